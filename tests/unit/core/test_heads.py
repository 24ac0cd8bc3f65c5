import math

import numpy as np
import pytest
import torch
from torch import nn

from agglom.core import normalise
from agglom.core.heads import Distiller, Head, Ladder, Mixer, resample
from agglom.core.normalise import Moments
from agglom.core.types import Dims, Features


class Trunk(nn.Module):
    """Summary of width 6 and a 2×3 grid of patches of width 5."""

    def __init__(self):
        super().__init__()
        self.summary, self.patches = nn.Linear(4, 6), nn.Linear(4, 5)

    def forward(self, pixels):
        flat = pixels.flatten(1)
        return Features(self.summary(flat), self.patches(flat)[:, None].expand(-1, 6, -1), (2, 3))


def test_head_is_a_residual_mlp_and_last_emits():
    torch.manual_seed(0)
    head = Head(3, 7, hidden=8, depth=2)
    x = torch.randn(2, 5, 3)
    kinds = [type(module).__name__ for module in head.modules() if not list(module.children())]
    assert kinds == ["Linear", *["LayerNorm", "GELU", "Linear"] * 2, "LayerNorm", "GELU", "Linear"]
    assert head(x).shape == (2, 5, 7)
    z = head.first(x)
    z = z + head.blocks[0](z)
    z = z + head.blocks[1](z)
    torch.testing.assert_close(head(x), head.last(torch.cat([head.activation(z), x], -1)))


def test_a_new_head_is_the_mlp_alone_and_may_become_linear():
    head = Head(3, 7, hidden=8, depth=1)
    assert not head.last.weight[:, 8:].any()
    matrix = torch.randn(7, 3)
    with torch.no_grad():
        head.last.weight.copy_(torch.cat([torch.zeros(7, 8), matrix], 1))
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(head(x), x @ matrix.T + head.last.bias)


def test_distiller_predicts_what_each_teacher_has():
    teachers = {"clip": Dims(9, None), "dino-v2": Dims(8, 7), "sam": Dims(None, 3)}
    model = Distiller(Trunk(), Dims(6, 5), teachers, hidden=4, depth=1)
    assert list(model.heads) == ["clip:summary", "dino-v2:summary", "dino-v2:patches", "sam:patches"]
    features, predicted = model(torch.rand(2, 1, 2, 2))
    assert features.summary_BD.shape == (2, 6)
    assert {name: p.summary_BD is not None and tuple(p.summary_BD.shape) for name, p in predicted.items()} == {
        "clip": (2, 9),
        "dino-v2": (2, 8),
        "sam": False,
    }
    assert predicted["clip"].patches_BND is None
    assert predicted["dino-v2"].patches_BND.shape == (2, 6, 7)
    assert predicted["sam"].grid == (2, 3)


@pytest.mark.parametrize(
    ("dims", "message"),
    [(Dims(6, None), "teacher 'dino' has patches, the student"), (Dims(None, 5), "teacher 'dino' has summary")],
)
def test_a_student_without_the_input_of_a_head_is_refused(dims, message):
    with pytest.raises(ValueError, match=message):
        Distiller(Trunk(), dims, {"dino": Dims(8, 7)}, hidden=4, depth=1)


class Tower(nn.Module):
    """A transformer in small: two class tokens and a 2×3 grid of width 5 after each of three blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8 * 5)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, pixels):
        x, levels = self.embed(pixels.flatten(1)).unflatten(1, (8, 5)), []
        for block in self.blocks:
            x = x + block(x).tanh()
            levels.append(Features(x[:, :2].mean(1), x[:, 2:], (2, 3), x[:, :2]))
        return levels[-1]._replace(levels=tuple(levels))


TEACHERS = {"a": Dims(9, 7), "b": Dims(8, None)}


def tower(kind, tokens="shared", **more):
    torch.manual_seed(0)
    offers = {"class_tokens": 2, "levels": 3} | more
    return Distiller(Tower(), Dims(5, 5), TEACHERS, hidden=8, depth=1, kind=kind, tokens=tokens, **offers)


def numpy_mlp(hidden, x):
    """Linear, a residual block, LN and the exact GELU, in float64."""
    erf = np.vectorize(math.erf)

    def linear(layer, x):
        return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()

    def activated(norm, x):
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
        z = z * norm.weight.detach().numpy() + norm.bias.detach().numpy()
        return z * (1 + erf(z / np.sqrt(2))) / 2

    z = linear(hidden.first, x)
    for norm, _, last in hidden.blocks:
        z = z + linear(last, activated(norm, z))
    return activated(hidden.activation[0], z)


def test_a_ladder_is_the_sum_of_an_mlp_on_every_level():
    torch.manual_seed(0)
    ladder = Ladder(5, 7, hidden=8, depth=1, levels=3)
    nn.init.normal_(ladder.last.weight)
    levels = [torch.randn(2, 6, 5) for _ in range(3)]
    weight, bias = (one.detach().double().numpy() for one in (ladder.last.weight, ladder.last.bias))
    expected = bias + levels[-1].double().numpy() @ weight[:, 24:].T
    for index, (rung, x) in enumerate(zip(ladder.rungs, levels, strict=True)):
        expected = expected + numpy_mlp(rung, x.double().numpy()) @ weight[:, 8 * index : 8 * index + 8].T
    np.testing.assert_allclose(ladder(*levels).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_ladder_of_one_rung_is_the_mlp():
    head, ladder = Head(5, 7, hidden=8, depth=2), Ladder(5, 7, hidden=8, depth=2, levels=1)
    renamed = {key if key.startswith("last") else f"rungs.0.{key}": value for key, value in head.state_dict().items()}
    ladder.load_state_dict(renamed)
    x = torch.randn(2, 6, 5)
    assert torch.equal(ladder(x), head(x))


def test_a_mixer_is_one_transformer_block_over_summary_and_patches():
    torch.manual_seed(0)
    mixer = Mixer(Dims(6, 5), hidden=128)
    inputs = {"summary": torch.randn(2, 6), "patches": torch.randn(2, 4, 5)}
    found = mixer(inputs)
    block = mixer.block
    assert (block.self_attn.num_heads, block.linear1.out_features) == (2, 512)
    x = torch.cat([mixer.first["summary"](inputs["summary"])[:, None], mixer.first["patches"](inputs["patches"])], 1)
    qkv = nn.functional.linear(block.norm1(x), block.self_attn.in_proj_weight, block.self_attn.in_proj_bias)
    q, k, v = (part.unflatten(2, (2, 64)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    attention = ((q @ k.mT) / 8).softmax(-1) @ v
    x = x + block.self_attn.out_proj(attention.transpose(1, 2).flatten(2))
    x = x + block.linear2(nn.functional.gelu(block.linear1(block.norm2(x))))
    expected = mixer.norm(x)
    torch.testing.assert_close(found["summary"], expected[:, 0])
    torch.testing.assert_close(found["patches"], expected[:, 1:])


@pytest.mark.parametrize("tokens", ["shared", "own"])
@pytest.mark.parametrize("kind", ["mlp", "ladder", "transformer"])
def test_every_kind_predicts_and_reaches_every_block(kind, tokens):
    model = tower(kind, tokens)
    trunk, predicted = model(torch.rand(3, 1, 2, 2))
    assert trunk.levels == ()
    assert predicted["a"].summary_BD.shape == (3, 9)
    assert predicted["a"].patches_BND.shape == (3, 6, 7)
    assert predicted["b"].summary_BD.shape == (3, 8)
    assert predicted["b"].patches_BND is None
    for head in model.heads.values():
        if hasattr(head, "last"):
            nn.init.normal_(head.last.weight)
    parts = [one for features in model(torch.rand(3, 1, 2, 2))[1].values() for one in features[:2] if one is not None]
    sum(one.square().sum() for one in parts).backward()
    without = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert without == []


class Replay(nn.Module):
    """Whatever the pixels, these features."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, pixels):
        return self.features


def test_a_ladder_reads_each_level_itself():
    """A block is handed a gradient by its own rung, not only through the blocks behind it."""
    model = tower("ladder")
    levels = [Features(*(torch.randn(shape, requires_grad=True) for shape in ((3, 5), (3, 6, 5)))) for _ in range(3)]
    model.trunk = Replay(levels[-1]._replace(levels=tuple(levels)))
    predicted = model(torch.zeros(3))[1]["a"]
    (predicted.summary_BD.square().sum() + predicted.patches_BND.square().sum()).backward()
    assert all(one.grad.abs().sum() > 0 for level in levels for one in level[:2])


@pytest.mark.parametrize("kind", ["mlp", "ladder"])
def test_each_teacher_reads_its_own_class_token(kind):
    model = tower(kind, "own")
    before = model.trunk(torch.rand(3, 1, 2, 2))
    levels = [one._replace(tokens_BKD=one.tokens_BKD + torch.tensor([[0.0], [1.0]])) for one in before.levels]
    summaries = []
    for features in (before, levels[-1]._replace(levels=tuple(levels))):
        model.trunk = Replay(features)
        summaries.append({name: one.summary_BD for name, one in model(torch.zeros(3))[1].items()})
    torch.testing.assert_close(summaries[0]["a"], summaries[1]["a"])
    assert not torch.allclose(summaries[0]["b"], summaries[1]["b"], atol=1e-2)


@pytest.mark.parametrize("kind", ["mlp", "ladder", "transformer"])
def test_a_normaliser_folds_into_every_kind(kind):
    """Raw features, to float32, where the head emitted normalised ones."""
    model = tower(kind).eval()
    pixels = torch.rand(3, 1, 2, 2)
    with torch.no_grad():
        for head in model.heads.values():
            if hasattr(head, "last"):
                nn.init.normal_(head.last.weight)
        before = model(pixels)[1]["a"]
        raw = 3 * torch.randn(40, 7) @ torch.randn(7, 7) + 5
        affine = normalise.fit("phi_s", Moments.empty(7).update(raw))
        model.heads["a:patches"].last = normalise.fold(affine, model.heads["a:patches"].last)
        after = model(pixels)[1]["a"]
    assert torch.equal(before.summary_BD, after.summary_BD)
    torch.testing.assert_close(after.patches_BND, normalise.invert(affine, before.patches_BND), rtol=1e-4, atol=1e-4)


def test_what_a_student_lacks_is_named():
    with pytest.raises(ValueError, match=r"own needs a class token for each of 2 teachers, the student has 1: "):
        tower("mlp", "own", class_tokens=1)
    with pytest.raises(ValueError, match=r"ladder reads the student's blocks, and it serves none: .*options\.levels"):
        tower("ladder", levels=0)


def test_the_default_keeps_its_keys():
    keys = {key for key in tower("mlp").state_dict() if key.startswith("heads.b")}
    layers = ["first", "blocks.0.0", "blocks.0.2", "activation.0", "last"]
    assert keys == {f"heads.b:summary.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_resample_to_the_same_grid_is_the_identity():
    patches = torch.randn(2, 6, 4)
    assert resample(patches, (2, 3), (2, 3)) is patches


def test_halving_a_grid_is_a_triangle_filter():
    """Antialiased bilinear by 2: support of four cells, weights 1 3 3 1, renormalised at the border."""
    patches_BND = torch.randn(2, 8 * 6, 3, dtype=torch.float64)
    grid = patches_BND.numpy().reshape(2, 8, 6, 3)

    def matrix(n):
        weights = np.zeros((n // 2, n))
        for i in range(n // 2):
            for j, weight in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
                if 0 <= j < n:
                    weights[i, j] = weight
        return weights / weights.sum(1, keepdims=True)

    expected = np.einsum("yh,xw,bhwd->byxd", matrix(8), matrix(6), grid).reshape(2, 12, 3)
    np.testing.assert_allclose(resample(patches_BND, (8, 6), (4, 3)), expected, atol=1e-12)


@pytest.mark.parametrize("to", [(3, 3), (2, 5), (7, 4)])
def test_resample_keeps_constants_and_row_major_order(to):
    constant = torch.ones(1, 20, 2)
    torch.testing.assert_close(resample(constant, (4, 5), to), torch.ones(1, to[0] * to[1], 2))
    rows = torch.arange(4.0).repeat_interleave(5)[None, :, None]
    found = resample(rows, (4, 5), to).reshape(to)
    assert (found[1:] > found[:-1]).all()
    torch.testing.assert_close(found, found[:, :1].expand(to))
