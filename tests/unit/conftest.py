"""What tests of several ranks need."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from agglom.runtime import World


@pytest.fixture
def ranks(tmp_path):
    """A function: what `work(world)` returns on each of `size` forked ranks, or the name and text of what it raises."""

    def run(work, size=2):
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def main(rank):
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size)
            world = World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo"))
            try:
                result = work(world)
            except Exception as error:
                result = type(error).__name__, str(error)
            queue.put((rank, result))
            dist.barrier()
            dist.destroy_process_group()

        processes = [context.Process(target=main, args=(rank,)) for rank in range(size)]
        for process in processes:
            process.start()
        found = dict(queue.get(timeout=30) for _ in processes)
        for process in processes:
            process.join()
        return [found[rank] for rank in range(size)]

    return run
