"""Normaliser × loss: what a small student learns of real teachers under each, on Fashion-MNIST, three seeds.

The teachers (DINOv2 ViT-S/14, EfficientNet-Lite0, MobileNetV2) encode every image once, clean, and their features are
kept beside --runs; each run then trains a tiny vision transformer at 48 px with agglom's own normalisers, heads and
table of losses. Every finished run is a line of --runs, so an interrupted bench goes on where it stopped. A seed sets
the student's start and the order of images.

Three figures, on test images that nothing was fitted on:
- unexplained: FVU of the patches in the teacher's raw space, predictions taken back through the normaliser. The losses
  of directions alone teach no length, so for them it says nothing of the student.
- unread: FVU of the same patches as a linear readout of the student's own (ridge, train images) predicts them:
  comparable whatever the loss was.
- probe: ten-class accuracy of a linear probe, its strength chosen on validation, on the student's summary.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from _common import ROOT, number, parser, table, versions, write_json
from safetensors.torch import save_file
from torch import Tensor

from agglom import plugins, targets
from agglom.core import losses, normalise, schedule
from agglom.core.heads import Distiller, resample
from agglom.core.normalise import KINDS, Moments
from agglom.core.tokens import TimmEncoder, emitted
from agglom.core.types import Dims, Features, Teacher
from agglom.data import simulate
from agglom.errors import CacheError
from agglom.job import Loss
from agglom.targets import Normaliser

TEACHERS = ("dinov2_vits14", "efficientnet_lite0", "mobilenetv2")
FILES = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
SIZE, TRAIN, VAL, TEST = 48, 3000, 500, 1000
BATCH, WARMUP, PEAK, END = 32, 20, 1e-3, 1e-5
LOSSES = {
    "mse": Loss(summary="mse", patches="mse"),
    "default": Loss(),  # what agglom does unless told otherwise
    "cosine": Loss(summary="cosine", patches="cosine"),
    "unic": Loss(summary="unic", patches="unic"),
}
CELLS = [(kind, loss) for loss in LOSSES for kind in (KINDS if loss != "default" else KINDS[:1])]
# PHI-S, arXiv 2410.01680: the order of the mean rank of a ViT-B's quality.
LITERATURE = [("phi_s", "mse"), ("standardise", "mse"), ("none", "cosine"), ("none", "mse")]
RESULTS = ROOT / "bench" / "results"
RIDGE = 1e-3


class Material(NamedTuple):
    """Images of train, val and test in that order, their classes, and what each teacher makes of them."""

    pixels_NCHW: Tensor
    class_N: np.ndarray
    teachers: dict[str, Teacher]
    raw: dict[str, Features]


def material(folder: Path, kept: Path) -> Material:
    """The first images of both files of Fashion-MNIST: 3,000 to train on, 500 to choose by, 1,000 to test on.

    What the teachers make of them is written to `kept`, and read from there if it is of the same teachers and images.
    """

    def read(stem: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = (gzip.decompress((folder / f"{stem}-{kind}").read_bytes()) for kind in FILES)
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:count]
        return pixels.astype(np.float32) / 255, np.frombuffer(labels, np.uint8, offset=8)[:count]

    (seen, seen_class), (test, test_class) = read("train", TRAIN + VAL), read("t10k", TEST)
    small_N1HW = torch.from_numpy(np.concatenate([seen, test]))
    pixels_NCHW = targets.resize(small_N1HW, (SIZE, SIZE)).clamp(0, 1).expand(-1, 3, -1, -1)
    teachers = {name: plugins.build("packaged", "teachers", {"model": name}) for name in TEACHERS}
    identity = {name: teacher.fingerprint for name, teacher in teachers.items()} | {"px": str(SIZE)}
    try:
        stored = targets.read(kept, identity)
        grids = {name: cast("tuple[int, int]", tuple(stored[f"{name}/grid"].tolist())) for name in TEACHERS}
        raw = {n: Features(stored[f"{n}/summary"], stored[f"{n}/patches"], grids[n]) for n in TEACHERS}
    except CacheError:
        started = time.perf_counter()
        parts = [targets.encode(teachers, TEACHERS, chunk_BCHW) for chunk_BCHW in pixels_NCHW.split(50)]
        raw = {name: _joined([part[name] for part in parts]) for name in TEACHERS}
        tensors = {f"{name}/{kind}": tensor for name, one in raw.items() for kind, tensor in _named(one)}
        save_file(tensors, kept, metadata=identity)
        print(f"{len(pixels_NCHW)} images encoded in {time.perf_counter() - started:.0f} s", flush=True)
    return Material(pixels_NCHW, np.concatenate([seen_class, test_class]), teachers, raw)


def _named(raw: Features) -> list[tuple[str, Tensor]]:
    summary_ND, patches_NND = _both(raw, slice(None))
    return [("summary", summary_ND), ("patches", patches_NND.contiguous()), ("grid", torch.tensor(raw.grid))]


def _joined(parts: list[Features]) -> Features:
    summary, patches = zip(*((p.summary_BD, p.patches_BND) for p in parts), strict=True)
    return Features(torch.cat(cast("list[Tensor]", summary)), torch.cat(cast("list[Tensor]", patches)), parts[0].grid)


def fitted(raw: Features, kind: str) -> Normaliser:
    """A teacher's normaliser as the survey of a run fits it under an MSE-type loss, on the train images."""
    summary_ND, patches_NND = _both(raw, slice(TRAIN))
    affines = [
        normalise.fit(kind, Moments.empty(one_ND.shape[-1]).update(one_ND))
        for one_ND in (patches_NND.flatten(0, 1), summary_ND)
    ]
    return Normaliser(*affines, *normalise.cone(summary_ND))


def _both(features: Features, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
    return cast(Tensor, features.summary_BD)[rows], cast(Tensor, features.patches_BND)[rows]


def student(dims: dict[str, Dims], seed: int) -> Distiller:
    """A vision transformer of 3 blocks of width 128 on patches of 16 px, with small heads."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    net = VisionTransformer(img_size=SIZE, patch_size=16, embed_dim=128, depth=3, num_heads=4, num_classes=0)
    encoder = TimmEncoder(net, (0.5,) * 3, (0.5,) * 3)
    encoder.summary = "class"
    own, _ = emitted(encoder.eval(), SIZE)
    return Distiller(encoder, own, dims, hidden=128, depth=0)


def wanted(m: Material, normalisers: dict[str, Normaliser], loss: Loss) -> dict[str, Features]:
    """The targets of the train images."""
    if not loss.normalises_summary:
        normalisers = {name: replace(one, summary=None) for name, one in normalisers.items()}
    return {name: normalisers[name](Features(*_both(raw, slice(TRAIN)), raw.grid)) for name, raw in m.raw.items()}


def train(
    m: Material, goals: dict[str, Features], normalisers: dict[str, Normaliser], loss: Loss, seed: int, steps: int
) -> Distiller:
    """One student, by the table of losses and a uniform weight, as in the engine but for its parallel parts."""
    dispersion = {teacher: cast(Tensor, one.dispersion) for teacher, one in normalisers.items()}
    dims = {teacher: one.dims for teacher, one in m.teachers.items()}
    columns, model = losses.columns(dims, {}), student(dims, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.05)
    order = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(TRAIN, generator=order) for _ in itertools.count())
    batches = (rows_B for epoch in epochs for rows_B in epoch.split(BATCH) if len(rows_B) == BATCH)
    for step, rows_B in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step, steps=steps, warmup=WARMUP, peak=PEAK, end=END)
        _, predicted = model(m.pixels_NCHW[rows_B])
        batch = {teacher: Features(*_both(one, rows_B), one.grid) for teacher, one in goals.items()}
        found = losses.table(
            columns, predicted, batch, set(batch), summary=loss.summary, patches=loss.patches, dispersion=dispersion
        )
        optimizer.zero_grad()
        losses.objective(found, torch.full_like(found.loss_BT, 1 / BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def judged(m: Material, model: Distiller, normalisers: dict[str, Normaliser]) -> dict[str, float]:
    """The figures of one student by name: `probe`, `unexplained/TEACHER` and `unread/TEACHER`."""
    outputs = [model(chunk_BCHW) for chunk_BCHW in m.pixels_NCHW.split(250)]
    trunk = _joined([own for own, _ in outputs])
    figures = {"probe": probe(cast(Tensor, trunk.summary_BD), m.class_N)}
    for name, raw in m.raw.items():
        predicted = _joined([of[name] for _, of in outputs])
        affine = cast(normalise.Affine, normalisers[name].patches)
        guess_NND = normalise.invert(affine, cast(Tensor, predicted.patches_BND))
        grid = cast("tuple[int, int]", tuple(map(min, raw.grid, trunk.grid)))
        truth_NND = resample(cast(Tensor, raw.patches_BND), raw.grid, grid)
        figures[f"unexplained/{name}"] = fvu(truth_NND, resample(guess_NND, trunk.grid, grid))
        own_NND = resample(cast(Tensor, trunk.patches_BND), trunk.grid, grid)
        figures[f"unread/{name}"] = fvu(truth_NND, readout(own_NND, truth_NND))
    return figures


def fvu(truth_NND: Tensor, guess_NND: Tensor) -> float:
    """Squared error on the test images over that of the train mean per position (Rulings 2)."""
    truth_MND, mean_ND = truth_NND[-TEST:].double(), truth_NND[:TRAIN].double().mean(0)
    error = (guess_NND[-TEST:] - truth_MND).square().sum()
    return float(error / (mean_ND - truth_MND).square().sum())


def readout(x_NND: Tensor, y_NND: Tensor) -> Tensor:
    """What ridge regression on the train images, with a constant, predicts of y from x for every image."""
    x_KD = torch.cat([x_NND, torch.ones_like(x_NND[..., :1])], -1).flatten(0, 1).double()
    tokens = TRAIN * x_NND.shape[1]
    fit_KD, y_KD = x_KD[:tokens], y_NND.flatten(0, 1)[:tokens].double()
    gram_DD = fit_KD.T @ fit_KD
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    return (x_KD @ torch.linalg.solve(gram_DD, fit_KD.T @ y_KD)).view_as(y_NND)


def probe(features_ND: Tensor, class_N: np.ndarray) -> float:
    """Accuracy on test of a logistic regression fitted on train; its strength is the best on val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x_ND, train, val, test = features_ND.numpy(), slice(TRAIN), slice(TRAIN, TRAIN + VAL), slice(TRAIN + VAL, None)
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)) for c in (1e-3, 1e-2, 1e-1)]
    best = max(models, key=lambda one: one.fit(x_ND[train], class_N[train]).score(x_ND[val], class_N[val]))
    return float(best.score(x_ND[test], class_N[test]))


# ── What is said ─────────────────────────────────────────────────────────────────────────────────────────────────────

Runs = dict[tuple[str, str], dict[str, list[float]]]


def gathered(rows: list[dict[str, Any]]) -> Runs:
    """By (normaliser, loss), the values of each figure in the order of the seeds."""
    found: Runs = {}
    for row in sorted(rows, key=lambda one: one["seed"]):
        cell = found.setdefault((row["normaliser"], row["loss"]), {})
        for name, value in row["figures"].items():
            cell.setdefault(name, []).append(value)
    return found


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, NaN for one value."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def shown(values: list[float]) -> str:
    mean, error = spread(values)
    return f"{number(mean)} ± {number(error)}"


def lines(found: Runs) -> Iterator[list[str]]:
    for (normaliser, loss), cell in found.items():
        yield [normaliser, loss, *(shown(values) for values in cell.values()), str(len(cell["probe"]))]


def quality(cell: dict[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """By seed: what can be read of the teachers (1 − unread, their mean), and the probe. Higher is better."""
    unread = [values for name, values in cell.items() if name.startswith("unread/")]
    return 1 - np.mean(unread, axis=0), np.asarray(cell["probe"])


def verdicts(found: Runs) -> Iterator[list[str]]:
    """Each step of the literature's ordering with the paired difference over the seeds."""
    for better, worse in itertools.pairwise(LITERATURE):
        if better not in found or worse not in found:
            continue
        for name, one, other in zip(("read", "probe"), quality(found[better]), quality(found[worse]), strict=True):
            shared = min(len(one), len(other))
            mean, error = spread(list(one[:shared] - other[:shared]))
            unclear = "too few seeds" if shared < 2 else "within 2 s.e."
            agrees = "yes" if mean > 2 * error else "no" if mean < -2 * error else unclear
            yield [f"{'+'.join(better)} ≥ {'+'.join(worse)}", name, f"{number(mean)} ± {number(error)}", agrees]


def main() -> None:
    cli: argparse.ArgumentParser = parser(__doc__ or "")
    cli.set_defaults(json=RESULTS / "ablation.json")
    cli.add_argument("--source", type=Path, default=simulate.FASHION, help=f"(default {simulate.FASHION})")
    cli.add_argument("--steps", type=int, default=150, help="of each run (default 150)")
    cli.add_argument("--seeds", type=int, default=3, help="(default 3)")
    cli.add_argument("--runs", type=Path, default=ROOT / "out" / "ablation.jsonl", help="(default out/ablation.jsonl)")
    cli.add_argument("--results", type=Path, default=RESULTS, help="folder of the record (default bench/results)")
    options = cli.parse_args()
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.runs.read_text().splitlines()] if options.runs.is_file() else []
    rows = [row for row in rows if (row["steps"], row["px"]) == (options.steps, SIZE)]
    done = {(row["normaliser"], row["loss"], row["seed"]) for row in rows if "figures" in row}
    # The ordering first: the record compares it, however early the bench is stopped.
    cells = sorted(CELLS, key=lambda cell: cell not in LITERATURE)
    due = {cell: [seed for seed in range(options.seeds) if (*cell, seed) not in done] for cell in cells}
    m = material(options.source, options.runs.with_suffix(".safetensors")) if any(due.values()) else None
    for name in TEACHERS if m else ():
        if name not in own_probes(rows):
            own = probe(cast(Tensor, cast(Material, m).raw[name].summary_BD), cast(Material, m).class_N)
            keep({"teacher": name, "probe": own, "steps": options.steps, "px": SIZE}, rows, options.runs)
    known: dict[str, dict[str, Normaliser]] = {}
    for (kind, name), seeds in due.items():
        if m is None or not seeds:
            continue
        normalisers = known.setdefault(kind, known.get(kind) or {t: fitted(raw, kind) for t, raw in m.raw.items()})
        goals = wanted(m, normalisers, LOSSES[name])
        for seed in seeds:
            started = time.perf_counter()
            figures = judged(m, train(m, goals, normalisers, LOSSES[name], seed, options.steps), normalisers)
            row = {"normaliser": kind, "loss": name, "seed": seed, "steps": options.steps, "px": SIZE}
            keep(row | {"figures": figures}, rows, options.runs)
            said = "  ".join(f"{key} {number(value)}" for key, value in figures.items())
            print(f"{kind} {name} seed {seed}, {time.perf_counter() - started:.0f} s: {said}", flush=True)
            publish(rows, options)
    print(publish(rows, options))


def keep(row: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Remember a row, here and in the file of runs."""
    rows.append(row)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def own_probes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The teachers' own accuracies."""
    return {row["teacher"]: row["probe"] for row in rows if "teacher" in row}


def publish(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Write the record of what has run so far; its text."""
    every = gathered([row for row in rows if "figures" in row])
    text = record({cell: every[cell] for cell in CELLS if cell in every}, own_probes(rows), options.steps)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "ablation.md").write_text(text, encoding="utf-8")
    write_json(options.json, {"steps": options.steps, "versions": versions(), "rows": rows})
    return text


def record(found: Runs, own: dict[str, float], steps: int) -> str:
    """The Markdown of bench/results/ablation.md."""
    names = list(next(iter(found.values())))
    explained = (__doc__ or "").partition("Three figures")[2]
    return (
        "\n\n".join(
            [
                "# Normaliser × loss, Fashion-MNIST",
                f"Made by `OMP_NUM_THREADS=1 .venv/bin/python bench/ablation.py` ({versions()}): {TRAIN} train, {VAL} "
                f"validation and {TEST} test images at {SIZE} px, {steps} steps of {BATCH} images, "
                f"mean ± standard error over the seeds of the last column; cells that are not there have not run.",
                f"Three figures{explained}".strip(),
                table(("normaliser", "loss", *names, "seeds"), lines(found)),
                "The probe of the teachers themselves: "
                + ", ".join(f"{name} {number(value)}" for name, value in own.items())
                + ".",
                "## The ordering of the literature (PHI-S ≥ standardise > cosine > raw MSE, arXiv 2410.01680)",
                "Paired differences over the seeds; `read` is 1 − unread, the mean over the teachers.",
                table(("step", "figure", "difference", "reproduced"), verdicts(found)),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
