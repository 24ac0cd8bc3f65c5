"""Named predictors × metrics × groups, after every stage: the student, its teachers and their ensemble side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from agglom import plan, probes, report
from agglom.assemble import Run, assemble, batches, build_distiller, build_student, check_identity, gathered
from agglom.config import Job
from agglom.core import losses, metrics
from agglom.core.heads import Distiller, resample
from agglom.core.metrics import Estimate
from agglom.core.types import Features, Student
from agglom.engine import latest, launched, read_weights
from agglom.errors import DataError
from agglom.probes import Readout
from agglom.report import GroupReport
from agglom.runtime import StopRequest
from agglom.survey import Pool, Survey, chosen_rows, survey
from agglom.targets import Normaliser, input_size

TEACHERS_STAGE = "teachers"
THRESHOLDED = frozenset({"accuracy", "tpr", "fpr"})


@dataclass(frozen=True)
class View:
    """One attribute (or everybody) as groups over the evaluated rows."""

    attribute: str
    values: tuple[str, ...]
    group_N: Tensor


def evaluate(
    run: Run, surveyed: Survey | None, normalisers: dict[str, Normaliser], stage: str, student: nn.Module | None
) -> GroupReport | None:
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


def publish(run: Run, found: GroupReport | None) -> None:
    """Write a report and say where it is."""
    if found is None:
        return
    for path in report.write(found, run.out / "reports"):
        if path.suffix == ".html":
            print(f"{found.stage} evaluated: {path}", flush=True)


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
    """The student's summaries of all rows, and its predictions of each teacher on the held-out sample."""

    summary_ND: Tensor | None
    predicted: dict[str, Pool]


@torch.no_grad()
def _encode_student(run: Run, student: nn.Module) -> StudentPool | None:
    rows_N, held_M = chosen_rows(run)
    student = copy.deepcopy(student).to(run.world.device).eval()

    def pieces() -> Iterator[tuple[Features, dict[str, Features]] | None]:
        for mine, batch in batches(run, rows_N, run.plan.evaluate_size):
            if batch is None:
                yield None
                continue
            trunk, predicted = student(batch.pixels_BCHW.to(run.world.device))
            held = torch.as_tensor(np.isin(mine, held_M))
            yield (
                Features(None if trunk.summary_BD is None else trunk.summary_BD.float().cpu(), None),
                {name: _rows(features, held) for name, features in predicted.items()},
            )

    summaries: list[Tensor | None] = []
    kept: dict[str, list[Features]] = {name: [] for name in run.targets}
    for trunk, predicted in gathered(run, pieces()):
        summaries.append(trunk.summary_BD)
        for name, features in predicted.items():
            kept[name].append(features)
    if not run.world.main:
        return None
    predicted = {
        name: Pool(_cat(f.summary_BD for f in parts), _cat(f.patches_BND for f in parts), parts[0].grid)
        for name, parts in kept.items()
    }
    return StudentPool(_cat(summaries), predicted)


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
) -> GroupReport:
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    summaries = {f"teacher/{name}": pool.summary_ND for name, pool in surveyed.pools.items()}
    if student is not None:
        summaries = {"student": student.summary_ND} | summaries
        rows += _fvu_rows(run, surveyed, normalisers, student)
    for label in run.manifest.labels:
        rows += _label_rows(run, surveyed, label, summaries, notes)
    for name, summary in summaries.items():
        if summary is None:
            notes.append(f"{name} has no summary, so no probe reads it.")
    names = [s.name for s in run.plan.stages]
    context = {
        "name": run.out.name,
        "index": names.index(stage) + 1 if stage in names else 0,
        "split": plan.headline_split(run.job, run.manifest),
        "groups": [
            {
                "attribute": s.attribute,
                "group": s.group,
                "split": s.split,
                "n_images": s.images,
                "n_patients": s.patients,
            }
            for s in plan.support(run.manifest, run.job.data.groups)
        ],
        "simulated": [name for name, attribute in run.job.data.attributes.items() if attribute.simulated],
        "labels": list(run.manifest.labels),
        "teachers": {n: {"fingerprint": t.fingerprint, "licence": t.licence} for n, t in run.teachers.items()},
        "balance": {"kind": run.job.balance.kind, "group": run.job.balance.group},
        "image_size": run.plan.evaluate_size,
        "min_support": run.job.data.min_support,
        "manifest": run.manifest.path.name,
        "seed": run.job.seed,
        "notes": list(dict.fromkeys(notes)),
        "history": _history(run.out / "reports", [TEACHERS_STAGE, *names], stage),
    }
    return GroupReport(stage, [{"stage": stage, **row} for row in rows], context)


def _history(folder: Path, names: list[str], stage: str) -> list[Any]:
    earlier = names[: names.index(stage)] if stage in names else []
    found = [folder / f"{name}.json" for name in earlier]
    return [[path.stem, report.load(path).rows] for path in found if path.is_file()]


def _views(run: Run, rows_N: np.ndarray) -> list[View]:
    everybody = View("", ("all",), torch.zeros(len(rows_N), dtype=torch.int64))
    index = torch.as_tensor(rows_N)
    return [everybody, *(View(n, run.spaces[n].values, run.spaces[n].index_N[index]) for n in run.job.data.groups)]


def _row(predictor: str, metric: str, view: View, group: str, split: str, estimate: Estimate, **more: Any) -> dict:
    e = estimate
    return {
        "predictor": predictor,
        "metric": metric,
        "label": more.pop("label", ""),
        "attribute": view.attribute,
        "group": group,
        "value": e.value,
        "lo": e.lo,
        "hi": e.hi,
        "n": e.n,
        "n_pos": e.n_pos,
        "n_neg": e.n_neg,
        "status": e.status,
        "split": split,
        "readout": more.pop("readout", "none"),
        "target": more.pop("target", ""),
        "threshold": more.pop("threshold", None),
        "n_patients": e.n_patients,
        "ci_method": e.method,
        "note": more.pop("note", ""),
    }


def _fvu_rows(
    run: Run, surveyed: Survey, normalisers: dict[str, Normaliser], student: StudentPool
) -> Iterator[dict[str, Any]]:
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
            if run.job.loss.summary == "mse":
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
) -> Iterator[dict[str, Any]]:
    patient_M = torch.as_tensor(run.manifest.patient_N[rows_M])
    for split in ("val", "test"):
        in_split = torch.as_tensor(np.isin(rows_M, run.manifest.rows(split)))
        if not in_split.any():
            continue
        for view in _views(run, rows_M):
            for index, group in enumerate(view.values):
                mine = in_split & (view.group_N == index)
                estimate = metrics.fvu(error_M[mine], baseline_M[mine], patient_M[mine])
                yield _row("student", metric, view, group, split, estimate, target=target, note=note)


def _label_rows(
    run: Run, surveyed: Survey, label: str, summaries: dict[str, Tensor | None], notes: list[str]
) -> Iterator[dict[str, Any]]:
    rows_N = surveyed.rows_N
    column = run.manifest.labels.index(label)
    label_N = run.manifest.label_NL[rows_N, column].astype(np.float64)
    known_N = ~np.isnan(label_N)
    split_N, patient_N = run.manifest.split_N[rows_N], run.manifest.patient_N[rows_N]
    train_N, val_N = known_N & (split_N == "train"), known_N & (split_N == "val")
    for kind in ("linear", "knn"):
        readouts: dict[str, Readout] = {}
        for name, summary_ND in summaries.items():
            if summary_ND is None:
                continue
            key = (label, kind, name)
            if name == "student" or key not in surveyed.readouts:
                if kind == "linear":
                    surveyed.readouts[key] = probes.linear(summary_ND, label_N, train_N, val_N)
                else:
                    neighbours = run.job.evaluate.knn
                    surveyed.readouts[key] = probes.nearest(summary_ND, label_N, patient_N, train_N, val_N, neighbours)
            readout = surveyed.readouts[key]
            if readout is None:
                notes.append(f"{label}: all train images have one class, so no probe can be fitted.")
                continue
            readouts[name] = readout
            if readout.note:
                notes.append(f"{label}, {kind} probe of {name}: {readout.note}.")
        teachers = [readout for name, readout in readouts.items() if name != "student"]
        if teachers:
            readouts["ensemble"] = probes.mean_of(teachers, label_N, val_N)
        for split in ("val", "test"):
            scored_N = known_N & (split_N == split)
            if scored_N.any():
                yield from _readout_rows(run, rows_N, label, kind, split, scored_N, label_N, readouts)


def _readout_rows(
    run: Run,
    rows_N: np.ndarray,
    label: str,
    kind: str,
    split: str,
    scored_N: np.ndarray,
    label_N: np.ndarray,
    readouts: dict[str, Readout],
) -> Iterator[dict[str, Any]]:
    y = torch.as_tensor(label_N[scored_N])
    patient = torch.as_tensor(run.manifest.patient_N[rows_N[scored_N]])
    scores = {name: torch.as_tensor(readout.scores_N[scored_N]) for name, readout in readouts.items()}
    settings: dict[str, Any] = {
        "min_patients": run.job.data.min_support,
        "replicates": run.job.evaluate.bootstrap,
        "seed": run.job.seed,
    }
    for view in _views(run, rows_N[scored_N]):
        for metric in metrics.METRICS:
            for name, readout in readouts.items():
                cut = readout.threshold if metric in THRESHOLDED else math.nan
                common = {"label": label, "readout": kind, "threshold": None if math.isnan(cut) else cut}
                arguments: tuple[Any, ...] = (metric, y, scores[name], patient, view.group_N, len(view.values))
                estimates = metrics.evaluate_groups(*arguments, threshold=cut, **settings)
                for group, estimate in zip(view.values, estimates, strict=True):
                    yield _row(name, metric, view, group, split, estimate, **common)
                if len(view.values) > 1:
                    level = metrics.simultaneous(0.95, len(view.values))
                    wide = metrics.evaluate_groups(*arguments, threshold=cut, level=level, **settings)
                    for summary, across in (("gap", metrics.gap(wide)), ("worst", metrics.worst(metric, wide))):
                        note = " − ".join(view.values[index] for index in across.groups)
                        row = _row(name, f"{metric}_{summary}", view, "all", split, across.estimate, **common)
                        yield row | {"note": note}
            if "student" not in readouts:
                continue
            student = readouts["student"]
            for name, readout in readouts.items():
                if not name.startswith("teacher/"):
                    continue
                cuts = (student.threshold, readout.threshold) if metric in THRESHOLDED else (math.nan, math.nan)
                for index, group in enumerate(view.values):
                    mine = view.group_N == index
                    estimate = metrics.paired(
                        metric,
                        y[mine],
                        scores["student"][mine],
                        scores[name][mine],
                        patient[mine],
                        threshold_a=cuts[0],
                        threshold_b=cuts[1],
                        **settings,
                    )
                    yield _row(f"student - {name}", metric, view, group, split, estimate, label=label, readout=kind)
