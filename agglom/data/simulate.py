"""Real images with a simulated device: groups with a known cause, where real ones cannot be had.

`python -m agglom.data.simulate digits OUT` writes scikit-learn's handwritten digits, `… fashion OUT` Fashion-MNIST
(Debian package dataset-fashion-mnist), as PNG files and a manifest. Device A leaves an image as it is; device B,
12 % of the training images and half of the others, blurs it, inverts and compresses its contrast, and adds noise.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from agglom.errors import AgglomError, ConfigError, DataError

SHARE_B = {"train": 0.12, "val": 0.5, "test": 0.5}
DIGIT_SIZE = 64
TOPS = (0, 2, 4, 6)  # Fashion-MNIST's T-shirt, pullover, coat and shirt
FASHION = Path("/usr/share/datasets/fashion-mnist")


def simulate(images_NHW: np.ndarray, device_B: np.ndarray, seed: int) -> np.ndarray:
    """The images as taken: where `device_B` (N, bool) is true by simulated device B, else unchanged.

    Images and result are float32 in [0, 1]. What happens to image i depends on (seed, i) and its own pixels alone.
    """
    from scipy.ndimage import gaussian_filter

    taken_NHW = np.array(images_NHW, dtype=np.float32)
    blur = taken_NHW.shape[1] / 32
    for index in np.flatnonzero(device_B):
        noise_HW = np.random.default_rng((seed, int(index))).normal(0.0, 0.06, taken_NHW.shape[1:])
        compressed_HW = 0.75 - 0.5 * gaussian_filter(taken_NHW[index], blur)
        taken_NHW[index] = np.clip(compressed_HW + noise_HW, 0.0, 1.0)
    return taken_NHW


def digits(out: Path, *, train: int = 600, val: int = 150, test: int = 250, seed: int = 0) -> Counter[tuple[str, str]]:
    """Write scikit-learn's digits, upsampled to 64×64, with label `even`; returns counts of (split, device).

    Raises:
        ConfigError: if there are fewer images than asked for.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    order_N = np.random.default_rng(seed).permutation(len(source.target))
    chosen_N = order_N[: _total(train, val, test, len(order_N))]
    side = (DIGIT_SIZE, DIGIT_SIZE)
    # Mode F keeps the 17 grey levels exact; bicubic overshoots at edges.
    large = [Image.fromarray((source.images[i] / 16).astype(np.float32)) for i in chosen_N]
    images_NHW = np.stack([np.asarray(image.resize(side, Image.Resampling.BICUBIC)) for image in large]).clip(0, 1)
    split = ["train"] * train + ["val"] * val + ["test"] * test
    return _write(out, images_NHW, split, "even", source.target[chosen_N] % 2 == 0, seed)


def fashion(
    out: Path, *, train: int = 10000, val: int = 2000, test: int = 5000, seed: int = 0, source: Path = FASHION
) -> Counter[tuple[str, str]]:
    """Write Fashion-MNIST, 28×28, with label `top` (clothes of the upper body); returns counts of (split, device).

    Train and val come from its training images, test from its test images.

    Raises:
        ConfigError: if there are fewer images than asked for.
        DataError: if the files of `source` are absent or broken.
    """
    images, labels, split = [], [], []
    for stem, sizes in (("train", {"train": train, "val": val}), ("t10k", {"test": test})):
        target_N = _idx(source / f"{stem}-labels-idx1-ubyte.gz")
        order_N = np.random.default_rng((seed, len(stem))).permutation(len(target_N))
        chosen_N = order_N[: _total(*sizes.values(), len(order_N))]
        images.append(_idx(source / f"{stem}-images-idx3-ubyte.gz")[chosen_N])
        labels.append(target_N[chosen_N])
        split += [name for name, size in sizes.items() for _ in range(size)]
    images_NHW = np.concatenate(images).astype(np.float32) / 255
    return _write(out, images_NHW, split, "top", np.isin(np.concatenate(labels), TOPS), seed)


def _total(*sizes_and_available: int) -> int:
    *sizes, available = sizes_and_available
    if min(sizes) < 1 or sum(sizes) > available:
        raise ConfigError(f"asked for {' + '.join(map(str, sizes))} images: each at least 1, in all up to {available}")
    return sum(sizes)


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's IDX format (magic 0, 0, type 8, number of axes; big-endian sizes; data)."""
    try:
        raw = gzip.decompress(path.read_bytes())
        axes = raw[3]
        shape = np.frombuffer(raw, ">u4", count=axes, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except FileNotFoundError:
        raise DataError(
            f"{path}: does not exist. Install the Debian package dataset-fashion-mnist or set --source"
        ) from None
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise DataError(f"{path}: not a gzipped IDX file of bytes ({error}). Install it again") from error


def _write(
    out: Path, images_NHW: np.ndarray, split: list[str], label: str, label_N: np.ndarray, seed: int
) -> Counter[tuple[str, str]]:
    split_N = np.array(split)
    rng = np.random.default_rng((seed, 1))
    device_B = np.zeros(len(split_N), bool)
    for name, share in SHARE_B.items():
        rows = np.flatnonzero(split_N == name)
        device_B[rng.permutation(rows)[: round(share * rows.size)]] = True
    taken_NHW = (simulate(images_NHW, device_B, seed) * 255).round().astype(np.uint8)

    (out / "images").mkdir(parents=True, exist_ok=True)
    counts: Counter[tuple[str, str]] = Counter()
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "patient", "split", "device", label])
        for index, name in enumerate(split):
            image, device = f"images/{index:05d}.png", "B" if device_B[index] else "A"
            Image.fromarray(taken_NHW[index]).save(out / image)
            writer.writerow([image, f"p{index:05d}", name, device, int(label_N[index])])
            counts[name, device] += 1
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m agglom.data.simulate",
        description="Write real images with a simulated device and their manifest.",
    )
    sources = parser.add_subparsers(dest="source_name", required=True)
    for name, make, sizes in (("digits", digits, (600, 150, 250)), ("fashion", fashion, (10000, 2000, 5000))):
        sub = sources.add_parser(name, help=f"write {name} as PNG files and a manifest")
        sub.set_defaults(make=make)
        sub.add_argument("out", type=Path, metavar="OUT")
        for split, size in zip(SHARE_B, sizes, strict=True):
            sub.add_argument(f"--{split}", type=int, default=size, help=f"number of {split} images (default {size})")
        sub.add_argument("--seed", type=int, default=0)
        if make is fashion:
            sub.add_argument("--source", type=Path, default=FASHION, help=f"folder of its files (default {FASHION})")
    options = vars(parser.parse_args(argv))
    name, make = options.pop("source_name"), options.pop("make")
    try:
        counts = make(**options)
    except AgglomError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"wrote {sum(counts.values())} images of {name} to {options['out'] / 'manifest.csv'}")
    print(f"{'':7}{'simulated device A':>20}{'simulated device B':>20}")
    for split in SHARE_B:
        print(f"{split:7}{counts[split, 'A']:20}{counts[split, 'B']:20}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
