"""What the student is asked for: the teachers' features of a batch, and the normalisers that make them comparable."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from agglom.core import losses, normalise
from agglom.core.borrowing import Lend
from agglom.core.normalise import Affine
from agglom.core.types import Features, PixelSpec, Teacher
from agglom.errors import CacheError, ConfigError
from agglom.job import Size, show_size


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
        summary, patches, grid = features[:3]
        return Features(
            None if summary is None else self.of_summary(summary),
            None if patches is None else self.of_patches(patches),
            grid,
        )

    def of_summary(self, raw_BD: Tensor) -> Tensor:
        return raw_BD if self.summary is None else normalise.apply(self.summary, raw_BD)

    def of_patches(self, raw_BND: Tensor) -> Tensor:
        return raw_BND if self.patches is None else normalise.apply(self.patches, raw_BND)

    def since(self, before: Normaliser) -> Normaliser:
        """What turns targets of the normaliser `before` into targets of this one."""

        def part(old: Affine | None, new: Affine | None) -> Affine | None:
            return None if old is None or new is None else normalise.change(old, new)

        return Normaliser(part(before.patches, self.patches), part(before.summary, self.summary))

    def to(self, device: torch.device) -> Normaliser:
        def move(part: Affine | None) -> Affine | None:
            return None if part is None else Affine(*(tensor.to(device) for tensor in part))

        return Normaliser(
            move(self.patches),
            move(self.summary),
            None if self.direction_D is None else self.direction_D.to(device),
            None if self.dispersion is None else self.dispersion.to(device),
        )


def _whole(size: Size, patch: int) -> Size:
    """Each side to the nearest whole patch, at least one."""
    height, width = (max(1, round(side / patch)) * patch for side in size)
    return height, width


def tiling(spec: PixelSpec, size: Size) -> tuple[int, int]:
    """Rows and columns of images of `size` in one input of the encoder: as many as fit into a mosaic, else one."""
    if not spec.mosaic or spec.size is None:
        return 1, 1
    rows, columns = (max(1, spec.size // side) for side in _whole(size, spec.patch))
    return rows, columns


def input_size(spec: PixelSpec, size: Size) -> Size:
    """Height and width at which an encoder sees images of `size`: its own, or each side to the nearest whole patch.

    In a mosaic they grow to the largest whole patches of which as many still fit, so that they fill it.
    """
    if spec.size is None:
        return _whole(size, spec.patch)
    if not spec.mosaic:
        return spec.size, spec.size
    height, width = (spec.size // count // spec.patch * spec.patch for count in tiling(spec, size))
    return height, width


def told(spec: PixelSpec, size: Size, student: Size | None) -> str:
    """How an encoder sees images of `size`, in a line; `student` is the student's grid (None: no patches are learnt).

    `128×96 → 126×98 px, grid 9×7, resampled to 8×6`: the coarser of the two grids is that of the loss.
    """
    seen, (rows, columns) = input_size(spec, size), tiling(spec, size)
    text = f"{show_size(size)} px" if seen == size else f"{show_size(size)} → {show_size(seen)} px"
    if rows * columns > 1:
        text += f", {rows}×{columns} of them in one of {spec.size} px"
    if student is None:
        return text
    grid = seen[0] // spec.patch, seen[1] // spec.patch
    common = min(grid[0], student[0]), min(grid[1], student[1])
    text += f", grid {_by(grid)}"
    if common != grid:
        text += f", resampled to {_by(common)}"
    if common != student:
        text += f"; the student's {_by(student)} is resampled to {_by(common)}"
    return text


def _by(grid: Size) -> str:
    return f"{grid[0]}×{grid[1]}"


@dataclass(frozen=True)
class Shift:
    """How the student and the teachers look at an image: through windows of `size` pixels (height, width), at places
    that are drawn for each of them among multiples of `unit` pixels, up to `most` units down and to the right.

    The image is larger than a window by what it moves, so that nothing is padded. A unit is a whole number of patches
    in the grids of all, so that no patch is resampled. By default there is one window, the image.
    """

    size: Size
    unit: Size
    most: tuple[int, int] = (0, 0)

    @property
    def view(self) -> Size:
        """Of the image (height, width)."""
        height, width = (side + most * unit for side, most, unit in zip(self.size, self.most, self.unit, strict=True))
        return height, width

    def draw(self, source: random.Random) -> tuple[int, int]:
        """A place: units from the top and from the left."""
        return source.randint(0, self.most[0]), source.randint(0, self.most[1])

    def window(self, pixels_BCHW: Tensor, at: tuple[int, int]) -> Tensor:
        """The pixels that are seen at a place."""
        (top, left), (height, width) = (at[0] * self.unit[0], at[1] * self.unit[1]), self.size
        return pixels_BCHW[..., top : top + height, left : left + width]

    def overlap(self, features: Features, at: tuple[int, int], other: tuple[int, int]) -> Features:
        """The patches of the window at one place that the window at another one sees, too."""
        units = self.size[0] // self.unit[0], self.size[1] // self.unit[1]
        return losses.overlap(features, (other[0] - at[0], other[1] - at[1]), units)


def shift(teachers: Mapping[str, PixelSpec], student: PixelSpec, size: Size, patches: int) -> Shift:
    """The windows of `size` for shifts of up to `patches` patches of the coarsest grid (`loss.shift`; 0: none).

    Raises ConfigError where no shift so short is a whole number of patches in every grid and of pixels, or where
    windows so far apart share nothing.
    """
    if not patches:
        return Shift(size, size)
    seen = {"the student": (size, student.patch)}
    seen |= {name: (input_size(spec, size), spec.patch) for name, spec in teachers.items()}
    said = ", ".join(f"{name} {_by((h // patch, w // patch))}" for name, ((h, w), patch) in seen.items())
    where = f"loss.shift: {patches}: at {show_size(size)} px the grids are {said}"
    if any(side % student.patch for side in size):
        raise ConfigError(
            f"{where}, and the student's patches of {student.patch} px do not fill the image; change size"
        )
    units, mosts = [], []
    for axis, side in enumerate(size):
        counts = [whole[axis] // patch for whole, patch in seen.values()]
        common = math.gcd(*counts)
        least = min(counts) // common
        most = patches // least
        if not most or side % common or common == 1:
            longer = "set a longer loss.shift, " if common > 1 and not side % common else ""
            raise ConfigError(
                f"{where}: the shortest shift that is whole in all of them is {least} patches of the coarsest"
                + (f", {side / common:g} px" if side % common else ", which leaves nothing" if common == 1 else "")
                + f"; {longer}choose a size at which the grids have more in common, or set loss.shift to 0"
            )
        if most >= common:
            raise ConfigError(f"{where}: windows so far apart share nothing; set loss.shift below {min(counts)}")
        units.append(side // common)
        mosts.append(most)
    return Shift(size, (units[0], units[1]), (mosts[0], mosts[1]))


def resize(pixels_BCHW: Tensor, size: Size) -> Tensor:
    """Antialiased bilinear resize to (height, width); the identity where nothing changes."""
    if pixels_BCHW.shape[-2:] == size:
        return pixels_BCHW
    return F.interpolate(pixels_BCHW, size, mode="bilinear", antialias=True, align_corners=False)


def root(teachers: Mapping[str, Teacher], name: str) -> str:
    """The teacher that sees the pixels: a derived one sees what its source does."""
    derived = teachers[name].derived
    return name if derived is None else root(teachers, derived.source)


@torch.no_grad()
def encode(
    teachers: Mapping[str, Teacher],
    names: Iterable[str],
    pixels_BCHW: Tensor,
    see: Callable[[str, Tensor], Tensor] = lambda name, pixels_BCHW: pixels_BCHW,
) -> dict[str, Features]:
    """The raw features of the named teachers; a source that several of them share is computed once.

    `see` cuts out of the pixels what a teacher sees of them; one that is derived sees what its source does.
    """
    done: dict[str, Features] = {}

    def features(name: str) -> Features:
        if name not in done:
            teacher = teachers[name]
            if teacher.derived is not None:
                done[name] = teacher.derived.derive(features(teacher.derived.source))
            else:
                seen_BCHW = see(name, pixels_BCHW)
                height, width = seen_BCHW.shape[-2:]
                seen_BCHW = resize(seen_BCHW, input_size(teacher.pixels, (height, width)))
                done[name] = _in_mosaic(teacher, seen_BCHW) if teacher.pixels.mosaic else teacher.encode(seen_BCHW)
        return done[name]

    return {name: features(name) for name in names}


def lent(features: Mapping[str, Features], lend: Lend, row_B: Tensor) -> dict[str, Features]:
    """Raw features with the summaries that these rows of the manifest borrow in the place of their own."""
    summary = {name: one.summary_BD for name, one in features.items() if one.summary_BD is not None}
    told = lend(summary, row_B)
    return {name: one._replace(summary_BD=told.get(name)) for name, one in features.items()}


def mosaicked(name: str, teacher: Teacher) -> Teacher:
    """The teacher that sees several images in one, of which each gets its own patches (RADIOv2.5, arXiv 2412.07679).

    A tile is seen at the positions of its place, and where attention spans the image it is seen beside its neighbours:
    those of its micro-batch. The evaluation sees it so, too: the student is judged by what it learns. A summary would
    be of no image in particular, so such a teacher has none.

    Raises ConfigError where the teacher takes images of any size, or has no patches.
    """
    if teacher.pixels.size is None:
        raise ConfigError(
            f"teachers.{name}.mosaic: is for a teacher of a fixed size, and this one takes the images as they are; "
            "remove this key, or pin its size where its kind has such an option"
        )
    if teacher.dims.patches is None:
        raise ConfigError(f"teachers.{name}.mosaic: this teacher has no patches to cut out of a mosaic; remove it")
    pixels, dims = replace(teacher.pixels, mosaic=True), replace(teacher.dims, summary=None)
    return replace(teacher, pixels=pixels, dims=dims, text=None)


def _in_mosaic(teacher: Teacher, tiles_BCHW: Tensor) -> Features:
    """Patches of images of whole patches, `tiling` of them to an input. The last input is filled up with the first
    images once more, and the rim that no tile covers with the pixels beside it; neither is kept."""
    spec, (height, width) = teacher.pixels, tiles_BCHW.shape[-2:]
    side = cast(int, spec.size)
    rows, columns = side // height, side // width
    count = -(-len(tiles_BCHW) // (rows * columns))
    filled_I = torch.arange(count * rows * columns, device=tiles_BCHW.device) % len(tiles_BCHW)
    inputs_MCHW = rearrange(tiles_BCHW[filled_I], "(m r c) d h w -> m d (r h) (c w)", r=rows, c=columns)
    rim = (0, side - columns * width, 0, side - rows * height)
    patches_MND, grid = teacher.encode(F.pad(inputs_MCHW, rim, mode="replicate"))[1:3]
    h, w = height // spec.patch, width // spec.patch
    maps_MhwD = rearrange(cast(Tensor, patches_MND), "m (h w) d -> m h w d", h=grid[0])[:, : rows * h, : columns * w]
    patches_IND = rearrange(maps_MhwD, "m (r h) (c w) d -> (m r c) (h w) d", r=rows, c=columns)
    return Features(None, patches_IND[: len(tiles_BCHW)], (h, w))


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
