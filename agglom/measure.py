"""What the last evaluation found, as the weights of the next stage see it: `core.cells.Measured` of a run.

Reliability comes from the scores of validation patients that are stored with the report before a stage, image by image
with probes of train images beside them (`agglom.confidence`); the report shows what sets a weight, of images the mean
in each group. Noise and spread come from one pass over a few train images. Both are
written down, so that a resumed run goes on with the same bits.

Shape suffixes: G groups, S teachers, T columns of the loss table, N scored rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from agglom import confidence, plugins, scores, targets
from agglom.assemble import Run, batches
from agglom.core import borrowing, cells, groups, losses, metrics
from agglom.core.borrowing import Bank, Lend, Loan
from agglom.core.cells import Measured
from agglom.core.metrics import Estimate
from agglom.core.types import Features
from agglom.errors import CacheError
from agglom.job import Acquisition, Views
from agglom.scores import Scores
from agglom.survey import Survey
from agglom.targets import Normaliser

# Train images of a group that tell its noise and its spread, and how many pairs are enough for it to have its own.
IMAGES, ENOUGH = 64, 8
# How a view differs from its image: by what a device does to it that leaves alone what it shows.
NUISANCE = Views(kinds=Acquisition(blur=0.5, resolution=0.5, contrast=0.5, noise=0.5), share=1.0)
# Half the width of an interval at 95 % in standard errors.
Z = 1.96


def wanted(run: Run) -> bool:
    """Whether the balancer asks for what is measured."""
    return bool(plugins.takes(run.job.balance.kind, "balancers", "measured"))


def before(
    run: Run, stage: str, last: str, normalisers: Mapping[str, Normaliser], surveyed: Survey | None
) -> Measured | None:
    """What is known before `stage`, after the report of the stage `last`: on every rank, on its device.

    None where the balancer does not ask for it. `surveyed` is of rank 0.
    """
    if not wanted(run):
        return None
    world, stored = run.world, partial(_stored, run, identity=run.trained)
    known = world.broadcast(world.on_main(lambda: stored(stage)))
    bank: Bank | None = None
    if known is None:
        # Teachers are frozen: what was measured before the first stage holds for all, but for what is borrowed.
        first = run.plan.stages[0].name
        known = world.broadcast(world.on_main(lambda: stored(first))) or _of_teachers(run, last, surveyed)
        if "noise_GT" not in known or _loans(run, stage, known) != _loans(run, first, known):
            bank = _bank(run, stage, known, surveyed)
            known |= _floors(run, stage, known, bank, normalisers)
        known |= world.broadcast(world.on_main(lambda: _of_student(run, last)) or {})
        world.on_main(lambda: _save(run, stage, known))
    here = {one.name: known[one.name].to(world.device) for one in fields(Measured) if one.name in known}
    bank = bank or _bank(run, stage, known, surveyed)
    return Measured(**here, loans=_loans(run, stage, known), bank=bank)


def reasons(run: Run, stage: str) -> dict[str, Any] | None:
    """What was known when a stage began, for its report (`weights`); None where the balancer does not ask for it."""
    known = _stored(run, stage, run.identity) if wanted(run) else None
    if known is None:
        return None
    steady_GS, _ = cells.steadiness(known["noise_GT"], known["spread_GT"], losses.teacher_index(run.columns))
    right_GS = torch.full_like(known["raw_GS"], torch.nan)
    if by_images := "sure_NS" in known:
        right_GS = cells.on_average(known["sure_NS"].double(), run.balance_space.index_N, right_GS)
    return {
        "stage": stage,
        "teachers": teachers(run),
        "n_patients": known["patients_G"].tolist(),
        "min_support": int(known["least"]),
        "auroc": known["raw_GS"].tolist(),
        "shrunk": known["right_GS"].tolist(),
        "right": right_GS.tolist() if by_images else None,
        "student": known["student_G"].tolist(),
        "noise": torch.where(known["noise_GT"].any(1, keepdim=True), 1 - steady_GS, torch.nan).tolist(),
        "borrowed": _borrowed(run, stage, known),
    }


def _borrowed(run: Run, stage: str, known: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Who borrows what in a stage, by name."""
    names, space = teachers(run), run.balance_space
    train_N = torch.as_tensor(run.manifest.rows("train"))
    group_N, told = space.index_N[train_N], []
    for loan in _loans(run, stage, known):
        asks_N1 = borrowing.borrowers(known["sure_NS"][train_N], group_N, [loan])
        told.append(
            {
                "teacher": names[loan.teacher],
                "groups": [space.values[group] for group in loan.to],
                "by": [names[one] for one in loan.by],
                "of": [space.values[group] for group in loan.of],
                "images": int(asks_N1.sum()),
                "of_images": int(borrowing.among(group_N, loan.to).sum()),
            }
        )
    return told


def _path(run: Run, stage: str) -> Path:
    return run.out / "measured" / f"{stage}.safetensors"


def _stored(run: Run, stage: str, identity: Mapping[str, str]) -> dict[str, Tensor] | None:
    try:
        return targets.read(_path(run, stage), identity)
    except CacheError:
        return None


def _save(run: Run, stage: str, known: Mapping[str, Tensor]) -> None:
    path = _path(run, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    save_file({key: value.contiguous() for key, value in known.items()}, beside, metadata=run.trained)
    beside.replace(path)


def _of_teachers(run: Run, last: str, surveyed: Survey | None) -> dict[str, Tensor]:
    """How reliable they are: the numbers of rank 0, which a resumed run reads, on every rank."""

    def read() -> dict[str, Tensor]:
        names, (_, group_M) = teachers(run), _lending(run, cast(Survey, surveyed))
        found = of_scores(run, _scores(run, last), [f"teacher/{name}" for name in names])
        known = {"right_GS": found.shrunk_GP, "right_S": found.pooled_P, "raw_GS": found.raw_GP}
        known["lends_G"] = torch.bincount(group_M[group_M >= 0], minlength=len(run.balance_space.values))
        known |= {"patients_G": found.patients_G, "least": torch.tensor(run.job.data.min_support)}
        if _option(run, "by") == "images":
            known["sure_NS"] = confidence.measure(run, cast(Survey, surveyed), names)
        return known

    return cast(dict[str, Tensor], run.world.broadcast(run.world.on_main(read)))


def _option(run: Run, name: str) -> Any:
    return plugins.given(run.job.balance.kind, "balancers", run.job.balance.options, name)


def _lending(run: Run, surveyed: Survey) -> tuple[Tensor, Tensor]:
    """Which rows of the survey may lend, those of train (bool), and their groups."""
    train_N = torch.as_tensor(run.manifest.split_N[surveyed.rows_N] == "train")
    return train_N, run.balance_space.index_N[torch.as_tensor(surveyed.rows_N)][train_N]


def _loans(run: Run, stage: str, known: Mapping[str, Tensor]) -> tuple[Loan, ...]:
    """What is borrowed in a stage, among its teachers, by groups of enough patients to be judged by themselves.

    A specialist has no part: whom it serves may be another matter than the groups that are weighed.
    """
    if not (_option(run, "borrow") or 0) > 0 or "sure_NS" not in known or not run.job.loss.summary_weight:
        return ()
    (active,) = (one.teachers for one in run.plan.stages if one.name == stage)
    taking_part_S = torch.tensor([name in active and name not in run.served for name in teachers(run)])
    judged_G1 = (known["patients_G"] >= known["least"])[:, None]
    return borrowing.loans(known["right_GS"], judged_G1 & taking_part_S, known["lends_G"])


def _bank(run: Run, stage: str, known: Mapping[str, Tensor], surveyed: Survey | None) -> Bank | None:
    """What the loans of a stage are taken from, on every rank and its device. A collective where there are any."""
    given, names = _loans(run, stage, known), teachers(run)
    if not given:
        return None

    def read() -> Bank:
        pools = cast(Survey, surveyed).pools
        train_N, group_M = _lending(run, cast(Survey, surveyed))
        asked = {names[one] for loan in given for one in (loan.teacher, *loan.by)}
        return Bank(group_M, {name: cast(Tensor, pools[name].summary_ND)[train_N] for name in sorted(asked)})

    return cast(Bank, run.world.broadcast(run.world.on_main(read))).to(run.world.device)


def _floors(
    run: Run, stage: str, known: Mapping[str, Tensor], bank: Bank | None, normalisers: Mapping[str, Normaliser]
) -> dict[str, Tensor]:
    lend = None
    if bank is not None:
        given = _loans(run, stage, known)
        asks_NJ = borrowing.borrowers(known["sure_NS"], run.balance_space.index_N, given).to(run.world.device)
        lend = borrowing.lender(given, tuple(teachers(run)), bank, _option(run, "borrow"), asks_NJ)
    noise_GT, spread_GT = floors(run, normalisers, lend)
    return {"noise_GT": noise_GT.cpu(), "spread_GT": spread_GT.cpu()}


def _of_student(run: Run, last: str) -> dict[str, Tensor]:
    return {"student_G": of_scores(run, _scores(run, last), ["student"]).shrunk_GP[:, 0]}


def _scores(run: Run, stage: str) -> Scores:
    """Those that were stored with the report of a stage; of nobody where there are no labels."""
    path = run.out / "reports" / f"{stage}.scores.parquet"
    if path.is_file():
        return scores.load(path, run.manifest, run.manifest.labels)
    return Scores((), (), (), np.zeros(0, np.int64), np.zeros((0, 0, 0)))


class Found(NamedTuple):
    """AUROC on validation, the mean over labels: of each predictor in each group, and shrunk; over everybody. And the
    patients of each group."""

    raw_GP: Tensor
    shrunk_GP: Tensor
    pooled_P: Tensor
    patients_G: Tensor


def of_scores(run: Run, found: Scores, names: Sequence[str]) -> Found:
    """How reliable the linear probes of some predictors are on validation. A specialist is judged on whom it serves."""
    manifest, space = run.manifest, run.balance_space
    mine_N = manifest.split_N[found.rows_N] == "val"
    rows_N = torch.as_tensor(found.rows_N[mine_N])
    score_LPN = torch.full((len(found.labels), len(names), len(rows_N)), torch.nan, dtype=torch.float64)
    for label, score_PN in zip(found.labels, score_LPN, strict=True):
        for name, score_N in found.of("linear", label).items():
            if name in names:
                score_PN[names.index(name)] = torch.as_tensor(score_N[mine_N])
    for index, name in enumerate(names):
        if (served_N := run.served.get(name.removeprefix("teacher/"))) is not None:
            score_LPN[:, index, ~served_N[rows_N]] = torch.nan
    columns = [manifest.labels.index(label) for label in found.labels]
    label_LN = torch.as_tensor(manifest.label_NL[rows_N][:, columns].T).double()
    patient_N = torch.as_tensor(manifest.patient_N)[rows_N]
    least = run.job.data.min_support
    return judged(label_LN, score_LPN, patient_N, space.index_N[rows_N], space.values, least)


def judged(
    label_LN: Tensor, score_LPN: Tensor, patient_N: Tensor, group_N: Tensor, values: tuple[str, ...], least: int
) -> Found:
    """AUROC of predictors by group, the mean over labels; NaN is a label or a score that is not known.

    Of each label the groups are shrunk towards everybody (`core.cells.shrunk`); one of fewer than `least` patients is
    looked at with its parents (`core.cells.speakers`). NaN where no label has both classes.
    """
    patients_G = torch.tensor([len(patient_N[group_N == group].unique()) for group in range(len(values))])
    speaks_GG = cells.speakers(values, patients_G, least) > 0
    everybody_N = torch.ones_like(group_N, dtype=torch.bool)
    members = [everybody_N, *(torch.cat([one_G, one_G.new_zeros(1)])[group_N] for one_G in speaks_GG)]

    def auroc(y_N: Tensor, p_N: Tensor) -> list[tuple[float, float]]:
        """Value and standard error of everybody, then of each group."""
        known_N = ~(torch.isnan(y_N) | torch.isnan(p_N))
        kept = [member_N & known_N for member_N in members]
        return [_auroc(metrics.evaluate("auroc", y_N[one], p_N[one], patient_N[one], min_patients=1)) for one in kept]

    of_labels = [torch.full((2 * len(members) - 1, score_LPN.shape[1]), torch.nan, dtype=torch.float64)]
    for y_N, score_PN in zip(label_LN, score_LPN, strict=True):
        table = torch.tensor([auroc(y_N, p_N) for p_N in score_PN], dtype=torch.float64)
        value_MP, error_MP = table.permute(2, 1, 0)
        of_labels.append(torch.cat([value_MP, cells.shrunk(value_MP[1:], error_MP[1:], value_MP[0])]))
    mean = torch.stack(of_labels).nanmean(0)
    return Found(mean[1 : len(members)], mean[len(members) :], mean[0], patients_G)


def _auroc(found: Estimate) -> tuple[float, float]:
    """Value and standard error; one score for all puts nobody before another, as one drawn at random for each patient
    does: ½, with the error of the rank-sum test, larger by as much as there are more images than patients."""
    if found.status == "constant_score":
        clustered = found.n / found.n_patients
        return 0.5, math.sqrt(clustered * (found.n + 1) / (12 * found.n_pos * found.n_neg))
    return found.value, (found.hi - found.lo) / (2 * Z)


def floors(run: Run, normalisers: Mapping[str, Normaliser], lend: Lend | None = None) -> tuple[Tensor, Tensor]:
    """Noise and spread of each cell (G, T), without static weights: half the mean loss between the targets of an image
    and of its simulated acquisition, and of two images of the group, on at most IMAGES train images of each group;
    `lend`: with what is borrowed in its place.

    Of squared errors that is the variance within an image and between images. A group of fewer than ENOUGH pairs is
    spoken for by its parents. A cell that no teacher serves: noise 0 and spread 1.
    """
    space, train_N, names = run.balance_space, run.manifest.rows("train"), teachers(run)
    draw, group_N, device = np.random.default_rng(run.job.seed), space.index_N.numpy(), run.world.device
    of_group = [train_N[group_N[train_N] == group] for group in range(len(space.values))]
    rows_N = np.concatenate([draw.permutation(rows)[:IMAGES] for rows in of_group])
    columns = tuple(column._replace(weight=1.0) for column in run.columns)
    kinds = {"summary": run.job.loss.summary, "patches": run.job.loss.patches}
    dispersion = {name: one.dispersion for name, one in normalisers.items() if one.dispersion is not None}
    everybody_N = torch.ones_like(space.index_N, dtype=torch.bool)
    served = {name: run.served.get(name, everybody_N) for name in names}
    empty_GT = torch.zeros(len(space.values) + 1, len(columns), dtype=torch.float64, device=device)
    sums = [empty_GT.clone() for _ in range(4)]  # of noise and its images, of spread and its pairs
    for mine, batch in batches(run, rows_N, run.plan.evaluate_size, NUISANCE):
        if batch is None:
            continue
        row_B = torch.as_tensor(mine)
        raw = [
            targets.encode(run.teachers, names, pixels_BCHW.to(device))
            for pixels_BCHW in (batch.pixels_BCHW, cast(Tensor, batch.student_BCHW))
        ]
        next_B = torch.arange(1, len(mine) + 1) % len(mine)
        group_B = space.index_N[row_B]
        if lend is not None:
            raw = [targets.lent(features, lend, row_B.to(device)) for features in raw]
        clean, seen = ({name: normalisers[name](one) for name, one in features.items()} for features in raw)
        alike_B = (group_B == group_B[next_B]) & (next_B > 0)
        taught = {name: served_N[row_B] for name, served_N in served.items()}
        paired = {name: mask_B & mask_B[next_B] & alike_B for name, mask_B in taught.items()}
        other = {name: _rows(features, next_B) for name, features in clean.items()}
        found: list[Tensor] = []
        for partner, masks in ((seen, taught), (other, paired)):
            present = {name: mask_B.to(device) for name, mask_B in masks.items()}
            table = losses.table(columns, clean, partner, present, **kinds, dispersion=dispersion)
            found += groups.tally(group_B.to(device), table.loss_BT, table.valid_BT, len(space.values))
        sums = [total + part for total, part in zip(sums, found, strict=True)]
    noise_GT, images_GT, spread_GT, pairs_GT = (run.world.sum(one)[:-1] for one in sums)
    speaks_GG = cells.speakers(space.values, pairs_GT.amax(1), ENOUGH)
    noise_GT, images_GT, spread_GT, pairs_GT = (speaks_GG @ one for one in (noise_GT, images_GT, spread_GT, pairs_GT))
    known_GT = (images_GT > 0) & (pairs_GT > 0)
    noise_GT = torch.where(known_GT, noise_GT / images_GT.clamp(min=1) / 2, 0.0)
    return noise_GT, torch.where(known_GT, spread_GT / pairs_GT.clamp(min=1) / 2, 1.0)


def teachers(run: Run) -> list[str]:
    """Those of the loss table, in the order of its columns."""
    return list(dict.fromkeys(column.teacher for column in run.columns))


def _rows(features: Features, rows_B: Tensor) -> Features:
    summary, patches, grid = features[:3]
    return Features(None if summary is None else summary[rows_B], None if patches is None else patches[rows_B], grid)
