"""Readouts: fitted on train, chosen on validation, test only scored."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from agglom import probes


def data(n=240, d=6, seed=0, signal=1.5):
    """Features whose first dimension tells the label; masks of train, val and test; each row its own patient."""
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.4).astype(float)
    x = rng.standard_normal((n, d))
    x[:, 0] += signal * label
    split = np.array(["train", "val", "test"]).repeat(n // 3)
    return torch.tensor(x, dtype=torch.float32), label, *(split == name for name in ("train", "val", "test"))


def fit(kind, x, label, train, val, patient=None, k=20):
    if kind == "linear":
        return probes.linear(x, label, train, val)
    return probes.nearest(x, label, np.arange(len(label)) if patient is None else patient, train, val, k)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_reads_what_is_there(kind):
    x, label, train, val, test = data(signal=6)
    readout = fit(kind, x, label, train, val)
    assert roc_auc_score(label[test], readout.scores_N[test]) > 0.9
    assert 0 <= readout.scores_N.min() <= readout.scores_N.max() <= 1
    assert readout.note == ""


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_labels_of_test_rows_are_not_read(kind):
    x, label, train, val, test = data()
    blind = np.where(test, np.nan, label)
    expected, found = fit(kind, x, label, train, val), fit(kind, x, blind, train, val)
    np.testing.assert_array_equal(found.scores_N, expected.scores_N)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_features_of_test_rows_change_no_other_score(kind):
    x, label, train, val, test = data()
    moved = x.clone()
    moved[torch.as_tensor(test)] += 5
    expected, found = fit(kind, x, label, train, val), fit(kind, moved, label, train, val)
    np.testing.assert_allclose(found.scores_N[~test], expected.scores_N[~test], rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_one_class_in_train_is_no_readout(kind):
    x, label, train, val, _ = data()
    assert fit(kind, x, np.where(train, 1.0, label), train, val) is None


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_one_class_in_validation_leaves_scores_as_they_are(kind):
    x, label, train, val, test = data()
    readout = fit(kind, x, np.where(val, 0.0, label), train, val)
    assert "one class" in readout.note
    assert roc_auc_score(label[test], readout.scores_N[test]) > 0.6


def test_the_linear_probe_ignores_scale_and_constants():
    x, label, train, val, _ = data()
    scaled = torch.cat([1000 * x + 7, torch.full((len(x), 2), 3.0)], 1)
    expected, found = fit("linear", x, label, train, val), fit("linear", scaled, label, train, val)
    np.testing.assert_allclose(found.scores_N, expected.scores_N, atol=1e-3)


def test_features_that_carry_nothing_score_all_alike():
    """As those from which the attribute has been erased: constant, so that AUROC is undefined."""
    x, label, train, val, _ = data()
    readout = fit("linear", torch.ones_like(x), label, train, val)
    assert np.ptp(readout.scores_N) == 0


def test_neighbours_vote_by_their_cosine():
    """Against the formula, one row at a time, before calibration."""
    x, label, train, val, _ = data(n=60)
    readout = probes.nearest(x, np.where(val, 0.0, label), np.arange(60), train, val, 5)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    for row in range(20, 60):
        cosine = unit[train] @ unit[row]
        best = np.argsort(-cosine)[:5]
        weight = np.exp(cosine[best] / 0.07)
        assert readout.scores_N[row] == pytest.approx((weight * label[train][best]).sum() / weight.sum(), abs=1e-5)


def test_neighbours_of_the_same_patient_do_not_vote():
    """Pairs of equal images, one patient each, with opposite labels: whoever votes for itself is always right."""
    x, label, *_ = data(n=60)
    x, label, patient = torch.cat([x, x]), np.concatenate([label, 1 - label]), np.tile(np.arange(60), 2)
    train, val = np.tile(np.arange(60) < 50, 2), np.tile(np.arange(60) >= 50, 2)
    readout = probes.nearest(x, np.where(val, 0.0, label), patient, train, val, 1)
    for row in range(50):
        assert readout.scores_N[row] == readout.scores_N[row + 60]  # the same vote, of another patient


def test_more_neighbours_than_images_are_all_of_them():
    x, label, train, val, _ = data(n=30)
    a, b = (probes.nearest(x, label, np.arange(30), train, val, k) for k in (10, 1000))
    np.testing.assert_array_equal(a.scores_N, b.scores_N)


def test_calibration_keeps_ranks_and_is_platts():
    rng = np.random.default_rng(3)
    label = (rng.random(300) < 0.3).astype(float)
    raw = 1 / (1 + np.exp(-(3 * label + rng.standard_normal(300) - 1)))
    val = np.arange(300) < 200
    readout = probes.calibrated(raw, label, val)
    order = np.argsort(raw)
    assert (np.diff(readout.scores_N[order]) >= 0).all()
    logit = np.log(raw / (1 - raw))
    model = LogisticRegression(C=1e6).fit(logit[val, None], label[val])
    np.testing.assert_allclose(readout.scores_N, model.predict_proba(logit[:, None])[:, 1], atol=1e-6)
    assert readout.scores_N[val].mean() == pytest.approx(label[val].mean(), abs=1e-4)


def test_scores_that_rank_backwards_are_not_turned_around():
    label = np.tile([0.0, 1.0], 20)
    raw = np.where(label == 1, 0.3, 0.6)
    readout = probes.calibrated(raw, label, np.ones(40, bool))
    np.testing.assert_array_equal(readout.scores_N, raw)
    assert "no better than chance" in readout.note


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_youdens(seed):
    rng = np.random.default_rng(seed)
    truth = (rng.random(80) < 0.4).astype(float)
    scores = np.round(truth + rng.standard_normal(80), 1)  # with ties
    cut = probes.youden(scores, truth)
    fpr, tpr, _ = roc_curve(truth, scores)
    reached = (scores >= cut)[truth == 1].mean() - (scores >= cut)[truth == 0].mean()
    assert reached == pytest.approx((tpr - fpr).max())
    assert cut not in scores  # between two of them, so that rounding decides nothing


def test_the_linear_probe_reads_other_features_as_its_own():
    x, label, train, val, test = data()
    readout = probes.linear(x, label, train, val)
    assert roc_auc_score(label[test], readout.read(x[test])) == roc_auc_score(label[test], readout.scores_N[test])
    assert np.array_equal(np.argsort(readout.read(x), kind="stable"), np.argsort(readout.scores_N, kind="stable"))
    # What it is fitted on is standardised by train rows alone, whatever it reads later.
    shifted = readout.read(x[test] + 100 * torch.eye(6)[0])
    assert (shifted > readout.read(x[test])).mean() > 0.9
    assert probes.nearest(x, label, np.arange(len(label)), train, val, 20).read is None
