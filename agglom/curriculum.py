"""A job in which students teach later students, cut into legs: one ordinary run for each student. Imports no torch.

A stage with a `student` of its own starts a new leg. A teacher with the option `stage`, of a kind that takes `folder`
besides, is the student of an earlier leg, named by that leg's last stage: its export is that folder. (EUPE's proxy
teacher: many teachers → a large student → small ones.)
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from agglom import plugins
from agglom.job import Job, TeacherSpec


@dataclass(frozen=True)
class Leg:
    """One student's run: what runs, its folder, and the configuration that is written there to run it again.

    `teaches`: another student comes after it.
    """

    job: Job
    out: Path
    written: Job
    teaches: bool


def takes_stage(kind: str) -> bool:
    """Whether a kind of teacher reads an export, and so may be an earlier student."""
    return all(plugins.takes(kind, "teachers", option) for option in ("folder", "stage"))


def stage_of(spec: TeacherSpec) -> str | None:
    """The stage whose student this teacher is; None for a teacher that is there from the start."""
    stage = spec.options.get("stage")
    return stage if isinstance(stage, str) and takes_stage(spec.kind) else None


def parts(job: Job) -> list[Job]:
    """The job of each leg, with the teachers that exist by then; their `stage` is still a name."""
    starts = [0, *(index for index, stage in enumerate(job.stages) if index and stage.student)]
    if len(starts) == 1 and not any(stage.student for stage in job.stages):
        return [job]
    found: list[Job] = []
    for start, end in pairwise([*starts, len(job.stages)]):
        stages = job.stages[start:end]
        over = [part.stages[-1].name for part in found]
        teachers = {name: spec for name, spec in job.teachers.items() if _exists(job, name, over)}
        evaluate = job.evaluate
        if evaluate.prompted_by not in teachers:
            evaluate = replace(evaluate, prompted_by=None)
        found.append(
            replace(
                job,
                student=stages[0].student or job.student,
                stages=tuple(replace(stage, student=None) for stage in stages),
                teachers=teachers,
                evaluate=evaluate,
            )
        )
    return found


def _exists(job: Job, name: str, over: Collection[str]) -> bool:
    """Whether a teacher, and what it is derived from, exists once the stages `over` are."""
    seen: set[str] = set()
    while name in job.teachers and name not in seen:
        seen.add(name)
        spec = job.teachers[name]
        if (stage := stage_of(spec)) is not None and stage not in over:
            return False
        name = spec.source or ""
    return True


def legs(job: Job, out: Path) -> list[Leg]:
    """The legs in their order: the last one runs in `out`, the others in `out/students/<their last stage>`."""
    *earlier, last = parts(job)
    folders = {part.stages[-1].name: out / "students" / part.stages[-1].name for part in earlier}
    found = [
        Leg(_resolved(part, folders, None), folder, _resolved(part, folders, folder), teaches=True)
        for part, folder in zip(earlier, folders.values(), strict=True)
    ]
    return [*found, Leg(_resolved(last, folders, None), out, job, teaches=False)]


def _resolved(job: Job, folders: dict[str, Path], start: Path | None) -> Job:
    """With the folder of an export instead of each `stage`, as seen from the folder `start`, else absolute."""

    def resolve(spec: TeacherSpec) -> TeacherSpec:
        if (stage := stage_of(spec)) is None:
            return spec
        folder = folders[stage] / "export"
        text = str(folder.absolute()) if start is None else os.path.relpath(folder, start)
        return replace(spec, options={k: v for k, v in spec.options.items() if k != "stage"} | {"folder": text})

    return replace(job, teachers={name: resolve(spec) for name, spec in job.teachers.items()})
