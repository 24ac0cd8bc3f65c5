"""Which (row, view, size) each rank sees in each micro-batch: a function of seed and step, so that resuming is exact.

The run is one endless stream of samples: number i is place i mod N of the permutation of epoch i div N, or of N draws
with replacement where rows have weights. Global batch k is samples [kB, (k+1)B), however many ranks and accumulation
steps share it, all of the size that step k draws.
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
    weights: np.ndarray | None = None,
) -> Iterator[list[Sample]]:
    """Endless micro-batches of (manifest row, view, size) of one rank, `accumulate` of them to an optimizer step.

    `batch` is global; the view of a sample is its epoch; `sizes` are what `drawn` draws from. The ranks' micro-batches
    of a step are disjoint and together its global batch. `start_step` counts optimizer steps. With `weights`, each row
    is drawn in proportion to its own, and as one may come twice in an epoch, its view is its number in the stream.

    Raises:
        ValueError: if `batch` is not micro × world × accumulate, there are no rows or no sizes, or not a weight a row.
    """
    if batch != micro * world * accumulate:
        raise ValueError(f"batch {batch} is not micro {micro} × world {world} × accumulate {accumulate}")
    rows_N = np.asarray(rows, dtype=np.int64)
    if rows_N.size == 0:
        raise ValueError("no rows to sample from")
    if not sizes:
        raise ValueError("no sizes to draw from")
    if weights is not None and weights.shape != rows_N.shape:
        raise ValueError(f"weights of shape {weights.shape} for {rows_N.size} rows")
    return _stream(rows_N, sizes, seed, batch, micro, rank, world, accumulate, start_step, weights)


def tempered(group_N: np.ndarray, power: float) -> np.ndarray:
    """The probability of each row, so that group g is drawn with a share ∝ p_g^(1 − power): at 1 all groups that have
    rows are as frequent, at 0 they are as they are. A row without annotation (−1) keeps its 1/N.
    """
    known_N = group_N >= 0
    count_G = np.bincount(group_N[known_N])
    share_G = np.where(count_G > 0, count_G.clip(1) ** (1 - power), 0.0)
    share_G *= known_N.mean() / max(share_G.sum(), 1e-12)
    return np.where(known_N, np.append(share_G / count_G.clip(1), 0.0)[group_N], 1 / group_N.size)


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
    weights_N: np.ndarray | None,
) -> Iterator[list[Sample]]:
    # Two: a micro-batch that crosses the end of an epoch needs both sides.
    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        if weights_N is None:
            return rng.permutation(rows_N)
        return rng.choice(rows_N, rows_N.size, p=weights_N / weights_N.sum())

    def sample(number: int, size: Size) -> Sample:
        epoch, place = divmod(number, rows_N.size)
        return int(order(epoch)[place]), epoch if weights_N is None else number, size

    step = start_step
    while True:
        size = drawn(sizes, seed, step)
        for part in range(accumulate):
            first = step * batch + (part * world + rank) * micro
            yield [sample(number, size) for number in range(first, first + micro)]
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
