from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core.balance import Cells, ada_loss, group_dro, inverse_frequency, teacher_dropping, uniform
from agglom.core.groups import tally
from agglom.core.losses import objective
from agglom.core.types import CellStats, LossTable

SHARES = torch.tensor([0.6, 0.25, 0.05], dtype=torch.float64)
TEACHERS = torch.tensor([0, 0, 1])


def cells(share=SHARES, batch=20, rows=0):
    return Cells(share, TEACHERS, batch, rows)


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
        "dropping nobody": teacher_dropping(cells=cells(), p=0.0),
    }.items():
        state = balancer.init()
        for step in range(3):
            state = balancer.update(state, stats(np.random.default_rng(step).random((3, 3)), np.full((3, 3), 4.0)))
        state_of[name] = balancer, state
    return state_of


@pytest.mark.parametrize("name", ["uniform", "dro at the start", "power 0"])
def test_uniform_equals_no_balancer_bit_for_bit(name):
    balancer = {
        "uniform": uniform(cells=cells()),
        "dro at the start": group_dro(cells=cells()),
        "power 0": inverse_frequency(cells=cells(), power=0.0),
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


def test_a_group_absent_from_a_step_keeps_its_weight():
    balancer = group_dro(cells=cells(), eta=1.0)
    state = balancer.update(balancer.init(), stats(np.random.rand(3, 3), np.ones((3, 3))))
    count_GT = np.ones((3, 3))
    count_GT[1] = 0
    after = balancer.update(state, stats(np.random.rand(3, 3), count_GT))
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


def test_the_worst_group_rises_to_its_cap():
    balancer = group_dro(cells=cells(), eta=1.0, cap=3.0)
    state = balancer.init()
    for _ in range(200):
        state = balancer.update(state, stats(np.array([[0.1] * 3, [0.2] * 3, [0.9] * 3]), np.ones((3, 3))))
    np.testing.assert_allclose(state["q_G"], [0.0, 0.75, 0.15], atol=1e-9)


@pytest.mark.parametrize(("make", "key"), [(group_dro, "q_G"), (ada_loss, "loss_S")])
def test_one_rank_equals_two_ranks_with_accumulation(make, key):
    balancer = make(cells=cells())
    table, group_B = full_table(), torch.randint(-1, 3, (20,))
    whole = tally(group_B, *table, 3)
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


def test_a_loss_that_is_not_finite_is_not_hidden():
    balancer = group_dro(cells=cells())
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
    for loss_T, valid_T in zip(*(part.tolist() for part in table), strict=True):
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
    pieces = (LossTable(*one) for one in zip(*(part.split(parts) for part in table), strict=True))
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
