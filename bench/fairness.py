"""What each way to weigh the losses does for a minority, on Fashion-MNIST with a simulated device.

Device B takes 12 % of the training images and half of the others. Three teachers: `majority` has learnt its classes on
20,000 images of device A alone and is unfair by construction, `balanced` on 1,500 images of both devices and is weaker,
`lite0` is EfficientNet-Lite0. A small convolutional student learns their summaries without labels (PHI-S, MSE), as
long and with as many images under every method; then a linear probe, its strength chosen on validation, is fitted on
the training images and read on test. A seed sets the draw of images and devices, the two teachers and the student.

`views` lets the student see half of its images as agglom's generic acquisitions (all kinds, strength 1) would have
taken them. Its families resemble the simulated device, which blurs, inverts, compresses and adds noise, too;
`views-unlike` leaves out the two that matter most, inversion and contrast.

Every finished run is a line of --runs, so an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import ROOT, encoded, parser, table, versions, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from agglom import plugins
from agglom.core import balance, groups, normalise, schedule
from agglom.core.balance import Cells
from agglom.core.heads import Head
from agglom.core.losses import mse
from agglom.core.normalise import Moments
from agglom.core.types import Balancer, LossTable
from agglom.data import simulate
from agglom.data.acquisition import simulated
from agglom.job import Acquisition

TRAIN, VAL, TEST = 10_000, 2_000, 5_000
MAJORITY, BALANCED = 20_000, 1_500
DEVICES = ("A", "B")
TEACHERS = ("majority", "balanced", "lite0")
WIDTH, PIXELS = 32, 64
BATCH, PEAK, END = 128, 2e-3, 1e-5
STUDENTS = {"small": 4, "large": 16}
RESULTS = ROOT / "bench" / "results"
ANY = Acquisition(blur=1.0, resolution=1.0, contrast=1.0, inversion=1.0, noise=1.0)
UNLIKE = Acquisition(blur=1.0, resolution=1.0, noise=1.0)
VIEWS = 4  # of each image, made in advance


class Method(NamedTuple):
    """How cells are weighted, and what the student sees; with `beta`, groups by `balancer` and teachers by reliability.

    The latter multiplies the weight of teacher t in group g by its share of Σ_t (1 − R_tg)^−β, 1 on average, where
    R_tg is the validation accuracy of its probe in the group (DESIGN.md, "The objective"). `own`: (1 − R_tg) is taken
    relative to the teacher's best group first, so that a teacher loses weight where it serves worse than elsewhere.
    """

    balancer: Callable[..., Balancer]
    seen: Acquisition | None = None
    beta: float = 0.0
    own: bool = False


HALF = partial(balance.inverse_frequency, power=0.5)  # q ∝ √p
# Each with the defaults of its paper.
METHODS = {
    "uniform": Method(balance.uniform),
    "inverse frequency": Method(balance.inverse_frequency),
    "group DRO": Method(balance.group_dro),
    "CVaR": Method(balance.cvar),
    "teacher dropping": Method(balance.teacher_dropping),
    "AdaLoss": Method(balance.ada_loss),
    "reliability, β = 2": Method(balance.uniform, beta=2.0),
    "reliability, β = 6": Method(balance.uniform, beta=6.0),
    "reliability, β = 2, γ = ½": Method(HALF, beta=2.0),
    "reliability, β = 6, γ = ½": Method(HALF, beta=6.0),
    "own reliability, β = 2": Method(balance.uniform, beta=2.0, own=True),
    "own reliability, β = 2, γ = ½": Method(HALF, beta=2.0, own=True),
    "own reliability, β = 6, γ = ½": Method(HALF, beta=6.0, own=True),
    "inverse frequency, γ = ½": Method(HALF),
    "views": Method(balance.uniform, seen=ANY),
    "views-unlike": Method(balance.uniform, seen=UNLIKE),
    "views + own reliability, β = 2, γ = ½": Method(HALF, seen=ANY, beta=2.0, own=True),
    "views + reliability, β = 2, γ = ½": Method(HALF, seen=ANY, beta=2.0),
}


@dataclass(frozen=True)
class Material:
    """Images (N, 1, 28, 28), classes and devices, train then val then test; raw features of each teacher."""

    pixels_NCHW: Tensor
    class_N: Tensor
    device_N: Tensor
    raw: dict[str, Tensor]


class Trunk(nn.Sequential):
    """Three strided convolutions and the mean over what is left of the image: 4·width features."""

    def __init__(self, width: int, out: int) -> None:
        sizes = (1, width, 2 * width, out)
        layers: list[nn.Module] = []
        for one, two in itertools.pairwise(sizes):
            layers += [nn.Conv2d(one, two, 3, 2, 1), nn.BatchNorm2d(two), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def material(seed: int, source: Path, path: Path) -> Material:
    """Drawn and encoded once for each seed."""
    if not path.is_file():
        tensors = _drawn(seed, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    kept = load_file(path)
    return Material(kept["pixels"], kept["class"], kept["device"], {name: kept[f"raw/{name}"] for name in TEACHERS})


def _drawn(seed: int, source: Path) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)

    def read(stem: str) -> tuple[np.ndarray, np.ndarray]:
        images = simulate._idx(source / f"{stem}-images-idx3-ubyte.gz").astype(np.float32) / 255
        return images, simulate._idx(source / f"{stem}-labels-idx1-ubyte.gz").astype(np.int64)

    (images, classes), (test_images, test_classes) = read("train"), read("t10k")
    order, held = rng.permutation(len(images)), rng.permutation(len(test_images))[:TEST]
    own, theirs = np.split(order, [TRAIN + VAL])
    device_N = np.concatenate([rng.random(TRAIN) < simulate.SHARE_B["train"], rng.random(VAL + TEST) < 0.5])
    taken = simulate.simulate(np.concatenate([images[own], test_images[held]]), device_N, seed)
    pixels_NCHW = torch.as_tensor(taken)[:, None]
    raw = {}
    for name, width, first, last in (("majority", 32, 0, MAJORITY), ("balanced", 16, MAJORITY, MAJORITY + BALANCED)):
        rows = theirs[first:last]
        device_B = rng.random(len(rows)) < 0.5 if name == "balanced" else np.zeros(len(rows), bool)
        seen = torch.as_tensor(simulate.simulate(images[rows], device_B, seed + 1))[:, None]
        raw[name] = _taught(pixels_NCHW, seen, torch.as_tensor(classes[rows]), width, seed)
    lite0 = plugins.build("packaged", "teachers", {"model": "efficientnet_lite0"})
    raw["lite0"] = encoded(lite0, (chunk.expand(-1, 3, -1, -1) for chunk in pixels_NCHW.split(250)), PIXELS)
    class_N = torch.as_tensor(np.concatenate([classes[own], test_classes[held]]))
    found = {"pixels": pixels_NCHW, "class": class_N, "device": torch.as_tensor(device_N.astype(np.int64))}
    return found | {f"raw/{name}": one_ND for name, one_ND in raw.items()}


def _taught(pixels_NCHW: Tensor, seen_BCHW: Tensor, class_B: Tensor, width: int, seed: int) -> Tensor:
    """Features of all images by a network that has learnt the classes of some; it ends in a norm, as ViTs do."""
    torch.manual_seed(seed)
    net = nn.Sequential(Trunk(width, WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False))
    head, steps = nn.Linear(WIDTH, 10), 1200
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule.lr(step, steps=steps, warmup=steps // 4, peak=4e-3, end=END)
        rows_B = torch.randint(len(seen_BCHW), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(head(net(seen_BCHW[rows_B])), class_B[rows_B]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        return torch.cat([net(chunk) for chunk in pixels_NCHW.split(500)])


class Student(nn.Module):
    """The trunk, and one head for each teacher."""

    def __init__(self, width: int, dims: dict[str, int]) -> None:
        super().__init__()
        self.trunk = Trunk(width, 4 * width)
        self.heads = nn.ModuleDict({name: Head(4 * width, dim, 64, 0) for name, dim in dims.items()})

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        summary_BD = self.trunk(pixels_BCHW)
        return summary_BD, {name: head(summary_BD) for name, head in self.heads.items()}


def goals(m: Material) -> dict[str, Tensor]:
    """Targets of all images, by the normaliser of the train images."""
    return {
        name: normalise.apply(normalise.fit("phi_s", Moments.empty(one.shape[1]).update(one[:TRAIN])), one)
        for name, one in m.raw.items()
    }


def views(m: Material, acquisition: Acquisition, seed: int) -> Tensor:
    """VIEWS simulated acquisitions of each train image, (VIEWS, TRAIN, 1, 28, 28)."""
    return torch.stack(
        [
            torch.stack(
                [
                    simulated(m.pixels_NCHW[row], acquisition, random.Random(f"{seed}/{row}/{view}"))
                    for row in range(TRAIN)
                ]
            )
            for view in range(VIEWS)
        ]
    )


def reliability(right_GT: Tensor, beta: float, own: bool) -> Tensor:
    """Groups × teachers, 1 on average over the teachers of a group."""
    wrong_GT = (1 - right_GT).clamp(min=1e-3)
    worth_GT = (wrong_GT / wrong_GT.amin(0) if own else wrong_GT) ** -beta
    return worth_GT / worth_GT.mean(1, keepdim=True)


def train(
    m: Material, goal: dict[str, Tensor], right_GT: Tensor, method: Method, width: int, seed: int, steps: int
) -> Student:
    """One student, by the table of losses and the method's weights on one process."""
    torch.manual_seed(seed)
    model = Student(width, {name: one.shape[1] for name, one in goal.items()}).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    share_G = torch.bincount(m.device_N[:TRAIN], minlength=2).double() / TRAIN
    balancer = method.balancer(cells=Cells(share_G, torch.arange(len(goal)), BATCH, TRAIN))
    worth_GT = reliability(right_GT, method.beta, method.own)
    state, draw = balancer.init(), torch.Generator().manual_seed(seed)
    taken_VNCHW = None if method.seen is None else views(m, method.seen, seed)
    epochs = (torch.randperm(TRAIN, generator=draw) for _ in itertools.count())
    batches = (rows_B for epoch in epochs for rows_B in epoch.split(BATCH) if len(rows_B) == BATCH)
    for step, rows_B in enumerate(itertools.islice(batches, steps)):
        optimizer.param_groups[0]["lr"] = schedule.lr(step, steps=steps, warmup=steps // 20, peak=PEAK, end=END)
        seen_BCHW, device_B = m.pixels_NCHW[rows_B], m.device_N[rows_B]
        if taken_VNCHW is not None:
            view_B = torch.randint(VIEWS, (BATCH,), generator=draw)
            clean_B = torch.rand(BATCH, generator=draw) < 0.5
            seen_BCHW = torch.where(clean_B[:, None, None, None], seen_BCHW, taken_VNCHW[view_B, rows_B])
        _, predicted = model(seen_BCHW)
        loss_BT = torch.stack([mse(predicted[name], one_ND[rows_B]) for name, one_ND in goal.items()], 1)
        found = LossTable(loss_BT, torch.ones_like(loss_BT, dtype=torch.bool))
        weight_BT = balancer.weigh(state, found, device_B, draw) * worth_GT[device_B]
        optimizer.zero_grad()
        (weight_BT * loss_BT).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = balancer.update(state, groups.tally(device_B, loss_BT, found.valid_BT, len(DEVICES)))
    return model.eval()


@torch.no_grad()
def summaries(m: Material, model: Student) -> Tensor:
    return torch.cat([model(chunk)[0] for chunk in m.pixels_NCHW.split(500)])


def probed(m: Material, features_ND: Tensor) -> np.ndarray:
    """Which of the images (N, bool) a linear probe classifies right; fitted on train, its strength chosen on val."""
    from sklearn.linear_model import LogisticRegression

    fit, val = slice(TRAIN), slice(TRAIN, TRAIN + VAL)
    x_ND, class_N = features_ND.double().numpy(), m.class_N.numpy()
    x_ND = (x_ND - x_ND[fit].mean(0)) / (x_ND[fit].std(0) + 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 150 steps are close enough to the optimum
        models = [LogisticRegression(C=c, max_iter=150).fit(x_ND[fit], class_N[fit]) for c in (1e-2, 1e-1, 1)]
    best = max(models, key=lambda one: one.score(x_ND[val], class_N[val]))
    return best.predict(x_ND) == class_N


def by_device(m: Material, right_N: np.ndarray, rows: slice) -> list[float]:
    """The share of `rows` that are right, of each device."""
    return [float(right_N[rows][m.device_N.numpy()[rows] == index].mean()) for index in range(len(DEVICES))]


def accuracy(m: Material, right_N: np.ndarray) -> dict[str, float]:
    """On test, in %: over all, over each device, and the worse of these."""
    test = slice(TRAIN + VAL, None)
    levels = by_device(m, right_N, test)
    found = {"all": float(right_N[test].mean())} | dict(zip(DEVICES, levels, strict=True)) | {"worst": min(levels)}
    return {group: 100 * value for group, value in found.items()}


# ── What is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float]) -> str:
    """Mean ± standard error over the seeds."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}"


def lines(rows: list[dict[str, Any]], size: str) -> Iterator[list[str]]:
    """A line for each method, with what it changes against uniform on the same seeds; one for each teacher."""
    by: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["student"] in (size, ""):
            by.setdefault(row["method"], {}).setdefault(row["group"], {})[row["seed"]] = row["value"]
    for name in (*METHODS, *(f"teacher {one}" for one in TEACHERS)):
        if name not in by:
            continue
        seeds, base = sorted(by[name]["all"]), by.get("uniform", {})
        change = [by[name]["B"][s] - base["B"][s] for s in seeds if s in base.get("B", {})]
        levels = [spread([by[name][group][s] for s in seeds]) for group in ("all", *DEVICES)]
        yield [
            name,
            *levels,
            spread(change) if change and name in METHODS and name != "uniform" else "",
            str(len(seeds)),
        ]


def publish(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Write the record of what has run so far; its text."""
    head = ("method", "all", "device A", "device B", "B − uniform's", "seeds")
    parts = [
        "# Ways to weigh the losses, Fashion-MNIST with a simulated minority device",
        f"Made by `OMP_NUM_THREADS=1 .venv/bin/python bench/fairness.py` ({versions()}): test accuracy in %, mean ± "
        f"standard error over the seeds, {options.steps} steps of {BATCH} images.",
        (__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[0],
    ]
    for size, width in STUDENTS.items():
        if any(row["student"] == size for row in rows):
            parts += [f"## Student: {size}, {4 * width} features", table(head, lines(rows, size))]
    text = "\n\n".join(parts) + "\n"
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "fairness.md").write_text(text, encoding="utf-8")
    write_json(options.json, {"steps": options.steps, "versions": versions(), "rows": rows})
    return text


def main() -> None:
    cli = parser(__doc__ or "")
    cli.set_defaults(json=RESULTS / "fairness.json")
    cli.add_argument("--source", type=Path, default=simulate.FASHION, help=f"(default {simulate.FASHION})")
    cli.add_argument("--steps", type=int, default=1500, help="of each run (default 1500)")
    cli.add_argument("--seeds", type=int, default=5, help="(default 5)")
    cli.add_argument("--students", nargs="+", choices=STUDENTS, default=["small"], help="(default small)")
    cli.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default all)")
    cli.add_argument("--runs", type=Path, default=ROOT / "out" / "fairness.jsonl", help="(default out/fairness.jsonl)")
    cli.add_argument("--results", type=Path, default=RESULTS, help="folder of the record (default bench/results)")
    options = cli.parse_args()
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.runs.read_text().splitlines()] if options.runs.is_file() else []
    rows = [row for row in rows if row["steps"] == options.steps]
    done = {(row["student"], row["method"], row["seed"]) for row in rows}

    def keep(student: str, method: str, seed: int, found: dict[str, float]) -> None:
        new = [
            {"setting": "fashion", "student": student, "method": method, "seed": seed, "steps": options.steps}
            | {"group": group, "metric": "accuracy", "value": value}
            for group, value in found.items()
        ]
        rows.extend(new)
        with options.runs.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)

    for seed in range(options.seeds):
        m = material(seed, options.source, options.runs.with_name(f"fairness-{seed}.safetensors"))
        due = [pair for pair in itertools.product(options.students, options.methods) if (*pair, seed) not in done]
        if not due:
            continue
        goal, rights = goals(m), {name: probed(m, m.raw[name]) for name in TEACHERS}
        for name, right_N in rights.items():
            if ("", f"teacher {name}", seed) not in done:
                keep("", f"teacher {name}", seed, accuracy(m, right_N))
        val = slice(TRAIN, TRAIN + VAL)
        right_GT = torch.tensor([by_device(m, right_N, val) for right_N in rights.values()]).T
        for size, method in due:
            started = time.perf_counter()
            model = train(m, goal, right_GT, METHODS[method], STUDENTS[size], seed, options.steps)
            found = accuracy(m, probed(m, summaries(m, model)))
            keep(size, method, seed, found)
            said = "  ".join(f"{group} {value:.1f}" for group, value in found.items())
            print(f"{size} {method} seed {seed}, {time.perf_counter() - started:.0f} s: {said}", flush=True)
        publish(rows, options)
    print(publish(rows, options))


if __name__ == "__main__":
    main()
