"""A program that `torch.export.save` has written (`.pt2`), as a teacher: any network, without the code that made it.

Source: https://docs.pytorch.org/docs/stable/export.html; the licence is that of the weights: `teachers.X.licence`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from agglom.core.tokens import Conditioner, freeze, from_outputs, to_float32
from agglom.core.types import Features, PixelSpec, Provenance, Teacher
from agglom.errors import PluginError
from agglom.weights import file_digest, file_of, measured, settled_side


def build(
    *,
    file: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    patch: int,
    size: int | None = None,
    summary: int | str | None = None,
    patches: int | str | None = None,
    prefix: int = 0,
    origin: str | None = None,
) -> Teacher:
    """A frozen exported program of one input, images (B, 3, H, W) normalised by mean and std.

    file: as `torch.export.save` writes it; mean, std: for pixels in [0, 1]; patch: pixels per cell of the grid; size:
    pin the side of the input in pixels (default: that of the program, else it follows the stage); summary, patches:
    which outputs, by position or by name of a dict, and the same for both where it holds all tokens; prefix: class and
    register tokens before the patches; origin: where the weights come from. Raises PluginError.
    """
    path = file_of("teachers.torch_export", file)
    if summary is None and patches is None:
        raise PluginError("teachers.torch_export: name the output that is the summary, or the one that is the patches")
    try:
        if not zipfile.is_zipfile(path):  # of which the library would log a traceback
            raise ValueError("not an archive")
        program = torch.export.load(path)
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PluginError(
            f"teachers.torch_export: {path}: not a program that torch {torch.__version__} has exported ({reason})"
        ) from error
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    shape: Sequence[Any] = inputs[0].meta["val"].shape if len(inputs) == 1 else ()
    side = settled_side("teachers.torch_export", path.name, shape, size)
    module = freeze(Program(program.module(), mean, std))
    single = isinstance(shape[0], int)  # and then 1

    def encode(pixels_BCHW: Tensor) -> Features:
        if single and len(pixels_BCHW) != 1:
            raise PluginError(
                f"teachers.torch_export: '{path.name}' takes one image at a time: set micro_batch: 1, or export it "
                "with a batch of any number"
            )
        output = module(pixels_BCHW)
        pooled, tokens = (None if which is None else _pick(output, which, path.name) for which in (summary, patches))
        return to_float32(from_outputs(pixels_BCHW, pooled, tokens, patch, prefix))

    dims, _ = measured("teachers.torch_export", path.name, encode, patch, side)
    return Teacher(
        module=module,
        encode=encode,
        dims=dims,
        pixels=PixelSpec(mean=tuple(mean), std=tuple(std), patch=patch, size=side),
        fingerprint=file_digest([path]),
        licence="unknown",
        provenance=Provenance(origin or path.name),
    )


def _pick(output: Any, which: int | str, file: str) -> Tensor:
    """One output of the program. Raises PluginError that lists what there is."""
    if isinstance(output, Mapping) and isinstance(which, str):
        known: Any = output
    else:
        known = dict(enumerate(tree_leaves(output)))
    if which not in known:
        listed = ", ".join(f"{key} {tuple(value.shape)}" for key, value in known.items())
        raise PluginError(f"teachers.torch_export: '{file}' has no output {which!r}; it has {listed}")
    return known[which]


class Program(nn.Module):
    """Pixels in [0, 1] (B, 3, H, W) → what the exported program returns."""

    def __init__(self, program: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.condition = Conditioner(mean, std)
        self.program = program
        self.device = torch.device("cpu")

    def forward(self, pixels_BCHW: Tensor) -> Any:
        if pixels_BCHW.device != self.device:
            self._retarget(pixels_BCHW.device)
        return self.program(self.condition(pixels_BCHW))

    def train(self, mode: bool = True) -> Program:
        """Sets a flag only: a program is exported in one mode and refuses to change it."""
        for module in self.modules():
            module.training = mode
        return self

    def _retarget(self, device: torch.device) -> None:
        """Tensors that the program makes, positions for instance, are made on the device that it was exported on."""
        for node in self.program.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.update_kwarg("device", device)
        self.program.recompile()
        self.device = device
