import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agglom.core.schedule import lr


def rates(**options):
    return [lr(step, **options) for step in range(options["steps"])]


def test_warm_up_is_linear_and_starts_above_zero():
    assert rates(steps=10, warmup=4, peak=1.0, end=0.0)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_ends_at_end_and_stays_there():
    options = {"steps": 10, "warmup": 4, "peak": 1.0, "end": 0.1}
    assert lr(9, **options) == pytest.approx(0.1)
    assert lr(10, **options) == lr(1000, **options) == pytest.approx(0.1)


def test_without_warm_up_starts_at_the_peak():
    expected = [0.1 + 0.9 * math.cos(math.pi * step / 38) ** 2 for step in range(20)]
    assert rates(steps=20, warmup=0, peak=1.0, end=0.1) == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 60), st.data(), st.floats(1e-6, 1), st.floats(0, 1))
def test_rises_then_falls_between_its_bounds(steps, data, peak, share):
    warmup = data.draw(st.integers(0, steps))
    found = rates(steps=steps, warmup=warmup, peak=peak, end=share * peak)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert all(0 <= rate <= peak * (1 + 1e-12) and math.isfinite(rate) for rate in found)
    assert max(found) == pytest.approx(peak)


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_outside_the_schedule_is_refused(warmup):
    with pytest.raises(ValueError, match="0 ≤ warmup ≤ steps"):
        lr(0, steps=10, warmup=warmup, peak=1.0, end=0.0)
