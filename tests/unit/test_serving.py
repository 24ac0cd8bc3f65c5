"""Where a specialist is judged: in groups of which it serves every image, and nowhere else."""

import numpy as np
import pytest

from agglom.data import manifest as manifests
from agglom.job import Attribute, Data
from agglom.serving import Serving


@pytest.fixture
def manifest(tmp_path):
    cells = [("F", "AP", 30), ("F", "PA", 60), ("M", "AP", 60), ("F", "", 60), ("", "AP", 30), ("M", "PA", 70)]
    lines = [f"{i}.png,{i},test,{sex},{view},{age}" for i, (sex, view, age) in enumerate(cells)]
    (tmp_path / "m.csv").write_text("\n".join(["image,patient,split,sex,view,age", *lines]))
    attributes = {"sex": Attribute(), "view": Attribute(), "age": Attribute(kind="continuous", bins=(50, 65))}
    data = Data(manifest="m.csv", attributes=attributes)
    return manifests.load(data, tmp_path, check_files=False, needed=())


@pytest.mark.parametrize(
    ("name", "groups", "rows"),
    [
        ("sex", ["F"], [0, 1, 3]),
        ("sex", ["M", "F"], [0, 1, 2, 3, 5]),
        ("sex*view", ["F|AP", "M|PA"], [0, 5]),
        ("age", ["<50", ">=65"], [0, 4, 5]),
    ],
)
def test_rows_among_some_groups(manifest, name, groups, rows):
    np.testing.assert_array_equal(np.flatnonzero(manifest.among(name, groups)), rows)


def test_it_is_judged_where_it_serves_everybody(manifest):
    serving = Serving.of(manifest, {"serves": {"teacher/women": ["sex", ["F"]], "teacher/old": ["age", [">=65"]]}})
    places = [("", "all"), ("sex", "F"), ("sex", "M"), ("sex", "all"), ("view", "AP"), ("age", ">=65"), ("age", "65")]
    places += [("sex*view", "F|PA"), ("sex*view", "M|PA"), ("sex*age", "F|50-65"), ("sex*age", "M|>=65")]

    def where(predictor):
        return [place for place in places if serving.judged(predictor, place)]

    assert where("student") == where("teacher/one") == where("student - teacher/one") == places
    women, old = ("sex", "F"), ("age", ">=65")
    assert where("teacher/women") == [women, ("sex*view", "F|PA"), ("sex*age", "F|50-65")]
    assert where("student - teacher/women") == where("teacher/women")
    assert where("teacher/old") == [old, ("sex*view", "M|PA"), ("sex*age", "M|>=65")]
    assert where("teacher/old - teacher/women") == []


def test_without_specialists_everybody_is_judged_everywhere(manifest):
    assert Serving.of(manifest, {}).judged("teacher/one - teacher/two", ("sex", "F"))
