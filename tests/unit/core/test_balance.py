import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from agglom.core.balance import (
    ada_loss,
    agre,
    cvar,
    group_dro,
    inverse_frequency,
    static,
    teacher_dropping,
    uniform,
)
from agglom.core.groups import tally
from agglom.core.losses import objective
from agglom.core.types import CellStats, LossTable
from agglom.core.weights import Cells

SHARES = torch.tensor([0.6, 0.25, 0.05], dtype=torch.float64)
TEACHERS = torch.tensor([0, 0, 1])


def cells(share=SHARES, batch=20, rows=0):
    return Cells(share, TEACHERS, batch, rows, groups=("A", "B", "C")[: len(share)], teachers=("one", "two"))


def full_table(rows=20, columns=3):
    return LossTable(torch.rand(rows, columns), torch.ones(rows, columns, dtype=torch.bool))


def stats(loss_GT, count_GT):
    """Sums and counts with an empty row for samples without annotation."""
    zero = np.zeros((1, loss_GT.shape[1]))
    return CellStats(*(torch.from_numpy(np.concatenate([a, zero])) for a in (loss_GT * count_GT, count_GT)))


def balancers():
    state_of = {}
    for name, balancer in {
        "uniform": uniform(cells=cells()),
        "inverse": inverse_frequency(cells=cells()),
        "capped": inverse_frequency(cells=cells(), power=2.0, cap=1.5),
        "dro": group_dro(cells=cells(), eta=1.0),
        "cvar": cvar(cells=cells(), alpha=0.4),
        "static": static(cells=cells(), groups={"B": 2.0, "C": 0.0}),
        "dropping nobody": teacher_dropping(cells=cells(), p=0.0),
    }.items():
        state = balancer.init()
        for step in range(3):
            state = balancer.update(state, stats(np.random.default_rng(step).random((3, 3)), np.full((3, 3), 4.0)))
        state_of[name] = balancer, state
    return state_of


@pytest.mark.parametrize("name", ["uniform", "dro at the start", "power 0", "cvar at the start", "static"])
def test_uniform_equals_no_balancer_bit_for_bit(name):
    balancer = {
        "uniform": uniform(cells=cells()),
        "dro at the start": group_dro(cells=cells()),
        "power 0": inverse_frequency(cells=cells(), power=0.0),
        "cvar at the start": cvar(cells=cells()),
        "static": static(cells=cells()),
    }[name]
    table, group_B = full_table(), torch.randint(-1, 3, (20,))
    w_BT = balancer.weigh(balancer.init(), table, group_B, None)
    assert torch.equal(w_BT, torch.full_like(table.loss_BT, 1 / 20))
    assert torch.equal(objective(table, w_BT), (table.loss_BT * (1 / 20)).sum())


@pytest.mark.parametrize("name", balancers())
def test_expected_gradient_is_that_of_the_full_data_objective(name):
    """100 rows, drawn uniformly: the mean over rows of B·w·∇ℓ is ∇ Σ q_g·ℓ̄_g + p_none·ℓ̄_none (Ruling 6)."""
    balancer, state = balancers()[name]
    group = torch.tensor([0] * 60 + [1] * 25 + [2] * 5 + [-1] * 10)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(100, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    theta = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def losses():
        return LossTable((x * theta - y)[:, :3].square(), torch.ones(100, 3, dtype=torch.bool))

    table = losses()
    w_BT = balancer.weigh(state, table, group, torch.Generator())
    (sampled,) = torch.autograd.grad(objective(table, w_BT) * 20 / 100, theta)
    q = state.get("q_G", SHARES)
    loss_BT = losses().loss_BT
    full = sum(q[g] * loss_BT[group == g].mean(0).sum() for g in range(3)) + 0.1 * loss_BT[group < 0].mean(0).sum()
    (expected,) = torch.autograd.grad(full, theta)
    torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-9)


def test_small_batches_keep_the_mass_of_a_small_group():
    """The estimate is unbiased at B = 8, where weights by in-batch counts would lose a third of a 12 % group."""
    share = torch.tensor([0.88, 0.12], dtype=torch.float64)
    balancer = inverse_frequency(cells=Cells(share, torch.tensor([0]), batch=8))
    group = (torch.rand(20000, 8, generator=torch.Generator().manual_seed(0)) < 0.12).long().flatten()
    table = LossTable(torch.ones(len(group), 1), torch.ones(len(group), 1, dtype=torch.bool))
    w_B = balancer.weigh(balancer.init(), table, group, None)[:, 0]
    assert float(w_B[group == 1].sum() / 20000) == pytest.approx(0.5, abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 3), st.floats(1, 20))
@settings(max_examples=80, deadline=None)
def test_mass_is_kept_and_no_weight_exceeds_its_cap(shares, power, cap):
    share = torch.tensor(shares, dtype=torch.float64)
    share = share / max(1.0, float(share.sum()))
    share = torch.where(share < 1e-6, 0.0, share)
    balancer = inverse_frequency(cells=Cells(share, TEACHERS, 20), power=power, cap=cap)
    q_G = balancer.init()["q_G"]
    torch.testing.assert_close(q_G.sum(), share.sum(), rtol=1e-9, atol=1e-12)
    assert (q_G <= cap * share * (1 + 1e-12)).all()
    group_B = torch.arange(-1, len(share))
    w_BT = balancer.weigh(balancer.init(), full_table(len(share) + 1), group_B, None)
    assert w_BT.isfinite().all()
    assert float(w_BT[0, 0]) == pytest.approx(1 / 20)
    assert (w_BT * 20 <= cap * (1 + 1e-6)).all()


def test_inverse_frequency_counts_all_groups_alike():
    q_G = inverse_frequency(cells=cells(), cap=100.0).init()["q_G"]
    torch.testing.assert_close(q_G, torch.full_like(q_G, 0.3))


class Sagawa:
    """Group DRO in float64 NumPy, after Algorithm 1 of arXiv 1911.08731, with a moving average of the losses."""

    def __init__(self, share, eta, ema, adjustment, rows):
        self.q, self.total = share.copy(), share.sum()
        self.eta, self.ema, self.bonus = eta, ema, adjustment / np.sqrt(share * rows)
        self.average = None

    def step(self, loss_GT):
        self.average = loss_GT if self.average is None else (1 - self.ema) * self.average + self.ema * loss_GT
        loss_G = (self.average[:, :2].sum(1) + self.average[:, 2]) / 2
        self.q = self.q * np.exp(self.eta * (loss_G + self.bonus))
        self.q *= self.total / self.q.sum()


@given(st.integers(0, 2**31), st.floats(0, 2), st.floats(0.01, 1), st.floats(0, 5))
@settings(max_examples=40, deadline=None)
def test_group_dro_agrees_with_the_paper(seed, eta, ema, adjustment):
    rng = np.random.default_rng(seed)
    reference = Sagawa(SHARES.numpy(), eta, ema, adjustment, rows=1000)
    balancer = group_dro(cells=cells(rows=1000), eta=eta, ema=ema, adjustment=adjustment, cap=1e9)
    state = balancer.init()
    for _ in range(12):
        loss_GT, count_GT = rng.random((3, 3)), rng.integers(1, 9, (3, 3)).astype(float)
        reference.step(loss_GT)
        state = balancer.update(state, stats(loss_GT, count_GT))
        np.testing.assert_allclose(state["q_G"], reference.q, rtol=1e-9)
    w_BT = balancer.weigh(state, full_table(3), torch.arange(3), None)
    np.testing.assert_allclose(w_BT[:, 0], reference.q / SHARES.numpy() / 20, rtol=1e-6)


@pytest.mark.parametrize("balancer", [group_dro(cells=cells(), eta=1.0), cvar(cells=cells(), alpha=0.9, ema=1.0)])
def test_a_group_absent_from_a_step_keeps_its_weight(balancer):
    rising, count_GT = np.array([[0.1] * 3, [0.5] * 3, [0.9] * 3]), np.ones((3, 3))
    state = balancer.update(balancer.init(), stats(rising, count_GT))
    count_GT[1] = 0
    after = balancer.update(state, stats(rising[::-1], count_GT))
    assert after["q_G"][1] == state["q_G"][1]
    assert torch.equal(after["loss_GT"][1], state["loss_GT"][1])
    assert after["q_G"][0] != state["q_G"][0]
    torch.testing.assert_close(after["q_G"].sum(), SHARES.sum())
    nothing = balancer.update(after, stats(np.zeros((3, 3)), np.zeros((3, 3))))
    assert all(torch.equal(nothing[key], after[key]) for key in after)


def test_a_teacher_that_is_not_in_this_stage_does_not_count():
    balancer = group_dro(cells=cells(), eta=1.0)
    loss_GT, both = np.random.rand(3, 3), np.ones((3, 3))
    one = np.array([[1.0, 1.0, 0.0]] * 3)
    state = balancer.update(balancer.init(), stats(loss_GT, one))
    expected = SHARES * torch.from_numpy(loss_GT[:, :2].sum(1)).exp()
    torch.testing.assert_close(state["q_G"], expected * SHARES.sum() / expected.sum())
    assert state["seen_GT"].tolist() == [[True, True, False]] * 3
    assert balancer.update(state, stats(loss_GT, both))["seen_GT"].all()


def test_the_generalisation_adjustment_counts_rows_not_draws():
    """A sampler that draws group 2 as often as group 1 leaves it as few rows as it has."""
    even, rows = torch.tensor([0.6, 0.15, 0.15]), torch.tensor([600.0, 250, 50])
    balancer = group_dro(cells=replace(cells(even, rows=1000), count_G=rows), eta=1.0, adjustment=3.0)
    state = balancer.update(balancer.init(), stats(np.zeros((3, 3)), np.ones((3, 3))))
    expected = even * (3 / rows.sqrt()).exp()
    torch.testing.assert_close(state["q_G"], (expected * 0.9 / expected.sum()).double(), rtol=1e-6, atol=0)


def ref_worst(loss_G, share_G, alpha):
    """The maximum of Σ q·ℓ under q ≤ p / α and Σ q = Σ p, by linear programming."""
    bounds = [(0, share / alpha) for share in share_G]
    return -linprog(-loss_G, A_eq=np.ones((1, len(loss_G))), b_eq=[share_G.sum()], bounds=bounds).fun


@given(st.integers(0, 2**31), st.floats(0.05, 1), st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_cvar_is_the_worst_mixture_of_groups(seed, alpha, ema):
    rng = np.random.default_rng(seed)
    balancer, share = cvar(cells=cells(), alpha=alpha, ema=ema), SHARES.numpy()
    state, average = balancer.init(), None
    for _ in range(4):
        loss_GT, count_GT = rng.random((3, 3)), rng.integers(1, 9, (3, 3)).astype(float)
        average = loss_GT if average is None else (1 - ema) * average + ema * loss_GT
        state = balancer.update(state, stats(loss_GT, count_GT))
        q, loss_G = state["q_G"].numpy(), average.sum(1) / 2
        assert q @ loss_G == pytest.approx(ref_worst(loss_G, share, alpha), rel=1e-9)
        assert q.sum() == pytest.approx(share.sum())
        assert (q >= 0).all()
        assert (q <= share / alpha * (1 + 1e-12)).all()


def test_cvar_spends_the_mass_of_those_who_are_there():
    """Without group 0: the worse of the others takes all that it may, the rest is left to the other."""
    balancer, count = cvar(cells=cells(), alpha=0.5, ema=1.0), np.ones((3, 3))
    count[0] = 0
    state = balancer.update(balancer.init(), stats(np.array([[9.0] * 3, [0.1] * 3, [0.2] * 3]), count))
    np.testing.assert_allclose(state["q_G"], [0.6, 0.2, 0.1], atol=1e-12)


def test_static_weights_are_relative_and_leave_the_mean_neutral():
    balancer = static(cells=cells(), groups={"B": 3, "C": 0}, teachers={"two": 0.5})
    group_B = torch.tensor([0, 1, 2, -1])
    found_BT = balancer.weigh(balancer.init(), full_table(4), group_B).double().numpy() * 20
    mean = (0.6 * 1 + 0.25 * 3) / 0.9
    expected = np.outer([1 / mean, 3 / mean, 0, 1], np.array([1, 1, 0.5]) / 0.75)
    np.testing.assert_allclose(found_BT, expected, rtol=1e-6)
    by_group = found_BT[:, [0, 2]].mean(1)
    assert SHARES.numpy() @ by_group[:3] / 0.9 == pytest.approx(1)
    assert by_group[3] == pytest.approx(1)


def deviating(seed=0, rows=20):
    """Losses of three teachers, in columns 0 and 1, 2, and 3, that a student's summary and a weight lead to."""
    generator = torch.Generator().manual_seed(seed)
    trunk_BD = torch.randn(rows, 5, generator=generator, requires_grad=True)
    head_TDD = torch.randn(4, 5, 6, generator=generator, requires_grad=True)
    target_TBD = torch.randn(4, rows, 6, generator=generator)
    loss_TB = (torch.tanh(torch.einsum("bd,tde->tbe", trunk_BD, head_TDD)) - target_TBD).square().mean(-1)
    valid_BT = torch.rand(rows, 4, generator=generator) < 0.7
    valid_BT[:, 0] |= ~valid_BT[:, :3].any(1)
    table = LossTable(loss_TB.T.masked_fill(~valid_BT, 0.0), valid_BT, trunk_BD)
    return table, head_TDD, target_TBD


def three():
    return Cells(SHARES, torch.tensor([0, 0, 1, 2]), 20, teachers=("one", "two", "biased"))


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_agre_weighs_by_what_deviates_from_the_biased_model(seed):
    """Gradients by hand in float64, image by image: of mean((tanh(xH) − y)²) with respect to x."""
    table, head, target = deviating(seed)
    found_BT = agre(cells=three(), biased="biased").weigh({}, table, None).numpy()
    x, head, target = (part.detach().double().numpy() for part in (table.trunk_BD, head, target))
    for i, valid_T in enumerate(table.valid_BT.tolist()):
        z = [np.tanh(x[i] @ head[t]) for t in range(4)]
        gradient = [head[t] @ (2 / 6 * (z[t] - target[t, i]) * (1 - z[t] ** 2)) * valid_T[t] for t in range(4)]
        one, two, biased = gradient[0] + gradient[1], gradient[2], gradient[3]
        weights = {}
        for name, mine, taught in (("one", one, valid_T[0] or valid_T[1]), ("two", two, valid_T[2])):
            norms = np.linalg.norm(mine) * np.linalg.norm(biased)
            if taught:
                weights[name] = 1 - (mine @ biased / norms if norms else 0.0)
        scale = len(weights) / sum(weights.values()) / 20
        expected = [weights.get(name, 0.0) * scale for name in ("one", "one", "two")]
        np.testing.assert_allclose(found_BT[i], [*expected, 0.01 / 20], rtol=1e-3, atol=1e-6)


def test_agre_weighs_an_image_whoever_is_beside_it_and_leaves_no_gradient():
    table, head, _ = deviating()
    balancer = agre(cells=three(), biased="biased", follow=0.0)
    w_BT = balancer.weigh({}, table, None)
    assert not w_BT.requires_grad
    assert head.grad is table.trunk_BD.grad is None
    alone = table._replace(valid_BT=table.valid_BT & (torch.arange(20) < 7)[:, None])
    torch.testing.assert_close(balancer.weigh({}, alone, None)[:7], w_BT[:7])
    assert w_BT[:, 3].eq(0).all()
    objective(table, w_BT).backward()
    assert head.grad[3].eq(0).all()
    assert head.grad[:3].ne(0).any()


def test_agre_where_all_agree_or_nothing_is_known():
    table, *_ = deviating()
    balancer = agre(cells=three(), biased="biased")
    agreed_BT = table.loss_BT[:, :1] * torch.tensor([1.0, 1.0, 2.0, 3.0])
    same = LossTable(agreed_BT, torch.ones(20, 4, dtype=torch.bool), table.trunk_BD)
    np.testing.assert_allclose(balancer.weigh({}, same, None) * 20, [[1, 1, 1, 0.01]] * 20, rtol=1e-2)
    for unknown in (table._replace(trunk_BD=None), table._replace(loss_BT=table.loss_BT.detach())):
        assert balancer.weigh({}, unknown, None).isnan().tolist() == [[True, True, True, False]] * 20
    elsewhere = table._replace(trunk_BD=torch.ones(20, 5, requires_grad=True))
    with pytest.raises(ValueError, match="no loss depends on the student's summary"):
        balancer.weigh({}, elsewhere, None)


def test_the_worst_group_rises_to_its_cap():
    balancer = group_dro(cells=cells(), eta=1.0, cap=3.0)
    state = balancer.init()
    for _ in range(200):
        state = balancer.update(state, stats(np.array([[0.1] * 3, [0.2] * 3, [0.9] * 3]), np.ones((3, 3))))
    np.testing.assert_allclose(state["q_G"], [0.0, 0.75, 0.15], atol=1e-9)


@pytest.mark.parametrize(("make", "key"), [(group_dro, "q_G"), (cvar, "q_G"), (ada_loss, "loss_S")])
def test_one_rank_equals_two_ranks_with_accumulation(make, key):
    balancer = make(cells=cells())
    table, group_B = full_table(), torch.randint(-1, 3, (20,))
    whole = tally(group_B, *table[:2], 3)
    parts = [tally(group_B[s], table.loss_BT[s], table.valid_BT[s], 3) for s in torch.arange(20).split([3, 7, 5, 5])]
    summed = CellStats(sum(p.sum_GT for p in parts), sum(p.count_GT for p in parts))
    one, two = (balancer.update(balancer.init(), each) for each in (whole, summed))
    torch.testing.assert_close(one[key], two[key], rtol=1e-9, atol=0)
    w_BT = balancer.weigh(one, table, group_B, None)
    halves = [balancer.weigh(one, full_table(10), half, None) for half in group_B.split(10)]
    assert torch.equal(w_BT, torch.cat(halves))


@pytest.mark.parametrize("name", balancers())
def test_state_survives_saving_and_update_does_not_change_its_input(name, tmp_path):
    balancer, state = balancers()[name]
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    new = stats(np.random.rand(3, 3), np.ones((3, 3)))
    one, two = balancer.update(state, new), balancer.update(loaded, new)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(state[key], loaded[key]) for key in state)


@pytest.mark.parametrize("balancer", [group_dro(cells=cells()), cvar(cells=cells())])
def test_a_loss_that_is_not_finite_is_not_hidden(balancer):
    loss_GT = np.ones((3, 3))
    loss_GT[1, 1] = np.nan
    assert balancer.update(balancer.init(), stats(loss_GT, np.ones((3, 3))))["q_G"].isnan().all()


def taught(seed=0, rows=20):
    """A table with holes: of some samples, teacher 1, or one column of teacher 0, has nothing to say."""
    generator = torch.Generator().manual_seed(seed)
    valid_BT = torch.rand(rows, 3, generator=generator) < 0.8
    valid_BT[:, 0] |= ~valid_BT.any(1)
    return LossTable(torch.rand(rows, 3, generator=generator) * valid_BT, valid_BT)


def ref_kept(table):
    """By sample: the teachers that it has, and the one with the largest loss, in plain Python."""
    for loss_T, valid_T in zip(*(part.tolist() for part in table[:2]), strict=True):
        loss_of = {}
        for teacher, loss, valid in zip(TEACHERS.tolist(), loss_T, valid_T, strict=True):
            if valid:
                loss_of[teacher] = loss_of.get(teacher, 0.0) + loss
        yield loss_of, max(loss_of, key=loss_of.get)


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_teacher_dropping_is_unics_per_image(seed, p):
    table = taught(seed)
    w_BT = teacher_dropping(cells=cells(), p=p).weigh({}, table, None, torch.Generator().manual_seed(seed))
    drawn_BS = torch.rand(20, 2, generator=torch.Generator().manual_seed(seed))
    expected = 0.0
    for (loss_of, hardest), drawn_S in zip(ref_kept(table), drawn_BS.tolist(), strict=True):
        kept = [teacher for teacher in loss_of if teacher == hardest or drawn_S[teacher] >= p]
        expected += len(loss_of) * np.mean([loss_of[teacher] for teacher in kept]) / 20
    assert float(objective(table, w_BT)) == pytest.approx(expected, rel=1e-5)


def test_dropping_nobody_is_uniform_and_dropping_all_leaves_the_hardest():
    table = taught()
    nobody, everybody = (teacher_dropping(cells=cells(), p=p).weigh({}, table, None, torch.Generator()) for p in (0, 1))
    assert torch.equal(objective(table, nobody), (table.loss_BT * (1 / 20)).sum())
    expected = sum(len(loss_of) * loss_of[hardest] for loss_of, hardest in ref_kept(table)) / 20
    assert float(objective(table, everybody)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_without_a_generator_dropping_weighs_as_it_does_on_average(p):
    balancer, table, generator = teacher_dropping(cells=cells(), p=p), taught(rows=8), torch.Generator().manual_seed(0)
    mean_BT = sum(balancer.weigh({}, table, None, generator) for _ in range(1500)) / 1500
    torch.testing.assert_close(balancer.weigh({}, table, None), mean_BT, atol=6e-3, rtol=0)
    nothing = LossTable(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert balancer.weigh({}, nothing, None).isnan().all()
    assert float(objective(nothing, balancer.weigh({}, nothing, None, generator))) == 0


@pytest.mark.parametrize("parts", [[10, 10], [3, 7, 5, 5]])
def test_dropping_draws_the_same_for_a_step_whatever_its_micro_batches(parts):
    balancer, table = teacher_dropping(cells=cells(), p=0.5), taught()
    whole_BT = balancer.weigh({}, table, None, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    pieces = (LossTable(*one) for one in zip(*(part.split(parts) for part in table[:2]), strict=True))
    assert torch.equal(torch.cat([balancer.weigh({}, one, None, generator) for one in pieces]), whole_BT)


@given(st.integers(0, 2**31), st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_ada_loss_divides_by_the_moving_average_of_each_teacher(seed, ema):
    rng = np.random.default_rng(seed)
    balancer = ada_loss(cells=cells(), ema=ema)
    state, average = balancer.init(), None
    assert torch.equal(balancer.weigh(state, full_table(), None), torch.full((20, 3), 1 / 20))
    for _ in range(6):
        loss_GT, count_GT = 0.1 + rng.random((3, 3)), rng.integers(1, 9, (3, 3)).astype(float)
        mean_T = (loss_GT * count_GT).sum(0) / count_GT.sum(0)
        now = np.array([mean_T[0] + mean_T[1], mean_T[2]])
        average = now if average is None else (1 - ema) * average + ema * now
        state = balancer.update(state, stats(loss_GT, count_GT))
    np.testing.assert_allclose(state["loss_S"], average, rtol=1e-9)
    table = full_table()
    expected = table.loss_BT.double().numpy() / average[TEACHERS.numpy()] / 20
    found = balancer.weigh(state, table, None) * table.loss_BT
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ada_loss_keeps_the_static_weights():
    """A teacher of weight 3 counts three times as much, whatever its loss."""
    static = torch.tensor([3.0, 3.0, 1.0])
    balancer = ada_loss(cells=replace(cells(), static_T=static), ema=1.0)
    loss_GT, count_GT = np.full((3, 3), 0.7) * static.numpy(), np.ones((3, 3))
    state = balancer.update(balancer.init(), stats(loss_GT, count_GT))
    table = LossTable(torch.tensor(loss_GT[:1], dtype=torch.float32), torch.ones(1, 3, dtype=torch.bool))
    found_T = (balancer.weigh(state, table, None) * table.loss_BT)[0] * 20
    np.testing.assert_allclose([found_T[0] + found_T[1], found_T[2]], [3, 1], rtol=1e-6)


def test_ada_loss_counts_those_without_annotation_and_forgets_no_teacher():
    balancer = ada_loss(cells=cells(), ema=0.5, floor=0.2)
    unknown = CellStats(torch.zeros(4, 3), torch.zeros(4, 3))
    for part, value in zip(unknown, (8.0, 4.0), strict=True):
        part[-1, :2] = value
    state = balancer.update(balancer.init(), unknown)
    assert state["loss_S"].tolist() == [4.0, 1.0]
    assert state["seen_S"].tolist() == [True, False]
    again = balancer.update(state, stats(np.full((3, 3), 0.1), np.array([[0.0, 0.0, 5.0]] * 3)))
    np.testing.assert_allclose(again["loss_S"], [4.0, 0.1])
    np.testing.assert_allclose(balancer.weigh(again, full_table(1), None), [[1 / 80, 1 / 80, 1 / 4]], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (inverse_frequency, {"power": -1.0, "cap": 0.5}, "power is -1.0, expected ≥ 0; cap is 0.5, expected ≥ 1"),
        (group_dro, {"eta": -1.0}, "eta is -1.0"),
        (group_dro, {"ema": 0.0}, r"ema is 0.0, expected in \(0, 1\]"),
        (teacher_dropping, {"p": 1.5}, r"p is 1.5, expected in \[0, 1\]"),
        (ada_loss, {"ema": 0.0, "floor": 0.0}, r"ema is 0.0, expected in \(0, 1\]; floor is 0.0, expected > 0"),
        (group_dro, {"adjustment": 1.0}, "adjustment is 1.0, expected ≥ 0, with cells.rows > 0"),
        (cvar, {"alpha": 0.0, "ema": 2.0}, r"alpha is 0.0, expected in \(0, 1\]; ema is 2.0"),
        (agre, {"biased": "three"}, r"biased is 'three', expected a teacher that has a loss, .* \(one, two\)"),
        (agre, {"biased": "one", "follow": -1.0}, "follow is -1.0, expected ≥ 0"),
        (static, {"groups": {"D": 1.0, "A": -1}}, "groups: 'D' is not one of A, B, C; A is -1, expected a number ≥ 0"),
        (
            static,
            {"teachers": {"one": math.nan, "two": "3"}},
            "teachers: one is nan, .*; two is '3', expected a number",
        ),
        (static, {"teachers": {"one": 0, "two": 0}}, "teachers: every weight is 0"),
    ],
)
def test_options_out_of_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(cells=cells(), **options)


def test_a_group_that_a_specialist_does_not_serve_is_judged_by_its_other_teachers():
    """Teacher 1 never sees group 2, whose loss is that of teacher 0: as if every group had a teacher of that mean."""
    loss, count = np.random.default_rng(0).random((3, 3)), np.full((3, 3), 4.0)
    count[2, 2] = 0
    served = torch.ones(3, 3, dtype=torch.bool)
    served[2, 2] = False
    specialist = group_dro(cells=Cells(SHARES, TEACHERS, 20, 0, served), eta=1.0, cap=100)
    found = specialist.update(specialist.init(), stats(loss, count))["q_G"].numpy()
    mean = np.array([loss[0].sum() / 2, loss[1].sum() / 2, loss[2, :2].sum()])
    expected = SHARES.numpy() * np.exp(mean)
    np.testing.assert_allclose(found, expected * SHARES.sum().item() / expected.sum())
    # Who is not told of the specialist waits for the missing cell for ever.
    waiting = group_dro(cells=cells(), eta=1.0)
    assert waiting.update(waiting.init(), stats(loss, count))["q_G"][2] == SHARES[2]
