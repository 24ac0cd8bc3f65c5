"""How sure it is that a probe is right: against scikit-learn used directly, and against the truth of simulated data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from agglom import confidence, probes
from agglom.survey import Pool, Survey

NAN = np.nan


def test_no_probe_has_seen_the_patient_that_it_scores():
    rng = np.random.default_rng(0)
    patient, label = rng.integers(0, 60, 200), (rng.random(200) < 0.3).astype(float)
    x = rng.standard_normal((200, 5)) + label[:, None]
    mine = np.arange(200) < 150
    found = confidence.out_of_fold(torch.tensor(x), label, patient, mine, 0.1, seed=3)
    splits = StratifiedGroupKFold(5, shuffle=True, random_state=3)
    pipe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    expected = cross_val_predict(pipe, x[:150], label[:150], groups=patient[:150], cv=splits, method="predict_proba")
    np.testing.assert_allclose(found[:150], expected[:, 1], rtol=1e-6)
    assert np.isnan(found[150:]).all()
    # A patient's labels do not move that patient's scores, while the folds stay as they are.
    own = next(own for one in patient if len(set(label[own := mine & (patient == one)])) == 2)
    swapped = np.where(own, 1 - label, label)
    again = confidence.out_of_fold(torch.tensor(x), swapped, patient, mine, 0.1, seed=3)
    np.testing.assert_allclose(again[own], found[own])
    assert (again[mine & ~own] != found[mine & ~own]).any()


def test_a_row_without_a_label_is_scored_and_teaches_nothing():
    rng = np.random.default_rng(1)
    label = np.arange(60) % 2.0
    x = torch.tensor(rng.standard_normal((60, 3)) + label[:, None])
    label[:6] = NAN
    moved = x.clone()
    moved[:6] += 9
    found, other = (confidence.out_of_fold(one, label, np.arange(60), np.ones(60, bool), 1.0, 0) for one in (x, moved))
    assert not np.isnan(found).any()
    np.testing.assert_allclose(other[6:], found[6:])


def test_a_class_of_one_patient_cannot_be_held_out():
    label, patient = np.repeat([0.0, 1.0], [30, 5]), np.repeat([0, 1, 2, 3], [10, 10, 10, 5])
    x = torch.randn(35, 3)
    assert np.isnan(confidence.out_of_fold(x, label, patient, np.ones(35, bool), 1.0, 0)).all()


def simulated(n=4000, seed=0, middle=0.0):
    """Scores that are right as often as they say in group 0, less often in group 1 however sure they are."""
    rng = np.random.default_rng(seed)
    group, score = rng.integers(0, 2, n), expit(middle + 2 * rng.standard_normal(n))
    p = np.where(group == 0, score, 0.5 + 0.2 * (score - 0.5))
    return score, (rng.random(n) < p).astype(float), group


def confident(score, label):
    """How far scores are from the prevalence."""
    return np.abs(logit(np.clip(score, probes.CLIP, 1 - probes.CLIP)) - logit(label.mean()))


def test_right_agrees_with_the_penalised_likelihood():
    """Minimised by another optimiser, over a design that is written out, with classes that are not alike."""
    score, label, group = simulated(300, middle=-2.0)
    group[:40] = -1
    assert label.mean() < 0.35
    c = confident(score, label)
    design = np.stack([np.ones(300), c, group == 0, group == 1, c * (group == 0), c * (group == 1)], 1)
    sign = np.where((score >= label.mean()) == (label == 1), 1, -1)
    each = np.where(label == 1, 1 / label.mean(), 1 / (1 - label.mean()))
    each *= each.sum() / (each**2).sum()

    def loss(w):
        return (each * np.logaddexp(0, -sign * (design @ w))).sum() + (w[1:] ** 2).sum() / 2

    weight = minimize(loss, np.zeros(6), tol=1e-12).x
    found = confidence.right(score, label, group, score, group, 2, label.mean())
    np.testing.assert_allclose(found, expit(design @ weight), atol=1e-5)


@pytest.mark.parametrize("middle", [0.0, -1.0])
def test_right_is_calibrated_in_each_group_were_both_classes_as_frequent(middle):
    judged, (score, label, group) = simulated(20_000, 1, middle), simulated(20_000, 2, middle)
    p = confidence.right(*judged, score, group, 2, judged[1].mean())
    told = (score >= judged[1].mean()) == (label == 1)
    each = 1 / np.where(label == 1, label.mean(), 1 - label.mean())
    for one in (0, 1):
        for part in (p < np.median(p[group == one]), p >= np.median(p[group == one])):
            here = part & (group == one)
            said, found = (np.average(x[here], weights=each[here]) for x in (p, told))
            assert said == pytest.approx(found, abs=0.04)
    assert p[group == 0].mean() - p[group == 1].mean() > 0.1


def test_a_rare_label_tells_teachers_apart():
    """Both probes are right on nearly all images if whoever says no is right; one of them knows nothing."""
    rng = np.random.default_rng(0)
    label, group = (rng.random(4000) < 0.03).astype(float), np.zeros(4000, np.int64)
    knowing, guessing = expit(np.stack([4 * label - 5, np.full(4000, -3.5)]) + rng.standard_normal((2, 4000)))
    plain = [((score >= 0.5) == (label == 1)).mean() for score in (knowing, guessing)]
    assert abs(plain[0] - plain[1]) < 0.03
    assert confidence.right(knowing, label, group, knowing, group, 1, label.mean()).mean() > 0.9
    guessed = confidence.right(guessing, label, group, guessing, group, 1, label.mean()).mean()
    assert guessed == pytest.approx(0.5, abs=0.1)


def test_scores_are_read_about_the_prevalence_that_their_probe_was_fitted_on():
    """A probe that is held back says nearly the prevalence of train, whatever that of validation."""
    rng = np.random.default_rng(0)
    label, group = (rng.random(1000) < 0.7).astype(float), np.zeros(1000, np.int64)
    score = 0.4 + 0.02 * (2 * label - 1) + 0.01 * rng.standard_normal(1000)
    assert confidence.right(score, label, group, score, group, 1, 0.4).mean() > 0.9


def test_one_missed_image_of_a_rare_label_does_not_speak_for_its_group():
    rng = np.random.default_rng(0)
    label, group = np.zeros(2000), np.zeros(2000, np.int64)
    label[:10], group[:3] = 1, 1
    group[20:22] = 1
    score = np.clip(0.005 + 0.3 * label + 0.002 * rng.standard_normal(2000), 1e-3, 1)
    score[:1] = 0.002  # a positive of the group of five
    found = confidence.right(score, label, group, np.full(2, 0.003), np.array([0, 1]), 2, 0.005)
    assert abs(found[0] - found[1]) < 0.4


@pytest.mark.parametrize("groups", [1, 40])
def test_a_group_of_one_image_or_none_says_nearly_what_all_say(groups):
    score, label, _ = simulated(400)
    group = np.where(np.arange(400) == 7, groups - 1, 0)
    pooled = confidence.right(score, label, np.full(400, -1), score, group, groups, label.mean())
    found = confidence.right(score, label, group, score, np.full(400, groups - 1), groups, label.mean())
    empty = confidence.right(score, label, group, score, np.full(400, groups // 2), groups, label.mean())
    assert np.abs(found - pooled).max() < 0.15
    assert np.abs(empty - pooled).max() < 0.05
    assert (np.diff(found[np.argsort(confident(score, label))]) >= 0).all()


def test_all_right_or_all_wrong_is_a_share():
    score, group = np.array([0.9, 0.2, 0.7]), np.array([0, 1, -1])
    for label, share in (([1.0, 0, 1], 4 / 5), ([0.0, 1, 0], 1 / 5)):
        assert confidence.right(score, np.array(label), group, score, group, 2, np.mean(label)).tolist() == [share] * 3


# ── A run ──

ROWS = 240
SPLIT = np.array(["train", "val", "test"]).repeat([160, 60, 20])


class Manifest(SimpleNamespace):
    def __len__(self):
        return ROWS


def world(seed=0):
    """Teachers `good` and `poor` of everybody, `few` of every other row; of label `a` five train rows are not known,
    and three rows are not surveyed."""
    rng = np.random.default_rng(seed)
    label_NL = (rng.random((ROWS, 2)) < 0.5).astype(np.float32)
    noise = {"good": 0.3, "poor": 3.0, "few": 1.0}
    x = {name: torch.tensor(label_NL + scale * rng.standard_normal((ROWS, 2))).float() for name, scale in noise.items()}
    label_NL[:5, 0] = NAN
    run = SimpleNamespace(
        manifest=Manifest(labels=("a", "b"), label_NL=label_NL, split_N=SPLIT, patient_N=np.arange(ROWS) // 2),
        balance_space=SimpleNamespace(index_N=torch.arange(ROWS) % 3 - 1, values=("x", "y")),
        served={"few": torch.arange(ROWS) % 2 == 0},
        job=SimpleNamespace(seed=0),
    )
    pools = {name: Pool(summary_ND[3:], None, (0, 0)) for name, summary_ND in x.items()}
    return run, Survey(np.arange(3, ROWS), np.arange(0), pools)


def test_of_train_images_of_the_survey_and_of_a_specialist_of_those_whom_it_serves():
    run, surveyed = world()
    sure_NS = confidence.measure(run, surveyed, ["few", "good", "poor"])
    assert sure_NS.dtype == torch.float32
    asked = np.isin(np.arange(ROWS), np.arange(3, 160))
    assert (~sure_NS[:, 1:].isnan().numpy() == asked[:, None]).all()
    assert (~sure_NS[:, 0].isnan().numpy() == asked & (np.arange(ROWS) % 2 == 0)).all()
    few, good, poor = sure_NS.nanmean(0).tolist()
    assert 0.4 < poor < few < good < 1
    assert good > 0.9
    assert set(surveyed.readouts) == {(x, "linear", f"teacher/{s}") for x in "ab" for s in ("few", "good", "poor")}


def test_the_mean_over_labels_of_the_probe_of_the_report():
    run, surveyed = world()
    sure_NS = confidence.measure(run, surveyed, ["good"])
    label_NL, x = run.manifest.label_NL[3:].astype(float), surveyed.pools["good"].summary_ND
    train, val = SPLIT[3:] == "train", SPLIT[3:] == "val"
    group, patient, expected = np.arange(3, ROWS) % 3 - 1, np.arange(3, ROWS) // 2, []
    for y in label_NL.T:
        full = probes.linear(x, y, train & ~np.isnan(y), val)
        score = confidence.out_of_fold(x, y, patient, train, full.strength, 0)[train]
        judged = full.read(x)[val], y[val], group[val]
        expected.append(confidence.right(*judged, score, group[train], 2, np.nanmean(y[train])))
    np.testing.assert_allclose(sure_NS[3:160, 0], np.mean(expected, 0), rtol=1e-5)
    # A probe that is remembered is the one that counts.
    surveyed.readouts.clear()
    of_another = probes.linear(-x, label_NL[:, 1], train, val)
    surveyed.readouts["b", "linear", "teacher/good"] = of_another
    assert (confidence.measure(run, surveyed, ["good"])[3:160] != sure_NS[3:160]).all()


def test_a_label_of_one_train_patient_counts_for_nobody():
    run, surveyed = world()
    run.manifest.labels, run.manifest.label_NL = ("b",), run.manifest.label_NL[:, 1:]
    expected = confidence.measure(run, surveyed, ["few", "good"])
    rare = np.where(SPLIT == "val", np.arange(ROWS) % 2, np.arange(ROWS) // 2 == 20)
    run.manifest.labels = ("b", "c")
    run.manifest.label_NL = np.concatenate([run.manifest.label_NL, rare[:, None].astype(np.float32)], 1)
    found = confidence.measure(run, surveyed, ["few", "good"])
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_label_of_one_class_counts_for_nobody(split):
    run, surveyed = world()
    run.manifest.labels, run.manifest.label_NL = ("b",), run.manifest.label_NL[:, 1:]
    expected = confidence.measure(run, surveyed, ["few", "good"])
    one = np.where((split == SPLIT) & (np.arange(ROWS) % 2 == 0), 1, np.random.default_rng(9).random(ROWS) < 0.5)
    run.manifest.labels = ("b", "c")
    run.manifest.label_NL = np.concatenate([run.manifest.label_NL, one[:, None].astype(np.float32)], 1)
    found = confidence.measure(run, surveyed, ["few", "good"])
    served = np.arange(ROWS) % 2 == 0
    torch.testing.assert_close(found[served], expected[served], equal_nan=True)
    others = found[~served & (SPLIT == "train"), 1][2:]
    assert (others < expected[~served & (SPLIT == "train"), 1][2:]).float().mean() > 0.8, "c is a coin"


def test_a_teacher_without_a_summary_is_not_known_and_hides_nobody_else():
    run, surveyed = world()
    surveyed.pools["poor"] = Pool(None, None, (0, 0))
    sure_NS = confidence.measure(run, surveyed, ["good", "poor"])
    assert sure_NS[:, 1].isnan().all()
    assert not sure_NS[:, 0].isnan().all()
