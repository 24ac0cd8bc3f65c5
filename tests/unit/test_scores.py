"""Tables of scores: the forms that they may have, and every way in which they may be wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from agglom import scores
from agglom.data import manifest as manifests
from agglom.errors import DataError
from agglom.job import Data

LABELS = ("sick", "hurt")
MANIFEST = """\
image,patient,split,sick,hurt
a/1.png,p1,train,1,0
a/2.png,p2,val,0,1
a/3.png,p3,val,1,0
a/4.png,p4,test,1,
a/5.png,p5,test,0,1
b/5.png,p6,test,1,0
b/6.png,p6,test,0,0
"""
HELD = ("a/2.png", "a/3.png", "a/4.png", "a/5.png", "b/5.png", "b/6.png")


def score(image, predictor, label):
    return round(0.05 + (31 * sum(map(ord, image + predictor + label)) % 90) / 100, 2)


def long_rows(images=HELD, predictors=("x", "y"), labels=LABELS):
    cells = [(i, p, k) for i in images for p in predictors for k in labels if (i, k) != ("a/4.png", "hurt")]
    return [{"image": i, "predictor": p, "label": k, "score": score(i, p, k)} for i, p, k in cells]


def wide_rows(images=HELD, predictors=("x", "y"), labels=LABELS):
    return [
        {"image": i}
        | {f"{p}:{k}": None if (i, k) == ("a/4.png", "hurt") else score(i, p, k) for p in predictors for k in labels}
        for i in images
    ]


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


class Lab:
    def __init__(self, folder):
        self.folder = folder
        (folder / "m.csv").write_text(MANIFEST)

    def manifest(self, labels=LABELS):
        data = Data(manifest="m.csv", labels=labels)
        return manifests.load(data, self.folder, check_files=False, needed=())

    def write(self, rows, suffix="csv"):
        path = self.folder / f"scores.{suffix}"
        table = pa.Table.from_pylist(rows)
        if suffix == "csv":
            csv.write_csv(table, path)
        else:
            pq.write_table(table, path)
        return path

    def load(self, rows, suffix="csv", labels=LABELS):
        return scores.load(self.write(rows, suffix), self.manifest(labels), labels)

    def problems(self, rows, suffix="csv", labels=LABELS):
        with pytest.raises(DataError) as caught:
            self.load(rows, suffix, labels)
        return str(caught.value)


def same(a, b):
    for name in ("predictors", "readouts", "labels"):
        assert getattr(a, name) == getattr(b, name)
    np.testing.assert_array_equal(a.rows_N, b.rows_N)
    np.testing.assert_array_equal(a.score_PNL, b.score_PNL)


# ── What is read ──


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("form", [long_rows, wide_rows])
def test_all_forms_say_the_same(lab, form, suffix):
    found = lab.load(form(), suffix)
    assert (found.predictors, found.readouts, found.labels) == (("x", "y"), ("scores", "scores"), LABELS)
    assert found.rows_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.score_PNL.dtype == np.float64
    for p, predictor in enumerate("xy"):
        for column, label in enumerate(LABELS):
            expected = [score(image, predictor, label) for image in HELD]
            if label == "hurt":
                expected[2] = np.nan
            np.testing.assert_array_equal(found.score_PNL[p, :, column], expected)
            np.testing.assert_array_equal(found.of("scores", label)[predictor], expected)
    assert found.notes == ()


def test_the_order_of_rows_says_nothing(lab):
    rows = long_rows()
    same(lab.load(rows[:1] + rows[:0:-1]), lab.load(rows))


@pytest.mark.parametrize("rows", [[{"image": i, "x": score(i, "x", "")} for i in HELD], None])
def test_one_label_need_not_be_named(lab, rows):
    rows = rows or [{"image": i, "predictor": "x", "score": score(i, "x", "")} for i in HELD]
    found = lab.load(rows, labels=("sick",))
    assert (found.predictors, found.labels) == (("x",), ("sick",))
    assert found.score_PNL.shape == (1, 6, 1)


def test_images_go_by_file_name_where_that_is_enough(lab):
    rows = long_rows()
    for row in rows:
        if not row["image"].endswith("5.png"):
            row["image"] = "/elsewhere/" + row["image"].split("/")[1]
    same(lab.load(rows), lab.load(long_rows()))


def test_readouts_are_series_of_their_own(lab):
    rows = [row | {"readout": readout, "score": row["score"] / k} for k, readout in ((1, "linear"), (2, "knn"))
            for row in long_rows()]  # fmt: skip
    found = lab.load(rows)
    assert list(zip(found.predictors, found.readouts, strict=True)) == [
        ("x", "linear"),
        ("y", "linear"),
        ("x", "knn"),
        ("y", "knn"),
    ]
    np.testing.assert_allclose(found.of("knn", "sick")["y"], found.of("linear", "sick")["y"] / 2)


def test_validation_may_be_left_out(lab):
    assert lab.load(long_rows(HELD[2:])).rows_N.tolist() == [3, 4, 5, 6]


def test_what_is_not_evaluated_is_said(lab):
    rows = long_rows((*HELD, "a/1.png"), labels=("hurt",))
    rows.append({"image": "a/4.png", "predictor": "x", "label": "hurt", "score": 0.5})
    found = lab.load(rows)
    assert found.rows_N.tolist() == [1, 2, 4, 5, 6]
    assert found.notes == (
        "Not scored, hence not evaluated: sick.",
        "Scored images that are of train, hence are not evaluated: 1.",
        "Scored images that have no known label, hence are not evaluated: 1.",
    )


def test_what_is_written_is_read(lab):
    found = lab.load(long_rows())
    path = lab.folder / "deep" / "s.scores.parquet"
    scores.write(path, found, lab.manifest())
    same(scores.load(path, lab.manifest(), LABELS), found)
    table = pq.read_table(path)
    assert table.column_names == ["image", "predictor", "label", "readout", "score", "split"]
    assert table.num_rows == len(long_rows())
    of_split = {row["image"]: row["split"] for row in table.to_pylist()}
    assert of_split == dict.fromkeys(HELD[:2], "val") | dict.fromkeys(HELD[2:], "test")
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_is_a_message(lab):
    (lab.folder / "file").touch()
    with pytest.raises(DataError, match=r"file/s\.parquet: cannot be written"):
        scores.write(lab.folder / "file" / "s.parquet", lab.load(long_rows()), lab.manifest())


def test_imports_are_light():
    command = "import sys, agglom.scores; print(*sorted({'torch', 'pandas', 'sklearn'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ── What is refused ──


def put(rows, index, **cells):
    rows[index] = rows[index] | cells
    return rows


def without(rows, **cells):
    return [row for row in rows if not all(row[key] == value for key, value in cells.items())]


WRONG = {
    "logit": (
        put(long_rows(), 3, score=2.5),
        [
            "scores outside [0, 1]: 1 score. Give probabilities: a sigmoid is not applied",
            "line 5: 'a/2.png', predictor 'y'",
        ],
    ),
    "negative": (put(long_rows(), 0, score=-0.1), ["line 2: 'a/2.png', predictor 'x', label 'sick': -0.1"]),
    "infinite": (put(long_rows(), 0, score=np.inf), ["scores outside [0, 1]: 1 score", ": inf"]),
    "NaN": (put(long_rows(), 0, score=np.nan), ["scores that are NaN: 1 score"]),
    "text": (
        [row | {"score": "high" if i == 2 else str(row["score"])} for i, row in enumerate(long_rows())],
        ["scores that are no numbers: 1 row. Write a number", "line 4: 'high'"],
    ),
    "empty score": (put(long_rows(), 0, score=None), ["empty score cells: 1 row", "line 2: 'a/2.png'"]),
    "empty predictor": (put(long_rows(), 0, predictor=None), ["empty predictor cells: 1 row"]),
    "stranger": (
        [*long_rows(), {"image": "z.png", "predictor": "x", "label": "sick", "score": 0.5}],
        ["images that are not in the manifest: 1 image", "line 24: 'z.png'", "m.csv does"],
    ),
    "name of several": (
        [row | {"image": row["image"].split("/")[1]} for row in long_rows()],
        ["file names that several images have: 1 image", "'5.png'"],
    ),
    "not scored": (
        long_rows(HELD[:4]),
        [
            "images of the manifest without a score: 4 scores",
            "'b/5.png' (test), label 'sick'",
            "drop them from the manifest",
        ],
    ),
    "half of validation": (long_rows(HELD[1:]), ["without a score: 2 scores", "'a/2.png' (val), label 'hurt'"]),
    "duplicate": (
        [*long_rows(), long_rows()[0]],
        ["duplicate rows: 1 score", "line 24: 'a/2.png', predictor 'x', label 'sick', is also in line 2"],
    ),
    "other rows": (
        without(long_rows(), image="a/5.png", predictor="y"),
        ["predictors on different images: 2 scores", "'a/5.png' has none of predictor 'y', label 'sick'"],
    ),
    "pair": (
        without(long_rows(), label="hurt", predictor="y"),
        ["predictor 'y', label 'hurt': no score at all. Score all predictors for all labels"],
    ),
    "unknown label": (
        [row | {"label": row["label"].replace("hurt", "hrt")} for row in long_rows()],
        ["unknown label 'hrt': 10 scores; did you mean 'hurt'? Labels of the manifest: sick, hurt"],
    ),
    "unnamed label": (
        [{"image": i, "x": 0.5} for i in HELD],
        ["the label is not named", "name the columns of a wide one predictor:label"],
    ),
    "wide, other columns": (
        [row | {"predicter": "x"} for row in wide_rows()],
        ["scores that are no numbers in column 'predicter': 6 rows", "did you mean 'predictor'?"],
    ),
    "wide, no label": (
        [{"image": i, "x:": 0.5} for i in HELD],
        ["column 'x:' is not named predictor or predictor:label"],
    ),
    "wide, gap": (put(wide_rows(), 4, **{"y:sick": None}), ["'b/5.png' has none of predictor 'y', label 'sick'"]),
    "no image": (
        [{"imag": "a/4.png", "predictor": "x", "label": "sick", "score": 0.5}],
        ["missing column 'image' (a long table holds image, predictor, label and score); did you mean 'imag'?"],
    ),
    "no score": (
        [{"image": "a/4.png", "predictor": "x", "label": "sick", "scor": 0.5}],
        ["missing column 'score'", "did you mean 'scor'? The file has: image, predictor, label, scor"],
    ),
    "no predictor": ([{"image": i} for i in HELD], ["no predictor: image is the only column"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tables(lab, name):
    rows, parts = WRONG[name]
    message = lab.problems(rows)
    assert message.startswith(f"{lab.folder / 'scores.csv'}: ")
    for part in parts:
        assert part in message


def test_every_problem_at_once(lab):
    """Those of the file's cells in one message; what they hide is told once they are mended."""
    rows = put(put(long_rows(), 0, score=7), 1, label="hurts")
    message = lab.problems([*rows, {"image": "z.png", "predictor": "x", "label": "sick", "score": np.nan}])
    assert message.count("\n  ") - message.count("\n    ") == 4
    for kind in ("outside [0, 1]", "NaN", "unknown label 'hurts'", "not in the manifest"):
        assert kind in message
    message = lab.problems([*without(long_rows(HELD[:5]), image="a/5.png", predictor="y"), long_rows()[0]])
    for kind in ("duplicate rows: 1", "without a score: 2", "different images: 2"):
        assert kind in message


def test_five_rows_and_the_count(lab):
    message = lab.problems([row | {"score": 3.0} for row in long_rows()])
    assert "scores outside [0, 1]: 22 scores" in message
    assert message.count("predictor '") == 5
    assert message.rstrip().endswith("…")


def test_rows_of_parquet_are_counted_from_one(lab):
    message = lab.problems(put(long_rows(), 3, score=2.5), "parquet")
    assert "data rows counted from 1" in message
    assert "row 4: 'a/2.png', predictor 'y', label 'hurt': 2.5" in message


def test_no_label_with_both_classes(lab):
    """A label that never occurs is a status of its rows; where all are so, nothing is left."""
    text = MANIFEST.replace(",1,\n", ",0,\n").replace("p6,test,1,0", "p6,test,0,0")
    (lab.folder / "m.csv").write_text(text)
    lab.load(long_rows())
    assert "no label has both a 0 and a 1" in lab.problems(long_rows(labels=("sick",)), labels=("sick",))


def test_nothing_to_evaluate(lab):
    (lab.folder / "m.csv").write_text(MANIFEST.replace("test", "train").replace("val", "train"))
    assert "has no row of test or of val with a known label" in lab.problems(long_rows())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the table of scores does not exist"),
        (b"", "the table of scores is empty"),
        (b"image,predictor,label,score\n", "has columns but no rows"),
        (b"PAR1 nothing", "not a readable Parquet file"),
        (b"image,x\na.png\n", "wrong number of cells"),
        (b"image,x,x\na,1,1\n", "column 'x' appears 2 times"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "s.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        scores.read(path)


def test_a_class_may_hold_a_colon(lab):
    """A wide column is parted at the first one."""
    text = MANIFEST.replace("sick,hurt", "sick,kind").replace(",0,1\n", ",0,x: y\n").replace(",1,0\n", ",1,z\n")
    (lab.folder / "m.csv").write_text(text.replace(",0,0\n", ",0,z\n"))
    data = Data(manifest="m.csv", labels=("kind=x: y",))
    manifest = manifests.load(data, lab.folder, check_files=False)
    table = pa.table({"image": list(HELD), "net:kind=x: y": [0.1, 0.2, None, 0.4, 0.5, 0.6]})
    pq.write_table(table, lab.folder / "s.parquet")
    found = scores.load(lab.folder / "s.parquet", manifest, data.labels)
    assert (found.predictors, found.labels) == (("net",), ("kind=x: y",))
