"""What balancers share: what they know of the job, the losses that they follow, and weights by group.

Shape suffixes: B batch, T columns of the table, S teachers, G groups, N rows of the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agglom.core.types import CellStats, LossTable

State = dict[str, Tensor]


@dataclass(frozen=True)
class Cells:
    """What a balancer knows of the job.

    `share_G`: each group's share under the sampler, over all rows, those without annotation included. `teacher_T`:
    column → teacher index (int64). `batch`: the global batch. `rows`: training rows, for a generalisation adjustment.
    `served_GT`: the cells that can occur, all by default; a specialist has none in the groups that it does not serve,
    a teacher of other stages has none at all.
    `static_T`: the static weight of each column, which its losses contain; all 1 by default. `groups` and `teachers`
    are their names, by index. `count_G`: the training rows of each group, where a sampler that draws some groups more
    often than others makes them another number than share × rows. `group_N`: the group of each row of the manifest.
    `summary_T`: which columns are of summaries (bool), all by default.
    Tensors lie on the device of the table, and so does the state.
    """

    share_G: Tensor
    teacher_T: Tensor
    batch: int
    rows: int = 0
    served_GT: Tensor | None = None
    static_T: Tensor | None = None
    groups: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    count_G: Tensor | None = None
    group_N: Tensor | None = None
    summary_T: Tensor | None = None

    @property
    def served_GS(self) -> Tensor:
        """Groups × teachers (bool): who serves whom with any column."""
        shape = len(self.share_G), int(self.teacher_T.max()) + 1
        if self.served_GT is None:
            return torch.ones(shape, dtype=torch.bool, device=self.share_G.device)
        count_GS = self.share_G.new_zeros(shape, dtype=torch.float64)
        return count_GS.index_add(1, self.teacher_T, self.served_GT.double()) > 0


def unmoved(cells: Cells) -> State:
    """The state of a balancer that follows the losses, before the first step: q at the shares, no losses."""
    share_G = cells.share_G.double()
    loss_GT = share_G.new_zeros(len(share_G), len(cells.teacher_T))
    return {"q_G": share_G.clone(), "loss_GT": loss_GT, "seen_GT": torch.zeros_like(loss_GT, dtype=torch.bool)}


def following(cells: Cells, ema: float) -> Callable[[State, CellStats], tuple[State, Tensor, Tensor]]:
    """(state, stats) → `loss_GT` and `seen_GT` after a step, the cells of this step, and which groups are known.

    Cells of a step (`active_GT`) are those of its teachers in the groups that they serve. A group is known where it was
    in this step and the moving average of every such cell has begun.
    """
    shape = len(cells.share_G), len(cells.teacher_T)
    everywhere_GT = torch.ones(shape, dtype=torch.bool, device=cells.share_G.device)
    served_GT = everywhere_GT if cells.served_GT is None else cells.served_GT

    def follow(state: State, stats: CellStats) -> tuple[State, Tensor, Tensor]:
        sum_GT, count_GT = (part_GT[: shape[0]] for part_GT in stats)
        seen_GT, now_GT = state["seen_GT"], count_GT > 0
        mean_GT = sum_GT / count_GT.clamp(min=1)
        moved_GT = torch.where(seen_GT, torch.lerp(state["loss_GT"], mean_GT, ema), mean_GT)
        loss_GT = torch.where(now_GT, moved_GT, state["loss_GT"])
        seen_GT = seen_GT | now_GT
        active_GT = now_GT.any(0) & served_GT
        ready_G = now_GT.any(1) & (seen_GT | ~active_GT).all(1)
        return {"loss_GT": loss_GT, "seen_GT": seen_GT}, active_GT, ready_G

    return follow


def mean_loss(cells: Cells) -> Callable[[Tensor, Tensor], Tensor]:
    """(losses, active cells) → the loss of each group: the sum of the active columns over the number of teachers."""
    teachers = int(cells.teacher_T.max()) + 1

    def mean(loss_GT: Tensor, active_GT: Tensor) -> Tensor:
        zeros_GS = loss_GT.new_zeros(len(loss_GT), teachers)
        active_GS = zeros_GS.index_add(1, cells.teacher_T, active_GT.to(zeros_GS))
        return (loss_GT * active_GT).sum(1) / active_GS.count_nonzero(1).clamp(min=1)

    return mean


def by_group(cells: Cells) -> Callable[..., Tensor]:
    """weigh(): q_g/(p_g·B) from the state's `q_G`, 1/B without annotation or in a group that has no rows."""
    share_G = cells.share_G.double()

    def weigh(state: State, table: LossTable, group_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        ratio_G = torch.where(share_G > 0, state["q_G"] / share_G, 1.0)
        ratio_B = torch.where(group_B < 0, 1.0, ratio_G[group_B.clamp(min=0)])
        return (ratio_B / cells.batch).to(table.loss_BT.dtype)[:, None].expand_as(table.loss_BT)

    return weigh


def capped(q_G: Tensor, share_G: Tensor, cap: float, total: Tensor | None = None) -> Tensor:
    """q scaled to the sum `total` (of the shares, by default) with q ≤ cap·share; the rest take what the cap cuts."""
    total = share_G.sum() if total is None else total
    over_G = torch.zeros_like(q_G, dtype=torch.bool)
    scaled_G = q_G
    # Each round caps at least one more group or changes nothing.
    for _ in range(len(q_G)):
        room = total - torch.where(over_G, cap * share_G, 0.0).sum()
        free = torch.where(over_G, 0.0, q_G).sum()
        scale = room / free.clamp(min=torch.finfo(torch.float64).tiny)
        scaled_G = torch.where(over_G, cap * share_G, q_G * scale)
        over_G = over_G | (scaled_G > cap * share_G)
    return torch.minimum(scaled_G, cap * share_G)
