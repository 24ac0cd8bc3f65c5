"""Resampling of patients: a bootstrap of AUROC, and the gap that groups would show if they did not differ.

The sampling unit is the patient, draws depend on the seed and not on the order of rows, and all predictors and groups
are read on the same draws. The intervals of a report come from `metrics`: the percentiles of a bootstrapped gap or
worst group do not cover.

Suffixes: N rows, P predictors, I patients, S strata, U units that are permuted, X positives, Y negatives, G groups,
R draws, C draws of a chunk, J patients × C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from agglom.core.influence import rate
from agglom.core.metrics import THRESHOLDED

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
    Raises ValueError for shapes that differ, NaN scores, labels or ids that cannot be used.
    """
    _check(y_N, scores_PN, patient_N, group_N, groups)
    y_N, scores_PN = y_N.bool(), scores_PN.double()
    patient_N, size_S = _strata(y_N, patient_N, group_N)
    members = [*((group_N == group).nonzero()[:, 0] for group in range(groups)), torch.arange(len(y_N))]
    patients, generator = int(size_S.sum()), torch.Generator().manual_seed(seed)
    draws = max(1, min(replicates, CHUNK // max(1, len(y_N))))
    predictors = [_segments(y_N, p_N, patient_N, members, draws, patients) for p_N in scores_PN]
    # Twice the running sum of the weights of all segments is the largest number that arises.
    heaviest = int(torch.bincount(patient_N).max()) if patients else 0
    dtype = torch.int32 if 4 * draws * patients * heaviest < 2**31 else torch.int64
    auroc_RPG = torch.empty(replicates, len(scores_PN), groups + 1, dtype=torch.float64)
    for part_CPG in auroc_RPG.split(draws):
        times_J = _draw(size_S, draws, generator).to(dtype)
        for predictor, segments in enumerate(predictors):
            auroc_CG = _weighted_auroc(times_J, segments).view(draws, groups + 1)
            part_CPG[:, predictor] = auroc_CG[: len(part_CPG)]
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
    measure = _measure(metric, y_N, p_N, threshold, unit_N, len(id_U), draws)

    def gaps(id_CU: Tensor) -> Tensor:
        value_GC = torch.stack([measure(id_CU == group) for group in range(groups)])
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
    """Patients numbered so that those of a stratum are neighbours, and the size of each stratum."""
    patient_N = patient_N.unique(return_inverse=True)[1]
    patients = int(patient_N.max()) + 1 if len(patient_N) else 0
    lowest_I, highest_I = (
        torch.zeros(patients, dtype=torch.int64).scatter_reduce(0, patient_N, group_N, side, include_self=False)
        for side in ("amin", "amax")
    )
    stratum_I = (torch.bincount(patient_N, y_N.double(), minlength=patients) > 0).long()
    if torch.equal(lowest_I, highest_I):
        stratum_I = stratum_I + 2 * (lowest_I + 1)
    place_I = stratum_I.argsort(stable=True).argsort()
    return place_I[patient_N], torch.bincount(stratum_I)


def _draw(size_S: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """How often each patient is drawn, one draw after the other."""
    patients = int(size_S.sum())
    strata = zip((size_S.cumsum(0) - size_S).tolist(), size_S.tolist(), strict=True)
    drawn = [
        torch.randint(start, start + size, (draws, size), generator=generator, dtype=torch.int32)
        for start, size in strata
        if size
    ]
    if not drawn:
        return torch.zeros(0, dtype=torch.int64)
    drawn_CI = torch.cat(drawn, dim=1) + patients * torch.arange(draws, dtype=torch.int32)[:, None]
    return torch.bincount(drawn_CI.flatten(), minlength=draws * patients)


def _segments(
    y_N: Tensor, p_N: Tensor, patient_N: Tensor, members: list[Tensor], draws: int, patients: int
) -> _Segments:
    pos: list[Tensor] = []
    neg: list[Tensor] = []
    places: tuple[list[Tensor], list[Tensor]] = ([], [])
    offset = 0
    for rows in members:
        rows = rows[p_N[rows].argsort(stable=True)]
        pos.append(rows[y_N[rows]])
        neg.append(rows[~y_N[rows]])
        for place, right in zip(places, (False, True), strict=True):
            place.append(torch.searchsorted(p_N[neg[-1]], p_N[pos[-1]], right=right) + offset)
        offset += len(neg[-1])

    def repeated(x_X: Tensor, step: int) -> Tensor:
        return (x_X + step * torch.arange(draws)[:, None]).flatten()

    pos_end, neg_end = (torch.tensor([len(part) for part in parts]).repeat(draws).cumsum(0) for parts in (pos, neg))
    return _Segments(
        repeated(patient_N[torch.cat(pos)], patients),
        repeated(patient_N[torch.cat(neg)], patients),
        pad(pos_end, (1, 0)),
        pad(neg_end, (1, 0)),
        *(repeated(torch.cat(place), offset) for place in places),
    )


def _weighted_auroc(times_J: Tensor, segments: _Segments) -> Tensor:
    """AUROC of each segment when the rows of a patient count as often as the patient was drawn."""
    pos_X = times_J.index_select(0, segments.pos_X)
    before_Y = times_J.new_zeros(len(segments.neg_Y) + 1)
    torch.cumsum(times_J.index_select(0, segments.neg_Y), 0, dtype=times_J.dtype, out=before_Y[1:])
    twice_X = before_Y.index_select(0, segments.below_X) + before_Y.index_select(0, segments.upto_X)
    # Sums of counts are exact up to 2⁵³: ten million rows stay below.
    wins_G, pos_G = (
        pad(x_X.cumsum(0, dtype=torch.float64), (1, 0)).index_select(0, segments.pos_end).diff()
        for x_X in (pos_X.double() * twice_X, pos_X)
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
    neighbours, the group of each unit, and the size of each stratum."""
    patient_N = patient_N.unique(return_inverse=True)[1]
    span = int(group_N.max()) + 1
    code_U, unit_N = (patient_N * span + group_N).unique(return_inverse=True)
    some_U, other_U = (torch.bincount(unit_N[rows_N], minlength=len(code_U)) > 0 for rows_N in (kind_N, ~kind_N))
    stratum_U = 2 * some_U.long() + other_U.long()
    order_U = stratum_U.argsort(stable=True)
    return order_U.argsort()[unit_N], (code_U % span)[order_U], torch.bincount(stratum_U)


def _permuted(id_U: Tensor, size_S: Tensor, generator: torch.Generator) -> Tensor:
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in id_U.split(size_S.tolist())])


def _measure(
    metric: str, y_N: Tensor, p_N: Tensor, threshold: float, unit_N: Tensor, units: int, draws: int
) -> Callable[[Tensor], Tensor]:
    """From which units are members, (C, U), to the metric of each draw, (C,)."""
    if metric == "auroc":
        segments = _segments(y_N, p_N, unit_N, [torch.arange(len(y_N))], draws, units)
        return lambda member_CU: _weighted_auroc(member_CU.flatten().int(), segments)
    cell_N = 2 * (p_N < threshold).long() + (~y_N).long()  # TP, FP, FN, TN
    count_U4 = torch.bincount(4 * unit_N + cell_N, minlength=4 * units).view(units, 4).double()
    return lambda member_CU: rate(metric, member_CU.double() @ count_U4)
