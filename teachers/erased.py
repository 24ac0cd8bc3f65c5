"""A fairness-aware teacher out of any other: its features, from which no linear probe can read some attributes.

LEACE (Belrose et al. 2023, arXiv 2306.03819): the least change of the features, in the least-squares sense, that
makes them uncorrelated with the attributes. Fitted in one pass on the train patients, for summary and patches apart.
Linear erasure is linear: a kNN or an MLP may still read an attribute. The report reads it by a linear probe of other
patients than the eraser has seen, `bench/erasure.py` by nearest neighbours as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from agglom.core.erase import CrossMoments, leace, oas
from agglom.core.fitted import Fitted
from agglom.core.normalise import Moments
from agglom.core.types import Derived, Dims, Features, Teacher
from agglom.errors import PluginError

KINDS = ("summary", "patches")


def build(
    *, source: Teacher, source_name: str, attribute: str | list[str], shrink: float | Literal["auto"] = 0.0
) -> Teacher:
    """The teacher `source` without the linear trace of one attribute, or of several at once.

    source, source_name: given by `source:` of the teacher, whose forward is shared; attribute: among `data.attributes`
    (of a continuous one its value goes, not its bins), or a crossing `sex*view`; shrink: in [0, 1], moves the
    covariance towards the identity, for few images; auto: by as much as their number asks for (OAS). Raises
    PluginError; the fit raises ValueError for an attribute that is constant or unknown.
    """
    attributes = (attribute,) if isinstance(attribute, str) else tuple(attribute)
    if not attributes or len(set(attributes)) < len(attributes):
        raise PluginError(f"teachers.erased: attribute is {attribute}, expected one or several, each once")
    if shrink != "auto" and not 0 <= shrink <= 1:
        raise PluginError(f"teachers.erased: shrink is {shrink}, expected a number in [0, 1] or auto")
    eraser = Eraser(source.dims, f"erased({source_name}, {', '.join(attributes)})", attributes, shrink).eval()
    identity = f"erased/{source.fingerprint}/{','.join(attributes)}/{shrink!r}"
    origin = source.provenance
    return replace(
        source,
        module=eraser,
        encode=lambda pixels_BCHW: eraser(source.encode(pixels_BCHW)),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        provenance=replace(origin, source=f"{origin.source}, without the linear trace of {', '.join(attributes)}"),
        derived=Derived(source=source_name, derive=eraser, attributes=attributes, fit=eraser.fit),
    )


class Eraser(Fitted):
    """x ↦ x − M(x − μ) for summary and patches, float64 inside; μ (D), M (D, D) and `fitted` are its state."""

    def __init__(self, dims: Dims, name: str, attributes: tuple[str, ...], shrink: float | Literal["auto"]) -> None:
        super().__init__()
        self.name, self.attributes, self.shrink = name, attributes, shrink
        self.kinds = [kind for kind in KINDS if getattr(dims, kind) is not None]
        for kind in self.kinds:
            width = getattr(dims, kind)
            self.register_buffer(f"{kind}_mean_D", torch.zeros(width, dtype=torch.float64))
            self.register_buffer(f"{kind}_matrix_DD", torch.zeros(width, width, dtype=torch.float64))

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
    def fit(self, stream: Iterable[tuple[Features, dict[str, Tensor]]]) -> None:
        """Fit on (source features, columns of the attributes), see `Derived`, streamed once.

        A patch token has the group or the value of its image. Raises ValueError for an attribute that is constant or
        unknown, by name.
        """
        images, moments, crossed = 0, dict[str, Moments](), dict[str, dict[str, CrossMoments]]()
        for features, columns in stream:
            for kind in self.kinds:
                x = tokens(features, kind)
                x_ND = rearrange(x, "b ... d -> (b ...) d")
                moments[kind] = moments.get(kind, Moments.empty(x.shape[-1])).update(x_ND)
                mine = crossed.setdefault(kind, {name: CrossMoments.empty(x.shape[-1]) for name in self.attributes})
                for name in self.attributes:
                    mine[name] = mine[name].update(x_ND, columns[name].repeat_interleave(len(x_ND) // max(1, len(x))))
            images += len(x)
        if not images:
            raise ValueError("erasure: there is no image to fit it on")
        for kind in self.kinds:
            shrink = oas(moments[kind], images) if self.shrink == "auto" else self.shrink
            mean_D, matrix_DD = leace(moments[kind], crossed[kind], shrink)
            getattr(self, f"{kind}_mean_D").copy_(mean_D)
            getattr(self, f"{kind}_matrix_DD").copy_(matrix_DD)
        self.done()


def tokens(features: Features, kind: str) -> Tensor:
    """Summary (B, D) or patches (B, N, D), which the source has declared."""
    found = features.summary_BD if kind == "summary" else features.patches_BND
    assert found is not None
    return found
