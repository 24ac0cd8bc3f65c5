"""Interrupted and resumed is uninterrupted: metrics, reports and weights are equal, to the bit."""

import json
import shutil
import signal

import pytest

from agglom import targets
from agglom.engine import checkpoints


def assert_same_run(lab, out, whole):
    assert lab.same(lab.metrics(out), lab.metrics(whole))
    for stage in ("teachers", "warm", "full"):
        assert lab.same(lab.rows(out, stage), lab.rows(whole, stage))
    assert lab.same(lab.weights(out), lab.weights(whole))


def steps(out):
    return [int(path.name.removeprefix("step-")) for path in checkpoints(out / "checkpoints")]


@pytest.mark.parametrize(
    ("step", "signum"), [(3, signal.SIGTERM), (7, signal.SIGINT)], ids=["first stage", "second stage"]
)
def test_resumes_where_a_signal_came(lab, whole, stop_at, capsys, step, signum):
    """Step 3 and 7 lie within a log interval, so what it has gathered is carried over."""
    stop_at(step, signum)
    assert lab.distill() == 130
    assert f"after step {step} of 10" in capsys.readouterr().err
    assert steps(lab.folder / "out")[-1] == step
    assert_same_run(lab, lab.run(), whole)
    assert f"goes on after step {step}" in capsys.readouterr().out


def test_resumes_between_training_and_evaluation(lab, whole, monkeypatch, capsys):
    from agglom import evaluate

    real = evaluate.evaluate

    def stopping(run, surveyed, normalisers, stage, student):
        if stage == "full":
            signal.raise_signal(signal.SIGTERM)
        return real(run, surveyed, normalisers, stage, student)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", stopping)
        assert lab.distill() == 130
    assert "interrupted during an evaluation" in capsys.readouterr().err
    out = lab.folder / "out"
    assert steps(out)[-1] == 10
    assert not (out / "reports" / "full.json").exists()
    assert_same_run(lab, lab.run(), whole)


def test_a_signal_before_the_first_step_costs_nothing(lab, monkeypatch):
    from agglom import survey

    real = survey.chosen_rows

    def stopping(run):
        signal.raise_signal(signal.SIGTERM)
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(survey, "chosen_rows", stopping)
        assert lab.distill() == 130
    assert steps(lab.folder / "out") == []
    lab.run()


def test_goes_on_from_an_older_checkpoint(lab, whole):
    """In a new folder, and in its own, where the later checkpoints of the first time are not taken for old ones."""
    checkpoint = whole / "checkpoints" / "step-00000004"
    assert_same_run_from(lab, lab.run("new", None, "--resume", str(checkpoint)), whole, 4)

    own = lab.folder / "own"
    shutil.copytree(whole, own)
    keep = {"log.keep": 2}
    lab.run("own", keep, "--resume", str(own / "checkpoints" / "step-00000004"))
    assert steps(own) == [9, 10]
    assert_same_run(lab, own, whole)


def assert_same_run_from(lab, out, whole, step):
    assert lab.same(lab.metrics(out), [line for line in lab.metrics(whole) if line["step"] > step])
    assert lab.same(lab.rows(out, "teachers"), lab.rows(whole, "teachers"))
    assert lab.same(lab.rows(out, "full"), lab.rows(whole, "full"))
    assert lab.same(lab.weights(out), lab.weights(whole))


def test_checkpoints_at_intervals_and_ends_of_stages(whole):
    assert steps(whole) == [3, 4, 6, 9, 10]


def test_keeps_the_last_checkpoints(lab):
    assert steps(lab.run("out", {"log.keep": 2})) == [9, 10]


def test_what_the_teachers_said_is_stored(lab, stop_at, monkeypatch):
    """Each image of the evaluation is encoded by each source once, a resume encodes none of them again."""
    counts, real = {}, targets.encode

    def counting(teachers, names, pixels, *see):
        if pixels.shape[-1] == 64 and names == list(teachers):  # the survey asks for all of them by list
            for name in names:
                counts[name] = counts.get(name, 0) + len(pixels)
        return real(teachers, names, pixels, *see)

    monkeypatch.setattr(targets, "encode", counting)
    stop_at(5)
    assert lab.distill() == 130
    assert counts == {"fair": 50, "one": 50, "two": 50}
    lab.run()
    assert counts == {"fair": 50, "one": 50, "two": 50}


def test_broken_stored_features_are_made_again(lab, whole):
    out = lab.folder / "out"
    shutil.copytree(whole, out)
    (out / "features" / "one.safetensors").write_bytes(b"\0" * 9)
    (out / "reports" / "full.json").unlink()
    assert_same_run(lab, lab.run(), whole)


# ── Refusals ──


def test_never_refuses_a_folder_with_a_run(lab, finished, capsys):
    before = lab.tree(finished)
    assert lab.distill("out", None, "--resume", "never") == 2
    message = capsys.readouterr().err
    assert "--resume never" in message
    assert str(finished) in message
    assert lab.tree(finished) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"optim.batch": 16}, "config.optim.batch was 8 and is 16"),
        ({"stages": [{"name": "full", "length": "9 steps", "size": 64}]}, "config.stages"),
        ({"seed": 1}, "config.seed was 0 and is 1"),
        ({"balance": {"kind": "uniform"}}, 'config.balance.kind was "group_dro" and is "uniform"'),
        ({"augment.flip": True}, "config.augment.flip was false and is true"),
        ({"teachers.two.weight": 0.5}, "config.teachers.two.weight was 1.0 and is 0.5"),
        ({"engine.zero": 2}, "config.engine.zero was 1 and is 2"),
        ({"student.options": {"width": 16}}, "config.student.options.width was absent and is 16"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_refuses_another_configuration(lab, finished, capsys, change, field):
    before = lab.tree(finished)
    assert lab.distill("out", change) == 4
    message = capsys.readouterr().err
    assert f"belongs to another job: {field}" in message
    assert "choose another --out" in message
    assert lab.tree(finished) == before


def test_refuses_another_manifest(lab, finished, capsys):
    other = lab.manifest(lambda rows: rows[3].update(device="A" if rows[3]["device"] == "B" else "B"))
    assert lab.distill("out", {"data.manifest": other}) == 4
    assert "belongs to another job: manifest was " in capsys.readouterr().err


def test_refuses_other_teacher_weights(lab, tmp_path, capsys, stop_at):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")
    change = {"teachers.two.options.weights": str(weights)}
    stop_at(1)
    assert lab.distill("out", change) == 130
    weights.write_bytes(b"two")
    assert lab.distill("out", change) == 4
    assert "belongs to another job: teacher two was " in capsys.readouterr().err


def test_what_is_printed_and_reported_may_change(lab, finished):
    """Log settings, labels, groups and the bootstrap change no weight."""
    (finished / "reports" / "full.json").unlink()
    lab.run("out", {"log.every": "5 steps", "data.labels": ["even"], "data.groups": [], "evaluate.bootstrap": 10})
    rows = lab.rows(finished)
    assert {row["attribute"] for row in rows} == {""}
    assert "auroc" in {row["metric"] for row in rows}


def test_records_no_step_twice(lab, finished):
    """A run that died after its last checkpoint leaves lines of steps that are done again, and half a line."""
    metrics = finished / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    shutil.rmtree(finished / "checkpoints" / "step-00000010")
    (finished / "checkpoints" / "latest").write_text("step-00000009")
    metrics.write_text("\n".join(lines) + '\n{"step": 11, "lo')
    lab.run()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [2, 4, 6, 8, 10]
