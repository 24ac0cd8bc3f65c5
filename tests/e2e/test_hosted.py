"""A run with teachers in micro-batches and parked weights is the same run; in another precision it is another."""

from agglom import cli

MOVED = {"teachers.one.micro_batch": 3, "teachers.two.placement": "cpu_swap", "teachers.two.licence": "MIT"}


def test_micro_batches_change_no_loss(lab, whole, capsys):
    assert lab.same(lab.metrics(lab.run("moved", MOVED)), lab.metrics(whole))
    said = "commercial use of the student: unknown, since these licences are: fair (none), one (none)\n"
    assert said in capsys.readouterr().out


def test_the_plan_names_a_licence_that_forbids_commercial_use(lab, capsys):
    config = lab.config({"teachers.two.licence": "CC-BY-NC-4.0"})
    assert cli.main(["plan", "--config", str(config)]) == 0
    line = "- commercial use of the student: no, forbidden by two (CC-BY-NC-4.0)\n"
    assert line in capsys.readouterr().out


def test_a_run_goes_on_with_other_batches_but_not_in_another_precision(lab, finished, capsys):
    assert lab.distill("out", MOVED) == 0
    assert lab.distill("out", {"teachers.one.dtype": "bf16"}) == 4
    assert 'config.teachers.one.dtype was "fp32" and is "bf16"' in capsys.readouterr().err


def test_other_precisions_are_close(lab, whole):
    half = lab.metrics(lab.run("half", {"teachers.one.dtype": "bf16"}))
    for ours, theirs in zip(half, lab.metrics(whole), strict=True):
        if "loss" in theirs:
            assert 0 < abs(ours["loss"] / theirs["loss"] - 1) < 0.02


def test_a_licence_that_contradicts_is_an_error(lab, capsys):
    teacher = {"kind": "timm", "options": {"model": "test_vit", "pretrained": False}, "licence": "CC-BY-NC-4.0"}
    assert lab.distill("wrong", {"teachers.two": teacher}) == 2
    assert "teachers.two: licence is 'CC-BY-NC-4.0', but its weights come under 'apache-2.0'" in capsys.readouterr().err
