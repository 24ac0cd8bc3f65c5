"""The loop in one process: what must change nothing changes nothing, and what is not finite never reaches a file."""

import math
import re

import numpy as np
import pytest
import torch

from agglom.data.sampler import stream
from agglom.engine import checkpoints, read_weights

# Sums of floats in another order: three decimals more than anybody reads.
TOLERANCE = 1e-5
BRIGHT = 0.45


def losses(lab, out, *more):
    return [{k: v for k, v in line.items() if k.startswith("loss") or k in more} for line in lab.metrics(out)]


def assert_close(found, expected, tolerance=TOLERANCE):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == b[key] or value == pytest.approx(b[key], rel=tolerance), key


def test_writes_its_tree(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("config.yaml", "plan.md", "metrics.jsonl", "tb", "checkpoints", "normaliser.safetensors"),
        *("features", "reports", "export"),
    }
    assert {path.name for path in (whole / "reports").iterdir()} == {
        f"{stage}.{suffix}" for stage in ("teachers", "warm", "full") for suffix in ("json", "md", "html", "csv")
    }
    assert list((whole / "tb").glob("events.*"))


def test_logs_each_teacher_and_group(lab, whole):
    lines = lab.metrics(whole)
    assert [(line["step"], line["stage"]) for line in lines] == [
        *[(2, "warm"), (4, "warm"), (6, "full"), (8, "full"), (10, "full")]
    ]
    warm, full = lines[0], lines[-1]
    assert {key for key in warm if key.startswith("loss/")} == {
        f"loss/{name}/{kind}" for name in ("one", "two") for kind in ("summary", "patches")
    }
    for name in ("one", "two", "fair"):
        assert full[f"loss/{name}/summary"] > 0
        assert full[f"weight/{name}/B"] > 0
        assert f"loss_group/{name}/patches/A" in full
    assert {"loss", "lr", "grad_norm"} <= full.keys()


def test_learns(lab):
    """The loss of each column and group falls."""
    stages = [{"name": "full", "length": "40 steps", "size": 64, "lr": 3e-3}]
    lines = lab.metrics(lab.run("out", {"stages": stages, "log.every": "10 steps", "balance": {"kind": "uniform"}}))
    for key in [key for key in lines[0] if key.startswith("loss")]:
        assert lines[-1][key] < lines[0][key], key


@pytest.mark.parametrize(
    "change",
    [{"engine.zero": 0}, {"engine.zero": 2}, {"engine.zero": 3}, {"optim.accumulate": 2}, {"optim.accumulate": 4}],
    ids=str,
)
def test_the_engine_changes_no_loss(lab, whole, change):
    """And its checkpoint, whatever its form, holds the weights that are exported."""
    out = lab.run("out", change)
    # Adam and clipping hide the size of a gradient, its norm does not; ZeRO 0 reports none.
    more = () if change == {"engine.zero": 0} else ("grad_norm",)
    assert_close(losses(lab, out, *more), losses(lab, whole, *more))
    stored = read_weights(out / "checkpoints" / "step-00000010")
    trunk = {key.removeprefix("trunk."): value for key, value in stored.items() if key.startswith("trunk.")}
    exported = {key.removeprefix("model."): v for key, v in lab.weights(out).items() if key.startswith("model.")}
    assert trunk.keys() == exported.keys()
    assert all(torch.equal(trunk[key], value) for key, value in exported.items())


def test_bf16_stays_close(lab, whole):
    """bfloat16 has 8 bits of mantissa."""
    found = losses(lab, lab.run("out", {"engine.precision": "bf16"}))
    assert_close(found, losses(lab, whole), 0.05)


def test_the_order_of_teachers_changes_nothing(lab, whole):
    job = lab.job()
    shuffled = {name: job["teachers"][name] for name in ("two", "fair", "one")}
    out = lab.run(
        "out", {"teachers": shuffled, "stages": [job["stages"][0] | {"teachers": ["two", "one"]}, job["stages"][1]]}
    )
    assert lab.same(lab.metrics(out), lab.metrics(whole))
    assert lab.same(lab.weights(out), lab.weights(whole))


def test_uniform_weights_are_no_weights(lab):
    """With groups to log by, and without."""
    grouped = lab.run("grouped", {"balance": {"kind": "uniform", "group": "device"}})
    plain = lab.run("plain", {"balance": {"kind": "uniform"}})
    shared = lab.metrics(plain)[0].keys() - {"grad_norm"}
    assert not [key for key in shared if key.startswith(("loss_group", "weight"))]
    assert lab.same(
        [{k: line[k] for k in line if k in shared or k.startswith("loss/")} for line in lab.metrics(grouped)],
        [{k: v for k, v in line.items() if k != "grad_norm"} for line in lab.metrics(plain)],
    )
    assert lab.same(lab.weights(grouped), lab.weights(plain))


def test_without_labels_the_report_speaks_of_variance(lab, whole):
    rows = lab.rows(whole)
    assert {row["metric"] for row in rows} == {"fvu", "fvu_angular"}
    assert {row["predictor"] for row in rows} == {"student"}
    assert {row["target"] for row in rows} == {
        f"{name}/{kind}" for name in ("one", "two", "fair") for kind in ("summary", "patches")
    }
    assert {(row["attribute"], row["group"]) for row in rows} == {("", "all"), ("device", "A"), ("device", "B")}
    assert {row["split"] for row in rows} == {"val", "test"}
    assert all(row["value"] > 0 and row["lo"] <= row["value"] <= row["hi"] for row in rows if row["status"] == "ok")
    assert lab.rows(whole, "teachers") == []


# ── What is not finite ──


def spoilt(size, **more):
    """One teacher whose summary is NaN for bright images of this size, and views that keep the brightness."""
    options = {"seed": 1, "width": 24, "nan_at": size, "nan_above": BRIGHT}
    return {"teachers.two.options": options, "augment.crop": [1.0, 1.0]} | more


@pytest.mark.parametrize("every", ["1 steps", "4 steps"])
def test_a_target_that_is_not_finite_is_named(lab, capsys, every):
    """Its first step, teacher and rows, also where the log comes later and everything has become NaN by then."""
    change = spoilt(32, **{"log.every": every, "log.checkpoint": every})
    assert lab.distill("out", change) == 5
    message = capsys.readouterr().err
    found = re.search(
        r"stage 'warm' step (\d): target not finite for two/summary, (\d) samples: data rows ([\d, ]+);", message
    )
    assert found, message
    assert "check the weights, dtype and pixels of that teacher" in message
    batches = stream(np.arange(24), [(32, 32)], seed=0, batch=8, micro=8)
    bright = np.array(lab.brightness()) > BRIGHT
    step, rows = next((k, rows) for k, batch in enumerate(batches, 1) if (rows := [r for r, *_ in batch if bright[r]]))
    assert int(found[1]) == step
    assert [int(row) - 1 for row in found[3].split(",")] == sorted(rows)
    assert int(found[2]) == len(rows)
    for folder in checkpoints(lab.folder / "out" / "checkpoints"):
        assert int(folder.name.removeprefix("step-")) < int(found[1])
        assert all(torch.isfinite(tensor).all() for tensor in read_weights(folder).values())


def test_a_student_that_diverges_is_named(lab, capsys):
    stages = [stage | {"lr": 1e30, "warmup": "0%"} for stage in lab.job()["stages"]]
    assert lab.distill("out", {"stages": stages, "log.every": "1 steps"}) == 5
    message = capsys.readouterr().err
    assert re.search(r"stage 'warm' step \d: loss not finite for one/patches, .*8 samples: data rows", message), message
    assert "lower stages[0].lr or optim.clip" in message


def test_a_signal_after_nan_saves_nothing(lab, capsys, stop_at):
    stop_at(3)
    assert lab.distill("out", spoilt(32, **{"log.every": "4 steps", "log.checkpoint": "4 steps"})) == 5
    assert "target not finite for two/summary" in capsys.readouterr().err
    assert checkpoints(lab.folder / "out" / "checkpoints") == []


@pytest.mark.parametrize("engine", [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"precision": "bf16"}], ids=str)
def test_a_gradient_that_is_not_finite_is_no_checkpoint(lab, capsys, monkeypatch, engine):
    """Finite losses with a gradient that is not, as from a square root at 0."""
    from agglom.core import losses as table

    real = table.objective
    monkeypatch.setattr(table, "objective", lambda *a: real(*a) + (real(*a) * 0).sqrt())
    assert lab.distill("out", {"log.every": "1 steps", "log.checkpoint": "1 steps", "engine": engine}) == 5
    assert "stage 'warm' step 1: gradient not finite" in capsys.readouterr().err
    assert checkpoints(lab.folder / "out" / "checkpoints") == []


def test_a_gradient_whose_norm_overflows_is_no_checkpoint(lab, capsys, monkeypatch):
    """In float32, as ZeRO 1 computes it."""
    from agglom.core import losses as table

    real = table.objective
    monkeypatch.setattr(table, "objective", lambda *a: real(*a) * 1e28)
    assert lab.distill("out", {"log.every": "1 steps", "log.checkpoint": "1 steps"}) == 5
    assert "stage 'warm' step 1: gradient not finite" in capsys.readouterr().err
    assert checkpoints(lab.folder / "out" / "checkpoints") == []


def test_a_run_goes_on_after_its_cause_is_removed(lab, capsys):
    """Nothing that the failed start has stored stands in the way."""
    assert lab.distill("out", spoilt(32)) == 5
    capsys.readouterr()
    lines = lab.metrics(lab.run("out"))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]


def test_a_scaled_trunk_moves_less_and_the_heads_as_far(lab):
    """One step of Adam moves each weight by its learning rate, whatever the gradient."""

    def moved(name, scale):
        stage = {"name": "full", "length": "1 step", "size": 32, "lr": 1e-3, "warmup": "0 steps"}
        stages = [stage | {"trunk_lr_scale": scale}]
        out = lab.run(name, {"stages": stages, "optim.weight_decay": 0, "log.checkpoint": "1 step"})
        return read_weights(out / "checkpoints" / "step-00000001")

    whole, tenth = moved("whole", 1.0), moved("tenth", 0.1)
    for part, expected in (("trunk.", 0.9e-3), ("heads.", 0.0)):
        apart = [float((whole[key] - tenth[key]).detach().abs().max()) for key in whole if key.startswith(part)]
        assert max(apart) == pytest.approx(expected, rel=0.05, abs=2e-5), part
