"""What a run writes down while it trains: metrics.jsonl, TensorBoard, and one line on the console."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from agglom.errors import DataError


class Journal:
    """Rank 0's record of a run; on other ranks every method does nothing.

    A resumed run first forgets what was written after its checkpoint, so its record is that of a run that was never
    interrupted.
    """

    def __init__(self, out: Path, active: bool, resumed_step: int) -> None:
        self._file: TextIO | None = None
        self._board: Any = None
        if not active:
            return
        path = out / "metrics.jsonl"
        self._path = path
        with disk(path):
            kept = [line for line in _lines(path) if _step(path, line) <= resumed_step]
            if path.is_file() and not kept:
                path.unlink()
            elif kept:
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                temporary.replace(path)
            self._file = path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(out / "tb"), purge_step=resumed_step + 1 if resumed_step else None)

    def record(self, step: int, stage: str, values: Mapping[str, float | None]) -> None:
        """One log point. What is not finite is written as null."""
        if self._file is None:
            return
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}
        with disk(self._path):
            self._file.write(json.dumps({"step": step, "stage": stage, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        self._scalars(step, finite)

    def report(self, step: int, stage: str, rows: list[dict[str, Any]], split: str) -> None:
        """The headline split of a report, in TensorBoard: the same numbers under predictor/metric/group."""
        if self._board is None:
            return
        for row in rows:
            told = row["split"] == split and row["rule"] != "group" and row["metric"] != "auroc_curve"
            if told and row["value"] is not None and math.isfinite(row["value"]):
                place = [
                    row["metric"],
                    row["label"],
                    row["target"],
                    row["readout"],
                    row["predictor"].replace(" ", ""),
                ]
                group = f"{row['attribute']}={row['group']}" if row["attribute"] else "all"
                self._board.add_scalar("eval/" + "/".join(part for part in [*place, group] if part), row["value"], step)
        self._board.flush()

    def say(self, line: str) -> None:
        """A line on the console."""
        if self._file is not None:
            print(line, file=sys.stdout, flush=True)

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        for key, value in values.items():
            if value is not None:
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        if self._file is not None:
            # Of a full disk the failed line has told; closing tries it again.
            with contextlib.suppress(OSError):
                self._file.close()
            self._board.close()


class disk:
    """Turns a full disk or a missing right into an error that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise DataError(
                f"{self._path}: cannot be written ({reason}); free space or choose another --out, then start again: "
                "the run goes on from its last checkpoint"
            ) from error


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open() as file:
        # A line without its end was being written when the process died.
        return [line for line in file if line.endswith("\n")]


def _step(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: a line is damaged: {line.strip()[:60]!r}; remove it, then go on with --resume auto"
        ) from error


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 7m05, 3h10."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}"
