"""Masks given as arrays: how far those of some predictors overlap the true ones, image by image.

A file of NumPy (`np.savez`) holds `image` (N names, as in a table of scores), `truth` (N, H, W) and for each predictor
an array of the same shape, under its name; masks are bool or 0 and 1. For several structures the arrays are named
`truth:lung`, `unet:lung`. One array is in memory at a time, beside the truth.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agglom.data.manifest import Manifest
from agglom.data.tables import Problems, did_you_mean
from agglom.errors import DataError
from agglom.scores import rows_of

SUFFIX = ".npz"
LABEL = "mask"  # of a file that names no structure
METRICS = ("dice", "iou")


@dataclass(frozen=True, eq=False)
class Overlaps:
    """`values[label][metric][predictor]` are float64 over `rows_N`, manifest rows (int64, ascending) of val and test;
    NaN where the true and the predicted mask are both empty. `notes` say how many there are."""

    rows_N: np.ndarray
    values: dict[str, dict[str, dict[str, np.ndarray]]]
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.values)


def load(path: Path, manifest: Manifest) -> Overlaps:
    """Read the masks at `path` and match them with the rows of `manifest`.

    Every image of test (of val, where there is no test) needs its masks; those of val all or none. Raises DataError
    with every problem of the file: its arrays, their names, shapes and values, and images that do not match.
    """
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with arrays:
            return _match(path, arrays, manifest)
    except FileNotFoundError:
        raise DataError(f"{path}: the masks do not exist. Name them with --predictions") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a readable file of masks ({error}). Write it with np.savez(path, image=…, truth=…, unet=…), "
            "names as text and masks as bool"
        ) from error


def _match(path: Path, arrays: Mapping[str, np.ndarray], manifest: Manifest) -> Overlaps:
    names = list(arrays)
    problems = Problems(path, "entry", "entries of image, counted from 1", np.arange(1, 1))
    series = _series(names, problems)
    problems.throw()
    images = [str(name) for name in arrays["image"]]
    problems.number_N = np.arange(1, len(images) + 1)
    row_I = rows_of(images, manifest, problems, problems.at)
    _, first_U, of_I = np.unique(row_I, return_index=True, return_inverse=True)
    again_I = (first_U[of_I] != np.arange(len(images))) & (row_I >= 0)
    problems.rows(
        "duplicate images", again_I, lambda index: f"'{images[index]}'", "An image has one mask of a predictor"
    )
    _check_complete(row_I, manifest, problems)
    problems.throw()
    order = np.argsort(row_I)
    order = order[np.isin(manifest.split_N[row_I[order]], ("val", "test"))]
    values: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    notes = []
    for label, keys in series.items():
        truth = _masks(arrays, keys.pop("truth"), None, len(images), problems)
        problems.throw()
        found = {name: _overlap(truth, _masks(arrays, key, truth, len(images), problems)) for name, key in keys.items()}
        problems.throw()
        values[label] = {metric: {name: by[metric][order] for name, by in found.items()} for metric in METRICS}
        empty = int((~truth[order].any((1, 2))).sum())
        if empty:
            notes.append(
                f"{label}: images whose true mask is empty: {empty:,}. There an empty prediction is left out of the "
                "mean, any other counts 0."
            )
    train = int((manifest.split_N[row_I] == "train").sum())
    notes += [f"Images with masks that are of train, hence are not evaluated: {train:,}."] if train else []
    return Overlaps(row_I[order].astype(np.int64), values, tuple(notes))


def _series(names: list[str], problems: Problems) -> dict[str, dict[str, str]]:
    """By label and predictor (one of them `truth`) the name of the array."""
    if "image" not in names:
        problems.add(f"no array 'image' with the names of the images. The file has: {', '.join(names) or 'nothing'}")
    found: dict[str, dict[str, str]] = {}
    for key in names:
        predictor, _, label = key.partition(":")
        if key != "image":
            found.setdefault(label or LABEL, {})[predictor] = key
    predictors = {name for by_predictor in found.values() for name in by_predictor} - {"truth"}
    for label, by_predictor in found.items():
        if "truth" not in by_predictor:
            key = "truth" if label == LABEL else f"truth:{label}"
            problems.add(f"no array '{key}'{did_you_mean(key, names)} The file has: {', '.join(names)}")
        if lacking := sorted(predictors - by_predictor.keys()):
            problems.add(f"no masks of {', '.join(lacking)} for '{label}'. Give all predictors the same structures")
    if not predictors:
        problems.add("no predictor: add an array of masks for each, under its name")
    return found


def _masks(arrays: Mapping[str, Any], key: str, like: np.ndarray | None, images: int, problems: Problems) -> np.ndarray:
    """The array as bool; what cannot be one is a problem, and stands in for an empty one."""
    masks = arrays[key]
    if masks.ndim != 3 or len(masks) != images or (like is not None and masks.shape != like.shape):
        expected = f"({images}, H, W)" if like is None else f"that of the truth, {like.shape}"
        problems.add(f"array '{key}' has shape {masks.shape}; expected {expected}: a mask for each image")
    elif masks.dtype != bool and not np.isin(np.unique(masks), (0, 1)).all():
        wrong = int((~np.isin(masks, (0, 1))).any((1, 2)).sum())
        problems.add(f"array '{key}' holds values other than 0 and 1 in {wrong} masks. Threshold it first")
    else:
        return masks.astype(bool, copy=False)
    return np.zeros((images, 1, 1) if like is None else like.shape, bool)


def _overlap(truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    from agglom.core import masks

    pair = torch.as_tensor(predicted), torch.as_tensor(truth)
    return {"dice": masks.dice(*pair).numpy(), "iou": masks.iou(*pair).numpy()}


def _check_complete(row_I: np.ndarray, manifest: Manifest, problems: Problems) -> None:
    has_M = np.isin(np.arange(len(manifest)), row_I)
    val_M = manifest.split_N == "val"
    due_M = (manifest.split_N == manifest.headline) | (val_M & (has_M & val_M).any())
    problems.items(
        "images of the manifest without masks",
        "image",
        np.flatnonzero(due_M & ~has_M),
        lambda row: f"'{manifest.cells[row]}' ({manifest.split_N[row]})",
        "Give every image of test its masks, and every one of val or none; or drop them from the manifest",
    )
