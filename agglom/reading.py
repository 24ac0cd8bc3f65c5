"""The rows of a report, selected and found by their keys; nothing is computed here.

A reading is of a distillation (student, teachers, ensemble) or an audit: predictors of any name, of which the first is
the one that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
FEW = "too few patients"
FVU_BAR = 0.8
OWN_MODELS = ("student", "ensemble")
OVERALL = ("", "all")
# By what a label is judged, in words: a mask has no AUROC.
MAIN = {"auroc": "AUROC", "dice": "Dice"}
# Rows of a study of its own: their labels, places and targets are not those of the rest.
STUDIES = ("leakage", "scarcity_", "holdout_", "sweep_")
READOUTS = {"linear": "AUROC, linear probe", "knn": "nearest neighbours", "zeroshot": "zero-shot"}
OWN = "linear, own threshold"
# The note of rows of `leakage` by a probe of other patients than those whose features a teacher was fitted on.
ON_VALIDATION = "fitted on validation patients"
RATES = {
    **{"tpr": "sensitivity (TPR)", "fpr": "false alarms (FPR)"},
    **{"ppv": "right if flagged (PPV)", "npv": "right if not (NPV)", "selection_rate": "flagged"},
}
QUALITIES = {
    **{"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "F1", "brier": "Brier score"},
    **{"ece": "calibration error (ECE)"},
}
SPREADS = {
    **{"gap": "{} gap", "worst": "worst {}", "ratio": "worst ÷ best"},
    **{"gap_to_overall": "farthest from all", "es": "equity-scaled"},
}
CRITERIA = {
    **{"tpr_gap": "sensitivity (equal opportunity)", "fpr_gap": "false alarms"},
    **{"equalized_odds_difference": "equalized odds", "demographic_parity_difference": "flagged (parity)"},
}
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
    likewise, a label of several classes before those of its classes. `given`: the scores are somebody's, not a
    probe's. `studies`: the rows of `STUDIES`, which no cell holds. `validated`: the main metric of each teacher on
    validation patients, by label and place.
    """

    split: str
    cells: dict[tuple[Variant, tuple[str, str], Place], Row]
    simulated: tuple[str, ...] = ()
    given: bool = False
    studies: tuple[Row, ...] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    validated: Mapping[tuple[str, Place], Mapping[str, float]] = field(default_factory=dict)

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
    def mains(self) -> dict[str, str]:
        """By label the metric that judges it, a key of `MAIN`."""
        found: dict[str, str] = {}
        for (metric, _), (label, _), _ in self.cells:
            if metric in MAIN:
                found[label] = min(metric, found.get(label, metric), key=list(MAIN).index)
        return found

    def main(self, label: str, summary: str = "") -> Variant:
        """The variant that judges a label, or a summary of it over groups: `gap`, `worst`."""
        return "_".join(part for part in (self.mains.get(label, "auroc"), summary) if part), "linear"

    def measure(self, label: str) -> str:
        """The main metric of a label in words."""
        return MAIN[self.main(label)[0]]

    def readouts(self, label: str) -> dict[Variant, str]:
        """The columns of a label's main metric, with their headings; the first is the one that is drawn."""
        found = {variant for variant, (subject, _), _ in self.cells if subject == label}
        if self.main(label)[0] == "dice":
            named = {("dice", "linear"): "Dice", ("iou", "linear"): "IoU"}
        else:
            named = {("auroc", readout): heading for readout, heading in READOUTS.items()}
            named |= {("auroc", "linear"): "AUROC"} if self.given else {}
        return {variant: heading for variant, heading in named.items() if variant in found}

    @cached_property
    def labels(self) -> list[str]:
        found = list(self.mains)

        def rank(label: str) -> tuple[int, bool]:
            family = [label, *self.members(label)]
            return min(found.index(one) for one in family if one in found), label not in self.classes

        return sorted(found, key=rank)

    def members(self, label: str) -> list[str]:
        """The labels of the classes of a label, each against the rest."""
        return [f"{label}={name}" for name in self.classes.get(label, ())]

    @cached_property
    def heads(self) -> list[str]:
        """The labels that are no class of another: what is counted and told first."""
        inner = {one for label in self.labels for one in self.members(label)}
        return [label for label in self.labels if label not in inner]

    @cached_property
    def predictors(self) -> list[str]:
        named = [predictor for _, (_, predictor), _ in self.cells]
        return unique([*named, *(row["predictor"] for row in self.studies)])

    @cached_property
    def teachers(self) -> list[str]:
        mine = [name for name in self.predictors if name.startswith("teacher/") and " - " not in name]
        return [name.removeprefix("teacher/") for name in mine]

    @cached_property
    def has_student(self) -> bool:
        return "student" in self.predictors

    def row(self, variant: Variant, subject: str, predictor: str, place: Place) -> Row | None:
        return self.cells.get((variant, (subject, predictor), place))

    def level(self, label: str, predictor: str, place: Place, summary: str = "") -> Row | None:
        """The row of the main metric of a label."""
        return self.row(self.main(label, summary), label, predictor, place)

    @cached_property
    def others(self) -> list[str]:
        """Predictors that are no part of a distillation: somebody's systems."""
        known = {*OWN_MODELS, *(f"teacher/{name}" for name in self.teachers)}
        return [name for name in self.predictors if name not in known and " - " not in name]

    def models(self, label: str) -> list[Series]:
        teachers = [Series(name, i, label, f"teacher/{name}") for i, name in enumerate(self.teachers, 1)]
        others = [Series(name, i, label, name) for i, name in enumerate(self.others, 1 + len(teachers))]
        return [Series("student", 0, label, "student"), *teachers, *others, Series("ensemble", -1, label, "ensemble")]

    @cached_property
    def is_audit(self) -> bool:
        return bool(self.others) and not self.has_student and not self.teachers

    def first(self, label: str) -> tuple[str, str]:
        """The predictor that findings speak of, and what they call it."""
        best = None if self.has_student or self.is_audit else self.best_teacher(label, OVERALL)
        name = "student" if self.has_student else self.others[0] if self.is_audit else f"teacher/{best}"
        return name, self.called(name)

    def called(self, predictor: str) -> str:
        """A predictor in a sentence."""
        kind, _, name = predictor.partition("/")
        return f"the teacher {name}" if kind == "teacher" else f"the {kind}" if predictor in OWN_MODELS else predictor

    def pairs(self, label: str) -> list[Series]:
        """The differences, each named after the teacher, or after both predictors where no student is compared."""
        names = [name for name in self.predictors if " - " in name]
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
        """The teacher that validation patients put first: of the group, or of everybody where it has none of them.
        The patients that the report speaks of have no say, or the best would be best by luck."""
        values = self.validated.get((label, place)) or self.validated.get((label, OVERALL), {})
        return max(values, key=values.__getitem__, default=None)


def read(rows: Iterable[Row], context: Mapping[str, Any]) -> Reading:
    """Select the rows of the headline split (`context["split"]`, else test if any row is of test, else val)."""
    rows = list(rows)
    splits = {row["split"] for row in rows}
    split = context.get("split") or ("test" if "test" in splits else "val")
    prior = "val" if "val" in splits else split
    support, classes = context.get("min_support") or 0, context.get("classes", {})
    # The words and figures speak of one readout; scores that somebody gave stand where a probe's would.
    readouts = {row["readout"] for row in rows if row["metric"] in MAIN}
    given = bool(readouts) and not readouts & {"linear", "knn"}
    stand_in = "scores" if "scores" in readouts else "zeroshot"
    cells, studies = {}, []
    validated: dict[tuple[str, Place], dict[str, float]] = {}
    for row in rows:
        readout = "linear" if given and row["readout"] == stand_in else row["readout"]
        place = (row["attribute"] or "", row["group"] or "not annotated")
        if row["split"] == prior and row["metric"] in MAIN and readout == "linear" and row["value"] is not None:
            teacher = row["predictor"].removeprefix("teacher/")
            if teacher != row["predictor"]:
                validated.setdefault((row["label"], place), {})[teacher] = row["value"]
        if row["split"] == split:
            few = row["n_patients"] is not None and row["n_patients"] < support
            why = _reason(row, classes) or (FEW if few else "")
            row = row | {"weak": bool(why), "why": why}
            if row["metric"].startswith(STUDIES):
                studies.append(row)
                continue
            subject = row["target"] if row["metric"].startswith("fvu") else row["label"]
            if row["rule"] == "group":
                row |= {"weak": bool(row["note"] or why), "why": row["note"] or why}
                readout = readout.replace("linear", OWN)
            key = ((row["metric"], readout), (subject or "", row["predictor"]))
            cells[*key, place] = row
    return Reading(split, cells, tuple(context.get("simulated", ())), given, tuple(studies), classes, validated)


def _reason(row: Row, classes: Mapping[str, Any]) -> str:
    """A status in words; whom it counts as positive or negative depends on what was measured."""
    if row["status"] in ("below_min_pos", "below_min_neg"):
        if row["metric"].startswith(("dice", "iou")):
            return FEW
        if row["metric"] == "leakage":
            return f"{FEW} of the group" if row["status"] == "below_min_pos" else "too few other patients"
        if row["metric"] == "holdout_auroc":
            return f"{FEW} of an outcome, here or in the fit ({row['note']})"
        if row["label"] in classes:
            return f"{FEW} of a class"
    return STATUSES[row["status"]]


def unique(items: Iterable[Any]) -> list[Any]:
    """Without repetition, in order of first appearance."""
    return list(dict.fromkeys(items))
