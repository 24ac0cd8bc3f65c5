"""Zero-shot: what texts say of images, in the space that a teacher's summary shares with its text tower.

The protocol of CLIP (Radford et al. 2021, arXiv 2103.00020, section 3.1.4): the embedded texts of a side are
normalised, averaged and normalised again, and the cosines of an image to the sides, times the teacher's scale, pass a
softmax. The sides of a label are its positive and its negative prompts; those of a class of a column may be the classes
of that column. The student is read through its summary head for a teacher, with the text tower of that teacher.

Shape suffixes: N images, S sides, D width of the summary, E of the space shared with text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglom import probes
from agglom.core.types import Teacher, Text
from agglom.errors import ConfigError
from agglom.job import Prompts
from agglom.probes import Readout

if TYPE_CHECKING:
    from agglom.assemble import Run

Side = tuple[str, ...]


@dataclass(frozen=True)
class Prompted:
    """What remains of a teacher's text side when its tower is gone: by label, the directions (S, E, float64) of its
    sides, its own first."""

    project: Callable[[Tensor], Tensor]
    scale: float
    sides: dict[str, Tensor]

    @torch.no_grad()
    def logit(self, label: str, summary_ND: Tensor) -> np.ndarray:
        """The logit of the label's probability under the softmax (N, float64), exact where that rounds to 0 or 1."""
        image_NE = F.normalize(self.project(summary_ND).double(), dim=1)
        z_NS = self.scale * image_NE @ self.sides[label].T
        return (z_NS[:, 0] - z_NS[:, 1:].logsumexp(1)).numpy()


def check(run: Run) -> None:
    """Raises ConfigError where there are prompts but nobody to read them, or not the teacher that the job names."""
    evaluate, able = run.job.evaluate, list(_able(run.teachers))
    name = evaluate.prompted_by
    if not evaluate.prompts:
        return
    if not able:
        raise ConfigError(
            f"evaluate.prompts: no teacher has a text tower ({', '.join(run.teachers)}); "
            "add a teacher of images and text, or remove the prompts"
        )
    if name is not None and name not in able:
        raise ConfigError(f"evaluate.prompted_by: {name!r} has no text tower; those that have one: {', '.join(able)}")
    if name is not None and not _learnt(run, name):
        raise ConfigError(
            f"evaluate.prompted_by: the student learns no summary of {name!r}; name it in a stage, and keep "
            "loss.summary_weight above 0"
        )


def reader(run: Run) -> str | None:
    """The teacher through which the student is read: the one that the job names, else the first by name that can, those
    that are derived from another last.

    None where there are no prompts, or the student learns the summary of no teacher with a text tower.
    """
    evaluate = run.job.evaluate
    able = [name for name in _able(run.teachers) if _learnt(run, name)] if evaluate.prompts else []
    if evaluate.prompted_by in able:
        return evaluate.prompted_by
    return min(able, key=lambda name: (run.teachers[name].derived is not None, name), default=None)


@torch.no_grad()
def embed(teachers: Mapping[str, Teacher], prompts: Mapping[str, Prompts]) -> dict[str, Prompted]:
    """By teacher with a text tower, the embedded prompts. A tower is in memory while it is used, one at a time.

    Raises PluginError where a tower cannot be loaded or a prompt is too long for it.
    """
    found: dict[Callable[[], Text], Prompted] = {}
    able = _able(teachers) if prompts else {}
    for load in able.values():
        if load not in found:  # derived teachers have that of their source
            found[load] = _embed(load(), prompts)
    return {name: found[load] for name, load in able.items()}


def readout(prompted: Prompted, label: str, summary_ND: Tensor, label_N: np.ndarray, val_N: np.ndarray) -> Readout:
    """Calibrated zero-shot probabilities of `label`; `val_N` is the mask of validation rows where it is known."""
    from scipy.special import expit

    logit_N = prompted.logit(label, summary_ND)
    # Cosines of a label may differ in the third decimal: Platt's scaling is fitted on their spread.
    spread = logit_N[val_N].std() if val_N.any() else 0.0
    standard_N = (logit_N - logit_N[val_N].mean()) / spread if spread else logit_N
    return probes.calibrated(expit(logit_N), label_N, val_N, standard_N)


def _able(teachers: Mapping[str, Teacher]) -> dict[str, Callable[[], Text]]:
    return {name: t.text for name, t in teachers.items() if t.text is not None and t.dims.summary is not None}


def _learnt(run: Run, name: str) -> bool:
    return name in run.targets and run.targets[name].summary is not None


def _embed(text: Text, prompts: Mapping[str, Prompts]) -> Prompted:
    sides = {label: _sides(label, prompts) for label in prompts}
    mean_E: dict[Side, Tensor] = {}
    for side in dict.fromkeys(side for several in sides.values() for side in several):
        mean_E[side] = F.normalize(F.normalize(text.embed(side).double(), dim=1).mean(0), dim=0)
    side_SE = {label: torch.stack([mean_E[side] for side in several]) for label, several in sides.items()}
    return Prompted(text.project, text.scale, side_SE)


def _sides(label: str, prompts: Mapping[str, Prompts]) -> list[Side]:
    """The texts of the label, then those of each side that it is told from."""
    positive, negative = prompts[label].positive, prompts[label].negative
    if negative:
        return [positive, negative]
    column = label.partition("=")[0]
    others = [name for name in prompts if name != label and name.startswith(f"{column}=")]
    return [positive, *(prompts[name].positive for name in others)]
