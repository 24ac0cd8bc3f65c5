import importlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import covariance
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import roc_auc_score

from agglom.core.erase import CrossMoments, leace, oas
from agglom.core.normalise import Moments


def data(count, width, groups=3, seed=0, unknown=0.2):
    """Correlated features that depend on the group and on an age, the group ids and ages, some of them unknown."""
    rng = np.random.default_rng(seed)
    z_N, age_N = rng.integers(0, groups, count), rng.normal(50, 15, count)
    x_ND = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 5
    x_ND += rng.normal(size=(groups, width))[z_N] + age_N[:, None] / 30 * rng.normal(size=width)
    z_N[rng.random(count) < unknown] = -1
    age_N[rng.random(count) < unknown] = np.nan
    z_N[:2], age_N[:2] = [0, 1], [40, 60]
    return tuple(map(torch.from_numpy, (x_ND, z_N, age_N)))


def streamed(x_ND, *attributes, batch=7):
    moments, crossed = Moments.empty(x_ND.shape[1]), {str(i): CrossMoments.empty(x_ND.shape[1]) for i in range(9)}
    for rows in torch.arange(len(x_ND)).split(batch):
        moments = moments.update(x_ND[rows])
        crossed |= {str(i): crossed[str(i)].update(x_ND[rows], z_N[rows]) for i, z_N in enumerate(attributes)}
    return moments, {str(i): crossed[str(i)] for i in range(len(attributes))}


def known(z_N):
    return ~z_N.isnan() if z_N.is_floating_point() else z_N >= 0


def columns(z_N):
    """Values, or one-hot groups, of the samples that have them."""
    mine = z_N[known(z_N)].numpy()
    return mine[:, None] if z_N.is_floating_point() else np.eye(z_N.max() + 1)[mine]


def cross_covariance(x_ND, z_N):
    x, z = x_ND[known(z_N)].numpy(), columns(z_N)
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


def erased(x_ND, mean_D, matrix_DD):
    return x_ND - (x_ND - mean_D) @ matrix_DD.T


def reference(x, cross):
    """W⁺PW of the paper, literally, in NumPy."""
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    kept = values > values[-1] * 1e-12
    values, vectors = values[kept], vectors[:, kept]
    whiten, colour = (vectors / np.sqrt(values)) @ vectors.T, (vectors * np.sqrt(values)) @ vectors.T
    basis, strength, _ = np.linalg.svd(whiten @ cross, full_matrices=False)
    basis = basis[:, strength > strength[0] * 1e-10]
    return colour @ basis @ basis.T @ whiten


@pytest.mark.parametrize("shrink", [0.0, 0.1, 1.0])
@given(st.integers(0, 2**31), st.sampled_from([(200, 8), (60, 40), (20, 40)]))
@settings(max_examples=15, deadline=None)
def test_nothing_linear_is_left_on_the_fitted_rows(shrink, seed, shape):
    """Ruling 12: ≤ 1e-8 relative, with fewer samples than dimensions and with shrinkage, for both attributes."""
    x_ND, *attributes = data(*shape, seed=seed)
    after = erased(x_ND, *leace(*streamed(x_ND, *attributes), shrink))
    for z_N in attributes:
        before = np.linalg.norm(cross_covariance(x_ND, z_N))
        assert np.linalg.norm(cross_covariance(after, z_N)) <= 1e-8 * before


@pytest.mark.parametrize("shape", [(300, 8), (30, 40)])
def test_it_is_the_formula_of_the_paper(shape):
    """Its covariance is that of all samples, its cross-covariance that of those whose attribute is known."""
    x_ND, *attributes = data(*shape)
    mean_D, matrix_DD = leace(*streamed(x_ND, *attributes))
    assert mean_D.dtype == matrix_DD.dtype == torch.float64
    np.testing.assert_allclose(mean_D, x_ND.mean(0), rtol=1e-10)
    cross = np.concatenate([cross_covariance(x_ND, z_N) for z_N in attributes], 1)
    np.testing.assert_allclose(matrix_DD, reference(x_ND.numpy(), cross), atol=1e-8)


@pytest.fixture(scope="module")
def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses torch.jit
        return importlib.import_module("concept_erasure")


def one_hot_and_age(z_N, age_N):
    return torch.cat([torch.nn.functional.one_hot(z_N).double(), age_N[:, None]], 1)


@pytest.mark.parametrize("which", ["groups", "value", "both"])
@pytest.mark.parametrize("shape", [(300, 8), (200, 64)])
def test_it_is_that_of_the_concept_erasure_package(package, which, shape):
    """Of EleutherAI, by the authors of the paper; on samples that are all annotated, since it knows no others."""
    x_ND, *attributes = data(*shape, unknown=0)
    concepts = one_hot_and_age(*attributes)
    pick, attributes = {"groups": (slice(3), attributes[:1]), "value": (slice(3, 4), attributes[1:])}.get(
        which, (slice(4), attributes)
    )
    # Their tolerance drops weak directions of the concept, which would then be left in.
    theirs = package.LeaceEraser.fit(x_ND, concepts[:, pick], shrinkage=False, svd_tol=1e-8)
    torch.testing.assert_close(erased(x_ND, *leace(*streamed(x_ND, *attributes))), theirs(x_ND), atol=1e-6, rtol=0)


def test_shrinkage_is_that_of_the_concept_erasure_package(package):
    """Given the strength that it chooses (Bodnar et al. 2014)."""
    x_ND, z_N, age_N = data(200, 64, unknown=0)
    fitter = package.LeaceFitter.fit(x_ND, one_hot_and_age(z_N, age_N), svd_tol=1e-8)
    raw, shrunk = np.cov(x_ND.numpy().T, bias=True), fitter.sigma_xx.numpy()
    shrink = 1 - shrunk[0, 1] / raw[0, 1]
    assert 0.01 < shrink < 0.5
    ours = erased(x_ND, *leace(*streamed(x_ND, z_N, age_N), float(shrink)))
    torch.testing.assert_close(ours, fitter.eraser(x_ND), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(300, 8), (40, 30), (5, 30)])
def test_shrinkage_by_the_number_of_samples_is_that_of_scikit_learn(shape):
    x_ND, *_ = data(*shape)
    assert oas(streamed(x_ND)[0], len(x_ND)) == pytest.approx(covariance.oas(x_ND.numpy())[1], rel=1e-9)
    assert oas(Moments.empty(3).update(torch.ones(4, 3)), 4) == 1
    assert oas(streamed(x_ND)[0], 10 * len(x_ND)) < oas(streamed(x_ND)[0], len(x_ND))


def test_it_is_a_projection_of_rank_groups_minus_one_and_keeps_the_mean():
    x_ND, z_N, age_N = data(300, 12)
    for attributes, rank in (((z_N,), 2), ((age_N,), 1), ((z_N, age_N), 3), ((z_N, z_N), 2)):
        mean_D, matrix_DD = leace(*streamed(x_ND, *attributes))
        torch.testing.assert_close(matrix_DD @ matrix_DD, matrix_DD, atol=1e-8, rtol=0)
        assert int(torch.linalg.matrix_rank(matrix_DD, rtol=1e-8)) == rank
        torch.testing.assert_close(erased(x_ND, mean_D, matrix_DD).mean(0), x_ND.mean(0))


def test_no_other_exact_eraser_changes_the_features_less():
    """Against the orthogonal projection off the same cross-covariance, shrinkage, and a fit on known samples alone."""
    x_ND, z_N, _ = data(400, 10)
    moments, crossed = streamed(x_ND, z_N)

    def change(mean_D, matrix_DD):
        return float((erased(x_ND, mean_D, matrix_DD) - x_ND).square().sum())

    basis = np.linalg.svd(cross_covariance(x_ND, z_N), full_matrices=False)[0][:, :2]
    mean_D, matrix_DD = leace(moments, crossed)
    assert change(mean_D, matrix_DD) < change(mean_D, torch.from_numpy(basis @ basis.T))
    assert change(mean_D, matrix_DD) < change(*leace(moments, crossed, 0.5))
    assert change(mean_D, matrix_DD) < change(*leace(*streamed(x_ND[known(z_N)], z_N[known(z_N)])))


def test_a_linear_probe_on_erased_rows_is_constant():
    x_ND, z_N, age_N = data(300, 6, groups=2, unknown=0.0)
    design = np.c_[erased(x_ND, *leace(*streamed(x_ND, z_N, age_N))).numpy(), np.ones(300)]
    for truth in (z_N.double().numpy(), age_N.numpy()):
        scores = design @ np.linalg.lstsq(design, truth)[0]
        np.testing.assert_allclose(scores, truth.mean(), atol=1e-7)


def test_on_new_samples_linear_probes_are_at_chance_where_samples_are_many():
    """50 samples per dimension and more; eraser, probes and test are of disjoint samples. Three standard errors."""
    x_ND, z_N, age_N = data(3 * 4000, 8, groups=2, unknown=0)
    fit, probe, test = torch.arange(len(x_ND)).split(4000)
    after_ND = erased(x_ND, *leace(*streamed(x_ND[fit], z_N[fit], age_N[fit], batch=500)))
    found = {}
    for name, x in (("raw", x_ND), ("erased", after_ND)):
        logit = LogisticRegression(max_iter=1000).fit(x[probe], z_N[probe]).decision_function(x[test])
        years = LinearRegression().fit(x[probe], age_N[probe]).predict(x[test])
        found[name] = roc_auc_score(z_N[test], logit) - 0.5, np.corrcoef(age_N[test], years)[0, 1]
    assert min(found["raw"]) > 0.2
    assert abs(found["erased"][0]) < 3 / np.sqrt(12 * 1000)
    assert abs(found["erased"][1]) < 3 / np.sqrt(4000)


def test_streaming_does_not_depend_on_the_batches():
    """Group 2 comes late, and whole batches are unknown."""
    x_ND, z_N, age_N = data(100, 5)
    order = torch.argsort(z_N, stable=True)
    x_ND, z_N, age_N = x_ND[order], z_N[order], age_N[order]
    one, two = leace(*streamed(x_ND, z_N, age_N, batch=100)), leace(*streamed(x_ND, z_N, age_N, batch=3))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_the_unit_of_a_value_does_not_matter():
    x_ND, z_N, age_N = data(100, 5)
    one, two = leace(*streamed(x_ND, z_N, age_N)), leace(*streamed(x_ND, z_N, age_N * 3.15e19))
    torch.testing.assert_close(one[1], two[1], atol=1e-8, rtol=0)


def test_what_was_erased_in_float32_is_not_erased_again():
    """What is left of it is the rounding of the features, and a projection on that would spoil new samples."""
    x_ND, z_N, _ = data(200, 12)
    once_ND = erased(x_ND, *leace(*streamed(x_ND, z_N))).float().double()
    _, again_DD = leace(*streamed(once_ND, z_N))
    assert torch.equal(again_DD, torch.zeros(12, 12, dtype=torch.float64))


def test_features_that_do_not_know_the_attribute_stay_as_they_are():
    x_ND = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 4, dtype=torch.float64)
    _, matrix_DD = leace(*streamed(x_ND, torch.tensor([0, 0, 1, 1] * 2)))
    assert matrix_DD.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("z", "message"),
    [
        ([1] * 6, "'0' is the same in all 6 samples that have it"),
        ([1, -1] * 3, "'0' is the same in all 3 samples"),
        ([-1] * 6, "'0' is unknown in all 6 samples; expected two groups"),
        ([0.1] * 6, "'0' is the same in all 6 samples"),
        ([np.nan] * 6, "'0' is unknown in all 6"),
    ],
)
def test_an_attribute_that_is_constant_or_unknown_is_refused(z, message):
    with pytest.raises(ValueError, match=message):
        leace(*streamed(torch.randn(6, 4), torch.tensor(z), batch=2))


@pytest.mark.parametrize("shrink", [-0.1, 1.1])
def test_shrink_out_of_range_is_refused(shrink):
    with pytest.raises(ValueError, match="shrink is"):
        leace(*streamed(*data(50, 4)), shrink)
