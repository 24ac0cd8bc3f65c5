"""A student that sees a simulated acquisition of what its teachers see, from the configuration to the weights."""

import pytest
import torch

from agglom import train
from agglom.engine import Engine

CONFIGURATION, CACHE = 2, 4
VIEWS = {
    "share": 0.5,
    "kinds": {"blur": 0.5, "resolution": 0.5, "contrast": 0.5, "inversion": 1.0, "noise": 0.5},
    "groups": {"device": ["A"]},
}
WARM = {"name": "warm", "length": "2 steps", "size": 32, "teachers": ["one", "two"], "warmup": "1 steps"}
FULL = {"name": "full", "length": "4 steps", "size": 64, "views": VIEWS}
VIEWED = {"stages": [WARM, FULL]}


def views(**more):
    return {"stages": [WARM, FULL | {"views": VIEWS | more}]}


def test_the_student_sees_what_no_teacher_does(lab, whole, stop_at, monkeypatch):
    """And a run that was interrupted in such a stage is one that was not, whoever reads the images."""
    batches, asked, seen = [], [], []
    compared, encode, forward = train._compared, train.targets.encode, Engine.__call__

    def comparing(loop, stage, aim, shift, places, batch):
        batches.append((stage.name, batch))
        return compared(loop, stage, aim, shift, places, batch)

    def encoding(teachers, names, pixels_BCHW, *see):
        asked.extend([pixels_BCHW] if see else [])  # the survey has no windows
        return encode(teachers, names, pixels_BCHW, *see)

    def calling(self, pixels_BCHW):
        seen.append(pixels_BCHW)
        return forward(self, pixels_BCHW)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_compared", comparing)
        patch.setattr(train.targets, "encode", encoding)
        patch.setattr(Engine, "__call__", calling)
        out = lab.run("out", VIEWED)
    assert [name for name, _ in batches] == ["warm"] * 2 + ["full"] * 4
    for (name, batch), teachers_BCHW, student_BCHW in zip(batches, asked, seen, strict=True):
        assert torch.equal(teachers_BCHW, batch.pixels_BCHW)
        other_B = (student_BCHW != teachers_BCHW).flatten(1).any(1)
        assert name == "full" or not other_B.any()
        assert (batch.group_B[other_B] == 0).all()  # the first device, A
        assert name == "warm" or torch.equal(student_BCHW, batch.student_BCHW)
    differ = torch.cat([(batch.student_BCHW != batch.pixels_BCHW).flatten(1).any(1) for _, batch in batches[2:]])
    assert 0 < differ.sum() < 32

    # Evaluations see the clean image, as they do without views.
    assert lab.same(lab.rows(out, "teachers"), lab.rows(whole, "teachers"))
    assert (
        "In stage full the student sees 50 % of device A images under a simulated acquisition, at most: "
        "blur 0.5, resolution 0.5, contrast 0.5, inversion 1, noise 0.5."
    ) in (out / "plan.md").read_text()

    stop_at(4)
    assert lab.distill("again", VIEWED) == 130
    lab.run("again", VIEWED | {"data.workers": 1})
    again = lab.folder / "again"
    assert lab.same(lab.metrics(again), lab.metrics(out))
    assert lab.same(lab.rows(again), lab.rows(out))
    assert lab.same(lab.weights(again), lab.weights(out))


def test_other_views_are_another_job(lab, stop_at, capsys):
    stop_at(1)
    assert lab.distill("out", VIEWED) == 130
    assert lab.distill("out", views(share=0.25)) == CACHE
    assert "config.stages[1].views.share was 0.5 and is 0.25" in capsys.readouterr().err
    assert lab.distill("out", {"stages": [WARM, FULL | {"views": None}]}) == CACHE
    assert "config.stages[1].views" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (views(shar=0.5), "stages[1].views: unknown key 'shar'; did you mean 'share'?"),
        (views(share=0), "stages[1].views.share: must be more than 0, got 0"),
        (views(share=1.5), "stages[1].views.share: must be at most 1, got 1.5"),
        (views(kinds={"blurr": 1}), "stages[1].views.kinds: unknown key 'blurr'; did you mean 'blur'?"),
        (views(kinds={"noise": 2}), "stages[1].views.kinds.noise: must be at most 1, got 2"),
        (views(kinds={}), "stages[1].views.kinds: no strength is above 0; give one of blur, resolution, contrast"),
        (views(groups={"devise": ["A"]}), "stages[1].views.groups: 'devise' is not one of the attributes under"),
        (views(groups={"device": []}), "stages[1].views.groups.device: is empty; name the groups"),
        (views(groups={"device": ["A", "A"]}), "stages[1].views.groups.device: 'A' is given twice"),
        (views(groups={"device": ["A", "a"]}), "stages[1].views.groups.device[1]: 'a' is not one of the values of"),
        ({"stages": [FULL | {"views": {"share": 0.5}}]}, "stages[0].views: key 'kinds' is missing; add it"),
        ({"stages": [FULL | {"views": True}]}, "stages[0].views: expected a map of keys, got true"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_wrong_views(lab, capsys, changes, message):
    assert lab.distill("out", changes) == CONFIGURATION
    assert message in capsys.readouterr().err


def test_views_of_a_group_that_is_not_trained_on(lab, capsys):
    table = lab.manifest(lambda rows: [row.update(device="C") for row in rows if row["split"] == "test"])
    assert lab.distill("out", views(groups={"device": ["A", "C"]}) | {"data.manifest": table}) == CONFIGURATION
    assert "stages[1].views.groups.device[1]: 'C' has no train image in " in capsys.readouterr().err
