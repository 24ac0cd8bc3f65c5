"""Resampling of patients: a bootstrap of AUROC, and the gap that groups would show if they did not differ.

The sampling unit is the patient, draws depend on the seed and not on the order of rows, and all predictors and groups
are read on the same draws. The intervals of a report come from `metrics`: the percentiles of a bootstrapped gap or
worst group do not cover.

Counts and places are small integers, as memory is what limits both. Suffixes: N rows, P predictors, I patients, S
strata, U units that are permuted, K kinds of them, X positives (of a piece of rows: any), Y negatives, G groups, R
draws, C draws of a chunk, J patients × C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from agglom.core.influence import rate
from agglom.core.metrics import THRESHOLDED, ascending

# Rows times draws handled at once, which bounds memory.
CHUNK = 2**17


class Null(NamedTuple):
    """Gaps under the hypothesis that groups do not differ: their 95 % quantile, the share at least as large as the gap
    that was seen, and their mean, the bias of that gap: `max(0, gap − bias)` corrects it."""

    quantile: float
    p_value: float
    bias: float


class _Segments(NamedTuple):
    """The rows of each group by score, group after group and draw after draw: where the positives and the negatives
    stand among the drawn patients, where segments end in both, and how many of `neg_Y` lie before the score of each
    positive, and before or at it."""

    pos_X: Tensor
    neg_Y: Tensor
    pos_end: Tensor
    neg_end: Tensor
    below_X: Tensor
    upto_X: Tensor


def bootstrap_auroc(
    y_N: Tensor,
    scores_PN: Tensor,
    patient_N: Tensor,
    group_N: Tensor,
    groups: int,
    *,
    replicates: int,
    seed: int,
) -> Tensor:
    """AUROC of every predictor in every group, and over all rows, on `replicates` draws of patients: float64 (R, P,
    G + 1), the last column overall, which rows of group −1 are part of.

    Patients are drawn with replacement within strata: with or without a positive image, in each group if every patient
    lies in one group only. Ties count half. NaN where a draw lacks a class. Labels in {0, 1}, ids −1 … groups − 1.
    Where a sixth of the rows is positive, the memory for one predictor stays below three times that of its scores.
    Raises ValueError for shapes that differ, NaN scores, labels or ids that cannot be used.
    """
    _check(y_N, scores_PN, patient_N, group_N, groups)
    y_N, scores_PN = y_N.bool(), scores_PN.double()
    place_N, size_S = _strata(y_N, patient_N, group_N)
    patients, generator = int(size_S.sum()), torch.Generator().manual_seed(seed)
    heaviest = int(torch.bincount(place_N).max()) if patients else 0
    draws = max(1, min(replicates, CHUNK // max(1, len(y_N))))
    everybody_N = torch.zeros((), dtype=torch.int64).expand(len(y_N))
    # One after the other, as a draw of all groups together takes as much memory as one of everybody.
    parts = [
        (predictor, columns, _segments(y_N, p_N, place_N, column_N, columns.stop - columns.start, draws, patients))
        for predictor, p_N in enumerate(scores_PN)
        for columns, column_N in ((slice(0, groups), group_N), (slice(groups, groups + 1), everybody_N))
    ]
    del place_N
    # Twice the running sum of the weights of all segments is the largest number that arises.
    dtype = torch.int32 if 4 * draws * patients * heaviest < 2**31 else torch.int64
    auroc_RPG = torch.empty(replicates, len(scores_PN), groups + 1, dtype=torch.float64)
    for part_CPG in auroc_RPG.split(draws):
        times_J = _draw(size_S, draws, generator)
        for predictor, columns, segments in parts:
            auroc_CG = _weighted_auroc(times_J, segments, dtype).view(draws, -1)
            part_CPG[:, predictor, columns] = auroc_CG[: len(part_CPG)]
    return auroc_RPG


def permutation_null(
    metric: str,
    y_N: Tensor,
    p_N: Tensor,
    patient_N: Tensor,
    group_N: Tensor,
    groups: int,
    *,
    threshold: float = math.nan,
    permutations: int,
    seed: int,
) -> Null:
    """The gap of `metric` (auroc, or a rate at `threshold`) between groups when group ids are permuted over patients.

    Give −1 to the rows of groups that the reported gap leaves out; they take no part. All rows of a patient in a group
    move together, so a patient in several groups moves in as many parts. What the metric is conditional on stays as it
    is in each group, so that the sizes of its samples do: ids move among patients with positive, with negative, and
    with both kinds of images (auroc, tpr, fpr, balanced_accuracy), likewise for rows at or above the threshold and
    below it (ppv, npv); freely for the rest. `p_value` = (1 + draws with a gap at least as large) / (1 + draws), a draw
    without two groups that have a value counted in. NaN where the data have no such two groups.

    Raises ValueError for another metric, a rate without a threshold, shapes that differ, NaN scores, and labels or ids
    that cannot be used.
    """
    _check(y_N, p_N[None], patient_N, group_N, groups)
    if metric not in ("auroc", *THRESHOLDED):
        raise ValueError(f"metric {metric!r} has no null; known: auroc, {', '.join(sorted(THRESHOLDED))}")
    if metric != "auroc" and math.isnan(threshold):
        raise ValueError(f"{metric} needs a threshold; choose it on the validation split")
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}; expected at least 1")
    known_N = group_N >= 0
    y_N, p_N, patient_N, group_N = y_N[known_N].bool(), p_N[known_N].double(), patient_N[known_N], group_N[known_N]
    if not len(y_N):
        return Null(math.nan, math.nan, math.nan)
    unit_N, id_U, size_S = _units(_condition(metric, y_N, p_N >= threshold), patient_N, group_N)
    draws = max(1, min(permutations, CHUNK // len(y_N)))
    measure = _measure(metric, y_N, p_N, threshold, unit_N, groups, len(id_U), draws)

    def gaps(id_CU: Tensor) -> Tensor:
        value_GC = measure(id_CU)
        known_GC = ~value_GC.isnan()
        gap_C = value_GC.where(known_GC, -math.inf).amax(0) - value_GC.where(known_GC, math.inf).amin(0)
        return gap_C.where(known_GC.sum(0) >= 2, math.nan)

    seen = float(gaps(id_U.expand(draws, -1))[0])
    if math.isnan(seen):
        return Null(math.nan, math.nan, math.nan)
    generator, null_R = torch.Generator().manual_seed(seed), torch.empty(permutations, dtype=torch.float64)
    for part_C in null_R.split(draws):
        drawn = [_permuted(id_U, size_S, generator) for _ in part_C]
        part_C.copy_(gaps(torch.stack([*drawn, *[id_U] * (draws - len(drawn))]))[: len(drawn)])
    # NaN is not smaller than the gap that was seen.
    at_least = int((~(null_R < seen)).sum())
    return Null(float(null_R.nanquantile(0.95)), (1 + at_least) / (1 + permutations), float(null_R.nanmean()))


def _check(y_N: Tensor, scores_PN: Tensor, patient_N: Tensor, group_N: Tensor, groups: int) -> None:
    for name, shape in (
        ("scores_PN", scores_PN.shape[1:]),
        ("patient_N", patient_N.shape),
        ("group_N", group_N.shape),
    ):
        if y_N.ndim != 1 or shape != y_N.shape:
            raise ValueError(f"{name} has rows of shape {tuple(shape)}, y_N {tuple(y_N.shape)}; expected (N,) for both")
    if bool(scores_PN.isnan().any()):
        raise ValueError(f"scores_PN holds {int(scores_PN.isnan().sum())} NaN among {scores_PN.numel()} scores")
    if not bool(((y_N == 0) | (y_N == 1)).all()):
        raise ValueError("y_N holds values other than 0 and 1; drop the rows whose label is not known")
    if len(group_N) and not (int(group_N.min()) >= -1 and int(group_N.max()) < groups):
        raise ValueError(f"group_N spans {int(group_N.min())} … {int(group_N.max())}, outside −1 … {groups - 1}")


def _strata(y_N: Tensor, patient_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Patients (int32) numbered so that those of a stratum are neighbours, and the size of each stratum."""
    place_N, patients, settled = torch.empty(len(y_N), dtype=torch.int32), 0, True
    found = [torch.zeros(0, dtype=torch.int32)]
    for rows_X, patient_X in ascending(patient_N):
        code_X = patient_X.unique_consecutive(return_inverse=True)[1]
        place_N[rows_X] = (code_X + patients).int()
        group_X, several = group_N[rows_X], int(code_X[-1]) + 1
        lowest_I, highest_I = (
            torch.zeros(several, dtype=torch.int64).scatter_reduce(0, code_X, group_X, side, include_self=False)
            for side in ("amin", "amax")
        )
        positive_I = torch.bincount(code_X[y_N[rows_X]], minlength=several) > 0
        found.append((positive_I + 2 * (lowest_I + 1)).int())
        patients, settled = patients + several, settled and torch.equal(lowest_I, highest_I)
    stratum_I = torch.cat(found)
    del found
    size_S = torch.bincount(stratum_I if settled else stratum_I.remainder_(2))
    place_I, start = torch.empty_like(stratum_I), 0
    for stratum, size in enumerate(size_S.tolist()):
        place_I.masked_scatter_(stratum_I == stratum, torch.arange(start, start + size, dtype=torch.int32))
        start += size
    return place_I.index_select(0, place_N), size_S


def _draw(size_S: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """How often each patient is drawn, one draw after the other (int16)."""
    patients, start = int(size_S.sum()), 0
    drawn_CI = torch.empty(draws, patients, dtype=torch.int32)
    for size in size_S[size_S > 0].tolist():
        drawn_CI[:, start : start + size].random_(start, start + size, generator=generator)
        start += size
    cell_J = (drawn_CI.add_(patients * torch.arange(draws, dtype=torch.int32)[:, None])).flatten()
    once_J = torch.ones((), dtype=torch.int16).expand(len(cell_J))
    return torch.zeros(len(cell_J), dtype=torch.int16).index_add_(0, cell_J, once_J)


def _segments(
    y_N: Tensor, p_N: Tensor, patient_N: Tensor, column_N: Tensor, columns: int, draws: int, patients: int
) -> _Segments:
    """Of the rows of each column 0 … columns − 1, as often as there are draws."""
    size_X = torch.zeros(2 * columns + 2, dtype=torch.int64)
    for column_X, y_X in zip(column_N.split(CHUNK), y_N.split(CHUNK), strict=True):
        size_X += torch.bincount(2 * column_X + 2 + y_X, minlength=len(size_X))
    size_2G = size_X[2:].view(-1, 2).T.flip(0)
    first_2G = size_2G.cumsum(1) - size_2G
    pos_X, below_X, upto_X = (torch.empty(int(size_2G[0].sum()), dtype=torch.int32) for _ in range(3))
    neg_Y, offset = torch.empty(int(size_2G[1].sum()), dtype=torch.int32), int(size_2G[1].sum())
    at_2G = first_2G.tolist()
    for rows_X, p_X in ascending(p_N):
        column_X = column_N.index_select(0, rows_X)
        code_X = 2 * column_X + y_N.index_select(0, rows_X)
        for column in range(columns):
            pos_rows, neg_rows = ((code_X == 2 * column + y).nonzero()[:, 0] for y in (1, 0))
            pos, neg = (
                slice(at[column], at[column] + len(r)) for at, r in zip(at_2G, (pos_rows, neg_rows), strict=True)
            )
            pos_X[pos] = patient_N.index_select(0, rows_X[pos_rows])
            neg_Y[neg] = patient_N.index_select(0, rows_X[neg_rows])
            for place_X, right in ((below_X, False), (upto_X, True)):
                place_X[pos] = torch.searchsorted(p_X[neg_rows], p_X[pos_rows], right=right, out_int32=True) + neg.start
            at_2G[0][column], at_2G[1][column] = pos.stop, neg.stop

    def repeated(x_X: Tensor, step: int) -> Tensor:
        return x_X if draws == 1 else (x_X + step * torch.arange(draws, dtype=torch.int32)[:, None]).flatten()

    pos_end, neg_end = (pad(size_G.repeat(draws).cumsum(0), (1, 0)) for size_G in size_2G)
    return _Segments(
        repeated(pos_X, patients),
        repeated(neg_Y, patients),
        pos_end,
        neg_end,
        repeated(below_X, offset),
        repeated(upto_X, offset),
    )


def _weighted_auroc(times_J: Tensor, segments: _Segments, dtype: torch.dtype = torch.int32) -> Tensor:
    """AUROC of each segment when the rows of a patient count as often as the patient was drawn."""
    before_Y = torch.zeros(len(segments.neg_Y) + 1, dtype=dtype)
    torch.cumsum(times_J.index_select(0, segments.neg_Y), 0, dtype=dtype, out=before_Y[1:])
    pos_X = times_J.index_select(0, segments.pos_X)
    won_X = before_Y.index_select(0, segments.below_X).add_(before_Y.index_select(0, segments.upto_X)).double()
    # Sums of counts are exact up to 2⁵³: ten million rows stay below.
    wins_G, pos_G = (
        pad(sum_X, (1, 0)).index_select(0, segments.pos_end).diff()
        for sum_X in (won_X.mul_(pos_X).cumsum_(0), pos_X.cumsum(0, dtype=torch.int64))
    )
    before_G = before_Y.index_select(0, segments.neg_end).double()
    return (wins_G / 2 - pos_G * before_G[:-1]) / (pos_G * before_G.diff())


def _condition(metric: str, y_N: Tensor, chosen_N: Tensor) -> Tensor:
    """The rows' two kinds between which group ids do not move."""
    if metric in ("auroc", "tpr", "fpr", "balanced_accuracy"):
        return y_N
    return chosen_N if metric in ("ppv", "npv") else torch.zeros_like(y_N)


def _units(kind_N: Tensor, patient_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of patients that lie in one group: the unit of each row, numbered so that those of a stratum are
    neighbours, the group of each unit (int16), and the size of each stratum."""
    patient_N = patient_N.unique(return_inverse=True)[1]
    span = int(group_N.max()) + 1
    code_U, unit_N = (patient_N * span + group_N).unique(return_inverse=True)
    some_U, other_U = (torch.bincount(unit_N[rows_N], minlength=len(code_U)) > 0 for rows_N in (kind_N, ~kind_N))
    stratum_U = 2 * some_U.long() + other_U.long()
    order_U = stratum_U.argsort(stable=True)
    return order_U.argsort()[unit_N], (code_U % span)[order_U].to(torch.int16), torch.bincount(stratum_U)


def _permuted(id_U: Tensor, size_S: Tensor, generator: torch.Generator) -> Tensor:
    orders = [torch.randperm(size, generator=generator, dtype=torch.int32) for size in size_S.tolist()]
    parts = zip(id_U.split(size_S.tolist()), orders, strict=True)
    return torch.cat([part.index_select(0, order) for part, order in parts])


def _measure(
    metric: str, y_N: Tensor, p_N: Tensor, threshold: float, unit_N: Tensor, groups: int, units: int, draws: int
) -> Callable[[Tensor], Tensor]:
    """From the group of each unit, (C, U), to the metric of each group and draw, (G, C)."""
    if metric == "auroc":
        segments = _segments(y_N, p_N, unit_N, torch.zeros_like(unit_N), 1, draws, units)
        return lambda id_CU: torch.stack(
            [_weighted_auroc((id_CU == group).flatten().to(torch.int16), segments) for group in range(groups)]
        )
    cell_N = 2 * (p_N < threshold).long() + (~y_N).long()  # TP, FP, FN, TN
    count_U4 = torch.bincount(4 * unit_N + cell_N, minlength=4 * units).view(units, 4)
    # Few kinds of units differ in their counts, and to count kinds is quicker than to add counts.
    kind_U, span = torch.zeros(units, dtype=torch.int64), int(count_U4.max()) + 1
    for count_U in count_U4.unbind(1):
        kind_U = (kind_U * span + count_U).unique(return_inverse=True)[1]
    kinds = int(kind_U.max()) + 1
    count_K4 = torch.zeros(kinds, 4, dtype=torch.int64).index_copy_(0, kind_U, count_U4).double()
    place_CU = kind_U + kinds * groups * torch.arange(draws)[:, None]

    def rates(id_CU: Tensor) -> Tensor:
        cell_CU = place_CU.add(id_CU, alpha=kinds)
        count_X = torch.bincount(cell_CU.flatten(), minlength=draws * groups * kinds).double()
        return rate(metric, count_X.view(-1, kinds) @ count_K4).view(draws, groups).T

    return rates
