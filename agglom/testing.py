"""The contract of teachers and students as a suite of checks: `agglom check teachers/mine.py --set model=…`.

Every check says what was expected and what was found. The same suite runs in tests/contract over every plug-in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from agglom import curriculum, hosting, licences, plugins
from agglom.core.tokens import Conditioner, flatten_map, freeze, weights_digest
from agglom.core.types import Derived, Dims, Features, PixelSpec, Student, Teacher, Text
from agglom.errors import PluginError
from agglom.job import Job, TeacherSpec

# How far features may differ for the company they had in the batch, by what a teacher computes in.
ATOLS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
ATOL = ATOLS["fp32"]
ROUNDING = 1e-5  # where memory lies decides how a kernel sums; dropout or a random crop is far above it


class Result(NamedTuple):
    """One check: `detail` tells what was expected and what was found where it failed."""

    name: str
    ok: bool
    detail: str


class Broken(Exception):
    """A check has failed; the message says what was expected and what was found."""


def check(kind: str, package: str, options: Mapping[str, Any], **injected: Any) -> str:
    """The rendered results of the suite on one plug-in. Raises PluginError with the same text if a check failed.

    A teacher that is derived from a source gets a synthetic one unless `source` and `source_name` are injected.
    """
    return _verdict({f"{package}/{kind}": run(kind, package, options, **injected)})


def check_job(job: Job) -> str:
    """The rendered results on every teacher and on the student of a job; raises PluginError if a check failed."""
    sources: dict[str, Teacher] = {}

    def injected(name: str) -> dict[str, Any]:
        source = job.teachers[name].source
        if source is None:
            return {}
        if source not in sources:
            spec = job.teachers[source]
            built = plugins.build(spec.kind, "teachers", spec.options, **injected(source))
            sources[source] = _hosted(source, built, spec)
        return {"source": sources[source], "source_name": source}

    legs = curriculum.parts(job)
    found = {
        f"teachers.{name}": run(spec.kind, "teachers", spec.options, spec, name=name, **injected(name))
        if name in legs[0].teachers
        else [Result("not there yet: it is, or derives from, a student of this job", True, "")]
        for name, spec in sorted(job.teachers.items())
    }
    for leg in legs:
        name = "student" if leg is legs[0] else f"student of stage {leg.stages[0].name}"
        found[name] = run(leg.student.kind, "students", leg.student.options)
    return _verdict(found)


def run(
    kind: str,
    package: str,
    options: Mapping[str, Any],
    spec: TeacherSpec | None = None,
    *,
    name: str | None = None,
    **injected: Any,
) -> list[Result]:
    """The suite on one plug-in, which is built twice. Raises PluginError if it cannot be built.

    With its part of a job, a teacher is checked as that job runs it, on the CPU.
    """
    if package == "teachers" and plugins.takes(kind, package, "source") and "source" not in injected:
        injected = {"source": synthetic_teacher(), "source_name": "synthetic"}

    def make() -> Any:
        torch.manual_seed(0)
        return plugins.build(kind, package, options, **injected)

    first, second = make(), make()
    expected = Teacher if package == "teachers" else Student
    checks: Iterator[tuple[str, Callable[[], None]]]
    if not isinstance(first, expected) or not isinstance(second, expected):
        return [Result("type", False, f"build() must return a {expected.__name__}, got {type(first).__name__}")]
    if isinstance(first, Teacher) and isinstance(second, Teacher):
        if spec is not None:
            first, second = (_hosted(name or kind, teacher, spec) for teacher in (first, second))
        checks = teacher_checks(first, second, injected.get("source"), spec.dtype if spec else "fp32")
    else:
        checks = student_checks(cast(Student, first))
    return [_attempt(name, function) for name, function in checks]


def render(results: list[Result]) -> str:
    """One line a check, and the sum."""
    lines = [f"ok    {r.name}" if r.ok else f"FAIL  {r.name}: {r.detail}" for r in results]
    failed = sum(not r.ok for r in results)
    return "\n".join([*lines, f"{len(results) - failed} of {len(results)} checks passed"])


def synthetic_teacher(width: int = 16) -> Teacher:
    """A small convolutional teacher with fixed weights, for checks of what is derived from a teacher."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = freeze(nn.Sequential(Conditioner((0.5,) * 3, (0.25,) * 3), nn.Conv2d(3, width, 8, 8), nn.GELU()))

    def encode(pixels_BCHW: Tensor) -> Features:
        patches_BND, grid = flatten_map(net(pixels_BCHW))
        return Features(patches_BND.amax(1), patches_BND, grid)

    spec = PixelSpec(mean=(0.5,) * 3, std=(0.25,) * 3, patch=8)
    return Teacher(net, encode, Dims(width, width), spec, weights_digest(net, "synthetic"), "Apache-2.0")


def teacher_checks(
    teacher: Teacher, again: Teacher, source: Teacher | None, dtype: str = "fp32"
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of a teacher; `again` is the same teacher built a second time, `dtype` what both compute in."""
    side, derived = _side(teacher.pixels), teacher.derived
    if derived is not None and derived.fit is not None and source is not None:
        yield "fits on features and columns of the manifest", lambda: _fit(teacher, again, derived, source)
    parts = teacher.encode, teacher.dims, teacher.pixels, teacher.module
    yield from _encoder_checks(*parts, derived is not None, ATOLS[dtype])
    yield "features are float32", lambda: _float32(teacher.encode(_pixels(side)))
    yield "frozen and in evaluation mode", lambda: _frozen(teacher)
    yield "fingerprint is that of a second build", lambda: _same_fingerprint(teacher, again)
    yield "licence is named", lambda: _expect(bool(teacher.licence), "a licence, or 'unknown'", teacher.licence)
    yield "provenance tells no folder of this machine", lambda: _origin(teacher.provenance.source)
    if (load := teacher.text) is not None:
        yield "texts and summaries share a space", lambda: _shared_space(teacher, load())


def student_checks(student: Student) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of a student."""
    # First of all, while the network is as `build` left it.
    yield "trainable: every parameter gets a gradient", lambda: _trainable(student)
    encode = _evaluation(student.module)
    yield from _encoder_checks(encode, student.dims, student.pixels, student.module, False)
    yield "class tokens and levels are those declared", lambda: _served(encode(_pixels(_side(student.pixels))), student)
    yield "the backbone is part of the module", lambda: _backbone(student)
    yield "the recipe is JSON", lambda: _json(student.recipe)
    if "architecture" in student.recipe:
        yield "plain timm rebuilds the backbone from the recipe", lambda: _rebuild(student)


def _encoder_checks(
    encode: Callable[[Tensor], Features],
    dims: Dims,
    pixels: PixelSpec,
    module: nn.Module,
    derived: bool,
    atol: float = ATOL,
) -> Iterator[tuple[str, Callable[[], None]]]:
    side = _side(pixels)
    yield "emits the declared dims", lambda: _dims(encode(_pixels(side)), dims)
    yield "grid is that of the patch size", lambda: _grid(encode(_pixels(side)), (side, side), pixels.patch)
    if pixels.size is None:
        tall = side + pixels.patch, side
        yield (
            "grid follows the input size, height before width",
            lambda: _grid(encode(_pixels(tall[0])[..., :side]), tall, pixels.patch),
        )
    yield "features are finite", lambda: _finite(encode(_pixels(side)))
    yield (
        "deterministic",
        lambda: _equal(encode(_pixels(side)), encode(_pixels(side)), ROUNDING, "equal features twice"),
    )
    yield "independent of order and company in the batch", lambda: _independent(encode, side, atol)
    yield "leaves its input as it was", lambda: _pure(encode, side)
    yield "mean and std are for pixels in [0, 1]", lambda: _constants(pixels)
    if not derived:
        yield "applies mean and std to pixels in [0, 1]", lambda: _conditioned(encode, module, pixels, side)


def _attempt(name: str, function: Callable[[], None]) -> Result:
    try:
        function()
    except Broken as failure:
        return Result(name, False, str(failure))
    except Exception as error:  # a plug-in may break in any way, and the other checks still have something to say
        return Result(name, False, f"{type(error).__name__}: {error}")
    return Result(name, True, "")


def _hosted(name: str, teacher: Teacher, spec: TeacherSpec) -> Teacher:
    """The teacher as a job makes it, on the CPU."""
    licence = licences.resolve(name, teacher.licence, spec.licence)
    return hosting.host(name, replace(teacher, licence=licence), spec, torch.device("cpu"))


def _verdict(found: dict[str, list[Result]]) -> str:
    text = "\n\n".join(f"{name}\n{render(results)}" for name, results in found.items())
    if not all(result.ok for results in found.values() for result in results):
        raise PluginError(f"the contract is broken\n{text}")
    return text


def _expect(condition: bool, expected: Any, got: Any) -> None:
    if not condition:
        raise Broken(f"expected {expected}, got {got!r}")


def _side(pixels: PixelSpec) -> int:
    return pixels.size or pixels.patch * max(2, -(-64 // pixels.patch))


def _pixels(side: int, images: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def _parts(features: Features) -> dict[str, Tensor]:
    named = {"summary": features.summary_BD, "patches": features.patches_BND}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _equal(a: Features, b: Features, atol: float, expected: str) -> None:
    for (name, x), y in zip(_parts(a).items(), _parts(b).values(), strict=True):
        # Rounding grows with the features: DINOv2's reach 10, others stay below 1.
        worst = ((x - y).abs().max() / x.abs().max().clamp(min=1.0)).item()
        _expect(worst <= atol, expected, f"{name} that differ by {worst:.1e}")


def _dims(features: Features, dims: Dims) -> None:
    _expect(isinstance(features, Features), "Features", type(features).__name__)
    shapes = {name: tuple(tensor.shape) for name, tensor in _parts(features).items()}
    emitted = Dims(*(shapes[name][-1] if name in shapes else None for name in ("summary", "patches")))
    _expect(emitted == dims, dims, emitted)
    _expect(emitted != Dims(None, None), "a summary or patches", emitted)
    for name, ndim in (("summary", 2), ("patches", 3)):
        shape = shapes.get(name)
        _expect(shape is None or (len(shape) == ndim and shape[0] == 2), f"{name} of {ndim} axes for 2 images", shape)


def _grid(features: Features, shape: tuple[int, int], patch: int) -> None:
    if features.patches_BND is None:
        return
    rows, columns = features.grid
    tokens, expected = features.patches_BND.shape[1], (shape[0] // patch, shape[1] // patch)
    _expect(rows * columns == tokens, f"{rows}×{columns} patch tokens of the grid", tokens)
    told = f"{expected[0]}×{expected[1]} cells ({shape[0]}×{shape[1]} px by {patch})"
    _expect(features.grid == expected, told, features.grid)


def _finite(features: Features) -> None:
    for name, tensor in _parts(features).items():
        _expect(bool(tensor.isfinite().all()), f"finite {name}", f"{int((~tensor.isfinite()).sum())} that are not")


def _float32(features: Features) -> None:
    for name, tensor in _parts(features).items():
        _expect(tensor.dtype == torch.float32, f"{name} in float32", str(tensor.dtype))


def _independent(encode: Callable[[Tensor], Features], side: int, atol: float) -> None:
    pixels_BCHW = _pixels(side, images=3)
    whole, turned, single = encode(pixels_BCHW), encode(pixels_BCHW.flip(0)), encode(pixels_BCHW[:1])
    for other, pick, what in ((turned, lambda x: x.flip(0), "reversed order"), (single, lambda x: x[:1], "no company")):
        summary, patches, grid = whole[:3]
        wanted = Features(None if summary is None else pick(summary), None if patches is None else pick(patches), grid)
        _equal(wanted, other, atol, f"the same features in {what}")


def _pure(encode: Callable[[Tensor], Features], side: int) -> None:
    pixels_BCHW = _pixels(side)
    encode(pixels_BCHW)
    _expect(torch.equal(pixels_BCHW, _pixels(side)), "pixels that are not written to", "changed pixels")


def _constants(pixels: PixelSpec) -> None:
    _expect(len(pixels.mean) == len(pixels.std) == pixels.channels, f"{pixels.channels} constants each", pixels)
    _expect(all(std > 0 for std in pixels.std), "positive std", pixels.std)
    _expect(all(abs(mean) <= 1 for mean in pixels.mean), "mean for pixels in [0, 1], not [0, 255]", pixels.mean)


def _conditioned(encode: Callable[[Tensor], Features], module: nn.Module, pixels: PixelSpec, side: int) -> None:
    """Some layer must have seen (pixels − mean) / std, on its way in or out."""
    pixels_BCHW = _pixels(side, images=1)  # a micro-batch may hold no more
    wanted_BCHW = Conditioner(pixels.mean, pixels.std)(pixels_BCHW)
    seen: list[bool] = []

    def look(layer: nn.Module, inputs: tuple, named: dict, output: Any) -> None:
        tensors = [x for x in (*inputs, *named.values(), output) if isinstance(x, Tensor)]
        seen.extend(x.shape == wanted_BCHW.shape and torch.allclose(x.float(), wanted_BCHW, atol=1e-5) for x in tensors)

    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in module.modules()]
    try:
        encode(pixels_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    _expect(any(seen), "a layer that sees (pixels − mean) / std of its PixelSpec", "none that does")


def _frozen(teacher: Teacher) -> None:
    trainable = [name for name, parameter in teacher.module.named_parameters() if parameter.requires_grad]
    _expect(not trainable, "no trainable parameter", trainable[:3])
    training = [name or "the module" for name, module in teacher.module.named_modules() if module.training]
    _expect(not training, "evaluation mode", training[:3])
    features = teacher.encode(_pixels(_side(teacher.pixels)))
    _expect(not any(x.requires_grad for x in _parts(features).values()), "features without gradient", "with gradient")


def _same_fingerprint(teacher: Teacher, again: Teacher) -> None:
    _expect(bool(teacher.fingerprint), "a fingerprint", teacher.fingerprint)
    _expect(again.fingerprint == teacher.fingerprint, teacher.fingerprint, again.fingerprint)


def _origin(source: str) -> None:
    _expect(bool(source), "where the weights come from, or 'unknown'", source)
    _expect(not Path(source).is_absolute(), "a name without the folders above it", source)


def _shared_space(teacher: Teacher, text: Text) -> None:
    words = ("a cat", "two dogs", "the sea")
    text_NE, turned_NE = text.embed(words), text.embed(words[::-1]).flip(0)
    _expect(text_NE.dtype == torch.float32, "embeddings in float32", str(text_NE.dtype))
    _expect(text_NE.ndim == 2 and len(text_NE) == 3, "embeddings (3, E) of 3 texts", tuple(text_NE.shape))
    _expect(bool(text_NE.isfinite().all()), "finite embeddings", "some that are not")
    _expect(torch.allclose(text_NE, turned_NE, atol=ATOL), "the same embeddings in reversed order", "others")
    summary_BD = teacher.encode(_pixels(_side(teacher.pixels))).summary_BD
    if summary_BD is None:
        raise Broken("expected a summary to compare texts with, got none")
    image_BE, longer_BE = text.project(summary_BD), text.project(3 * summary_BD)
    wanted = len(summary_BD), text_NE.shape[1]
    _expect(image_BE.shape == wanted, f"projected summaries {wanted}", tuple(image_BE.shape))
    cosine = torch.cosine_similarity(image_BE, longer_BE).min().item()
    _expect(cosine > 1 - ATOL, "a direction that does not depend on the length of the summary", f"cosine {cosine}")
    _expect(0 < text.scale < math.inf, "a positive scale", text.scale)


def _fit(teacher: Teacher, again: Teacher, derived: Derived, source: Teacher) -> None:
    """Refuses to work before the fit, fits on synthetic groups, and its state carries the fit to another build."""
    assert derived.fit is not None
    side = _side(source.pixels)
    try:
        teacher.encode(_pixels(side))
    except PluginError:
        pass
    else:
        raise Broken("expected a PluginError before the fit, got features")
    group_B = torch.tensor([0, 1, -1, 0, 1, 1, 0, 1])
    label_B = torch.tensor([0.0, 0.0, 1.0, torch.nan, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    columns = dict.fromkeys((*derived.attributes, *derived.groups), group_B) | dict.fromkeys(derived.labels, label_B)
    derived.fit((source.encode(_pixels(side, len(group_B), seed)), columns) for seed in range(8))
    again.module.load_state_dict(teacher.module.state_dict())
    _equal(teacher.encode(_pixels(side)), again.encode(_pixels(side)), 0.0, "a fit that the state dict carries")
    shared = derived.derive(source.encode(_pixels(side)))
    _equal(teacher.encode(_pixels(side)), shared, 0.0, "encode(pixels) = derive(source.encode(pixels))")


def _evaluation(module: nn.Module) -> Callable[[Tensor], Features]:
    @torch.no_grad()
    def encode(pixels_BCHW: Tensor) -> Features:
        return module.eval()(pixels_BCHW)

    return encode


def _trainable(student: Student) -> None:
    _expect(student.module.training, "training mode", "evaluation mode")
    features = student.module(_pixels(_side(student.pixels)))
    torch.stack([x.square().mean() for x in _parts(features).values()]).sum().backward()
    unused = [name for name, parameter in student.module.named_parameters() if parameter.grad is None]
    student.module.zero_grad(set_to_none=True)
    _expect(not unused, "a gradient on every parameter", f"none on {', '.join(unused[:3])}")


def _served(features: Features, student: Student) -> None:
    shape, widths = None if features.tokens_BKD is None else tuple(features.tokens_BKD.shape), student.dims
    wanted = (2, student.class_tokens, widths.summary) if student.class_tokens else None
    _expect(shape == wanted, f"class tokens {wanted} for 2 images", shape)
    _expect(len(features.levels) == student.levels, f"{student.levels} levels", len(features.levels))
    for level in features.levels:
        _dims(level, widths)
        _expect(level.grid == features.grid, f"levels on the grid {features.grid}", level.grid)
        tokens = None if level.tokens_BKD is None else tuple(level.tokens_BKD.shape)
        _expect(tokens == shape, f"class tokens {shape} on every level", tokens)
    if features.levels:
        _equal(features.levels[-1], features, 0.0, "a last level that is the features themselves")


def _backbone(student: Student) -> None:
    inside = any(module is student.backbone for module in student.module.modules())
    _expect(inside, "the backbone among the module's modules", type(student.backbone).__name__)


def _json(recipe: dict[str, Any]) -> None:
    returned = json.loads(json.dumps(recipe))
    _expect(returned == recipe, "a recipe that JSON gives back unchanged", recipe)


def _rebuild(student: Student) -> None:
    import timm

    recipe = student.recipe
    net: Any = timm.create_model(recipe["architecture"], pretrained=False, num_classes=0, **recipe["model_args"])
    net.eval().load_state_dict(student.backbone.state_dict())
    for key in ("mean", "std", "input_size"):
        _expect(key in recipe["pretrained_cfg"], f"{key} in pretrained_cfg", sorted(recipe["pretrained_cfg"]))
    pixels_BCHW, backbone = _pixels(_side(student.pixels)), cast(Any, student.backbone.eval())
    with torch.no_grad():
        theirs, ours = net.forward_features(pixels_BCHW), backbone.forward_features(pixels_BCHW)
    _expect(torch.allclose(theirs, ours, atol=ATOL), "equal features", f"{(theirs - ours).abs().max():.1e} apart")
