"""Which images are surveyed, and how one teacher's features are gathered."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agglom import survey
from agglom.core.types import Features
from agglom.errors import DataError

SPLIT_N = np.array((["train"] * 6 + ["val"] * 2 + ["test"] * 2) * 10)


def run(probe_images=20000, fvu_images=512, fit_images=3000, seed=0):
    manifest = SimpleNamespace(rows=lambda split: np.flatnonzero(split == SPLIT_N))
    settings = SimpleNamespace(probe_images=probe_images, fvu_images=fvu_images)
    job = SimpleNamespace(evaluate=settings, seed=seed, loss=SimpleNamespace(fit_images=fit_images))
    return SimpleNamespace(manifest=manifest, job=job)


def test_small_data_is_surveyed_in_full():
    rows, held = survey.chosen_rows(run())
    np.testing.assert_array_equal(rows, np.arange(100))
    np.testing.assert_array_equal(held, np.flatnonzero(SPLIT_N != "train"))


def test_large_data_is_sampled():
    """All of val and test are scored; train and the sample for variance unexplained have their limits."""
    rows, held = survey.chosen_rows(run(probe_images=10, fvu_images=3))
    assert (SPLIT_N[rows] == "train").sum() == 10
    assert (SPLIT_N[rows] != "train").sum() == 40
    assert [(SPLIT_N[held] == split).sum() for split in ("train", "val", "test")] == [0, 3, 3]
    assert np.isin(held, rows).all()
    assert (np.diff(rows) > 0).all()


def test_the_sample_depends_on_the_seed_alone():
    first, again, other = (survey.chosen_rows(run(probe_images=10, seed=seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_fit_is_on_surveyed_train_images():
    few = run(probe_images=30, fit_images=12)
    fit = survey._fit_rows(few)
    assert len(fit) == 12
    assert (SPLIT_N[fit] == "train").all()
    assert np.isin(fit, survey.chosen_rows(few)[0]).all()


def test_gathers_moments_means_and_pools():
    torch.manual_seed(0)
    summary, patches = torch.randn(10, 3), torch.randn(10, 4, 5)
    held, train = torch.arange(10) >= 6, torch.arange(10) < 6
    gatherer = survey._Gatherer()
    for part in torch.arange(10).split(4):
        features = Features(summary[part], patches[part], (2, 2))
        gatherer.add("one", features, held[part], train[part], train[part] & (part > 0))
    pool = gatherer.pool()
    torch.testing.assert_close(pool.summary_ND, summary)
    torch.testing.assert_close(pool.patches_MND, patches[6:])
    torch.testing.assert_close(pool.mean_patches_ND, patches[:6].mean(0))
    assert pool.grid == (2, 2)
    assert gatherer.moments.count == 5 * 4
    torch.testing.assert_close(gatherer.moments.mean_D, patches[1:6].flatten(0, 1).double().mean(0))


@pytest.mark.parametrize("kind", ["summary", "patches"])
def test_refuses_features_that_are_not_finite(kind):
    summary, patches, no = torch.zeros(2, 3), torch.zeros(2, 4, 3), torch.zeros(2, dtype=torch.bool)
    (summary if kind == "summary" else patches)[1] = torch.nan
    with pytest.raises(DataError, match=f"teachers.one: its {kind} features are not finite"):
        survey._Gatherer().add("one", Features(summary, patches, (2, 2)), no, no, no)
