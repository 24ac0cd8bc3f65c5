import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core import balance
from agglom.core.borrowing import SKILLED, Bank, Loan
from agglom.core.cells import (
    APART,
    FOLLOWED,
    UNSKILLED,
    Measured,
    excess,
    listening,
    reliability,
    shrunk,
    speakers,
    standing,
    steadiness,
)
from agglom.core.groups import tally
from agglom.core.types import CellStats, LossTable
from agglom.core.weights import Cells

NAN = math.nan
NUMBERS = ("right_GS", "raw_GS", "right_S", "student_G", "noise_GT", "spread_GT")
SHARES = np.array([0.6, 0.25, 0.05])
TEACHER = np.array([0, 0, 1])  # of three columns
CROSSED = ("F|AP", "F|PA", "M|AP", "M|PA")


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def measured(seed=0, groups=3, **more):
    rng = np.random.default_rng(seed)
    parts = {
        "right_GS": rng.uniform(0.5, 1, (groups, 2)),
        "raw_GS": rng.uniform(0.4, 1, (groups, 2)),
        "right_S": rng.uniform(0.5, 1, 2),
        "student_G": rng.uniform(0.4, 0.9, groups),
        "noise_GT": rng.uniform(0, 0.3, (groups, 3)),
        "spread_GT": rng.uniform(0.3, 1, (groups, 3)),
    }
    return Measured(**{key: tensor(value) for key, value in (parts | more).items()})


def of(shares=SHARES, served=None, **more):
    served_GT = None if served is None else torch.tensor(served)
    names = ("A", "B", "C", "D")[: len(shares)]
    return Cells(tensor(shares), torch.tensor(TEACHER), 20, 1000, served_GT, groups=names, teachers=("x", "y"), **more)


def stats(loss_GT, count_GT):
    zero = np.zeros((1, loss_GT.shape[1]))
    return CellStats(*(torch.from_numpy(np.concatenate([a, zero])) for a in (loss_GT * count_GT, count_GT)))


# ── Reliability ──


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_reliability_is_one_on_average_and_keeps_the_order(rights, temperature):
    right_GS, served_GS = tensor(rights), torch.ones(len(rights), 3, dtype=torch.bool)
    rho_GS = reliability(right_GS, served_GS, temperature)
    torch.testing.assert_close(rho_GS.mean(1), torch.ones(len(rights), dtype=torch.float64))
    assert (rho_GS > 0).all()
    assert (rho_GS.amin(1) >= FOLLOWED * rho_GS.amax(1) * (1 - 1e-9)).all()
    better = right_GS[:, :, None] >= right_GS[:, None]
    assert (rho_GS[:, :, None] - rho_GS[:, None])[better].min() >= -1e-12


def test_reliability_by_hand():
    """With T = 1 / log 2 ten points less are ten points of a half-life."""
    served_GS = torch.tensor([[True, True, False], [True, True, True], [True, True, True], [True, True, True]])
    right_GS = tensor([[0.9, 0.7, 0.99], [0.6, 0.6, 0.6], [NAN, 0.9, 0.7], [NAN, NAN, NAN]])
    rho_GS = reliability(right_GS, served_GS, 0.1 / math.log(2))
    torch.testing.assert_close(rho_GS[0], tensor([1.6, 0.4, 0]))
    assert rho_GS[1].tolist() == [1, 1, 1]
    torch.testing.assert_close(rho_GS[2], tensor([1, 1.6, 0.4]))
    assert rho_GS[3].tolist() == [1, 1, 1], "nobody is known, so nobody is preferred"
    torch.testing.assert_close(reliability(right_GS, served_GS, 1e9), served_GS.double())


def test_steadiness_is_the_share_of_variance_that_views_leave_alone():
    known = measured(noise_GT=[[0.1, 0.3, 0.5]] * 2, spread_GT=[[1, 0.6, 0.25], [1, 1, 1]], groups=2)
    kept_GS, kept_S = steadiness(known.noise_GT, known.spread_GT, torch.tensor(TEACHER))
    torch.testing.assert_close(kept_GS, tensor([[(0.9 + 0.5) / 2, 0], [(0.9 + 0.7) / 2, 0.5]]))
    torch.testing.assert_close(kept_S, tensor([0.75, 0.25]))


def ref_shrunk(value_GX, error_GX, pooled_X):
    """Cell by cell, in NumPy."""
    known = [(g, x) for g, x in np.ndindex(value_GX.shape) if not np.isnan(value_GX[g, x] + error_GX[g, x])]
    weight = {at: 1 / max(error_GX[at], 1e-6) ** 2 for at in known}
    q = sum(weight[g, x] * (value_GX[g, x] - pooled_X[x]) ** 2 for g, x in known)
    between = min(max(0, (q - len(known)) / sum(weight.values())), APART**2) if known else 0.0
    found = np.tile(pooled_X, (len(value_GX), 1))
    for g, x in known:
        found[g, x] += between / (between + 1 / weight[g, x]) * (value_GX[g, x] - pooled_X[x])
    return found


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0.001, 0.5))
@settings(max_examples=60, deadline=None)
def test_shrunk_agrees_with_numpy(seed, groups, error):
    rng = np.random.default_rng(seed)
    value_GX, error_GX = rng.uniform(0, 1, (groups, 3)), error * rng.uniform(0.5, 2, (groups, 3))
    value_GX[rng.random((groups, 3)) < 0.2] = NAN
    pooled_X = rng.uniform(0, 1, 3)
    found = shrunk(tensor(value_GX), tensor(error_GX), tensor(pooled_X)).numpy()
    np.testing.assert_allclose(found, ref_shrunk(value_GX, error_GX, pooled_X), rtol=1e-9)


def test_many_patients_speak_for_themselves_and_a_dozen_do_not():
    value_GX, pooled_X = tensor([[0.95], [0.75]]), tensor([0.9])
    many = shrunk(value_GX, tensor([[0.01], [0.01]]), pooled_X)
    torch.testing.assert_close(many, value_GX, atol=0.002, rtol=0)
    few = shrunk(value_GX, tensor([[0.01], [0.15]]), pooled_X)
    assert float(few[1]) - 0.75 > 0.01
    assert abs(float(few[1]) - 0.9) < 0.06
    assert float(shrunk(tensor([[NAN]]), tensor([[NAN]]), pooled_X)) == 0.9
    alone = shrunk(tensor([[0.0], [1.0]]), tensor([[0.3], [0.3]]), pooled_X)
    assert float(alone[0]) > 0.8, "five patients whom a probe gets all wrong"


# ── Groups ──


def test_a_small_crossing_is_spoken_for_by_its_parts_then_by_all():
    """By hand: F|AP has too few, and F|PA and M|AP share a value with it; of 20 samples in all nobody has enough."""
    found = speakers(CROSSED, torch.tensor([5, 40, 50, 60]), 30)
    assert found.tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert speakers(CROSSED, torch.tensor([5, 6, 7, 60]), 30)[0].tolist() == [1, 1, 1, 1]
    assert speakers(CROSSED, torch.tensor([5, 6, 7, 60]), 30)[1].tolist() == [1, 1, 0, 1]
    assert speakers(("A", "B"), torch.tensor([5, 60]), 30).tolist() == [[1, 1], [0, 1]]
    with_clusters = (*CROSSED, "cluster 1")
    assert speakers(with_clusters, torch.tensor([5, 40, 50, 60, 9]), 30)[0].tolist() == [1, 1, 1, 0, 0]
    assert speakers(with_clusters, torch.tensor([5, 40, 50, 60, 9]), 30)[4].tolist() == [1] * 5
    assert speakers(CROSSED, torch.tensor([0, 0, 0, 0]), 0).tolist() == torch.eye(4).tolist()


def test_standing_tells_noise_from_a_student_that_lags():
    """Above chance as it was found, which shrinking hides; behind in what was shrunk, a difference and no ratio."""
    raw_GS, right_GS = [[0.9, 0.7], [0.5, 0.4], [NAN, NAN]], [[0.85, 0.7], [0.68, 0.6], [0.8, 0.7]]
    known = measured(raw_GS=raw_GS, right_GS=right_GS, student_G=[0.7, 0.66, NAN])
    best_G, lag_G = standing(known, torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(best_G, tensor([0.8, 0.0, NAN]), equal_nan=True)
    torch.testing.assert_close(lag_G, tensor([0.3, 0.04, 0.0]))
    only_second = torch.tensor([[False, True]] * 3)
    torch.testing.assert_close(standing(known, only_second)[1], tensor([0.0, 0.0, 0.0]))
    assert standing(measured(student_G=[NAN] * 3), only_second)[1].tolist() == [0, 0, 0]


class Reference:
    """`balance.cells` step by step in NumPy, with three groups of enough rows."""

    def __init__(self, known, temperature, gamma, tau, ema, floor, cap):
        known = {key: getattr(known, key).numpy() for key in NUMBERS}
        right = known["right_GS"]
        best, reached = (np.maximum(2 * known[key].max(1) - 1, 0) for key in ("raw_GS", "right_GS"))
        worth = np.maximum(np.exp((right - right.max(1, keepdims=True)) / temperature), FOLLOWED)
        self.rho = 2 * worth / worth.sum(1, keepdims=True)
        lag = np.maximum(reached - np.maximum(2 * known["student_G"] - 1, 0), 0)
        self.base = SHARES**gamma * np.clip(best / SKILLED, UNSKILLED, 1) * np.exp(lag / tau)
        self.tau, self.ema, self.floor, self.cap, self.known = tau, ema, floor, cap, known
        self.average, self.q = None, self.bounded(self.base)

    def bounded(self, mass):
        """The scale by bisection; a mixture with the shares."""
        total, most = (1 - self.floor) * SHARES.sum(), (self.cap - self.floor) * SHARES

        def taken(scale):
            with np.errstate(over="ignore"):
                return np.minimum(scale * mass, most)

        low, high = 0.0, 1e300
        for _ in range(100):
            middle = math.sqrt(max(low, 1e-300) * high)
            low, high = (middle, high) if taken(middle).sum() < total else (low, middle)
        return self.floor * SHARES + taken(high)

    def step(self, loss_GT):
        self.average = loss_GT if self.average is None else (1 - self.ema) * self.average + self.ema * loss_GT
        left = np.clip((self.average - self.known["noise_GT"]) / self.known["spread_GT"], 0, 1)
        weight = self.rho[:, TEACHER]
        self.q = self.bounded(self.base * np.exp((left * weight).sum(1) / weight.sum(1) / self.tau))


@given(
    st.integers(0, 2**31),
    *(st.floats(lo, hi) for lo, hi in ((0.01, 1), (0, 1), (0.05, 2), (0, 0.9), (1, 9))),
)
@settings(max_examples=40, deadline=None)
def test_the_balancer_agrees_with_numpy(seed, temperature, gamma, tau, floor, cap):
    rng, known = np.random.default_rng(seed), measured(seed)
    settings_ = {"temperature": temperature, "gamma": gamma, "tau": tau, "floor": floor, "cap": cap}
    reference = Reference(known, ema=0.3, **settings_)
    balancer = balance.cells(cells=of(), measured=known, ema=0.3, **settings_)
    state = balancer.init()
    np.testing.assert_allclose(state["q_G"], reference.q, rtol=1e-6)
    for _ in range(6):
        loss_GT = rng.random((3, 3))
        reference.step(loss_GT)
        state = balancer.update(state, stats(loss_GT, rng.integers(1, 9, (3, 3)).astype(float)))
        np.testing.assert_allclose(state["q_G"], reference.q, rtol=1e-6)
    table = LossTable(torch.rand(3, 3), torch.ones(3, 3, dtype=torch.bool))
    w_BT = balancer.weigh(state, table, torch.arange(3))
    expected = (reference.q / SHARES)[:, None] * reference.rho[:, TEACHER] / 20
    np.testing.assert_allclose(w_BT, expected, rtol=1e-5)


def test_a_sample_of_no_group_counts_once_and_hears_the_teachers_as_everybody_does():
    known = measured(right_S=[0.9, 0.7])
    balancer = balance.cells(cells=of(), measured=known, temperature=0.1 / math.log(2))
    table = LossTable(torch.rand(1, 3), torch.ones(1, 3, dtype=torch.bool))
    w_BT = balancer.weigh(balancer.init(), table, torch.tensor([-1])) * 20
    torch.testing.assert_close(w_BT[0], torch.tensor([1.6, 1.6, 0.4]))


def test_a_group_absent_from_a_step_keeps_its_weight():
    balancer = balance.cells(cells=of(), measured=measured())
    count_GT, loss_GT = np.ones((3, 3)), np.random.default_rng(0).random((3, 3))
    state = balancer.update(balancer.init(), stats(loss_GT, count_GT))
    count_GT[1] = 0
    after = balancer.update(state, stats(loss_GT[::-1].copy(), count_GT))
    assert after["q_G"][1] == state["q_G"][1]
    assert after["q_G"][0] != state["q_G"][0]
    torch.testing.assert_close(after["q_G"].sum(), tensor(SHARES.sum()))
    nothing = balancer.update(after, stats(np.zeros((3, 3)), np.zeros((3, 3))))
    assert all(torch.equal(nothing[key], after[key]) for key in after)


def test_a_group_of_a_few_rows_has_the_losses_of_all():
    """Of 1,000 rows group C has 5, which the others' speak for."""
    shares = np.array([0.6, 0.395, 0.005])
    balancer = balance.cells(cells=of(shares), measured=measured(), support=30)
    loss_GT, count_GT = np.array([[0.2] * 3, [0.4] * 3, [9.0] * 3]), np.array([[6.0] * 3, [4.0] * 3, [0.0] * 3])
    state = balancer.update(balancer.init(), stats(loss_GT, count_GT))
    torch.testing.assert_close(state["loss_GT"][2], tensor([0.28] * 3))


def test_a_group_that_is_noise_takes_nothing_from_the_others():
    """Its loss cannot fall, and no teacher reads anything there: it ends at the floor, however large its loss."""
    known = measured(
        right_GS=[[0.9, 0.9], [0.9, 0.9], [0.68, 0.68]],
        raw_GS=[[0.9, 0.9], [0.9, 0.9], [0.52, 0.49]],
        student_G=[0.8, 0.8, 0.66],
        noise_GT=[[0.1] * 3, [0.1] * 3, [0.9] * 3],
        spread_GT=[[1.0] * 3] * 3,
    )
    balancer = balance.cells(cells=of(), measured=known, gamma=1.0, tau=0.15, floor=0.1)
    state = balancer.update(balancer.init(), stats(np.array([[0.3] * 3, [0.5] * 3, [1.0] * 3]), np.ones((3, 3))))
    ratio = state["q_G"].numpy() / SHARES
    assert ratio[1] > ratio[0] > 0.5
    assert 0.1 <= ratio[2] < 0.5


def test_everything_alike_is_uniform():
    known = measured(
        right_GS=[[0.9, 0.9]] * 3,
        raw_GS=[[0.9, 0.9]] * 3,
        right_S=[0.9] * 2,
        student_G=[NAN] * 3,
        noise_GT=[[0.1] * 3] * 3,
        spread_GT=[[1.0] * 3] * 3,
    )
    balancer = balance.cells(cells=of(), measured=known, gamma=1.0)
    state = balancer.update(balancer.init(), stats(np.full((3, 3), 0.4), np.ones((3, 3))))
    np.testing.assert_allclose(state["q_G"], SHARES, rtol=1e-12)
    table = LossTable(torch.rand(4, 3), torch.ones(4, 3, dtype=torch.bool))
    torch.testing.assert_close(balancer.weigh(state, table, torch.tensor([0, 1, 2, -1])), torch.full((4, 3), 1 / 20))


def test_micro_batches_add_up():
    """Two halves of a batch leave the state that the whole does."""
    group_B, loss_BT = torch.randint(-1, 3, (40,)), torch.rand(40, 3)
    valid_BT = torch.ones(40, 3, dtype=torch.bool)
    parts = [tally(group_B[half], loss_BT[half], valid_BT[half], 3) for half in (slice(0, 17), slice(17, 40))]
    balancer = balance.cells(cells=of(), measured=measured())
    whole = balancer.update(balancer.init(), tally(group_B, loss_BT, valid_BT, 3))
    added = balancer.update(balancer.init(), CellStats(*(a + b for a, b in zip(*parts, strict=True))))
    for key in whole:
        torch.testing.assert_close(whole[key], added[key])


def test_a_specialist_weighs_only_where_it_serves():
    served = [[True, True, True], [True, True, False], [True, True, True]]
    balancer = balance.cells(cells=of(served=served), measured=measured())
    table = LossTable(torch.rand(3, 3), torch.ones(3, 3, dtype=torch.bool))
    w_BT = balancer.weigh(balancer.init(), table, torch.arange(3))
    assert w_BT[1, 2] == 0
    assert (w_BT[1, :2] > 0).all()
    assert excess(torch.ones(3, 3).double(), measured(), w_BT.double()).isfinite().all()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0),
        ("gamma", 2),
        ("tau", 0),
        ("ema", 0),
        ("floor", 2),
        ("cap", 0.5),
        ("support", -1),
        ("borrow", -1),
    ],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"balance cells: {option} is {value}"):
        balance.cells(cells=of(), measured=measured(), **{option: value})


# ── Image by image ──


@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(0.01, 2))
@settings(max_examples=60, deadline=None)
def test_listening_agrees_with_numpy(seed, teachers, temperature):
    rng = np.random.default_rng(seed)
    sure_BS, served_BS = rng.random((20, teachers)), rng.random((20, teachers)) < 0.7
    sure_BS[rng.random((20, teachers)) < 0.1] = NAN
    found_BS = listening(tensor(sure_BS), torch.tensor(served_BS), temperature).numpy()
    for sure_S, served_S, found_S in zip(sure_BS, served_BS, found_BS, strict=True):
        known_S = served_S & ~np.isnan(sure_S)
        if not known_S.any():
            assert np.isnan(found_S).all()
            continue
        expected_S = served_S.astype(float)  # who is not known counts 1
        worth_S = np.exp((sure_S[known_S] - sure_S[known_S].max()) / temperature).clip(min=FOLLOWED)
        expected_S[known_S] = known_S.sum() * worth_S / worth_S.sum()
        np.testing.assert_allclose(found_S, expected_S, rtol=1e-9)


def test_listening_by_hand():
    """exp(ln 3) = 3 times as loud; one that is hopeless keeps FOLLOWED; one that does not serve is not asked."""
    sure_BS = tensor([[0.6 + 0.05 * math.log(3), 0.6, NAN], [1, 0, 0.9], [NAN, 0.6, 0.9], [NAN, NAN, NAN]])
    served_BS = torch.tensor([[True, True, False], [True, True, False], [True, True, True], [False] * 3])
    found_BS = listening(sure_BS, served_BS, 0.05)
    torch.testing.assert_close(found_BS[0], tensor([1.5, 0.5, 0]))
    torch.testing.assert_close(found_BS[1], tensor([2, 0.02, 0]) / 1.01)
    torch.testing.assert_close(found_BS[2], tensor([1, 0.02 / 1.01, 2 / 1.01]))
    assert found_BS[3].isnan().all()


def test_each_image_has_its_own_teachers_where_they_are_known():
    """Rows 0 and 1 of one group, 2 not annotated; 3 and 4 (not annotated) are not known, and have what labels say."""
    sure_NS = tensor([[0.9, 0.5], [0.5, 0.9], [0.9, 0.5], [NAN, NAN], [NAN, NAN]]).float()
    known = measured(sure_NS=sure_NS)
    group_B, row_B = torch.tensor([0, 0, -1, 0, -1]), torch.arange(5)
    table = LossTable(torch.rand(5, 3), torch.ones(5, 3, dtype=torch.bool), row_B=row_B)
    by_labels, by_images = (
        balance.cells(cells=of(), measured=known, by=by, temperature=0.04) for by in ("labels", "images")
    )
    state = by_images.init()
    assert torch.equal(state["q_G"], by_labels.init()["q_G"])
    w_BT, cell_BT = by_images.weigh(state, table, group_B), by_labels.weigh(state, table, group_B)
    ratio_B = (state["q_G"] / tensor(SHARES))[0].repeat(5)
    ratio_B[[2, 4]] = 1
    rho_BT = torch.tensor([[2, 2, 0.02], [0.02, 0.02, 2], [2, 2, 0.02]]) / 1.01
    torch.testing.assert_close(w_BT[:3], (ratio_B[:3, None] / 20 * rho_BT).float())
    assert torch.equal(w_BT[3:], cell_BT[3:])
    assert torch.equal(by_images.weigh(state, table._replace(row_B=None), group_B), cell_BT)
    # Whoever is put into another group by mistake hears the same teachers.
    moved_BT = by_images.weigh(state, table, torch.tensor([1, 2, -1, 0, -1]))
    torch.testing.assert_close(moved_BT[:2, 0] / moved_BT[:2, 2], w_BT[:2, 0] / w_BT[:2, 2])


def test_a_specialist_is_not_asked_about_images_of_groups_that_it_does_not_serve():
    served = [[True, True, True], [True, True, False], [True, True, True]]
    known = measured(sure_NS=tensor([[0.7, 0.7], [0.7, NAN]]).float())
    balancer = balance.cells(cells=of(served=served), measured=known, by="images", gamma=1.0, tau=1e6)
    table = LossTable(torch.rand(2, 3), torch.tensor([[True] * 3, [True, True, False]]), row_B=torch.arange(2))
    rho_BT = balancer.weigh({"q_G": tensor(SHARES)}, table, torch.tensor([0, 1])) * 20
    torch.testing.assert_close(rho_BT, torch.tensor([[1.0, 1, 1], [1, 1, 0]]))


def test_what_is_said_of_a_group_is_the_mean_of_its_images():
    sure_NS = tensor([[0.9, 0.5], [0.9, 0.5], [0.5, 0.9], [NAN, NAN], [0.9, 0.5]]).float()
    facts = replace(of(), group_N=torch.tensor([0, 0, 0, 0, -1]))
    balancer = balance.cells(
        cells=facts, measured=measured(sure_NS=sure_NS), by="images", gamma=1.0, tau=1e6, temperature=0.04
    )
    table = LossTable(torch.rand(1, 3), torch.ones(1, 3, dtype=torch.bool))
    rho_BT = balancer.weigh({"q_G": tensor(SHARES)}, table, torch.tensor([0])) * 20
    torch.testing.assert_close(rho_BT[0, [0, 2]], torch.tensor([4.02, 2.04]) / 1.01 / 3)


@pytest.mark.parametrize("by", ["labels", "views", "images"])
def test_an_image_weighs_as_much_whoever_teaches_it(by):
    """A specialist by another attribute serves some images of each group; unannotated images are nobody's cell."""
    sure_NS = torch.rand(4, 2)
    balancer = balance.cells(cells=of(), measured=measured(sure_NS=sure_NS), by=by, gamma=1.0, tau=1e6)
    valid_BT = torch.tensor([[True] * 3, [True, True, False], [False, False, True], [True, True, False]])
    table = LossTable(torch.rand(4, 3), valid_BT, row_B=torch.arange(4))
    w_BT = balancer.weigh({"q_G": tensor(SHARES)}, table, torch.tensor([0, 1, 0, -1])) * 20 * valid_BT
    per_teacher_BS = torch.stack([w_BT[:, :2].amax(1), w_BT[:, 2]], 1)
    torch.testing.assert_close(per_teacher_BS.sum(1), torch.tensor([2.0, 1, 1, 1]))


@given(st.integers(0, 2**31), st.floats(1e-4, 1), st.floats(0, 1), st.floats(1, 5))
@settings(max_examples=60, deadline=None)
def test_weights_stay_between_floor_and_cap_and_keep_their_sum(seed, tau, floor, cap):
    """Over steps in which groups are absent, however sharp the tilt and however little a group varies."""
    rng = np.random.default_rng(seed)
    known = measured(seed, spread_GT=10.0 ** rng.uniform(-6, 0, (3, 3)))
    balancer = balance.cells(cells=of(), measured=known, tau=tau, floor=floor, cap=cap)
    state = balancer.init()
    for _ in range(6):
        count_GT = np.repeat(rng.integers(0, 2, (3, 1)), 3, 1).astype(float)
        state = balancer.update(state, stats(rng.random((3, 3)), count_GT))
        q_G = state["q_G"].numpy()
        np.testing.assert_allclose(q_G.sum(), SHARES.sum(), rtol=1e-9)
        assert (q_G >= floor * SHARES * (1 - 1e-9)).all()
        assert (q_G <= cap * SHARES * (1 + 1e-9)).all()


# ── Borrowing ──

LACKS = [[0.9, 0.9], [0.6, 0.9], [0.9, 0.9]]
LOAN = Loan(teacher=0, by=(1,), of=(0, 2), to=(1,))


def lent(**more):
    generator = torch.Generator().manual_seed(0)
    summary = {name: torch.randn(40, width, generator=generator) for name, width in (("x", 3), ("y", 2))}
    numbers = measured(right_GS=LACKS, **more)
    return replace(numbers, loans=(LOAN,), bank=Bank(torch.arange(40) % 3, summary))


def test_who_borrows_hears_the_summary_of_a_teacher_as_much_as_those_who_choose():
    """Columns: summary and patches of x, who does not know the second group, and the summary of y."""
    known = lent(sure_NS=tensor([[0.6, 0.9]] * 2 + [[0.9, 0.6]]).float())
    facts = replace(of(), group_N=torch.tensor([1, 0, 1]), summary_T=torch.tensor([True, False, True]))
    table = LossTable(torch.rand(3, 3), torch.ones(3, 3, dtype=torch.bool), row_B=torch.arange(3))
    behind = math.exp(-0.3 / 0.15)
    balancer = balance.cells(cells=facts, measured=known)
    w_BT = balancer.weigh(balancer.init(), table, torch.tensor([1, 0, 1])).double()
    assert float(w_BT[0, 0] / w_BT[0, 2]) == pytest.approx(1)
    assert float(w_BT[0, 1] / w_BT[0, 0]) == pytest.approx(2 * behind / (1 + behind)), "its patches are its own"
    assert float(w_BT[1, 0] / w_BT[1, 2]) == pytest.approx(behind)
    assert float(w_BT[2, 0] / w_BT[2, 2]) == pytest.approx(1 / behind), "it knows this image, and keeps its own"
    summary = {name: one_MD[[1, 0, 4]] for name, one_MD in known.bank.summary.items()}
    told = balancer.lend(summary, torch.arange(3))
    assert (told["x"] != summary["x"]).any(1).tolist() == [True, False, False]


def test_nothing_is_borrowed_where_it_is_not_asked_for():
    facts, known = replace(of(), group_N=torch.tensor([1])), lent(sure_NS=tensor([[0.6, 0.9]]))
    assert balance.cells(cells=facts, measured=known).lend is not None
    for options in ({"borrow": 0}, {"by": "views"}, {"by": "labels"}):
        assert balance.cells(cells=facts, measured=known, **options).lend is None
    for nothing in (measured(sure_NS=known.sure_NS), lent()):
        assert balance.cells(cells=facts, measured=nothing).lend is None
