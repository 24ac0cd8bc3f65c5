"""The only file that knows DeepSpeed: processes, the wrapped model, and its checkpoints.

Its promise to the loop: `backward(objective)` adds exactly the gradient of the sum of the objectives over all
micro-batches and ranks, whatever DeepSpeed divides by; the learning rate is a number given to `step`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from agglom import config
from agglom.core.types import Features
from agglom.errors import ConfigError, DataError
from agglom.job import Job
from agglom.runtime import World

LATEST = "latest"
# Rank 0 fits probes and draws reports while the others wait for it.
PATIENCE = timedelta(hours=6)


def _import_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own deprecations are not the user's business
        import deepspeed
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On the CPU DeepSpeed compiles a shared-memory all-reduce at first use: minutes, and a compiler to have. Gloo
        # gives the same losses. An empty table of what could be compiled prevents it, and the probing that runs gcc
        # to fill it; a version that keeps no such table never looks.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def launched() -> Iterator[World]:
    """The processes of this run: those of the launcher, or this one alone."""
    deepspeed = _import_deepspeed()
    alone = "WORLD_SIZE" not in os.environ
    if alone:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    threads = torch.get_num_threads()
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that share the cores otherwise fight for them.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=PATIENCE)
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"the ranks cannot meet at {place} ({str(error).splitlines()[0]}); another job may hold that port: "
            "start with `deepspeed --master_port N`"
        ) from error
    size = dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    try:
        yield World(dist.get_rank(), size, device, control, has_launcher=not alone)
    finally:
        # DeepSpeed remembers groups and its backend: a second run in this process would talk to those that are gone.
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        torch.set_num_threads(threads)
        if alone:
            for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(key, None)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trunk and heads apart, as each has its own learning rate; no decay on vectors, as biases, gains and position
    tables shrink towards nothing useful."""
    groups = []
    for trunk in (True, False):
        mine = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("trunk.") == trunk]
        matrices, vectors = ([p for p in mine if (p.ndim > 1) == wide] for wide in (True, False))
        groups.append({"params": matrices, "weight_decay": weight_decay, "trunk": trunk})
        groups.append({"params": vectors, "weight_decay": 0.0, "trunk": trunk})
    return [group for group in groups if group["params"]]


class Engine:
    """The student and its heads under DeepSpeed."""

    def __init__(self, model: nn.Module, job: Job, world: World) -> None:
        deepspeed = _import_deepspeed()
        groups = _parameter_groups(model, job.optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=job.stages[0].lr, betas=job.optim.betas)
        self._world = world
        settings = config.deepspeed(job, world.size)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ConfigError("\n  ".join(["engine.deepspeed: DeepSpeed refuses", *problems])) from error
        self._undo_division = world.size * job.optim.accumulate
        self._zero = job.engine.zero
        self._dtype = torch.bfloat16 if job.engine.precision == "bf16" else torch.float32
        self._asleep: list[tuple[Any, Any]] = []

    def __call__(self, pixels_BCHW: Tensor) -> tuple[Features, dict[str, Features]]:
        """Trunk features and the prediction for every teacher. Until `backward`, autograd may be asked for gradients of
        any of them with respect to the trunk features; not in ZeRO 3."""
        trunk, predicted = self._engine(pixels_BCHW.to(self._dtype))
        # DeepSpeed takes the first gradient that passes its outputs for the start of a backward pass, and scales it.
        # It keeps who watches for that at the first output, which is the trunk's.
        watching = [hook for part in trunk for hook in getattr(part, "_backward_hook_managers", ())]
        self._asleep = [(hook, hook.preprocess_per_tensor_fn) for hook in watching]
        for hook in watching:
            hook.preprocess_done, hook.preprocess_per_tensor_fn = True, None
        return trunk, predicted

    def train(self) -> None:
        self._engine.train()

    def backward(self, objective: Tensor) -> None:
        """Accumulate the gradient; `objective` is this micro-batch's share of the global sum."""
        for hook, scale in self._asleep:
            hook.preprocess_done, hook.preprocess_per_tensor_fn = False, scale
        self._engine.backward(objective * self._undo_division)

    def step(self, lr: float, trunk_lr_scale: float) -> None:
        """Apply what has been accumulated: the heads learn at `lr`, the trunk at that times its scale.

        Call once per micro-batch, DeepSpeed acts on the last one.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * trunk_lr_scale if group["trunk"] else lr
        self._engine.step()

    def grad_norm(self) -> float | None:
        """The global norm before clipping; None in ZeRO stage 0, which does not report it."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def sound(self) -> bool:
        """Whether the last step's gradient was finite; in ZeRO 0, whether the weights after it are."""
        norm = self.grad_norm()
        if norm is None:
            return all(bool(torch.isfinite(parameter).all()) for parameter in self._engine.module.parameters())
        return math.isfinite(norm)

    def weights(self) -> dict[str, Tensor]:
        """The full float32 state of the model on the CPU of every rank. A collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, parameter in self._engine.module.named_parameters():
            full = parameter if self._zero == 0 else safe_get_full_fp32_param(parameter)
            state[name] = full.detach().to("cpu", torch.float32, copy=True)
        kept = self._engine.module.state_dict()  # buffers that are not persistent are no state
        for name, buffer in self._engine.module.named_buffers():
            if name not in kept:
                continue
            dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
            state[name] = buffer.detach().to("cpu", dtype, copy=True)
        return state

    def save(self, folder: Path, tag: str, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint and then drop the oldest ones beyond `keep`. A collective.

        Raises:
            DataError: it cannot be written; the earlier checkpoints are untouched.
        """
        try:
            self._engine.save_checkpoint(str(folder), tag=tag, client_state=state)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{folder / tag}: cannot write the checkpoint ({error}); free space there or choose another --out, "
                "then start again: the run goes on from the last complete checkpoint"
            ) from error
        if self._world.main:
            # Those of later steps are what an earlier resume from here left: not old, and written again in time.
            for old in [path for path in checkpoints(folder) if path.name <= tag][:-keep]:
                shutil.rmtree(old)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restore a checkpoint and return the state that was saved with it. A collective.

        Raises:
            DataError: it cannot be read.
        """
        try:
            path, state = self._engine.load_checkpoint(str(folder), tag=tag)
        except Exception as error:  # whatever torch and DeepSpeed raise on a damaged file
            raise DataError(
                f"{folder / tag}: cannot read the checkpoint ({type(error).__name__}: {error}); "
                "resume from another one with --resume PATH, or start over in another --out"
            ) from error
        if path is None:
            raise DataError(f"{folder / tag}: no checkpoint there")
        return state


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The full float32 state of the model in a checkpoint, whatever the number of ranks that wrote it.

    Raises:
        DataError: it cannot be read.
    """
    _import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        if any(checkpoint.glob("*_optim_states.pt")):
            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
        # Stage 0 keeps the whole model in one file, together with optimizer state that is not plain tensors.
        stored = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored["module"].items()
        }
    except Exception as error:  # whatever torch and DeepSpeed raise on a damaged file
        raise DataError(f"{checkpoint}: cannot read the checkpoint ({type(error).__name__}: {error})") from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first (their tags sort by step)."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def latest(folder: Path) -> str | None:
    """The tag of the last complete checkpoint: DeepSpeed writes it after everything else."""
    pointer = folder / LATEST
    return pointer.read_text().strip() if pointer.is_file() else None
