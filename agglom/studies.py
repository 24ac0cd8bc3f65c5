"""Studies of frozen features beyond the ordinary probes: what they tell about people, and how few labels they need.

All are linear probes of `probes.linear`, fitted on train patients and scored on those of validation and test.

- Leakage: with what AUROC a probe reads a person's group from the features (Gichoya et al. 2022, Lancet Digit. Health
  4). What can be read need not be used (Glocker et al. 2023, eBioMedicine 89); what a linear probe does not find, other
  readers may. An attribute that a teacher was fitted on is the exception: to erase it from train patients leaves a
  probe of those same patients nothing to find, less than nothing on others. There the probe of every predictor is
  fitted on validation patients, whom no eraser has seen, and scored on test alone.
- Scarcity: the probe fitted on a share of the train patients, for several draws of them. The strength of its penalty is
  chosen on all validation patients, so that shares differ in nothing but the labels fitted on; who has few labels has
  few of those too, and would do worse (Oliver et al. 2018, arXiv 1804.09170, section 4.6).
- Hold-out: the probe fitted on the patients of one site, or any group, and tested on those of each (Zech et al. 2018,
  PLoS Med. 15).

Shape suffixes: N rows of the evaluation, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from agglom import probes
from agglom.core import metrics
from agglom.core.metrics import Across, Estimate
from agglom.data.manifest import Manifest
from agglom.job import Data, Evaluate
from agglom.probes import Readout
from agglom.reading import ON_VALIDATION, Row, unique
from agglom.samples import Settings, row

Readouts = Mapping[tuple[str, str, str], Readout | None]
Masks = tuple[str, dict[str, np.ndarray]]  # an attribute or crossing, and by group the mask of its rows
SUMMARIES: dict[str, Callable[[Sequence[Estimate]], Across]] = {
    "gap": metrics.gap,
    "worst": partial(metrics.worst, "auroc"),
}


def rows(
    summaries: Mapping[str, Tensor | None],
    manifest: Manifest,
    rows_N: np.ndarray,
    data: Data,
    evaluate: Evaluate,
    settings: Settings,
    fitted_on: Set[str],
    readouts: Readouts,
    memory: MutableMapping[str, list[Row]],
) -> Iterator[Row]:
    """Every row of the studies that `evaluate` asks for, of each predictor with a summary (N, D) of the rows `rows_N`.

    - `leakage`: for each part of `data.groups`, each group against the other known ones (by membership, where a row
      may be in several), the interval that of `metrics.evaluate`. Of attributes in `fitted_on`, which a teacher has
      seen of the train patients, test alone has a value;
    - `scarcity_auroc`, its `_gap` and its `_worst`: `target` is the share, `value` the mean over seeds, `lo` and `hi`
      the least and largest;
    - `holdout_auroc`: `target` is the group fitted on, "all" for everybody, `group` the one tested on. Its status tells
      of few patients (`min_patients`) in the test or else in the fit, and its note counts the latter.

    A probe whose train rows hold one class is a row with status single_class. `readouts` has the ordinary probes by
    (label, "linear", predictor), which are not fitted again. `memory` keeps the rows by predictor: those of a frozen
    teacher are made once, those of the student each time.
    """
    for name, summary_ND in summaries.items():
        if summary_ND is None:
            continue
        if name == "student" or name not in memory:
            task = partial(_Task, name, summary_ND, manifest, rows_N, settings)
            memory[name] = list(_rows(task, manifest, rows_N, data, evaluate, fitted_on, readouts))
        yield from memory[name]


@dataclass(frozen=True)
class _Task:
    """Something to read from the summaries of one predictor: `label_N` is 0, 1 or NaN (not known)."""

    predictor: str
    summary_ND: Tensor
    manifest: Manifest
    rows_N: np.ndarray
    settings: Settings
    label_N: np.ndarray

    @cached_property
    def split_N(self) -> np.ndarray:
        return self.manifest.split_N[self.rows_N]

    @cached_property
    def patient_N(self) -> np.ndarray:
        return self.manifest.patient_N[self.rows_N]

    @property
    def splits(self) -> list[str]:
        return [split for split in ("val", "test") if (self.split_N == split).any()]

    def known(self, split: str) -> np.ndarray:
        return (self.split_N == split) & ~np.isnan(self.label_N)

    def patients(self, mask_N: np.ndarray) -> np.ndarray:
        return np.unique(self.patient_N[mask_N])

    def probe(self, fit_N: np.ndarray, val_N: np.ndarray) -> Readout | None:
        """The probe fitted on `fit_N`. Train rows beyond those are not scored (NaN)."""
        used_N = fit_N | (self.split_N != "train")
        columns = self.label_N[used_N], fit_N[used_N], val_N[used_N]
        found = probes.linear(self.summary_ND[torch.as_tensor(used_N)], *columns)
        if found is None:
            return None
        scores_N = np.full(len(used_N), np.nan)
        scores_N[used_N] = found.scores_N
        return Readout(scores_N, found.note)

    def auroc(self, readout: Readout | None, mask_N: np.ndarray) -> Estimate:
        """AUROC on the rows of a mask; undefined, with their counts, where there is no probe."""
        scores_N = np.zeros(len(mask_N)) if readout is None else readout.scores_N
        columns = (torch.as_tensor(column_N[mask_N]) for column_N in (self.label_N, scores_N, self.patient_N))
        found = metrics.evaluate("auroc", *columns, min_patients=self.settings.min_patients)
        return found._replace(status="single_class") if readout is None and found.status != "empty" else found

    def row(self, metric: str, place: tuple[str, str], split: str, estimate: Estimate, **more: str) -> Row:
        return row(self.predictor, metric, place, split, estimate, readout="linear", **more)


def _rows(
    task: Callable[[np.ndarray], _Task],
    manifest: Manifest,
    rows_N: np.ndarray,
    data: Data,
    evaluate: Evaluate,
    fitted_on: Set[str],
    readouts: Readouts,
) -> Iterator[Row]:
    def masks(name: str) -> Masks:
        view = manifest.view(name)
        return name, {group: np.isin(rows_N, rows) for group, rows in view.members.items()}

    if evaluate.leakage:
        for attribute in unique(part for name in data.groups for part in name.split("*")):
            seen = attribute in fitted_on
            yield from _leakage(task, *masks(attribute), several=attribute in manifest.separators, seen=seen)
    if not (evaluate.scarcity or evaluate.holdout):
        return
    views, held = [masks(name) for name in ("", *data.groups)], [masks(name) for name in evaluate.holdout]
    for index, label in enumerate(manifest.labels):
        one = task(manifest.label_NL[rows_N, index].astype(np.float64))
        key = (label, "linear", one.predictor)
        whole = readouts[key] if key in readouts else one.probe(one.known("train"), one.known("val"))
        for share in evaluate.scarcity:
            yield from _scarcity(one, label, views, share, evaluate.scarcity_seeds, whole)
        for view in held:
            yield from _holdout(one, label, *view, whole)


def _leakage(
    task: Callable[[np.ndarray], _Task], attribute: str, members: dict[str, np.ndarray], *, several: bool, seen: bool
) -> Iterator[Row]:
    known_N = np.logical_or.reduce(list(members.values()))
    first: Readout | None = None
    for group, mine_N in members.items():
        one = task(np.where(known_N, mine_N, np.nan))
        fit_N, val_N = _unseen(one) if seen else (one.known("train"), one.known("val"))
        if first is not None and len(members) == 2 and not several:
            readout: Readout | None = Readout(-first.scores_N, first.note)
        else:
            readout = first = one.probe(fit_N, val_N)
        source = "validation" if seen else "train"
        said = [f"all {source} images have one class"] if readout is None else [readout.note] if readout.note else []
        said += [f"{ON_VALIDATION}, as a teacher was on {attribute} of train patients"] if seen else []
        for split in one.splits:
            tested_N = one.known(split)
            if seen and split == "val":
                if "test" in one.splits:
                    continue
                said, tested_N = [*said, "there are no test patients to score it on"], np.zeros(len(tested_N), bool)
            estimate = one.auroc(readout, tested_N)
            yield one.row("leakage", (attribute, group), split, estimate, note="; ".join(said))


def _unseen(one: _Task) -> tuple[np.ndarray, np.ndarray]:
    """The rows of four fifths of the validation patients, and those of the others, who choose the penalty."""
    val_N = one.known("val")
    order = np.random.default_rng(one.settings.seed).permutation(one.patients(val_N))
    judge_N = val_N & np.isin(one.patient_N, order[: len(order) // 5])
    return val_N & ~judge_N, judge_N


def _scarcity(
    one: _Task, label: str, views: Sequence[Masks], share: float, seeds: int, whole: Readout | None
) -> Iterator[Row]:
    more = {"label": label, "target": f"{share:g}"}
    samples = [_sample(one, share, seed) for seed in range(seeds)] if share < 1 else []
    fits = [one.probe(sample_N, one.known("val")) for sample_N in samples] or [whole]
    for split, (attribute, members) in itertools.product(one.splits, views):
        known_N, groups = one.known(split), list(members)
        found = [[one.auroc(fit, known_N & mine_N) for mine_N in members.values()] for fit in fits]
        for group, estimates in zip(groups, zip(*found, strict=True), strict=True):
            estimate, note = _over_seeds(estimates)
            yield one.row("scarcity_auroc", (attribute, group), split, estimate, **more, note=note)
        for summary, measure in SUMMARIES.items() if len(groups) > 1 else ():
            across = [measure(estimates) for estimates in found]
            estimate, note = _over_seeds([each.estimate for each in across])
            note += _named(across, groups)
            yield one.row(f"scarcity_auroc_{summary}", (attribute, "all"), split, estimate, **more, note=note)


def _sample(one: _Task, share: float, seed: int) -> np.ndarray:
    """The rows of a share of the train patients with a known label; of a seed, smaller samples lie in larger ones."""
    train_N = one.known("train")
    order = np.random.default_rng((one.settings.seed, seed)).permutation(one.patients(train_N))
    return train_N & np.isin(one.patient_N, order[: math.ceil(share * len(order) - 1e-9)])


def _over_seeds(found: Sequence[Estimate]) -> tuple[Estimate, str]:
    """Mean and extremes of the seeds that have a value, and how many they are. Counts are those of the first."""
    usable = [each for each in found if not math.isnan(each.value)]
    note = f"{len(found)} seed{'s' * (len(found) > 1)}"
    if len(usable) < len(found):
        note = f"{len(usable)} of {note} usable"
    if not usable:
        return found[0], note
    values = [each.value for each in usable]
    return usable[0]._replace(value=fmean(values), lo=min(values), hi=max(values), method="seed_range"), note


def _named(across: Sequence[Across], groups: Sequence[str]) -> str:
    """Which groups set the value in each usable seed, and which were left out."""
    set_by = [" − ".join(groups[index] for index in each.groups) for each in across if each.groups]
    left = unique(f"{groups[index]} ({status})" for each in across for index, status in each.excluded)
    return (f": {', '.join(set_by)}" if set_by else "") + (f"; left out: {', '.join(left)}" if left else "")


def _holdout(
    one: _Task, label: str, attribute: str, members: dict[str, np.ndarray], whole: Readout | None
) -> Iterator[Row]:
    for source, mine_N in ({"all": np.ones(len(one.rows_N), bool)} | members).items():
        fit_N, val_N = one.known("train") & mine_N, one.known("val") & mine_N
        status, said = _support(one, fit_N)
        if source != "all" and len(np.unique(one.label_N[val_N])) < 2:
            val_N, said = one.known("val"), f"{said}; strength chosen on the validation patients of all groups"
        readout = whole if source == "all" else one.probe(fit_N, val_N)
        more = {"label": label, "target": source, "note": said}
        for split, (group, tested_N) in itertools.product(one.splits, members.items()):
            estimate = one.auroc(readout, one.known(split) & tested_N)
            estimate = estimate._replace(status=status) if estimate.status == "ok" else estimate
            yield one.row("holdout_auroc", (attribute, group), split, estimate, **more)


def _support(one: _Task, fit_N: np.ndarray) -> tuple[str, str]:
    """Whether a probe is fitted on enough patients of both classes, and on how many."""
    positive, negative = (len(one.patients(fit_N & (one.label_N == outcome))) for outcome in (1, 0))
    enough = one.settings.min_patients
    status = "below_min_pos" if positive < enough else "below_min_neg" if negative < enough else "ok"
    return status, f"fitted on {len(one.patients(fit_N))} patients, {positive} of them positive"
