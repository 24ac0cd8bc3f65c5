"""A teacher that teaches chosen patients only: the features of its source, for the groups that it serves.

For a model that is good, trained or licensed for some groups and not for others (one site, one device, children), and
for letting each group learn from the teacher that reads it best (`agglom check --doctor` says which). It shares the
forward of its source. The student learns from it on images of those groups alone, and its normaliser, its probes and
every comparison with it are fitted and read on them alone. An image whose group is not known has no part in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from torch import nn

from agglom.core.types import Derived, Serves, Teacher
from agglom.errors import PluginError


def build(*, source: Teacher, source_name: str, attribute: str, groups: list[str]) -> Teacher:
    """The teacher `source` for some patients.

    source, source_name: given by `source:` of the teacher, whose forward is shared; attribute: among `data.attributes`,
    or a crossing `sex*view`; groups: those of its values that the teacher serves, as the report names them (`F`,
    `F|AP`, `<50`). Raises PluginError.
    """
    if not groups or len(set(groups)) < len(groups):
        raise PluginError(f"teachers.specialist: groups is {groups}, expected one or several, each once")
    if source.serves is not None:
        raise PluginError(
            f"teachers.specialist: {source_name} serves {', '.join(source.serves.groups)} of {source.serves.attribute} "
            "only; name a teacher of everybody as the source, and a crossing such as sex*view as the attribute"
        )
    identity = f"specialist/{source.fingerprint}/{attribute}/{','.join(sorted(groups))}"
    origin = source.provenance
    return replace(
        source,
        module=nn.Identity().eval(),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        provenance=replace(origin, source=f"{origin.source}, for {attribute} {', '.join(groups)} only"),
        derived=Derived(source=source_name, derive=lambda features: features),
        serves=Serves(attribute, tuple(groups)),
    )
