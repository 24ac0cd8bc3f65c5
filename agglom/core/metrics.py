"""Metrics of a group of patients with confidence intervals; paired differences, gaps and worst groups.

Rows are images, the sampling unit is the patient: every interval allows for several images of one patient, and none
assumes that their labels agree. Tensors live on the CPU, sums are float64, nothing depends on the order of rows.
Suffixes: N rows, I patients, G groups (and one column more in `tabulate`: everybody), C calibration bins, D distinct
scores. How each value moves with each patient is in `influence`, calibration error in `calibration`.

An undefined value is NaN with a status and its counts, never a filler:

| status | value | meaning |
|---|---|---|
| ok | number | enough patients with every kind of row that the metric needs |
| below_min_pos, below_min_neg | number | fewer than `min_patients` patients with such a row, see the next table |
| empty | NaN | no rows; ppv without a row predicted positive, npv without one predicted negative |
| single_class | NaN | the metric needs a class that has no rows |
| constant_score | NaN | AUROC or AUPRC of one score for all; share of a variance that is zero |
| missing_attr | – | for the caller: the attribute is not known |

| metric | undefined without | many patients needed with |
|---|---|---|
| auroc, auprc, balanced_accuracy | positives, negatives | positives (below_min_pos), negatives (below_min_neg) |
| accuracy, brier, ece, ece_debiased | – | positives, negatives |
| tpr | positives | positives |
| fpr | negatives | negatives |
| f1 | rows that are positive or predicted so | positives |
| ppv | rows predicted positive (empty) | rows predicted positive (below_min_pos) |
| npv | rows predicted negative (empty) | rows predicted negative (below_min_neg) |
| selection_rate | – | any rows (below_min_pos) |

Promised at 95 % and checked by simulation (bench/results/coverage.md): 95 ± 2 for one group and for a paired difference
with 30 patients a class. ECE and its differences are conservative, 96 to 100: |·| bends at 0, and the interval allows
for either side in every bin that may be calibrated. So are gap and worst, which hold for all groups at once. Known
limits: about 92 % for differences from an AUROC of .99, and when a few patients hold most of the images.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from agglom.core import calibration, influence
from agglom.core.influence import Interval, Linear

THRESHOLDED = frozenset({"accuracy", "balanced_accuracy", "f1", "tpr", "fpr", "ppv", "npv", "selection_rate"})
PROBABILISTIC = frozenset({"brier", "ece", "ece_debiased"})
METRICS = (
    "auroc",
    "auprc",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "tpr",
    "fpr",
    "ppv",
    "npv",
    "selection_rate",
    "brier",
    "ece",
    "ece_debiased",
)
LOWER_IS_BETTER = frozenset({"fpr", "brier", "ece", "ece_debiased"})
STATUSES = ("ok", "empty", "single_class", "constant_score", "below_min_pos", "below_min_neg", "missing_attr")
MIN_PATIENTS = 30
BINS = calibration.BINS

# The second table above: kinds of rows without which a metric is undefined, and those whose patients must be many.
_UNDEFINED_WITHOUT = {
    "auroc": ("pos", "neg"),
    "auprc": ("pos", "neg"),
    "balanced_accuracy": ("pos", "neg"),
    "f1": ("pos or said",),
    "tpr": ("pos",),
    "fpr": ("neg",),
    "ppv": ("said",),
    "npv": ("unsaid",),
}
_NEEDS_MANY = {
    **dict.fromkeys(METRICS, ("pos", "neg")),
    "f1": ("pos",),
    "tpr": ("pos",),
    "fpr": ("neg",),
    "ppv": ("said",),
    "npv": ("unsaid",),
    "selection_rate": ("any",),
}
_FEW = {
    "pos": "below_min_pos",
    "neg": "below_min_neg",
    "said": "below_min_pos",
    "unsaid": "below_min_neg",
    "any": "below_min_pos",
}
_RANKING = ("auroc", "auprc")
_CALIBRATION = ("ece", "ece_debiased")
_NOTHING: Interval = (math.nan, math.nan, math.nan, "none")
_UNDEFINED = frozenset({"empty", "single_class", "constant_score"})
# Rows that are counted at once, and pieces that are sorted one by one: both bound memory.
_CHUNK, _PIECES = 2**17, 8


class Estimate(NamedTuple):
    """A value with its confidence interval. `n`, `n_pos`, `n_neg` count rows, `n_patients` patients."""

    value: float
    lo: float
    hi: float
    n: int
    n_pos: int
    n_neg: int
    n_patients: int
    status: str
    method: str


class Across(NamedTuple):
    """A gap or a worst group. `groups` are the ids that set the value (gap: highest, lowest; worst: that one);
    `excluded` holds (id, status) of every group that was left out."""

    estimate: Estimate
    groups: tuple[int, ...]
    excluded: tuple[tuple[int, str], ...]


def evaluate(
    metric: str,
    y_N: Tensor,
    p_N: Tensor,
    patient_N: Tensor,
    *,
    threshold: float = math.nan,
    level: float = 0.95,
    min_patients: int = MIN_PATIENTS,
    replicates: int = 1000,
    seed: int = 0,
) -> Estimate:
    """One metric of one group: labels `y_N` in {0, 1}, scores `p_N`, integer patient codes `patient_N`.

    Scores at or above `threshold` count as positive (the THRESHOLDED metrics). The PROBABILISTIC ones need scores in
    [0, 1]; the two ECE use `replicates` and `seed`.

    - auroc: DeLong et al. 1988 with the clustered variance of Obuchowski 1997 (Biometrics 53), mid-ranks for ties, the
      interval on the logit scale with Student's t at the degrees of freedom of that variance. Where nothing varies
      (AUROC of 1) or a class has one patient: Wilson's interval under the largest possible variance, θ(1−θ)/min(m, n)
      (Birnbaum and Klose 1957).
    - auprc: average precision, Σ (R_k − R_{k−1}) P_k over the distinct scores as thresholds; its influence function on
      the logit scale with Student's t. Covers 94 to 95 % in bench/results/coverage.md (AUROC .8, prevalence .3); it
      errs towards high values, by .016 at 40 positives, by .005 at 200.
    - accuracy, tpr, fpr, ppv, npv, selection_rate: Wilson 1927 at the rows that the rate is conditional on divided by
      the design effect of the patients, never below 1. Rates of 0 and 1 say nothing of that effect: all images of a
      patient then count as one opinion (Kish 1965).
    - f1: 2TP / (2TP + FP + FN) is 2J / (1 + J), J the share of true positives among the rows that are positive or said
      to be: the interval of that rate, transformed (Wilson indirect, Lam, Gopal and Qian 2023, arXiv 2309.14621).
    - balanced_accuracy: (TPR + TNR) / 2, the intervals of the two rates combined with their correlation (Newcombe 1998,
      Stat. Med. 17; Zou 2007, Psychol. Methods 12), so that a rate of 1 in a small class keeps its width.
    - brier: mean of (p − y)², clustered Student's t with the correction for skewness of `paired`, within [0, 1].
    - ece: Σ_c |Σ_{i in c} (p_i − y_i)| / n over ten equal bins [0, .1) … [.9, 1]; biased upwards in small groups. |·|
      bends at 0, where a percentile bootstrap does not cover: draws of the sums of the bins are pushed through the
      directional derivative instead (Fang and Santos 2019, Rev. Econ. Stud. 86). Their theorem asks no more of the
      draws than the right limit, so they are normal, with the clustered covariance of the sums.
    - ece_debiased: ece less its bias when the mean of every bin is normal, twice the value less the expectation about
      it (Kumar, Liang and Ma 2019, NeurIPS, "Verified uncertainty calibration", the correction of their code for the
      ℓ1 error; here in closed form and with the clustered variance), not below 0. Nothing of the bias is left far from
      calibrated; of that of a calibrated score 41 % is taken (√2 − 1), as no unbiased estimate of |·| exists. It
      estimates what ece does and shares its interval, which allows for the bias.

    Raises ValueError for a metric, shape, label, score, threshold or level that cannot be used.
    """
    common = {"min_patients": min_patients, "replicates": replicates, "seed": seed}
    return at_level(metric, y_N, p_N, patient_N, threshold=threshold, **common)(level)


def at_level(
    metric: str,
    y_N: Tensor,
    p_N: Tensor,
    patient_N: Tensor,
    *,
    threshold: float = math.nan,
    min_patients: int = MIN_PATIENTS,
    replicates: int = 1000,
    seed: int = 0,
) -> Callable[[float], Estimate]:
    """`evaluate` as a function of its level, for several levels on the same draws of patients."""
    _check(metric, y_N, {"p_N": p_N}, patient_N, (threshold,))
    patient_N, columns = _codes(patient_N), (p_N.double(),)
    status = _status(metric, y_N.bool(), columns, (threshold,), patient_N, min_patients)
    interval: Callable[[float], Interval]
    if status in _UNDEFINED:
        interval = _nothing
    elif metric in _CALIBRATION:
        drawn = calibration.draw(metric, y_N.bool(), columns, patient_N, replicates, seed)
        interval = partial(calibration.interval, drawn)
    else:
        interval = influence.at_level(metric, y_N.bool(), columns[0], threshold, patient_N)

    def estimate(level: float) -> Estimate:
        _check_level(level)
        return _estimate(y_N, patient_N, status, interval(level))

    return estimate


def evaluate_groups(
    metric: str,
    y_N: Tensor,
    p_N: Tensor,
    patient_N: Tensor,
    group_N: Tensor,
    groups: int,
    *,
    threshold: float = math.nan,
    level: float = 0.95,
    min_patients: int = MIN_PATIENTS,
    replicates: int = 1000,
    seed: int = 0,
) -> list[Estimate]:
    """`evaluate` for each of the `groups` ids in turn; rows of group −1 (not annotated) take no part.

    Raises ValueError as `evaluate` does, and for ids outside −1 … groups − 1.
    """
    _check(metric, y_N, {"p_N": p_N}, patient_N, (threshold,))
    _check_groups(y_N, group_N, groups)
    sizes = torch.bincount(group_N + 1, minlength=groups + 1).tolist()
    one = partial(evaluate, metric, threshold=threshold, level=level)
    one = partial(one, min_patients=min_patients, replicates=replicates, seed=seed)
    order_N = group_N.argsort(stable=True)
    return [one(y_N[rows], p_N[rows], patient_N[rows]) for rows in order_N.split(sizes)[1:]]


def tabulate(
    y_N: Tensor,
    p_N: Tensor,
    group_N: Tensor,
    groups: int,
    threshold: float,
    order_N: Tensor | None = None,
    patient_N: Tensor | None = None,
) -> dict[str, Tensor]:
    """The values of all METRICS without intervals: float64 (G + 1,), the last of all rows, those of group −1 included.

    One sort of the probabilities `p_N`, none if `order_N` is given (`p_N.argsort()`, for several views of the same
    scores), and counts. `evaluate` of each group gives the same values; where patients have several images
    `ece_debiased` needs `patient_N` for that, without it every row is a patient of its own. Undefined is NaN. Without
    `patient_N`, and unless most scores are equal, memory stays below twice that of the scores.
    Raises ValueError as `evaluate_groups` does, and for an order that does not sort the scores.
    """
    _check("ece", y_N, {"p_N": p_N}, y_N if patient_N is None else patient_N, (threshold,))
    _check_shape(y_N, "order_N", y_N if order_N is None else order_N)
    if math.isnan(threshold):
        raise ValueError("tabulate needs a threshold; choose it on the validation split")
    _check_groups(y_N, group_N, groups)
    y_N, p_N = y_N.bool(), p_N.double()
    count_G4, sum_GC, square_GC = _sums(y_N, p_N, group_N, groups, threshold)
    n_G = count_G4.sum(1)
    found = {metric: influence.rate(metric, count_G4) for metric in sorted(THRESHOLDED)}
    found["brier"], found["ece"] = square_GC.sum(1) / n_G, sum_GC.abs().sum(1) / n_G
    found["auroc"], found["auprc"] = _ranks(y_N, p_N, group_N, groups, order_N, count_G4)
    if patient_N is None:
        mean_GC = sum_GC / n_G[:, None]
        variance_GC = (square_GC / n_G[:, None] - mean_GC.square()) / (n_G - 1).clamp(min=1)[:, None]
        found["ece_debiased"] = calibration.corrected(mean_GC, variance_GC)
    else:
        found["ece_debiased"] = torch.stack(
            [
                *(_debiased(*(x_N[group_N == g] for x_N in (y_N, p_N, patient_N))) for g in range(groups)),
                _debiased(y_N, p_N, patient_N),
            ]
        )
    return {metric: found[metric] for metric in METRICS}


def ascending(value_N: Tensor, order_N: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows (int64) in ascending order of their values, and the values: in pieces, equal values in the same one.

    By `order_N` where it is given, else by sorting an eighth of the rows at a time, cut at quantiles of a sample.
    """

    for order_X in _sorted(value_N) if order_N is None else [order_N]:

        def value(place: int, order_X: Tensor = order_X) -> float:
            return value_N[order_X[place]].item()

        start, places = 0, range(len(order_X))
        while start < len(order_X):
            stop = min(start + _CHUNK, len(order_X))
            if stop < len(order_X):
                before = bisect_left(places, value(stop), start, stop, key=value)
                stop = before if before > start else bisect_right(places, value(stop), stop, key=value)
            rows_X = order_X[start:stop]
            yield rows_X, value_N.index_select(0, rows_X)
            start = stop


def _sorted(value_N: Tensor) -> Iterator[Tensor]:
    value_N = value_N.contiguous()
    sample_X = value_N[:: max(1, len(value_N) // 2**12)].sort().values
    pieces = _PIECES if len(value_N) > _CHUNK else 1
    edges = sample_X[:: max(1, len(sample_X) // pieces)][1:pieces].unique()
    piece_N = torch.bucketize(value_N, edges, right=True, out_int32=True).to(torch.uint8)
    for piece in range(len(edges) + 1):
        rows_X = (piece_N == piece).nonzero()[:, 0]
        yield rows_X[value_N[rows_X].argsort(stable=True)]


def paired(
    metric: str,
    y_N: Tensor,
    a_N: Tensor,
    b_N: Tensor,
    patient_N: Tensor,
    *,
    threshold_a: float = math.nan,
    threshold_b: float = math.nan,
    level: float = 0.95,
    min_patients: int = MIN_PATIENTS,
    replicates: int = 1000,
    seed: int = 0,
) -> Estimate:
    """The metric of scores `a_N` minus that of scores `b_N` on the same rows, each at its own threshold.

    All but the two ECE: clustered variance of the difference of the influences (for AUROC the covariance of DeLong and
    Obuchowski), Student's t as above; the side towards which the influences are skewed is widened by the correction of
    Hall 1992 (J. R. Statist. Soc. B 54), the other is not narrowed. Where the two never differ: the bound of no event
    among that many patients. ece: the directional draws, both on the same ones; conservative, as it takes the
    least favourable side in every bin that may be calibrated.
    A one-sided 95 % bound is `lo` or `hi` at level .90. Raises ValueError as `evaluate` does.
    """
    _check(metric, y_N, {"a_N": a_N, "b_N": b_N}, patient_N, (threshold_a, threshold_b))
    _check_level(level)
    thresholds, patient_N = (threshold_a, threshold_b), _codes(patient_N)
    status, at = _difference(metric, y_N, (a_N, b_N), thresholds, patient_N, min_patients, replicates, seed)
    return _estimate(y_N, patient_N, status, at(level))


def paired_p(
    metric: str,
    y_N: Tensor,
    a_N: Tensor,
    b_N: Tensor,
    patient_N: Tensor,
    *,
    threshold_a: float = math.nan,
    threshold_b: float = math.nan,
    replicates: int = 1000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of `paired` against no difference: the largest p whose interval at level 1 − p holds 0.

    By bisection, so it agrees with the interval at every level: the correction for skewness and the bounds of pairs
    that never differ are in it. Not below 1e-15, for the two ECE not below 2 / (replicates + 1). NaN where the
    difference is undefined. Raises ValueError as `evaluate` does.
    """
    _check(metric, y_N, {"a_N": a_N, "b_N": b_N}, patient_N, (threshold_a, threshold_b))
    thresholds, patient_N = (threshold_a, threshold_b), _codes(patient_N)
    status, at = _difference(metric, y_N, (a_N, b_N), thresholds, patient_N, 1, replicates, seed)
    if status in _UNDEFINED:
        return math.nan
    return _bisected(lambda level: at(level)[1:3], 2 / (replicates + 1) if metric in _CALIBRATION else 1e-15)


def p_value(difference: Callable[[float], Estimate]) -> float:
    """The same of any difference, given as a function of the level of its interval; NaN where it is undefined."""
    if math.isnan(difference(0.95).lo):
        return math.nan
    return _bisected(lambda level: difference(level)[1:3], 1e-15)


def _bisected(interval: Callable[[float], tuple[float, ...]], smallest: float) -> float:
    inside, outside = math.log10(smallest), 0.0
    for _ in range(50):
        middle = (inside + outside) / 2
        lo, hi = interval(1 - 10**middle)
        inside, outside = (middle, outside) if lo <= 0 <= hi else (inside, middle)
    return 10**outside


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979, Scand. J. Statist. 6): each at or below α is a claim at a
    familywise error of α. NaN stays NaN and is not counted. Raises ValueError for numbers outside [0, 1]."""
    known = sorted((one, index) for index, one in enumerate(p) if not math.isnan(one))
    if any(not 0 <= one <= 1 for one, _ in known):
        raise ValueError(f"p-values span {known[0][0]:g} … {known[-1][0]:g}; expected numbers from 0 to 1")
    adjusted, least = list(p), 0.0
    for rank, (one, index) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * one))
        adjusted[index] = least
    return adjusted


def mean(value_N: Tensor, patient_N: Tensor, *, level: float = 0.95, min_patients: int = MIN_PATIENTS) -> Estimate:
    """The mean of a measure in [0, 1] of each image, such as Dice: clustered Student's t with the correction for
    skewness of `paired`; where nothing varies Wilson's interval under the largest variance that such values can have.

    NaN rows, images in which the measure is undefined, are left out of the mean and counted: `n` is all rows, `n_pos`
    those with a value, `n_neg` those without, `n_patients` the patients with a value. `empty` without any value,
    `below_min_pos` with fewer than `min_patients` patients. Raises ValueError for shapes, values or a level that cannot
    be used.
    """
    return mean_at_level(value_N, patient_N, min_patients=min_patients)(level)


def mean_at_level(
    value_N: Tensor, patient_N: Tensor, *, min_patients: int = MIN_PATIENTS
) -> Callable[[float], Estimate]:
    """`mean` as a function of its level."""
    return _of_means([value_N], patient_N, min_patients)


def mean_difference(
    a_N: Tensor, b_N: Tensor, patient_N: Tensor, *, min_patients: int = MIN_PATIENTS
) -> Callable[[float], Estimate]:
    """The mean of `a_N` minus that of `b_N` over the rows on which both are defined, as a function of the level of its
    interval, which is that of `paired`; else as `mean`."""
    return _of_means([a_N, b_N], patient_N, min_patients)


def _of_means(columns: Sequence[Tensor], patient_N: Tensor, min_patients: int) -> Callable[[float], Estimate]:
    known_N = torch.ones(patient_N.shape, dtype=torch.bool)
    for value_N in columns:
        if value_N.ndim != 1 or patient_N.shape != value_N.shape:
            shapes = f"{tuple(value_N.shape)}, patient_N {tuple(patient_N.shape)}"
            raise ValueError(f"value_N has shape {shapes}; expected (N,) for both")
        if not bool((((value_N >= 0) & (value_N <= 1)) | value_N.isnan()).all()):
            least, most = value_N.nan_to_num(0).min(), value_N.nan_to_num(0).max()
            raise ValueError(f"value_N spans {least:g} … {most:g}; expected values from 0 to 1, or NaN")
        known_N = known_N & ~value_N.isnan()
    n, known, patient_X = len(known_N), int(known_N.sum()), _codes(patient_N[known_N])
    patients = int(patient_X.max()) + 1 if known else 0
    linear = [influence.of_mean(value_N[known_N].double(), patient_X) for value_N in columns] if known else []
    status = "empty" if not known else "ok" if patients >= min_patients else "below_min_pos"
    interval: Callable[[float], Interval] = _nothing
    if len(linear) == 1:
        interval = partial(influence.mean, linear[0])
    elif linear:
        interval = partial(influence.difference, *influence.less(*linear))

    def estimate(level: float) -> Estimate:
        _check_level(level)
        value, lo, hi, method = interval(level)
        return Estimate(value, lo, hi, n, known, n - known, patients, status, method)

    return estimate


def simultaneous(level: float, groups: int) -> float:
    """The level of each interval at which those of all `groups` hold together with `level` (Bonferroni)."""
    return 1 - (1 - level) / max(1, groups)


def gap(estimates: Sequence[Estimate]) -> Across:
    """Highest minus lowest group, with a conservative band from intervals at the `simultaneous` level:
    lo = max(0, max lo_g − min hi_g), hi = max hi_g − min lo_g, whatever the dependence between groups.

    Groups whose status is not ok are left out; with fewer than two others the gap is NaN with the status of the first
    one left out. Counts are sums over the groups that took part.
    """
    usable, excluded = _usable(estimates)
    if len(usable) < 2:
        return _undefined(excluded)
    kept = [estimates[g] for g in usable]
    high, low = (pick(usable, key=lambda g: estimates[g].value) for pick in (max, min))
    value = estimates[high].value - estimates[low].value
    lo, hi = max(e.lo for e in kept) - min(e.hi for e in kept), max(e.hi for e in kept) - min(e.lo for e in kept)
    n, n_pos, n_neg, patients = (
        sum(c) for c in zip(*((e.n, e.n_pos, e.n_neg, e.n_patients) for e in kept), strict=True)
    )
    estimate = Estimate(value, max(0.0, lo), hi, n, n_pos, n_neg, patients, "ok", "simultaneous-bonferroni")
    return Across(estimate, (high, low), excluded)


def worst(metric: str, estimates: Sequence[Estimate]) -> Across:
    """The worst group, with a conservative band from intervals at the `simultaneous` level: the lowest group lies in
    [min lo_g, min hi_g], the highest (where lower is better) in [max lo_g, max hi_g].

    Groups whose status is not ok are left out; without any other, NaN with the status of the first one left out.
    Counts are those of the worst group.
    """
    usable, excluded = _usable(estimates)
    if not usable:
        return _undefined(excluded)
    pick = max if metric in LOWER_IS_BETTER else min
    group = pick(usable, key=lambda g: estimates[g].value)
    lo, hi = pick(estimates[g].lo for g in usable), pick(estimates[g].hi for g in usable)
    return Across(estimates[group]._replace(lo=lo, hi=hi, method="simultaneous-bonferroni"), (group,), excluded)


def fvu(error_N: Tensor, baseline_N: Tensor, patient_N: Tensor, *, level: float = 0.95) -> Estimate:
    """Σ error / Σ baseline: the fraction of variance unexplained, when `baseline_N` is the error of the train mean.

    A ratio of sums over patients, linearised (Cochran 1977, section 6), on the log scale. With one patient, or no error
    at all, there is a value but no interval (NaN). Raises ValueError for shapes that differ and for negative errors.
    """
    for name, value_N in (("error_N", error_N), ("baseline_N", baseline_N), ("patient_N", patient_N)):
        if value_N.ndim != 1 or value_N.shape != error_N.shape:
            raise ValueError(f"{name} has shape {tuple(value_N.shape)}, error_N {tuple(error_N.shape)}; expected (N,)")
        if value_N is not patient_N and not bool((value_N >= 0).all()):
            raise ValueError(f"{name} holds negative or NaN values; expected squared errors")
    patient_N = _codes(patient_N)
    size_I, total = torch.bincount(patient_N), float(baseline_N.double().sum())
    counts = (len(error_N), 0, 0, len(size_I))
    if not total:
        return Estimate(math.nan, math.nan, math.nan, *counts, "constant_score" if len(size_I) else "empty", "none")
    value = float(error_N.double().sum()) / total
    residual_N = (error_N.double() - value * baseline_N.double()) / total
    linear = Linear(value, torch.bincount(patient_N, residual_N)[None], size_I[None])
    found = influence.moments(linear)
    known = value > 0 and 0 < found.variance < math.inf
    factor = math.exp(influence.t_of(found.df, level) * math.sqrt(found.variance) / value) if known else math.nan
    return Estimate(value, value / factor, value * factor, *counts, "ok", "linearised-log")


def status_of(
    metric: str,
    rows: Callable[[str], int],
    patients: Callable[[str], int],
    constant: Callable[[], bool],
    min_patients: int,
) -> str:
    """By the two tables above: from how many rows, and patients with such a row, there are of a kind ("pos", "neg",
    "said", "unsaid", "pos or said", "any"), and whether all rows have the same score. There are rows."""
    for kind in _UNDEFINED_WITHOUT.get(metric, ()):
        if not rows(kind):
            return "empty" if kind in ("said", "unsaid") else "single_class"
    if metric in _RANKING and constant():
        return "constant_score"
    return next((_FEW[kind] for kind in _NEEDS_MANY[metric] if patients(kind) < min_patients), "ok")


def _check(
    metric: str,
    y_N: Tensor,
    columns: dict[str, Tensor],
    patient_N: Tensor,
    thresholds: Sequence[float],
) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    if metric in THRESHOLDED and any(map(math.isnan, thresholds)):
        raise ValueError(f"{metric} needs a threshold; choose it on the validation split")
    for name, value_N in (*columns.items(), ("patient_N", patient_N)):
        _check_shape(y_N, name, value_N)
    for name, p_N in columns.items():
        if bool(p_N.isnan().any()):
            raise ValueError(f"{name} holds {int(p_N.isnan().sum())} NaN among {len(p_N)} scores")
        if metric in PROBABILISTIC and not bool(((p_N >= 0) & (p_N <= 1)).all()):
            raise ValueError(f"{metric} needs probabilities; {name} spans {p_N.min():g} … {p_N.max():g}")
    if not bool(((y_N == 0) | (y_N == 1)).all()):
        raise ValueError("y_N holds values other than 0 and 1; drop the rows whose label is not known")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level:g}; expected a value between 0 and 1, such as 0.95")


def _check_shape(y_N: Tensor, name: str, value_N: Tensor) -> None:
    if y_N.ndim != 1 or value_N.shape != y_N.shape:
        raise ValueError(f"{name} has shape {tuple(value_N.shape)}, y_N {tuple(y_N.shape)}; expected (N,) for both")


def _check_groups(y_N: Tensor, group_N: Tensor, groups: int) -> None:
    _check_shape(y_N, "group_N", group_N)
    if len(group_N) and not (int(group_N.min()) >= -1 and int(group_N.max()) < groups):
        raise ValueError(f"group_N spans {int(group_N.min())} … {int(group_N.max())}, outside −1 … {groups - 1}")


def _codes(patient_N: Tensor) -> Tensor:
    """Patients as 0 … I − 1, in the order of their codes."""
    if len(patient_N) and 0 <= int(patient_N.min()) <= int(patient_N.max()) < 8 * len(patient_N):
        # Without sorting, as this is done for every metric of every group.
        return ((torch.bincount(patient_N) > 0).cumsum(0) - 1).index_select(0, patient_N.long())
    return patient_N.unique(return_inverse=True)[1]


def _estimate(y_N: Tensor, patient_N: Tensor, status: str, found: Interval) -> Estimate:
    value, lo, hi, method = found
    n, n_pos, patients = len(y_N), int(y_N.sum()), int(patient_N.max()) + 1 if len(y_N) else 0
    return Estimate(value, lo, hi, n, n_pos, n - n_pos, patients, status, method)


def _status(
    metric: str,
    y_N: Tensor,
    columns: Sequence[Tensor],
    thresholds: Sequence[float],
    patient_N: Tensor,
    min_patients: int,
) -> str:
    """By the two tables above; of several columns of scores, each must do."""
    if not len(y_N):
        return "empty"
    found = []
    for p_N, threshold in zip(columns, thresholds, strict=True):

        def rows(kind: str, p_N: Tensor = p_N, threshold: float = threshold) -> Tensor:
            if kind == "pos or said":
                return rows("pos") | rows("said")
            if kind in ("said", "unsaid"):
                return p_N >= threshold if kind == "said" else p_N < threshold
            return {"pos": y_N, "neg": ~y_N}.get(kind, torch.ones_like(y_N))

        found.append(
            status_of(
                metric,
                lambda kind, rows=rows: int(rows(kind).any()),  # type: ignore[misc]
                lambda kind, rows=rows: int(torch.bincount(patient_N[rows(kind)]).count_nonzero()),  # type: ignore[misc]
                lambda p_N=p_N: bool((p_N == p_N[0]).all()),  # type: ignore[misc]
                min_patients,
            )
        )
    weak = sorted((one for one in found if one != "ok"), key=lambda one: one not in _UNDEFINED)
    return weak[0] if weak else "ok"


def _difference(
    metric: str,
    y_N: Tensor,
    scores: Sequence[Tensor],
    thresholds: Sequence[float],
    patient_N: Tensor,
    min_patients: int,
    replicates: int,
    seed: int,
) -> tuple[str, Callable[[float], Interval]]:
    """The status, and the interval of the first scores' metric minus the second's as a function of its level."""
    y_N, columns = y_N.bool(), [p_N.double() for p_N in scores]
    status = _status(metric, y_N, columns, thresholds, patient_N, min_patients)
    if status in _UNDEFINED:
        return status, _nothing
    if metric in _CALIBRATION:
        drawn = calibration.draw(metric, y_N, columns, patient_N, replicates, seed)
        return status, partial(calibration.interval, drawn)
    a, b = (influence.linearise(metric, y_N, *pair, patient_N) for pair in zip(columns, thresholds, strict=True))
    return status, partial(influence.difference, *influence.less(a, b))


def _sums(y_N: Tensor, p_N: Tensor, group_N: Tensor, groups: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group and, last, of all rows: counts of TP, FP, FN, TN; Σ (p − y) and Σ (p − y)² by calibration bin."""
    columns = groups + 1
    count_X, sum_X, square_X = (torch.zeros(columns * cells, dtype=torch.float64) for cells in (4, BINS, BINS))
    for y_X, p_X, group_X in zip(*(value_N.split(_CHUNK) for value_N in (y_N, p_N, group_N)), strict=True):
        column_X = group_X.remainder(columns)  # −1 becomes the last
        cell_X = 4 * column_X + 2 * (p_X < threshold).long() + (~y_X).long()
        count_X += torch.bincount(cell_X, minlength=len(count_X))
        cell_X, residual_X = BINS * column_X + calibration.bin_of(p_X), p_X - y_X.double()
        sum_X += torch.bincount(cell_X, residual_X, minlength=len(sum_X))
        square_X += torch.bincount(cell_X, residual_X.square(), minlength=len(square_X))
    count_G4, sum_GC, square_GC = (cells_X.view(columns, -1) for cells_X in (count_X, sum_X, square_X))
    for cells_GX in (count_G4, sum_GC, square_GC):
        cells_GX[-1] = cells_GX.sum(0)
    return count_G4, sum_GC, square_GC


def _ranks(
    y_N: Tensor, p_N: Tensor, group_N: Tensor, groups: int, order_N: Tensor | None, count_G4: Tensor
) -> tuple[Tensor, Tensor]:
    """AUROC and average precision of each group and, last, of all rows."""
    total_2G = torch.stack([count_G4.sum(1), count_G4[:, 0] + count_G4[:, 2]])
    # Of small integers, as these are quick to gather and to sort.
    code_N = group_N.remainder(groups + 1).to(torch.int16 if groups < 2**14 else torch.int64).mul_(2).add_(y_N)
    sum_5G = torch.zeros(5, groups + 1, dtype=torch.float64)
    last = None
    for rows_X, p_X in ascending(p_N, order_N):
        if not bool((p_X[1:] >= p_X[:-1]).all()) or (last is not None and last > p_X[0]):
            raise ValueError("order_N does not sort the scores; pass p_N.argsort()")
        last = p_X[-1]
        code_X = code_N.index_select(0, rows_X)
        everybody_X = (code_X & 1).add_(2 * groups)
        by_group_X = (code_X >> 1).argsort(stable=True)
        by_group = code_X.index_select(0, by_group_X), p_X.index_select(0, by_group_X)
        # The rows of no group stand in the last column until everybody takes it.
        for mine, columns in ((slice(-1), by_group), (slice(-1, None), (everybody_X, p_X))):
            sum_5G[:, mine] += _ranked(*columns, total_2G - sum_5G[3:])[:, mine]
    lost_G, precision_G, distinct_G, n_G, pos_G = sum_5G
    known_G = (distinct_G > 1) & (pos_G > 0) & (pos_G < n_G)
    auroc_G, precision_G = 1 - lost_G / (pos_G * (n_G - pos_G)), precision_G / pos_G
    return auroc_G.where(known_G, math.nan), precision_G.where(known_G, math.nan)


def _ranked(code_X: Tensor, p_X: Tensor, left_2G: Tensor) -> Tensor:
    """What a piece of the rows, column by column in ascending order of their scores, adds to each column, (5, G): pairs
    lost, precision summed over positives, distinct scores, rows, positives. `left_2G`: rows and positives that the
    column has from the piece on."""
    columns, column_X, y_X = left_2G.shape[1], code_X >> 1, code_X & 1
    new_X = torch.ones(len(p_X), dtype=torch.bool)
    torch.ne(p_X[1:], p_X[:-1], out=new_X[1:])
    new_X[1:] |= column_X[1:] != column_X[:-1]
    first_D, before_X = new_X.nonzero()[:, 0], pad(y_X.cumsum(0), (1, 0))
    end_D = torch.cat([first_D[1:], torch.tensor([len(p_X)])])
    with_D = before_X.index_select(0, end_D) > before_X.index_select(0, first_D)
    # From here on only of scores that a positive has, W.
    first_W, end_W = first_D[with_D], end_D[with_D]
    before_W, column_W = before_X.index_select(0, first_W), column_X.index_select(0, first_W).long()
    pos_W = before_X.index_select(0, end_W) - before_W
    edges = pad(torch.bincount(column_X, minlength=columns).cumsum(0), (1, 0))
    start_2G = left_2G + torch.stack([edges, before_X[edges]])[:, :-1]
    row_left_W, pos_left_W = start_2G[0][column_W] - first_W, start_2G[1][column_W] - before_W
    lost_W = pos_W * (row_left_W - pos_left_W - (end_W - first_W - pos_W) / 2)
    precision_W = pos_W * pos_left_W / row_left_W
    sums = [torch.bincount(column_W, w_W, minlength=columns) for w_W in (lost_W, precision_W)]
    counts = [edge_G.diff() for edge_G in (torch.searchsorted(first_D, edges), edges, before_X[edges])]
    return torch.stack([*sums, *counts])


def _debiased(y_X: Tensor, p_X: Tensor, patient_X: Tensor) -> Tensor:
    if not len(y_X):
        return torch.tensor(math.nan, dtype=torch.float64)
    patient_X = _codes(patient_X)
    return calibration.debiased(calibration.residuals(y_X, p_X, patient_X), torch.bincount(patient_X))


def _nothing(level: float) -> Interval:
    return _NOTHING


def _usable(estimates: Sequence[Estimate]) -> tuple[list[int], tuple[tuple[int, str], ...]]:
    usable = [g for g, e in enumerate(estimates) if e.status == "ok"]
    return usable, tuple((g, e.status) for g, e in enumerate(estimates) if e.status != "ok")


def _undefined(excluded: tuple[tuple[int, str], ...]) -> Across:
    status = excluded[0][1] if excluded else "empty"
    return Across(Estimate(math.nan, math.nan, math.nan, 0, 0, 0, 0, status, "none"), (), excluded)
