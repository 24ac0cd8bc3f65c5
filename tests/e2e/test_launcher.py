"""The real DeepSpeed launcher with two ranks on the CPU. A launch takes two cores for about 20 s: `make test`
has five."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import agglom
from agglom.data import simulate
from agglom.engine import checkpoints, read_weights

ROOT = Path(agglom.__file__).parents[1]
PATIENCE_S = 240
# Two ranks sum in another order than one.
TOLERANCE = 1e-5


def launch(config, out, *flags, environment=None):
    """`deepspeed --num_accelerators 2 launch/distill.py`, in a process group of its own: (status, output)."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        *(sys.executable, Path(sys.executable).with_name("deepspeed"), "--num_accelerators", "2"),
        *("--master_port", str(port), ROOT / "launch" / "distill.py", "--config", config, "--out", out, *flags),
    ]
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=out.parent,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


@pytest.fixture(scope="module")
def two_ranks(workshop):
    """The base job on two ranks, to its end: output folder and what was printed. Only to be read."""
    out = workshop.folder / "whole"
    status, output = launch(workshop.config(), out)
    assert status == 0, output
    return out, output


def assert_same_losses(lab, found, expected):
    """Every number of metrics.jsonl to a relative `TOLERANCE`; what one of them lacks, the other lacks."""
    for a, b in zip(lab.metrics(found), lab.metrics(expected), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == b[key] or value == pytest.approx(b[key], rel=TOLERANCE), (a["step"], key)


def test_two_ranks_are_one(lab, two_ranks, whole):
    out, output = two_ranks
    assert_same_losses(lab, out, whole)
    # Not the weights: Adam makes steps of full size out of gradients that are rounding, where they do not matter.
    found, expected = (load_file(folder / "export" / "sample.safetensors") for folder in (out, whole))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)
    for row, other in zip(lab.rows(out), lab.rows(whole), strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-4), row
    assert "on 2 ranks (cpu)" in output
    assert output.count("stage full, test split") == 1  # one rank speaks
    assert re.search(r"reloaded in a fresh process: max abs diff \S+", output)


@pytest.mark.slow
def test_two_ranks_are_one_where_images_choose_their_teachers(lab, workshop):
    """And where images of device B, of which the first teacher says nothing, borrow what it says of others."""
    folder = workshop.folder / "more"
    simulate.digits(folder, train=900, val=120, test=16)
    with (folder / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = [row for row in rows if (row["split"], row["device"]) == ("train", "A")][:100]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if row in first or (row["split"], row["device"]) != ("train", "A"))
    reads = {"width": 64, "patch": 32}
    changes = {
        "data.manifest": str(folder / "manifest.csv"),
        "data.labels": ["even"],
        # Images of device B are brighter, and no others.
        "teachers.one.options": reads | {"seed": 1, "blind_above": 0.45},
        "teachers.two.options": reads | {"seed": 2},
        "teachers.fair": None,
        "balance": {"kind": "cells", "group": "device"},
        # One, as its student may order two patients otherwise by rounding alone.
        "stages": [{"name": "full", "length": "6 steps", "size": 64}],
    }
    out = workshop.folder / "cells"
    status, output = launch(workshop.config(changes), out)
    assert status == 0, output
    one = workshop.run("cells-one", changes)
    assert_same_losses(lab, out, one)
    found, expected = (load_file(folder / "measured" / "full.safetensors")["sure_NS"] for folder in (out, one))
    assert found.isfinite().any()
    torch.testing.assert_close(found, expected, equal_nan=True)
    reasons = [
        json.loads((folder / "reports" / "full.json").read_text())["context"]["reasons"] for folder in (out, one)
    ]
    assert reasons[0]["borrowed"] == reasons[1]["borrowed"]
    (loan,) = reasons[0]["borrowed"]
    assert (loan["teacher"], loan["groups"], loan["by"], loan["of"]) == ("one", ["B"], ["two"], ["A"])
    assert loan["images"] > 50


def test_zero_3_reproduces_zero_1(lab, two_ranks, workshop):
    out = workshop.folder / "zero3"
    status, output = launch(workshop.config({"engine.zero": 3}), out)
    assert status == 0, output
    assert_same_losses(lab, out, two_ranks[0])


def test_interrupted_and_resumed_is_uninterrupted(lab, two_ranks, workshop):
    """SIGTERM to the process group within a log interval of the first stage; then the same command again."""
    out, config = workshop.folder / "resumed", workshop.config()
    status, output = launch(config, out, environment={"TINY_SIGNAL": "3"})
    assert status == -signal.SIGTERM, output
    assert "Traceback" not in output
    assert re.search(r"interrupted in stage 'warm' after step [34] of 10; checkpoint", output)
    tags = checkpoints(out / "checkpoints")
    assert tags
    assert read_weights(tags[-1])

    status, output = launch(config, out)
    assert status == 0, output
    assert "goes on after step" in output
    assert lab.same(lab.metrics(out), lab.metrics(two_ranks[0]))
    assert lab.same(lab.weights(out), lab.weights(two_ranks[0]))
    assert lab.same(lab.rows(out), lab.rows(two_ranks[0]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the launcher by /proc")
def test_ranks_end_when_the_launcher_dies(workshop):
    """SIGTERM to the `deepspeed` command alone, as a job scheduler may send it."""
    out = workshop.folder / "orphans"
    job = workshop.config({"stages": [{"name": "warm", "length": "100000 steps", "size": 32}]})
    status, output = launch(job, out, environment={"TINY_SIGNAL": "3", "TINY_LAUNCHER": "1"})
    assert status == -signal.SIGTERM, output
    assert "Traceback" not in output
    assert "interrupted in stage 'warm' after step" in output
    assert read_weights(checkpoints(out / "checkpoints")[-1])


def test_ranks_agree_on_an_unreadable_image(workshop):
    """Rank 1 meets it, both end with the same status, and a checkpoint of the step before is kept."""
    change, image, row = workshop.damaged()
    out = workshop.folder / "corrupt"
    status, output = launch(workshop.config(change), out)
    assert status == 4, output
    assert "Traceback" not in output
    for rank in ("agglom: ", "agglom (rank 1): "):
        assert f"{rank}{image}: the image cannot be decoded" in output
    assert f"data row {row + 1} of " in output
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-00000002"]
    assert read_weights(out / "checkpoints" / "step-00000002")
