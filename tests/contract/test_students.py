"""The student kind over the families of timm: transformers, convolutional and hierarchical networks."""

import pytest
import timm
import torch

import students.timm
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
        {"model": "test_vit", "registers": 2},
        {"model": "test_vit", "class_tokens": 3, "registers": 1, "levels": 2},
        {"model": "test_vit2", "registers": 1, "levels": 3},
        pytest.param({"model": "vit_small_patch16_dinov3", "class_tokens": 2, "registers": 1}, marks=pytest.mark.slow),
        pytest.param({"model": "deit3_small_patch16_224", "class_tokens": 2, "levels": 4}, marks=pytest.mark.slow),
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


@pytest.mark.parametrize(("model", "in_table"), [("test_vit", True), ("deit3_small_patch16_224", False)])
def test_added_tokens_stand_in_order(model, in_table):
    """Class token, new class tokens, registers that were there, new registers, patches; with their positions, be they
    in the table or not."""
    torch.manual_seed(0)
    net, wide = (timm.create_model(model, num_classes=0, reg_tokens=count) for count in (1, 5))
    students.timm._fill(wide, net, 2)
    old, new = net.state_dict(), wide.state_dict()
    moved = {"reg_token", "pos_embed"} if in_table else {"reg_token"}
    assert all(torch.equal(new[key], value) for key, value in old.items() if key not in moved)
    assert torch.equal(new["reg_token"][:, 2], old["reg_token"][:, 0])
    noise = new["reg_token"][:, [0, 1, 3, 4]]
    noise[:, :2] -= old["cls_token"]
    assert noise.std() == pytest.approx(0.02, rel=0.15)
    if in_table:
        assert torch.equal(new["pos_embed"][:, :4], old["pos_embed"][:, [0, 0, 0, 1]])
        assert not new["pos_embed"][:, 4:6].any()
        assert torch.equal(new["pos_embed"][:, 6:], old["pos_embed"][:, 2:])


def test_a_checkpoint_with_or_without_the_added_tokens_starts_a_student(tmp_path):
    more = {"class_tokens": 2, "registers": 1}
    plain = make(model="test_vit").backbone.state_dict()
    torch.save(plain, tmp_path / "plain.pth")
    torch.manual_seed(0)
    first = make(model="test_vit", checkpoint=str(tmp_path / "plain.pth"), **more).backbone.state_dict()
    assert all(torch.equal(first[key], value) for key, value in plain.items() if key != "pos_embed")
    torch.save(first, tmp_path / "more.pth")
    second = make(model="test_vit", checkpoint=str(tmp_path / "more.pth"), **more).backbone.state_dict()
    assert all(torch.equal(second[key], value) for key, value in first.items())


def test_registers_are_seen_by_nobody():
    """They are in no patch, no summary and no class token; of several class tokens the summary is the mean."""
    student = make(model="test_vit", class_tokens=2, registers=3)
    pixels = torch.rand(2, 3, 64, 64)
    features = student.module.eval()(pixels)
    tokens = student.backbone.forward_features(student.module.condition(pixels))
    assert tokens.shape[1] == 2 + 3 + 16
    assert torch.equal(features.patches_BND, tokens[:, 5:])
    assert torch.equal(features.tokens_BKD, tokens[:, :2])
    assert torch.equal(features.summary_BD, tokens[:, :2].mean(1))


def test_levels_are_evenly_spaced_blocks():
    student = make(model="test_vit", registers=1, levels=3)
    seen = {}
    for index, block in enumerate(student.backbone.blocks):
        block.register_forward_hook(lambda block, given, output, index=index: seen.update({index: output}))
    *inner, last = student.module.eval()(torch.rand(2, 3, 64, 64)).levels
    for level, index in zip(inner, (1, 3), strict=True):
        assert torch.equal(level.summary_BD, seen[index][:, 0])
        assert torch.equal(level.patches_BND, seen[index][:, 2:])
    assert torch.equal(last.patches_BND, student.backbone.norm(seen[5])[:, 2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "test_vit2", "class_tokens": 2}, "'test_vit2' has no class token to add others to"),
        ({"model": "test_efficientnet", "registers": 2}, "'test_efficientnet' takes no registers"),
        ({"model": "test_vit3", "registers": 2}, "'test_vit3' pools its registers into the summary"),
        ({"model": "test_efficientnet", "levels": 2}, "levels is 2, but 'test_efficientnet' is no patch transformer"),
        ({"model": "test_vit", "levels": 7}, "levels is 7, but 'test_vit' has 6 blocks"),
        ({"model": "test_vit", "class_tokens": 0}, "class_tokens is 0, registers 0, levels 0; expected at least 1, 0"),
    ],
)
def test_says_which_tokens_a_network_cannot_have(options, message):
    with pytest.raises(PluginError, match=message):
        make(**options)


def test_says_what_is_wrong():
    with pytest.raises(PluginError, match=r"students\.timm: timm has no model 'resnet19'; did you mean resnet1"):
        make(model="resnet19")
