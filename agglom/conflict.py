"""How far the teachers agree as the student sees them, after a stage: by its losses, and by what they ask of its trunk.

Suffixes: M images of the held-out sample, T columns of the loss table or teachers, P parameters of the trunk.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from agglom.assemble import Run, batches
from agglom.core import diagnosis, losses
from agglom.core.heads import Distiller
from agglom.core.losses import Column
from agglom.core.types import Batch, Features, LossTable
from agglom.plan import ResolvedStage
from agglom.runtime import World
from agglom.survey import Pool, Survey
from agglom.targets import Normaliser

# Images whose gradients are taken, as each costs a backward pass for each teacher, on one rank; the groups have equal
# parts of them, but no fewer than LEAST if there are as many.
GRADIENT_IMAGES, LEAST = 24, 8
CHUNK = 64


def measure(
    run: Run,
    surveyed: Survey,
    normalisers: Mapping[str, Normaliser],
    stage: ResolvedStage,
    student: Distiller,
    predicted: Mapping[str, Pool],
) -> dict[str, Any] | None:
    """The context key `conflict` of a report (see `report.GroupReport`), on one rank; None with fewer than two columns.

    Of the teachers of the stage, whose heads it has trained, at the size of the evaluation and without shifts. The
    losses are those of all held-out images, of a specialist those of the images that it serves. The gradients are of
    each teacher's mean loss, its columns summed: the student in evaluation mode, in float32, a parameter that no
    gradient reaches counting as 0. They are taken on few images (see `GRADIENT_IMAGES`), drawn from each group with the
    seed of the job; for everybody each group counts as much as it does in the held-out sample. Groups are those of the
    balancer, else of the first attribute of the report of which an image has one value.
    """
    columns = tuple(column for column in run.columns if column.teacher in stage.teachers)
    if len(columns) < 2:
        return None
    targets = _Targets(run, surveyed, normalisers, columns)
    held_M = np.arange(len(surveyed.held_M))
    tables = [
        targets.table({name: _part(pool, place) for name, pool in predicted.items()}, place)
        for place in torch.as_tensor(held_M).split(CHUNK)
    ]
    loss_MT, valid_MT = (torch.cat(parts) for parts in zip(*(one[:2] for one in tables), strict=True))
    return {
        "columns": [f"{column.teacher}/{column.kind}" for column in columns],
        "n_images": len(held_M),
        "pearson": correlations(loss_MT, valid_MT, "pearson"),
        "spearman": correlations(loss_MT, valid_MT, "spearman"),
        **_gradients(run, targets, student),
    }


def correlations(loss_MT: Tensor, valid_MT: Tensor, method: Literal["pearson", "spearman"]) -> list[list[float]]:
    """Between the columns, over the images valid in both; NaN where these are fewer than three, or one is constant."""
    import pandas as pd

    known_MT = loss_MT.double().masked_fill(~valid_MT, math.nan)
    return pd.DataFrame(known_MT.numpy()).corr(method, min_periods=3).to_numpy().tolist()


class _Targets:
    """What teachers say of the held-out sample, as the survey has stored it: nothing is borrowed here."""

    def __init__(
        self, run: Run, surveyed: Survey, normalisers: Mapping[str, Normaliser], columns: tuple[Column, ...]
    ) -> None:
        self.loss, self.columns, self.surveyed = run.job.loss, columns, surveyed
        self.names = list(dict.fromkeys(column.teacher for column in columns))
        self.normalisers = {name: normalisers[name].to(torch.device("cpu")) for name in self.names}
        self.served_M = {name: served_N[torch.as_tensor(surveyed.held_M)] for name, served_N in run.served.items()}
        self.held_N = torch.as_tensor(np.flatnonzero(np.isin(surveyed.rows_N, surveyed.held_M)))

    def served(self, name: str, place_B: Tensor) -> Tensor:
        """Whether a teacher serves the images at these places of the sample: all of them, unless it is a specialist."""
        return self.served_M[name][place_B] if name in self.served_M else torch.ones(len(place_B), dtype=torch.bool)

    def table(self, predicted: Mapping[str, Features], place_B: Tensor) -> LossTable:
        """The losses of the images at these places of the sample, on the device of the predictions."""
        wanted, dispersion, present = {}, {}, {}
        for name in self.names:
            pool, normaliser = self.surveyed.pools[name], self.normalisers[name]
            raw = Features(
                None if pool.summary_ND is None else pool.summary_ND[self.held_N[place_B]],
                None if pool.patches_MND is None else pool.patches_MND[place_B],
                pool.grid,
            )
            one = predicted[name].patches_BND if predicted[name].summary_BD is None else predicted[name].summary_BD
            device = torch.device("cpu") if one is None else one.device
            wanted[name] = _moved(normaliser(raw), device)
            present[name] = self.served(name, place_B).to(device)
            if normaliser.dispersion is not None:
                dispersion[name] = normaliser.dispersion.to(device)
        return losses.table(
            self.columns,
            predicted,
            wanted,
            present,
            summary=self.loss.summary,
            patches=self.loss.patches,
            dispersion=dispersion,
        )


def _part(pool: Pool, place_B: Tensor) -> Features:
    return Features(
        None if pool.summary_ND is None else pool.summary_ND[place_B],
        None if pool.patches_MND is None else pool.patches_MND[place_B],
        pool.grid,
    )


def _moved(features: Features, device: torch.device) -> Features:
    return features._replace(
        summary_BD=None if features.summary_BD is None else features.summary_BD.to(device),
        patches_BND=None if features.patches_BND is None else features.patches_BND.to(device),
    )


def _gradients(run: Run, targets: _Targets, student: Distiller) -> dict[str, Any]:
    """Cosines between the teachers' gradients: of everybody, and of each group of which there are enough images."""
    student = copy.deepcopy(student).to(run.world.device).eval()
    attribute, row_M = _attribute(run), targets.surveyed.held_M
    members = run.manifest.view(attribute).members if attribute else {}
    known = {group: np.isin(row_M, rows) for group, rows in members.items()}
    parts = {"": ~np.logical_or.reduce([np.zeros(len(row_M), bool), *known.values()])} | known
    quota = max(LEAST, GRADIENT_IMAGES // sum(mine_M.any() for mine_M in parts.values()))
    order_M = np.random.default_rng(run.job.seed).permutation(len(row_M))
    total_TP: Tensor | float = 0.0
    count_T: Tensor | float = 0.0
    both_TT: Tensor | int = 0
    groups, taken = [], 0
    for group, mine_M in parts.items():
        place_I = np.sort(order_M[mine_M[order_M]][:quota])
        share = mine_M.sum() / max(1, len(place_I))
        sum_TP = _summed(run, targets, student, place_I)
        served_TI = torch.stack([targets.served(name, torch.as_tensor(place_I)) for name in targets.names]).long()
        total_TP, count_T = total_TP + share * sum_TP, count_T + share * served_TI.sum(1)
        both_TT = both_TT + served_TI @ served_TI.T
        taken += len(place_I)
        if group:
            cosine = diagnosis.cosines(_gram(sum_TP)).tolist() if len(place_I) >= LEAST else None
            groups.append({"group": group, "n_images": len(place_I), "cosine": cosine})
    gram_TT = _gram(torch.as_tensor(total_TP))
    return {
        "teachers": targets.names,
        "n_gradient": taken,
        "n_both": torch.as_tensor(both_TT).tolist(),
        "cosine": diagnosis.cosines(gram_TT).tolist(),
        "norm": (gram_TT.diagonal().sqrt() / count_T).tolist(),
        "attribute": attribute,
        "groups": groups,
    }


def _attribute(run: Run) -> str | None:
    names = (run.job.balance.group, *run.job.data.groups)
    return next((name for name in names if name and not set(name.split("*")) & set(run.manifest.separators)), None)


def _parameters(student: Distiller) -> list[nn.Parameter]:
    return [parameter for parameter in student.trunk.parameters() if parameter.requires_grad]


def _summed(run: Run, targets: _Targets, student: Distiller, place_M: np.ndarray) -> Tensor:
    """The gradient of each teacher's losses, summed over the images at these places: (T, P) on the CPU."""
    parameters, teacher_T = _parameters(student), losses.teacher_index(targets.columns)
    sum_TP = torch.zeros(len(targets.names), sum(parameter.numel() for parameter in parameters))
    row_M, start, micro = targets.surveyed.held_M[place_M], 0, run.plan.micro
    alone = replace(run, world=World(0, 1, run.world.device))
    for rows, batch in batches(alone, row_M, run.plan.evaluate_size):
        place_B = torch.as_tensor(place_M[start : start + len(rows)])
        start += len(rows)
        # A micro-batch of the training is what fits into memory together with its activations.
        pieces = cast(Batch, batch).pixels_BCHW.split(micro), place_B.split(micro)
        for pixels_BCHW, several in zip(*pieces, strict=True):
            _, predicted = student(pixels_BCHW.to(run.world.device))
            loss_BT = targets.table(predicted, several).loss_BT
            for teacher, mine_P in enumerate(sum_TP):
                loss = loss_BT[:, teacher_T == teacher].sum()
                grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                mine_P += _flat(parameters, grads)
    return sum_TP


def _flat(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> Tensor:
    found = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
    return torch.cat([one.detach().float().flatten().cpu() for one in found])


def _gram(g_TP: Tensor) -> Tensor:
    """Inner products in float64, without a copy of it all in that precision."""
    return torch.stack([part.double() @ part.double().T for part in g_TP.split(2**20, dim=1)]).sum(0)
