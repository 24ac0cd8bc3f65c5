"""What a report draws: against scikit-learn, and from the lines of a journal."""

import json

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score, roc_curve

from agglom import curves
from agglom.data import manifest as manifests
from agglom.job import Attribute, Data
from agglom.samples import Settings
from agglom.scores import Scores

SETTINGS = Settings(min_patients=5, replicates=50, permutations=0, seed=0)


@pytest.fixture
def drawn(tmp_path):
    """Labels, scores and groups of 400 images, and what is drawn of them."""
    draw = np.random.default_rng(0)
    sick, sex = draw.random(400) < 0.4, draw.choice(["F", "M", "X"], 400, p=[0.5, 0.49, 0.01])
    sick[sex == "X"] = False
    score = 1 / (1 + np.exp(-(draw.normal(size=400) + 1.5 * sick - 1)))
    score = score.round(2).clip(0.01, 0.99) - 0.003  # ties, and none at the edge of a bin
    lines = [f"{i}.png,{i},{int(sick[i])},{sex[i]}" for i in range(400)]
    (tmp_path / "m.csv").write_text("\n".join(["image,patient,sick,sex", *lines]))
    data = Data(manifest="m.csv", split=None, labels=("sick",), attributes={"sex": Attribute()}, groups=("sex",))
    manifest = manifests.load(data, tmp_path, check_files=False, needed=())
    found = Scores(("net",), ("scores",), ("sick",), np.arange(400), score[None, :, None])
    return sick, score, sex, curves.of_scores(found, manifest, data.groups, SETTINGS)


def test_points_of_the_roc_lie_on_that_of_scikit_learn(drawn):
    sick, score, sex, found = drawn
    assert [(one["attribute"], one["group"]) for one in found] == [("", "all"), ("sex", "F"), ("sex", "M")]
    for one in found:
        mine = np.ones(400, bool) if one["group"] == "all" else sex == one["group"]
        fpr, tpr, _ = roc_curve(sick[mine], score[mine], drop_intermediate=False)
        points = set(zip(fpr.round(5), tpr.round(5), strict=True))
        shown = list(zip(one["roc"]["fpr"], one["roc"]["tpr"], strict=True))
        assert set(shown) <= points
        assert (shown[0], shown[-1], len(shown) <= curves.POINTS) == ((0, 0), (1, 1), True)
        area = np.trapezoid(one["roc"]["tpr"], one["roc"]["fpr"])
        assert area == pytest.approx(roc_auc_score(sick[mine], score[mine]), abs=0.005)


def test_calibration_is_that_of_scikit_learn(drawn):
    sick, score, _, (everybody, *_) = drawn
    rate, mean = calibration_curve(sick, score, n_bins=10)
    table = everybody["calibration"]
    assert [one["rate"] for one in table] == pytest.approx(rate, abs=1e-5)
    assert [one["score"] for one in table] == pytest.approx(mean, abs=1e-5)
    assert all(one["lo"] <= one["rate"] <= one["hi"] for one in table)
    assert sum(one["n"] for one in table) == 400


def test_a_weight_that_was_not_known_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": i, "stage": "full", "weight/a/F": known, "weight/b/F": None} for i, known in ((1, None), (2, 3.0))
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = curves.of_weights(path, "sex", ["full"])
    assert found["stages"] == [{"stage": "full", "weight": [[3.0, None]]}]
    assert found["path"]["weight"] == [[None], [3.0]]


def test_weights_of_a_journal(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 10 * i, "stage": stage, "loss": 1.0, "weight/a/F|AP": 1.0 + i, "weight/a/M|AP": 0.5}
        | ({"weight/b/F|AP": 3.0, "weight/b/M|AP": 1.0} if stage == "full" else {})
        for i, stage in enumerate(["warm", "warm", "full"], 1)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = curves.of_weights(path, "sex*view", ["warm", "full"])
    assert (found["teachers"], found["groups"], found["attribute"]) == (["a", "b"], ["F|AP", "M|AP"], "sex*view")
    assert found["stages"] == [
        {"stage": "warm", "weight": [[2.5, None], [0.5, None]]},
        {"stage": "full", "weight": [[4.0, 3.0], [0.5, 1.0]]},
    ]
    assert found["path"] == {"step": [10, 20, 30], "weight": [[2.0, 0.5], [3.0, 0.5], [3.5, 0.75]]}
    assert curves.of_weights(path, "sex*view", ["warm"])["path"]["step"] == [10, 20]
    assert curves.of_weights(path, None, ["warm"]) is None
    assert curves.of_weights(path, "sex", ["never"]) is None
    assert curves.of_weights(tmp_path / "absent", "sex", ["warm"]) is None
