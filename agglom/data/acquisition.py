"""A simulated acquisition: an image as some other device might have taken it. Generic families, none of them a device.

Each kind maps pixels (C, H, W) in [0, 1] and a strength in [0, 1]; strength 0 is the identity, and what a draw does at
one strength, it does more of at a larger one. A grey image stays grey: all channels are treated alike.
"""

from __future__ import annotations

import random

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import interpolate

from agglom.job import Acquisition

# At strength 1.
BLUR = 1 / 32  # standard deviation in sides of the image
RESOLUTION = 1 / 4  # of the height and of the width
CONTRAST = 3 / 4  # share of the range that is lost
NOISE = 0.15  # standard deviation in ranges of the image


def simulated(pixels_CHW: Tensor, acquisition: Acquisition, rng: random.Random) -> Tensor:
    """Some of the kinds that `acquisition` names (strength > 0), in the order in which light meets a device.

    Any set of them that is not empty is as likely: each of k kinds acts with probability 2^(k − 1) / (2^k − 1).
    Deterministic in its arguments, whatever the threads: pixels (C, H, W), clipped to [0, 1].

    Raises:
        ValueError: if `acquisition` names no kind.
    """
    order = (blur, resolution, contrast, inversion, noise)
    named = [(kind, strength) for kind in order if (strength := getattr(acquisition, kind.__name__)) > 0]
    chosen = rng.randrange(1, 2 ** len(named))
    for bit, (kind, strength) in enumerate(named):
        if chosen >> bit & 1:
            pixels_CHW = kind(pixels_CHW, strength, rng)
    return pixels_CHW.clamp(0.0, 1.0)


def blur(pixels_CHW: Tensor, strength: float, rng: random.Random) -> Tensor:
    """Convolved with a Gaussian of standard deviation σ ~ U(0, strength · side / 32) px, side the shorter one.

    The Gaussian is cut at 3σ; pixels beyond an edge are those at the edge.
    """
    sigma = rng.uniform(0.0, strength) * BLUR * min(pixels_CHW.shape[1:])
    # A convolution of torch sums in an order that depends on threads and memory; this one does not.
    return torch.from_numpy(gaussian_filter(pixels_CHW.numpy(), (0, sigma, sigma), mode="nearest", truncate=3.0))


def resolution(pixels_CHW: Tensor, strength: float, rng: random.Random) -> Tensor:
    """Sampled at 4^(−a) of the height and of the width, a ~ U(0, strength), and back: bilinear, with antialiasing."""
    scale = RESOLUTION ** rng.uniform(0.0, strength)
    height, width = pixels_CHW.shape[1:]
    coarse = max(1, round(height * scale)), max(1, round(width * scale))
    small_1CHW = interpolate(pixels_CHW[None], coarse, mode="bilinear", align_corners=False, antialias=True)
    return interpolate(small_1CHW, (height, width), mode="bilinear", align_corners=False)[0]


def contrast(pixels_CHW: Tensor, strength: float, rng: random.Random) -> Tensor:
    """(1 − c) x + c · level: a share c ~ U(0, ¾ strength) of the range is lost to a flat level ~ U(0, 1).

    The level makes the image darker or brighter, as scattered light or a wide window do; nothing is clipped.
    """
    lost = rng.uniform(0.0, strength) * CONTRAST
    return (1.0 - lost) * pixels_CHW + lost * rng.random()


def inversion(pixels_CHW: Tensor, strength: float, rng: random.Random) -> Tensor:
    """1 − x with probability `strength`, else x: polarity is the one or the other, and a mixture would be contrast."""
    return 1.0 - pixels_CHW if rng.random() < strength else pixels_CHW


def noise(pixels_CHW: Tensor, strength: float, rng: random.Random) -> Tensor:
    """x + σ ε, σ ~ U(0, 0.15 strength), ε ~ N(0, 1) for each pixel, one for all channels. Not clipped."""
    sigma = rng.uniform(0.0, strength) * NOISE
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return pixels_CHW + sigma * torch.randn(pixels_CHW.shape[1:], generator=generator)
