"""The simulation of bench/coverage.py with fewer repetitions: the intervals cover as often as they promise."""

import importlib.util
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from agglom.core import metrics

BENCH = Path(__file__).parents[3] / "bench"
REPETITIONS = 400


class Inline:
    """A pool that works in this process."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future


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
    summaries = ("auroc gap", "auroc worst", "auroc gap to overall", "auroc ES, sum", "auroc ES, std")
    assert {
        f"{what}, {n} groups, {case}"
        for what in (*summaries, "equalized odds difference")
        for n in (2, 8)
        for case in ("no gap", "a gap")
    } <= names
    # Three Monte Carlo errors at 95 % leave a false alarm in one of a thousand.
    slack = 3 * (0.95 * 0.05 / REPETITIONS) ** 0.5
    for name, tally in design.tallies.items():
        assert (tally.measured, tally.undefined) == (REPETITIONS, 0), name
        conservative = tally.promise == "≥ 95"
        assert tally.share >= (0.95 if conservative else 0.93) - slack, name
        assert tally.share <= (1 if conservative else 0.97 + slack), name


def test_true_values_are_those_of_a_large_sample(coverage):
    for auroc in (coverage.AUROC, coverage.WORSE):
        sample = coverage.draw(100_000, 4, auroc, torch.Generator().manual_seed(2))
        everybody = torch.zeros_like(sample.patient_N)
        found = metrics.tabulate(sample.y_N, sample.p_N, everybody, 1, coverage.cut())
        for metric in coverage.SINGLE:
            # Some three standard errors of the least precise of them, the rates of the 120,000 positives.
            assert coverage.truth(metric, auroc) == pytest.approx(float(found[metric][0]), abs=0.005), metric


def test_the_same_seed_gives_the_same_tallies(coverage):
    once, twice = (coverage.simulate(coverage.Design(40, 2, 3), seed=5, groups=(2,)) for _ in range(2))
    assert once.tallies == twice.tallies
    assert all(tally.measured + tally.undefined == 3 for tally in once.tallies.values())
    assert "auroc gap, 2 groups, a gap" in coverage.summary([once])


def test_true_values_of_summaries_are_those_of_large_groups(coverage):
    generator = torch.Generator().manual_seed(3)
    aurocs = (coverage.WORSE, *[coverage.AUROC] * 3)
    samples = [coverage.draw(60_000, 1, auroc, generator) for auroc in aurocs]
    at = {name: [coverage.measured(name, sample) for sample in samples] for name in ("auroc", "tpr", "fpr")}
    overall = {name: coverage.measured(name, coverage.pooled(samples)) for name in coverage.GROUPED}
    found = list(coverage.across(aurocs, at, overall))
    assert len(found) == 11
    for name, truth, estimate, flagged in found:
        assert not flagged
        assert estimate.value == pytest.approx(truth, abs=0.015), name
        assert estimate.lo < truth < estimate.hi, name
    assert overall["auroc"](0.95).n_patients == 240_000


def test_a_run_that_was_cut_off_goes_on(coverage, tmp_path, monkeypatch, capsys):
    record, parts = tmp_path / "coverage.md", tmp_path / "parts.jsonl"
    flags = ["--patients", "30", "--images", "1", "--parts", str(parts), "--markdown", str(record)]
    monkeypatch.setattr(coverage, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(sys, "argv", ["bench/coverage.py", *flags, "--repetitions", "2"])
    coverage.main()
    once = record.read_text()
    assert f"Written by `bench/coverage.py {' '.join(flags)} --repetitions 2`" in once
    assert once.split("\n\n- ")[1] in capsys.readouterr().out
    parts.write_text(parts.read_text() + '{"seed": 0, "patients": 30, "ima')
    assert len(coverage.finished(parts, 0)) == 1
    assert not coverage.finished(parts, 1)
    monkeypatch.setattr(coverage, "simulate", None)
    coverage.main()
    assert record.read_text() == once


def test_sentences_tell_chance_from_defects(coverage):
    def tally(share, promise=coverage.EXACT):
        return coverage.Tally(promise, 0.5, covered=round(2000 * share), measured=2000)

    names = {"auroc": 0.951, "tpr": 0.928, "brier": 0.9, "npv": 0.98}
    design = coverage.Design(200, 1, 2000, {name: tally(share) for name, share in names.items()})
    design.tallies["ece"] = tally(1.0, coverage.CONSERVATIVE)
    first, ece, *_ = coverage.said([design])
    assert first.startswith("One group and paired differences, where 95 ± 2 is promised: 1 of 4 cells in 95 ± 2;")
    assert "as chance may do: tpr, 200 × 1: 92.8, by 0.4. Outside by more" in first
    assert first.endswith("which chance does not explain: brier, 200 × 1: 90.0, by 5.3; npv, 200 × 1: 98.0, by 2.6.")
    assert ece.startswith(
        "ECE, conservative because |·| bends at 0: all 1 cells at 95 or more; from 100.0 (ece, 200 × 1)"
    )
