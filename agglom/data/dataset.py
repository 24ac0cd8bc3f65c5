"""From (row, view) to pixels. A view is a function of (seed, row, view) alone: the same in any worker, rank and run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from agglom.core.types import Batch
from agglom.data.manifest import Manifest
from agglom.data.readers import decode
from agglom.errors import DataError
from agglom.job import Augment

CLEAN = -1
ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10


class ImageDataset(Dataset[Batch]):
    """The images of `rows` of the manifest, at `size`×`size`.

    Indexed by (manifest row, view); view −1 is the whole image, resized without crop, whatever `augment` says.
    `group_N` holds the group id of every row of the manifest, −1 where it is not annotated.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: Sequence[int] | np.ndarray,
        size: int,
        augment: Augment | None,
        group_N: Tensor | np.ndarray,
        seed: int,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.manifest = manifest
        self.rows = rows
        self.size = size
        self.augment = augment
        self.group_N = torch.as_tensor(group_N, dtype=torch.int64)
        self.label_NL = torch.as_tensor(manifest.label_NL) if manifest.labels else None
        self.seed = seed
        self.value_range = value_range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int]) -> Batch:
        """One sample as a Batch without its first axis: pixels (3, size, size).

        Raises:
            DataError: naming the file and its row of the manifest.
        """
        row, view = index
        try:
            image_CHW = torch.from_numpy(decode(self.manifest.images[row], self.value_range))
        except DataError as error:
            raise DataError(f"{error} ({self.manifest.where(row)})") from error
        if view == CLEAN or self.augment is None:
            pixels_CHW = resize(image_CHW, self.size)
        else:
            pixels_CHW = augmented(image_CHW, self.size, self.augment, view_random(self.seed, row, view))
        return Batch(
            pixels_CHW.expand(3, -1, -1),
            torch.tensor(row),
            torch.tensor(view),
            self.group_N[row],
            None if self.label_NL is None else self.label_NL[row],
        )


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of `ImageDataset` as one Batch."""
    pixels, row, view, group, label = zip(*samples, strict=True)
    return Batch(
        torch.stack(pixels),
        torch.stack(row),
        torch.stack(view),
        torch.stack(group),
        None if label[0] is None else torch.stack(label),
    )


def view_random(seed: int, row: int, view: int) -> random.Random:
    """The source of randomness of one view. Seeding with text goes through SHA-512, so near keys are unrelated."""
    return random.Random(f"{seed}/{row}/{view}")


def augmented(image_CHW: Tensor, size: int, augment: Augment, rng: random.Random) -> Tensor:
    """A random resized crop (Szegedy et al. 2015, section 6) and, if asked for, a flip: (C, size, size)."""
    top, left, height, width = crop_box(image_CHW.shape[1], image_CHW.shape[2], augment.crop, rng)
    view_CHW = resize(image_CHW[:, top : top + height, left : left + width], size)
    return view_CHW.flip(-1) if augment.flip and rng.random() < 0.5 else view_CHW


def crop_box(height: int, width: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop with a share of the area in `scale` and an aspect of 3:4 to 4:3.

    Where ten draws do not fit into the image: the largest central crop within those aspects.
    """
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image_CHW: Tensor, size: int) -> Tensor:
    """Bilinear with antialiasing to (C, size, size), in [0, 1]."""
    pixels_1CHW = interpolate(image_CHW[None], (size, size), mode="bilinear", align_corners=False, antialias=True)
    return pixels_1CHW[0].clamp_(0.0, 1.0)
