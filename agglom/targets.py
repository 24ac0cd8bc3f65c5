"""What the student is asked for: the teachers' features of a batch, and the normalisers that make them comparable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from agglom.core import normalise
from agglom.core.normalise import Affine
from agglom.core.types import Features, PixelSpec, Teacher
from agglom.errors import CacheError


@dataclass(frozen=True)
class Normaliser:
    """What is fitted on a teacher's features of train images, once, and then frozen.

    `patches` and `summary` are affine maps (None: the raw features are the target); `direction_D` and `dispersion`
    are μ_y and Disp of the angular loss.
    """

    patches: Affine | None = None
    summary: Affine | None = None
    direction_D: Tensor | None = None
    dispersion: Tensor | None = None

    def __call__(self, features: Features) -> Features:
        """Raw features as targets."""
        summary, patches, grid = features
        return Features(
            None if summary is None else self.of_summary(summary),
            None if patches is None else self.of_patches(patches),
            grid,
        )

    def of_summary(self, raw_BD: Tensor) -> Tensor:
        return raw_BD if self.summary is None else normalise.apply(self.summary, raw_BD)

    def of_patches(self, raw_BND: Tensor) -> Tensor:
        return raw_BND if self.patches is None else normalise.apply(self.patches, raw_BND)

    def to(self, device: torch.device) -> Normaliser:
        def move(part: Affine | None) -> Affine | None:
            return None if part is None else Affine(*(tensor.to(device) for tensor in part))

        return Normaliser(
            move(self.patches),
            move(self.summary),
            None if self.direction_D is None else self.direction_D.to(device),
            None if self.dispersion is None else self.dispersion.to(device),
        )


def input_size(spec: PixelSpec, stage_size: int) -> int:
    """The side at which an encoder sees a stage's images: its own, or the stage's to the nearest whole patch."""
    return spec.size or max(1, round(stage_size / spec.patch)) * spec.patch


def resize(pixels_BCHW: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize to size × size; the identity where nothing changes."""
    if pixels_BCHW.shape[-2:] == (size, size):
        return pixels_BCHW
    return F.interpolate(pixels_BCHW, (size, size), mode="bilinear", antialias=True, align_corners=False)


@torch.no_grad()
def encode(teachers: Mapping[str, Teacher], names: Iterable[str], pixels_BCHW: Tensor) -> dict[str, Features]:
    """The raw features of the named teachers; a source that several of them share is computed once."""
    done: dict[str, Features] = {}

    def features(name: str) -> Features:
        if name not in done:
            teacher = teachers[name]
            if teacher.derived is not None:
                done[name] = teacher.derived.derive(features(teacher.derived.source))
            else:
                done[name] = teacher.encode(resize(pixels_BCHW, input_size(teacher.pixels, pixels_BCHW.shape[-1])))
        return done[name]

    return {name: features(name) for name in names}


def save(
    path: Path, normalisers: Mapping[str, Normaliser], teachers: Mapping[str, Teacher], identity: Mapping[str, str]
) -> None:
    """Write the normalisers and what derived teachers have fitted, with the identity of the job they belong to."""
    tensors: dict[str, Tensor] = {}
    for name, normaliser in normalisers.items():
        for kind in ("patches", "summary"):
            affine = getattr(normaliser, kind)
            if affine is not None:
                tensors |= {f"{name}/{kind}/{field}": value for field, value in affine._asdict().items()}
        for field in ("direction_D", "dispersion"):
            if getattr(normaliser, field) is not None:
                tensors[f"{name}/{field}"] = getattr(normaliser, field)
    for name, teacher in teachers.items():
        if teacher.derived is not None:
            tensors |= {f"{name}/fitted/{key}": value for key, value in teacher.module.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary, metadata=dict(identity))
    temporary.replace(path)


def read(path: Path, identity: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file that was written with this identity.

    Raises:
        CacheError: it cannot be read, or belongs to another job; the field that differs is named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise CacheError(f"{path}: cannot be read ({error}); delete it and it is fitted again") from error
    for field, value in identity.items():
        if stored.get(field) != value:
            raise CacheError(
                f"{path}: of another job: {field} is {stored.get(field)!r} there and {value!r} now; use another --out"
            )
    return tensors


def load(path: Path, teachers: Mapping[str, Teacher], identity: Mapping[str, str]) -> dict[str, Normaliser]:
    """Read what `save` wrote, and give derived teachers their fit back.

    Raises:
        CacheError: see `read`.
    """
    tensors = read(path, identity)

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    normalisers = {}
    for name, teacher in teachers.items():
        affines = {kind: part(f"{name}/{kind}/") for kind in ("patches", "summary")}
        normalisers[name] = Normaliser(
            **{kind: Affine(**fields) if fields else None for kind, fields in affines.items()},
            direction_D=tensors.get(f"{name}/direction_D"),
            dispersion=tensors.get(f"{name}/dispersion"),
        )
        if teacher.derived is not None:
            teacher.module.load_state_dict(part(f"{name}/fitted/"))
    return normalisers
