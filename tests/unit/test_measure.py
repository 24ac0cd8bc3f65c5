"""What is measured of the cells before a stage."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from agglom import measure, targets
from agglom.core.borrowing import SKILLED
from agglom.core.cells import Measured, standing
from agglom.core.losses import Column
from agglom.core.types import Batch, Features
from agglom.runtime import World

ROWS, WIDTH = 40, 6


class Plain:
    """A normaliser that changes nothing."""

    dispersion = None

    def __call__(self, features):
        return features


@pytest.fixture
def measured_by(monkeypatch):
    """A function: noise and spread of two groups of twenty images, in chunks of a size, on a rank of a world."""
    generator = torch.Generator().manual_seed(0)
    clean_ND = torch.randn(ROWS, WIDTH, generator=generator)
    seen_ND = clean_ND + 0.3 * torch.randn(ROWS, WIDTH, generator=generator)
    order = []

    def batches(run, rows_N, size, views):
        order[:] = rows_N.tolist()
        chunks = [rows_N[start : start + run.chunk] for start in range(0, ROWS, run.chunk)]
        mine = chunks[run.world.rank :: run.world.size]
        for turn in range(-(-len(chunks) // run.world.size)):
            if turn >= len(mine):
                yield rows_N[:0], None
                continue
            row_B = torch.as_tensor(mine[turn])
            yield mine[turn], Batch(clean_ND[row_B], row_B, row_B, row_B, None, seen_ND[row_B])

    monkeypatch.setattr(measure, "batches", batches)
    monkeypatch.setattr(targets, "encode", lambda teachers, names, pixels: {"one": Features(pixels, None)})
    manifest = SimpleNamespace(rows=lambda split: np.arange(ROWS))
    job = SimpleNamespace(seed=0, loss=SimpleNamespace(summary="mse", patches="mse"))
    space = SimpleNamespace(index_N=torch.arange(ROWS) % 2, values=("A", "B"))
    facts = {"manifest": manifest, "job": job, "balance_space": space, "served": {}, "teachers": None}
    facts |= {"columns": (Column("one", "summary", 7.0),), "plan": SimpleNamespace(evaluate_size=(8, 8))}

    def run(world, chunk):
        found = measure.floors(SimpleNamespace(**facts, world=world, chunk=chunk), {"one": Plain()})
        return [one_GT.flatten().tolist() for one_GT in found]

    return run, clean_ND.double().numpy(), seen_ND.double().numpy(), order


def test_noise_and_spread_by_hand(measured_by):
    """Half the mean squared difference of two views, and of each two images of a group that follow each other."""
    run, clean_ND, seen_ND, order = measured_by
    noise_G, spread_G = run(World(0, 1, torch.device("cpu")), ROWS)
    for group in range(2):
        rows = [row for row in order if row % 2 == group]
        expected = ((clean_ND[rows] - seen_ND[rows]) ** 2).mean() / 2
        assert noise_G[group] == pytest.approx(expected)
        expected = ((clean_ND[rows[:-1]] - clean_ND[rows[1:]]) ** 2).mean() / 2
        assert spread_G[group] == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [10, ROWS])
def test_two_ranks_measure_what_one_does(measured_by, ranks, chunk):
    """Where there is one chunk, the second rank has none."""
    run, *_ = measured_by
    alone = run(World(0, 1, torch.device("cpu")), chunk)
    for found in ranks(lambda world: run(world, chunk)):
        np.testing.assert_allclose(found, alone)


def scores(rng, n, skills):
    """A label, and scores of teachers that are better the larger their skill."""
    y_N = torch.as_tensor(rng.integers(0, 2, n)).double()
    return y_N, torch.stack([torch.sigmoid(s * (2 * y_N - 1) + torch.as_tensor(rng.normal(size=n))) for s in skills])


def test_reliability_is_the_mean_auroc_over_labels():
    rng, group_N = np.random.default_rng(0), torch.arange(600) % 3 - 1
    tables = [scores(rng, 600, (0.2, 1.0)) for _ in range(2)]
    label_LN, score_LPN = (torch.stack(parts) for parts in zip(*tables, strict=True))
    label_LN[0, :30] = torch.nan
    found = measure.judged(label_LN, score_LPN, torch.arange(600), group_N, ("A", "B"), 30)
    assert found.patients_G.tolist() == [200, 200]
    for place, rows_N in ((found.raw_GP[0], group_N == 0), (found.pooled_P, group_N > -2)):
        for teacher in range(2):
            kept = [rows_N & ~torch.isnan(y_N) for y_N in label_LN]
            pairs = zip(label_LN, score_LPN, kept, strict=True)
            expected = np.mean([roc_auc_score(y_N[one], p_PN[teacher][one]) for y_N, p_PN, one in pairs])
            assert float(place[teacher]) == pytest.approx(expected)
    between = (found.shrunk_GP - found.pooled_P).abs() <= (found.raw_GP - found.pooled_P).abs() + 1e-9
    assert between.all()


def test_a_group_of_noise_is_seen_to_be_one():
    """However far its few patients are shrunk towards the others, in whom the teachers are good."""
    rng, shares = np.random.default_rng(1), []
    for _ in range(10):
        good, noise = scores(rng, 400, (1.5, 1.2)), scores(rng, 200, (0.0, 0.0))
        label_LN = torch.cat([good[0], noise[0]])[None]
        score_LPN = torch.cat([good[1], noise[1]], 1)[None]
        group_N = torch.cat([torch.zeros(400), torch.ones(200)]).long()
        found = measure.judged(label_LN, score_LPN, torch.arange(600), group_N, ("good", "noise"), 30)
        ones_GT = torch.ones(2, 2).double()
        known = Measured(found.shrunk_GP, found.raw_GP, found.pooled_P, ones_GT[0], ones_GT, ones_GT)
        best_G, _ = standing(known, ones_GT > 0)
        shares.append((best_G / SKILLED).clamp(max=1).tolist())
    good, noise = np.mean(shares, 0)
    assert good == 1
    assert noise < 0.5


def test_a_predictor_that_scores_nobody_is_not_known():
    nothing_LPN = torch.full((1, 2, 40), torch.nan).double()
    found = measure.judged(
        torch.ones(1, 40).double(), nothing_LPN, torch.arange(40), torch.arange(40) % 2, ("A", "B"), 5
    )
    assert found.raw_GP.isnan().all()
    assert found.shrunk_GP.isnan().all()


def test_who_scores_all_of_a_group_alike_tells_nothing_of_it():
    """And is not taken to be as good there as elsewhere."""
    rng = np.random.default_rng(2)
    y_N, p_PN = scores(rng, 600, (1.0, 1.0))
    group_N = torch.arange(600) % 2
    p_PN[0, group_N == 1] = 0.3
    found = measure.judged(y_N[None], p_PN[None], torch.arange(600), group_N, ("A", "B"), 30)
    assert found.raw_GP[1, 0] == 0.5
    assert found.shrunk_GP[1, 0] < 0.6
    few = measure.judged(y_N[None], p_PN[None], torch.arange(600) // 10, group_N, ("A", "B"), 30)
    assert few.shrunk_GP[1, 0] > found.shrunk_GP[1, 0], "ten images of a patient do not tell as much as ten patients"
    assert found.raw_GP[0, 0] > 0.8
