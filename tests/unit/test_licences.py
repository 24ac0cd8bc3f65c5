"""What the names of licences mean, and what a student inherits."""

import pytest

from agglom import checks, licences
from agglom.errors import PluginError
from agglom.job import Data, Job, Stage, TeacherSpec


@pytest.mark.parametrize(
    ("licence", "verdict"),
    [
        ("Apache-2.0", True),
        ("apache 2.0", True),
        ("MIT", True),
        ("BSD-3-Clause", True),
        ("CC-BY-4.0", True),
        ("CC BY-SA 4.0", True),
        ("CC0-1.0", True),
        ("dinov3-license", True),
        ("nvidia-open-model-license", True),
        ("CC-BY-NC-4.0", False),
        ("cc-by-nc-nd-4.0", False),
        ("CC BY-NC-SA 4.0", False),
        ("Creative Commons Attribution-NonCommercial 4.0", False),
        ("non-commercial use only", False),
        ("no commercial use", False),
        ("not for commercial use", False),
        ("Academic Free License v3.0", True),
        ("Noncommercial", False),
        ("fair-noncommercial-research-license", False),
        ("apple-amlr", False),
        ("Apple Machine Learning Research Model License", False),
        ("NSCLv1", False),
        ("NVIDIA Source Code License for SegFormer", False),
        ("nvidia-source-code-license-nc", False),
        ("seer-license", False),
        ("research only", False),
        ("for research purposes only", False),
        ("for academic use", False),
        ("MSR-LA", False),
        ("Apache-2.0; CC-BY-NC-4.0", False),
        ("Apache-2.0; MIT", True),
        ("Apache-2.0; unknown", None),
        ("unknown", None),
        ("other", None),
        ("our own", None),
        ("gemma", None),
        ("mitigated", None),
        ("bancnet", None),
    ],
)
def test_commercial_use(licence, verdict):
    assert licences.commercial_use(licence) is verdict


def test_the_licences_that_timm_names_are_sorted():
    """A new one of timm that is taken to forbid or to permit is looked at here."""
    from timm.models._registry import _model_default_cfgs

    named = {one.license for many in _model_default_cfgs.values() for one in many.cfgs.values() if one.license}
    found = {verdict: {x for x in named if licences.commercial_use(x) is verdict} for verdict in (True, False)}
    assert found[False] == {"cc-by-nc-4.0", "apple-amlr", "fair-noncommercial-research-license", "seer-license"}
    permissive = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"}
    assert found[True] == permissive | {"dinov3-license", "nvidia-open-model-license", "apple-ascl"}


def test_the_student_is_marked_by_those_who_forbid_else_by_those_unknown():
    assert licences.of_student({"a": "MIT", "b": "Apache-2.0"}) == (True, [])
    assert licences.of_student({"a": "MIT", "c": "unknown"}) == (None, ["c"])
    verdict = {"c": "unknown", "b": "CC-BY-NC-4.0", "a": "NSCLv1", "d": "MIT"}
    assert licences.of_student(verdict) == (False, ["a", "b"])
    assert licences.sentence(verdict).endswith("no, forbidden by a (NSCLv1), b (CC-BY-NC-4.0)")
    assert licences.sentence({"c": "unknown"}).endswith("unknown, since these licences are: c (unknown)")
    assert licences.sentence({"a": "MIT"}).endswith("no licence forbids it")


def test_the_configuration_tells_what_the_plug_in_does_not_know():
    assert licences.resolve("x", "unknown", None) == "unknown"
    assert licences.resolve("x", "unknown", "MIT") == "MIT"
    assert licences.resolve("x", "other", "CC-BY-NC-4.0") == "CC-BY-NC-4.0"
    assert licences.resolve("x", "", "MIT") == "MIT"
    assert licences.resolve("x", "apache-2.0", "Apache 2.0") == "apache-2.0"
    with pytest.raises(PluginError, match=r"teachers\.x: licence is missing.*set teachers\.x\.licence"):
        licences.resolve("x", " ", None)
    with pytest.raises(PluginError, match=r"teachers\.x: licence is 'MIT', but its weights come under 'cc-by-nc-4\.0'"):
        licences.resolve("x", "cc-by-nc-4.0", "MIT")


def job(**teachers):
    stages = (Stage(name="one", length="1 steps"),)
    return Job(data=Data(manifest="m.csv"), teachers=teachers, stages=stages)


def test_the_plan_says_what_the_configuration_alone_tells():
    free, bound = TeacherSpec(kind="onnx", licence="MIT"), TeacherSpec(kind="onnx", licence="CC-BY-NC-4.0")
    assert licences.planned(job(a=free, c=TeacherSpec(kind="timm"))) == []
    (line,) = licences.planned(job(a=free, b=bound))
    assert line == "- commercial use of the student: no, forbidden by b (CC-BY-NC-4.0)"


def test_problems_of_the_configuration():
    source = TeacherSpec(kind="packaged", options={"model": "mobilenetv2"}, licence=" ")
    derived = TeacherSpec(kind="erased", source="a", options={"attribute": "sex"}, dtype="bf16", micro_batch=4)
    found = {".".join(map(str, key)): message for key, message in checks.problems(job(a=source, b=derived))}
    assert found["teachers.a.licence"].startswith("is empty; name the licence")
    for key in ("dtype", "micro_batch"):
        assert found[f"teachers.b.{key}"] == "it computes on the features of its source; set this key there"
    assert "teachers.b.placement" not in found
