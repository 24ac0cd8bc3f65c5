import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agglom.core.losses import SUMMARY, mse
from agglom.core.normalise import (
    Moments,
    apply,
    balanced,
    change,
    cone,
    fit,
    fold,
    hadamard,
    invert,
    rotation_equal_variance,
)

KINDS = ("phi_s", "global_std", "standardise", "whiten", "none")
FOUND = (1, 2, 4, 8, 12, 20, 28, 36, 44, 64, 192, 384, 576, 768, 1024, 1152, 1280, 1408)


def samples(count, width, seed=0, rank=None):
    """Correlated features with a mean far from 0 and a spectrum over several decades."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(rank or width, width)) * np.logspace(0, -2, rank or width)[:, None]
    return torch.from_numpy(rng.normal(size=(count, rank or width)) @ basis + 3 * rng.normal(size=width))


def moments(x_ND, *cuts):
    found = Moments.empty(x_ND.shape[1])
    for part in torch.tensor_split(x_ND, cuts):
        found = found.update(part)
    return found


def fitted(kind, x_ND):
    """The affine map and the targets of the samples it was fitted on."""
    affine = fit(kind, moments(x_ND))
    return affine, apply(affine, x_ND).double()


@given(st.integers(0, 2**31), st.lists(st.integers(0, 30), max_size=4))
@settings(max_examples=30, deadline=None)
def test_streamed_moments_are_those_of_the_whole(seed, cuts):
    x_ND = samples(30, 5, seed)
    found = moments(x_ND, *sorted(cuts))
    halves = moments(x_ND[:11]).merge(moments(x_ND[11:]))
    for either in (found, halves):
        assert either.count == 30
        np.testing.assert_allclose(either.mean_D, x_ND.numpy().mean(0), atol=1e-12)
        np.testing.assert_allclose(either.scatter_DD / 30, np.cov(x_ND.numpy().T, bias=True), atol=1e-11)


def test_moments_of_low_precision_features_accumulate_in_float64():
    x_ND = (samples(4000, 3) + 100).bfloat16()
    found = Moments.empty(3).update(x_ND[:1000]).update(x_ND[1000:])
    np.testing.assert_allclose(found.mean_D, x_ND.double().numpy().mean(0), rtol=1e-13)


@pytest.mark.parametrize("order", FOUND)
def test_hadamard_is_orthonormal_with_entries_of_one_size(order):
    matrix = hadamard(order)
    signs = (matrix * order**0.5).round()
    torch.testing.assert_close(matrix * order**0.5, signs, atol=1e-12, rtol=0)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    # Products of ±1 are integers below 2²⁴: exact in float32, whatever the order of the sum.
    assert torch.equal(signs.float() @ signs.float().T, order * torch.eye(order))


@pytest.mark.slow
@pytest.mark.parametrize("order", [1536, 2048, 4096])
def test_hadamard_of_the_largest_widths(order):
    test_hadamard_is_orthonormal_with_entries_of_one_size(order)


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 50, 92, 518])
def test_hadamard_refuses_what_it_does_not_know(order):
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard(order)


@given(st.integers(2, 40), st.integers(0, 2**31), st.sampled_from(["even", "decades", "rank", "one"]))
@settings(max_examples=40, deadline=None)
def test_rotation_makes_all_variances_equal(width, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    eigenvalues_D = torch.rand(width, dtype=torch.float64, generator=generator) + 0.1
    if shape == "decades":
        eigenvalues_D = eigenvalues_D**20
    elif shape == "rank":
        eigenvalues_D[width // 2 :] = 0
    elif shape == "one":
        eigenvalues_D[1:] = 0
    H_DD = rotation_equal_variance(eigenvalues_D, seed)
    diagonal_D = ((H_DD * eigenvalues_D) @ H_DD.T).diagonal()
    torch.testing.assert_close(diagonal_D / eigenvalues_D.mean(), torch.ones_like(diagonal_D), atol=1e-10, rtol=0)
    torch.testing.assert_close(H_DD @ H_DD.T, torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(H_DD, rotation_equal_variance(eigenvalues_D, seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "width"), [(500, 24), (500, 18), (10, 24), (10, 18)])
def test_forward_and_back(kind, count, width):
    """Widths with and without a Hadamard matrix, more and fewer samples than dimensions."""
    x_ND = samples(count, width)
    affine, z_ND = fitted(kind, x_ND)
    assert all(part.dtype == torch.float32 for part in affine)
    torch.testing.assert_close(invert(affine, z_ND).double(), x_ND, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("count", "width"), [(500, 24), (500, 18), (10, 24), (10, 18)])
def test_phi_s_is_an_isometry_up_to_scale_with_unit_variance(count, width):
    x_ND = samples(count, width)
    _, z_ND = fitted("phi_s", x_ND)
    np.testing.assert_allclose(z_ND.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z_ND.var(0, correction=0), 1, rtol=1e-4)
    scale = x_ND.var(0, correction=0).mean().sqrt()
    np.testing.assert_allclose(torch.cdist(z_ND, z_ND) * scale, torch.cdist(x_ND, x_ND), rtol=1e-4, atol=1e-4)


def test_under_phi_s_the_mean_predictor_scores_one():
    _, z_ND = fitted("phi_s", samples(400, 24))
    z_BND = z_ND.reshape(50, 8, 24)
    assert float(mse(torch.zeros_like(z_BND), z_BND).mean()) == pytest.approx(1, rel=1e-4)


def test_phi_s_is_the_formula_of_the_paper():
    x_ND = samples(300, 12)
    values, vectors = np.linalg.eigh(np.cov(x_ND.numpy().T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    expected = hadamard(12).numpy() @ vectors.T / np.sqrt(values.mean())
    np.testing.assert_allclose(fit("phi_s", moments(x_ND)).matrix_DD, expected, atol=1e-5)


def test_global_std_is_one_scale_for_all():
    x_ND = samples(500, 10)
    _, z_ND = fitted("global_std", x_ND)
    np.testing.assert_allclose(z_ND, (x_ND - x_ND.mean(0)) / x_ND.var(0, correction=0).mean().sqrt(), atol=1e-4)


def test_standardise_and_whiten():
    x_ND = samples(500, 10)
    _, z_ND = fitted("standardise", x_ND)
    np.testing.assert_allclose(z_ND, (x_ND - x_ND.mean(0)) / x_ND.std(0, correction=0), atol=1e-4)
    _, z_ND = fitted("whiten", x_ND)
    np.testing.assert_allclose(np.cov(z_ND.numpy().T, bias=True), np.eye(10), atol=1e-3)


def test_a_constant_dimension_is_only_centred_by_standardise():
    x_ND = samples(50, 4)
    x_ND[:, 2] = 7.3
    _, z_ND = fitted("standardise", x_ND)
    assert (z_ND[:, 2].abs() < 1e-5).all()
    np.testing.assert_allclose(z_ND[:, [0, 1, 3]].var(0, correction=0), 1, rtol=1e-4)


def test_whiten_does_not_blow_up_null_directions():
    x_ND = samples(200, 12, rank=4)
    affine, z_ND = fitted("whiten", x_ND)
    assert affine.matrix_DD.isfinite().all()
    assert np.allclose(z_ND.var(0, correction=0)[:4], 1, rtol=1e-2)
    assert (z_ND.var(0, correction=0)[4:] < 1e-3).all()


def test_none_changes_nothing():
    x_ND = samples(5, 6).float()
    affine = fit("none", Moments.empty(6))
    assert torch.equal(apply(affine, x_ND), x_ND)


@pytest.mark.parametrize("kind", ["phi_s", "global_std", "standardise", "whiten"])
def test_ill_posed_fits_are_refused(kind):
    with pytest.raises(ValueError, match="1 samples, expected at least 2"):
        fit(kind, moments(samples(1, 4)))
    for constant in (torch.full((9, 4), 0.1), torch.full((9, 4), float("nan"))):
        with pytest.raises(ValueError, match="constant or not finite over 9 samples"):
            fit(kind, moments(constant, 2, 5))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'phis' is not one of phi_s"):
        fit("phis", moments(samples(5, 4)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_linear_emits_raw_features(kind, bias):
    torch.manual_seed(0)
    affine, linear = fit(kind, moments(samples(300, 12))), nn.Linear(5, 12, bias=bias)
    hidden = torch.randn(7, 3, 5)
    folded = fold(affine, linear)
    torch.testing.assert_close(folded(hidden), invert(affine, linear(hidden)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(apply(affine, folded(hidden)), linear(hidden), atol=1e-3, rtol=1e-3)


def test_the_mean_direction_scores_one_on_the_angular_loss():
    y_ND = samples(300, 8)
    direction_D, dispersion = cone(y_ND)
    unit = y_ND.numpy() / np.linalg.norm(y_ND.numpy(), axis=1, keepdims=True)
    mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
    np.testing.assert_allclose(direction_D, mean, atol=1e-6)
    assert float(dispersion) == pytest.approx((np.arccos(unit @ mean) ** 2).mean(), rel=1e-5)
    loss_N = SUMMARY["angular"](direction_D.expand(300, -1), y_ND.float(), dispersion)
    assert float(loss_N.mean()) == pytest.approx(1, rel=1e-4)


@given(st.integers(0, 2**31), st.integers(2, 5))
@settings(max_examples=20, deadline=None)
def test_weighted_moments_are_those_of_repeated_samples(seed, parts):
    rng = np.random.default_rng(seed)
    x_ND, times_N = samples(30, 5, seed), torch.from_numpy(rng.integers(1, 6, 30))
    found = Moments.empty(5)
    for x, times in zip(x_ND.tensor_split(parts), times_N.tensor_split(parts), strict=True):
        found = found.update(x, times)
    expected = moments(x_ND.repeat_interleave(times_N, 0))
    assert found.count == expected.count
    torch.testing.assert_close(found.mean_D, expected.mean_D, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.scatter_DD, expected.scatter_DD, rtol=1e-10, atol=1e-10)
    found, expected = cone(x_ND, times_N), cone(x_ND.repeat_interleave(times_N, 0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_balanced_moments_are_the_mean_over_the_groups():
    """Of 40, 8 and 2 images, the group without any left out; those of no group keep their mass."""
    group_N = torch.tensor([0] * 40 + [1] * 8 + [3] * 2)
    x_ND = samples(50, 4) + group_N[:, None]
    found = Moments.empty(4).update(x_ND, balanced(group_N))
    members = [x_ND[group_N == group].numpy() for group in (0, 1, 3)]
    mean_D = np.mean([one.mean(0) for one in members], 0)
    np.testing.assert_allclose(found.mean_D, mean_D, rtol=1e-12)
    spread_DD = np.mean([(one - mean_D).T @ (one - mean_D) / len(one) for one in members], 0)
    np.testing.assert_allclose(found.scatter_DD / found.count, spread_DD, rtol=1e-10)
    assert found.count == pytest.approx(50)
    weight_N = balanced(torch.cat([group_N, torch.full((10,), -1)]))
    assert weight_N[-10:].tolist() == [1.0] * 10
    for group in (0, 1, 3):
        assert float(weight_N[:50][group_N == group].sum()) == pytest.approx(50 / 3)
    assert balanced(torch.full((3,), -1)).tolist() == [1.0] * 3


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_targets_of_one_normaliser_become_those_of_another(old, new):
    x_ND = samples(300, 12)
    before, after = fit(old, moments(x_ND)), fit(new, moments(samples(200, 12, seed=1) * 2))
    found = apply(change(before, after), apply(before, x_ND))
    torch.testing.assert_close(found, apply(after, x_ND), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(invert(change(before, after), found), apply(before, x_ND), rtol=1e-3, atol=2e-3)


# Embedding widths of timm's vision transformers, hierarchical transformers and convolutional networks, by hand: those
# of their smallest to their largest members.
TIMM = [
    *(96, 144, 160, 192, 200, 216, 224, 240, 256, 288, 320, 336, 368, 384, 400, 408, 432, 440, 448, 480, 512, 528, 544),
    *(576, 588, 624, 640, 672, 704, 720, 768, 784, 864, 888, 896, 912, 960, 984, 1000, 1008, 1024, 1056, 1152, 1232),
    *(1280, 1408, 1440, 1504, 1512, 1536, 1664, 1728, 1792, 1920, 2016, 2048, 2208, 2240, 2304, 2520, 2560, 2816),
    *(3024, 3072, 3712, 4096),
]


@pytest.mark.slow
@pytest.mark.parametrize("width", TIMM)
def test_every_usual_width_has_a_hadamard_matrix(width):
    assert hadamard(width).shape == (width, width)


@pytest.mark.slow
@pytest.mark.parametrize("width", [518, 1001])
def test_the_rotation_of_an_unusual_width_takes_bounded_time(width):
    spectrum_D = torch.logspace(0, -6, width, dtype=torch.float64)
    started = time.process_time()
    rotation_DD = rotation_equal_variance(spectrum_D, 0)
    assert time.process_time() - started < 10
    diagonal_D = rotation_DD.square() @ spectrum_D
    torch.testing.assert_close(diagonal_D / spectrum_D.mean(), torch.ones_like(diagonal_D), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dinov2_vits14", "efficientnet_lite0"])
def test_normalisers_of_real_teachers_are_inverted_and_isotropic(model):
    """Digits at 112 px: features of real networks, whose spectra fall over many decades."""
    from sklearn.datasets import load_digits

    from agglom import plugins

    teacher = plugins.build("packaged", "teachers", {"model": model})
    pixels = torch.from_numpy(load_digits().images[:60] / 16).float()[:, None]
    pixels = nn.functional.interpolate(pixels, (112, 112), mode="bilinear").expand(-1, 3, -1, -1)
    with torch.no_grad():
        y_ND = teacher.encode(pixels).patches_BND.flatten(0, 1)
    found = moments(y_ND, 700)
    for kind in KINDS:
        affine = fit(kind, found)
        z_ND = apply(affine, y_ND)
        error = (invert(affine, z_ND) - y_ND).norm() / y_ND.norm()
        assert float(error) < 1e-5, kind
        if kind in ("phi_s", "global_std"):
            scale = float(y_ND.double().var(0, correction=0).mean().sqrt())
            z, y = z_ND[:200].double(), y_ND[:200].double()
            near, far = torch.cdist(z, z) * scale, torch.cdist(y, y)
            torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
        if kind == "phi_s":
            torch.testing.assert_close(
                z_ND.double().var(0, correction=0).float(), torch.ones(len(z_ND.T)), rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("bad", [samples(1, 3), torch.ones(5, 3), torch.full((5, 3), float("nan"))])
def test_a_cone_without_width_is_refused(bad):
    with pytest.raises(ValueError, match="dispersion of summaries"):
        cone(bad)
