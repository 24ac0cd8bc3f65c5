"""The student of a run beside its teachers, beside other runs and beside its own earlier stages.

Everything is paired on the same patients. What one run without a margin says is read from `reports/<stage>.json` alone;
verdicts, runs and stages are computed anew from `reports/<stage>.scores.parquet`, and torch is imported only for them.
Here is what is asked and what is computed, once; `comparison` words it for the terminal and for files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agglom import comparison, config, report, scores
from agglom.data import manifest as manifests
from agglom.data.manifest import Manifest
from agglom.errors import ConfigError, DataError
from agglom.reading import OVERALL, STATUSES, Place, Reading, read, unique
from agglom.report import REMEDY, GroupReport
from agglom.serving import Serving

if TYPE_CHECKING:
    from agglom.core.metrics import Estimate
    from agglom.core.verdicts import FailOn, Verdict
    from agglom.samples import Paired

STUDENT = "student"
LEVEL = 0.95
_BEFORE = "before"


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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing that was found of one group: a row of `compare.json` and `compare.csv`. What is undefined, or of
    another kind of row, is null; `status` (of `report`) and `why` (in words) say why no finding is drawn from a number.

    kind:
        value: the metric of the student of `run` after `stage`, with its 95 % interval.
        difference: that metric minus the one of `minus`, a teacher (`teacher/<name>`) or the stage before, with its
            95 % interval; `p_holm` where the report has it.
        verdict: the difference against `minus`, turned so that more is better for the student, with a 90 % interval:
            each of its ends is a one-sided 95 % bound. `bound` is the lower one, `verdict` one of `core.verdicts.KINDS`
            at the margin, `smallest_margin` = max(0, −bound), `patients_needed` would decide what is inconclusive.
            `minus` "" is all teachers together: non-inferior only if against each; `against` is then the teacher with
            the lowest bound, whose numbers these are, and hi is null.
        choice: which group is worst for `run` or `stage` on validation patients, and its one-sided 95 % `bound`, in the
            units of the metric; `chosen` where this one has the best of all. `attribute` "" and `group` "" where it
            lacks a group that another one has.

    `attribute` "" and `group` "all" is everybody; a crossing is `sex*view`, `F|AP`. `level` is that of lo and hi.
    """

    kind: str
    run: str
    stage: str
    split: str
    label: str
    metric: str
    readout: str
    attribute: str
    group: str
    n_patients: int | None = None
    minus: str = ""
    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    level: float | None = None
    status: str = "ok"
    why: str = ""
    p_holm: float | None = None
    verdict: str = ""
    against: str = ""
    bound: float | None = None
    smallest_margin: float | None = None
    patients_needed: int | None = None
    chosen: bool | None = None

    @property
    def place(self) -> Place:
        return self.attribute, self.group

    @property
    def weak(self) -> bool:
        return bool(self.why)


@dataclass(frozen=True)
class Comparison:
    """What was found, by group. `stage_of` by run names its last stage, `kept` by run says whether the margin is."""

    question: Question
    split: str
    lower_is_better: bool
    lines: tuple[Line, ...]
    stage_of: dict[str, str]
    kept: dict[str, bool]
    simulated: tuple[str, ...] = ()

    def of(self, kind: str, **keys: Any) -> list[Line]:
        """The lines of a kind whose fields are these."""
        return [one for one in self.lines if one.kind == kind and all(getattr(one, key) == keys[key] for key in keys)]


@dataclass(frozen=True)
class Scored:
    """A stage and the scores that its report was computed from, by (label, split); `rows_of` by place (attribute,
    group) are the manifest rows of that group, everybody first. `name` tells it from those that it is compared with."""

    name: str
    run: str
    stage: str
    path: Path
    reading: Reading
    context: Mapping[str, Any]
    manifest: Manifest
    rows_of: dict[Place, np.ndarray]
    sample_of: dict[tuple[str, str], Paired]

    @property
    def labels(self) -> list[str]:
        return unique(label for label, _ in self.sample_of)


def main(folders: Sequence[Path], question: Question, files: Path | None = None) -> tuple[str, bool]:
    """The answer as text, and whether it is a yes: False only where a margin was asked for and is not kept.

    - one run: the paired table of its last stage, or with `margin` a verdict for each group;
    - several runs: the student of each by group, and which of them the validation patients prefer; with `margin` the
      verdicts of each, too, and a yes only if it is one for all;
    - `stages`: each stage minus the one before, and which of them the validation patients prefer.

    `files` is a folder for `compare.{json,csv,md,html}`, which say the same and more. Raises ConfigError for a question
    that cannot be asked; DataError for a run without report or scores, for runs that were not scored on the same
    patients, and for a folder that cannot be written.
    """
    _check(folders, question)
    if files is None and len(folders) == 1 and question.margin is None and not question.stages:
        return table(folders[0], question), True
    found = compare(folders, question)
    if files is not None:
        comparison.write(found, files)
    return comparison.text(found), all(found.kept.values())


def table(folder: Path, question: Question | None = None) -> str:
    """The paired differences (student − each teacher) of the last stage's report in `folder`.

    The smallest lower bound of a group is the lowest end of its 95 % intervals over the teachers; where a lower value
    is better, the largest upper bound is the highest. Raises as `main`.
    """
    last = _reports(folder)[-1]
    if not last.reading.labels:
        return f"No labels, hence no paired difference. What the student leaves unexplained:\n\n{report.headline(last)}"
    return comparison.text(compare([folder], question or Question()))


def compare(folders: Sequence[Path], question: Question) -> Comparison:
    """What `main` tells. Raises as it does."""
    if question.stages:
        stages = [_scored(folders[0], one, one.stage, question) for one in _reports(folders[0])]
        if len(stages) < 2:
            raise DataError(f"{folders[0]}: '{stages[0].name}' is the only stage with a student that is evaluated yet")
        return _found(question, stages, [*_steps(stages, question), *_choices(stages, question)])
    if len(folders) == 1 and question.margin is None:
        return _reported(folders[0], question)
    short = [folder.absolute().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    again = [names[:index].count(name) for index, name in enumerate(names)]
    names = [f"{name} ({times + 1})" if times else name for name, times in zip(names, again, strict=True)]
    runs = [_scored(one, _reports(one)[-1], name, question) for one, name in zip(folders, names, strict=True)]
    lines: list[Line] = []
    if len(runs) > 1:
        _check_same(runs)
        lines += [*_values(runs, question), *_choices(runs, question)]
    kept: dict[str, bool] = {}
    if question.margin is not None:
        for run in runs:
            judged, kept[run.name] = _judged(run, question, question.margin)
            lines += judged
    return _found(question, runs, lines, kept)


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
    reading = read(one.rows, one.context | ({"split": question.split} if question.split else {}))
    if not reading.labels:
        raise DataError(f"{folder}: the run has no labels, hence nothing to compare; name some with data.labels")
    pairs = _pairs(reading)
    if not pairs:
        raise DataError(f"{folder}: stage '{one.stage}' has no difference of student and teacher; no probe reads them")
    readouts = unique(readout for _, readout, _ in pairs)
    known = unique(metric for metric, readout, _ in pairs if readout == question.readout)
    for flag, asked, there in (
        ("--label", question.label, reading.labels),
        ("--readout", question.readout, readouts),
        ("--metric", question.metric, known),
    ):
        if asked is not None and asked not in there:
            raise ConfigError(f"{flag} {asked}: the report of {folder} has {', '.join(there)}")
    if not _labels(reading, question):
        raise ConfigError(f"--label {question.label}: the report of {folder} has no {question.metric} of it")
    return reading


def _pairs(reading: Reading) -> list[tuple[str, str, str]]:
    """The (metric, readout, label) of which there are differences of student and teacher."""
    return unique((*variant, label) for variant, (label, name), _ in reading.cells if name.startswith("student - "))


def _labels(reading: Reading, question: Question) -> list[str]:
    """The labels that are asked for, and judged by the metric that is."""
    mine = [label for *variant, label in _pairs(reading) if tuple(variant) == _variant(question)]
    return [label for label in reading.labels if label in mine and question.label in (None, label)]


def _scored(folder: Path, one: GroupReport, name: str, question: Question) -> Scored:
    """Raises DataError where the scores are missing, or do not belong to the manifest."""
    from agglom import samples

    reading = _reading(folder, one, question)
    path = folder / "reports" / f"{one.stage}.scores.parquet"
    if not path.is_file():
        raise DataError(f"{path}: no such scores; `agglom evaluate --out {folder}` writes them")
    job, base = config.load(folder / "config.yaml")
    # An evaluation may have had other labels and groups than the training.
    labels = [label for label in reading.labels if label not in reading.classes]
    manifest = manifests.load(replace(job.data, labels=tuple(labels)), base, check_files=False)
    found = scores.load(path, manifest, labels)
    rows_of: dict[Place, np.ndarray] = {OVERALL: np.arange(len(manifest))}
    for attribute in unique(attribute for attribute, _ in reading.places if attribute):
        if not set(attribute.split("*")) <= manifest.attributes.keys():
            raise DataError(f"{folder / 'config.yaml'}: has no attribute {attribute}, the report does; {REMEDY}")
        rows_of |= {(attribute, value): rows for value, rows in manifest.view(attribute).members.items()}
    support, seed = one.context.get("min_support"), one.context.get("seed")
    settings = samples.Settings.of(job.data, job.evaluate, seed or 0)
    settings = replace(settings, min_patients=support) if support else settings
    sample_of: dict[tuple[str, str], Paired] = {}
    for label in _labels(reading, question):
        members = [label] if label in labels else reading.members(label)
        scored = [set(found.of(question.readout, one)) for one in members if one in found.labels]
        known = set.intersection(*scored) if len(scored) == len(members) else set()
        if STUDENT not in known or not any(name.startswith("teacher/") for name in known):
            raise DataError(f"{path}: no scores of student and teachers for {label}, {question.readout}; {REMEDY}")
        make = samples.binary if label in labels else samples.classes
        for split in ("val", "test"):
            sample_of[label, split] = make(found, manifest, label, question.readout, split, settings)
    run = folder.absolute().name if question.stages else name
    return Scored(name, run, one.stage, path, reading, one.context, manifest, rows_of, sample_of)


def _check_same(runs: Sequence[Scored]) -> None:
    first = runs[0]
    for run in runs[1:]:
        differs = [
            what
            for what, a, b in (
                ("the manifest (sha256)", first.manifest.digest, run.manifest.digest),
                ("labels", first.labels, run.labels),
                ("groups", [*first.rows_of], [*run.rows_of]),
                ("the split", first.reading.split, run.reading.split),
                ("min_support", first.context.get("min_support"), run.context.get("min_support")),
            )
            if a != b
        ]
        if not differs:
            differs += [
                f"the {split} images scored for {label}"
                for (label, split), sample in first.sample_of.items()
                if not np.array_equal(sample.place_M, run.sample_of[label, split].place_M)
            ]
            differs += [
                f"the patients of {comparison.title(place)}"
                for place, rows in first.rows_of.items()
                if not np.array_equal(rows, run.rows_of[place])
            ]
        if differs:
            raise DataError(
                f"{run.name} and {first.name} cannot be compared, they differ in {', '.join(differs)}; "
                "evaluate both with the same manifest and `data`"
            )


# ── Estimates ──


def _variant(question: Question) -> tuple[str, str]:
    return question.metric, question.readout


def _guarded(run: Scored, measure: Callable[[], Estimate]) -> Estimate:
    try:
        return measure()
    except ValueError as error:
        raise DataError(f"{run.path}: {error}; {REMEDY}") from error


def _value(run: Scored, label: str, split: str, place: Place, question: Question, level: float) -> Estimate:
    """The metric of the student."""
    sample, cut = run.sample_of[label, split], _threshold(run, label, STUDENT, question)
    rows_X = sample.at(run.rows_of[place])
    return _guarded(run, lambda: sample.measured(question.metric, STUDENT, rows_X, cut)(level))


def _minus(run: Scored, teacher: str, label: str, place: Place, question: Question, level: float) -> Estimate:
    """The metric of the student minus that of a teacher."""
    sample, names = run.sample_of[label, run.reading.split], (STUDENT, teacher)
    rows_X, cuts = sample.at(run.rows_of[place]), [_threshold(run, label, name, question) for name in names]
    return _guarded(run, lambda: sample.difference(question.metric, names, rows_X, cuts, level)[0])


def _step(after: Scored, before: Scored, label: str, place: Place, question: Question) -> Estimate:
    """The metric of the student after a stage minus that after the stage before."""
    from agglom import samples

    now, then = (stage.sample_of[label, after.reading.split] for stage in (after, before))
    field = "score_PNC" if isinstance(now, samples.Classes) else "score_PN"
    both = {STUDENT: getattr(now, field)[STUDENT], _BEFORE: getattr(then, field)[STUDENT]}
    columns: dict[str, Any] = {field: both}
    sample, rows_X = replace(now, **columns), now.at(after.rows_of[place])
    cuts = [_threshold(stage, label, STUDENT, question) for stage in (after, before)]
    return _guarded(after, lambda: sample.difference(question.metric, [*both], rows_X, cuts, LEVEL)[0])


def _threshold(run: Scored, label: str, predictor: str, question: Question) -> float:
    """The one that the report has chosen on validation; NaN where the metric has none."""
    row = run.reading.row(_variant(question), label, predictor, OVERALL)
    return math.nan if row is None or row["threshold"] is None else row["threshold"]


# ── Answers ──


def _found(
    question: Question, runs: Sequence[Scored], lines: Sequence[Line], kept: Mapping[str, bool] | None = None
) -> Comparison:
    reading, stage_of = runs[0].reading, {run.run: run.stage for run in runs}
    lower = _lower_is_better(question)
    return Comparison(question, reading.split, lower, tuple(lines), stage_of, dict(kept or {}), reading.simulated)


def _line(kind: str, at: tuple[str, str, str, str, Place], question: Question, **more: Any) -> Line:
    """`at`: run, stage, split, label and place."""
    run, stage, split, label, (attribute, group) = at
    metric, readout = _variant(question)
    more = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in more.items()}
    more |= {"run": run, "stage": stage, "split": split, "label": label, "metric": metric, "readout": readout}
    return Line(kind=kind, attribute=attribute, group=group, **more)


def _of(one: Estimate, level: float) -> dict[str, Any]:
    return {
        **{"value": one.value, "lo": one.lo, "hi": one.hi, "level": level, "n_patients": one.n_patients},
        **{"status": one.status, "why": STATUSES[one.status]},
    }


def _reported(folder: Path, question: Question) -> Comparison:
    """Student minus each teacher, as the last report has it."""
    last = _reports(folder)[-1]
    reading, name, lines = _reading(folder, last, question), folder.absolute().name, []
    for label, place in itertools.product(_labels(reading, question), reading.places):
        for one in reading.pairs(label):
            row = reading.row(_variant(question), label, one.predictor, place)
            if row is not None:
                keys = ("value", "lo", "hi", "n_patients", "status", "why", "p_holm")
                more = {key: row[key] for key in keys} | {"minus": one.predictor.removeprefix("student - ")}
                at = (name, last.stage, reading.split, label, place)
                lines.append(_line("difference", at, question, level=LEVEL, **more))
    lower, stage_of = _lower_is_better(question), {name: last.stage}
    return Comparison(question, reading.split, lower, tuple(lines), stage_of, {}, reading.simulated)


def _judged(run: Scored, question: Question, margin: float) -> tuple[list[Line], bool]:
    """The verdicts of each group against each teacher and all of them together, and that of the gate."""
    from agglom.core import verdicts

    lines: list[Line] = []
    groups: list[Verdict] = []
    everybody: list[Verdict] = []
    serving = Serving.of(run.manifest, run.context)
    for label, place in itertools.product(run.labels, run.rows_of):
        split = run.reading.split
        scored = [name for name in run.sample_of[label, split].predictors if name.startswith("teacher/")]
        teachers = [name for name in scored if serving.judged(name, place)]
        if not teachers:
            continue
        pairs = {name: _minus(run, name, label, place, question, verdicts.LEVEL) for name in teachers}
        for names in (*([name] for name in teachers), teachers):
            one = verdicts.verdict({name: pairs[name] for name in names}, margin, metric=question.metric)
            more = _of(verdicts.turned(question.metric, pairs[names[0]]), verdicts.LEVEL) | {"minus": names[0]}
            if names is teachers:
                more |= {"minus": "", "value": one.difference, "lo": one.bound, "hi": None}
                more |= {"status": one.status, "why": STATUSES[one.status]}
            found = {key: getattr(one, key) for key in ("against", "bound", "smallest_margin", "patients_needed")}
            lines.append(
                _line("verdict", (run.run, run.stage, split, label, place), question, verdict=one.kind, **more, **found)
            )
        (everybody if place == OVERALL else groups).append(one)
    # Everybody must pass like any group, but cannot stand in for groups that are too small.
    parts = [part for part in ([*everybody, *groups], groups) if part]
    return lines, all(verdicts.gate(part, fail_on=question.fail_on) for part in parts)


def _values(runs: Sequence[Scored], question: Question) -> Iterator[Line]:
    """Groups × runs: the metric of the student with its 95 % interval."""
    split = runs[0].reading.split
    for label, place, run in itertools.product(runs[0].labels, runs[0].rows_of, runs):
        one = _value(run, label, split, place, question, LEVEL)
        yield _line("value", (run.run, run.stage, split, label, place), question, **_of(one, LEVEL))


def _steps(stages: Sequence[Scored], question: Question) -> Iterator[Line]:
    """Each stage minus the one before, on the same patients."""
    for before, after in itertools.pairwise(stages):
        _check_same([before, after])
        for label, place in itertools.product(after.labels, after.rows_of):
            more = _of(_step(after, before, label, place, question), LEVEL) | {"minus": before.name}
            yield _line("difference", (after.run, after.stage, after.reading.split, label, place), question, **more)


def _choices(candidates: Sequence[Scored], question: Question) -> Iterator[Line]:
    """Which candidate the validation patients prefer, by the bound of the worst group over all labels."""
    from agglom.core import verdicts

    what = "stage" if question.stages else "run"
    found: dict[str, dict[str, Estimate]] = {}
    where: dict[str, tuple[str, Place]] = {}
    for one in candidates:
        if not any(len(one.sample_of[label, "val"]) for label in one.labels):
            raise DataError(f"{one.path}: no validation image is scored, and choosing a {what} on test is refused")
        places = [place for place in one.rows_of if place != OVERALL] or [OVERALL]
        found[one.name] = {}
        for label, place in itertools.product(one.labels, places):
            key = f"{comparison.title(place)} ({label})"
            where[key] = label, place
            found[one.name][key] = _value(one, label, "val", place, question, verdicts.LEVEL)
    choice = verdicts.select(found, metric=question.metric)
    for one in candidates:
        worst = choice.group_of[one.name]
        label, place = ("", ("", "")) if worst is None else where[worst]
        patients = None if worst is None else found[one.name][worst].n_patients
        more = {"bound": choice.bounds[one.name], "chosen": choice.name == one.name, "n_patients": patients}
        yield _line("choice", (one.run, one.stage, "val", label, place), question, level=verdicts.LEVEL, **more)


def _lower_is_better(question: Question) -> bool:
    if question.metric == "auroc":
        return False  # known without torch
    from agglom.core import metrics

    return question.metric in metrics.LOWER_IS_BETTER
