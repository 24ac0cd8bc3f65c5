"""How much each cell (teacher × group) weighs: pure triples (init, weigh, update) over the loss table.

The objective is Σ_g q_g·ℓ_g. A sample i of group g, drawn with probability in proportion to the group's share p_g,
therefore weighs w = q_g / (p_g·B), B the global batch (Ruling 6): in expectation the gradient is that of the objective,
whatever the groups of one batch. A sample without annotation weighs the neutral 1/B. Σ q = Σ p over the groups.

Shape suffixes: B batch, T columns of the table, S teachers, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from agglom.core import borrowing
from agglom.core.borrowing import Loan
from agglom.core.cells import (
    UNSKILLED,
    Measured,
    excess,
    listening,
    on_average,
    reliability,
    shares,
    speakers,
    standing,
    steadiness,
)
from agglom.core.types import Balancer, CellStats, LossTable
from agglom.core.weights import Cells, State, by_group, capped, following, mean_loss, unmoved


def uniform(*, cells: Cells) -> Balancer:
    """Every sample weighs 1/B, exactly as without a balancer."""

    def weigh(state: State, table: LossTable, group_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.full_like(table.loss_BT, 1 / cells.batch)

    return Balancer(dict, weigh, lambda state, stats: state)


def inverse_frequency(*, cells: Cells, power: float = 1.0, cap: float = 10.0) -> Balancer:
    """q_g ∝ p_g^(1 − power): power 1 counts all groups alike, 0 is uniform. No sample exceeds `cap` times neutral.

    Raises ValueError unless power ≥ 0 and cap ≥ 1.
    """
    _require("inverse_frequency", power=(power, power >= 0, "≥ 0"), cap=(cap, cap >= 1, "≥ 1"))
    share_G = cells.share_G.double()
    q_G = torch.where(share_G > 0, share_G ** (1 - power), 0.0)
    q_G = capped(q_G, share_G, cap)
    return Balancer(lambda: {"q_G": q_G.clone()}, by_group(cells), lambda state, stats: state)


def cells(
    *,
    cells: Cells,
    measured: Measured,
    by: Literal["images", "labels", "views"] = "images",
    temperature: float = 0.15,
    gamma: float = 1.0,
    tau: float = 0.3,
    ema: float = 0.1,
    floor: float = 0.1,
    cap: float = 10.0,
    support: int = 30,
    borrow: int = 30,
) -> Balancer:
    """Teachers count by measured reliability or borrow it, groups by what is left to learn.

    A sample i of group g weighs (q_g / p_g)·ρ_{s|i} / B for teacher s, from what is `measured` before a stage:

    - ρ_{s|i} ∝ exp(R_{i,s} / `temperature`), R how probable it is that its probe is right on the image
      (`core.cells.listening`), and where that is not known the mean ρ of the group; `by` labels R is the AUROC of the
      probe in the group (`core.cells.reliability`); `by` views ρ is in proportion to what another view of an image of
      the group leaves as it is (`core.cells.steadiness`);
    - q_g ∝ p_g^`gamma` · exp((e_g + lag_g) / `tau`), e_g the excess loss (`core.cells.excess`) as a moving average in
      which a step counts `ema`, lag_g by how much of the skill of its best teacher the student fell short in the last
      evaluation; a group whose best teacher is less than .2 above chance counts less, to a quarter, so that one that
      is only noise takes nothing from the others. `floor`·p_g ≤ q_g ≤ `cap`·p_g;
    - where the AUROC of a teacher in the group is clearly below the best and its R on the image below the mean of those
      who know the group, or not known, its summary is the mean of what it says of the `borrow` images of other groups
      that are most alike to these (`core.borrowing`); it then counts as much as they do, its patches as before. Nothing
      is borrowed with 0, nor `by` labels or views.

    A group of fewer than `support` rows has the losses of its parents (`core.cells.speakers`). One that is absent from
    a step keeps its weight, and the others share theirs. A sample without annotation has q = p and, where it has none
    of its own, the ρ of everybody, which is by labels. Of the teachers of an image ρ is 1 on average.
    State: as that of `group_dro`.
    Raises ValueError unless temperature > 0, 0 ≤ gamma ≤ 1, tau > 0, 0 < ema ≤ 1, 0 ≤ floor ≤ 1 ≤ cap, support ≥ 0 and
    borrow ≥ 0.
    """
    _require(
        "cells",
        temperature=(temperature, temperature > 0, "> 0"),
        gamma=(gamma, 0 <= gamma <= 1, "in [0, 1]"),
        tau=(tau, tau > 0, "> 0"),
        ema=(ema, 0 < ema <= 1, "in (0, 1]"),
        floor=(floor, 0 <= floor <= 1, "in [0, 1]"),
        cap=(cap, cap >= 1, "≥ 1"),
        support=(support, support >= 0, "≥ 0"),
        borrow=(borrow, borrow >= 0, "≥ 0"),
    )
    share_G, served_GS = cells.share_G.double(), cells.served_GS
    count_G = share_G * max(1, cells.rows) if cells.count_G is None else cells.count_G.double()
    static_T = torch.ones_like(cells.teacher_T) if cells.static_T is None else cells.static_T
    speaks_GG, follow = speakers(cells.groups, count_G, support), following(cells, ema)
    rho_S = reliability(measured.right_S[None], served_GS.any(0)[None], temperature)[0]
    if by == "views":
        kept_GS, kept_S = steadiness(measured.noise_GT, measured.spread_GT, cells.teacher_T)
        rho_S = shares(kept_S[None], served_GS.any(0)[None])[0]

    sure_NS, group_N = measured.sure_NS if by == "images" else None, cells.group_N

    def heard(loans: Sequence[Loan]) -> tuple[Tensor, Tensor | None]:
        """The ρ of each group, and how sure the teachers are of each image, where these loans are given."""
        if by == "views":
            return shares(kept_GS, served_GS), None
        group_G = torch.arange(len(share_G), device=share_G.device)
        rho_GS = reliability(borrowing.reliable(measured.right_GS, group_G, loans), served_GS, temperature)
        if sure_NS is None or group_N is None:
            return rho_GS, sure_NS
        found_NS = borrowing.reliable(sure_NS, group_N, loans)
        rho_NS = listening(found_NS, served_GS[group_N.clamp(min=0)], temperature)
        return on_average(rho_NS, group_N, rho_GS), found_NS

    own, lend = heard(()), None
    lent = own
    if borrow and measured.loans and measured.bank is not None and sure_NS is not None and group_N is not None:
        asks_NJ = borrowing.borrowers(sure_NS, group_N, measured.loans)
        lend = borrowing.lender(measured.loans, cells.teachers, measured.bank, borrow, asks_NJ)
        lent = heard(measured.loans)
    summary_T = torch.ones_like(cells.teacher_T, dtype=torch.bool) if cells.summary_T is None else cells.summary_T
    rho_GT = torch.where(summary_T, lent[0][:, cells.teacher_T], own[0][:, cells.teacher_T])
    best_G, lag_G = standing(measured, served_GS)
    skilled_G = (best_G / borrowing.SKILLED).clamp(UNSKILLED, 1).nan_to_num(1.0)
    log_G = gamma * share_G.log() + skilled_G.log() + lag_G / tau
    weigh_groups = by_group(cells)

    def tempered(log_G: Tensor, here_G: Tensor, mass: Tensor) -> Tensor:
        """exp(log_G), scaled to `mass` between floor and cap; a mixture with uniform keeps all above the floor."""
        here_G = here_G & (share_G > 0)
        part_G = torch.where(here_G, share_G, 0.0)
        log_G = torch.where(here_G, log_G, -torch.inf)
        # The largest is subtracted, as exp overflows; where it underflows the cap would have nothing to scale.
        q_G = torch.exp(log_G - log_G.max().clamp(min=torch.finfo(torch.float64).min)) + 1e-30 * part_G
        low_G = floor * part_G
        return low_G + capped(q_G, part_G, cap - floor, (mass - low_G.sum()).clamp(min=0))

    def init() -> State:
        return unmoved(cells) | {"q_G": tempered(log_G, share_G > 0, share_G.sum())}

    def weigh(state: State, table: LossTable, group_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rho_BT = rho(*own, table, group_B)[:, cells.teacher_T]
        if lend is not None:
            rho_BT = torch.where(summary_T, rho(*lent, table, group_B)[:, cells.teacher_T], rho_BT)
        return weigh_groups(state, table, group_B) * rho_BT.to(table.loss_BT.dtype)

    def rho(rho_GS: Tensor, sure_NS: Tensor | None, table: LossTable, group_B: Tensor) -> Tensor:
        """ρ of the images of a batch and the teachers."""
        rho_BS = torch.where(group_B[:, None] < 0, rho_S, rho_GS[group_B.clamp(min=0)])
        zeros_BS = torch.zeros_like(rho_BS)
        taught_BS = zeros_BS.index_add(1, cells.teacher_T, table.valid_BT.to(zeros_BS)) > 0
        if sure_NS is not None and table.row_B is not None:
            own_BS = listening(sure_NS[table.row_B], taught_BS, temperature)
            rho_BS = torch.where(own_BS.isnan(), rho_BS, own_BS)
        # Whoever teaches an image: it counts as much as under uniform weights.
        return torch.where(taught_BS.any(1, keepdim=True), shares(rho_BS, taught_BS), rho_BS)

    def update(state: State, stats: CellStats) -> State:
        groups = len(share_G)
        merged = CellStats(speaks_GG @ stats.sum_GT[:groups], speaks_GG @ stats.count_GT[:groups])
        followed, active_GT, ready_G = follow(state, merged)
        left_G = excess(followed["loss_GT"] / static_T, measured, rho_GT * active_GT)
        mass = torch.where(ready_G, state["q_G"], 0.0).sum()
        q_G = tempered(log_G + left_G / tau, ready_G, mass)
        return {"q_G": torch.where(ready_G, q_G, state["q_G"]), **followed}

    return Balancer(init, weigh, update, lend)


def group_dro(
    *, cells: Cells, eta: float = 0.01, ema: float = 0.1, adjustment: float = 0.0, cap: float = 10.0
) -> Balancer:
    """Group DRO on the distillation loss: q_g ← q_g·exp(η·(ℓ̄_g + C/√n_g)), normalised (Sagawa 2020; 2311.00476).

    ℓ̄_g: the teachers' losses (columns summed) averaged over the teachers of the step that serve the group, as a moving
    average in which a new value counts `ema`. C is `adjustment`, n_g the training rows of the group. q starts at the
    shares, so training starts uniform; a group absent from a step keeps its weight and the others share theirs;
    q_g ≤ `cap`·p_g.
    State: `q_G`; `loss_GT`, the moving average of each cell, 0 where `seen_GT` is false.
    Raises ValueError unless η ≥ 0, 0 < ema ≤ 1, adjustment ≥ 0 (with `cells.rows`), cap ≥ 1.
    """
    _require(
        "group_dro",
        eta=(eta, eta >= 0, "≥ 0"),
        ema=(ema, 0 < ema <= 1, "in (0, 1]"),
        adjustment=(adjustment, adjustment == 0 or (adjustment > 0 and cells.rows > 0), "≥ 0, with cells.rows > 0"),
        cap=(cap, cap >= 1, "≥ 1"),
    )
    share_G = cells.share_G.double()
    count_G = share_G * max(1, cells.rows) if cells.count_G is None else cells.count_G.double()
    bonus_G = adjustment / count_G.sqrt() if adjustment else torch.zeros_like(share_G)
    follow, mean = following(cells, ema), mean_loss(cells)

    def update(state: State, stats: CellStats) -> State:
        followed, active_GT, ready_G = follow(state, stats)
        loss_G = mean(followed["loss_GT"], active_GT)
        mass_G = torch.where(ready_G, state["q_G"], 0.0)
        # The largest exponent is subtracted: it cancels in the normalisation, and exp cannot overflow.
        exponent_G = torch.where(ready_G, eta * (loss_G + bonus_G), -torch.inf)
        tilted_G = mass_G * torch.exp(exponent_G - exponent_G.max().clamp(min=torch.finfo(torch.float64).min))
        q_G = capped(tilted_G, torch.where(ready_G, share_G, 0.0), cap, mass_G.sum())
        return {"q_G": torch.where(ready_G, q_G, state["q_G"]), **followed}

    return Balancer(lambda: unmoved(cells), by_group(cells), update)


def teacher_dropping(*, cells: Cells, p: float = 0.5) -> Balancer:
    """Per image, the teacher with the largest loss is kept and each other one dropped with probability p (UNIC).

    arXiv 2408.05088, DUNE 2503.14405: (1/B)·Σ_i S_i·Σ_s c_is·L_is / Σ_s c_is, L_is the sum of the teacher's columns.

    UNIC's code divides by Σ c of the batch, so an image that keeps more teachers weighs more, and the weight depends on
    who else is in the batch. Here every image weighs the same. S_i, the number of its teachers, makes p = 0 `uniform`.
    Without a generator the weights are their expectation over the draw, NaN without a loss. Groups play no part.
    Raises ValueError unless 0 ≤ p ≤ 1.
    """
    _require("teacher_dropping", p=(p, 0 <= p <= 1, "in [0, 1]"))
    teachers = int(cells.teacher_T.max()) + 1

    def weigh(state: State, table: LossTable, group_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        loss_BT, valid_BT = table.loss_BT.detach(), table.valid_BT
        zeros_BS = loss_BT.new_zeros(len(loss_BT), teachers)
        loss_BS = zeros_BS.index_add(1, cells.teacher_T, loss_BT.masked_fill(~valid_BT, 0.0))
        taught_BS = zeros_BS.index_add(1, cells.teacher_T, valid_BT.to(zeros_BS)) > 0
        count_B1 = taught_BS.sum(1, keepdim=True)
        largest_B1 = loss_BS.masked_fill(~taught_BS, -torch.inf).argmax(1, keepdim=True)
        hardest_BS = taught_BS & (torch.arange(teachers, device=loss_BT.device) == largest_B1)
        if generator is None:
            # E[1 / (1 + X)] of the binomial X of the others that are kept (Chao and Strawderman 1972).
            kept_B1 = 1.0 if p == 1 else (1 - p**count_B1) / (count_B1 * (1 - p)).clamp(min=1e-12)
            others_B1 = (1 - kept_B1) / (count_B1 - 1).clamp(min=1)
            part_BS = torch.where(hardest_BS, kept_B1, others_B1).masked_fill(count_B1 == 0, torch.nan)
        else:
            drawn_BS = torch.rand(zeros_BS.shape, generator=generator, device=loss_BT.device) >= p
            keep_BS = taught_BS & (drawn_BS | hardest_BS)
            part_BS = keep_BS.to(loss_BT) / keep_BS.sum(1, keepdim=True).clamp(min=1)
        return (part_BS * count_B1 / cells.batch).to(loss_BT.dtype)[:, cells.teacher_T]

    return Balancer(dict, weigh, lambda state, stats: state)


def ada_loss(*, cells: Cells, ema: float = 0.1, floor: float = 1e-3) -> Balancer:
    """Each teacher's loss over its own moving average: Σ_s L_s / stopgrad(L̄_s) (AdaLoss, AM-RADIO, arXiv 2312.06709).

    L_s is the sum of the teacher's columns, averaged over all samples; a new value counts `ema`. L̄_s is taken without
    the static weight of the teacher (the mean over its columns), so that this still counts. A teacher weighs the
    neutral 1 until its first step is done, and no more than 1 / `floor`. Only useful where the scales of the teachers
    are equal already (PHI-S): it then lets each count the same, however well it is learnt. Groups play no part.
    State: `loss_S`, 1 where `seen_S` is false.
    Raises ValueError unless 0 < ema ≤ 1 and floor > 0.
    """
    _require("ada_loss", ema=(ema, 0 < ema <= 1, "in (0, 1]"), floor=(floor, floor > 0, "> 0"))
    teachers = int(cells.teacher_T.max()) + 1
    columns_S = torch.bincount(cells.teacher_T, minlength=teachers).double()
    static_T = torch.ones_like(cells.teacher_T) if cells.static_T is None else cells.static_T
    weight_S = torch.zeros_like(columns_S).index_add(0, cells.teacher_T, static_T.double()) / columns_S

    def init() -> State:
        loss_S = cells.share_G.new_ones(teachers, dtype=torch.float64)
        return {"loss_S": loss_S, "seen_S": torch.zeros_like(loss_S, dtype=torch.bool)}

    def weigh(state: State, table: LossTable, group_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        weight_S = 1 / (state["loss_S"].clamp(min=floor) * cells.batch)
        return weight_S.to(table.loss_BT.dtype)[cells.teacher_T].expand_as(table.loss_BT)

    def update(state: State, stats: CellStats) -> State:
        count_T = stats.count_GT.double().sum(0)
        mean_T = stats.sum_GT.sum(0) / count_T.clamp(min=1)
        zeros_S = torch.zeros_like(state["loss_S"])
        mean_S = zeros_S.index_add(0, cells.teacher_T, mean_T) / weight_S
        now_S = zeros_S.index_add(0, cells.teacher_T, count_T) > 0
        moved_S = torch.where(state["seen_S"], torch.lerp(state["loss_S"], mean_S, ema), mean_S)
        return {"loss_S": torch.where(now_S, moved_S, state["loss_S"]), "seen_S": state["seen_S"] | now_S}

    return Balancer(init, weigh, update)


def static(
    *, cells: Cells, groups: dict[str, float] | None = None, teachers: dict[str, float] | None = None
) -> Balancer:
    """Fixed weights by name, 1 where a group or a teacher is not named: w = a_g·b_t / B.

    Both are relative: a is scaled so that the mean annotated sample under the sampler weighs the neutral 1, b so that
    the mean teacher does. A sample without annotation has a = 1.
    State: none that changes; `q_G` = a_g·p_g.
    Raises ValueError for a name that `cells` does not have, a negative weight, or weights that leave nothing.
    """
    share_G = cells.share_G.double()
    weight_G = _by_name("groups", groups or {}, cells.groups, share_G)
    teacher_S = share_G.new_ones(int(cells.teacher_T.max()) + 1)
    weight_S = _by_name("teachers", teachers or {}, cells.teachers, teacher_S / len(teacher_S))
    weigh_groups = by_group(cells)

    def weigh(state: State, table: LossTable, group_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return weigh_groups(state, table, group_B) * weight_S.to(table.loss_BT.dtype)[cells.teacher_T]

    return Balancer(lambda: {"q_G": share_G * weight_G}, weigh, lambda state, stats: state)


def cvar(*, cells: Cells, alpha: float = 0.2, ema: float = 0.1) -> Balancer:
    """CVaR over groups: the worst of all q with q_g ≤ p_g / α and Σ q = Σ p (topic CVaR, Oren et al. 2019, arXiv
    1909.02060; α and `ema` as in the code of Sagawa 2020).

    The losses are the moving averages of `group_dro`, and q the exact maximiser of Σ q·ℓ̄: from the largest loss down,
    each group takes all that it may until the mass is spent. α = 1 is uniform. Training starts uniform; a group absent
    from a step keeps its weight and the others share theirs.
    State: as that of `group_dro`.
    Raises ValueError unless 0 < α ≤ 1 and 0 < ema ≤ 1.
    """
    _require("cvar", alpha=(alpha, 0 < alpha <= 1, "in (0, 1]"), ema=(ema, 0 < ema <= 1, "in (0, 1]"))
    share_G = cells.share_G.double()
    follow, mean = following(cells, ema), mean_loss(cells)

    def update(state: State, stats: CellStats) -> State:
        followed, active_GT, ready_G = follow(state, stats)
        loss_G = mean(followed["loss_GT"], active_GT)
        # A loss that is not finite must reach every weight, not only move its group to an end of the order.
        mass = torch.where(ready_G, state["q_G"] + 0 * loss_G, 0.0).sum()
        order_G = torch.where(ready_G, loss_G, -torch.inf).argsort(descending=True, stable=True)
        most_G = torch.where(ready_G, share_G / alpha, 0.0)[order_G]
        taken_G = torch.minimum((mass - most_G.cumsum(0) + most_G).clamp(min=0), most_G)
        q_G = torch.empty_like(taken_G).index_copy(0, order_G, taken_G)
        return {"q_G": torch.where(ready_G, q_G, state["q_G"]), **followed}

    return Balancer(lambda: unmoved(cells), by_group(cells), update)


def agre(*, cells: Cells, biased: str, follow: float = 0.01) -> Balancer:
    """A teacher counts the more on an image, the more its gradient deviates from that of a `biased` model, one more
    teacher of the table: W_is = 1 − cos(∇L_is, ∇L_ib), w_is = S_i·W_is / (B·Σ_s W_is) (AGRE-KD, Kenfack et al. 2024,
    arXiv 2411.14984). It needs no groups.

    L_is is the sum of the teacher's columns, S_i the number of other teachers that the image has: where all deviate
    alike this is uniform. An image that the biased model does not teach weighs uniform.
    Adapted: the paper distils logits, and gradients are those of the student's parameters. Here they are taken at the
    student's summary (`table.trunk_BD`), per image without a backward pass for each; a teacher without a summary column
    has none, and counts W = 1. The paper gives the biased model no part in the loss. Here that would leave its head as
    it was initialised, and the gradient through it without meaning, so it weighs `follow` times neutral: enough for a
    head, as Adam sees no scale, and little for the trunk.
    Without `trunk_BD`, or without a gradient, the weights of the teachers are not known: NaN.
    Raises ValueError unless `biased` is a teacher beside others and follow ≥ 0; `weigh` where no loss depends on
    `trunk_BD`.
    """
    _require("agre", follow=(follow, follow >= 0, "≥ 0"))
    if biased not in cells.teachers or len(cells.teachers) < 2:
        known = ", ".join(cells.teachers) or "none"
        raise ValueError(
            f"balance agre: biased is {biased!r}, expected a teacher that has a loss, beside others ({known})"
        )
    bias, teachers = cells.teachers.index(biased), len(cells.teachers)

    def weigh(state: State, table: LossTable, group_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        loss_BT, valid_BT = table.loss_BT, table.valid_BT
        zeros_BS = torch.zeros_like(loss_BT[:, :1]).repeat(1, teachers)
        others_S = torch.arange(teachers, device=loss_BT.device) != bias
        taught_BS = (zeros_BS.index_add(1, cells.teacher_T, valid_BT.to(zeros_BS)) > 0) & others_S
        if table.trunk_BD is None or not loss_BT.requires_grad:
            part_BS = torch.full_like(zeros_BS, torch.nan)
        else:
            # Images do not mix, so row i of the gradient of the sum is the gradient of image i.
            sum_S = zeros_BS.index_add(1, cells.teacher_T, loss_BT.masked_fill(~valid_BT, 0.0)).sum(0)
            found = [torch.autograd.grad(one, table.trunk_BD, retain_graph=True, allow_unused=True)[0] for one in sum_S]
            if found[0] is None:
                raise ValueError("balance agre: no loss depends on the student's summary, where gradients are taken")
            gradient_SBD = torch.stack(found).float()
            cosine_SB = torch.cosine_similarity(gradient_SBD, gradient_SBD[bias], dim=-1, eps=1e-30)
            # Where all agree with the biased model, rounding would decide.
            weight_BS = (1 - cosine_SB.T).clamp(min=1e-4) * taught_BS
            part_BS = weight_BS * taught_BS.sum(1, keepdim=True) / weight_BS.sum(1, keepdim=True).clamp(min=1e-4)
        part_BS = torch.where(others_S, part_BS, follow)
        return (part_BS / cells.batch).to(loss_BT.dtype)[:, cells.teacher_T]

    return Balancer(dict, weigh, lambda state, stats: state)


def _by_name(option: str, weights: dict[str, float], names: tuple[str, ...], share_N: Tensor) -> Tensor:
    """The weight of each name, 1 by default, scaled so that their mean by `share_N` is 1. Raises ValueError."""
    unknown = [f"{name!r} is not one of {', '.join(names) or 'none'}" for name in weights if name not in names]
    fine = {name: isinstance(weight, int | float) and 0 <= weight < math.inf for name, weight in weights.items()}
    wrong = [f"{name} is {weights[name]!r}, expected a number ≥ 0" for name in weights if not fine[name]]
    if unknown or wrong:
        raise ValueError(f"balance static: {option}: {'; '.join(unknown + wrong)}")
    given = [float(weights.get(name, 1.0)) for name in names]
    weight_N = torch.tensor(given, dtype=torch.float64, device=share_N.device) if weights else torch.ones_like(share_N)
    mass = (share_N * weight_N).sum()
    if not mass > 0:
        raise ValueError(f"balance static: {option}: every weight is 0, nothing would be learned")
    return weight_N * share_N.sum() / mass


def _require(kind: str, **options: tuple[float, bool, str]) -> None:
    """One ValueError that lists each option out of range."""
    wrong = [f"{name} is {value}, expected {range}" for name, (value, fine, range) in options.items() if not fine]
    if wrong:
        raise ValueError(f"balance {kind}: {'; '.join(wrong)}")
