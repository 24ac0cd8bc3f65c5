"""What the rows of a report say: select, order, word. Nothing is computed here that is not a row.

A reading is of a distillation (student, teachers, ensemble) or an audit: predictors of any name, of which the first is
the one that the others are compared with. Words follow the interval: where it contains 0, the report says that it
cannot tell. Groups below the minimum support are shown, but no finding is drawn from them, and an undefined number is a
dash with its reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

Row = dict[str, Any]
Place = tuple[str, str]  # attribute, group
Variant = tuple[str, str]  # metric, readout

STATUSES = {
    "ok": "",
    "empty": "no image",
    "single_class": "only one outcome occurs",
    "constant_score": "every image has the same score",
    "below_min_pos": "too few positive patients",
    "below_min_neg": "too few negative patients",
    "missing_attr": "group not annotated",
}
FVU_BAR = 0.8
OVERALL = ("", "all")
AUROC = ("auroc", "linear")
READOUTS = {"linear": "AUROC, linear probe", "knn": "nearest neighbours", "zeroshot": "zero-shot"}
OWN = "linear, own threshold"
RATES = {
    **{"tpr": "sensitivity (TPR)", "fpr": "false alarms (FPR)"},
    **{"ppv": "right if flagged (PPV)", "npv": "right if not (NPV)", "selection_rate": "flagged"},
}
QUALITIES = {
    **{"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "F1", "brier": "Brier score"},
    **{"ece": "calibration error (ECE)"},
}
SPREADS = {
    **{"auroc_gap": "AUROC gap", "auroc_worst": "worst AUROC", "auroc_ratio": "worst ÷ best"},
    **{"auroc_gap_to_overall": "farthest from all", "auroc_es": "equity-scaled"},
}
CRITERIA = {
    **{"tpr_gap": "sensitivity (equal opportunity)", "fpr_gap": "false alarms"},
    **{"equalized_odds_difference": "equalized odds", "demographic_parity_difference": "flagged (parity)"},
}
RARE = 0.05
SPLITS = {"test": "test patients", "val": "validation patients"}


class Series(NamedTuple):
    """One line of a figure: name, marker (0 the student, −1 the ensemble, else any), and the key of its rows."""

    name: str
    mark: int
    subject: str
    predictor: str


@dataclass(frozen=True)
class Reading:
    """The rows of the headline split by (metric, readout), (label or target, predictor), (attribute, group).

    Rows gain `weak` (no finding may be drawn) and `why` (the reason, in words). The readout of rates at the threshold
    of a group is `OWN`. `places` are everybody, then the groups, in the order of the rows; `labels` and `teachers`
    likewise. `given`: the scores are somebody's, not a probe's.
    """

    split: str
    cells: dict[tuple[Variant, tuple[str, str], Place], Row]
    simulated: tuple[str, ...] = ()
    given: bool = False

    @cached_property
    def places(self) -> list[Place]:
        found = unique(
            place
            for variant, _, place in self.cells
            if not (place[0] and place[1] == "all") and variant[0] != "auroc_curve"
        )
        return sorted(found, key=lambda place: place != OVERALL)

    @cached_property
    def attributes(self) -> list[str]:
        return unique(attribute for attribute, _ in self.places if attribute)

    @cached_property
    def readouts(self) -> dict[Variant, str]:
        """The columns of AUROC that there are, with their headings; the first is the one that is drawn."""
        found = {variant for variant, *_ in self.cells}
        named = {("auroc", readout): heading for readout, heading in READOUTS.items()}
        return {one: "AUROC" if self.given and one == AUROC else named[one] for one in named if one in found}

    @cached_property
    def labels(self) -> list[str]:
        return unique(subject for variant, (subject, _), _ in self.cells if variant[0] == "auroc")

    @cached_property
    def teachers(self) -> list[str]:
        predictors = unique(predictor for _, (_, predictor), _ in self.cells)
        mine = [name for name in predictors if name.startswith("teacher/") and " - " not in name]
        return [name.removeprefix("teacher/") for name in mine]

    @cached_property
    def has_student(self) -> bool:
        return any(predictor == "student" for _, (_, predictor), _ in self.cells)

    def row(self, variant: Variant, subject: str, predictor: str, place: Place) -> Row | None:
        return self.cells.get((variant, (subject, predictor), place))

    @cached_property
    def others(self) -> list[str]:
        """Predictors that are no part of a distillation: somebody's systems."""
        predictors = unique(predictor for _, (_, predictor), _ in self.cells)
        known = {"student", "ensemble", *(f"teacher/{name}" for name in self.teachers)}
        return [name for name in predictors if name not in known and " - " not in name]

    def models(self, label: str) -> list[Series]:
        teachers = [Series(name, i, label, f"teacher/{name}") for i, name in enumerate(self.teachers, 1)]
        others = [Series(name, i, label, name) for i, name in enumerate(self.others, 1 + len(teachers))]
        return [Series("student", 0, label, "student"), *teachers, *others, Series("ensemble", -1, label, "ensemble")]

    @cached_property
    def is_audit(self) -> bool:
        return bool(self.others) and not self.has_student and not self.teachers

    def first(self, label: str) -> tuple[str, str]:
        """The predictor that findings speak of, and what they call it."""
        if self.has_student:
            return "student", "the student"
        if self.is_audit:
            return self.others[0], self.others[0]
        best = self.best_teacher(label, OVERALL)
        return f"teacher/{best}", f"the teacher {best}"

    def pairs(self, label: str) -> list[Series]:
        """The differences, each named after the teacher, or after both predictors where no student is compared."""
        names = unique(predictor for _, (_, predictor), _ in self.cells if " - " in predictor)
        short = [name.removeprefix("student - ").removeprefix("teacher/").replace(" - ", " − ") for name in names]
        return [Series(one, i, label, name) for i, (one, name) in enumerate(zip(short, names, strict=True), 1)]

    def targets(self) -> list[tuple[Series, Variant]]:
        keys = unique((key, variant) for variant, key, _ in self.cells if variant[0].startswith("fvu"))
        names = unique(target.split("/")[0] for (target, _), _ in keys)
        return [(Series(key[0], 1 + names.index(key[0].split("/")[0]), *key), variant) for key, variant in keys]

    def title(self, place: Place) -> str:
        """`sex × view F · AP`; the attribute alone for its group "all"; simulated groups say so."""
        if place == OVERALL:
            return "all patients"
        made = " (simulated)" if set(place[0].split("*")) & set(self.simulated) else ""
        group = "" if place[1] == "all" else f" {place[1].replace('|', ' · ')}"
        return f"{place[0].replace('*', ' × ')}{group}{made}"

    def best_teacher(self, label: str, place: Place) -> str | None:
        rows = {name: self.row(AUROC, label, f"teacher/{name}", place) for name in self.teachers}
        values = {name: row["value"] for name, row in rows.items() if row and row["value"] is not None}
        return max(values, key=values.__getitem__, default=None)


def read(rows: Iterable[Row], context: Mapping[str, Any]) -> Reading:
    """Select the rows of the headline split (`context["split"]`, else test if any row is of test, else val)."""
    rows = list(rows)
    splits = {row["split"] for row in rows}
    split = context.get("split") or ("test" if "test" in splits else "val")
    support = context.get("min_support") or 0
    # The words and figures speak of one readout; scores that somebody gave stand where a probe's would.
    readouts = {row["readout"] for row in rows if row["metric"] == "auroc"}
    given = bool(readouts) and not readouts & {"linear", "knn"}
    stand_in = "scores" if "scores" in readouts else "zeroshot"
    cells = {}
    for row in rows:
        if row["split"] == split:
            few = row["n_patients"] is not None and row["n_patients"] < support
            why = STATUSES[row["status"]] or ("too few patients" if few else "")
            subject = row["target"] if row["metric"].startswith("fvu") else row["label"]
            readout = "linear" if given and row["readout"] == stand_in else row["readout"]
            if row["rule"] == "group":
                why = row["note"] or why
                readout = readout.replace("linear", OWN)
            key = ((row["metric"], readout), (subject or "", row["predictor"]))
            place = (row["attribute"] or "", row["group"] or "not annotated")
            cells[*key, place] = row | {"weak": bool(why), "why": why}
    return Reading(split, cells, tuple(context.get("simulated", ())), given)


def unique(items: Iterable[Any]) -> list[Any]:
    """Without repetition, in order of first appearance."""
    return list(dict.fromkeys(items))


# ── Numbers in words ──


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals and a true minus; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def interval(row: Row, signed: bool = False) -> str:
    """`0.81 to 0.89`, which cannot be misread where a bound is negative."""
    if row["lo"] is None or row["hi"] is None:
        return "no interval"
    return f"{number(row['lo'], signed)} to {number(row['hi'], signed)}"


def estimate(row: Row | None, signed: bool = False) -> str:
    """Value and interval."""
    if row is None or row["value"] is None:
        return "–"
    return f"{number(row['value'], signed)} ({interval(row, signed)})"


def count(n: int, noun: str) -> str:
    """`1 image`, `1,200 images`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def support(row: Row) -> str:
    """How many stand behind a number."""
    counts = [] if row["n_patients"] is None else [count(row["n_patients"], "patient")]
    counts += [] if row["n"] is None else [count(row["n"], "image")]
    if row["n_pos"] is not None and row["n"] and not row["metric"].startswith("fvu"):
        counts.append(f"{row['n_pos']:,} positive")
    return ", ".join(counts)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def p_value(value: float | None, name: str = "") -> str:
    """What three decimals would round to 0 is below 0.001; with a name `p = 0.020`."""
    tiny = value is not None and value < 0.0005
    text = "0.001" if tiny else number(value)
    return f"{name} {'<' if tiny else '='} {text}" if name else f"{'< ' if tiny else ''}{text}"


def gap_finding(gap: Row, which: str) -> str:
    """How far groups lie apart, whether that is a finding, what chance alone would show, what could have been found."""
    missed = gap["lo"] <= 0
    rare = missed and gap["p_value"] is not None and gap["p_value"] < RARE
    if not missed:
        truth = "the groups differ"
    elif rare:
        truth = (
            "this interval, which errs on the wide side, reaches 0, but groups that do not differ would rarely show "
            f"so large a gap ({p_value(gap['p_value'], 'p')}), so they seem to differ"
        )
    else:
        truth = "this reaches 0, so we cannot tell whether they differ"
    said = [f"{which} lie {estimate(gap)} apart: {truth}."]
    if gap["null_hi"] is not None and gap["corrected"] is not None:
        share = "" if rare or gap["p_value"] is None else f" ({p_value(gap['p_value'], 'p')})"
        said.append(
            f"Groups that do not differ would show up to {number(gap['null_hi'])} by chance in 19 of 20 cases{share}; "
            f"less what chance adds on average, {number(gap['corrected'])} of the gap remains."
        )
    if missed and gap["detectable"] is not None:
        said.append(
            "No gap between these groups would be found four times in five, so few are the patients."
            if gap["detectable"] > 1
            else f"The smallest gap that these patients would show four times in five is {number(gap['detectable'])}."
        )
    return " ".join(said)


def gap_notes(row: Row | None) -> list[str]:
    """The same in a table: what stands below the gap."""
    if row is None or row["value"] is None:
        return []
    notes, second = [], []
    if row["null_hi"] is not None:
        share = "" if row["p_value"] is None else f", {p_value(row['p_value'], 'p')}"
        notes.append(f"by chance to {number(row['null_hi'])}{share}")
    if row["corrected"] is not None:
        second.append(f"corrected {number(row['corrected'])}")
    if row["detectable"] is not None and row["lo"] is not None and row["lo"] <= 0:
        second.append("could show none" if row["detectable"] > 1 else f"could show {number(row['detectable'])}")
    notes += [", ".join(second)] if second else []
    if row["unknown_lo"] is not None and row["unknown_hi"] is not None:
        notes.append(f"unknown: {number(row['unknown_lo'])} to {number(row['unknown_hi'])}")
    return notes


def verdict(row: Row | None) -> str:
    """What a paired difference allows to say: better | worse | cannot tell | too few to judge | undefined."""
    if row is None or None in (row["value"], row["lo"], row["hi"]):
        return "undefined"
    if row["weak"]:
        return "too few to judge"
    return "better" if row["lo"] > 0 else "worse" if row["hi"] < 0 else "cannot tell"


# ── The finding ──

_CONCLUSIONS = {
    "better": ("It scores better there than its best teacher, {}.", "lies above 0: there the student scores better"),
    "worse": ("It scores worse there than its best teacher, {}.", "lies below 0: there the student scores worse"),
    "cannot tell": (
        "Whether it is as good there as its best teacher, {}, these patients cannot tell.",
        "contains 0: from these patients we cannot tell whether the student is better or worse",
    ),
}


def label_finding(reading: Reading, label: str) -> tuple[str, str]:
    """One sentence or two to lead with, and the figures behind them."""
    subject, who = reading.first(label)
    rows = {place: reading.row(AUROC, label, subject, place) for place in reading.places}
    judged = {place: row for place, row in rows.items() if row and not row["weak"] and row["value"] is not None}
    groups = [place for place in judged if place != OVERALL]
    if groups:
        worst = min(groups, key=lambda place: judged[place]["value"])
        lead = f"For “{label}”, {_lowest(reading, label) if reading.is_audit else _scores([who], reading, worst)}."
        said = [f"There {who} reaches AUROC {estimate(judged[worst])}"]
        said[-1] += f"; over all patients, {estimate(judged[OVERALL])}." if OVERALL in judged else "."
    elif OVERALL in judged:
        worst = OVERALL
        lead = f"For “{label}”, no group has enough patients for a finding."
        said = [f"Over all patients, {who} reaches AUROC {estimate(judged[worst])}."]
    else:
        lead = f"For “{label}”, there are too few patients for a finding."
        return lead, "The numbers below are shown for completeness; nothing follows from them."
    best = reading.best_teacher(label, worst)
    pair = reading.row(AUROC, label, f"student - teacher/{best}", worst)
    if verdict(pair) in _CONCLUSIONS:
        short, long = _CONCLUSIONS[verdict(pair)]
        lead += f" {short.format(best)}" if groups else ""
        reaches = estimate(reading.row(AUROC, label, f"teacher/{best}", worst))
        said.append(f"The best teacher there, {best}, reaches {reaches}.")
        said.append(f"Student minus teacher is {estimate(pair, signed=True)}; this interval {long}.")
    for one in [] if reading.teachers else reading.pairs(label):
        pair = reading.row(AUROC, label, one.predictor, worst)
        name, other = one.predictor.split(" - ", 1)
        word = verdict(pair)
        if word in _CONCLUSIONS:
            told = "we cannot tell which is better" if word == "cannot tell" else f"{name} scores {word} there"
            said.append(f"On the same patients, {name} minus {other} is {estimate(pair, signed=True)}: {told}.")
    gap = reading.row(("auroc_gap", "linear"), label, subject, (worst[0], "all"))
    if groups and gap and not gap["weak"] and None not in (gap["value"], gap["lo"]):
        left_out = any(place[0] == worst[0] and place not in judged for place in reading.places)
        which = f"The groups of {worst[0].replace('*', ' × ')}{' that are large enough' if left_out else ''}"
        said.append(gap_finding(gap, f"{which}, as {who} scores them," if reading.is_audit else which))
    return lead, " ".join(said)


def _scores(names: Sequence[str], reading: Reading, place: Place) -> str:
    return f"{listed(names)} score{'s' if len(names) == 1 else ''} lowest in {reading.title(place)}"


def _lowest(reading: Reading, label: str) -> str:
    """Where each predictor of an audit scores lowest among the groups that bear a finding."""
    found: dict[Place, list[str]] = {}
    for name in reading.others:
        rows = {place: reading.row(AUROC, label, name, place) for place in reading.places if place != OVERALL}
        levels = {place: row["value"] for place, row in rows.items() if row and not row["weak"]}
        if levels:
            found.setdefault(min(levels, key=levels.__getitem__), []).append(name)
    return ", ".join(_scores(names, reading, place) for place, names in found.items())


def tally(reading: Reading) -> str:
    """In how many groups the student is worse, better, or cannot be told from the best teacher there.

    Without teachers the same for each pair of predictors.
    """
    cells = [(label, place) for label in reading.labels for place in reading.places if place != OVERALL]
    if reading.teachers:
        rivals = [(label, place, reading.best_teacher(label, place)) for label, place in cells]
        rows = [reading.row(AUROC, label, f"student - teacher/{best}", place) for label, place, best in rivals]
        return _counted(reading, "Against the best teacher of each group, the student", rows)
    told = []
    for one in reading.pairs(""):
        name, other = one.predictor.split(" - ", 1)
        rows = [reading.row(AUROC, label, one.predictor, place) for label, place in cells]
        told.append(_counted(reading, f"Against {other}, {name}", rows))
    return " ".join(text for text in told if text)


def _counted(reading: Reading, who: str, rows: Sequence[Row | None]) -> str:
    verdicts = [verdict(row) for row in rows]
    judged = [word for word in verdicts if word in _CONCLUSIONS]
    if not judged:
        return ""
    one_label = len(reading.labels) == 1
    noun = "group" if one_label else "combination"
    scope = f"{count(len(judged), noun)}{'' if one_label else ' of a label and a group'}"
    unsure = judged.count("cannot tell")
    counts = [f"{word} in {judged.count(word)}" for word in ("worse", "better") if word in judged]
    if counts:
        told = f"{who} scores {' and '.join(counts)} of {scope}{f'; in {unsure} we cannot tell' if unsure else ''}"
    else:
        told = f"{who} cannot be told to be better or worse in {unsure} of {scope}"
    left = len(verdicts) - len(judged)
    rest = f" {count(left, f'more {noun}')} {'has' if left == 1 else 'have'} too few patients, or none." if left else ""
    return f"{told}.{rest}"


def fvu_finding(reading: Reading) -> tuple[str, str]:
    """Where the student explains least of a teacher's features; how much, and how many cells meet the bar."""
    cells = [
        (one, place, row)
        for one, variant in reading.targets()
        for place in reading.places
        if (row := reading.row(variant, one.subject, one.predictor, place))
        and not row["weak"]
        and row["value"] is not None
    ]
    if not cells:
        return "", ""
    one, place, row = max(cells, key=lambda cell: cell[2]["value"])
    met = sum(row["value"] < FVU_BAR and row["hi"] is not None and row["hi"] < 1 for *_, row in cells)
    lead = f"Of the teachers' features, the student explains least of {one.name} in {reading.title(place)}."
    said = f"There {estimate(row)} of their variance stays unexplained. "
    return lead, said + f"The bar of {FVU_BAR} is met in {met} of {len(cells)} combinations of features and group."


def limits(reading: Reading, context: Mapping[str, Any]) -> list[str]:
    """What the report cannot say, from the statuses of its rows and from the context."""
    said = []
    if reading.split == "val":
        said.append(
            "There is no test split. These are the validation patients, on whom thresholds and weights were chosen: "
            "the numbers flatter every model."
        )
    said += [
        f"The groups of {name} are simulated by image processing. They show how the method behaves, not how real "
        "patients fare."
        for name in reading.simulated
    ]
    series = [(one, AUROC) for label in reading.labels for one in reading.models(label)] or reading.targets()
    found: dict[str, dict[str, list[str]]] = {}
    for one, variant in series:
        for place in reading.places:
            row = reading.row(variant, one.subject, one.predictor, place)
            if row and row["weak"]:
                who = f" of {one.name}" if row["status"] == "constant_score" else ""
                places = found.setdefault(f"{row['why']}{who}", {})
                places.setdefault(f"{reading.title(place)} ({support(row)})", []).append(one.subject)
    for why, places in found.items():
        several = len(reading.labels) > 1
        named = [
            f"{place}{' for ' + ', '.join(unique(subjects)) if several else ''}" for place, subjects in places.items()
        ]
        said.append(f"No finding, {why}: {'; '.join(named)}.")
    for group in context.get("groups", ()):
        if group["group"] is None and group["split"] == reading.split and group["n_images"]:
            images, patients = count(group["n_images"], "image"), count(group["n_patients"], "patient")
            name = group["attribute"].replace("*", " × ")
            said.append(f"{images} of {patients} lack {name}; they count in “all patients” only.")
            said[-1] += _assigned(reading, group["attribute"])
    return [*said, *context.get("notes", ())]


def _assigned(reading: Reading, attribute: str) -> str:
    """How small and how large the gap may be if those of unknown group are assigned at worst."""
    told = []
    for label in reading.labels:
        subject, who = reading.first(label)
        gap = reading.row(("auroc_gap", "linear"), label, subject, (attribute, "all"))
        if gap and None not in (gap["unknown_lo"], gap["unknown_hi"]):
            told.append(f"{number(gap['unknown_lo'])} to {number(gap['unknown_hi'])} for “{label}” and {who}")
    said = f" Whichever groups they belong to, the AUROC gap would be {listed(told)}, before the play of chance."
    return said if told else ""


# ── Figures ──


@dataclass(frozen=True)
class Axis:
    """A linear axis of `size` pixels; values beyond its ends are clamped to them."""

    lo: float
    hi: float
    ticks: tuple[float, ...]
    mark: float | None
    size: int

    def at(self, value: float) -> float:
        share = (min(max(value, self.lo), self.hi) - self.lo) / (self.hi - self.lo)
        return round(18 + share * (self.size - 36), 1)

    def beyond(self, value: float) -> bool:
        return not self.lo - 1e-9 <= value <= self.hi + 1e-9


def axis(rows: Iterable[Row | None], mark: float | None = None, size: int = 340, whole: bool = False) -> Axis:
    """Round ticks around the rows that bear a finding (around all, if none does) and the reference line `mark`.

    What a weak row says may lie beyond the ends, lest a handful of patients flatten the picture; with `whole`, only
    its interval may, for figures that do not print their values.
    """
    known = [row for row in rows if row and row["value"] is not None]
    firm = [row for row in known if not row["weak"]] or known
    values = [row[key] for row in firm for key in ("value", "lo", "hi") if row[key] is not None]
    values += [row["value"] for row in known] if whole else []
    values += [] if mark is None else [mark]
    lo, hi = min(values, default=0.0), max(values, default=1.0)
    steps = (round(digit * 10.0**power, 2) for power in range(-2, 300) for digit in (1, 2, 5))
    step = next(one for one in steps if hi - lo <= 4.5 * one)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    ticks = tuple(round(i * step, 6) for i in range(first, max(last, first + 1) + 1))
    return Axis(ticks[0], ticks[-1], ticks, mark, size)


def bands(
    reading: Reading, lines: Sequence[tuple[Series, Sequence[Variant]]], places: Sequence[Place]
) -> list[dict[str, Any]]:
    """Per place: title, support, one line a series with a row (or None) for each variant.

    Where all rows are weak for one reason, the band says it; where all are undefined, its lines are left out.
    """
    found = []
    for place in places:
        table = [
            (one, [reading.row(variant, one.subject, one.predictor, place) for variant in variants])
            for one, variants in lines
        ]
        table = [(one, rows) for one, rows in table if any(rows)]
        rows = [row for _, several in table for row in several if row]
        if rows:
            reasons = unique(row["why"] for row in rows)
            why = reasons[0] if len(reasons) == 1 else ""
            undefined = why and all(row["value"] is None for row in rows)
            shown = [] if undefined else table
            found.append({"title": reading.title(place), "support": support(rows[0]), "why": why, "lines": shown})
    return found


def figure(
    reading: Reading, lines: Sequence[tuple[Series, Sequence[Variant]]], mark: float | None = None
) -> dict[str, Any]:
    """Bands over all places and an axis for their first column."""
    drawn = bands(reading, lines, reading.places)
    return {"bands": drawn, "axis": axis((rows[0] for band in drawn for _, rows in band["lines"]), mark)}


def charts(readings: Sequence[tuple[str, Reading]]) -> list[dict[str, Any]]:
    """The student over the stages: one chart per (label or target, attribute), one line per group, all in pixels."""
    stages = [(stage, one) for stage, one in readings if one.has_student]
    if len(stages) < 2:
        return []
    last = stages[-1][1]
    series = [(Series("student", 0, label, "student"), AUROC) for label in last.labels] or last.targets()
    attributes = unique(attribute for attribute, _ in last.places if attribute) or [""]
    ticks = [round(58 + i * 230 / (len(stages) - 1), 1) for i in range(len(stages))]
    drawn = []
    for (one, variant), attribute in itertools.product(series, attributes):
        places = [place for place in last.places if place[0] in ("", attribute)]
        rows = {
            last.title(place) if place == OVERALL else place[1].replace("|", " · "): [
                then.row(variant, one.subject, one.predictor, place) for _, then in stages
            ]
            for place in places
        }
        scale = axis((row for several in rows.values() for row in several), size=220, whole=True)
        lines, ends = [], {}
        for i, (name, several) in enumerate(rows.items()):
            pairs = zip(ticks, several, strict=True)
            points = [(x + 4 * i, row) for x, row in pairs if row and row["value"] is not None]
            if points:
                lines.append({"name": name, "rows": several, "points": points})
                ends[name] = scale.size - scale.at(points[-1][1]["value"])
        title = f"{one.subject}, by {last.title((attribute, 'all'))}" if attribute else one.subject
        metric = "AUROC" if variant == AUROC else "variance unexplained"
        names = [(x, stage) for x, (stage, _) in zip(ticks, stages, strict=True)]
        drawn.append(
            {"title": title, "metric": metric, "stages": names, "lines": lines, "axis": scale, "ends": _apart(ends)}
        )
    return drawn


def tradeoffs(reading: Reading, past: Sequence[tuple[str, Reading]], label: str) -> list[dict[str, Any]]:
    """Everybody's AUROC against the worst group's: a chart an attribute, a mark a model, stages as a path."""
    drawn = []
    for attribute in reading.attributes:
        marks: list[dict[str, Any]] = []
        for one in reading.models(label):
            then = [("", reading)] if one.predictor != "student" else [*past, ("", reading)]
            pairs = [
                (
                    stage,
                    at.row(AUROC, label, one.predictor, OVERALL),
                    at.row(("auroc_worst", "linear"), label, one.predictor, (attribute, "all")),
                )
                for stage, at in then
            ]
            steps = [step for step in pairs if all(row and row["value"] is not None for row in step[1:])]
            if steps and steps[-1][0] == "":
                marks.append({"name": one.name, "mark": one.mark, "steps": steps})
        if sum(len(mark["steps"]) for mark in marks) > 1:
            steps = [step for mark in marks for step in mark["steps"]]
            x, y = axis((x for _, x, _ in steps), size=268), axis((y for *_, y in steps), size=268)
            ends = {mark["name"]: y.size - y.at(mark["steps"][-1][2]["value"]) for mark in marks}
            same = max(x.lo, y.lo), min(x.hi, y.hi)
            title = reading.title((attribute, "all"))
            staged = len(steps) > len(marks)
            one_chart = {"title": title, "marks": marks, "x": x, "y": y, "ends": _apart(ends)}
            drawn.append(one_chart | {"same": same, "staged": staged})
    return drawn


def curves(reading: Reading, label: str) -> list[dict[str, Any]]:
    """AUROC along each continuous attribute: all models on the same axes, each to be drawn in a panel of its own."""
    found: dict[str, list[float]] = {}
    for (metric, _), (subject, _), (attribute, centre) in reading.cells:
        if (metric, subject) == ("auroc_curve", label):
            found.setdefault(attribute, []).append(float(centre))
    drawn = []
    for attribute, all_centres in found.items():
        centres = sorted(set(all_centres))
        lines: list[dict[str, Any]] = []
        for one in reading.models(label):
            variant = ("auroc_curve", "linear")
            rows = [reading.row(variant, label, one.predictor, (attribute, f"{centre:g}")) for centre in centres]
            points = [(x, row) for x, row in zip(centres, rows, strict=True) if row and row["value"] is not None]
            if points:
                lines.append({"name": one.name, "mark": one.mark, "rows": rows, "points": points})
        if lines:
            y = axis((row for line in lines for row in line["rows"]), size=190, whole=True)
            ends = [{"value": x, "lo": None, "hi": None, "weak": False} for x in (centres[0], centres[-1])]
            title = reading.title((attribute, "all"))
            drawn.append({"title": title, "centres": centres, "lines": lines, "x": axis(ends, size=290), "y": y})
    return drawn


def _apart(heights: Mapping[str, float], distance: float = 16) -> dict[str, float]:
    placed: dict[str, float] = {}
    for name in sorted(heights, key=heights.__getitem__):
        placed[name] = max(heights[name], max(placed.values(), default=-math.inf) + distance)
    return placed


def people(reading: Reading, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Who is in the data: a line a group (one for the not annotated, if there are any), a column a split."""
    found = unique(one["split"] for one in groups)
    splits = [split for split in ("train", "val", "test") if split in found]
    cells = {(one["attribute"], one["group"], one["split"]): one for one in groups}
    names = unique((one["attribute"], one["group"]) for one in groups if one["group"] is not None or one["n_images"])
    lines = [
        (reading.title((name, group or "not annotated")), [cells.get((name, group, split)) for split in splits])
        for name, group in names
    ]
    return {"splits": splits, "lines": lines}


def section(reading: Reading, past: Sequence[tuple[str, Reading]], label: str) -> dict[str, Any]:
    """The figures and tables of one label. Lists are empty, and `bands` of figures, where there is nothing to show."""
    models, (first, who) = reading.models(label), reading.first(label)
    attributes = [(attribute, "all") for attribute in reading.attributes]

    def table(metrics: Iterable[str], places: Sequence[Place], readout: str = "linear") -> list[dict[str, Any]]:
        return bands(reading, [(one, [(metric, readout) for metric in metrics]) for one in models], places)

    def spread(metrics: Iterable[str]) -> list[dict[str, Any]]:
        # A sum over groups counts a patient once in each.
        return [band | {"support": ""} for band in table(metrics, attributes)]

    level = reading.row(AUROC, label, first, OVERALL)
    pairs = figure(reading, [(one, [AUROC]) for one in reading.pairs(label)], 0.0)
    return {
        "label": label,
        "who": who,
        "levels": figure(reading, [(one, list(reading.readouts)) for one in models], level["value"] if level else None),
        "pairs": pairs,
        "adjusted": any(rows[0]["p_holm"] is not None for band in pairs["bands"] for _, rows in band["lines"]),
        "tradeoffs": tradeoffs(reading, past, label),
        "curves": curves(reading, label),
        "spreads": spread(SPREADS),
        "criteria": spread(CRITERIA),
        "rates": table(RATES, reading.places),
        "own": table(RATES, reading.places, OWN),
        "qualities": table(QUALITIES, reading.places),
    }


def view(
    stage: str, reading: Reading, past: Sequence[tuple[str, Reading]], context: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the templates draw."""
    said = {label: label_finding(reading, label) for label in reading.labels}
    unexplained = fvu_finding(reading)
    if len(said) == 1:
        [(lead, details)] = said.values()
        more = [details, tally(reading), " ".join(unexplained)]
    elif said:
        few = "There are too few patients to compare the student with its teachers."
        alone = f"{count(len(said), 'label')}, each with the group in which it is recognised least well."
        lead = tally(reading) or (few if reading.has_student else alone)
        more = [*(short for short, _ in said.values()), " ".join(unexplained)]
    else:
        lead, details = unexplained if unexplained[0] else ("There is too little data for a finding.", "")
        lacking = "No probe could be fitted for the labels" if context.get("labels") else "There are no labels"
        reason = f"{lacking}, so this report cannot say whether the student does its task as well as its teachers."
        more = [details, f"{reason} It says how much of their features the student reproduces, group by group."]
    sections = [section(reading, past, label) | {"said": " ".join(said[label])} for label in reading.labels]
    return {
        "stage": stage,
        "name": context.get("name", ""),
        "reading": reading,
        "who": SPLITS.get(reading.split, f"{reading.split} patients"),
        "lead": lead,
        "more": [text for text in more if text.strip()],
        "sections": sections,
        "several": len(sections) > 1,
        "fvu": figure(reading, [(one, [variant]) for one, variant in reading.targets()], FVU_BAR),
        "charts": charts([*past, (stage, reading)]),
        "people": people(reading, context.get("groups", ())),
        "limits": limits(reading, context),
    }
