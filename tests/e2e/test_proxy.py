"""A student that was exported teaches another one."""

import json
import shutil

import pytest
import torch

from agglom import cli, config, export, exported, plugins, testing


def test_an_export_keeps_the_contract_of_teachers(labelled):
    for options in ({}, {"head": "two"}, {"size": 32}):
        results = testing.run("checkpoint", "teachers", {"folder": str(labelled / "export"), **options})
        assert all(result.ok for result in results), testing.render(results)


def test_it_says_what_the_export_says(labelled):
    model = exported.load(labelled / "export")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trunk, predicted = model(pixels)
    for head, expected in ((None, trunk), ("one", predicted["one"])):
        teacher = plugins.build("checkpoint", "teachers", {"folder": str(labelled / "export"), "head": head})
        found = teacher.encode(pixels)
        assert teacher.pixels.size is None
        for mine, theirs in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(mine, theirs)


def test_it_follows_the_images_unless_the_student_was_pinned(labelled, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(labelled / "export", folder)
    teacher = plugins.build("checkpoint", "teachers", {"folder": str(folder)})
    assert teacher.encode(torch.rand(1, 3, 32, 64)).grid == (2, 4)
    stored = json.loads((folder / "config.json").read_text())
    stored["agglom"]["pixels"]["pinned"] = True
    (folder / "config.json").write_text(json.dumps(stored))
    assert plugins.build("checkpoint", "teachers", {"folder": str(folder)}).pixels.size == 64


def test_a_student_of_a_student(lab, labelled):
    proxy = {"kind": "checkpoint", "options": {"folder": str(labelled / "export")}}
    changes = {
        "teachers": {"proxy": proxy},
        "stages": [{"name": "small", "length": "2 steps", "size": 64}],
        "data.labels": ["even"],
    }
    out = lab.run("proxy", changes)
    rows = lab.rows(out, "small")
    assert {row["predictor"] for row in rows} >= {"student", "teacher/proxy", "student - teacher/proxy"}
    assert {row["target"] for row in rows if row["metric"].startswith("fvu")} == {"proxy/summary", "proxy/patches"}


# ── Two students in one configuration ──


def curriculum(lab, **large):
    """What changes in the base job: a large student of two teachers, then a small one of the large one and of one."""
    teachers = {name: lab.job()["teachers"][name] for name in ("one", "two")}
    student = {"kind": lab.job()["student"]["kind"], "options": {"width": 16}}
    return {
        "teachers": teachers | {"proxy": {"kind": "checkpoint", "options": {"stage": "large"}}},
        "student.options": {"width": 48},
        "stages": [
            {"name": "large", "length": "4 steps", "size": 32} | large,
            {"name": "small", "length": "4 steps", "size": 64, "student": student, "teachers": ["proxy", "one"]},
        ],
        "log.every": "1 step",
    }


def assert_same_legs(lab, out, whole):
    for folder, stage in (("students/large", "large"), ("", "small")):
        assert lab.same(lab.metrics(out / folder), lab.metrics(whole / folder))
        assert lab.same(lab.rows(out / folder, stage), lab.rows(whole / folder, stage))
        assert lab.same(lab.weights(out / folder), lab.weights(whole / folder))


@pytest.fixture(scope="module")
def taught(workshop):
    """Both students, never interrupted. Only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_verify_afresh", lambda folder: "")
        return workshop.run("taught", curriculum(workshop))


def test_a_large_student_teaches_a_small_one(lab, taught):
    large = taught / "students" / "large"
    for out, stage, names in ((large, "large", {"one", "two"}), (taught, "small", {"proxy", "one"})):
        targets = {row["target"] for row in lab.rows(out, stage) if row["metric"] in ("fvu", "fvu_angular")}
        assert targets == {f"{name}/{kind}" for name in names for kind in ("summary", "patches")}
    widths = [json.loads((out / "export" / "config.json").read_text())["num_features"] for out in (large, taught)]
    assert widths == [48, 16]
    teacher = plugins.build("checkpoint", "teachers", {"folder": str(large / "export")})
    stored = json.loads((taught / "export" / "config.json").read_text())["agglom"]["teachers"]
    assert stored["proxy"]["fingerprint"] == teacher.fingerprint
    plan = (taught / "plan.md").read_text()
    assert "# Plan of student 1 of 2, until stage large\n" in plan
    assert "# Plan of student 2 of 2, until stage small\n" in plan
    assert config.load(taught / "config.yaml")[0].teachers["proxy"].options == {"stage": "large"}
    assert config.load(large / "config.yaml")[0].student.options == {"width": 48}


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 6], ids=["first student", "second student"])
def test_an_interrupted_curriculum_goes_on(lab, taught, stop_at, capsys, step):
    stop_at(step)
    assert lab.distill("out", curriculum(lab)) == 130
    before = lab.tree(lab.folder / "out" / "students" / "large")
    out = lab.folder / "out"
    assert cli.main(["distill", "--out", str(out)]) == 0
    assert_same_legs(lab, out, taught)
    if step > 4:
        assert f"large: the student is there, in {out / 'students' / 'large' / 'export'}" in capsys.readouterr().out
        assert lab.tree(out / "students" / "large") == before


def test_verbs_act_on_the_last_student_wherever_the_run_lies(lab, taught):
    moved = lab.folder / "moved"
    shutil.copytree(taught, moved)
    rows = lab.rows(moved, "small")
    for verb in ("evaluate", "export", "distill"):
        assert cli.main([verb, "--out", str(moved)]) == 0
    assert lab.same(lab.rows(moved, "small"), rows)
    assert lab.same(lab.weights(moved), lab.weights(taught))
    assert cli.main(["evaluate", "--out", str(moved / "students" / "large")]) == 0


def test_an_earlier_student_of_another_job_is_refused(lab, taught, capsys):
    shutil.copytree(taught, lab.folder / "out")
    assert lab.distill("out", curriculum(lab, lr=0.5)) == 4
    message = capsys.readouterr().err
    assert f"{lab.folder / 'out' / 'students' / 'large' / 'export'}: belongs to another job: " in message
    assert "config.stages[0].lr was 0.001 and is 0.5" in message
    assert lab.distill("out", curriculum(lab), "--resume", "never") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_folder_of_one_student_is_no_place_for_several(lab, labelled, capsys):
    shutil.copytree(labelled, lab.folder / "out")
    assert lab.distill("out", curriculum(lab)) == 2
    assert "out holds a run of one student" in capsys.readouterr().err
