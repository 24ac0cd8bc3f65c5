"""Jobs in which students teach later students: how they are cut, and what is wrong with them."""

import pytest

from agglom import config, curriculum, testing
from agglom.errors import ConfigError
from agglom.job import StudentSpec

JOB = """
data: {manifest: table.csv}
teachers:
  one: {kind: timm, options: {model: resnet18}}
  two: {kind: timm, options: {model: resnet34}}
  proxy: {kind: checkpoint, options: {stage: wide}}
  fair: {kind: erased, source: proxy, options: {attribute: sex}}
  own: {kind: checkpoint, options: {stage: middle, head: one}}
student: {options: {model: vit_large_patch16_224}}
evaluate: {prompted_by: proxy}
stages:
  - {name: first, length: 20 steps}
  - {name: wide, length: 20 steps, teachers: [two]}
  - {name: middle, length: 20 steps, student: {options: {model: vit_base_patch16_224}}, teachers: [one, fair]}
  - {name: small, length: 20 steps, student: {options: {model: vit_tiny_patch16_224}}}
  - {name: last, length: 20 steps, teachers: [own]}
"""
JOB = JOB.replace("{manifest: table.csv}", "{manifest: table.csv, attributes: {sex: {}}}")


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)

    def load(*overrides):
        return config.load(path, overrides)[0]

    return load


def test_a_new_student_starts_a_leg_with_the_teachers_that_exist(load):
    job = load()
    wide, middle, small = curriculum.parts(job)
    assert [[stage.name for stage in leg.stages] for leg in (wide, middle, small)] == [
        ["first", "wide"],
        ["middle"],
        ["small", "last"],
    ]
    assert [leg.student.options["model"].split("_")[1] for leg in (wide, middle, small)] == ["large", "base", "tiny"]
    assert [list(leg.teachers) for leg in (wide, middle, small)] == [
        ["one", "two"],
        ["one", "two", "proxy", "fair"],
        ["one", "two", "proxy", "fair", "own"],
    ]
    assert [leg.evaluate.prompted_by for leg in (wide, middle, small)] == [None, "proxy", "proxy"]
    assert all(stage.student is None for leg in (wide, middle, small) for stage in leg.stages)


def test_legs_run_in_folders_of_their_own_and_the_last_one_in_that_of_the_run(load, tmp_path):
    job, out = load(), tmp_path / "out"
    wide, middle, small = curriculum.legs(job, out)
    assert [leg.out for leg in (wide, middle, small)] == [out / "students" / "wide", out / "students" / "middle", out]
    assert [leg.teaches for leg in (wide, middle, small)] == [True, True, False]
    folder = {"folder": str(out / "students" / "wide" / "export")}
    assert middle.job.teachers["proxy"].options == small.job.teachers["proxy"].options == folder
    assert small.job.teachers["own"].options == {
        "head": "one",
        "folder": str(out / "students" / "middle" / "export"),
    }
    assert small.written == job


def test_what_an_earlier_leg_writes_down_is_its_job_wherever_the_run_lies(load, tmp_path):
    _, middle, _ = curriculum.legs(load(), tmp_path / "out")
    folder = tmp_path / "moved" / "students" / "middle"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(middle.written))
    job, _ = config.load(folder / "config.yaml")
    assert job.teachers["proxy"].options == {"folder": str(tmp_path / "moved" / "students" / "wide" / "export")}
    (leg,) = curriculum.legs(job, folder)
    assert leg.job == leg.written == job


def test_one_student_is_one_leg(load, tmp_path):
    ordinary = ("teachers={one: {kind: timm, options: {model: resnet18}}}", "evaluate.prompted_by=one")
    stages = "[{name: a, length: 1 step}, {name: b, length: 1 step}]"
    job = load(*ordinary, f"stages={stages}")
    assert curriculum.legs(job, tmp_path) == [curriculum.Leg(job, tmp_path, job, teaches=False)]
    named = load(*ordinary, f"stages={stages}", "stages[0].student.options.model=vit_base_patch16_224")
    (leg,) = curriculum.parts(named)
    assert leg.student == StudentSpec(options={"model": "vit_base_patch16_224"})
    assert [stage.name for stage in leg.stages] == ["a", "b"]


def test_paths_of_a_student_of_a_stage_start_at_its_file(load, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def build(*, weights: str) -> 'Student': ...\n")
    text = (tmp_path / "job.yaml").read_text()
    student = "student: {kind: mine.py, options: {weights: ./w.pth}}, "
    (tmp_path / "job.yaml").write_text(text.replace("{name: last, ", "{name: last, " + student))
    job, _ = config.load(tmp_path / "job.yaml")
    assert job.stages[4].student == StudentSpec(kind=str(path), options={"weights": str(tmp_path / "w.pth")})


WRONG = {
    "no such stage": (
        "teachers.proxy.options.stage=wid",
        "teachers.proxy.options.stage: 'wid' is not one of the stages after which another student starts: wide, "
        "middle; did you mean 'wide'?",
    ),
    "amid a student": ("teachers.proxy.options.stage=first", "teachers.proxy.options.stage: 'first' is not one of"),
    "the last student": ("teachers.own.options.stage=last", "teachers.own.options.stage: 'last' is not one of"),
    "both": ("teachers.proxy.options.folder=x", "teachers.proxy.options: folder and stage both name an export"),
    "neither": ("teachers.proxy.options={}", "teachers.proxy.options: name the export: folder, or stage"),
    "not yet": ("stages[0].teachers=[two, proxy]", "stages[0].teachers: 'proxy' is not there yet: its own stage ends"),
    "derived from what is not yet": ("stages[1].teachers=[fair]", "stages[1].teachers: 'fair' is not there yet"),
    "a student's option": ("stages[3].student.options.modle=x", "stages[3].student.options: unknown key 'modle'"),
    "a student's kind": ("stages[2].student.kind=tim", "stages[2].student.kind: 'tim' is not one of the students"),
    "class tokens of a student": (
        "heads.tokens=own",
        "stages[2].student.options.class_tokens: heads.tokens: own needs one for each of 2 teachers, got 1",
    ),
    "levels of a student": ("heads.kind=ladder", "student.options.levels: heads.kind: ladder needs at least 1, got 0"),
    "depth": ("heads={kind: transformer, depth: 2}", "heads.depth: kind transformer is one block, got 2; set 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(load, case):
    override, expected = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert expected in str(caught.value)


def test_a_job_of_one_student_has_no_earlier_one(load):
    with pytest.raises(ConfigError, match="the stages after which another student starts: none; there are"):
        load("stages=[{name: a, length: 1 step}]")


def test_enough_tokens_and_levels_are_no_problem(load):
    more = {"student": 2, "stages[2].student": 2, "stages[3].student": 5}
    options = [f"{key}.options.class_tokens={count}" for key, count in more.items()]
    options += [f"{key}.options.levels=3" for key in more]
    assert load("heads={tokens: own, kind: ladder}", "stages[0].teachers=[one, two]", *options)


def test_the_contract_suite_runs_on_every_student_and_the_teachers_that_exist(load, monkeypatch):
    seen = []

    def run(kind, package, options, *spec, **more):
        seen.append((package, options["model"]))
        return [testing.Result("seen", True, "")]

    monkeypatch.setattr(testing, "run", run)
    text = testing.check_job(load())
    assert seen == [
        *(("teachers", f"resnet{depth}") for depth in (18, 34)),
        *(("students", f"vit_{size}_patch16_224") for size in ("large", "base", "tiny")),
    ]
    assert text.count("not there yet: it is, or derives from, a student of this job") == 3
    assert "student of stage small\nok    seen" in text
