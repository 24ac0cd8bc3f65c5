"""The processes of a run are given back, and checkpoints are found."""

import os

import pytest
import torch
import torch.distributed as dist

from agglom import engine
from agglom.core.balance import agre
from agglom.core.heads import Distiller
from agglom.core.losses import columns, objective, table, teacher_index
from agglom.core.types import Dims, Features
from agglom.core.weights import Cells
from agglom.errors import DataError
from agglom.job import Data, Engine, Job, Optim, Stage

KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_a_process_runs_one_job_after_another(monkeypatch):
    """Also after an error; and it is left as it was found."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    threads = torch.get_num_threads()

    def job():
        with engine.launched() as world:
            assert (world.rank, world.size, world.main) == (0, 1, True)
            assert dist.is_initialized()
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            job()
        assert not dist.is_initialized()
        assert not [key for key in KEYS if key in os.environ]
        assert torch.get_num_threads() == threads


def test_checkpoints_are_sorted_by_step(tmp_path):
    assert engine.checkpoints(tmp_path / "none") == []
    assert engine.latest(tmp_path) is None
    for step in (10, 9, 100):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-00000200").write_text("a file")
    (tmp_path / "latest").write_text("step-00000100\n")
    assert [path.name[-3:] for path in engine.checkpoints(tmp_path)] == ["009", "010", "100"]
    assert engine.latest(tmp_path) == "step-00000100"


def test_weights_that_cannot_be_read_name_their_checkpoint(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: cannot read the checkpoint"):
        engine.read_weights(tmp_path)


def test_vectors_have_no_weight_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    (group,) = engine._parameter_groups(model, 0.05)
    assert group["weight_decay"] == 0
    assert len(group["params"]) == 3
    model[0].weight.requires_grad_(True)
    matrices, vectors = engine._parameter_groups(model, 0.05)
    assert [p.ndim for p in matrices["params"]] == [2]
    assert matrices["weight_decay"] == 0.05
    assert len(vectors["params"]) == 3


def test_trunk_and_heads_are_groups_of_their_own():
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(3, 4), "heads": torch.nn.Linear(4, 5)})
    groups = engine._parameter_groups(model, 0.05)
    shapes = [(group["trunk"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    assert shapes == [(True, [(4, 3)]), (True, [(4,)]), (False, [(5, 4)]), (False, [(5,)])]


def test_no_compiler_is_run(monkeypatch):
    """DeepSpeed probes what it could compile, with gcc, and compiles a shared-memory operation for the CPU."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)

    def refuse(*arguments, **named):
        raise AssertionError(f"a process is started: {arguments}")

    monkeypatch.delitem(vars(engine._import_deepspeed().ops), "__compatible_ops__")
    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    with engine.launched():
        dist.all_reduce(torch.ones(2))


class Trunk(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 4)

    def forward(self, pixels_BCHW):
        return Features(torch.tanh(self.linear(pixels_BCHW.flatten(1))), None)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_gradients_within_a_step_leave_those_of_the_step_alone(zero, monkeypatch):
    """Beside a biased model that weighs neutral, a lone teacher does, too: what is learnt is what uniform weights
    teach, over accumulation steps, whatever gradients were taken to find that out."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    dims, stages = {"biased": Dims(3, None), "two": Dims(5, None)}, (Stage(name="one", length="1 steps"),)
    optim, settings = Optim(batch=8, accumulate=2), Engine(zero=zero)
    job = Job(data=Data(manifest=""), teachers={}, stages=stages, optim=optim, engine=settings)
    kinds = columns(dims, {})
    cells = Cells(torch.ones(1), teacher_index(kinds), 8, teachers=tuple(dims))
    balancer, generator = agre(cells=cells, biased="biased", follow=1.0), torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 4, 3, 2, 2, generator=generator)
    targets = {name: torch.randn(6, 4, one.summary, generator=generator) for name, one in dims.items()}

    def learnt(balanced):
        torch.manual_seed(0)
        with engine.launched() as world:
            student = engine.Engine(Distiller(Trunk(), Dims(4, None), dims, hidden=8, depth=1), job, world)
            for step, pixels_BCHW in enumerate(pixels):
                trunk, predicted = student(pixels_BCHW)
                wanted = {name: Features(target[step], None) for name, target in targets.items()}
                found = table(kinds, predicted, wanted, set(dims), summary="mse", patches="mse", dispersion={})
                found = found._replace(trunk_BD=trunk.summary_BD)
                weight_BT = torch.full((4, 2), 1 / 8)
                if balanced:
                    asked_BT, weight_BT = weight_BT, balancer.weigh({}, found, None)
                    torch.testing.assert_close(weight_BT, asked_BT)
                student.backward(objective(found, weight_BT))
                student.step(1e-2, 1.0)
            return student.weights()

    torch.testing.assert_close(learnt(balanced=True), learnt(balanced=False), rtol=1e-6, atol=1e-7)
