"""agglom.core.metrics against other libraries, independent NumPy, and its own promises."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core import metrics
from agglom.core.metrics import Estimate, evaluate, evaluate_groups, fvu, gap, paired, simultaneous, worst

RATES = ("accuracy", "tpr", "fpr")
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
    return metrics._variance(metrics._linear(metric, y, p, threshold, metrics._codes(patient)))


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


def test_grouped_rates_are_those_of_fairlearn():
    from fairlearn.metrics import MetricFrame, false_positive_rate, true_positive_rate
    from sklearn.metrics import accuracy_score

    y, p, patient = sample(0, 400, mixed=True)
    group = torch.tensor(np.random.default_rng(0).integers(0, 4, 400))
    functions = {"accuracy": accuracy_score, "tpr": true_positive_rate, "fpr": false_positive_rate}
    frame = MetricFrame(
        metrics=functions, y_true=y.numpy(), y_pred=(p >= 0.6).numpy(), sensitive_features=group.numpy()
    ).by_group
    for metric in RATES:
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
    for metric in ("auroc", *RATES):
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
        linear = metrics._Linear(0.5, part - part.mean(), torch.ones(1, patients))
        square, fourth = float(linear.part_KI.square().sum()), float(linear.part_KI.pow(4).sum())
        df = 2 * square**2 / (fourth - square**2 / patients)
        for level in (0.8, 0.95, 0.999):
            assert metrics._t(linear, level) == pytest.approx(t.ppf((1 + level) / 2, df), rel=0.01)


def test_the_paired_variance_is_that_of_the_difference():
    y, a, patient = sample(5, 60, images=3, mixed=True)
    b = sample(6, 60, images=3, mixed=True)[1]
    for metric in ("auroc", *RATES):
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


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_no_rows(metric):
    nothing = torch.zeros(0)
    estimate = evaluate(metric, nothing, nothing, nothing.long(), threshold=0.5)
    assert math.isnan(estimate.value)
    assert estimate[3:] == (0, 0, 0, 0, "empty", "none")
    assert paired(metric, nothing, nothing, nothing, nothing.long(), threshold_a=0, threshold_b=0).status == "empty"


@pytest.mark.parametrize(("metric", "label"), [("auroc", 0), ("auroc", 1), ("tpr", 0), ("fpr", 1)])
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
    assert paired("auroc", y, p, same, patient).status == "constant_score"
    assert math.isnan(paired("auroc", y, p, same, patient).hi)
    assert evaluate("ece", y, same, patient).value == pytest.approx(0.2)


@pytest.mark.parametrize("images", [1, 20])
def test_perfection_of_few_patients_is_not_certainty(images):
    y = torch.tensor([0, 1] * 30).repeat_interleave(images)
    p, patient = y.double(), torch.arange(60).repeat_interleave(images)
    wanted = {"auroc": (1, 30), "tpr": (1, 30), "fpr": (0, 30), "accuracy": (1, 60), "ece": (0, 60)}
    for metric, (value, support) in wanted.items():
        e = evaluate(metric, y, p, patient, threshold=0.5)
        assert e.value == value
        assert e.hi - e.lo == pytest.approx(1.96**2 / (support + 1.96**2), rel=1e-3)
        both = paired(metric, y, p, p, patient, threshold_a=0.5, threshold_b=0.5)
        assert (both.value, both.lo) == (0, -both.hi)
        assert both.hi == pytest.approx(e.hi - e.lo)


def test_a_single_patient_has_wide_but_finite_intervals():
    y, p = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0.2, 0.9, 0.6, 0.4, 0.8, 0.1])
    for metric in metrics.METRICS:
        e = evaluate(metric, y, p, torch.full((6,), 7), threshold=0.5)
        assert e.n_patients == 1
        assert 0 <= e.lo <= e.value <= e.hi <= 1
        assert e.hi - e.lo > 0.5
    # One positive patient among many negative ones: the placement of the positives says nothing of other patients.
    e = evaluate("auroc", y, p, torch.tensor([1, 0, 2, 0, 0, 3]))
    assert e.method == "wilson-bound"
    assert e.hi - e.lo > 0.5


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 4), st.integers(0, 9)), max_size=25))
def test_no_group_raises_and_every_interval_holds_its_value(rows):
    y, a, b, patient = torch.tensor(rows or np.zeros((0, 4))).long().T
    for metric in metrics.METRICS:
        options = {"threshold": 0.5} if metric in RATES else {}
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
                if metric != "ece":
                    assert e.lo <= e.value <= e.hi
                    assert e.lo < e.hi


# ── Groups ──


def test_groups_are_evaluated_one_by_one_and_the_unknown_left_out():
    y, p, patient = sample(12, 300, images=2, mixed=True)
    group = torch.tensor(np.random.default_rng(12).choice([-1, 0, 1, 3], 600))
    for metric in metrics.METRICS:
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
    for metric in metrics.METRICS:
        options = {"threshold": 0.5} if metric in RATES else {}
        kept = evaluate(metric, y, p, patient, **options)
        shuffled = evaluate(metric, y[order], p[order], patient[order], **options)
        assert kept[:3] == pytest.approx(shuffled[:3], abs=1e-12)
        assert kept[3:] == shuffled[3:]


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
