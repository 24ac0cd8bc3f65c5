"""What linear erasure (LEACE) takes out of a teacher's features, judged on patients that the eraser has not seen.

`--data nih1000`: sex alone, or sex and age in years at once, and what that costs `abnormal`, on real chest X-rays, with
and without shrinkage. `--data fashion`: a simulated device and a simulated exposure on Fashion-MNIST (Debian package
dataset-fashion-mnist), where the eraser sees many more images than features.

Each repeat deals the patients out to three disjoint sets: one fits the eraser, one fits the probe (a fifth of it
chooses the probe's strength), one is read. On nih1000 the sets then change places, so that every patient is read once;
scores become ranks within a set before they are read together. Groups are read by the readouts of agglom's reports, as
AUROC; numbers by ridge regression and by the mean of the nearest neighbours, as Spearman's correlation.
"""

from __future__ import annotations

import gzip
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _common import ROOT, dinov2, encoded, interval, number, parser, table, versions, write_json
from scipy.stats import rankdata
from torch import Tensor

from agglom import config, plugins, probes
from agglom.core import groups, metrics
from agglom.core.metrics import Estimate
from agglom.core.types import Features, Teacher
from agglom.data import manifest as manifests
from agglom.data import simulate
from agglom.data.dataset import CLEAN, ImageDataset, collate

KINDS = ("linear", "knn")
NEIGHBOURS, WIDTH = 20, 384
PROBED, TESTED = 3000, 2000  # images of Fashion-MNIST
RIDGE = tuple(10.0**power for power in range(-1, 7))
DRAWS = 200  # of patients, for the interval of a correlation


class Eraser(NamedTuple):
    """What is erased at once, and how much the covariance is shrunk."""

    attributes: tuple[str, ...]
    shrink: float | str


@dataclass(frozen=True)
class Material:
    """Features of all images, whose they are, what may be erased (group ids or numbers, the first of them ids) and what
    is read (1 and 0, or numbers), `about` the rest."""

    teacher: Teacher
    raw_ND: Tensor
    patient_N: np.ndarray
    erase: dict[str, Tensor]
    read: dict[str, np.ndarray]
    about: str


def nih(path: Path, size: int) -> Material:
    """Every image of the manifest: the repeats deal the patients out anew, whatever their split."""
    job, base = config.load(ROOT / "configs" / "nih.yaml", [f"data.manifest={path}"])
    manifest = manifests.load(job.data, base)
    nobody_N = np.full(len(manifest), -1)
    dataset = ImageDataset(manifest, np.arange(len(manifest)), None, nobody_N, 0)
    chunks = np.array_split(np.arange(len(manifest)), len(manifest) // 32)
    images = (collate([dataset[int(row), CLEAN, (size, size)] for row in chunk]).pixels_BCHW for chunk in chunks)
    teacher = dinov2()
    sex = groups.encode("sex", manifest.attributes)
    age_N = manifest.numbers["age"]
    read = {"sex": (sex.index_N == sex.values.index("M")).double().numpy(), "age": age_N}
    read["abnormal"] = manifest.label_NL[:, 0]
    erase = {"sex": sex.index_N, "age": torch.as_tensor(age_N)}
    raw_ND = encoded(teacher, images, size)
    return Material(teacher, raw_ND, manifest.patient_N, erase, read, "sex and age are real")


def fashion(folder: Path, size: int, count: int) -> Material:
    """`count` images, half of them as taken by simulated device B, all of some simulated exposure; every image is its
    own patient."""
    files = [folder / f"{stem}-images-idx3-ubyte.gz" for stem in ("train", "t10k")]
    raw = [np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16) for file in files]
    images_NHW = np.concatenate(raw).reshape(-1, 28, 28)
    rng = np.random.default_rng(0)
    images_NHW = images_NHW[rng.permutation(len(images_NHW))[:count]].astype(np.float32) / 255
    device_N = rng.permutation(np.arange(len(images_NHW)) % 2)
    exposure_N = rng.uniform(0.5, 1.0, len(images_NHW))
    taken_N1HW = torch.from_numpy(simulate.simulate(images_NHW, device_N == 1, seed=0))[:, None]
    taken_N1HW = taken_N1HW * torch.as_tensor(exposure_N, dtype=torch.float32)[:, None, None, None]
    images = (chunk.expand(-1, 3, -1, -1) for chunk in taken_N1HW.split(64))
    teacher = dinov2()
    raw_ND = encoded(teacher, images, size)
    about = "device and exposure are simulated, and half of the images of every set are of device B"
    erase = {"device": torch.as_tensor(device_N), "exposure": torch.as_tensor(exposure_N)}
    read = {"device": device_N.astype(np.float64), "exposure": exposure_N}
    return Material(teacher, raw_ND, np.arange(len(raw_ND)), erase, read, about)


def deal(material: Material, shares: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Rows of disjoint random sets of patients; the groups of the first attribute keep their shares in each."""
    rng, place_P = np.random.default_rng(seed), np.full(int(material.patient_N.max()) + 1, len(shares))
    group_P = next(iter(material.erase.values())).numpy()[np.unique(material.patient_N, return_index=True)[1]]
    for group in np.unique(group_P):
        drawn = rng.permutation(np.flatnonzero(group_P == group))
        ends = [round(len(drawn) * share) for share in np.cumsum(shares)]
        for place, part in enumerate(np.split(drawn, ends)[:-1]):
            place_P[part] = place
    place_N = place_P[material.patient_N]
    return [np.flatnonzero(place_N == place) for place in range(len(shares))]


def erase(material: Material, rows: np.ndarray, eraser: Eraser) -> Tensor:
    """All features as the teacher `erased` emits them, fitted on `rows`."""
    options = {"attribute": list(eraser.attributes), "shrink": eraser.shrink}
    teacher = plugins.build("erased", "teachers", options, source=material.teacher, source_name="dinov2")

    def columns(chunk: Tensor) -> dict[str, Tensor]:
        return {name: material.erase[name][chunk] for name in eraser.attributes}

    chunks = torch.as_tensor(rows).split(4096)
    teacher.derived.fit((Features(material.raw_ND[c], None), columns(c)) for c in chunks)
    return teacher.derived.derive(Features(material.raw_ND, None)).summary_BD


def ranks(
    material: Material, features_ND: Tensor, label: str, kind: str, probe: np.ndarray, test: np.ndarray
) -> Tensor:
    """Ranks in (0, 1] of the test rows under a readout fitted on the probe rows, a fifth of their patients as val."""
    patients = np.random.default_rng(0).permutation(np.unique(material.patient_N[probe]))
    used = np.concatenate([probe, test])
    held = np.isin(material.patient_N[used], patients[: len(patients) // 5])
    tested = np.arange(len(used)) >= len(probe)
    known, masks = (features_ND[torch.as_tensor(used)], material.read[label][used]), (~held & ~tested, held)
    if is_number(material, label):
        scores_N = regressed(*known, material.patient_N[used], *masks, kind)
    elif kind == "linear":
        scores_N = probes.linear(*known, *masks).scores_N
    else:
        scores_N = probes.nearest(*known, material.patient_N[used], *masks, NEIGHBOURS).scores_N
    return torch.as_tensor(rankdata(scores_N[tested]) / len(test))


def is_number(material: Material, label: str) -> bool:
    return bool(np.setdiff1d(material.read[label][~np.isnan(material.read[label])], (0.0, 1.0)).size)


def regressed(
    x_ND: Tensor, y_N: np.ndarray, patient_N: np.ndarray, fit_N: np.ndarray, held_N: np.ndarray, kind: str
) -> np.ndarray:
    """A number as ridge regression predicts it, its strength chosen on `held_N`, or the nearest by cosine."""
    fit_N, held_N = fit_N & ~np.isnan(y_N), held_N & ~np.isnan(y_N)
    if kind == "knn":
        unit_ND = torch.nn.functional.normalize(x_ND, dim=1).numpy()
        other_NM = patient_N[:, None] != patient_N[fit_N][None]
        near_NK = np.argsort(-np.where(other_NM, unit_ND @ unit_ND[fit_N].T, -np.inf), 1)[:, :NEIGHBOURS]
        return y_N[fit_N][near_NK].mean(1)
    x_ND = x_ND.double().numpy()
    x_ND = (x_ND - x_ND[fit_N].mean(0)) / x_ND[fit_N].std(0).clip(1e-6)
    u, s, vt = np.linalg.svd(x_ND[fit_N], full_matrices=False)
    said = [x_ND @ vt.T @ (s / (s**2 + strength) * (u.T @ (y_N[fit_N] - y_N[fit_N].mean()))) for strength in RIDGE]
    return min(said, key=lambda one: np.square(one + y_N[fit_N].mean() - y_N)[held_N].mean())


def correlated(y: Tensor, scores: list[Tensor], patient: Tensor, seed: int) -> list[Estimate]:
    """Spearman's correlation of each of some scores with numbers, and the first less the second where there are two.

    The intervals are percentiles over resampled patients.
    """
    y_N, patient_N, found = y.numpy(), patient.numpy(), []
    known = ~np.isnan(y_N)
    y_N, patient_N, columns = y_N[known], patient_N[known], [one.numpy()[known] for one in scores]
    rows_of = [np.flatnonzero(patient_N == one) for one in np.unique(patient_N)]
    rng = np.random.default_rng(seed)

    def measured(rows: np.ndarray) -> list[float]:
        truth = rankdata(y_N[rows])
        values = [float(np.corrcoef(truth, rankdata(one[rows]))[0, 1]) for one in columns]
        return [*values, values[0] - values[1]]

    draws = np.array(
        [
            measured(np.concatenate([rows_of[i] for i in rng.integers(0, len(rows_of), len(rows_of))]))
            for _ in range(DRAWS)
        ]
    )
    nan = float("nan")
    for value, (lo, hi) in zip(
        measured(np.arange(len(y_N))), np.quantile(draws, (0.025, 0.975), axis=0).T, strict=True
    ):
        found.append(Estimate(value, float(lo), float(hi), len(y_N), nan, nan, len(rows_of), "ok", "bootstrap"))
    return found


def repeat(material: Material, shares: tuple[float, ...], rotate: bool, erasers: list[Eraser], seed: int) -> dict:
    """What is read on one partition: raw, erased, and raw minus erased on the same images, each with its interval."""
    sets = deal(material, shares, seed)
    turns = [(sets[i], sets[i - 2], sets[i - 1]) for i in range(3 if rotate else 1)]
    said: dict[tuple[str, str, Eraser | None], list[Tensor]] = {}
    for fitted, probe, test in turns:
        for eraser in (None, *erasers):
            x_ND = material.raw_ND if eraser is None else erase(material, fitted, eraser)
            for label, kind in itertools.product(material.read, KINDS):
                said.setdefault((label, kind, eraser), []).append(ranks(material, x_ND, label, kind, probe, test))
    tested = np.concatenate([test for _, _, test in turns])
    patient, found = torch.as_tensor(material.patient_N[tested]), {}
    for eraser, label, kind in itertools.product(erasers, material.read, KINDS):
        y = torch.as_tensor(material.read[label][tested])
        raw, erased = (torch.cat(said[label, kind, one]) for one in (None, eraser))
        if is_number(material, label):
            estimates = correlated(y, [raw, erased], patient, seed)
        else:
            estimates = [metrics.evaluate("auroc", y, one, patient) for one in (raw, erased)]
            estimates.append(metrics.paired("auroc", y, raw, erased, patient))
        for figure, estimate in zip(("raw", "erased", "drop"), estimates, strict=True):
            found[eraser, label, kind, figure] = estimate
    return found


def pooled(found: list[dict], eraser: Eraser, numbers: set[str]) -> list[dict]:
    """One row per label, readout and figure: means over the repeats.

    The mean of equally precise estimates from the same patients varies no more than each of them, so the mean of
    their intervals is a conservative interval of their mean.
    """
    rows = []
    for label, kind, figure in (key[1:] for key in found[0] if key[0] == eraser):
        estimates = [one[eraser, label, kind, figure] for one in found]
        null = 0.0 if figure == "drop" or label in numbers else 0.5
        value, lo, hi = (float(np.mean([getattr(e, name) for e in estimates])) for name in ("value", "lo", "hi"))
        rows.append(
            {"label": label, "readout": kind, "figure": figure, "value": value, "lo": lo, "hi": hi}
            | {"metric": "spearman" if label in numbers else "auroc"}
            | {"spread": float(np.std([e.value for e in estimates], ddof=1)), "null": null, "repeats": len(found)}
            | {"covers": sum(e.lo <= null <= e.hi for e in estimates), "above": sum(e.lo > null for e in estimates)}
            | {"n": estimates[0].n, "n_patients": estimates[0].n_patients, "status": estimates[0].status}
        )
    return rows


def summary(rows: list[dict], erased: tuple[str, ...]) -> str:
    """The rows of one eraser as a table, and the verdict."""
    head = ("read", "by", "features", "AUROC or Spearman", "SD of repeats", "null inside", "n", "patients", "status")
    lines = []
    for r in rows:
        what, covers = interval(r["value"], r["lo"], r["hi"]), f"{r['covers']} of {r['repeats']}"
        support = (number(r["spread"]), covers, r["n"], r["n_patients"], r["status"])
        lines.append((r["label"], r["readout"], r["figure"], what, *support))
    told = []
    for name in erased:
        drops = [r for r in rows if r["figure"] == "drop" and r["label"] == name]
        verdicts = [f"{r['readout']} {'yes' if r['lo'] > 0 else 'no'} ({r['above']} of {r['repeats']})" for r in drops]
        told.append(f"Significant drop of {name} (repeats that say so alone): {', '.join(verdicts)}")
    return f"{table(head, lines)}\n\n{'. '.join(told)}"


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--data", choices=("nih1000", "fashion"), default="nih1000")
    cli.add_argument("--manifest", type=Path, default=Path("../shared/data/nih1000/manifest.csv"), help="of nih1000")
    cli.add_argument("--source", type=Path, default=simulate.FASHION, help=f"of fashion (default {simulate.FASHION})")
    cli.add_argument("--repeats", type=int, help="random partitions (default 10)")
    cli.add_argument("--per-width", type=int, nargs="+", default=(10, 50, 100), help="eraser's images ÷ width, fashion")
    cli.add_argument("--size", type=int, help="pixels (default 112; fashion 42)")
    options = cli.parse_args()
    torch.set_grad_enabled(False)
    if options.data == "nih1000":
        repeats, rotate = options.repeats or 10, True
        material, settings = nih(options.manifest, options.size or 112), [(1 / 3, 1 / 3, 1 / 3)]
        strengths: tuple[float | str, ...] = (0.0, "auto")
    else:
        repeats, rotate, strengths = options.repeats or 10, False, (0.0,)
        sizes = [(WIDTH * ratio, PROBED, TESTED) for ratio in options.per_width]
        total = max(sum(size) for size in sizes)
        material = fashion(options.source, options.size or 42, total)
        settings = [tuple(part / total for part in size) for size in sizes]
    names = tuple(material.erase)
    erasers = [Eraser(several, strength) for several in (names[:1], names) for strength in strengths]
    print(f"{material.about}; {len(np.unique(material.patient_N))} patients, {repeats} repeats")
    figures = []
    numbers = {label for label in material.read if is_number(material, label)}
    for shares in settings:
        found = [repeat(material, shares, rotate, erasers, seed) for seed in range(repeats)]
        images = round(shares[0] * len(material.raw_ND))
        for eraser in erasers:
            rows = pooled(found, eraser, numbers)
            title = f"{' and '.join(eraser.attributes)} erased on about {images} images ({images / WIDTH:.1f} × width)"
            title += f", shrink {eraser.shrink}"
            about = {"title": title, "erased": eraser.attributes, "shrink": eraser.shrink, "eraser_images": images}
            figures.append(about | {"text": summary(rows, eraser.attributes), "rows": rows})
            print(f"\n{title}\n{figures[-1]['text']}", flush=True)
    about = {"data": options.data, "about": material.about}
    write_json(options.json, about | {"repeats": repeats, "versions": versions(), "figures": figures})


if __name__ == "__main__":
    main()
