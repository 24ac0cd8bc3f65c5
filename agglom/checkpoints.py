"""Where a run stands, and its checkpoints: what goes on from one repeats the uninterrupted run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from agglom.assemble import IDENTITY, Run
from agglom.core.types import CellStats
from agglom.engine import Engine, latest
from agglom.journal import disk


@dataclass(frozen=True)
class State:
    """Where a run stands, besides its weights: `step` optimizer steps are done, `window` is not logged yet."""

    step: int
    balance: dict[str, Tensor]
    window: CellStats


def identity(run: Run) -> dict[str, str]:
    return run.trained | {"ranks": str(run.world.size)}


def save(run: Run, engine: Engine, state: State) -> Path:
    folder, tag = run.out / "checkpoints", f"step-{state.step:08d}"
    if latest(folder) == tag:
        return folder / tag

    run.world.on_main(lambda: identify(folder / tag, identity(run)))
    kept = {
        "step": state.step,
        "balance": {key: value.cpu() for key, value in state.balance.items()},
        "window": tuple(tensor.cpu() for tensor in state.window),
    }
    engine.save(folder, tag, kept, run.job.log.keep)
    return folder / tag


def identify(folder: Path, identity: Mapping[str, str]) -> None:
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / IDENTITY).write_text(json.dumps(identity, indent=1))


def restore(run: Run, engine: Engine, checkpoint: Path) -> State:
    kept = engine.load(checkpoint.parent, checkpoint.name)
    device = run.world.device
    return State(
        kept["step"],
        {key: value.to(device) for key, value in kept["balance"].items()},
        CellStats(*(tensor.to(device) for tensor in kept["window"])),
    )
