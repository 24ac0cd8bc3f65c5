"""Named predictors × metrics × groups, after every stage: the student, its teachers and their ensemble side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from agglom import audit, curves, probes, report, scores, studies, zeroshot
from agglom.assemble import Run, assemble, batches, build_distiller, build_student, check_identity, gathered
from agglom.core import losses, metrics, normalise
from agglom.core.heads import Distiller, resample
from agglom.core.types import Features, Student
from agglom.engine import latest, launched, read_weights
from agglom.errors import DataError
from agglom.job import Job
from agglom.probes import Readout
from agglom.reading import Row
from agglom.report import GroupReport
from agglom.runtime import StopRequest
from agglom.samples import Settings, row
from agglom.scores import Scores
from agglom.survey import Pool, Survey, chosen_rows, survey
from agglom.targets import Normaliser, input_size

TEACHERS_STAGE = "teachers"
READOUTS = {"linear": "linear probe", "knn": "knn probe", "zeroshot": "zero-shot"}


@dataclass(frozen=True)
class Evaluation:
    """The report of a stage, and the scores that it speaks of."""

    report: GroupReport
    scores: Scores


def evaluate(
    run: Run, surveyed: Survey | None, normalisers: dict[str, Normaliser], stage: str, student: nn.Module | None
) -> Evaluation | None:
    """The report of one stage on rank 0; every rank takes part in encoding with the student.

    `student` is the distiller in plain PyTorch, the same on all ranks, or None before the first stage.
    """
    pool = None if student is None else _encode_student(run, student)
    if surveyed is None:
        return run.world.on_main(lambda: None)
    return run.world.on_main(lambda: _report(run, surveyed, normalisers, stage, pool))


def main(job: Job, base: Path, out: Path) -> None:
    """Evaluate the teachers, and the student of the last checkpoint, again: with other groups, labels or settings.

    Raises DataError where there is no checkpoint, CacheError where it belongs to another job.
    """
    with launched() as world, StopRequest().listening(world.has_launcher) as stop:
        run = assemble(job, base, out, world, stop)
        step, _, plain = world.attempt(lambda: last_student(run))
        surveyed, normalisers = survey(run)
        stage = next(s for s in reversed(run.plan.stages) if s.first_step < step or s.index == 0)
        for name, student in ((TEACHERS_STAGE, None), (stage.name, plain)):
            found = evaluate(run, surveyed, normalisers, name, student)
            world.attempt(partial(publish, run, found))


def publish(run: Run, found: Evaluation | None) -> None:
    """Write a report and its scores, and say where it is."""
    if found is None:
        return
    folder, stage = run.out / "reports", found.report.stage
    if found.scores.labels:
        scores.write(folder / f"{stage}.scores.parquet", found.scores, run.manifest)
    for path in report.write(found.report, folder):
        if path.suffix == ".html":
            print(f"{stage} evaluated: {path}", flush=True)


def last_student(run: Run) -> tuple[int, Student, Distiller]:
    """The step of the last checkpoint, and its student inside its distiller, in plain PyTorch."""
    folder = run.out / "checkpoints"
    tag = latest(folder)
    if tag is None:
        raise DataError(f"{folder}: no checkpoint there; name the folder that `agglom distill` wrote with --out")
    check_identity(run.identity, folder / tag)
    student = build_student(run.job)
    plain = build_distiller(run, student)
    plain.load_state_dict(read_weights(folder / tag))
    return int(tag.removeprefix("step-")), student, plain


# ── Encoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StudentPool:
    """The student's summaries of all rows, and its predictions of each teacher on the held-out sample; of the teacher
    through which prompts read it (`zeroshot.reader`), the predicted summaries of all rows."""

    summary_ND: Tensor | None
    predicted: dict[str, Pool]
    prompted_ND: Tensor | None


@torch.no_grad()
def _encode_student(run: Run, student: nn.Module) -> StudentPool | None:
    rows_N, held_M = chosen_rows(run)
    student = copy.deepcopy(student).to(run.world.device).eval()
    through = zeroshot.reader(run)

    def pieces() -> Iterator[tuple[Features, dict[str, Features], Tensor | None] | None]:
        for mine, batch in batches(run, rows_N, run.plan.evaluate_size):
            if batch is None:
                yield None
                continue
            trunk, predicted = student(batch.pixels_BCHW.to(run.world.device))
            held = torch.as_tensor(np.isin(mine, held_M))
            yield (
                Features(None if trunk.summary_BD is None else trunk.summary_BD.float().cpu(), None),
                {name: _rows(features, held) for name, features in predicted.items()},
                None if through is None else predicted[through].summary_BD.float().cpu(),
            )

    summaries: list[Tensor | None] = []
    prompted: list[Tensor | None] = []
    kept: dict[str, list[Features]] = {name: [] for name in run.targets}
    for trunk, predicted, summary in gathered(run, pieces()):
        summaries.append(trunk.summary_BD)
        prompted.append(summary)
        for name, features in predicted.items():
            kept[name].append(features)
    if not run.world.main:
        return None
    predicted = {
        name: Pool(_cat(f.summary_BD for f in parts), _cat(f.patches_BND for f in parts), parts[0].grid)
        for name, parts in kept.items()
    }
    return StudentPool(_cat(summaries), predicted, _cat(prompted))


def _rows(features: Features, keep_B: Tensor) -> Features:
    summary, patches, grid = features
    return Features(
        None if summary is None else summary.float().cpu()[keep_B],
        None if patches is None else patches.float().cpu()[keep_B],
        grid,
    )


def _cat(parts: Iterable[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


# ── Rows of the report ───────────────────────────────────────────────────────────────────────────────────────────────


def _report(
    run: Run, surveyed: Survey, normalisers: dict[str, Normaliser], stage: str, student: StudentPool | None
) -> Evaluation:
    rows: list[Row] = []
    notes: list[str] = []
    summaries = {f"teacher/{name}": pool.summary_ND for name, pool in surveyed.pools.items()}
    if student is not None:
        summaries = {"student": student.summary_ND} | summaries
        rows += _fvu_rows(run, surveyed, normalisers, student)
    data, settings = run.job.data, Settings.of(run.job.data, run.job.evaluate, run.job.seed)
    prompted = _prompted(run, surveyed, normalisers, student, notes)
    found = _scores(run, surveyed, summaries, prompted, notes)
    rows += audit.rows(found, run.manifest, data.groups, settings, notes)
    asked = data, run.job.evaluate, settings
    rows += studies.rows(summaries, run.manifest, surveyed.rows_N, *asked, surveyed.readouts, surveyed.studies)
    notes += [f"{name} has no summary, so no probe reads it." for name, one in summaries.items() if one is None]
    names = [s.name for s in run.plan.stages]
    context = audit.context(run.manifest, data, run.job.seed, notes) | {
        "name": run.out.name,
        "index": names.index(stage) + 1 if stage in names else 0,
        "teachers": {n: {"fingerprint": t.fingerprint, "licence": t.licence} for n, t in run.teachers.items()},
        "balance": {"kind": run.job.balance.kind, "group": run.job.balance.group},
        "image_size": run.plan.evaluate_size,
        "curves": curves.of_scores(found, run.manifest, data.groups, settings),
        "weights": curves.of_weights(run.out / "metrics.jsonl", run.job.balance.group, _until(names, stage)),
        "history": _history(run.out / "reports", [TEACHERS_STAGE, *names], stage),
    }
    return Evaluation(GroupReport(stage, [{"stage": stage, **row} for row in rows], context), found)


def _until(names: list[str], stage: str) -> list[str]:
    """The stages up to this one."""
    return names[: names.index(stage) + 1] if stage in names else []


def _history(folder: Path, names: list[str], stage: str) -> list[Any]:
    """The rows of the student in the reports of the stages before: those of the teachers are the same in all."""
    earlier = names[: names.index(stage)] if stage in names else []
    found = [report.load(path) for path in (folder / f"{name}.json" for name in earlier) if path.is_file()]
    return [[one.stage, [row for row in one.rows if row["predictor"] == "student"]] for one in found]


def _fvu_rows(run: Run, surveyed: Survey, normalisers: dict[str, Normaliser], student: StudentPool) -> Iterator[Row]:
    """Variance unexplained on held-out images: squared error over that of the train mean per patch position."""
    rows_M, size = surveyed.held_M, run.plan.evaluate_size
    held_N, train_N = (torch.as_tensor(np.isin(surveyed.rows_N, r)) for r in (rows_M, run.manifest.rows("train")))
    for name, predicted in student.predicted.items():
        pool, normaliser = surveyed.pools[name], normalisers[name].to(torch.device("cpu"))
        note = f"teacher at {input_size(run.teachers[name].pixels, size)} px"
        if predicted.patches_MND is not None:
            error_M, baseline_M = _patch_errors(pool, predicted, normaliser)
            yield from _ratio_rows(run, rows_M, error_M, baseline_M, "fvu", f"{name}/patches", note)
        if predicted.summary_ND is not None and pool.summary_ND is not None:
            guess_MD, raw_MD = predicted.summary_ND, pool.summary_ND[held_N]
            if run.job.loss.normalises_summary:
                metric, truth_MD = "fvu", normaliser.of_summary(raw_MD)
                mean_D = normaliser.of_summary(pool.summary_ND[train_N]).mean(0)
                error_M, baseline_M = ((one - truth_MD).square().mean(1) for one in (guess_MD, mean_D))
            else:
                metric, mean_MD = "fvu_angular", cast(Tensor, normaliser.direction_D).expand_as(raw_MD)
                error_M, baseline_M = (losses.angle(one, raw_MD).square() for one in (guess_MD, mean_MD))
            yield from _ratio_rows(run, rows_M, error_M, baseline_M, metric, f"{name}/summary", note)


def _patch_errors(pool: Pool, predicted: Pool, normaliser: Normaliser) -> tuple[Tensor, Tensor]:
    """Squared error of the prediction and of the train mean, per image, on the coarser of the two grids."""
    grid = min(pool.grid[0], predicted.grid[0]), min(pool.grid[1], predicted.grid[1])
    raw_MND, guess_MND, mean_ND = (
        cast(Tensor, tensor) for tensor in (pool.patches_MND, predicted.patches_MND, pool.mean_patches_ND)
    )

    def target(raw_BND: Tensor) -> Tensor:
        return resample(normaliser.of_patches(raw_BND), pool.grid, grid)

    mean_1ND = target(mean_ND[None])
    errors, baselines = [], []
    for raw_BND, guess_BND in zip(raw_MND.split(64), guess_MND.split(64), strict=True):
        truth_BND = target(raw_BND)
        errors.append((resample(guess_BND, predicted.grid, grid) - truth_BND).square().mean((1, 2)))
        baselines.append((mean_1ND - truth_BND).square().mean((1, 2)))
    return torch.cat(errors), torch.cat(baselines)


def _ratio_rows(
    run: Run, rows_M: np.ndarray, error_M: Tensor, baseline_M: Tensor, metric: str, target: str, note: str
) -> Iterator[Row]:
    patient_M = torch.as_tensor(run.manifest.patient_N[rows_M])
    for split in ("val", "test"):
        in_split = torch.as_tensor(np.isin(rows_M, run.manifest.rows(split)))
        if not in_split.any():
            continue
        for view in map(run.manifest.view, ("", *run.job.data.groups)):
            for group, members in view.members.items():
                mine = in_split & torch.as_tensor(np.isin(rows_M, members))
                estimate = metrics.fvu(error_M[mine], baseline_M[mine], patient_M[mine])
                yield row("student", metric, (view.attribute, group), split, estimate, target=target, note=note)


def _prompted(
    run: Run,
    surveyed: Survey,
    normalisers: dict[str, Normaliser],
    student: StudentPool | None,
    notes: list[str],
) -> dict[str, Tensor | None]:
    """By predictor, the summaries that prompts are compared with: of the student, what it predicts of a teacher."""
    found = {f"teacher/{name}": surveyed.pools[name].summary_ND for name in surveyed.prompted}
    if student is None or not found:
        return found
    through = zeroshot.reader(run)
    if through is None:
        notes.append("Zero-shot: the student learns the summary of no teacher with a text tower, so it is left out.")
        return found
    notes.append(f"Zero-shot: the student is read through its head for {through} and the text tower of that teacher.")
    affine, summary_ND = normalisers[through].to(torch.device("cpu")).summary, cast(Tensor, student.prompted_ND)
    return {"student": summary_ND if affine is None else normalise.invert(affine, summary_ND)} | found


def _scores(
    run: Run,
    surveyed: Survey,
    summaries: dict[str, Tensor | None],
    prompted: dict[str, Tensor | None],
    notes: list[str],
) -> Scores:
    """Every readout's scores of val and test.

    Probes of a label of which train images have one class are left out, with a note.
    """
    rows_N = surveyed.rows_N
    held_N = np.isin(run.manifest.split_N[rows_N], ("val", "test"))
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for label, label_N in zip(run.manifest.labels, run.manifest.label_NL[rows_N].T.astype(np.float64), strict=True):
        for kind in READOUTS:
            features = summaries if kind != "zeroshot" else prompted if label in run.job.evaluate.prompts else {}
            for name, readout in _readouts(run, surveyed, label, kind, label_N, features, notes).items():
                scores_N = np.where(np.isnan(label_N), np.nan, readout.scores_N)
                found.setdefault((kind, name), {})[label] = scores_N[held_N]
    labels = tuple(label for label in run.manifest.labels if any(label in scored for scored in found.values()))
    series = sorted(found, key=lambda one: list(READOUTS).index(one[0]))
    nothing_N = np.full(int(held_N.sum()), np.nan)
    score_PNL = np.empty((len(series), len(nothing_N), len(labels)))
    for index, one in enumerate(series):
        for column, label in enumerate(labels):
            score_PNL[index, :, column] = found[one].get(label, nothing_N)
    kinds, names = tuple(kind for kind, _ in series), tuple(name for _, name in series)
    return Scores(names, kinds, labels, rows_N[held_N], score_PNL)


def _readouts(
    run: Run,
    surveyed: Survey,
    label: str,
    kind: str,
    label_N: np.ndarray,
    summaries: dict[str, Tensor | None],
    notes: list[str],
) -> dict[str, Readout]:
    """The readouts of one kind by predictor, and the ensemble of the teachers; none where no probe can be fitted."""
    rows_N, known_N = surveyed.rows_N, ~np.isnan(label_N)
    split_N, patient_N = run.manifest.split_N[rows_N], run.manifest.patient_N[rows_N]
    train_N, val_N = known_N & (split_N == "train"), known_N & (split_N == "val")
    readouts: dict[str, Readout] = {}
    for name, summary_ND in summaries.items():
        if summary_ND is None:
            continue
        key = (label, kind, name)
        if name == "student" or key not in surveyed.readouts:
            if kind == "linear":
                surveyed.readouts[key] = probes.linear(summary_ND, label_N, train_N, val_N)
            elif kind == "zeroshot":
                through = cast(str, zeroshot.reader(run)) if name == "student" else name.removeprefix("teacher/")
                surveyed.readouts[key] = zeroshot.readout(surveyed.prompted[through], label, summary_ND, label_N, val_N)
            else:
                neighbours = run.job.evaluate.knn
                surveyed.readouts[key] = probes.nearest(summary_ND, label_N, patient_N, train_N, val_N, neighbours)
        readout = surveyed.readouts[key]
        if readout is None:
            notes.append(f"{label}: all train images have one class, so no probe can be fitted.")
            continue
        readouts[name] = readout
        if readout.note:
            notes.append(f"{label}, {READOUTS[kind]} of {name}: {readout.note}.")
    teachers = [readout for name, readout in readouts.items() if name != "student"]
    if teachers:
        readouts["ensemble"] = Readout(np.mean([readout.scores_N for readout in teachers], axis=0))
    return readouts
