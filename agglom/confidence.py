"""How probable it is that the linear probe of a teacher is right on a train image, by how confident it is there.

Both classes of a label count alike, or all teachers would look alike on one that is rare: what a probe says is positive
where it is above the prevalence among those it was fitted on, and confidence is how far it is from that, in logits, of
a probe that has not seen the patient. How often such confidence is right, validation says, its two classes weighted to
one half each. The label of the image itself plays no part, and its group a small one, so that wrong groups do little
harm.

Shape suffixes: N surveyed rows, M of these that are scored, V validation rows, D width of the summary,
S teachers, L labels, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agglom import probes
from agglom.assemble import Run
from agglom.survey import Survey

FOLDS = 5


def measure(run: Run, surveyed: Survey, names: Sequence[str]) -> Tensor:
    """p̂ of each manifest row and teacher (float32), the mean over labels: of the train rows that are surveyed, and of a
    specialist of those that it serves; NaN elsewhere.

    A label of which p̂ of a teacher that serves an image and has a summary is not known does not count for the others
    either, as labels are not equally hard: it takes both classes in train and in validation.
    """
    rows_N, everybody_N = surveyed.rows_N, np.ones(len(surveyed.rows_N), bool)
    served = {name: served_N.numpy()[rows_N] for name, served_N in run.served.items()}
    served_SN = np.stack([served.get(name, everybody_N) for name in names])
    known_LSN = np.stack(
        [
            [_of_label(run, surveyed, label, name, served_N) for name, served_N in zip(names, served_SN, strict=True)]
            for label in run.manifest.labels
        ]
    )
    read_S1 = np.array([[surveyed.pools[name].summary_ND is not None] for name in names])
    lacks_L1N = (np.isnan(known_LSN) & served_SN & read_S1).any(1, keepdims=True)
    mean_SN = torch.as_tensor(np.where(lacks_L1N, np.nan, known_LSN)).nanmean(0)
    sure_NS = torch.full((len(run.manifest), len(names)), torch.nan)
    sure_NS[torch.as_tensor(rows_N)] = mean_SN.T.float()
    return sure_NS


def _of_label(run: Run, surveyed: Survey, label: str, name: str, served_N: np.ndarray) -> np.ndarray:
    """p̂ for one label and teacher, from the probe that the report speaks of."""
    manifest, rows_N, space = run.manifest, surveyed.rows_N, run.balance_space
    label_N = manifest.label_NL[rows_N, manifest.labels.index(label)].astype(np.float64)
    mine_N, val_N = (served_N & (manifest.split_N[rows_N] == split) for split in ("train", "val"))
    known_N, val_N = mine_N & ~np.isnan(label_N), val_N & ~np.isnan(label_N)
    summary_ND, sure_N = surveyed.pools[name].summary_ND, np.full(len(rows_N), np.nan)
    if summary_ND is None or min(len(np.unique(label_N[part_N])) for part_N in (known_N, val_N)) < 2:
        return sure_N
    key = label, "linear", f"teacher/{name}"
    if key not in surveyed.readouts:
        surveyed.readouts[key] = probes.linear(summary_ND, label_N, known_N, val_N)
    full: Any = surveyed.readouts[key]
    patient_N, group_N = manifest.patient_N[rows_N], space.index_N.numpy()[rows_N]
    score_N = out_of_fold(summary_ND, label_N, patient_N, mine_N, full.strength, run.job.seed)
    seen_N = ~np.isnan(score_N)
    if seen_N.any():
        on_validation = full.read(summary_ND[torch.as_tensor(val_N)]), label_N[val_N], group_N[val_N]
        asked, prevalence = (score_N[seen_N], group_N[seen_N]), float(label_N[known_N].mean())
        sure_N[seen_N] = right(*on_validation, *asked, len(space.values), prevalence)
    return sure_N


def out_of_fold(
    features_ND: Tensor, label_N: np.ndarray, patient_N: np.ndarray, mine_N: np.ndarray, strength: float, seed: int
) -> np.ndarray:
    """What probes of some rows (mask `mine_N`) that were fitted on other patients say of them: probabilities, NaN for
    other rows and where those patients have one class.

    FOLDS folds, or as many as there are patients of the rarer class; a row without a label (NaN) is scored alone.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    score_N, rows_M = np.full(len(label_N), np.nan), np.flatnonzero(mine_N)
    label_M, patient_M = label_N[rows_M], patient_N[rows_M]
    folds = min(FOLDS, *(len(np.unique(patient_M[label_M == one])) for one in (0, 1)))
    if folds < 2:
        return score_N
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for others, held in splits.split(rows_M, label_M == 1, patient_M):
        fit_M = rows_M[others[~np.isnan(label_M[others])]]
        if len(np.unique(label_N[fit_M])) == 2:
            (probe,) = probes.fit([strength], features_ND, label_N, fit_M)
            score_N[rows_M[held]] = probe(features_ND[rows_M[held]])
    return score_N


def right(
    score_V: np.ndarray,
    label_V: np.ndarray,
    group_V: np.ndarray,
    score_N: np.ndarray,
    group_N: np.ndarray,
    groups: int,
    prevalence: float,
) -> np.ndarray:
    """The probability that scores are on the right side of `prevalence`, were both classes as frequent, from how far
    they are from it and group (−1: none). `prevalence` is that of the rows which the probe was fitted on.

    By a logistic regression on validation, which needs both classes: each has half of the weight, and all together as
    much as images of one weight that would tell as much (Kish 1965), so that its L2 penalty holds a group of a few
    images to what all of them say. Where validation is all right or all wrong: its share, by the rule of succession.
    """
    from sklearn.linear_model import LogisticRegression

    # Scores do not go beyond CLIP, and those at CLIP say no.
    cut = np.clip(prevalence, 2 * probes.CLIP, 1 - 2 * probes.CLIP)
    told_V = (score_V >= cut) == (label_V == 1)
    if told_V.all() or not told_V.any():
        return np.full(len(score_N), (told_V.sum() + 1) / (len(told_V) + 2))
    share = (label_V == 1).mean()
    weight_V = 1 / np.where(label_V == 1, share, 1 - share)
    weight_V *= weight_V.sum() / np.square(weight_V).sum()
    model = LogisticRegression(solver="newton-cholesky", tol=1e-8)
    model.fit(_described(score_V, group_V, cut, groups), told_V, weight_V)
    return model.predict_proba(_described(score_N, group_N, cut, groups))[:, 1]


def _described(score_N: np.ndarray, group_N: np.ndarray, cut: float, groups: int) -> np.ndarray:
    """Confidence, the group, and the confidence in it: N × (1 + 2 G)."""
    from scipy.special import logit

    sure_N = np.abs(logit(np.clip(score_N, probes.CLIP, 1 - probes.CLIP)) - logit(cut))
    group_NG = (group_N[:, None] == np.arange(groups)).astype(np.float64)
    return np.concatenate([sure_N[:, None], group_NG, sure_N[:, None] * group_NG], 1)
