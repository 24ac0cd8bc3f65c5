"""The configuration: frozen dataclasses, read from YAML with every problem reported at once. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# ── The job, as dataclasses. Durations are strings with a unit: "2000 steps", "30 epochs", "20000 samples", "5%". ──


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One column of the manifest that describes the patient or the acquisition."""

    kind: Literal["categorical", "continuous"] = "categorical"
    column: str | None = None
    bins: tuple[float, ...] = ()
    missing: tuple[str, ...] = ("", "NA", "NaN", "nan", "unknown", "Unknown", "UNKNOWN")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The values of the split column. Without `test`, the report is on `val` and says so."""

    train: str = "train"
    val: str = "val"
    test: str | None = "test"


@dataclass(frozen=True, kw_only=True)
class Data:
    """The manifest and how to read it. Relative paths start at the folder of the configuration file."""

    manifest: str
    root: str | None = None
    image: str = "image"
    patient: str = "patient"
    split: str = "split"
    splits: Splits = Splits()
    labels: tuple[str, ...] = ()
    attributes: dict[str, Attribute] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    min_support: int = 30
    value_range: tuple[float, float] | None = None
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A teacher: a plug-in and its options; `source` names the teacher from whose features it is derived."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StudentSpec:
    """The student: a plug-in and its options."""

    kind: str = "timm"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The MLP between the student and each target: width and number of hidden residual blocks."""

    hidden: int = 512
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Losses per token kind, their weights, and the normaliser of the targets."""

    summary: Literal["angular", "cosine", "mse"] = "angular"
    patches: Literal["mse", "cosine", "smooth_l1"] = "mse"
    summary_weight: float = 1.0
    patches_weight: float = 1.0
    normaliser: Literal["phi_s", "standardise", "whiten", "none"] = "phi_s"
    fit_images: int = 3000


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How the cells (teacher × group) are weighted; `group` is an attribute or a crossing such as `sex*view`."""

    kind: str = "uniform"
    group: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random resized crop of the training view; no flip by default, laterality carries meaning."""

    crop: tuple[float, float] = (0.5, 1.0)
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and the batch. `batch` is global: over all ranks and accumulation steps."""

    batch: int = 64
    accumulate: int = 1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One leg of the training. Without `teachers`, all of them."""

    name: str
    length: str
    size: int = 224
    teachers: tuple[str, ...] = ()
    lr: float = 1e-3
    lr_end: float = 1e-5
    warmup: str = "5%"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Precision and ZeRO stage; `deepspeed` takes DeepSpeed's own keys."""

    precision: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2, 3] = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The evaluation after each stage. `size` defaults to that of the last stage, so teachers are encoded once."""

    size: int | None = None
    batch: int = 32
    knn: int = 20
    probe_images: int = 20000
    fvu_images: int = 512
    bootstrap: int = 1000


@dataclass(frozen=True, kw_only=True)
class Log:
    """How often to log and to save; `keep` checkpoints are kept."""

    every: str = "10 steps"
    checkpoint: str = "500 steps"
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class Job:
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
    seed: int = 0
