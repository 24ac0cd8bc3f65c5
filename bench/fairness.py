"""What each way to weigh the losses does for the groups of patients, against uniform weights and against the teachers.

(A) Fashion-MNIST with a simulated minority device: device B takes 12 % of the training images and half of the others.
Three teachers: `majority` has learnt its classes on 20,000 images of device A alone and is unfair by construction,
`balanced` on 1,500 images of both devices and is weaker, `lite0` is EfficientNet-Lite0. (B) 776 chest X-rays of real
patients, sex × view: DINOv2, the same with sex erased, EfficientNet-Lite0 and MobileNetV2. A convolutional student
learns their summaries without labels (PHI-S, MSE), as long and from as many images under every method; then a linear
probe, its strength chosen on validation, is fitted on the training images and read on test. A seed sets the draw of
images, devices or patients, the teachers that are trained, and the student; since initial weights and the order of
images alone move a small student by many points, some methods have three students for the same images.

Every method has the defaults of its paper, unless it is called tuned: tuning chose, on 8,000 validation images of four
other seeds, what lifts the worst group most of what costs the majority no more than half a point, and of what comes
within half a point of that, which is noise, what is best for the majority. The options of `cells` were looked at so,
too; that targets are borrowed at all after trials on two of these seeds. `cells` reads the labels of train and
validation images, by probes of the teachers, MFD those of the train images in its loss, nobody else any. `cells,
nothing borrowed` has what was best before there was borrowing: a temperature of .04 and a τ of .5. `best` is the best
teacher of a group.

With a weight of .1 MFD costs the majority more than that rule allows; it is there for comparison. Larger students show
what is left where capacity binds less; the wide one has the architecture of the teacher `majority` and may start from
its weights, which have learnt the classes of other images.

`views` lets the student see half of its images as agglom's generic acquisitions (all kinds, strength 1) would have
taken them. Their families resemble the simulated device, which blurs, inverts, compresses and adds noise, too;
`views-unlike` leaves out the two that matter most, inversion and contrast.

Hard cases of (A): annotations that are wrong or missing, a group that is only noise, a teacher that is good for nobody,
twelve crossings, some of five images.

Every finished run is a line of --runs, so an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import ROOT, parser, table, versions, write_json
from _record import AGAIN, below, chosen, duels, lines, plot, tuned
from _settings import CASES, FOLDS, HELD, TRUNK, TUNING, VAL, Material, Trunk, fashion, nih
from torch import Tensor, nn

from agglom import confidence
from agglom.core import balance, borrowing, cells, groups, losses, metrics, normalise, schedule
from agglom.core.borrowing import Bank, Lend
from agglom.core.cells import Measured
from agglom.core.heads import Head
from agglom.core.normalise import Affine, Moments
from agglom.core.types import Balancer, LossTable
from agglom.core.weights import Cells
from agglom.data import simulate
from agglom.data.acquisition import simulated
from agglom.data.dataset import view_random
from agglom.data.sampler import tempered
from agglom.job import Acquisition
from agglom.measure import ENOUGH, Found, judged

SETTINGS = {"A": "Fashion-MNIST, simulated device", "B": "chest X-rays, sex × view"}
STEPS, BATCH = {"A": 1500, "B": 600}, {"A": 128, "B": 64}
PEAK, END = 2e-3, 1e-5
LEAST = 30  # validation patients of a group that is looked at alone
FIRST, TUNED_ON = 20, (100, 101, 102, 103)  # seeds
VIEWS = 4  # of each image, made in advance
ANY = Acquisition(blur=1.0, resolution=1.0, contrast=1.0, inversion=1.0, noise=1.0)
UNLIKE = Acquisition(blur=1.0, resolution=1.0, noise=1.0)
RESULTS = ROOT / "bench" / "results"


class Size(NamedTuple):
    """Channels of the first layer, features, how many times as long it learns, and whether it starts from the weights
    of the teacher `majority`."""

    width: int
    features: int
    times: int = 1
    started: bool = False


STUDENTS = {
    "small": Size(4, 16),
    "wide": Size(*TRUNK),
    "wide, from the weights of a teacher": Size(*TRUNK, started=True),
    "wide, from the weights of a teacher, four times as long": Size(*TRUNK, times=4, started=True),
}


class Method(NamedTuple):
    """How cells are weighted, what the student sees, how images are drawn, and the weight of an MFD term. `stages`: in
    so many parts, and before each but the first the student is measured, too."""

    balancer: Callable[..., Balancer]
    seen: Acquisition | None = None
    resample: float = 0.0
    mfd: float = 0.0
    stages: int = 1


CELLS, INVERSE = balance.cells, balance.inverse_frequency
LABELS = partial(CELLS, by="labels")
OWN = partial(CELLS, borrow=0, tau=0.5, temperature=0.04)
METHODS = {
    "uniform": Method(balance.uniform),
    "inverse frequency": Method(INVERSE),
    "inverse frequency, tuned": Method(partial(INVERSE, power=0.25)),
    "resampling by group": Method(balance.uniform, resample=1.0),
    "group DRO, size-adjusted": Method(partial(balance.group_dro, adjustment=1.0)),
    "CVaR over groups": Method(balance.cvar),
    "UNIC dropping": Method(balance.teacher_dropping),
    "UNIC dropping, tuned": Method(partial(balance.teacher_dropping, p=0.25)),
    "AdaLoss": Method(balance.ada_loss),
    "AGRE": Method(partial(balance.agre, biased="majority")),
    "MFD": Method(balance.uniform, mfd=1.0),
    "MFD, weight 0.1": Method(balance.uniform, mfd=0.1),
    "MFD, tuned": Method(balance.uniform, mfd=0.03),
    "cells": Method(CELLS),
    "cells, by labels": Method(LABELS),
    "cells, by views": Method(partial(CELLS, by="views")),
    "cells, fed back twice": Method(CELLS, stages=3),
    "cells, τ = 0.2": Method(partial(CELLS, tau=0.2)),
    "cells, borrowing alone": Method(partial(CELLS, tau=1e6, temperature=1e6)),
    "cells, nothing borrowed": Method(OWN),
    "cells, reliability alone": Method(partial(OWN, tau=1e6)),
    "cells, tilt alone": Method(partial(OWN, by="labels", temperature=1e6)),
    "cells + MFD, tuned": Method(CELLS, mfd=0.03),
    "cells, nothing borrowed, + MFD, weight 0.1": Method(OWN, mfd=0.1),
    "views": Method(balance.uniform, seen=ANY),
    "views + cells": Method(CELLS, seen=ANY),
    "views-unlike": Method(balance.uniform, seen=UNLIKE),
    "views-unlike + cells": Method(CELLS, seen=UNLIKE),
}
# The small student of these is trained several times for the same images.
OFTEN = (
    *("uniform", "inverse frequency, tuned", "MFD, tuned", "MFD, weight 0.1", "cells", "cells, nothing borrowed"),
    *("cells + MFD, tuned", "cells, nothing borrowed, + MFD, weight 0.1", "views", "views + cells"),
)
OURS = ("cells", "cells + MFD, tuned")
# What is chosen from, on validation.
GRID = {
    "uniform": Method(balance.uniform),
    **{f"cells, τ = {tau}": Method(partial(CELLS, tau=tau)) for tau in (0.2, 0.3, 0.5)},
    **{f"cells, temperature = {heat}": Method(partial(CELLS, temperature=heat)) for heat in (0.05, 0.5)},
    **{f"cells, neighbours = {number}": Method(partial(CELLS, borrow=number)) for number in (10, 90)},
    **{f"cells + MFD, weight {weight}": Method(CELLS, mfd=weight) for weight in (0.03, 0.1)},
    **{f"MFD, weight {weight}": Method(balance.uniform, mfd=weight) for weight in (0.03, 0.1, 0.3)},
    "cells, nothing borrowed": Method(OWN),
    **{f"cells, by labels, τ = {tau}": Method(partial(LABELS, tau=tau)) for tau in (0.3, 0.5)},
    **{f"cells, by labels, temperature = {heat}": Method(partial(LABELS, temperature=heat)) for heat in (0.05, 0.3)},
    **{f"inverse frequency, power {power}": Method(partial(INVERSE, power=power)) for power in (0.25, 0.5)},
    **{f"resampling by group, power {power}": Method(balance.uniform, resample=power) for power in (0.25, 0.5)},
    **{f"UNIC dropping, p = {p}": Method(partial(balance.teacher_dropping, p=p)) for p in (0.25, 0.5)},
}
OF_STUDENTS = {
    "small": tuple(METHODS),
    "wide": ("uniform", "views + cells"),
    "wide, from the weights of a teacher": (
        *("uniform", "MFD, weight 0.1", "cells", "cells + MFD, tuned", "views + cells"),
        *("cells, nothing borrowed", "cells, nothing borrowed, + MFD, weight 0.1"),
    ),
    "wide, from the weights of a teacher, four times as long": (
        *("uniform", "cells, nothing borrowed, + MFD, weight 0.1"),
    ),
}
IN_ALL = ("uniform", "cells")
IN_CASES = {
    "20 % wrong annotations": ("cells, by labels", "cells, nothing borrowed", "MFD, weight 0.1"),
    "a group of noise": ("cells, by labels", "group DRO, size-adjusted"),
}
IN_B = ("uniform", "inverse frequency", "group DRO, size-adjusted", "UNIC dropping", "cells", "views + cells")


class Student(nn.Module):
    """The trunk, and one head for each teacher."""

    def __init__(self, size: Size, dims: dict[str, int]) -> None:
        super().__init__()
        self.trunk = Trunk(size.width, size.features)
        self.heads = nn.ModuleDict({name: Head(size.features, dim, 64, 0) for name, dim in dims.items()})

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        summary_BD = self.trunk(pixels_BCHW)
        return summary_BD, {name: head(summary_BD) for name, head in self.heads.items()}


def probed(m: Material, features_ND: Tensor) -> np.ndarray:
    """The probabilities (N, L) of a linear probe, fitted on train, its strength chosen on val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    fit, val = m.fit.numpy(), m.val.numpy()
    y_N = m.label_NL.argmax(1).numpy() if m.classes else m.label_NL[:, 0].numpy()
    x_ND = features_ND.double().numpy()
    x_ND = (x_ND - x_ND[fit].mean(0)) / (x_ND[fit].std(0) + 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 150 steps are close enough to the optimum
        strengths = (1e-2, 1e-1, 1) if m.classes else (1e-4, 1e-3, 1e-2, 1e-1)
        models = [LogisticRegression(C=c, max_iter=150).fit(x_ND[fit], y_N[fit]) for c in strengths]
    best = min(models, key=lambda one: log_loss(y_N[val], one.predict_proba(x_ND[val]), labels=one.classes_))
    return best.predict_proba(x_ND)[:, 0 if m.classes else 1 :]


def on_validation(m: Material, of_predictors: list[np.ndarray]) -> Found:
    """How reliable probes are in each group, as agglom judges them."""
    score_LPN = torch.stack([torch.as_tensor(p_NL[m.val]) for p_NL in of_predictors]).permute(2, 0, 1)
    return judged(m.label_NL[m.val].T, score_LPN, m.patient_N[m.val], m.seen_N[m.val], m.values, LEAST)


def fitted(m: Material) -> dict[str, Affine]:
    """The normaliser of each teacher, of the train images."""
    moments = {name: Moments.empty(one.shape[1]).update(one[m.fit]) for name, one in m.raw.items()}
    return {name: normalise.fit("phi_s", one) for name, one in moments.items()}


def measured(lesson: Lesson, borrow: int) -> Measured:
    """What agglom measures of the cells before a stage, from the teachers' probes on validation and their twins, where
    targets of so many neighbours are borrowed (0: none)."""
    m, affines, goal, scored = lesson.m, lesson.affines, lesson.goal, lesson.probes.scored
    known_M = (m.seen_N[m.twin_M] >= 0) & (m.seen_N[m.twin_M] < len(m.values))
    twin_M = m.twin_M[known_M]
    group_M = m.seen_N[twin_M]
    found = on_validation(m, [scored[name] for name in m.raw])
    count_G = torch.bincount(group_M, minlength=len(m.values))
    speaks_GG = cells.speakers(m.values, count_G, ENOUGH)
    noise_GT, spread_GT = (torch.zeros(len(m.values), len(m.raw), dtype=torch.float64) for _ in range(2))
    clean = {name: one_ND[twin_M] for name, one_ND in goal.items()}
    twin = {name: normalise.apply(affine, m.twin_raw[name][known_M]) for name, affine in affines.items()}
    lends_M = m.seen_N[m.fit]
    bank = Bank(lends_M, {name: one_ND[m.fit] for name, one_ND in goal.items()})
    judged_GP = (found.patients_G >= LEAST)[:, None].expand_as(found.shrunk_GP)
    lends_G = torch.bincount(lends_M[(lends_M >= 0) & (lends_M < len(m.values))], minlength=len(m.values))
    loans = borrowing.loans(found.shrunk_GP, judged_GP, lends_G) if borrow else ()
    if loans:
        asks_NJ = borrowing.borrowers(lesson.sure_NS, lesson.group_N, loans)
        lend = borrowing.lender(loans, tuple(goal), bank, borrow, asks_NJ)
        clean, twin = lend(clean, twin_M), lend(twin, twin_M)
    for column, name in enumerate(goal):
        for group, speaks_G in enumerate(speaks_GG > 0):
            mine = torch.nonzero(speaks_G[group_M])[:, 0]
            noise_GT[group, column] = losses.mse(clean[name][mine], twin[name][mine]).mean() / 2
            spread_GT[group, column] = losses.mse(clean[name][mine], clean[name][mine].roll(1, 0)).mean() / 2
    unknown_G = torch.full((len(m.values),), torch.nan, dtype=torch.float64)
    return Measured(
        found.shrunk_GP, found.raw_GP, found.pooled_P, unknown_G, noise_GT, spread_GT, loans=loans, bank=bank
    )


def held_out(m: Material, raw_ND: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What a teacher's probe says (V, L) of validation images, and (X, L) of train images, out of fold. For speed it
    has one strength and reads 128 principal components."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    fit, val = m.fit.numpy(), m.val.numpy()
    y_N = (m.label_NL.argmax(1) if m.classes else m.label_NL[:, 0]).numpy()
    folds = {} if m.classes else {"cv": GroupKFold(), "groups": m.patient_N.numpy()[fit]}
    first, strength = (0, 0.1) if m.classes else (1, 1e-3)
    x_ND = raw_ND.double() - raw_ND[m.fit].double().mean(0)
    x_ND = x_ND @ torch.linalg.eigh(torch.cov(x_ND[m.fit].T))[1][:, -128:]
    x_ND = (x_ND / (x_ND[m.fit].std(0) + 1e-9)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `probed`
        model = LogisticRegression(C=strength, max_iter=100)
        p_XL = cross_val_predict(model, x_ND[fit], y_N[fit], method="predict_proba", **folds)[:, first:]
        return model.fit(x_ND[fit], y_N[fit]).predict_proba(x_ND[val])[:, first:], p_XL


class Probes:
    """Of the teachers; cases with the same features, labels and parts share them."""

    def __init__(self, m: Material) -> None:
        self.m = m

    def serve(self, m: Material) -> bool:
        return all(getattr(self.m, name) is getattr(m, name) for name in ("raw", "label_NL", "patient_N", "fit", "val"))

    @cached_property
    def scored(self) -> dict[str, np.ndarray]:
        return {name: probed(self.m, one_ND) for name, one_ND in self.m.raw.items()}

    @cached_property
    def held_out(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [held_out(self.m, one_ND) for one_ND in self.m.raw.values()]


def sure(m: Material, probes: Probes) -> Tensor:
    """The probability (N, S) that a teacher's probe is right on a train image, as agglom finds it; NaN elsewhere."""
    told_V, told_X = m.seen_N[m.val].numpy(), m.seen_N[m.fit].numpy()
    y_VL, prevalence_L = m.label_NL[m.val].numpy(), m.label_NL[m.fit].mean(0).tolist()
    found = torch.full((len(m.seen_N), len(m.raw)), torch.nan)
    for column, (p_VL, p_XL) in enumerate(probes.held_out):
        of_labels = [
            confidence.right(p_V, y_V, told_V, p_X, told_X, len(m.values), prevalence)
            for p_V, y_V, p_X, prevalence in zip(p_VL.T, y_VL.T, p_XL.T, prevalence_L, strict=True)
        ]
        found[m.fit, column] = torch.as_tensor(np.mean(of_labels, 0)).float()
    return found


def views(m: Material, acquisition: Acquisition, seed: int) -> Tensor:
    """VIEWS simulated acquisitions of each image, (VIEWS, N, 1, H, W); of images that are not of train, the images."""
    taken = m.pixels_NCHW[None].repeat(VIEWS, 1, 1, 1, 1)
    for view, row in itertools.product(range(VIEWS), m.fit.tolist()):
        taken[view, row] = simulated(m.pixels_NCHW[row], acquisition, view_random(seed, row, view))
    return taken


def drawn(m: Material, method: Method, batch: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Rows of each batch: epoch by epoch, or with replacement where groups are to be as frequent."""
    if method.resample:
        weight_N = torch.as_tensor(tempered(m.seen_N[m.fit].numpy(), method.resample))
        while True:
            yield m.fit[torch.multinomial(weight_N, batch, replacement=True, generator=draw)]
    while True:
        order = m.fit[torch.randperm(len(m.fit), generator=draw)]
        yield from (rows_B for rows_B in order.split(batch) if len(rows_B) == batch)


class Lesson:
    """A setting or a case of it: the targets (N, D) of each teacher, and what takes time and is made once."""

    def __init__(self, m: Material, probes: Probes) -> None:
        self.m, self.probes, self.affines = m, probes, fitted(m)
        self.goal = {name: normalise.apply(affine, m.raw[name]) for name, affine in self.affines.items()}
        self.made: dict[tuple[Any, ...], Any] = {}

    def once(self, *key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def known(self, balancer: Callable[..., Balancer]) -> Measured:
        """What is measured for a balancer that asks for it."""
        borrow = option(balancer, "borrow") if (by_images := option(balancer, "by") == "images") else 0
        found = self.once("known", borrow, make=lambda: measured(self, borrow))
        return replace(found, sure_NS=self.sure_NS) if by_images else found

    @cached_property
    def sure_NS(self) -> Tensor:
        return sure(self.m, self.probes)

    @property
    def group_N(self) -> Tensor:
        """Those that methods are told of, −1 for others."""
        return torch.where(self.m.seen_N < len(self.m.values), self.m.seen_N, -1)

    def lent(self, balancer: Callable[..., Balancer], lend: Lend) -> dict[str, Tensor]:
        """The targets, with what train images borrow."""

        def make() -> dict[str, Tensor]:
            whole = {name: one_ND.clone() for name, one_ND in self.goal.items()}
            for rows in self.m.fit.split(500):
                told = lend({name: one_ND[rows] for name, one_ND in self.goal.items()}, rows)
                for name, one_BD in told.items():
                    whole[name][rows] = one_BD
            return whole

        return self.once("lent", option(balancer, "borrow"), make=make)

    def views(self, acquisition: Acquisition, seed: int) -> Tensor:
        return self.once("views", acquisition, make=lambda: views(self.m, acquisition, seed))


def option(balancer: Callable[..., Balancer], name: str) -> Any:
    return signature(balancer).parameters[name].default


def train(lesson: Lesson, method: Method, size: Size, seed: int, steps: int, batch: int) -> tuple[Student, list[float]]:
    """One student, by the table of losses and the method's weights on one process; and the last weights of groups."""
    torch.manual_seed(seed + 2 * AGAIN)  # or it would start as a teacher did that was trained with this seed
    m, goal, names = lesson.m, lesson.goal, tuple(lesson.m.raw)
    known = lesson.known(method.balancer) if "measured" in signature(method.balancer).parameters else None
    model = Student(size, {name: one.shape[1] for name, one in goal.items()}).train()
    if size.started:
        model.trunk.load_state_dict(m.start)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    told_N = m.seen_N[m.fit]
    count_G = torch.bincount(told_N[told_N >= 0], minlength=len(m.values)).double()
    share_G = count_G / len(m.fit)
    if method.resample:
        share_G = (count_G > 0) * share_G.sum() / (count_G > 0).sum()
    more = {"groups": m.values, "teachers": names, "count_G": count_G, "group_N": lesson.group_N}
    facts = Cells(share_G, torch.arange(len(goal)), batch, len(m.fit), **more)

    def informed(known: Measured | None) -> Balancer:
        return method.balancer(cells=facts, **({"measured": known} if known else {}))

    balancer = informed(known)
    if balancer.lend is not None:
        goal = lesson.lent(method.balancer, balancer.lend)
    state, draw = balancer.init(), torch.Generator().manual_seed(seed)
    taken_VNCHW = None if method.seen is None else lesson.views(method.seen, seed % AGAIN)
    for step, row_B in enumerate(itertools.islice(drawn(m, method, batch, draw), steps)):
        if step and step % -(-steps // method.stages) == 0:
            lag = on_validation(m, [probed(m, summaries(m, model.eval()))]).shrunk_GP[:, 0]
            balancer = informed(known and replace(known, student_G=lag))
            model.train()
        optimizer.param_groups[0]["lr"] = schedule.lr(step, steps=steps, warmup=steps // 20, peak=PEAK, end=END)
        seen_BCHW, group_B = m.pixels_NCHW[row_B], m.seen_N[row_B]
        if taken_VNCHW is not None:
            view_B = torch.randint(VIEWS, (batch,), generator=draw)
            clean_B = torch.rand(batch, generator=draw) < 0.5
            seen_BCHW = torch.where(clean_B[:, None, None, None], seen_BCHW, taken_VNCHW[view_B, row_B])
        trunk_BD, predicted = model(seen_BCHW)
        loss_BT = torch.stack([losses.mse(predicted[name], one_ND[row_B]) for name, one_ND in goal.items()], 1)
        found = LossTable(loss_BT, torch.ones_like(loss_BT, dtype=torch.bool), trunk_BD, row_B)
        weight_BT = balancer.weigh(state, found, group_B, draw)
        total = losses.objective(found, weight_BT)
        if method.mfd:
            class_B = m.label_NL[row_B].argmax(1) if m.classes else m.label_NL[row_B, 0]
            asked = class_B, group_B, len(m.values), m.label_NL.shape[1] if m.classes else 2
            total = total + method.mfd * sum(losses.mfd(predicted[name], goal[name][row_B], *asked) for name in goal)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = balancer.update(state, groups.tally(group_B, loss_BT, found.valid_BT, len(m.values)))
    return model.eval(), (state["q_G"] / share_G).tolist() if "q_G" in state else []


@torch.no_grad()
def summaries(m: Material, model: Student) -> Tensor:
    return torch.cat([model(chunk)[0] for chunk in m.pixels_NCHW.split(500)])


def judge(m: Material, p_NL: np.ndarray, rows: Tensor) -> dict[str, Any]:
    """Accuracy of classes or AUROC of a label, in %, with the interval at 95 % over patients; `weight` is what it is
    of: images, or pairs of an image with and one without the label."""
    y_NL, p_NL = m.label_NL[rows], torch.as_tensor(p_NL[rows])
    if m.classes:
        # The share of images that are right is what a rate of selection is of them.
        right_N = (p_NL.argmax(1) == y_NL.argmax(1)).double()
        found = metrics.evaluate("selection_rate", right_N, right_N, m.patient_N[rows], threshold=0.5)
        weight = len(rows)
    else:
        found = metrics.evaluate("auroc", y_NL[:, 0], p_NL[:, 0], m.patient_N[rows], min_patients=1)
        weight = int((y_NL == 1).sum() * (y_NL == 0).sum())
    numbers = {"value": 100 * found.value, "lo": 100 * found.lo, "hi": 100 * found.hi}
    return numbers | {"weight": weight, "n": found.n, "status": found.status}


def rows_of(m: Material, p_NL: np.ndarray) -> Iterator[dict[str, Any]]:
    metric = "accuracy" if m.classes else "auroc"
    for index, group in enumerate(("all", *m.groups)):
        rows = m.test if group == "all" else m.test[m.group_N[m.test] == index - 1]
        if len(rows):
            yield {"group": group, "metric": metric} | judge(m, p_NL, rows)


class Task(NamedTuple):
    """One student to be trained."""

    setting: str
    case: str
    student: str
    method: str
    seed: int

    @property
    def steps(self) -> int:
        """None for a teacher, which is there already."""
        return STEPS[self.setting] * STUDENTS[self.student].times if self.student else 0

    @property
    def how(self) -> Method:
        return (GRID if self.case == TUNING else METHODS)[self.method]


def tasks(options: argparse.Namespace) -> Iterator[list[Task]]:
    """What is done in one go, a seed at a time; hard cases last."""
    seeds = range(FIRST, FIRST + options.seeds)
    if "tuning" in options.settings:
        for seed in TUNED_ON:
            yield [Task("A", TUNING, "small", method, one) for method in GRID for one in (seed, seed + AGAIN)]
    if "A" in options.settings:
        for seed in seeds:
            asked = [(student, method) for student in options.students for method in OF_STUDENTS[student]]
            first = [Task("A", "", *one, seed) for one in asked]
            more = [one for one in first if one.student == "small" and one.method in OFTEN]
            yield first + [one._replace(seed=seed + again * AGAIN) for again in range(1, options.times) for one in more]
    if "B" in options.settings:
        folds = range(FIRST, FIRST + FOLDS)
        yield from ([Task("B", "", "small", method, seed) for method in IN_B] for seed in folds)
    if "cases" in options.settings:
        for seed in seeds:
            hard = CASES.keys() - {"", TUNING}
            asked = [(case, method) for case in CASES if case in hard for method in (*IN_ALL, *IN_CASES.get(case, ()))]
            yield [Task("A", case, "small", method, seed) for case, method in asked]


def run(due: list[Task], options: argparse.Namespace) -> None:
    """All students of a seed in a setting, a line of --runs for each number."""
    setting, seed = due[0].setting, due[0].seed % AGAIN
    torch.set_num_threads(1)
    folder = options.runs.parent
    if setting == "A":
        base = fashion(seed, options.source, folder, HELD if due[0].case == TUNING else VAL)
    else:
        base = nih(seed, folder)
    lessons: dict[str, Lesson] = {}
    for task in due:
        started = time.perf_counter()
        if task.case not in lessons:
            m = CASES[task.case](base, seed)
            probes = next((one.probes for one in lessons.values() if one.probes.serve(m)), Probes(m))
            lessons[task.case] = Lesson(m, probes)
            teachers = {task._replace(method=f"teacher {name}", student="", seed=seed): name for name in m.raw}
            for one in teachers.keys() - finished(options.runs):
                keep(options.runs, one, [], rows_of(m, probes.scored[teachers[one]]))
        lesson = lessons[task.case]
        m = lesson.m
        size = STUDENTS[task.student]
        model, weights = train(lesson, task.how, size, task.seed, task.steps, BATCH[setting])
        rows = list(rows_of(m, probed(m, summaries(m, model))))
        keep(options.runs, task, weights, rows)
        said = "  ".join(f"{row['group']} {row['value']:.1f}" for row in rows[:3])
        print(f"{', '.join(map(str, filter(None, task)))}, {time.perf_counter() - started:.0f} s: {said}", flush=True)


def keep(path: Path, task: Task, weights: list[float], rows: Iterable[dict[str, Any]]) -> None:
    told = task._asdict() | {"steps": task.steps, "weights": [round(one, 3) for one in weights]}
    text = "".join(json.dumps(told | row) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(text)  # in one piece: a task is there with all of its rows, or not at all


def publish(options: argparse.Namespace) -> str:
    """Write the record of what has run so far; its text."""
    rows = stored(options.runs)
    command = f"OMP_NUM_THREADS=1 .venv/bin/python bench/fairness.py --seeds {options.seeds}"
    parts = [
        "# Ways to weigh the losses",
        f"Made by `{command}`, larger students by `--settings A --students …` ({versions()}). In %: accuracy in (A), "
        "AUROC in (B). Levels are of all students of a method ± standard error, changes are of pairs of students with "
        "the same images and initial weights, with intervals at 95 %; both by the jackknife over the seeds (Student's "
        "t), the students of one left out together. "
        "The seeds of (B) are five folds of the patients, each of whom is tested once; an AUROC compares images of the "
        "same fold, and as some folds hold most of the pairs of a group, its interval is rough.",
        (__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[0],
        "![minority against majority](fairness.svg)",
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    for setting, (case, student) in itertools.product(SETTINGS, itertools.product(CASES, STUDENTS)):
        by = chosen(rows, setting, case, student)
        if ("uniform", "all") not in by:
            continue
        methods = GRID if case == TUNING else METHODS
        head, *body = lines(by, methods)
        title = f"({setting}) {SETTINGS[setting]}, student: {student}" + (f"; {case}" if case else "")
        said = "; ".join(below(by, [one for one in methods if "cells" in one])) or "none was found"
        parts += [f"## {title}", table(head, body), f"Of `cells`, below uniform at 95 %: {said}."]
        if case == TUNING:
            parts.append(f"Chosen: {'; '.join(tuned(by, GRID, 'A'))}.")
        if (setting, case, student) == ("A", "", "small"):
            others = [one for one in METHODS if one not in OURS and METHODS[one].seen is None]
            head, *body = duels(by, OURS, others)
            parts += [
                "By how many points ours are better than the others, with the interval at 95 %:",
                table(head, body),
            ]
            plot(by, METHODS, options.results / "fairness.svg")
    text = "\n\n".join(parts) + "\n"
    (options.results / "fairness.md").write_text(text, encoding="utf-8")
    write_json(options.json, {"versions": versions(), "rows": rows})
    return text


def stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def finished(path: Path) -> set[Task]:
    return {Task(*(row[key] for key in Task._fields)) for row in stored(path)}


def main() -> None:
    cli = parser(__doc__ or "")
    cli.set_defaults(json=RESULTS / "fairness.json")
    cli.add_argument("--source", type=Path, default=simulate.FASHION, help=f"(default {simulate.FASHION})")
    cli.add_argument("--seeds", type=int, default=5, help=f"from {FIRST} on (default 5)")
    cli.add_argument("--times", type=int, default=3, help="students of some methods for the same images (default 3)")
    cli.add_argument("--students", nargs="+", choices=STUDENTS, default=["small"], help="of (A) (default small)")
    whole = ["tuning", "A", "cases", "B"]
    cli.add_argument("--settings", nargs="+", choices=whole, default=whole, help="(default all)")
    cli.add_argument("--runs", type=Path, default=ROOT / "out" / "fairness.jsonl", help="(default out/fairness.jsonl)")
    cli.add_argument("--results", type=Path, default=RESULTS, help="folder of the record (default bench/results)")
    cli.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each (default 2)")
    options = cli.parse_args()
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    done = finished(options.runs)
    due = [[task for task in several if task not in done] for several in tasks(options)]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        waiting = [pool.submit(run, several, options) for several in due if several]
        for one in waiting:
            one.result()
            publish(options)
    print(publish(options))


if __name__ == "__main__":
    main()
