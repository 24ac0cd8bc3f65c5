"""What a comparison says: plain tables for the terminal; JSON, CSV, Markdown and one self-contained HTML file.

Everything is worded from the lines of one `compare.Comparison`; nothing is computed here but the picture.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agglom import figures, findings, report
from agglom.reading import OVERALL, SPLITS, STATUSES, Place, Reading, Series, unique

if TYPE_CHECKING:
    from agglom.compare import Comparison, Line

SCHEMA = 1
FLATTERS = "These are validation patients, on whom thresholds and weights were chosen: the numbers flatter every model."
WORDS = {
    **{"non_inferior": "non-inferior", "inferior": "inferior"},
    **{"inconclusive": "inconclusive", "not_assessable": "not assessable"},
}
_PAIRED_HEAD = ("group", "patients", "minus", "difference", "95 % interval", "the student is", "p (Holm)")
_HOLM = "p (Holm): of the claim that this group by itself differs, adjusted over the groups of its attribute."
_VERDICT_HEAD = ("group", "patients", "verdict", "smallest margin", "against", "difference", "bound", "needed")
_NEEDED = (
    "Needed: patients of the group that would decide it, if the estimate and the mix of patients stay as they are."
)


# ── Text for the terminal ──


def text(found: Comparison) -> str:
    """The answer, part by part in the order of what was asked."""
    if found.question.stages:
        return "\n\n".join([_steps(found), _chosen(found)])
    if not found.kept and not found.of("choice"):
        return _paired(found)
    parts = [_overview(found), _chosen(found)] if found.of("choice") else []
    for run in found.kept:
        judged = _judged(found, run)
        parts.append(f"run {run}\n{judged}" if len(found.stage_of) > 1 else judged)
    return "\n\n".join(parts)


def title(place: Place) -> str:
    return "all" if place == OVERALL else " ".join(place)


def _paired(found: Comparison) -> str:
    lines, [stage] = found.of("difference"), found.stage_of.values()
    told = [
        f"stage {stage}, {found.split} split: {_metric(found)} of the student minus each teacher, "
        f"{found.question.readout} readout"
    ]
    adjusted = any(one.p_holm is not None for one in lines)
    for label, mine in _by(lines, "label"):
        cells = [_PAIRED_HEAD, *(cell for _, pairs in _by(mine, "place") for cell in _pairs(pairs, found))]
        told += ["", label, *report.aligned(cells if adjusted else [cell[:-1] for cell in cells])]
    told += [
        "",
        f"Where an interval contains 0{', or p is .05 or more' if adjusted else ''}, these patients cannot tell.",
    ]
    return "\n".join([*told, *([_HOLM] if adjusted else [])])


def _pairs(pairs: Sequence[Line], found: Comparison) -> list[tuple[str, ...]]:
    lower = found.lower_is_better
    lines = [(*_difference(one, lower), _p_value(one)) for one in pairs]
    bounds = [(end, _short(one)) for one in pairs if (end := one.hi if lower else one.lo) is not None]
    if bounds:
        missing = f", undefined for {len(pairs) - len(bounds)}" if len(bounds) < len(pairs) else ""
        bound, name = (max if lower else min)(bounds)
        words = "largest upper bound" if lower else "smallest lower bound"
        lines.append((words, f"{bound:+.3f}", "", f"against {name}{missing}", ""))
    return _block(pairs[0], lines)


def _judged(found: Comparison, run: str) -> str:
    """The verdict of each group, label by label, and that of the gate."""
    lines, question = found.of("verdict", run=run, minus=""), found.question
    told = [
        f"stage {found.stage_of[run]}, {found.split} split: is the student non-inferior to every teacher at a margin "
        f"of {question.margin:g}?",
        f"{_metric(found)} of the student minus a teacher, {question.readout} readout, one-sided 95 % bounds"
        + (", turned so that more is better" if found.lower_is_better else ""),
    ]
    for label, mine in _by(lines, "label"):
        cells = [_VERDICT_HEAD, *(cell for one in mine for cell in _block(one, [_verdict_cells(one)]))]
        told += ["", label, *report.aligned(cells)]
    needed = [_NEEDED] if any(one.patients_needed for one in lines) else []
    told += ["", *needed, *_flatters(found), f"Verdict: {sentence(found, run)}"]
    return "\n".join(told)


def _verdict_cells(one: Line) -> tuple[str, ...]:
    if one.bound is None:
        return judgement(one), "-", "-", "-", "-", "-"
    needed = "-" if one.patients_needed is None else f"{one.patients_needed:,}"
    against = one.against.removeprefix("teacher/")
    return judgement(one), margin(one), against, f"{one.value:+.3f}", f"{one.bound:+.4f}", needed


def judgement(one: Line) -> str:
    """A verdict in words, with the reason where there is none."""
    return WORDS[one.verdict] + (f", {STATUSES[one.status]}" if one.verdict == "not_assessable" else "")


def margin(one: Line) -> str:
    """Rounded up: at the margin that is shown the group passes."""
    smallest = one.smallest_margin or 0.0
    return f"{(math.floor(smallest * 1e3) + 1) / 1e3 if smallest else 0:.3f}"


def sentence(found: Comparison, run: str, called: Callable[[Place], str] = title) -> str:
    """Yes or no, and how many groups got which verdict; those that did not pass are named."""
    lines, question = found.of("verdict", run=run, minus=""), found.question
    several = len({one.label for one in lines}) > 1
    named: dict[str, list[str]] = {}
    for one in lines:
        who = called(one.place)
        named.setdefault(one.verdict, []).append(f"{who} ({one.label})" if several else who)
    counts = []
    for kind, word in WORDS.items():
        if names := named.get(kind):
            listed = ", ".join(names if len(names) <= 5 else [*names[:5], "…"])
            counts.append(f"{word} {len(names)}{'' if kind == 'non_inferior' else f': {listed}'}")
    groups = [one for one in lines if one.place != OVERALL] or lines
    if all(one.verdict == "not_assessable" for one in groups):
        said = "no group can be assessed"
    elif not found.kept[run]:
        said = f"non-inferiority at a margin of {question.margin:g} is not shown"
    elif "inconclusive" in named:
        said = f"no group is shown to be inferior at a margin of {question.margin:g}, which is all that was asked"
    else:
        said = f"non-inferior at a margin of {question.margin:g} wherever there are enough patients"
    return f"{'yes' if found.kept[run] else 'no'}, {said} ({'; '.join(counts)})."


def _overview(found: Comparison) -> str:
    lines = found.of("value")
    told = [f"{found.split} split: {_metric(found)} of the student, {found.question.readout} readout; 95 % intervals"]
    for label, mine in _by(lines, "label"):
        cells: list[tuple[str, ...]] = [("group", "patients", *found.stage_of)]
        cells += [(*_head(runs[0]), *map(_level, runs)) for _, runs in _by(mine, "place")]
        told += ["", label, *report.aligned(cells)]
    weak = unique(f"* {one.why}" for one in lines if one.why)
    return "\n".join([*told, *weak, *_flatters(found)])


def _steps(found: Comparison) -> str:
    told = [
        f"{found.split} split: {_metric(found)} of the student minus that of the stage before, "
        f"{found.question.readout} readout"
    ]
    for (stage, label), mine in _by(found.of("difference"), "stage", "label"):
        cells: list[tuple[str, ...]] = [("group", "patients", "minus", "difference", "95 % interval", "it is")]
        for one in mine:
            cells += _block(one, [_difference(one, found.lower_is_better)])
        told += ["", f"{stage}, {label}", *report.aligned(cells)]
    return "\n".join([*told, *_flatters(found)])


def _chosen(found: Comparison) -> str:
    what, side = _what(found), "upper" if found.lower_is_better else "lower"
    cells = [(what, "worst group", f"its {side} bound")]
    for one in found.of("choice"):
        group = "-" if one.bound is None else f"{title(one.place)} ({one.label})"
        cells.append((_candidate(one, found), group, "-" if one.bound is None else f"{one.bound:.3f}"))
    head = f"val split: the one-sided 95 % {side} bound of the worst group chooses the {what}, never the test split"
    return "\n".join([head, "", *report.aligned(cells), "", _choice(found)])


def _choice(found: Comparison) -> str:
    names = [_candidate(one, found) for one in found.of("choice", chosen=True)]
    return f"Chosen: {names[0]}." if names else "None can be chosen: no group has enough validation patients."


# ── Words ──


def _what(found: Comparison) -> str:
    return "stage" if found.question.stages else "run"


def _candidate(one: Line, found: Comparison) -> str:
    return one.stage if found.question.stages else one.run


def _metric(found: Comparison) -> str:
    return "AUROC" if found.question.metric == "auroc" else found.question.metric


def _flatters(found: Comparison) -> list[str]:
    return [FLATTERS] if found.split == "val" else []


def _short(one: Line) -> str:
    return one.minus.removeprefix("teacher/")


def _level(one: Line) -> str:
    mark = "*" if one.weak else ""
    return f"-{mark}" if one.value is None else f"{one.value:.3f}{mark} [{one.lo:.3f}, {one.hi:.3f}]"


def _difference(one: Line, lower_is_better: bool) -> tuple[str, ...]:
    value = "-" if one.value is None else f"{one.value:+.3f}"
    span = "-" if None in (one.lo, one.hi) else f"[{one.lo:+.3f}, {one.hi:+.3f}]"
    return _short(one), value, span, one.why or _said(one, lower_is_better)


def _said(one: Line, lower_is_better: bool) -> str:
    return findings.verdict(_row(one, lower_is_better))


def _p_value(one: Line) -> str:
    p = one.p_holm
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _head(one: Line) -> tuple[str, str]:
    return title(one.place), "-" if one.n_patients is None else f"{one.n_patients:,}"


def _block(one: Line, lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The lines of one group, of which the first says who it is."""
    return [(_head(one) if i == 0 else ("", "")) + line for i, line in enumerate(lines)]


def _by(lines: Iterable[Line], *keys: str) -> list[tuple[Any, list[Line]]]:
    """Lines by the values of `keys`, in order of first appearance."""
    found: dict[Any, list[Line]] = {}
    for one in lines:
        values = tuple(getattr(one, key) for key in keys)
        found.setdefault(values if len(keys) > 1 else values[0], []).append(one)
    return list(found.items())


def _row(one: Line, turned: bool = False) -> dict[str, Any]:
    """As the row of a report, for what draws and words those; a difference `turned` so that more is better."""
    row = asdict(one) | {"weak": one.weak}
    if turned:
        ends = {"value": one.value, "lo": one.hi, "hi": one.lo}
        row |= {key: None if number is None else -number for key, number in ends.items()}
    return row


# ── Files ──


def write(found: Comparison, folder: Path) -> list[Path]:
    """`folder/compare.{json,csv,md,html}`.

    The JSON holds `schema`, `question` (fields of `compare.Question`), `split`, `stages` (the last one, by run), `kept`
    (whether the margin is, by run; empty where none was asked for) and `rows`, a list of `compare.Line`; the CSV holds
    these rows. Raises DataError naming a file that cannot be written.
    """
    rows = [asdict(one) for one in found.lines]
    drawn = view(found)
    texts = {
        "json": _json(found, rows),
        "csv": _csv(rows),
        "md": report.environment().get_template("compare.md.j2").render(drawn),
        "html": report.environment().get_template("compare.html.j2").render(drawn),
    }
    return [report.put(folder / f"compare.{suffix}", content) for suffix, content in texts.items()]


def _json(found: Comparison, rows: Sequence[dict[str, Any]]) -> str:
    """One row a line, so that comparisons can be compared by eye and by diff."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    head = {"schema": SCHEMA, "question": asdict(found.question), "split": found.split}
    head |= {"stages": found.stage_of, "kept": found.kept}
    told = ",\n".join(f"{encode(key)}: {encode(value)}" for key, value in head.items())
    lines = ",\n".join(map(encode, rows))
    return f'{{{told},\n"rows": [\n{lines}\n]}}\n'


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    from agglom.compare import Line

    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Line)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def view(found: Comparison) -> dict[str, Any]:
    """Everything that the templates draw."""
    reading = Reading(found.split, {}, found.simulated)
    side = "upper" if found.lower_is_better else "lower"
    lead, more = _lead(found, reading)
    return {
        "found": found,
        "metric": _metric(found),
        "what": _what(found),
        "side": side,
        "who": SPLITS.get(found.split, f"{found.split} patients"),
        "lead": lead,
        "more": more,
        "verdicts": [(run, _verdict_parts(found, run, reading)) for run in found.kept],
        "adjusted": any(one.p_holm is not None for one in found.lines),
        "values": _parts(found.of("value"), reading, lambda one: one.run),
        "differences": _difference_parts(found, reading),
        "choices": [(_candidate(one, found), one, reading.title(one.place)) for one in found.of("choice")],
        "limits": _limits(found, reading),
    }


def _parts(
    lines: Sequence[Line],
    reading: Reading,
    name: Callable[[Line], str],
    mark: float | None = None,
    turned: bool = False,
) -> list[tuple[str, dict[str, Any]]]:
    """A figure a label: by group a band with a line for each name."""
    marks = {one: mark for mark, one in enumerate(unique(map(name, lines)), 1)}
    found = []
    for label, mine in _by(lines, "label"):
        bands = []
        for place, several in _by(mine, "place"):
            reasons, patients = unique(one.why for one in several), several[0].n_patients
            rows = [(Series(name(one), marks[name(one)], label, one.run), [_row(one, turned)]) for one in several]
            support = "" if patients is None else findings.count(patients, "patient")
            why = reasons[0] if len(reasons) == 1 else ""
            bands.append({"title": reading.title(place), "support": support, "why": why, "lines": rows, "place": place})
        # A difference is read against 0, whatever else its axis marks.
        zero = [] if mark is None else [{"value": 0.0, "lo": None, "hi": None, "weak": False}]
        drawn = [rows[0] for band in bands for _, rows in band["lines"]]
        found.append((label, {"bands": bands, "axis": figures.axis([*drawn, *zero], mark)}))
    return found


def _verdict_parts(found: Comparison, run: str, reading: Reading) -> list[tuple[str, dict[str, Any]]]:
    """Against each teacher, and in `joint` against all of them; what they say in words."""

    def worded(one: Line) -> dict[str, str]:
        needed = "–" if one.patients_needed is None else f"{one.patients_needed:,}"
        return {"says": WORDS[one.verdict], "least": "–" if one.bound is None else margin(one), "needed": needed}

    each = [one for one in found.of("verdict", run=run) if one.minus]
    parts = _parts(each, reading, _short, -(found.question.margin or 0.0))
    for label, drawn in parts:
        for band in drawn["bands"]:
            mine = {"run": run, "label": label, "place": band["place"]}
            [joint] = found.of("verdict", **mine, minus="")
            band["joint"] = _row(joint) | worded(joint) | {"against": joint.against.removeprefix("teacher/")}
            for _, [row] in band["lines"]:
                row |= worded(*found.of("verdict", **mine, minus=row["minus"]))
    return parts


def _difference_parts(found: Comparison, reading: Reading) -> list[tuple[str, str, dict[str, Any]]]:
    """(stage, label, figure): of the one stage of a run minus each teacher, or of each stage minus the one before."""
    return [
        (stage, label, drawn)
        for stage, mine in _by(found.of("difference"), "stage")
        for label, drawn in _parts(mine, reading, _short, 0.0, turned=found.lower_is_better)
    ]


def _lead(found: Comparison, reading: Reading) -> tuple[str, list[str]]:
    """The finding in one sentence, and what else should be known before any figure."""
    if found.kept:
        told = {run: sentence(found, run, reading.title) for run in found.kept}
        more = [*_flatters(found)]
        if len(told) == 1:
            [only] = told.values()
            return only[0].upper() + only[1:], [*more, *_failures(found, reading)]
        passed = [run for run, kept in found.kept.items() if kept]
        names = f": {findings.listed(passed)}" if passed else ""
        return f"The margin of {found.question.margin:g} is kept by {len(passed)} of {len(told)} runs{names}.", [
            *(f"Run {run}: {said}" for run, said in told.items()),
            *more,
            _why_chosen(found, reading),
        ]
    tally = [*_tally(found, reading), *_flatters(found)]
    if found.of("choice"):
        return _why_chosen(found, reading), tally
    return tally[0], tally[1:]


def _failures(found: Comparison, reading: Reading) -> list[str]:
    """A sentence for each group that did not pass, with the teacher in its way."""
    several = len({one.label for one in found.lines}) > 1
    told = []
    for one in found.of("verdict", minus=""):
        who = f"{reading.title(one.place)}{f', {one.label}' if several else ''}"
        if one.verdict == "not_assessable":
            told.append(f"{who}: {judgement(one)}.")
        elif one.verdict != "non_inferior":
            needed = (
                f" {findings.count(one.patients_needed, 'patient')} would decide it." if one.patients_needed else ""
            )
            told.append(
                f"{who}: {WORDS[one.verdict]}, {findings.number(one.value, True)} against "
                f"{one.against.removeprefix('teacher/')}, at worst {findings.number(one.bound, True)}.{needed}"
            )
    return told


def _why_chosen(found: Comparison, reading: Reading) -> str:
    best = found.of("choice", chosen=True)
    if not best:
        return _choice(found)
    [one] = best
    side = "at most" if found.lower_is_better else "at least"
    return (
        f"Chosen: {_candidate(one, found)}, whose worst group among validation patients, {reading.title(one.place)} "
        f"({one.label}), has {side} {findings.number(one.bound)} ({_metric(found)})."
    )


def _tally(found: Comparison, reading: Reading) -> list[str]:
    """In how many differences the student is ahead or behind, then in which."""
    lines = found.of("difference")
    several = len({one.label for one in lines}) > 1
    where: dict[str, dict[str, list[str]]] = {"worse": {}, "better": {}}
    for one in lines:
        word = "" if one.weak else _said(one, found.lower_is_better)
        if word in where:
            who = f"{reading.title(one.place)}{f' ({one.label})' if several else ''}"
            where[word].setdefault(_short(one), []).append(who)
    worse, better = (sum(map(len, named.values())) for named in where.values())
    if not lines:
        return []
    told = [
        f"Of {findings.count(len(lines), 'difference')} the student is behind in {worse} and ahead in {better}; in "
        f"{len(lines) - worse - better} these patients cannot tell."
    ]
    for word, says in (("worse", "Behind"), ("better", "Ahead of")):
        told += [f"{says} {name}: {findings.listed(groups)}." for name, groups in where[word].items()]
    return told


def _limits(found: Comparison, reading: Reading) -> list[str]:
    told = []
    for why, mine in _by([one for one in found.lines if one.why], "why"):
        names = unique(reading.title(one.place) for one in mine)
        told.append(f"No finding, {why}: {findings.listed(names)}.")
    if found.kept:
        told += [
            "The margin must be chosen before the bounds are seen. Non-inferior is claimed against every teacher at "
            "once, so no best teacher is picked, and at most 5 % of samples say so wrongly. Inferior is not adjusted "
            "for the number of teachers.",
            "A group that cannot be assessed neither passes nor fails; nothing is known of it.",
        ]
    if any(one.patients_needed for one in found.lines):
        told.append("Patients needed suppose that the estimate and the mix of patients stay as they are.")
    if found.of("choice"):
        told.append(
            f"The {_what(found)} was chosen by its worst group on validation patients; its bound there flatters it, as "
            "that of any best of several."
        )
    if found.of("difference"):
        told.append(
            "Each interval stands for one comparison. Of many that are equal in truth, one in twenty seems not."
        )
    return told
