"""Measures of disparity between groups beyond the gap, and what the rows of unknown group could change.

`ratio`, `gap_to_overall`, `equalized_odds` and `equity_scaled` take estimates whose intervals hold together
(`metrics.simultaneous` over all that enter) and return the range of the measure while each estimate moves freely within
its interval, or a range around that one: whatever the dependence between groups, it covers at least as often as the
intervals do together, and mostly more (bench/results/coverage.md). Groups whose status is not ok are left out and
listed; with fewer than two others the value is NaN with the status of the first one left out. Counts are sums over the
groups that took part.

Suffixes: N rows, X rows of one kind, A and B blocks of unknown positives and negatives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from agglom.core.metrics import Across, Estimate, gap, simultaneous

# What `unknown_bounds` knows.
BOUNDED = ("auroc", "accuracy", "balanced_accuracy", "f1", "tpr", "fpr", "ppv", "npv", "selection_rate", "brier")
# The bounds of AUROC are exact up to this many distinct scores of unknown rows in each class.
BLOCKS = 1024

_Bounds = tuple[float, float]


def ratio(estimates: Sequence[Estimate]) -> Across:
    """Lowest ÷ highest group, fairlearn's `ratio("between_groups")`; `groups` are the ids (lowest, highest).

    NaN with the status constant_score where every group reads 0. Raises ValueError for a negative value.
    """
    across = gap(estimates)
    if across.estimate.status != "ok":
        return across
    kept = [e for e in estimates if e.status == "ok"]
    if any(e.value < 0 for e in kept):
        raise ValueError(f"a ratio needs values of at least 0; a group reads {min(e.value for e in kept):g}")
    high, low = across.groups
    if estimates[high].value == 0:
        return _said(across, math.nan, math.nan, math.nan, (low, high), status="constant_score")
    lo = min((max(0.0, a.lo) / b.hi for a, b in itertools.permutations(kept, 2) if b.hi > 0), default=0.0)
    lowest_hi, highest_lo = min(e.hi for e in kept), max(e.lo for e in kept)
    hi = 1.0 if lowest_hi >= highest_lo else lowest_hi / highest_lo
    return _said(across, estimates[low].value / estimates[high].value, lo, hi, (low, high))


def gap_to_overall(overall: Estimate, estimates: Sequence[Estimate]) -> Across:
    """max_g |M_g − M|, fairlearn's `difference("to_overall")`; `groups` is the id that sets it.

    The interval of `overall` enters as well: level `simultaneous(level, groups + 1)`. NaN with the status of `overall`
    where that is not ok.
    """
    across = _with(overall, gap(estimates))
    if across.estimate.status != "ok":
        return across
    usable = [g for g, e in enumerate(estimates) if e.status == "ok"]
    lo_G, hi_G = [estimates[g].lo for g in usable], [estimates[g].hi for g in usable]
    group = max(usable, key=lambda g: abs(estimates[g].value - overall.value))
    # The distance to the farthest group is least midway between the highest lower and the lowest upper bound.
    nearest = min(max((max(lo_G) + min(hi_G)) / 2, overall.lo), overall.hi)
    lo = max(0.0, max(lo_G) - nearest, nearest - min(hi_G))
    hi = max(max(hi_G) - overall.lo, overall.hi - min(lo_G))
    return _said(across, abs(estimates[group].value - overall.value), lo, hi, (group,))


def equalized_odds(tpr: Sequence[Estimate], fpr: Sequence[Estimate]) -> Across:
    """The larger of the gaps of TPR and of FPR, fairlearn's `equalized_odds_difference(agg="worst_case")`.

    Two intervals a group enter: level `simultaneous(level, 2 * groups)`. A group left out of either gap is listed; NaN
    where either gap is. `groups` and counts are those of the larger gap.
    """
    gaps = [gap(tpr), gap(fpr)]
    excluded = tuple(sorted((dict(gaps[1].excluded) | dict(gaps[0].excluded)).items()))
    undefined = [across for across in gaps if across.estimate.status != "ok"]
    if undefined:
        return undefined[0]._replace(excluded=excluded)
    larger = max(gaps, key=lambda across: across.estimate.value)
    lo, hi = (max(getattr(across.estimate, side) for across in gaps) for side in ("lo", "hi"))
    return _said(larger, larger.estimate.value, lo, hi, larger.groups)._replace(excluded=excluded)


def equity_scaled(
    overall: Estimate, estimates: Sequence[Estimate], form: Literal["sum", "std"], alpha: float = 1.0
) -> Across:
    """The overall value, scaled down by how much the groups differ; `groups` are the ids that took part.

    - sum: M / (1 + α Σ_g |M_g − M|) (Luo et al., FairCLIP, CVPR 2024); falls as the number of groups grows.
    - std: M / (1 + α·std_g M_g), population standard deviation (Jin et al., FairMedFM, NeurIPS 2024).

    The interval of `overall` enters as well: level `simultaneous(level, groups + 1)`. NaN with the status of `overall`
    where that is not ok. Raises ValueError for another form or an `alpha` below 0.
    """
    if form not in ("sum", "std"):
        raise ValueError(f"form is {form!r}; expected 'sum' or 'std'")
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha:g}; expected at least 0")
    across = _with(overall, gap(estimates))
    if across.estimate.status != "ok":
        return across
    usable = [g for g, e in enumerate(estimates) if e.status == "ok"]
    values, box = [estimates[g].value for g in usable], [(estimates[g].lo, estimates[g].hi) for g in usable]
    if form == "sum":
        spread = sum(abs(value - overall.value) for value in values)
        # Against the farthest values M / (1 + α·spread) is quasi-concave in M, so it is least at an end; against the
        # nearest ones the spread is linear between the ends of the intervals, so it is greatest at one of them.
        ends = (overall.lo, overall.hi)
        inner = [x for pair in box for x in pair if overall.lo < x < overall.hi]
        lo = min(m / (1 + alpha * sum(_farthest(m, pair) for pair in box)) for m in ends)
        hi = max(m / (1 + alpha * sum(_nearest(m, pair) for pair in box)) for m in (*ends, *inner))
    else:
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        greatest, least = _deviation(_farthest, box), _deviation(_nearest, box)
        lo, hi = overall.lo / (1 + alpha * greatest), overall.hi / (1 + alpha * least)
    return _said(across, overall.value / (1 + alpha * spread), lo, hi, tuple(usable))


def detectable(estimates: Sequence[Estimate], *, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true gap that would have been found with `power` whichever two groups it lies between.

    Found: by a two-sided test at `level` over all pairs of groups together (Bonferroni), δ = (z + z_power)·√(SE_i² +
    SE_j²) for the two least precise groups. The intervals of `estimates` must be at `simultaneous(level,
    len(estimates))`: a standard error is half an interval over the normal quantile of that level, so a little too
    large where Student's t made the interval. NaN with fewer than two groups whose status is ok; above 1 for a metric
    in [0, 1] no gap could have been found. Raises ValueError for a power or level outside (0, 1).
    """
    for name, value in (("power", power), ("level", level)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value:g}; expected a value between 0 and 1")
    half_G = sorted((e.hi - e.lo) / 2 for e in estimates if e.status == "ok")
    if len(half_G) < 2:
        return math.nan
    error = math.hypot(*half_G[-2:]) / _z(simultaneous(level, len(estimates)))
    return error * (_z(simultaneous(level, math.comb(len(half_G), 2))) + NormalDist().inv_cdf(power))


def unknown_bounds(
    metric: str, y_N: Tensor, p_N: Tensor, group_N: Tensor, groups: int, threshold: float = math.nan
) -> list[tuple[float, float]]:
    """Lowest and highest value of each group over all ways in which rows of group −1 may or may not belong to it.

    Labels in {0, 1}, scores, ids −1 … groups − 1. Every row is assigned on its own, so that the bounds also hold,
    though less tightly, when the rows of a patient belong together. Assignments that leave the metric undefined do not
    count; (NaN, NaN) when all do. Bounds of a gap or a ratio: put these in place of the intervals of its estimates.

    - rates and brier are means: the unknown rows join in the order of their values. f1 rises with true positives and
      falls with false ones and missed ones. Exact.
    - auroc: of a unknown positives and b unknown negatives the lowest value takes the a lowest and the b highest
      scores. Between equal scores it is monotone in a and in b, so that only blocks of equal scores are searched, all
      pairs (a, b) by prefix sums. Exact up to BLOCKS distinct scores a class; beyond that neighbouring scores share
      the outermost score of their block, and the bounds are a little wider than they need be.

    Raises ValueError for another metric, for ids outside the range, and for a rate without a threshold.
    """
    if metric not in BOUNDED:
        raise ValueError(f"metric {metric!r} has no bounds; known: {', '.join(BOUNDED)}")
    if metric not in ("auroc", "brier") and math.isnan(threshold):
        raise ValueError(f"{metric} needs a threshold; choose it on the validation split")
    if len(group_N) and not (int(group_N.min()) >= -1 and int(group_N.max()) < groups):
        raise ValueError(f"group_N spans {int(group_N.min())} … {int(group_N.max())}, outside −1 … {groups - 1}")
    y_N, p_N = y_N.bool(), p_N.double()
    chosen_N = p_N >= threshold
    if metric == "auroc":
        lowest, mirrored = _lowest_auroc(y_N, p_N, group_N, groups), _lowest_auroc(y_N, -p_N, group_N, groups)
        return [(lo, 1 - hi) for lo, hi in zip(lowest, mirrored, strict=True)]
    if metric == "balanced_accuracy":
        tpr, fpr = (unknown_bounds(rate, y_N, p_N, group_N, groups, threshold) for rate in ("tpr", "fpr"))
        return [((t[0] + 1 - f[1]) / 2, (t[1] + 1 - f[0]) / 2) for t, f in zip(tpr, fpr, strict=True)]
    if metric == "f1":
        return _f1_bounds(y_N, chosen_N, group_N, groups)
    everyone_N = torch.ones_like(y_N)
    rows_N, value_N = {
        "accuracy": (everyone_N, chosen_N == y_N),
        "selection_rate": (everyone_N, chosen_N),
        "tpr": (y_N, chosen_N),
        "fpr": (~y_N, chosen_N),
        "ppv": (chosen_N, y_N),
        "npv": (~chosen_N, ~y_N),
        "brier": (everyone_N, (p_N - y_N.double()).square()),
    }[metric]
    return _mean_bounds(value_N[rows_N].double(), group_N[rows_N], groups)


def _with(overall: Estimate, across: Across) -> Across:
    """Undefined where `overall` is."""
    if overall.status == "ok" or across.estimate.status != "ok":
        return across
    return _said(across, math.nan, math.nan, math.nan, (), status=overall.status)


def _said(across: Across, value: float, lo: float, hi: float, groups: tuple[int, ...], status: str = "ok") -> Across:
    method = across.estimate.method if status == "ok" else "none"
    estimate = across.estimate._replace(value=value, lo=lo, hi=hi, status=status, method=method)
    return across._replace(estimate=estimate, groups=groups)


def _farthest(x: float, pair: _Bounds) -> float:
    return max(pair[1] - x, x - pair[0])


def _nearest(x: float, pair: _Bounds) -> float:
    return max(pair[0] - x, x - pair[1], 0.0)


def _deviation(reach: Callable[[float, _Bounds], float], box: Sequence[_Bounds]) -> float:
    """Standard deviation of values in the box, as min_c √mean reach(c)²: exact for the least one (`_nearest`), an upper
    bound of the greatest (`_farthest`). Convex in c: ternary search down to rounding."""

    def square(centre: float) -> float:
        return sum(reach(centre, pair) ** 2 for pair in box) / len(box)

    lo, hi = min(pair[0] for pair in box), max(pair[1] for pair in box)
    for _ in range(100):
        third = (hi - lo) / 3
        lo, hi = (lo, hi - third) if square(lo + third) < square(hi - third) else (lo + third, hi)
    return math.sqrt(square((lo + hi) / 2))


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _mean_bounds(value_X: Tensor, group_X: Tensor, groups: int) -> list[_Bounds]:
    known_X = group_X >= 0
    count_G = torch.bincount(group_X[known_X], minlength=groups)
    sum_G = torch.bincount(group_X[known_X], value_X[known_X], minlength=groups)
    rising_X = value_X[~known_X].sort().values
    joined_X = torch.arange(len(rising_X) + 1)
    lowest_X, highest_X = (pad(v_X.cumsum(0), (1, 0)) for v_X in (rising_X, rising_X.flip(0)))
    bounds = []
    for count, total in zip(count_G, sum_G, strict=True):
        means = [((total + add_X) / (count + joined_X))[count + joined_X > 0] for add_X in (lowest_X, highest_X)]
        bounds.append((float(means[0].min()), float(means[1].max())) if len(means[0]) else (math.nan, math.nan))
    return bounds


def _f1_bounds(y_N: Tensor, chosen_N: Tensor, group_N: Tensor, groups: int) -> list[_Bounds]:
    hit_N, wrong_N = y_N & chosen_N, y_N ^ chosen_N
    hits, wrongs = (torch.bincount(group_N[rows_N] + 1, minlength=groups + 1).tolist() for rows_N in (hit_N, wrong_N))

    def f1(hit: int, wrong: int) -> float:
        return 2 * hit / (2 * hit + wrong) if hit or wrong else math.nan

    bounds = []
    for hit, wrong in zip(hits[1:], wrongs[1:], strict=True):
        lo, hi = f1(hit, wrong + wrongs[0]), f1(hit + hits[0], wrong)
        # Where only one kind of row exists at all, the other end is undefined and the value is that of this kind.
        bounds.append((hi if math.isnan(lo) else lo, lo if math.isnan(hi) else hi))
    return bounds


def _lowest_auroc(y_N: Tensor, p_N: Tensor, group_N: Tensor, groups: int) -> list[float]:
    unknown_N = group_N < 0
    pos_A, pos_size_A = _blocks(p_N[unknown_N & y_N])
    neg_B, neg_size_B = _blocks(-p_N[unknown_N & ~y_N])
    neg_B = -neg_B
    wins_AB = (pos_A[:, None] > neg_B).double() + 0.5 * (pos_A[:, None] == neg_B).double()
    wins_AB = pad((wins_AB * pos_size_A[:, None] * neg_size_B).cumsum(0).cumsum(1), (1, 0, 1, 0))
    lowest = []
    for group in range(groups):
        pos_X, neg_X = p_N[(group_N == group) & y_N], p_N[(group_N == group) & ~y_N]
        wins = _below(pos_X, neg_X).sum()
        pos_wins_A = pad((_below(pos_A, neg_X) * pos_size_A).cumsum(0), (1, 0))
        neg_wins_B = pad((_below(-neg_B, -pos_X) * neg_size_B).cumsum(0), (1, 0))
        pos_size = pad(pos_size_A.cumsum(0), (1, 0)) + len(pos_X)
        neg_size = pad(neg_size_B.cumsum(0), (1, 0)) + len(neg_X)
        auroc_AB = wins_AB + (wins + pos_wins_A)[:, None]
        auroc_AB.add_(neg_wins_B).div_(pos_size[:, None]).div_(neg_size)
        value = float(auroc_AB.nan_to_num_(nan=math.inf).min())
        lowest.append(value if value < math.inf else math.nan)
    return lowest


def _blocks(score_X: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct scores, rising, and their counts; neighbours share the lowest score of their block beyond BLOCKS."""
    score_X, count_X = score_X.unique(return_counts=True)
    block_X = torch.arange(len(score_X)) * min(BLOCKS, len(score_X)) // max(1, len(score_X))
    first_X = block_X.diff(prepend=torch.tensor([-1])) > 0
    return score_X[first_X], torch.bincount(block_X, count_X.double())


def _below(score_X: Tensor, other_Y: Tensor) -> Tensor:
    """Number of `other_Y` below each score, ties by half."""
    sorted_Y = other_Y.sort().values
    twice_X = torch.searchsorted(sorted_Y, score_X) + torch.searchsorted(sorted_Y, score_X, right=True)
    return twice_X.double() / 2
