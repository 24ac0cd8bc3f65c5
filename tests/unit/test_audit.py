"""From scores to rows: against scikit-learn, fairlearn and the pure functions that it is made of."""

import math
import time
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from agglom import audit, probes, report
from agglom.audit import Settings
from agglom.core import disparity, metrics, resample
from agglom.core.metrics import METRICS, THRESHOLDED
from agglom.data import manifest as manifests
from agglom.errors import DataError
from agglom.job import Attribute, Data
from agglom.scores import Scores

SETTINGS = Settings(min_patients=5, replicates=50, permutations=20, seed=0)
DATA = Data(
    manifest="m.csv",
    labels=("sick",),
    attributes={
        "sex": Attribute(),
        "age": Attribute(kind="continuous", bins=(40, 60)),
        "race": Attribute(separator=";"),
    },
    groups=("sex", "age", "race", "sex*race"),
)
RACES = ("A", "B", "A;B", "", "unknown")


class World:
    """A manifest of val and test, two images a patient, and scores of three predictors on it."""

    def __init__(self, folder, n=600, skill=(("student", 1.6), ("teacher/a", 1.0), ("teacher/b", 1.6)), data=DATA):
        rng = np.random.default_rng(1)
        patient, half = np.arange(n) // 2, n // 2
        self.sick = rng.random(n) < 0.4
        self.sex = np.where(rng.random(n // 2) < 0.3, "F", "M")[patient]
        self.race = rng.choice(RACES, n // 2)[patient]
        self.age = rng.integers(20, 90, n // 2)[patient]
        split = np.where(np.arange(n) < half, "val", "test")
        cells = zip(patient, split, self.sick.astype(int), self.sex, self.age, self.race, strict=True)
        lines = [",".join(map(str, (f"{i}.png", *row))) for i, row in enumerate(cells)]
        (folder / "m.csv").write_text("\n".join(["image,patient,split,sick,sex,age,race", *lines]))
        self.manifest = manifests.load(data, folder, check_files=False, needed=())
        self.val, self.test = split == "val", split == "test"
        weaker = np.where(self.sex == "F", 0.6, 1.0)
        score_PN = [1 / (1 + np.exp(-(rng.standard_normal(n) + weaker * d * (self.sick - 0.5)))) for _, d in skill]
        self.score = {name: one for (name, _), one in zip(skill, score_PN, strict=True)}
        self.found = self.scores()

    def scores(self, readout="scores", rows=None):
        rows = np.arange(len(self.sick)) if rows is None else np.flatnonzero(rows)
        names = tuple(self.score)
        score_PNL = np.stack([self.score[name][rows] for name in names])[..., None]
        return Scores(names, (readout,) * len(names), ("sick",), rows, score_PNL)

    def rows(self, found=None, settings=SETTINGS, groups=DATA.groups, notes=None):
        notes = [] if notes is None else notes
        return list(audit.rows(found or self.found, self.manifest, groups, settings, notes))

    def cut(self, name, mask=True):
        mine = self.val & mask
        return probes.youden(self.score[name][mine], self.sick[mine].astype(float))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rows(world):
    return world.rows()


def select(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def one(rows, **wanted):
    wanted = {"split": "test", "predictor": "student"} | wanted
    if wanted["metric"] in THRESHOLDED:
        wanted = {"rule": "global"} | wanted
    (row,) = select(rows, **wanted)
    return row


def masks(world, attribute):
    """Written without the code under test."""
    races = [set(cell.split(";")) - {"", "unknown"} for cell in world.race]
    ages = np.select([world.age < 40, world.age < 60], ["<40", "40-60"], ">=60")
    simple = {
        "sex": {value: world.sex == value for value in "FM"},
        "age": {value: ages == value for value in ("<40", "40-60", ">=60")},
        "race": {value: np.array([value in several for several in races]) for value in "AB"},
    }
    if "*" not in attribute:
        return simple[attribute]
    a, b = attribute.split("*")
    return {f"{x}|{y}": simple[a][x] & simple[b][y] for x in simple[a] for y in simple[b]}


SKLEARN = {
    "auroc": lambda y, p, c: sk.roc_auc_score(y, p),
    "auprc": lambda y, p, c: sk.average_precision_score(y, p),
    "accuracy": lambda y, p, c: sk.accuracy_score(y, c),
    "balanced_accuracy": lambda y, p, c: sk.balanced_accuracy_score(y, c),
    "f1": lambda y, p, c: sk.f1_score(y, c),
    "tpr": lambda y, p, c: sk.recall_score(y, c),
    "fpr": lambda y, p, c: 1 - sk.recall_score(~y, ~c),
    "ppv": lambda y, p, c: sk.precision_score(y, c),
    "npv": lambda y, p, c: sk.precision_score(~y, ~c),
    "selection_rate": lambda y, p, c: c.mean(),
    "brier": lambda y, p, c: sk.brier_score_loss(y, p),
}


@pytest.mark.parametrize("attribute", ["", *DATA.groups])
@pytest.mark.parametrize("name", ["student", "teacher/a"])
def test_values_are_those_of_scikit_learn(world, rows, name, attribute):
    """In every group, those of overlapping ones too, at the threshold of Youden on all validation images."""
    groups = masks(world, attribute) if attribute else {"all": np.ones(600, bool)}
    cut = world.cut(name)
    for metric in METRICS:
        found = [row for row in select(rows, predictor=name, metric=metric, attribute=attribute, split="test")
                 if row["rule"] != "group"]  # fmt: skip
        assert [row["group"] for row in found] == list(groups)
        for row in found:
            mine = world.test & groups[row["group"]]
            y, p = world.sick[mine], world.score[name][mine]
            counts = len(y), y.sum(), (~y).sum(), len({i // 2 for i in np.flatnonzero(mine)})
            assert (row["n"], row["n_pos"], row["n_neg"], row["n_patients"]) == counts
            assert (row["threshold"] == cut, row["rule"]) == (
                (True, "global") if metric in THRESHOLDED else (False, "")
            )
            if metric in SKLEARN:
                assert row["value"] == pytest.approx(SKLEARN[metric](y, p, p >= cut))
                assert row["lo"] <= row["value"] <= row["hi"]


def test_summaries_are_those_of_fairlearn(world, rows):
    from fairlearn import metrics as fair

    y, p, sex = (values[world.test] for values in (world.sick, world.score["student"], world.sex))
    chosen = p >= world.cut("student")
    frame = fair.MetricFrame(
        metrics={"tpr": fair.true_positive_rate, "fpr": fair.false_positive_rate, "accuracy": sk.accuracy_score,
                 "selection_rate": fair.selection_rate},
        y_true=y, y_pred=chosen, sensitive_features=sex,
    )  # fmt: skip
    place = {"attribute": "sex", "group": "all"}
    for metric in ("tpr", "fpr", "accuracy", "selection_rate"):
        assert one(rows, metric=f"{metric}_gap", **place)["value"] == pytest.approx(frame.difference()[metric])
        assert one(rows, metric=f"{metric}_ratio", **place)["value"] == pytest.approx(frame.ratio()[metric])
        to_overall = frame.difference("to_overall")[metric]
        assert one(rows, metric=f"{metric}_gap_to_overall", **place)["value"] == pytest.approx(to_overall)
    for metric, better in (("tpr", "min"), ("accuracy", "min"), ("fpr", "max")):
        expected = getattr(frame, f"group_{better}")()[metric]
        assert one(rows, metric=f"{metric}_worst", **place)["value"] == pytest.approx(expected)
    for metric in ("demographic_parity_difference", "equal_opportunity_difference", "equalized_odds_difference"):
        expected = getattr(fair, metric)(y, chosen, sensitive_features=sex)
        assert one(rows, metric=metric, rule="global", **place)["value"] == pytest.approx(expected)
    assert not select(rows, metric="selection_rate_worst")


def test_both_forms_of_es_auroc(world, rows):
    mine = world.test
    overall = sk.roc_auc_score(world.sick[mine], world.score["student"][mine])
    groups = [sk.roc_auc_score(world.sick[mine & mask], world.score["student"][mine & mask])
              for mask in masks(world, "race").values()]  # fmt: skip
    place = {"attribute": "race", "group": "all"}
    expected = overall / (1 + sum(abs(value - overall) for value in groups))
    assert one(rows, metric="auroc_es", **place)["value"] == pytest.approx(expected)
    assert one(rows, metric="auroc_es_std", **place)["value"] == pytest.approx(overall / (1 + np.std(groups)))


def test_summaries_of_every_metric_and_attribute(rows):
    for attribute in DATA.groups:
        for metric in set(audit.SUMMARISED) & set(METRICS):
            for summary in ("gap", "ratio", "gap_to_overall", *(() if metric == "selection_rate" else ("worst",))):
                row = one(rows, metric=f"{metric}_{summary}", attribute=attribute)
                assert row["group"] == "all"
                assert row["lo"] <= row["value"] <= row["hi"]
    assert {row["group"] for row in rows if row["attribute"] == ""} == {"all"}


def test_a_gap_names_its_groups_and_those_left_out(world, rows):
    assert one(rows, metric="auroc_gap", attribute="sex")["note"] == "M − F"
    row = one(world.rows(settings=Settings(40, 50, 0, 0), groups=("sex",)), metric="auroc_gap")
    assert (row["value"], row["status"]) == (pytest.approx(math.nan, nan_ok=True), "below_min_pos")
    share = (world.sex == "F")[world.test].mean()
    assert row["note"] == f"left out: F (below_min_pos, {share:.0%} of the images)"


def columns(world, name="student"):
    mine = world.test
    patient = torch.arange(600)[mine] // 2
    return torch.tensor(world.sick[mine]).double(), torch.tensor(world.score[name][mine]), patient


def test_the_null_of_a_gap(world, rows):
    y, p, patient = columns(world)
    sex = torch.tensor((world.sex == "M")[world.test]).long()
    for metric in audit.NULLED:
        cut = math.nan if metric == "auroc" else world.cut("student")
        settings = {"threshold": cut, "permutations": 20, "seed": 0}
        null = resample.permutation_null(metric, y, p, patient, sex, 2, **settings)
        row = one(rows, metric=f"{metric}_gap", attribute="sex")
        assert row["p_value"] == pytest.approx(null.p_value)
        assert row["corrected"] == pytest.approx(max(0, row["value"] - null.bias))
        level = metrics.simultaneous(0.95, 2)
        wide = metrics.evaluate_groups(metric, y, p, patient, sex, 2, threshold=cut, level=level, min_patients=5)
        assert row["detectable"] == pytest.approx(disparity.detectable(wide))
        assert row["null_hi"] > 0


def test_the_null_of_groups_that_overlap(rows):
    row = one(rows, metric="auroc_gap", attribute="race")
    assert 0 < row["p_value"] <= 1
    assert row["corrected"] <= row["value"]


def test_without_permutations_there_is_no_null(world):
    row = one(world.rows(settings=Settings(5, 50, 0, 0), groups=("sex",)), metric="auroc_gap")
    assert (row["p_value"], row["null_hi"], row["corrected"]) == (None, None, None)
    assert row["detectable"] > 0


def test_unknown_patients_assigned_at_worst(world, rows):
    """Race has both overlapping groups and unknown ones; the bounds of the groups set those of the gap."""
    bounds = []
    unknown = np.isin(world.race, ("", "unknown"))
    for group, mask in masks(world, "race").items():
        row = one(rows, metric="tpr", attribute="race", group=group)
        called = world.score["student"] >= world.cut("student")
        hit, all_of = (called & world.sick & world.test), (world.sick & world.test)
        join = (hit & unknown).sum(), (all_of & unknown & ~called).sum()
        low = (hit & mask).sum() / ((all_of & mask).sum() + join[1])
        high = ((hit & mask).sum() + join[0]) / ((all_of & mask).sum() + join[0])
        assert (row["unknown_lo"], row["unknown_hi"]) == (pytest.approx(low), pytest.approx(high))
        bounds.append((low, high))
    row = one(rows, metric="tpr_gap", attribute="race")
    assert row["unknown_hi"] == pytest.approx(max(b for _, b in bounds) - min(a for a, _ in bounds))
    assert row["unknown_lo"] <= row["value"] <= row["unknown_hi"]
    row = one(rows, metric="auroc", attribute="race", group="A")
    assert row["unknown_lo"] < row["value"] < row["unknown_hi"]


def test_bounds_where_there_is_something_unknown_only(rows):
    for row in rows:
        known = row["attribute"] in ("", "sex", "age") or row["split"] == "val" or "ece" in row["metric"]
        assert not known or row["unknown_lo"] is None


def test_thresholds_of_groups(world, rows):
    found = select(rows, rule="group")
    assert {row["split"] for row in found} == {"test"}
    assert {row["metric"] for row in found} == THRESHOLDED
    for group, mask in masks(world, "sex").items():
        cut = world.cut("student", mask)
        (row,) = select(found, predictor="student", metric="tpr", attribute="sex", group=group)
        mine = world.test & mask & world.sick
        assert row["threshold"] == cut
        assert row["value"] == pytest.approx((world.score["student"][mine] >= cut).mean())


# ── Differences ──


def test_pairs():
    teachers = ["teacher/a", "teacher/b"]
    assert audit.pairs(["student", *teachers, "ensemble"]) == [("student", name) for name in teachers]
    assert audit.pairs([*teachers, "ensemble"]) == []
    assert audit.pairs(["x", "student", "y"]) == [("student", "x"), ("student", "y")]
    assert audit.pairs(["x", "y", "z"]) == [("y", "x"), ("z", "x")]
    assert audit.pairs(["x"]) == []


def test_differences_are_paired(world, rows):
    y, a, patient = columns(world)
    b = columns(world, "teacher/a")[1]
    assert not select(rows, predictor="student - teacher/a", metric="ece_debiased")
    for metric in set(METRICS) - {"ece_debiased"}:
        cuts = {"threshold_a": world.cut("student"), "threshold_b": world.cut("teacher/a")}
        cuts = cuts if metric in THRESHOLDED else {}
        settings = {"min_patients": 5, "replicates": 50, "seed": 0}
        expected = metrics.paired(metric, y, a, b, patient, **cuts, **settings)
        row = one(rows, predictor="student - teacher/a", metric=metric, attribute="")
        assert (row["value"], row["lo"], row["hi"]) == (expected.value, expected.lo, expected.hi)
        assert row["threshold"] is None


def test_p_values_agree_with_intervals(rows):
    found = [row for row in rows if " - " in row["predictor"] and not math.isnan(row["p_value"])]
    assert {row["metric"] for row in found} == {"auroc", *THRESHOLDED}
    assert {row["split"] for row in found} == {"test"}
    for row in found:
        assert 0 < row["p_value"] <= row["p_holm"] <= 1
        assert (row["p_value"] < 0.05) == (row["lo"] > 0 or row["hi"] < 0)


def test_holm_over_the_groups_of_an_attribute(rows):
    for metric in ("auroc", "tpr"):
        found = select(rows, predictor="student - teacher/a", metric=metric, split="test", attribute="sex")
        first, second = sorted(found, key=lambda row: row["p_value"])
        assert first["p_holm"] == pytest.approx(min(1, 2 * first["p_value"]))
        assert second["p_holm"] == pytest.approx(max(first["p_holm"], second["p_value"]))


def test_the_interval_at_one_minus_p_ends_at_0(world, rows):
    y, a, patient = columns(world)
    b = columns(world, "teacher/a")[1]
    row = one(rows, predictor="student - teacher/a", metric="auroc", attribute="")
    found = metrics.paired("auroc", y, a, b, patient, level=1 - row["p_value"], min_patients=5)
    assert row["value"] > 0
    assert found.lo == pytest.approx(0, abs=1e-4)


def test_predictors_that_are_equal_have_p_1(world):
    world_scores = world.scores()
    score_PNL = np.stack([world_scores.score_PNL[0]] * 3)
    found = Scores(world_scores.predictors, world_scores.readouts, ("sick",), world_scores.rows_N, score_PNL)
    row = one(world.rows(found, groups=()), predictor="student - teacher/b", metric="auroc")
    assert (row["value"], row["p_value"], row["p_holm"]) == (0, 1, 1)


# ── The curve over age ──


def test_the_curve(world, rows):
    found = select(rows, metric="auroc_curve", predictor="student")
    assert {(row["attribute"], row["split"]) for row in found} == {("age", "test")}
    centres = [float(row["group"]) for row in found]
    assert centres == sorted(set(centres))
    assert len(centres) >= 7
    for row in found:
        low, high = (float(end) for end in row["note"].removeprefix("from ").split(" to "))
        mine = world.test & (world.age >= low) & (world.age <= high)
        assert low <= float(row["group"]) <= high
        assert row["n"] == mine.sum()
        assert row["n_patients"] >= 0.2 * 150
        assert row["value"] == pytest.approx(sk.roc_auc_score(world.sick[mine], world.score["student"][mine]))


def test_a_window_holds_enough_patients_of_each_class(world, rows):
    found = select(world.rows(settings=Settings(30, 50, 0, 0), groups=("age",)), metric="auroc_curve")
    assert {row["status"] for row in found} == {"ok"}
    assert sum(row["n"] for row in found) > sum(row["n"] for row in select(rows, metric="auroc_curve"))


# ── What there may be less of ──


def test_another_readout_gets_auroc_alone(world):
    found = world.rows(world.scores("knn"))
    assert {row["metric"].split("_")[0] for row in found} == {"auroc"}
    assert {row["readout"] for row in found} == {"knn"}
    assert all(row["p_value"] is None or math.isnan(row["p_value"]) for row in found)


def test_without_validation_thresholds_are_a_half(world):
    notes = []
    found = world.rows(world.scores(rows=world.test), notes=notes, groups=("sex",))
    assert {row["threshold"] for row in found if row["rule"] == "global" and " - " not in row["predictor"]} == {0.5}
    assert notes == ["sick: no validation image is scored, so thresholds are .5."]
    mine = select(found, rule="group")
    assert {(row["threshold"], row["status"], row["note"]) for row in mine} == {
        (None, "single_class", "no threshold: no validation image is scored")
    }
    assert all(math.isnan(row["value"]) for row in mine)


def test_a_label_that_never_occurs_is_a_status(world, tmp_path):
    text = (world.manifest.path).read_text()
    (tmp_path / "m.csv").write_text(text.replace("test,1", "test,0"))
    manifest = manifests.load(DATA, tmp_path, check_files=False, needed=())
    found = list(audit.rows(world.found, manifest, ("sex",), SETTINGS, []))
    for metric in ("auroc", "tpr", "auroc_gap", "equalized_odds_difference"):
        for row in select(found, metric=metric, split="test", predictor="student"):
            assert (math.isnan(row["value"]), row["status"]) == (True, "single_class")


def test_rows_make_a_report(world, rows, tmp_path):
    about = audit.context(world.manifest, DATA, 0, ["a", "a", "b"])
    assert about["notes"] == ["a", "b"]
    made = report.GroupReport("report", [{"stage": "report", **row} for row in rows], about | {"index": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (path, *_) = report.write(made, tmp_path)
    assert report.load(path) == made
    assert all(tuple(row) == report.COLUMNS for row in made.rows)
    # Overlapping groups: a patient of A and B counts in both.
    support = {(g["group"], g["split"]): g["n_images"] for g in about["groups"] if g["attribute"] == "race"}
    for group, mask in masks(world, "race").items():
        assert support[group, "test"] == (mask & world.test).sum()
    assert support[None, "test"] == (np.isin(world.race, ("", "unknown")) & world.test).sum()


def test_the_demo_sized_report_takes_a_few_seconds(world):
    start = time.perf_counter()
    world.rows(settings=Settings(30, 500, 200, 0), groups=("sex",))
    assert time.perf_counter() - start < 15  # about 2 s on an idle core


# ── The schema that column names suggest ──


def test_guess(tmp_path):
    head = "image,subject_id,label,other,age,site,scanner,findings,empty,a*b,const"
    lines = [f"{i}.png,p{i},{i % 2},{i % 3},{20 + i},s{i % 3},{1 + i % 4},f{i},,x,1" for i in range(60)]
    path = tmp_path / "m.csv"
    path.write_text("\n".join([head, *lines]))
    schema, notes = audit.guess(path, [""])
    assert schema["patient"] == "subject_id"
    assert schema["split"] is None
    assert schema["labels"] == ["label"]
    assert schema["attributes"] == {
        "other": {},
        "age": {"kind": "continuous", "bins": [35.0, 50.0, 64.0]},
        "site": {},
        "scanner": {},
        "const": {},
    }
    assert schema["groups"] == list(schema["attributes"])
    assert notes == [
        "Column findings is not used: 60 distinct values.",
        "Column empty is not used: 0 distinct values.",
        "Column 'a*b' is not used: '*' and '|' write crossings.",
    ]
    assert audit.guess(path, ["other", "label"])[0]["labels"] == ["other", "label"]
    path.write_text("image,patient,ill\n0.png,p0,1\n")
    with pytest.raises(DataError, match=r"m\.csv: no column 'label'.*predictor:label"):
        audit.guess(path, [""])


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        (range(20, 91), [38.0, 55.0, 72.0]),
        (np.linspace(0, 1, 101), [0.25, 0.5, 0.75]),
        ([0.0] * 90 + list(range(1, 14)), [1.0]),
        (np.linspace(1e-4, 2e-4, 50), [1.25e-4, 1.5e-4, 1.75e-4]),
        (np.linspace(1e5, 1e6, 91), [320000.0, 550000.0, 780000.0]),
    ],
)
def test_edges_are_near_the_quartiles(values, edges):
    found = audit._edges(list(map(float, values)))
    assert found == sorted(set(found))
    assert all(min(values) < edge <= max(values) for edge in found)
    assert found == pytest.approx(edges, rel=0.05)
