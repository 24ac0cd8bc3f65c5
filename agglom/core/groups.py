"""From attribute columns to group ids, and from tables to sums per cell.

Shape suffixes: N manifest rows, B batch, T columns of the table, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agglom.core.types import CellStats


@dataclass(frozen=True)
class GroupSpace:
    """The groups of one attribute ("sex") or crossing ("sex*view").

    `values` names the groups in the order of their ids ("F", "M"; "F|AP", "F|PA", …); `index_N` is the id of each
    manifest row, −1 where any part is not annotated: an unknown group is no group, and never a minority.
    """

    name: str
    values: tuple[str, ...]
    index_N: Tensor


def encode(name: str, columns: Mapping[str, Sequence[str | None]]) -> GroupSpace:
    """Number the groups of `name`, an attribute or attributes joined by `*`, over the rows of `columns`.

    None marks a missing value. Values are in alphabetical order. A crossing is the full product of its parts, the
    last one fastest, so that a combination without patients is seen to have none.
    Raises ValueError for an attribute that is unknown or repeated, or for columns of unequal length.
    """
    parts = name.split("*")
    unknown = [part for part in parts if part not in columns]
    if unknown:
        raise ValueError(f"group {name!r}: unknown attribute {', '.join(unknown)}; known: {', '.join(columns)}")
    if len(set(parts)) < len(parts):
        raise ValueError(f"group {name!r}: an attribute is crossed with itself")
    if len({len(columns[part]) for part in parts}) > 1:
        raise ValueError(f"group {name!r}: columns of unequal length")
    values_of = [sorted({value for value in columns[part] if value is not None}) for part in parts]
    index_N = torch.zeros(len(columns[parts[0]]), dtype=torch.int64)
    missing_N = torch.zeros_like(index_N, dtype=torch.bool)
    for part, values in zip(parts, values_of, strict=True):
        id_of = {value: id for id, value in enumerate(values)} | {None: -1}
        id_N = torch.tensor([id_of[value] for value in columns[part]], dtype=torch.int64)
        missing_N |= id_N < 0
        index_N = index_N * len(values) + id_N
    names = tuple("|".join(combination) for combination in itertools.product(*values_of))
    return GroupSpace(name, names, index_N.masked_fill(missing_N, -1))


def clusters(number: int) -> tuple[str, ...]:
    """Names of groups that nobody has annotated."""
    return tuple(f"cluster {k}" for k in range(1, number + 1))


def joined(name: str, known: GroupSpace | None, cluster_N: Tensor, number: int) -> GroupSpace:
    """The groups of `known`, and for rows that have none the cluster (0 to `number` − 1; −1 unknown) as a group."""
    values = () if known is None else known.values
    index_N = torch.full_like(cluster_N, -1) if known is None else known.index_N
    proxy_N = torch.where(cluster_N >= 0, cluster_N + len(values), -1)
    return GroupSpace(name, values + clusters(number), torch.where(index_N >= 0, index_N, proxy_N))


def tally(group_B: Tensor, values_BT: Tensor, valid_BT: Tensor, groups: int) -> CellStats:
    """Sum `values_BT` and count its valid entries per cell, in float64; row `groups` holds ids of −1.

    Additive over micro-batches and ranks, detached, without host sync. A value that is not finite stays in its cell.
    """
    index_B = group_B.masked_fill(group_B < 0, groups)
    zeros_GT = torch.zeros(groups + 1, values_BT.shape[1], dtype=torch.float64, device=values_BT.device)
    values_BT = values_BT.detach().double().masked_fill(~valid_BT, 0.0)
    return CellStats(zeros_GT.index_add(0, index_B, values_BT), zeros_GT.index_add(0, index_B, valid_BT.double()))
