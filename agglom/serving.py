"""Where a specialist, a teacher of chosen groups, is judged: in the groups of which it serves every image.

Elsewhere no row of a report and no verdict speaks of it, so that it can be neither the best teacher of patients whom it
was not made for, nor what a student has to match there. Imports no torch.

Shape suffixes: N rows of the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agglom.data.manifest import Manifest
from agglom.reading import Place


@dataclass(frozen=True)
class Serving:
    """`served` maps the predictor of each specialist (`teacher/<name>`) to the mask over N of whom it serves."""

    manifest: Manifest
    served: Mapping[str, np.ndarray]

    @staticmethod
    def of(manifest: Manifest, context: Mapping[str, Any]) -> Serving:
        """As the context of a report has it."""
        found: Mapping[str, tuple[str, Sequence[str]]] = context.get("serves", {})
        return Serving(manifest, {name: manifest.among(*serves) for name, serves in found.items()})

    def judged(self, predictor: str, place: Place) -> bool:
        """Whether a predictor, or each of a pair `a - b`, serves every image of a place (attribute, group).

        A group that is none of the attribute's stands for all of them: "all", or a point of a curve.
        """
        parts = [name for name in predictor.split(" - ") if name in self.served]
        if not parts:
            return True
        members = self.manifest.view(place[0]).members
        rows = members.get(place[1], np.arange(len(self.manifest)))
        return len(rows) > 0 and all(bool(self.served[name][rows].all()) for name in parts)
