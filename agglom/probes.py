"""Readouts of frozen features: what a linear probe and the nearest neighbours make of them.

Fitted on train patients; regularisation and calibration come from validation patients; test is only scored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(-5, 2))
TEMPERATURE = 0.07
CLIP = 1e-3


@dataclass(frozen=True)
class Readout:
    """Calibrated probabilities of all rows, and how they came about.

    `read` is the linear probe for other features (N, D) of the same encoder: probabilities before calibration, clipped
    as that clips them, so that they rank images as `scores_N` does. `strength` is the one that validation chose for it.
    """

    scores_N: np.ndarray
    note: str = ""
    read: Callable[[Tensor], np.ndarray] | None = None
    strength: float | None = None


def linear(features_ND: Tensor, label_N: np.ndarray, train_N: np.ndarray, val_N: np.ndarray) -> Readout | None:
    """Logistic regression on standardised features, its L2 strength chosen by validation log-loss.

    `train_N` and `val_N` are masks of rows with a known label. None where train has a single class.
    """
    from sklearn.metrics import log_loss

    if len(np.unique(label_N[train_N])) < 2:
        return None
    judged = len(np.unique(label_N[val_N])) == 2
    strengths, tried = STRENGTHS if judged else (1e-3,), []
    for strength, probe in zip(strengths, fit(strengths, features_ND, label_N, train_N), strict=True):
        found_N = probe(features_ND)
        loss = log_loss(label_N[val_N], found_N[val_N], labels=[0, 1]) if judged else 0.0
        tried.append((loss, strength, probe, found_N))
    _, strength, chosen, scores_N = min(tried, key=lambda one: one[0])

    def read(features_ND: Tensor) -> np.ndarray:
        return np.clip(chosen(features_ND), CLIP, 1 - CLIP)

    return replace(calibrated(scores_N, label_N, val_N), read=read, strength=strength)


def fit(
    strengths: Sequence[float], features_ND: Tensor, label_N: np.ndarray, train_N: np.ndarray
) -> Iterator[Callable[[Tensor], np.ndarray]]:
    """For each strength, what reads the probability of a label from features (N, D): fitted on those of `train_N` (mask
    or indices), standardised, from the optimum of the strength before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x_ND = features_ND[torch.as_tensor(train_N)].double().numpy()
    mean_D, std_D = x_ND.mean(0), x_ND.std(0)
    # A direction that train images do not vary in carries nothing but rounding.
    scale_D = np.where(std_D > 1e-6 * max(std_D.max(), 1e-300), std_D, np.inf)
    x_ND = (x_ND - mean_D) / scale_D
    model = LogisticRegression(max_iter=200, warm_start=True)
    for strength in strengths:
        model.C = strength
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps from the last optimum are close enough
            model.fit(x_ND, label_N[train_N])
        weight_D = model.coef_[0] / scale_D
        yield partial(_read, weight_D, float(model.intercept_[0] - mean_D @ weight_D))


def _read(weight_D: np.ndarray, bias: float, features_ND: Tensor) -> np.ndarray:
    from scipy.special import expit

    return expit(features_ND.double().numpy() @ weight_D + bias)


def nearest(
    features_ND: Tensor, label_N: np.ndarray, patient_N: np.ndarray, train_N: np.ndarray, val_N: np.ndarray, k: int
) -> Readout | None:
    """k nearest train images by cosine, votes weighted by exp(cos / .07) (Wu et al. 2018, DINO's kNN protocol).

    A train image never votes for its own patient. None where train has a single class.
    """
    if len(np.unique(label_N[train_N])) < 2:
        return None
    unit_ND = torch.nn.functional.normalize(features_ND.float(), dim=1)
    bank_MD, votes_M = unit_ND[train_N], torch.as_tensor(label_N[train_N], dtype=torch.float32)
    patient_M = torch.as_tensor(patient_N[train_N])
    scores = []
    for chunk_CD, patient_C in zip(unit_ND.split(1024), torch.as_tensor(patient_N).split(1024), strict=True):
        similarity_CM = (chunk_CD @ bank_MD.T).masked_fill(patient_C[:, None] == patient_M[None], -torch.inf)
        top = similarity_CM.topk(min(k, bank_MD.shape[0]), dim=1)
        weight_CK = torch.softmax(top.values / TEMPERATURE, dim=1).nan_to_num(0.0)
        scores.append((weight_CK * votes_M[top.indices]).sum(1))
    return calibrated(torch.cat(scores).double().numpy(), label_N, val_N)


def calibrated(
    scores_N: np.ndarray, label_N: np.ndarray, val_N: np.ndarray, logit_N: np.ndarray | None = None
) -> Readout:
    """Platt scaling (Platt 1999) on validation; ranks are kept.

    `logit_N` is any increasing affine function of the logits, for scores closer to 0 or 1 than `CLIP`.
    """
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    truth = label_N[val_N]
    if len(np.unique(truth)) < 2:
        return Readout(scores_N, "validation holds one class: not calibrated")
    logit_N = _logit(scores_N) if logit_N is None else logit_N
    platt = LogisticRegression(C=1e6).fit(logit_N[val_N, None], truth)
    slope, note = float(platt.coef_[0, 0]), ""
    if slope > 0:
        scores_N = expit(slope * logit_N + float(platt.intercept_[0]))
    else:
        note = "validation ranks no better than chance: not calibrated"
    return Readout(scores_N, note)


def youden(scores_N: np.ndarray, truth_N: np.ndarray) -> float:
    """The threshold with the largest TPR − FPR (Youden 1950): midway between the two scores that it separates."""
    order = np.argsort(-scores_N, kind="stable")
    scores, truth = scores_N[order], truth_N[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    rate = np.cumsum(truth)[last] / truth.sum() - np.cumsum(1 - truth)[last] / (1 - truth).sum()
    cut = last[int(np.argmax(rate))]
    return float(scores[cut] if cut + 1 == len(scores) else (scores[cut] + scores[cut + 1]) / 2)


def _logit(p_N: np.ndarray) -> np.ndarray:
    p_N = np.clip(p_N, CLIP, 1 - CLIP)
    return np.log(p_N / (1 - p_N))
