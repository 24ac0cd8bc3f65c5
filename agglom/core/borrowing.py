"""What a teacher would say to a group that it does not know, from images that are alike in groups that it knows.

A teacher that reads a group poorly teaches it nothing, and where it is merely weighed down there, the student is not
told what images of the group have in common with those of others in the eyes of that teacher. So the target is
borrowed. The teachers that do know the group say which images of other groups are most like this one, and the target is
the mean of what the first teacher says of those: regression by nearest neighbours, from the features of some teachers
to those of another. An image of which the first teacher is found to be as sure as these keeps its own target.
Labels take part only in that reliability was measured by them.

Shape suffixes: B batch, N rows of the manifest, M images of the bank, L of these that lend, C nearest ones, K features
by which images are compared, D features of the summary that is lent, G groups, S teachers, J loans, X groups or
images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# How far below the best teacher of a group, in AUROC, one still knows it.
CLOSE = 0.05
# Among fewer images the nearest is not near.
LEAST = 30
# Below this skill (2·AUROC − 1) of its best teacher nobody has shown that a group can be taught.
SKILLED = 0.2

Lend = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]  # see `lender`


class Bank(NamedTuple):
    """Train images that may lend: their group (M, −1 not known), and the summary (M, D) of each teacher in a loan."""

    group_M: Tensor
    summary: dict[str, Tensor]

    def to(self, device: torch.device) -> Bank:
        return Bank(self.group_M.to(device), {name: one_MD.to(device) for name, one_MD in self.summary.items()})


class Loan(NamedTuple):
    """`teacher` does not know the groups `to`, knows the groups `of`, and `by` are the teachers that know `to`."""

    teacher: int
    by: tuple[int, ...]
    of: tuple[int, ...]
    to: tuple[int, ...]


def loans(right_GS: Tensor, taking_part_GS: Tensor, count_G: Tensor) -> tuple[Loan, ...]:
    """Who borrows, by AUROC in each group (NaN not known), among the teachers that take part in a group (bool).

    `count_G`: the images of each group that may lend; fewer than LEAST in all lend nothing.
    """
    right_GS = torch.where(taking_part_GS, right_GS, torch.nan)
    best_G1 = right_GS.nan_to_num(-1.0).amax(1, keepdim=True)
    knows_GS = (right_GS >= best_G1 - CLOSE) & (2 * best_G1 - 1 >= SKILLED)
    lacks_GS = (right_GS < best_G1 - CLOSE) & knows_GS.any(1, keepdim=True)
    found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for group, teacher in torch.nonzero(lacks_GS).tolist():
        if int(count_G[knows_GS[:, teacher]].sum()) >= LEAST:
            by = tuple(torch.nonzero(knows_GS[group])[:, 0].tolist())
            found.setdefault((teacher, by), []).append(group)
    return tuple(
        Loan(teacher, by, tuple(torch.nonzero(knows_GS[:, teacher])[:, 0].tolist()), tuple(to))
        for (teacher, by), to in found.items()
    )


def reliable(right_XS: Tensor, group_X: Tensor, given: Sequence[Loan]) -> Tensor:
    """How reliable teachers are (X × S), of groups or of images of these groups, once targets are borrowed: as those
    are who choose the images, on average, and never less than by themselves."""
    found_XS = right_XS.clone()
    for loan in given:
        own_X, chosen_X = found_XS[:, loan.teacher], _choosing(right_XS, loan)
        found_XS[:, loan.teacher] = torch.where(among(group_X, loan.to), torch.fmax(own_X, chosen_X), own_X)
    return found_XS


def _choosing(right_XS: Tensor, loan: Loan) -> Tensor:
    return right_XS[:, list(loan.by)].mean(1)


def among(group_X: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Which are of some groups (bool)."""
    return (group_X[..., None] == torch.tensor(groups, device=group_X.device)).any(-1)


def borrowers(sure_NS: Tensor, group_N: Tensor, given: Sequence[Loan]) -> Tensor:
    """Which images take part in a loan (N × J, bool): those of which its teacher is less sure than those who choose,
    and where that is not known (NaN), all of the group."""
    knows_NJ = torch.stack([sure_NS[:, loan.teacher] >= _choosing(sure_NS, loan) for loan in given], 1)
    return torch.stack([among(group_N, loan.to) for loan in given], 1) & ~knows_NJ


def lender(given: Sequence[Loan], names: tuple[str, ...], bank: Bank, neighbours: int, asks_NJ: Tensor) -> Lend:
    """What takes summaries (B, D) by teacher and rows of the manifest (B) to the same summaries with borrowed ones in
    the places of those that ask for it (`borrowers`).

    Distances are Euclidean, between the summaries of the teachers that choose, each centred and scaled to a total
    variance of 1 over the bank. Of few images not all are near: there are at most √L neighbours of L that lend. No host
    sync.
    """
    mean = {name: one_MD.mean(0) for name, one_MD in bank.summary.items()}
    scale = {name: one_MD.var(0).sum().sqrt().clamp(min=1e-12) for name, one_MD in bank.summary.items()}

    def keys(summary: Mapping[str, Tensor], by: tuple[int, ...], rows: Tensor | slice) -> Tensor:
        chosen = [(names[one], summary[names[one]][rows].float()) for one in by]
        return torch.cat([(one_BD - mean[name]) / scale[name] for name, one_BD in chosen], 1)

    terms: list[tuple[Loan, Tensor, Tensor, Tensor]] = []
    for loan, asks_N in zip(given, asks_NJ.T, strict=True):
        rows_L = torch.nonzero(among(bank.group_M, loan.of))[:, 0]
        terms.append((loan, keys(bank.summary, loan.by, rows_L), bank.summary[names[loan.teacher]][rows_L], asks_N))

    def lend(summary: Mapping[str, Tensor], row_B: Tensor) -> dict[str, Tensor]:
        told = dict(summary)
        for loan, keys_LK, lent_LD, asks_N in terms:
            away_BL = torch.cdist(keys(summary, loan.by, slice(None)), keys_LK)
            nearest_BC = away_BL.topk(min(neighbours, math.isqrt(len(lent_LD))), largest=False).indices
            borrowed_BD = lent_LD[nearest_BC].mean(1)
            name, asks_B1 = names[loan.teacher], asks_N[row_B][:, None]
            told[name] = torch.where(asks_B1, borrowed_BD.to(told[name].dtype), told[name])
        return told

    return lend
