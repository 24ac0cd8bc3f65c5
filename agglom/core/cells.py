"""What is measured of the cells (teacher × group) and what follows from it for their weights.

Two questions are kept apart, as mixing them hurts: which teacher a sample should listen to, which is answered by
measured reliability and never by the loss, and how much a group counts, which the losses and what the evaluation found
decide (`balance.cells`).

Shape suffixes: N rows of the manifest, B batch, G groups, S teachers, T columns of the loss table, X values to be
pooled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agglom.core.borrowing import Bank, Loan

# A group of which nobody has shown that it can be taught (`borrowing.SKILLED`) counts less, and at least this much of
# what it would: few patients do not show the contrary either.
UNSKILLED = 0.25
# The most that the AUROC of groups is believed to differ, as a standard deviation.
APART = 0.1
# The least that a teacher weighs, relative to the best of a group.
FOLLOWED = 0.01


@dataclass(frozen=True)
class Measured:
    """What is known of the cells before a stage, float64; NaN where it is not known.

    `right_GS`: AUROC of a teacher's probe in a group, shrunk towards that over everybody by its uncertainty (`shrunk`),
    `raw_GS` as it was found, and `right_S` over everybody. `student_G`: that of the student, shrunk, NaN before it has
    learnt anything. `noise_GT` and `spread_GT`: half the mean loss between the targets of two views of an image, and of
    two images of the group, without static weights. `sure_NS` (float32), where it is asked for: how probable it is that
    a teacher's probe is right on an image (`agglom.confidence`). `loans`: what groups borrow, and the `bank` of train
    images that lend (`core.borrowing`), for a balancer with an option `borrow`: noise and spread are then those of
    targets of which so many neighbours are the mean.
    """

    right_GS: Tensor
    raw_GS: Tensor
    right_S: Tensor
    student_G: Tensor
    noise_GT: Tensor
    spread_GT: Tensor
    sure_NS: Tensor | None = None
    loans: tuple[Loan, ...] = ()
    bank: Bank | None = None


def skill(right: Tensor) -> Tensor:
    """How far an AUROC is above chance: 2·AUROC − 1, not below 0 (Somers' D)."""
    return (2 * right - 1).clamp(min=0)


def steadiness(noise_GT: Tensor, spread_GT: Tensor, teacher_T: Tensor) -> tuple[Tensor, Tensor]:
    """What reliability is taken to be without labels: 1 − ν / V in [0, 1], the mean over the columns of a teacher; in
    each group (G × S), and the mean over the groups (S)."""
    kept_GT = (1 - noise_GT / spread_GT.clamp(min=1e-12)).clamp(0, 1)
    columns_S = torch.bincount(teacher_T)
    kept_GS = kept_GT.new_zeros(len(kept_GT), len(columns_S)).index_add(1, teacher_T, kept_GT) / columns_S
    return kept_GS, kept_GS.mean(0)


def reliability(right_GS: Tensor, served_GS: Tensor, temperature: float) -> Tensor:
    """ρ_{s|g} ∝ exp(R_{g,s} / T), R the AUROC of a teacher in a group: 1 on average over the teachers that serve it, 0
    for the others, none less than FOLLOWED of the best, or its head would stay as initialised.

    Differences of R count, not ratios of the error 1 − R: an error twice as large is little where both are small, as in
    a majority, whose images still teach what the others need, and much where both are large. A teacher whose R is not
    known (NaN), as it has no summary, counts 1.
    """
    return listening(right_GS, served_GS, temperature).nan_to_num(1.0) * served_GS


def listening(sure_BS: Tensor, served_BS: Tensor, temperature: float) -> Tensor:
    """The same for images: ρ_{s|i} ∝ exp(p̂_{i,s} / T), p̂ how probable it is that a teacher is right on one.

    NaN for an image of which no p̂ is known.
    """
    known_BS = served_BS & ~torch.isnan(sure_BS)
    sure_BS = torch.where(known_BS, sure_BS.double(), -torch.inf)
    worth_BS = torch.exp((sure_BS - sure_BS.amax(1, keepdim=True)) / temperature).clamp(min=FOLLOWED)
    rho_BS = torch.where(known_BS, shares(worth_BS, known_BS), served_BS.double())
    return torch.where(known_BS.any(1, keepdim=True), rho_BS, torch.nan)


def shares(worth_BS: Tensor, among_BS: Tensor) -> Tensor:
    """What each of some teachers counts by its worth: 1 on average over those, 0 for the others."""
    worth_BS = torch.where(among_BS, worth_BS, 0.0)
    return worth_BS * among_BS.sum(1, keepdim=True) / worth_BS.sum(1, keepdim=True).clamp(min=1e-300)


def on_average(rho_NS: Tensor, group_N: Tensor, otherwise_GS: Tensor) -> Tensor:
    """The mean over the images of each group of which ρ is known (G × S); `otherwise_GS` where it is of none."""
    known_N1 = (group_N >= 0)[:, None] & ~rho_NS.isnan()
    index_N, zeros_GS = group_N.clamp(min=0), torch.zeros_like(otherwise_GS)
    sum_GS = zeros_GS.index_add(0, index_N, torch.where(known_N1, rho_NS, 0.0))
    count_GS = zeros_GS.index_add(0, index_N, known_N1.double())
    return torch.where(count_GS > 0, sum_GS / count_GS.clamp(min=1), otherwise_GS)


def standing(measured: Measured, served_GS: Tensor) -> tuple[Tensor, Tensor]:
    """Of each group how far the best teacher is above chance, and how far the student is below it, in [0, 1].

    The first as it was found: shrinking would make a group of noise look like the others. NaN where it is not known.
    The second of what was shrunk, and no ratio, in which the best of noise would be out of reach; 0 if not known.
    """
    found_GS, right_GS = (
        torch.where(served_GS & ~torch.isnan(one_GS), skill(one_GS), -1.0)
        for one_GS in (measured.raw_GS, measured.right_GS)
    )
    best_G = found_GS.amax(1)
    lag_G = (right_GS.amax(1) - skill(measured.student_G)).clamp(0, 1).nan_to_num(0.0)
    return torch.where(best_G < 0, torch.nan, best_G), lag_G


def shrunk(value_GX: Tensor, error_GX: Tensor, pooled_X: Tensor) -> Tensor:
    """Values of groups, moved towards those of everybody by as much as their standard errors say: empirical Bayes.

    x̃ = m + τ² / (τ² + s²)·(x − m), τ² the variance between groups by the moments of DerSimonian and Laird (1986,
    Control. Clin. Trials 7) about the known m, over all cells at once: a few groups alone do not tell it. τ is not
    above APART, or a handful of patients whom a probe gets all wrong would vouch for themselves. A value that is not
    known (NaN) is that of everybody.
    """
    known_GX = ~(torch.isnan(value_GX) | torch.isnan(error_GX))
    weight_GX = torch.where(known_GX, 1 / error_GX.clamp(min=1e-6).square(), 0.0)
    off_GX = torch.where(known_GX, value_GX - pooled_X, 0.0)
    total = weight_GX.sum().clamp(min=1e-300)
    between = (((weight_GX * off_GX.square()).sum() - known_GX.sum()) / total).clamp(0, APART**2)
    kept_GX = between / (between + 1 / weight_GX.clamp(min=1e-300))
    return pooled_X + torch.where(known_GX, kept_GX * off_GX, 0.0)


def speakers(values: tuple[str, ...], count_G: Tensor, least: int) -> Tensor:
    """Whose samples speak for each group (G × G, float64 of 0 and 1, rows sum over columns).

    A group of at least `least` samples speaks for itself. A smaller crossing ("F|AP") is spoken for by all groups that
    share a value with it in some part, where these have as many together, else by all groups; sums of them are exact
    under accumulation and ranks, as they are sums. A smaller group that is no crossing: by all.
    """
    parts = [value.split("|") for value in values]
    itself_GG = torch.eye(len(values), dtype=torch.float64, device=count_G.device)
    shared = [
        [one == two or (1 < len(one) == len(two) and any(map(str.__eq__, one, two))) for two in parts] for one in parts
    ]
    akin_GG = torch.tensor(shared, dtype=torch.float64, device=count_G.device)
    count_G1 = count_G.double()[:, None]
    few_G1 = count_G1 < least
    alone_GG = torch.where(few_G1, akin_GG, itself_GG)
    return torch.where(few_G1 & (akin_GG @ count_G1 < least), 1.0, alone_GG)


def excess(loss_GT: Tensor, measured: Measured, weight_GT: Tensor) -> Tensor:
    """e_g = Σ_t w_{g,t}·max(0, ℓ_{g,t} − ν_{g,t}) / V_{g,t} / Σ_t w_{g,t}, the columns weighted by their reliability.

    The share of the variance of a group that is left to be learnt: hard groups have a large loss, and so do noisy ones,
    of whose loss no more than V − ν can go. A student that knows the mean of a group has 1 left, and none has more.
    """
    left_GT = ((loss_GT - measured.noise_GT).clamp(min=0) / measured.spread_GT.clamp(min=1e-12)).clamp(max=1)
    return (left_GT * weight_GT).sum(1) / weight_GT.sum(1).clamp(min=1e-300)
