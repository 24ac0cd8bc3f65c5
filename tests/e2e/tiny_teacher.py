"""A teacher for tests: a random patch embedding, with nothing to download and nothing to import but torch.

`TINY_SIGNAL=N` in the environment: rank 0 sends SIGTERM at the N-th batch of 32 px images, the size of the first stage
and of no evaluation; to its process group, or with `TINY_LAUNCHER=1` to the `deepspeed` command alone. These are no
options, so a job with them and one without are the same job.
"""

import hashlib
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from agglom.core.types import Dims, Features, PixelSpec, Teacher, Text

PATCH = 16
STAGE = 32


class Net(nn.Module):
    """Patches by a convolution and a nonlinearity; the summary reads their mean and maximum."""

    def __init__(self, seed: int, width: int, patch: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(3, width, patch, patch)
            self.mix = nn.Linear(width, width)
            self.read = nn.Linear(2 * width, width)

    def forward(self, pixels_BCHW: Tensor) -> Features:
        maps_BDhw = self.embed(pixels_BCHW - 0.5)
        patches_BND = torch.tanh(self.mix(2 * maps_BDhw.flatten(2).transpose(1, 2)))
        pooled = torch.cat([patches_BND.mean(1), patches_BND.amax(1)], 1)
        return Features(self.read(pooled), patches_BND, tuple(maps_BDhw.shape[-2:]))


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def speak(width: int) -> Text:
    """A text tower that knows of characters alone."""

    def embed(texts: Sequence[str]) -> Tensor:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
        return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    return Text(embed, project=lambda summary_BD: summary_BD, scale=10.0)


def build(
    *,
    seed: int = 0,
    width: int = 32,
    weights: str = "",
    nan_at: int = 0,
    nan_above: float = 0.5,
    blind_above: float = 1.0,
    text: bool = False,
    patch: int = PATCH,
    size: int | None = None,
) -> Teacher:
    """A frozen random encoder.

    weights: a file whose content is part of the fingerprint; nan_at: at this image size, the summary of an image
    whose mean exceeds `nan_above` is NaN; blind_above: of an image whose mean exceeds it the summary says nothing;
    text: whether it has a text tower; size: pin the side of its input.
    """
    net = Net(seed, width, patch).eval().requires_grad_(False)
    batches = [0]

    def encode(pixels_BCHW: Tensor) -> Features:
        size = pixels_BCHW.shape[-1]
        batches[0] += size == STAGE
        if size == STAGE and os.environ.get("TINY_SIGNAL") == str(batches[0]) and os.environ["RANK"] == "0":
            if os.environ.get("TINY_LAUNCHER"):
                os.kill(parent(os.getppid()), signal.SIGTERM)
            else:
                os.killpg(0, signal.SIGTERM)
        features = net(pixels_BCHW)
        bright_B1 = pixels_BCHW.mean((1, 2, 3))[:, None]
        for above, said in ((nan_above if size == nan_at else 1.0, float("nan")), (blind_above, 0.0)):
            features = features._replace(summary_BD=features.summary_BD.masked_fill(bright_B1 > above, said))
        return features

    content = Path(weights).read_bytes() if weights else b""
    return Teacher(
        module=net,
        encode=encode,
        dims=Dims(width, width),
        pixels=PixelSpec(mean=(0.5,) * 3, std=(1.0,) * 3, patch=patch, size=size),
        fingerprint=hashlib.sha256(
            content + repr((seed, width, nan_at, blind_above, patch, size)).encode()
        ).hexdigest(),
        licence="none",
        text=partial(speak, width) if text else None,
    )
