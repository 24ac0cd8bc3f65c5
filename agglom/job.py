"""The job as frozen dataclasses, and its durations. Imports no torch. `config` reads it from YAML."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError, PydanticKnownError

from agglom.errors import ConfigError

Positive = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0)]
Weight = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
Strength = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Size = tuple[int, int]  # of an image in pixels: height, width


def _side(value: Any) -> Any:
    """Refuses a wrong size before pydantic tries both forms and reports an error of each."""
    if type(value) is int:
        if value < 1:
            raise PydanticKnownError("greater_than_equal", {"ge": 1})
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return tuple(value)
    raise PydanticCustomError("side_type", "expected a number of pixels or [height, width]")


# Of an image in pixels: the side of a square, or [height, width].
Side = Annotated[Positive | tuple[Positive, Positive], BeforeValidator(_side)]


def pair(side: int | Size) -> Size:
    """Height and width."""
    return (side, side) if isinstance(side, int) else side


def side(size: Size) -> int | Size:
    """As the configuration has it: the side of a square, or the pair."""
    height, width = size
    return height if height == width else size


def show_size(size: Size) -> str:
    """In words: 128 for a square, else height×width."""
    height, width = size
    return str(height) if height == width else f"{height}×{width}"


class Section:
    """Makes pydantic refuse unknown keys, infinities and NaN in every part of the job."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


# ── The job, as dataclasses. Durations are strings with a unit: "2000 steps", "30 epochs", "20000 samples", "5%". ──


@dataclass(frozen=True, kw_only=True)
class Attribute(Section):
    """A column of the manifest on the patient or the acquisition. The report says which ones are `simulated`.

    With a `separator` a cell may hold several values, "a;b", and the image is in the group of each.
    """

    kind: Literal["categorical", "continuous"] = "categorical"
    column: str | None = None
    bins: tuple[float, ...] = ()
    separator: str | None = None
    missing: tuple[str, ...] = ("", "NA", "NaN", "nan", "unknown", "Unknown", "UNKNOWN")
    simulated: bool = False


@dataclass(frozen=True, kw_only=True)
class Splits(Section):
    """The values of the split column. Without `test`, the report is on `val` and says so."""

    train: str = "train"
    val: str = "val"
    test: str | None = "test"


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """The manifest and how to read it. Relative paths start at the folder of the configuration file.

    Without a `split` column every row is of test: enough to audit scores, but not to train. A label names a column of 0
    and 1, or one class of a column: `finding=covid`. Where labels name several classes of a column, all of its classes
    must be among them.
    """

    manifest: str
    root: str | None = None
    image: str = "image"
    patient: str = "patient"
    split: str | None = "split"
    splits: Splits = Splits()
    labels: tuple[str, ...] = ()
    attributes: dict[str, Attribute] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    min_support: Positive = 30
    value_range: tuple[float, float] | None = None
    workers: Natural = 0


@dataclass(frozen=True, kw_only=True)
class TeacherSpec(Section):
    """A teacher: a plug-in and its options; `source` names the teacher from whose features it is derived.

    It computes in `dtype`, `micro_batch` images at a time (default: the whole batch). With `placement: cpu_swap` it is
    parked on the CPU and brought to the accelerator for its turn alone. `compile`: through `torch.compile`. `mosaic`: a
    teacher of a fixed size sees several images side by side in one, where a whole number of them fits. `licence`: of
    its weights, where the plug-in does not know it.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    weight: Weight = 1.0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    placement: Literal["online", "cpu_swap"] = "online"
    micro_batch: Positive | None = None
    compile: bool = False
    mosaic: bool = False
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class StudentSpec(Section):
    """The student: a plug-in and its options."""

    kind: str = "timm"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Heads(Section):
    """What stands between the student and each target.

    `mlp`: an MLP of that width and number of hidden residual blocks; `ladder`: an MLP on every block of the student,
    summed; `transformer`: one block over the tokens. `tokens`: all teachers read the `shared` summary of the student,
    or each its `own` class token.
    """

    kind: Literal["mlp", "ladder", "transformer"] = "mlp"
    tokens: Literal["shared", "own"] = "shared"
    hidden: Positive = 512
    depth: Natural = 1


@dataclass(frozen=True, kw_only=True)
class Mfd(Section):
    """Among the images of a class of `label`, the summaries that the student predicts for each group of `balance.group`
    are to be spread as the target's of all are, by `weight` times a conditional MMD (Jung et al. 2021, arXiv
    2106.04411), in each micro-batch. Of one `teacher`, or summed over all.
    """

    label: str
    weight: Rate = 1.0
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loss(Section):
    """Losses per token kind, their weights, and the normaliser of the targets.

    `moments_by`: an attribute or crossing whose groups all count the same when a normaliser is fitted, so that the
    directions of a minority are not scaled away. `refit`: normalisers are fitted once, at the size of the evaluation,
    or for every stage at its own. `shift`: the student and each teacher see the image shifted by up to that many
    patches, independently, and are compared where both see it; 0 is off.
    """

    summary: Literal["angular", "cosine", "mse", "unic"] = "angular"
    patches: Literal["mse", "cosine", "smooth_l1", "hybrid", "unic", "relational"] = "mse"
    summary_weight: Weight = 1.0
    patches_weight: Weight = 1.0
    normaliser: Literal["phi_s", "global_std", "standardise", "whiten", "none"] = "phi_s"
    fit_images: Annotated[int, Ge(2)] = 3000
    moments_by: str | None = None
    refit: Literal["once", "stage"] = "once"
    shift: Natural = 0
    mfd: Mfd | None = None

    @property
    def normalises_summary(self) -> bool:
        """Whether targets of summaries are normalised: a loss of directions alone takes them as they are."""
        return self.summary in ("mse", "unic")


@dataclass(frozen=True, kw_only=True)
class Proxies(Section):
    """Groups for images of no known group: the `clusters` that k-means finds among the summaries of a teacher of train
    images. It is fitted from `seeds` different starts: the best fit counts, and how far all agree is reported.
    """

    teacher: str
    clusters: Annotated[int, Ge(2)] = 8
    seeds: Annotated[int, Ge(2)] = 5


@dataclass(frozen=True, kw_only=True)
class Balance(Section):
    """How the cells (teacher × group) are weighted; `group` is an attribute or a crossing such as `sex*view`.

    With `resample` above 0 images are drawn with replacement, so that a group of share p comes with one ∝ p^(1 −
    resample): at 1 all groups are as frequent. Images without annotation come as often as before, unless `proxies` puts
    them into groups: all images where `group` is null.
    """

    kind: str = "uniform"
    group: str | None = None
    proxies: Proxies | None = None
    options: dict[str, Any] = field(default_factory=dict)
    resample: Strength = 0.0

    @property
    def over(self) -> str | None:
        """What the groups are groups of; never the attribute alone where clusters are among them."""
        if self.proxies is None:
            return self.group
        clusters = f"clusters of {self.proxies.teacher}"
        return f"{self.group}, else {clusters}" if self.group else clusters


@dataclass(frozen=True, kw_only=True)
class Augment(Section):
    """Random resized crop of the training view; no flip by default, laterality carries meaning."""

    crop: tuple[Share, Share] = (0.5, 1.0)
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """AdamW and the batch. `batch` is global: over all ranks and accumulation steps."""

    batch: Positive = 64
    accumulate: Positive = 1
    weight_decay: Weight = 0.05
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    clip: Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class Acquisition(Section):
    """How strongly each kind of a simulated acquisition acts, 1 at most; 0 is not at all."""

    blur: Strength = 0.0
    resolution: Strength = 0.0
    contrast: Strength = 0.0
    inversion: Strength = 0.0
    noise: Strength = 0.0


@dataclass(frozen=True, kw_only=True)
class Views(Section):
    """The student sees a `share` of its images as some other device might have taken them, its teachers never.

    With `groups` of attributes or crossings, only images that are in any of these groups.
    """

    kinds: Acquisition
    share: Share = 0.5
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage(Section):
    """One leg of the training. Without `teachers`, all of them.

    `size` is that of the images: the side of a square, or [height, width]. With `sizes`, one of them is drawn for each
    step, the same for all teachers, and `size`, one of them, is that of the evaluation. With a `student` of its own, a
    stage starts a new one, which may learn from the student of an earlier stage: a teacher of a kind that takes `stage`
    as an option.

    The heads learn at `lr`, the trunk at `trunk_lr_scale` times it: below 1 a pretrained trunk keeps more of what it
    knows while the heads, which start at random, catch up (Kumar et al. 2022, arXiv 2202.10054).

    With `views` the student does not see what its teachers see, who always see the clean image.
    """

    name: str
    length: str
    size: Side = 224
    sizes: tuple[Side, ...] = ()
    student: StudentSpec | None = None
    teachers: tuple[str, ...] = ()
    lr: Rate = 1e-3
    lr_end: Weight = 1e-5
    trunk_lr_scale: Share = 1.0
    warmup: str = "5%"
    views: Views | None = None


@dataclass(frozen=True, kw_only=True)
class Engine(Section):
    """Precision and ZeRO stage; `deepspeed` takes DeepSpeed's own keys."""

    precision: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2, 3] = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompts(Section):
    """Texts that describe a label where it is present (`positive`) and where it is absent (`negative`).

    A class of a column, `finding=covid`, may do without the latter: it is told from the other classes.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluate(Section):
    """The evaluation after each stage. `size` defaults to that of the last stage, so teachers are encoded once.

    `permutations` draw the gap that groups would show if they did not differ; 0 leaves it out. `leakage`: how well a
    linear probe reads the groups from the features. `scarcity`: shares of the train patients that the probes are fitted
    on as well, each for `scarcity_seeds` draws. `holdout`: attributes or crossings, such as `site`, of which each group
    in turn is what the probes are fitted on. `prompts` by label are what zero-shot compares images with; the student is
    read through its head for the teacher `prompted_by`, else for the first one with a text tower. `sizes`: of images at
    which the student and its teachers are looked at besides, the resolution sweep. `conflict`: how the teachers agree
    as the student sees them, by their losses and by their gradients.
    """

    size: Side | None = None
    sizes: tuple[Side, ...] = ()
    conflict: bool = True
    batch: Positive = 32
    knn: Positive = 20
    probe_images: Positive = 20000
    fvu_images: Positive = 512
    bootstrap: Positive = 1000
    permutations: Natural = 200
    leakage: bool = True
    scarcity: tuple[Share, ...] = ()
    scarcity_seeds: Positive = 3
    holdout: tuple[str, ...] = ()
    prompts: dict[str, Prompts] = field(default_factory=dict)
    prompted_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Log(Section):
    """How often to log and to save; `keep` checkpoints are kept."""

    every: str = "10 steps"
    checkpoint: str = "500 steps"
    keep: Positive = 2


@dataclass(frozen=True, kw_only=True)
class Job(Section):
    """Everything a run is made of."""

    data: Data
    teachers: dict[str, TeacherSpec]
    stages: tuple[Stage, ...]
    student: StudentSpec = StudentSpec()
    heads: Heads = Heads()
    loss: Loss = Loss()
    balance: Balance = Balance()
    augment: Augment = Augment()
    optim: Optim = Optim()
    engine: Engine = Engine()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    seed: Natural = 0


@dataclass(frozen=True, kw_only=True)
class Audit(Section):
    """The parts of a job that the evaluation of somebody's scores needs."""

    data: Data
    evaluate: Evaluate = Evaluate()
    seed: Natural = 0


# ── Durations ──


class Duration(NamedTuple):
    """An amount and its unit: `steps`, `epochs`, `samples` or `%`."""

    amount: float
    unit: str


def parse_duration(text: str) -> Duration:
    """Split "30 epochs" into 30 and "epochs". Raises ConfigError on anything else."""
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*(step|epoch|sample|%)s?\s*", text)
    if not match:
        raise ConfigError(f"{text!r} is not a duration; write it as '2000 steps', '30 epochs', '20000 samples' or '5%'")
    amount, unit = float(match[1].replace("_", "")), match[2]
    return Duration(amount, unit if unit == "%" else unit + "s")


def duration(text: str, *, batch: int, samples: int, total_steps: int | None = None) -> int:
    """Optimizer steps in `text`, rounded up: `samples` is the number of images of an epoch, `batch` the global batch.

    A percentage is of `total_steps`; ConfigError where that is None.
    """
    amount, unit = parse_duration(text)
    if unit == "%" and total_steps is None:
        raise ConfigError(f"{text!r} is a share of nothing; give it in steps, epochs or samples")
    per_unit = {"steps": 1.0, "epochs": samples / batch, "samples": 1 / batch, "%": (total_steps or 0) / 100}
    return math.ceil(amount * per_unit[unit] - 1e-9)
