"""A report of a table of scores that does not fit into memory: record batches in, counts per bin kept.

What is given up: values are those of scores in 4096 bins (rates at the threshold, which is the edge of a bin, Brier and
ECE are exact, AUROC and average precision the middle of bounds that a note states); intervals only of rates and AUROC,
and only where each patient has one image; no ECE less its bias where a patient has several; no averages over classes,
no differences between predictors, p-values, nulls, bounds of unknown groups, thresholds of groups or curves.

Shape suffixes: M rows of the manifest, C cells of a batch, E pairs of a row and a group that it is in, P predictors,
L labels, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from agglom import audit, config, report, scores
from agglom.audit import LEVEL, SUMMARISED
from agglom.core import influence, metrics
from agglom.core.influence import Moments
from agglom.core.metrics import THRESHOLDED, Estimate
from agglom.core.streaming import Bounded, ScoreHistogram
from agglom.data import manifest as manifests
from agglom.data.manifest import Manifest, View
from agglom.data.tables import Problems, first_line, without_index
from agglom.errors import DataError
from agglom.reading import Row
from agglom.report import GroupReport
from agglom.samples import Sample, Settings
from agglom.scores import Table

BATCH = 2**17  # rows of the file
SPLITS = ("val", "test")
# The rows that a rate is conditional on, where not all of them.
CONDITION = {
    **dict.fromkeys(sorted(THRESHOLDED - {"balanced_accuracy"}), "any"),
    **{"tpr": "pos", "fpr": "neg", "ppv": "said", "npv": "unsaid", "f1": "pos or said"},
}
Series = tuple[str, str]  # predictor, readout
NOTE = (
    "The scores were read in a stream, so there are no differences between predictors and no p-values, and intervals "
    "only of rates and AUROC, where each patient has one image."
)


@dataclass
class Streamed:
    """What is kept of a table: of each series and label a histogram over the groups of all views, those of val before
    those of test, and which images have a score."""

    labels: tuple[str, ...] = ()
    histograms: dict[tuple[Series, str], ScoreHistogram] = field(default_factory=dict)
    seen: dict[tuple[Series, str], np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def series(self) -> list[Series]:
        return list(dict.fromkeys(series for series, _ in self.histograms))


def main(
    predictions: Path, manifest_file: Path | None, config_file: Path | None, overrides: Sequence[str], out: Path
) -> list[Path]:
    """As `audit.main`, of a Parquet file of any size. Raises ConfigError and DataError."""
    notes = list[str]()
    schema: dict[str, Any] = {} if manifest_file is None else {"manifest": str(manifest_file.absolute())}
    if config_file is None:
        labels = dict.fromkeys(label for part in _parts(predictions) for label in part.labels)
        schema, notes = audit.guess(Path(schema["manifest"]), tuple(labels))
    asked, base = config.load_audit(config_file, overrides, **schema)
    manifest = manifests.load(asked.data, base, check_files=False, needed=(), missing="Name it with --manifest")
    views = [manifest.view(name) for name in ("", *asked.data.groups)]
    found = read(predictions, manifest, asked.data.labels, views)
    settings = Settings.of(asked.data, asked.evaluate, asked.seed)
    notes += found.notes
    measured = [{"stage": "report", **one} for one in rows(found, manifest, views, settings, notes)]
    about = audit.context(manifest, asked.data, asked.seed, [*notes, NOTE]) | {"labels": list(found.labels)}
    about |= {"name": out.name, "index": 0, "scores": predictions.name}
    return report.write(GroupReport("report", measured, about), out)


def read(path: Path, manifest: Manifest, labels: Sequence[str], views: Sequence[View]) -> Streamed:
    """Count the scores of the table at `path`. Raises DataError with the problems of the first batch that has any, or
    with what the whole lacks."""
    found, (offset_M, id_E, width) = Streamed(), _memberships(manifest, views)
    for part in _parts(path):
        label_C, row_C = scores.placed(part, manifest, labels)
        again_C = np.ones(len(row_C), bool)
        key_C = part.series_C * len(labels) + label_C
        for key in np.unique(key_C):
            of, label = (part.series[key // len(labels)], labels[key % len(labels)]), key % len(labels)
            mine = np.flatnonzero(key_C == key)
            first = mine[np.unique(row_C[mine], return_index=True)[1]]
            seen_M = found.seen.setdefault(of, np.zeros(len(manifest), bool))
            again_C[first] = seen_M[row_C[first]]
            seen_M[row_C[first]] = True
            y_C = manifest.label_NL[row_C[mine], manifest.labels.index(labels[label])]
            mine, y_C = mine[~np.isnan(y_C)], y_C[~np.isnan(y_C)]
            start_C, count_C = offset_M[row_C[mine]], offset_M[row_C[mine] + 1] - offset_M[row_C[mine]]
            pair_E = np.repeat(start_C - (np.cumsum(count_C) - count_C), count_C) + np.arange(count_C.sum())
            columns = np.repeat(y_C, count_C), np.repeat(part.score_C[mine], count_C), id_E[pair_E].astype(np.int64)
            histogram = found.histograms.get(of) or ScoreHistogram.empty(width)
            found.histograms[of] = histogram.update(*map(torch.as_tensor, columns))
        part.mark("duplicate rows", again_C, "An image may have one score of a predictor and label")
        part.problems.throw()
    found.labels = tuple(label for label in labels if any(label == one for _, one in found.seen))
    truth_ML = manifest.label_NL[:, [manifest.labels.index(label) for label in found.labels]]
    nothing_M = np.zeros(len(manifest), bool)
    has_PML = np.array([[found.seen.get((s, label), nothing_M) for label in found.labels] for s in found.series])
    whole = replace(part, series=tuple(found.series), problems=replace(part.problems, legend="of the whole table"))
    scores.check_complete(whole, manifest, found.labels, truth_ML, has_PML.swapaxes(1, 2) & ~np.isnan(truth_ML))
    whole.problems.throw()
    found.notes += scores.notes_on(manifest, labels, found.labels, truth_ML, np.logical_or.reduce(has_PML, (0, 1)))
    return found


def rows(
    found: Streamed, manifest: Manifest, views: Sequence[View], settings: Settings, notes: list[str]
) -> Iterator[Row]:
    """The values of `audit.rows` over everybody and in each group, and their summaries where there are intervals."""
    for label in found.labels:
        for readout in dict.fromkeys(readout for _, readout in found.series):
            of = {series[0]: found.histograms[series, label] for series in found.series if series[1] == readout}
            cuts = {name: histogram.youden(0) for name, histogram in of.items()}
            if any(map(math.isnan, cuts.values())):
                cuts = dict.fromkeys(of, 0.5)
                notes.append(f"{label}: validation is not scored or holds one class, so thresholds are .5.")
            for split in SPLITS:
                sample = _sample(found, manifest, views, label, readout, split, settings, of, cuts)
                for view in views if len(sample) else ():
                    yield from _levels(sample, view, cuts)


def _levels(sample: Binned, view: View, cuts: dict[str, float]) -> Iterator[Row]:
    members = sample.members(view)
    for metric in sample.metrics:
        for name, cut in cuts.items():
            at = {group: sample.measured(metric, name, rows_X, cut) for group, rows_X in members.items()}
            found = {group: measured(LEVEL) for group, measured in at.items()}
            for group, one in found.items():
                more = sample.rule(metric, cut) | {"note": sample.note(metric, name, members[group])}
                yield sample.row(name, metric, (view.attribute, group), one, **more)
            bare = any(math.isnan(one.lo) > math.isnan(one.value) for one in found.values())
            if len(members) > 1 and metric in SUMMARISED and not bare:
                yield from audit.summaries(sample, metric, name, cut, view, at, {}, full=False)


@dataclass(frozen=True)
class Binned(Sample):
    """One label, readout and split. `rows_G` are the rows of each group of all views, `place_G` those of its histogram;
    `value_G` and `bounds` by predictor and metric."""

    y_N: Tensor
    histograms: dict[str, ScoreHistogram]
    rows_G: dict[tuple[str, str], Tensor]
    first: int
    count_G4: dict[str, Tensor]
    value_G: dict[str, dict[str, Tensor]]
    bounds: dict[str, dict[str, Bounded]]

    thresholded = True

    @property
    def predictors(self) -> list[str]:
        return list(self.histograms)

    @property
    def everybody(self) -> Tensor:
        return self.rows_G["", "all"]

    def members(self, view: View) -> dict[str, Tensor]:
        return {group: self.rows_G[view.attribute, group] for group in view.members}

    def _place(self, rows_X: Tensor) -> int:
        """Where the histograms have a group, which is known by its tensor: only whole groups were counted."""
        return self.first + next(place for place, one in enumerate(self.rows_G.values()) if one is rows_X)

    def note(self, metric: str, name: str, rows_X: Tensor) -> str:
        """Between which values a value lies that is the middle of bounds."""
        if metric not in self.bounds[name] or math.isnan(self.value_G[name][metric][self._place(rows_X)]):
            return ""
        _, lo, hi = (float(one_G[self._place(rows_X)]) for one_G in self.bounds[name][metric])
        return f"exact value from {lo:.6f} to {hi:.6f}"

    def measured(self, metric: str, name: str, rows_X: Tensor, cut: float) -> Callable[[float], Estimate]:
        place, y_X, patient_X = self._place(rows_X), self.y_N[rows_X] == 1, self.patient_N[rows_X]
        counts = len(y_X), int(y_X.sum()), int((~y_X).sum()), len(patient_X.unique())
        tp, fp, fn, tn = self.count_G4[name][place].tolist()
        of_kind = {"pos": tp + fn, "neg": fp + tn, "said": tp + fp, "unsaid": fn + tn, "pos or said": tp + fp + fn}

        def patients(kind: str) -> int:
            """Of rows said to be positive, or not, no more is known than how many there are."""
            mine = {"pos": y_X, "neg": ~y_X}.get(kind)
            return min(of_kind.get(kind, counts[0]), counts[3]) if mine is None else len(patient_X[mine].unique())

        def constant() -> bool:
            return int(self.histograms[name].count_G2C[place].sum(0).count_nonzero()) == 1

        least, value = self.settings.min_patients, float(self.value_G[name][metric][place])
        status = metrics.status_of(metric, of_kind.__getitem__, patients, constant, least) if counts[0] else "empty"
        undefined = status in ("empty", "single_class", "constant_score")

        def at(level: float) -> Estimate:
            lo = hi = math.nan
            method = "none"
            if counts[0] == counts[3] and not undefined and metric == "auroc":
                moments = self.histograms[name].auroc_moments(place)
                _, lo, hi, method = influence.interval(metric, value, moments, level)
                low, high = (float(one_G[place]) for one_G in self.bounds[name][metric][1:])
                lo, hi = max(0.0, lo + low - value), min(1.0, hi + high - value)
            elif counts[0] == counts[3] and not undefined and metric in CONDITION:
                n = of_kind.get(CONDITION[metric], counts[0])
                _, lo, hi, method = influence.interval(metric, value, Moments(1.0, math.inf, 0.0, n, 1, n), level)
            # With several images a patient this value would need to know whose scores are whose.
            blank = undefined or (metric == "ece_debiased" and counts[0] != counts[3])
            return Estimate(math.nan if blank else value, lo, hi, *counts, status, method)

        return at


def _sample(
    found: Streamed,
    manifest: Manifest,
    views: Sequence[View],
    label: str,
    readout: str,
    split: str,
    settings: Settings,
    of: dict[str, ScoreHistogram],
    cuts: dict[str, float],
) -> Binned:
    label_M = manifest.label_NL[:, manifest.labels.index(label)]
    scored_M = np.logical_or.reduce([seen_M for (_, one), seen_M in found.seen.items() if one == label])
    mine = np.flatnonzero((manifest.split_N == split) & ~np.isnan(label_M) & scored_M)
    place_M = np.full(len(manifest), -1)
    place_M[mine] = np.arange(len(mine))
    rows_G = {
        (view.attribute, group): torch.as_tensor(place_M[rows][place_M[rows] >= 0])
        for view in views
        for group, rows in view.members.items()
    }
    count_G4 = {name: histogram.confusion(cuts[name]) for name, histogram in of.items()}
    bounds = {name: {"auroc": one.auroc(), "auprc": one.auprc()} for name, one in of.items()}
    value_G = {
        name: {metric: influence.rate(metric, count_G4[name]) for metric in THRESHOLDED}
        | {metric: getattr(one, metric)() for metric in ("brier", "ece", "ece_debiased")}
        | {metric: bound.value_G for metric, bound in bounds[name].items()}
        for name, one in of.items()
    }
    y_N, patient_N = torch.as_tensor(label_M[mine]), torch.as_tensor(manifest.patient_N[mine])
    first = SPLITS.index(split) * len(rows_G)
    return Binned(
        *(label, readout, split, patient_N, place_M, settings, y_N, of, rows_G, first, count_G4, value_G, bounds)
    )


def _memberships(manifest: Manifest, views: Sequence[View]) -> tuple[np.ndarray, np.ndarray, int]:
    """Where the groups of each row start, these groups one row after the other, and how many there are."""
    groups = [rows for view in views for rows in view.members.values()]
    parts = [rows[manifest.split_N[rows] == split] for split in SPLITS for rows in groups]
    row_E, id_E = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(row_E, kind="stable")
    return np.searchsorted(row_E[order], np.arange(len(manifest) + 1)), id_E[order].astype(np.int16), len(parts)


def _open(path: Path) -> Any:
    # Takes a quarter of a second to import.
    import pyarrow.parquet

    if path.suffix.lower() not in (".parquet", ".pq"):
        raise DataError(f"{path}: --stream reads Parquet only; write the table as Parquet, or leave out --stream")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: the table of scores does not exist. Name it with --predictions") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}). Write it again") from error


def _parts(path: Path) -> Iterator[Table]:
    """The table, batch after batch; its problems are numbered as rows of the file."""
    file, start = _open(path), 0
    if not file.metadata.num_rows:
        raise DataError(f"{path}: the table of scores has columns but no rows")
    try:
        for batch in file.iter_batches(BATCH):
            stop = start + batch.num_rows
            legend = f"data rows counted from 1; rows after {stop:,} were not read"
            problems = Problems(path, "row", legend, np.arange(start + 1, stop + 1))
            yield scores.parse(without_index(pa.Table.from_batches([batch])), problems)
            start = stop
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}). Write it again") from error
