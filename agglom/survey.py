"""The one pass of the frozen teachers over the evaluation's images: encoded once, used after every stage.

On the way everything is fitted that is fitted on teachers' features of train images: derived teachers (erasure),
the normalisers of the targets, and the train mean that variance unexplained is measured against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from agglom import targets, zeroshot
from agglom.assemble import Run, batches, gathered
from agglom.core import normalise
from agglom.core.normalise import Moments
from agglom.core.types import Features
from agglom.errors import CacheError, DataError
from agglom.probes import Readout
from agglom.reading import Row
from agglom.targets import Normaliser
from agglom.zeroshot import Prompted


@dataclass(frozen=True)
class Pool:
    """One encoder's features of the evaluation's images: summaries of all, patches of the held-out sample."""

    summary_ND: Tensor | None
    patches_MND: Tensor | None
    grid: tuple[int, int]
    mean_patches_ND: Tensor | None = None


@dataclass(frozen=True)
class Survey:
    """What rank 0 keeps: `rows_N` are manifest rows, `held_M` those of val and test on which FVU is measured.

    `prompted` are the prompts as each teacher with a text tower embeds them. `readouts` remembers the probes by (label,
    kind, predictor), `studies` the rows of `studies.rows` by predictor: a frozen teacher's are made once, too.
    """

    rows_N: np.ndarray
    held_M: np.ndarray
    pools: dict[str, Pool]
    prompted: dict[str, Prompted] = field(default_factory=dict)
    readouts: dict[tuple[str, str, str], Readout | None] = field(default_factory=dict)
    studies: dict[str, list[Row]] = field(default_factory=dict)


def chosen_rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the evaluation: all of val and test and at most `probe_images` of train, and the FVU sample."""
    settings, draw = run.job.evaluate, np.random.default_rng(run.job.seed)

    def sample(split: str, most: int) -> np.ndarray:
        rows = run.manifest.rows(split)
        return np.sort(draw.choice(rows, most, replace=False)) if len(rows) > most else rows

    train, held = sample("train", settings.probe_images), [run.manifest.rows(split) for split in ("val", "test")]
    few = [sample(split, settings.fvu_images) for split in ("val", "test")]
    return np.sort(np.concatenate([train, *held])), np.sort(np.concatenate(few))


def survey(run: Run, *, prompted: bool = True) -> tuple[Survey | None, dict[str, Normaliser]]:
    """Encode with every teacher once, or read what an earlier start of the same run has stored.

    Returns the pools (rank 0 only) and the normalisers (every rank, on its device). `prompted`: embed the prompts, too.
    """
    # First, since a text tower may be absent, and it is gone before the images need the memory.
    prompts = run.job.evaluate.prompts if prompted else {}
    embedded = run.world.on_main(lambda: zeroshot.embed(run.teachers, prompts)) or {}
    path, folder = run.out / "normaliser.safetensors", run.out / "features"
    pools = run.world.on_main(lambda: _stored(path, folder, run))
    if not run.world.broadcast(pools is not None):
        _fit_derived(run)
        pools, fitted = _encode(run)
        run.world.on_main(lambda: _save(folder, pools or {}, run))
        run.world.on_main(lambda: targets.save(path, fitted, run.teachers, run.identity))
    # What is read back has the precision of the file: a resumed run starts from the same bits.
    normalisers = run.world.attempt(lambda: targets.load(path, run.teachers, run.identity))
    rows, held = chosen_rows(run)
    found = Survey(rows, held, pools, embedded) if pools is not None else None
    return found, {name: normaliser.to(run.world.device) for name, normaliser in normalisers.items()}


def _fit_rows(run: Run) -> np.ndarray:
    """The train images that everything is fitted on: at most `fit_images` of those that are encoded anyway."""
    rows, most = np.intersect1d(chosen_rows(run)[0], run.manifest.rows("train")), run.job.loss.fit_images
    return np.sort(np.random.default_rng(run.job.seed).choice(rows, most, replace=False)) if len(rows) > most else rows


def _features(run: Run, names: list[str], rows_N: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, Features]]]:
    def pieces() -> Iterator[tuple[np.ndarray, dict[str, Features]] | None]:
        for mine, batch in batches(run, rows_N, run.plan.evaluate_size):
            if batch is None:
                yield None
                continue
            found = targets.encode(run.teachers, names, batch.pixels_BCHW.to(run.world.device))
            yield mine, {name: _to_cpu(features) for name, features in found.items()}

    return gathered(run, pieces())


def _to_cpu(features: Features) -> Features:
    summary, patches, (h, w) = features
    return Features(
        None if summary is None else summary.float().cpu(), None if patches is None else patches.float().cpu(), (h, w)
    )


def _fit_derived(run: Run) -> None:
    """Fit the derived teachers on rank 0, one after the other, and give the result to all ranks."""
    for name, teacher in run.teachers.items():
        derived = teacher.derived
        if derived is None or derived.fit is None or derived.attribute is None:
            continue
        space = run.spaces[derived.attribute]
        stream = _features(run, [derived.source], _fit_rows(run))

        def fit(derived=derived, space=space, stream=stream, name=name) -> dict[str, Tensor]:
            try:
                derived.fit((found[derived.source], space.index_N[torch.as_tensor(rows)]) for rows, found in stream)
            except ValueError as error:
                raise DataError(f"teachers.{name}: cannot fit on the train patients: {error}") from error
            finally:
                for _ in stream:  # the other ranks are still in it
                    pass
            return {}

        def drive(stream=stream) -> None:
            for _ in stream:
                pass

        run.world.attempt(fit if run.world.main else drive)
        state = {key: value.cpu() for key, value in teacher.module.state_dict().items()}
        teacher.module.load_state_dict(run.world.broadcast(state))


class _Gatherer:
    """Collects one teacher's features on rank 0."""

    def __init__(self) -> None:
        self.summaries: list[Tensor] = []
        self.patches: list[Tensor] = []
        self.moments: Moments | None = None
        self.sum_ND: Tensor | None = None
        self.images = 0
        self.grid = (0, 0)

    def add(self, name: str, features: Features, held_B: Tensor, train_B: Tensor, fit_B: Tensor) -> None:
        summary, patches, grid = features
        for kind, tensor in (("summary", summary), ("patches", patches)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise DataError(f"teachers.{name}: its {kind} features are not finite; check its weights and pixels")
        if summary is not None:
            self.summaries.append(summary)
        if patches is None:
            return
        self.grid = grid
        self.patches.append(patches[held_B])
        if fit_B.any():
            moments = self.moments or Moments.empty(patches.shape[-1])
            self.moments = moments.update(patches[fit_B].flatten(0, 1))
        if train_B.any():
            total = patches[train_B].double().sum(0)
            self.sum_ND = total if self.sum_ND is None else self.sum_ND + total
            self.images += int(train_B.sum())

    def pool(self) -> Pool:
        return Pool(
            torch.cat(self.summaries) if self.summaries else None,
            torch.cat(self.patches) if self.patches else None,
            self.grid,
            None if self.sum_ND is None else (self.sum_ND / self.images).float(),
        )


def _encode(run: Run) -> tuple[dict[str, Pool] | None, dict[str, Normaliser]]:
    rows_N, held_M = chosen_rows(run)
    train, fit = run.manifest.rows("train"), _fit_rows(run)
    gatherers = {name: _Gatherer() for name in run.teachers}
    # A generator that fails on rank 0 alone would leave the others waiting: the error is kept until the stream ends.
    failure: Exception | None = None
    for rows_B, found in _features(run, list(run.teachers), rows_N):
        held_B, train_B, fit_B = (torch.as_tensor(np.isin(rows_B, part)) for part in (held_M, train, fit))
        for name, features in found.items():
            try:
                gatherers[name].add(name, features, held_B, train_B, fit_B)
            except DataError as error:
                failure = failure or error
    run.world.agree(failure)
    if not run.world.main:
        return None, run.world.attempt(dict)
    pools = {name: gatherer.pool() for name, gatherer in gatherers.items()}
    train_N = torch.as_tensor(np.isin(rows_N, train))
    return pools, run.world.attempt(
        lambda: {name: _fit(run, name, gatherers[name].moments, pools[name], train_N) for name in run.teachers}
    )


def _fit(run: Run, name: str, moments: Moments | None, pool: Pool, train_N: Tensor) -> Normaliser:
    loss = run.job.loss
    try:
        patches = None if moments is None else normalise.fit(loss.normaliser, moments, run.job.seed)
        if pool.summary_ND is None:
            return Normaliser(patches)
        train = pool.summary_ND[train_N]
        # After centring, the mean direction is noise: the angular losses take raw summaries (Rulings 3).
        summary = None
        if loss.normalises_summary:
            summary = normalise.fit(loss.normaliser, Moments.empty(train.shape[-1]).update(train), run.job.seed)
        direction, dispersion = normalise.cone(train)
    except ValueError as error:
        raise DataError(f"teachers.{name}: cannot fit its normaliser: {error}") from error
    return Normaliser(patches, summary, direction, dispersion)


def _save(folder: Path, pools: dict[str, Pool], run: Run) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pool in pools.items():
        fields = {"summary": pool.summary_ND, "patches": pool.patches_MND, "mean_patches": pool.mean_patches_ND}
        tensors = {key: value.contiguous() for key, value in fields.items() if value is not None}
        tensors["grid"] = torch.tensor(pool.grid)
        temporary = folder / f"{name}.tmp"
        save_file(tensors, temporary, metadata=run.identity)
        temporary.replace(folder / f"{name}.safetensors")


def _stored(path: Path, folder: Path, run: Run) -> dict[str, Pool] | None:
    """What an earlier start has stored. None where it is absent, broken, or of another job: it can be fitted again."""
    try:
        targets.load(path, run.teachers, run.identity)
        files = {name: targets.read(folder / f"{name}.safetensors", run.identity) for name in run.teachers}
    except CacheError:
        return None
    pools = {}
    for name, tensors in files.items():
        h, w = tensors["grid"].tolist()
        pools[name] = Pool(tensors.get("summary"), tensors.get("patches"), (h, w), tensors.get("mean_patches"))
    return pools
