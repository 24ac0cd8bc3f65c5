"""A job from its first stage to its export: train, evaluate after each stage, and go on where it was interrupted."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from agglom import (
    __version__,
    checkpoints,
    config,
    curriculum,
    evaluate,
    export,
    findings,
    measure,
    plan,
    proxies,
    report,
    targets,
    train,
)
from agglom.assemble import IDENTITY, Run, assemble, build_distiller, build_student, check_identity
from agglom.core.types import Student
from agglom.curriculum import Leg
from agglom.engine import Engine, latest, launched
from agglom.errors import ConfigError
from agglom.job import Job
from agglom.journal import Journal, disk
from agglom.plan import ResolvedStage
from agglom.runtime import StopRequest, World
from agglom.survey import survey
from agglom.train import Loop


def distill(job: Job, base: Path, out: Path, *, resume: str = "auto") -> None:
    """Run a job from its first stage, or from where an interrupted one stopped, to its export.

    Where students teach later ones, one after the other: those before the last in folders of their own (`curriculum`).
    `resume` is "auto" (go on where there is a checkpoint in `out`), "never", or the path of a checkpoint.
    Raises ConfigError, PluginError, DataError, NumericsError, Interrupted: on every rank alike.
    """
    legs = curriculum.legs(job, out)
    with launched() as world, StopRequest().listening(world.has_launcher) as stop:
        if legs[0].teaches:
            world.on_main(lambda: _write_down(job, out, legs[0]))
        for leg in legs:
            _distill(leg, base, world, stop, _resume(resume, leg, legs))
            gc.collect()  # an engine holds its own memory in cycles, and the next student needs it


def _distill(leg: Leg, base: Path, world: World, stop: StopRequest, resume: str) -> None:
    """One student from its first stage to its export; nothing where it is there to teach the next one."""
    run = assemble(leg.job, base, leg.out, world, stop)
    if leg.teaches and resume == "auto" and world.broadcast(world.on_main(lambda: _is_whole(run))):
        return
    checkpoint = world.broadcast(world.on_main(lambda: _prepare(run, resume, leg)))
    student = build_student(leg.job)
    model = build_distiller(run, student)
    shifts = world.attempt(lambda: train.shifts_of(run, student))
    # ZeRO takes the model apart: a whole copy stays for evaluation and export.
    plain, plain_student = copy.deepcopy((model, student))
    engine = Engine(model, leg.job, world)
    kept = checkpoints.restore(run, engine, checkpoint) if checkpoint else None
    step = kept.step if kept else 0
    journal = world.attempt(lambda: Journal(leg.out, world.main, step))
    try:
        journal.say("\n".join([_greeting(run, step), *_resolutions(run, student)]))
        surveyed, normalisers = survey(run)
        run, surveyed = proxies.added(run, surveyed)
        if surveyed is not None and surveyed.proxies is not None:
            journal.say(findings.proxies_finding(surveyed.proxies))
        served = {name: served_N.to(world.device) for name, served_N in run.served.items()}
        if step == 0 or not _reported(run, evaluate.TEACHERS_STAGE):
            found = evaluate.evaluate(run, surveyed, normalisers, evaluate.TEACHERS_STAGE, None)
            _publish(run, found, journal, 0)
        state, last = kept, evaluate.TEACHERS_STAGE
        for stage in run.plan.stages:
            if not _finished(run, stage, state.step if state else 0):
                balancer = train.balancer(run, stage, measure.before(run, stage.name, last, normalisers, surveyed))
                loop = Loop(run, engine, run.columns, balancer, normalisers, served, shifts, journal, stop)
                state = train.train(loop, stage, state or train.initial(run, balancer))
                plain.load_state_dict(engine.weights())
                found = evaluate.evaluate(run, surveyed, normalisers, stage.name, plain)
                _publish(run, found, journal, state.step)
            last = stage.name
        plain.load_state_dict(engine.weights())
        folder = leg.out / "export"
        world.on_main(lambda: export.write(folder, run, plain_student, plain, normalisers, journal.say))
        if leg.teaches:
            world.on_main(lambda: checkpoints.identify(folder, run.identity))
        world.on_main(lambda: journal.say(_farewell(run)))
    finally:
        journal.close()


def _resume(resume: str, leg: Leg, legs: Sequence[Leg]) -> str:
    """A checkpoint is for the leg in whose folder it lies, else for the last; the others go on by themselves."""
    if resume in ("auto", "never"):
        return resume
    inside = [one for one in legs[:-1] if Path(resume).resolve().is_relative_to(one.out.resolve())]
    return resume if leg is (inside or legs)[-1] else "auto"


def _write_down(job: Job, out: Path, first: Leg) -> None:
    """The whole job before its first student, so that the same `--out` goes on from there, too."""
    if latest(out / "checkpoints") and not first.out.is_dir():
        raise ConfigError(f"{out} holds a run of one student, and this job has several; choose another --out")
    with disk(out / "config.yaml"):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "config.yaml").is_file():
            (out / "config.yaml").write_text(config.dump(job))


def _prepare(run: Run, resume: str, leg: Leg) -> Path | None:
    """Write down what will run, and find the checkpoint to go on from."""
    folder = run.out / "checkpoints"
    tag = latest(folder)
    if resume == "never" and tag is not None:
        raise ConfigError(
            f"--resume never: {run.out} already holds a run ({folder / tag}), which would be overwritten; "
            "choose another --out, delete that folder, or go on with --resume auto"
        )
    checkpoint = Path(resume) if resume not in ("auto", "never") else folder / tag if tag else None
    if checkpoint is not None:
        check_identity(checkpoints.identity(run), checkpoint)
    with disk(run.out / "config.yaml"):
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "config.yaml").write_text(config.dump(leg.written))
        (run.out / "plan.md").write_text(plan.document(leg.written, run.base, run.world.size, run.manifest))
        (run.out / "export" / IDENTITY).unlink(missing_ok=True)
    return checkpoint


def _is_whole(run: Run) -> bool:
    """Whether the student of an earlier leg is exported. Raises CacheError where it belongs to another job."""
    folder = run.out / "export"
    if not (folder / IDENTITY).is_file():
        return False
    check_identity(run.identity, folder)
    print(f"{run.out.name}: the student is there, in {folder}", flush=True)
    return True


def _finished(run: Run, stage: ResolvedStage, step: int) -> bool:
    """Whether a stage is trained and evaluated. A run that stopped in between is evaluated first."""
    end = stage.first_step + stage.steps
    return step > end or (step == end and _reported(run, stage.name))


def _reported(run: Run, stage: str) -> bool:
    return run.world.broadcast((run.out / "reports" / f"{stage}.json").is_file())


def _publish(run: Run, found: evaluate.Evaluation | None, journal: Journal, step: int) -> None:
    def publish() -> None:
        if found is not None:
            evaluate.publish(run, found)
            journal.report(step, found.report.stage, found.report.rows, found.report.context["split"])

    run.world.attempt(publish)


# ── What is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _greeting(run: Run, step: int) -> str:
    where = f"goes on after step {step}" if step else "starts"
    sizes = (len(run.plan.stages), "stage"), (run.plan.total_steps, "step"), (run.world.size, "rank")
    stages, steps, ranks = (plan.count(n, noun) for n, noun in sizes)
    return (
        f"agglom {__version__} {where}: {stages}, {steps} of {run.plan.global_batch} images "
        f"on {ranks} ({run.world.device.type})"
    )


def _resolutions(run: Run, student: Student) -> Iterator[str]:
    """How each teacher sees the images of each stage, and on which grid it is compared with the student."""
    patch = student.pixels.patch
    for stage in run.plan.stages:
        for name in stage.teachers:
            learns = name in run.targets and run.targets[name].patches is not None
            grids = [(math.ceil(height / patch), math.ceil(width / patch)) for height, width in stage.sizes]
            seen = [
                targets.told(run.teachers[name].pixels, size, grid if learns else None)
                for size, grid in zip(stage.sizes, grids, strict=True)
            ]
            yield f"{stage.name}  {name}: {' | '.join(seen)}"


def _farewell(run: Run) -> str:
    last = run.out / "reports" / run.plan.stages[-1].name
    return "\n".join(
        [
            "",
            report.headline(report.load(last.with_suffix(".json"))),
            "",
            f"report  {last}.html",
            f"export  {run.out / 'export'}",
        ]
    )
