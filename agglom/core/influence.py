"""Metrics as sums of influences: how far each patient moves a value to first order, and the intervals that follow.

Intervals of `metrics` come from here, those of calibration error from `calibration`. Suffixes: N rows, I patients,
K parts of an influence (positives and negatives for AUROC, one for the rest), D distinct scores, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

# A variance below this is the rounding of an exact zero.
TINY = 1e-28

Interval = tuple[float, float, float, str]  # value, lo, hi, method


class Linear(NamedTuple):
    """A metric, the first-order influence of each patient on it, and the rows behind each influence."""

    value: float
    part_KI: Tensor
    size_KI: Tensor


class Moments(NamedTuple):
    """What the intervals need of an influence: clustered variance (NaN or infinite where a part has one patient), its
    degrees of freedom, skewness of the sum; rows, the most rows of a patient, effective rows of the smaller part."""

    variance: float
    df: float
    skew: float
    rows: int
    heaviest: int
    least: float


def selected(metric: str, y_N: Tensor, said_N: Tensor) -> tuple[Tensor, Tensor]:
    """A rate is the share of hits among the rows that it is conditional on: those rows, and the hits, both bool.

    F1 is a function of such a rate, the Jaccard index J: F1 = 2 J / (1 + J).
    """
    everybody_N = torch.ones_like(y_N)
    return {
        "accuracy": (everybody_N, said_N == y_N),
        "f1": (y_N | said_N, y_N & said_N),
        "tpr": (y_N, said_N),
        "fpr": (~y_N, said_N),
        "ppv": (said_N, y_N),
        "npv": (~said_N, ~y_N),
        "selection_rate": (everybody_N, said_N),
    }[metric]


def rate(metric: str, count_G4: Tensor) -> Tensor:
    """A thresholded metric from counts of TP, FP, FN, TN, (G,); NaN where it divides by zero."""
    if metric == "balanced_accuracy":
        return (rate("tpr", count_G4) + 1 - rate("fpr", count_G4)) / 2
    y_4, said_4 = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    rows_4, hit_4 = selected(metric, y_4, said_4)
    value_G = (count_G4.double() @ (rows_4 & hit_4).double()) / (count_G4.double() @ rows_4.double())
    return 2 * value_G / (1 + value_G) if metric == "f1" else value_G


def linearise(metric: str, y_N: Tensor, p_N: Tensor, threshold: float, patient_N: Tensor) -> Linear:
    """Any metric but a calibration error; patients 0 … I − 1, the classes that it needs present.

    auroc: placement values of the positives and of the negatives about their mean (DeLong et al. 1988, Biometrics 44);
    balanced accuracy is the AUROC of the prediction. auprc: see `_precision`. The rest: hits or squared errors of the
    rows about their mean, for F1 by the chain rule.
    """
    if metric == "auprc":
        return _precision(y_N, p_N, patient_N)
    said_N = p_N >= threshold
    if metric in ("auroc", "balanced_accuracy"):
        score_N = p_N if metric == "auroc" else said_N.double()
        pos_N, neg_N = y_N, ~y_N
        below_X, above_Y = _below(score_N[pos_N], score_N[neg_N]), 1 - _below(score_N[neg_N], score_N[pos_N])
        return _about_mean([(pos_N, below_X), (neg_N, above_Y)], patient_N)
    if metric == "brier":
        return of_mean((p_N - y_N.double()).square(), patient_N)
    rows_N, hit_N = selected(metric, y_N, said_N)
    linear = _about_mean([(rows_N, hit_N[rows_N].double())], patient_N)
    if metric != "f1":
        return linear
    stretch = 2 / (1 + linear.value) ** 2
    return Linear(2 * linear.value / (1 + linear.value), stretch * linear.part_KI, linear.size_KI)


def at_level(metric: str, y_N: Tensor, p_N: Tensor, threshold: float, patient_N: Tensor) -> Callable[[float], Interval]:
    """The interval of one metric as a function of its level, as `metrics.evaluate` describes it; arguments as
    `linearise`."""
    if metric == "balanced_accuracy":
        tpr, fpr = (linearise(rate, y_N, p_N, threshold, patient_N) for rate in ("tpr", "fpr"))
        return partial(_balanced, tpr, fpr)
    linear = linearise(metric, y_N, p_N, threshold, patient_N)
    if metric == "brier":
        return partial(mean, linear)
    return partial(interval, metric, linear.value, moments(linear))


def of_mean(value_N: Tensor, patient_N: Tensor) -> Linear:
    """The mean of all rows."""
    return _about_mean([(torch.ones_like(value_N, dtype=torch.bool), value_N)], patient_N)


def mean(linear: Linear, level: float) -> Interval:
    """The interval of a mean of values in [0, 1]: Student's t, widened on the skewed side (Hall 1992). Where nothing
    varies: Wilson's under the largest variance that such values can have."""
    found = moments(linear)
    if not TINY < found.variance < math.inf:
        return linear.value, *wilson(linear.value, found.least, z_of(level)), "wilson-bound"
    below, above = _arms(found, level)
    return linear.value, max(0.0, linear.value - below), min(1.0, linear.value + above), "clustered-t-skew"


def less(a: Linear, b: Linear) -> tuple[float, Moments]:
    """The difference of two metrics of the same patients, and its moments."""
    # Predictive values are conditional on other rows in each.
    size_KI = torch.maximum(a.size_KI, b.size_KI)
    found = moments(Linear(a.value - b.value, a.part_KI - b.part_KI, size_KI))
    return a.value - b.value, found._replace(least=min(*map(kish, a.size_KI), *map(kish, b.size_KI)))


def difference(value: float, found: Moments, level: float) -> Interval:
    """The interval of what `less` returns."""
    if TINY < found.variance < math.inf:
        (below, above), method = _arms(found, level), "clustered-t-skew"
    else:
        below = above = wilson(0.0, found.least, z_of(level))[1]
        method = "wilson-bound"
    return value, max(-1.0, value - below), min(1.0, value + above), method


def moments(linear: Linear) -> Moments:
    """Variance as in Obuchowski 1997: each part scaled by its own number of patients, the covariance of the parts by
    the number of all patients. Degrees of freedom: Satterthwaite's, from the fourth moment of the influences, so that
    few patients who carry most of the variance widen the interval."""
    part_KI, size_KI = linear.part_KI, linear.size_KI
    count_K, patients = (size_KI > 0).sum(1).double(), size_KI.shape[1]
    square_K, fourth_K, whole_I = part_KI.square().sum(1), part_KI.pow(4).sum(1), part_KI.sum(0)
    own = (square_K * (count_K / (count_K - 1))).sum()
    cross = whole_I.square().sum() - square_K.sum()
    variance = float(own + cross * (patients / max(1, patients - 1)))
    noise, total = float((fourth_K - square_K.square() / count_K).sum()), float(square_K.sum())
    df = 2 * total**2 / max(noise, 1e-6 * total**2) if total else math.inf
    skew = float(whole_I.pow(3).sum()) / variance**1.5 if variance > TINY else 0.0
    return Moments(variance, df, skew, int(size_KI.sum()), int(size_KI.max()), min(map(kish, size_KI)))


def z_of(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def t_of(df: float, level: float) -> float:
    """Student's quantile (Wallace 1959)."""
    if df == math.inf:
        return z_of(level)
    return math.sqrt(df * math.expm1((z_of(level) * (8 * df + 3) / (8 * df + 1)) ** 2 / df))


def kish(size_I: Tensor) -> float:
    """Effective number of rows when all rows of a patient say the same."""
    return float(size_I.double().sum().square() / size_I.double().square().sum())


def wilson(value: float, n: float, z: float) -> tuple[float, float]:
    shrink = 1 + z**2 / n
    centre = (value + z**2 / (2 * n)) / shrink
    half = z * math.sqrt(value * (1 - value) / n + z**2 / (4 * n**2)) / shrink
    return min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half))


def _about_mean(parts: list[tuple[Tensor, Tensor]], patient_N: Tensor) -> Linear:
    """From rows (bool) and a value for each of them: the mean, which all parts share."""
    value, patients = float(parts[0][1].mean()), int(patient_N.max()) + 1
    size_KI = torch.stack([torch.bincount(patient_N[rows_N], minlength=patients) for rows_N, _ in parts])
    sum_KI = torch.stack([torch.bincount(patient_N[rows_N], v, minlength=patients) for rows_N, v in parts])
    return Linear(value, (sum_KI - size_KI.double() * value) / size_KI.sum(1, keepdim=True), size_KI)


def _below(score_X: Tensor, other_Y: Tensor) -> Tensor:
    """Share of `other_Y` below each score, ties by half (mid-ranks), by sorting."""
    sorted_Y = other_Y.sort().values
    twice_X = torch.searchsorted(sorted_Y, score_X) + torch.searchsorted(sorted_Y, score_X, right=True)
    return twice_X.double() / (2 * len(other_Y))


def _precision(y_N: Tensor, p_N: Tensor, patient_N: Tensor) -> Linear:
    """Average precision θ = Σ_{i: y=1} P(s_i) / m over m positives, P(s) the share of positives at or above s, each
    distinct score a threshold.

    Row j enters as a positive itself and in P at every score up to its own, so with c(s) the rows at or above s its
    influence is [y_j (P(s_j) − θ) + Σ_{i: y=1, s_i ≤ s_j} (y_j − P(s_i)) / c(s_i)] / m; they sum to zero. The rows
    behind it are the positives, the scarcer class where this metric is of use.
    """
    score_D, place_N = p_N.unique(return_inverse=True)
    pos_D = torch.bincount(place_N, y_N.double(), minlength=len(score_D))
    at_least_D = torch.bincount(place_N).flip(0).cumsum(0).flip(0).double()
    precision_D = pos_D.flip(0).cumsum(0).flip(0) / at_least_D
    positives = float(pos_D.sum())
    value = min(1.0, float((pos_D * precision_D).sum()) / positives)  # rounding may end above 1
    reach_D, loss_D = (pos_D / at_least_D).cumsum(0), (pos_D * precision_D / at_least_D).cumsum(0)
    influence_N = (y_N * (precision_D - value + reach_D)[place_N] - loss_D[place_N]) / positives
    size_I = torch.bincount(patient_N[y_N], minlength=int(patient_N.max()) + 1)
    return Linear(value, torch.bincount(patient_N, influence_N)[None], size_I[None])


def interval(metric: str, value: float, found: Moments, level: float) -> Interval:
    """The interval of a ranking on the logit scale, that of a rate (f1 too) by Wilson's."""
    if metric in ("auroc", "auprc"):
        spread = value * (1 - value)
        if not spread or not TINY < found.variance < math.inf:
            return value, *wilson(value, found.least, z_of(level)), "wilson-bound"
        centre, half = math.log(value / (1 - value)), t_of(found.df, level) * math.sqrt(found.variance) / spread
        lo, hi = (0.5 + 0.5 * math.tanh(logit / 2) for logit in (centre - half, centre + half))
        return value, lo, hi, "delong-obuchowski-logit" if metric == "auroc" else "linearised-logit"
    if metric == "f1":
        squeeze = 2 / (2 - value) ** 2
        found = found._replace(variance=squeeze**2 * found.variance)
        _, *ends, method = _clustered(value / (2 - value), found, level)
        lo, hi = (2 * end / (1 + end) for end in ends)
        return value, min(value, lo), max(value, hi), method
    return _clustered(value, found, level)


def _clustered(value: float, found: Moments, level: float) -> Interval:
    """Wilson's interval at the rows divided by the design effect of the patients, never below 1."""
    spread, z, design_effect = value * (1 - value), z_of(level), 1.0
    if not spread or not math.isfinite(found.variance):
        return value, *wilson(value, found.least, z), "wilson-bound"
    if found.heaviest > 1 and found.variance > TINY:
        design_effect = max(1.0, found.variance * (found.rows - 1) / spread * (t_of(found.df, level) / z) ** 2)
    return value, *wilson(value, found.rows / design_effect, z), "wilson-clustered"


def _balanced(tpr: Linear, fpr: Linear, level: float) -> Interval:
    found = [moments(one) for one in (tpr, fpr)]
    (a, a_lo, a_hi, _), (b, b_lo, b_hi, _) = (
        _clustered(one.value, its, level) for one, its in zip((tpr, fpr), found, strict=True)
    )
    patients, scale = tpr.size_KI.shape[1], math.sqrt(found[0].variance * found[1].variance)
    covariance = float((tpr.part_KI * fpr.part_KI).sum()) * patients / max(1, patients - 1)
    together = max(-1.0, min(1.0, covariance / scale)) if TINY < scale < math.inf else 0.0

    def arm(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 + other**2 - 2 * together * one * other)) / 2

    value = (1 + a - b) / 2
    return value, max(0.0, value - arm(a - a_lo, b_hi - b)), min(1.0, value + arm(a_hi - a, b - b_lo)), "mover-wilson"


def _arms(found: Moments, level: float) -> tuple[float, float]:
    """How far the interval reaches below and above the value; the side without skew is not narrowed."""
    error, shift = math.sqrt(found.variance), found.skew * (2 * z_of(level) ** 2 + 1) / 6
    below, above = (error * (t_of(found.df, level) + min(1.0, max(0.0, side))) for side in (-shift, shift))
    return below, above
