"""From a job to the objects of a run: manifest, plan, groups, teachers, the student and its heads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agglom import __version__, curriculum, hosting, licences, plan, plugins, targets, zeroshot
from agglom.core import groups, losses
from agglom.core.groups import GroupSpace
from agglom.core.heads import Distiller
from agglom.core.losses import Column
from agglom.core.types import Batch, Dims, Student, Teacher
from agglom.data import manifest as manifests
from agglom.data.dataset import CLEAN, ImageDataset
from agglom.data.manifest import Manifest
from agglom.data.sampler import loader
from agglom.errors import CacheError, ConfigError, DataError, Interrupted, PluginError
from agglom.job import Job, Side, Size, Views, pair, show_size
from agglom.plan import Plan
from agglom.runtime import StopRequest, World

IDENTITY = "agglom.json"


@dataclass(frozen=True)
class Run:
    """What every part of a run needs to know. Teachers are in the order of their names, so their order in the
    configuration changes nothing. `proxy`: the groups with clusters among them (`proxies`), once these are known."""

    job: Job
    base: Path
    out: Path
    world: World
    manifest: Manifest
    plan: Plan
    spaces: dict[str, GroupSpace]
    teachers: dict[str, Teacher]
    stop: StopRequest
    proxy: GroupSpace | None = None

    @property
    def balance_space(self) -> GroupSpace:
        """The groups that the balancer acts on; without any, everybody is one."""
        if self.proxy is not None:
            return self.proxy
        if self.job.balance.group:
            return self.spaces[self.job.balance.group]
        return GroupSpace("", ("all",), torch.zeros(len(self.manifest), dtype=torch.int64))

    @cached_property
    def served(self) -> dict[str, Tensor]:
        """By specialist, the manifest rows (bool) that it serves; a teacher that is not among them serves everybody."""
        serves = {name: teacher.serves for name, teacher in self.teachers.items()}
        return {
            name: torch.as_tensor(self.manifest.among(one.attribute, one.groups))
            for name, one in serves.items()
            if one is not None
        }

    @property
    def targets(self) -> dict[str, Dims]:
        """What the student predicts: the outputs of the teachers of any stage whose loss has a weight."""
        loss, wanted = self.job.loss, {name for stage in self.plan.stages for name in stage.teachers}
        return {
            name: Dims(
                teacher.dims.summary if loss.summary_weight else None,
                teacher.dims.patches if loss.patches_weight else None,
            )
            for name, teacher in self.teachers.items()
            if name in wanted
        }

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the loss table."""
        weights = {name: spec.weight for name, spec in self.job.teachers.items()}
        return losses.columns(self.targets, weights, self.job.loss.summary_weight, self.job.loss.patches_weight)

    @cached_property
    def compared_by_mfd(self) -> tuple[str, ...]:
        """The teachers whose summaries `loss.mfd` compares."""
        asked = self.job.loss.mfd
        named = {column.teacher for column in self.columns if column.kind == "summary"} if asked else set()
        return tuple(sorted(name for name in named if asked and asked.teacher in (None, name)))

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for a checkpoint or stored features to belong to this run."""
        settings = asdict(self.job)
        del settings["log"]  # what is printed changes no number
        for teacher in settings["teachers"].values():
            del teacher["placement"], teacher["micro_batch"], teacher["licence"]  # neither do these
        settings["evaluate"] = {key: settings["evaluate"][key] for key in ("size", "probe_images", "fvu_images")}
        data = settings["data"] | {"manifest": "", "root": "", "workers": 0}  # the manifest's digest speaks for them
        data |= {"labels": (), "groups": (), "min_support": 0}  # what is reported changes no weight
        parts = {part for name in _trained_groups(self.job, self.teachers) for part in name.split("*")}
        data["attributes"] = {name: spec for name, spec in data["attributes"].items() if name in parts}
        settings["data"] = data
        for spec in settings["teachers"].values():
            if curriculum.takes_stage(spec["kind"]):
                spec["options"].pop("folder", None)  # where an export lies: the teacher's fingerprint speaks for it
        return (
            dict(_leaves("config", settings))
            | {"manifest": self.manifest.digest, "agglom": __version__}
            | {f"teacher {name}": teacher.fingerprint for name, teacher in self.teachers.items()}
        )

    @property
    def trained(self) -> dict[str, str]:
        """The same for what training goes on from: where what is measured sets weights, by what it is measured."""
        if not plugins.takes(self.job.balance.kind, "balancers", "measured"):
            return self.identity
        data = self.job.data
        return self.identity | {
            "data.labels, by which teachers are measured,": json.dumps(data.labels),
            "data.min_support, by which teachers are measured,": str(data.min_support),
        }


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every setting by its key path, as text: what differs can be named with both its values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}", item)
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        for index, item in enumerate(value):
            yield from _leaves(f"{path}[{index}]", item)
    else:
        yield path, json.dumps(value)


def assemble(job: Job, base: Path, out: Path, world: World, stop: StopRequest) -> Run:
    """Read the manifest, resolve the plan, build the teachers.

    Raises:
        ConfigError, PluginError, DataError: on every rank alike.
    """
    manifest, resolved, spaces, teachers = world.attempt(lambda: _parts(job, base, world))
    run = Run(job, base, out, world, manifest, resolved, spaces, teachers, stop)
    world.attempt(lambda: _check_mfd(run))
    world.attempt(lambda: _check_proxies(run))
    world.attempt(lambda: zeroshot.check(run))
    return run


def _check_mfd(run: Run) -> None:
    if (asked := run.job.loss.mfd) and not run.compared_by_mfd:
        who = f"{asked.teacher!r} has no" if asked.teacher else "no teacher has a"
        raise ConfigError(f"loss.mfd: {who} summary whose loss has a weight; name another teacher, or set it to null")


def _check_proxies(run: Run) -> None:
    if (asked := run.job.balance.proxies) is None:
        return
    teacher, space = run.teachers[asked.teacher], run.balance_space
    if teacher.dims.summary is None:
        raise ConfigError(f"balance.proxies.teacher: {asked.teacher!r} has no summary to cluster; name another teacher")
    if teacher.serves is not None:
        raise ConfigError(
            f"balance.proxies.teacher: {asked.teacher!r} is a specialist, and clusters need a summary of everybody; "
            "name its source"
        )
    if taken := [name for name in groups.clusters(asked.clusters) if name in space.values]:
        raise ConfigError(
            f"balance.proxies: {run.job.balance.group} has a value {taken[0]!r}, which is to name a cluster; rename it "
            "in the manifest"
        )


def _parts(job: Job, base: Path, world: World) -> tuple[Manifest, Plan, dict[str, GroupSpace], dict[str, Teacher]]:
    manifest = manifests.load(job.data, base)
    resolved = plan.resolve(job, base, world.size, manifest)
    teachers = build_teachers(job, world.device)
    _try_teachers(job, teachers, world.device)
    try:
        spaces = {name: groups.encode(name, manifest.attributes) for name in _trained_groups(job, teachers)}
    except ValueError as error:
        raise ConfigError(f"data.attributes: {error}") from error
    for name, teacher in teachers.items():
        if (serves := teacher.serves) is not None:
            plan.check_groups(f"teachers.{name}.options.groups", serves.attribute, serves.groups, manifest)
    return manifest, resolved, spaces, teachers


def _trained_groups(job: Job, teachers: Mapping[str, Teacher]) -> list[str]:
    """The attributes and crossings that training depends on: the balancer's, normalisers', views' and teachers'."""
    derived = [teacher.derived for teacher in teachers.values() if teacher.derived is not None]
    served = [teacher.serves.attribute for teacher in teachers.values() if teacher.serves is not None]
    fitted = [name for one in derived for name in (*one.attributes, *one.groups)]
    viewed = [name for stage in job.stages if stage.views for name in stage.views.groups]
    names = [job.balance.group, job.loss.moments_by, *viewed, *served, *fitted]
    return [name for name in dict.fromkeys(names) if name]


def build_teachers(job: Job, device: torch.device) -> dict[str, Teacher]:
    """All teachers of a job on `device`, sources before what is derived from them, in the order of their names.

    Raises PluginError and ConfigError that name the teacher.
    """
    built: dict[str, Teacher] = {}

    def build(name: str) -> Teacher:
        if name not in built:
            spec = job.teachers[name]
            source = {} if spec.source is None else {"source": build(spec.source), "source_name": spec.source}
            try:
                teacher = plugins.build(spec.kind, "teachers", spec.options, **source)
            except PluginError as error:
                raise PluginError(f"teachers.{name}: {str(error).removeprefix(f'teachers.{spec.kind}: ')}") from error
            if not isinstance(teacher, Teacher):
                raise PluginError(f"teachers.{name}: build() returned {type(teacher).__name__}, expected a Teacher")
            teacher.module.eval().requires_grad_(False)
            licence = licences.resolve(name, teacher.licence, spec.licence)
            hosted = hosting.host(name, replace(teacher, licence=licence), spec, device)
            built[name] = _in_mosaics(job, name, hosted) if spec.mosaic else hosted
        return built[name]

    for name in sorted(job.teachers):
        build(name)
    return {name: built[name] for name in sorted(built)}


def _in_mosaics(job: Job, name: str, teacher: Teacher) -> Teacher:
    if teacher.dims.summary is not None and job.loss.summary_weight:
        raise ConfigError(
            f"teachers.{name}.mosaic: a summary of a mosaic is of no image in particular, and this teacher's is to be "
            "learnt; set loss.summary_weight to 0, or mosaic to false"
        )
    return targets.mosaicked(name, teacher)


def build_student(job: Job) -> Student:
    """The student, with the seed of the job: equal on all ranks."""
    torch.manual_seed(job.seed)
    options = dict(job.student.options)
    student = plugins.build(job.student.kind, "students", options)
    if not isinstance(student, Student):
        raise PluginError(f"student: build() returned {type(student).__name__}, expected a Student")
    _try_sizes(job, student)
    return student


def _sizes(job: Job) -> dict[str, Size]:
    """Every image size of the job by its key."""
    found: dict[str, Side] = {} if job.evaluate.size is None else {"evaluate.size": job.evaluate.size}
    found |= {f"evaluate.sizes[{index}]": size for index, size in enumerate(job.evaluate.sizes)}
    for index, stage in enumerate(job.stages):
        drawn = {f"stages[{index}].sizes[{number}]": size for number, size in enumerate(stage.sizes)}
        found |= drawn or {f"stages[{index}].size": stage.size}
    return {key: pair(size) for key, size in found.items()}


@torch.no_grad()
def _try_teachers(job: Job, teachers: Mapping[str, Teacher], device: torch.device) -> None:
    """An image of every size that some step draws, or that a sweep comes to, goes through each teacher at the start."""
    for key, size in _sizes(job).items():
        for name in (name for name, teacher in teachers.items() if "sizes" in key and teacher.derived is None):
            try:
                targets.encode(teachers, [name], torch.zeros(1, 3, *size, device=device))
            except (ValueError, RuntimeError, AssertionError) as error:
                raise ConfigError(
                    f"{key}: the teacher {name!r} takes no image of {show_size(size)} px "
                    f"({str(error).splitlines()[0]}); pin its size where its kind can, or change this one"
                ) from error


@torch.no_grad()
def _try_sizes(job: Job, student: Student) -> None:
    """An image of every size of the job goes through the student once, before any work depends on it."""
    patch, pinned = student.pixels.patch, student.pixels.size
    student.module.eval()
    for key, size in _sizes(job).items():
        try:
            student.module(torch.zeros(1, student.pixels.channels, *size))
        except (ValueError, RuntimeError, AssertionError) as error:
            below = [max(1, side // patch) * patch for side in size]
            above = [-(-side // patch) * patch for side in size]
            near = [(below[0], below[1]), (above[0], above[1])] if pinned is None else [(pinned, pinned)]
            raise ConfigError(
                f"{key}: the student takes no image of {show_size(size)} px ({str(error).splitlines()[0]}); "
                f"its patch is {patch} px, so try {' or '.join(dict.fromkeys(map(show_size, near)))}"
            ) from error
    student.module.train()


def build_distiller(run: Run, student: Student) -> Distiller:
    """The student with one head per teacher and token kind."""
    torch.manual_seed(run.job.seed + 1)
    settings = asdict(run.job.heads) | {"class_tokens": student.class_tokens, "levels": student.levels}
    try:
        return Distiller(student.module, student.dims, run.targets, **settings)
    except ValueError as error:
        raise PluginError(f"student: {error}") from error


def batches(
    run: Run, rows_N: np.ndarray, size: Size, views: Views | None = None
) -> Iterator[tuple[np.ndarray, Batch | None]]:
    """Clean views of `rows_N`, at `size`, in chunks of `evaluate.batch`, dealt out to the ranks in turn; with `views`,
    what a student would see of them, too.

    Every rank takes part in every round: where it has no chunk left it gets None. The chunks do not depend on the
    number of ranks. An image that cannot be read is an error on all of them.
    """
    data, world, step = run.job.data, run.world, run.job.evaluate.batch
    nobody_N = np.full(len(run.manifest), -1)
    dataset = ImageDataset(run.manifest, rows_N, None, nobody_N, run.job.seed, data.value_range, views)
    view = CLEAN if views is None else 0
    chunks = [rows_N[start : start + step] for start in range(0, len(rows_N), step)]
    mine = chunks[world.rank :: world.size]
    source = loader(dataset, [[(int(row), view, size) for row in chunk] for chunk in mine], data.workers)
    for turn in range(math.ceil(len(chunks) / world.size)):
        batch = world.attempt(lambda: next(source, None))
        (stopping,) = world.any(bool(run.stop))
        if stopping:
            raise Interrupted("interrupted during an evaluation: the same command goes on from the last checkpoint")
        yield (mine[turn] if turn < len(mine) else rows_N[:0]), batch


def gathered(run: Run, pieces: Iterable[Any]) -> Iterator[Any]:
    """On rank 0: the pieces of all ranks in the order of the chunks, None left out. Elsewhere: drives the rounds."""
    for piece in pieces:
        for value in run.world.gather_main(piece) or ():
            if value is not None:
                yield value


def check_identity(identity: dict[str, str], checkpoint: Path) -> None:
    """Refuse a checkpoint of another job, naming the field that differs (Rulings 19).

    Raises DataError for what is no checkpoint, CacheError for one of another job.
    """
    try:
        stored = json.loads((checkpoint / IDENTITY).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint}: not a checkpoint of agglom: {IDENTITY} cannot be read ({error})") from error
    for key in dict.fromkeys([*identity, *(key for key in stored if key.startswith("config."))]):
        then, now = stored.get(key, "absent"), identity.get(key, "absent")
        if then != now:
            raise CacheError(
                f"{checkpoint}: belongs to another job: {key} was {then} and is {now}; "
                "restore that setting, or choose another --out to start over"
            )
