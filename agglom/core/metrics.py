"""Metrics of a group of patients with confidence intervals; paired differences, gaps and worst groups.

Rows are images, the sampling unit is the patient: every interval allows for several images of one patient, and none
assumes that their labels agree. Tensors live on the CPU, sums are float64, nothing depends on the order of rows.
Suffixes: N rows, I patients, C calibration bins, R bootstrap draws, P predictors, K parts of an influence (positives
and negatives for AUROC, one for the rest).

An undefined value is NaN with a status and its counts, never a filler:

| status | value | meaning |
|---|---|---|
| ok | number | enough patients of every class that the metric needs |
| below_min_pos, below_min_neg | number | fewer than `min_patients` patients with a positive (negative) image |
| empty | NaN | no rows |
| single_class | NaN | the metric needs a class that has no rows |
| constant_score | NaN | AUROC of one score for all; share of a variance that is zero |
| missing_attr | – | for the caller: the attribute is not known |

Promised at 95 % and checked by simulation: 95 ± 2 for one group and for a paired difference with 30 patients a class.
Known limits: about 92 % for differences from an AUROC of .99, and when a few patients hold most of the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

METRICS = ("auroc", "accuracy", "tpr", "fpr", "ece")
LOWER_IS_BETTER = frozenset({"fpr", "ece"})
STATUSES = ("ok", "empty", "single_class", "constant_score", "below_min_pos", "below_min_neg", "missing_attr")
MIN_PATIENTS = 30
BINS = 10

# Classes whose patients must be many: 1 positives, 0 negatives.
_NEEDS = {"auroc": (1, 0), "accuracy": (1, 0), "tpr": (1,), "fpr": (0,), "ece": (1, 0)}
_UNDEFINED_WITHOUT = frozenset({"auroc", "tpr", "fpr"})
_UNDEFINED = frozenset({"empty", "single_class", "constant_score"})
# A variance below this is the rounding of an exact zero.
_TINY = 1e-28

_Interval = tuple[float, float, float, str]  # value, lo, hi, method


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


class _Linear(NamedTuple):
    """A metric, the first-order influence of each patient on it, and the rows behind each influence."""

    value: float
    part_KI: Tensor
    size_KI: Tensor


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

    Scores at or above `threshold` count as positive (accuracy, tpr, fpr). `ece` alone needs probabilities and uses
    `replicates` and `seed`.

    - auroc: DeLong et al. 1988 with the clustered variance of Obuchowski 1997 (Biometrics 53), mid-ranks for ties, the
      interval on the logit scale with Student's t at the degrees of freedom of that variance. Where nothing varies
      (AUROC of 1) or a class has one patient: Wilson's interval under the largest possible variance, θ(1−θ)/min(m, n)
      (Birnbaum and Klose 1957).
    - accuracy, tpr, fpr: Wilson 1927 at n divided by the design effect of the patients, never below 1. Rates of 0 and 1
      say nothing of that effect: all images of a patient then count as one opinion (Kish 1965).
    - ece: Σ_c |Σ_{i in c} (p_i − y_i)| / n over ten equal bins [0, .1) … [.9, 1]; biased upwards in small groups. |·|
      bends at 0, where a percentile bootstrap does not cover: draws of patients are pushed through the directional
      derivative instead (Fang and Santos 2019, Rev. Econ. Stud. 86).

    Raises ValueError for a metric, shape, label, score, threshold or level that cannot be used.
    """
    return _measure(metric, y_N, {"p_N": p_N}, patient_N, (threshold,), level, min_patients, replicates, seed)


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
    _check(metric, y_N, {"p_N": p_N, "group_N": group_N}, patient_N, (threshold,), level)
    if len(group_N) and not (int(group_N.min()) >= -1 and int(group_N.max()) < groups):
        raise ValueError(f"group_N spans {int(group_N.min())} … {int(group_N.max())}, outside −1 … {groups - 1}")
    sizes = torch.bincount(group_N + 1, minlength=groups + 1).tolist()
    one = partial(evaluate, metric, threshold=threshold, level=level)
    one = partial(one, min_patients=min_patients, replicates=replicates, seed=seed)
    order_N = group_N.argsort(stable=True)
    return [one(y_N[rows], p_N[rows], patient_N[rows]) for rows in order_N.split(sizes)[1:]]


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

    auroc and rates: clustered variance of the difference of the influences (for AUROC the covariance of DeLong and
    Obuchowski), Student's t as above; the side towards which the influences are skewed is widened by the correction of
    Hall 1992 (J. R. Statist. Soc. B 54), the other is not narrowed. Where the two never differ: the bound of no event
    among that many patients. ece: the directional bootstrap, both on the same draws of patients; conservative, as it
    takes the least favourable side in every bin that may be calibrated.
    A one-sided 95 % bound is `lo` or `hi` at level .90. Raises ValueError as `evaluate` does.
    """
    scores, thresholds = {"a_N": a_N, "b_N": b_N}, (threshold_a, threshold_b)
    return _measure(metric, y_N, scores, patient_N, thresholds, level, min_patients, replicates, seed)


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
    linear = _Linear(value, torch.bincount(patient_N, residual_N)[None], size_I[None])
    variance = _variance(linear)
    known = value > 0 and 0 < variance < math.inf
    factor = math.exp(_t(linear, level) * math.sqrt(variance) / value) if known else math.nan
    return Estimate(value, value / factor, value * factor, *counts, "ok", "linearised-log")


def _measure(
    metric: str,
    y_N: Tensor,
    columns: dict[str, Tensor],
    patient_N: Tensor,
    thresholds: Sequence[float],
    level: float,
    min_patients: int,
    replicates: int,
    seed: int,
) -> Estimate:
    """The metric of one column of scores, or of the first minus the second."""
    _check(metric, y_N, columns, patient_N, thresholds, level)
    y_N, scores, patient_N = y_N.bool(), [p_N.double() for p_N in columns.values()], _codes(patient_N)
    status = _status(metric, y_N, scores, patient_N, min_patients)
    if status in _UNDEFINED:
        value, lo, hi, method = math.nan, math.nan, math.nan, "none"
    elif metric == "ece":
        value, lo, hi, method = _ece(y_N, scores, patient_N, level, replicates, seed)
    else:
        a, *b = (_linear(metric, y_N, *pair, patient_N) for pair in zip(scores, thresholds, strict=True))
        value, lo, hi, method = _difference(a, b[0], level) if b else _interval(metric, a, level)
    n, n_pos, patients = len(y_N), int(y_N.sum()), len(torch.bincount(patient_N))
    return Estimate(value, lo, hi, n, n_pos, n - n_pos, patients, status, method)


def _check(
    metric: str,
    y_N: Tensor,
    columns: dict[str, Tensor],
    patient_N: Tensor,
    thresholds: Sequence[float],
    level: float,
) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level:g}; expected a value between 0 and 1, such as 0.95")
    if metric in ("accuracy", "tpr", "fpr") and any(map(math.isnan, thresholds)):
        raise ValueError(f"{metric} needs a threshold; choose it on the validation split")
    for name, value_N in (*columns.items(), ("patient_N", patient_N)):
        if y_N.ndim != 1 or value_N.shape != y_N.shape:
            raise ValueError(f"{name} has shape {tuple(value_N.shape)}, y_N {tuple(y_N.shape)}; expected (N,) for both")
        if name in ("patient_N", "group_N"):
            continue
        if bool(value_N.isnan().any()):
            raise ValueError(f"{name} holds {int(value_N.isnan().sum())} NaN among {len(value_N)} scores")
        if metric == "ece" and not bool(((value_N >= 0) & (value_N <= 1)).all()):
            raise ValueError(f"ece needs probabilities; {name} spans {value_N.min():g} … {value_N.max():g}")
    if not bool(((y_N == 0) | (y_N == 1)).all()):
        raise ValueError("y_N holds values other than 0 and 1; drop the rows whose label is not known")


def _codes(patient_N: Tensor) -> Tensor:
    """Patients as 0 … I − 1, in the order of their codes."""
    return patient_N.unique(return_inverse=True)[1]


def _status(metric: str, y_N: Tensor, scores: Sequence[Tensor], patient_N: Tensor, min_patients: int) -> str:
    if not len(y_N):
        return "empty"
    support = {c: int(torch.bincount(patient_N[y_N == c]).count_nonzero()) for c in _NEEDS[metric]}
    if metric in _UNDEFINED_WITHOUT and not all(support.values()):
        return "single_class"
    if metric == "auroc" and any(bool((p_N == p_N[0]).all()) for p_N in scores):
        return "constant_score"
    few = [c for c, patients in support.items() if patients < min_patients]
    return ("below_min_neg", "below_min_pos")[few[0]] if few else "ok"


def _interval(metric: str, linear: _Linear, level: float) -> _Interval:
    value, variance, z = linear.value, _variance(linear), _z(level)
    spread = value * (1 - value)
    if not spread or not math.isfinite(variance) or (metric == "auroc" and variance < _TINY):
        return value, *_wilson(value, min(map(_kish, linear.size_KI)), z), "wilson-bound"
    if metric == "auroc":
        centre, half = math.log(value / (1 - value)), _t(linear, level) * math.sqrt(variance) / spread
        lo, hi = (0.5 + 0.5 * math.tanh(logit / 2) for logit in (centre - half, centre + half))
        return value, lo, hi, "delong-obuchowski-logit"
    rows, design_effect = int(linear.size_KI.sum()), 1.0
    if int(linear.size_KI.max()) > 1 and variance > _TINY:
        design_effect = max(1.0, variance * (rows - 1) / spread * (_t(linear, level) / z) ** 2)
    return value, *_wilson(value, rows / design_effect, z), "wilson-clustered"


def _difference(a: _Linear, b: _Linear, level: float) -> _Interval:
    linear = _Linear(a.value - b.value, a.part_KI - b.part_KI, a.size_KI)
    value, variance, z = linear.value, _variance(linear), _z(level)
    if not _TINY < variance < math.inf:
        below = above = _wilson(0.0, min(map(_kish, linear.size_KI)), z)[1]
        method = "wilson-bound"
    else:
        error = math.sqrt(variance)
        skew = float(linear.part_KI.sum(0).pow(3).sum()) / error**3 * (2 * z**2 + 1) / 6
        below, above = (error * (_t(linear, level) + min(1.0, max(0.0, side))) for side in (-skew, skew))
        method = "clustered-t-skew"
    return value, max(-1.0, value - below), min(1.0, value + above), method


def _linear(metric: str, y_N: Tensor, p_N: Tensor, threshold: float, patient_N: Tensor) -> _Linear:
    """AUROC: placement values of the positives and of the negatives, about their mean. Rates: hits about theirs."""
    patients = int(patient_N.max()) + 1
    if metric == "auroc":
        pos_N, neg_N = y_N, ~y_N
        parts = [(pos_N, _below(p_N[pos_N], p_N[neg_N])), (neg_N, 1 - _below(p_N[neg_N], p_N[pos_N]))]
    else:
        hit_N = (p_N >= threshold) == y_N if metric == "accuracy" else p_N >= threshold
        rows_N = {"tpr": y_N, "fpr": ~y_N}.get(metric, torch.ones_like(y_N))
        parts = [(rows_N, hit_N[rows_N].double())]
    value = float(parts[0][1].mean())
    size_KI = torch.stack([torch.bincount(patient_N[rows_N], minlength=patients) for rows_N, _ in parts])
    sum_KI = torch.stack([torch.bincount(patient_N[rows_N], v, minlength=patients) for rows_N, v in parts])
    return _Linear(value, (sum_KI - size_KI.double() * value) / size_KI.sum(1, keepdim=True), size_KI)


def _below(score_X: Tensor, other_Y: Tensor) -> Tensor:
    """Share of `other_Y` below each score, ties by half (mid-ranks), by sorting."""
    sorted_Y = other_Y.sort().values
    twice_X = torch.searchsorted(sorted_Y, score_X) + torch.searchsorted(sorted_Y, score_X, right=True)
    return twice_X.double() / (2 * len(other_Y))


def _variance(linear: _Linear) -> float:
    """Clustered variance; NaN where a part has one patient. As in Obuchowski 1997 each part is scaled by its own number
    of patients, and the covariance of the parts by the number of all patients."""
    count_K, patients = (linear.size_KI > 0).sum(1).double(), linear.size_KI.shape[1]
    square_K = linear.part_KI.square().sum(1)
    own = (square_K * (count_K / (count_K - 1))).sum()
    cross = linear.part_KI.sum(0).square().sum() - square_K.sum()
    return float(own + cross * (patients / max(1, patients - 1)))


def _t(linear: _Linear, level: float) -> float:
    """Student's quantile (Wallace 1959) at the degrees of freedom of the variance: Satterthwaite's, from the fourth
    moment of the influences, so that few patients who carry most of the variance widen the interval."""
    square_K, fourth_K = linear.part_KI.square().sum(1), linear.part_KI.pow(4).sum(1)
    noise = float((fourth_K - square_K.square() / (linear.size_KI > 0).sum(1)).sum())
    total = float(square_K.sum())
    df = 2 * total**2 / max(noise, 1e-6 * total**2)
    return math.sqrt(df * math.expm1((_z(level) * (8 * df + 3) / (8 * df + 1)) ** 2 / df))


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _kish(size_I: Tensor) -> float:
    """Effective number of rows when all rows of a patient say the same."""
    return float(size_I.double().sum().square() / size_I.double().square().sum())


def _wilson(value: float, n: float, z: float) -> tuple[float, float]:
    shrink = 1 + z**2 / n
    centre = (value + z**2 / (2 * n)) / shrink
    half = z * math.sqrt(value * (1 - value) / n + z**2 / (4 * n**2)) / shrink
    return min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half))


def _residuals(y_N: Tensor, p_N: Tensor, patient_N: Tensor) -> Tensor:
    """Sum of p − y per patient and bin, (I, C)."""
    edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
    cell_N = patient_N * BINS + torch.bucketize(p_N, edges, right=True)
    cells = BINS * (int(patient_N.max()) + 1)
    return rearrange(torch.bincount(cell_N, p_N - y_N.double(), minlength=cells), "(i c) -> i c", c=BINS)


def _moves(sum_PIC: Tensor, size_I: Tensor, replicates: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bootstrap of (estimated − true) ECE for P predictors on the same draws of patients: two (P, R) tensors.

    A draw moves bin c by h. Far from calibrated (|s| beyond √log I standard errors) |s| moves by sign(s)·h. Where s may
    be 0 the truth lies between sign(s)·h (straight) and |h| (curved).
    """
    patients, generator = len(size_I), torch.Generator().manual_seed(seed)
    flat_IX = torch.cat([*sum_PIC, size_I[:, None]], dim=1)
    chunk = max(1, 2**22 // patients)  # bounds memory, not the number of draws
    draws = []
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn_RI = torch.randint(patients, (rows, patients), generator=generator)
        cell_RI = drawn_RI + patients * torch.arange(rows)[:, None]
        times = torch.bincount(cell_RI.flatten(), minlength=rows * patients).double()
        draws.append(rearrange(times, "(r i) -> r i", r=rows) @ flat_IX)
    draw_RX = torch.cat(draws)
    draw_PRC = rearrange(draw_RX[:, :-1] / draw_RX[:, -1:], "r (p c) -> p r c", c=BINS)
    mean_PC = sum_PIC.sum(1) / size_I.sum()
    move_PRC = draw_PRC - mean_PC[:, None]
    far_PC = mean_PC.abs() > math.sqrt(math.log(patients)) * move_PRC.std(1, correction=0)
    straight_PRC = move_PRC * mean_PC.sign()[:, None]
    curved_PRC = torch.where(far_PC[:, None], straight_PRC, move_PRC.abs())
    return straight_PRC.sum(2), curved_PRC.sum(2)


def _ece(
    y_N: Tensor, scores: Sequence[Tensor], patient_N: Tensor, level: float, replicates: int, seed: int
) -> _Interval:
    """ECE of one predictor, or of the first minus the second."""
    sum_PIC = torch.stack([_residuals(y_N, p_N, patient_N) for p_N in scores])
    size_I, single = torch.bincount(patient_N), len(scores) == 1
    ece_P = sum_PIC.sum(1).abs().sum(1) / len(y_N)
    value = float(ece_P[0] - ece_P[1:].sum())
    straight_PR, curved_PR = _moves(sum_PIC, size_I, replicates, seed)
    if float(straight_PR.abs().max()) < math.sqrt(_TINY):
        bound = _wilson(value if single else 0.0, _kish(size_I), _z(level))
        return value, *(bound if single else (max(-1.0, value - bound[1]), min(1.0, value + bound[1]))), "wilson-bound"
    above_R, below_R = curved_PR[0] - straight_PR[1:].sum(0), straight_PR[0] - curved_PR[1:].sum(0)
    lo = value - float(above_R.quantile((1 + level) / 2))
    hi = value - float(below_R.quantile((1 - level) / 2))
    return value, max(0.0 if single else -1.0, lo), min(1.0, hi), "bootstrap-directional"


def _usable(estimates: Sequence[Estimate]) -> tuple[list[int], tuple[tuple[int, str], ...]]:
    usable = [g for g, e in enumerate(estimates) if e.status == "ok"]
    return usable, tuple((g, e.status) for g, e in enumerate(estimates) if e.status != "ok")


def _undefined(excluded: tuple[tuple[int, str], ...]) -> Across:
    status = excluded[0][1] if excluded else "empty"
    return Across(Estimate(math.nan, math.nan, math.nan, 0, 0, 0, 0, status, "none"), (), excluded)
