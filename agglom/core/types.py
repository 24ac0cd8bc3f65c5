"""The nouns of the engine, without behaviour.

Shape suffixes: B batch, C channels, H W pixels, N patches, D width, T columns of the loss table, G groups, L labels.
NamedTuples cross the DeepSpeed engine (ZeRO-3 hooks see into tuples and dicts); frozen dataclasses everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from agglom.core.borrowing import Lend


class Batch(NamedTuple):
    """Images on their way to the student and its teachers.

    `pixels_BCHW` lies in [0, 1]; `row_B` indexes the manifest; `view_B` seeds the augmentation (−1: none);
    `group_B` is the group id (−1: not annotated); `label_BL` holds 0, 1 or NaN (unknown). `student_BCHW` is what the
    student sees where that is not what its teachers see.
    """

    pixels_BCHW: Tensor
    row_B: Tensor
    view_B: Tensor
    group_B: Tensor
    label_BL: Tensor | None = None
    student_BCHW: Tensor | None = None


class Features(NamedTuple):
    """What every encoder returns: one summary vector and a row-major grid of patch tokens, either may be absent.

    A student may add its class tokens, of which each teacher can have its own, and its features after some of its
    blocks, first to last; the last of these `levels` are the features themselves.
    """

    summary_BD: Tensor | None
    patches_BND: Tensor | None
    grid: tuple[int, int] = (0, 0)
    tokens_BKD: Tensor | None = None
    levels: tuple[Features, ...] = ()


@dataclass(frozen=True)
class Dims:
    """Widths of the summary and of the patch tokens; None where the encoder has no such output."""

    summary: int | None
    patches: int | None


@dataclass(frozen=True)
class PixelSpec:
    """What an encoder expects of its pixels. Its module applies `mean` and `std` itself, to input in [0, 1].

    `size` pins the side of the square input; None follows the stage, rounded to a multiple of `patch`. `mosaic`: that
    square shows several images side by side (`targets.tiling`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int
    size: int | None = None
    channels: int = 3
    mosaic: bool = False


@dataclass(frozen=True)
class Derived:
    """How a teacher is computed from the features of another one (its source), so that both share one forward.

    `fit` consumes (source features on the CPU, {column: tensor (B)}) of the train patients in one pass and stores its
    result in the buffers of the teacher's module. The columns are those named by

    - `attributes`: float64 values of a continuous one, NaN where unknown, else int64 group ids, −1 where unknown;
    - `groups`: attributes, too, and crossings, as group ids whatever their kind;
    - `labels`: float64, 1, 0 or NaN (unknown).
    """

    source: str
    derive: Callable[[Features], Features]
    attributes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    fit: Callable[[Iterable[tuple[Features, dict[str, Tensor]]]], None] | None = None


@dataclass(frozen=True)
class Serves:
    """The groups of an attribute, or of a crossing, that a specialist teaches; an image of unknown group is in none."""

    attribute: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """The text side of a teacher of images and text, on the CPU.

    `embed` maps n texts to float32 (n, E), `project` float32 summaries (B, D) into the same space (B, E); `scale`
    multiplies their cosines before a softmax. The direction of what `project` returns depends on the direction of the
    summary alone: a student learns no more of it under an angular loss.
    """

    embed: Callable[[Sequence[str]], Tensor]
    project: Callable[[Tensor], Tensor]
    scale: float


@dataclass(frozen=True)
class Provenance:
    """Where weights come from: a name on a hub, a package, or a file (its name alone), and the revision of it."""

    source: str = "unknown"
    revision: str | None = None


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder. `encode` maps pixels in [0, 1] (B, C, H, W) to Features of the declared dims.

    `text` loads the text tower that shares a space with the summary; None where there is no such tower. Nobody keeps
    it in memory longer than the prompts take to embed. `serves` are the patients that it teaches and is judged on; None
    is everybody.
    """

    module: nn.Module
    encode: Callable[[Tensor], Features]
    dims: Dims
    pixels: PixelSpec
    fingerprint: str
    licence: str = ""
    derived: Derived | None = None
    text: Callable[[], Text] | None = None
    provenance: Provenance = Provenance()
    serves: Serves | None = None


@dataclass(frozen=True)
class Student:
    """A trainable encoder: `module(pixels)` returns Features, with `class_tokens` class tokens and `levels` levels.

    `backbone` is the bare network inside `module`; `recipe` is the JSON-serialisable description from which plain
    timm builds it again (`architecture`, `model_args`, `pretrained_cfg`).
    """

    module: nn.Module
    backbone: nn.Module
    dims: Dims
    pixels: PixelSpec
    recipe: dict[str, Any] = field(default_factory=dict)
    class_tokens: int = 0
    levels: int = 0


class LossTable(NamedTuple):
    """The waist: the loss of each sample under each column (teacher, kind), before any weighting.

    `loss_BT` is finite where `valid_BT` is true; invalid cells weigh nothing and carry no gradient. For balancers that
    weigh a sample by more than its losses: the student's summary, `trunk_BD`, from which they were computed, and the
    samples' rows of the manifest, `row_B`.
    """

    loss_BT: Tensor
    valid_BT: Tensor
    trunk_BD: Tensor | None = None
    row_B: Tensor | None = None


class CellStats(NamedTuple):
    """Additive sums of the table per cell; the last row of each (index G) collects samples without annotation."""

    sum_GT: Tensor
    count_GT: Tensor


@dataclass(frozen=True)
class Balancer:
    """Pure functions. `state` is a dict of tensors, so that it can be saved and resumed.

    `init() -> state`; `weigh(state, table, group_B, generator) -> w_BT` reads the state only and needs no
    collective; `update(state, stats) -> state` runs once per optimizer step on sums over all micro-batches and ranks.
    `lend(summaries, row_B) -> summaries`, of a balancer that has it, puts others in the place of raw summaries
    (`core.borrowing`).
    """

    init: Callable[[], dict[str, Tensor]]
    weigh: Callable[..., Tensor]
    update: Callable[[dict[str, Tensor], CellStats], dict[str, Tensor]]
    lend: Lend | None = None
