"""agglom.core.disparity against fairlearn, brute force over the corners of the box, and over all assignments."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core import disparity, influence, metrics
from agglom.core.disparity import detectable, equalized_odds, equity_scaled, gap_to_overall, ratio, unknown_bounds
from agglom.core.metrics import Estimate, evaluate, evaluate_groups, gap

quick = settings(max_examples=60, deadline=None, derandomize=True)
RATES = ("accuracy", "balanced_accuracy", "f1", "tpr", "fpr", "ppv", "npv", "selection_rate")


def estimate_of(value, lo, hi, status="ok"):
    return Estimate(value, lo, hi, 100, 50, 50, 80, status, "m")


box = st.tuples(*[st.integers(0, 20)] * 3).map(lambda xs: estimate_of(*(sorted(xs)[i] / 20 for i in (1, 0, 2))))
boxes = st.lists(box, min_size=2, max_size=4)
EXCLUDED = [estimate_of(0.1, 0, 0.2, "below_min_pos"), estimate_of(math.nan, math.nan, math.nan, "single_class")]


def es(overall, values, form, alpha=1.0):
    spread = np.std(values) if form == "std" else sum(abs(v - overall) for v in values)
    return overall / (1 + alpha * spread)


# ── Point values against fairlearn ──


@settings(quick, max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2)), min_size=12, max_size=60))
def test_values_are_those_of_fairlearn(rows):
    from fairlearn.metrics import (
        MetricFrame,
        demographic_parity_difference,
        equalized_odds_difference,
        false_positive_rate,
        selection_rate,
        true_positive_rate,
    )

    # Every group has both classes: without one fairlearn reads a rate of 0, agglom none.
    rows = [*rows, *itertools.product((True, False), (True, False), range(3))]
    y, said, group = (np.array(column) for column in zip(*rows, strict=True))
    functions = {"selection_rate": selection_rate, "tpr": true_positive_rate, "fpr": false_positive_rate}
    frame = MetricFrame(metrics=functions, y_true=y, y_pred=said, sensitive_features=group)
    arguments = torch.tensor(y), torch.tensor(said).double(), torch.arange(len(y))
    by_group = {
        metric: evaluate_groups(metric, *arguments, torch.tensor(group), 3, threshold=0.5, min_patients=1)
        for metric in ("tpr", "fpr")
    }
    selected = [estimate_of(float(v), 0, 1) for v in frame.by_group["selection_rate"]]
    assert gap(selected).estimate.value == pytest.approx(
        demographic_parity_difference(y, said, sensitive_features=group), abs=1e-12
    )
    for metric, estimates in (*by_group.items(), ("selection_rate", selected)):
        overall = estimate_of(float(frame.overall[metric]), 0, 1)
        to_overall = gap_to_overall(overall, estimates).estimate.value
        assert ratio(estimates).estimate.value == pytest.approx(frame.ratio()[metric], abs=1e-12)
        assert to_overall == pytest.approx(frame.difference(method="to_overall")[metric], abs=1e-12)
        assert gap(estimates).estimate.value == pytest.approx(frame.difference()[metric], abs=1e-12)
        worst = (frame.group_max if metric in metrics.LOWER_IS_BETTER else frame.group_min)()[metric]
        assert metrics.worst(metric, estimates).estimate.value == pytest.approx(worst, abs=1e-12)
    assert equalized_odds(by_group["tpr"], by_group["fpr"]).estimate.value == pytest.approx(
        equalized_odds_difference(y, said, sensitive_features=group), abs=1e-12
    )


def test_equity_scaled_in_both_forms():
    groups = [estimate_of(v, v, v) for v in (0.9, 0.7, 0.8)]
    overall = estimate_of(0.82, 0.82, 0.82)
    for form, alpha, expected in (
        ("sum", 1, 0.82 / (1 + 0.08 + 0.12 + 0.02)),
        ("sum", 2, 0.82 / (1 + 2 * 0.22)),
        ("std", 1, 0.82 / (1 + math.sqrt(0.02 / 3))),
        ("std", 0, 0.82),
    ):
        e = equity_scaled(overall, groups, form, alpha).estimate
        assert (e.value, e.lo, e.hi) == pytest.approx((expected, expected, expected), abs=1e-9)


# ── Intervals against brute force over the box ──


@quick
@given(boxes, box, st.integers(0, 2**16))
def test_intervals_hold_every_point_of_the_box_and_the_exact_ones_touch_it(estimates, overall, seed):
    rng = random.Random(seed)
    grids = [sorted({e.lo, e.value, e.hi, rng.uniform(e.lo, e.hi)}) for e in estimates]
    # Where the overall value may lie: its ends, the ends of the others, halfway between any two of them.
    knots = {x for e in (overall, *estimates) for x in (e.lo, e.hi)}
    middles = {(a + b) / 2 for a, b in itertools.product(knots, knots)} | {overall.value}
    middles = [m for m in sorted(middles) if overall.lo <= m <= overall.hi]
    measures = {
        "ratio": (ratio(estimates), lambda v, m: min(v) / max(v) if max(v) else math.nan),
        "to_overall": (gap_to_overall(overall, estimates), lambda v, m: max(abs(x - m) for x in v)),
        "sum": (equity_scaled(overall, estimates, "sum"), lambda v, m: es(m, v, "sum")),
        "std": (equity_scaled(overall, estimates, "std", 2), lambda v, m: es(m, v, "std", 2)),
    }
    points = list(itertools.product(*grids))
    for name, (across, function) in measures.items():
        seen = [function(v, m) for v in points for m in (middles if name != "ratio" else [0.5])]
        seen = [x for x in seen if not math.isnan(x)]
        e = across.estimate
        if e.status != "ok":
            assert name == "ratio"
            assert max(x.value for x in estimates) == 0
            continue
        assert e.lo - 1e-9 <= min(seen)
        assert max(seen) <= e.hi + 1e-9
        assert e.lo - 1e-9 <= e.value <= e.hi + 1e-9
    # The corners of the box reach these ends.
    spread = measures["to_overall"][0].estimate
    assert max(max(abs(x - m) for x in v) for v in points for m in middles) == pytest.approx(spread.hi)
    corners = list(itertools.product(*[(e.lo, e.hi) for e in estimates]))
    assert min(es(m, v, "sum") for v in corners for m in (overall.lo, overall.hi)) == pytest.approx(
        measures["sum"][0].estimate.lo
    )


@pytest.mark.parametrize(
    ("lows", "highs", "expected"),
    [
        ((0.2, 0.6), (0.4, 0.8), (0.25, 0.4 / 0.6)),
        ((0.2, 0.3), (0.5, 0.4), (0.5, 1.0)),
        ((0.0, 0.4), (0.2, 0.5), (0, 0.5)),
    ],
)
def test_the_interval_of_a_ratio(lows, highs, expected):
    e = ratio([estimate_of((a + b) / 2, a, b) for a, b in zip(lows, highs, strict=True)]).estimate
    assert (e.lo, e.hi) == pytest.approx(expected)


def test_the_least_deviation_and_distance_within_the_box_are_exact():
    boxed = [estimate_of(0.5, 0.1, 0.6), estimate_of(0.7, 0.55, 0.9), estimate_of(0.8, 0.75, 0.95)]
    overall = estimate_of(0.6, 0.5, 0.66)
    fine = [np.linspace(e.lo, e.hi, 41) for e in boxed]
    mesh = np.stack(np.meshgrid(*fine, indexing="ij"), -1)
    best = 0.66 / (1 + mesh.std(-1).min())
    assert equity_scaled(overall, boxed, "std").estimate.hi == pytest.approx(best, abs=2e-3)
    middles = np.linspace(0.5, 0.66, 41)
    nearest = min(np.abs(mesh - m).max(-1).min() for m in middles)
    assert gap_to_overall(overall, boxed).estimate.lo == pytest.approx(nearest, abs=6e-3)
    assert equity_scaled(overall, boxed, "sum").estimate.hi == pytest.approx(
        max(m / (1 + np.abs(mesh - m).sum(-1).min()) for m in middles), abs=2e-3
    )


def test_groups_that_do_not_count_are_listed():
    good = [estimate_of(0.8, 0.7, 0.9), estimate_of(0.9, 0.85, 0.95)]
    overall, listed = estimate_of(0.86, 0.8, 0.9), ((1, "below_min_pos"), (3, "single_class"))
    mixed = [good[0], EXCLUDED[0], good[1], EXCLUDED[1]]
    for across, groups in (
        (ratio(mixed), (0, 2)),
        (gap_to_overall(overall, mixed), (0,)),
        (equity_scaled(overall, mixed, "sum"), (0, 2)),
        (equity_scaled(overall, mixed, "std"), (0, 2)),
        (equalized_odds(mixed, mixed), (2, 0)),
    ):
        assert (across.groups, across.excluded, across.estimate.status) == (groups, listed, "ok")
        assert (across.estimate.n, across.estimate.n_patients) == (200, 160)
    for across in (
        ratio(mixed[:2]),
        gap_to_overall(overall, mixed[:2]),
        equity_scaled(overall, mixed[:2], "std"),
        equalized_odds(mixed, mixed[:2]),
        equalized_odds(mixed[:2], mixed),
    ):
        assert math.isnan(across.estimate.value)
        assert across.estimate.status == "below_min_pos"
    for across in (gap_to_overall(EXCLUDED[1], good), equity_scaled(EXCLUDED[1], good, "sum")):
        assert math.isnan(across.estimate.lo)
        assert (across.estimate.status, across.estimate.method, across.groups) == ("single_class", "none", ())


def test_equalized_odds_takes_the_larger_gap_and_every_exclusion():
    tpr = [estimate_of(0.8, 0.7, 0.9), estimate_of(0.5, 0.4, 0.6), EXCLUDED[0]]
    fpr = [estimate_of(0.1, 0.0, 0.2), EXCLUDED[1], estimate_of(0.3, 0.2, 0.9)]
    across = equalized_odds(tpr, fpr)
    assert (across.groups, across.excluded) == ((0, 1), ((1, "single_class"), (2, "below_min_pos")))
    assert (across.estimate.value, across.estimate.lo, across.estimate.hi) == pytest.approx((0.3, 0.1, 0.9))


def test_a_ratio_of_nothing_is_undefined():
    across = ratio([estimate_of(0.0, 0.0, 0.1)] * 2)
    assert math.isnan(across.estimate.value)
    assert across.estimate.status == "constant_score"
    assert ratio([estimate_of(0.0, 0.0, 0.1), estimate_of(0.2, 0.1, 0.3)]).estimate.value == 0


# ── What could have been detected ──


def test_the_detectable_gap_is_found_with_the_power_promised():
    rows, level = 400, 0.95
    z = influence.z_of(metrics.simultaneous(level, 2))
    half = z * math.sqrt(0.25 / rows)
    found = detectable([estimate_of(0.5, 0.5 - half, 0.5 + half)] * 2)
    assert found == pytest.approx((1.959964 + 0.841621) * math.sqrt(2 * 0.25 / rows), rel=1e-5)
    rng = np.random.default_rng(0)
    seen = rng.binomial(rows, 0.5 - found / 2, 4000) - rng.binomial(rows, 0.5 + found / 2, 4000)
    assert np.mean(np.abs(seen) / rows > 1.96 * math.sqrt(0.5 / rows)) == pytest.approx(0.8, abs=0.03)


def test_the_detectable_gap_is_that_of_the_least_precise_pair():
    z = influence.z_of(metrics.simultaneous(0.9, 4))
    groups = [estimate_of(0.5, 0.5 - z * s, 0.5 + z * s) for s in (0.03, 0.01, 0.04)]
    expected = 0.05 * (influence.z_of(1 - 0.1 / 3) + 1.281552)
    assert detectable([*groups, EXCLUDED[0]], power=0.9, level=0.9) == pytest.approx(expected)
    assert math.isnan(detectable([groups[0], *EXCLUDED]))


# ── Unknown groups ──


def every_assignment(metric, y, p, group, wanted):
    """Values of group `wanted` over all subsets of the unknown rows that give one."""
    known, unknown = [np.flatnonzero(group == g) for g in (wanted, -1)]
    for taken in itertools.product((False, True), repeat=len(unknown)):
        rows = np.concatenate([known, unknown[np.array(taken, dtype=bool)]])
        yy, pp = y[rows], p[rows]
        tp, fp, fn, tn = (np.sum((yy == a) & ((pp >= 0.5) == b)) for a, b in ((1, 1), (0, 1), (1, 0), (0, 0)))
        with np.errstate(invalid="ignore"):
            value = {
                "auroc": lambda y=yy, p=pp: (
                    np.mean((p[y][:, None] > p[~y]) + 0.5 * (p[y][:, None] == p[~y]))
                    if 0 < y.sum() < len(y)
                    else math.nan
                ),
                "brier": lambda y=yy, p=pp: np.mean((p - y) ** 2) if len(y) else math.nan,
                "accuracy": lambda c=(tp, fp, fn, tn): (c[0] + c[3]) / np.float64(sum(c)),
                "selection_rate": lambda c=(tp, fp, fn, tn): (c[0] + c[1]) / np.float64(sum(c)),
                "tpr": lambda c=(tp, fp, fn, tn): np.float64(c[0]) / (c[0] + c[2]),
                "fpr": lambda c=(tp, fp, fn, tn): np.float64(c[1]) / (c[1] + c[3]),
                "ppv": lambda c=(tp, fp, fn, tn): np.float64(c[0]) / (c[0] + c[1]),
                "npv": lambda c=(tp, fp, fn, tn): np.float64(c[3]) / (c[3] + c[2]),
                "f1": lambda c=(tp, fp, fn, tn): np.float64(2 * c[0]) / (2 * c[0] + c[1] + c[2]),
                "balanced_accuracy": lambda c=(tp, fp, fn, tn): (
                    (np.float64(c[0]) / (c[0] + c[2]) + np.float64(c[3]) / (c[1] + c[3])) / 2
                ),
            }[metric]()
        if not math.isnan(value):
            yield value


row = st.tuples(st.booleans(), st.integers(0, 6))
cases = st.tuples(st.lists(row, max_size=7), st.lists(st.tuples(row, st.integers(0, 1)), max_size=12))


@settings(quick, max_examples=40)
@given(cases)
def test_bounds_are_the_extremes_over_all_assignments(case):
    rows = [(y, p, -1) for y, p in case[0]] + [(y, p, g) for (y, p), g in case[1]]
    y, p, group = (np.array([r[i] for r in rows]) for i in range(3))
    y, p, group = y.astype(bool), p / 6, group.astype(int)
    for metric in disparity.BOUNDED:
        bounds = unknown_bounds(metric, *(torch.tensor(x) for x in (y, p, group)), 3, 0.5)
        for wanted in range(3):
            seen = list(every_assignment(metric, y, p, group, wanted))
            expected = (min(seen), max(seen)) if seen else (math.nan, math.nan)
            assert bounds[wanted] == pytest.approx(expected, abs=1e-12, nan_ok=True), metric


def test_blocks_of_scores_give_bounds_that_are_only_a_little_wider(monkeypatch):
    rng = np.random.default_rng(0)
    y, group = torch.tensor(rng.random(3000) < 0.3), torch.tensor(rng.integers(-1, 3, 3000))
    p = torch.tensor(rng.random(3000)) + 0.3 * y
    exact = unknown_bounds("auroc", y, p, group, 3)
    monkeypatch.setattr(disparity, "BLOCKS", 50)
    for (lo, hi), (wide_lo, wide_hi) in zip(exact, unknown_bounds("auroc", y, p, group, 3), strict=True):
        assert lo - 0.02 < wide_lo <= lo < hi <= wide_hi < hi + 0.02


def test_bounds_hold_the_value_and_close_when_all_is_known():
    rng = np.random.default_rng(1)
    y, group = torch.tensor(rng.random(200) < 0.3), torch.tensor(rng.integers(0, 2, 200))
    p = torch.tensor(rng.random(200))
    for metric in ("auroc", "accuracy", "tpr", "fpr"):
        values = [e.value for e in evaluate_groups(metric, y, p, torch.arange(200), group, 2, threshold=0.5)]
        assert [lo for lo, _ in unknown_bounds(metric, y, p, group, 2, 0.5)] == pytest.approx(values, abs=1e-12)
        assert [hi for _, hi in unknown_bounds(metric, y, p, group, 2, 0.5)] == pytest.approx(values, abs=1e-12)
        hidden = group.masked_fill(torch.arange(200) < 40, -1)
        bounds = unknown_bounds(metric, y, p, hidden, 2, 0.5)
        assert all(lo <= value <= hi for (lo, hi), value in zip(bounds, values, strict=True))
    assert evaluate("auroc", y, p, torch.arange(200)).value > 0


def test_wrong_input_is_named():
    y, p, group = torch.tensor([0, 1]), torch.tensor([0.2, 0.7]), torch.tensor([0, -1])
    pair = [estimate_of(0.5, 0.4, 0.6), estimate_of(-0.1, -0.2, 0.1)]
    for match, call in {
        "metric 'ece' has no bounds; known: auroc": lambda: unknown_bounds("ece", y, p, group, 1),
        "tpr needs a threshold": lambda: unknown_bounds("tpr", y, p, group, 1),
        "group_N spans -1 … 0, outside −1 … -1": lambda: unknown_bounds("auroc", y, p, group, 0),
        "form is 'max'": lambda: equity_scaled(pair[0], pair, "max"),
        "alpha is -1": lambda: equity_scaled(pair[0], pair, "sum", -1),
        "power is 80": lambda: detectable(pair, power=80),
        "level is 95": lambda: detectable(pair, level=95),
        "a group reads -0.1": lambda: ratio(pair),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
