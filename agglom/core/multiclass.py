"""Metrics of a label of several classes: macro averages, each class against the rest, and those of the top class.

| metric | value |
|---|---|
| auroc, auprc | mean over the classes of that of each class against the rest (scikit-learn: `multi_class="ovr"`) |
| accuracy | share of images whose class has the highest score; of equal scores the first class |
| balanced_accuracy | mean over the classes of the share of their images that it holds for |
| f1 | mean over the classes of the F1 of "this class has the highest score" |

An average over classes differs between groups that lack different classes, so all but accuracy are `single_class`
where a class has no rows, and `below_min_pos` where one has fewer than `min_patients` patients; accuracy needs those
many in all. `n_pos` counts the rows of the rarest class. Suffixes as in `metrics`; C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from agglom.core import influence
from agglom.core.influence import Interval, Linear
from agglom.core.metrics import MIN_PATIENTS, Estimate

METRICS = ("auroc", "auprc", "accuracy", "balanced_accuracy", "f1")
_RANKING = ("auroc", "auprc")


def at_level(
    metric: str, class_N: Tensor, p_NC: Tensor, patient_N: Tensor, *, min_patients: int = MIN_PATIENTS
) -> Callable[[float], Estimate]:
    """The estimate as a function of the level of its interval: classes `class_N` in 0 … C − 1, scores `p_NC`.

    Each patient's influence on a mean is the mean of the influences, hence exact covariances between the classes:
    auroc and auprc on the logit scale, accuracy by Wilson, the rest by Student's t with the correction for skewness, as
    in `metrics.evaluate`. Raises ValueError for a metric, shape, class or score that cannot be used.
    """
    class_N, patient_N, (p_NC,) = _checked(metric, class_N, patient_N, p_NC)
    status = _status(metric, class_N, [p_NC], patient_N, min_patients)
    interval: Callable[[float], Interval]
    if status in ("empty", "single_class", "constant_score"):
        interval = _nothing
    else:
        linear = linearise(metric, class_N, p_NC, patient_N)
        interval = partial(influence.mean, linear)
        if metric in (*_RANKING, "accuracy"):
            interval = partial(influence.interval, metric, linear.value, influence.moments(linear))
    return _at(interval, class_N, p_NC.shape[1], patient_N, status)


def difference(
    metric: str, class_N: Tensor, a_NC: Tensor, b_NC: Tensor, patient_N: Tensor, *, min_patients: int = MIN_PATIENTS
) -> Callable[[float], Estimate]:
    """The metric of scores `a_NC` minus that of `b_NC` on the same rows, as `metrics.paired`; else as `at_level`."""
    class_N, patient_N, (a_NC, b_NC) = _checked(metric, class_N, patient_N, a_NC, b_NC)
    status = _status(metric, class_N, [a_NC, b_NC], patient_N, min_patients)
    interval: Callable[[float], Interval] = _nothing
    if status not in ("empty", "single_class", "constant_score"):
        a, b = (linearise(metric, class_N, p_NC, patient_N) for p_NC in (a_NC, b_NC))
        interval = partial(influence.difference, *influence.less(a, b))
    return _at(interval, class_N, a_NC.shape[1], patient_N, status)


def linearise(metric: str, class_N: Tensor, p_NC: Tensor, patient_N: Tensor) -> Linear:
    """The metric with each patient's influence; arguments as `influence.linearise`, every class present."""
    top_N = p_NC.argmax(1)
    if metric == "accuracy":
        return influence.of_mean((top_N == class_N).double(), patient_N)
    of_class = []
    for column, p_N in enumerate(p_NC.unbind(1)):
        is_N = class_N == column
        if metric in _RANKING:
            of_class.append(influence.linearise(metric, is_N, p_N, math.nan, patient_N))
        else:
            rate = "tpr" if metric == "balanced_accuracy" else metric
            of_class.append(influence.linearise(rate, is_N, (top_N == column).double(), 0.5, patient_N))
    return Linear(
        sum(one.value for one in of_class) / len(of_class),
        torch.cat([one.part_KI for one in of_class]) / len(of_class),
        torch.cat([one.size_KI for one in of_class]),
    )


def _checked(metric: str, class_N: Tensor, patient_N: Tensor, *columns: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    for p_NC in columns:
        shapes = tuple(class_N.shape), tuple(patient_N.shape), tuple(p_NC.shape)
        if class_N.ndim != 1 or patient_N.shape != class_N.shape or p_NC.shape != (len(class_N), columns[0].shape[-1]):
            raise ValueError(
                f"class_N, patient_N and scores have shapes {', '.join(map(str, shapes))}; expected (N,), (N,), (N, C)"
            )
        if bool(p_NC.isnan().any()):
            raise ValueError(f"{int(p_NC.isnan().any(1).sum())} of {len(p_NC)} rows of scores hold NaN")
    classes = columns[0].shape[1]
    if len(class_N) and not (int(class_N.min()) >= 0 and int(class_N.max()) < classes):
        raise ValueError(f"class_N spans {int(class_N.min())} … {int(class_N.max())}, outside 0 … {classes - 1}")
    return class_N.long(), patient_N.unique(return_inverse=True)[1], [p_NC.double() for p_NC in columns]


def _status(metric: str, class_N: Tensor, columns: list[Tensor], patient_N: Tensor, min_patients: int) -> str:
    if not len(class_N):
        return "empty"
    if metric == "accuracy":
        return "ok" if int(patient_N.max()) + 1 >= min_patients else "below_min_pos"
    patients = [len(patient_N[class_N == column].unique()) for column in range(columns[0].shape[1])]
    if not min(patients):
        return "single_class"
    if metric in _RANKING and any(bool((p_NC == p_NC[0]).all(0).any()) for p_NC in columns):
        return "constant_score"
    return "ok" if min(patients) >= min_patients else "below_min_pos"


def _at(
    interval: Callable[[float], Interval], class_N: Tensor, classes: int, patient_N: Tensor, status: str
) -> Callable[[float], Estimate]:
    n, rarest = len(class_N), int(torch.bincount(class_N, minlength=classes).min())
    patients = int(patient_N.max()) + 1 if n else 0

    def estimate(level: float) -> Estimate:
        if not 0 < level < 1:
            raise ValueError(f"level is {level:g}; expected a value between 0 and 1, such as 0.95")
        value, lo, hi, method = interval(level)
        return Estimate(value, lo, hi, n, rarest, n - rarest, patients, status, method)

    return estimate


def _nothing(level: float) -> Interval:
    return math.nan, math.nan, math.nan, "none"
