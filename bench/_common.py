"""What the benches share: a table for people, figures for programs, and encoding."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout works from any folder


def parser(doc: str) -> argparse.ArgumentParser:
    """A command line with `--json FILE`."""
    made = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return made


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it also reads well in a terminal."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]])


def number(value: float | None) -> str:
    """Three decimals without the leading zero; an undefined number is an en dash."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def interval(value: float | None, lo: float | None, hi: float | None) -> str:
    """`value [lo, hi]`."""
    return number(value) if lo is None or math.isnan(lo) else f"{number(value)} [{number(lo)}, {number(hi)}]"


def versions() -> str:
    """The software that a figure depends on."""
    return f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures where `--json` says; an undefined number becomes null."""
    if path is None:
        return

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(figures), indent=1) + "\n", encoding="utf-8")


def dinov2() -> Any:
    """The packaged teacher DINOv2 ViT-S/14 without its patches, which no probe reads."""
    from agglom import plugins

    teacher = plugins.build("packaged", "teachers", {"model": "dinov2_vits14"})
    return replace(teacher, dims=replace(teacher.dims, patches=None))


@torch.no_grad()
def encoded(teacher: Any, images: Iterable[Tensor], size: int) -> Tensor:
    """Summary features (N, D) of batches of pixels (B, 3, H, W) in [0, 1], resized to `size`."""
    from agglom import targets

    started = time.perf_counter()
    raw_ND = torch.cat([teacher.encode(targets.resize(pixels_BCHW, (size, size))).summary_BD for pixels_BCHW in images])
    print(f"{len(raw_ND)} images encoded at {size} px in {time.perf_counter() - started:.0f} s", flush=True)
    return raw_ND
