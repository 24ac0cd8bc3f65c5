"""The student kind over the families of timm: transformers, convolutional and hierarchical networks."""

import pytest
import torch

from agglom import plugins, testing
from agglom.core.types import Dims
from agglom.errors import PluginError


def make(**options):
    return plugins.build("timm", "students", options)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "test_vit"},
        {"model": "test_vit", "size": 96, "drop_path": 0.1},
        {"model": "test_vit2"},
        {"model": "test_efficientnet"},
        {"model": "test_efficientnet", "fixed_statistics": True},
        {"model": "test_convnext", "drop_path": 0.1},
        {"model": "mobilenetv3_small_050"},
        {"model": "test_mambaout"},
        {"model": "test_maxvit"},
        {"model": "test_vit3"},
        pytest.param({"model": "swin_tiny_patch4_window7_224"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_timm(options):
    results = testing.run("timm", "students", options)
    assert all(result.ok for result in results), "\n" + testing.render(results)


def test_pooled_and_mapped_widths_may_differ():
    assert make(model="mobilenetv3_small_050").dims == Dims(1024, 288)


def test_a_class_token_is_the_summary_where_pooling_was_never_trained():
    assert make(model="vit_small_patch16_dinov3").module.summary == "class"


def test_starts_from_a_checkpoint(tmp_path):
    first = make(model="test_efficientnet")
    torch.save(first.backbone.state_dict(), tmp_path / "student.pth")
    second = make(model="test_efficientnet", checkpoint=str(tmp_path / "student.pth"))
    for (name, a), b in zip(first.backbone.state_dict().items(), second.backbone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_fixed_statistics_make_training_see_what_evaluation_sees():
    pixels = torch.rand(4, 3, 64, 64)
    for fixed in (False, True):
        module = make(model="test_efficientnet", fixed_statistics=fixed).module
        seen, judged = module.train()(pixels), module.eval()(pixels)
        assert torch.equal(seen.summary_BD, judged.summary_BD) == fixed


def test_builds_on_the_meta_device():
    """`agglom plan --params` counts parameters without weights."""
    with torch.device("meta"):
        assert make(model="test_vit").dims == Dims(64, 64)


def test_bfloat16_weights_take_float32_pixels():
    module = make(model="test_vit").module.bfloat16()
    assert module(torch.rand(1, 3, 64, 64)).summary_BD.dtype == torch.bfloat16


def test_says_what_is_wrong():
    with pytest.raises(PluginError, match=r"students\.timm: timm has no model 'resnet19'; did you mean resnet1"):
        make(model="resnet19")
