"""Losses per sample, and the table of them: the waist of the engine.

Shape suffixes: B batch, N patches, D width, T columns of the table. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from agglom.core.heads import resample
from agglom.core.types import Dims, Features, LossTable

EPSILON = 1e-6
RELATIONAL_TEMPERATURE = 0.1


class Column(NamedTuple):
    """A column of the table: the `kind` ("summary" or "patches") of one teacher, and its static weight."""

    teacher: str
    kind: str
    weight: float = 1.0


def columns(
    teachers: Mapping[str, Dims],
    weights: Mapping[str, float],
    summary_weight: float = 1.0,
    patches_weight: float = 1.0,
) -> tuple[Column, ...]:
    """One column for each output of each teacher, in the order given, weight = teacher's × kind's.

    A teacher missing in `weights` counts 1. A weight of 0 means no column.
    """
    kinds = {"summary": summary_weight, "patches": patches_weight}
    all_columns = (
        Column(teacher, kind, weights.get(teacher, 1.0) * kind_weight)
        for teacher, dims in teachers.items()
        for kind, kind_weight in kinds.items()
        if getattr(dims, kind) is not None
    )
    return tuple(column for column in all_columns if column.weight != 0)


def teacher_index(columns: tuple[Column, ...]) -> Tensor:
    """Column → index of its teacher, teachers numbered by first appearance (int64, T)."""
    order = {teacher: index for index, teacher in enumerate(dict.fromkeys(column.teacher for column in columns))}
    return torch.tensor([order[column.teacher] for column in columns], dtype=torch.int64)


def _direction(x: Tensor) -> Tensor:
    """Unit vectors along the last axis. A vector shorter than EPSILON has no direction: it stays about 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > EPSILON, norm, 1.0)


def angle(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """Angle between the vectors of the last axis, in radians, [0, π].

    Θ = 2·atan2(‖u − v‖, ‖u + v‖) of the unit vectors u, v (Kahan): accurate at both ends, and its gradient is finite
    at x = y and at x = −y, where that of arccos is not. A zero vector is at π/2 to everything.
    """
    u_BD, v_BD = _direction(x_BD), _direction(y_BD)
    return 2 * torch.atan2(torch.linalg.vector_norm(u_BD - v_BD, dim=-1), torch.linalg.vector_norm(u_BD + v_BD, dim=-1))


def _per_sample(loss: Tensor) -> Tensor:
    """Mean over all axes but the first."""
    return loss.flatten(1).mean(1)


# One signature for all: (prediction, target, dispersion) → loss_B, over (B, D) summaries or (B, N, D) patches.
# Only the angular loss uses the dispersion.


def angular(x_BD: Tensor, y_BD: Tensor, dispersion: Tensor) -> Tensor:
    """Θ(x, y)² / dispersion: the mean direction of the teacher scores 1 (L_angle, C-RADIOv4)."""
    return angle(x_BD, y_BD).square() / dispersion


def cosine(x: Tensor, y: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """1 − cos(x, y), averaged over the patches (AM-RADIO, arXiv 2312.06709). A zero vector scores 1."""
    distance = 1 - (_direction(x) * _direction(y)).sum(-1, keepdim=True)
    return _per_sample(distance)


def mse(x: Tensor, y: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """Squared error averaged over dimensions and patches; 1 for the mean of a PHI-S target (arXiv 2410.01680)."""
    return _per_sample((x - y).square())


def smooth_l1(x: Tensor, y: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """Smooth L1 (β = 1) averaged over dimensions and patches (AM-RADIO, UNIC)."""
    return _per_sample(F.smooth_l1_loss(x, y, reduction="none"))


def hybrid(x: Tensor, y: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """.9 cosine + .1 smooth L1: direction first, a little magnitude (AM-RADIO, arXiv 2312.06709)."""
    return 0.9 * cosine(x, y) + 0.1 * smooth_l1(x, y)


def unic(x: Tensor, y: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """.5 cosine + .5 smooth L1, of summaries and of patches, on standardised targets (UNIC, arXiv 2408.05088)."""
    return 0.5 * cosine(x, y) + 0.5 * smooth_l1(x, y)


def relational(x_BND: Tensor, y_BND: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """KL(P ‖ Q), averaged over the patches i of an image, of which other patches each of them resembles: P(j | i) ∝
    exp(cos(y_i, y_j) / τ) of the teacher, Q that of the student, τ = RELATIONAL_TEMPERATURE (probabilistic knowledge
    transfer, Passalis and Tefas 2018, arXiv 1803.10837, with a softmax of the cosines, and the patches of an image in
    place of a batch). It is blind to a rotation or a scale that all patches share. 0 where there are fewer than three.
    """
    log_q_BNN, log_p_BNN = (_resemblance(z_BND) for z_BND in (x_BND, y_BND))
    return (log_p_BNN.exp() * (log_p_BNN - log_q_BNN)).sum(-1).mean(-1)


def _resemblance(z_BND: Tensor) -> Tensor:
    """Log of the distribution over the other patches; the patch itself, and a lone patch, have the same in all."""
    unit_BND = _direction(z_BND)
    itself_NN = torch.eye(z_BND.shape[1], dtype=torch.bool, device=z_BND.device)
    # Not −∞: its gradient is NaN where there is no other patch.
    return (unit_BND @ unit_BND.mT / RELATIONAL_TEMPERATURE).masked_fill(itself_NN, -1e4).log_softmax(-1)


Loss = Callable[[Tensor, Tensor, Any], Tensor]
SUMMARY: dict[str, Loss] = {"angular": angular, "cosine": cosine, "mse": mse, "unic": unic}
PATCHES: dict[str, Loss] = {
    **{"mse": mse, "cosine": cosine, "smooth_l1": smooth_l1},
    **{"hybrid": hybrid, "unic": unic, "relational": relational},
}


def overlap(features: Features, shift: tuple[int, int], units: tuple[int, int]) -> Features:
    """The patches that another window of the same image sees, too, one `shift` units down and to the right of this one.

    A window is `units` (rows, columns) large, each a whole number of patches. Both windows, cut to what they share, lie
    on the same part of the image, so any patch loss of them is the shift-equivariant one: a pattern that is fixed to a
    teacher's positions is no longer at the same place twice, and cannot be learnt (C-RADIOv4, arXiv 2601.17237).
    Raises ValueError where a unit is no whole number of patches, or nothing is shared.
    """
    if features.patches_BND is None or shift == (0, 0):
        return features
    per_unit = features.grid[0] // units[0], features.grid[1] // units[1]
    if (per_unit[0] * units[0], per_unit[1] * units[1]) != features.grid:
        raise ValueError(f"a grid of {features.grid} patches in {units} units: expected a whole number in each")
    if abs(shift[0]) >= units[0] or abs(shift[1]) >= units[1]:
        raise ValueError(f"windows of {units} units that are {shift} apart share nothing")
    rows, columns = (
        slice(max(0, by) * patches, (count + min(0, by)) * patches)
        for by, count, patches in zip(shift, units, per_unit, strict=True)
    )
    maps_BhwD = rearrange(features.patches_BND, "b (h w) d -> b h w d", h=features.grid[0])[:, rows, columns]
    grid = maps_BhwD.shape[1], maps_BhwD.shape[2]
    return features._replace(patches_BND=rearrange(maps_BhwD, "b h w d -> b (h w) d"), grid=grid)


def _keep(x: Tensor, valid_B: Tensor) -> Tensor:
    """Zero in invalid samples, with zero gradient even where x is NaN there."""
    return torch.where(valid_B.view(-1, *[1] * (x.ndim - 1)), x, 0.0)


def tokens(features: Features, kind: str) -> Tensor:
    """The summary or the patches, in float32. Raises ValueError if there are none."""
    tokens = features.summary_BD if kind == "summary" else features.patches_BND
    if tokens is None:
        raise ValueError(f"features without {kind}, which a column of the table needs")
    return tokens.float()


def _pair(predicted: Features, target: Features, kind: str) -> tuple[Tensor, Tensor]:
    """Prediction and target in float32, patches on the coarser of the two grids."""
    x, y = tokens(predicted, kind), tokens(target, kind)
    if kind == "summary":
        return x, y
    grid = min(predicted.grid[0], target.grid[0]), min(predicted.grid[1], target.grid[1])
    return resample(x, predicted.grid, grid), resample(y, target.grid, grid)


def table(
    columns: tuple[Column, ...],
    predicted: Mapping[str, Features],
    targets: Mapping[str, Features],
    present: Mapping[str, Tensor] | Set[str],
    *,
    summary: str,
    patches: str,
    dispersion: Mapping[str, Tensor],
) -> LossTable:
    """The loss of each sample under each column, static weights included.

    `present` is the set of teachers of this batch, or maps each to a mask (bool, B) of the samples that it covers.
    A column whose teacher lacks a target or is not present is invalid: 0, with a zero gradient to its head, so that
    every head runs on every rank (ZeRO hangs otherwise). `dispersion[teacher]` scales the angular loss.
    """
    functions = {"summary": SUMMARY[summary], "patches": PATCHES[patches]}
    loss_columns, valid_columns = [], []
    for teacher, kind, weight in columns:
        raw = tokens(predicted[teacher], kind)
        if teacher not in targets or teacher not in present:
            valid_B = torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
            loss_B = _per_sample(raw)
        else:
            valid_B = torch.ones(len(raw), dtype=torch.bool, device=raw.device)
            x, y = _pair(predicted[teacher], targets[teacher], kind)
            if isinstance(present, Mapping):
                valid_B = present[teacher]
                x, y = _keep(x, valid_B), _keep(y, valid_B)
            loss_B = weight * functions[kind](x, y, dispersion.get(teacher))
        loss_B = _keep(loss_B, valid_B)
        loss_columns.append(loss_B)
        valid_columns.append(valid_B)
    return LossTable(torch.stack(loss_columns, 1), torch.stack(valid_columns, 1))


def objective(table: LossTable, w_BT: Tensor) -> Tensor:
    """Σ w·loss over the valid cells. Invalid cells keep their path, with a zero gradient."""
    return (w_BT.masked_fill(~table.valid_BT, 0.0) * table.loss_BT).sum()


def mfd(
    student_BD: Tensor, teacher_BD: Tensor, label_B: Tensor, group_B: Tensor, groups: int, classes: int = 2
) -> Tensor:
    """½·Σ_c Σ_g MMD²(teacher | y = c; student | y = c, group g): among images of a class, the student's features of
    each group should be spread as the teacher's of all (MFD, Jung et al., CVPR 2021, arXiv 2106.04411). A scalar.

    RBF kernel exp(−‖a − b‖² / 2σ²), σ² the mean squared distance from teacher to student, a constant to the gradient;
    MMD² with the pairs of an image and itself, so never negative. Both as public implementations have them. `label_B`
    is 0 to `classes` − 1, or anything else, such as NaN, where unknown: such an image takes no part, whatever its
    features. One of group −1 is among the teacher's of all. A cell without images counts nothing.
    """
    class_CB = label_B == torch.arange(classes, device=label_B.device)[:, None]
    x_BD, y_BD = (_keep(z_BD.float(), class_CB.any(0)) for z_BD in (student_BD, teacher_BD.detach()))
    member_CB = class_CB.to(x_BD)
    inside_GB = (group_B == torch.arange(groups, device=group_B.device)[:, None]).to(x_BD)
    cell_CGB = member_CB[:, None] * inside_GB
    count_CG = cell_CGB.sum(-1)
    of_class_CB = member_CB / member_CB.sum(-1, keepdim=True).clamp(min=1)
    of_cell_CGB = cell_CGB / count_CG[..., None].clamp(min=1)
    known_B = member_CB.sum(0)
    apart_BB = _apart(y_BD, x_BD)
    variance = (known_B @ apart_BB.detach() @ known_B) / known_B.sum().square().clamp(min=1)

    def kernel(apart_BB: Tensor) -> Tensor:
        return torch.exp(-apart_BB / (2 * variance.clamp(min=EPSILON**2)))

    teacher_C = torch.einsum("cb,bd,cd->c", of_class_CB, kernel(_apart(y_BD, y_BD)), of_class_CB)
    student_CG = torch.einsum("cgb,bd,cgd->cg", of_cell_CGB, kernel(_apart(x_BD, x_BD)), of_cell_CGB)
    between_CG = torch.einsum("cb,bd,cgd->cg", of_class_CB, kernel(apart_BB), of_cell_CGB)
    return torch.where(count_CG > 0, teacher_C[:, None] + student_CG - 2 * between_CG, 0.0).sum() / 2


def _apart(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """Squared distances of all pairs."""
    return (x_BD.square().sum(-1)[:, None] + y_BD.square().sum(-1) - 2 * x_BD @ y_BD.mT).clamp(min=0)
