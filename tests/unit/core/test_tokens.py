import pytest
import torch
from torch import nn

from agglom.core.tokens import (
    Conditioner,
    TimmEncoder,
    flatten_map,
    freeze,
    grid_of,
    split_prefix,
    stride,
    summary_kind,
    weights_digest,
)
from agglom.core.types import Features


class Transformer(nn.Module):
    """The surface of a timm patch transformer: class token, two registers, then one token per patch."""

    global_pool = "token"
    num_prefix_tokens = 3
    num_features = 4

    def __init__(self, pooling: str = "token", class_token: bool = True, classes: int = 0):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, (4, 8), (4, 8))
        self.blocks = nn.Identity()
        self.fc_norm = nn.Identity()
        self.cls_token = nn.Parameter(torch.full((1, 1, 4), 7.0)) if class_token else None
        self.global_pool = pooling
        self.num_prefix_tokens = 3 if class_token else 0
        self.feature_info = [{"reduction": (4, 8)}]
        self.pretrained_cfg = {"num_classes": classes}

    def forward_features(self, x):
        patches = self.patch_embed(x).flatten(2).mT
        if self.cls_token is None:
            return patches
        return torch.cat([self.cls_token.expand(len(x), -1, -1), patches[:, :2] * 0, patches], 1)

    def forward_head(self, x, pre_logits=False):
        assert pre_logits
        return x[:, 0] if self.global_pool == "token" else x.mean(1)


class Convolutional(nn.Module):
    """The surface of a timm network with maps, channels first or last."""

    num_features = 5

    def __init__(self, last: bool, declared: bool):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 5, 8, 8), last
        self.feature_info = [{"reduction": 8}]
        if declared:
            self.output_fmt = "NHWC" if last else "NCHW"

    def forward_features(self, x):
        return self.stem(x).permute(0, 2, 3, 1) if self.last else self.stem(x)

    def forward_head(self, x, pre_logits=False):
        return x.amax((1, 2) if self.last else (2, 3))


def test_conditioner_standardises_each_channel_and_has_no_state():
    conditioner = Conditioner((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    pixels = torch.rand(2, 3, 4, 5)
    out = conditioner(pixels)
    torch.testing.assert_close(out[:, 2], (pixels[:, 2] - 0.3) / 4)
    assert conditioner.state_dict() == {}


def test_prefix_tokens_are_split_from_patches():
    tokens = torch.arange(2 * 7 * 1.0).reshape(2, 7, 1)
    first, patches = split_prefix(tokens, 3)
    assert first.tolist() == [[0.0], [7.0]]
    assert patches[0, :, 0].tolist() == [3, 4, 5, 6]
    assert split_prefix(tokens, 0)[0] is None


def test_maps_become_row_major_tokens():
    patches, grid = flatten_map(torch.arange(6.0).reshape(1, 1, 2, 3))
    assert grid == (2, 3)
    assert patches.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_grid_follows_the_image_and_refuses_what_does_not_fit():
    assert grid_of(torch.zeros(1, 3, 28, 56), (14, 14), 9, 1) == (2, 4)
    with pytest.raises(ValueError, match="expected 2×4 patch tokens after 1 prefix tokens, got 8"):
        grid_of(torch.zeros(1, 3, 28, 56), (14, 14), 8, 1)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 32)])
def test_transformer_keeps_class_token_and_patches_apart(height, width):
    net = Transformer()
    pixels = torch.rand(2, 3, height, width)
    summary, patches, grid = TimmEncoder(net, (0.5,) * 3, (0.5,) * 3)(pixels)[:3]
    assert grid == (height // 4, width // 8)
    assert summary.tolist() == [[7.0] * 4] * 2
    expected = net.patch_embed((pixels - 0.5) / 0.5)
    torch.testing.assert_close(patches[:, 1], expected[:, :, 0, 1])


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_maps_of_either_layout_give_the_same_features(last, declared):
    net = Convolutional(last, declared)
    summary, patches, grid = TimmEncoder(net, (0.0,) * 3, (1.0,) * 3)(torch.rand(2, 3, 16, 40))[:3]
    assert grid == (2, 5)
    assert patches.shape == (2, 10, 5)
    torch.testing.assert_close(summary, patches.amax(1))


def test_the_summary_is_never_an_untrained_mean():
    assert summary_kind(Transformer("token")) == "head"
    assert summary_kind(Transformer("avg", classes=10)) == "head"
    assert summary_kind(Transformer("avg")) == "class"
    assert summary_kind(Transformer("avg", class_token=False)) == "none"
    normed = Transformer("avg", class_token=False)
    normed.fc_norm = nn.LayerNorm(4)
    assert summary_kind(normed) == "head"
    silent = TimmEncoder(Transformer("avg", class_token=False), (0.0,) * 3, (1.0,) * 3)(torch.rand(1, 3, 8, 8))
    assert silent.summary_BD is None
    assert isinstance(silent, Features)


def test_stride_is_a_pair():
    assert stride(Transformer()) == (4, 8)
    assert stride(Convolutional(False, False)) == (8, 8)


def test_digest_depends_on_name_keys_and_values():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.BatchNorm1d(2)
    before = weights_digest(one, "a")
    assert before == weights_digest(one, "a")
    assert before != weights_digest(one, "b")
    assert weights_digest(two, "a") == weights_digest(nn.BatchNorm1d(2), "a")
    with torch.no_grad():
        one.weight[0, 0] += 1e-6
    assert before != weights_digest(one, "a")
    assert weights_digest(one, "a") != weights_digest(one.bfloat16(), "a")


def test_frozen_is_evaluation_without_gradients():
    module = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert not module[1].training
    assert not module[0].weight.requires_grad
