"""The processes of a run: who they are, how they talk, and how all of them decide together.

No rank exits, skips or raises alone. Whatever one rank learns by itself (an unreadable image, a signal) goes through
`World.agree` first, over a gloo group on the CPU, so that the accelerator is never waited for.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from agglom.errors import AgglomError, DataError

T = TypeVar("T")

PARENT_POLL_S = 1.0
GRACE_S = 25.0


@dataclass(frozen=True)
class World:
    """This process among the others. `control` is a gloo group for objects and flags."""

    rank: int
    size: int
    device: torch.device
    control: Any = None
    has_launcher: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_main(self, value: T) -> list[T] | None:
        """The values of all ranks on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place, on the tensor's own device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags is set on at least one rank."""
        if self.size == 1:
            return flags
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(flag) for flag in tensor.tolist())

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank when one of them has met an error: its own where it has one, else the first."""
        (failed,) = self.any(error is not None)
        if not failed:
            return
        errors = self.gather(_portable(error))
        raise error or next(e for e in errors if e is not None)

    def attempt(self, work: Callable[[], T]) -> T:
        """Run `work` here; if it fails on any rank, raise on all."""
        result, error = _try(work)
        self.agree(error)
        return cast(T, result)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0 while the others wait; its error is everybody's."""
        return self.attempt(work) if self.main else self.attempt(lambda: None)


def _try(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """An error that pickles: ours as they are, others by their text."""
    if error is None or isinstance(error, AgglomError):
        return error
    return DataError(f"{type(error).__name__}: {error}")


class StopRequest:
    """Remembers SIGINT and SIGTERM; the loop asks at each step. Repeated signals change nothing.

    The DeepSpeed launcher delivers some signals twice and kills what is left after a few seconds, and a SIGTERM to
    the launcher alone leaves its ranks running. So the handlers only set a flag, and a rank whose parent has died
    sends itself a SIGTERM, and ends for good when its checkpoint is not written within `GRACE_S`.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def _handle(self, signum: int, frame: object) -> None:
        self.signum = self.signum or signum

    @contextmanager
    def listening(self, follow_parent: bool) -> Iterator[StopRequest]:
        """Install the handlers for the time of the block, and watch the launcher if there is one."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        over = threading.Event()
        if follow_parent:
            threading.Thread(target=_follow_launcher, args=(over,), daemon=True).start()
        try:
            yield self
        finally:
            over.set()
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _launcher() -> tuple[int, str]:
    """Parent and grandparent: `deepspeed` starts a process that starts the ranks, and either may die alone."""
    parent = os.getppid()
    try:
        status = Path(f"/proc/{parent}/status").read_text()
        return parent, next((line for line in status.splitlines() if line.startswith("PPid:")), "")
    except OSError:  # no /proc, or the parent has just gone
        return parent, ""


def _follow_launcher(over: threading.Event) -> None:
    launcher = _launcher()
    while not over.wait(PARENT_POLL_S):
        if _launcher() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)
            if not over.wait(GRACE_S):
                os._exit(143)
            return


class Stopwatch:
    """Seconds since the start, for rates and the time left."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self.start


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process: of the accelerator where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
