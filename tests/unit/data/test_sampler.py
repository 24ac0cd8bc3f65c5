"""The stream of samples: epochs whole, batches full, ranks disjoint, resuming exact."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.data.sampler import drawn, stream

SIZES = ((64, 64), (96, 64), (128, 128))


def steps(rows, count, *, batch, world=1, accumulate=1, seed=0, start_step=0):
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


def test_refusals_come_at_once():
    with pytest.raises(ValueError, match="batch 8 is not micro 2 × world 2 × accumulate 1"):
        stream([1], SIZES, seed=0, batch=8, micro=2, world=2)
    with pytest.raises(ValueError, match="no rows"):
        stream([], SIZES, seed=0, batch=8, micro=8)
    with pytest.raises(ValueError, match="no sizes"):
        stream([1], [], seed=0, batch=8, micro=8)
