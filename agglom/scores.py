"""Tables of scores: what some predictors say of the images of a manifest. Imports no torch, no pandas.

A long table has a row for each `image, predictor, label, score` and may have a column `readout`; without `label` there
is one label only. A wide table has a row for each `image` and a column for each predictor, named `predictor` where
there is one label only, else `predictor:label`. Both are CSV or Parquet. Scores are probabilities. Images are named as
the manifest names them, or by their file name where no other image has it.

Shape suffixes: R rows of the file, N scored rows of the manifest, P predictors, L labels, C cells, I images.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from agglom.data import tables
from agglom.data.manifest import Manifest
from agglom.data.tables import Problems, did_you_mean, encode, first_line
from agglom.errors import DataError

READOUT = "scores"
KEYS = ("image", "predictor", "label", "readout")


@dataclass(frozen=True, eq=False)
class Scores:
    """Predictors' scores of manifest rows that are of val or test.

    `predictors` and `readouts` run along P: a predictor may have several readouts. `rows_N` are manifest rows (int64,
    ascending). `score_PNL` is float64 in [0, 1], NaN where the label is not known and for all rows of a label that a
    readout does not have, and only there. `notes` are sentences on what a table holds beyond that.
    """

    predictors: tuple[str, ...]
    readouts: tuple[str, ...]
    labels: tuple[str, ...]
    rows_N: np.ndarray
    score_PNL: np.ndarray
    notes: tuple[str, ...] = ()

    def of(self, readout: str, label: str) -> dict[str, np.ndarray]:
        """By predictor, its scores over N; none where the readout does not have the label."""
        score_PN = self.score_PNL[:, :, self.labels.index(label)]
        series = zip(self.predictors, self.readouts, score_PN, ~np.isnan(score_PN).all(1), strict=True)
        return {name: score_N for name, one, score_N, scored in series if one == readout and scored}


@dataclass(frozen=True, eq=False)
class Table:
    """A table of scores before it meets its manifest.

    Codes (int64) index `images`, `series` and `labels`; a series is a predictor with its readout, a label "" one that
    the file does not name. `row_C` is the row of the file. `problems` wait for those that the manifest brings to light.
    """

    problems: Problems
    images: tuple[str, ...]
    series: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]
    row_C: np.ndarray
    image_C: np.ndarray
    series_C: np.ndarray
    label_C: np.ndarray
    score_C: np.ndarray

    def mark(self, kind: str, mask_C: np.ndarray, remedy: str, more: Callable[[int], str] = lambda cell: "") -> None:
        """Add a problem of cells, each told by its row and what it is a score of."""

        def said(cell: int) -> str:
            who = _who(self.series[self.series_C[cell]], self.labels[self.label_C[cell]])
            return f"{self.problems.at(self.row_C[cell])}: '{self.images[self.image_C[cell]]}', {who}{more(cell)}"

        self.problems.items(kind, "score", np.flatnonzero(mask_C), said, remedy)


def load(path: Path, manifest: Manifest, labels: Sequence[str]) -> Scores:
    """Read the table of scores at `path` and match it with the rows and the `labels` of `manifest`.

    Raises:
        DataError: with every problem of the file, each with its count and the first five rows.
    """
    return match(read(path), manifest, labels)


def write(path: Path, scores: Scores, manifest: Manifest) -> None:
    """Write a long Parquet table, with a column `split`, that `load` reads back; beside its place, then renamed.

    Raises DataError where it cannot be written.
    """
    import pyarrow.parquet

    series_C, row_C, label_C = np.nonzero(~np.isnan(scores.score_PNL))

    def column(values: Sequence[str], code_C: np.ndarray) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(code_C, pa.int32()), pa.array(values, pa.string()))

    test_C = manifest.split_N[scores.rows_N[row_C]] == "test"
    table = pa.table(
        {
            "image": column([manifest.cells[row] for row in scores.rows_N], row_C),
            "predictor": column(scores.predictors, series_C),
            "label": column(scores.labels, label_C),
            "readout": column(scores.readouts, series_C),
            "score": scores.score_PNL[series_C, row_C, label_C],
            "split": column(("val", "test"), test_C.astype(int)),
        }
    )
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, beside)
        beside.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another --out, "
            "then run `agglom evaluate`"
        ) from error


def read(path: Path) -> Table:
    """Read a table of scores; what is wrong with its cells is told by `match`.

    Raises DataError where it cannot be read or lacks a column.
    """
    _, table, problems = tables.read(path, "the table of scores", "Name it with --predictions")
    return parse(table, problems)


def parse(table: pa.Table, problems: Problems) -> Table:
    """The cells of a table of scores, or of a part of it. Raises DataError where it lacks a column."""
    names = table.column_names
    long = "predictor" in names or {"label", "score"} <= set(names)
    problems.found += [f"column '{name}' appears {n} times. Keep one" for name, n in Counter(names).items() if n > 1]
    for name in ("image", "predictor", "score") if long else ("image",):
        if name not in names:
            kind = "a long table holds image, predictor, label and score" if long else "every table needs it"
            problems.add(
                f"missing column '{name}' ({kind}){did_you_mean(name, names)} The file has: {', '.join(names)}"
            )
    if names == ["image"]:
        problems.add("no predictor: image is the only column. Add a column of scores for each predictor")
    problems.throw()
    return _long(table, problems) if long else _wide(table, problems)


def match(table: Table, manifest: Manifest, labels: Sequence[str]) -> Scores:
    """The scores of `table` on the rows of `manifest` that are of val or test and whose label is known.

    All rows of test (of val, where there is no test) need a score of each predictor; those of val all or none. Raises
    DataError as `load`.
    """
    problems, (label_C, row_C) = table.problems, placed(table, manifest, labels)
    key_C = (row_C * len(labels) + label_C) * len(table.series) + table.series_C
    _, first_U, of_C = np.unique(key_C, return_index=True, return_inverse=True)
    table.mark(
        "duplicate rows",
        first_U[of_C] != np.arange(len(key_C)),
        "An image may have one score of a predictor and label",
        lambda cell: f", is also in {problems.at(table.row_C[first_U[of_C[cell]]])}",
    )
    used, column_C = np.unique(label_C, return_inverse=True)
    names = [labels[label] for label in used]
    score_PNL = np.full((len(table.series), len(manifest), len(used)), np.nan)
    score_PNL[table.series_C, row_C, column_C] = table.score_C
    truth_NL = manifest.label_NL[:, [manifest.labels.index(name) for name in names]]
    notes = notes_on(manifest, labels, names, truth_NL, ~np.isnan(score_PNL).all((0, 2)))
    score_PNL[:, np.isnan(truth_NL)] = np.nan
    check_complete(table, manifest, names, truth_NL, ~np.isnan(score_PNL))
    problems.throw()
    rows_N = np.flatnonzero(np.isin(manifest.split_N, ("val", "test")) & ~np.isnan(score_PNL).all((0, 2)))
    predictors, readouts = zip(*table.series, strict=True)
    return Scores(predictors, readouts, tuple(names), rows_N, score_PNL[:, rows_N], tuple(notes))


def placed(table: Table, manifest: Manifest, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """For each cell the place of its label among `labels`, and its row of the manifest. Raises DataError."""
    label_C, first_I = _label_of(table, labels)[table.label_C], np.unique(table.image_C, return_index=True)[1]
    problems = table.problems
    row_I = rows_of(table.images, manifest, problems, lambda index: problems.at(table.row_C[first_I[index]]))
    problems.throw()
    return label_C, row_I[table.image_C]


# ── From the file to cells ──


def _long(table: pa.Table, problems: Problems) -> Table:
    rows = table.num_rows
    cells = {name: _text(table, name, problems) for name in KEYS if name in table.column_names}
    score_R, empty_R = _numbers(table, "score", problems)
    problems.throw()
    problems.rows("empty score cells", empty_R, lambda row: f"'{cells['image'][row]}'", "Give every row its score")
    for name, column in cells.items():
        nothing_R = np.array([not cell for cell in column])
        problems.rows(f"empty {name} cells", nothing_R, lambda row: "''", f"Give every row its {name}")
    cells = {"label": [""] * rows, "readout": [READOUT] * rows} | cells
    (image_C, images), (label_C, labels) = (encode(cells[name], rows) for name in ("image", "label"))
    pair_C, pairs = encode(zip(cells["predictor"], cells["readout"], strict=True), rows)
    found = Table(
        problems, tuple(images), tuple(pairs), tuple(labels), np.arange(rows), image_C, pair_C, label_C, score_R
    )
    _check_scores(found, ~empty_R)
    return found


def _wide(table: pa.Table, problems: Problems) -> Table:
    """An empty cell is no score: `match` tells where one is due."""
    columns = [name for name in table.column_names if name != "image"]
    parts = [name.partition(":") for name in columns]
    for name, (predictor, colon, label) in zip(columns, parts, strict=True):
        if not predictor or (colon and not label):
            problems.add(f"column '{name}' is not named predictor or predictor:label. Rename it")
    cells, found = _text(table, "image", problems), [_numbers(table, name, problems) for name in columns]
    problems.throw()
    problems.rows("empty image cells", np.array([not cell for cell in cells]), lambda row: "''", "Name the image")
    image_R, images = encode(cells, len(cells))
    label_S, labels = encode((label for *_, label in parts), len(parts))
    series_S, predictors = encode((predictor for predictor, *_ in parts), len(parts))
    row_C, column_C = np.nonzero(~np.stack([empty_R for _, empty_R in found], 1))
    wide = Table(
        problems,
        tuple(images),
        tuple((predictor, READOUT) for predictor in predictors),
        tuple(labels),
        row_C,
        image_R[row_C],
        series_S[column_C],
        label_S[column_C],
        np.stack([score_R for score_R, _ in found], 1)[row_C, column_C],
    )
    _check_scores(wide, np.ones(len(row_C), bool))
    return wide


def _text(table: pa.Table, name: str, problems: Problems) -> list[str]:
    try:
        return tables.text(table.column(name))
    except pa.ArrowException as error:
        problems.add(f"column '{name}' cannot be read as text ({first_line(error)})")
        return []


def _numbers(table: pa.Table, name: str, problems: Problems) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a column, and the mask of its empty cells."""
    column = table.column(name)
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        return column.to_numpy().astype(np.float64), column.is_null().to_numpy()
    cells = _text(table, name, problems)
    score_R, wrong_R = np.full(len(cells), np.nan), np.zeros(len(cells), bool)
    for row, cell in enumerate(cells):
        try:
            score_R[row] = float(cell or "nan")
        except ValueError:
            wrong_R[row] = True
    hint = did_you_mean(name, KEYS) if name != "score" else "."
    what = "" if name == "score" else f" in column '{name}'"
    remedy = f"A wide table holds image and scores of predictors only{hint}" if what else "Write a number"
    problems.rows(f"scores that are no numbers{what}", wrong_R, lambda row: f"'{cells[row]}'", remedy)
    return score_R, np.array([not cell for cell in cells])


def _check_scores(table: Table, filled_C: np.ndarray) -> None:
    nan_C = np.isnan(table.score_C)
    table.mark(
        "scores that are NaN", nan_C & filled_C, "Give every image a score, or leave it out of manifest and table"
    )
    table.mark(
        "scores outside [0, 1]",
        ~nan_C & ~((table.score_C >= 0) & (table.score_C <= 1)),
        "Give probabilities: a sigmoid is not applied for you",
        lambda cell: f": {table.score_C[cell]:g}",
    )


# ── From cells to rows of the manifest ──


def _who(series: tuple[str, str], label: str) -> str:
    predictor, readout = series
    read = f" ({readout})" if readout != READOUT else ""
    return f"predictor '{predictor}'{read}" + (f", label '{label}'" if label else "")


def _label_of(table: Table, labels: Sequence[str]) -> np.ndarray:
    """For each label of the table its place among `labels`, −1 where it has none."""
    known = ", ".join(labels) or "none"
    found = np.full(len(table.labels), -1)
    for index, label in enumerate(table.labels):
        if label in labels:
            found[index] = labels.index(label)
        elif not label and len(labels) == 1:
            found[index] = 0
        elif label:
            hint, count = did_you_mean(label, labels), int((table.label_C == index).sum())
            table.problems.add(f"unknown label '{label}': {count} scores{hint} Labels of the manifest: {known}")
        else:
            table.problems.add(
                "the label is not named, and the manifest has not just one. Add a column label to a long table, name "
                f"the columns of a wide one predictor:label. Labels of the manifest: {known}"
            )
    return found


def rows_of(images: Sequence[str], manifest: Manifest, problems: Problems, at: Callable[[int], str]) -> np.ndarray:
    """For each image its row of the manifest, −1 where it has none, which is a problem told with `at` of its index."""
    row_of = _rows_by_image(manifest)
    found = np.fromiter((row_of.get(image, -1) for image in images), np.int64, len(images))
    shared = np.zeros(len(images), bool)
    for index in np.flatnonzero(found < 0).tolist():
        rows = _rows_by_name(manifest).get(os.path.basename(images[index]), [])
        shared[index] = len(rows) > 1
        found[index] = rows[0] if len(rows) == 1 else -1
    unknown = np.flatnonzero((found < 0) & ~shared & (np.array(images) != ""))
    for kind, marked, remedy in (
        ("images that are not in the manifest", unknown, f"Name them as {manifest.path} does, or by file name"),
        ("file names that several images have", np.flatnonzero(shared), f"Name them as {manifest.path} does"),
    ):
        problems.items(kind, "image", marked, lambda index: f"{at(index)}: '{images[index]}'", remedy)
    return found


def notes_on(
    manifest: Manifest, labels: Sequence[str], names: Sequence[str], truth_NL: np.ndarray, scored_N: np.ndarray
) -> list[str]:
    """What is not evaluated, in sentences: `labels` that are not among the scored `names`, and scored images."""
    notes = [f"Not scored, hence not evaluated: {', '.join(one for one in labels if one not in names)}."]
    notes = [] if len(names) == len(labels) else notes
    for count, what in (
        (int((scored_N & (manifest.split_N == "train")).sum()), "are of train"),
        (int((scored_N & np.isnan(truth_NL).all(1)).sum()), "have no known label"),
    ):
        notes += [f"Scored images that {what}, hence are not evaluated: {count:,}."] if count else []
    return notes


# Made once for all parts of a table, and file names only if a table uses them.
@lru_cache(maxsize=1)
def _rows_by_image(manifest: Manifest) -> dict[str, int]:
    return {cell: row for row, cell in enumerate(manifest.cells)}


@lru_cache(maxsize=1)
def _rows_by_name(manifest: Manifest) -> dict[str, list[int]]:
    rows_named: dict[str, list[int]] = {}
    for row, cell in enumerate(manifest.cells):
        rows_named.setdefault(os.path.basename(cell), []).append(row)
    return rows_named


def check_complete(
    table: Table, manifest: Manifest, names: Sequence[str], truth_NL: np.ndarray, has_PNL: np.ndarray
) -> None:
    """Every predictor on the same rows, and all rows of the splits that are evaluated."""
    problems = table.problems
    headline_N = manifest.split_N == manifest.headline
    val_N = manifest.split_N == "val"
    has_NL, scored_PL = (np.logical_or.reduce(has_PNL, axis) for axis in (0, 1))
    due_NL = (headline_N | (val_N & has_NL[val_N].any()))[:, None] & ~np.isnan(truth_NL)
    if not due_NL.any():
        problems.add(f"nothing to evaluate: {manifest.path} has no row of test or of val with a known label")
        return
    rows_X, columns_X = np.nonzero(due_NL & ~has_NL)
    problems.items(
        "images of the manifest without a score",
        "score",
        np.arange(len(rows_X)),
        lambda x: f"'{manifest.cells[rows_X[x]]}' ({manifest.split_N[rows_X[x]]}), label '{names[columns_X[x]]}'",
        "Score every image of test, and every one of val or none; or drop them from the manifest",
    )
    readout_P = np.array([readout for _, readout in table.series])
    asked_PL = np.stack([scored_PL[readout_P == readout].any(0) for readout in readout_P])
    problems.found += [
        f"{_who(table.series[p], names[column])}: no score at all. Score all predictors for all labels"
        for p, column in np.argwhere(asked_PL & ~scored_PL)
    ]
    lacking_X3 = np.argwhere(due_NL & has_NL & ~has_PNL & scored_PL[:, None])
    problems.items(
        "predictors on different images",
        "score",
        np.arange(len(lacking_X3)),
        lambda x: (
            f"'{manifest.cells[lacking_X3[x][1]]}' has none of "
            f"{_who(table.series[lacking_X3[x][0]], names[lacking_X3[x][2]])}"
        ),
        "Score all predictors on the same images, or their differences mean nothing",
    )
    classes = [np.unique(truth_N[headline_N & has_N]) for truth_N, has_N in zip(truth_NL.T, has_NL.T, strict=True)]
    if all(np.isfinite(found).sum() < 2 for found in classes):
        seen = "; ".join(
            f"'{name}': {found[np.isfinite(found)].tolist()}" for name, found in zip(names, classes, strict=True)
        )
        problems.add(f"no label has both a 0 and a 1 among the images that are evaluated ({seen}). Nothing can be said")
