"""The training loop, and the parts of its step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from agglom import checkpoints, plugins, progress, targets
from agglom.assemble import Run
from agglom.checkpoints import State
from agglom.core import groups, losses, schedule
from agglom.core.cells import Measured
from agglom.core.losses import Column
from agglom.core.types import Balancer, Batch, CellStats, Features, LossTable, Student
from agglom.core.weights import Cells
from agglom.data.dataset import ImageDataset
from agglom.data.sampler import drawn, loader, stream, tempered
from agglom.engine import Engine, latest
from agglom.errors import AgglomError, Interrupted, NumericsError
from agglom.job import Size
from agglom.journal import Journal
from agglom.plan import ResolvedStage
from agglom.runtime import StopRequest, Stopwatch
from agglom.survey import refitted
from agglom.targets import Normaliser, Shift


class Witness(NamedTuple):
    """The first step of a log interval whose loss is not finite, else the last step: its rows and their bad cells;
    `sick_BT` are those whose target was not finite, so that the teacher is to blame."""

    step: Tensor
    row_B: Tensor
    bad_BT: Tensor
    sick_BT: Tensor


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
        cells, mfd = _no_cells(run), torch.zeros((), device=world.device)
        seen: list[tuple[Batch, LossTable, Tensor]] = []
        for batch in batches:
            trunk, predicted, wanted = _compared(loop, stage, aim, shift, places, batch)
            present = _present(loop, wanted, batch)
            table = losses.table(
                loop.columns,
                predicted,
                wanted,
                present,
                summary=run.job.loss.summary,
                patches=run.job.loss.patches,
                dispersion=dispersion,
            )._replace(trunk_BD=trunk.summary_BD, row_B=batch.row_B)
            weight_BT = loop.balancer.weigh(state.balance, table, batch.group_B, generator)
            term = _mfd(loop, predicted, wanted, present, batch)
            mfd = mfd + term.detach()
            engine.backward(losses.objective(table, weight_BT) + term)
            engine.step(lr, stage.trunk_lr_scale)
            cells = _add(cells, groups.tally(batch.group_B, table.loss_BT, table.valid_BT, len(loop.values)))
            seen.append((batch, table, _sick(loop.columns, wanted, table)))
        witness = _witness(state, seen, witness)
        cells = CellStats(*(world.sum(tensor) for tensor in cells))
        state = State(state.step + 1, loop.balancer.update(state.balance, cells), _add(state.window, cells))
        if state.step % run.plan.log_every == 0 or state.step == end:
            _assert_finite(loop, stage, state, witness)
            rate = (state.step - logged) * run.plan.global_batch / watch()
            progress.log(loop, stage, state, lr, rate, world.sum(mfd))
            state, watch, logged = State(state.step, state.balance, _no_cells(run)), Stopwatch(), state.step
        if state.step % run.plan.checkpoint_every == 0 or state.step == end:
            _assert_finite(loop, stage, state, witness)
            checkpoints.save(run, engine, state)
    return state


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
        stage.views,
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
        weights=_drawn_by(run),
    )
    return loader(dataset, samples, job.data.workers)


def _drawn_by(run: Run) -> np.ndarray | None:
    """The probability of each train row under the sampler; None where each comes once an epoch."""
    group_N = run.balance_space.index_N[torch.as_tensor(run.manifest.rows("train"))].numpy()
    return tempered(group_N, run.job.balance.resample) if run.job.balance.resample else None


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
        path = checkpoints.save(loop.run, loop.engine, state)
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
) -> tuple[Features, dict[str, Features], dict[str, Features]]:
    """The student's features of a micro-batch, what it predicts and what it is asked for, on the patches that both
    sides see."""
    teachers, here = loop.run.teachers, shift.draw(places)
    root = {name: targets.root(teachers, name) for name in stage.teachers}
    there = {name: shift.draw(places) for name in sorted(set(root.values()))}
    features = targets.encode(
        teachers, stage.teachers, batch.pixels_BCHW, lambda name, pixels_BCHW: shift.window(pixels_BCHW, there[name])
    )
    if loop.balancer.lend is not None:
        features = targets.lent(features, loop.balancer.lend, batch.row_B)
    student_BCHW = batch.pixels_BCHW if batch.student_BCHW is None else batch.student_BCHW
    trunk, predicted = loop.engine(shift.window(student_BCHW, here))
    wanted = {
        name: shift.overlap(aim.normalisers[name](raw), there[root[name]], here) for name, raw in features.items()
    }
    predicted = {name: aim.since[name](one) if name in aim.since else one for name, one in predicted.items()}
    seen = {name: shift.overlap(predicted[name], here, there[root[name]]) for name in wanted}
    return trunk, predicted | seen, wanted


def shifts_of(run: Run, student: Student) -> dict[str, dict[Size, Shift]]:
    """By stage and size of its images, how they are shifted. Raises ConfigError where they cannot be."""
    found: dict[str, dict[Size, Shift]] = {}
    for stage in run.plan.stages:
        learnt = [name for name in stage.teachers if name in run.targets and run.targets[name].patches is not None]
        specs = {name: run.teachers[targets.root(run.teachers, name)].pixels for name in learnt}
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


def _mfd(
    loop: Loop,
    predicted: Mapping[str, Features],
    wanted: Mapping[str, Features],
    present: Mapping[str, Tensor] | Set[str],
    batch: Batch,
) -> Tensor:
    """The share of a micro-batch in the mean of `loss.mfd`, times its weight, over the micro-batches of all ranks, each
    of which has a statistic of its own; 0 without. Under a loss of directions alone, directions are compared."""
    run, asked = loop.run, loop.run.job.loss.mfd
    term = torch.zeros((), device=run.world.device)
    if asked is None or batch.label_BL is None:
        return term
    label_B = batch.label_BL[:, run.manifest.labels.index(asked.label)]
    for teacher in run.compared_by_mfd:
        if teacher not in wanted:
            continue
        known_B = label_B.where(present[teacher], torch.nan) if isinstance(present, Mapping) else label_B
        pair = [losses.tokens(features[teacher], "summary") for features in (predicted, wanted)]
        x_BD, y_BD = pair if run.job.loss.normalises_summary else (F.normalize(z_BD, dim=-1) for z_BD in pair)
        term = term + losses.mfd(x_BD, y_BD, known_B, batch.group_B, len(loop.values))
    return term * asked.weight * run.plan.micro / run.plan.global_batch


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


def balancer(run: Run, stage: ResolvedStage, measured: Measured | None) -> Balancer:
    """The balancer of a stage, told the shares of the groups under the sampler, and what is measured before it."""
    train_N, weight_N = run.balance_space.index_N[torch.as_tensor(run.manifest.rows("train"))], _drawn_by(run)
    known_N, groups = train_N >= 0, len(run.balance_space.values)
    count_G = torch.bincount(train_N[known_N], minlength=groups)
    share_G = count_G.double() / len(train_N)
    if weight_N is not None:
        share_G = torch.bincount(train_N[known_N], torch.from_numpy(weight_N)[known_N], minlength=groups)
    cells = Cells(
        share_G.to(run.world.device),
        losses.teacher_index(run.columns).to(run.world.device),
        run.plan.global_batch,
        len(train_N),
        _served_cells(run, stage).to(run.world.device),
        torch.tensor([column.weight for column in run.columns], dtype=torch.float64, device=run.world.device),
        run.balance_space.values,
        tuple(dict.fromkeys(column.teacher for column in run.columns)),
        count_G.to(run.world.device),
        run.balance_space.index_N.to(run.world.device),
        torch.tensor([column.kind == "summary" for column in run.columns], device=run.world.device),
    )
    options = run.job.balance.options
    return plugins.build(run.job.balance.kind, "balancers", options, cells=cells, measured=measured)


def _served_cells(run: Run, stage: ResolvedStage) -> Tensor:
    """Groups × columns (bool): whether the column's teacher is of the stage and serves any train image of the group."""
    space, train_N = run.balance_space, torch.as_tensor(run.manifest.rows("train"))
    served_GT = torch.ones(len(space.values), len(run.columns), dtype=torch.bool)
    for index, column in enumerate(run.columns):
        if column.teacher not in stage.teachers:
            served_GT[:, index] = False
        elif column.teacher in run.served:
            group_N = space.index_N[train_N][run.served[column.teacher][train_N]]
            served_GT[:, index] = torch.bincount(group_N[group_N >= 0], minlength=len(space.values)) > 0
    return served_GT


def initial(run: Run, balancer: Balancer) -> State:
    """Before the first step."""
    weights = {key: value.to(run.world.device) for key, value in balancer.init().items()}
    return State(0, weights, _no_cells(run))


def _sick(columns: Sequence[Column], wanted: Mapping[str, Features], table: LossTable) -> Tensor:
    """The valid cells whose target is not finite."""
    sick_TB = [torch.zeros_like(valid_B) for valid_B in table.valid_BT.T]
    for index, column in enumerate(columns):
        if column.teacher in wanted:
            tokens = losses.tokens(wanted[column.teacher], column.kind)
            sick_TB[index] = ~torch.isfinite(tokens.flatten(1)).all(1)
    return torch.stack(sick_TB, 1) & table.valid_BT


def _witness(state: State, seen: Sequence[tuple[Batch, LossTable, Tensor]], before: Witness | None) -> Witness:
    """This step, unless the interval already holds a step that was not finite: decided on the device, nobody waits."""
    row_B = torch.cat([batch.row_B for batch, *_ in seen])
    bad_BT = torch.cat([table.valid_BT & ~torch.isfinite(table.loss_BT) for _, table, _ in seen])
    sick_BT = torch.cat([sick_BT for *_, sick_BT in seen])
    # `full` writes the number on the device; `tensor` would copy it there, and wait.
    step = torch.full((), state.step + 1, dtype=torch.int64, device=row_B.device)
    now = Witness(step, row_B, bad_BT, sick_BT)
    sound = torch.isfinite(state.window.sum_GT).all()
    return now if before is None else Witness(*(torch.where(sound, n, b) for n, b in zip(now, before, strict=True)))


def _assert_finite(loop: Loop, stage: ResolvedStage, state: State, witness: Witness | None) -> None:
    """Read at log points and before a checkpoint, so what is not finite never reaches one.

    Raises NumericsError that names the first such step, its teachers and its rows.
    """
    if witness is None or (bool(torch.isfinite(state.window.sum_GT).all()) and loop.engine.sound()):
        return
    sick, bad = (_cells_of(loop, witness, cells_BT) for cells_BT in (witness.sick_BT, witness.bad_BT))
    folder = loop.run.out / "checkpoints"
    sound = f"the last sound checkpoint is {latest(folder) or 'none'} in {folder}"
    at = f"stage {stage.name!r} step {int(witness.step)}"
    if sick:
        raise NumericsError(
            f"{at}: target not finite for {sick}; check the weights, dtype and pixels of that teacher; {sound}"
        )
    what = f"loss not finite for {bad}" if bad else "gradient not finite"
    raise NumericsError(f"{at}: {what}; lower stages[{stage.index}].lr or optim.clip; {sound}")


def _cells_of(loop: Loop, witness: Witness, cells_BT: Tensor) -> str:
    """The columns and the data rows of some cells, of all ranks; "" where there are none."""
    names = [f"{column.teacher}/{column.kind}" for column in loop.columns]
    mine = [(names[column], int(witness.row_B[row]) + 1) for row, column in torch.nonzero(cells_BT).tolist()]
    found = [pair for pairs in loop.run.world.gather(mine) for pair in pairs]
    teachers, rows = sorted({name for name, _ in found}), sorted({row for _, row in found})
    shown = ", ".join(map(str, rows[:8])) + (", …" if rows[8:] else "")
    return f"{', '.join(teachers)}, {len(rows)} samples: data rows {shown}" if found else ""
