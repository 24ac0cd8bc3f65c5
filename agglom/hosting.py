"""How a teacher runs, whatever it is: its precision, how many images at a time, where its weights wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from agglom.core.tokens import to_float32
from agglom.core.types import Features, Teacher
from agglom.errors import PluginError
from agglom.job import TeacherSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MATMULS = (nn.Linear, nn.modules.conv._ConvNd)
Encode = Callable[[Tensor], Features]


def host(name: str, teacher: Teacher, spec: TeacherSpec, device: torch.device) -> Teacher:
    """The teacher as its part of the job wants it, on `device`. Its features are float32 and of the declared dims.

    dtype: under autocast; the weights of linear and convolutional layers, which it would cast at every call, are
    stored so, all others stay as they are. placement `cpu_swap`: the weights lie on the CPU and are copied to the
    device for the time of a call, so that the device holds those of one such teacher at a time; on the CPU it is the
    identity. A derived teacher computes on the features of its source, so it is only moved and checked.

    Raises PluginError where the weights are not in the module and something is asked that needs them there. What the
    teacher emits is checked at every call, without waiting for the device: PluginError where it is not of the
    declared dims, or its grid differs from that of an earlier batch of the same size.
    """
    check = _Check(name, teacher)
    if (derived := teacher.derived) is not None:
        teacher.module.to(device)
        return replace(
            teacher,
            encode=lambda pixels_BCHW: check(teacher.encode(pixels_BCHW), pixels_BCHW),
            derived=replace(derived, derive=lambda features: check(derived.derive(features), None)),
        )
    _needs_weights(name, teacher.module, spec)
    swapped = spec.placement == "cpu_swap" and device.type != "cpu"
    precision: Callable[[], AbstractContextManager] = nullcontext
    if spec.dtype != "fp32":
        for layer in teacher.module.modules():
            if isinstance(layer, MATMULS):
                layer.to(DTYPES[spec.dtype])
        precision = lambda: torch.autocast(device.type, DTYPES[spec.dtype])  # noqa: E731 - a factory of contexts
    place = _parked(teacher.module, device) if swapped else nullcontext
    if not swapped:
        teacher.module.to(device)
    inner = _compiled(name, teacher.encode) if spec.compile else teacher.encode

    @torch.no_grad()
    def encode(pixels_BCHW: Tensor) -> Features:
        chunks = pixels_BCHW.split(spec.micro_batch or max(1, len(pixels_BCHW)))
        with place(), precision():
            return _joined([check(to_float32(inner(chunk)), chunk) for chunk in chunks])

    return replace(teacher, encode=encode)


def facts(teacher: Teacher) -> dict[str, str | None]:
    """What an export and a report tell of a teacher."""
    origin = teacher.provenance
    return {
        "fingerprint": teacher.fingerprint,
        "licence": teacher.licence,
        "source": origin.source,
        "revision": origin.revision,
    }


def _needs_weights(name: str, module: nn.Module, spec: TeacherSpec) -> None:
    """Nothing of the configuration is ignored: weights that the module does not hold can be neither cast nor moved."""
    asked = {"dtype": spec.dtype != "fp32", "placement": spec.placement != "online", "compile": spec.compile}
    if any(parameter.is_floating_point() for parameter in module.parameters()):
        return
    for key in (key for key, value in asked.items() if value):
        raise PluginError(
            f"teachers.{name}.{key}: its weights are not parameters of its module (kind {spec.kind!r}), so this "
            "cannot be done to them; remove this key"
        )


def _parked(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context in which the tensors of `module` are on `device`. Copies go one way: parked tensors never change."""
    parts: list[Any] = [part for layer in module.modules() for part in (layer._parameters, layer._buffers)]
    slots = [(part, key) for part in parts for key, tensor in part.items() if tensor is not None]
    if device.type == "cuda":  # from pinned memory the host does not wait for a copy
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.pin_memory()
    homes = [part[key] for part, key in slots]

    @contextmanager
    def place() -> Iterator[None]:
        moved: dict[int, Tensor] = {}  # by the identity of the parked tensor: tied weights are copied once
        try:
            for (part, key), home in zip(slots, homes, strict=True):
                if id(home) not in moved:
                    copy = home.to(device, non_blocking=True)
                    moved[id(home)] = nn.Parameter(copy, False) if isinstance(home, nn.Parameter) else copy
                part[key] = moved[id(home)]
            yield
        finally:
            for (part, key), home in zip(slots, homes, strict=True):
                part[key] = home

    return place


def _compiled(name: str, encode: Encode) -> Encode:
    compiled = torch.compile(encode)

    def run(pixels_BCHW: Tensor) -> Features:
        try:
            return compiled(pixels_BCHW)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise PluginError(
                f"teachers.{name}.compile: torch.compile failed ({type(error).__name__}: {reason}); it needs a C++ "
                "compiler, and on an accelerator Triton; or remove this key"
            ) from error

    return run


def _joined(parts: list[Features]) -> Features:
    if len(parts) == 1:
        return parts[0]
    summaries = [part.summary_BD for part in parts if part.summary_BD is not None]
    patches = [part.patches_BND for part in parts if part.patches_BND is not None]
    return Features(torch.cat(summaries) if summaries else None, torch.cat(patches) if patches else None, parts[0].grid)


class _Check:
    """Whether features are what their teacher declares and what it gave before. Reads shapes only."""

    def __init__(self, name: str, teacher: Teacher) -> None:
        self.name, self.dims = name, teacher.dims
        self.grids: dict[tuple[int, ...], tuple[int, int]] = {}

    def __call__(self, features: Features, pixels_BCHW: Tensor | None) -> Features:
        """The same features. `pixels_BCHW`: what they were computed from, None where that is not images."""
        for kind, tensor, axes in (("summary", features.summary_BD, "BD"), ("patches", features.patches_BND, "BND")):
            if tensor is not None and tensor.ndim != len(axes):
                raise PluginError(
                    f"teachers.{self.name}: emits {kind} of shape {tuple(tensor.shape)}, expected the axes {axes}"
                )
            emitted, declared = None if tensor is None else tensor.shape[-1], getattr(self.dims, kind)
            if emitted != declared:
                raise PluginError(
                    f"teachers.{self.name}: emits {_width(emitted, kind)}, but declares {_width(declared, kind)}; "
                    "its plug-in must say what it emits"
                )
            if tensor is not None and pixels_BCHW is not None and len(tensor) != len(pixels_BCHW):
                raise PluginError(
                    f"teachers.{self.name}: emits {kind} of {len(tensor)} images for {len(pixels_BCHW)} images"
                )
        patches_BND, grid = features.patches_BND, features.grid
        if patches_BND is None:
            return features
        if grid[0] * grid[1] != patches_BND.shape[1]:
            raise PluginError(
                f"teachers.{self.name}: its grid is {grid[0]}×{grid[1]}, but it emits {patches_BND.shape[1]} patches"
            )
        if pixels_BCHW is not None:
            height, width = pixels_BCHW.shape[-2:]
            before = self.grids.setdefault((height, width), grid)
            if before != grid:
                raise PluginError(
                    f"teachers.{self.name}: its grid is {grid[0]}×{grid[1]} for images of {height}×{width} px, and was "
                    f"{before[0]}×{before[1]} for an earlier batch of that size; it must depend on the size alone"
                )
        return features


def _width(width: int | None, kind: str) -> str:
    return f"no {kind}" if width is None else f"{kind} of width {width}"
