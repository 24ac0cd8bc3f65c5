"""The student with one head for each (teacher, token kind), and the resampling of patch grids.

Shape suffixes: B batch, C channels, H W pixels, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from agglom.core.types import Dims, Features


def resample(patches_BND: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patches of a row-major `grid` (h, w) on the grid `to`: bilinear, antialiased, corners not aligned."""
    if grid == to:
        return patches_BND
    maps_BDhw = rearrange(patches_BND, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
    maps_BDhw = F.interpolate(maps_BDhw, size=to, mode="bilinear", antialias=True, align_corners=False)
    return rearrange(maps_BDhw, "b d h w -> b (h w) d")


class Head(nn.Module):
    """Linear → `depth` residual blocks LN-GELU-Linear → LN-GELU-Linear, on the last axis (RADIO's MLP head).

    The final Linear, `last`, also sees the input itself, at first with weight 0: what a student holds in linear form
    already, above all one that starts from related weights, need not pass through the MLP to be kept. A normaliser
    can be folded into it.
    """

    def __init__(self, d_in: int, d_out: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_in, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(depth)
        )
        self.activation = nn.Sequential(nn.LayerNorm(hidden), nn.GELU())
        self.last = nn.Linear(hidden + d_in, d_out)
        nn.init.zeros_(self.last.weight[:, hidden:])

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        for block in self.blocks:
            z = z + block(z)
        return self.last(torch.cat([self.activation(z), x], dim=-1))


class Distiller(nn.Module):
    """What DeepSpeed trains: the student (`trunk`) and `heads`, keyed "teacher:kind"."""

    def __init__(
        self, student_module: nn.Module, dims: Dims, teachers: Mapping[str, Dims], hidden: int, depth: int
    ) -> None:
        """`dims` are the student's. Raises ValueError where a teacher has an output whose input the student lacks."""
        super().__init__()
        self.trunk = student_module
        self.teachers = tuple(teachers)
        self.heads = nn.ModuleDict()
        for teacher, target in teachers.items():
            for kind in ("summary", "patches"):
                d_in, d_out = getattr(dims, kind), getattr(target, kind)
                if d_out is None:
                    continue
                if d_in is None:
                    raise ValueError(
                        f"teacher {teacher!r} has {kind}, the student has none: choose a student with {kind}, "
                        f"or set loss.{kind}_weight to 0"
                    )
                self.heads[f"{teacher}:{kind}"] = Head(d_in, d_out, hidden, depth)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Features, dict[str, Features]]:
        """Features of the trunk, and for each teacher the prediction of its (normalised) features."""
        features = self.trunk(pixels_BCHW)
        return features, {teacher: self._predict(teacher, features) for teacher in self.teachers}

    def _predict(self, teacher: str, features: Features) -> Features:
        summary, patches = f"{teacher}:summary", f"{teacher}:patches"
        return Features(
            self.heads[summary](features.summary_BD) if summary in self.heads else None,
            self.heads[patches](features.patches_BND) if patches in self.heads else None,
            features.grid,
        )
