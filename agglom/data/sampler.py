"""Which (row, view, size) each rank sees in each micro-batch: a function of seed and step, so that resuming is exact.

The run is one endless stream of samples: number i is place i mod N of the permutation of epoch i div N. Global batch
k is samples [kB, (k+1)B), however many ranks and accumulation steps share it, all of the size that step k draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader

from agglom.core.types import Batch
from agglom.data.dataset import ImageDataset, Sample, collate
from agglom.errors import DataError
from agglom.job import Size


def stream(
    rows: Sequence[int] | np.ndarray,
    sizes: Sequence[Size],
    *,
    seed: int,
    batch: int,
    micro: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    start_step: int = 0,
) -> Iterator[list[Sample]]:
    """Endless micro-batches of (manifest row, view, size) of one rank, `accumulate` of them to an optimizer step.

    `batch` is global; the view of a sample is its epoch; `sizes` are what `drawn` draws from. The ranks' micro-batches
    of a step are disjoint and together its global batch. `start_step` counts optimizer steps.

    Raises:
        ValueError: if `batch` is not micro × world × accumulate, or there are no rows or no sizes.
    """
    if batch != micro * world * accumulate:
        raise ValueError(f"batch {batch} is not micro {micro} × world {world} × accumulate {accumulate}")
    rows_N = np.asarray(rows, dtype=np.int64)
    if rows_N.size == 0:
        raise ValueError("no rows to sample from")
    if not sizes:
        raise ValueError("no sizes to draw from")
    return _stream(rows_N, sizes, seed, batch, micro, rank, world, accumulate, start_step)


def drawn(sizes: Sequence[Size], seed: int, step: int) -> Size:
    """The image size of an optimizer step, the same on all ranks: each of `sizes` is as likely."""
    return random.Random(f"{seed}/size/{step}").choice(sizes)


def _stream(
    rows_N: np.ndarray,
    sizes: Sequence[Size],
    seed: int,
    batch: int,
    micro: int,
    rank: int,
    world: int,
    accumulate: int,
    start_step: int,
) -> Iterator[list[Sample]]:
    # Two: a micro-batch that crosses the end of an epoch needs both sides.
    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(rows_N)

    step = start_step
    while True:
        size = drawn(sizes, seed, step)
        for part in range(accumulate):
            first = step * batch + (part * world + rank) * micro
            places = (divmod(number, rows_N.size) for number in range(first, first + micro))
            yield [(int(order(epoch)[place]), epoch, size) for epoch, place in places]
        step += 1


def loader(dataset: ImageDataset, micro_batches: Iterable[list[Sample]], workers: int = 0) -> Iterator[Batch]:
    """Batches of `micro_batches`, in order, read by `workers` processes (0: by this one).

    Raises:
        DataError: of a file that cannot be read, with the message that it has without workers.
    """
    # Its own generator, or each pass would draw from the global one, and the draw would differ with a resumed run.
    source = DataLoader(
        dataset, batch_sampler=micro_batches, collate_fn=collate, num_workers=workers, generator=torch.Generator()
    )
    try:
        yield from source
    except DataError as error:
        # A worker's error arrives wrapped in the text of its traceback.
        raise DataError(str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")[2].strip()) from error
