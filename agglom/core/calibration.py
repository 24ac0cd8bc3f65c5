"""Expected calibration error over fixed bins: values and intervals.

Suffixes: N rows, I patients, C calibration bins, R draws, P predictors, X any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from agglom.core.influence import TINY, Interval, kish, wilson, z_of

BINS = 10


class Draws(NamedTuple):
    """ECE of each predictor, the value to report, how far ECE moves in each draw (least and most, (P, R)),
    effective rows."""

    ece_P: Tensor
    value_P: Tensor
    straight_PR: Tensor
    curved_PR: Tensor
    least: float


def bin_of(p_N: Tensor) -> Tensor:
    """The bin of each probability: [0, .1) … [.9, 1]."""
    return torch.bucketize(p_N.contiguous(), torch.arange(1, BINS, dtype=torch.float64) / BINS, right=True)


def residuals(y_N: Tensor, p_N: Tensor, patient_N: Tensor) -> Tensor:
    """Sum of p − y per patient and bin, (I, C)."""
    cells = BINS * (int(patient_N.max()) + 1)
    sum_X = torch.bincount(patient_N * BINS + bin_of(p_N), p_N - y_N.double(), minlength=cells)
    return rearrange(sum_X, "(i c) -> i c", c=BINS)


def corrected(mean_XC: Tensor, variance_XC: Tensor) -> Tensor:
    """Σ_c |mean_c| less its bias where each mean is normal about the one that was seen, never below 0, (X,).

    For a normal μ with standard error σ, E|·| = σ √(2/π) exp(−μ²/2σ²) + μ erf(μ/(σ√2)).
    """
    error_XC = variance_XC.clamp(min=0).sqrt()
    ratio_XC = mean_XC / error_XC.clamp(min=1e-300)
    folded_XC = error_XC * math.sqrt(2 / math.pi) * (-ratio_XC.square() / 2).exp()
    folded_XC += mean_XC * (ratio_XC / math.sqrt(2)).erf()
    return (2 * mean_XC.abs() - folded_XC).sum(-1).clamp(min=0)


def debiased(sum_IC: Tensor, size_I: Tensor) -> Tensor:
    """`corrected` with the clustered variance of each bin, from `residuals` and the rows of each patient."""
    patients, rows = len(size_I), size_I.sum()
    mean_C = sum_IC.sum(0) / rows
    square_C = (sum_IC - size_I[:, None] * mean_C).square().sum(0)
    return corrected(mean_C, square_C / rows.double().square() * (patients / max(1, patients - 1)))


def draw(metric: str, y_N: Tensor, scores: Sequence[Tensor], patient_N: Tensor, replicates: int, seed: int) -> Draws:
    """`ece` or `ece_debiased` of every predictor, and how far draws of their bins, all on the same patients, move it.

    A draw, normal with the clustered covariance of the sums (`metrics.evaluate` says why), moves bin c by h. Far from
    calibrated (|s| beyond √log I standard errors) |s| moves by sign(s)·h. Where s may be 0 the truth lies between
    sign(s)·h (straight) and |h| (curved).
    """
    size_I, sum_PIC = torch.bincount(patient_N), torch.stack([residuals(y_N, p_N, patient_N) for p_N in scores])
    straight_PR, curved_PR = _moves(sum_PIC, size_I, replicates, seed)
    ece_P = value_P = sum_PIC.sum(1).abs().sum(1) / len(y_N)
    if metric == "ece_debiased":
        value_P = torch.stack([debiased(sum_IC, size_I) for sum_IC in sum_PIC])
    return Draws(ece_P, value_P, straight_PR, curved_PR, kish(size_I))


def interval(draws: Draws, level: float) -> Interval:
    """Of one predictor, or of the first minus the second. ECE and its corrected value estimate the same number, so
    they share their interval."""
    straight_PR, curved_PR, single = draws.straight_PR, draws.curved_PR, len(draws.ece_P) == 1
    ece, value = (float(one_P[0] - one_P[1:].sum()) for one_P in (draws.ece_P, draws.value_P))
    if float(straight_PR.abs().max()) < math.sqrt(TINY):
        bound = wilson(ece if single else 0.0, draws.least, z_of(level))
        return value, *(bound if single else (max(-1.0, ece - bound[1]), min(1.0, ece + bound[1]))), "wilson-bound"
    above_R, below_R = curved_PR[0] - straight_PR[1:].sum(0), straight_PR[0] - curved_PR[1:].sum(0)
    lo = ece - float(above_R.quantile((1 + level) / 2))
    hi = ece - float(below_R.quantile((1 - level) / 2))
    return value, max(0.0 if single else -1.0, lo), min(1.0, hi), "draws-directional"


def _moves(sum_PIC: Tensor, size_I: Tensor, replicates: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws of (estimated − true) ECE for P predictors, all on the same patients: two (P, R) tensors."""
    patients, rows = len(size_I), size_I.sum()
    mean_PC = sum_PIC.sum(1) / rows
    deviation_PIC = (sum_PIC - size_I[:, None] * mean_PC[:, None]) / rows
    deviation_IX = rearrange(deviation_PIC, "p i c -> i (p c)")
    variance_X, axes_XX = torch.linalg.eigh(deviation_IX.T @ deviation_IX * (patients / max(1, patients - 1)))
    # The symmetric root, as the signs and the order of axes are arbitrary.
    root_XX = axes_XX * variance_X.clamp(min=0).sqrt() @ axes_XX.T
    generator = torch.Generator().manual_seed(seed)
    normal_RX = torch.randn(replicates, len(root_XX), generator=generator, dtype=torch.float64)
    move_PRC = rearrange(normal_RX @ root_XX, "r (p c) -> p r c", c=BINS)
    error_PC = rearrange(root_XX.square().sum(0).sqrt(), "(p c) -> p c", c=BINS)
    far_PC = mean_PC.abs() > math.sqrt(math.log(patients)) * error_PC
    straight_PRC = move_PRC * mean_PC.sign()[:, None]
    curved_PRC = torch.where(far_PC[:, None], straight_PRC, move_PRC.abs())
    return straight_PRC.sum(2), curved_PRC.sum(2)
