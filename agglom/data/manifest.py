"""The table of images: one row an image, read and checked in full before anything runs. Imports no torch, no pandas.

Every problem of the file is found in one pass and told in one `DataError`.
Shape suffixes: N rows, L labels, P patients, U distinct cells.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import itertools
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from agglom.config import Attribute, Data
from agglom.errors import DataError

SHOWN = 5
LABEL_VALUES = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": math.nan}


@dataclass(frozen=True, eq=False)
class Manifest:
    """The checked table; row i of every field is the i-th row of the file.

    `images` are absolute paths; `patient_N` indexes `patients`; `split_N` holds "train", "val" or "test" whatever
    the file calls them; `label_NL` is float32 with NaN for unknown; `attributes` maps an attribute to the group name
    of each row, None where it is missing; `digest` is the sha256 of the file's bytes.
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

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, split: str) -> np.ndarray:
        """Indices (int64, ascending) of the rows of `split`: "train", "val" or "test"."""
        return np.flatnonzero(self.split_N == split).astype(np.int64)

    def where(self, row: int) -> str:
        """Where row `row` stands in the file, for messages: data row 1 is the first below the header."""
        return f"data row {row + 1} of {self.path}"


def load(data: Data, base: Path, *, check_files: bool = True) -> Manifest:
    """Read and check the manifest of `data`, a CSV or Parquet file; relative paths start at `base`.

    Images are relative to `data.root`, or without it to the manifest's folder. Cells are stripped of surrounding
    blanks. `check_files=False` does not look for the images.

    Raises:
        DataError: with every problem of the file, each with its count and the first five rows.
    """
    path = Path(os.path.abspath(base / data.manifest))
    raw = _bytes(path)
    table = _table(path, raw)
    problems = _Problems(path, *_numbering(path, raw, table.num_rows))
    cells = _cells(data, table, problems)

    root = path.parent if data.root is None else Path(os.path.abspath(base / data.root))
    images = _images(cells.get(data.image), root, problems, check_files)
    split_N, patient_N, patients = _splits(data, cells, problems)
    label_NL = np.full((table.num_rows, len(data.labels)), np.nan, np.float32)
    for index, label in enumerate(data.labels):
        if label in cells:
            label_NL[:, index] = _label(label, cells[label], problems)
    attributes = {
        name: _attribute(name, spec, cells[spec.column or name], problems)
        for name, spec in data.attributes.items()
        if (spec.column or name) in cells
    }
    problems.throw()
    digest = hashlib.sha256(raw).hexdigest()
    return Manifest(path, images, patient_N, patients, split_N, label_NL, tuple(data.labels), attributes, digest)


def bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    """Names of the left-closed intervals between inner `edges`: (50, 65) -> "<50", "50-65", ">=65"."""
    text = [str(int(edge)) if float(edge).is_integer() else repr(float(edge)) for edge in edges]
    between = (f"{low}-{high}" for low, high in itertools.pairwise(text))
    return (f"<{text[0]}", *between, f">={text[-1]}")


@dataclass
class _Problems:
    """Collects problems; `number_N` is how the reader of the message finds row i, `unit` says how it counts."""

    path: Path
    unit: str
    legend: str
    number_N: np.ndarray
    found: list[str] = field(default_factory=list)

    def at(self, row: int) -> str:
        return f"{self.unit} {self.number_N[row]}"

    def add(self, text: str) -> None:
        self.found.append(text)

    def rows(self, kind: str, mask_N: np.ndarray, cell: Callable[[int], str], remedy: str) -> None:
        """Add `kind` if any row is marked: count, the first five with `cell(row)`, and what to do."""
        marked = np.flatnonzero(mask_N)
        if marked.size == 0:
            return
        shown = [f"    {self.at(row)}: {cell(row)}" for row in marked[:SHOWN]]
        more = ["    …"] if marked.size > SHOWN else []
        count = f"{marked.size} row{'s' * (marked.size > 1)}"
        self.add("\n".join([f"{kind}: {count}. {remedy}", *shown, *more]))

    def throw(self) -> None:
        if self.found:
            count = f"{len(self.found)} problem{'s' * (len(self.found) > 1)}"
            raise DataError("\n".join([f"{self.path}: {count} ({self.legend})", *(f"  {text}" for text in self.found)]))


# ── From the file to cells ──


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else "."
        raise DataError(
            f"{path}: the manifest does not exist{hint} Set data.manifest; "
            "a relative path starts at the folder of the configuration file"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read ({error.strerror}). Check its permissions") from error
    if not raw.strip():
        raise DataError(f"{path}: the manifest is empty. It needs a header and one row for each image")
    return raw


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _is_parquet(path: Path, raw: bytes) -> bool:
    return path.suffix.lower() in (".parquet", ".pq") or raw.startswith(b"PAR1")


def _table(path: Path, raw: bytes) -> pa.Table:
    table = _parquet(path, raw) if _is_parquet(path, raw) else _csv(path, raw)
    if table.num_rows == 0:
        raise DataError(f"{path}: the manifest has columns but no rows. It needs one row for each image")
    return table


def _parquet(path: Path, raw: bytes) -> pa.Table:
    # Takes a quarter of a second to import, and most manifests are CSV.
    import pyarrow.parquet

    try:
        # Not read_table: it imports pandas, two seconds.
        return pyarrow.parquet.ParquetFile(pa.BufferReader(raw)).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)}). Write it again") from error


def _csv(path: Path, raw: bytes) -> pa.Table:
    from pyarrow import csv as arrow

    ragged: list[arrow.InvalidRow] = []

    def note(row: arrow.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    try:
        # Arrow guesses the type of each column that is not named beforehand: "007" would become 7.
        header = next(csv.reader(io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig", newline="")))
        table = arrow.read_csv(
            pa.BufferReader(raw),
            # One thread, or the row numbers of ragged rows are not known.
            read_options=arrow.ReadOptions(use_threads=False),
            parse_options=arrow.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()),
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: not a readable CSV file ({_first_line(error)}). "
            "It must be UTF-8, separated by commas, with a header"
        ) from error
    if ragged:
        shown = [f"    row {row.number}: {row.actual_columns} cells: {row.text[:80]}" for row in ragged[:SHOWN]]
        raise DataError(
            "\n".join(
                [
                    f"{path}: 1 problem (row 2 is the first below the header)",
                    f"  wrong number of cells: {len(ragged)} rows. The header has {ragged[0].expected_columns}; "
                    "put cells that contain a comma in double quotes",
                    *shown,
                    *(["    …"] if len(ragged) > SHOWN else []),
                ]
            )
        )
    return table


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _numbering(path: Path, raw: bytes, rows: int) -> tuple[str, str, np.ndarray]:
    """Unit, legend and number of each row: lines of a CSV file where they can be told, else data rows."""
    if not _is_parquet(path, raw):
        lines = [number for number, line in enumerate(raw.splitlines(), 1) if line]
        if len(lines) == rows + 1:
            return "line", "line numbers of the file; the header is line 1", np.array(lines[1:])
    return "row", "data rows counted from 1", np.arange(1, rows + 1)


def _cells(data: Data, table: pa.Table, problems: _Problems) -> dict[str, list[str]]:
    """The columns that the configuration names, as text; those that the file lacks are a problem and left out."""
    wanted = {data.image: "data.image", data.patient: "data.patient", data.split: "data.split"}
    wanted |= dict.fromkeys(data.labels, "data.labels")
    wanted |= {spec.column or name: f"data.attributes.{name}" for name, spec in data.attributes.items()}
    existing = Counter(table.column_names)
    cells = {}
    for name, key in wanted.items():
        if name not in existing:
            near = difflib.get_close_matches(name, existing, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            problems.add(f"missing column '{name}' ({key}){hint} The file has: {', '.join(existing)}")
        elif existing[name] > 1:
            problems.add(f"column '{name}' ({key}) appears {existing[name]} times. Keep one")
        else:
            try:
                cells[name] = _text(table.column(name))
            except pa.ArrowException as error:
                problems.add(f"column '{name}' ({key}) cannot be read as text ({_first_line(error)})")
    return cells


def _text(column: pa.ChunkedArray) -> list[str]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = {None, "nan"} if pa.types.is_floating(column.type) else {None}
    # A cast imports pyarrow.compute; the columns of a CSV file are text already.
    text = column if pa.types.is_string(column.type) else column.cast(pa.string())
    return ["" if cell in missing else cell.strip() for cell in text.to_pylist()]


# ── From cells to the fields of the manifest ──


def _encode(cells: Iterable[str], count: int) -> tuple[np.ndarray, list[str]]:
    """Codes (int64) by first appearance, and the distinct cells."""
    index: dict[str, int] = {}
    codes_N = np.fromiter((index.setdefault(cell, len(index)) for cell in cells), np.int64, count)
    return codes_N, list(index)


def _images(cells: list[str] | None, root: Path, problems: _Problems, check_files: bool) -> tuple[str, ...]:
    if cells is None:
        return ()
    empty_N = np.array([not cell for cell in cells])
    problems.rows("empty image cells", empty_N, lambda row: "''", "Every row needs an image")
    prefix = str(root)
    images = tuple(os.path.normpath(os.path.join(prefix, cell)) for cell in cells)

    codes_N, distinct = _encode(images, len(images))
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
    data: Data, cells: dict[str, list[str]], problems: _Problems
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Canonical split and patient code of each row; every patient must be in one split."""
    rows = len(problems.number_N)
    names = {data.splits.train: "train", data.splits.val: "val"}
    if data.splits.test is not None:
        names[data.splits.test] = "test"
    split_cells, patient_cells = cells.get(data.split, []), cells.get(data.patient, [])
    split_N = np.array([names.get(cell, "") for cell in split_cells], dtype="<U5")
    patient_N, patients = _encode(patient_cells, len(patient_cells))
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
            if name != "test" and not (split_N == name).any():
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


def _label(name: str, cells: list[str], problems: _Problems) -> np.ndarray:
    codes_N, distinct = _encode(cells, len(cells))
    wrong_N = np.array([value not in LABEL_VALUES for value in distinct], bool)[codes_N]
    problems.rows(
        f"label '{name}' not 0 or 1",
        wrong_N,
        lambda row: f"'{cells[row]}'",
        "Write 0 or 1, and leave the cell empty where the label is unknown or uncertain",
    )
    return np.array([LABEL_VALUES.get(value, math.nan) for value in distinct], np.float32)[codes_N]


def _attribute(name: str, spec: Attribute, cells: list[str], problems: _Problems) -> tuple[str | None, ...]:
    codes_N, distinct = _encode(cells, len(cells))
    missing = {"", *spec.missing}
    if spec.kind == "categorical":
        groups = [None if value in missing else value for value in distinct]
        return tuple(groups[code] for code in codes_N)

    names = bin_names(spec.bins)
    # A code for missing such as -1 must not fall into a bin because the file writes it -1.0.
    missing_numbers = {_number(token) for token in spec.missing} - {None}
    groups, wrong = [], []
    for value in distinct:
        number = _number(value)
        absent = value in missing or number in missing_numbers
        wrong.append(number is None and not absent)
        groups.append(None if number is None or absent else names[bisect_right(spec.bins, number)])
    problems.rows(
        f"attribute '{name}' not numeric",
        np.array(wrong, bool)[codes_N],
        lambda row: f"'{cells[row]}'",
        f"Write a number, or name what stands for missing in data.attributes.{name}.missing",
    )
    return tuple(groups[code] for code in codes_N)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
