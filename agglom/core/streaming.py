"""Metrics of more scores than fit in memory: counts per bin, which add up over batches and ranks.

Suffixes: N rows, G groups and one row more (in a histogram: rows of group −1; in a result: all rows), C bins of the
score, B bins of calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agglom.core.calibration import BINS, bin_of, corrected
from agglom.core.influence import Moments


class Bounded(NamedTuple):
    """A value for each group and, last, for all rows, with bounds that hold for certain."""

    value_G: Tensor
    lo_G: Tensor
    hi_G: Tensor


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of scores in [0, 1] by group, label and bin; `update` and `merge` return new ones.

    Bin c holds scores in [c / bins, (c + 1) / bins), the last one 1 as well. `count_G2C` int64; `calibration_GB3` rows,
    Σ (p − y) and Σ (p − y)² in the ten bins of `metrics` ECE, float64. Every row lies in one group or in none. An
    undefined value is NaN. Unlike `metrics`, a histogram cannot tell one score for all from scores of one bin.
    """

    count_G2C: Tensor
    calibration_GB3: Tensor

    @staticmethod
    def empty(groups: int, bins: int = 4096) -> ScoreHistogram:
        """Of nothing. Raises ValueError unless `bins` is a power of two, which makes the edges exact."""
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"bins is {bins}; expected a power of two, such as 4096")
        return ScoreHistogram(
            torch.zeros(groups + 1, 2, bins, dtype=torch.int64),
            torch.zeros(groups + 1, BINS, 3, dtype=torch.float64),
        )

    def update(self, y_N: Tensor, p_N: Tensor, group_N: Tensor) -> ScoreHistogram:
        """With the rows added: labels in {0, 1}, probabilities, ids −1 … groups − 1.

        Raises ValueError for shapes that differ and for values that cannot be used.
        """
        rows, _, bins = self.count_G2C.shape
        for name, value_N in (("p_N", p_N), ("group_N", group_N)):
            if y_N.ndim != 1 or value_N.shape != y_N.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value_N.shape)}, y_N {tuple(y_N.shape)}; expected (N,) for both"
                )
        if not len(y_N):
            return self
        if not bool(((p_N >= 0) & (p_N <= 1)).all()):
            raise ValueError(f"scores must lie in [0, 1]; p_N spans {p_N.min():g} … {p_N.max():g}")
        if not bool(((y_N == 0) | (y_N == 1)).all()):
            raise ValueError("y_N holds values other than 0 and 1; drop the rows whose label is not known")
        if not (int(group_N.min()) >= -1 and int(group_N.max()) < rows - 1):
            raise ValueError(f"group_N spans {int(group_N.min())} … {int(group_N.max())}, outside −1 … {rows - 2}")
        y_N, p_N, row_N = y_N.long(), p_N.double(), group_N.remainder(rows)
        bin_N = (p_N * bins).long().clamp(max=bins - 1)
        count = torch.bincount((row_N * 2 + y_N) * bins + bin_N, minlength=rows * 2 * bins)
        residual_N, cell_N = p_N - y_N, row_N * BINS + bin_of(p_N)
        weights = (None, residual_N, residual_N.square())
        sums = [torch.bincount(cell_N, w_N, minlength=rows * BINS).double() for w_N in weights]
        calibration_GB3 = torch.stack(sums, dim=1).view(rows, BINS, 3)
        return self.merge(ScoreHistogram(count.view(rows, 2, bins), calibration_GB3))

    def merge(self, other: ScoreHistogram) -> ScoreHistogram:
        """Of the rows of both. Raises ValueError for other groups or bins."""
        if self.count_G2C.shape != other.count_G2C.shape:
            ours, theirs = tuple(self.count_G2C.shape), tuple(other.count_G2C.shape)
            raise ValueError(f"histograms of shapes {ours} and {theirs} do not add up")
        return ScoreHistogram(
            self.count_G2C + other.count_G2C,
            self.calibration_GB3 + other.calibration_GB3,
        )

    def pack(self) -> Tensor:
        """Everything as one float64 vector, for one all-reduce (SUM); counts are exact up to 2⁵³."""
        return torch.cat([self.count_G2C.double().flatten(), self.calibration_GB3.flatten()])

    def unpack(self, packed: Tensor) -> ScoreHistogram:
        """The histogram behind a vector that `pack` of one of this shape made."""
        parts = (self.count_G2C, self.calibration_GB3)
        count, calibration = packed.split([part.numel() for part in parts])
        return ScoreHistogram(count.round().long().view_as(self.count_G2C), calibration.view_as(self.calibration_GB3))

    def auroc(self) -> Bounded:
        """AUROC, pairs within a bin counted half; the bounds are reached when all of them rank rightly or wrongly."""
        neg_GC, pos_GC = _with_overall(self.count_G2C).double().unbind(1)
        pairs_G, within_G = pos_GC.sum(1) * neg_GC.sum(1), (pos_GC * neg_GC).sum(1)
        lo_G = (pos_GC * (neg_GC.cumsum(1) - neg_GC)).sum(1)
        return Bounded((lo_G + within_G / 2) / pairs_G, lo_G / pairs_G, (lo_G + within_G) / pairs_G)

    def auroc_moments(self, group: int) -> Moments:
        """What the interval of `auroc` needs: DeLong's variance of the scores rounded down to the edges of their bins,
        of one group (−1: all rows), each row a patient of its own."""
        neg_C, pos_C = _with_overall(self.count_G2C)[group].double()
        pos, neg = pos_C.sum(), neg_C.sum()
        below_C = (neg_C.cumsum(0) - neg_C / 2) / neg
        above_C = (pos - pos_C.cumsum(0) + pos_C / 2) / pos
        value = (pos_C * below_C).sum() / pos
        count_2, weight_2C = torch.stack([pos, neg]), torch.stack([pos_C, neg_C])
        part_2C = (torch.stack([below_C, above_C]) - value) / count_2[:, None]
        square_2, fourth_2 = ((weight_2C * part_2C.pow(power)).sum(1) for power in (2, 4))
        total, noise = square_2.sum().square(), (fourth_2 - square_2.square() / count_2).sum()
        variance = float((square_2 * (count_2 / (count_2 - 1))).sum())
        df = float(2 * total / noise.clamp(min=float(1e-6 * total))) if float(total) else math.inf
        return Moments(variance, df, 0.0, int(pos + neg), 1, float(count_2.min()))

    def auprc(self) -> Bounded:
        """Average precision, the middle of its bounds. Highest: in each bin the positives share a score above those of
        the negatives. Lowest: all scores differ, and the negatives come first."""
        neg_GC, pos_GC = _with_overall(self.count_G2C).double().unbind(1)
        above_GC, false_GC = (n.flip(1).cumsum(1).flip(1) - n for n in (pos_GC, neg_GC))
        reach_GC = above_GC + pos_GC
        hi_GC = pos_GC * reach_GC / (reach_GC + false_GC).clamp(min=1)
        # Σ_j (a + j) / (a + f + j) over the positives, f the negatives at or above the bin.
        false_GC = false_GC + neg_GC
        start_GC = above_GC + false_GC + 1
        lo_GC = pos_GC - false_GC * (torch.digamma(start_GC + pos_GC) - torch.digamma(start_GC))
        lo_G, hi_G = (one_GC.sum(1) / pos_GC.sum(1) for one_GC in (lo_GC, hi_GC))
        lo_G, hi_G = (one_G.where(neg_GC.sum(1) > 0, math.nan) for one_G in (lo_G, hi_G))
        return Bounded((lo_G + hi_G) / 2, lo_G, hi_G)

    def youden(self, group: int) -> float:
        """The edge with the largest TPR − FPR of a group (−1: all rows) among the lower ones of bins that hold a row,
        the highest of several; NaN without both classes."""
        count_2C = _with_overall(self.count_G2C)[group].flip(1)
        neg_C, pos_C = count_2C.cumsum(1).double()
        if not float(neg_C[-1]) or not float(pos_C[-1]):
            return math.nan
        rise_C = (pos_C / pos_C[-1] - neg_C / neg_C[-1]).where(count_2C.sum(0) > 0, -math.inf)
        return 1 - (int(rise_C.argmax()) + 1) / len(rise_C)

    def confusion(self, threshold: float) -> Tensor:
        """Exact int64 counts (G, 4) of TP, FP, FN, TN when scores at or above `threshold` count as positive.

        Raises ValueError for a threshold that is not the lower edge of a bin.
        """
        bins = self.count_G2C.shape[2]
        place = threshold * bins
        if not (0 <= place < bins and place == math.floor(place)):
            raise ValueError(f"threshold {threshold:g} is not an edge k/{bins}, k < {bins}, of the histogram")
        count_G2C = _with_overall(self.count_G2C)
        below_G2, above_G2 = count_G2C[..., : int(place)].sum(2), count_G2C[..., int(place) :].sum(2)
        return torch.stack([above_G2[:, 1], above_G2[:, 0], below_G2[:, 1], below_G2[:, 0]], dim=1)

    def brier(self) -> Tensor:
        """Mean squared error of the probability, (G,)."""
        n_GB, _, square_GB = _with_overall(self.calibration_GB3).unbind(2)
        return square_GB.sum(1) / n_GB.sum(1)

    def ece(self) -> Tensor:
        """Expected calibration error over the ten bins of `metrics`, (G,)."""
        n_GB, residual_GB, _ = _with_overall(self.calibration_GB3).unbind(2)
        return residual_GB.abs().sum(1) / n_GB.sum(1)

    def ece_debiased(self) -> Tensor:
        """As `metrics` has it where each row is a patient of its own, (G,)."""
        n_GB, residual_GB, square_GB = _with_overall(self.calibration_GB3).unbind(2)
        n_G1 = n_GB.sum(1, keepdim=True)
        mean_GB = residual_GB / n_G1
        return corrected(mean_GB, (square_GB / n_G1 - mean_GB.square()) / (n_G1 - 1).clamp(min=1))


def _with_overall(sum_G: Tensor) -> Tensor:
    """All rows in the place of those of no group."""
    return torch.cat([sum_G[:-1], sum_G.sum(0, keepdim=True)])
