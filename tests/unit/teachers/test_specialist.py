"""A teacher of some patients: its features are those of its source, and it says whom it serves."""

from dataclasses import replace

import pytest
import torch

from agglom import plugins, targets, testing
from agglom.core.types import Serves
from agglom.errors import PluginError


def make(source=None, **options):
    source = source or testing.synthetic_teacher()
    options = {"attribute": "sex*view", "groups": ["F|AP", "F|PA"]} | options
    return source, plugins.build("specialist", "teachers", options, source=source, source_name="one")


def test_it_shares_the_forward_of_its_source():
    source, teacher = make()
    calls = []
    counted = replace(source, encode=lambda x: calls.append(1) or source.encode(x))
    pixels = torch.rand(2, 3, 32, 32)
    found = targets.encode({"one": counted, "local": teacher}, ["one", "local"], pixels)
    assert len(calls) == 1
    assert torch.equal(found["local"].summary_BD, found["one"].summary_BD)
    assert teacher.serves == Serves("sex*view", ("F|AP", "F|PA"))
    assert (teacher.derived.source, teacher.derived.fit) == ("one", None)


def test_its_fingerprint_is_that_of_source_and_groups_whatever_their_order():
    source, teacher = make()
    assert make(groups=["F|PA", "F|AP"])[1].fingerprint == teacher.fingerprint
    others = {make(groups=["F|AP"])[1].fingerprint, make(attribute="view*sex")[1].fingerprint, source.fingerprint}
    assert len(others | {teacher.fingerprint}) == 4


@pytest.mark.parametrize("groups", [[], ["F", "F"]])
def test_groups_are_one_or_several(groups):
    with pytest.raises(PluginError, match=r"groups is .* expected one or several, each once"):
        make(groups=groups)


def test_a_specialist_is_no_source_of_another():
    with pytest.raises(PluginError, match=r"one serves F\|AP, F\|PA of sex\*view only; name a teacher of everybody"):
        make(make()[1])
