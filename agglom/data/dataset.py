"""From (row, view, size) to pixels, a function of these and the seed alone: the same in any worker, rank and run."""

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
from agglom.data.acquisition import simulated
from agglom.data.manifest import Manifest
from agglom.data.readers import decode
from agglom.errors import DataError
from agglom.job import Augment, Size, Views

Sample = tuple[int, int, Size]

CLEAN = -1
ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10


class ImageDataset(Dataset[Batch]):
    """The images of `rows` of the manifest.

    Indexed by (manifest row, view, (height, width)); view −1 is the whole image, resized without crop, whatever
    `augment` says. `group_N` holds the group id of every row of the manifest, −1 where it is not annotated. With
    `views` the student has pixels of its own, which are those of its teachers where nothing is simulated.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: Sequence[int] | np.ndarray,
        augment: Augment | None,
        group_N: Tensor | np.ndarray,
        seed: int,
        value_range: tuple[float, float] | None = None,
        views: Views | None = None,
    ) -> None:
        self.manifest = manifest
        self.rows = rows
        self.augment = augment
        self.group_N = torch.as_tensor(group_N, dtype=torch.int64)
        self.label_NL = torch.as_tensor(manifest.label_NL) if manifest.labels else None
        self.seed = seed
        self.value_range = value_range
        self.views = views
        eligible = [manifest.among(name, groups) for name, groups in views.groups.items()] if views else []
        self.eligible_N = np.logical_or.reduce(eligible) if eligible else np.ones(len(manifest), bool)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Sample) -> Batch:
        """One sample as a Batch without its first axis: pixels (3, height, width).

        Raises:
            DataError: naming the file and its row of the manifest.
        """
        row, view, size = index
        try:
            image_CHW = torch.from_numpy(decode(self.manifest.images[row], self.value_range))
        except DataError as error:
            raise DataError(f"{error} ({self.manifest.where(row)})") from error
        if view == CLEAN or self.augment is None:
            pixels_CHW = resize(image_CHW, size)
        else:
            pixels_CHW = augmented(image_CHW, size, self.augment, view_random(self.seed, row, view))
        return Batch(
            pixels_CHW.expand(3, -1, -1),
            torch.tensor(row),
            torch.tensor(view),
            self.group_N[row],
            None if self.label_NL is None else self.label_NL[row],
            None if self.views is None else self._seen(pixels_CHW, self.views, row, view).expand(3, -1, -1),
        )

    def _seen(self, pixels_CHW: Tensor, views: Views, row: int, view: int) -> Tensor:
        # Numbers of its own, so that the crops are those of a run without views.
        rng = random.Random(f"{self.seed}/acquisition/{row}/{view}")
        if view == CLEAN or not self.eligible_N[row] or rng.random() >= views.share:
            return pixels_CHW
        return simulated(pixels_CHW, views.kinds, rng)


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of `ImageDataset` as one Batch."""
    pixels, row, view, group, label, student = zip(*samples, strict=True)
    return Batch(
        torch.stack(pixels),
        torch.stack(row),
        torch.stack(view),
        torch.stack(group),
        None if label[0] is None else torch.stack(label),
        None if student[0] is None else torch.stack(student),
    )


def view_random(seed: int, row: int, view: int) -> random.Random:
    """The source of randomness of one view. Seeding with text goes through SHA-512, so near keys are unrelated."""
    return random.Random(f"{seed}/{row}/{view}")


def augmented(image_CHW: Tensor, size: Size, augment: Augment, rng: random.Random) -> Tensor:
    """A random resized crop (Szegedy et al. 2015, section 6) and, if asked for, a flip: (C, *size)."""
    shape = image_CHW.shape[1], image_CHW.shape[2]
    top, left, height, width = crop_box(shape, augment.crop, rng, aspect=size[1] / size[0])
    view_CHW = resize(image_CHW[:, top : top + height, left : left + width], size)
    return view_CHW.flip(-1) if augment.flip and rng.random() < 0.5 else view_CHW


def crop_box(
    shape: Size, scale: tuple[float, float], rng: random.Random, aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of an image of `shape` with a share of its area in `scale`.

    Width over height is 3:4 to 4:3 of `aspect`, that of the view: the resize distorts by no more. Where ten draws do
    not fit into the image: the largest central crop within those bounds.
    """
    height, width = shape
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        drawn = aspect * math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = max(1, round(math.sqrt(area * drawn))), max(1, round(math.sqrt(area / drawn)))
        if w <= width and h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, max(1, round(height * aspect * ASPECT[1])))
    h = min(height, max(1, round(width / (aspect * ASPECT[0]))))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image_CHW: Tensor, size: Size) -> Tensor:
    """Bilinear with antialiasing to (C, height, width), in [0, 1]."""
    pixels_1CHW = interpolate(image_CHW[None], size, mode="bilinear", align_corners=False, antialias=True)
    return pixels_1CHW[0].clamp_(0.0, 1.0)
