"""The resolution sweep: the student and its teachers at other image sizes than those of the evaluation.

A student may learn at one size to be like one teacher and at another like another (mode switching: the zero-shot
accuracy of RADIOv2.1 is 82.9 at 512 px and 1.3 at 768 px, arXiv 2412.07679). So at each of `evaluate.sizes`, and for
comparison at the size of the evaluation itself, all are shown the held-out sample: how much of each teacher's features
at that size the student leaves unexplained, and what the linear probes that were fitted at the size of the evaluation
make of the summaries.

Nothing of it is kept but errors and summaries: at several sizes the patches of all teachers would fill the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from agglom import plan, targets, unexplained
from agglom.assemble import Run, batches, gathered
from agglom.core import metrics
from agglom.core.heads import Distiller
from agglom.core.types import Features
from agglom.errors import DataError
from agglom.job import Size, show_size
from agglom.reading import Place, Row
from agglom.samples import Settings, row
from agglom.survey import Survey, chosen_rows, on_cpu
from agglom.targets import Normaliser

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Guess:
    """What can be said of a teacher's features at a size without an image, from train images: the mean per position,
    the mean summary and the mean direction of the summaries, all raw. None of a specialist that serves none of them."""

    patches_ND: Tensor | None
    summary_D: Tensor | None
    direction_D: Tensor | None


@dataclass(frozen=True)
class Look:
    """The held-out sample at one size: raw summaries (M, D) by predictor; by (teacher, kind) the errors of the student
    and of the guess (M), and how the teacher saw the images."""

    size: Size
    summaries: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)


def looks(
    run: Run, surveyed: Survey | None, normalisers: Mapping[str, Normaliser], student: Distiller | None
) -> list[Look]:
    """What is seen at each size, on rank 0; every rank takes part. Without a student, the teachers' summaries alone.

    Raises DataError where the features of a teacher are not finite, on every rank alike.
    """
    if student is not None:
        student = copy.deepcopy(student).to(run.world.device).eval()
    elif not run.manifest.labels:
        return []
    found = []
    for size in plan.sweep_sizes(run.plan, run.job):
        guesses = {} if surveyed is None else surveyed.guesses
        if student is not None and not run.world.broadcast(size in guesses):
            guesses[size] = _guesses(run, size)
        found.append(_look(run, size, guesses.get(size, {}), normalisers, student))
    return found


Piece = tuple[np.ndarray, dict[str, Features], Features | None, dict[str, Features]]


@torch.no_grad()
def _pieces(run: Run, names: list[str], rows: np.ndarray, size: Size, student: Distiller | None) -> Iterator[Piece]:
    """On rank 0: rows, the features of the teachers, and of the student its own and what it predicts of them."""

    def mine() -> Iterator[Piece | None]:
        for rows_B, batch in batches(run, rows, size):
            if batch is None:
                yield None
                continue
            pixels_BCHW = batch.pixels_BCHW.to(run.world.device)
            seen = targets.encode(run.teachers, names, pixels_BCHW)
            trunk, predicted = (None, {}) if student is None else student(pixels_BCHW)
            yield (
                rows_B,
                {name: on_cpu(features) for name, features in seen.items()},
                None if trunk is None else on_cpu(trunk._replace(patches_BND=None)),
                {name: on_cpu(features) for name, features in predicted.items()},
            )

    # A rank 0 that fails alone would leave the others waiting: the error is kept until the stream ends.
    failure: Exception | None = None
    for piece in gathered(run, mine()):
        for name, features in piece[1].items():
            for kind, tensor in (("summary", features.summary_BD), ("patches", features.patches_BND)):
                if tensor is not None and not torch.isfinite(tensor).all():
                    failure = failure or DataError(
                        f"teachers.{name}: its {kind} features are not finite at {show_size(size)} px; take this size "
                        "out of evaluate.sizes"
                    )
        if failure is None:
            yield piece
    run.world.agree(failure)


def _guesses(run: Run, size: Size) -> dict[str, Guess]:
    """Measured on as many train images as the sample may have held-out ones; of a specialist, on those it serves."""
    names, most = list(run.targets), run.job.evaluate.fvu_images
    rows = np.intersect1d(chosen_rows(run)[0], run.manifest.rows("train"))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(run.job.seed).choice(rows, most, replace=False))
    summaries: dict[str, list[Tensor]] = {name: [] for name in names}
    sums: dict[str, Tensor] = {}
    images = dict.fromkeys(names, 0)
    for rows_B, seen, _, _ in _pieces(run, names, rows, size, None):
        for name, features in seen.items():
            served_B = _served(run, name, rows_B)
            images[name] += int(served_B.sum())
            if features.summary_BD is not None:
                summaries[name].append(features.summary_BD[served_B].double())
            if features.patches_BND is not None:
                total_ND = features.patches_BND[served_B].double().sum(0)
                sums[name] = sums[name] + total_ND if name in sums else total_ND
    guesses = {}
    for name in names if run.world.main else ():
        summary_ND = torch.cat(summaries[name]) if summaries[name] and images[name] else None
        guesses[name] = Guess(
            (sums[name] / images[name]).float() if name in sums and images[name] else None,
            None if summary_ND is None else summary_ND.mean(0).float(),
            None if summary_ND is None else torch.nn.functional.normalize(summary_ND, dim=-1).mean(0).float(),
        )
    return guesses


def _served(run: Run, name: str, rows: np.ndarray) -> Tensor:
    return run.served[name][torch.as_tensor(rows)] if name in run.served else torch.ones(len(rows), dtype=torch.bool)


def _look(
    run: Run,
    size: Size,
    guesses: Mapping[str, Guess],
    normalisers: Mapping[str, Normaliser],
    student: Distiller | None,
) -> Look:
    names = list(run.teachers) if run.manifest.labels else list(run.targets)
    summaries: dict[str, list[Tensor]] = {}
    errors: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    told: dict[str, str] = {}
    applied = {name: normaliser.to(CPU) for name, normaliser in normalisers.items()}
    for _, seen, trunk, predicted in _pieces(run, names, chosen_rows(run)[1], size, student):
        known = {"student": trunk} if trunk is not None else {}
        known |= {f"teacher/{name}": features for name, features in seen.items()}
        for predictor, features in known.items():
            if features.summary_BD is not None:
                summaries.setdefault(predictor, []).append(features.summary_BD)
        for name, guess in predicted.items():
            for kind, pair_B in _errors(run, guess, seen[name], guesses[name], applied[name]):
                errors.setdefault((name, kind), []).append(pair_B)
            learnt = guess.grid if guess.patches_BND is not None else None
            told[name] = targets.told(run.teachers[name].pixels, size, learnt)
    return Look(
        size,
        {predictor: torch.cat(parts) for predictor, parts in summaries.items()},
        {key: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for key, parts in errors.items()},
        told,
    )


def _errors(
    run: Run, predicted: Features, raw: Features, guess: Guess, normaliser: Normaliser
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    if predicted.patches_BND is not None and guess.patches_ND is not None:
        yield "patches", unexplained.patches(predicted, raw, guess.patches_ND, normaliser)
    if predicted.summary_BD is None or raw.summary_BD is None or guess.summary_D is None or guess.direction_D is None:
        return
    mean_D, applied = guess.direction_D, None
    if run.job.loss.normalises_summary:
        mean_D, applied = normaliser.of_summary(guess.summary_D), normaliser
    yield "summary", unexplained.summaries(predicted.summary_BD, raw.summary_BD, mean_D, applied)


def rows(run: Run, surveyed: Survey, found: list[Look], notes: list[str]) -> Iterator[Row]:
    """Of each size HxW: `sweep_fvu` of the student, target `teacher/kind@HxW`, the guess measured on train images at
    that size; `sweep_auroc` of student and teachers, target `HxW`, of the linear probe that was fitted at the size of
    the evaluation (`surveyed.readouts`). Adds to `notes` who is left out."""
    held_M = surveyed.held_M
    settings = Settings.of(run.job.data, run.job.evaluate, run.job.seed)
    judged = {name for look in found for name, _ in look.errors}
    notes += [
        f"{name} serves none of the train images that the sweep draws for its means, so it is left out there."
        for name in dict.fromkeys(name for look in found for name in look.told if name not in judged)
    ]
    for look in found:
        at = f"{look.size[0]}x{look.size[1]}"
        for (name, kind), errors in look.errors.items():
            asked = run, held_M, _served(run, name, held_M), *errors
            yield from unexplained.ratios(*asked, "sweep_fvu", f"{name}/{kind}@{at}", look.told[name])
        for label in run.manifest.labels:
            label_M = torch.as_tensor(run.manifest.label_NL[held_M, run.manifest.labels.index(label)]).double()
            for predictor, summary_MD in look.summaries.items():
                readout = surveyed.readouts.get((label, "linear", predictor))
                if readout is None or readout.read is None:
                    continue
                score_M = torch.as_tensor(readout.read(summary_MD))
                asked_M = ~label_M.isnan()
                if predictor != "student":
                    asked_M &= _served(run, predictor.removeprefix("teacher/"), held_M)
                for place, split, estimate in _aurocs(run, held_M, asked_M, label_M, score_M, settings):
                    more = {"label": label, "readout": "linear", "target": at}
                    yield row(predictor, "sweep_auroc", place, split, estimate, **more)


def _aurocs(
    run: Run, rows_M: np.ndarray, asked_M: Tensor, label_M: Tensor, score_M: Tensor, settings: Settings
) -> Iterator[tuple[Place, str, metrics.Estimate]]:
    patient_M = torch.as_tensor(run.manifest.patient_N[rows_M])
    for split in ("val", "test"):
        split_M = torch.as_tensor(np.isin(rows_M, run.manifest.rows(split)))
        for view in map(run.manifest.view, ("", *run.job.data.groups)) if split_M.any() else ():
            for group, members in view.members.items():
                mine_M = asked_M & split_M & torch.as_tensor(np.isin(rows_M, members))
                columns = label_M[mine_M], score_M[mine_M], patient_M[mine_M]
                estimate = metrics.evaluate("auroc", *columns, min_patients=settings.min_patients)
                yield (view.attribute, group), split, estimate
