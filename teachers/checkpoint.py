"""A student that agglom has exported, as a teacher: many teachers → a large student → small ones (proxy teachers).

Small students learn less from many teachers at once than from one large student of them (EUPE's proxy teacher).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from agglom import exported
from agglom.core.tokens import freeze, to_float32, weights_digest
from agglom.core.types import Features, PixelSpec, Provenance, Teacher
from agglom.errors import AgglomError, PluginError
from agglom.weights import measured


def build(
    *, folder: str | None = None, stage: str | None = None, head: str | None = None, size: int | None = None
) -> Teacher:
    """A frozen student with its heads.

    folder: the `export/` of a run; stage: instead, the last stage of an earlier student of the same job, which the
    engine turns into that folder; head: serve the features that it predicts of this teacher (default: its own); size:
    pin the side of the input in pixels (default: it follows the stage, unless the student itself was pinned). It knows
    the sizes that it was trained at: other ones are a risk that `evaluate.sizes` shows. Raises PluginError.

    Its licence lists those of the teachers that it learnt from.
    """
    if folder is None:
        missing = "folder is missing" if stage is None else f"the student of stage '{stage}' is not exported yet"
        raise PluginError(f"teachers.checkpoint: {missing}; name the export/ of a run")
    place = Path(folder)
    try:
        model = exported.load(place)
        stored = json.loads((place / exported.CONFIG).read_text(encoding="utf-8"))["agglom"]
    except AgglomError as error:
        raise PluginError(f"teachers.checkpoint: {error}") from error
    if head is not None and head not in model.teachers:
        raise PluginError(f"teachers.checkpoint: {place} has no head '{head}'; it has {', '.join(model.teachers)}")
    module = freeze(model)
    pixels = stored["pixels"]
    side = size or (pixels["size"] if pixels["pinned"] else None)

    @torch.no_grad()
    def encode(pixels_BCHW: Tensor) -> Features:
        trunk, predicted = module(pixels_BCHW)
        return to_float32(trunk if head is None else predicted[head])

    dims, _ = measured("teachers.checkpoint", folder, encode, pixels["patch"], side)
    return Teacher(
        module=module,
        encode=encode,
        dims=dims,
        pixels=PixelSpec(mean=tuple(pixels["mean"]), std=tuple(pixels["std"]), patch=pixels["patch"], size=side),
        fingerprint=weights_digest(module, f"checkpoint/{head}/{side}"),
        licence="; ".join(sorted({part for one in stored["teachers"].values() for part in one["licence"].split("; ")})),
        provenance=Provenance(f"student of {', '.join(stored['teachers'])}, by agglom {stored['version']}"),
    )
