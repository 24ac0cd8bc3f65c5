import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsRegressor

from agglom.core import borrowing
from agglom.core.borrowing import LEAST, Bank, Loan, borrowers, lender, reliable

NAMES = ("a", "b", "c")


def auroc(rows):
    return torch.tensor(rows, dtype=torch.float64)


def loans(right_GS, taking_part_GS=None, count=LEAST):
    everybody_GS = torch.ones_like(right_GS, dtype=torch.bool)
    count_G = torch.full((len(right_GS),), count)
    return borrowing.loans(right_GS, everybody_GS if taking_part_GS is None else taking_part_GS, count_G)


def bank(images=60, groups=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = {"a": 3, "b": 5, "c": 4}
    summary = {name: torch.randn(images, width, generator=generator) * width for name, width in widths.items()}
    return Bank(torch.randint(-1, groups, (images,), generator=generator), summary)


# ── Who borrows ──


def test_a_teacher_that_is_clearly_behind_borrows_from_groups_that_it_knows():
    right_GS = auroc([[0.99, 0.97, 0.98], [0.80, 0.95, 0.94]])
    assert loans(right_GS) == (Loan(teacher=0, by=(1, 2), of=(0,), to=(1,)),)


@pytest.mark.parametrize(
    "right",
    [
        [[0.9, 0.88], [0.8, 0.84]],  # all are close
        [[0.9, 0.7], [0.8, 0.6]],  # who is behind knows no group
        [[0.9, 0.9], [0.3, 0.55]],  # nobody has shown to know the group
        [[0.9, float("nan")], [0.9, float("nan")]],
        [[float("nan")] * 2] * 2,
    ],
)
def test_nobody_borrows(right):
    assert loans(auroc(right)) == ()


def test_who_has_no_part_in_a_group_neither_borrows_nor_chooses_there():
    right_GS = auroc([[0.99, 0.97, 0.98], [0.80, 0.95, 0.94]])
    for teacher, expected in ((0, ()), (2, (Loan(0, (1,), (0,), (1,)),))):
        taking_part_GS = torch.ones_like(right_GS, dtype=torch.bool)
        taking_part_GS[1, teacher] = False
        assert loans(right_GS, taking_part_GS) == expected


def test_too_few_images_lend_nothing():
    assert loans(auroc([[0.99, 0.97], [0.80, 0.95]]), count=LEAST - 1) == ()


@given(st.lists(st.lists(st.floats(0.3, 1), min_size=3, max_size=3), min_size=1, max_size=6))
def test_loans_by_their_definition(right):
    right_GS = np.array(right)
    best_G = right_GS.max(1)
    taught_G = 2 * best_G - 1 >= 0.2
    knows_GS = (right_GS >= best_G[:, None] - 0.05) & taught_G[:, None]
    borrowed = {(t, g) for t in range(3) for g in range(len(right)) if taught_G[g] and not knows_GS[g, t]}
    borrowed = {(t, g) for t, g in borrowed if knows_GS[:, t].any()}
    found = loans(auroc(right))
    assert {(one.teacher, group) for one in found for group in one.to} == borrowed
    for one in found:
        assert one.of == tuple(np.flatnonzero(knows_GS[:, one.teacher]))
        assert all(one.by == tuple(np.flatnonzero(knows_GS[group])) for group in one.to)
        assert one.teacher not in one.by


# ── What is borrowed ──


def told_to(asked, given, stored, neighbours, sure=math.nan):
    """Of images in the order of the rows; by default it is not known how sure teachers are of them."""
    images = len(asked.group_M)
    asks_NJ = borrowers(torch.as_tensor(sure).expand(images, len(NAMES)), asked.group_M, given)
    return lender(given, NAMES, stored, neighbours, asks_NJ)(asked.summary, torch.arange(images))


def test_nearest_neighbours_agree_with_scikit_learn():
    stored, loan = bank(300), Loan(teacher=0, by=(1, 2), of=(0,), to=(1,))
    asked = bank(seed=1)
    told = told_to(asked, [loan], stored, 7)

    def keys(one):
        parts = [(one.summary[name] - stored.summary[name].mean(0)) for name in ("b", "c")]
        scales = [stored.summary[name].var(0).sum().sqrt() for name in ("b", "c")]
        return torch.cat([part / scale for part, scale in zip(parts, scales, strict=True)], 1).numpy()

    lends_M = (stored.group_M == 0).numpy()
    model = KNeighborsRegressor(7).fit(keys(stored)[lends_M], stored.summary["a"].numpy()[lends_M])
    borrows_B = (asked.group_M == 1).numpy()
    np.testing.assert_allclose(told["a"].numpy()[borrows_B], model.predict(keys(asked))[borrows_B], atol=1e-4)
    assert torch.equal(told["a"][~borrows_B], asked.summary["a"][~borrows_B])
    assert all(told[name] is asked.summary[name] for name in ("b", "c"))


def test_of_few_images_not_all_are_near():
    stored, asked, loan = bank(), bank(seed=1), Loan(0, (1,), (0,), (1,))
    few = math.isqrt(int((stored.group_M == 0).sum()))
    told, capped = (told_to(asked, [loan], stored, count) for count in (few, 10**6))
    assert torch.equal(told["a"], capped["a"])


def test_the_precision_of_the_teacher_is_kept():
    stored, asked = bank(), bank(seed=1)
    half = asked._replace(summary={name: one_BD.bfloat16() for name, one_BD in asked.summary.items()})
    assert told_to(half, [Loan(0, (1,), (0,), (1,))], stored, 5)["a"].dtype == torch.bfloat16


def test_an_image_of_which_a_teacher_is_as_sure_as_those_who_choose_keeps_its_own():
    stored, asked = bank(), bank(seed=1)
    sure_NS = torch.rand(len(asked.group_M), 3, generator=torch.Generator().manual_seed(2))
    sure_NS[::7] = math.nan
    told = told_to(asked, [Loan(0, (1, 2), (0,), (1,))], stored, 5, sure_NS)
    keeps_B = sure_NS[:, 0] >= sure_NS[:, 1:].mean(1)
    borrows_B = (asked.group_M == 1) & ~keeps_B
    assert torch.equal((told["a"] != asked.summary["a"]).any(1), borrows_B)
    assert (borrows_B & sure_NS[:, 0].isnan()).any(), "where that is not known, the group decides"
    assert ((asked.group_M == 1) & keeps_B).any()


def test_a_borrowed_target_is_as_reliable_as_those_who_choose_it():
    right_GS = auroc([[0.99, 0.97, 0.98], [0.80, 0.95, 0.93]])
    found_GS = reliable(right_GS, torch.arange(2), loans(right_GS))
    assert found_GS.tolist() == [[0.99, 0.97, 0.98], [pytest.approx(0.94), 0.95, 0.93]]
    assert right_GS[1, 0] == 0.80


def test_a_teacher_may_borrow_for_two_groups_by_other_teachers():
    stored, asked = bank(300, groups=3), bank(groups=3, seed=1)
    both = [Loan(0, (1,), (0,), (1,)), Loan(0, (2,), (0,), (2,))]
    told, (one, two) = told_to(asked, both, stored, 5), (told_to(asked, [loan], stored, 5) for loan in both)
    expected_BD = torch.where((asked.group_M == 1)[:, None], one["a"], two["a"])
    assert torch.equal(told["a"], expected_BD)
    right_XS = auroc([[0.9, 0.9, 0.9], [0.6, 0.8, 0.7], [0.6, 0.7, 0.85]])
    assert reliable(right_XS, torch.arange(3), both)[:, 0].tolist() == [0.9, 0.8, 0.85]


def test_nor_does_borrowing_make_a_teacher_less_reliable():
    loan, nan = Loan(0, (1, 2), (0,), (1,)), math.nan
    sure_NS = torch.tensor([[0.5, 0.6, 0.8], [0.9, 0.6, 0.8], [0.1, 0.6, 0.8], [nan, nan, nan]])
    found_NS = reliable(sure_NS, torch.tensor([1, 1, 0, 1]), [loan])
    assert found_NS[:3, 0].tolist() == pytest.approx([0.7, 0.9, 0.1])
    assert found_NS[3].isnan().all()
