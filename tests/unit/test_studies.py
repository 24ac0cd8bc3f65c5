"""Leakage, label scarcity and hold-out: against scikit-learn by hand, and never scored on who was fitted on."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from agglom import plugins, probes, studies, testing
from agglom.core import metrics
from agglom.core.types import Dims, Features
from agglom.data import manifest as manifests
from agglom.job import Attribute, Data, Evaluate
from agglom.report import COLUMNS
from agglom.samples import Settings

SETTINGS = Settings(min_patients=5, replicates=50, permutations=0, seed=0)
DATA = Data(
    manifest="m.csv",
    labels=("sick",),
    attributes={
        "sex": Attribute(),
        "age": Attribute(kind="continuous", bins=(40, 60)),
        "race": Attribute(separator=";"),
        "site": Attribute(),
    },
    groups=("sex*age", "sex", "race", "site"),
)
SPLITS = ("val", "test")


class World:
    """Two images a patient. Site c has no sick train patient, d no train patient, e no sick validation patient; the
    last patient is the only one of race "O", in test. One dimension tells the sex, one the sickness."""

    def __init__(self, folder, n=720):
        rng = np.random.default_rng(2)
        self.patient, p = np.arange(n) // 2, n // 2
        self.split = np.where(np.arange(p) < p / 2, "train", np.where(np.arange(p) < 0.7 * p, "val", "test"))
        sick, self.site = rng.random(p) < 0.4, rng.choice(list("aabbcde"), p)
        sick &= ~((self.site == "c") & (self.split == "train")) & ~((self.site == "e") & (self.split == "val"))
        self.site[(self.site == "d") & (self.split == "train")] = "a"
        sex, race = rng.choice(["F", "M"], p), rng.choice(["A", "B", "A;B", ""], p)
        race[-1] = "O"
        age = rng.integers(20, 90, p)
        columns = self.split, sick.astype(int), sex, age, race, self.site
        self.split, self.sick, self.sex, self.age, self.race, self.site = (one[self.patient] for one in columns)
        cells = zip(self.patient, self.split, self.sick, self.sex, self.age, self.race, self.site, strict=True)
        lines = [",".join(map(str, (f"{i}.png", *row))) for i, row in enumerate(cells)]
        (folder / "m.csv").write_text("\n".join(["image,patient,split,sick,sex,age,race,site", *lines]))
        self.manifest = manifests.load(DATA, folder, check_files=False)
        x = rng.standard_normal((n, 6))
        x[:, 0] += 1.2 * self.sick
        x[:, 1] += 1.5 * (self.sex == "F")
        x[:, 2] += 0.8 * (self.site == "b") * (2 * self.sick - 1)
        self.summary = torch.tensor(x, dtype=torch.float32)

    def rows(self, evaluate, summary=None, readouts=None, keep=None, settings=SETTINGS, data=DATA, fitted_on=()):
        summary, keep = (
            self.summary if summary is None else summary,
            np.arange(len(self.sick)) if keep is None else keep,
        )
        asked = {"student": summary[torch.as_tensor(keep)]}, self.manifest, keep, data, evaluate, settings
        return list(studies.rows(*asked, fitted_on, readouts or {}, {}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="module")
def leakage(world):
    return world.rows(Evaluate())


def pick(rows, **keys):
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def by_hand(x, label, train, val):
    """Logits of the logistic regression whose C has the least log-loss on validation, with scikit-learn's own parts."""
    scaler = StandardScaler().fit(x[train])
    x, found = scaler.transform(x), {}
    for strength in probes.STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000, tol=1e-6).fit(x[train], label[train])
        found[log_loss(label[val], model.predict_proba(x[val])[:, 1])] = model.decision_function(x)
    return found[min(found)]


# ── Leakage ──


def test_leakage_is_the_auroc_of_a_probe_by_hand(world, leakage):
    rows = pick(leakage, metric="leakage")
    x, of = world.summary.double().numpy(), {split: world.split == split for split in ("train", *SPLITS)}
    truths = {("sex", "F"): world.sex == "F", ("age", "40-60"): (world.age >= 40) & (world.age < 60)}
    truths |= {("site", "b"): world.site == "b"}
    for (attribute, group), truth in truths.items():
        logit = by_hand(x, truth, of["train"], of["val"])
        for split in SPLITS:
            (row,) = pick(rows, attribute=attribute, group=group, split=split)
            assert row["value"] == pytest.approx(roc_auc_score(truth[of[split]], logit[of[split]]), abs=2e-3)
            assert (row["n"], row["n_pos"]) == (of[split].sum(), truth[of[split]].sum())
            assert row["lo"] < row["value"] < row["hi"]
            assert (row["status"], row["ci_method"], row["readout"]) == ("ok", "delong-obuchowski-logit", "linear")


def test_leakage_finds_what_is_there_and_nothing_else(world):
    x = torch.randn(len(world.sick), 6, generator=torch.Generator().manual_seed(0))
    x[:, 3] += 8 * torch.as_tensor(world.sex == "F")
    data = Data(manifest="m.csv", groups=("sex", "site"))
    rows = pick(world.rows(Evaluate(), x, data=data), split="test", status="ok")
    assert all(row["value"] > 0.99 for row in pick(rows, attribute="sex"))
    others = [row for row in rows if row["attribute"] != "sex"]
    assert len(others) > 3
    assert all(row["lo"] < 0.5 < row["hi"] for row in others)


def test_each_part_of_a_crossing_is_read_once(leakage):
    rows = pick(leakage, split="test")
    assert Counter((row["attribute"], row["group"]) for row in rows) == Counter(
        [
            *(("sex", group) for group in "FM"),
            *(("age", group) for group in ("<40", "40-60", ">=60")),
            *(("race", group) for group in ("A", "B", "O")),
            *(("site", group) for group in "abcde"),
        ]
    )
    assert all(row.keys() == set(COLUMNS) - {"stage"} and row["label"] == "" for row in rows)


def test_two_groups_are_one_probe(world, monkeypatch):
    fits, real = [], probes.linear

    def counted(*columns):
        fits.append(columns)
        return real(*columns)

    monkeypatch.setattr(probes, "linear", counted)
    rows = world.rows(Evaluate(), data=Data(manifest="m.csv", groups=("sex",)))
    assert len(fits) == 1
    female, male = (pick(rows, group=group, split="test")[0] for group in "FM")
    assert female["value"] == pytest.approx(male["value"], abs=1e-12)
    assert (female["lo"], female["n_pos"]) == (pytest.approx(male["lo"], abs=1e-12), male["n_neg"])


def test_several_values_are_read_by_membership_among_the_known(world, leakage):
    test = (world.split == "test") & (world.race != "")
    for group in "AB":
        (row,) = pick(leakage, attribute="race", group=group, split="test")
        mine = np.array([group in cell.split(";") for cell in world.race])
        assert (row["n"], row["n_pos"]) == (test.sum(), mine[test].sum())


def test_a_group_that_train_lacks_is_undefined(leakage):
    for attribute, group in (("race", "O"), ("site", "d")):
        (row,) = pick(leakage, attribute=attribute, group=group, split="test")
        assert math.isnan(row["value"])
        assert (row["status"], row["note"]) == ("single_class", "all train images have one class")
        assert row["n_pos"] > 0


def test_features_without_content_leak_nothing(world):
    rows = world.rows(Evaluate(), torch.ones(len(world.sick), 4), data=Data(manifest="m.csv", groups=("sex",)))
    assert {row["status"] for row in rows} == {"constant_score"}


def test_nobody_is_fitted_and_scored(world, monkeypatch):
    """The patients of every fit are of train, and no score of a train row is read."""
    seen, scored, real, measure = [], [], probes.linear, metrics.evaluate

    def fit(features, label, train, val):
        seen.append((train.sum(), len(train)))
        found = real(features, label, train, val)
        if found is not None:
            found.scores_N[train] = np.nan  # whoever reads them fails
        return found

    def evaluate(metric, y, p, patient, **more):
        scored.append(set(patient.tolist()))
        return measure(metric, y, p, patient, **more)

    monkeypatch.setattr(probes, "linear", fit)
    monkeypatch.setattr(metrics, "evaluate", evaluate)
    world.rows(Evaluate(scarcity=(0.2, 1), scarcity_seeds=2, holdout=("site",)))
    trained = set(world.patient[world.split == "train"])
    assert seen
    assert scored
    assert not any(trained & patients for patients in scored)


def erased(world, attribute, rows):
    """The summaries without the attribute, as an eraser emits them that was fitted on some rows."""
    source = testing.synthetic_teacher()
    source = replace(source, dims=Dims(world.summary.shape[1], None))
    teacher = plugins.build("erased", "teachers", {"attribute": attribute}, source=source, source_name="one")
    group = torch.as_tensor(np.unique(getattr(world, attribute), return_inverse=True)[1])
    teacher.derived.fit([(Features(world.summary[rows], None), {attribute: group[rows]})])
    return teacher.derived.derive(Features(world.summary, None)).summary_BD


def test_what_was_erased_is_read_by_a_probe_of_patients_whom_no_eraser_has_seen(world):
    """On rows that the eraser was fitted on, scores differ by rounding alone, and others seem to hide the sex well."""
    train, (val, test) = torch.as_tensor(world.split == "train"), (world.split == split for split in SPLITS)
    summary, data = erased(world, "sex", train), Data(manifest="m.csv", groups=("sex", "site"))
    fooled = probes.linear(summary, (world.sex == "F").astype(float), train.numpy(), val)
    assert np.ptp(fooled.scores_N) < 1e-6
    rows = world.rows(Evaluate(), summary, data=data, fitted_on={"sex"})
    (row,) = pick(rows, attribute="sex", group="F")
    assert (row["split"], row["status"]) == ("test", "ok")
    assert row["note"] == "fitted on validation patients, as a teacher was on sex of train patients"
    patients = np.random.default_rng(0).permutation(np.unique(world.patient[val]))
    judge = np.isin(world.patient, patients[: len(patients) // 5])
    logit = by_hand(summary.double().numpy(), world.sex == "F", val & ~judge, judge)
    assert row["value"] == pytest.approx(roc_auc_score(world.sex[test] == "F", logit[test]), abs=2e-3)
    others = pick(world.rows(Evaluate(), summary, data=data), attribute="site")
    assert repr(pick(rows, attribute="site")) == repr(others)


def test_without_test_patients_nothing_is_said_of_what_was_erased(world):
    keep = np.flatnonzero(world.split != "test")
    rows = world.rows(Evaluate(), keep=keep, data=Data(manifest="m.csv", groups=("sex",)), fitted_on={"sex"})
    assert {(row["split"], row["status"]) for row in rows} == {("val", "empty")}
    assert all(math.isnan(row["value"]) and "no test patients" in row["note"] for row in rows)


# ── Scarcity ──


def test_all_labels_are_the_ordinary_probe(world):
    label = world.sick.astype(float)
    ordinary = probes.linear(world.summary, label, world.split == "train", world.split == "val")
    key = {("sick", "linear", "student"): ordinary}
    for readouts in (key, {}):
        rows = world.rows(Evaluate(leakage=False, scarcity=(1,)), readouts=readouts)
        for split, sex in ((split, sex) for split in SPLITS for sex in ("F", "M", None)):
            mine = (world.split == split) & ((world.sex == sex) | (sex is None))
            place = {"attribute": "sex", "group": sex} if sex else {"attribute": "", "group": "all"}
            (row,) = pick(rows, metric="scarcity_auroc", split=split, **place)
            assert row["value"] == pytest.approx(roc_auc_score(label[mine], ordinary.scores_N[mine]), abs=1e-12)
            assert (row["lo"], row["hi"], row["note"]) == (row["value"], row["value"], "1 seed")


def test_a_share_is_of_patients_and_smaller_ones_lie_in_larger_ones(world, monkeypatch):
    fits, real = [], probes.linear

    def spy(features, label, train, val):
        rows = {tuple(row) for row in features[torch.as_tensor(train)].tolist()}
        fits.append((np.array([tuple(row) in rows for row in world.summary.tolist()]), val.sum()))
        return real(features, label, train, val)

    monkeypatch.setattr(probes, "linear", spy)
    world.rows(
        Evaluate(leakage=False, scarcity=(0.05, 0.1, 0.5), scarcity_seeds=2),
        readouts={("sick", "linear", "student"): None},
    )
    train = len(set(world.patient[world.split == "train"]))
    assert {kept for _, kept in fits} == {(world.split == "val").sum()}  # all of validation chooses the strength
    order = itertools.product((0.05, 0.1, 0.5), range(2))
    of = {key: set(world.patient[mask]) for key, (mask, _) in zip(order, fits, strict=True)}
    for (share, _), patients in of.items():
        assert len(patients) == math.ceil(share * train)
    for seed in range(2):
        assert of[0.05, seed] < of[0.1, seed] < of[0.5, seed]
    assert of[0.5, 0] != of[0.5, 1]
    assert all(mask.sum() == 2 * len(set(world.patient[mask])) for mask, _ in fits)  # patients, not images


def test_mean_range_gap_and_worst_are_those_of_the_seeds(world):
    """Each seed by hand: a probe on the sample, AUROC of every site, the largest less the smallest."""
    rows = world.rows(Evaluate(leakage=False, scarcity=(0.3,), scarcity_seeds=4))
    label, val, test = world.sick.astype(float), world.split == "val", world.split == "test"
    patients = np.unique(world.patient[world.split == "train"])
    found = []
    for seed in range(4):
        sample = np.random.default_rng((0, seed)).permutation(patients)[: math.ceil(0.3 * len(patients))]
        scores = probes.linear(world.summary, label, np.isin(world.patient, sample), val).scores_N
        masks = [test & (world.site == site) for site in "abcde"]
        found.append([roc_auc_score(label[mask], scores[mask]) for mask in masks])
    found = np.array(found)
    for index, site in enumerate("abcde"):
        (row,) = pick(rows, metric="scarcity_auroc", attribute="site", group=site, split="test", target="0.3")
        expected = found[:, index].mean(), found[:, index].min(), found[:, index].max()
        assert (row["value"], row["lo"], row["hi"]) == pytest.approx(expected, abs=1e-12)
        assert (row["ci_method"], row["note"], row["status"]) == ("seed_range", "4 seeds", "ok")
    for summary, each in (("gap", np.ptp(found, 1)), ("worst", found.min(1))):
        (row,) = pick(rows, metric=f"scarcity_auroc_{summary}", attribute="site", split="test")
        assert row["group"] == "all"
        assert (row["value"], row["lo"], row["hi"]) == pytest.approx((each.mean(), each.min(), each.max()), abs=1e-12)
    assert row["note"] == "4 seeds: " + ", ".join("abcde"[one] for one in found.argmin(1))


def test_groups_with_few_patients_are_left_out_of_the_gap_by_name(world):
    settings = Settings(min_patients=8, replicates=1, permutations=0, seed=0)
    rows = pick(world.rows(Evaluate(leakage=False, scarcity=(1,)), settings=settings), split="test", attribute="site")
    few = [row["group"] for row in pick(rows, metric="scarcity_auroc") if row["status"] != "ok"]
    values = [row["value"] for row in pick(rows, metric="scarcity_auroc", status="ok")]
    (gap,) = pick(rows, metric="scarcity_auroc_gap")
    assert len(few) >= 1
    assert len(values) >= 2
    assert gap["value"] == pytest.approx(max(values) - min(values))
    assert all(f"{group} (below_min" in gap["note"].partition("left out")[2] for group in few)


def test_samples_of_one_class_are_counted(world):
    """Of two patients some samples hold both classes and some do not; of one patient none does."""
    patients = len(set(world.patient[world.split == "train"]))
    few = Evaluate(leakage=False, scarcity=(2 / patients, 1 / patients), scarcity_seeds=6)
    two, one = (pick(world.rows(few), target=f"{share:g}", group="all", attribute="") for share in few.scarcity)
    usable = 0
    for seed in range(6):
        sample = np.random.default_rng((0, seed)).permutation(np.unique(world.patient[world.split == "train"]))[:2]
        usable += len(set(world.sick[np.isin(world.patient, sample)])) == 2
    assert 0 < usable < 6
    assert {row["note"] for row in two} == {f"{usable} of 6 seeds usable"}
    assert not any(math.isnan(row["value"]) for row in two)
    assert {(row["status"], row["note"]) for row in one} == {("single_class", "0 of 6 seeds usable")}
    assert all(math.isnan(row["value"]) and row["n_pos"] > 0 for row in one)


# ── Hold-out ──


def test_the_matrix_is_a_probe_of_each_group_by_hand(world):
    rows = world.rows(Evaluate(leakage=False, holdout=("site",)))
    label, of = world.sick.astype(float), {split: world.split == split for split in ("train", *SPLITS)}
    assert Counter((row["target"], row["group"], row["split"]) for row in rows) == Counter(
        (a, b, split) for a in ("all", *"abcde") for b in "abcde" for split in SPLITS
    )
    for source, validated in (("all", True), ("a", world.site == "a"), ("b", world.site == "b"), ("e", True)):
        mine = (world.site == source) | (source == "all")
        scores = probes.linear(world.summary, label, of["train"] & mine, of["val"] & validated).scores_N
        for group in "abcde":
            (row,) = pick(rows, target=source, group=group, split="test")
            tested = of["test"] & (world.site == group)
            assert row["value"] == pytest.approx(roc_auc_score(label[tested], scores[tested]), abs=1e-12)
            assert (row["n"], row["attribute"], row["label"]) == (tested.sum(), "site", "sick")
            patients = len(set(world.patient[of["train"] & mine]))
            assert row["note"].startswith(f"fitted on {patients} patients")
            assert ("validation patients of all groups" in row["note"]) == (source == "e")


def test_a_source_of_one_class_is_undefined(world):
    rows = world.rows(Evaluate(leakage=False, holdout=("site",)))
    for source in "cd":
        assert {row["status"] for row in pick(rows, target=source)} == {"single_class"}
        assert all(math.isnan(row["value"]) and row["n"] for row in pick(rows, target=source))


def test_a_source_of_few_patients_is_no_finding(world):
    settings = Settings(min_patients=12, replicates=1, permutations=0, seed=0)
    rows = pick(world.rows(Evaluate(leakage=False, holdout=("site",)), settings=settings), split="test", group="b")
    sick = {site: world.sick.astype(bool) & (world.split == "train") & (world.site == site) for site in "abe"}
    for source, mine in sick.items():
        (row,) = pick(rows, target=source)
        few = len(set(world.patient[mine])) < 12
        assert (row["status"], few) == ("below_min_pos" if few else "ok", source == "e")
        assert not math.isnan(row["value"])


def test_a_crossing_can_be_held_out(world):
    rows = pick(world.rows(Evaluate(leakage=False, holdout=("sex*age",))), split="test")
    assert {row["target"] for row in rows} == {"all", *(f"{s}|{age}" for s in "FM" for age in ("<40", "40-60", ">=60"))}


# ── What is remembered, and what is absent ──


def test_only_the_student_is_studied_again(world, monkeypatch):
    fits, real, memory = [], probes.linear, {}

    def counted(*columns):
        fits.append(1)
        return real(*columns)

    monkeypatch.setattr(probes, "linear", counted)
    summaries = {"student": world.summary, "teacher/one": world.summary, "teacher/none": None}
    data, evaluate = Data(manifest="m.csv", groups=("sex",)), Evaluate(scarcity=(0.5, 1), scarcity_seeds=1)
    asked = world.manifest, np.arange(len(world.sick)), data, evaluate, SETTINGS, set()
    first = list(studies.rows(summaries, *asked, {}, memory))
    once = len(fits)
    again = list(studies.rows(summaries | {"student": world.summary * 2}, *asked, {}, memory))
    assert len(fits) == 1.5 * once
    assert {row["predictor"] for row in first} == {"student", "teacher/one"}
    assert repr(pick(again, predictor="teacher/one")) == repr(pick(first, predictor="teacher/one"))


def test_rows_of_the_evaluation_may_be_fewer_than_those_of_the_manifest(world):
    keep = np.flatnonzero((world.split != "train") | (world.patient % 3 > 0))
    rows = world.rows(Evaluate(leakage=False, holdout=("sex",)), keep=keep)
    label, train = world.sick.astype(float), np.isin(np.arange(len(world.sick)), keep) & (world.split == "train")
    test, female = world.split == "test", world.sex == "F"
    scores = probes.linear(world.summary, label, train & female, (world.split == "val") & female).scores_N
    (row,) = pick(rows, metric="holdout_auroc", target="F", group="M", split="test")
    assert row["value"] == pytest.approx(roc_auc_score(label[test & ~female], scores[test & ~female]), abs=1e-12)


def test_nothing_is_asked(world):
    assert world.rows(Evaluate(leakage=False)) == []
