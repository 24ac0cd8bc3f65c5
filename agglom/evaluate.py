"""Named predictors × metrics × groups, after every stage: the student, its teachers and their ensemble side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from agglom import (
    audit,
    conflict,
    curriculum,
    curves,
    hosting,
    measure,
    probes,
    proxies,
    report,
    scores,
    studies,
    sweep,
    unexplained,
    zeroshot,
)
from agglom.assemble import Run, assemble, batches, build_distiller, build_student, check_identity, gathered
from agglom.core import normalise
from agglom.core.heads import Distiller
from agglom.core.types import Features, Student
from agglom.engine import latest, launched, read_weights
from agglom.errors import DataError
from agglom.findings import count, listed
from agglom.job import Job, show_size, side
from agglom.probes import Readout
from agglom.reading import Row
from agglom.report import GroupReport
from agglom.runtime import StopRequest
from agglom.samples import Settings
from agglom.scores import Scores
from agglom.serving import Serving
from agglom.survey import Pool, Survey, chosen_rows, fit_rows, survey
from agglom.sweep import Look
from agglom.targets import Normaliser, input_size, told

TEACHERS_STAGE = "teachers"
# Images that linear erasure takes for each dimension to hold for new patients (docs/fairness-aware-teachers.md).
PER_DIMENSION = 50
READOUTS = {"linear": "linear probe", "knn": "knn probe", "zeroshot": "zero-shot"}


@dataclass(frozen=True)
class Evaluation:
    """The report of a stage, and the scores that it speaks of."""

    report: GroupReport
    scores: Scores


def evaluate(
    run: Run, surveyed: Survey | None, normalisers: dict[str, Normaliser], stage: str, student: Distiller | None
) -> Evaluation | None:
    """The report of one stage on rank 0; every rank takes part in encoding with the student.

    `student` is the distiller in plain PyTorch, the same on all ranks, or None before the first stage.
    """
    pool = None if student is None else _encode_student(run, student)
    looks = sweep.looks(run, surveyed, normalisers, student)
    if surveyed is None:
        return run.world.on_main(lambda: None)
    return run.world.on_main(lambda: _report(run, surveyed, normalisers, stage, pool, looks, student))


def main(job: Job, base: Path, out: Path) -> None:
    """Evaluate the teachers, and the student of the last checkpoint, again: with other groups, labels or settings.

    Raises DataError where there is no checkpoint, CacheError where it belongs to another job.
    """
    with launched() as world, StopRequest().listening(world.has_launcher) as stop:
        run = assemble(curriculum.legs(job, out)[-1].job, base, out, world, stop)
        step, _, plain = world.attempt(lambda: last_student(run))
        surveyed, normalisers = survey(run)
        run, surveyed = proxies.added(run, surveyed)
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
    summary, patches, grid = features[:3]
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
    run: Run,
    surveyed: Survey,
    normalisers: dict[str, Normaliser],
    stage: str,
    student: StudentPool | None,
    looks: list[Look],
    model: Distiller | None,
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
    serving = Serving(run.manifest, {f"teacher/{name}": mask_N.numpy() for name, mask_N in run.served.items()})
    drawn = curves.of_scores(found, run.manifest, data.groups, settings)
    measured = audit.rows(found, run.manifest, data.groups, settings, notes)
    rows += [one for one in measured if serving.judged(one["predictor"], (one["attribute"], one["group"]))]
    asked = data, run.job.evaluate, settings, _fitted_on(run)
    studied = {name: summary_ND for name, summary_ND in summaries.items() if name not in serving.served}
    rows += studies.rows(studied, run.manifest, surveyed.rows_N, *asked, surveyed.readouts, surveyed.studies)
    rows += sweep.rows(run, surveyed, looks, notes)
    notes += _resampled(run, student)
    notes += _sample_limited(run)
    notes += [f"{name} has no summary, so no probe reads it." for name, one in summaries.items() if one is None]
    serves = {name: (s.attribute, s.groups) for name, t in run.teachers.items() if (s := t.serves) is not None}
    notes += [
        f"{name} serves {', '.join(groups)} of {attribute} and is judged in groups of those patients alone; what its "
        "features tell about people is what those of its source tell."
        for name, (attribute, groups) in serves.items()
    ]
    names = [s.name for s in run.plan.stages]
    context = audit.context(run.manifest, data, run.job.seed, notes) | {
        "name": run.out.name,
        "index": names.index(stage) + 1 if stage in names else 0,
        "teachers": {name: hosting.facts(teacher) for name, teacher in run.teachers.items()},
        "balance": {"kind": run.job.balance.kind, "group": run.job.balance.over},
        "image_size": side(run.plan.evaluate_size),
        "serves": {f"teacher/{name}": one for name, one in serves.items()},
        "curves": [one for one in drawn if serving.judged(one["predictor"], (one["attribute"], one["group"]))],
        "weights": curves.of_weights(run.out / "metrics.jsonl", run.job.balance.over, _until(names, stage)),
        "reasons": measure.reasons(run, stage),
        "proxies": surveyed.proxies,
        "conflict": _conflict(run, surveyed, normalisers, stage, student, model),
        "history": _history(run.out / "reports", [TEACHERS_STAGE, *names], stage),
    }
    return Evaluation(GroupReport(stage, [{"stage": stage, **row} for row in rows], context), found)


def _conflict(
    run: Run,
    surveyed: Survey,
    normalisers: dict[str, Normaliser],
    stage: str,
    student: StudentPool | None,
    model: Distiller | None,
) -> dict[str, Any] | None:
    if student is None or model is None or not run.job.evaluate.conflict:
        return None
    trained = next(one for one in run.plan.stages if one.name == stage)
    return conflict.measure(run, surveyed, normalisers, trained, model, student.predicted)


def _fitted_on(run: Run) -> Set[str]:
    """The attributes that a teacher was fitted on, so that the features of its train patients were made to hide or to
    use them."""
    derived = [teacher.derived for teacher in run.teachers.values() if teacher.derived is not None]
    return {part for one in derived for name in (*one.attributes, *one.groups) for part in name.split("*")}


def _sample_limited(run: Run) -> Iterator[str]:
    """Which teachers that took attributes out of features of another saw too few images for patients that are new.

    One that reads labels as well learns to predict and takes nothing out.
    """
    images = len(fit_rows(run))
    for name, teacher in run.teachers.items():
        derived, width = teacher.derived, teacher.dims.summary
        if derived is None or width is None or derived.labels or images >= PER_DIMENSION * width:
            continue
        if names := listed([one.replace("*", " × ") for one in (*derived.attributes, *derived.groups)]):
            yield (
                f"{name} was fitted on {names} with {count(images, 'image')}; for linear erasure to hold for new "
                f"patients, its {width:,} dimensions take about {PER_DIMENSION * width:,} ({PER_DIMENSION} each)."
            )


def _resampled(run: Run, student: StudentPool | None) -> Iterator[str]:
    """Where teacher and student do not meet on the grid of both."""
    for name, predicted in student.predicted.items() if student is not None else ():
        if predicted.patches_MND is not None:
            how = told(run.teachers[name].pixels, run.plan.evaluate_size, predicted.grid)
            if "resampled" in how:
                yield f"The student and {name} are compared on the coarser of their grids: {name}: {how}."


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
        note = f"teacher at {show_size(input_size(run.teachers[name].pixels, size))} px"
        served_M, fitted_N = torch.ones(len(rows_M), dtype=torch.bool), train_N
        if name in run.served:
            note += ", on the images of those whom it serves"
            served_M = run.served[name][torch.as_tensor(rows_M)]
            fitted_N = train_N & run.served[name][torch.as_tensor(surveyed.rows_N)]
        if predicted.patches_MND is not None:
            guess = Features(None, predicted.patches_MND, predicted.grid)
            raw, mean_ND = Features(None, pool.patches_MND, pool.grid), cast(Tensor, pool.mean_patches_ND)
            errors = unexplained.patches(guess, raw, mean_ND, normaliser)
            yield from unexplained.ratios(run, rows_M, served_M, *errors, "fvu", f"{name}/patches", note)
        if predicted.summary_ND is not None and pool.summary_ND is not None:
            metric, mean_D, applied = "fvu_angular", cast(Tensor, normaliser.direction_D), None
            if run.job.loss.normalises_summary:
                metric, mean_D = "fvu", normaliser.of_summary(pool.summary_ND[fitted_N]).mean(0)
                applied = normaliser
            errors = unexplained.summaries(predicted.summary_ND, pool.summary_ND[held_N], mean_D, applied)
            yield from unexplained.ratios(run, rows_M, served_M, *errors, metric, f"{name}/summary", note)


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
    """The readouts of one kind by predictor, and the ensemble of the teachers; none where no probe can be fitted.

    Of a specialist they are fitted and calibrated on those whom it serves, and the ensemble hears it on them alone.
    """
    rows_N, known_N = surveyed.rows_N, ~np.isnan(label_N)
    split_N, patient_N = run.manifest.split_N[rows_N], run.manifest.patient_N[rows_N]
    train_N, val_N = known_N & (split_N == "train"), known_N & (split_N == "val")
    readouts: dict[str, Readout] = {}
    served_N = dict.fromkeys(summaries, np.ones(len(rows_N), bool))
    served_N |= {f"teacher/{name}": mask_N.numpy()[rows_N] for name, mask_N in run.served.items()}
    for name, summary_ND in summaries.items():
        if summary_ND is None:
            continue
        key = (label, kind, name)
        if name == "student" or key not in surveyed.readouts:
            fit_N, judge_N = train_N & served_N[name], val_N & served_N[name]
            if kind == "linear":
                surveyed.readouts[key] = probes.linear(summary_ND, label_N, fit_N, judge_N)
            elif kind == "zeroshot":
                through = cast(str, zeroshot.reader(run)) if name == "student" else name.removeprefix("teacher/")
                asked = surveyed.prompted[through], label, summary_ND
                surveyed.readouts[key] = zeroshot.readout(*asked, label_N, judge_N)
            else:
                neighbours = run.job.evaluate.knn
                surveyed.readouts[key] = probes.nearest(summary_ND, label_N, patient_N, fit_N, judge_N, neighbours)
        readout = surveyed.readouts[key]
        if readout is None:
            whose = f" that {name} serves" if name.removeprefix("teacher/") in run.served else ""
            notes.append(f"{label}: all train images{whose} have one class, so no probe can be fitted.")
            continue
        readouts[name] = readout
        if readout.note:
            notes.append(f"{label}, {READOUTS[kind]} of {name}: {readout.note}.")
    teachers = {name: readout.scores_N for name, readout in readouts.items() if name != "student"}
    heard_TN = np.array([served_N[name] for name in teachers])
    if teachers and heard_TN.any(0).all():
        readouts["ensemble"] = Readout(np.average(list(teachers.values()), axis=0, weights=heard_TN))
    elif teachers:
        notes.append(f"{label}: no teacher serves some of the images, so the teachers have no ensemble.")
    return readouts
