"""What a report draws of the scores themselves: ROC and calibration of each group, and the weights of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agglom import samples
from agglom.core import calibration, metrics
from agglom.data.manifest import Manifest
from agglom.reading import unique
from agglom.samples import MAIN, Binary, Settings
from agglom.scores import Scores

POINTS = 60
# So many of the last log points of a stage make up the weight that its heat map shows.
LAST = 5
DIGITS = 5


def of_scores(found: Scores, manifest: Manifest, groups: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """ROC and calibration of every predictor on the headline split, over everybody and in each group of both classes.

    `roc` has at most 60 points of the empirical curve, (0, 0) and (1, 1) among them. `calibration` has, of each of ten
    equal bins that is not empty, the mean score, the share of positives with its interval at 95 %, and counts.
    """
    drawn = []
    for label in found.labels:
        for readout in unique(found.readouts):
            if readout not in MAIN:
                continue
            sample = samples.binary(found, manifest, label, readout, manifest.headline, settings)
            for view in (manifest.view(name) for name in ("", *groups)):
                for group, rows_X in sample.members(view).items():
                    if len(sample.y_N[rows_X].unique()) < 2:
                        continue
                    drawn += [
                        {"label": label, "readout": readout, "predictor": name, "attribute": view.attribute}
                        | {"group": group, "roc": _roc(sample, name, rows_X)}
                        | {"calibration": _calibration(sample, name, rows_X)}
                        for name in sample.predictors
                    ]
    return drawn


def _roc(sample: Binary, name: str, rows_X: torch.Tensor) -> dict[str, list[float]]:
    y_X, p_X = sample.y_N[rows_X].numpy(), sample.score_PN[name][rows_X].numpy()
    order = np.argsort(-p_X, kind="stable")
    last = np.append(np.flatnonzero(np.diff(p_X[order])), len(order) - 1)
    tpr, fpr = (np.append(0, np.cumsum(side[order])[last] / side.sum()) for side in (y_X, 1 - y_X))
    # Equal steps along the curve, so that a steep part keeps its points.
    kept = np.unique(np.searchsorted(tpr + fpr, np.linspace(0, 2, POINTS - 1)).clip(max=len(tpr) - 1))
    kept = np.union1d(kept, [0, len(tpr) - 1])
    return {"fpr": fpr[kept].round(DIGITS).tolist(), "tpr": tpr[kept].round(DIGITS).tolist()}


def _calibration(sample: Binary, name: str, rows_X: torch.Tensor) -> list[dict[str, float]]:
    y_X, p_X, patient_X = sample.y_N[rows_X], sample.score_PN[name][rows_X], sample.patient_N[rows_X]
    bin_X, found = calibration.bin_of(p_X), []
    for one in bin_X.unique().tolist():
        mine = bin_X == one
        # The share that a score of 0 or 1 selects is the share of positives.
        rate = metrics.evaluate("selection_rate", y_X[mine], y_X[mine], patient_X[mine], threshold=0.5)
        numbers = {"score": float(p_X[mine].mean()), "rate": rate.value, "lo": rate.lo, "hi": rate.hi}
        counts = {"n": rate.n, "n_patients": rate.n_patients}
        found.append({key: round(value, DIGITS) for key, value in numbers.items()} | counts)
    return found


def of_weights(journal: Path, attribute: str | None, stages: Sequence[str]) -> dict[str, Any] | None:
    """From metrics.jsonl what a sample of each cell (group, teacher) weighed, 1 what it weighs without a balancer.

    `stages`: the mean over the last log points of each; `path`: of each log point, the mean over the teachers by group.
    None where there are no groups, or no log point of these stages yet.
    """
    if attribute is None or not journal.is_file():
        return None
    points = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    cells = [
        (one["step"], one["stage"], {tuple(k.split("/", 2)[1:]): v for k, v in one.items() if k.startswith("weight/")})
        for one in points
        if one["stage"] in stages
    ]
    cells = [(step, stage, weight) for step, stage, weight in cells if weight]
    if not cells:
        return None
    teachers, groups = (unique(key[part] for *_, weight in cells for key in weight) for part in (0, 1))

    def table(several: Sequence[dict[tuple[str, ...], float]]) -> list[list[float | None]]:
        """Groups × teachers; None for a teacher that takes no part."""
        return [
            [
                _mean([weight[teacher, group] for weight in several if (teacher, group) in weight])
                for teacher in teachers
            ]
            for group in groups
        ]

    of_stage = {stage: [weight for _, at, weight in cells if at == stage][-LAST:] for stage in stages}
    return {
        "attribute": attribute,
        "groups": groups,
        "teachers": teachers,
        "stages": [{"stage": stage, "weight": table(several)} for stage, several in of_stage.items() if several],
        "path": {
            "step": [step for step, *_ in cells],
            "weight": [
                [_mean([value for (_, one), value in weight.items() if one == group]) for group in groups]
                for *_, weight in cells
            ],
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known: a balancer may not know a weight before it has a loss."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), DIGITS) if known else None
