"""The affine map between a teacher's raw features and the targets of the student, fitted once from streamed moments.

Shape suffixes: N samples, D width. Fitted in float64, used and stored in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agglom.core.hadamard import hadamard, rotation_equal_variance
from agglom.core.losses import angle

KINDS = ("phi_s", "global_std", "standardise", "whiten", "none")
# Eigenvalues below this share of the largest are noise of float32 features: whitening does not amplify them further.
WHITEN_FLOOR = 1e-8


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter Σ w·(x − mean)(x − mean)ᵀ of a stream, float64. `update` and `merge` return new ones.

    The weights w are 1 unless given, and `count` is their sum.
    """

    count: float
    mean_D: Tensor
    scatter_DD: Tensor

    @staticmethod
    def empty(width: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of nothing."""
        zeros = torch.zeros(width, width, dtype=torch.float64, device=device)
        return Moments(0, zeros[0].clone(), zeros)

    def update(self, x_ND: Tensor, weight_N: Tensor | None = None) -> Moments:
        """With the samples `x_ND` added, each counted `weight_N` > 0 times (default 1)."""
        if len(x_ND) == 0:
            return self
        x_ND = x_ND.detach().to(self.mean_D)
        if weight_N is None:
            mean_D = x_ND.mean(0)
            centred_ND = x_ND - mean_D
            return self.merge(Moments(len(x_ND), mean_D, centred_ND.T @ centred_ND))
        weight_N = weight_N.to(self.mean_D)
        count = float(weight_N.sum())
        mean_D = weight_N @ x_ND / count
        centred_ND = x_ND - mean_D
        return self.merge(Moments(count, mean_D, centred_ND.T @ (centred_ND * weight_N[:, None])))

    def merge(self, other: Moments) -> Moments:
        """Of both streams together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta_D = other.mean_D - self.mean_D
        between_DD = torch.outer(delta_D, delta_D) * (self.count * other.count / count)
        return Moments(
            count, self.mean_D + delta_D * (other.count / count), self.scatter_DD + other.scatter_DD + between_DD
        )


class Affine(NamedTuple):
    """z = (y − mean) @ matrix.T and back, y = z @ inverse.T + mean."""

    mean_D: Tensor
    matrix_DD: Tensor
    inverse_DD: Tensor


def balanced(group_N: Tensor) -> Tensor:
    """Weights of a sample (float64, N) under which every group that it holds counts the same, 1 on average.

    An id of −1 is of no group: it weighs 1, as much as without balancing.
    """
    known_N = group_N >= 0
    count_G = torch.bincount(group_N[known_N])
    each_G = count_G.sum() / ((count_G > 0).sum() * count_G.clamp(min=1).double())
    weight_N = torch.ones(len(group_N), dtype=torch.float64)
    weight_N[known_N] = each_G[group_N[known_N]]
    return weight_N


def spectrum(covariance_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, negative ones clipped to 0) and eigenvectors in columns, largest entry positive."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    values_D, vectors_DD = values_D.flip(0).clamp(min=0.0), vectors_DD.flip(1)
    largest_1D = vectors_DD.gather(0, vectors_DD.abs().argmax(0, keepdim=True))
    return values_D, vectors_DD * largest_1D.sign()


def fit(kind: str, moments: Moments, seed: int = 0) -> Affine:
    """Fit the normaliser `kind` to the moments of a teacher's features.

    - phi_s: α·H·Uᵀ(y − μ), α = (mean Λ)^−½: a rotation and one scale, variance 1 in every dimension (arXiv 2410.01680).
    - global_std: (y − μ)/σ with one σ, (mean Λ)^½: PHI-S without its rotation (the ablation of arXiv 2410.01680).
    - standardise: (y − μ)/σ per dimension (UNIC); a constant dimension is centred only.
    - whiten: Λ^−½·Uᵀ(y − μ), eigenvalues floored at WHITEN_FLOOR of the largest.
    - none: the identity.

    `seed` matters to phi_s of a width that has no Hadamard matrix. Variances are over `count`, not count − 1.
    Raises ValueError for an unknown kind, fewer than two samples, or features that are constant or not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"normaliser {kind!r} is not one of {', '.join(KINDS)}")
    width = len(moments.mean_D)
    identity_DD = torch.eye(width, dtype=torch.float64, device=moments.mean_D.device)
    if kind == "none":
        return _as_float32(torch.zeros_like(moments.mean_D), identity_DD, identity_DD)
    if moments.count < 2:
        raise ValueError(f"normaliser {kind!r}: {moments.count:g} samples, expected at least 2")
    covariance_DD = moments.scatter_DD / moments.count
    variance_D = covariance_DD.diagonal()
    # Features that are all alike leave a variance of rounding errors, relative to the square of their mean.
    noise = torch.finfo(torch.float64).eps * (moments.mean_D.square().mean() + variance_D.mean())
    if not variance_D.mean() > noise:
        raise ValueError(f"normaliser {kind!r}: the features are constant or not finite over {moments.count:g} samples")
    if kind == "global_std":
        scale = variance_D.mean().sqrt()
        return _as_float32(moments.mean_D, identity_DD / scale, identity_DD * scale)
    if kind == "standardise":
        scale_D = torch.where(variance_D > noise, variance_D, 1.0).sqrt()
        return _as_float32(moments.mean_D, torch.diag(1 / scale_D), torch.diag(scale_D))
    values_D, vectors_DD = spectrum(covariance_DD)
    if kind == "whiten":
        scale_D = values_D.clamp(min=WHITEN_FLOOR * float(values_D[0])).sqrt()
        return _as_float32(moments.mean_D, vectors_DD.T / scale_D[:, None], vectors_DD * scale_D)
    try:
        rotation_DD = hadamard(width).to(values_D)
    except ValueError:
        rotation_DD = rotation_equal_variance(values_D, seed)
    rotation_DD = rotation_DD @ vectors_DD.T
    scale = values_D.mean().sqrt()
    return _as_float32(moments.mean_D, rotation_DD / scale, rotation_DD.T * scale)


def _as_float32(*tensors: Tensor) -> Affine:
    return Affine(*(tensor.float().contiguous() for tensor in tensors))


def apply(affine: Affine, y: Tensor) -> Tensor:
    """Raw features → targets, on the last axis, in float32."""
    return (y.float() - affine.mean_D) @ affine.matrix_DD.T


def invert(affine: Affine, z: Tensor) -> Tensor:
    """Targets → raw features, on the last axis, in float32."""
    return z.float() @ affine.inverse_DD.T + affine.mean_D


def fold(affine: Affine, linear: nn.Linear) -> nn.Linear:
    """A new Linear that emits raw teacher features where `linear` emits normalised ones."""
    inverse_DD = affine.inverse_DD.double()
    weight, bias = linear.weight.detach(), linear.bias
    folded = nn.Linear(linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype)
    offset_D = affine.mean_D.double() if bias is None else inverse_DD @ bias.detach().double() + affine.mean_D
    with torch.no_grad():
        folded.weight.copy_(inverse_DD @ weight.double())
        folded.bias.copy_(offset_D)
    return folded


def change(old: Affine, new: Affine) -> Affine:
    """The map from targets under `old` to those under `new`: apply(new, ·) after invert(old, ·), float64 inside."""
    old_mean_D, old_DD, old_inverse_DD = (part.double() for part in old)
    new_mean_D, new_DD, new_inverse_DD = (part.double() for part in new)
    return _as_float32(old_DD @ (new_mean_D - old_mean_D), new_DD @ old_inverse_DD, old_DD @ new_inverse_DD)


def cone(summary_ND: Tensor, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean direction μ (D) and dispersion E[Θ(y, μ)²] (scalar, float32) of raw summaries, for L_angle (C-RADIOv4).

    μ is the mean of the unit vectors, normalised; both means take `weight_N` (default 1). Raises ValueError for fewer
    than two samples, or a dispersion that is 0 or not finite: such a teacher's summaries carry nothing to learn.
    """
    if len(summary_ND) < 2:
        raise ValueError(f"dispersion of summaries: {len(summary_ND)} samples, expected at least 2")
    unit_ND = nn.functional.normalize(summary_ND.detach().double(), dim=-1)
    weight_N = unit_ND.new_ones(len(unit_ND)) if weight_N is None else weight_N.to(unit_ND)
    share_N = weight_N / weight_N.sum()
    direction_D = nn.functional.normalize(share_N @ unit_ND, dim=-1)
    dispersion = share_N @ angle(unit_ND, direction_D.expand_as(unit_ND)).square()
    if not (1e-12 < dispersion < torch.inf):
        raise ValueError(f"dispersion of summaries: all {len(summary_ND)} are alike, or not finite")
    return direction_D.float(), dispersion.float()
