"""A fairness-aware teacher out of any other: its features, from which no linear probe can read an attribute.

LEACE (Belrose et al. 2023, arXiv 2306.03819): the least change of the features, in the least-squares sense, that
makes them uncorrelated with the attribute. Fitted in one pass on the train patients, for summary and patches apart.
Linear erasure is linear: a kNN or an MLP may still read the attribute; the report measures both on other patients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from agglom.core.erase import CrossMoments, leace
from agglom.core.normalise import Moments
from agglom.core.types import Derived, Dims, Features, Teacher
from agglom.errors import PluginError

KINDS = ("summary", "patches")


def build(*, source: Teacher, source_name: str, attribute: str, shrink: float = 0.0) -> Teacher:
    """The teacher `source` without the linear trace of `attribute`.

    source, source_name: given by `source:` of the teacher, whose forward is shared; attribute: a column among
    `data.attributes`, or a crossing `sex*view`; shrink: in [0, 1], moves the covariance towards the identity, for few
    images. Raises PluginError; the fit raises ValueError where fewer than two groups are annotated.
    """
    if not 0 <= shrink <= 1:
        raise PluginError(f"teachers.erased: shrink is {shrink}, expected a number in [0, 1]")
    eraser = Eraser(source.dims, f"erased({source_name}, {attribute})", shrink).eval()
    identity = f"erased/{source.fingerprint}/{attribute}/{shrink!r}"
    return replace(
        source,
        module=eraser,
        encode=lambda pixels_BCHW: eraser(source.encode(pixels_BCHW)),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        derived=Derived(source=source_name, derive=eraser, attribute=attribute, fit=eraser.fit),
    )


class Eraser(nn.Module):
    """x ↦ x − M(x − μ) for summary and patches, float64 inside; μ (D), M (D, D) and `fitted` are its state."""

    fitted: Tensor

    def __init__(self, dims: Dims, name: str, shrink: float) -> None:
        super().__init__()
        self.name, self.shrink = name, shrink
        self.kinds = [kind for kind in KINDS if getattr(dims, kind) is not None]
        for kind in self.kinds:
            width = getattr(dims, kind)
            self.register_buffer(f"{kind}_mean_D", torch.zeros(width, dtype=torch.float64))
            self.register_buffer(f"{kind}_matrix_DD", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("fitted", torch.tensor(False))
        # A plain bool beside the tensor: asking the tensor at every step would wait for the accelerator.
        self.ready = False
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "ready", bool(module.fitted)))

    def forward(self, features: Features) -> Features:
        """The erased features. Raises PluginError before the fit."""
        if not self.ready:
            raise PluginError(f"{self.name} is used before it was fitted on the train patients")
        erased = {kind: self._erase(kind, features) for kind in self.kinds}
        return Features(erased.get("summary"), erased.get("patches"), features.grid)

    def _erase(self, kind: str, features: Features) -> Tensor:
        x = tokens(features, kind).double()
        mean_D, matrix_DD = getattr(self, f"{kind}_mean_D"), getattr(self, f"{kind}_matrix_DD")
        return (x - (x - mean_D) @ matrix_DD.T).float()

    @torch.no_grad()
    def fit(self, stream: Iterable[tuple[Features, Tensor]]) -> None:
        """Fit on (source features, group ids of the images, −1 where not annotated), streamed once.

        A patch token has the group of its image. Raises ValueError with the counts for fewer than two groups.
        """
        moments: dict[str, CrossMoments] = {}
        for features, group_B in stream:
            groups = int(group_B.max()) + 1 if len(group_B) else 0
            for kind in self.kinds:
                x = tokens(features, kind)
                x_ND = rearrange(x, "b ... d -> (b ...) d")
                before = moments.get(kind) or CrossMoments.empty(x.shape[-1], 0, x.device)
                group_N = group_B.repeat_interleave(len(x_ND) // max(1, len(x)))
                moments[kind] = widened(before, groups).update(x_ND, group_N)
        if not moments:
            raise ValueError("erasure: there is no image to fit it on")
        for kind in self.kinds:
            mean_D, matrix_DD = leace(moments[kind], self.shrink)
            getattr(self, f"{kind}_mean_D").copy_(mean_D)
            getattr(self, f"{kind}_matrix_DD").copy_(matrix_DD)
        self.fitted.fill_(True)
        self.ready = True


def tokens(features: Features, kind: str) -> Tensor:
    """Summary (B, D) or patches (B, N, D), which the source has declared."""
    found = features.summary_BD if kind == "summary" else features.patches_BND
    assert found is not None
    return found


def widened(moments: CrossMoments, groups: int) -> CrossMoments:
    """The same moments with room for `groups` groups: those that nobody had so far have mean and scatter 0."""
    more = max(0, groups - moments.groups)
    joint = moments.joint
    mean_D, scatter_DD = F.pad(joint.mean_D, (0, more)), F.pad(joint.scatter_DD, (0, more, 0, more))
    return CrossMoments(moments.groups + more, Moments(joint.count, mean_D, scatter_DD))
