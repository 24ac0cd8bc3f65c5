"""Each kind beside another implementation of it, the identity at 0, more at more, and what all of them share."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agglom.data import acquisition
from agglom.data.acquisition import blur, contrast, inversion, noise, resolution, simulated
from agglom.job import Acquisition

KINDS = (blur, resolution, contrast, inversion, noise)
NAMES = [kind.__name__ for kind in KINDS]
kinds = pytest.mark.parametrize("kind", KINDS, ids=NAMES)
sides = st.integers(1, 40)
strengths = st.floats(0.01, 1)
seeds = st.integers(0, 10**9)


def image(channels=1, height=48, width=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, height, width, generator=generator)


def scene(height=48, width=40):
    """Smooth, so that nothing but a kind of acquisition makes it rough: in [0.1, 0.9]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 5, width), indexing="ij")
    return (0.5 + 0.4 * torch.sin(y + x) * torch.cos(y - x))[None]


# ── The kinds, against NumPy and Pillow ──


def amount(seed, strength):
    return random.Random(seed).uniform(0, strength)


@pytest.mark.parametrize(("shape", "strength"), [((1, 48, 40), 1.0), ((3, 32, 64), 0.7), ((1, 112, 112), 0.3)])
def test_blur_is_a_sum_over_a_gaussian(shape, strength):
    pixels_CHW = image(*shape)
    sigma = amount(5, strength) * min(shape[1:]) / 32
    radius = round(3 * sigma)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    expected = pixels_CHW.double().numpy()
    for axis in (1, 2):
        index = [np.clip(np.arange(shape[axis]) + offset, 0, shape[axis] - 1) for offset in offsets]
        expected = sum(w * expected.take(i, axis) for w, i in zip(weights, index, strict=True))
    np.testing.assert_allclose(blur(pixels_CHW, strength, random.Random(5)).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "strength"), [(48, 40, 1.0), (33, 64, 0.7), (112, 112, 0.3)])
def test_resolution_is_pillows_resize_there_and_back(height, width, strength):
    pixels_CHW = image(1, height, width)
    scale = 0.25 ** amount(6, strength)
    picture = Image.fromarray(pixels_CHW[0].numpy())
    small = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    assert small.size < picture.size
    expected = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resolution(pixels_CHW, strength, random.Random(6))[0].numpy(), expected, atol=1e-5)


def test_contrast_is_a_line_through_its_level():
    pixels_CHW = image(3)
    rng = random.Random(7)
    lost, level = 0.75 * rng.uniform(0, 0.8), rng.random()
    found = contrast(pixels_CHW, 0.8, random.Random(7)).double().numpy()
    np.testing.assert_allclose(found, level + (1 - lost) * (pixels_CHW.double().numpy() - level), atol=1e-6)


def test_inversion_is_as_frequent_as_strong():
    pixels_CHW = image(3)
    found = [inversion(pixels_CHW, 0.3, random.Random(seed)) for seed in range(1000)]
    inverted = [one for one in found if not torch.equal(one, pixels_CHW)]
    assert 240 < len(inverted) < 360  # 4 standard deviations
    assert all(np.array_equal(one.numpy(), 1 - pixels_CHW.numpy()) for one in inverted)
    assert not torch.equal(inversion(pixels_CHW, 1.0, random.Random(0)), pixels_CHW)


def test_noise_is_normal_and_grey():
    pixels_CHW = image(3, 200, 200)
    difference_CHW = noise(pixels_CHW, 1.0, random.Random(8)) - pixels_CHW
    torch.testing.assert_close(difference_CHW[0], difference_CHW[2], atol=1e-6, rtol=0)
    ratio_HW = difference_CHW[0].double().numpy() / (0.15 * amount(8, 1.0))
    assert abs(ratio_HW.mean()) < 0.02  # 4 standard errors of 40,000 pixels
    assert abs(ratio_HW.std() - 1) < 0.015
    assert abs((np.abs(ratio_HW) < 1).mean() - 0.6827) < 0.01
    assert abs(np.corrcoef(ratio_HW[:, 1:].ravel(), ratio_HW[:, :-1].ravel())[0, 1]) < 0.02


# ── What they share ──


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), height=sides, width=sides, channels=st.sampled_from([1, 3]), seed=seeds)
def test_identity_at_strength_0(kind, height, width, channels, seed):
    pixels_CHW = image(channels, height, width)
    assert torch.equal(kind(pixels_CHW, 0.0, random.Random(seed)), pixels_CHW)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), strength=st.tuples(strengths, strengths).map(sorted), seed=seeds)
def test_more_at_more(kind, strength, seed):
    """With the same draws, a stronger acquisition takes an image no less far from itself."""
    pixels_CHW = scene()
    less, more = ((kind(pixels_CHW, s, random.Random(seed)) - pixels_CHW).abs().mean() for s in strength)
    # The kernel of a blur and the coarse image of a resolution change by whole pixels.
    assert less <= more + 1e-3


@kinds
def test_strong_at_1(kind):
    """In the mean of its draws, each kind moves an image by some percent of its range."""
    noisy = (scene() + 0.3 * (image() - 0.5)).clamp(0, 1)
    moved = [(kind(noisy, 1.0, random.Random(seed)) - noisy).abs().mean() for seed in range(30)]
    assert torch.stack(moved).mean() > 0.03


@settings(max_examples=100, deadline=None)
@given(
    strength=st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(any),
    height=sides,
    width=sides,
    channels=st.sampled_from([1, 3]),
    seed=seeds,
)
def test_any_acquisition(strength, height, width, channels, seed):
    pixels_CHW = image(channels, height, width)
    kept = pixels_CHW.clone()
    asked = Acquisition(**dict(zip(NAMES, strength, strict=True)))
    state = torch.get_rng_state()
    found = simulated(pixels_CHW, asked, random.Random(seed))
    assert found.shape == pixels_CHW.shape
    assert found.dtype == torch.float32
    assert 0 <= found.min() <= found.max() <= 1
    assert torch.equal(found, simulated(pixels_CHW, asked, random.Random(seed)))
    assert torch.equal(pixels_CHW, kept)
    assert torch.equal(torch.get_rng_state(), state)


@kinds
def test_grey_stays_grey(kind):
    grey_CHW = image().expand(3, -1, -1)
    found = kind(grey_CHW, 1.0, random.Random(1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[:1], kind(image(), 1.0, random.Random(1)))


# ── Which of them act, and in which order ──


def test_the_configuration_names_all_kinds_in_their_order():
    assert [field.name for field in dataclasses.fields(Acquisition)] == NAMES


@pytest.fixture
def acted(monkeypatch):
    """The names of the kinds that act, as they act."""
    names = []
    for kind in KINDS:

        def act(pixels_CHW, strength, rng, name=kind.__name__):
            names.append((name, strength))
            return pixels_CHW

        act.__name__ = kind.__name__
        monkeypatch.setattr(acquisition, kind.__name__, act)
    return names


def test_every_set_of_kinds_is_as_likely(acted):
    """Over 3 kinds: 7 sets, 1000 draws each within 4 standard deviations."""
    counts, rng = Counter(), random.Random(0)
    for _ in range(7000):
        acted.clear()
        simulated(image(), Acquisition(noise=0.2, blur=0.5, contrast=0.1), rng)
        counts[tuple(acted)] += 1
    assert len(counts) == 7
    assert all(883 < count < 1117 for count in counts.values())
    assert (("blur", 0.5), ("contrast", 0.1), ("noise", 0.2)) in counts


@pytest.mark.parametrize("name", NAMES)
def test_one_kind_always_acts(acted, name):
    for seed in range(20):
        simulated(image(), Acquisition(**{name: 0.5}), random.Random(seed))
    assert acted == [(name, 0.5)] * 20


def test_no_kind_is_no_acquisition():
    with pytest.raises(ValueError, match="empty range"):
        simulated(image(), Acquisition(), random.Random(0))
