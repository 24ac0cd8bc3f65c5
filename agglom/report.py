"""Group reports: tidy rows in; JSON, CSV, Markdown, one self-contained HTML file and terminal tables out.

The words come from `findings.py`, the figures from `figures.py`, the layout from `templates/`. HTML figures are inline
SVG drawn by the template, so they follow the reader's colour scheme, print, and need neither a network nor a plotting
library.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agglom import figures, findings
from agglom.errors import DataError
from agglom.reading import (
    CRITERIA,
    FVU_BAR,
    OVERALL,
    OWN,
    QUALITIES,
    RATES,
    SPLITS,
    SPREADS,
    STATUSES,
    Place,
    Reading,
    Row,
    Series,
    Variant,
    read,
    unique,
)

if TYPE_CHECKING:
    import jinja2

SCHEMA = 1
COLUMNS = (
    *("stage", "predictor", "metric", "label", "attribute", "group", "value", "lo", "hi", "n", "n_pos", "n_neg"),
    *("status", "split", "readout", "target", "threshold", "n_patients", "ci_method", "note"),
    *("rule", "p_value", "p_holm", "null_hi", "corrected", "detectable", "unknown_lo", "unknown_hi"),
)
NUMBERS = (
    *("value", "lo", "hi", "n", "n_pos", "n_neg", "threshold", "n_patients"),
    *("p_value", "p_holm", "null_hi", "corrected", "detectable", "unknown_lo", "unknown_hi"),
)
WIDTH = 100
REMEDY = "`agglom evaluate` writes it again"


@dataclass(frozen=True)
class GroupReport:
    """What one evaluation found.

    `rows`: dicts with the keys `COLUMNS` (more are kept). `attribute` "" and `group` "all" is everybody; a crossing
    is attribute `sex*view`, group `F|AP`; `<metric>_gap` and `<metric>_worst` carry the attribute and group "all".

    `context`: `index` (int, order of the stages; `compare` needs it), `name` of the job, `split` (headline: "test" or
    "val"), `groups` (list of dicts attribute, group (None: not annotated), split, n_images, n_patients), `min_support`
    (patients), `simulated` (attributes made by image processing), `notes` (sentences), `history` (list of (stage,
    rows) of the stages before). All but `index` may be absent, and so may these:

    - `classes`: dict from a label to the names of its classes, each of which is a label `<label>=<class>`;
    - `serves`: dict from a specialist (`teacher/<name>`) to the [attribute, groups] that it serves (see `serving`);
    - `curves`: list of dicts label, readout, predictor, attribute, group, `roc` (dict `fpr`, `tpr`: lists of equal
      length, increasing) and `calibration` (list of dicts score (mean predicted), rate (observed), lo, hi, n,
      n_patients: the bins that hold any image);
    - `weights`: dict `attribute`, `groups` (G), `teachers` (T), `stages` (list of dicts stage, weight [G][T]) and
      `path` (dict `step` [S], `weight` [S][G]); 1 is what all weigh without balancing, null who takes no part;
    - `reasons`: what set these weights in a `stage`: `teachers` (T), and of each of the groups of `weights` the
      validation patients `n_patients` [G] (below `min_support` they were looked at with related groups), the AUROC of
      each teacher `auroc` [G][T] and after shrinking `shrunk` [G][T], how probable it is that it is `right` on a train
      image [G][T] (null where images are not weighed by that), the AUROC of the `student` [G], and the share of a
      teacher's variance that is `noise` [G][T]; and `borrowed`, a list of dicts: the `groups` that have the targets of
      a `teacher` from images `of` other groups, `by` which teachers these were chosen, for how many `images` of the
      `of_images` of train;
    - `proxies`: dict of the groups that stand in for what is not annotated: `teacher` whose summaries were clustered,
      `attribute` that annotated images keep (or null), `clusters` (K names), of train images `n_fitted`, `n_train` [K]
      in each cluster, `n_grouped` [K] without annotation, so that they are weighed with it; `stability` and
      `stability_lo`, mean and least adjusted Rand index of two of `fits`; `agreement` (list of dicts attribute,
      n_images, nmi, ari, purity, largest, chance, chance_hi (see `proxies.agreement`), `why` they are null or "");
    - `conflict`: dict `columns` (C names `<teacher>/<kind>` of the loss table), `pearson` and `spearman` [C][C] of
      their losses over `n_images`; `teachers` (T), `cosine` [T][T] of the gradients of their losses on the trunk,
      `norm` [T] of the mean gradient, over `n_gradient` images, of which two teachers both serve `n_both` [T][T] (on
      the diagonal: one does); `attribute` (or null) and `groups` (list of dicts
      group, n_images, `cosine` [T][T], null where the images are too few). A number that is not defined is null.

    Rows of `leakage` have the group that a probe reads in attribute and group; those of `scarcity_auroc[_gap|_worst]`
    the share of labels used in `target`, as text, and in value, lo, hi the mean and the range over seeds; those of
    `holdout_auroc` the group trained on in `target`, "all" for everybody, and the one tested on in `group`; those of
    `sweep_fvu` the teacher, the kind and the image size in `target`, `teacher/kind@HxW`, of `sweep_auroc` `HxW`.

    NaN, infinities and array scalars become plain JSON values at construction, so `load(write(r)) == r`.
    """

    stage: str
    rows: list[Row]
    context: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", _tidy(self.rows))
        object.__setattr__(self, "context", _plain(self.context))

    @property
    def reading(self) -> Reading:
        """The rows of the headline split, by their keys."""
        return read(self.rows, self.context)


def write(report: GroupReport, folder: Path) -> list[Path]:
    """`folder/<stage>.{json,csv,md,html}`, each written beside its place and renamed, so no reader sees a half.

    Raises DataError naming the file when the disk is full or the folder cannot be written.
    """
    reading = report.reading
    past = [
        (stage, read(_tidy(rows), report.context | {"split": reading.split}))
        for stage, rows in report.context.get("history", ())
    ]
    view = _view(report.stage, reading, past, report.context)
    texts = {
        "json": to_json(report),
        "csv": _csv(report.rows),
        "md": environment().get_template("report.md.j2").render(view),
        "html": environment().get_template("report.html.j2").render(view),
    }
    return [put(folder / f"{report.stage}.{suffix}", text) for suffix, text in texts.items()]


def load(path: Path) -> GroupReport:
    """Read `<stage>.json`. Raises DataError when it is missing, not JSON, of another schema, or its rows are wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such report; {REMEDY}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable report ({error}); {REMEDY}") from error
    problems = _problems(raw)
    if problems:
        shown = "\n  ".join(problems[:5])
        raise DataError(f"{path}: not a report of schema {SCHEMA}, problems: {len(problems)}; {REMEDY}\n  {shown}")
    return GroupReport(raw["stage"], raw["rows"], raw["context"])


def headline(report: GroupReport) -> str:
    """A plain table for the terminal, at most 100 columns: predictors × (everybody, groups of the first attribute).

    The main metric of a label on the headline split, one block a label (the first three); without labels, FVU.
    """
    reading = report.reading
    first = next((attribute for attribute, _ in reading.places if attribute), "")
    places = [place for place in reading.places if place[0] in ("", first)]
    made = " (simulated)" if first in reading.simulated else ""
    lines = [f"stage {report.stage}, {reading.split} split{f', by {first}{made}' if first else ''}; 95 % intervals"]
    blocks = [
        (f"{reading.measure(label)}, {label}", [(one, reading.main(label)) for one in reading.models(label)])
        for label in reading.labels
    ]
    for title, series in blocks[:3] or [("variance unexplained (FVU)", reading.targets())]:
        lines += ["", *_block(title, series, places, reading)]
    if len(blocks) > 3:
        lines += ["", f"labels left for the report: {len(blocks) - 3}"]
    return "\n".join(lines)


# ── What the templates draw ──


def _section(
    reading: Reading, past: Sequence[tuple[str, Reading]], label: str, given: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures and tables of one label. Lists are empty, and `bands` of figures, where there is nothing to show."""
    models, (first, who) = reading.models(label), reading.first(label)
    attributes = [(attribute, "all") for attribute in reading.attributes]
    measured = {variant for variant, (subject, _), _ in reading.cells if subject == label}

    def table(metrics: Mapping[str, str], places: Sequence[Place], readout: str = "linear") -> dict[str, Any]:
        """Only the columns of which there are rows."""
        found = {(metric, readout): name for metric, name in metrics.items() if (metric, readout) in measured}
        lines = [(one, list(found)) for one in models]
        return {"columns": list(found.values()), "bands": figures.bands(reading, lines, places)}

    def spread(metrics: Mapping[str, str]) -> dict[str, Any]:
        # A sum over groups counts a patient once in each.
        found = table(metrics, attributes)
        return found | {"bands": [band | {"support": ""} for band in found["bands"]]}

    main, measure, readouts = reading.main(label), reading.measure(label), reading.readouts(label)
    level = reading.level(label, first, OVERALL)
    pairs = figures.figure(reading, [(one, [main]) for one in reading.pairs(label)], 0.0)
    return {
        "label": label,
        "who": who,
        "measure": measure,
        "classes": reading.classes.get(label, ()),
        "readouts": list(readouts.values()),
        "levels": figures.figure(reading, [(one, list(readouts)) for one in models], level["value"] if level else None),
        "pairs": pairs,
        "adjusted": any(rows[0]["p_holm"] is not None for band in pairs["bands"] for _, rows in band["lines"]),
        "tradeoffs": figures.tradeoffs(reading, past, label),
        "curves": figures.curves(reading, label),
        "operating": figures.operating(reading, label, given),
        "nulled": any(
            (row := reading.level(label, one.predictor, place, "gap")) and row["null_hi"] is not None
            for one in models
            for place in attributes
        ),
        "spreads": spread({f"{main[0]}_{summary}": name.format(measure) for summary, name in SPREADS.items()}),
        "criteria": spread(CRITERIA),
        "rates": table(RATES, reading.places),
        "own": table(RATES, reading.places, OWN),
        "qualities": table(QUALITIES, reading.places),
        "scarcity": figures.scarcity(reading, label),
        "scarce": findings.scarcity_finding(reading, label),
        "holdout": figures.holdout(reading, label),
    }


def _view(
    stage: str, reading: Reading, past: Sequence[tuple[str, Reading]], context: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the templates draw."""
    said = {label: findings.label_finding(reading, label) for label in reading.labels}
    heads = [said[label] for label in reading.heads]
    unexplained = findings.fvu_finding(reading)
    if len(heads) == 1:
        [(lead, details)] = heads
        more = [details, findings.tally(reading), " ".join(unexplained)]
    elif heads:
        few = "There are too few patients to compare the student with its teachers."
        alone = f"{findings.count(len(heads), 'label')}, each with the group in which it is recognised least well."
        lead = findings.tally(reading) or (few if reading.has_student else alone)
        more = [*(short for short, _ in heads), " ".join(unexplained)]
    else:
        lead, details = unexplained if unexplained[0] else ("There is too little data for a finding.", "")
        lacking = "No probe could be fitted for the labels" if context.get("labels") else "There are no labels"
        reason = f"{lacking}, so this report cannot say whether the student does its task as well as its teachers."
        more = [details, f"{reason} It says how much of their features the student reproduces, group by group."]
    # What leads the report is not said again below.
    led = reading.heads if len(heads) == 1 else []
    sections = [
        _section(reading, past, label, context.get("curves", ())) | {"said": "" if label in led else " ".join(words)}
        for label, words in said.items()
    ]
    return {
        "stage": stage,
        "name": context.get("name", ""),
        "reading": reading,
        "who": SPLITS.get(reading.split, f"{reading.split} patients"),
        "lead": lead,
        "more": [text for text in more if text.strip()],
        "sections": sections,
        "fvu": figures.figure(reading, [(one, [variant]) for one, variant in reading.targets()], FVU_BAR),
        "sweep": figures.sweep(reading),
        "resized": findings.sweep_finding(reading),
        "leakage": figures.leakage(reading),
        "revealed": findings.leakage_finding(reading),
        "fitted": findings.leakage_fit(reading),
        "charts": figures.charts([*past, (stage, reading)]),
        "weights": figures.weights(context.get("weights")),
        "reasons": figures.reasons(context.get("weights"), context.get("reasons")),
        "proxies": figures.proxies(context.get("proxies")),
        "stands": findings.proxies_finding(context.get("proxies")),
        "conflict": figures.conflict(context.get("conflict")),
        "opposed": findings.conflict_finding(context.get("conflict")),
        "people": figures.people(reading, context.get("groups", ())),
        "limits": findings.limits(reading, context),
    }


# ── Values and checks ──


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tidy(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    return [dict.fromkeys(COLUMNS) | _plain(row) for row in rows]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON, undefined is null")


def _problems(raw: Any) -> list[str]:
    if not isinstance(raw, dict):
        return [f"expected an object, got {type(raw).__name__}"]
    if raw.get("schema") != SCHEMA:
        return [f"schema: expected {SCHEMA}, got {raw.get('schema')!r}"]
    kinds = {"stage": str, "rows": list, "context": dict}
    found = [f"{key}: expected a {kind.__name__}" for key, kind in kinds.items() if not isinstance(raw.get(key), kind)]
    for number, row in enumerate([] if found else raw["rows"]):
        if not isinstance(row, dict):
            found.append(f"rows[{number}]: expected an object, got {type(row).__name__}")
            continue
        found += [f"rows[{number}]: {key!r} is missing" for key in COLUMNS if key not in row]
        found += [
            f"rows[{number}].{key}: expected a number or null, got {row[key]!r}"
            for key in NUMBERS
            if type(row.get(key)) not in (int, float, type(None))
        ]
        if row.get("status") not in STATUSES:
            found.append(f"rows[{number}].status: {row.get('status')!r} is not one of {', '.join(STATUSES)}")
    return found


# ── Text out ──


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in plain text, columns by two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _block(
    title: str, series: Sequence[tuple[Series, Variant]], places: Sequence[Place], reading: Reading
) -> list[str]:
    """The fullest form that fits: with intervals, without them, then with fewer groups, saying how many are left."""
    lines = [
        (one, [reading.row(variant, one.subject, one.predictor, place) for place in places]) for one, variant in series
    ]
    lines = [(one, rows) for one, rows in lines if any(rows)]
    columns = [[row for row in column if row] for column in zip(*(rows for _, rows in lines), strict=True)]
    sizes = [column[0]["n"] if column else None for column in columns]
    for shown in range(len(places), 0, -1):
        for intervals in (True, False):
            table = [[title[:40], *(group[:30] for _, group in places[:shown])]]
            table += [[_name(one), *(_cell(row, intervals) for row in rows[:shown])] for one, rows in lines]
            table.append(["images", *("-" if n is None else f"{n:,}" for n in sizes[:shown])])
            text = aligned(table)
            if max(map(len, text)) <= WIDTH:
                notes = unique(
                    (_sign(row), row["why"]) for _, rows in lines for row in rows[:shown] if row and row["weak"]
                )
                text += [f"{sign} {why}" for sign, why in notes]
                return text + ([f"groups left for the report: {len(places) - shown}"] if shown < len(places) else [])
    return [f"{title}: nothing was measured"]


def _name(one: Series) -> str:
    name = one.subject if one.predictor == "student" and one.name != "student" else one.predictor
    return name if len(name) <= 30 else f"{name[:29]}…"


def _sign(row: Row) -> str:
    return "-" if row["value"] is None else "*"


def _cell(row: Row | None, intervals: bool) -> str:
    if row is None or row["value"] is None:
        return "-"
    text = f"{row['value']:.3f}{'*' if row['weak'] else ''}"
    return text if not intervals or None in (row["lo"], row["hi"]) else f"{text} [{row['lo']:.2f}, {row['hi']:.2f}]"


def to_json(report: GroupReport) -> str:
    """One row a line, so that reports can be compared by eye and by diff."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    rows = ",\n".join(encode(row) for row in report.rows)
    head = f'"schema": {SCHEMA},\n"stage": {encode(report.stage)}'
    return f'{{{head},\n"rows": [\n{rows}\n],\n"context": {encode(report.context)}}}\n'


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    out = csv.DictWriter(text, unique([*COLUMNS, *(key for row in rows for key in row)]), lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    return text.getvalue()


def markdown(text: Any) -> str:
    """Nothing in the name of a group or a plug-in may act as markup."""
    return "".join(f"\\{c}" if c in "\\|*_`<>[]#" else c for c in str(text)).replace("\n", " ")


@cache
def environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("agglom"),
        autoescape=lambda template: template is not None and template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        **{"number": findings.number, "interval": findings.interval, "estimate": findings.estimate},
        **{"notes": findings.gap_notes, "listed": findings.listed, "p_value": findings.p_value, "markdown": markdown},
    }
    environment.globals |= {"verdict": findings.verdict, "count": findings.count, "FVU_BAR": FVU_BAR}
    return environment


def put(path: Path, text: str) -> Path:
    """Write a file beside its place, then rename. Raises DataError naming it where that fails."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        try:
            beside.unlink(missing_ok=True)
        except OSError as nested:
            error.add_note(str(nested))
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another folder, "
            "then run `agglom evaluate` or `agglom compare` again"
        ) from error
    return path
