"""Groups for images that nobody has annotated: clusters of a teacher's summaries, and how well they tell known groups.

In the spirit of GEORGE (Sohoni et al. 2020, arXiv 2011.12945), which looks for subclasses within the classes of a model
that was trained on the task; here k-means looks at the directions (L2-normalised) of the raw summaries of all train
images. A cluster is no group of patients: what it has to do with those that are known is measured, and it is never
shown under the name of an attribute.

Shape suffixes: N images, D width of the summary, K clusters, P pairs of fits.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file

from agglom import targets
from agglom.assemble import Run
from agglom.core import groups
from agglom.errors import CacheError, DataError
from agglom.job import Proxies
from agglom.survey import Survey, chosen_rows, encoded

# Of the clusters over the patients, for what clusters that tell nothing would show.
SHUFFLES = 20
MEASURES = ("nmi", "ari", "purity", "largest", "chance", "chance_hi")


@dataclass(frozen=True)
class Clusters:
    """The cluster (int64, 0 has most images) of each manifest row, −1 where none is needed; on how many train images
    they were fitted, and the adjusted Rand index of each two fits."""

    cluster_N: np.ndarray
    fitted: int
    ari_P: np.ndarray


def added(run: Run, surveyed: Survey | None) -> tuple[Run, Survey | None]:
    """With `balance.proxies`: the run with clusters among its groups, and what the report says of them in the survey.

    Every rank takes part and gets the same clusters, which are fitted once and stored, as in `survey`.
    Raises DataError where train images are too few or too alike, or a summary is not finite.
    """
    asked, world, path = run.job.balance.proxies, run.world, run.out / "proxies.safetensors"
    if asked is None:
        return run, surveyed
    found = world.broadcast(world.on_main(lambda: _stored(path, run)))
    if found is None:
        fitted = _cluster(run, surveyed, asked)
        world.on_main(lambda: _save(path, cast(Clusters, fitted), run))
        found = cast(Clusters, world.broadcast(fitted))
    known, name = run.spaces.get(run.job.balance.group or ""), cast(str, run.job.balance.over)
    run = replace(run, proxy=groups.joined(name, known, torch.from_numpy(found.cluster_N), asked.clusters))
    told = world.on_main(lambda: _told(run, cast(Survey, surveyed).rows_N, asked, found))
    return run, None if surveyed is None else replace(surveyed, proxies=told)


def _cluster(run: Run, surveyed: Survey | None, asked: Proxies) -> Clusters | None:
    """On rank 0, fitted on the train images of the survey. Those that it leaves out are encoded where they need one."""
    rows_N, train, known = chosen_rows(run)[0], run.manifest.rows("train"), run.spaces.get(run.job.balance.group or "")
    cluster_N, fitted_N = np.full(len(run.manifest), -1), np.isin(rows_N, train)

    def of_survey() -> tuple[np.ndarray, np.ndarray]:
        summary_ND = cast(torch.Tensor, cast(Survey, surveyed).pools[asked.teacher].summary_ND).numpy()
        centre_KD, ari_P = fit(summary_ND[fitted_N], asked.clusters, asked.seeds, run.job.seed)
        cluster_N[rows_N] = nearest(summary_ND, centre_KD)
        return centre_KD, ari_P

    centre_KD, ari_P = cast(tuple[np.ndarray, np.ndarray], run.world.broadcast(run.world.on_main(of_survey)))
    wanted = train if known is None else train[known.index_N.numpy()[train] < 0]
    for mine, found in encoded(run, [asked.teacher], np.setdiff1d(wanted, rows_N), run.plan.evaluate_size):
        cluster_N[mine] = nearest(cast(torch.Tensor, found[asked.teacher].summary_BD).numpy(), centre_KD)

    def whole() -> Clusters:
        if len(sick := wanted[cluster_N[wanted] < 0]):
            raise DataError(
                f"teachers.{asked.teacher}: its summary features are not finite; check its weights and pixels, and "
                f"{run.manifest.where(sick[0])}"
            )
        return Clusters(cluster_N, int(fitted_N.sum()), ari_P)

    return run.world.on_main(whole)


def fit(summary_ND: np.ndarray, clusters: int, seeds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (K, D) of the fit with the least inertia out of `seeds`, and the adjusted Rand index of each two fits.

    k-means of scikit-learn on directions; the centre with most images is the first. Raises DataError where there are
    fewer different images than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    unit_ND = _directions(summary_ND)
    different = len(np.unique(unit_ND.round(6), axis=0))
    if different < clusters:
        raise DataError(
            f"balance.proxies.clusters: {clusters} clusters need as many different images, and the {len(unit_ND)} "
            f"train images that are encoded for the evaluation have {different} different summaries; lower it, raise "
            "evaluate.probe_images, or name another teacher"
        )
    starts = np.random.SeedSequence(seed).generate_state(seeds)
    fits = [KMeans(clusters, n_init=1, random_state=int(start)).fit(unit_ND) for start in starts]
    centre_KD = min(fits, key=lambda one: one.inertia_).cluster_centers_
    images_K = np.bincount(nearest(unit_ND, centre_KD), minlength=clusters)
    pairs = itertools.combinations([one.labels_ for one in fits], 2)
    return centre_KD[np.argsort(-images_K, kind="stable")], np.array([adjusted_rand_score(*pair) for pair in pairs])


def nearest(summary_ND: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
    """The centre (int64) that is nearest to the direction of each summary; −1 where that is not finite."""
    finite_N = np.isfinite(summary_ND).all(1)
    unit_ND = _directions(np.where(finite_N[:, None], summary_ND, 0))
    return np.where(finite_N, ((centre_KD**2).sum(1) - 2 * unit_ND @ centre_KD.T).argmin(1), -1)


def _directions(summary_ND: np.ndarray) -> np.ndarray:
    x_ND = summary_ND.astype(np.float64)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(min=1e-12)


def agreement(group_N: np.ndarray, cluster_N: np.ndarray, patient_N: np.ndarray, seed: int) -> dict[str, float]:
    """How well clusters tell groups: `nmi` and `ari` of scikit-learn; `purity`, the share of images whose group is the
    most frequent one of their cluster; `largest`, the same if all were one cluster; `chance` and `chance_hi`, its mean
    and maximum when the clusters are dealt out anew, in their sizes, over patients, whose images stay together.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    generator, place_N = np.random.default_rng(seed), np.argsort(patient_N, kind="stable")
    chance, dealt_N = [], np.empty_like(cluster_N)
    for _ in range(SHUFFLES):
        turn_P = generator.permutation(patient_N.max() + 1)
        dealt_N[place_N] = cluster_N[np.argsort(turn_P[patient_N], kind="stable")]
        chance.append(_purity(group_N, dealt_N))
    indices = normalized_mutual_info_score(group_N, cluster_N), adjusted_rand_score(group_N, cluster_N)
    purities = _purity(group_N, cluster_N), _purity(group_N, np.zeros_like(cluster_N)), np.mean(chance), max(chance)
    return {name: float(value) for name, value in zip(MEASURES, (*indices, *purities), strict=True)}


def _purity(group_N: np.ndarray, cluster_N: np.ndarray) -> float:
    table_GK = np.zeros((group_N.max() + 1, cluster_N.max() + 1))
    np.add.at(table_GK, (group_N, cluster_N), 1)
    return table_GK.max(0).sum() / len(group_N)


def _told(run: Run, rows_N: np.ndarray, asked: Proxies, found: Clusters) -> dict[str, Any]:
    """The context key `proxies` of a report (see `report.GroupReport`)."""
    train, group, space = run.manifest.rows("train"), run.job.balance.group, run.balance_space
    first = len(space.values) - asked.clusters
    counts = found.cluster_N[train], space.index_N.numpy()[train] - first
    n_train, n_grouped = (np.bincount(one[one >= 0], minlength=asked.clusters).tolist() for one in counts)
    names = dict.fromkeys([*run.job.data.groups, *([group] if group else [])])
    return {
        "teacher": asked.teacher,
        "attribute": group,
        "clusters": space.values[first:],
        "n_fitted": found.fitted,
        "n_train": n_train,
        "n_grouped": n_grouped,
        "fits": asked.seeds,
        "stability": float(found.ari_P.mean()),
        "stability_lo": float(found.ari_P.min()),
        "agreement": [_compared(run, name, rows_N, found.cluster_N[rows_N], asked.clusters) for name in names],
    }


def _compared(run: Run, name: str, rows_N: np.ndarray, cluster_N: np.ndarray, clusters: int) -> dict[str, Any]:
    """The agreement with an attribute or a crossing over those of some rows that are annotated with it."""
    group_M, groups_M = np.full(len(run.manifest), -1), np.zeros(len(run.manifest), np.int64)
    for index, members in enumerate(run.manifest.view(name).members.values()):
        group_M[members] = index
        groups_M[members] += 1
    known_N = group_M[rows_N] >= 0
    mine, cluster_N = rows_N[known_N], cluster_N[known_N]
    why = ""
    if (groups_M[mine] > 1).any():
        why = "an image may be in several of its groups"
    elif len(mine) < clusters:
        why = "fewer images than clusters"
    elif len(np.unique(group_M[mine])) == 1:
        why = "one group only"
    measured = dict.fromkeys(MEASURES, math.nan)
    if not why:
        measured = agreement(group_M[mine], cluster_N, run.manifest.patient_N[mine], run.job.seed)
    return {"attribute": name, "n_images": len(mine), "why": why, **measured}


def _save(path: Path, found: Clusters, run: Run) -> None:
    tensors = {"cluster_N": found.cluster_N, "fitted": np.array(found.fitted), "ari_P": found.ari_P}
    temporary = path.with_suffix(".tmp")
    save_file({key: torch.from_numpy(one) for key, one in tensors.items()}, temporary, metadata=run.identity)
    temporary.replace(path)


def _stored(path: Path, run: Run) -> Clusters | None:
    """What an earlier start has stored. None where it is absent, broken, or of another job: it can be fitted again."""
    try:
        tensors = targets.read(path, run.identity)
    except CacheError:
        return None
    return Clusters(tensors["cluster_N"].numpy(), int(tensors["fitted"]), tensors["ari_P"].numpy())
