"""Diagnoses of features and gradients: against NumPy, SciPy, scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch

from agglom.core import diagnosis
from agglom.core.normalise import Moments


def moments(x_ND, chunk=7):
    found = Moments.empty(x_ND.shape[1])
    for part in x_ND.split(chunk):
        found = found.update(part)
    return found


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


# ── Scale and rank ──


def test_rms_is_that_of_the_raw_features(draw):
    x_ND = 3 * torch.randn(50, 6, generator=draw) + 2
    assert diagnosis.rms(moments(x_ND)) == pytest.approx(np.sqrt((x_ND.numpy().astype(float) ** 2).mean()), rel=1e-6)
    assert math.isnan(diagnosis.rms(Moments.empty(3)))


@pytest.mark.parametrize(("rows", "width"), [(200, 12), (9, 30)])
def test_effective_rank_is_rankme_of_the_singular_values(rows, width, draw):
    x_ND = torch.randn(rows, width, generator=draw) @ torch.randn(width, width, generator=draw) + 5
    x = x_ND.numpy().astype(float)
    sigma = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7  # the ε of the paper
    assert diagnosis.effective_rank(moments(x_ND)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_effective_rank_of_equal_directions_is_their_number():
    """An orthogonal design of 4 of 8 dimensions; an offset adds no direction."""
    x_ND = torch.zeros(8, 8)
    x_ND[torch.arange(4), torch.arange(4)] = 1.0
    x_ND[torch.arange(4, 8), torch.arange(4)] = -1.0
    assert diagnosis.effective_rank(moments(x_ND + 100)) == pytest.approx(4, abs=1e-5)


def test_effective_rank_ignores_scale_and_rotation(draw):
    x_ND = torch.randn(60, 5, generator=draw) * torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1])
    turn_DD, _ = torch.linalg.qr(torch.randn(5, 5, generator=draw))
    expected = diagnosis.effective_rank(moments(x_ND))
    assert diagnosis.effective_rank(moments(0.01 * x_ND @ turn_DD)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 123.4])
def test_features_that_are_all_alike_have_no_rank(value):
    assert math.isnan(diagnosis.effective_rank(moments(torch.full((20, 4), value))))


def test_share_of_high_norms():
    norm_N = torch.tensor([1.0] * 90 + [2.9] * 5 + [3.1] * 4 + [50.0])
    share, largest = diagnosis.high_norm(norm_N)
    assert (share, largest) == (pytest.approx(0.05), pytest.approx(50))
    assert diagnosis.high_norm(1000 * norm_N) == pytest.approx((share, largest))
    assert all(map(math.isnan, (*diagnosis.high_norm(torch.zeros(0)), *diagnosis.high_norm(torch.zeros(5)))))


# ── Agreement of representations ──


def test_centred_cosine(draw):
    x_ND, y_ND = torch.randn(40, 6, generator=draw) + 9, torch.randn(40, 6, generator=draw) + 9
    x, y = ((z - z.mean(0)).numpy().astype(float) for z in (x_ND, y_ND))
    expected = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)])
    assert diagnosis.centred_cosine(x_ND, y_ND) == pytest.approx(expected, abs=1e-6)
    assert abs(expected) < 0.3  # that of the raw rows is near 1
    assert diagnosis.centred_cosine(x_ND, 3 * x_ND - 1) == pytest.approx(1, abs=1e-6)
    assert diagnosis.centred_cosine(x_ND, -x_ND) == pytest.approx(-1, abs=1e-6)


def unbiased_hsic(k, m):
    """Equation 4 of Song et al. 2012, by its sums over distinct indices."""
    n, total = len(k), 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_cka_is_that_of_the_definition(draw):
    x_ND, y_ND = torch.randn(9, 3, generator=draw) + 4, torch.randn(9, 5, generator=draw)
    y_ND[:, :3] += x_ND
    x, y = (z.numpy().astype(float) for z in (x_ND, y_ND))
    k, m = x @ x.T, y @ y.T
    expected = unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))
    assert diagnosis.linear_cka(x_ND, y_ND) == pytest.approx(expected, abs=1e-6)


def test_cka_ignores_rotation_scale_and_offset(draw):
    x_ND = torch.randn(30, 6, generator=draw)
    turn_DD, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw))
    assert diagnosis.linear_cka(x_ND, 7 * x_ND @ turn_DD + 3) == pytest.approx(1, abs=1e-6)


def test_cka_of_unrelated_features_is_about_0_where_they_are_wide(draw):
    x_ND, y_ND = torch.randn(64, 500, generator=draw), torch.randn(64, 500, generator=draw)
    x, y = (np.asarray(z - z.mean(0), dtype=float) for z in (x_ND, y_ND))
    plain = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert plain > 0.8
    assert abs(diagnosis.linear_cka(x_ND, y_ND)) < 0.1


def test_undefined_cka():
    assert math.isnan(diagnosis.linear_cka(torch.randn(3, 4), torch.randn(3, 4)))
    assert math.isnan(diagnosis.linear_cka(torch.ones(9, 4), torch.randn(9, 4)))


# ── Agreement of gradients ──


def test_cosines_of_a_gram_matrix(draw):
    g_TP = torch.randn(3, 10, generator=draw, dtype=torch.float64)
    g_TP[2] = 0
    found = diagnosis.cosines(g_TP @ g_TP.T)
    a, b = g_TP[:2].numpy()
    assert float(found[0, 1]) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert torch.isnan(found[2]).all()
    assert torch.isnan(found[:, 2]).all()
