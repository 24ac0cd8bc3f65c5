"""How a teacher runs: precision, batches, where its weights wait, and what it may emit."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from agglom import assemble, hosting, testing
from agglom.core.tokens import freeze
from agglom.core.types import Derived, Dims, Features
from agglom.errors import PluginError
from agglom.job import Data, Job, Stage, TeacherSpec

GOOD = testing.synthetic_teacher()
CPU, META = torch.device("cpu"), torch.device("meta")
PIXELS = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def hosted(teacher, device=CPU, **changes):
    return hosting.host("one", teacher, TeacherSpec(kind="any", **changes), device)


@pytest.fixture(scope="module")
def vit():
    from agglom import plugins

    torch.manual_seed(0)
    return plugins.build("timm", "teachers", {"model": "test_vit", "pretrained": False})


def bare(emit, dims=None, module=None):
    """A teacher that emits what `emit(pixels)` returns."""
    good = testing.synthetic_teacher()
    return replace(good, encode=emit, dims=dims or good.dims, module=module or good.module)


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a[:2], b[:2], strict=True))


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 9])
def test_micro_batches_give_the_features_of_the_whole_batch(vit, micro_batch):
    seen = []
    spied = replace(vit, encode=lambda pixels: (seen.append(len(pixels)), vit.encode(pixels))[1])
    features = hosted(spied, micro_batch=micro_batch).encode(PIXELS)
    assert largest_difference(features, vit.encode(PIXELS)) < 1e-5
    assert features.grid == vit.encode(PIXELS).grid
    assert sum(seen) == 5
    assert max(seen) <= micro_batch


def test_without_settings_a_teacher_is_as_it_was(vit):
    assert largest_difference(hosted(vit).encode(PIXELS), vit.encode(PIXELS)) == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtype_is_autocast_with_the_matrices_stored_in_it(vit, dtype):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wanted = vit.encode(PIXELS)
    with torch.autocast("cpu", kind):
        reference = vit.encode(PIXELS)
    module = copy.deepcopy(vit.module)
    features = hosted(replace(vit, module=module, encode=module), dtype=dtype).encode(PIXELS)
    assert features.summary_BD.dtype == features.patches_BND.dtype == torch.float32
    for ours, theirs in zip(features[:2], reference[:2], strict=True):
        assert torch.equal(ours, theirs.float())
    assert 0 < largest_difference(features, wanted) < 0.2
    stored = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert stored["net.blocks.0.attn.qkv.weight"] == stored["net.patch_embed.proj.weight"] == kind
    assert stored["net.blocks.0.norm1.weight"] == stored["net.cls_token"] == torch.float32


def wide(width, log):
    """A teacher whose forward logs how many bytes lie on the accelerator."""

    class Net(nn.Sequential):
        def forward(self, pixels):
            log.append(sum(m.weight.nbytes for m in nets if m.weight.device.type == "meta"))
            return super().forward(pixels)

    net = freeze(Net(nn.Conv2d(3, width, 8, 8, bias=False), nn.BatchNorm2d(width)))
    nets = log.nets
    nets.append(net[0])

    def encode(pixels):
        map_ = net(pixels)
        return Features(None, map_.flatten(2).mT, (map_.shape[-2], map_.shape[-1]))

    return bare(encode, Dims(None, width), net)


class Log(list):
    def __init__(self):
        super().__init__()
        self.nets = []


def test_swapped_teachers_are_on_the_device_one_at_a_time():
    """The meta device stands for an accelerator: what lies there has no values, but a device."""
    log = Log()
    small, large = (hosted(wide(width, log), META, placement="cpu_swap") for width in (8, 32))
    before = [net.weight.clone() for net in log.nets]
    for teacher in (small, large, small):
        assert teacher.encode(torch.zeros(2, 3, 64, 64, device="meta")).patches_BND.device == META
    bytes_of = [weight.nbytes for weight in before]
    assert log == [bytes_of[0], bytes_of[1], bytes_of[0]]
    for net, weight in zip(log.nets, before, strict=True):
        assert torch.equal(net.weight, weight)


def test_tied_weights_are_copied_once():
    layer = nn.Conv2d(3, 3, 1, bias=False)
    net = freeze(nn.Sequential(layer, nn.Identity(), nn.Conv2d(3, 3, 1, bias=False)))
    net[2].weight = layer.weight
    seen = []
    net[1].register_forward_hook(lambda *_: seen.append(net[0].weight is net[2].weight))
    encode = lambda x: Features(None, net(x).flatten(2).mT, x.shape[-2:])  # noqa: E731
    hosted(bare(encode, Dims(None, 3), net), META, placement="cpu_swap").encode(torch.zeros(1, 3, 8, 8, device="meta"))
    assert seen == [True]
    assert net[0].weight is net[2].weight


def test_online_teachers_are_all_on_the_device():
    log = Log()
    small, large = (hosted(wide(width, log), META) for width in (8, 32))
    for teacher in (small, large):
        teacher.encode(torch.zeros(2, 3, 64, 64, device="meta"))
    assert log == [8 * 192 * 4 + 32 * 192 * 4] * 2


def test_a_swapped_teacher_that_fails_is_parked_again():
    log = Log()
    teacher = hosted(wide(8, log), META, placement="cpu_swap")
    with pytest.raises(RuntimeError, match="channel"):
        teacher.encode(torch.zeros(2, 4, 64, 64, device="meta"))
    assert {tensor.device.type for tensor in teacher.module.state_dict().values()} == {"cpu"}


def test_on_the_cpu_swapping_is_the_identity(vit):
    homes = [parameter.data_ptr() for parameter in vit.module.parameters()]
    assert largest_difference(hosted(vit, placement="cpu_swap").encode(PIXELS), vit.encode(PIXELS)) == 0
    assert homes == [parameter.data_ptr() for parameter in vit.module.parameters()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled():
    teacher = hosted(GOOD, compile=True)
    assert largest_difference(teacher.encode(PIXELS), GOOD.encode(PIXELS)) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_that_fails_is_named(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=broken))
    teacher = hosted(testing.synthetic_teacher(), compile=True)
    with pytest.raises(PluginError, match=r"teachers\.one\.compile: torch\.compile failed .*C\+\+ compiler"):
        teacher.encode(PIXELS)


@pytest.mark.parametrize("change", [{"dtype": "bf16"}, {"placement": "cpu_swap"}, {"compile": True}])
def test_weights_outside_the_module_are_refused(change):
    good = testing.synthetic_teacher()
    with pytest.raises(PluginError, match=rf"teachers\.one\.{next(iter(change))}: its weights are not parameters"):
        hosted(replace(good, module=nn.Identity()), **change)
    hosted(replace(good, module=nn.Identity()), micro_batch=2)


@pytest.mark.parametrize(
    ("emit", "message"),
    [
        (lambda x: GOOD.encode(x)._replace(summary_BD=None), "emits no summary, but declares summary of width 16"),
        (
            lambda x: GOOD.encode(x)._replace(patches_BND=torch.zeros(5, 64, 8)),
            "emits patches of width 8, but declares",
        ),
        (
            lambda x: GOOD.encode(x)._replace(summary_BD=torch.zeros(5, 1, 16)),
            "emits summary of shape .5, 1, 16., expected the axes BD",
        ),
        (lambda x: GOOD.encode(x)._replace(grid=(7, 8)), "its grid is 7×8, but it emits 64 patches"),
        (lambda x: GOOD.encode(x[:4]), "emits summary of 4 images for 5 images"),
    ],
)
def test_what_is_not_as_declared_is_named(emit, message):
    with pytest.raises(PluginError, match=f"teachers.one: {message}"):
        hosted(bare(emit)).encode(PIXELS)


def test_a_grid_that_changes_from_batch_to_batch_is_named():
    grids = iter([(8, 8), (4, 16), (8, 8), (8, 8), (4, 16)])
    teacher = hosted(bare(lambda x: GOOD.encode(x)._replace(grid=next(grids))))
    teacher.encode(PIXELS)
    with pytest.raises(PluginError, match=r"its grid is 4×16 for images of 64×64 px, and was 8×8 for an earlier batch"):
        teacher.encode(PIXELS)
    # Another size has a grid of its own; the micro-batches of one batch are compared, too.
    assert teacher.encode(PIXELS).grid == (8, 8)
    split = hosted(bare(lambda x: GOOD.encode(x)._replace(grid=next(grids))), micro_batch=3)
    with pytest.raises(PluginError, match="and was 8×8"):
        split.encode(PIXELS)


def test_a_derived_teacher_is_checked_and_not_cast():
    def derive(features):
        return features._replace(summary_BD=features.summary_BD[:, :8])

    wrong = replace(GOOD, derived=Derived("source", derive), encode=lambda x: derive(GOOD.encode(x)))
    teacher = hosted(wrong)
    for call in (lambda: teacher.encode(PIXELS), lambda: teacher.derived.derive(GOOD.encode(PIXELS))):
        with pytest.raises(PluginError, match="emits summary of width 8"):
            call()
    right = hosted(replace(wrong, dims=Dims(8, 16)))
    assert right.encode(PIXELS).summary_BD.shape == (5, 8)


def test_what_changes_no_number_is_no_part_of_the_identity():
    def identity(**changes):
        spec = TeacherSpec(kind="any", **changes)
        job = Job(data=Data(manifest="m.csv"), teachers={"a": spec}, stages=(Stage(name="s", length="1 steps"),))
        run = SimpleNamespace(job=job, manifest=SimpleNamespace(digest="d"), teachers={})
        return assemble.Run.identity.fget(run)

    plain = identity()
    for same in ({"placement": "cpu_swap"}, {"micro_batch": 4}, {"licence": "MIT"}):
        assert identity(**same) == plain
    for other in ({"dtype": "bf16"}, {"compile": True}, {"weight": 2.0}):
        assert identity(**other) != plain
