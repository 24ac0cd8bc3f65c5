"""The table of images: one row an image, read and checked in full before anything runs. Imports no torch, no pandas.

Every problem of the file is found in one pass and told in one `DataError`.
Shape suffixes: N rows, L labels, P patients, U distinct cells.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from agglom.data import tables
from agglom.data.tables import Problems, did_you_mean, encode, number
from agglom.job import Attribute, Data

MISSING = "set data.manifest; a relative path starts at the folder of the configuration file"
LABEL_VALUES = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": math.nan}


@dataclass(frozen=True, eq=False)
class View:
    """The groups of an attribute ("sex"), a crossing ("sex*view") or everybody ("", the one group "all").

    `members` are the rows (int64, ascending) of each group, `unknown` those of no group because a part is missing.
    Memberships, not a partition: where a cell holds several values its row is in several groups.
    """

    attribute: str
    members: dict[str, np.ndarray]
    unknown: np.ndarray


@dataclass(frozen=True, eq=False)
class Manifest:
    """The checked table; row i of every field is the i-th row of the file.

    `images` are absolute paths, `cells` as the file writes them; `patient_N` indexes `patients`; `split_N` holds
    "train", "val" or "test" whatever the file calls them; `label_NL` is float32 with NaN for unknown; `attributes` maps
    an attribute to the group name of each row, None where it is missing; `digest` is the sha256 of the file's bytes.
    `numbers` are the values of continuous attributes, NaN where missing. `separators` names the attributes of which a
    row may have several values; their cells in `attributes` hold them in order, joined by it. A label `finding=covid`
    is 1 where the column `finding` holds covid, 0 where it holds something else.
    """

    path: Path
    images: tuple[str, ...]
    patient_N: np.ndarray
    patients: tuple[str, ...]
    split_N: np.ndarray
    label_NL: np.ndarray
    labels: tuple[str, ...]
    attributes: dict[str, tuple[str | None, ...]]
    digest: str
    cells: tuple[str, ...] = ()
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    separators: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, split: str) -> np.ndarray:
        """Indices (int64, ascending) of the rows of `split`: "train", "val" or "test"."""
        return np.flatnonzero(self.split_N == split).astype(np.int64)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """By column, the classes of a label of several classes, in the order of `labels`."""
        return classes(self.labels)

    @property
    def headline(self) -> str:
        """The split that a report speaks of: test, or val where there is none."""
        return "test" if len(self.rows("test")) else "val"

    def view(self, name: str = "") -> View:
        """The groups of `name`, attributes joined by `*`: values in alphabetical order, those of a continuous attribute
        by size. A crossing is the full product of its parts, so that a combination without rows is seen to have none.
        """
        everybody = np.arange(len(self))
        if not name:
            return View("", {"all": everybody}, everybody[:0])
        parts = [self._masks(part) for part in name.split("*")]
        members = {
            "|".join(value for value, _ in combination): np.flatnonzero(
                np.logical_and.reduce([mask_N for _, mask_N in combination])
            )
            for combination in itertools.product(*(part.items() for part in parts))
        }
        known = [np.logical_or.reduce([*part.values(), np.zeros(len(self), bool)]) for part in parts]
        return View(name, members, np.flatnonzero(~np.logical_and.reduce(known)))

    def among(self, name: str, groups: Sequence[str]) -> np.ndarray:
        """The mask over N of the rows that are in one of some groups of `name`, an attribute or a crossing."""
        members = self.view(name).members
        return np.isin(np.arange(len(self)), np.concatenate([members[group] for group in groups]))

    def _masks(self, attribute: str) -> dict[str, np.ndarray]:
        """By value, the mask over N of the rows that have it."""
        column, separator = self.attributes[attribute], self.separators.get(attribute)
        codes_N, distinct = encode(("" if cell is None else cell for cell in column), len(column))
        values_of = [cell.split(separator) if cell and separator else [cell] for cell in distinct]
        values = sorted({value for several in values_of for value in several} - {""})
        masks = {v: np.array([v in several for several in values_of], bool)[codes_N] for v in values}
        if attribute in self.numbers:
            values.sort(key=lambda value: np.nanmin(self.numbers[attribute][masks[value]]))
        return {value: masks[value] for value in values}

    def where(self, row: int) -> str:
        """Where row `row` stands in the file, for messages: data row 1 is the first below the header."""
        return f"data row {row + 1} of {self.path}"


def load(
    data: Data,
    base: Path,
    *,
    check_files: bool = True,
    needed: Sequence[str] = ("train", "val"),
    missing: str = MISSING,
) -> Manifest:
    """Read and check the manifest of `data`, a CSV or Parquet file; relative paths start at `base`.

    Images are relative to `data.root`, or without it to the manifest's folder. Cells are stripped of surrounding
    blanks. `check_files=False` does not look for the images; the splits in `needed` must have rows; `missing` says what
    to do where there is no such file.

    Raises:
        DataError: with every problem of the file, each with its count and the first five rows.
    """
    path = Path(os.path.abspath(base / data.manifest))
    raw, table, problems = tables.read(path, "the manifest", missing)
    cells = _cells(data, table, problems)

    root = path.parent if data.root is None else Path(os.path.abspath(base / data.root))
    images = _images(cells.get(data.image), root, problems, check_files)
    split_N, patient_N, patients = _splits(data, cells, needed, problems)
    label_NL = np.full((table.num_rows, len(data.labels)), np.nan, np.float32)
    for index, label in enumerate(data.labels):
        column, of_class, value = label.partition("=")
        if column in cells:
            found_N = _class(value, cells[column]) if of_class else _label(label, cells[column], problems)
            label_NL[:, index] = found_N
    for column, values in classes(data.labels).items():
        if column in cells:
            _check_classes(column, values, cells[column], problems)
    attributes: dict[str, tuple[str | None, ...]] = {}
    numbers: dict[str, np.ndarray] = {}
    for name, spec in data.attributes.items():
        if (column := spec.column or name) in cells:
            if spec.kind == "continuous":
                attributes[name], numbers[name] = _continuous(name, spec, cells[column], problems)
            else:
                attributes[name] = _categorical(spec, cells[column])
    problems.throw()
    return Manifest(
        path=path,
        images=images,
        patient_N=patient_N,
        patients=patients,
        split_N=split_N,
        label_NL=label_NL,
        labels=tuple(data.labels),
        attributes=attributes,
        digest=hashlib.sha256(raw).hexdigest(),
        cells=tuple(cells[data.image]),
        numbers=numbers,
        separators={name: spec.separator for name, spec in data.attributes.items() if spec.separator is not None},
    )


def classes(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By column, the classes that labels `column=class` name, where they name several."""
    found: dict[str, list[str]] = {}
    for label in labels:
        column, of_class, value = label.partition("=")
        if of_class:
            found.setdefault(column, []).append(value)
    return {column: tuple(values) for column, values in found.items() if len(values) > 1}


def bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    """Names of the left-closed intervals between inner `edges`: (50, 65) -> "<50", "50-65", ">=65"."""
    text = [str(int(edge)) if float(edge).is_integer() else repr(float(edge)) for edge in edges]
    between = (f"{low}-{high}" for low, high in itertools.pairwise(text))
    return (f"<{text[0]}", *between, f">={text[-1]}")


def _cells(data: Data, table: pa.Table, problems: Problems) -> dict[str, list[str]]:
    """The columns that the configuration names, as text; those that the file lacks are a problem and left out."""
    wanted = {data.image: "data.image", data.patient: "data.patient"}
    wanted |= {data.split: "data.split"} if data.split is not None else {}
    wanted |= {label.partition("=")[0]: "data.labels" for label in data.labels}
    wanted |= {spec.column or name: f"data.attributes.{name}" for name, spec in data.attributes.items()}
    existing = Counter(table.column_names)
    cells = {}
    for name, key in wanted.items():
        if name not in existing:
            hint = did_you_mean(name, existing)
            problems.add(f"missing column '{name}' ({key}){hint} The file has: {', '.join(existing)}")
        elif existing[name] > 1:
            problems.add(f"column '{name}' ({key}) appears {existing[name]} times. Keep one")
        else:
            try:
                cells[name] = tables.text(table.column(name))
            except pa.ArrowException as error:
                problems.add(f"column '{name}' ({key}) cannot be read as text ({tables.first_line(error)})")
    return cells


# ── From cells to the fields of the manifest ──


def _images(cells: list[str] | None, root: Path, problems: Problems, check_files: bool) -> tuple[str, ...]:
    if cells is None:
        return ()
    empty_N = np.array([not cell for cell in cells])
    problems.rows("empty image cells", empty_N, lambda row: "''", "Every row needs an image")
    prefix = str(root)
    images = tuple(os.path.normpath(os.path.join(prefix, cell)) for cell in cells)

    codes_N, distinct = encode(images, len(images))
    if len(distinct) < len(images):
        first_U = np.unique(codes_N, return_index=True)[1]
        again_N = (np.arange(len(images)) != first_U[codes_N]) & ~empty_N
        problems.rows(
            "duplicate image rows",
            again_N,
            lambda row: f"'{cells[row]}' is also in {problems.at(first_U[codes_N[row]])}",
            "An image may have one row",
        )
    if check_files:
        folders: dict[str, set[str]] = {}
        absent_N = np.fromiter((not _exists(image, folders) for image in images), bool, len(images))
        problems.rows(
            "missing image files",
            absent_N & ~empty_N,
            lambda row: f"'{cells[row]}'",
            f"Looked in '{root}'; set data.root to the folder that the paths start from",
        )
    return images


def _exists(image: str, folders: dict[str, set[str]]) -> bool:
    """Whether `image` is a file: each folder is listed once, as a stat per file is slow on network disks."""
    folder, name = os.path.split(image)
    if folder not in folders:
        try:
            with os.scandir(folder) as entries:
                folders[folder] = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            folders[folder] = set()
    return name in folders[folder]


def _splits(
    data: Data, cells: dict[str, list[str]], needed: Sequence[str], problems: Problems
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Canonical split and patient code of each row; every patient must be in one split."""
    rows = len(problems.number_N)
    names = {data.splits.train: "train", data.splits.val: "val"}
    if data.splits.test is not None:
        names[data.splits.test] = "test"
    patient_cells = cells.get(data.patient, [])
    split_cells = [data.splits.test or "test"] * rows if data.split is None else cells.get(data.split, [])
    split_N = np.array([names.get(cell, "") for cell in split_cells], dtype="<U5")
    patient_N, patients = encode(patient_cells, len(patient_cells))
    no_patient_N = np.array([not cell for cell in patient_cells], dtype=bool)

    if split_cells:
        empty_N = np.array([not cell for cell in split_cells])
        problems.rows("empty split cells", empty_N, lambda row: "''", "Every row needs a split")
        problems.rows(
            "unknown split values",
            (split_N == "") & ~empty_N,
            lambda row: f"'{split_cells[row]}'",
            f"data.splits names {', '.join(names)}; name this one there or drop the rows",
        )
        for value, name in names.items():
            if name in needed and not (split_N == name).any():
                problems.add(f"no {name} rows: no cell of column '{data.split}' is '{value}' (data.splits.{name})")
    problems.rows(
        "empty patient cells",
        no_patient_N,
        lambda row: "''",
        "Splits are by patient; give each row a patient, a new one where there is a single image",
    )
    if split_cells and patient_cells:
        known = np.flatnonzero((split_N != "") & ~no_patient_N)
        first_P = np.zeros(len(patients), np.int64)
        # Of repeated indices the last assignment wins: backwards, that is a patient's first row.
        first_P[patient_N[known[::-1]]] = known[::-1]
        leak_N = np.zeros(rows, bool)
        leak_N[known] = split_N[known] != split_N[first_P[patient_N[known]]]
        problems.rows(
            f"patients in two splits ({len(np.unique(patient_N[leak_N]))})",
            leak_N,
            lambda row: (
                f"patient '{patient_cells[row]}' is in '{split_cells[row]}', "
                f"in {problems.at(first_P[patient_N[row]])} in '{split_cells[first_P[patient_N[row]]]}'"
            ),
            "Split by patient, or scores on images of known patients look too good",
        )
    return split_N, patient_N, tuple(patients)


def _label(name: str, cells: list[str], problems: Problems) -> np.ndarray:
    codes_N, distinct = encode(cells, len(cells))
    wrong_N = np.array([value not in LABEL_VALUES for value in distinct], bool)[codes_N]
    problems.rows(
        f"label '{name}' not 0 or 1",
        wrong_N,
        lambda row: f"'{cells[row]}'",
        "Write 0 or 1, and leave the cell empty where the label is unknown or uncertain",
    )
    return np.array([LABEL_VALUES.get(value, math.nan) for value in distinct], np.float32)[codes_N]


def _class(value: str, cells: list[str]) -> np.ndarray:
    codes_N, distinct = encode(cells, len(cells))
    return np.array([float(cell == value) if cell else math.nan for cell in distinct], np.float32)[codes_N]


def _check_classes(column: str, values: Sequence[str], cells: list[str], problems: Problems) -> None:
    """An image has one class, so those of a column must be named in full."""
    wrong_N = np.array([bool(cell) and cell not in values for cell in cells])
    problems.rows(
        f"classes of '{column}' that no label names",
        wrong_N,
        lambda row: f"'{cells[row]}'{did_you_mean(cells[row], values)}",
        f"Add a label '{column}=…' for each class, and leave the cell empty where it is unknown",
    )


def _categorical(spec: Attribute, cells: list[str]) -> tuple[str | None, ...]:
    """The group of each row; several are in alphabetical order, and what stands for missing among them says nothing."""
    codes_N, distinct = encode(cells, len(cells))
    missing = {"", *spec.missing}
    groups: list[str | None] = []
    for cell in distinct:
        values = [cell] if spec.separator is None else sorted({value.strip() for value in cell.split(spec.separator)})
        groups.append((spec.separator or "").join(value for value in values if value not in missing) or None)
    return tuple(groups[code] for code in codes_N)


def _continuous(
    name: str, spec: Attribute, cells: list[str], problems: Problems
) -> tuple[tuple[str | None, ...], np.ndarray]:
    """The bin and the number of each row."""
    codes_N, distinct = encode(cells, len(cells))
    names = bin_names(spec.bins)
    missing = {"", *spec.missing}
    # A code for missing such as -1 must not fall into a bin because the file writes it -1.0.
    missing_numbers = {number(token) for token in spec.missing} - {None}
    groups: list[str | None] = []
    numbers, wrong = [], []
    for cell in distinct:
        value = number(cell)
        absent = cell in missing or value in missing_numbers
        wrong.append(value is None and not absent)
        known = math.nan if value is None or absent else value
        groups.append(None if math.isnan(known) else names[bisect_right(spec.bins, known)])
        numbers.append(known)
    problems.rows(
        f"attribute '{name}' not numeric",
        np.array(wrong, bool)[codes_N],
        lambda row: f"'{cells[row]}'",
        f"Write a number, or name what stands for missing in data.attributes.{name}.missing",
    )
    return tuple(groups[code] for code in codes_N), np.array(numbers, float)[codes_N]
