"""The student with one head for each (teacher, token kind), and the resampling of patch grids.

Shape suffixes: B batch, C channels, H W pixels, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from agglom.core.types import Dims, Features

KINDS = ("summary", "patches")


def resample(patches_BND: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patches of a row-major `grid` (h, w) on the grid `to`: bilinear, antialiased, corners not aligned."""
    if grid == to:
        return patches_BND
    maps_BDhw = rearrange(patches_BND, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
    maps_BDhw = F.interpolate(maps_BDhw, size=to, mode="bilinear", antialias=True, align_corners=False)
    return rearrange(maps_BDhw, "b d h w -> b (h w) d")


class Hidden(nn.Module):
    """Linear → `depth` residual blocks LN-GELU-Linear → LN-GELU, on the last axis."""

    def __init__(self, d_in: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_in, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(depth)
        )
        self.activation = nn.Sequential(nn.LayerNorm(hidden), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        for block in self.blocks:
            z = z + block(z)
        return self.activation(z)


def _last(hidden: int, d_in: int, d_out: int) -> nn.Linear:
    """The Linear that ends every head, `last`, into which a normaliser can be folded.

    It also sees the input itself, at first with weight 0: what a student holds in linear form already, above all one
    that starts from related weights, need not pass through the rest of the head to be kept.
    """
    last = nn.Linear(hidden + d_in, d_out)
    nn.init.zeros_(last.weight[:, hidden:])
    return last


class Head(Hidden):
    """An MLP and the final Linear (RADIO's MLP head)."""

    def __init__(self, d_in: int, d_out: int, hidden: int, depth: int) -> None:
        super().__init__(d_in, hidden, depth)
        self.last = _last(hidden, d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([super().forward(x), x], dim=-1))


class Ladder(nn.Module):
    """The sum of an MLP on every level (UNIC, arXiv 2408.05088): one final Linear over all their hidden layers."""

    def __init__(self, d_in: int, d_out: int, hidden: int, depth: int, levels: int) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(Hidden(d_in, hidden, depth) for _ in range(levels))
        self.last = _last(levels * hidden, d_in, d_out)

    def forward(self, *levels: Tensor) -> Tensor:
        rungs = [rung(x) for rung, x in zip(self.rungs, levels, strict=True)]
        return self.last(torch.cat([*rungs, levels[-1]], dim=-1))


class Mixer(nn.Module):
    """Summary and patches, each through its Linear, together through one transformer block, and LN.

    (B, D) and (B, N, D') → (B, hidden) and (B, N, hidden): DUNE's projector (arXiv 2503.14405), of which the final
    Linear is each head's own. The block is pre-norm, attention in heads of 64 where that divides `hidden`, and a GELU
    MLP of four times the width.
    """

    def __init__(self, dims: Dims, hidden: int) -> None:
        super().__init__()
        self.first = nn.ModuleDict(
            {kind: nn.Linear(width, hidden) for kind in KINDS if (width := getattr(dims, kind)) is not None}
        )
        heads = hidden // 64 if hidden % 64 == 0 else 1
        self.block = nn.TransformerEncoderLayer(
            hidden, heads, 4 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = {kind: linear(inputs[kind]) for kind, linear in self.first.items()}
        parts = [z[:, None] if z.ndim == 2 else z for z in tokens.values()]
        mixed_BPD = self.norm(self.block(torch.cat(parts, dim=1)))
        split = mixed_BPD.split([part.shape[1] for part in parts], dim=1)
        return {kind: z[:, 0] if tokens[kind].ndim == 2 else z for kind, z in zip(tokens, split, strict=True)}


class Tail(nn.Module):
    """The final Linear behind a mixer."""

    def __init__(self, d_in: int, d_out: int, hidden: int) -> None:
        super().__init__()
        self.last = _last(hidden, d_in, d_out)

    def forward(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.last(torch.cat([mixed, x], dim=-1))


class Distiller(nn.Module):
    """What DeepSpeed trains: the student (`trunk`) and `heads`, keyed "teacher:kind".

    Heads of kind `transformer` share a mixer per teacher, "teacher:mixer". With tokens `own`, the summary of a teacher
    is predicted from the class token of its number (and so is the context of its mixer), else from the student's.
    """

    def __init__(
        self,
        student_module: nn.Module,
        dims: Dims,
        teachers: Mapping[str, Dims],
        hidden: int,
        depth: int,
        *,
        kind: str = "mlp",
        tokens: str = "shared",
        class_tokens: int = 0,
        levels: int = 0,
    ) -> None:
        """`dims`, `class_tokens` and `levels` are the student's.

        Raises ValueError where the student lacks what a head needs: an output of the teacher's, a class token for each
        teacher, levels for a ladder.
        """
        super().__init__()
        if tokens == "own" and class_tokens < len(teachers):
            raise ValueError(
                f"heads.tokens: own needs a class token for each of {len(teachers)} teachers, the student has "
                f"{class_tokens}: give it more (student.options.class_tokens), or set heads.tokens to shared"
            )
        if kind == "ladder" and not levels:
            raise ValueError(
                "heads.kind: ladder reads the student's blocks, and it serves none: set student.options.levels where "
                "it has that option, or another heads.kind"
            )
        self.trunk = student_module
        self.teachers = tuple(teachers)
        self.kind, self.tokens = kind, tokens
        self.heads = nn.ModuleDict()
        for teacher, target in teachers.items():
            if kind == "transformer" and target != Dims(None, None):
                self.heads[f"{teacher}:mixer"] = Mixer(dims, hidden)
            for part in KINDS:
                d_in, d_out = getattr(dims, part), getattr(target, part)
                if d_out is None:
                    continue
                if d_in is None:
                    raise ValueError(
                        f"teacher {teacher!r} has {part}, the student has none: choose a student with {part}, "
                        f"or set loss.{part}_weight to 0"
                    )
                head: nn.Module
                if kind == "ladder":
                    head = Ladder(d_in, d_out, hidden, depth, levels)
                elif kind == "transformer":
                    head = Tail(d_in, d_out, hidden)
                else:
                    head = Head(d_in, d_out, hidden, depth)
                self.heads[f"{teacher}:{part}"] = head

    def forward(self, pixels_BCHW: Tensor) -> tuple[Features, dict[str, Features]]:
        """Features of the trunk, and for each teacher the prediction of its (normalised) features."""
        features = self.trunk(pixels_BCHW)
        predicted = {teacher: self._predict(index, teacher, features) for index, teacher in enumerate(self.teachers)}
        return features._replace(levels=()), predicted

    def _predict(self, index: int, teacher: str, features: Features) -> Features:
        levels = [self._read(index, one) for one in (features.levels if self.kind == "ladder" else (features,))]
        mixer = f"{teacher}:mixer"
        inputs = [*levels, self.heads[mixer](levels[-1])] if mixer in self.heads else levels

        def predict(part: str) -> Tensor | None:
            name = f"{teacher}:{part}"
            return self.heads[name](*(one[part] for one in inputs)) if name in self.heads else None

        return Features(predict("summary"), predict("patches"), features.grid)

    def _read(self, index: int, features: Features) -> dict[str, Tensor]:
        """What a teacher's heads see of the student."""
        summary_BD = features.summary_BD
        if self.tokens == "own":
            summary_BD = cast("Tensor", features.tokens_BKD)[:, index]
        parts = {"summary": summary_BD, "patches": features.patches_BND}
        return {part: tensor for part, tensor in parts.items() if tensor is not None}
