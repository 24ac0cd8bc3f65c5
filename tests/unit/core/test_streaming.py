"""agglom.core.streaming against the metrics of the scores themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom import probes
from agglom.core.influence import linearise, moments, rate
from agglom.core.metrics import THRESHOLDED, evaluate, evaluate_groups
from agglom.core.streaming import ScoreHistogram

quick = settings(max_examples=60, deadline=None, derandomize=True)
rows_of_a_case = st.lists(
    st.tuples(st.booleans(), st.one_of(st.integers(0, 10).map(lambda k: k / 10), st.floats(0, 1)), st.integers(-1, 2)),
    max_size=40,
)


def columns(rows):
    y, p, group = zip(*rows, strict=True) if rows else ((), (), ())
    return torch.tensor(y, dtype=torch.bool), torch.tensor(p, dtype=torch.float64), torch.tensor(group).long()


def estimates(metric, y, p, group, **options):
    patient, options = torch.arange(len(y)), {"min_patients": 1, "replicates": 2, **options}
    return [*evaluate_groups(metric, y, p, patient, group, 3, **options), evaluate(metric, y, p, patient, **options)]


def values(metric, *arguments, **options):
    return [e.value for e in estimates(metric, *arguments, **options)]


@quick
@given(rows_of_a_case, st.sampled_from([2, 8, 64]))
def test_the_bounds_of_auroc_hold_the_exact_value(rows, bins):
    y, p, group = columns(rows)
    found = ScoreHistogram.empty(3, bins).update(y, p, group).auroc()
    for e, value, lo, hi in zip(estimates("auroc", y, p, group), *found, strict=True):
        if e.status == "constant_score":
            assert float(value) == 0.5
        elif math.isnan(e.value):
            assert math.isnan(value)
        else:
            assert lo - 1e-12 <= e.value <= hi + 1e-12
            assert float(value) == pytest.approx(float(lo + hi) / 2)


@quick
@given(rows_of_a_case, st.sampled_from([2, 8, 64]))
def test_the_bounds_of_average_precision_hold_the_exact_value(rows, bins):
    y, p, group = columns(rows)
    found = ScoreHistogram.empty(3, bins).update(y, p, group).auprc()
    for e, value, lo, hi in zip(estimates("auprc", y, p, group), *found, strict=True):
        if e.status != "constant_score":
            assert math.isnan(e.value) == math.isnan(value)
        if not math.isnan(e.value):
            assert lo - 1e-12 <= e.value <= hi + 1e-12
            assert float(value) == pytest.approx(float(lo + hi) / 2)


def test_the_bounds_of_average_precision_are_reached():
    y, group = torch.tensor([0, 1, 1, 0, 1]), torch.zeros(5, dtype=torch.int64)
    for p, reached in (
        ([0.1, 0.6, 0.6, 0.55, 0.9], 2),
        ([0.1, 0.6, 0.7, 0.8, 0.9], 2),
        ([0.1, 0.6, 0.7, 0.95, 0.9], 1),
    ):
        p = torch.tensor(p, dtype=torch.float64)
        y_2 = y if reached == 1 else torch.tensor([0, 1, 1, 0, 1])
        found = ScoreHistogram.empty(1, 2).update(y_2, p, group).auprc()
        expected = {1: (1 / 2 + 2 / 3 + 3 / 4) / 3, 2: 1.0}[reached]
        assert float(found[reached][0]) == pytest.approx(expected)


@quick
@given(rows_of_a_case)
def test_youden_separates_what_the_scores_do_at_the_edges(rows):
    y, p, group = columns(rows)
    p = (p * 64).floor() / 64
    cut = ScoreHistogram.empty(3, 64).update(y, p, group).youden(-1)
    if bool(y.all()) or not bool(y.any()):
        assert math.isnan(cut)
        return
    p = p.clamp(max=63 / 64)  # the last bin holds both
    assert torch.equal(p >= cut, p >= probes.youden(p.numpy(), y.numpy().astype(float)))


def test_the_variance_is_that_of_delong_on_scores_at_the_edges():
    rng = np.random.default_rng(3)
    y, p = torch.tensor(rng.random(300) < 0.3), torch.tensor(np.floor(rng.random(300) * 32) / 32)
    group = torch.tensor(rng.integers(-1, 2, 300))
    histogram = ScoreHistogram.empty(2, 32).update(y, p, group)
    for place, member in ((0, group == 0), (1, group == 1), (-1, group >= -1)):
        patient = torch.arange(int(member.sum()))
        expected = moments(linearise("auroc", y[member], p[member], math.nan, patient))
        found = histogram.auroc_moments(place)
        for key in ("variance", "df", "rows", "heaviest", "least"):
            assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=1e-9), key


def test_the_bounds_are_reached():
    y, group = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64)
    for p, reached in ((torch.tensor([0.1, 0.6, 0.7, 0.9]), 2), (torch.tensor([0.1, 0.9, 0.6, 0.7]), 1)):
        found = ScoreHistogram.empty(1, 2).update(y, p, group).auroc()
        assert float(found[reached][0]) == evaluate("auroc", y, p, torch.arange(4)).value


@quick
@given(rows_of_a_case, st.integers(0, 15))
def test_rates_at_an_edge_are_exact(rows, place):
    y, p, group = columns(rows)
    confusion = ScoreHistogram.empty(3, 16).update(y, p, group).confusion(place / 16)
    assert confusion.dtype == torch.int64
    for metric in ("tpr", "fpr", "accuracy"):
        expected = values(metric, y, p, group, threshold=place / 16)
        assert rate(metric, confusion).tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_rates_are_those_of_scikit_learn():
    from sklearn import metrics as sk

    rng = np.random.default_rng(0)
    y, p = rng.random(500) < 0.3, rng.random(500)
    confusion = ScoreHistogram.empty(1).update(*(torch.tensor(x) for x in (y, p, np.zeros(500, int)))).confusion(0.75)
    said = p >= 0.75
    expected = {
        "accuracy": sk.accuracy_score(y, said),
        "balanced_accuracy": sk.balanced_accuracy_score(y, said),
        "f1": sk.f1_score(y, said),
        "tpr": sk.recall_score(y, said),
        "fpr": 1 - sk.recall_score(~y, ~said),
        "ppv": sk.precision_score(y, said),
        "npv": sk.precision_score(~y, ~said),
        "selection_rate": said.mean(),
    }
    assert set(expected) == THRESHOLDED
    for metric, value in expected.items():
        assert rate(metric, confusion).tolist() == pytest.approx([value, value], abs=1e-12)


@quick
@given(rows_of_a_case)
def test_brier_and_ece_are_exact(rows):
    y, p, group = columns(rows)
    histogram = ScoreHistogram.empty(3, 2).update(y, p, group)
    assert histogram.ece().tolist() == pytest.approx(values("ece", y, p, group), abs=1e-12, nan_ok=True)
    members = [group == 0, group == 1, group == 2, group >= -1]
    expected = [float((p[m] - y[m].double()).square().mean()) for m in members]
    assert histogram.brier().tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    found = histogram.ece_debiased().tolist()
    assert found == pytest.approx(values("ece_debiased", y, p, group), abs=1e-12, nan_ok=True)


@quick
@given(rows_of_a_case, st.integers(0, 40))
def test_parts_merge_to_all_at_once(rows, cut):
    y, p, group = columns(rows)
    empty = ScoreHistogram.empty(3, 32)
    whole = empty.update(y, p, group)
    parts = [empty.update(*(x[s] for x in (y, p, group))) for s in (slice(None, cut), slice(cut, None))]
    for joined in (
        parts[0].merge(parts[1]),
        parts[0].update(y[cut:], p[cut:], group[cut:]),
        empty.unpack(parts[0].pack() + parts[1].pack()),
    ):
        assert joined.count_G2C.dtype == torch.int64
        assert torch.equal(joined.count_G2C, whole.count_G2C)
        assert torch.allclose(joined.pack(), whole.pack(), rtol=1e-12)
    assert int(whole.count_G2C.sum()) == len(rows)


def test_scores_at_the_ends_and_in_single_precision():
    y, group = torch.tensor([0, 1, 1]), torch.tensor([-1, -1, -1])
    histogram = ScoreHistogram.empty(0, 4).update(y, torch.tensor([0.0, 1.0, 0.25]), group)
    assert histogram.count_G2C[0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 1]]
    assert histogram.confusion(0.75).tolist() == [[1, 0, 1, 1]]
    assert histogram.confusion(0).tolist() == [[2, 1, 0, 0]]


def test_wrong_input_is_named():
    empty = ScoreHistogram.empty(2, 8)
    y, p, group = torch.tensor([0, 1]), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    for match, call in {
        "bins is 10; expected a power of two": lambda: ScoreHistogram.empty(2, 10),
        r"p_N has shape \(1,\), y_N \(2,\)": lambda: empty.update(y, p[1:], group),
        r"scores must lie in \[0, 1\]; p_N spans": lambda: empty.update(y, p * 3, group),
        "p_N spans nan": lambda: empty.update(y, p * math.nan, group),
        "y_N holds values other": lambda: empty.update(y * 2, p, group),
        "group_N spans 0 … 2, outside −1 … 1": lambda: empty.update(y, p, group * 2),
        "threshold 0.3 is not an edge k/8": lambda: empty.confusion(0.3),
        "threshold 1 is not an edge": lambda: empty.confusion(1),
        "do not add up": lambda: empty.merge(ScoreHistogram.empty(3, 8)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
