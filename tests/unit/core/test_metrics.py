"""agglom.core.metrics against other libraries, independent NumPy, and its own promises."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core import calibration, influence, metrics
from agglom.core.metrics import (
    METRICS,
    THRESHOLDED,
    Estimate,
    evaluate,
    evaluate_groups,
    fvu,
    gap,
    holm,
    mean,
    paired,
    paired_p,
    simultaneous,
    tabulate,
    worst,
)

RATES = ("accuracy", "tpr", "fpr", "ppv", "npv", "selection_rate")
LINEAR = tuple(m for m in METRICS if m not in ("ece", "ece_debiased"))
quick = settings(max_examples=60, deadline=None, derandomize=True)


def sample(seed, patients, images=1, icc=0.5, auroc=0.8, prevalence=0.5, mixed=False):
    """Binormal scores in (0, 1) with patient effects, labels by patient or (`mixed`) by image."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), images)
    y = (rng.random(len(patient)) < prevalence) if mixed else (np.arange(patients) < prevalence * patients)[patient]
    noise = math.sqrt(icc) * rng.normal(size=patients)[patient] + math.sqrt(1 - icc) * rng.normal(size=len(patient))
    score = noise + math.sqrt(2) * NormalDist().inv_cdf(auroc) * y
    return torch.tensor(y), torch.tensor(1 / (1 + np.exp(-score))), torch.tensor(patient)


def obuchowski(y, p, patient):
    """AUROC and its clustered variance from the pairwise kernel, O(n²), patient by patient."""
    pos, neg = p[y], p[~y]
    kernel = (pos[:, None] > neg[None]) + 0.5 * (pos[:, None] == neg[None])
    theta, m, n = kernel.mean(), len(pos), len(neg)
    rows10, rows01 = kernel.mean(1), kernel.mean(0)
    names = np.unique(patient)
    v10 = np.array([(rows10[patient[y] == i] - theta).sum() for i in names])
    v01 = np.array([(rows01[patient[~y] == i] - theta).sum() for i in names])
    i, i10, i01 = len(names), len(np.unique(patient[y])), len(np.unique(patient[~y]))
    s10, s01 = i10 / (i10 - 1) / m * (v10**2).sum(), i01 / (i01 - 1) / n * (v01**2).sum()
    return theta, s10 / m + s01 / n + 2 * i / (i - 1) * (v10 * v01).sum() / (m * n)


def variance_of(metric, y, p, patient, threshold=math.nan):
    return influence.moments(influence.linearise(metric, y, p, threshold, metrics._codes(patient))).variance


def delong(y, p):
    """DeLong's covariance by np.cov over the placement values, O(n²)."""
    kernel = (p[y][:, None] > p[~y][None]) + 0.5 * (p[y][:, None] == p[~y][None])
    return np.var(kernel.mean(1), ddof=1) / y.sum() + np.var(kernel.mean(0), ddof=1) / (~y).sum()


# ── Values against other libraries ──


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=2, max_size=60))
def test_auroc_is_that_of_scikit_learn_with_ties(rows):
    from sklearn.metrics import roc_auc_score

    y, p = (torch.tensor(column) for column in zip(*rows, strict=True))
    estimate = evaluate("auroc", y, p / 12, torch.arange(len(y)))
    if len(set(y.tolist())) == 1:
        assert estimate.status == "single_class"
    elif len(set(p.tolist())) == 1:
        assert estimate.status == "constant_score"
    else:
        assert estimate.value == pytest.approx(roc_auc_score(y.numpy(), p.numpy()), abs=1e-12)
        assert 0 <= estimate.lo <= estimate.value <= estimate.hi <= 1
        assert estimate.lo < estimate.hi


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=40), st.integers(0, 9))
def test_every_other_value_is_that_of_scikit_learn_where_it_is_defined(rows, cut):
    from sklearn import metrics as sk

    y, p = (torch.tensor(column) for column in zip(*rows, strict=True))
    said, both = (p >= cut).numpy(), len(set(y.tolist())) == 2
    wanted = {
        "accuracy": sk.accuracy_score(y.numpy(), said),
        "brier": np.mean((p.numpy() / 8 - y.numpy()) ** 2),
        "f1": sk.f1_score(y.numpy(), said, zero_division=math.nan),
        "tpr": sk.recall_score(y.numpy(), said, zero_division=math.nan),
        "fpr": 1 - sk.recall_score(~y.numpy(), ~said, zero_division=math.nan),
        "ppv": sk.precision_score(y.numpy(), said, zero_division=math.nan),
        "npv": sk.precision_score(~y.numpy(), ~said, zero_division=math.nan),
        "selection_rate": said.mean(),
        "balanced_accuracy": sk.balanced_accuracy_score(y.numpy(), said) if both else math.nan,
        "auprc": sk.average_precision_score(y.numpy(), p.numpy()) if both and len(set(p.tolist())) > 1 else math.nan,
    }
    if both:
        assert wanted["brier"] == pytest.approx(sk.brier_score_loss(y.numpy(), p.numpy() / 8))
    for metric, value in wanted.items():
        e = evaluate(metric, y, p / 8, torch.arange(len(y)), threshold=cut / 8)
        assert e.value == pytest.approx(value, abs=1e-12, nan_ok=True)
        assert math.isnan(e.value) == (e.status in ("empty", "single_class", "constant_score"))


def test_grouped_rates_are_those_of_fairlearn():
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, precision_score

    y, p, patient = sample(0, 400, mixed=True)
    group = torch.tensor(np.random.default_rng(0).integers(0, 4, 400))
    functions = {
        "accuracy": accuracy_score,
        "balanced_accuracy": balanced_accuracy_score,
        "f1": f1_score,
        "tpr": true_positive_rate,
        "fpr": false_positive_rate,
        "ppv": precision_score,
        "selection_rate": selection_rate,
    }
    frame = MetricFrame(
        metrics=functions, y_true=y.numpy(), y_pred=(p >= 0.6).numpy(), sensitive_features=group.numpy()
    ).by_group
    for metric in functions:
        ours = evaluate_groups(metric, y, p, patient, group, 4, threshold=0.6)
        assert [e.value for e in ours] == pytest.approx(frame[metric].tolist(), abs=1e-12)


def test_ece_is_that_of_torchmetrics():
    from torchmetrics.functional.classification import binary_calibration_error

    for seed, rows in ((0, 7), (1, 50), (2, 1000)):
        y, p, patient = sample(seed, rows, mixed=True)
        expected = binary_calibration_error(p, y.long(), n_bins=10, norm="l1")
        assert evaluate("ece", y, p, patient, replicates=50).value == pytest.approx(float(expected), abs=1e-12)


def test_ece_counts_a_score_of_one_in_the_last_bin():
    y, p = torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.95, 0.0])
    assert evaluate("ece", y, p, torch.arange(3)).value == pytest.approx((abs(1.95 - 1) + 1) / 3)


@pytest.mark.parametrize("images", [1, 4])
def test_ece_debiased_subtracts_the_bias_of_normal_bins(images):
    rng = np.random.default_rng(0)
    y, p, patient = sample(3, 150, images=images, mixed=True)
    rows = np.array([[(patient == i) & (calibration.bin_of(p) == c) for c in range(10)] for i in range(150)])
    sums = (rows * (p - y.double()).numpy()).sum(2) / len(y)
    mean_c, drawn = sums.sum(0), rng.normal(size=(200_000, 10))
    error_c = np.sqrt(((sums - mean_c / 150) ** 2).sum(0) * 150 / 149)
    bias = np.abs(mean_c + error_c * drawn).sum(1).mean() - np.abs(mean_c).sum()
    plain, less = (evaluate(metric, y, p, patient) for metric in ("ece", "ece_debiased"))
    assert less.value == pytest.approx(plain.value - bias, abs=3e-4)
    assert less[1:] == plain[1:]
    pair = paired("ece_debiased", y, p, 1 - p, patient)
    assert pair.value == pytest.approx(less.value - evaluate("ece_debiased", y, 1 - p, patient).value)
    assert pair[1:3] == paired("ece", y, p, 1 - p, patient)[1:3]


def test_ece_debiased_takes_two_fifths_of_the_bias_of_a_calibrated_score_and_nothing_far_from_it():
    bias = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p = torch.tensor(rng.random(200))
        y = torch.tensor(rng.random(200) < p.numpy())
        bias.append([evaluate(m, y, p, torch.arange(200), replicates=1).value for m in ("ece", "ece_debiased")])
    plain, less = np.mean(bias, axis=0)
    assert less / plain == pytest.approx(2 - math.sqrt(2), abs=0.03)
    y, p = torch.arange(2000) % 2 == 0, torch.full((2000,), 0.95, dtype=torch.float64)
    assert evaluate("ece_debiased", y, p, torch.arange(2000)).value == pytest.approx(0.45, abs=1e-9)


# ── Variances against independent NumPy ──


@quick
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_one_image_a_patient_reduces_to_delong(seed, coarse):
    y, p, patient = sample(seed, 40, mixed=True)
    p = (p * 3 * coarse).round()
    assert variance_of("auroc", y, p.double(), patient) == pytest.approx(delong(y.numpy(), p.numpy()), rel=1e-9)


@quick
@given(st.integers(0, 10**6), st.booleans())
def test_several_images_a_patient_give_obuchowski(seed, mixed):
    y, p, _ = sample(seed, 60, mixed=mixed)
    patient = torch.tensor(np.random.default_rng(seed).integers(100, 118, 60))
    theta, variance = obuchowski(y.numpy(), p.numpy(), patient.numpy())
    assert evaluate("auroc", y, p, patient).value == pytest.approx(theta, abs=1e-12)
    assert variance_of("auroc", y, p, patient) == pytest.approx(variance, rel=1e-9)


# DeLong, DeLong and Clarke-Pearson 1988: the 43 complete cases of their 49 patients with ovarian cancer, as listed in
# the SAS/STAT User's Guide, LOGISTIC procedure, "Comparing Receiver Operating Characteristic Curves": albumin, total
# protein, K-G score, outcome of surgery.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def test_the_published_example_of_delong():
    albumin, protein, kg, y = torch.tensor([float(x) for x in OVARIAN.split()]).double().view(43, 4).T
    y, patient = y.bool(), torch.arange(43)
    scores = {"albumin": albumin, "protein": protein, "kg": -kg}
    published = {"albumin": (0.7366, 0.0927), "protein": (0.6478, 0.1000), "kg": (0.7258, 0.1028)}
    linear = {name: influence.linearise("auroc", y, p, math.nan, patient) for name, p in scores.items()}
    for name, (value, error) in published.items():
        assert linear[name].value == pytest.approx(value, abs=5e-5)
        assert math.sqrt(influence.moments(linear[name]).variance) == pytest.approx(error, abs=5e-5)
    # The contrast of the other two with the K-G score: chi-square 2.5340 with 2 degrees of freedom.
    contrast = [influence.less(linear[name], linear["kg"]) for name in ("albumin", "protein")]
    between = influence.less(linear["albumin"], linear["protein"])[1].variance
    d, v = np.array([c[0] for c in contrast]), [c[1].variance for c in contrast]
    cross = (v[0] + v[1] - between) / 2
    assert d @ np.linalg.solve([[v[0], cross], [cross, v[1]]], d) == pytest.approx(2.5340, abs=5e-5)
    z = contrast[1][0] / math.sqrt(v[1])
    assert paired_p("auroc", y, protein, -kg, patient) == pytest.approx(2 * NormalDist().cdf(-abs(z)), abs=0.05)


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("metric", LINEAR)
def test_influences_are_those_of_leaving_a_patient_out(metric, images):
    y, p, patient = sample(21, 300, images=images, mixed=True, prevalence=0.3)
    p = (20 * p).round() / 20

    def value(rows):
        return influence.linearise(metric, y[rows], p[rows], 0.6, metrics._codes(patient[rows])).value

    linear = influence.linearise(metric, y, p, 0.6, patient)
    moved = torch.tensor([linear.value - value(patient != i) for i in range(300)]).double()
    assert torch.allclose(linear.part_KI.sum(0), moved, rtol=0.05, atol=0.05 * float(moved.abs().max()))
    jackknife = 299 / 300 * float((moved - moved.mean()).square().sum())
    assert influence.moments(linear).variance == pytest.approx(jackknife, rel=0.04)


def test_f1_interval_is_that_of_its_share_of_true_positives():
    from scipy.stats import binomtest

    y, p = torch.tensor([1] * 50 + [0] * 50), torch.tensor([0.9] * 40 + [0.1] * 10 + [0.9] * 15 + [0.1] * 35)
    e, share = evaluate("f1", y, p, torch.arange(100), threshold=0.5), binomtest(40, 65).proportion_ci(method="wilson")
    assert e[:3] == pytest.approx([80 / 105, *(2 * x / (1 + x) for x in (share.low, share.high))])


def test_balanced_accuracy_keeps_the_width_of_a_rate_of_one():
    y, p = torch.tensor([1] * 40 + [0] * 4000), torch.tensor([0.9] * 40 + [0.9] * 400 + [0.1] * 3600)
    e = evaluate("balanced_accuracy", y, p, torch.arange(4040), threshold=0.5)
    below = 1 - evaluate("tpr", y, p, torch.arange(4040), threshold=0.5).lo
    assert e.value == pytest.approx(0.95)
    assert e.value - e.lo == pytest.approx(below / 2, rel=0.02)
    assert e.hi - e.value < 0.01


def test_auroc_interval_is_on_the_logit_scale():
    y, p, patient = sample(3, 2000, auroc=0.85)
    estimate, error = evaluate("auroc", y, p, patient), math.sqrt(delong(y.numpy(), p.numpy()))
    half = 1.96 * error / (estimate.value * (1 - estimate.value))
    logits = [math.log(x / (1 - x)) for x in (estimate.lo, estimate.value, estimate.hi)]
    assert [b - a for a, b in pairwise(logits)] == pytest.approx([half, half], rel=5e-3)


def test_a_rate_of_one_image_a_patient_has_the_plain_wilson_interval():
    from scipy.stats import binomtest

    y = torch.tensor([1, 0] * 35)
    p = torch.tensor([0.9] * 62 + [0.1] * 8)
    for metric, hits, rows in (("tpr", 31, 35), ("fpr", 31, 35), ("accuracy", 35, 70)):
        e = evaluate(metric, y, p, torch.arange(70), threshold=0.5)
        wanted = binomtest(hits, rows).proportion_ci(method="wilson")
        assert (e.value, e.lo, e.hi) == pytest.approx((hits / rows, wanted.low, wanted.high), abs=1e-9)


def test_copies_of_an_image_add_nothing():
    y, p, patient = sample(4, 120)
    for metric in LINEAR:
        once = evaluate(metric, y, p, patient, threshold=0.6)
        thrice = evaluate(metric, y.repeat(3), p.repeat(3), patient.repeat(3), threshold=0.6)
        assert thrice.n == 3 * once.n
        assert thrice.n_patients == once.n_patients
        assert thrice.hi - thrice.lo == pytest.approx(once.hi - once.lo, rel=0.08)


def test_students_quantile():
    from scipy.stats import t

    rng = np.random.default_rng(0)
    for patients in (12, 40, 400):
        part = torch.tensor(rng.normal(size=(1, patients)))
        linear = influence.Linear(0.5, part - part.mean(), torch.ones(1, patients))
        square, fourth = float(linear.part_KI.square().sum()), float(linear.part_KI.pow(4).sum())
        df = 2 * square**2 / (fourth - square**2 / patients)
        for level in (0.8, 0.95, 0.999):
            assert influence.t_of(influence.moments(linear).df, level) == pytest.approx(
                t.ppf((1 + level) / 2, df), rel=0.01
            )


def test_the_paired_variance_is_that_of_the_difference():
    y, a, patient = sample(5, 60, images=3, mixed=True)
    b = sample(6, 60, images=3, mixed=True)[1]
    for metric in LINEAR:
        estimate = paired(metric, y, a, b, patient, threshold_a=0.6, threshold_b=0.4)
        one, other = evaluate(metric, y, a, patient, threshold=0.6), evaluate(metric, y, b, patient, threshold=0.4)
        assert estimate.value == pytest.approx(one.value - other.value, abs=1e-12)
        assert estimate.lo < estimate.value < estimate.hi
        assert estimate[3:7] == one[3:7]
        flipped = paired(metric, y, b, a, patient, threshold_a=0.4, threshold_b=0.6)
        assert (flipped.value, -flipped.hi, -flipped.lo) == pytest.approx((-estimate.value, estimate.lo, estimate.hi))
    # Independent models, one image a patient: variances add, up to the sampling error of the covariance.
    y, a, patient = sample(7, 4000)
    b = sample(8, 4000)[1]
    half = (lambda e: (e.hi - e.lo) / 2)(paired("auroc", y, a, b, patient))
    assert half == pytest.approx(1.96 * math.hypot(*(delong(y.numpy(), s.numpy()) ** 0.5 for s in (a, b))), rel=0.05)


def test_paired_tpr_is_the_wald_interval_of_a_paired_proportion():
    rng = np.random.default_rng(9)
    a, b = rng.random(300) < 0.8, rng.random(300) < 0.7
    y, patient = torch.ones(300), torch.arange(300)
    e = paired("tpr", y, torch.tensor(a).double(), torch.tensor(b).double(), patient, threshold_a=0.5, threshold_b=0.5)
    error = np.std(a.astype(float) - b, ddof=1) / math.sqrt(300)
    assert e.value - e.lo == pytest.approx(1.96 * error, rel=0.02)


# ── Degenerate groups ──


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows(metric):
    nothing = torch.zeros(0)
    estimate = evaluate(metric, nothing, nothing, nothing.long(), threshold=0.5)
    assert math.isnan(estimate.value)
    assert estimate[3:] == (0, 0, 0, 0, "empty", "none")
    assert paired(metric, nothing, nothing, nothing, nothing.long(), threshold_a=0, threshold_b=0).status == "empty"


@pytest.mark.parametrize(
    ("metric", "label"),
    [(metric, label) for metric in ("auroc", "auprc", "balanced_accuracy") for label in (0, 1)]
    + [("tpr", 0), ("fpr", 1)],
)
def test_a_missing_class_is_not_a_number(metric, label):
    y, p = torch.full((50,), label), torch.linspace(0, 1, 50)
    for e in (
        evaluate(metric, y, p, torch.arange(50), threshold=0.5),
        paired(metric, y, p, p, torch.arange(50), threshold_a=0.5, threshold_b=0.5),
    ):
        assert (math.isnan(e.value), math.isnan(e.lo), e.n, e.n_pos, e.status) == (
            True,
            True,
            50,
            50 * label,
            "single_class",
        )


@pytest.mark.parametrize(("metric", "label"), [("tpr", 1), ("fpr", 0), ("accuracy", 1), ("ece", 0)])
def test_a_metric_that_needs_one_class_has_a_value(metric, label):
    y, p = torch.full((50,), label), torch.linspace(0, 1, 50)
    e = evaluate(metric, y, p, torch.arange(50), threshold=0.5)
    assert e.value == pytest.approx(0.5, abs=0.02)
    assert e.status == ("ok" if metric in ("tpr", "fpr") else f"below_min_{'neg' if label else 'pos'}")


def test_metrics_that_are_conditional_on_the_prediction():
    y, p, patient = torch.tensor([1, 0] * 50), torch.linspace(0, 1, 100), torch.arange(100)
    nobody, everybody = 2.0, 0.0
    assert evaluate("ppv", y, p, patient, threshold=nobody).status == "empty"
    assert evaluate("npv", y, p, patient, threshold=everybody).status == "empty"
    assert paired("ppv", y, p, p, patient, threshold_a=0.5, threshold_b=nobody).status == "empty"
    assert evaluate("ppv", y, p, patient, threshold=0.9).status == "below_min_pos"
    assert evaluate("npv", y, p, patient, threshold=0.1).status == "below_min_neg"
    assert evaluate("f1", 0 * y, p, patient, threshold=nobody).status == "single_class"
    assert evaluate("f1", y, p, patient, threshold=nobody)[:3] == pytest.approx((0, 0, 0.133), abs=1e-3)
    assert evaluate("f1", 0 * y, p, patient, threshold=0.5)[7] == "below_min_pos"
    for threshold, value in ((nobody, 0), (everybody, 1)):
        assert evaluate("selection_rate", 0 * y, p, patient, threshold=threshold)[7] == "ok"
        assert evaluate("selection_rate", y, p, patient, threshold=threshold).value == value
        assert evaluate("balanced_accuracy", y, p, patient, threshold=threshold).value == 0.5
    assert evaluate("selection_rate", y, p, patient // 4, threshold=0.5).status == "below_min_pos"


def test_support_counts_patients_not_images():
    y, p, patient = sample(10, 40, images=10)
    assert evaluate("auroc", y, p, patient).status == "below_min_pos"
    assert evaluate("auroc", y, p, patient, min_patients=20).status == "ok"
    assert evaluate("tpr", y, p, patient, min_patients=20, threshold=0.5).status == "ok"
    few = torch.where(y, patient, 1000 + patient % 5)
    assert evaluate("auroc", y, p, few, min_patients=20).status == "below_min_neg"
    assert not math.isnan(evaluate("auroc", y, p, few, min_patients=20).value)


def test_one_score_for_all_ranks_nothing():
    y, p, patient = sample(11, 100)
    same = torch.full_like(p, 0.3)
    assert evaluate("auroc", y, same, patient).status == "constant_score"
    assert evaluate("auprc", y, same, patient).status == "constant_score"
    assert paired("auroc", y, p, same, patient).status == "constant_score"
    assert math.isnan(paired("auroc", y, p, same, patient).hi)
    assert evaluate("ece", y, same, patient).value == pytest.approx(0.2)


@pytest.mark.parametrize("images", [1, 20])
def test_perfection_of_few_patients_is_not_certainty(images):
    y = torch.tensor([0, 1] * 30).repeat_interleave(images)
    p, patient = y.double(), torch.arange(60).repeat_interleave(images)
    support = {**dict.fromkeys(METRICS, 30), **dict.fromkeys(("accuracy", "selection_rate"), 60)}
    support |= dict.fromkeys(("brier", "ece", "ece_debiased"), 60)
    zero, half = ("fpr", "brier", "ece", "ece_debiased"), ("selection_rate", "balanced_accuracy", "f1")
    for metric in METRICS:
        e = evaluate(metric, y, p, patient, threshold=0.5)
        assert e.value == (0.5 if metric == "selection_rate" else metric not in zero)
        width = 1.96**2 / (support[metric] + 1.96**2)
        if metric not in half:
            assert e.hi - e.lo == pytest.approx(width, rel=1e-3)
        both = paired(metric, y, p, p, patient, threshold_a=0.5, threshold_b=0.5)
        assert (both.value, both.lo) == (0, -both.hi)
        assert both.hi == pytest.approx(width, rel=1e-3)
    e = evaluate("balanced_accuracy", y, p, patient, threshold=0.5)
    assert 1 - e.lo == pytest.approx(math.sqrt(2) / 2 * 1.96**2 / (30 + 1.96**2), rel=1e-3)
    e = evaluate("f1", y, p, patient, threshold=0.5)
    assert e.lo == pytest.approx(2 * (x := 30 / (30 + 1.96**2)) / (1 + x), rel=1e-3)


def test_a_single_patient_has_wide_but_finite_intervals():
    y, p = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0.2, 0.9, 0.6, 0.4, 0.8, 0.1])
    for metric in METRICS:
        e = evaluate(metric, y, p, torch.full((6,), 7), threshold=0.5)
        assert e.n_patients == 1
        assert 0 <= e.lo <= e.hi <= 1
        assert e.lo <= e.value <= e.hi or metric == "ece_debiased"
        assert e.hi - e.lo > (0.45 if metric == "balanced_accuracy" else 0.5)
    # One positive patient among many negative ones: the placement of the positives says nothing of other patients.
    e = evaluate("auroc", y, p, torch.tensor([1, 0, 2, 0, 0, 3]))
    assert e.method == "wilson-bound"
    assert e.hi - e.lo > 0.5


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 4), st.integers(0, 9)), max_size=25))
def test_no_group_raises_and_every_interval_holds_its_value(rows):
    y, a, b, patient = torch.tensor(rows or np.zeros((0, 4))).long().T
    for metric in METRICS:
        options = {"threshold": 0.5} if metric in THRESHOLDED else {}
        for e in (
            evaluate(metric, y, a / 4, patient, replicates=20, **options),
            paired(metric, y, a / 4, b / 4, patient, replicates=20, threshold_a=0.5, threshold_b=0.25),
        ):
            assert e.status in metrics.STATUSES
            assert (e.n, e.n_pos + e.n_neg) == (len(rows), len(rows))
            assert math.isnan(e.value) == (e.status in ("empty", "single_class", "constant_score"))
            if not math.isnan(e.value):
                assert -1 <= e.lo <= 1
                assert e.lo <= e.hi
                if metric in LINEAR:
                    assert e.lo <= e.value <= e.hi
                    assert e.lo < e.hi


# ── Groups ──


def test_groups_are_evaluated_one_by_one_and_the_unknown_left_out():
    y, p, patient = sample(12, 300, images=2, mixed=True)
    group = torch.tensor(np.random.default_rng(12).choice([-1, 0, 1, 3], 600))
    for metric in METRICS:
        options = {"threshold": 0.5, "level": 0.9, "replicates": 50, "min_patients": 10, "seed": 5}
        estimates = evaluate_groups(metric, y, p, patient, group, 5, **options)
        for g in (0, 1, 3):
            rows = group == g
            assert estimates[g] == pytest.approx(evaluate(metric, y[rows], p[rows], patient[rows], **options))
        assert [estimates[g].status for g in (2, 4)] == ["empty", "empty"]
        assert sum(e.n for e in estimates) == int((group >= 0).sum())


def test_the_order_of_rows_does_not_matter():
    y, p, patient = sample(13, 100, images=3, mixed=True)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(13))
    for metric in METRICS:
        options = {"threshold": 0.5} if metric in THRESHOLDED else {}
        kept = evaluate(metric, y, p, patient, **options)
        shuffled = evaluate(metric, y[order], p[order], patient[order], **options)
        assert kept[:3] == pytest.approx(shuffled[:3], abs=1e-12)
        assert kept[3:] == shuffled[3:]


# ── All values at once ──


@settings(quick, max_examples=25)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 5), st.integers(-1, 2)), max_size=40),
    st.integers(2, 50),
)
def test_tabulate_gives_the_values_of_evaluate(rows, chunk):
    y, p, patient, group = torch.tensor(rows or np.zeros((0, 4))).long().T
    for given_patient in (None, patient):
        who = torch.arange(len(y)) if given_patient is None else patient
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "_CHUNK", chunk)
            table = tabulate(y, p / 6, group, 3, 0.5, patient_N=given_patient)
            again = tabulate(y, p / 6, group, 3, 0.5, p.argsort(), given_patient)
        assert tuple(table) == METRICS
        for metric in METRICS:
            options = {"threshold": 0.5, "replicates": 1}
            wanted = [
                *evaluate_groups(metric, y, p / 6, who, group, 3, **options),
                evaluate(metric, y, p / 6, who, **options),
            ]
            assert table[metric].tolist() == pytest.approx([e.value for e in wanted], abs=1e-12, nan_ok=True)
            assert torch.equal(table[metric].nan_to_num(), again[metric].nan_to_num())


def test_tabulate_of_many_rows():
    y, p, patient = sample(16, 300_000, mixed=True, prevalence=0.2)
    table = tabulate(y, p, torch.zeros(300_000).long(), 1, 0.5)
    for metric in METRICS:
        one = evaluate(metric, y, p, patient, threshold=0.5, replicates=1)
        assert table[metric].tolist() == pytest.approx([one.value] * 2, abs=1e-12)


def estimate_of(value, lo, hi, status="ok"):
    return Estimate(value, lo, hi, 100, 50, 50, 80, status, "m")


def test_gap_and_worst_take_the_bonferroni_bands_of_the_groups_that_count():
    estimates = [
        estimate_of(0.80, 0.75, 0.85),
        estimate_of(0.30, 0.10, 0.50, "below_min_pos"),
        estimate_of(0.90, 0.88, 0.92),
        estimate_of(math.nan, math.nan, math.nan, "single_class"),
        estimate_of(0.85, 0.70, 0.95),
    ]
    spread = gap(estimates)
    assert (spread.estimate.value, spread.estimate.lo, spread.estimate.hi) == pytest.approx((0.10, 0.03, 0.25))
    assert spread.groups == (2, 0)
    assert spread.excluded == ((1, "below_min_pos"), (3, "single_class"))
    assert (spread.estimate.n, spread.estimate.n_patients, spread.estimate.status) == (300, 240, "ok")
    low = worst("auroc", estimates)
    assert (low.estimate.value, low.estimate.lo, low.estimate.hi, low.groups) == (0.80, 0.70, 0.85, (0,))
    high = worst("ece", estimates)
    assert (high.estimate.value, high.estimate.lo, high.estimate.hi, high.groups) == (0.90, 0.88, 0.95, (2,))
    assert gap([estimates[0], estimates[4]]).estimate.lo == 0
    assert simultaneous(0.95, 5) == pytest.approx(0.99)


def test_gap_and_worst_of_too_few_groups_are_undefined():
    few, good = estimate_of(0.3, 0.1, 0.5, "below_min_neg"), estimate_of(0.8, 0.7, 0.9)
    for across, status in (
        (gap([few, good]), "below_min_neg"),
        (gap([good]), "empty"),
        (gap([]), "empty"),
        (worst("auroc", [few]), "below_min_neg"),
    ):
        assert math.isnan(across.estimate.value)
        assert (across.estimate.status, across.groups) == (status, ())
    assert worst("auroc", [few, good]).groups == (1,)


# ── Tests of a difference ──


@pytest.mark.parametrize("metric", METRICS)
def test_the_p_value_is_the_level_at_which_the_interval_touches_zero(metric):
    y, a, patient = sample(17, 120, images=2, mixed=True)
    b = (a + 0.4 * sample(18, 120, images=2, mixed=True)[1]) / 1.4
    options = {"threshold_a": 0.5, "threshold_b": 0.55}
    p = paired_p(metric, y, a, b, patient, **options)
    assert 0 < p <= 1
    assert p == pytest.approx(paired_p(metric, y, b, a, patient, threshold_a=0.55, threshold_b=0.5), rel=1e-6)
    inside, outside = (
        paired(metric, y, a, b, patient, level=1 - q, **options) for q in (0.98 * p, min(1.02 * p, 0.999))
    )
    assert inside.lo <= 0 <= inside.hi
    assert p > 0.97 or not outside.lo <= 0 <= outside.hi


def test_the_p_value_of_no_and_of_an_evident_difference():
    y, a, patient = sample(19, 400)
    assert paired_p("auroc", y, a, a, patient) == 1
    assert paired_p("auroc", y, a, 1 - a, patient) < 1e-12
    assert paired_p("ece", y, a, 1 - a, patient, replicates=99) == pytest.approx(2 / 100)
    assert math.isnan(paired_p("auroc", y, a, torch.zeros_like(a), patient))


def test_p_values_without_a_difference_are_uniform():
    def exchangeable(seed):
        rng = np.random.default_rng(seed)
        y = rng.random(200) < 0.4
        a, b = (torch.tensor(y + 1.2 * rng.normal(size=200)) for _ in range(2))
        return paired_p("auroc", torch.tensor(y), a, b, torch.arange(200) // 2)

    drawn = np.array([exchangeable(seed) for seed in range(300)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(drawn <= level) == pytest.approx(level, abs=0.06)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.6, math.nan, 0.02])
    assert (adjusted[0], adjusted[2]) == pytest.approx((0.6, 0.04))
    assert math.isnan(adjusted[1])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


# ── Means ──


def test_mean_is_a_clustered_t_interval_of_the_rows_that_have_a_value():
    from scipy.stats import t

    rng = np.random.default_rng(20)
    value = rng.beta(5, 5, size=400)
    e = mean(torch.tensor(value), torch.arange(400))
    half = t.ppf(0.975, 399) * value.std(ddof=1) / 20
    assert (e.value, e.lo, e.hi) == pytest.approx((value.mean(), value.mean() - half, value.mean() + half), abs=2e-4)
    assert (e.n, e.n_pos, e.n_neg, e.n_patients, e.status) == (400, 400, 0, 400, "ok")
    copies = mean(torch.tensor(value).repeat(3), torch.arange(400).repeat(3))
    assert copies[:3] == pytest.approx(e[:3])
    gaps = torch.tensor(np.where(np.arange(400) < 100, math.nan, value))
    some = mean(gaps, torch.arange(400))
    assert some.value == pytest.approx(value[100:].mean())
    assert some[3:8] == (400, 300, 100, 300, "ok")


def test_mean_of_few_none_or_equal_values():
    assert mean(torch.tensor([math.nan] * 3), torch.arange(3))[3:] == (3, 0, 3, 0, "empty", "none")
    assert mean(torch.zeros(0), torch.arange(0)).status == "empty"
    few = mean(torch.tensor([0.2, 0.9]), torch.arange(2))
    assert (few.status, 0 <= few.lo < few.value < few.hi <= 1) == ("below_min_pos", True)
    perfect = mean(torch.ones(60), torch.arange(60))
    assert perfect[:3] == pytest.approx((1, 60 / (60 + 1.96**2), 1), rel=1e-3)
    one = mean(torch.tensor([0.5, 0.7]), torch.zeros(2).long())
    assert (one.method, one.hi - one.lo > 0.5) == ("wilson-bound", True)


# ── What cannot be used ──


def test_wrong_input_is_named():
    y, p, patient = sample(14, 10)
    group = torch.zeros(10, dtype=torch.int64)
    for match, call in {
        "metric 'auc' is not one of auroc": lambda: evaluate("auc", y, p, patient),
        r"p_N has shape \(9,\), y_N \(10,\)": lambda: evaluate("auroc", y, p[1:], patient),
        "patient_N has shape": lambda: evaluate("auroc", y, p, patient[1:]),
        r"b_N has shape \(10, 1\)": lambda: paired("auroc", y, p, p[:, None], patient),
        "group_N has shape": lambda: evaluate_groups("auroc", y, p, patient, group[1:], 1),
        "group_N spans 2 … 2, outside −1 … 1": lambda: evaluate_groups("auroc", y, p, patient, group + 2, 2),
        "1 NaN among 10": lambda: evaluate("auroc", y, p.clone().index_fill_(0, group[:1], math.nan), patient),
        "ece needs probabilities; p_N spans": lambda: evaluate("ece", y, p * 3, patient),
        "ece needs probabilities; b_N spans -": lambda: paired("ece", y, p, -p, patient),
        "tpr needs a threshold": lambda: evaluate("tpr", y, p, patient),
        "y_N holds values other than 0 and 1": lambda: evaluate("auroc", y * 2, p, patient),
        "brier needs probabilities": lambda: evaluate("brier", y, p * 3, patient),
        "f1 needs a threshold": lambda: paired("f1", y, p, p, patient, threshold_a=0.5),
        "tabulate needs a threshold": lambda: tabulate(y, p, group, 1, math.nan),
        "order_N does not sort": lambda: tabulate(y, p, group, 1, 0.5, p.argsort(descending=True)),
        "order_N has shape": lambda: tabulate(y, p, group, 1, 0.5, p.argsort()[1:]),
        "ece needs probabilities; p_N": lambda: tabulate(y, p * 3, group, 1, 0.5),
        "group_N spans 1 … 1, outside": lambda: tabulate(y, p, group + 1, 1, 0.5),
        r"value_N has shape \(10,\), patient_N": lambda: mean(p, patient[1:]),
        "value_N spans 0": lambda: mean(torch.tensor([0.0, 2.0]), patient[:2]),
        "p-values span": lambda: holm([0.1, 1.2]),
        "level is 95": lambda: evaluate("auroc", y, p, patient, level=95),
        "baseline_N has shape": lambda: fvu(p, p[1:], patient),
        "error_N holds negative or NaN": lambda: fvu(-p, p, patient),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    assert evaluate("auroc", y, p * 30 - 7, patient).value == evaluate("auroc", y, p, patient).value


# ── Fraction of variance unexplained ──


def test_fvu_is_the_ratio_of_sums_with_the_error_of_a_ratio():
    rng = np.random.default_rng(15)
    baseline = rng.gamma(4, size=3000)
    error = 0.7 * baseline * rng.gamma(9, 1 / 9, size=3000)
    e = fvu(torch.tensor(error), torch.tensor(baseline), torch.arange(3000))
    ratio = error.sum() / baseline.sum()
    half = 1.96 * np.std(error - ratio * baseline, ddof=1) * math.sqrt(3000) / error.sum()
    assert (e.value, math.log(e.hi / e.value), math.log(e.value / e.lo)) == pytest.approx((ratio, half, half), rel=3e-3)
    assert (e.n, e.n_patients, e.status) == (3000, 3000, "ok")
    fives = fvu(torch.tensor(error).repeat(5), torch.tensor(baseline).repeat(5), torch.arange(3000).repeat(5))
    assert fives[:3] == pytest.approx(e[:3])


def test_fvu_without_variance_or_patients():
    ones, patient = torch.ones(4), torch.arange(4)
    assert fvu(ones, 0 * ones, patient).status == "constant_score"
    assert fvu(ones[:0], ones[:0], patient[:0]).status == "empty"
    assert (fvu(ones, 2 * ones, 0 * patient).value, math.isnan(fvu(ones, 2 * ones, 0 * patient).lo)) == (0.5, True)


# ── Coverage ──


def coverage(trial, truth, trials):
    """Share of intervals that hold the truth, over seeds; the standard error is about 1 % at 500 trials."""
    return np.mean([(e := trial(seed)).lo <= truth <= e.hi for seed in range(trials)])


def check_coverage(trials, slack):
    def single(seed):
        return evaluate("auroc", *sample(seed, 80, images=4, auroc=0.8))

    def difference(seed):
        y, a, patient = sample(seed, 80, images=2, auroc=0.85)
        return paired("auroc", y, 0.5 * a + 0.5 * sample(seed + 10**6, 80, images=2, auroc=0.85)[1], a, patient)

    def rate(seed):
        y, p, patient = sample(seed, 80, images=4, auroc=0.8)
        return evaluate("fpr", y, p, patient, threshold=0.7)

    # Seen without allowance for patients: about 80 % (single).
    assert coverage(single, 0.8, trials) == pytest.approx(0.95, abs=0.02 + slack)
    assert coverage(rate, 1 - NormalDist().cdf(math.log(7 / 3)), trials) == pytest.approx(0.95, abs=0.02 + slack)
    truth = paired("auroc", *pooled()).value
    assert coverage(difference, truth, trials) == pytest.approx(0.95, abs=0.02 + slack)


def pooled():
    y, a, patient = sample(0, 400_000, auroc=0.85)
    return y, 0.5 * a + 0.5 * sample(10**6, 400_000, auroc=0.85)[1], a, patient


def check_every_coverage(trials, slack):
    """Of the metrics whose intervals follow from influences, two images a patient; and of differences."""

    def models(seed, patients=200):
        y, a, patient = sample(seed, patients, images=2, auroc=0.85, mixed=True, prevalence=0.3)
        rng = np.random.default_rng(seed + 10**6)
        return y, a, torch.sigmoid(0.6 * a.logit() + torch.tensor(rng.normal(size=2 * patients))), patient

    many = models(0, 200_000)
    for metric in LINEAR[1:]:
        one, cuts = {"threshold": 0.6}, {"threshold_a": 0.6, "threshold_b": 0.5}
        truth = evaluate(metric, *many[:2], many[3], **one).value
        found = coverage(
            lambda seed, m=metric, o=one: evaluate(m, *models(seed)[:2], models(seed)[3], **o), truth, trials
        )
        assert found == pytest.approx(0.95, abs=0.02 + slack), metric
        truth = paired(metric, *many, **cuts).value
        found = coverage(lambda seed, m=metric, o=cuts: paired(m, *models(seed), **o), truth, trials)
        assert found == pytest.approx(0.95, abs=0.02 + slack), metric


def check_gap_coverage(trials):
    group = torch.arange(1600) % 8

    def trial(seed):
        y, p, patient = sample(seed, 1600, mixed=True, prevalence=0.3)
        return gap(evaluate_groups("auroc", y, p, patient, group, 8, level=simultaneous(0.95, 8)))

    assert coverage(lambda seed: trial(seed).estimate, 0.0, trials) >= 0.95
    assert np.mean([trial(seed).estimate.value for seed in range(10)]) > 0.08


def check_ece_coverage(trials):
    def calibrated(seed, shift):
        rng = np.random.default_rng(seed)
        logit = 1.5 * rng.normal(size=200) - 1
        y = torch.tensor(rng.random(200) < 1 / (1 + np.exp(-logit)))
        return y, torch.tensor(1 / (1 + np.exp(-logit - shift))), torch.arange(200)

    def one(seed):
        e = evaluate("ece", *calibrated(seed, 0.0), replicates=200, seed=seed)
        return e._replace(lo=e.lo - 1e-3)  # within a bin the mean score and the mean label differ by as much

    def two(seed):
        y, a, patient = calibrated(seed, 0.0)
        return paired("ece", y, a, calibrated(seed, -1.5)[1], patient, replicates=200, seed=seed)

    assert coverage(one, 0.0, trials) >= 0.9
    assert coverage(two, -0.192, trials) >= 0.93


def test_coverage_in_brief():
    check_coverage(200, slack=0.03)
    check_gap_coverage(40)
    check_ece_coverage(100)


@pytest.mark.slow
def test_coverage_at_length():
    check_coverage(2000, slack=0.01)
    check_gap_coverage(300)
    check_ece_coverage(600)


@pytest.mark.slow
def test_coverage_of_every_metric_at_length():
    check_every_coverage(2000, slack=0.01)
