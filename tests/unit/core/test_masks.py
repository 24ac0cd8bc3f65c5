"""agglom.core.masks against scikit-learn, pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agglom.core.masks import dice, iou
from agglom.core.metrics import mean

quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(arrays(bool, (2, 3, 4, 2)))
def test_overlap_is_f1_and_jaccard_of_the_pixels(masks):
    from sklearn.metrics import f1_score, jaccard_score

    pred, truth = torch.tensor(masks)
    for ours, theirs in ((dice(pred, truth), f1_score), (iou(pred, truth), jaccard_score)):
        for value, a, b in zip(ours.tolist(), *masks.reshape(2, 3, -1), strict=True):
            if a.any() or b.any():
                assert value == pytest.approx(theirs(b, a), abs=1e-12)
            else:
                assert math.isnan(value)


@quick
@given(st.integers(0, 10**6))
def test_iou_is_a_function_of_dice_and_both_are_symmetric(seed):
    pred, truth = torch.tensor(np.random.default_rng(seed).random((2, 5, 6, 6)) < 0.3)
    assert torch.allclose(iou(pred, truth), dice(pred, truth) / (2 - dice(pred, truth)))
    assert torch.equal(dice(pred, truth), dice(truth, pred))
    assert torch.equal(dice(pred.int(), truth.float()), dice(pred, truth))


def test_images_without_anything_are_counted_apart():
    truth = torch.zeros(40, 4, 4, dtype=torch.bool)
    truth[:35, :2] = True
    estimate = mean(dice(truth, truth), torch.arange(40))
    assert (estimate.value, estimate.n, estimate.n_pos, estimate.n_neg, estimate.status) == (1, 40, 35, 5, "ok")
    false_alarm = truth.clone()
    false_alarm[39, 0, 0] = True
    assert mean(dice(false_alarm, truth), torch.arange(40)).value == pytest.approx(35 / 36)


def test_wrong_input_is_named():
    mask = torch.zeros(2, 3, 3)
    for match, pred, truth in (
        (r"pred_NHW has shape \(2, 3, 3\), truth_NHW \(1, 3, 3\)", mask, mask[:1]),
        (r"expected \(N, H, W\)", mask[0], mask[0]),
        ("truth_NHW holds values other than 0 and 1", mask, mask + 0.5),
        ("pred_NHW holds values other than 0 and 1", mask * math.nan, mask),
    ):
        for overlap in (dice, iou):
            with pytest.raises(ValueError, match=match):
                overlap(pred, truth)
