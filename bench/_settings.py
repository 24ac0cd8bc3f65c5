"""The settings of bench/fairness.py: images with groups, the features that teachers have of them, and hard cases.

Shape suffixes: N images, L labels, D features, M images that are there twice.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from _common import ROOT, dinov2, encoded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from agglom import plugins
from agglom.core import schedule
from agglom.core.erase import CrossMoments, leace
from agglom.core.normalise import Moments
from agglom.data import readers, simulate
from agglom.data.acquisition import simulated
from agglom.data.dataset import view_random
from agglom.measure import NUISANCE

TRAIN, VAL, TEST = 10_000, 2_000, 5_000
TUNING, HELD = "tuning, on validation", 10_000  # a case, and its validation images
MAJORITY, BALANCED, NOISE = 20_000, 1_500, (1_000, 200)
TWINS = 128  # images of each group of which there is a simulated acquisition
WIDTH, PIXELS = 32, 64
TRUNK = 32, WIDTH  # of the teacher `majority`: channels of the first layer, features
NIH = ROOT.parent / "shared" / "data" / "nih1000"
NIH_PIXELS = 112
FOLDS = 5


@dataclass(frozen=True)
class Material:
    """Images (N, 1, H, W), labels (N, L) of 0 and 1, and the groups they are of, by which methods are judged; `seen_N`
    are those that methods are told, −1 where they are not. `raw` are the features of each teacher, `twin_raw` those of
    other acquisitions of the images `twin_M`. `fit`, `val` and `test` are rows. `start`: the weights of the trunk of
    the teacher `majority`, from which a student may start."""

    pixels_NCHW: Tensor
    label_NL: Tensor
    group_N: Tensor
    groups: tuple[str, ...]
    seen_N: Tensor
    values: tuple[str, ...]
    patient_N: Tensor
    fit: Tensor
    val: Tensor
    test: Tensor
    raw: dict[str, Tensor]
    twin_M: Tensor
    twin_raw: dict[str, Tensor]
    classes: bool = True
    start: dict[str, Tensor] = field(default_factory=dict)


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Made once, then read."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, beside)
        beside.replace(path)
    return load_file(path)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


def twins(pixels_NCHW: Tensor, rows_M: Tensor, seed: int) -> Tensor:
    """Other acquisitions of some images, as agglom takes them to measure noise."""
    taken = [simulated(pixels_NCHW[row], NUISANCE.kinds, view_random(seed, row, 0)) for row in rows_M.tolist()]
    return torch.stack(taken)


# ── (A) Fashion-MNIST with a simulated device ──


class Trunk(nn.Sequential):
    """Three strided convolutions and the mean over what is left of the image."""

    def __init__(self, width: int, out: int) -> None:
        layers: list[nn.Module] = []
        for one, two in itertools.pairwise((1, width, 2 * width, out)):
            layers += [nn.Conv2d(one, two, 3, 2, 1), nn.BatchNorm2d(two), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def fashion(seed: int, source: Path, folder: Path, val_images: int = VAL) -> Material:
    """Device B takes 12 % of the training images and half of the others. Images of pure noise are there for a hard
    case and are of no part."""
    found = kept(folder / f"fashion-{seed}-{val_images}.safetensors", lambda: _fashion(seed, source, val_images))
    one_hot_NL = F.one_hot(found["class"], 10).double()
    rows = torch.arange(len(one_hot_NL))
    fit, val, test, _ = rows.split([TRAIN, val_images, TEST, sum(NOISE)])
    groups, group_N = ("A", "B"), found["device"]
    told = found["pixels"], one_hot_NL, group_N, groups, group_N, groups, rows, fit, val, test
    taught = _part(found, "raw/"), found["twins"], _part(found, "twin/")
    return Material(*told, *taught, start=_part(found, "start/"))


def _fashion(seed: int, source: Path, val_images: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)

    def read(stem: str) -> tuple[np.ndarray, np.ndarray]:
        images = simulate._idx(source / f"{stem}-images-idx3-ubyte.gz").astype(np.float32) / 255
        return images, simulate._idx(source / f"{stem}-labels-idx1-ubyte.gz").astype(np.int64)

    (images, classes), (test_images, test_classes) = read("train"), read("t10k")
    order, held = rng.permutation(len(images)), rng.permutation(len(test_images))[:TEST]
    own, theirs = np.split(order, [TRAIN + val_images])
    device_N = np.concatenate([rng.random(TRAIN) < simulate.SHARE_B["train"], rng.random(val_images + TEST) < 0.5])
    taken = simulate.simulate(np.concatenate([images[own], test_images[held]]), device_N, seed)
    noise = rng.random((sum(NOISE), *taken.shape[1:]), dtype=np.float32)
    pixels_NCHW = torch.as_tensor(np.concatenate([taken, noise]))[:, None]
    drawn = rng.integers(0, 10, sum(NOISE))
    class_N = torch.as_tensor(np.concatenate([classes[own], test_classes[held], drawn]))
    group_N = torch.as_tensor(np.concatenate([device_N.astype(np.int64), np.full(sum(NOISE), 2)]))
    in_train = torch.arange(len(group_N)) < TRAIN
    in_train[TRAIN + val_images + TEST : TRAIN + val_images + TEST + NOISE[0]] = True
    rows_M = torch.cat([torch.nonzero(in_train & (group_N == group))[:TWINS, 0] for group in range(3)])
    both_NCHW = torch.cat([pixels_NCHW, twins(pixels_NCHW, rows_M, seed)])
    found = {"pixels": pixels_NCHW, "class": class_N, "device": group_N, "twins": rows_M}
    raw = {}
    for name, width, part in (("majority", TRUNK[0], (0, MAJORITY)), ("balanced", 16, (MAJORITY, MAJORITY + BALANCED))):
        rows = theirs[slice(*part)]
        device_B = rng.random(len(rows)) < 0.5 if name == "balanced" else np.zeros(len(rows), bool)
        seen = torch.as_tensor(simulate.simulate(images[rows], device_B, seed + 1))[:, None]
        net = _taught(seen, torch.as_tensor(classes[rows]), width, seed)
        with torch.no_grad():
            raw[name] = torch.cat([net(chunk) for chunk in both_NCHW.split(500)])
        if name == "majority":
            found |= {f"start/{key}": one for key, one in net[0].state_dict().items()}
    lite0 = plugins.build("packaged", "teachers", {"model": "efficientnet_lite0"})
    raw["lite0"] = encoded(lite0, (chunk.expand(-1, 3, -1, -1) for chunk in both_NCHW.split(250)), PIXELS)
    found |= {f"raw/{name}": one_ND[: len(class_N)] for name, one_ND in raw.items()}
    return found | {f"twin/{name}": one_ND[len(class_N) :] for name, one_ND in raw.items()}


def _taught(seen_BCHW: Tensor, class_B: Tensor, width: int, seed: int) -> nn.Sequential:
    """A trunk that has learnt the classes of some images, and a norm, in which ViTs end, too."""
    torch.manual_seed(seed)
    net = nn.Sequential(Trunk(width, WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False))
    head, steps = nn.Linear(WIDTH, 10), 1200
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule.lr(step, steps=steps, warmup=steps // 4, peak=4e-3, end=1e-5)
        rows_B = torch.randint(len(seen_BCHW), (128,))
        optimizer.zero_grad()
        F.cross_entropy(head(net(seen_BCHW[rows_B])), class_B[rows_B]).backward()
        optimizer.step()
    return net.eval()


# ── Hard cases of (A) ──


def wrong(m: Material, seed: int) -> Material:
    """20 % of the annotations of train and val name the other device."""
    flip_N = torch.rand(len(m.seen_N), generator=torch.Generator().manual_seed(seed)) < 0.2
    return replace(m, seen_N=torch.where(flip_N, 1 - m.seen_N, m.seen_N))


def missing(m: Material, seed: int) -> Material:
    """30 % of the annotations of train and val are not there."""
    gone_N = torch.rand(len(m.seen_N), generator=torch.Generator().manual_seed(seed)) < 0.3
    return replace(m, seen_N=m.seen_N.masked_fill(gone_N, -1))


def noise_group(m: Material, seed: int) -> Material:
    """A third group, 9 % of train and val, is noise: its classes are drawn, and no loss can fall there."""
    train, val = torch.arange(len(m.group_N) - sum(NOISE), len(m.group_N)).split(NOISE)
    values = ("A", "B", "noise")
    return replace(m, values=values, groups=values, fit=torch.cat([m.fit, train]), val=torch.cat([m.val, val]))


def bad_teacher(m: Material, seed: int) -> Material:
    """A fourth teacher is noise: good for nobody."""
    generator = torch.Generator().manual_seed(seed)
    raw, twin = (torch.randn(len(one["lite0"]), WIDTH, generator=generator) for one in (m.raw, m.twin_raw))
    return replace(m, raw=m.raw | {"random": raw}, twin_raw=m.twin_raw | {"random": twin})


def crossings(m: Material, seed: int) -> Material:
    """Device × six sites from 45 to .4 % of the images: twelve groups, the smallest of about five train images."""
    share = torch.tensor([0.45, 0.3, 0.15, 0.08, 0.016, 0.004])
    site_N = torch.multinomial(share, len(m.group_N), replacement=True, generator=torch.Generator().manual_seed(seed))
    values = tuple(f"{device}|{site}" for device in "AB" for site in "uvwxyz")
    group_N = torch.where(m.group_N < 2, 6 * m.group_N + site_N, -1)
    return replace(m, group_N=group_N, groups=values, seen_N=group_N, values=values)


def tuning(m: Material, seed: int) -> Material:
    """What is chosen may see no test image: of many for validation all but some play their part."""
    val, test = m.val.split([VAL, HELD - VAL])
    return replace(m, val=val, test=test)


CASES: dict[str, Callable[[Material, int], Material]] = {
    "": lambda m, seed: m,
    TUNING: tuning,
    "20 % wrong annotations": wrong,
    "30 % missing annotations": missing,
    "a group of noise": noise_group,
    "a teacher of noise": bad_teacher,
    "twelve crossings": crossings,
}


# ── (B) chest X-rays of real patients ──


def nih(seed: int, folder: Path) -> Material:
    """The 776 radiographs of nih1000 with sex × view. A seed is a fold: of five parts of the patients one is for test,
    the next for validation, so that five seeds in a row test each patient once."""
    with (NIH / "manifest.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["sex"] and row["view"]]
    names, patient_N = np.unique([row["patient_id"] for row in table], return_inverse=True)
    part_I = (np.random.default_rng(0).permutation(len(names)) * FOLDS // len(names) - seed) % FOLDS
    part_N = torch.as_tensor(part_I[patient_N])
    test, val, fit = (torch.nonzero(part)[:, 0] for part in (part_N == 0, part_N == 1, part_N > 1))
    values = ("F|AP", "F|PA", "M|AP", "M|PA")
    group_N = torch.tensor([values.index(f"{row['sex']}|{row['view']}") for row in table])
    found = kept(folder / "nih.safetensors", lambda: _nih(table))
    raw, twin = _part(found, "raw/"), _part(found, "twin/")
    # LEACE of sex, fitted on the train patients of this seed.
    width = raw["dinov2"].shape[1]
    sex = CrossMoments.empty(width).update(raw["dinov2"][fit], group_N[fit] // 2)
    mean_D, matrix_DD = leace(Moments.empty(width).update(raw["dinov2"][fit]), {"sex": sex}, shrink=0.1)
    for of in (raw, twin):
        of["erased"] = (of["dinov2"].double() - (of["dinov2"].double() - mean_D) @ matrix_DD.T).float()
    in_fit_N = torch.zeros(len(table), dtype=torch.bool).index_fill(0, fit, True)
    twin_M = torch.nonzero(in_fit_N)[:, 0]
    label_NL = torch.tensor([[float(row["abnormal"])] for row in table], dtype=torch.float64)
    told = found["pixels"], label_NL, group_N, values, group_N, values, torch.as_tensor(patient_N), fit, val, test
    return Material(*told, raw, twin_M, {name: one_ND[twin_M] for name, one_ND in twin.items()}, classes=False)


def _nih(table: list[dict[str, str]]) -> dict[str, Tensor]:
    pixels_NCHW = torch.stack(
        [torch.from_numpy(readers.read(NIH / row["image"]).mean(0, keepdims=True)) for row in table]
    )
    rows = torch.arange(len(table))
    found = {"pixels": pixels_NCHW}
    teachers = {
        "dinov2": dinov2(),
        "lite0": plugins.build("packaged", "teachers", {"model": "efficientnet_lite0"}),
        "mobilenet": plugins.build("packaged", "teachers", {"model": "mobilenetv2"}),
    }
    for part, images in (("raw", pixels_NCHW), ("twin", twins(pixels_NCHW, rows, 0))):
        for name, teacher in teachers.items():
            chunks: Iterator[Tensor] = (chunk.expand(-1, 3, -1, -1) for chunk in images.split(100))
            found[f"{part}/{name}"] = encoded(teacher, chunks, NIH_PIXELS)
    return found
