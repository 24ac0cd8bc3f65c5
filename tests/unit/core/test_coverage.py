"""The simulation of bench/coverage.py with fewer repetitions: the intervals cover as often as they promise."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from agglom.core import metrics

BENCH = Path(__file__).parents[3] / "bench"
REPETITIONS = 400


@pytest.fixture(scope="module")
def coverage():
    """The bench, under a name that is not that of the package `coverage`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        spec = importlib.util.spec_from_file_location("bench_coverage", BENCH / "coverage.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "images"), [(200, 1), (200, 4)])
def test_intervals_cover_as_often_as_they_promise(coverage, patients, images):
    design = coverage.simulate(coverage.Design(patients, images, REPETITIONS), seed=1)
    names = design.tallies.keys()
    assert {"auroc", "tpr", "accuracy", "ece", "auroc, paired difference"} <= names
    assert {
        f"auroc {what}, {n} groups, {case}" for what in ("gap", "worst") for n in (2, 8) for case in ("no gap", "a gap")
    } <= names
    # Three Monte Carlo errors at 95 % leave a false alarm in one of a thousand.
    slack = 3 * (0.95 * 0.05 / REPETITIONS) ** 0.5
    for name, tally in design.tallies.items():
        assert (tally.measured, tally.undefined) == (REPETITIONS, 0), name
        conservative = tally.promise == "≥ 95"
        assert tally.share >= (0.95 if conservative else 0.93) - slack, name
        # In a sample of this size bins of ece look calibrated that are not, and the interval allows for both.
        assert tally.share <= (1 if conservative or name == "ece" else 0.97 + slack), name


def test_true_values_are_those_of_a_large_sample(coverage):
    for auroc in (coverage.AUROC, coverage.WORSE):
        sample = coverage.draw(100_000, 4, auroc, torch.Generator().manual_seed(2))
        everybody = torch.zeros_like(sample.patient_N)
        found = metrics.tabulate(sample.y_N, sample.p_N, everybody, 1, coverage.cut())
        for metric in (*coverage.SINGLE, "ece"):
            # Some three standard errors of the least precise of them, the rates of the 120,000 positives.
            assert coverage.truth(metric, auroc) == pytest.approx(float(found[metric][0]), abs=0.005), metric


def test_the_same_seed_gives_the_same_tallies(coverage):
    once, twice = (coverage.simulate(coverage.Design(40, 2, 3), seed=5, groups=(2,)) for _ in range(2))
    assert once.tallies == twice.tallies
    assert all(tally.measured + tally.undefined == 3 for tally in once.tallies.values())
    assert "auroc gap, 2 groups, a gap" in coverage.summary([once])
