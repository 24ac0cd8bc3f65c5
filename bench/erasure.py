"""What linear erasure (LEACE) takes out of a teacher's features, judged on patients that the eraser has not seen.

`--data nih1000`: sex, and what its erasure costs `abnormal`, on real chest X-rays. `--data fashion`: a simulated device
on Fashion-MNIST (Debian package dataset-fashion-mnist), where the eraser sees many more images than features.

Each repeat deals the patients out to three disjoint sets: one fits the eraser, one fits the probe (a fifth of it
chooses the probe's strength), one is read. On nih1000 the sets then change places, so that every patient is read once;
scores become ranks within a set before they are read together. Both readouts are those of agglom's reports.
"""

from __future__ import annotations

import gzip
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _common import ROOT, dinov2, encoded, interval, number, parser, table, versions, write_json
from scipy.stats import rankdata
from torch import Tensor

from agglom import config, plugins, probes
from agglom.core import groups, metrics
from agglom.core.types import Features, Teacher
from agglom.data import manifest as manifests
from agglom.data import simulate
from agglom.data.dataset import CLEAN, ImageDataset, collate

KINDS = ("linear", "knn")
NEIGHBOURS, WIDTH = 20, 384
PROBED, TESTED = 3000, 2000  # images of Fashion-MNIST


@dataclass(frozen=True)
class Material:
    """Features of all images, whose they are, what is erased (group ids) and what is read (1, 0), `about` the rest."""

    teacher: Teacher
    raw_ND: Tensor
    patient_N: np.ndarray
    erase_N: Tensor
    read: dict[str, np.ndarray]
    about: str


def nih(path: Path, size: int) -> Material:
    """Every image of the manifest: the repeats deal the patients out anew, whatever their split."""
    job, base = config.load(ROOT / "configs" / "nih.yaml", [f"data.manifest={path}"])
    manifest = manifests.load(job.data, base)
    nobody_N = np.full(len(manifest), -1)
    dataset = ImageDataset(manifest, np.arange(len(manifest)), size, None, nobody_N, 0)
    chunks = np.array_split(np.arange(len(manifest)), len(manifest) // 32)
    images = (collate([dataset[int(row), CLEAN] for row in chunk]).pixels_BCHW for chunk in chunks)
    teacher = dinov2()
    sex = groups.encode("sex", manifest.attributes)
    read = {"sex": (sex.index_N == sex.values.index("M")).double().numpy(), "abnormal": manifest.label_NL[:, 0]}
    return Material(teacher, encoded(teacher, images, size), manifest.patient_N, sex.index_N, read, "sex is real")


def fashion(folder: Path, size: int, count: int) -> Material:
    """`count` images, half of them as taken by simulated device B; every image is its own patient."""
    files = [folder / f"{stem}-images-idx3-ubyte.gz" for stem in ("train", "t10k")]
    raw = [np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16) for file in files]
    images_NHW = np.concatenate(raw).reshape(-1, 28, 28)
    rng = np.random.default_rng(0)
    images_NHW = images_NHW[rng.permutation(len(images_NHW))[:count]].astype(np.float32) / 255
    device_N = rng.permutation(np.arange(len(images_NHW)) % 2)
    taken_N1HW = torch.from_numpy(simulate.simulate(images_NHW, device_N == 1, seed=0))[:, None]
    images = (chunk.expand(-1, 3, -1, -1) for chunk in taken_N1HW.split(64))
    teacher, device = dinov2(), torch.as_tensor(device_N)
    raw_ND = encoded(teacher, images, size)
    about = "the device is simulated, and half of the images of every set are of device B"
    return Material(teacher, raw_ND, np.arange(len(raw_ND)), device, {"device": device_N.astype(np.float64)}, about)


def deal(material: Material, shares: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Rows of disjoint random sets of patients; the erased groups keep their shares in each."""
    rng, place_P = np.random.default_rng(seed), np.full(int(material.patient_N.max()) + 1, len(shares))
    group_P = material.erase_N.numpy()[np.unique(material.patient_N, return_index=True)[1]]
    for group in np.unique(group_P):
        drawn = rng.permutation(np.flatnonzero(group_P == group))
        ends = [round(len(drawn) * share) for share in np.cumsum(shares)]
        for place, part in enumerate(np.split(drawn, ends)[:-1]):
            place_P[part] = place
    place_N = place_P[material.patient_N]
    return [np.flatnonzero(place_N == place) for place in range(len(shares))]


def erase(material: Material, rows: np.ndarray, shrink: float) -> Tensor:
    """All features as the teacher `erased` emits them, fitted on `rows`."""
    options = {"attribute": "bench", "shrink": shrink}
    teacher = plugins.build("erased", "teachers", options, source=material.teacher, source_name="dinov2")
    chunks, grid = torch.as_tensor(rows).split(4096), (0, 0)
    teacher.derived.fit((Features(material.raw_ND[c], None, grid), material.erase_N[c]) for c in chunks)
    return teacher.derived.derive(Features(material.raw_ND, None, grid)).summary_BD


def ranks(
    material: Material, features_ND: Tensor, label: str, kind: str, probe: np.ndarray, test: np.ndarray
) -> Tensor:
    """Ranks in (0, 1] of the test rows under a readout fitted on the probe rows, a fifth of their patients as val."""
    patients = np.random.default_rng(0).permutation(np.unique(material.patient_N[probe]))
    used = np.concatenate([probe, test])
    held = np.isin(material.patient_N[used], patients[: len(patients) // 5])
    tested = np.arange(len(used)) >= len(probe)
    known, masks = (features_ND[torch.as_tensor(used)], material.read[label][used]), (~held & ~tested, held)
    if kind == "linear":
        readout = probes.linear(*known, *masks)
    else:
        readout = probes.nearest(*known, material.patient_N[used], *masks, NEIGHBOURS)
    return torch.as_tensor(rankdata(readout.scores_N[tested]) / len(test))


def repeat(material: Material, shares: tuple[float, ...], rotate: bool, shrink: float, seed: int) -> dict:
    """AUROC on one partition: raw, erased, and raw minus erased on the same images, each with its interval."""
    sets = deal(material, shares, seed)
    turns = [(sets[i], sets[i - 2], sets[i - 1]) for i in range(3 if rotate else 1)]
    said: dict[tuple[str, str, str], list[Tensor]] = {}
    for eraser, probe, test in turns:
        for name, x_ND in (("raw", material.raw_ND), ("erased", erase(material, eraser, shrink))):
            for label, kind in itertools.product(material.read, KINDS):
                said.setdefault((label, kind, name), []).append(ranks(material, x_ND, label, kind, probe, test))
    tested = np.concatenate([test for _, _, test in turns])
    patient, found = torch.as_tensor(material.patient_N[tested]), {}
    for label, kind in itertools.product(material.read, KINDS):
        y = torch.as_tensor(material.read[label][tested])
        raw, erased = (torch.cat(said[label, kind, name]) for name in ("raw", "erased"))
        found[label, kind, "raw"] = metrics.evaluate("auroc", y, raw, patient)
        found[label, kind, "erased"] = metrics.evaluate("auroc", y, erased, patient)
        found[label, kind, "drop"] = metrics.paired("auroc", y, raw, erased, patient)
    return found


def pooled(found: list[dict]) -> list[dict]:
    """One row per label, readout and figure: means over the repeats.

    The mean of equally precise estimates from the same patients varies no more than each of them, so the mean of
    their intervals is a conservative interval of their mean.
    """
    rows = []
    for label, kind, figure in found[0]:
        estimates, null = [one[label, kind, figure] for one in found], 0.0 if figure == "drop" else 0.5
        value, lo, hi = (float(np.mean([getattr(e, name) for e in estimates])) for name in ("value", "lo", "hi"))
        rows.append(
            {"label": label, "readout": kind, "figure": figure, "value": value, "lo": lo, "hi": hi}
            | {"spread": float(np.std([e.value for e in estimates], ddof=1)), "null": null, "repeats": len(found)}
            | {"covers": sum(e.lo <= null <= e.hi for e in estimates), "above": sum(e.lo > null for e in estimates)}
            | {"n": estimates[0].n, "n_patients": estimates[0].n_patients, "status": estimates[0].status}
        )
    return rows


def summary(rows: list[dict], erased: str) -> str:
    """The rows of one eraser as a table, and the verdict."""
    head, lines = ("read", "by", "features", "AUROC", "SD of repeats", "null inside", "n", "patients", "status"), []
    for r in rows:
        what, covers = interval(r["value"], r["lo"], r["hi"]), f"{r['covers']} of {r['repeats']}"
        support = (number(r["spread"]), covers, r["n"], r["n_patients"], r["status"])
        lines.append((r["label"], r["readout"], r["figure"], what, *support))
    drops = [r for r in rows if r["figure"] == "drop" and r["label"] == erased]
    verdicts = [f"{r['readout']} {'yes' if r['lo'] > 0 else 'no'} ({r['above']} of {r['repeats']})" for r in drops]
    return f"{table(head, lines)}\n\nSignificant drop of {erased} (repeats that say so alone): {', '.join(verdicts)}"


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--data", choices=("nih1000", "fashion"), default="nih1000")
    cli.add_argument("--manifest", type=Path, default=Path("../shared/data/nih1000/manifest.csv"), help="of nih1000")
    cli.add_argument("--source", type=Path, default=simulate.FASHION, help=f"of fashion (default {simulate.FASHION})")
    cli.add_argument("--repeats", type=int, help="random partitions (default 40; fashion 10)")
    cli.add_argument("--shrink", type=float, default=0.0, help="of the eraser, as of the teacher (default 0)")
    cli.add_argument("--per-width", type=int, nargs="+", default=(10, 50, 100), help="eraser's images ÷ width, fashion")
    cli.add_argument("--size", type=int, help="pixels (default 112; fashion 42)")
    options = cli.parse_args()
    torch.set_grad_enabled(False)
    if options.data == "nih1000":
        repeats, erased, rotate = options.repeats or 40, "sex", True
        material, settings = nih(options.manifest, options.size or 112), [(1 / 3, 1 / 3, 1 / 3)]
    else:
        repeats, erased, rotate = options.repeats or 10, "device", False
        sizes = [(WIDTH * ratio, PROBED, TESTED) for ratio in options.per_width]
        total = max(sum(size) for size in sizes)
        material = fashion(options.source, options.size or 42, total)
        settings = [tuple(part / total for part in size) for size in sizes]
    print(f"{material.about}; {len(np.unique(material.patient_N))} patients, {repeats} repeats")
    figures = []
    for shares in settings:
        rows = pooled([repeat(material, shares, rotate, options.shrink, seed) for seed in range(repeats)])
        images = round(shares[0] * len(material.raw_ND))
        title = f"eraser on about {images} images ({images / WIDTH:.1f} × width)"
        figures.append({"title": title, "eraser_images": images, "text": summary(rows, erased), "rows": rows})
        print(f"\n{title}\n{figures[-1]['text']}", flush=True)
    settings = {"data": options.data, "about": material.about, "erased": erased, "shrink": options.shrink}
    write_json(options.json, settings | {"repeats": repeats, "versions": versions(), "figures": figures})


if __name__ == "__main__":
    main()
