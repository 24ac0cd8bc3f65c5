"""The student of a run beside its teachers, beside other runs and beside its own earlier stages.

Everything is paired on the same patients. The paired table is read from `reports/<stage>.json` alone; verdicts, runs
and stages are computed anew from `reports/<stage>.scores.parquet`, and torch is imported only for them.
Shape suffixes: N manifest rows, R scored ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agglom import config, findings, report, scores
from agglom.data import manifest as manifests
from agglom.data.manifest import Manifest
from agglom.errors import ConfigError, DataError
from agglom.findings import OVERALL, STATUSES, Place, Reading, Row, unique
from agglom.report import REMEDY, GroupReport

if TYPE_CHECKING:
    from agglom.core.metrics import Estimate
    from agglom.core.verdicts import FailOn, Verdict

STUDENT = "student"
FLATTERS = "These are validation patients, on whom thresholds and weights were chosen: the numbers flatter every model."
_WORDS = {
    **{"non_inferior": "non-inferior", "inferior": "inferior"},
    **{"inconclusive": "inconclusive", "not_assessable": "not assessable"},
}
_PAIRED_HEAD = ("group", "patients", "minus", "difference", "95 % interval", "the student is", "p (Holm)")
_HOLM = "p (Holm): of the claim that this group by itself differs, adjusted over the groups of its attribute."
_VERDICT_HEAD = ("group", "patients", "verdict", "smallest margin", "against", "difference", "bound", "needed")
_NEEDED = (
    "Needed: patients of the group that would decide it, if the estimate and the mix of patients stay as they are."
)


@dataclass(frozen=True)
class Question:
    """What is asked of the runs. `label` None is all of them; `split` None is test, or val where there is no test."""

    margin: float | None = None
    metric: str = "auroc"
    label: str | None = None
    readout: str = "linear"
    split: str | None = None
    fail_on: FailOn = "inconclusive"
    stages: bool = False


@dataclass(frozen=True)
class Scored:
    """A stage and the scores that its report was computed from.

    `score_N` by (label, predictor) is NaN where a row of the manifest was not scored; `label_N` by label; `mask_N` by
    place (attribute, group) marks the rows of that group, everybody first.
    """

    name: str
    stage: str
    path: Path
    reading: Reading
    context: Mapping[str, Any]
    manifest: Manifest
    label_N: dict[str, np.ndarray]
    mask_N: dict[Place, np.ndarray]
    score_N: dict[tuple[str, str], np.ndarray]

    def teachers(self, label: str) -> list[str]:
        return [name for one, name in self.score_N if one == label and name.startswith("teacher/")]

    def rows(self, label: str, split: str) -> np.ndarray:
        """The mask over N of the rows of `split` on which the student was scored."""
        return ~np.isnan(self.score_N[label, STUDENT]) & (self.manifest.split_N == split)


def main(folders: Sequence[Path], question: Question) -> tuple[str, bool]:
    """The answer as text, and whether it is a yes: False only where a margin was asked for and is not kept.

    - one run: the paired table of its last stage, or with `margin` a verdict for each group;
    - several runs: the student of each by group, and which of them the validation patients prefer; with `margin` the
      verdicts of each, too, and a yes only if it is one for all;
    - `stages`: each stage minus the one before, and which of them the validation patients prefer.

    Raises ConfigError for a question that cannot be asked; DataError for a run without report or scores, and for runs
    that were not scored on the same patients.
    """
    _check(folders, question)
    if question.stages:
        stages = [_scored(folders[0], one, one.stage, question) for one in _reports(folders[0])]
        if len(stages) < 2:
            raise DataError(f"{folders[0]}: '{stages[0].name}' is the only stage with a student that is evaluated yet")
        return "\n\n".join([_steps(stages, question), _chosen(stages, "stage", question)]), True
    if len(folders) == 1 and question.margin is None:
        return table(folders[0], question), True
    short = [folder.absolute().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    runs = [_scored(one, _reports(one)[-1], name, question) for one, name in zip(folders, names, strict=True)]
    parts: list[str] = []
    if len(runs) > 1:
        _check_same(runs)
        parts = [_overview(runs, question), _chosen(runs, "run", question)]
    kept = True
    if question.margin is not None:
        for run in runs:
            text, yes = _judged(run, question, question.margin)
            parts.append(f"run {run.name}\n{text}" if len(runs) > 1 else text)
            kept &= yes
    return "\n\n".join(parts), kept


def table(folder: Path, question: Question | None = None) -> str:
    """The paired differences (student − each teacher) of the last stage's report in `folder`.

    The smallest lower bound of a group is the lowest end of its 95 % intervals over the teachers; where a lower value
    is better, the largest upper bound is the highest. Raises as `main`.
    """
    question = question or Question()
    last = _reports(folder)[-1]
    if not last.reading.labels:
        return f"No labels, hence no paired difference. What the student leaves unexplained:\n\n{report.headline(last)}"
    reading = _reading(folder, last, question)
    lines = [
        f"stage {last.stage}, {reading.split} split: {_metric(question)} of the student minus each teacher, "
        f"{question.readout} readout"
    ]
    tables = {
        label: [_PAIRED_HEAD, *(line for place in reading.places for line in _pairs(place, label, reading, question))]
        for label in (reading.labels if question.label is None else [question.label])
    }
    adjusted = any(line[-1] for cells in tables.values() for line in cells[1:])
    for label, cells in tables.items():
        lines += ["", label, *report.aligned(cells if adjusted else [line[:-1] for line in cells])]
    lines += ["", "Where an interval contains 0, these patients cannot tell."]
    return "\n".join([*lines, *([_HOLM] if adjusted else [])])


def _pairs(place: Place, label: str, reading: Reading, question: Question) -> list[tuple[str, ...]]:
    lower = _lower_is_better(question)
    found = [(one.name, reading.row(_variant(question), label, one.predictor, place)) for one in reading.pairs(label)]
    rows = [(name, row) for name, row in found if row is not None]
    lines = [(*_difference(name, row, lower), _p_value(row)) for name, row in rows]
    bounds = [(row["hi" if lower else "lo"], name) for name, row in rows if row["lo"] is not None]
    if bounds:
        missing = f", undefined for {len(rows) - len(bounds)}" if len(bounds) < len(rows) else ""
        bound, name = (max if lower else min)(bounds)
        words = "largest upper bound" if lower else "smallest lower bound"
        lines.append((words, f"{bound:+.3f}", "", f"against {name}{missing}", ""))
    return _block(place, rows[0][1]["n_patients"] if rows else None, lines)


# ── What is asked, and of what ──


def _check(folders: Sequence[Path], question: Question) -> None:
    if question.margin is not None and not 0 < question.margin < 1:
        raise ConfigError(f"--margin {question.margin:g}: expected a number between 0 and 1, such as 0.02")
    if question.margin is None and question.fail_on != "inconclusive":
        raise ConfigError(f"--fail-on {question.fail_on}: there is no verdict without --margin, such as --margin 0.02")
    if question.metric == "selection_rate":
        raise ConfigError("--metric selection_rate: neither more nor less of it is better")
    if question.stages and question.margin is not None:
        raise ConfigError("--stages and --margin are two questions; ask one at a time")
    if question.stages and len(folders) > 1:
        raise ConfigError("--stages compares the stages of one run; name one")


def _reports(folder: Path) -> list[GroupReport]:
    """The reports of the stages with a student, in the order of the stages."""
    place = folder / "reports"
    found = {path: report.load(path) for path in sorted(place.glob("*.json"))}
    for path, one in found.items():
        if type(one.context.get("index")) is not int:
            raise DataError(f"{path}: context.index must be an integer, the order of the stages; {REMEDY}")
    if not found:
        raise DataError(f"{place}: holds no report; run `agglom distill` or `agglom evaluate` first")
    students = [one for one in found.values() if one.reading.has_student]
    if not students:
        raise DataError(f"{place}: no stage with a student is evaluated yet; go on with `agglom distill --resume auto`")
    return sorted(students, key=lambda one: one.context["index"])


def _reading(folder: Path, one: GroupReport, question: Question) -> Reading:
    """The rows of the split that is asked for. Raises ConfigError for what the report does not hold."""
    splits = unique(row["split"] for row in one.rows)
    if question.split and question.split not in splits:
        raise ConfigError(f"--split {question.split}: stage '{one.stage}' of {folder} has {', '.join(splits)}")
    reading = findings.read(one.rows, one.context | ({"split": question.split} if question.split else {}))
    if not reading.labels:
        raise DataError(f"{folder}: the run has no labels, hence nothing to compare; name some with data.labels")
    pairs = unique(variant for variant, (_, predictor), _ in reading.cells if predictor.startswith("student - "))
    if not pairs:
        raise DataError(f"{folder}: stage '{one.stage}' has no difference of student and teacher; no probe reads them")
    for flag, asked, known in (
        ("--label", question.label, reading.labels),
        ("--readout", question.readout, unique(readout for _, readout in pairs)),
        ("--metric", question.metric, [metric for metric, readout in pairs if readout == question.readout]),
    ):
        if asked is not None and asked not in known:
            raise ConfigError(f"{flag} {asked}: the report of {folder} has {', '.join(known)}")
    return reading


def _scored(folder: Path, one: GroupReport, name: str, question: Question) -> Scored:
    """Raises DataError where the scores are missing, or do not belong to the manifest."""
    reading = _reading(folder, one, question)
    path = folder / "reports" / f"{one.stage}.scores.parquet"
    if not path.is_file():
        raise DataError(f"{path}: no such scores; `agglom evaluate --out {folder}` writes them")
    job, base = config.load(folder / "config.yaml")
    # An evaluation may have had other labels and groups than the training.
    manifest = manifests.load(replace(job.data, labels=tuple(reading.labels)), base, check_files=False)
    found = scores.load(path, manifest, reading.labels)
    mask_N: dict[Place, np.ndarray] = {OVERALL: np.ones(len(manifest), bool)}
    for attribute in unique(attribute for attribute, _ in reading.places if attribute):
        if not set(attribute.split("*")) <= manifest.attributes.keys():
            raise DataError(f"{folder / 'config.yaml'}: has no attribute {attribute}, the report does; {REMEDY}")
        for value, rows in manifest.view(attribute).members.items():
            mask_N[attribute, value] = np.isin(np.arange(len(manifest)), rows)
    label_N, score_N = {}, {}
    for label in reading.labels if question.label is None else [question.label]:
        label_N[label] = manifest.label_NL[:, manifest.labels.index(label)]
        by_predictor = found.of(question.readout, label) if label in found.labels else {}
        if STUDENT not in by_predictor or not any(name.startswith("teacher/") for name in by_predictor):
            raise DataError(f"{path}: no scores of student and teachers for {label}, {question.readout}; {REMEDY}")
        for predictor, score_R in by_predictor.items():
            score_N[label, predictor] = np.full(len(manifest), np.nan)
            score_N[label, predictor][found.rows_N] = score_R
    return Scored(name, one.stage, path, reading, one.context, manifest, label_N, mask_N, score_N)


def _check_same(runs: Sequence[Scored]) -> None:
    first = runs[0]
    for run in runs[1:]:
        differs = [
            what
            for what, a, b in (
                ("the manifest (sha256)", first.manifest.digest, run.manifest.digest),
                ("labels", [*first.label_N], [*run.label_N]),
                ("groups", [*first.mask_N], [*run.mask_N]),
                ("the split", first.reading.split, run.reading.split),
                ("min_support", first.context.get("min_support"), run.context.get("min_support")),
            )
            if a != b
        ]
        if not differs:
            differs += [
                f"the {split} images scored for {label}"
                for label in first.label_N
                for split in ("val", "test")
                if not np.array_equal(first.rows(label, split), run.rows(label, split))
            ]
            differs += [
                f"the patients of {_title(place)}"
                for place, mask_N in first.mask_N.items()
                if not np.array_equal(mask_N, run.mask_N[place])
            ]
        if differs:
            raise DataError(
                f"{run.name} and {first.name} cannot be compared, they differ in {', '.join(differs)}; "
                "evaluate both with the same manifest and `data`"
            )


# ── Estimates ──


def _variant(question: Question) -> tuple[str, str]:
    return question.metric, question.readout


def _guarded(measure: Callable[..., Estimate], run: Scored, *columns: np.ndarray, **settings: Any) -> Estimate:
    import torch

    settings["seed"] = run.context.get("seed") or 0
    if support := run.context.get("min_support"):
        settings["min_patients"] = support
    try:
        return measure(*map(torch.as_tensor, columns), **settings)
    except ValueError as error:
        raise DataError(f"{run.path}: {error}; {REMEDY}") from error


def _value(run: Scored, label: str, split: str, place: Place, question: Question, level: float) -> Estimate:
    """The metric of the student."""
    from agglom.core import metrics

    mine = run.rows(label, split) & run.mask_N[place]
    columns = run.label_N[label][mine], run.score_N[label, STUDENT][mine], run.manifest.patient_N[mine]
    threshold = _threshold(run, label, STUDENT, question)
    return _guarded(partial(metrics.evaluate, question.metric), run, *columns, threshold=threshold, level=level)


def _minus(
    run: Scored, other: Scored, predictor: str, label: str, place: Place, question: Question, level: float
) -> Estimate:
    """The metric of the student of `run` minus that of `predictor` in `other`, on the same rows."""
    from agglom.core import metrics

    mine = run.rows(label, run.reading.split) & run.mask_N[place]
    pair = run.score_N[label, STUDENT], other.score_N[label, predictor]
    columns = run.label_N[label][mine], *(score_N[mine] for score_N in pair), run.manifest.patient_N[mine]
    cuts = {
        "threshold_a": _threshold(run, label, STUDENT, question),
        "threshold_b": _threshold(other, label, predictor, question),
    }
    return _guarded(partial(metrics.paired, question.metric), run, *columns, **cuts, level=level)


def _threshold(run: Scored, label: str, predictor: str, question: Question) -> float:
    """The one that the report has chosen on validation; NaN where the metric has none."""
    row = run.reading.row(_variant(question), label, predictor, OVERALL)
    return math.nan if row is None or row["threshold"] is None else row["threshold"]


# ── Answers ──


def _judged(run: Scored, question: Question, margin: float) -> tuple[str, bool]:
    """The verdict of each group, label by label, and that of the gate."""
    from agglom.core import verdicts

    lines = [
        f"stage {run.stage}, {run.reading.split} split: is the student non-inferior to every teacher at a margin of "
        f"{margin:g}?",
        f"{_metric(question)} of the student minus a teacher, {question.readout} readout, one-sided 95 % bounds"
        + (", turned so that more is better" if _lower_is_better(question) else ""),
    ]
    found: dict[tuple[str, Place], Verdict] = {}
    for label in run.label_N:
        cells: list[tuple[str, ...]] = [_VERDICT_HEAD]
        for place in run.mask_N:
            pairs = {
                name: _minus(run, run, name, label, place, question, verdicts.LEVEL) for name in run.teachers(label)
            }
            found[label, place] = one = verdicts.verdict(pairs, margin, metric=question.metric)
            patients = next(iter(pairs.values())).n_patients
            cells.append((_title(place), f"{patients:,}", *_verdict_cells(one)))
        lines += ["", label, *report.aligned(cells)]
    of_groups = [one for (_, place), one in found.items() if place != OVERALL]
    # Everybody must pass like any group, but cannot stand in for groups that are too small.
    kept = all(verdicts.gate(some, fail_on=question.fail_on) for some in (found.values(), of_groups) if some)
    needed = [_NEEDED] if any(one.patients_needed for one in found.values()) else []
    lines += ["", *needed, *_flatters(run), _sentence(found, kept, bool(of_groups), question)]
    return "\n".join(lines), kept


def _verdict_cells(one: Verdict) -> tuple[str, ...]:
    kind = _WORDS[one.kind] + (f", {STATUSES[one.status]}" if one.kind == "not_assessable" else "")
    if math.isnan(one.bound):
        return kind, "-", "-", "-", "-", "-"
    needed = "-" if one.patients_needed is None else f"{one.patients_needed:,}"
    against = one.against.removeprefix("teacher/")
    # Rounded up: at the margin that is printed the group passes.
    shown = f"{(math.floor(one.smallest_margin * 1e3) + 1) / 1e3 if one.smallest_margin else 0:.3f}"
    return kind, shown, against, f"{one.difference:+.3f}", f"{one.bound:+.4f}", needed


def _sentence(found: Mapping[tuple[str, Place], Verdict], kept: bool, grouped: bool, question: Question) -> str:
    several = len({label for label, _ in found}) > 1
    named: dict[str, list[str]] = {}
    for (label, place), one in found.items():
        named.setdefault(one.kind, []).append(f"{_title(place)} ({label})" if several else _title(place))
    counts = []
    for kind, word in _WORDS.items():
        if names := named.get(kind):
            listed = ", ".join(names if len(names) <= 5 else [*names[:5], "…"])
            counts.append(f"{word} {len(names)}{'' if kind == 'non_inferior' else f': {listed}'}")
    if all(one.kind == "not_assessable" for (_, place), one in found.items() if place != OVERALL or not grouped):
        said = "no group can be assessed"
    elif not kept:
        said = f"non-inferiority at a margin of {question.margin:g} is not shown"
    elif "inconclusive" in named:
        said = f"no group is shown to be inferior at a margin of {question.margin:g}, which is all that was asked"
    else:
        said = f"non-inferior at a margin of {question.margin:g} wherever there are enough patients"
    return f"Verdict: {'yes' if kept else 'no'}, {said} ({'; '.join(counts)})."


def _overview(runs: Sequence[Scored], question: Question) -> str:
    """Groups × runs: the metric of the student with its 95 % interval."""
    split = runs[0].reading.split
    lines = [f"{split} split: {_metric(question)} of the student, {question.readout} readout; 95 % intervals"]
    weak: list[str] = []
    for label in runs[0].label_N:
        cells: list[tuple[str, ...]] = [("group", "patients", *(run.name for run in runs))]
        for place in runs[0].mask_N:
            found = [_value(run, label, split, place, question, 0.95) for run in runs]
            cells.append((_title(place), f"{found[0].n_patients:,}", *map(_level, found)))
            weak += [f"* {STATUSES[one.status]}" for one in found if one.status != "ok"]
        lines += ["", label, *report.aligned(cells)]
    return "\n".join([*lines, *unique(weak), *_flatters(runs[0])])


def _steps(stages: Sequence[Scored], question: Question) -> str:
    """Each stage minus the one before, on the same patients."""
    split, lower = stages[0].reading.split, _lower_is_better(question)
    lines = [
        f"{split} split: {_metric(question)} of the student minus that of the stage before, {question.readout} readout"
    ]
    for before, after in itertools.pairwise(stages):
        _check_same([before, after])
        for label in after.label_N:
            cells: list[tuple[str, ...]] = [("group", "patients", "minus", "difference", "95 % interval", "it is")]
            for place in after.mask_N:
                one = _minus(after, before, STUDENT, label, place, question, 0.95)
                cells += _block(place, one.n_patients, [_difference(before.name, _row(one), lower)])
            lines += ["", f"{after.name}, {label}", *report.aligned(cells)]
    return "\n".join([*lines, *_flatters(stages[0])])


def _chosen(candidates: Sequence[Scored], what: str, question: Question) -> str:
    """Which candidate the validation patients prefer, by the bound of the worst group over all labels."""
    from agglom.core import verdicts

    found: dict[str, dict[str, Estimate]] = {}
    for one in candidates:
        if not any(one.rows(label, "val").any() for label in one.label_N):
            raise DataError(f"{one.path}: no validation image is scored, and choosing a {what} on test is refused")
        places = [place for place in one.mask_N if place != OVERALL] or [OVERALL]
        found[one.name] = {
            f"{_title(place)} ({label})": _value(one, label, "val", place, question, verdicts.LEVEL)
            for label in one.label_N
            for place in places
        }
    choice = verdicts.select(found, metric=question.metric)
    side = "upper" if _lower_is_better(question) else "lower"
    cells = [(what, "worst group", f"its {side} bound")]
    for name, bound in choice.bounds.items():
        group = choice.group_of[name]
        cells.append((name, "-", "-") if group is None else (name, group, f"{bound:.3f}"))
    head = f"val split: the one-sided 95 % {side} bound of the worst group chooses the {what}, never the test split"
    said = f"Chosen: {choice.name}." if choice.name else "None can be chosen: no group has enough validation patients."
    return "\n".join([head, "", *report.aligned(cells), "", said])


# ── Words ──


def _metric(question: Question) -> str:
    return "AUROC" if question.metric == "auroc" else question.metric


def _lower_is_better(question: Question) -> bool:
    if question.metric == "auroc":
        return False  # known without torch
    from agglom.core import metrics

    return question.metric in metrics.LOWER_IS_BETTER


def _flatters(run: Scored) -> list[str]:
    return [FLATTERS] if run.reading.split == "val" else []


def _title(place: Place) -> str:
    return "all" if place == OVERALL else " ".join(place)


def _row(one: Estimate) -> Row:
    """As a row of a report."""
    values = {"value": one.value, "lo": one.lo, "hi": one.hi}
    plain = {key: None if math.isnan(number) else number for key, number in values.items()}
    return plain | {"weak": one.status != "ok", "why": STATUSES[one.status]}


def _level(one: Estimate) -> str:
    mark = "" if one.status == "ok" else "*"
    return f"-{mark}" if math.isnan(one.value) else f"{one.value:.3f}{mark} [{one.lo:.3f}, {one.hi:.3f}]"


def _difference(name: str, row: Row, lower_is_better: bool) -> tuple[str, ...]:
    value = "-" if row["value"] is None else f"{row['value']:+.3f}"
    span = "-" if None in (row["lo"], row["hi"]) else f"[{row['lo']:+.3f}, {row['hi']:+.3f}]"
    word = row["why"] or findings.verdict(row)
    return name, value, span, {"better": "worse", "worse": "better"}.get(word, word) if lower_is_better else word


def _p_value(row: Row) -> str:
    p = row.get("p_holm")
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _block(place: Place, patients: int | None, lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The lines of one group, of which the first says who it is."""
    head = (_title(place), "-" if patients is None else f"{patients:,}")
    return [(head if i == 0 else ("", "")) + line for i, line in enumerate(lines)]
