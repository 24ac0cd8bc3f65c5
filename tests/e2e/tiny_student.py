"""A student for tests that builds in a millisecond: a patch embedding and one transformer block, without dropout."""

from torch import Tensor, nn

from agglom.core.types import Dims, Features, PixelSpec, Student

PATCH = 16


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, pixels_BCHW: Tensor) -> Features:
        maps_BDhw = self.embed(pixels_BCHW)
        patches_BND = self.block(maps_BDhw.flatten(2).transpose(1, 2))
        return Features(patches_BND.mean(1), patches_BND, tuple(maps_BDhw.shape[-2:]))


def build(*, width: int = 32) -> Student:
    """A trainable encoder of 16-pixel patches."""
    net = Net(width)
    spec = PixelSpec(mean=(0.0,) * 3, std=(1.0,) * 3, patch=PATCH)
    return Student(module=net, backbone=net, dims=Dims(width, width), pixels=spec, recipe={"architecture": "tiny"})
