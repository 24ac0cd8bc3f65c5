import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core.groups import clusters, encode, joined, tally

COLUMNS = {"sex": ["M", "F", None, "F", "M"], "view": ["PA", "AP", "AP", None, "AP"], "site": ["1", "1", "2"]}


def test_an_attribute_is_numbered_in_alphabetical_order():
    space = encode("sex", COLUMNS)
    assert (space.name, space.values) == ("sex", ("F", "M"))
    assert space.index_N.tolist() == [1, 0, -1, 0, 1]
    assert space.index_N.dtype == torch.int64


def test_a_crossing_is_the_full_product_and_unknown_in_any_part_is_no_group():
    space = encode("sex*view", COLUMNS)
    assert space.values == ("F|AP", "F|PA", "M|AP", "M|PA")
    assert space.index_N.tolist() == [3, 0, -1, -1, 2]


def test_nobody_annotated():
    space = encode("sex", {"sex": [None, None]})
    assert space.values == ()
    assert space.index_N.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("age", "unknown attribute age; known: sex"), ("sex*sex", "crossed with itself"), ("sex*site", "unequal length")],
)
def test_wrong_names_and_columns_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        encode(name, COLUMNS)


def test_clusters_take_in_whom_no_group_has():
    known, cluster_N = encode("sex", COLUMNS), torch.tensor([1, -1, 1, 0, 0])
    space = joined("sex, else clusters", known, cluster_N, 2)
    assert (space.name, space.values) == ("sex, else clusters", ("F", "M", "cluster 1", "cluster 2"))
    assert space.index_N.tolist() == [1, 0, 3, 0, 1]
    alone = joined("clusters", None, cluster_N, 2)
    assert (alone.values, alone.index_N.tolist()) == (clusters(2), [1, -1, 1, 0, 0])


names = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=30)


@given(st.integers(0, 2**31), names)
@settings(max_examples=50, deadline=None)
def test_a_crossing_agrees_with_its_parts(seed, first):
    second = np.random.default_rng(seed).choice(["x", "y", None], len(first)).tolist()
    space = encode("p*q", {"p": first, "q": second})
    for index, p, q in zip(space.index_N.tolist(), first, second, strict=True):
        assert index == -1 if p is None or q is None else space.values[index] == f"{p}|{q}"


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_tally_equals_a_loop(seed, batch, columns, groups):
    rng = np.random.default_rng(seed)
    group, values = rng.integers(-1, groups, batch), rng.normal(size=(batch, columns))
    valid = rng.random((batch, columns)) < 0.7
    total, count = np.zeros((groups + 1, columns)), np.zeros((groups + 1, columns))
    for i in range(batch):
        for t in range(columns):
            if valid[i, t]:
                total[group[i], t] += values[i, t]
                count[group[i], t] += 1
    values[~valid] = np.nan
    stats = tally(torch.from_numpy(group), torch.from_numpy(values), torch.from_numpy(valid), groups)
    np.testing.assert_allclose(stats.sum_GT, total, atol=1e-12)
    np.testing.assert_array_equal(stats.count_GT, count)


def test_tally_is_additive_over_parts_of_a_batch_and_keeps_no_graph():
    group_B = torch.tensor([0, 1, -1, 1, 0, 2])
    values_BT = torch.arange(12.0).reshape(6, 2).requires_grad_()
    valid_BT = torch.ones(6, 2, dtype=torch.bool)
    whole = tally(group_B, values_BT, valid_BT, 3)
    parts = [tally(group_B[s], values_BT[s], valid_BT[s], 3) for s in (slice(0, 2), slice(2, 6))]
    assert torch.equal(whole.sum_GT, parts[0].sum_GT + parts[1].sum_GT)
    assert torch.equal(whole.count_GT, parts[0].count_GT + parts[1].count_GT)
    assert not whole.sum_GT.requires_grad


def test_a_value_that_is_not_finite_stays_in_its_cell():
    values_BT = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    stats = tally(torch.tensor([0, 1]), values_BT, torch.ones(2, 2, dtype=torch.bool), 2)
    assert stats.sum_GT.isnan().tolist() == [[False, True], [False, False], [False, False]]
