"""From scores and a manifest to the rows of a report: the one path for the stages of a run and for anybody's scores.

A view of the manifest is a list of groups, each with its rows (`manifest.View`): memberships, which serve alike where
every image has one group and where it may have several. Intervals of a single group do not mind; the bands over groups
are Bonferroni's, whatever the dependence between them; and under the permutation null a patient in several groups moves
in as many parts.

Shape suffixes: N scored rows with a known label, P predictors, X rows of one group, I patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agglom import config, curves, overlaps, plan, probes, report, samples, scores
from agglom.core import disparity, metrics, resample
from agglom.core.metrics import METRICS, THRESHOLDED, Across, Estimate
from agglom.data import manifest as manifests
from agglom.data import tables
from agglom.data.manifest import Manifest, View
from agglom.errors import DataError
from agglom.job import Attribute, Data
from agglom.overlaps import Overlaps
from agglom.reading import Row, unique
from agglom.report import GroupReport
from agglom.samples import MAIN, TESTED, Binary, Paired, Sample, Settings
from agglom.scores import Scores

LEVEL = 0.95
SUMMARISED = ("auroc", "tpr", "fpr", "accuracy", "ppv", "ece", "selection_rate", *overlaps.METRICS)
NULLED = ("auroc", "tpr", "fpr")
# The names that some gaps have among the fairness criteria.
CRITERIA = {"selection_rate": "demographic_parity_difference", "tpr": "equal_opportunity_difference"}
# The curve over a continuous attribute: where its windows are centred, and the share of patients in each.
CENTRES = tuple(tenth / 10 for tenth in range(1, 10))
WINDOW = 0.2
# Columns that may name the patient, and when a column without a schema is taken for numbers, groups or neither.
PATIENTS = ("patient", "patient_id", "subject_id")
MOST_NUMBERS, MOST_GROUPS = 12, 20


def rows(
    found: Scores, manifest: Manifest, groups: Sequence[str], settings: Settings, notes: list[str]
) -> Iterator[Row]:
    """Every metric of every predictor, label, readout and split, over everybody and in each group of `groups`.

    - values at thresholds chosen on validation (`rule` "global"; "group": on the validation patients of the group);
    - summaries over the groups of an attribute, with group "all"; the null of their gaps and what could be detected;
    - the bounds of a value or a gap when patients whose attribute is not known are assigned at worst;
    - paired differences of predictors (`pairs`), with p-values adjusted by Holm (1979) over the groups of an attribute;
    - `auroc_curve` over a continuous attribute, whose groups are the centres of windows.

    Group thresholds, nulls, bounds, p-values and curves are for the headline split and the readouts in `MAIN` alone.
    Adds to `notes` what a reader must know. The classes of a column come with the label that they make up, see
    `core.multiclass`.
    """
    views = [manifest.view(name) for name in ("", *groups)]
    whole = {
        column: [f"{column}={value}" for value in values]
        for column, values in manifest.classes.items()
        if {f"{column}={value}" for value in values} <= set(found.labels)
    }
    for label in found.labels:
        column = label.partition("=")[0]
        for readout in unique(found.readouts):
            val, test = (samples.binary(found, manifest, label, readout, split, settings) for split in ("val", "test"))
            if column in whole and label == whole[column][0]:
                for split in ("val", "test"):
                    together = samples.classes(found, manifest, column, readout, split, settings)
                    yield from _report(together, views, dict.fromkeys(together.predictors, math.nan), manifest)
            cuts, said = _thresholds(val, val.everybody)
            notes += [f"{label}: {said}, so thresholds are .5."] if said and readout in MAIN else []
            cuts = cuts or dict.fromkeys(val.predictors, 0.5)
            for sample in (val, test):
                yield from _report(sample, views, cuts, manifest)
            if readout in MAIN:
                headline = test if manifest.headline == "test" else val
                for view in views[1:] if len(headline) else ():
                    yield from _group_thresholds(headline, val, view)


def overlap_rows(found: Overlaps, manifest: Manifest, groups: Sequence[str], settings: Settings) -> Iterator[Row]:
    """The same of masks: Dice and IoU, their summaries over groups, and paired differences."""
    views = [manifest.view(name) for name in ("", *groups)]
    for label in found.labels:
        for split in ("val", "test"):
            sample = samples.masks(found, manifest, label, split, settings)
            yield from _report(sample, views, dict.fromkeys(sample.predictors, math.nan), manifest)


def _report(sample: Paired, views: Sequence[View], cuts: Mapping[str, float], manifest: Manifest) -> Iterator[Row]:
    """The rows of one sample; the costly ones of the headline alone."""
    full = sample.readout in MAIN and sample.split == manifest.headline
    for view in views if len(sample) else ():
        yield from _levels(sample, view, cuts, full)
        yield from _differences(sample, view, cuts, full)
        if full and isinstance(sample, Binary) and view.attribute in manifest.numbers:
            yield from _curve(sample, view.attribute, manifest.numbers[view.attribute])


def pairs(predictors: Sequence[str]) -> list[tuple[str, str]]:
    """Whom to subtract from whom: each teacher from the student; without teachers, each other from the student; without
    a student, the first predictor from each other. Teachers alone are not compared."""
    teachers = [name for name in predictors if name.startswith("teacher/")]
    if "student" in predictors:
        return [("student", name) for name in teachers or predictors if name != "student"]
    return [] if teachers else [(name, predictors[0]) for name in predictors[1:]]


def context(manifest: Manifest, data: Data, seed: int, notes: Iterable[str]) -> dict[str, Any]:
    """What any report says of its data."""
    return {
        "split": manifest.headline,
        "groups": [
            {
                "attribute": s.attribute,
                "group": s.group,
                "split": s.split,
                "n_images": s.images,
                "n_patients": s.patients,
            }
            for s in plan.support(manifest, data.groups)
        ],
        "simulated": [name for name, attribute in data.attributes.items() if attribute.simulated],
        "labels": list(manifest.labels),
        "classes": manifest.classes,
        "min_support": data.min_support,
        "manifest": manifest.path.name,
        "seed": seed,
        "notes": unique(notes),
    }


# ── Thresholds ──


def _thresholds(val: Binary, rows_X: Tensor) -> tuple[dict[str, float], str]:
    """By predictor, Youden's threshold on validation rows; none of them, and why, where those lack a class."""
    truth_X = val.y_N[rows_X].numpy()
    if not len(truth_X):
        return {}, "no validation image is scored"
    if len(np.unique(truth_X)) < 2:
        return {}, "validation holds one class"
    return {name: probes.youden(score_N[rows_X].numpy(), truth_X) for name, score_N in val.score_PN.items()}, ""


# ── Values and their summaries over groups ──


def _levels(sample: Sample, view: View, cuts: Mapping[str, float], full: bool) -> Iterator[Row]:
    members = sample.members(view)
    unknown_X = sample.at(view.unknown)
    for metric in sample.metrics:
        for name, cut in cuts.items():
            bounds = {}
            if full and isinstance(sample, Binary):
                bounds = _bounds(sample, metric, name, cut, members, unknown_X)
            at = {group: sample.measured(metric, name, rows_X, cut) for group, rows_X in members.items()}
            for group, measured in at.items():
                found = sample.row(name, metric, (view.attribute, group), measured(LEVEL), **sample.rule(metric, cut))
                yield found | dict(zip(("unknown_lo", "unknown_hi"), bounds.get(group, ()), strict=False))
            if len(members) > 1 and metric in SUMMARISED:
                yield from summaries(sample, metric, name, cut, view, at, bounds, full)


def _bounds(
    sample: Binary, metric: str, name: str, cut: float, members: Mapping[str, Tensor], unknown_X: Tensor
) -> dict[str, tuple[float, float]]:
    """By group, how low and how high the metric may be when the rows of unknown group are assigned."""
    if not len(unknown_X) or metric not in disparity.BOUNDED:
        return {}
    found = {}
    for group, rows_X in members.items():
        both_X = torch.cat([rows_X, unknown_X])
        id_X = torch.cat([torch.zeros_like(rows_X), torch.full_like(unknown_X, -1)])
        columns = sample.y_N[both_X], sample.score_PN[name][both_X], id_X
        (found[group],) = disparity.unknown_bounds(metric, *columns, 1, cut if metric in THRESHOLDED else math.nan)
    return found


def summaries(
    sample: Sample,
    metric: str,
    name: str,
    cut: float,
    view: View,
    at: Mapping[str, Callable[[float], Estimate]],
    bounds: Mapping[str, tuple[float, float]],
    full: bool,
) -> Iterator[Row]:
    """Gap, worst group, ratio and gap to everybody; what fairness criteria call some of them; ES-AUROC."""
    members, groups = sample.members(view), list(view.members)

    def together(shares: int, measured: Iterable[Callable[[float], Estimate]] = at.values()) -> list[Estimate]:
        """Intervals that hold together, as a part of `shares` in all."""
        level = metrics.simultaneous(LEVEL, shares)
        return [one(level) for one in measured]

    def said(summary: str, across: Across, note: str) -> Row:
        share = {group: len(members[group]) / len(sample) for group in groups}
        excluded = [f"{groups[g]} ({status}, {share[groups[g]]:.0%} of the images)" for g, status in across.excluded]
        note += f"; left out: {', '.join(excluded)}" if excluded else ""
        place, mine = (view.attribute, "all"), sample.rule(metric, cut)
        return sample.row(name, summary, place, across.estimate, **mine, note=note.removeprefix("; "))

    wide = together(len(groups))
    assigned = [
        one._replace(lo=bounds[group][0], hi=bounds[group][1]) if group in bounds else one
        for group, one in zip(groups, wide, strict=True)
    ]
    known = bounds and not any(math.isnan(one.lo) for one in assigned if one.status == "ok")
    across_of: dict[str, tuple[Callable[[Sequence[Estimate]], Across], str]] = {
        "gap": (metrics.gap, " − "),
        "worst": (lambda estimates: metrics.worst(metric, estimates), ""),
        "ratio": (disparity.ratio, " ÷ "),
    }
    if metric == "selection_rate":
        del across_of["worst"]  # neither more nor less of it is better
    for summary, (measure, sign) in across_of.items():
        across = measure(wide)
        found = said(f"{metric}_{summary}", across, sign.join(groups[index] for index in across.groups))
        if known and across.estimate.status == "ok":
            worst_case = measure(assigned).estimate
            found |= {"unknown_lo": worst_case.lo, "unknown_hi": worst_case.hi}
        if summary == "gap" and full and metric in NULLED and isinstance(sample, Binary):
            found |= {"detectable": disparity.detectable(wide)}
            found |= _null(sample, metric, name, cut, list(members.values()), wide)
        yield found
        if summary == "gap" and metric in CRITERIA:
            yield found | {"metric": CRITERIA[metric]}
    everybody = sample.measured(metric, name, sample.everybody, cut)
    overall, *wide = together(len(groups) + 1, [everybody, *at.values()])
    across = disparity.gap_to_overall(overall, wide)
    yield said(f"{metric}_gap_to_overall", across, "".join(groups[index] for index in across.groups))
    if metric == "auroc":
        yield said("auroc_es", disparity.equity_scaled(overall, wide, "sum"), f"{len(groups)} groups")
        yield said("auroc_es_std", disparity.equity_scaled(overall, wide, "std"), f"{len(groups)} groups")
    if metric == "tpr":
        fpr = [sample.measured("fpr", name, rows_X, cut) for rows_X in members.values()]
        across = disparity.equalized_odds(together(2 * len(groups)), together(2 * len(groups), fpr))
        yield said("equalized_odds_difference", across, " − ".join(groups[index] for index in across.groups))


def _null(
    sample: Binary, metric: str, name: str, cut: float, members: Sequence[Tensor], wide: Sequence[Estimate]
) -> dict[str, float]:
    """The gap against what it would be if groups did not differ, over the groups that it is measured on."""
    usable = [rows_X for rows_X, one in zip(members, wide, strict=True) if one.status == "ok"]
    if len(usable) < 2 or not sample.settings.permutations:
        return {}
    rows_X = torch.cat(usable)
    null = resample.permutation_null(
        metric,
        sample.y_N[rows_X],
        sample.score_PN[name][rows_X],
        sample.patient_N[rows_X],
        torch.arange(len(usable)).repeat_interleave(torch.tensor([len(one) for one in usable])),
        len(usable),
        threshold=cut if metric in THRESHOLDED else math.nan,
        permutations=sample.settings.permutations,
        seed=sample.settings.seed,
    )
    corrected = max(0.0, metrics.gap(wide).estimate.value - null.bias)
    return {"p_value": null.p_value, "null_hi": null.quantile, "corrected": corrected}


# ── Thresholds of groups ──


def _group_thresholds(sample: Binary, val: Binary, view: View) -> Iterator[Row]:
    """The same rates with a threshold for each group, chosen on its own validation patients."""
    members, chosen = sample.members(view), val.members(view)
    cuts = {group: _thresholds(val, chosen[group]) for group in members}
    for metric in (one for one in METRICS if one in THRESHOLDED):
        for name in sample.score_PN:
            for group, rows_X in members.items():
                cut, said = cuts[group]
                estimate = sample.measured(metric, name, rows_X, cut.get(name, 0.5))(LEVEL)
                if not cut and estimate.status != "empty":
                    nan = math.nan
                    estimate = estimate._replace(value=nan, lo=nan, hi=nan, status="single_class", method="none")
                note = f"no threshold: {said}" if said else ""
                more = {"threshold": cut.get(name), "rule": "group", "note": note}
                yield sample.row(name, metric, (view.attribute, group), estimate, **more)


# ── Differences between predictors ──


def _differences(sample: Paired, view: View, cuts: Mapping[str, float], full: bool) -> Iterator[Row]:
    members = sample.members(view)
    for names in pairs(list(cuts)):
        for metric in sample.metrics:
            if metric == "ece_debiased":
                continue  # it shares its interval with ece
            found = []
            for group, rows_X in members.items():
                estimate, p_value = sample.difference(metric, names, rows_X, [cuts[name] for name in names], LEVEL)
                tested = full and metric in TESTED and estimate.status == "ok"
                more: dict[str, Any] = {"rule": "global"} if sample.rule(metric, 0) else {}
                more |= {"p_value": p_value() if tested else math.nan}
                found.append(sample.row(" - ".join(names), metric, (view.attribute, group), estimate, **more))
            for one, adjusted in zip(found, metrics.holm([one["p_value"] for one in found]), strict=True):
                yield one | {"p_holm": adjusted}


# ── The curve over a continuous attribute ──


def _curve(sample: Binary, attribute: str, number_M: np.ndarray) -> Iterator[Row]:
    """AUROC in sliding windows: the patients nearest to the deciles of the attribute, with pointwise intervals.

    A window holds a fifth of the patients and `min_patients` of each class, where there are as many.
    """
    known = np.flatnonzero((sample.place_M >= 0) & ~np.isnan(number_M))
    rows_X, number_X = sample.at(known), number_M[known]
    if not len(known):
        return
    patient_X, y_X = sample.patient_N[rows_X].numpy(), sample.y_N[rows_X].numpy()
    of_patients = number_X[np.unique(patient_X, return_index=True)[1]]
    for centre in np.unique(np.quantile(of_patients, CENTRES, method="closest_observation")):
        far_X = np.abs(number_X - centre)

        def reach(mine_X: np.ndarray, patients: int, far_X=far_X) -> float:
            """How far to go for so many patients; 0 where there are fewer."""
            order = np.argsort(far_X[mine_X], kind="stable")
            nearest = far_X[mine_X][order][np.unique(patient_X[mine_X][order], return_index=True)[1]]
            return float(np.sort(nearest)[patients - 1]) if len(nearest) >= patients else 0.0

        radius = max(
            reach(np.ones(len(far_X), bool), math.ceil(WINDOW * len(of_patients))),
            *(reach(y_X == outcome, sample.settings.min_patients) for outcome in (0, 1)),
        )
        near_X = far_X <= radius
        note = f"from {number_X[near_X].min():g} to {number_X[near_X].max():g}"
        for name in sample.score_PN:
            estimate = sample.measured("auroc", name, rows_X[torch.as_tensor(near_X)], math.nan)(LEVEL)
            yield sample.row(name, "auroc_curve", (attribute, f"{centre:g}"), estimate, note=note)


# ── Anybody's scores ──


def main(
    predictions: Path, manifest_file: Path | None, config_file: Path | None, overrides: Sequence[str], out: Path
) -> list[Path]:
    """Report on a table of scores, or of masks (`.npz`): `out`/report.{json,csv,md,html}, whose paths are returned.

    The schema of the manifest is the `data` of `config_file`, whose manifest `manifest_file` replaces; without a file
    it is read from the column names (`guess`). One of the two must be given. Raises ConfigError and DataError.
    """
    masks = predictions.suffix == overlaps.SUFFIX
    table, notes = None if masks else scores.read(predictions), list[str]()
    schema: dict[str, Any] = {} if manifest_file is None else {"manifest": str(manifest_file.absolute())}
    if config_file is None:
        schema, notes = guess(Path(schema["manifest"]), table.labels if table else ())
    audit, base = config.load_audit(config_file, overrides, **schema)
    data = audit.data if table else replace(audit.data, labels=())
    manifest = manifests.load(data, base, check_files=False, needed=(), missing="Name it with --manifest")
    settings = Settings.of(data, audit.evaluate, audit.seed)
    about: dict[str, Any] = {"name": out.name, "index": 0, "scores": predictions.name}
    found: Scores | Overlaps
    if table:
        found = scores.match(table, manifest, data.labels)
        notes = [*notes, *found.notes]
        measured = list(rows(found, manifest, data.groups, settings, notes))
        about |= {"curves": curves.of_scores(found, manifest, data.groups, settings)}
    else:
        found = overlaps.load(predictions, manifest)
        notes = [*notes, *found.notes]
        measured = list(overlap_rows(found, manifest, data.groups, settings))
    about = context(manifest, data, audit.seed, notes) | about | {"labels": list(found.labels)}
    return report.write(GroupReport("report", [{"stage": "report", **one} for one in measured], about), out)


def guess(path: Path, labels: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The `data` section for the manifest at `path` as its column names suggest it, and notes on what is left out.

    `image`; the first of `PATIENTS`; `split`, without which all rows are of test; the `labels` of the scores ("label",
    where they name none). Every other column is an attribute and a group: numbers with more than 12 distinct values are
    continuous, with edges near the quartiles; more than 20 distinct texts are no groups.
    """
    table = tables.read(path, "the manifest", "Name it with --manifest").table
    names = table.column_names
    if "" in labels and "label" not in names:
        raise DataError(
            f"{path}: no column 'label', which scores without a named label are scores of; name their columns "
            "predictor:label (a long table has a column label), or name the label in data.labels of a --config"
        )
    schema: dict[str, Any] = {
        "manifest": str(path),
        "patient": next((name for name in PATIENTS if name in names), PATIENTS[0]),
        "split": "split" if "split" in names else None,
        "labels": [label or "label" for label in labels],
    }
    used = {"image", schema["patient"], schema["split"], *(label.partition("=")[0] for label in schema["labels"])}
    attributes: dict[str, dict[str, Any]] = {}
    notes = []
    for name in unique(names):
        if name in used:
            continue
        cells = set(tables.text(table.column(name))) - {"", *Attribute().missing}
        numbers = [found for cell in cells if (found := tables.number(cell)) is not None]
        if len(numbers) == len(cells) > MOST_NUMBERS:
            every = [found for cell in tables.text(table.column(name)) if (found := tables.number(cell)) is not None]
            attributes[name] = {"kind": "continuous", "bins": _edges(every)}
        elif not cells or len(cells) > MOST_GROUPS:
            notes.append(f"Column {name} is not used: {len(cells)} distinct values.")
        elif not name or set("*|") & set(name):
            notes.append(f"Column {name!r} is not used: '*' and '|' write crossings.")
        else:
            attributes[name] = {}
    return schema | {"attributes": attributes, "groups": list(attributes)}, notes


def _edges(values: Sequence[float]) -> list[float]:
    """The quartiles, rounded to about a fiftieth of the range, that leave a value on both sides; where most values are
    the lowest, the one above it."""
    lowest, highest = min(values), max(values)
    digits = -math.floor(math.log10((highest - lowest) / 50))
    if all(value.is_integer() for value in values):
        digits = min(0, digits)
    rounded = {round(float(edge), digits) for edge in np.quantile(values, (0.25, 0.5, 0.75))}
    inside = sorted(edge for edge in rounded if lowest < edge <= highest)
    return inside or [min(value for value in values if value > lowest)]
