"""Is the student non-inferior to every teacher in a group? Which of several candidates has the best worst group?

Both questions are about a minimum, and both get an intersection-union test (Berger 1982, Technometrics 24).
"Non-inferior to all teachers" is claimed only where it holds against each of them at one-sided 5 %, and then the whole
claim is wrong in at most 5 % of samples: no adjustment is due, and no best teacher is picked, so none by luck.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from agglom.core.metrics import LOWER_IS_BETTER, Estimate

NON_INFERIOR, INFERIOR = "non_inferior", "inferior"
INCONCLUSIVE, NOT_ASSESSABLE = "inconclusive", "not_assessable"
KINDS = (NON_INFERIOR, INFERIOR, INCONCLUSIVE, NOT_ASSESSABLE)
# The level of a two-sided interval whose ends are one-sided 95 % bounds.
LEVEL = 0.90
# An estimate this near the margin would need more patients than there are people.
_AT_THE_MARGIN = 1e-5

FailOn = Literal["inconclusive", "inferior"]


class Verdict(NamedTuple):
    """What the patients of one group say. Differences are turned so that more is better for the student.

    `against` is the teacher with the lowest lower bound, `difference` the estimate against it and `bound` that lower
    bound; `smallest_margin` = max(0, −bound): against any larger margin the group is non-inferior. `patients_needed`
    (patients of this group in all) is None unless the verdict is inconclusive, and where the estimate lies at the
    margin. `status` is the first that is not ok, else ok. Undefined numbers are NaN, an undefined teacher is "".
    """

    kind: str
    bound: float
    against: str
    smallest_margin: float
    patients_needed: int | None
    difference: float
    status: str


class Choice(NamedTuple):
    """The candidate with the best `bounds`; `group_of` names the group that sets each (None: not comparable)."""

    name: str | None
    bounds: dict[str, float]
    group_of: dict[str, str | None]


def verdict(differences: Mapping[str, Estimate], margin: float, *, metric: str = "auroc") -> Verdict:
    """One group's verdict from `metrics.paired(metric, student, teacher, level=LEVEL)` by teacher.

    - non_inferior: the lower bound against every teacher exceeds −margin. At most 5 % of samples say so wrongly.
    - inferior: the upper bound against some teacher is below −margin. It is not adjusted for the number of teachers T:
      up to 5·T % of samples say so wrongly where the student sits at the margin of all of them.
    - not_assessable: a status is not ok and no teacher with a defined difference stands against the claim; thus a
      teacher more never turns a "no" into anything milder.
    - inconclusive: anything else.

    Where `metric` is better when lower (fpr, ece, brier) the difference is turned round.

    `patients_needed` leaves every estimate where it is, and the mix of outcomes and images per patient too, and lets
    the distance to its bounds shrink by 1/√n. Then it is the number that puts all bounds above −margin, or, where an
    estimate is below −margin, the upper bound of one such teacher under it. It is a plan for a study, no promise.

    Raises ValueError for a margin outside (0, 1) and for no teacher at all.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin is {margin:g}; expected a value between 0 and 1, such as 0.02")
    if not differences:
        raise ValueError("no teacher to compare with")
    better = {name: turned(metric, one) for name, one in differences.items()}
    usable = {name: one for name, one in better.items() if one.status == "ok"}
    status = next((one.status for one in better.values() if one.status != "ok"), "ok")
    if not usable:
        return Verdict(NOT_ASSESSABLE, math.nan, "", math.nan, None, math.nan, status)
    # By name where bounds are equal, so that the order of the teachers says nothing.
    against = min(usable, key=lambda name: (usable[name].lo, name))
    bound, needed = usable[against].lo, None
    if any(one.hi < -margin for one in usable.values()):
        kind = INFERIOR
    elif bound <= -margin:
        kind, needed = INCONCLUSIVE, _patients_needed(usable.values(), margin)
    else:
        kind = NON_INFERIOR if status == "ok" else NOT_ASSESSABLE
    return Verdict(kind, bound, against, max(0.0, -bound), needed, usable[against].value, status)


def gate(verdicts: Iterable[Verdict], *, fail_on: FailOn = "inconclusive") -> bool:
    """Pass only if there is an assessable group and every assessable one is non-inferior.

    With `fail_on="inferior"` an inconclusive group passes, too. Demanding every group is again an intersection-union
    test: it needs no adjustment for the number of groups.
    """
    kinds = {one.kind for one in verdicts} - {NOT_ASSESSABLE}
    return bool(kinds) and not kinds & ({INFERIOR} if fail_on == "inferior" else {INFERIOR, INCONCLUSIVE})


def select(candidates: Mapping[str, Mapping[str, Estimate]], *, metric: str = "auroc") -> Choice:
    """The candidate (run, stage) whose worst group has the best lower bound, from its estimates by group at `LEVEL`.

    The lowest bound of all groups is itself a one-sided 95 % bound of the worst group's value, whatever their number.
    Groups that no candidate can assess are left out. A candidate that misses one which another has is not comparable
    (bound NaN): it must not win by failing there. Ties go to the first. `bounds` are in the units of `metric`: where
    lower is better, they are upper bounds. The bound of the chosen one flatters, as that of any maximum.
    """
    assessable = dict.fromkeys(g for groups in candidates.values() for g, one in groups.items() if one.status == "ok")
    bounds: dict[str, float] = {}
    group_of: dict[str, str | None] = {}
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    for name, groups in candidates.items():
        complete = assessable and all(g in groups and groups[g].status == "ok" for g in assessable)
        low = {g: turned(metric, groups[g]).lo for g in assessable} if complete else {}
        worst = min(low, key=low.__getitem__, default=None)
        bounds[name], group_of[name] = (math.nan if worst is None else sign * low[worst]), worst
    comparable = [name for name, bound in bounds.items() if not math.isnan(bound)]
    return Choice(max(comparable, key=lambda name: sign * bounds[name], default=None), bounds, group_of)


def turned(metric: str, one: Estimate) -> Estimate:
    """A difference, or a value, so that more of it is better."""
    return one._replace(value=-one.value, lo=-one.hi, hi=-one.lo) if metric in LOWER_IS_BETTER else one


def _patients_needed(estimates: Iterable[Estimate], margin: float) -> int | None:
    below: list[float] = []
    above: list[float] = []
    for one in estimates:
        distance = one.value + margin
        if abs(distance) < _AT_THE_MARGIN:
            above.append(math.inf)
            continue
        reach = one.value - one.lo if distance > 0 else one.hi - one.value
        (above if distance > 0 else below).append(one.n_patients * (reach / distance) ** 2)
    needed = min(below) if below else max(above)
    return None if math.isinf(needed) else math.floor(needed) + 1
