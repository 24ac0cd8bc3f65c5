"""Variance unexplained: the student's error against that of a guess that sees no image (Rulings 2).

Shape suffixes: M images of the held-out sample, B some of them, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from agglom.assemble import Run
from agglom.core import losses, metrics
from agglom.core.heads import resample
from agglom.core.types import Features
from agglom.reading import Row
from agglom.samples import row
from agglom.targets import Normaliser

CHUNK = 64


def patches(predicted: Features, raw: Features, mean_ND: Tensor, normaliser: Normaliser) -> tuple[Tensor, Tensor]:
    """Squared errors (M) of the prediction and of the train mean per position, both on the coarser of the two grids.

    `predicted` is in the space of the targets; `raw` and `mean_ND` are as the teacher gives them.
    """
    grid = min(raw.grid[0], predicted.grid[0]), min(raw.grid[1], predicted.grid[1])
    assert predicted.patches_BND is not None
    assert raw.patches_BND is not None

    def target(raw_BND: Tensor) -> Tensor:
        return resample(normaliser.of_patches(raw_BND), raw.grid, grid)

    mean_1ND = target(mean_ND[None])
    errors, baselines = [], []
    for raw_BND, guess_BND in zip(raw.patches_BND.split(CHUNK), predicted.patches_BND.split(CHUNK), strict=True):
        truth_BND = target(raw_BND)
        errors.append((resample(guess_BND, predicted.grid, grid) - truth_BND).square().mean((1, 2)))
        baselines.append((mean_1ND - truth_BND).square().mean((1, 2)))
    return torch.cat(errors), torch.cat(baselines)


def summaries(guess_MD: Tensor, raw_MD: Tensor, mean_D: Tensor, normaliser: Normaliser | None) -> tuple[Tensor, Tensor]:
    """Errors (M) of the prediction and of the mean: squared, of normalised targets; without a normaliser squared
    angles. `mean_D` is in the space of the targets: the train mean, or the mean direction."""
    if normaliser is None:
        return losses.angle(guess_MD, raw_MD).square(), losses.angle(mean_D.expand_as(raw_MD), raw_MD).square()
    truth_MD = normaliser.of_summary(raw_MD)
    return (guess_MD - truth_MD).square().mean(1), (mean_D - truth_MD).square().mean(1)


def ratios(
    run: Run,
    rows_M: np.ndarray,
    served_M: Tensor,
    error_M: Tensor,
    baseline_M: Tensor,
    metric: str,
    target: str,
    note: str,
) -> Iterator[Row]:
    """Σ error / Σ baseline of the student over everybody and in each group, by split; of the images in `served_M`."""
    patient_M = torch.as_tensor(run.manifest.patient_N[rows_M])
    for split in ("val", "test"):
        in_split = torch.as_tensor(np.isin(rows_M, run.manifest.rows(split)))
        if not in_split.any():
            continue
        for view in map(run.manifest.view, ("", *run.job.data.groups)):
            for group, members in view.members.items():
                mine = in_split & served_M & torch.as_tensor(np.isin(rows_M, members))
                estimate = metrics.fvu(error_M[mine], baseline_M[mine], patient_M[mine])
                yield row("student", metric, (view.attribute, group), split, estimate, target=target, note=note)
