"""Nothing between the forward of the teachers and the balancer's update waits for the accelerator.

On the CPU every operator that would have to wait is seen as it is dispatched, and told with the line of agglom that
asked for it. With an accelerator, torch itself refuses.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from agglom import checkpoints, progress, targets, train
from agglom.core import borrowing

ROOT = Path(__file__).parents[2]
OURS = [str(ROOT / folder) for folder in ("agglom", "teachers", "students")]
# A value, or a size that depends on values, is known only when the accelerator has come so far.
WAITS = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "equal", "masked_select", "unique_dim"),
    *("_unique", "_unique2", "unique_consecutive", "bincount", "repeat_interleave", "_assert_async"),
}
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}
# A number of Python's is copied to the accelerator from memory that is not pinned; `full` writes it there instead.
COPIES = {"tensor", "as_tensor", "from_numpy"}


def asked_by():
    """The innermost line of agglom that is running, None where DeepSpeed asks on its own account."""
    frame = sys._getframe(3)  # who called the mode that notes
    while frame is not None:
        file = frame.f_code.co_filename
        if "/deepspeed/" in file:
            return None
        if file.startswith(tuple(OURS)) and not frame.f_code.co_name.startswith("__torch_"):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


class Watch:
    """What waits while `on`."""

    def __init__(self):
        self.on, self.steps, self.found = False, 0, []

    def note(self, what):
        if self.on and (line := asked_by()) is not None:
            self.found.append(f"{what} at {line}")


class Operators(TorchDispatchMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1]
        )
        if masks or (name in WAITS and not str(func).endswith("self_int")):
            self.watch.note(name + (" by a mask" if masks else ""))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (name := getattr(func, "__name__", "")) in READS | COPIES:
            self.watch.note(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch):
    """Watches each step from the moment its images are there until it is logged, saved, or over."""
    seen = Watch()

    def switched(function, after):
        def call(*args):
            seen.on = False
            found = function(*args)
            seen.on, seen.steps = after, seen.steps + after
            return found

        return call

    monkeypatch.setattr(train, "_read", switched(train._read, after=True))
    for place, name in AT_LOG_POINTS:
        monkeypatch.setattr(place, name, switched(getattr(place, name), after=False))
    return seen


AT_LOG_POINTS = (train, "_assert_finite"), (progress, "log"), (checkpoints, "save")
BUSY = {
    "optim.accumulate": 2,
    "teachers.two.micro_batch": 3,
    "teachers.local": {"kind": "specialist", "source": "one", "options": {"attribute": "device", "groups": ["A"]}},
    "loss": {"summary": "unic", "patches": "hybrid", "refit": "stage", "moments_by": "device", "shift": 1},
}
BALANCERS = {
    "group_dro": {},
    "teacher_dropping": {"balance": {"kind": "teacher_dropping"}},
    "ada_loss": {"balance": {"kind": "ada_loss"}},
    "cvar": {"balance.kind": "cvar", "balance.options": {}},
    "cells": {
        "data.labels": ["even"],
        "evaluate.permutations": 0,
        "balance": {"kind": "cells", "group": "device", "options": {"by": "images"}},
    },
    "agre": {
        "data.labels": ["even"],
        "evaluate.permutations": 0,
        "balance": {"kind": "agre", "group": "device", "resample": 0.5, "options": {"biased": "two"}},
        "loss": BUSY["loss"] | {"mfd": {"label": "even"}},
    },
}
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("ada_loss", "cvar", "teacher_dropping")]


@pytest.mark.parametrize("kind", ["group_dro", "cells", "agre", *SLOW])
def test_no_step_waits_for_a_value(lab, watch, monkeypatch, kind):
    whole = train.train

    def watched(*args):
        with Operators(watch), Reads(watch):
            state = whole(*args)
        watch.on = False
        return state

    monkeypatch.setattr(train, "train", watched)
    loan, lent, real = borrowing.Loan(teacher=2, by=(3,), of=(0,), to=(1,)), [], targets.lent  # of one, by two
    monkeypatch.setattr(borrowing, "loans", lambda *given: (loan,))
    monkeypatch.setattr(targets, "lent", lambda *given: lent.append(given) or real(*given))
    views = {"kinds": {"blur": 1.0, "inversion": 1.0}, "groups": {"device": ["A"]}}
    stages = [stage | {"length": "2 steps", "views": views} for stage in lab.job()["stages"]]
    lab.run("out", BUSY | BALANCERS[kind] | {"stages": stages})
    assert watch.steps == 4
    assert watch.found == []
    assert bool(lent) == (kind == "cells")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (lambda loss: float(loss.sum()), "_local_scalar_dense"),
        (lambda loss: bool((loss > 0).any()), "_local_scalar_dense"),
        (lambda loss: loss[loss > 0], "index by a mask"),
        (lambda loss: loss.nonzero(), "nonzero"),
        (lambda loss: loss.detach().cpu(), "cpu"),
        (lambda loss: loss.tolist(), "tolist"),
        (lambda loss: torch.tensor(3, device=loss.device), "tensor"),
    ],
)
def test_what_waits_is_seen_with_its_line(watch, monkeypatch, line, what):
    """Of a function of agglom's: this one's file, for the time of the test."""
    monkeypatch.setattr(f"{__name__}.OURS", [__file__])
    watch.on = True
    with Operators(watch), Reads(watch):
        line(torch.rand(3, 2))
    assert f"{what} at tests/e2e/test_sync.py:{line.__code__.co_firstlineno}" in watch.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator that torch can ask for its waits")
@pytest.mark.parametrize("kind", BALANCERS)
def test_no_step_waits_for_an_accelerator(lab, monkeypatch, kind):
    from agglom.engine import Engine

    def mode(name):
        return lambda: torch.cuda.set_sync_debug_mode(name)

    def switched(function, before, after):
        def call(*args):
            before()
            try:
                return function(*args)
            finally:
                after()

        return call

    allowed, refused = mode("default"), mode("error")
    monkeypatch.setattr(train, "_read", switched(train._read, allowed, refused))
    for place, name in AT_LOG_POINTS:
        monkeypatch.setattr(place, name, switched(getattr(place, name), allowed, refused))
    for name in ("__call__", "backward", "step"):  # what DeepSpeed does in them is its own affair
        monkeypatch.setattr(Engine, name, switched(getattr(Engine, name), allowed, refused))
    monkeypatch.setattr(train, "train", switched(train.train, allowed, allowed))
    lab.run("out", BUSY | BALANCERS[kind])
