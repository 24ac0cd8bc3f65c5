"""The full training step beside the sum of its parts in plain PyTorch, in one process: the target is a ratio ≤ 1.03.

The loop is that of `agglom distill`, on digits. Between its steps the same work is done by hand on the same images:
the forward of each teacher, then a bare student step (forward with heads, the same losses, backward, clipping, AdamW)
on a copy that started from the same weights. Which side goes first alternates from step to step, so both see the same
state of the machine, and that they do the same work is seen by their losses. Reading images is left out of both, and so
are evaluations and the export; log points are in the loop's steps, but not in their median. The first steps warm up and
are not counted.

Wall clock and CPU seconds of the process are given; on a machine that others use, believe the latter. With an
accelerator every clock waits for it.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from _common import ROOT, parser, table, versions, write_json
from torch import Tensor, nn

from agglom import config, distill, evaluate, export, targets, train
from agglom.checkpoints import State
from agglom.core import losses, schedule
from agglom.core.types import Batch
from agglom.data import simulate

RESULTS = ROOT / "bench" / "results"
TARGET = 1.03
JOB = """\
extends: {base}
data: {{manifest: {manifest}, attributes: {{device: {{simulated: true}}}}, groups: [device], min_support: 2}}
teachers:
  dinov2: {{kind: packaged, options: {{model: dinov2_vits14}}}}
  lite0: {{kind: packaged, options: {{model: efficientnet_lite0}}}}
student: {{kind: timm, options: {{model: {student}}}}}
optim: {{batch: {batch}}}
engine: {{zero: {zero}}}
stages: [{{name: full, length: {steps} steps, size: {size}}}]
log: {{every: 10 steps, checkpoint: {steps} steps}}
"""
Clock = tuple[float, float]  # wall, CPU


def now(device: torch.device) -> Clock:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def since(then: Clock, device: torch.device) -> Clock:
    wall, cpu = now(device)
    return wall - then[0], cpu - then[1]


class Plain:
    """The parts of a step by hand: what a script for this one job would do."""

    def __init__(self, loop: train.Loop, model: nn.Module) -> None:
        job = loop.run.job
        self.loop, self.model = loop, model.to(loop.run.world.device).train()
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": job.optim.weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=job.stages[0].lr, betas=job.optim.betas)
        self.clip = job.optim.clip

    @torch.no_grad()
    def teachers(self, batch: Batch) -> dict[str, Any]:
        found = {}
        for name, teacher in self.loop.run.teachers.items():
            height, width = batch.pixels_BCHW.shape[-2:]
            size = targets.input_size(teacher.pixels, (height, width))
            found[name] = teacher.encode(targets.resize(batch.pixels_BCHW, size))
        return found

    def student(self, batch: Batch, raw: dict[str, Any], lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, predicted = self.model(batch.pixels_BCHW)
        parts = []
        for name, features in raw.items():
            normaliser, mine = self.loop.normalisers[name], predicted[name]
            with torch.no_grad():
                wanted = normaliser(features)
            parts.append(losses.angular(mine.summary_BD, wanted.summary_BD, normaliser.dispersion).mean())
            common = min(mine.grid[0], wanted.grid[0]), min(mine.grid[1], wanted.grid[1])
            x, y = (losses.resample(one.patches_BND, one.grid, common) for one in (mine, wanted))
            parts.append(losses.mse(x, y).mean())
        loss = torch.stack(parts).sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()


@dataclass
class Measured:
    """Clocks of each counted step, and the losses of both sides at every step."""

    full: list[Clock] = field(default_factory=list)
    teachers: list[Clock] = field(default_factory=list)
    student: list[Clock] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)


def run(options: Any) -> tuple[Measured, str]:
    """Train with the clocks between the steps of the loop. Returns what they show, and the device."""
    found, device = Measured(), torch.device("cpu")
    plain: Plain | None = None
    started: Clock | None = None
    models: list[nn.Module] = []
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    late: list[tuple[int, Batch, float]] = []
    kept = train._read, distill.build_distiller, distill._farewell, losses.objective, evaluate.evaluate, export.write
    read, build, _, objective, *_ = kept

    def built(*arguments: Any) -> nn.Module:
        model = build(*arguments)
        models.append(copy.deepcopy(model))
        return model

    def seen(*arguments: Any) -> Tensor:
        found = objective(*arguments)
        ours.append(found.detach())
        return found

    def by_hand(step: int, batch: Batch, lr: float) -> None:
        then = now(device)
        raw = cast(Plain, plain).teachers(batch)
        of_teachers, then = since(then, device), now(device)
        theirs.append(cast(Plain, plain).student(batch, raw, lr))
        of_student = since(then, device)
        if step >= options.warm:
            found.teachers.append(of_teachers)
            found.student.append(of_student)

    def between(loop: train.Loop, stage: Any, state: State, *more: Any) -> list[Batch]:
        nonlocal plain, started, device
        device = loop.run.world.device
        if started is not None and state.step > options.warm:
            found.full.append(since(started, device))
        plain = plain or Plain(loop, models[0])
        if late:
            by_hand(*late.pop())
        [batch] = read(loop, stage, state, *more)
        lr = schedule.lr(
            state.step - stage.first_step, steps=stage.steps, warmup=stage.warmup_steps, peak=stage.lr, end=stage.lr_end
        )
        if state.step % 2:
            late.append((state.step, batch, lr))
        else:
            by_hand(state.step, batch, lr)
        started = now(device)
        return [batch]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        simulate.digits(path / "data", train=4 * options.batch, val=16, test=16)
        text = JOB.format(
            **{"base": ROOT / "configs" / "base.yaml", "manifest": path / "data" / "manifest.csv"},
            **{"student": options.student, "batch": options.batch, "zero": options.zero, "size": options.size},
            steps=options.warm + options.steps + 1,  # the last step ends in a checkpoint and is not counted
        )
        (path / "job.yaml").write_text(text)
        job, base = config.load(path / "job.yaml")
        train._read, distill.build_distiller, distill._farewell = between, built, lambda *_: "done"
        losses.objective, evaluate.evaluate, export.write = seen, lambda *_: None, lambda *_: None
        try:
            distill.distill(job, base, path / "out")
        finally:
            train._read, distill.build_distiller, distill._farewell = kept[:3]
            losses.objective, evaluate.evaluate, export.write = kept[3:]
    found.losses = [(a.item(), b.item()) for a, b in zip(ours, theirs, strict=False)]
    found.teachers, found.student = found.teachers[: len(found.full)], found.student[: len(found.full)]
    return found, torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def ratio(found: Measured, clock: int, seed: int = 0) -> tuple[float, float, float]:
    """Median step of the loop ÷ sum of the medians of the parts, and its 95 % percentile interval over the steps.

    A step is resampled with its parts, since they saw the same machine.
    """
    sides = np.array([[one[clock] for one in side] for side in (found.full, found.teachers, found.student)])

    def of(place: np.ndarray) -> float:
        full, teachers, student = np.median(sides[:, place], axis=1)
        return float(full / (teachers + student))

    count, draw = sides.shape[1], np.random.default_rng(seed)
    lo, hi = np.quantile([of(draw.integers(0, count, count)) for _ in range(2000)], (0.025, 0.975))
    return of(np.arange(count)), float(lo), float(hi)


def figures(found: Measured, device: str, options: Any) -> dict[str, Any]:
    sides = {"full": found.full, "teachers": found.teachers, "student": found.student}
    told: dict[str, Any] = {"steps": len(found.full), "device": device, "target": TARGET}
    for clock, name in enumerate(("wall", "cpu")):
        value, lo, hi = ratio(found, clock)
        told[name] = {"ratio": value, "lo": lo, "hi": hi}
        for side, seconds in sides.items():
            quartiles = np.quantile([one[clock] for one in seconds], (0.25, 0.5, 0.75)).tolist()
            told[name][side] = dict(zip(("q25", "median", "q75"), quartiles, strict=True))
    told["losses_differ"] = max(abs(a - b) / abs(b) for a, b in found.losses)
    asked = {key: getattr(options, key) for key in ("batch", "size", "student", "zero", "warm", "threads")}
    return told | {"options": asked, "versions": versions()}


def markdown(told: dict[str, Any]) -> str:
    asked = told["options"]
    names = {
        "full": "agglom, the whole step",
        "teachers": "plain: forward of both teachers",
        "student": "plain: student step",
    }

    def cell(one: dict[str, float]) -> str:
        return f"{1000 * one['median']:.0f} ({1000 * one['q25']:.0f} to {1000 * one['q75']:.0f})"

    rows = [(text, *(cell(told[clock][side]) for clock in ("wall", "cpu"))) for side, text in names.items()]
    ratios = (f"**{one['ratio']:.3f}** ({one['lo']:.3f} to {one['hi']:.3f})" for one in (told["wall"], told["cpu"]))
    rows.append(("ratio: whole ÷ sum of the parts", *ratios))
    return "\n\n".join(
        [
            "# The full training step beside the sum of its parts",
            f"Teachers DINOv2 ViT-S/14 and EfficientNet-Lite0, student {asked['student']} with heads, {asked['batch']} "
            f"images of {asked['size']} px a step, fp32, ZeRO {asked['zero']}; {told['steps']} steps after "
            f"{asked['warm']} that are not counted. Both sides take turns, step by step, on the same images, and "
            "who goes first alternates. Reading images is left out of both; clipping and AdamW are in both.",
            table(
                ("median (quartiles), ms", "wall clock", "CPU time of the process"),
                rows,
            ),
            f"Interval of a ratio: 95 %, percentiles over resampled steps. Target ≤ {told['target']}. Both sides do "
            f"the same work: their losses differ by at most {told['losses_differ']:.0e}, relative. {told['device']}, "
            f"{asked['threads']} thread(s); {told['versions']}.",
        ]
    )


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--steps", type=int, default=60)
    cli.add_argument("--warm", type=int, default=5, help="steps before those that count")
    cli.add_argument("--batch", type=int, default=32)
    cli.add_argument("--size", type=int, default=112)
    cli.add_argument("--student", default="vit_tiny_patch16_224", help="a timm model")
    cli.add_argument("--zero", type=int, choices=(0, 1, 2), default=1)
    cli.add_argument("--threads", type=int, default=1, help="of torch")
    cli.add_argument("--results", type=Path, default=RESULTS, help="folder of the record (default bench/results)")
    options = cli.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    found, device = run(options)
    told = figures(found, device, options)
    text = markdown(told)
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"step-zero{options.zero}.md").write_text(text + "\n", encoding="utf-8")
    write_json(options.json or options.results / f"step-zero{options.zero}.json", told)


if __name__ == "__main__":
    main()
