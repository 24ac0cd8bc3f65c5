"""Ranks that agree, and signals that are remembered."""

import os
import signal
import threading
import time

import pytest
import torch

from agglom import runtime
from agglom.errors import ConfigError, DataError, Interrupted
from agglom.runtime import StopRequest, World

ALONE = World(0, 1, torch.device("cpu"))


def test_one_rank_agrees_with_itself():
    assert ALONE.main
    assert ALONE.gather(3) == [3]
    assert ALONE.gather_main(3) == [3]
    assert ALONE.broadcast(3) == 3
    assert ALONE.any(True, False) == (True, False)
    assert ALONE.attempt(lambda: 3) == 3
    assert ALONE.on_main(lambda: 3) == 3
    ALONE.agree(None)
    with pytest.raises(ZeroDivisionError):
        ALONE.attempt(lambda: 1 // 0)


def test_two_ranks_share_values(ranks):
    def work(world):
        total = world.sum(torch.tensor([1.0 + world.rank]))
        return (
            world.gather(world.rank * 10),
            world.gather_main(world.rank),
            world.broadcast(f"from {world.rank}"),
            float(total),
            world.any(world.rank == 1, False),
            world.on_main(lambda: "told"),
        )

    first, second = ranks(work)
    assert first == ([0, 10], [0, 1], "from 0", 3.0, (True, False), "told")
    assert second == ([0, 10], None, "from 0", 3.0, (True, False), None)


def test_an_error_of_one_is_the_error_of_all(ranks):
    def work(world):
        def read():
            if world.rank == 1:
                raise DataError("image 7 is broken")

        world.attempt(read)

    assert ranks(work) == [("DataError", "image 7 is broken")] * 2


def test_each_keeps_its_own_error(ranks):
    def work(world):
        world.agree(ConfigError("a") if world.rank == 0 else DataError("b"))

    assert ranks(work) == [("ConfigError", "a"), ("DataError", "b")]


def test_foreign_errors_travel_as_text(ranks):
    """They need not pickle."""

    class Local(Exception):
        pass

    def fail():
        raise Local("odd")

    def work(world):
        world.on_main(fail)

    assert ranks(work) == [("Local", "odd"), ("DataError", "Local: odd")]


# ── Signals ──


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_repeated_ones_change_nothing(signum):
    before = signal.getsignal(signum)
    with StopRequest().listening(False) as stop:
        assert not stop
        signal.raise_signal(signum)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop
        assert stop.signum == signum
    assert signal.getsignal(signum) is before


def test_handlers_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), StopRequest().listening(False):
        raise Interrupted("stop")
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_installs_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest().listening(False) as stop:
            found.append((bool(stop), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, True)]


@pytest.mark.parametrize("dies", ["parent", "grandparent"])
def test_a_rank_whose_launcher_dies_asks_itself_to_stop(dies, monkeypatch):
    """`deepspeed` starts a process that starts the ranks; a SIGTERM to one of the two leaves the rank behind."""
    monkeypatch.setattr(runtime, "PARENT_POLL_S", 0.02)
    reading, writing = os.pipe()
    release_read, release_write = os.pipe()

    def rank():
        os.close(release_write)
        with StopRequest().listening(True) as stop:
            time.sleep(0.1)
            os.write(writing, b"-" if not stop else b"early ")
            deadline = time.monotonic() + 20
            while not stop and time.monotonic() < deadline:
                time.sleep(0.01)
            os.write(writing, b"stopped" if stop else b"left behind")

    def chain(depth):
        """Processes of which the last is a rank; those that die wait until it is up."""
        if depth == 0:
            rank()
            os._exit(0)
        child = os.fork()
        if child == 0:
            chain(depth - 1)
        name = {2: "grandparent", 1: "parent"}[depth]
        if name == dies:
            os.read(release_read, 1)
            os._exit(0)
        os.waitpid(child, 0)
        os._exit(0)

    top = os.fork()
    if top == 0:
        chain(2)
    os.close(writing)
    assert os.read(reading, 8) == b"-"
    os.write(release_write, b"x")
    assert os.read(reading, 20) == b"stopped"
    os.waitpid(top, 0)
    for end in (reading, release_read, release_write):
        os.close(end)


def test_a_rank_that_does_not_stop_in_time_ends(monkeypatch):
    """Its checkpoint cannot be written: after the grace it goes, with the status of SIGTERM."""
    monkeypatch.setattr(runtime, "PARENT_POLL_S", 0.01)
    monkeypatch.setattr(runtime, "GRACE_S", 0.05)
    monkeypatch.setattr(runtime, "_launcher", iter([(1, "a"), (2, "a")]).__next__)
    child = os.fork()
    if child == 0:
        with StopRequest().listening(True):
            time.sleep(20)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143


def test_peak_memory_is_that_of_this_process():
    mib = runtime.peak_memory_mib(torch.device("cpu"))
    assert 50 < mib < 100_000


def test_the_stopwatch_runs():
    watch = runtime.Stopwatch()
    time.sleep(0.01)
    assert 0.01 <= watch() < 5
