"""A fairness-aware teacher out of any other and a label: what a group-robust head makes of its summary.

One hidden layer on the frozen summary, trained to tell the label in the worst of the cells (label × group): group DRO
(Sagawa et al. 2020, arXiv 1911.08731) under a strong L2 penalty, without which, as they show, a head that can fit every
training image is no more robust than an ordinary one. The student learns its hidden activations: the directions of the
source that help where an ordinary head would take a short cut, and none that it does without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agglom.core.fitted import Fitted
from agglom.core.types import Derived, Dims, Features, Teacher
from agglom.errors import PluginError


def build(
    *,
    source: Teacher,
    source_name: str,
    label: str,
    attribute: str,
    hidden: int = 64,
    l2: float = 0.03,
    eta: float = 0.1,
    steps: int = 500,
    lr: float = 0.01,
    seed: int = 0,
) -> Teacher:
    """The hidden activations of a group-robust head on the summary of `source`, for one label and one attribute.

    source, source_name: given by `source:` of the teacher, whose forward is shared; label: among `data.labels`;
    attribute: among `data.attributes` (its bins, where it is continuous), or a crossing `sex*view`; hidden: the width
    of the embedding; l2: of all weights but the biases; eta: how fast the weight of a cell follows its loss (0 is
    ordinary training); steps, lr: of Adam on all images at once. Raises PluginError; the fit raises ValueError where
    the label or the attribute does not vary.
    """
    if source.dims.summary is None:
        raise PluginError(f"teachers.group_dro_probe: {source_name} has no summary to put a head on")
    wanted = {"hidden": (hidden, 1), "l2": (l2, 0), "eta": (eta, 0), "steps": (steps, 1), "lr": (lr, 0)}
    wrong = [
        f"{name} is {value}, expected at least {least}" for name, (value, least) in wanted.items() if value < least
    ]
    if wrong:
        raise PluginError(f"teachers.group_dro_probe: {'; '.join(wrong)}")
    how = Recipe(hidden, l2, eta, steps, lr, seed)
    probe = Probe(source.dims.summary, f"group_dro_probe({source_name}, {label}, {attribute})", label, attribute, how)
    identity = f"group_dro_probe/{source.fingerprint}/{label}/{attribute}/{tuple(how)}"
    origin = source.provenance
    return replace(
        source,
        module=probe.eval().requires_grad_(False),
        encode=lambda pixels_BCHW: probe(source.encode(pixels_BCHW)),
        dims=Dims(hidden, None),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        provenance=replace(origin, source=f"{origin.source}, a head for {label}, robust over {attribute}"),
        derived=Derived(source=source_name, derive=probe, groups=(attribute,), labels=(label,), fit=probe.fit),
        text=None,
    )


class Recipe(NamedTuple):
    """How a head is trained, see `build`."""

    hidden: int
    l2: float
    eta: float
    steps: int
    lr: float
    seed: int


class Probe(Fitted):
    """summary ↦ GELU(Wx + b) / scale. W takes the features as they are; `scale` makes the mean square of a dimension 1.

    Not centred: an angular loss reads directions from the origin, and the average patient would have none.
    """

    weight_HD: Tensor
    bias_H: Tensor
    scale: Tensor

    def __init__(self, width: int, name: str, label: str, attribute: str, how: Recipe) -> None:
        super().__init__()
        self.name, self.label, self.attribute, self.how = name, label, attribute, how
        self.register_buffer("weight_HD", torch.zeros(how.hidden, width))
        self.register_buffer("bias_H", torch.zeros(how.hidden))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, features: Features) -> Features:
        """The embedding as the summary, without patches. Raises PluginError before the fit."""
        if not self.ready:
            raise PluginError(f"{self.name} is used before it was fitted on the train patients")
        assert features.summary_BD is not None
        return Features(F.gelu(F.linear(features.summary_BD.float(), self.weight_HD, self.bias_H)) / self.scale, None)

    def fit(self, stream: Iterable[tuple[Features, dict[str, Tensor]]]) -> None:
        """Fit on (source features, columns of label and attribute), see `Derived`.

        It keeps all summaries in float32, 4·D bytes an image (12 MB of 3,000 images and D = 1,024), and those of known
        label and group are used. Raises ValueError where they hold one label or one group.
        """
        summaries, labels, groups = [], [], []
        for features, columns in stream:
            assert features.summary_BD is not None
            summaries.append(features.summary_BD.float())
            labels.append(columns[self.label])
            groups.append(columns[self.attribute])
        if not summaries:
            raise ValueError("group_dro_probe: there is no image to fit it on")
        x_ND, y_N, group_N = torch.cat(summaries), torch.cat(labels), torch.cat(groups)
        known_N = ~y_N.isnan() & (group_N >= 0)
        for what, name, mine_N in (("label", self.label, ~y_N.isnan()), ("attribute", self.attribute, group_N >= 0)):
            if not mine_N.any():
                raise ValueError(f"{what} {name!r} is unknown in all {len(mine_N)} images; expected two values")
        x_ND, y_N, group_N = x_ND[known_N], y_N[known_N].float(), group_N[known_N]
        for what, name, column in (("label", self.label, y_N), ("attribute", self.attribute, group_N)):
            if len(column.unique()) < 2:
                raise ValueError(
                    f"{what} {name!r} has one value in the {len(column)} images of known label and group; expected two"
                )
        head = train(x_ND, y_N, group_N, self.how)
        self.weight_HD.copy_(head.weight_HD)
        self.bias_H.copy_(head.bias_H)
        self.scale.copy_(F.gelu(F.linear(x_ND, head.weight_HD, head.bias_H)).square().mean().sqrt())
        self.done()


class Head(NamedTuple):
    """logit = v·GELU(Wx + b) + c, on raw features."""

    weight_HD: Tensor
    bias_H: Tensor
    readout_H: Tensor
    offset: Tensor


def train(x_ND: Tensor, y_N: Tensor, group_N: Tensor, how: Recipe) -> Head:
    """Group DRO over the cells (label, group) that occur: min over the head of Σ_c q_c·ℓ_c + ½·l2·‖weights‖².

    ℓ_c is the mean cross-entropy of a cell, and q_c ← q_c·exp(η·ℓ_c), normalised, at every step (Sagawa et al.,
    algorithm 1, with all images in each step). q starts at the shares of the cells, so that η = 0 is ordinary training.
    The features (float32) are standardised inside; a dimension that does not vary is left out. Seeded.
    """
    mean_D, std_D = x_ND.mean(0), x_ND.std(0, correction=0)
    inverse_D = torch.where(std_D > 1e-6 * std_D.max(), 1 / std_D, 0.0)
    z_ND = (x_ND - mean_D) * inverse_D
    _, cell_N, count_C = torch.unique(2 * group_N + y_N.long(), return_inverse=True, return_counts=True)
    member_NC = F.one_hot(cell_N).to(x_ND) / count_C
    q_C = count_C / len(x_ND)
    draw = torch.Generator().manual_seed(how.seed)
    weight_HD = torch.randn(how.hidden, x_ND.shape[1], generator=draw) / x_ND.shape[1] ** 0.5
    readout_H = torch.randn(how.hidden, generator=draw) / how.hidden**0.5
    head = Head(weight_HD, torch.zeros(how.hidden), readout_H, torch.zeros(()))
    with torch.enable_grad():
        for tensor in head:
            tensor.requires_grad_()
        optimizer = torch.optim.Adam(head, how.lr)
        for _ in range(how.steps):
            logit_N = F.gelu(F.linear(z_ND, head.weight_HD, head.bias_H)) @ head.readout_H + head.offset
            loss_C = F.binary_cross_entropy_with_logits(logit_N, y_N, reduction="none") @ member_NC
            q_C = torch.softmax(q_C.log() + how.eta * loss_C.detach(), 0)
            penalty = head.weight_HD.square().sum() + head.readout_H.square().sum()
            optimizer.zero_grad()
            (q_C @ loss_C + how.l2 / 2 * penalty).backward()
            optimizer.step()
    weight_HD, bias_H, *rest = (tensor.detach() for tensor in head)
    raw_HD = weight_HD * inverse_D
    return Head(raw_HD, bias_H - raw_HD @ mean_D, *rest)
