"""The one pass of the frozen teachers over the evaluation's images: encoded once, used after every stage.

On the way everything is fitted that is fitted on teachers' features of train images: derived teachers (erasure),
the normalisers of the targets, and the train mean that variance unexplained is measured against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from agglom import targets, zeroshot
from agglom.assemble import Run, batches, gathered
from agglom.core import normalise
from agglom.core.normalise import Moments
from agglom.core.types import Derived, Features, Teacher
from agglom.errors import CacheError, DataError
from agglom.job import Size
from agglom.plan import ResolvedStage
from agglom.probes import Readout
from agglom.reading import Row
from agglom.targets import Normaliser
from agglom.zeroshot import Prompted

if TYPE_CHECKING:
    from agglom.sweep import Guess


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
    kind, predictor), `studies` the rows of `studies.rows` by predictor, `guesses` what `sweep` measures by size and
    teacher: a frozen teacher's are made once, too. `proxies`: see `report.GroupReport`.
    """

    rows_N: np.ndarray
    held_M: np.ndarray
    pools: dict[str, Pool]
    prompted: dict[str, Prompted] = field(default_factory=dict)
    readouts: dict[tuple[str, str, str], Readout | None] = field(default_factory=dict)
    studies: dict[str, list[Row]] = field(default_factory=dict)
    guesses: dict[Size, dict[str, Guess]] = field(default_factory=dict)
    proxies: dict[str, Any] | None = None


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


def refitted(run: Run, stage: ResolvedStage, normalisers: Mapping[str, Normaliser]) -> dict[str, Normaliser]:
    """The normalisers of a stage: with `loss.refit: stage`, those of its teachers are fitted at its size.

    Where that is the size of the evaluation they are `normalisers`. All `sizes` of a stage share the one of its `size`,
    or the target of an image would be in other units from step to step. Fitted once and stored, as in `survey`.
    """
    if run.job.loss.refit == "once" or stage.size == run.plan.evaluate_size:
        return dict(normalisers)
    path = run.out / f"normaliser.{stage.name}.safetensors"
    teachers = {name: run.teachers[name] for name in run.teachers if name in stage.teachers}
    if not run.world.broadcast(run.world.on_main(lambda: _is_stored(path, teachers, run))):
        fitted = _refit(run, list(teachers), stage.size)
        run.world.on_main(lambda: targets.save(path, fitted, teachers, run.identity))
    found = run.world.attempt(lambda: targets.load(path, teachers, run.identity))
    return dict(normalisers) | {name: normaliser.to(run.world.device) for name, normaliser in found.items()}


def _is_stored(path: Path, teachers: Mapping[str, Teacher], run: Run) -> bool:
    try:
        targets.load(path, teachers, run.identity)
    except CacheError:
        return False
    return True


def fit_rows(run: Run) -> np.ndarray:
    """The train images that everything is fitted on: at most `fit_images` of those that are encoded anyway."""
    rows, most = np.intersect1d(chosen_rows(run)[0], run.manifest.rows("train")), run.job.loss.fit_images
    return np.sort(np.random.default_rng(run.job.seed).choice(rows, most, replace=False)) if len(rows) > most else rows


def encoded(
    run: Run, names: list[str], rows_N: np.ndarray, size: Size
) -> Iterator[tuple[np.ndarray, dict[str, Features]]]:
    """Rows and what some teachers say of them, chunk by chunk: on rank 0, while the others take their part."""

    def pieces() -> Iterator[tuple[np.ndarray, dict[str, Features]] | None]:
        for mine, batch in batches(run, rows_N, size):
            if batch is None:
                yield None
                continue
            found = targets.encode(run.teachers, names, batch.pixels_BCHW.to(run.world.device))
            yield mine, {name: on_cpu(features) for name, features in found.items()}

    return gathered(run, pieces())


def on_cpu(features: Features) -> Features:
    """Summary and patches in float32."""
    summary, patches, (h, w) = features[:3]
    return Features(
        None if summary is None else summary.float().cpu(), None if patches is None else patches.float().cpu(), (h, w)
    )


def _columns(run: Run, derived: Derived) -> dict[str, Tensor]:
    """What a fit reads of the manifest, over its rows."""
    manifest = run.manifest
    columns = {name: run.spaces[name].index_N for name in (*derived.attributes, *derived.groups)}
    columns |= {n: torch.as_tensor(manifest.numbers[n]) for n in derived.attributes if n in manifest.numbers}
    at = {name: manifest.labels.index(name) for name in derived.labels}
    return columns | {name: torch.as_tensor(manifest.label_NL[:, index]).double() for name, index in at.items()}


def _sources_first(teachers: Mapping[str, Teacher]) -> list[str]:
    def depth(name: str) -> int:
        derived = teachers[name].derived
        return 0 if derived is None else 1 + depth(derived.source)

    return sorted(teachers, key=depth)


def _fit_derived(run: Run) -> None:
    """Fit the derived teachers on rank 0, one after the other, and give the result to all ranks."""
    size = run.plan.evaluate_size
    for name in _sources_first(run.teachers):
        teacher = run.teachers[name]
        derived = teacher.derived
        if derived is None or derived.fit is None:
            continue
        columns, stream = _columns(run, derived), encoded(run, [derived.source], fit_rows(run), size)

        def fit(derived=derived, columns=columns, stream=stream, name=name) -> dict[str, Tensor]:
            def pieces() -> Iterator[tuple[Features, dict[str, Tensor]]]:
                for rows, found in stream:
                    _require_finite(derived.source, found[derived.source])
                    yield found[derived.source], {key: column[torch.as_tensor(rows)] for key, column in columns.items()}

            try:
                derived.fit(pieces())
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


def _require_finite(name: str, features: Features) -> None:
    for kind, tensor in (("summary", features.summary_BD), ("patches", features.patches_BND)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise DataError(f"teachers.{name}: its {kind} features are not finite; check its weights and pixels")


class _Gatherer:
    """Collects one teacher's features on rank 0."""

    def __init__(self) -> None:
        self.summaries: list[Tensor] = []
        self.patches: list[Tensor] = []
        self.moments: Moments | None = None
        self.sum_ND: Tensor | None = None
        self.images = 0
        self.grid = (0, 0)

    def add(self, name: str, features: Features, held_B: Tensor, train_B: Tensor, weight_B: Tensor) -> None:
        """`weight_B`: what an image counts in the moments of the patches, 0 if nothing is fitted on it."""
        summary, patches, grid = features[:3]
        _require_finite(name, features)
        if summary is not None:
            self.summaries.append(summary)
        if patches is None:
            return
        self.grid = grid
        self.patches.append(patches[held_B])
        if (fit_B := weight_B > 0).any():
            moments = self.moments or Moments.empty(patches.shape[-1])
            weight_N = weight_B[fit_B].repeat_interleave(patches.shape[1])
            self.moments = moments.update(patches[fit_B].flatten(0, 1), None if (weight_N == 1).all() else weight_N)
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
    (rows_N, held_M), train = chosen_rows(run), run.manifest.rows("train")
    gatherers = _gather(run, list(run.teachers), rows_N, held_M, run.plan.evaluate_size)
    if not run.world.main:
        return None, run.world.attempt(dict)
    pools = {name: gatherer.pool() for name, gatherer in gatherers.items()}
    trained = rows_N[np.isin(rows_N, train)]
    return pools, run.world.attempt(
        lambda: {name: _fit(run, name, one, rows_N, trained) for name, one in gatherers.items()}
    )


def _refit(run: Run, names: list[str], size: Size) -> dict[str, Normaliser]:
    rows_N = fit_rows(run)
    gatherers = _gather(run, names, rows_N, rows_N[:0], size)
    return run.world.attempt(lambda: {name: _fit(run, name, one, rows_N, rows_N) for name, one in gatherers.items()})


def _gather(run: Run, names: list[str], rows_N: np.ndarray, held_M: np.ndarray, size: Size) -> dict[str, _Gatherer]:
    """One pass over `rows_N`; the gatherers are of rank 0, elsewhere there are none."""
    train, fit = run.manifest.rows("train"), fit_rows(run)
    weights = run.world.attempt(lambda: {name: _weights(run, name, fit) for name in names})
    gatherers = {name: _Gatherer() for name in names}
    # A generator that fails on rank 0 alone would leave the others waiting: the error is kept until the stream ends.
    failure: Exception | None = None
    for rows_B, found in encoded(run, names, rows_N, size):
        rows = torch.as_tensor(rows_B)
        held_B, train_B = (torch.as_tensor(np.isin(rows_B, part)) for part in (held_M, train))
        for name, features in found.items():
            mine_B = train_B & run.served[name][rows] if name in run.served else train_B
            try:
                gatherers[name].add(name, features, held_B, mine_B, weights[name][rows])
            except DataError as error:
                failure = failure or error
    run.world.agree(failure)
    return gatherers if run.world.main else {}


def _weights(run: Run, name: str, rows_N: np.ndarray) -> Tensor:
    """What each row of the manifest counts when moments of a teacher are taken over `rows_N`: 0 for all others.

    1 for those that it serves, unless `loss.moments_by` makes their groups count the same. Raises DataError where a
    group has a single image.
    """
    mine = torch.as_tensor(rows_N)
    mine = mine[run.served[name][mine]] if name in run.served else mine
    weight_N = torch.zeros(len(run.manifest), dtype=torch.float64)
    weight_N[mine] = 1.0
    if (attribute := run.job.loss.moments_by) is not None:
        space = run.spaces[attribute]
        group_N = space.index_N[mine]
        count_G = torch.bincount(group_N[group_N >= 0], minlength=len(space.values)).tolist()
        if alone := [value for value, count in zip(space.values, count_G, strict=True) if count == 1]:
            raise DataError(
                f"loss.moments_by: of {attribute} {', '.join(alone)} there is one image among the {len(mine)} that the "
                f"normaliser of {name} is fitted on, and one has no spread; raise loss.fit_images, or name a coarser "
                "attribute"
            )
        weight_N[mine] = normalise.balanced(group_N)
    return weight_N


def _fit(run: Run, name: str, found: _Gatherer, rows_N: np.ndarray, trained: np.ndarray) -> Normaliser:
    """A teacher's normaliser from its pass over `rows_N`; its summaries count where they are of `trained` rows."""
    loss, pool = run.job.loss, found.pool()
    try:
        patches = None if found.moments is None else normalise.fit(loss.normaliser, found.moments, run.job.seed)
        if pool.summary_ND is None:
            return Normaliser(patches)
        weight_N = _weights(run, name, trained)[torch.as_tensor(rows_N)]
        train_ND, weight_N = pool.summary_ND[weight_N > 0], weight_N[weight_N > 0]
        weighs = None if (weight_N == 1).all() else weight_N
        # After centring, the mean direction is noise: the angular losses take raw summaries (Rulings 3).
        summary = None
        if loss.normalises_summary:
            moments = Moments.empty(train_ND.shape[-1]).update(train_ND, weighs)
            summary = normalise.fit(loss.normaliser, moments, run.job.seed)
        direction, dispersion = normalise.cone(train_ND, weighs)
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
