"""The configuration: frozen dataclasses, read from YAML with every problem reported at once. Imports no torch.

A relative path starts at the folder of the file that says it, or at the current folder when `--set` says it; `load`
makes it absolute, so a dumped job can be read from anywhere. Paths are `data.manifest`, `data.root`, every kind that
ends in `.py`, and every option that begins with `./`, `../` or `~/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from agglom import plugins
from agglom.errors import ConfigError, PluginError

Positive = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0)]
Weight = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]


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
    """A teacher: a plug-in and its options; `source` names the teacher from whose features it is derived."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    weight: Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class StudentSpec(Section):
    """The student: a plug-in and its options."""

    kind: str = "timm"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Heads(Section):
    """The MLP between the student and each target: width and number of hidden residual blocks."""

    hidden: Positive = 512
    depth: Natural = 1


@dataclass(frozen=True, kw_only=True)
class Loss(Section):
    """Losses per token kind, their weights, and the normaliser of the targets."""

    summary: Literal["angular", "cosine", "mse", "unic"] = "angular"
    patches: Literal["mse", "cosine", "smooth_l1", "hybrid", "unic", "relational"] = "mse"
    summary_weight: Weight = 1.0
    patches_weight: Weight = 1.0
    normaliser: Literal["phi_s", "global_std", "standardise", "whiten", "none"] = "phi_s"
    fit_images: Annotated[int, Ge(2)] = 3000

    @property
    def normalises_summary(self) -> bool:
        """Whether targets of summaries are normalised: a loss of directions alone takes them as they are."""
        return self.summary in ("mse", "unic")


@dataclass(frozen=True, kw_only=True)
class Balance(Section):
    """How the cells (teacher × group) are weighted; `group` is an attribute or a crossing such as `sex*view`."""

    kind: str = "uniform"
    group: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


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
class Stage(Section):
    """One leg of the training. Without `teachers`, all of them.

    The heads learn at `lr`, the trunk at `trunk_lr_scale` times it: below 1 a pretrained trunk keeps more of what it
    knows while the heads, which start at random, catch up (Kumar et al. 2022, arXiv 2202.10054).
    """

    name: str
    length: str
    size: Positive = 224
    teachers: tuple[str, ...] = ()
    lr: Rate = 1e-3
    lr_end: Weight = 1e-5
    trunk_lr_scale: Share = 1.0
    warmup: str = "5%"


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
    read through its head for the teacher `prompted_by`, else for the first one with a text tower.
    """

    size: Positive | None = None
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


Part = TypeVar("Part", Job, Audit)


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


# ── YAML ──

# The numbers, booleans and nulls of YAML 1.2: `1e-4` is a number; `no`, `12:30` and `2020-01-01` are strings.
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, that refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own declaration)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in first:
                problem = f"key {key.value!r} is given twice, first in line {first[key.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that either YAML 1.1 or `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # Plain and single-quoted scalars lose line breaks such as U+0085.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}:{line}: {error.problem or 'not YAML'}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error


def _read_text(path: Path, role: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such {role}{_suggest(path.name, beside)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this {role}: {error}") from error


Key = tuple[str | int, ...]
Problem = tuple[Key, str]


def _anchor(value: Any, key: Key, folder: Path) -> Any:
    """`value` with every relative path in it made absolute, starting at `folder`."""
    if isinstance(value, dict):
        return {name: _anchor(item, (*key, name), folder) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    match key:
        case ("data", "manifest" | "root"):
            is_path = bool(value)
        case ("teachers", _, "kind") | ("student" | "balance", "kind"):
            is_path = value.endswith(".py")
        case ("teachers", _, "options", *_) | ("student" | "balance", "options", *_):
            is_path = value.startswith(("./", "../", "~/"))
        case _:
            is_path = False
    return os.path.abspath(folder / Path(value).expanduser()) if is_path else value


def _merge(base: Any, top: Any) -> Any:
    """`top` over `base`: maps are merged, everything else (lists too) is replaced."""
    if isinstance(base, dict) and isinstance(top, dict):
        return base | {key: _merge(base[key], value) if key in base else value for key, value in top.items()}
    return top


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The map in a file, merged over the file that it extends."""
    if path.resolve() in seen:
        chain = " extends ".join(p.name for p in (*seen[seen.index(path.resolve()) :], path))
        raise ConfigError(f"{path}: extends: a cycle, {chain}; remove one of these")
    raw = _parse(_read_text(path, "configuration"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a map of keys (data, teachers, stages, …), got {_show(raw)}")
    parent = raw.pop("extends", None)
    raw = _anchor(raw, (), path.parent)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: expected the name of one file, got {_show(parent)}")
    return _merge(_read(path.parent / parent, (*seen, path.resolve())), raw)


def _override(raw: dict[str, Any], text: str) -> None:
    """Apply one `--set a.b[0]=value` in place."""
    name, equals, value = text.partition("=")
    parts = re.findall(r"[^.\[\]]+", name)
    if not equals or not parts:
        raise ConfigError(f"--set {text}: expected key.path=value, for example --set optim.batch=64")
    node: Any = raw
    key: Key = ()
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"--set {text}: {_path(key)} has {len(node)} entries, counted from 0; got {part!r}")
            place: str | int = int(part)
        elif isinstance(node, dict):
            place = part
            if node.get(part) is None and depth + 1 < len(parts):
                node[part] = {}
        else:
            raise ConfigError(f"--set {text}: {_path(key)} is {_show(node)}, it has no keys")
        key = (*key, place)
        if depth + 1 < len(parts):
            node = node[place]
    node[place] = _anchor(_parse(value, f"--set {name}"), key, Path.cwd())


# ── Shape: what pydantic finds ──


def _path(key: Key) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".") or "top level"


def _show(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_of(word: str, known: Sequence[str], what: str) -> str:
    listed = ", ".join(known) or f"none; there are no {what}"
    return f"{word!r} is not one of the {what}: {listed}{_suggest(word, known)}"


def _type_at(key: Key) -> Any:
    """The type that the dataclasses declare at a key path."""
    found: Any = Job
    for part in key:
        if dataclasses.is_dataclass(found):
            found = get_type_hints(found)[str(part)]
        else:
            found = get_args(found)[-1 if get_origin(found) is dict else 0]
    return found


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "tuple_type": "a list",
    "dict_type": "a map of keys",
    "dataclass_type": "a map of keys",
}


def _explain(error: Mapping[str, Any]) -> Problem:
    kind, key, got, context = error["type"], tuple(error["loc"]), error["input"], error.get("ctx", {})
    match kind:
        case "unexpected_keyword_argument" if len(key) == 1 and key[0] in get_type_hints(Job):
            return (), f"an audit reads {', '.join(get_type_hints(Audit))}; got {key[0]!r}"
        case "unexpected_keyword_argument":
            known = [f.name for f in dataclasses.fields(_type_at(key[:-1]))]
            remedy = _suggest(str(key[-1]), known) or f"; known keys: {', '.join(known)}"
            return key[:-1], f"unknown key {key[-1]!r}{remedy}"
        case "missing" if isinstance(key[-1], int):
            return key[:-1], f"value {key[-1]} is missing, got {_show(got)}"
        case "missing":
            return key[:-1], f"key {key[-1]!r} is missing; add it"
        case "literal_error":
            remedy = _suggest(got, re.findall(r"'(\w+)'", context["expected"])) if isinstance(got, str) else ""
            return key, f"expected {context['expected']}, got {_show(got)}{remedy}"
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            (bound,) = context.values()
            words = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
            return key, f"must be {words.get(kind, 'less than')} {bound:g}, got {_show(got)}"
        case "too_long":
            return key, f"expected {context['max_length']} values, got {_show(got)}"
        case _ if kind in _EXPECTED:
            return key, f"expected {_EXPECTED[kind]}, got {_show(got)}"
    return key, f"{error['msg']}, got {_show(got)}"


def _without(value: Any, key: Key) -> Any:
    """A copy of nested maps and lists without the entry at `key`, so that its default takes its place."""
    if isinstance(value, dict) and key and key[0] in value:
        if len(key) == 1:
            return {name: item for name, item in value.items() if name != key[0]}
        return value | {key[0]: _without(value[key[0]], key[1:])}
    if isinstance(value, list) and len(key) > 1 and isinstance(key[0], int) and key[0] < len(value):
        return [_without(item, key[1:]) if i == key[0] else item for i, item in enumerate(value)]
    return value


def _blamed(error: Mapping[str, Any]) -> Key:
    """The key whose value is not what the user meant: that of the error, or the one that an unknown key resembles."""
    *parent, name = error["loc"]
    if error["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(_type_at(tuple(parent)))]
        return (*parent, *(difflib.get_close_matches(str(name), known, n=1) or [name]))
    # The kind decides what its neighbours mean.
    return tuple(parent) if name == "kind" else (*parent, name)


def _validate(
    raw: Any, kind: type[Part], check: Callable[[Part], Iterator[Problem]]
) -> tuple[Part | None, list[Problem]]:
    """The job and its problems, all of them where wrong values can be replaced by defaults to check the rest."""
    adapter = TypeAdapter(kind)
    try:
        job = adapter.validate_json(json.dumps(raw, default=str), strict=True)
        return job, list(check(job))
    except ValidationError as error:
        errors = error.errors(include_url=False)
    blamed = {_blamed(item) for item in errors if item["type"] != "missing"}
    shape = [_explain(item) for item in errors if item["type"] != "missing" or tuple(item["loc"]) not in blamed]
    for item in errors:
        raw = _without(raw, tuple(item["loc"]))
    try:
        job = adapter.validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError:
        return None, shape
    # A default that stands in for a wrong value must not be blamed in its turn.
    return job, shape + [(key, text) for key, text in check(job) if not any(key[: len(b)] == b for b in blamed)]


# ── Sense: what no single field can know ──


def _attributes(data: Data, name: str, *, one_value: bool = True) -> Iterator[str]:
    """What is wrong with an attribute's name or a crossing such as `sex*view`; `one_value`: it must be a partition."""
    parts = name.split("*")
    for part in parts:
        if part not in data.attributes:
            yield _one_of(part, list(data.attributes), "attributes under data.attributes")
        elif one_value and data.attributes[part].separator is not None:
            yield f"{part!r} has a separator, so an image may be in several of its groups; name one without"
    if len(set(parts)) < len(parts):
        yield f"{name!r} crosses an attribute with itself"


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _check_data(data: Data) -> Iterator[Problem]:
    if not data.manifest:
        yield ("data", "manifest"), "is empty; name the CSV or Parquet file with one row per image"
    for name in _repeated(data.labels):
        yield ("data", "labels"), f"{name!r} is given twice"
    for index, name in enumerate(data.labels):
        column, of_class, value = name.partition("=")
        if not column or (of_class and not value):
            yield ("data", "labels", index), f"{name!r} is not a column, nor a class of one such as 'finding=covid'"
        elif of_class and column in data.labels:
            yield ("data", "labels", index), f"{name!r} takes {column!r} for classes, another label for 0 and 1"
    splits = data.splits
    if len({splits.train, splits.val, splits.test}) < 3:
        yield ("data", "splits"), f"train, val and test must differ, got {splits.train}, {splits.val}, {splits.test}"
    for name, attribute in data.attributes.items():
        key = ("data", "attributes", name)
        if not name or re.search(r"[*|]", name):
            yield key, "an attribute's name may not be empty or hold '*' or '|', they write crossings"
        if attribute.kind == "continuous" and (
            not attribute.bins or list(attribute.bins) != sorted(set(attribute.bins))
        ):
            got = _show(list(attribute.bins))
            yield (*key, "bins"), f"a continuous attribute needs increasing edges, for example [50, 65]; got {got}"
        if attribute.kind == "categorical" and attribute.bins:
            yield (*key, "bins"), "only a continuous attribute has bins; remove them or set kind: continuous"
        if attribute.separator is not None and (attribute.kind == "continuous" or not attribute.separator.strip()):
            yield (*key, "separator"), 'only a categorical attribute has a separator, and it may not be blank; try ";"'
    for index, name in enumerate(data.groups):
        for message in _attributes(data, name, one_value=False):
            yield ("data", "groups", index), message
    for name in _repeated(data.groups):
        yield ("data", "groups"), f"{name!r} is given twice"
    if data.value_range and data.value_range[0] >= data.value_range[1]:
        yield ("data", "value_range"), f"the first must be less than the second, got {_show(data.value_range)}"


def _check_plugin(key: Key, kind: str, package: str, options: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        signature = plugins.schema(kind, package)
    except PluginError as error:
        yield (*key, "kind"), str(error)
        return
    for option, message in plugins.problems(signature, options, plugins.INJECTED[package]):
        yield (*key, "options", option) if option else (*key, "options"), message


def _check_teachers(job: Job) -> Iterator[Problem]:
    names = list(job.teachers)
    if not names:
        yield ("teachers",), "is empty; name at least one teacher"
    elif all(spec.weight == 0 for spec in job.teachers.values()):
        yield ("teachers",), "every weight is 0, nothing would be learned"
    for name, spec in job.teachers.items():
        key = ("teachers", name)
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            yield key, "a teacher's name may hold a-z, 0-9, '_' and '-' only; rename it"
        if spec.source is not None and spec.source not in job.teachers:
            yield (*key, "source"), _one_of(spec.source, [n for n in names if n != name], "other teachers")
        else:
            chain = [name]
            while (source := job.teachers[chain[-1]].source) in job.teachers and len(chain) <= len(names):
                chain.append(str(source))
            if name in chain[1:]:
                yield (*key, "source"), f"a cycle: {' ← '.join(chain[: chain.index(name, 1) + 1])}"
        yield from _check_plugin(key, spec.kind, "teachers", spec.options)
        derives = plugins.takes(spec.kind, "teachers", "source")
        if derives and spec.source is None:
            others = ", ".join(n for n in names if n != name) or "none yet"
            yield (*key, "source"), f"kind {spec.kind!r} derives from another teacher; name one (there are: {others})"
        if derives is False and spec.source is not None:
            yield (*key, "source"), f"kind {spec.kind!r} has no source; remove this key"
        if derives and isinstance(attribute := spec.options.get("attribute"), str):
            for message in _attributes(job.data, attribute):
                yield (*key, "options", "attribute"), message


def _check_prompts(job: Job) -> Iterator[Problem]:
    key: Key = ("evaluate", "prompts")
    prompts, labels = job.evaluate.prompts, job.data.labels
    for label, texts in prompts.items():
        if label not in labels:
            yield (*key, label), _one_of(label, labels, "labels under data.labels")
        for kind in ("positive", "negative"):
            if any(not text.strip() for text in getattr(texts, kind)):
                yield (*key, label, kind), "holds an empty text; remove it"
        if not texts.positive:
            yield (*key, label, "positive"), "is empty; describe an image that shows the label"
        if texts.negative:
            continue
        column, of_class, _ = label.partition("=")
        others = [one for one in labels if of_class and one != label and one.startswith(f"{column}=")]
        if not others:
            yield (*key, label), "needs negative, too: describe an image that does not show the label"
        for other in others:
            if other not in prompts or prompts[other].negative:
                state = "has no prompts" if other not in prompts else "has negative prompts"
                yield (*key, label), f"is told from the other classes of {column!r}, but {other!r} {state}"
    name = job.evaluate.prompted_by
    if name is not None and name not in job.teachers:
        yield ("evaluate", "prompted_by"), _one_of(name, list(job.teachers), "teachers")


def _check_stages(job: Job) -> Iterator[Problem]:
    if not job.stages:
        yield ("stages",), "is empty; give at least one stage, for example [{name: full, length: 30 epochs}]"
    for name in _repeated([stage.name for stage in job.stages]):
        yield ("stages",), f"two stages are called {name!r}; reports are files of that name, rename one"
    for index, stage in enumerate(job.stages):
        key: Key = ("stages", index)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage.name) or stage.name == "teachers":
            yield (
                (*key, "name"),
                (f"{stage.name!r} cannot name report files; use letters, digits, '_' and '-' ('teachers' is taken)"),
            )
        for name in dict.fromkeys(stage.teachers):
            if name not in job.teachers:
                yield (*key, "teachers"), _one_of(name, list(job.teachers), "teachers")
        for name in _repeated(stage.teachers):
            yield (*key, "teachers"), f"{name!r} is given twice"
        try:
            length = parse_duration(stage.length)
        except ConfigError as error:
            yield (*key, "length"), str(error)
            continue
        if length.unit == "%":
            yield (*key, "length"), f"{stage.length!r} is a share of nothing; give it in steps, epochs or samples"
        elif length.amount == 0:
            yield (*key, "length"), f"{stage.length!r} trains nothing; make it longer or remove the stage"
        else:
            yield from _check_warmup(job, (*key, "warmup"), stage, length)


def _check_warmup(job: Job, key: Key, stage: Stage, length: Duration) -> Iterator[Problem]:
    try:
        warmup = parse_duration(stage.warmup)
    except ConfigError as error:
        yield key, str(error)
        return
    # An epoch is unknown until the manifest is read; `plan` compares the other pairs of units.
    comparable = warmup.unit == "%" or (warmup.unit == "epochs") == (length.unit == "epochs")
    steps = duration(stage.length, batch=job.optim.batch, samples=10**6)
    if comparable and duration(stage.warmup, batch=job.optim.batch, samples=10**6, total_steps=steps) > steps:
        yield key, f"{stage.warmup!r} is longer than the stage ({stage.length}); shorten it"


def _check(job: Job) -> Iterator[Problem]:
    """Every problem of a well-shaped job that needs more than one field to see."""
    yield from _check_data(job.data)
    yield from _check_teachers(job)
    yield from _check_plugin(("student",), job.student.kind, "students", job.student.options)
    yield from _check_plugin(("balance",), job.balance.kind, "balancers", job.balance.options)
    yield from _check_stages(job)
    yield from _check_prompts(job)
    yield from _check_studies(job)
    if job.data.split is None:
        yield ("data", "split"), "is null, which is for audits only; name the column that parts train, val and test"
    if job.balance.group is not None:
        for message in _attributes(job.data, job.balance.group):
            yield ("balance", "group"), message
    elif job.balance.kind != "uniform" and plugins.takes(job.balance.kind, "balancers", "cells"):
        known = ", ".join(job.data.attributes) or "none yet"
        yield ("balance", "group"), f"kind {job.balance.kind!r} weighs groups; name an attribute (there are: {known})"
    if not job.loss.summary_weight and not job.loss.patches_weight:
        yield ("loss",), "summary_weight and patches_weight are both 0, nothing would be learned"
    if job.augment.crop[0] > job.augment.crop[1]:
        yield ("augment", "crop"), f"the first may not exceed the second, got {_show(job.augment.crop)}"
    if job.optim.batch % job.optim.accumulate:
        sizes = _nearest(job.optim.batch, job.optim.accumulate)
        yield (
            ("optim", "batch"),
            f"{job.optim.batch} does not divide by accumulate = {job.optim.accumulate}; {sizes} do",
        )
    if job.engine.precision == "bf16" and job.engine.zero == 0:
        yield ("engine", "zero"), "bf16 with ZeRO 0 keeps no fp32 weights and drifts; set zero to 1, 2 or 3"
    for name in ("every", "checkpoint"):
        try:
            if parse_duration(getattr(job.log, name)).amount == 0:
                yield ("log", name), "must be more than 0"
        except ConfigError as error:
            yield ("log", name), str(error)


def _check_studies(job: Job) -> Iterator[Problem]:
    evaluate = job.evaluate
    for index, name in enumerate(evaluate.holdout):
        for message in _attributes(job.data, name, one_value=False):
            yield ("evaluate", "holdout", index), message
    asked = {"scarcity": [f"{share:g}" for share in evaluate.scarcity], "holdout": evaluate.holdout}
    for key, values in asked.items():
        for value in _repeated(values):
            yield ("evaluate", key), f"{value} is given twice"
        if values and not job.data.labels:
            yield ("evaluate", key), "fits probes of labels, and data.labels is empty; name them there"


def _nearest(batch: int, divisor: int) -> str:
    """The multiples of `divisor` around `batch`, in words."""
    below = batch // divisor * divisor
    return " and ".join(str(size) for size in (below, below + divisor) if size)


# DeepSpeed ignores top-level keys that it does not know, and new versions add some: only a near miss is refused.
DEEPSPEED_KEYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "torch_autocast", "communication_data_type"),
    *("activation_checkpointing", "aio", "comms_logger", "flops_profiler", "steps_per_print", "wall_clock_breakdown"),
    *("memory_breakdown", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "data_types"),
    *("zero_allow_untrusted_optimizer", "zero_force_ds_cpu_optimizer", "checkpoint", "compile", "dump_state"),
)


# ── The interface ──


def load(
    path: str | Path, overrides: Sequence[str] = (), *, deepspeed_config: str | Path | None = None
) -> tuple[Job, Path]:
    """The job in a YAML file, and the folder of that file.

    Later wins: the files that it extends, the file, `deepspeed_config` (a JSON file, merged under `engine.deepspeed`),
    `overrides` (`key.path=value`, the value is YAML). Raises one ConfigError that lists every problem.
    """
    path = Path(path)
    raw = _read(path)
    if deepspeed_config is not None:
        file = Path(deepspeed_config)
        try:
            settings = json.loads(_read_text(file, "DeepSpeed configuration"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{file}: expected a map of DeepSpeed's keys, got {_show(settings)}")
        raw = _merge(raw, {"engine": {"deepspeed": settings}})
    return _job(raw, overrides, str(path), Job, _check), path.parent


def load_audit(path: str | Path | None, overrides: Sequence[str] = (), **data: Any) -> tuple[Audit, Path]:
    """What an audit needs of the YAML file `path`, and that file's folder (without a file, the current one).

    The file may be a whole job, of which only `data`, `evaluate` and `seed` are read. The keys `data` of the section of
    that name replace those of the file, and `overrides` replace both. Raises as `load`.
    """
    raw = {} if path is None else _read(Path(path))
    keys, known = {f.name for f in dataclasses.fields(Audit)}, [f.name for f in dataclasses.fields(Job)]
    lines = [f"top level: unknown key {key!r}{_suggest(key, known)}" for key in raw if key not in known]
    if lines:
        raise ConfigError("\n  ".join([f"{path}: {_count(lines)}", *lines]))
    raw = _merge({key: value for key, value in raw.items() if key in keys}, {"data": data})
    where = "the schema from the column names" if path is None else str(path)
    folder = Path.cwd() if path is None else Path(path).parent
    return _job(raw, overrides, where, Audit, lambda audit: _check_data(audit.data)), folder


def _job(
    raw: dict[str, Any],
    overrides: Sequence[str],
    where: str,
    kind: type[Part],
    check: Callable[[Part], Iterator[Problem]],
) -> Part:
    lines: list[str] = []
    for text in overrides:
        try:
            _override(raw, text)
        except ConfigError as error:
            lines.append(str(error))
    job, problems = _validate(raw, kind, check)
    lines += [f"{_path(key)}: {message}" for key, message in problems]
    if lines or job is None:
        raise ConfigError("\n  ".join([f"{where}: {_count(lines)}", *dict.fromkeys(lines)]))
    return job


def _count(lines: Sequence[str]) -> str:
    return f"{len(lines)} problem{'s' * (len(lines) != 1)}"


def options(overrides: Sequence[str]) -> dict[str, Any]:
    """The options of a single plug-in from `key=value` texts, with the paths rule of `load`."""
    raw: dict[str, Any] = {"student": {"options": {}}}
    for text in overrides:
        _override(raw, f"student.options.{text}")
    return raw["student"]["options"]


def dump(job: Job) -> str:
    """The job as YAML that `load` reads back to an equal job."""
    return yaml.dump(_plain(dataclasses.asdict(job)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def micro_batch(job: Job, world: int) -> int:
    """Images per rank and accumulation step. Raises ConfigError where the global batch does not divide."""
    parts = world * job.optim.accumulate
    if job.optim.batch % parts:
        raise ConfigError(
            f"optim.batch: {job.optim.batch} images do not divide over {world} ranks × {job.optim.accumulate} "
            f"accumulation steps; {_nearest(job.optim.batch, parts)} do"
        )
    return job.optim.batch // parts


def deepspeed(job: Job, world: int) -> dict[str, Any]:
    """DeepSpeed's final configuration on `world` ranks: `engine.deepspeed` plus the keys that agglom owns.

    An owned key may be absent, "auto" or equal to agglom's; one ConfigError lists every other. `optimizer` and
    `scheduler` are checked and left out, since agglom makes both; so is every other "auto", DeepSpeed's default.
    """
    micro = micro_batch(job, world)
    lr = job.stages[0].lr
    owned: dict[tuple[str, ...], tuple[Any, str]] = {
        ("train_batch_size",): (job.optim.batch, "optim.batch"),
        ("train_micro_batch_size_per_gpu",): (micro, f"optim.batch over {world} ranks and optim.accumulate"),
        ("gradient_accumulation_steps",): (job.optim.accumulate, "optim.accumulate"),
        ("gradient_clipping",): (job.optim.clip, "optim.clip"),
        ("bf16", "enabled"): (job.engine.precision == "bf16", "engine.precision"),
        ("fp16", "enabled"): (False, "engine.precision, fp32 or bf16"),
        ("zero_optimization", "stage"): (job.engine.zero, "engine.zero"),
        ("optimizer", "type"): ("AdamW", "agglom"),
        ("optimizer", "params", "lr"): (lr, "stages[].lr"),
        ("optimizer", "params", "betas"): (list(job.optim.betas), "optim.betas"),
        ("optimizer", "params", "weight_decay"): (job.optim.weight_decay, "optim.weight_decay"),
    }
    lines, settings = [], {}
    for key, value in _leaves(job.engine.deepspeed):
        name = _path(("engine", "deepspeed", *key))
        if key[0] not in DEEPSPEED_KEYS and difflib.get_close_matches(key[0], DEEPSPEED_KEYS, cutoff=0.85):
            raise ConfigError(f"{name}: unknown key{_suggest(key[0], DEEPSPEED_KEYS)}")
        if key in owned and value != "auto" and value != owned[key][0]:
            lines.append(f"{name}: {_show(value)} contradicts {_show(owned[key][0])}, set by {owned[key][1]}")
        elif key not in owned and key[0] in ("optimizer", "scheduler") and value != "auto":
            lines.append(f"{name}: agglom makes the {key[0]} itself; remove this key, set optim and stages instead")
        elif value != "auto" and key not in owned and key[0] not in ("optimizer", "scheduler"):
            settings[key] = value
    if lines:
        count = f"{len(lines)} conflict{'s' * (len(lines) != 1)} with keys that agglom owns (remove them or write auto)"
        raise ConfigError("\n  ".join([f"engine.deepspeed: {count}", *lines]))
    settings |= {key: value for key, (value, _) in owned.items() if key[0] != "optimizer"}
    final: dict[str, Any] = {}
    for (*parents, leaf), value in settings.items():
        node = final
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return final


def _leaves(tree: Mapping[str, Any], key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*key, name))
        else:
            yield (*key, name), value


def schema() -> str:
    """The JSON schema of a configuration file, for editors. A file that others extend may leave keys out."""
    tree = TypeAdapter(Job).json_schema()
    tree.pop("required")
    tree["properties"]["extends"] = {"type": "string", "description": "A file, relative to this one, to start from."}
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | tree, indent=2) + "\n"


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("configs", "schema.json").write_text(schema(), encoding="utf-8")
