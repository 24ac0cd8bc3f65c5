import numpy as np
import pytest
import torch
from torch import nn

from agglom.core.heads import Distiller, Head, resample
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
