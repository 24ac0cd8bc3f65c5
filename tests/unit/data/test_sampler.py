"""The stream of samples: epochs whole, batches full, ranks disjoint, resuming exact."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.data.sampler import drawn, stream, tempered

SIZES = ((64, 64), (96, 64), (128, 128))


def steps(rows, count, *, batch, world=1, accumulate=1, seed=0, start_step=0, weights=None):
    """The global batches (sets of samples as sorted lists) of `count` steps, from all ranks."""
    micro = batch // (world * accumulate)
    ranks = [
        stream(
            rows,
            SIZES,
            seed=seed,
            batch=batch,
            micro=micro,
            rank=rank,
            world=world,
            accumulate=accumulate,
            start_step=start_step,
            weights=weights,
        )
        for rank in range(world)
    ]
    batches = []
    for _ in range(count):
        parts = [part for rank in ranks for part in islice(rank, accumulate)]
        assert all(len(part) == micro for part in parts)
        batches.append(sorted(sample for part in parts for sample in part))
    return batches


rows_of = st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True)
shares = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(rows=rows_of, share=shares, seed=st.integers(0, 2**32))
def test_ranks_and_accumulation_share_the_same_global_batches(rows, share, seed):
    world, accumulate, micro = share
    batch = world * accumulate * micro
    assert steps(rows, 5, batch=batch, world=world, accumulate=accumulate, seed=seed) == steps(
        rows, 5, batch=batch, seed=seed
    )


@settings(max_examples=100, deadline=None)
@given(rows=rows_of, batch=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_each_epoch_sees_each_row_once(rows, batch, seed):
    epochs = 3
    count = -(-epochs * len(rows) // batch)
    seen = [
        sample for part in islice(stream(rows, SIZES, seed=seed, batch=batch, micro=batch), count) for sample in part
    ]
    for epoch in range(epochs):
        chunk = seen[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert sorted((row, view) for row, view, _ in chunk) == sorted((row, epoch) for row in rows)


@settings(max_examples=100, deadline=None)
@given(rows=rows_of, share=shares, start=st.integers(0, 30))
def test_resuming_continues(rows, share, start):
    world, accumulate, micro = share
    options = {"seed": 5, "batch": world * accumulate * micro, "micro": micro, "rank": world - 1, "world": world}
    options["accumulate"] = accumulate
    whole = list(islice(stream(rows, SIZES, **options), (start + 3) * accumulate))
    assert list(islice(stream(rows, SIZES, start_step=start, **options), 3 * accumulate)) == whole[start * accumulate :]


def test_seed_and_epoch_shuffle():
    rows = list(range(100))
    first, second = (list(islice(stream(rows, SIZES, seed=0, batch=100, micro=100), 2))[epoch] for epoch in (0, 1))
    other = next(stream(rows, SIZES, seed=1, batch=100, micro=100))
    orders = [[row for row, *_ in part] for part in (first, second, other)]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != rows


@settings(max_examples=100, deadline=None)
@given(rows=rows_of, share=shares, start=st.integers(0, 30))
def test_one_size_to_a_step_whatever_the_ranks(rows, share, start):
    world, accumulate, micro = share
    count, options = 4, {"batch": world * accumulate * micro, "seed": 2, "start_step": start}
    found = [{size for *_, size in part} for part in steps(rows, count, world=world, accumulate=accumulate, **options)]
    assert found == [{drawn(SIZES, 2, step)} for step in range(start, start + count)]


def test_sizes_are_as_likely_and_pinned():
    """A change of the first numbers changes every run of several sizes: say so in the release notes."""
    found = [SIZES.index(drawn(SIZES, 0, step)) for step in range(3000)]
    assert found[:12] == [0, 1, 1, 0, 1, 2, 0, 2, 2, 0, 1, 2]
    assert all(abs(found.count(place) - 1000) < 100 for place in range(3))
    assert found != [SIZES.index(drawn(SIZES, 1, step)) for step in range(3000)]


@settings(max_examples=100, deadline=None)
@given(rows=rows_of, share=shares, start=st.integers(0, 30), seed=st.integers(0, 2**32))
def test_weighted_draws_are_shared_by_ranks_and_go_on_after_a_resume(rows, share, start, seed):
    world, accumulate, micro = share
    options = {"batch": world * accumulate * micro, "seed": seed, "weights": np.arange(1.0, len(rows) + 1)}
    whole = steps(rows, start + 3, **options)
    assert steps(rows, 3, world=world, accumulate=accumulate, start_step=start, **options) == whole[start:]
    views = [view for batch in whole for _, view, _ in batch]
    assert sorted(views) == list(range(len(views)))


def test_rows_come_by_their_weights_and_no_view_twice():
    """In each epoch anew, with replacement; without weights nothing has changed."""
    weights = np.array([0.5, 0.3, 0.2, 0.0] * 250)
    seen = next(stream(range(1000), SIZES, seed=1, batch=20_000, micro=20_000, weights=weights))
    assert len({(row, view) for row, view, _ in seen}) == 20_000
    count = np.bincount([row % 4 for row, *_ in seen], minlength=4) / 20_000
    np.testing.assert_allclose(count, [0.5, 0.3, 0.2, 0.0], atol=0.015)
    epochs = [[row for row, *_ in seen[1000 * epoch :][:1000]] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) < 700
    again = next(stream(range(1000), SIZES, seed=1, batch=1000, micro=1000))
    assert [row for row, *_ in again] == np.random.default_rng((1, 0)).permutation(1000).tolist()


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.floats(0, 1))
def test_tempered_shares(groups, power):
    """By group, in plain Python; those without annotation stay as frequent as they are."""
    group, total = np.array(groups), len(groups)
    found = tempered(group, power)
    assert found.sum() == pytest.approx(1)
    count = {one: groups.count(one) for one in set(groups) - {-1}}
    mass = sum((n / total) ** (1 - power) for n in count.values())
    for one, n in count.items():
        expected = (n / total) ** (1 - power) / mass * sum(count.values()) / total
        np.testing.assert_allclose(found[group == one], expected / n)
    np.testing.assert_allclose(found[group < 0], 1 / total)


def test_refusals_come_at_once():
    with pytest.raises(ValueError, match=r"weights of shape \(2,\) for 1 rows"):
        stream([1], SIZES, seed=0, batch=8, micro=8, weights=np.ones(2))
    with pytest.raises(ValueError, match="batch 8 is not micro 2 × world 2 × accumulate 1"):
        stream([1], SIZES, seed=0, batch=8, micro=2, world=2)
    with pytest.raises(ValueError, match="no rows"):
        stream([], SIZES, seed=0, batch=8, micro=8)
    with pytest.raises(ValueError, match="no sizes"):
        stream([1], [], seed=0, batch=8, micro=8)
