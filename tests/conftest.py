"""What several kinds of test need."""

import math
import os
import random
from statistics import NormalDist

import pytest

from agglom.report import COLUMNS

# The tests run in as many processes as there are cores; threads that wait for each other would only take them away.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARES = ("0.01", "0.05", "0.1", "0.25", "1")


@pytest.fixture(scope="session")
def studied():
    """`studied(label, predictors, groups)`: rows and context of all studies of a label, as evaluated."""
    return make_studies


def make_studies(label, predictors, groups, stage="full", split="test"):
    """`groups`: by attribute or crossing its groups; weights are over the last. The gap grows as labels shrink."""
    draw = random.Random(label)
    rows = []

    def add(metric, predictor, place, value, half, target="", **more):
        plain = dict.fromkeys(COLUMNS) | {"stage": stage, "split": split, "readout": "linear", "note": "", "rule": ""}
        plain |= {"attribute": place[0], "group": place[1], "metric": metric, "predictor": predictor, "target": target}
        counts = {"n": 600, "n_pos": 200, "n_neg": 400, "n_patients": 500, "status": "ok", "ci_method": "delong"}
        interval = {"value": value, "lo": value - half, "hi": min(1.0, value + half)}
        rows.append(plain | {"label": label} | counts | interval | more)

    for i, name in enumerate(predictors):
        for attribute, members in groups.items():
            for g, group in enumerate(members):
                add("leakage", name, (attribute, group), 0.83 - 0.07 * i - 0.02 * g, 0.04, label="")
            for trained in ("all", *members):
                for group in members:
                    value = 0.88 - 0.02 * i - 0.08 * (trained not in ("all", group)) + draw.gauss(0, 0.01)
                    add("holdout_auroc", name, (attribute, group), value, 0.05, trained)
        for target in SHARES:
            few, seeds = -math.log10(float(target)), {"ci_method": "seed_range", "note": "3 seeds"}
            half = 0.012 * few
            add("scarcity_auroc", name, ("", "all"), 0.9 - 0.02 * i - 0.07 * few, half, target, **seeds)
            for attribute, members in groups.items():
                for g, group in enumerate(members):
                    value = 0.9 - 0.03 * g - 0.02 * i - 0.07 * few
                    add("scarcity_auroc", name, (attribute, group), value, half, target, **seeds)
                for metric, value in (("gap", 0.04 + 0.03 * few + 0.005 * i), ("worst", 0.84 - 0.08 * few)):
                    add(f"scarcity_auroc_{metric}", name, (attribute, "all"), value, half, target, **seeds)
    places = [("", "all"), *((attribute, group) for attribute, members in groups.items() for group in members)]
    curves = [
        _curve(label, name, place, 1.7 - 0.15 * i - 0.1 * g)
        for i, name in enumerate(predictors)
        for g, place in enumerate(places)
    ]
    attribute, members = list(groups.items())[-1]
    teachers = [name.removeprefix("teacher/") for name in predictors if name.startswith("teacher/")]
    return rows, {"curves": curves} | ({"weights": _weights(attribute, members, teachers)} if teachers else {})


def _curve(label, predictor, place, separation):
    normal, fpr = NormalDist(), [i / 40 for i in range(41)]
    tpr = [0.0, *(normal.cdf(separation + normal.inv_cdf(x)) for x in fpr[1:-1]), 1.0]
    bins = []
    for tenth in range(10):
        score = round(0.05 + tenth / 10, 2)
        rate = score ** (1.0 + 0.3 * len(place[1]) / 10)
        n = 90 - 8 * tenth
        half = 1.96 * math.sqrt(rate * (1 - rate) / n)
        bins.append(
            {"score": score, "rate": rate, "lo": max(0.0, rate - half), "hi": min(1.0, rate + half)}
            | {"n": n, "n_patients": n}
        )
    key = {"label": label, "readout": "linear", "predictor": predictor, "attribute": place[0], "group": place[1]}
    return key | {"roc": {"fpr": fpr, "tpr": tpr}, "calibration": bins}


def _weights(attribute, groups, teachers):
    def cell(g, t, time):
        return round(2.0 ** (time * (g - (len(groups) - 1) / 2) + 0.4 * (t - (len(teachers) - 1) / 2)), 5)

    stages = [
        {"stage": stage, "weight": [[cell(g, t, time) for t in range(len(teachers))] for g in range(len(groups))]}
        for stage, time in (("warm", 0.4), ("full", 0.9))
    ]
    steps = list(range(50, 1550, 50))
    path = [[cell(g, (len(teachers) - 1) / 2, step / 1500) for g in range(len(groups))] for step in steps]
    return {
        "attribute": attribute,
        "groups": groups,
        "teachers": teachers,
        "stages": stages,
        "path": {"step": steps, "weight": path},
    }
