"""Macro averages against scikit-learn, their intervals against a bootstrap and against the binary case."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from agglom.core import metrics, multiclass


def sample(seed=0, n=240, classes=4, images=1, ties=False):
    draw = np.random.default_rng(seed)
    class_N = draw.integers(classes, size=n)
    class_N[:classes] = np.arange(classes)
    logit_NC = draw.normal(size=(n, classes)) + 1.2 * np.eye(classes)[class_N]
    p_NC = np.exp(logit_NC) / np.exp(logit_NC).sum(1, keepdims=True)
    if ties:
        p_NC = p_NC.round(1)
    patient_N = np.arange(n) // images
    return torch.as_tensor(class_N), torch.as_tensor(p_NC), torch.as_tensor(patient_N)


def reference(metric, class_N, p_NC):
    y_NC, top_N = np.eye(p_NC.shape[1])[class_N], p_NC.argmax(1)
    return {
        "auroc": lambda: roc_auc_score(y_NC, p_NC, average="macro"),
        "auprc": lambda: average_precision_score(y_NC, p_NC, average="macro"),
        "accuracy": lambda: float((top_N == class_N).mean()),
        "balanced_accuracy": lambda: balanced_accuracy_score(class_N, top_N),
        "f1": lambda: f1_score(class_N, top_N, average="macro", labels=range(p_NC.shape[1]), zero_division=0),
    }[metric]()


@given(seed=st.integers(0, 10**6), n=st.integers(12, 80), classes=st.integers(2, 5), ties=st.booleans())
@settings(max_examples=40, derandomize=True, deadline=None)
@pytest.mark.parametrize("metric", multiclass.METRICS)
def test_values_are_those_of_scikit_learn(metric, seed, n, classes, ties):
    class_N, p_NC, patient_N = sample(seed, n, classes, ties=ties)
    found = multiclass.at_level(metric, class_N, p_NC, patient_N)(0.95)
    if found.status == "constant_score":
        assert bool((p_NC == p_NC[0]).all(0).any())
        return
    assert found.value == pytest.approx(reference(metric, class_N.numpy(), p_NC.numpy()), abs=1e-12)
    assert found.lo - 1e-12 <= found.value <= found.hi + 1e-12
    assert (found.n, found.n_patients) == (n, n)
    assert found.n_pos == int(torch.bincount(class_N, minlength=classes).min())


@pytest.mark.parametrize("metric", multiclass.METRICS)
@pytest.mark.parametrize("images", [1, 3])
def test_intervals_are_as_wide_as_those_of_a_bootstrap_of_patients(metric, images):
    class_N, p_NC, _ = sample(3, 600, 3)
    if images > 1:  # all images of a patient say the same
        class_N, p_NC = class_N[:200].repeat(images), p_NC[:200].repeat(images, 1)
    patient_N = torch.arange(600) % (600 // images)
    found = multiclass.at_level(metric, class_N, p_NC, patient_N)(0.95)
    draw, rows = np.random.default_rng(0), [np.flatnonzero(patient_N == one) for one in range(600 // images)]
    values = []
    for _ in range(300):
        chosen = np.concatenate([rows[one] for one in draw.integers(len(rows), size=len(rows))])
        drawn = class_N[chosen], p_NC[chosen], torch.arange(600)
        values.append(multiclass.linearise(metric, *drawn).value)
    assert found.hi - found.lo == pytest.approx(np.quantile(values, 0.975) - np.quantile(values, 0.025), rel=0.15)


def test_two_classes_of_complementary_scores_are_the_binary_case():
    class_N, p_NC, patient_N = sample(1, 300, 2)
    ours = multiclass.at_level("auroc", class_N, p_NC, patient_N)(0.9)
    binary = metrics.evaluate("auroc", class_N, p_NC[:, 1], patient_N, level=0.9)
    assert ours.value == pytest.approx(binary.value, abs=1e-12)
    # Each row is in a part of both classes; of small samples the covariance of parts is scaled a little differently.
    assert ours[1:3] == pytest.approx(binary[1:3], abs=5e-4)


@pytest.mark.parametrize("metric", multiclass.METRICS)
def test_a_difference_is_that_of_the_values_and_of_nothing_from_itself(metric):
    class_N, a_NC, patient_N = sample(4, 400, 3)
    b_NC = (a_NC + 0.3 * sample(5, 400, 3)[1]) / 1.3
    found = multiclass.difference(metric, class_N, a_NC, b_NC, patient_N)(0.95)
    a, b = (multiclass.at_level(metric, class_N, p_NC, patient_N)(0.95) for p_NC in (a_NC, b_NC))
    assert found.value == pytest.approx(a.value - b.value, abs=1e-12)
    assert found.lo < found.value < found.hi
    same = multiclass.difference(metric, class_N, a_NC, a_NC, patient_N)(0.95)
    assert same.value == 0
    assert same.lo < 0 < same.hi
    p = metrics.p_value(multiclass.difference(metric, class_N, a_NC, b_NC, patient_N))
    at_p = multiclass.difference(metric, class_N, a_NC, b_NC, patient_N)(1 - p)
    assert min(abs(at_p.lo), abs(at_p.hi)) < 1e-6 or p < 1.1e-15


@pytest.mark.parametrize(
    ("metric", "change", "status"),
    [
        ("auroc", lambda c, p, i: (c[:0], p[:0], i[:0]), "empty"),
        ("auroc", lambda c, p, i: (c.clamp(max=1), p, i), "single_class"),
        ("f1", lambda c, p, i: (c.clamp(max=1), p, i), "single_class"),
        ("accuracy", lambda c, p, i: (c.clamp(max=1), p, i), "ok"),
        ("auroc", lambda c, p, i: (c, torch.full_like(p, 0.3), i), "constant_score"),
        ("balanced_accuracy", lambda c, p, i: (c, torch.full_like(p, 0.3), i), "ok"),
        ("auroc", lambda c, p, i: (c, p, i // 8), "below_min_pos"),
        ("accuracy", lambda c, p, i: (c[:20], p[:20], i[:20]), "below_min_pos"),
    ],
)
def test_what_cannot_be_known_has_a_status(metric, change, status):
    found = multiclass.at_level(metric, *change(*sample(n=200, classes=3)))(0.95)
    assert found.status == status
    assert math.isnan(found.value) == (status in ("empty", "single_class", "constant_score"))


@pytest.mark.parametrize(
    ("metric", "change", "message"),
    [
        ("brier", lambda c, p, i: (c, p, i), "metric 'brier' is not one of"),
        ("auroc", lambda c, p, i: (c, p[:, 0], i), "expected"),
        ("auroc", lambda c, p, i: (c[1:], p, i), "shapes"),
        ("auroc", lambda c, p, i: (c + 1, p, i), "class_N spans 1 … 4, outside 0 … 3"),
        ("auroc", lambda c, p, i: (c, torch.where(p > 0.8, math.nan, p), i), "rows of scores hold NaN"),
    ],
)
def test_what_cannot_be_used_is_refused(metric, change, message):
    with pytest.raises(ValueError, match=message):
        multiclass.at_level(metric, *change(*sample()))
