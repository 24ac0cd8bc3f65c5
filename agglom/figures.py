"""What the templates draw: axes, bands, lines and tables of a reading, in pixels and in text.

A figure is drawn from rows, or from a part of the context that is made of the same scores; where it has nothing to show
it is absent, not empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agglom.findings import CHANCE, count, estimate, listed, number, share, support, sweep_sizes
from agglom.reading import OVERALL, Place, Reading, Row, Series, Variant, unique

# The area of a plot begins LEFT pixels from the left and is SIZE wide.
LEFT, SIZE = 44, 268
# False alarms at which a table reads off a ROC curve, and the marks and columns that a long line gets.
ALARMS = (0.05, 0.1, 0.2)
MARKED = 6


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


UNIT = Axis(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), None, SIZE)


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


def point(value: float, lo: float | None = None, hi: float | None = None, weak: bool = False) -> Row:
    """What an axis and a line need to know of a number that is not a row."""
    return {"value": value, "lo": lo, "hi": hi, "weak": weak}


def line(name: str, mark: int, tone: str, places: Sequence[float], rows: Sequence[Row | None]) -> dict[str, Any]:
    """A line through the rows that have a value, at `places` in pixels; of very many points only some are marked."""
    points = [(x, row) for x, row in zip(places, rows, strict=True) if row and row["value"] is not None]
    marks = points[:: math.ceil(len(points) / MARKED)] if len(points) > 2 * MARKED else points
    return {"name": name, "mark": mark, "tone": tone, "rows": rows, "points": points, "marks": marks}


def plot(
    title: str,
    about: str,
    ticks: Sequence[tuple[float, str]],
    lines: Sequence[dict[str, Any]],
    scale: Axis,
    **more: Any,
) -> dict[str, Any]:
    """Lines over an axis whose name is `about`, each named at its end; by default its table has a column a tick."""
    drawn = [one for one in lines if one["points"]]
    ends = _apart({one["name"]: scale.size - scale.at(one["points"][-1][1]["value"]) for one in drawn})
    if "table" not in more:
        cells = [[one["name"], *(estimate(row) for row in one["rows"])] for one in drawn]
        more["table"] = {"head": [about, *(text for _, text in ticks)], "lines": cells}
    height = max([scale.size + 32, *(end + 8 for end in ends.values())])
    drawing = {"ticks": ticks, "lines": drawn, "axis": scale, "ends": ends, "height": height}
    return {"title": title, "about": about, "diagonal": False, "ribbon": False} | drawing | more


def short(place: Place) -> str:
    """A group where its attribute is said beside it."""
    return "all patients" if place == OVERALL else place[1].replace("|", " · ")


def charts(readings: Sequence[tuple[str, Reading]]) -> list[dict[str, Any]]:
    """The student over the stages: a chart per label or target and attribute, a line a group; the gaps of a label."""
    stages = [(stage, one) for stage, one in readings if one.has_student]
    if len(stages) < 2:
        return []
    last = stages[-1][1]
    student = [Series("student", 0, label, "student") for label in last.labels]
    series = [(one, last.main(one.subject)) for one in student] or last.targets()
    ticks = [(round(58 + i * 230 / (len(stages) - 1), 1), stage) for i, (stage, _) in enumerate(stages)]

    def over(name: str, k: int, one: Series, variant: Variant, place: Place) -> dict[str, Any]:
        rows = [then.row(variant, one.subject, one.predictor, place) for _, then in stages]
        return line(name, k, f"c{k % 7}", [x + 4 * k for x, _ in ticks], rows)

    def chart(title: str, lines: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        scale = axis((row for one in lines for row in one["rows"]), size=220, whole=True)
        return plot(title, "stage", ticks, lines, scale, **more)

    drawn = []
    for one, variant in series:
        measure = last.measure(one.subject) if student else "variance unexplained"
        for attribute in last.attributes or [""]:
            places = [place for place in last.places if place[0] in ("", attribute)]
            lines = [over(short(place), k, one, variant, place) for k, place in enumerate(places)]
            by = f", by {last.title((attribute, 'all'))}" if attribute else ""
            drawn.append(chart(f"{one.subject}{by}", lines, measure=measure))
        gap = last.main(one.subject, "gap")
        wholes = [(attribute, "all") for attribute in last.attributes if student]
        lines = [over(last.title(place), k, one, gap, place) for k, place in enumerate(wholes)]
        if any(one["points"] for one in lines):
            title = f"{one.subject}, {measure} gap between the groups of an attribute"
            drawn.append(chart(title, lines, measure=f"{measure} gap", ribbon=True))
    return drawn


def operating(reading: Reading, label: str, given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ROC and calibration of the first predictor: two panels an attribute, a line a group."""
    subject, _ = reading.first(label)
    mine = [one for one in given if (one["label"], one["predictor"]) == (label, subject)]
    mine = [one for one in mine if one["readout"] == mine[0]["readout"]]
    drawn = []
    for attribute in unique(one["attribute"] for one in mine if one["attribute"]):
        groups = [one for one in mine if one["attribute"] in ("", attribute)]
        title = reading.title((attribute, "all"))
        drawn.append(
            {"title": title, "roc": _roc(reading, groups, title), "calibration": _calibration(reading, groups, title)}
        )
    return drawn


def _roc(reading: Reading, groups: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    lines, table = [], []
    for k, one in enumerate(groups):
        fpr, tpr = one["roc"]["fpr"], one["roc"]["tpr"]
        place = one["attribute"], one["group"]
        name, weak = short(place), _too_few(reading, one)
        level, alarms, found = (
            reading.row((metric, "linear"), one["label"], one["predictor"], place) for metric in ("auroc", "fpr", "tpr")
        )
        lines.append(line(name, k, f"c{k % 7}", [LEFT + UNIT.at(x) for x in fpr], [point(y, weak=weak) for y in tpr]))
        both = alarms is not None and found is not None and None not in (alarms["value"], found["value"])
        lines[-1]["marks"] = [(LEFT + UNIT.at(alarms["value"]), found)] if alarms and both else []
        reached = [max((y for x, y in zip(fpr, tpr, strict=True) if x <= most), default=0.0) for most in ALARMS]
        table.append([name, *map(estimate, (level, alarms, found)), *map(number, reached)])
    head = ["group", "AUROC", "false alarms at the threshold", "sensitivity at the threshold"]
    head += [f"sensitivity, false alarms ≤ {100 * most:g} %" for most in ALARMS]
    ticks = [(LEFT + UNIT.at(tick), f"{tick:g}") for tick in UNIT.ticks]
    more = {"measure": "sensitivity", "diagonal": True, "table": {"head": head, "lines": table}}
    return plot(f"ROC, by {title}", "false alarms", ticks, lines, UNIT, **more)


def _too_few(reading: Reading, one: Mapping[str, Any]) -> bool:
    """Whether no finding may be drawn from the group of a curve."""
    row = reading.level(one["label"], one["predictor"], (one["attribute"], one["group"]))
    return row is not None and row["weak"]


def _calibration(reading: Reading, groups: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any] | None:
    bins = [cell for one in groups for cell in one["calibration"]]
    if not bins:
        return None
    seen = [point(cell["rate"], cell["lo"], cell["hi"]) for cell in bins] + [point(cell["score"]) for cell in bins]
    scale = axis([*seen, point(0.0)], size=SIZE, whole=True)
    scale = UNIT if scale.hi == UNIT.hi else scale
    lines, table = [], []
    for k, one in enumerate(groups):
        cells, name = one["calibration"], short((one["attribute"], one["group"]))
        rows = [point(cell["rate"], cell["lo"], cell["hi"], _too_few(reading, one)) for cell in cells]
        lines.append(line(name, k, f"c{k % 7}", [LEFT + scale.at(cell["score"]) for cell in cells], rows))
        table += [
            [name, number(cell["score"]), estimate(row), f"{cell['n_patients']:,}"]
            for cell, row in zip(cells, rows, strict=True)
        ]
    head = ["group", "mean predicted", "observed", "patients"]
    ticks = [(LEFT + scale.at(tick), f"{tick:g}") for tick in scale.ticks]
    more = {"measure": "observed share", "diagonal": True, "table": {"head": head, "lines": table}}
    return plot(f"Calibration, by {title}", "mean predicted", ticks, lines, scale, **more)


def weights(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The weights of the cells, a line a group, a block of teachers a stage; and their path over the steps."""
    if not given:
        return None
    groups = [short((given["attribute"], group)) for group in given["groups"]]
    blocks = [stage["weight"] for stage in given["stages"]]
    lines = [(group, [[_shade(cell) for cell in block[g]] for block in blocks]) for g, group in enumerate(groups)]
    drawn = {"title": given["attribute"].replace("*", " × "), "teachers": given["teachers"], "lines": lines}
    return drawn | {"stages": [stage["stage"] for stage in given["stages"]], "path": _path(groups, given.get("path"))}


def reasons(drawn: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Why the groups weigh what they do: what was known of each of them when a stage began."""
    if not drawn or not given:
        return None
    lines = []
    for g, group in enumerate(drawn["groups"]):
        of_teachers = [
            f"{number(raw)} → {number(shrunk)}"
            for raw, shrunk in zip(given["auroc"][g], given["shrunk"][g], strict=True)
        ]
        rights = [number(one) for one in given["right"][g]] if given["right"] else []
        student, noise = number(given["student"][g]), [number(one) for one in given["noise"][g]]
        few = given["n_patients"][g] < given["min_support"]
        n = f"{given['n_patients'][g]:,}" + (", with others" if few else "")
        lines.append([short((drawn["attribute"], group)), n, *of_teachers, *rights, student, *noise])
    names = given["teachers"]
    rights = [f"right, {name}" for name in names] if given["right"] else []
    head = ["group", "patients", *names, *rights, "student before", *(f"noise, {name}" for name in names)]
    borrowed = [
        f"{listed(one['groups'])}: what {one['teacher']} says of images of {listed(one['of'])}, those that "
        f"{listed(one['by'])} find{'s' * (len(one['by']) == 1)} most alike, for {one['images']:,} of "
        f"{count(one['of_images'], 'train image')}"
        for one in given.get("borrowed", ())
    ]
    return {"stage": given["stage"], "head": head, "lines": lines, "borrowed": borrowed}


def _shade(weight: float | None) -> dict[str, Any]:
    """A weight in figures, and how far it is from neutral: full strength at a factor of four."""
    if weight is None:
        return {"text": "–", "side": "", "strength": 0}
    far = min(1.0, abs(math.log2(weight)) / 2) if weight > 0 else 1.0
    side = "" if round(weight, 2) == 1 else "over" if weight > 1 else "under"
    return {"text": f"{weight:.2f}", "side": side, "strength": round(100 * far)}


def _path(groups: Sequence[str], path: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not path or len(path["step"]) < 2:
        return None
    steps, ends = path["step"], axis([point(step) for step in path["step"]], size=SIZE)
    places = [LEFT + ends.at(step) for step in steps]
    columns = [
        [None if cell is None else point(cell) for cell in column] for column in zip(*path["weight"], strict=True)
    ]
    lines = [
        line(group, k, f"c{k % 7}", places, rows) for k, (group, rows) in enumerate(zip(groups, columns, strict=True))
    ]
    scale = axis((row for rows in columns for row in rows), 1.0, size=220, whole=True)
    shown = sorted({round(i * (len(steps) - 1) / MARKED) for i in range(MARKED + 1)})
    cells = [
        [group, *("–" if row is None else f"{row['value']:.2f}" for row in (rows[i] for i in shown))]
        for group, rows in zip(groups, columns, strict=True)
    ]
    table = {"head": ["step", *(f"{steps[i]:,}" for i in shown)], "lines": cells}
    ticks = [(LEFT + ends.at(tick), f"{tick:,g}") for tick in ends.ticks]
    return plot("Weight of each group over the steps", "step", ticks, lines, scale, measure="weight", table=table)


def proxies(given: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What clusters have to do with the groups that are known, and their sizes: two tables."""
    if not given:
        return []
    measures = {
        **{"nmi": "NMI", "ari": "adjusted Rand", "purity": "purity", "chance": "dealt out anew"},
        **{"chance_hi": "at most", "largest": "largest group"},
    }
    compared = [
        [one["attribute"].replace("*", " × "), f"{one['n_images']:,}"]
        + [number(one[key]) for key in measures]
        + [one["why"]]
        for one in given["agreement"]
    ]
    sizes = zip(given["clusters"], given["n_train"], given["n_grouped"], strict=True)
    lines = [[name, *(f"{n:,}" for n in counts)] for name, *counts in sizes]
    tables = [
        {"head": ["groups of", "images", *measures.values(), ""], "lines": compared},
        {"head": ["cluster", "train images", "weighed with it"], "lines": lines},
    ]
    return [table for table in tables if table["lines"]]


def conflict(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How teachers agree: a heat map of their losses, one of their gradients by group, and the same as tables."""
    if not given:
        return None
    columns, teachers, groups = given["columns"], given["teachers"], given["groups"]
    spearman, pearson = given["spearman"], given["pearson"]
    cosines = {f"all ({given['n_gradient']})": given["cosine"]}
    cosines |= {f"{short((given['attribute'], one['group']))} ({one['n_images']})": one["cosine"] for one in groups}
    asked = [(i, j) for i in range(len(teachers)) for j in range(i + 1, len(teachers))]
    pulls = [(f"{teachers[i]}, {teachers[j]}", [one and one[i][j] for one in cosines.values()]) for i, j in asked]
    together = [
        (f"{columns[i]}, {columns[j]}", [pearson[i][j], spearman[i][j]])
        for i in range(len(columns))
        for j in range(i + 1, len(columns))
    ]
    tables = {
        "losses": ((f"losses of, {given['n_images']:,} images", "Pearson", "Spearman"), together),
        "gradients": (("gradients of, cosine", *cosines), pulls),
    }
    drawn = [_heat("losses, Spearman", columns, list(zip(columns, spearman, strict=True)))]
    drawn += [_heat("gradients, cosine", list(cosines), pulls)] if pulls else []
    return {
        "maps": drawn,
        "tables": [
            {"of": of, "head": list(head), "lines": [[name, *map(number, values)] for name, values in lines]}
            for of, (head, lines) in tables.items()
            if lines
        ],
    }


def _heat(title: str, columns: Sequence[str], lines: Sequence[tuple[str, Sequence[float | None]]]) -> dict[str, Any]:
    """Numbers from −1 to 1 as a heat map of one block."""

    def cell(value: float | None) -> dict[str, Any]:
        side = "" if value is None or round(value, 2) == 0 else "over" if value > 0 else "under"
        text = "–" if value is None else f"{value:.2f}".replace("-", "−")
        return {"text": text, "side": side, "strength": 0 if value is None else round(100 * min(1.0, abs(value)))}

    drawn = [(name, [[cell(value) for value in values]]) for name, values in lines]
    return {"title": "of", "stages": [title], "teachers": columns, "lines": drawn}


def leakage(reading: Reading) -> dict[str, Any]:
    """How well a linear probe reads each group from the features of each predictor, against chance."""
    variant: Variant = ("leakage", "linear")
    cells = {
        (variant, ("", row["predictor"]), (row["attribute"], row["group"])): row
        for row in reading.studies
        if row["metric"] == "leakage"
    }
    alone = replace(reading, cells=cells, studies=())
    return figure(alone, [(one, [variant]) for one in reading.models("")], CHANCE)


def sweep(reading: Reading) -> list[dict[str, Any]]:
    """Over image sizes, from small to large: what the student leaves unexplained of each teacher, then by label the
    AUROC of the linear probes of student and teachers. All patients."""
    sizes = sweep_sizes(reading)
    ticks = [(round(58 + i * 230 / max(1, len(sizes) - 1), 1), size.replace("x", "×")) for i, size in enumerate(sizes)]
    rows = {
        (row["label"], row["predictor"], *(row["target"].rpartition("@")[::2])): row
        for row in reading.studies
        if row["metric"].startswith("sweep_") and (row["attribute"], row["group"]) == OVERALL
    }
    kinds = unique(kind for _, _, kind, _ in rows if kind)
    names = unique(kind.rpartition("/")[0] for kind in kinds)
    targets = [Series(kind, 1 + names.index(kind.rpartition("/")[0]), "", "student") for kind in kinds]
    asked = [("variance unexplained", "What the student leaves unexplained, all patients", targets)]
    asked += [(f"AUROC, {label}", f"AUROC of {label}, all patients", reading.models(label)) for label in reading.labels]
    drawn = []
    for measure, title, series in asked:
        lines = []
        for k, one in enumerate(series):
            kind = one.name if series is targets else ""
            found = [rows.get((one.subject, one.predictor, kind, size)) for size in sizes]
            tone = "student" if one.mark == 0 else f"c{one.mark % 7}"
            lines.append(line(one.name, one.mark, tone, [x + 3 * k for x, _ in ticks], found))
        if any(one["points"] for one in lines):
            scale = axis((row for one in lines for row in one["rows"]), size=220, whole=True)
            drawn.append(plot(title, "image size, px", ticks, lines, scale, measure=measure))
    return drawn


def scarcity(reading: Reading, label: str) -> list[dict[str, Any]]:
    """AUROC over all patients, then the gap of each attribute, against the share of labels; the band is of seeds."""
    mine = [row for row in reading.studies if row["metric"].startswith("scarcity_") and row["label"] == label]
    columns = {float(row["target"]): share(row) for row in sorted(mine, key=lambda row: float(row["target"]))}
    rows = {
        (row["metric"], row["predictor"], row["attribute"], row["group"], float(row["target"])): row for row in mine
    }
    if not rows:
        return []
    log = [math.log10(one) for one in columns]
    ends = Axis(log[0], log[-1] if len(log) > 1 else log[0] + 1, (), None, SIZE)
    ticks = [(LEFT + ends.at(x), text) for x, text in zip(log, columns.values(), strict=True)]

    def several(metric: str, predictor: str, place: Place) -> list[Row | None]:
        return [rows.get((metric, predictor, *place, one)) for one in columns]

    drawn = []
    for attribute in ["", *unique(row["attribute"] for row in mine if row["attribute"])]:
        metric = "scarcity_auroc_gap" if attribute else "scarcity_auroc"
        lines, table = [], []
        for one in reading.models(label):
            found = several(metric, one.predictor, (attribute, "all"))
            tone = "student" if one.mark == 0 else f"c{one.mark % 7}"
            lines.append(line(one.name, one.mark, tone, [x for x, _ in ticks], found))
            names = [
                (metric, "all", "gap" if attribute else "all patients"),
                ("scarcity_auroc_worst", "all", "worst group"),
            ]
            groups = unique(row["group"] for row in mine if row["attribute"] == attribute and row["group"] != "all")
            names += [("scarcity_auroc", group, short((attribute, group))) for group in groups]
            table += [
                [f"{one.name}, {name}", *map(estimate, told)]
                for which, group, name in names
                if any(told := several(which, one.predictor, (attribute, group)))
            ]
        if any(one["points"] for one in lines):
            title = f"AUROC gap, by {reading.title((attribute, 'all'))}" if attribute else "AUROC, all patients"
            scale = axis((row for one in lines for row in one["rows"]), size=220, whole=True)
            more = {"ribbon": True, "table": {"head": ["labels used", *columns.values()], "lines": table}}
            drawn.append(plot(title, "labels used", ticks, lines, scale, measure=title.split(",")[0], **more))
    return drawn


def holdout(reading: Reading, label: str) -> list[dict[str, Any]]:
    """By attribute and predictor: a line a group trained on, a column a group tested on."""
    mine = [row for row in reading.studies if (row["metric"], row["label"]) == ("holdout_auroc", label)]
    rows = {(row["attribute"], row["predictor"], row["target"], row["group"]): row for row in mine}
    drawn = []
    for attribute in unique(row["attribute"] for row in mine):
        tested = unique(row["group"] for row in mine if row["attribute"] == attribute)
        trained = unique(row["target"] for row in mine if row["attribute"] == attribute)
        for one in reading.models(label):
            lines = [
                (name, [rows.get((attribute, one.predictor, name, group)) for group in tested]) for name in trained
            ]
            if any(row for _, cells in lines for row in cells):
                title = reading.title((attribute, "all"))
                told = [(short((attribute, name)), cells) for name, cells in lines]
                columns = [short((attribute, group)) for group in tested]
                drawn.append({"title": title, "name": one.name, "tested": columns, "lines": told})
    return drawn


def tradeoffs(reading: Reading, past: Sequence[tuple[str, Reading]], label: str) -> list[dict[str, Any]]:
    """Everybody's level against the worst group's: a chart an attribute, a mark a model, stages as a path."""
    drawn = []
    for attribute in reading.attributes:
        marks: list[dict[str, Any]] = []
        for one in reading.models(label):
            then = [("", reading)] if one.predictor != "student" else [*past, ("", reading)]
            pairs = [
                (
                    stage,
                    at.level(label, one.predictor, OVERALL),
                    at.level(label, one.predictor, (attribute, "all"), "worst"),
                )
                for stage, at in then
            ]
            steps = [step for step in pairs if all(row and row["value"] is not None for row in step[1:])]
            if steps and steps[-1][0] == "":
                marks.append({"name": one.name, "mark": one.mark, "steps": steps})
        if sum(len(mark["steps"]) for mark in marks) > 1:
            steps = [step for mark in marks for step in mark["steps"]]
            x, y = axis((x for _, x, _ in steps), size=SIZE), axis((y for *_, y in steps), size=SIZE)
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
            x, title = axis(map(point, (centres[0], centres[-1])), size=290), reading.title((attribute, "all"))
            cells = [[one["name"], *map(estimate, one["rows"])] for one in lines]
            table = {"head": ["model", *(f"{centre:g}" for centre in centres)], "lines": cells}
            drawn.append({"title": title, "lines": lines, "x": x, "y": y, "table": table})
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
