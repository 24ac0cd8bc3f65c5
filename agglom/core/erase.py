"""Closed-form erasure of attributes from features: LEACE (Belrose et al. 2023, arXiv 2306.03819).

Shape suffixes: N samples, D width, K columns of an attribute: one for each group, or its value. Float64 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.core.normalise import Moments, spectrum


@dataclass(frozen=True)
class CrossMoments:
    """Streamed moments of features x (D) with one attribute z (K), over the samples of which z is known.

    `cross_DK` is Σ (x − mean)(z − mean)ᵀ and `scatter_K` Σ (z − mean)². `update` returns new ones.
    """

    count: int
    mean_D: Tensor
    mean_K: Tensor
    cross_DK: Tensor
    scatter_K: Tensor

    @staticmethod
    def empty(width: int) -> CrossMoments:
        """Moments of nothing, on the CPU."""
        zeros_D = torch.zeros(width, dtype=torch.float64)
        return CrossMoments(0, zeros_D, zeros_D[:0], zeros_D[:, None][:, :0], zeros_D[:0])

    def update(self, x_ND: Tensor, z_N: Tensor) -> CrossMoments:
        """With the samples `x_ND` added; `z_N` are group ids (int64, −1 unknown) or values (floating, NaN unknown)."""
        known_N = z_N >= 0 if not z_N.is_floating_point() else ~z_N.isnan()
        if not known_N.any():
            return self
        x_ND, z_N = x_ND.detach()[known_N].double(), z_N[known_N]
        z_NK = z_N.double()[:, None] if z_N.is_floating_point() else F.one_hot(z_N).double()
        # A group that one side has not seen: its column is 0 there.
        columns = max(z_NK.shape[1], len(self.mean_K))
        old_K, old_DK, old_scatter_K = (
            F.pad(one, (0, columns - one.shape[-1])) for one in (self.mean_K, self.cross_DK, self.scatter_K)
        )
        z_NK = F.pad(z_NK, (0, columns - z_NK.shape[1]))
        mean_D, mean_K = x_ND.mean(0), z_NK.mean(0)
        count = self.count + len(x_ND)
        # Both parts together (Chan, Golub, LeVeque 1979).
        delta_D, delta_K, share = mean_D - self.mean_D, mean_K - old_K, len(x_ND) / count
        centred_NK = z_NK - mean_K
        return CrossMoments(
            count,
            self.mean_D + share * delta_D,
            old_K + share * delta_K,
            old_DK + (x_ND - mean_D).T @ centred_NK + self.count * share * torch.outer(delta_D, delta_K),
            old_scatter_K + centred_NK.square().sum(0) + self.count * share * delta_K.square(),
        )


def leace(moments: Moments, attributes: Mapping[str, CrossMoments], shrink: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean (D) and matrix M (D, D) of the eraser x' = x − M(x − mean), after which x' and every z are uncorrelated.

    M = W⁺PW, computed as C(CᵀΣ⁺C)⁺CᵀΣ⁺ with the cross-covariances C of all attributes side by side and the covariance
    Σ: the same oblique projection on the range of C, which erases C to rounding even where Σ is singular.

    Mean and Σ are those of all samples, `moments`, since all are transformed: of the maps that leave no covariance with
    any z it changes them least. C has for each attribute the samples of which it is known, so no correlation is left on
    them. The theorem takes any pair of Σ and C, provided that the range of C lies in that of Σ.

    `shrink` in [0, 1] moves Σ towards its mean variance times the identity: steadier where samples are few, still exact
    on the fitted samples, no longer the smallest change of them. Raises ValueError for a shrink out of range, and for
    an attribute that is unknown or constant, by name.
    """
    if not 0 <= shrink <= 1:
        raise ValueError(f"erasure: shrink is {shrink}, expected a number in [0, 1]")
    covariance_DD = moments.scatter_DD / moments.count
    values_D, vectors_DD = spectrum(covariance_DD)
    rounding = len(values_D) * torch.finfo(torch.float64).eps
    # Features are rounded to float32, each by up to half a unit of it: a covariance below that is no trace of anything.
    size = (covariance_DD.diagonal() + moments.mean_D.square()).sum().sqrt()
    resolved = torch.finfo(torch.float32).eps / 2 * size
    values_D = (1 - shrink) * values_D + shrink * values_D.mean()
    cross_DK = torch.cat([_covariance(name, one, moments.count) for name, one in attributes.items()], 1)
    basis_DK, strength_K, _ = torch.linalg.svd(cross_DK, full_matrices=False)
    # One-hot columns depend on each other, so some directions are rounding error; the rest span what must go. Nothing
    # must where the source was erased of the same before.
    basis_DR = basis_DK[:, strength_K > torch.maximum(1e-12 * strength_K[0], resolved)]
    kept_D = values_D > values_D[0] * rounding
    rotated_DR = vectors_DD.T @ basis_DR
    scaled_DR = rotated_DR * torch.where(kept_D, 1 / values_D, 0.0)[:, None]
    oblique_RD = torch.linalg.solve(rotated_DR.T @ scaled_DR, (vectors_DD @ scaled_DR).T)
    return moments.mean_D.clone(), basis_DR @ oblique_RD


def _covariance(name: str, one: CrossMoments, samples: float) -> Tensor:
    """Of the features with an attribute of unit variance, so that no unit of measurement decides what is rounding."""
    if one.count == 0:
        raise ValueError(f"attribute {name!r} is unknown in all {samples:g} samples; expected two groups or values")
    std_K = (one.scatter_K / one.count).sqrt()
    varies_K = std_K > 1e-12 * one.mean_K.abs()
    if not varies_K.any():
        raise ValueError(
            f"attribute {name!r} is the same in all {one.count} samples that have it; expected two groups or values"
        )
    return one.cross_DK[:, varies_K] / (one.count * std_K[varies_K])


def oas(moments: Moments, samples: int) -> float:
    """The oracle approximating shrinkage of a covariance towards its mean variance times the identity, in [0, 1].

    With tr, the traces of Σ and Σ², and the width d, (tr(Σ²)/d² + (tr Σ/d)²) / ((n + 1)(tr(Σ²)/d² − (tr Σ/d)²/d)):
    Chen, Wiesel, Eldar, Hero 2010, arXiv 0907.4698, equation 23, in the form of scikit-learn's `oas`. It asks only for
    what is streamed anyway. n = `samples` counts what is independent: images, not their patches.
    """
    covariance_DD = moments.scatter_DD / moments.count
    width = len(covariance_DD)
    power, mean = covariance_DD.square().mean(), covariance_DD.trace() / width
    excess = (samples + 1) * (power - mean.square() / width)
    return float(((power + mean.square()) / excess).clamp(max=1.0)) if excess > 0 else 1.0
