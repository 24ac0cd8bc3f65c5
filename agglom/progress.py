"""What is said of a step: its line on the console, and its numbers for the journal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agglom.checkpoints import State
from agglom.core.types import LossTable
from agglom.journal import duration
from agglom.plan import ResolvedStage
from agglom.runtime import peak_memory_mib

if TYPE_CHECKING:
    from agglom.train import Loop


def log(loop: Loop, stage: ResolvedStage, state: State, lr: float, rate: float, mfd: Tensor) -> None:
    """`mfd`: the term of `loss.mfd` in the last step."""
    run = loop.run
    measured = {"images_per_s": rate, "memory_mib": max(run.world.gather(peak_memory_mib(run.world.device)))}
    if run.job.loss.mfd is not None:
        measured["mfd"] = float(mfd)
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
    loop.journal.say(_line(loop, stage, state, values, teachers, mean_T * weight_T, mean_GT))


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
    loss_T: Tensor,
    mean_GT: Tensor,
) -> str:
    total = loop.run.plan.total_steps
    parts = [f"{stage.name} {state.step}/{total}", f"{100 * state.step / total:.1f}%", f"loss {values['loss']:.3f}"]
    parts += [f"{name} {float(loss_T[indices].sum()):.3f}" for name, indices in teachers.items() if indices]
    if len(loop.values) > 1:
        active = [index for indices in teachers.values() for index in indices]
        loss_G = mean_GT[:-1][:, active].nanmean(1).nan_to_num(-torch.inf)
        worst = int(loss_G.argmax())
        parts.append(f"worst {loop.values[worst]} {float(loss_G[worst]):.3f}")
    rate = values["images_per_s"]
    left = (total - state.step) * loop.run.plan.global_batch / rate
    return "  ".join([*parts, f"{rate:.0f} img/s", f"eta {duration(left)}"])
