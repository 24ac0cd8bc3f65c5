"""What is measured at once: the rows of one split whose label is known, with the scores of all predictors.

A label is of two classes (`Binary`), of several (`Classes`) or a structure to be segmented (`Masks`); `audit` asks all
three the same questions. Shape suffixes: N rows of the sample, M rows of the manifest, X rows of one group, P
predictors, C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from agglom import overlaps, report, scores
from agglom.core import metrics, multiclass
from agglom.core.metrics import METRICS, THRESHOLDED, Estimate
from agglom.data.manifest import Manifest, View
from agglom.job import Data, Evaluate
from agglom.overlaps import Overlaps
from agglom.reading import Row
from agglom.scores import Scores

# Of the other readouts of a label only AUROC is reported: they are a second look, not a second report.
MAIN = ("linear", "zeroshot", scores.READOUT)
TESTED = frozenset({"auroc", *THRESHOLDED, *overlaps.METRICS})


@dataclass(frozen=True)
class Settings:
    """What the measurement depends on besides the data; see `job.Data` and `job.Evaluate`."""

    min_patients: int
    replicates: int
    permutations: int
    seed: int

    @staticmethod
    def of(data: Data, evaluate: Evaluate, seed: int) -> Settings:
        return Settings(data.min_support, evaluate.bootstrap, evaluate.permutations, seed)


@dataclass(frozen=True)
class Sample(ABC):
    """`place_M` maps manifest rows to rows of the sample, −1 where they are not of it."""

    label: str
    readout: str
    split: str
    patient_N: Tensor
    place_M: np.ndarray
    settings: Settings

    # The first of them is all that is reported of a second look.
    measures: ClassVar[tuple[str, ...]] = METRICS
    # Where there is no threshold, there are no rates, no criteria of fairness, and no null of their gaps either.
    thresholded: ClassVar[bool] = False
    counted: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.patient_N)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of it."""
        return self.measures if self.readout in MAIN else self.measures[:1]

    @property
    @abstractmethod
    def predictors(self) -> list[str]:
        """Whose scores it holds."""

    @abstractmethod
    def measured(self, metric: str, name: str, rows_X: Tensor, cut: float) -> Callable[[float], Estimate]:
        """The metric of one predictor in one group, as a function of the level of its interval."""

    @property
    def everybody(self) -> Tensor:
        return torch.arange(len(self))

    def members(self, view: View) -> dict[str, Tensor]:
        return {group: self.at(rows) for group, rows in view.members.items()}

    def at(self, rows: np.ndarray) -> Tensor:
        """The rows of the sample among manifest rows."""
        place = self.place_M[rows]
        return torch.as_tensor(place[place >= 0])

    def rule(self, metric: str, cut: float) -> dict[str, Any]:
        return {"threshold": cut, "rule": "global"} if self.thresholded and metric in THRESHOLDED else {}

    def row(self, name: str, metric: str, place: tuple[str, str], estimate: Estimate, **more: Any) -> Row:
        more |= {} if self.counted else {"n_pos": None, "n_neg": None}
        return row(name, metric, place, self.split, estimate, label=self.label, readout=self.readout, **more)


@dataclass(frozen=True)
class Paired(Sample):
    """A sample that knows which scores are of one image, so that predictors can be compared."""

    @abstractmethod
    def difference(
        self, metric: str, names: Sequence[str], rows_X: Tensor, cuts: Sequence[float], level: float
    ) -> tuple[Estimate, Callable[[], float]]:
        """The metric of the first predictor minus that of the second in one group, and what finds its p-value."""


@dataclass(frozen=True)
class Binary(Paired):
    """Labels 0 and 1."""

    y_N: Tensor
    score_PN: dict[str, Tensor]

    thresholded: ClassVar[bool] = True

    @property
    def predictors(self) -> list[str]:
        return list(self.score_PN)

    @property
    def _common(self) -> dict[str, Any]:
        s = self.settings
        return {"min_patients": s.min_patients, "replicates": s.replicates, "seed": s.seed}

    def measured(self, metric: str, name: str, rows_X: Tensor, cut: float) -> Callable[[float], Estimate]:
        columns = (x_N.index_select(0, rows_X) for x_N in (self.y_N, self.score_PN[name], self.patient_N))
        return metrics.at_level(metric, *columns, threshold=cut if metric in THRESHOLDED else math.nan, **self._common)

    def difference(
        self, metric: str, names: Sequence[str], rows_X: Tensor, cuts: Sequence[float], level: float
    ) -> tuple[Estimate, Callable[[], float]]:
        cut_a, cut_b = cuts if metric in THRESHOLDED else (math.nan, math.nan)
        a_X, b_X = (self.score_PN[name][rows_X] for name in names)
        columns = metric, self.y_N[rows_X], a_X, b_X, self.patient_N[rows_X]
        estimate = metrics.paired(*columns, threshold_a=cut_a, threshold_b=cut_b, level=level, **self._common)
        return estimate, lambda: metrics.paired_p(*columns, threshold_a=cut_a, threshold_b=cut_b)


@dataclass(frozen=True)
class Classes(Paired):
    """Classes 0 … C − 1: averages over them, see `core.multiclass`."""

    class_N: Tensor
    score_PNC: dict[str, Tensor]

    measures: ClassVar[tuple[str, ...]] = multiclass.METRICS
    counted: ClassVar[bool] = False

    @property
    def predictors(self) -> list[str]:
        return list(self.score_PNC)

    def measured(self, metric: str, name: str, rows_X: Tensor, cut: float) -> Callable[[float], Estimate]:
        columns = self.class_N[rows_X], self.score_PNC[name][rows_X], self.patient_N[rows_X]
        return multiclass.at_level(metric, *columns, min_patients=self.settings.min_patients)

    def difference(
        self, metric: str, names: Sequence[str], rows_X: Tensor, cuts: Sequence[float], level: float
    ) -> tuple[Estimate, Callable[[], float]]:
        a_XC, b_XC = (self.score_PNC[name][rows_X] for name in names)
        columns = self.class_N[rows_X], a_XC, b_XC, self.patient_N[rows_X]
        at = multiclass.difference(metric, *columns, min_patients=self.settings.min_patients)
        return at(level), lambda: metrics.p_value(at)


@dataclass(frozen=True)
class Masks(Paired):
    """One overlap of predicted and true mask an image, by metric and predictor; NaN where both masks are empty."""

    value_PN: dict[str, dict[str, Tensor]]

    measures: ClassVar[tuple[str, ...]] = overlaps.METRICS
    counted: ClassVar[bool] = False

    @property
    def predictors(self) -> list[str]:
        return list(next(iter(self.value_PN.values())))

    def measured(self, metric: str, name: str, rows_X: Tensor, cut: float) -> Callable[[float], Estimate]:
        value_X, patient_X = self.value_PN[metric][name][rows_X], self.patient_N[rows_X]
        return metrics.mean_at_level(value_X, patient_X, min_patients=self.settings.min_patients)

    def difference(
        self, metric: str, names: Sequence[str], rows_X: Tensor, cuts: Sequence[float], level: float
    ) -> tuple[Estimate, Callable[[], float]]:
        a_X, b_X = (self.value_PN[metric][name][rows_X] for name in names)
        at = metrics.mean_difference(a_X, b_X, self.patient_N[rows_X], min_patients=self.settings.min_patients)
        return at(level), lambda: metrics.p_value(at)


def binary(found: Scores, manifest: Manifest, label: str, readout: str, split: str, settings: Settings) -> Binary:
    label_N = manifest.label_NL[found.rows_N, manifest.labels.index(label)]
    mine_N = (manifest.split_N[found.rows_N] == split) & ~np.isnan(label_N)
    score_PN = {name: torch.as_tensor(score_N[mine_N]) for name, score_N in found.of(readout, label).items()}
    rows = found.rows_N[mine_N]
    y_N = torch.as_tensor(label_N[mine_N].astype(np.float64))
    return Binary(label, readout, split, *_where(manifest, rows), settings, y_N, score_PN)


def classes(found: Scores, manifest: Manifest, column: str, readout: str, split: str, settings: Settings) -> Classes:
    """Of the labels `column=class`, all of which must be scored."""
    names = [f"{column}={value}" for value in manifest.classes[column]]
    label_NC = manifest.label_NL[found.rows_N][:, [manifest.labels.index(name) for name in names]]
    mine_N = (manifest.split_N[found.rows_N] == split) & ~np.isnan(label_NC).any(1)
    by_class = [found.of(readout, name) for name in names]
    score_PNC = {
        name: torch.as_tensor(np.stack([of_class[name][mine_N] for of_class in by_class], 1))
        for name in by_class[0]
        if all(name in of_class for of_class in by_class)
    }
    class_N = torch.as_tensor(label_NC[mine_N].argmax(1))
    return Classes(column, readout, split, *_where(manifest, found.rows_N[mine_N]), settings, class_N, score_PNC)


def masks(found: Overlaps, manifest: Manifest, label: str, split: str, settings: Settings) -> Masks:
    mine_N = manifest.split_N[found.rows_N] == split
    value_PN = {
        metric: {name: torch.as_tensor(value_N[mine_N]) for name, value_N in by_predictor.items()}
        for metric, by_predictor in found.values[label].items()
    }
    return Masks(label, scores.READOUT, split, *_where(manifest, found.rows_N[mine_N]), settings, value_PN)


def _where(manifest: Manifest, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The patients of manifest rows, and the place of each manifest row among them."""
    place_M = np.full(len(manifest), -1)
    place_M[rows] = np.arange(len(rows))
    return torch.as_tensor(manifest.patient_N[rows]), place_M


def row(predictor: str, metric: str, place: tuple[str, str], split: str, estimate: Estimate, **more: Any) -> Row:
    """A row of a report at `place` (attribute, group)."""
    plain = dict.fromkeys(report.COLUMNS) | {"label": "", "readout": "none", "target": "", "note": "", "rule": ""}
    del plain["stage"]
    e = estimate
    return plain | {
        "predictor": predictor,
        "metric": metric,
        "attribute": place[0],
        "group": place[1],
        "value": e.value,
        "lo": e.lo,
        "hi": e.hi,
        "n": e.n,
        "n_pos": e.n_pos,
        "n_neg": e.n_neg,
        "status": e.status,
        "split": split,
        "n_patients": e.n_patients,
        "ci_method": e.method,
        **more,
    }
