"""Tables from CSV and Parquet files, and their problems told all at once. Imports no torch, no pandas.

Shape suffix: N rows.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from agglom.errors import DataError

SHOWN = 5
FOREIGN = {b"PK\x03\x04": "a spreadsheet or a zip archive", b"\x1f\x8b": "compressed"}
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Problems:
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
        self.items(kind, "row", np.flatnonzero(mask_N), lambda row: f"{self.at(row)}: {cell(row)}", remedy)

    def items(self, kind: str, noun: str, marked_X: np.ndarray, said: Callable[[int], str], remedy: str) -> None:
        """Add `kind` if anything is marked, whatever it is that a number in `marked_X` stands for."""
        if len(marked_X) == 0:
            return
        shown = [f"    {said(int(item))}" for item in marked_X[:SHOWN]]
        more = ["    …"] if len(marked_X) > SHOWN else []
        count = f"{len(marked_X)} {noun}{'s' * (len(marked_X) > 1)}"
        self.add("\n".join([f"{kind}: {count}. {remedy}", *shown, *more]))

    def throw(self) -> None:
        if self.found:
            count = f"{len(self.found)} problem{'s' * (len(self.found) > 1)}"
            raise DataError("\n".join([f"{self.path}: {count} ({self.legend})", *(f"  {text}" for text in self.found)]))


class File(NamedTuple):
    """A file as it lies on the disk, its table, and where the problems of its rows go."""

    raw: bytes
    table: pa.Table
    problems: Problems


def read(path: Path, noun: str, remedy: str) -> File:
    """Read a CSV or Parquet file, of which messages speak as `noun`; cells of a CSV file are text.

    Raises DataError where there is no such file (then with `remedy`), or none that can be read, or no row in it.
    """
    raw = _bytes(path, noun, remedy)
    table = _parquet(path, raw) if _is_parquet(path, raw) else _csv(path, raw)
    if table.num_rows == 0:
        raise DataError(f"{path}: {noun} has columns but no rows")
    return File(raw, table, Problems(path, *_numbering(path, raw, table.num_rows)))


def without_index(table: pa.Table) -> pa.Table:
    """Without what pandas adds to a Parquet file that it writes of some rows of a table: their numbers."""
    return table.drop_columns([name for name in table.column_names if name.startswith("__index_level_")])


def text(column: pa.ChunkedArray) -> list[str]:
    """The cells as text without surrounding blanks, "" where nothing is known. Raises pa.ArrowException."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = {None, "nan"} if pa.types.is_floating(column.type) else {None}
    # A cast imports pyarrow.compute; the columns of a CSV file are text already.
    cells = column if pa.types.is_string(column.type) else column.cast(pa.string())
    return ["" if cell in missing else cell.strip() for cell in cells.to_pylist()]


def encode(cells: Iterable[Key], count: int) -> tuple[np.ndarray, list[Key]]:
    """Codes (int64) by first appearance, and the distinct cells."""
    every = list(cells)
    index = {cell: code for code, cell in enumerate(dict.fromkeys(every))}
    return np.fromiter(map(index.__getitem__, every), np.int64, count), list(index)


def number(cell: str) -> float | None:
    """The number that a cell writes; None where it writes none, or an infinite one."""
    try:
        found = float(cell)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'image'?" where a known name is near, else "."."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "."


def first_line(error: BaseException) -> str:
    """What an error of a library says, in short."""
    return str(error).strip().split("\n")[0][:200]


# ── From the file to the table ──


def _bytes(path: Path, noun: str, remedy: str) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else "."
        raise DataError(f"{path}: {noun} does not exist{hint} {remedy}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: {noun} is a folder; name the file. {remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: {noun} cannot be read ({error.strerror}). Check its permissions") from error
    for start, kind in FOREIGN.items():
        if raw.startswith(start):
            raise DataError(f"{path}: {noun} is {kind}; write it as CSV or Parquet")
    if not raw.strip():
        raise DataError(f"{path}: {noun} is empty. It needs a header and rows")
    return raw


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _is_parquet(path: Path, raw: bytes) -> bool:
    return path.suffix.lower() in (".parquet", ".pq") or raw.startswith(b"PAR1")


def _parquet(path: Path, raw: bytes) -> pa.Table:
    # Takes a quarter of a second to import, and most manifests are CSV.
    import pyarrow.parquet

    try:
        # Not read_table: it imports pandas, two seconds.
        return without_index(pyarrow.parquet.ParquetFile(pa.BufferReader(raw)).read())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}). Write it again") from error


def _csv(path: Path, raw: bytes) -> pa.Table:
    from pyarrow import csv as arrow

    ragged: list[arrow.InvalidRow] = []

    def note(row: arrow.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    try:
        # Arrow guesses the type of each column that is not named beforehand: "007" would become 7.
        header = next(csv.reader(io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig", newline="")))
        if len(header) == 1 and ";" in header[0]:
            raise DataError(f"{path}: its columns are separated by semicolons; write it with commas, and 0.5, not 0,5")
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
            f"{path}: not a readable CSV file ({first_line(error)}). "
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


def _numbering(path: Path, raw: bytes, rows: int) -> tuple[str, str, np.ndarray]:
    """Unit, legend and number of each row: lines of a CSV file where they can be told, else data rows."""
    if not _is_parquet(path, raw):
        lines = [number for number, line in enumerate(raw.splitlines(), 1) if line]
        if len(lines) == rows + 1:
            return "line", "line numbers of the file; the header is line 1", np.array(lines[1:])
    return "row", "data rows counted from 1", np.arange(1, rows + 1)
