"""Which images are surveyed, and how one teacher's features are gathered."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agglom import survey
from agglom.core import groups
from agglom.core.types import Derived, Features
from agglom.errors import DataError

COLUMNS = ("sex", "age", "sex*age")
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
    fit = survey.fit_rows(few)
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


def test_a_fit_reads_groups_numbers_and_labels():
    """A continuous attribute by its value, as a group by its bins; a crossing by its groups."""
    spaces = {name: groups.encode(name, {"sex": ["F", None, "M"], "age": ["<50", ">=50", None]}) for name in COLUMNS}
    manifest = SimpleNamespace(
        numbers={"age": np.array([40.0, 60.0, np.nan])},
        labels=("old", "sick"),
        label_NL=np.array([[0, 1], [0, np.nan], [0, 0]], np.float32),
    )
    job = SimpleNamespace(spaces=spaces, manifest=manifest)
    found = survey._columns(job, Derived("one", lambda features: features, ("sex", "age", "sex*age"), (), ("sick",)))
    assert {name: column.dtype for name, column in found.items()} == {
        **{"sex": torch.int64, "age": torch.float64, "sex*age": torch.int64, "sick": torch.float64}
    }
    assert found["sex"].tolist() == [0, -1, 1]
    assert found["age"].nan_to_num(-1).tolist() == [40, 60, -1]
    assert found["sex*age"].tolist() == [0, -1, -1]
    assert found["sick"].nan_to_num(-1).tolist() == [1, -1, 0]
    assert survey._columns(job, Derived("one", lambda features: features, (), ("age",)))["age"].tolist() == [0, 1, -1]


def test_sources_are_fitted_before_what_is_derived_from_them():
    derived = {"a": "b", "b": "c", "c": None, "d": "c"}
    teachers = {
        name: SimpleNamespace(derived=source and SimpleNamespace(source=source)) for name, source in derived.items()
    }
    assert survey._sources_first(teachers) == ["c", "b", "d", "a"]


def grouped(counts, served=None):
    """A run whose train images are of groups in these numbers, the last of them of no group."""
    index_N = torch.tensor([group for group, count in enumerate(counts[:-1]) for _ in range(count)] + [-1] * counts[-1])
    space = groups.GroupSpace("sex", tuple("FMX"[: len(counts) - 1]), index_N)
    job = SimpleNamespace(loss=SimpleNamespace(moments_by="sex"))
    served = {} if served is None else {"local": served}
    return SimpleNamespace(job=job, spaces={"sex": space}, manifest=index_N, served=served)


def test_moments_by_counts_every_group_the_same():
    weight_N = survey._weights(grouped([6, 2, 2]), "one", np.arange(10))
    assert weight_N.tolist() == [pytest.approx(4 / 6)] * 6 + [2.0] * 2 + [1.0] * 2
    some_N = survey._weights(grouped([6, 2, 2]), "one", np.arange(4, 8))
    assert some_N.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 2
    everybody = grouped([6, 2, 2])
    everybody.job.loss.moments_by = None
    assert survey._weights(everybody, "one", np.arange(3)).tolist() == [1.0] * 3 + [0.0] * 7


def test_moments_of_a_specialist_are_of_those_it_serves():
    serves_N = torch.tensor([True] * 2 + [False] * 4 + [True] * 4)
    weight_N = survey._weights(grouped([6, 2, 2], serves_N), "local", np.arange(10))
    assert weight_N.tolist() == [1.0] * 2 + [0.0] * 4 + [1.0] * 4


def test_a_group_of_one_image_has_no_moments():
    with pytest.raises(
        DataError, match=r"loss.moments_by: of sex M there is one image among the 9 .* of one is fitted"
    ):
        survey._weights(grouped([6, 1, 2]), "one", np.arange(9))
