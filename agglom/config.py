"""The configuration: YAML to a `Job`, with every problem reported at once, and back. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from agglom.checks import Problem, data_problems, nearest, problems
from agglom.errors import ConfigError
from agglom.job import Audit, Job
from agglom.yamls import Dumper, Key, key_path, merge, override, read_file, read_text, show, suggest

Part = TypeVar("Part", Job, Audit)


# ── Shape: what pydantic finds ──


def _type_at(key: Key) -> Any:
    """The type that the dataclasses declare at a key path."""
    found: Any = Job
    for part in key:
        if dataclasses.is_dataclass(found):
            found = get_type_hints(found)[str(part)]
        else:
            found = get_args(found)[-1 if get_origin(found) is dict else 0]
        if type(None) in get_args(found):
            found = get_args(found)[0]
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
    "side_type": "a number of pixels or [height, width]",
}


def _explain(error: Mapping[str, Any]) -> Problem:
    kind, key, got, context = error["type"], tuple(error["loc"]), error["input"], error.get("ctx", {})
    match kind:
        case "unexpected_keyword_argument" if len(key) == 1 and key[0] in get_type_hints(Job):
            return (), f"an audit reads {', '.join(get_type_hints(Audit))}; got {key[0]!r}"
        case "unexpected_keyword_argument":
            known = [f.name for f in dataclasses.fields(_type_at(key[:-1]))]
            remedy = suggest(str(key[-1]), known) or f"; known keys: {', '.join(known)}"
            return key[:-1], f"unknown key {key[-1]!r}{remedy}"
        case "missing" if isinstance(key[-1], int):
            return key[:-1], f"value {key[-1]} is missing, got {show(got)}"
        case "missing":
            return key[:-1], f"key {key[-1]!r} is missing; add it"
        case "literal_error":
            remedy = suggest(got, re.findall(r"'(\w+)'", context["expected"])) if isinstance(got, str) else ""
            return key, f"expected {context['expected']}, got {show(got)}{remedy}"
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            (bound,) = context.values()
            words = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
            return key, f"must be {words.get(kind, 'less than')} {bound:g}, got {show(got)}"
        case "too_long":
            return key, f"expected {context['max_length']} values, got {show(got)}"
        case _ if kind in _EXPECTED:
            return key, f"expected {_EXPECTED[kind]}, got {show(got)}"
    return key, f"{error['msg']}, got {show(got)}"


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
    raw = read_file(path)
    if deepspeed_config is not None:
        file = Path(deepspeed_config)
        try:
            settings = json.loads(read_text(file, "DeepSpeed configuration"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{file}: expected a map of DeepSpeed's keys, got {show(settings)}")
        raw = merge(raw, {"engine": {"deepspeed": settings}})
    return _job(raw, overrides, str(path), Job, problems), path.parent


def load_audit(path: str | Path | None, overrides: Sequence[str] = (), **data: Any) -> tuple[Audit, Path]:
    """What an audit needs of the YAML file `path`, and that file's folder (without a file, the current one).

    The file may be a whole job, of which only `data`, `evaluate` and `seed` are read. The keys `data` of the section of
    that name replace those of the file, and `overrides` replace both. Raises as `load`.
    """
    raw = {} if path is None else read_file(Path(path))
    keys, known = {f.name for f in dataclasses.fields(Audit)}, [f.name for f in dataclasses.fields(Job)]
    lines = [f"top level: unknown key {key!r}{suggest(key, known)}" for key in raw if key not in known]
    if lines:
        raise ConfigError("\n  ".join([f"{path}: {_count(lines)}", *lines]))
    raw = merge({key: value for key, value in raw.items() if key in keys}, {"data": data})
    where = "the schema from the column names" if path is None else str(path)
    folder = Path.cwd() if path is None else Path(path).parent
    return _job(raw, overrides, where, Audit, lambda audit: data_problems(audit.data)), folder


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
            override(raw, text)
        except ConfigError as error:
            lines.append(str(error))
    job, found = _validate(raw, kind, check)
    lines += [f"{key_path(key)}: {message}" for key, message in found]
    if lines or job is None:
        raise ConfigError("\n  ".join([f"{where}: {_count(lines)}", *dict.fromkeys(lines)]))
    return job


def _count(lines: Sequence[str]) -> str:
    return f"{len(lines)} problem{'s' * (len(lines) != 1)}"


def options(overrides: Sequence[str]) -> dict[str, Any]:
    """The options of a single plug-in from `key=value` texts, with the paths rule of `load`."""
    raw: dict[str, Any] = {"student": {"options": {}}}
    for text in overrides:
        override(raw, f"student.options.{text}")
    return raw["student"]["options"]


def dump(job: Job) -> str:
    """The job as YAML that `load` reads back to an equal job."""
    return yaml.dump(_plain(dataclasses.asdict(job)), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


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
            f"accumulation steps; {nearest(job.optim.batch, parts)} do"
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
        name = key_path(("engine", "deepspeed", *key))
        if key[0] not in DEEPSPEED_KEYS and difflib.get_close_matches(key[0], DEEPSPEED_KEYS, cutoff=0.85):
            raise ConfigError(f"{name}: unknown key{suggest(key[0], DEEPSPEED_KEYS)}")
        if key in owned and value != "auto" and value != owned[key][0]:
            lines.append(f"{name}: {show(value)} contradicts {show(owned[key][0])}, set by {owned[key][1]}")
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
