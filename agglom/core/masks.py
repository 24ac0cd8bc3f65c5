"""Overlap of masks, one value for each image; `metrics.mean` makes an estimate of them.

Suffixes: N images, H W pixels.
"""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor


def dice(pred_NHW: Tensor, truth_NHW: Tensor) -> Tensor:
    """2 |A ∩ B| / (|A| + |B|) of each image, float64 (N,); NaN where both masks are empty (Dice 1945, Ecology 26).

    Masks are bool or hold 0 and 1 only; a mask of several classes is one call for each. Raises ValueError for shapes
    that differ and for other values.
    """
    both_N, pred_N, truth_N = _areas(pred_NHW, truth_NHW)
    return 2 * both_N / (pred_N + truth_N)


def iou(pred_NHW: Tensor, truth_NHW: Tensor) -> Tensor:
    """|A ∩ B| / |A ∪ B| of each image (Jaccard index); as `dice` otherwise."""
    both_N, pred_N, truth_N = _areas(pred_NHW, truth_NHW)
    return both_N / (pred_N + truth_N - both_N)


def _areas(pred_NHW: Tensor, truth_NHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of the intersection and of both masks. Counts, as 0 / 0 is NaN and nothing else is."""
    if pred_NHW.ndim != 3 or pred_NHW.shape != truth_NHW.shape:
        shapes = f"{tuple(pred_NHW.shape)}, truth_NHW {tuple(truth_NHW.shape)}"
        raise ValueError(f"pred_NHW has shape {shapes}; expected (N, H, W) for both")
    for name, mask_NHW in (("pred_NHW", pred_NHW), ("truth_NHW", truth_NHW)):
        if not bool(((mask_NHW == 0) | (mask_NHW == 1)).all()):
            raise ValueError(f"{name} holds values other than 0 and 1; threshold the mask first")
    pred_NHW, truth_NHW = pred_NHW.bool(), truth_NHW.bool()
    both_N, pred_N, truth_N = (
        reduce(mask_NHW.long(), "n h w -> n", "sum").to(torch.float64)
        for mask_NHW in (pred_NHW & truth_NHW, pred_NHW, truth_NHW)
    )
    return both_N, pred_N, truth_N
