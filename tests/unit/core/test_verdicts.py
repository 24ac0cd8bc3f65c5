"""Verdicts of non-inferiority: what may and may not change them, how often they are wrong, and who is selected."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core import metrics, verdicts
from agglom.core.metrics import STATUSES, Estimate
from agglom.core.verdicts import INCONCLUSIVE, INFERIOR, KINDS, NON_INFERIOR, NOT_ASSESSABLE

# From worst to best news; what cannot be assessed is apart.
NEWS = (INFERIOR, INCONCLUSIVE, NON_INFERIOR)
fast = settings(derandomize=True, max_examples=150, deadline=None)


def estimate(value=0.0, below=0.01, above=0.01, status="ok", patients=200):
    value = value if status not in ("empty", "single_class", "constant_score") else math.nan
    return Estimate(value, value - below, value + above, 2 * patients, patients, patients, patients, status, "test")


numbers = st.floats(-0.3, 0.3).map(lambda value: round(value, 4))
widths = st.floats(1e-4, 0.2).map(lambda value: round(value, 4))
estimates = st.builds(estimate, numbers, widths, widths, st.sampled_from(["ok"] * 5 + ["constant_score"]))
teachers = st.dictionaries(st.sampled_from("abcdef"), estimates, min_size=1, max_size=4)
margins = st.floats(0.001, 0.3)


# ── One group ──


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({"a": estimate(0.0, 0.01)}, NON_INFERIOR),
        ({"a": estimate(0.0, 0.03)}, INCONCLUSIVE),
        ({"a": estimate(-0.05, 0.01)}, INFERIOR),
        ({"a": estimate(0.2, 0.01), "b": estimate(-0.05, 0.01)}, INFERIOR),
        ({"a": estimate(0.2, 0.01), "b": estimate(0.0, 0.03)}, INCONCLUSIVE),
        ({"a": estimate(-0.01, 0.02, 0.02), "b": estimate(0.0, 0.01)}, INCONCLUSIVE),
        ({"a": estimate(0.1, 0.01, status="below_min_pos")}, NOT_ASSESSABLE),
        ({"a": estimate(-0.5, 0.01, status="below_min_neg")}, NOT_ASSESSABLE),
        ({"a": estimate(status="empty")}, NOT_ASSESSABLE),
        ({"a": estimate(), "b": estimate(status="constant_score")}, NOT_ASSESSABLE),
        ({"a": estimate(0.0, 0.03), "b": estimate(status="constant_score")}, INCONCLUSIVE),
        ({"a": estimate(-0.05, 0.01), "b": estimate(status="constant_score")}, INFERIOR),
    ],
)
def test_kinds(pairs, expected):
    assert verdicts.verdict(pairs, 0.02).kind == expected


def test_fields():
    found = verdicts.verdict({"a": estimate(0.03, 0.01), "b": estimate(0.01, 0.04), "c": estimate(0.02, 0.02)}, 0.05)
    assert (found.kind, found.against, found.status) == (NON_INFERIOR, "b", "ok")
    assert found.bound == pytest.approx(-0.03)
    assert found.smallest_margin == pytest.approx(0.03)
    assert found.difference == pytest.approx(0.01)
    assert found.patients_needed is None
    assert verdicts.verdict({"a": estimate(0.03, 0.01)}, 0.05).smallest_margin == 0


def test_what_is_undefined_is_nan():
    found = verdicts.verdict({"a": estimate(status="single_class")}, 0.02)
    assert all(map(math.isnan, (found.bound, found.smallest_margin, found.difference)))
    assert (found.against, found.patients_needed, found.status) == ("", None, "single_class")


@pytest.mark.parametrize("metric", sorted(metrics.LOWER_IS_BETTER))
def test_lower_is_better_turns_the_difference(metric):
    higher_rate = {"a": estimate(0.05, 0.01, 0.02)}
    found = verdicts.verdict(higher_rate, 0.02, metric=metric)
    assert found.kind == INFERIOR
    assert found.bound == pytest.approx(-0.07)
    assert found.difference == pytest.approx(-0.05)
    assert verdicts.verdict({"a": estimate(-0.05, 0.01)}, 0.02, metric=metric).kind == NON_INFERIOR


@pytest.mark.parametrize("margin", [0.0, -0.02, 1.0, 2.0, math.nan])
def test_a_margin_is_a_share(margin):
    with pytest.raises(ValueError, match="expected a value between 0 and 1"):
        verdicts.verdict({"a": estimate()}, margin)


def test_no_teacher_is_no_comparison():
    with pytest.raises(ValueError, match="no teacher"):
        verdicts.verdict({}, 0.02)


@fast
@given(teachers, margins)
def test_every_verdict_is_one_of_four_and_says_what_it_could_show(pairs, margin):
    found = verdicts.verdict(pairs, margin)
    assert found.kind in KINDS
    assert found.status in STATUSES
    if found.kind == NON_INFERIOR:
        assert found.smallest_margin < margin
    elif found.kind != NOT_ASSESSABLE:
        assert found.smallest_margin >= margin
        again = verdicts.verdict(pairs, min(found.smallest_margin * (1 + 1e-9) + 1e-12, 0.999))
        assert again.kind == (NON_INFERIOR if found.status == "ok" else NOT_ASSESSABLE)


@fast
@given(teachers, margins, margins)
def test_a_larger_margin_never_brings_worse_news(pairs, one, other):
    small, large = (verdicts.verdict(pairs, margin).kind for margin in sorted((one, other)))
    if NOT_ASSESSABLE in (small, large):
        # Some teacher is undefined: what the others deny can be taken back, but nothing can be shown.
        assert large == NOT_ASSESSABLE
    else:
        assert NEWS.index(large) >= NEWS.index(small)


@fast
@given(teachers, margins)
def test_the_order_of_teachers_is_nothing(pairs, margin):
    first = verdicts.verdict(pairs, margin)
    for order in itertools.islice(itertools.permutations(pairs), 24):
        found = verdicts.verdict({name: pairs[name] for name in order}, margin)
        assert found == first or (math.isnan(first.bound) and found.kind == first.kind)


@fast
@given(teachers, estimates, margins)
def test_a_teacher_more_never_turns_a_no_into_anything_milder(pairs, more, margin):
    before, after = (verdicts.verdict(some, margin).kind for some in (pairs, pairs | {"more": more}))
    if before in (INFERIOR, INCONCLUSIVE):
        assert after in NEWS
        assert NEWS.index(after) <= NEWS.index(before)
    assert not (after == NON_INFERIOR and before != NON_INFERIOR)


# ── How many patients would decide ──


@fast
@given(teachers.filter(lambda pairs: all(one.status == "ok" for one in pairs.values())), margins)
def test_that_many_patients_decide_and_one_fewer_does_not(pairs, margin):
    found = verdicts.verdict(pairs, margin)
    if found.patients_needed is None or found.patients_needed > 1e7:
        return
    assert found.kind == INCONCLUSIVE
    now = next(iter(pairs.values())).n_patients

    def with_patients(n):
        scale = math.sqrt(now / n)
        return {
            name: one._replace(lo=one.value - (one.value - one.lo) * scale, hi=one.value + (one.hi - one.value) * scale)
            for name, one in pairs.items()
        }

    assert found.patients_needed > now
    assert verdicts.verdict(with_patients(found.patients_needed * (1 + 1e-9) + 1e-6), margin).kind != INCONCLUSIVE
    assert verdicts.verdict(with_patients(found.patients_needed - 1 - 1e-6), margin).kind == INCONCLUSIVE


def test_an_estimate_at_the_margin_is_never_decided():
    assert verdicts.verdict({"a": estimate(-0.02, 0.03, 0.03)}, 0.02).patients_needed is None
    # Another teacher, clearly better than the student, decides all the same.
    pairs = {"a": estimate(-0.02, 0.03, 0.03), "b": estimate(-0.05, 0.04, 0.04)}
    assert verdicts.verdict(pairs, 0.02).patients_needed == pytest.approx(200 * (4 / 3) ** 2, abs=1)


# ── The gate ──


def verdict_of(kind):
    return verdicts.Verdict(kind, 0.0, "a", 0.0, None, 0.0, "ok")


@pytest.mark.parametrize(
    ("kinds", "strict", "relaxed"),
    [
        ([], False, False),
        ([NOT_ASSESSABLE], False, False),
        ([NON_INFERIOR], True, True),
        ([NON_INFERIOR, NOT_ASSESSABLE], True, True),
        ([NON_INFERIOR, INCONCLUSIVE], False, True),
        ([NOT_ASSESSABLE, INCONCLUSIVE], False, True),
        ([NON_INFERIOR, INFERIOR], False, False),
    ],
)
def test_gate(kinds, strict, relaxed):
    found = [verdict_of(kind) for kind in kinds]
    assert verdicts.gate(found) is strict
    assert verdicts.gate(found, fail_on="inferior") is relaxed


# ── Errors of the test, by simulation ──


def wrong(reps, patients, seed, teachers, margin=0.05):
    """The share of each verdict on a student that is worse than each teacher by exactly the margin: TPR .75 and .80."""
    generator = torch.Generator().manual_seed(seed)
    y_N, patient_N = torch.ones(patients), torch.arange(patients)
    counts = dict.fromkeys(KINDS, 0)
    for _ in range(reps):
        draw_N = torch.rand(patients, generator=generator)
        student_N = (draw_N < 0.75).double()
        pairs = {}
        for name in range(teachers):
            flip_N = torch.rand(patients, generator=generator)
            # A teacher finds .9 of what the student finds and half of the rest: .675 + .125.
            teacher_N = (flip_N < torch.where(student_N == 1, 0.9, 0.5)).double()
            pairs[f"{name}"] = metrics.paired(
                "tpr", y_N, student_N, teacher_N, patient_N, threshold_a=0.5, threshold_b=0.5, level=verdicts.LEVEL
            )
        counts[verdicts.verdict(pairs, margin).kind] += 1
    return {kind: count / reps for kind, count in counts.items()}


@pytest.mark.parametrize("teachers", [1, 3])
def test_at_the_margin_at_most_one_in_twenty_is_called_non_inferior(teachers):
    """Four standard errors of 400 repetitions are allowed."""
    found = wrong(400, 250, seed=teachers, teachers=teachers)
    assert found[NON_INFERIOR] <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)
    assert found[INFERIOR] <= 0.05 * teachers + 4 * math.sqrt(0.05 * teachers / 400)
    assert found[INCONCLUSIVE] > 0.7


def test_auroc_at_the_margin():
    """Normal scores: the student's AUROC is Φ(1/√2) = .760, the teacher's higher by the margin."""
    generator, reps, patients = torch.Generator().manual_seed(5), 300, 300
    margin = 0.04
    normal = torch.distributions.Normal(0.0, 1.0)
    distance = math.sqrt(2) * float(normal.icdf(torch.tensor(0.5 * (1 + math.erf(0.5)) + margin)))
    y_N, patient_N = torch.arange(patients) % 2, torch.arange(patients)
    called = 0
    for _ in range(reps):
        shared_N, own_2N = torch.randn(patients, generator=generator), torch.randn(2, patients, generator=generator)
        noise_2N = math.sqrt(0.7) * shared_N + math.sqrt(0.3) * own_2N
        student_N, teacher_N = noise_2N[0] + y_N, noise_2N[1] + distance * y_N
        pair = metrics.paired("auroc", y_N, student_N, teacher_N, patient_N, level=verdicts.LEVEL)
        called += verdicts.verdict({"a": pair}, margin).kind == NON_INFERIOR
    assert called / reps <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / reps)
    assert called


@pytest.mark.slow
@pytest.mark.parametrize("teachers", [1, 2, 4])
def test_error_rates_over_many_repetitions(teachers):
    found = wrong(3000, 400, seed=teachers, teachers=teachers)
    assert found[NON_INFERIOR] <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 3000)
    assert found[INFERIOR] <= 0.05 * teachers + 2 * math.sqrt(0.05 * teachers / 3000)


# ── Selection ──


def test_selects_by_the_lowest_bound_of_a_group():
    runs = {
        "even": {"F": estimate(0.80, 0.04), "M": estimate(0.81, 0.02)},
        "best on average": {"F": estimate(0.95, 0.01), "M": estimate(0.79, 0.06)},
        "sure": {"F": estimate(0.79, 0.01), "M": estimate(0.79, 0.02)},
    }
    found = verdicts.select(runs)
    assert found.name == "sure"
    assert found.bounds == {name: pytest.approx(b) for name, b in zip(runs, (0.76, 0.73, 0.77), strict=True)}
    assert found.group_of == {"even": "F", "best on average": "M", "sure": "M"}


def test_selects_the_lowest_upper_bound_where_lower_is_better():
    runs = {"a": {"F": estimate(0.2, above=0.05), "M": estimate(0.1)}, "b": {"F": estimate(0.21), "M": estimate(0.22)}}
    found = verdicts.select(runs, metric="fpr")
    assert (found.name, found.group_of) == ("b", {"a": "F", "b": "M"})
    assert found.bounds == {"a": pytest.approx(0.25), "b": pytest.approx(0.23)}


def test_none_wins_by_failing_in_a_group():
    low, none = estimate(0.6), estimate(status="constant_score")
    found = verdicts.select({"a": {"F": estimate(0.9), "M": low}, "b": {"F": estimate(0.9), "M": none}})
    assert found.name == "a"
    assert math.isnan(found.bounds["b"])
    assert found.group_of["b"] is None


def test_groups_that_none_can_assess_decide_nothing():
    few = estimate(0.1, status="below_min_pos")
    found = verdicts.select({"a": {"F": estimate(0.8), "X": few}, "b": {"F": estimate(0.7), "X": few}})
    assert (found.name, found.group_of["a"]) == ("a", "F")
    found = verdicts.select({"a": {"X": few}, "b": {"X": few}})
    assert found.name is None
    assert all(map(math.isnan, found.bounds.values()))


@fast
@given(st.dictionaries(st.sampled_from("pqr"), st.lists(estimates, min_size=3, max_size=3), min_size=1))
def test_the_chosen_one_has_the_best_bound(candidates):
    found = verdicts.select({name: dict(zip("xyz", several, strict=True)) for name, several in candidates.items()})
    bounds = [bound for bound in found.bounds.values() if not math.isnan(bound)]
    assert (found.name is None) == (not bounds)
    assert found.name is None or found.bounds[found.name] == max(bounds)
