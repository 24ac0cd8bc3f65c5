"""Closed-form erasure of an attribute from features: LEACE (Belrose et al. 2023, arXiv 2306.03819).

Shape suffixes: N samples, D width, G groups of the attribute. Float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agglom.core.normalise import Moments, spectrum


@dataclass(frozen=True)
class CrossMoments:
    """Streamed moments of the features joined with the one-hot attribute (width D + G)."""

    groups: int
    joint: Moments

    @staticmethod
    def empty(width: int, groups: int, device: torch.device | str = "cpu") -> CrossMoments:
        """Moments of nothing."""
        return CrossMoments(groups, Moments.empty(width + groups, device))

    def update(self, x_ND: Tensor, z_N: Tensor) -> CrossMoments:
        """With the samples `x_ND` and their group ids `z_N` added; ids of −1 are skipped."""
        known_N = z_N >= 0
        x_ND, z_N = x_ND[known_N].to(self.joint.mean_D), z_N[known_N].to(self.joint.mean_D.device)
        one_hot_NG = torch.nn.functional.one_hot(z_N, self.groups).to(x_ND)
        return CrossMoments(self.groups, self.joint.update(torch.cat([x_ND, one_hot_NG], 1)))

    @property
    def counts_G(self) -> Tensor:
        """Samples of each group (int64)."""
        return (self.joint.mean_D[-self.groups :] * self.joint.count).round().long()


def leace(moments: CrossMoments, shrink: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean (D) and matrix M (D, D) of the eraser x' = x − M(x − mean), after which x' and z are uncorrelated.

    M = W⁺PW, computed as C(CᵀΣ⁺C)⁺CᵀΣ⁺ with the cross-covariance C and the covariance Σ: the same oblique projection
    on the range of C, which erases C to rounding even where Σ is singular. `shrink` in [0, 1] moves Σ towards its mean
    variance times the identity: steadier where samples are few, still exact on the fitted samples, no longer the
    smallest change of them. Raises ValueError for a shrink out of range or an attribute with fewer than two groups.
    """
    if not 0 <= shrink <= 1:
        raise ValueError(f"erasure: shrink is {shrink}, expected a number in [0, 1]")
    counts = moments.counts_G.tolist()
    if sum(count > 0 for count in counts) < 2:
        raise ValueError(f"erasure: samples per group are {counts}, expected at least two groups with samples")
    width = len(moments.joint.mean_D) - moments.groups
    mean_D = moments.joint.mean_D[:width].clone()
    covariance_DD = moments.joint.scatter_DD[:width, :width] / moments.joint.count
    cross_DG = moments.joint.scatter_DD[:width, width:] / moments.joint.count
    values_D, vectors_DD = spectrum(covariance_DD)
    rounding = width * torch.finfo(torch.float64).eps
    spread = values_D[0].sqrt()
    values_D = (1 - shrink) * values_D + shrink * values_D.mean()
    basis_DG, strength_G, _ = torch.linalg.svd(cross_DG, full_matrices=False)
    # One-hot columns sum to 0, so at least one direction is rounding error; the rest span what must go.
    basis_DR = basis_DG[:, strength_G > torch.maximum(1e-12 * strength_G[0], rounding * spread)]
    kept_D = values_D > values_D[0] * rounding
    rotated_DR = vectors_DD.T @ basis_DR
    scaled_DR = rotated_DR * torch.where(kept_D, 1 / values_D, 0.0)[:, None]
    oblique_RD = torch.linalg.solve(rotated_DR.T @ scaled_DR, (vectors_DD @ scaled_DR).T)
    return mean_D, basis_DR @ oblique_RD
