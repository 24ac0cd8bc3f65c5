"""What the rows of bench/fairness.py say: levels, changes and their intervals, as tables and a plot.

Everything is a statistic of what the students found together: of a group the mean of its values, weighted by what a
value is of (images of an accuracy, pairs of an AUROC), `worst` the least of the groups and `gap` the most less the
least. Errors are by the jackknife over the seeds (Efron 1982), which for a plain mean is s / √n; students of the same
images and teachers are left out together. For `worst` and `gap` that takes one group to be clearly the worst; of many
small groups the least is also lower than any of them is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

AGAIN = 1000  # added to a seed: the same images and teachers, another student
MOST = 4  # groups that have columns of their own
AT_MOST = 0.5  # points of the majority
NEAR = 0.5  # points of the worst group, the noise of a comparison
OF_ALL, OF_WORST, OF_GAP = "all", "worst", "gap"


class Score(NamedTuple):
    value: float
    weight: float


By = dict[tuple[str, str], dict[int, Score]]  # (method, group) → seed → score


def chosen(rows: Iterable[dict[str, Any]], setting: str, case: str, student: str) -> By:
    """Rows of a setting, and of its teachers."""
    found: By = {}
    for row in rows:
        if (row["setting"], row["case"]) == (setting, case) and row["student"] in (student, ""):
            score = Score(row["value"], row["weight"])
            found.setdefault((row["method"], row["group"]), {})[row["seed"]] = score
    return found


def groups_of(by: By) -> list[str]:
    return [group for group in dict.fromkeys(group for _, group in by) if group != OF_ALL]


def teachers_of(by: By) -> list[str]:
    """They are called "teacher …", and nothing else is."""
    return sorted({method for method, _ in by if method.startswith("teacher ")})


def level(by: By, method: str, what: str, seeds: Iterable[int]) -> float:
    """Of a group, of all, of the worst group, or the gap; NaN where a group is not known."""
    if what in (OF_WORST, OF_GAP):
        levels = [level(by, method, group, seeds) for group in groups_of(by)]
        return float(np.min(levels) if what == OF_WORST else np.ptp(levels))
    scores = [by[method, what][seed] for seed in seeds if seed in by.get((method, what), {})]
    known = [one for one in scores if not math.isnan(one.value) and one.weight > 0]
    values, weights = [one.value for one in known], [one.weight for one in known]
    return float(np.average(values, weights=weights)) if known else math.nan


def best(by: By, what: str, seeds: Iterable[int]) -> float:
    """The level of the teacher that is best in a group, in all or in the worst group."""
    levels = [level(by, one, what, seeds) for one in teachers_of(by)]
    return float(np.nanmax(levels)) if np.isfinite(levels).any() else math.nan


def seeds_of(by: By, *methods: str) -> list[int]:
    """That all of some methods have."""
    return sorted(set.intersection(*(set(by.get((method, OF_ALL), {})) for method in methods)))


class Estimate(NamedTuple):
    """`error` and the interval at 95 % (Student's t) are NaN where there are fewer than two seeds."""

    value: float
    error: float
    lo: float
    hi: float


def jackknife(statistic: Callable[[list[int]], float], seeds: list[int]) -> Estimate:
    blocks = {seed % AGAIN for seed in seeds}
    value, count = statistic(seeds), len(blocks)
    if count < 2:
        return Estimate(value, *[math.nan] * 3)
    without = np.array([statistic([seed for seed in seeds if seed % AGAIN != one]) for one in blocks])
    error = float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return Estimate(value, error, value - half, value + half)


def estimate(by: By, method: str, what: str, other: str | None = None) -> Estimate:
    """A level, or what it is above that of another method on the same seeds, of those in which it is known."""

    def statistic(seeds: list[int]) -> float:
        return level(by, method, what, seeds) - (level(by, other, what, seeds) if other else 0)

    seeds = seeds_of(by, method, *([other] if other else []))
    return jackknife(statistic, [seed for seed in seeds if not math.isnan(statistic([seed]))])


def lines(by: By, methods: Iterable[str]) -> Iterator[list[str]]:
    """A head, then a line a method: levels, changes against uniform on the same seeds, and how far from the best
    teacher of each group. Of many groups only the worst."""
    few = groups_of(by) if len(groups_of(by)) <= MOST else []
    shown = [OF_ALL, *few, OF_WORST]
    yield [
        "method",
        *shown,
        OF_GAP,
        *(f"{one} − uniform" for one in shown),
        *(f"{one} − best" for one in shown),
        "students",
    ]
    trained = [method for method in methods if (method, OF_ALL) in by]
    for method in (*trained, *teachers_of(by)):
        seeds = seeds_of(by, method)
        told = [f"{one.value:.1f} ± {one.error:.1f}" for one in (estimate(by, method, one) for one in (*shown, OF_GAP))]
        if method in trained:
            told += [change(by, method, one, "uniform") if method != "uniform" else "" for one in shown]
            told += [f"{level(by, method, one, seeds) - best(by, one, seeds):+.1f}" for one in shown]
        else:
            told += [""] * 2 * len(shown)
        yield [method, *told, str(len(seeds))]


def change(by: By, method: str, what: str, other: str) -> str:
    found = estimate(by, method, what, other)
    return f"{found.value:+.1f} [{found.lo:+.1f}, {found.hi:+.1f}]"


def duels(by: By, ours: Iterable[str], others: Iterable[str]) -> Iterator[list[str]]:
    """A head, then a line for each of the others: by how much ours are better, in each group."""
    pairs = [(one, group) for one in ours for group in groups_of(by) if (one, group) in by]
    yield ["against", *(f"{one}: {group}" for one, group in pairs)]
    for other in others:
        if (other, OF_ALL) in by:
            yield [other, *(change(by, one, group, other) for one, group in pairs)]


def below(by: By, methods: Iterable[str]) -> Iterator[str]:
    """Groups in which a method is worse than uniform at 95 %."""
    for method in methods:
        for group in (OF_ALL, *groups_of(by)):
            if (method, group) in by and (found := estimate(by, method, group, "uniform")).hi < 0:
                yield f"{method}: {group} [{found.lo:+.1f}, {found.hi:+.1f}]"


def tuned(by: By, methods: Iterable[str], majority: str) -> list[str]:
    """Of variants of a method, in each of which one number is another, and that cost the majority no more than AT_MOST,
    that which lifts the worst group most; of those within NEAR of it that which is best for the majority. Or none."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for method in methods:
        if method != "uniform" and (method, OF_ALL) in by:
            allowed = found.setdefault(re.sub(r" [^,]+ = [\d.]+| [\d.]+", " …", method), [])
            won, kept = (estimate(by, method, what, "uniform").value for what in (OF_WORST, majority))
            if kept >= -AT_MOST:
                allowed.append((won, kept, method))
    return [
        max((one for one in allowed if one[0] >= max(allowed)[0] - NEAR), key=lambda one: one[1])[2]
        if allowed
        else f"{kind}: none"
        for kind, allowed in found.items()
    ]


def plot(by: By, methods: Iterable[str], path: Path) -> None:
    """Minority against majority, mean over the seeds with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "agglom"  # the same file from the same rows
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    shown = [method for method in methods if (method, "B") in by]
    for number, method in enumerate(shown, 1):
        x, y = (estimate(by, method, group) for group in "AB")
        ours = "cells" in method
        errors = {"xerr": np.nan_to_num(x.error), "yerr": np.nan_to_num(y.error)}
        style = {"fmt": "o" if ours else "s", "color": "C0" if ours else "0.5", "alpha": 0.8}
        axes.errorbar(x.value, y.value, label=f"{number}  {method}", **style, **errors)
        # Neighbours in the list are often neighbours in the plane.
        place = (4, 3) if number % 2 else (-4, -3)
        sides = {"ha": "left", "va": "bottom"} if number % 2 else {"ha": "right", "va": "top"}
        axes.annotate(str(number), (x.value, y.value), xytext=place, textcoords="offset points", fontsize=8, **sides)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes.set(xlabel="device A (majority), accuracy in %", ylabel="device B (minority), accuracy in %")
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
