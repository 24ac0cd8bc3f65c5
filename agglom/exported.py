"""The export of a run, read back: the student with its heads, without the engine that trained it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from agglom import plugins
from agglom.core.heads import Distiller
from agglom.core.types import Dims
from agglom.errors import DataError

WEIGHTS, HEADS, CONFIG = "model.safetensors", "heads.safetensors", "config.json"
OWN = "student.py"  # the plug-in of a student of the user's own travels along


def load(folder: Path) -> Distiller:
    """The exported student with its heads: `model(pixels in [0, 1]) -> (Features, {teacher: raw Features})`.

    Raises DataError where a file is missing or does not fit.
    """
    try:
        stored = json.loads((folder / CONFIG).read_text())["agglom"]
        weights, heads = load_file(folder / WEIGHTS), load_file(folder / HEADS)
        kind = stored["student"]["kind"]
        kind = str(folder / kind) if kind.endswith(".py") else kind
        student = plugins.build(kind, "students", stored["student"]["options"])
        student.backbone.load_state_dict(weights)
        settings = stored["heads"] | {"class_tokens": student.class_tokens, "levels": student.levels}
        targets = {name: Dims(**dims) for name, dims in settings.pop("targets").items()}
        model = Distiller(student.module, student.dims, targets, **settings)
        model.heads.load_state_dict(heads)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: not an export of agglom ({error}); write it again with `agglom export`") from error
    return model.eval()
