"""The training loop: stages of agglomeration, an evaluation after each, an export at the end."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from agglom import __version__, config, curriculum, evaluate, export, plan, plugins, report, targets
from agglom.assemble import IDENTITY, Run, assemble, build_distiller, build_student, check_identity
from agglom.core import groups, losses, schedule
from agglom.core.balance import Cells
from agglom.core.losses import Column
from agglom.core.types import Balancer, Batch, CellStats, Features, LossTable, Student, Teacher
from agglom.curriculum import Leg
from agglom.data.dataset import ImageDataset
from agglom.data.sampler import drawn, loader, stream
from agglom.engine import Engine, latest, launched
from agglom.errors import AgglomError, ConfigError, Interrupted, NumericsError
from agglom.job import Job, Size
from agglom.journal import Journal, disk, duration
from agglom.plan import ResolvedStage
from agglom.runtime import StopRequest, Stopwatch, World, peak_memory_mib
from agglom.survey import refitted, survey
from agglom.targets import Normaliser, Shift


@dataclass(frozen=True)
class State:
    """Where a run stands, besides its weights: `step` optimizer steps are done, `window` is not logged yet."""

    step: int
    balance: dict[str, Tensor]
    window: CellStats


class Witness(NamedTuple):
    """The first step of a log interval whose loss is not finite, else the last step: its rows and their bad cells."""

    step: Tensor
    row_B: Tensor
    bad_BT: Tensor


@dataclass(frozen=True)
class Loop:
    """What the loop works with from the first step to the last; `served` is that of the run, on its device.

    The heads predict targets of `normalisers`, whichever a stage learns; `shifts` by stage and size of its images.
    """

    run: Run
    engine: Engine
    columns: tuple[Column, ...]
    balancer: Balancer
    normalisers: dict[str, Normaliser]
    served: dict[str, Tensor]
    shifts: dict[str, dict[Size, Shift]]
    journal: Journal
    stop: StopRequest

    @property
    def values(self) -> tuple[str, ...]:
        return self.run.balance_space.values


@dataclass(frozen=True)
class Aim:
    """What a stage learns: the targets of its own `normalisers`; `since` turns what the heads predict into these."""

    normalisers: dict[str, Normaliser]
    since: dict[str, Normaliser]

    @staticmethod
    def of(loop: Loop, stage: ResolvedStage) -> Aim:
        fitted = refitted(loop.run, stage, loop.normalisers)
        changed = {name: one for name, one in fitted.items() if one is not loop.normalisers[name]}
        return Aim(fitted, {name: one.since(loop.normalisers[name]) for name, one in changed.items()})


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
    shifts = world.attempt(lambda: _shifts(run, student))
    # ZeRO takes the model apart: a whole copy stays for evaluation and export.
    plain, plain_student = copy.deepcopy((model, student))
    engine = Engine(model, leg.job, world)
    balancer = _balancer(run)
    state = _restore(run, engine, checkpoint) if checkpoint else State(0, _state(run, balancer), _no_cells(run))
    journal = world.attempt(lambda: Journal(leg.out, world.main, state.step))
    try:
        journal.say("\n".join([_greeting(run, state), *_resolutions(run, student)]))
        surveyed, normalisers = survey(run)
        served = {name: served_N.to(world.device) for name, served_N in run.served.items()}
        loop = Loop(run, engine, run.columns, balancer, normalisers, served, shifts, journal, stop)
        if state.step == 0 or not _reported(run, evaluate.TEACHERS_STAGE):
            found = evaluate.evaluate(run, surveyed, normalisers, evaluate.TEACHERS_STAGE, None)
            _publish(run, found, journal, 0)
        for stage in run.plan.stages:
            if _finished(run, stage, state):
                continue
            state = train(loop, stage, state)
            plain.load_state_dict(engine.weights())
            found = evaluate.evaluate(run, surveyed, normalisers, stage.name, plain)
            _publish(run, found, journal, state.step)
        plain.load_state_dict(engine.weights())
        folder = leg.out / "export"
        world.on_main(lambda: export.write(folder, run, plain_student, plain, normalisers, journal.say))
        if leg.teaches:
            world.on_main(lambda: _identify(folder, run.identity))
        world.on_main(lambda: journal.say(_farewell(run)))
    finally:
        journal.close()


def _resume(resume: str, leg: Leg, legs: Sequence[Leg]) -> str:
    """A checkpoint is for the leg in whose folder it lies, else for the last; the others go on by themselves."""
    if resume in ("auto", "never"):
        return resume
    inside = [one for one in legs[:-1] if Path(resume).resolve().is_relative_to(one.out.resolve())]
    return resume if leg is (inside or legs)[-1] else "auto"


def train(loop: Loop, stage: ResolvedStage, state: State) -> State:
    """One stage, from `state` to its end; a checkpoint lies there whenever this returns, or is interrupted."""
    run, engine, world = loop.run, loop.engine, loop.run.world
    aim, shifts = Aim.of(loop, stage), loop.shifts[stage.name]
    feed = _feed(run, stage, [shifts[size].view for size in stage.sizes], state.step)
    accumulate = run.job.optim.accumulate
    end, watch, logged = stage.first_step + stage.steps, Stopwatch(), state.step
    witness: Witness | None = None
    dispersion = {name: n.dispersion for name, n in aim.normalisers.items() if n.dispersion is not None}
    engine.train()
    while state.step < end:
        batches = _read(loop, stage, state, witness, feed, accumulate)
        lr = schedule.lr(
            state.step - stage.first_step, steps=stage.steps, warmup=stage.warmup_steps, peak=stage.lr, end=stage.lr_end
        )
        generator, places = _seeded(run, state.step), _places(run, state.step)
        shift = shifts[drawn(stage.sizes, run.job.seed, state.step)]
        cells = _no_cells(run)
        seen: list[tuple[Batch, LossTable]] = []
        for batch in batches:
            predicted, wanted = _compared(loop, stage, aim, shift, places, batch)
            table = losses.table(
                loop.columns,
                predicted,
                wanted,
                _present(loop, wanted, batch),
                summary=run.job.loss.summary,
                patches=run.job.loss.patches,
                dispersion=dispersion,
            )
            weight_BT = loop.balancer.weigh(state.balance, table, batch.group_B, generator)
            engine.backward(losses.objective(table, weight_BT))
            engine.step(lr, stage.trunk_lr_scale)
            cells = _add(cells, groups.tally(batch.group_B, table.loss_BT, table.valid_BT, len(loop.values)))
            seen.append((batch, table))
        witness = _witness(state, seen, witness)
        cells = CellStats(*(world.sum(tensor) for tensor in cells))
        state = State(state.step + 1, loop.balancer.update(state.balance, cells), _add(state.window, cells))
        if state.step % run.plan.log_every == 0 or state.step == end:
            _assert_finite(loop, stage, state, witness)
            _log(loop, stage, state, lr, (state.step - logged) * run.plan.global_batch / watch())
            state, watch, logged = State(state.step, state.balance, _no_cells(run)), Stopwatch(), state.step
        if state.step % run.plan.checkpoint_every == 0 or state.step == end:
            _assert_finite(loop, stage, state, witness)
            _save(run, engine, state)
    return state


# ── One step's parts ─────────────────────────────────────────────────────────────────────────────────────────────────


def _feed(run: Run, stage: ResolvedStage, sizes: Sequence[Size], start_step: int) -> Iterator[Batch]:
    job = run.job
    rows_N = run.manifest.rows("train")
    dataset = ImageDataset(
        run.manifest,
        rows_N,
        job.augment,
        run.balance_space.index_N,
        job.seed,
        job.data.value_range,
    )
    samples = stream(
        rows_N,
        sizes,
        seed=job.seed,
        batch=run.plan.global_batch,
        micro=run.plan.micro,
        rank=run.world.rank,
        world=run.world.size,
        accumulate=job.optim.accumulate,
        start_step=start_step,
    )
    return loader(dataset, samples, job.data.workers)


def _read(
    loop: Loop, stage: ResolvedStage, state: State, witness: Witness | None, feed: Iterator[Batch], accumulate: int
) -> list[Batch]:
    """This step's micro-batches; a signal or an unreadable image on any rank ends the run on all of them."""
    device = loop.run.world.device
    error: Exception | None = None
    batches: list[Batch] = []
    try:
        batches = [_moved(batch, device) for batch in itertools.islice(feed, accumulate)]
    except AgglomError as found:
        error = found
    failed, stopping = loop.run.world.any(error is not None, bool(loop.stop))
    if failed or stopping:
        _assert_finite(loop, stage, state, witness)
        path = _save(loop.run, loop.engine, state)
        loop.run.world.agree(error)
        raise Interrupted(
            f"interrupted in stage {stage.name!r} after step {state.step} of {loop.run.plan.total_steps}; "
            f"checkpoint {path}: the same command goes on from it"
        )
    return batches


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in batch))  # type: ignore[arg-type]


def _compared(
    loop: Loop, stage: ResolvedStage, aim: Aim, shift: Shift, places: random.Random, batch: Batch
) -> tuple[dict[str, Features], dict[str, Features]]:
    """What the student predicts of a micro-batch and what it is asked for, on the patches that both sides see."""
    teachers, here = loop.run.teachers, shift.draw(places)
    root = {name: _root(teachers, name) for name in stage.teachers}
    there = {name: shift.draw(places) for name in sorted(set(root.values()))}
    features = targets.encode(
        teachers, stage.teachers, batch.pixels_BCHW, lambda name, pixels_BCHW: shift.window(pixels_BCHW, there[name])
    )
    _, predicted = loop.engine(shift.window(batch.pixels_BCHW, here))
    wanted = {
        name: shift.overlap(aim.normalisers[name](raw), there[root[name]], here) for name, raw in features.items()
    }
    predicted = {name: aim.since[name](one) if name in aim.since else one for name, one in predicted.items()}
    return predicted | {name: shift.overlap(predicted[name], here, there[root[name]]) for name in wanted}, wanted


def _root(teachers: Mapping[str, Teacher], name: str) -> str:
    """The teacher that sees the pixels: a derived one sees what its source does."""
    derived = teachers[name].derived
    return name if derived is None else _root(teachers, derived.source)


def _shifts(run: Run, student: Student) -> dict[str, dict[Size, Shift]]:
    """By stage and size of its images, how they are shifted. Raises ConfigError where they cannot be."""
    found: dict[str, dict[Size, Shift]] = {}
    for stage in run.plan.stages:
        learnt = [name for name in stage.teachers if name in run.targets and run.targets[name].patches is not None]
        specs = {name: run.teachers[_root(run.teachers, name)].pixels for name in learnt}
        found[stage.name] = {
            size: targets.shift(specs, student.pixels, size, run.job.loss.shift) for size in stage.sizes
        }
    return found


def _present(loop: Loop, wanted: Collection[str], batch: Batch) -> Mapping[str, Tensor] | Set[str]:
    """The teachers of a step, with whom of the batch each of them serves where there is a specialist among them."""
    specialists = {name: served_N[batch.row_B] for name, served_N in loop.served.items() if name in wanted}
    if not specialists:
        return set(wanted)
    everybody_B = torch.ones_like(batch.row_B, dtype=torch.bool)
    return {name: specialists.get(name, everybody_B) for name in wanted}


def _seeded(run: Run, step: int) -> torch.Generator:
    """All randomness of a step is a function of (seed, step, rank): a resumed run draws what it would have drawn."""
    seed = (run.job.seed * 1_000_003 + step) * 65_537 + run.world.rank
    torch.manual_seed(seed)
    return torch.Generator(run.world.device).manual_seed(seed)


def _places(run: Run, step: int) -> random.Random:
    """Where the windows of a step lie, by numbers on the CPU: nobody waits for the accelerator to say."""
    return random.Random(f"{run.job.seed}/shift/{step}/{run.world.rank}")


def _no_cells(run: Run) -> CellStats:
    shape = (len(run.balance_space.values) + 1, len(run.columns))
    zeros = [torch.zeros(shape, dtype=torch.float64, device=run.world.device) for _ in range(2)]
    return CellStats(*zeros)


def _add(a: CellStats, b: CellStats) -> CellStats:
    return CellStats(a.sum_GT + b.sum_GT, a.count_GT + b.count_GT)


def _balancer(run: Run) -> Balancer:
    """The balancer of the job, told the shares of the groups under the sampler."""
    train_N = run.balance_space.index_N[torch.as_tensor(run.manifest.rows("train"))]
    count_G = torch.bincount(train_N[train_N >= 0], minlength=len(run.balance_space.values))
    cells = Cells(
        (count_G.double() / len(train_N)).to(run.world.device),
        losses.teacher_index(run.columns).to(run.world.device),
        run.plan.global_batch,
        len(train_N),
        _served_cells(run).to(run.world.device),
    )
    return plugins.build(run.job.balance.kind, "balancers", run.job.balance.options, cells=cells)


def _served_cells(run: Run) -> Tensor:
    """Groups × columns (bool): whether the column's teacher serves any train image of the group."""
    space, train_N = run.balance_space, torch.as_tensor(run.manifest.rows("train"))
    served_GT = torch.ones(len(space.values), len(run.columns), dtype=torch.bool)
    for index, column in enumerate(run.columns):
        if column.teacher in run.served:
            group_N = space.index_N[train_N][run.served[column.teacher][train_N]]
            served_GT[:, index] = torch.bincount(group_N[group_N >= 0], minlength=len(space.values)) > 0
    return served_GT


def _state(run: Run, balancer: Balancer) -> dict[str, Tensor]:
    return {key: value.to(run.world.device) for key, value in balancer.init().items()}


def _witness(state: State, seen: Sequence[tuple[Batch, LossTable]], before: Witness | None) -> Witness:
    """This step, unless the interval already holds a step that was not finite: decided on the device, nobody waits."""
    row_B = torch.cat([batch.row_B for batch, _ in seen])
    bad_BT = torch.cat([table.valid_BT & ~torch.isfinite(table.loss_BT) for _, table in seen])
    # `full` writes the number on the device; `tensor` would copy it there, and wait.
    step = torch.full((), state.step + 1, dtype=torch.int64, device=row_B.device)
    now = Witness(step, row_B, bad_BT)
    sound = torch.isfinite(state.window.sum_GT).all()
    return now if before is None else Witness(*(torch.where(sound, n, b) for n, b in zip(now, before, strict=True)))


def _assert_finite(loop: Loop, stage: ResolvedStage, state: State, witness: Witness | None) -> None:
    """Read at log points and before a checkpoint, so what is not finite never reaches one.

    Raises NumericsError that names the first such step, its teachers and its rows.
    """
    if witness is None or (bool(torch.isfinite(state.window.sum_GT).all()) and loop.engine.sound()):
        return
    names = [f"{column.teacher}/{column.kind}" for column in loop.columns]
    mine = [(names[column], int(witness.row_B[row]) + 1) for row, column in torch.nonzero(witness.bad_BT).tolist()]
    found = [pair for pairs in loop.run.world.gather(mine) for pair in pairs]
    teachers, rows = sorted({name for name, _ in found}), sorted({row for _, row in found})
    shown = ", ".join(map(str, rows[:8])) + (", …" if rows[8:] else "")
    bad = f"loss not finite for {', '.join(teachers)}, {len(rows)} samples: data rows {shown}"
    folder = loop.run.out / "checkpoints"
    raise NumericsError(
        f"stage {stage.name!r} step {int(witness.step)}: {bad if found else 'gradient not finite'}; lower "
        f"stages[{stage.index}].lr or optim.clip; the last sound checkpoint is {latest(folder) or 'none'} in {folder}"
    )


# ── What is said of a step ───────────────────────────────────────────────────────────────────────────────────────────


def _log(loop: Loop, stage: ResolvedStage, state: State, lr: float, rate: float) -> None:
    run = loop.run
    measured = {"images_per_s": rate, "memory_mib": max(run.world.gather(peak_memory_mib(run.world.device)))}
    grad_norm = loop.engine.grad_norm()
    if grad_norm is not None:
        measured["grad_norm"] = grad_norm
    run.world.on_main(lambda: _record(loop, stage, state, lr, measured))


def _record(loop: Loop, stage: ResolvedStage, state: State, lr: float, measured: dict[str, float]) -> None:
    columns = loop.columns
    weight_T = torch.tensor([column.weight for column in columns], dtype=torch.float64)
    sum_GT, count_GT = (tensor.cpu() for tensor in state.window)
    sum_GT = sum_GT / weight_T
    active = [index for index, column in enumerate(columns) if column.teacher in stage.teachers]
    mean_T = sum_GT.sum(0) / count_GT.sum(0)
    # A specialist whom none of these images concerned has no loss.
    known = [index for index in active if count_GT[:, index].any()]
    values: dict[str, float] = {"loss": float((mean_T * weight_T)[known].sum()) if known else math.nan, "lr": lr}
    for index in active:
        values[f"loss/{columns[index].teacher}/{columns[index].kind}"] = float(mean_T[index])
    teachers = {name: [i for i in active if columns[i].teacher == name] for name in stage.teachers}
    mean_GT = sum_GT / count_GT
    if len(loop.values) > 1:
        weight_GT = _relative_weights(loop, state)
        for group, value in enumerate(loop.values):
            for index in active:
                name = f"{columns[index].teacher}/{columns[index].kind}"
                values[f"loss_group/{name}/{value}"] = float(mean_GT[group, index])
            for name, indices in teachers.items():
                values[f"weight/{name}/{value}"] = float(weight_GT[group, indices[0]]) if indices else 1.0
    values |= measured
    loop.journal.record(state.step, stage.name, values)
    loop.journal.say(_line(loop, stage, state, values, teachers, mean_T, mean_GT))


def _relative_weights(loop: Loop, state: State) -> Tensor:
    """What a sample of each group weighs under each column, 1 = neutral: the balancer asked with one sample a group,
    whose losses are the means of the window."""
    sum_GT, count_GT = (tensor[: len(loop.values)] for tensor in state.window)
    table = LossTable((sum_GT / count_GT.clamp(min=1)).float(), count_GT > 0)
    group_G = torch.arange(len(loop.values), device=sum_GT.device)
    return (loop.balancer.weigh(state.balance, table, group_G) * loop.run.plan.global_batch).cpu()


def _line(
    loop: Loop,
    stage: ResolvedStage,
    state: State,
    values: dict[str, float],
    teachers: dict[str, list[int]],
    mean_T: Tensor,
    mean_GT: Tensor,
) -> str:
    total = loop.run.plan.total_steps
    parts = [f"{stage.name} {state.step}/{total}", f"{100 * state.step / total:.1f}%", f"loss {values['loss']:.3f}"]
    parts += [f"{name} {float(mean_T[indices].mean()):.3f}" for name, indices in teachers.items() if indices]
    if len(loop.values) > 1:
        active = [index for indices in teachers.values() for index in indices]
        loss_G = mean_GT[:-1][:, active].nanmean(1).nan_to_num(-torch.inf)
        worst = int(loss_G.argmax())
        parts.append(f"worst {loop.values[worst]} {float(loss_G[worst]):.3f}")
    rate = values["images_per_s"]
    left = (total - state.step) * loop.run.plan.global_batch / rate
    return "  ".join([*parts, f"{rate:.0f} img/s", f"eta {duration(left)}"])


def _greeting(run: Run, state: State) -> str:
    where = f"goes on after step {state.step}" if state.step else "starts"
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


def _publish(run: Run, found: evaluate.Evaluation | None, journal: Journal, step: int) -> None:
    def publish() -> None:
        if found is not None:
            evaluate.publish(run, found)
            journal.report(step, found.report.stage, found.report.rows, found.report.context["split"])

    run.world.attempt(publish)


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
        check_identity(_identity(run), checkpoint)
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


def _identity(run: Run) -> dict[str, str]:
    return run.identity | {"ranks": str(run.world.size)}


def _save(run: Run, engine: Engine, state: State) -> Path:
    folder, tag = run.out / "checkpoints", f"step-{state.step:08d}"
    if latest(folder) == tag:
        return folder / tag

    run.world.on_main(lambda: _identify(folder / tag, _identity(run)))
    kept = {
        "step": state.step,
        "balance": {key: value.cpu() for key, value in state.balance.items()},
        "window": tuple(tensor.cpu() for tensor in state.window),
    }
    engine.save(folder, tag, kept, run.job.log.keep)
    return folder / tag


def _identify(folder: Path, identity: Mapping[str, str]) -> None:
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / IDENTITY).write_text(json.dumps(identity, indent=1))


def _restore(run: Run, engine: Engine, checkpoint: Path) -> State:
    kept = engine.load(checkpoint.parent, checkpoint.name)
    device = run.world.device
    return State(
        kept["step"],
        {key: value.to(device) for key, value in kept["balance"].items()},
        CellStats(*(tensor.to(device) for tensor in kept["window"])),
    )


def _finished(run: Run, stage: ResolvedStage, state: State) -> bool:
    """Whether a stage is trained and evaluated. A run that stopped in between is evaluated first."""
    end = stage.first_step + stage.steps
    return state.step > end or (state.step == end and _reported(run, stage.name))


def _reported(run: Run, stage: str) -> bool:
    return run.world.broadcast((run.out / "reports" / f"{stage}.json").is_file())
