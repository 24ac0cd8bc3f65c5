"""A head that is robust over groups: against an ordinary one where a short cut is at hand, and by its state."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from agglom import plugins, testing
from agglom.core.types import Dims, Features
from agglom.errors import PluginError
from teachers.group_dro_probe import Recipe, train

HOW = Recipe(hidden=32, l2=0.03, eta=0.1, steps=200, lr=0.01, seed=0)


def spurious(n, aligned, seed, width=16):
    """One direction tells the label, another, more clearly, the group, which is the label in a share of the images."""
    draw = torch.Generator().manual_seed(seed)
    y_N = torch.randint(0, 2, (n,), generator=draw)
    group_N = torch.where(torch.rand(n, generator=draw) < aligned, y_N, 1 - y_N)
    x_ND = torch.randn(n, width, generator=draw)
    x_ND[:, 0] = 2 * y_N - 1 + 0.8 * x_ND[:, 0]
    x_ND[:, 1] = 2 * group_N - 1 + 0.3 * x_ND[:, 1]
    mixed_DD = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))[0]
    return 5 * x_ND @ mixed_DD + 2, y_N.float(), group_N


def worst_cell(head, x_ND, y_N, group_N):
    logit_N = F.gelu(F.linear(x_ND, head.weight_HD, head.bias_H)) @ head.readout_H + head.offset
    right_N = ((logit_N > 0) == (y_N > 0)).double()
    return min(float(right_N[(y_N == y) & (group_N == g)].mean()) for y in (0, 1) for g in (0, 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_worst_group_is_better_off_than_with_an_ordinary_head(seed):
    x_ND, y_N, group_N = spurious(800, 0.95, seed)
    test = spurious(4000, 0.5, 100 + seed)
    ordinary = worst_cell(train(x_ND, y_N, group_N, HOW._replace(eta=0.0)), *test)
    robust = worst_cell(train(x_ND, y_N, group_N, HOW), *test)
    assert robust > ordinary + 0.1
    assert robust > 0.7


def test_an_ordinary_head_is_the_minimum_of_the_mean_cross_entropy():
    """Of the objective by hand, with all cells at their shares: it is larger on either side."""
    x_ND, y_N, group_N = spurious(300, 0.7, 0)
    head = train(x_ND, y_N, group_N, HOW._replace(eta=0.0, steps=400))

    def objective(readout_H):
        hidden_NH = F.gelu(F.linear(x_ND, head.weight_HD, head.bias_H))
        losses = F.binary_cross_entropy_with_logits(hidden_NH @ readout_H + head.offset, y_N)
        return losses + HOW.l2 / 2 * readout_H.square().sum()

    least = objective(head.readout_H)
    assert all(objective(head.readout_H * scale) > least for scale in (0.9, 1.1))


def test_features_that_do_not_vary_and_their_scale_change_nothing():
    x_ND, y_N, group_N = spurious(200, 0.9, 0)
    head = train(x_ND, y_N, group_N, HOW)
    more_ND = torch.cat([1000 * x_ND - 7, torch.full((200, 3), 4.0)], 1)
    again = train(torch.cat([x_ND, torch.full((200, 3), 4.0)], 1), y_N, group_N, HOW)
    scaled = train(more_ND, y_N, group_N, HOW)
    assert (scaled.weight_HD[:, 16:] == 0).all()
    torch.testing.assert_close(scaled.weight_HD[:, :16] * 1000, again.weight_HD[:, :16], rtol=0.05, atol=0.01)
    assert not torch.equal(head.weight_HD, train(x_ND, y_N, group_N, HOW._replace(seed=1)).weight_HD)
    assert torch.equal(head.weight_HD, train(x_ND, y_N, group_N, HOW).weight_HD)


def make(**options):
    source = replace(testing.synthetic_teacher(), dims=Dims(16, 16))
    options = {"label": "sick", "attribute": "site", "hidden": 8, "steps": 100} | options
    return plugins.build("group_dro_probe", "teachers", options, source=source, source_name="one")


def stream(x_ND, y_N, group_N, batch=50):
    for rows in torch.arange(len(x_ND)).split(batch):
        yield Features(x_ND[rows], None), {"sick": y_N[rows].double(), "site": group_N[rows]}


def test_the_embedding_has_the_scale_of_one_and_comes_back_from_its_state():
    x_ND, y_N, group_N = spurious(200, 0.9, 0)
    one, two = make(), make()
    assert (one.dims, one.derived.labels, one.derived.groups) == (Dims(8, None), ("sick",), ("site",))
    one.derived.fit(stream(x_ND, y_N, group_N))
    two.module.load_state_dict(one.module.state_dict())
    found = one.derived.derive(Features(x_ND, x_ND[:, None]))
    assert found.patches_BND is None
    assert float(found.summary_BD.square().mean()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(two.derived.derive(Features(x_ND, None)).summary_BD, found.summary_BD)
    assert all(not value.requires_grad for value in one.module.state_dict().values())


def test_what_is_not_known_takes_no_part():
    x_ND, y_N, group_N = spurious(200, 0.9, 0)
    one, two = make(), make()
    one.derived.fit(stream(x_ND, y_N, group_N))
    odd_ND = torch.full((60, 16), 1e3)
    y, group = torch.full((60,), 1.0), torch.ones(60, dtype=torch.int64)
    y[:30], group[30:] = math.nan, -1
    two.derived.fit(stream(torch.cat([x_ND, odd_ND]), torch.cat([y_N, y]), torch.cat([group_N, group])))
    torch.testing.assert_close(two.module.weight_HD, one.module.weight_HD)


def test_what_does_not_vary_is_refused_by_name():
    x_ND, y_N, group_N = spurious(50, 0.9, 0)
    with pytest.raises(ValueError, match="label 'sick' has one value in the 50 images of known label and group"):
        make().derived.fit(stream(x_ND, torch.ones(50), group_N))
    with pytest.raises(ValueError, match="attribute 'site' is unknown in all 50 images"):
        make().derived.fit(stream(x_ND, y_N, torch.full((50,), -1)))
    with pytest.raises(ValueError, match="attribute 'site' has one value in the 20 images"):
        make().derived.fit(stream(x_ND, y_N, torch.where(torch.arange(50) < 20, 3, -1)))
    with pytest.raises(ValueError, match="no image to fit it on"):
        make().derived.fit([])


def test_options_out_of_range_and_a_source_without_summary_are_refused():
    with pytest.raises(PluginError, match="hidden is 0, expected at least 1; eta is -1, expected at least 0"):
        make(hidden=0, eta=-1)
    source = replace(testing.synthetic_teacher(), dims=Dims(None, 16))
    options = {"label": "sick", "attribute": "site"}
    with pytest.raises(PluginError, match="one has no summary to put a head on"):
        plugins.build("group_dro_probe", "teachers", options, source=source, source_name="one")


def test_the_fingerprint_is_that_of_source_and_options():
    prints = [make(**more).fingerprint for more in ({}, {"seed": 1}, {"l2": 0.1}, {"label": "old"}, {"hidden": 9})]
    assert len(set(prints)) == 5
    assert make().fingerprint == prints[0]
    assert np.all([len(one) == 64 for one in prints])
