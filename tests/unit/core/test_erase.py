import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core.erase import CrossMoments, leace


def data(count, width, groups=3, seed=0, unknown=0.2):
    """Correlated features that depend on the group, and the group ids, some of them unknown."""
    rng = np.random.default_rng(seed)
    z_N = rng.integers(0, groups, count)
    x_ND = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 5
    x_ND += rng.normal(size=(groups, width))[z_N]
    z_N[rng.random(count) < unknown] = -1
    z_N[:2] = [0, 1]
    return torch.from_numpy(x_ND), torch.from_numpy(z_N)


def streamed(x_ND, z_N, groups=3, batch=7):
    moments = CrossMoments.empty(x_ND.shape[1], groups)
    for x, z in zip(x_ND.split(batch), z_N.split(batch), strict=True):
        moments = moments.update(x, z)
    return moments


def cross_covariance(x_ND, z_N, groups=3):
    known = z_N >= 0
    x, z = x_ND[known].numpy(), np.eye(groups)[z_N[known].numpy()]
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


def erased(x_ND, mean_D, matrix_DD):
    return x_ND - (x_ND - mean_D) @ matrix_DD.T


def reference(x, z):
    """W⁺PW of the paper, literally, in NumPy."""
    x, z = x - x.mean(0), z - z.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    kept = values > values[-1] * 1e-12
    values, vectors = values[kept], vectors[:, kept]
    whiten, colour = (vectors / np.sqrt(values)) @ vectors.T, (vectors * np.sqrt(values)) @ vectors.T
    basis, strength, _ = np.linalg.svd(whiten @ (x.T @ z / len(x)), full_matrices=False)
    basis = basis[:, strength > strength[0] * 1e-10]
    return colour @ basis @ basis.T @ whiten


@pytest.mark.parametrize("shrink", [0.0, 0.1, 1.0])
@given(st.integers(0, 2**31), st.sampled_from([(200, 8), (60, 40), (20, 40)]))
@settings(max_examples=15, deadline=None)
def test_nothing_linear_is_left_on_the_fitted_rows(shrink, seed, shape):
    """Ruling 12: ≤ 1e-8 relative, with fewer samples than dimensions and with shrinkage, too."""
    x_ND, z_N = data(*shape, seed=seed)
    after = cross_covariance(erased(x_ND, *leace(streamed(x_ND, z_N), shrink)), z_N)
    assert np.linalg.norm(after) <= 1e-8 * np.linalg.norm(cross_covariance(x_ND, z_N))


@pytest.mark.parametrize("shape", [(300, 8), (30, 40)])
def test_it_is_the_formula_of_the_paper(shape):
    x_ND, z_N = data(*shape)
    known = z_N >= 0
    mean_D, matrix_DD = leace(streamed(x_ND, z_N))
    assert mean_D.dtype == matrix_DD.dtype == torch.float64
    np.testing.assert_allclose(mean_D, x_ND[known].mean(0), rtol=1e-10)
    np.testing.assert_allclose(matrix_DD, reference(x_ND[known].numpy(), np.eye(3)[z_N[known]]), atol=1e-8)


def test_it_is_a_projection_of_rank_groups_minus_one_and_keeps_the_mean():
    x_ND, z_N = data(300, 12)
    mean_D, matrix_DD = leace(streamed(x_ND, z_N))
    torch.testing.assert_close(matrix_DD @ matrix_DD, matrix_DD, atol=1e-8, rtol=0)
    assert int(torch.linalg.matrix_rank(matrix_DD, rtol=1e-8)) == 2
    known = z_N >= 0
    torch.testing.assert_close(erased(x_ND, mean_D, matrix_DD)[known].mean(0), x_ND[known].mean(0))


def test_no_other_exact_eraser_changes_the_features_less():
    """Against the orthogonal projection off the same cross-covariance, and against shrinkage."""
    x_ND, z_N = data(400, 10)
    known, moments = z_N >= 0, streamed(x_ND, z_N)

    def change(mean_D, matrix_DD):
        return float((erased(x_ND, mean_D, matrix_DD) - x_ND)[known].square().sum())

    basis = np.linalg.svd(cross_covariance(x_ND, z_N), full_matrices=False)[0][:, :2]
    mean_D, matrix_DD = leace(moments)
    assert change(mean_D, matrix_DD) < change(mean_D, torch.from_numpy(basis @ basis.T))
    assert change(mean_D, matrix_DD) < change(*leace(moments, 0.5))


def test_a_linear_probe_on_erased_rows_is_constant():
    x_ND, z_N = data(300, 6, groups=2, unknown=0.0)
    design = np.c_[erased(x_ND, *leace(streamed(x_ND, z_N, 2))).numpy(), np.ones(300)]
    scores = design @ np.linalg.lstsq(design, z_N.numpy().astype(float))[0]
    np.testing.assert_allclose(scores, z_N.double().mean(), atol=1e-8)


def test_streaming_does_not_depend_on_the_batches_and_skips_the_unknown():
    x_ND, z_N = data(100, 5)
    known = z_N >= 0
    one, two = leace(streamed(x_ND, z_N, batch=100)), leace(streamed(x_ND[known], z_N[known], batch=3))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    assert streamed(x_ND, z_N).counts_G.tolist() == [int((z_N == g).sum()) for g in range(3)]


def test_features_that_do_not_know_the_attribute_stay_as_they_are():
    x_ND = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 4, dtype=torch.float64)
    _, matrix_DD = leace(streamed(x_ND, torch.tensor([0, 0, 1, 1] * 2), 2))
    assert matrix_DD.abs().max() < 1e-12


@pytest.mark.parametrize(("ids", "counts"), [([1] * 6, r"\[0, 6, 0\]"), ([-1] * 6, r"\[0, 0, 0\]")])
def test_an_attribute_that_is_constant_or_unknown_is_refused(ids, counts):
    with pytest.raises(ValueError, match=f"{counts}, expected at least two groups"):
        leace(streamed(torch.randn(6, 4), torch.tensor(ids)))


@pytest.mark.parametrize("shrink", [-0.1, 1.1])
def test_shrink_out_of_range_is_refused(shrink):
    with pytest.raises(ValueError, match="shrink is"):
        leace(streamed(*data(50, 4)), shrink)
