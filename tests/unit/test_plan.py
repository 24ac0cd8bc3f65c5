"""The plan: durations become steps, batches are divided, groups are counted, doubts are told."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agglom import plan
from agglom.core import groups
from agglom.data.manifest import Manifest
from agglom.errors import ConfigError
from agglom.job import (
    Attribute,
    Balance,
    Data,
    Evaluate,
    Job,
    Log,
    Loss,
    Mfd,
    Optim,
    Proxies,
    Splits,
    Stage,
    StudentSpec,
    TeacherSpec,
)

SPLIT = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
SEX = ("F", "M", "F", None, "F", "M", "F", "M", "F", "F", None, "F")
VIEW = ("AP", "PA") * 6
PATIENT = [0, 1, 0, 2, 3, 3, 4, 5, 6, 6, 7, 8]


@pytest.fixture
def manifest():
    return Manifest(
        path=Path("/data/table.csv"),
        images=tuple(f"/data/{i}.png" for i in range(12)),
        patient_N=np.array(PATIENT),
        patients=tuple("abcdefghi"),
        split_N=np.array(SPLIT),
        label_NL=np.zeros((12, 1), np.float32),
        labels=("ill",),
        attributes={"sex": SEX, "view": VIEW},
        digest="",
    )


@pytest.fixture
def job():
    return Job(
        data=Data(
            manifest="/data/table.csv",
            labels=("ill",),
            attributes={"sex": Attribute(), "view": Attribute()},
            groups=("sex", "sex*view"),
            min_support=2,
        ),
        teachers={
            "clip": TeacherSpec(kind="timm", options={"model": "a"}),
            "erased": TeacherSpec(kind="erased", options={"attribute": "sex"}, source="clip"),
            "dino": TeacherSpec(kind="timm", options={"model": "b"}),
        },
        student=StudentSpec(options={"model": "tiny"}),
        optim=Optim(batch=4, accumulate=2),
        stages=(
            Stage(name="warm", length="10 epochs", size=64, teachers=("erased",), warmup="20%"),
            Stage(name="full", length="100 samples", size=112, warmup="2 steps", lr=1e-4),
        ),
        log=Log(every="10%", checkpoint="2 epochs"),
    )


def test_stages_in_steps(job, manifest):
    resolved = plan.resolve(job, Path(), 2, manifest)
    warm, full = resolved.stages
    assert (warm.first_step, warm.steps, warm.warmup_steps, warm.teachers) == (0, 15, 3, ("erased",))
    assert (full.first_step, full.steps, full.warmup_steps, full.teachers) == (15, 25, 2, ("clip", "erased", "dino"))
    assert (warm.index, full.index, full.lr, full.size) == (0, 1, 1e-4, (112, 112))
    assert resolved.total_steps == 40
    assert (resolved.log_every, resolved.checkpoint_every) == (4, 3)
    assert (resolved.micro, resolved.global_batch, resolved.world) == (1, 4, 2)
    assert resolved.evaluate_size == (112, 112)


def test_evaluation_size_can_be_set(job, manifest):
    assert plan.resolve(replace(job, evaluate=Evaluate(size=96)), Path(), 1, manifest).evaluate_size == (96, 96)


def test_sizes_are_height_and_width(job, manifest):
    drawn = replace(job.stages[1], size=(96, 128), sizes=(64, (96, 128)))
    job = replace(job, stages=(job.stages[0], drawn), evaluate=Evaluate(sizes=(64, (160, 64)), fvu_images=2))
    resolved = plan.resolve(job, Path(), 1, manifest)
    assert [(stage.size, stage.sizes) for stage in resolved.stages] == [
        ((64, 64), ((64, 64),)),
        ((96, 128), ((64, 64), (96, 128))),
    ]
    assert resolved.evaluate_size == (96, 128)
    assert plan.sweep_sizes(resolved, job) == [(64, 64), (160, 64), (96, 128)]
    text = plan.render(resolved, job, manifest)
    assert " 64, 96×128 " in text
    assert "The evaluation runs at 96×128 px" in text
    assert "the held-out sample at 64, 160×64, 96×128 px" in text
    assert "one is drawn for each step" in text
    assert "Sizes are height × width." in text
    # At each of 3 sizes 2 train images once, and at most 2 of val and 2 of test before and after 2 stages.
    evaluated = [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| clip ")]
    plainly = plan.render(resolved, replace(job, evaluate=Evaluate()), manifest)
    before = [line.split("|")[3].strip() for line in plainly.splitlines() if line.startswith("| clip ")]
    val = min(2, len(manifest.rows("val")))
    assert int(evaluated[0]) - int(before[0]) == 3 * (2 + 3 * (2 + val))


def test_one_square_size_is_told_as_before(job, manifest):
    text = plan.render(plan.resolve(job, Path(), 1, manifest), job, manifest)
    assert "drawn" not in text
    assert "height" not in text
    assert "held-out sample at" not in text


def test_batch_that_does_not_divide(job, manifest):
    with pytest.raises(ConfigError, match="4 images do not divide over 3 ranks × 2 accumulation steps; 6 do"):
        plan.resolve(job, Path(), 3, manifest)


def test_warm_up_longer_than_its_stage(job, manifest):
    stage = Stage(name="a", length="5 steps", warmup="4 epochs")
    with pytest.raises(
        ConfigError, match=r"stages\[0\].warmup: '4 epochs' is 6 steps, longer than the stage \(5 steps"
    ):
        plan.resolve(replace(job, stages=(stage,)), Path(), 1, manifest)


@pytest.mark.parametrize("name", ["sex", "view", "sex*view", "view*sex"])
def test_support_agrees_with_the_groups_of_training(manifest, name):
    space = groups.encode(name, manifest.attributes)
    counts = plan.support(manifest, [name])
    assert list(dict.fromkeys(c.group for c in counts)) == [*space.values, None]
    index_N = space.index_N.numpy()
    for count in counts:
        rows = manifest.rows(count.split)
        wanted = -1 if count.group is None else space.values.index(count.group)
        rows = rows[index_N[rows] == wanted]
        assert (count.images, count.patients) == (len(rows), len(set(manifest.patient_N[rows])))


def test_warnings(job, manifest):
    warnings = "\n".join(plan.resolve(job, Path(), 1, manifest).warnings)
    assert "the normaliser is fitted on 6 images; below 3000" in warnings
    # Test patients: F 6 and 8, M nobody.
    assert "fewer than 2 test patients, so no interval is promised for: sex M (0), sex*view F|AP (1)" in warnings
    assert "label ill: train has 0 positive and 6 negative images, so no probe is fitted" in warnings
    assert "sex F" not in warnings
    assert "no test rows" not in warnings


def test_a_group_of_nobody_is_refused(job, manifest):
    nobody = replace(manifest, attributes={"sex": (None,) * 12, "view": VIEW})
    with pytest.raises(ConfigError, match=r"balance\.group: nobody is annotated with 'sex' in /data/table\.csv"):
        plan.resolve(replace(job, balance=Balance(kind="group_dro", group="sex")), Path(), 1, nobody)


def test_warnings_where_things_are_absent(job, manifest):
    data = replace(job.data, labels=(), groups=(), splits=Splits(test=None))
    changed = replace(job, data=data, balance=Balance(kind="group_dro", group="sex*view"), optim=Optim(batch=16))
    without_test = replace(manifest, split_N=np.where(manifest.split_N == "test", "val", manifest.split_N))
    warnings = "\n".join(plan.resolve(changed, Path(), 1, without_test).warnings)
    assert "there are no test rows: the report is on val" in warnings
    assert "there are no labels" in warnings
    assert "data.groups is empty" in warnings
    assert "balance.group: no train image of sex*view F|PA, M|AP; no weight can help there" in warnings
    assert "optim.batch 16 exceeds the 6 train images" in warnings


def test_what_is_done_for_the_groups_is_told(job, manifest):
    balance = Balance(kind="cvar", group="sex", resample=0.25)
    changed = replace(job, balance=balance, loss=Loss(mfd=Mfd(label="ill", weight=3)))
    text = plan.render(plan.resolve(changed, Path(), 1, manifest), changed, manifest)
    assert "- weights: cvar over sex\n" in text
    assert "- images: drawn with replacement, a group of share p with one ∝ p^0.75\n" in text
    assert "- MFD of ill over sex: 3 × that of the summaries of all teachers\n" in text


def test_clusters_that_stand_in_for_groups_are_told(job, manifest):
    balance = Balance(kind="group_dro", proxies=Proxies(teacher="erased", clusters=3))
    changed = replace(job, balance=balance, evaluate=Evaluate(probe_images=4), loss=Loss(fit_images=4))
    text = plan.render(plan.resolve(changed, Path(), 1, manifest), changed, manifest)
    assert "- weights: group_dro over clusters of erased\n" in text
    assert "- groups of all images: 3 clusters of the summaries of erased, the best of 5 fits by k-means\n" in text
    # Two train images are not among those of the evaluation; the source encodes them.
    assert re.search(r"\| clip +\| 160 +\| 12 ", text)
    assert re.search(r"\| dino +\| 100 +\| 10 ", text)
    sex = replace(changed, balance=replace(balance, group="sex"))
    text = plan.render(plan.resolve(sex, Path(), 1, manifest), sex, manifest)
    assert "- weights: group_dro over sex, else clusters of erased\n" in text
    assert "- groups of images without sex: 3 clusters" in text


def test_render(job, manifest):
    text = plan.render(plan.resolve(job, Path(), 2, manifest), job, manifest)
    assert "- images: 6 train, 2 val, 4 test (9 patients)" in text
    assert "- global batch 4 = 1 image × 2 accumulation steps × 2 ranks; fp32, ZeRO 1" in text
    lines = text.replace("\\|", "·").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["warm", "15", "3", "64", "0.001 → 1e-05", "10.0", "erased", "0.0 MiB"] in rows
    # A source is encoded wherever what derives from it is trained on.
    assert ["clip", "160", "12"] in rows
    assert ["dino", "100", "12"] in rows
    assert ["erased", "from clip", "from clip"] in rows
    assert ["sex", "F", "3 (2)", "1 (1)", "3 (2)", ""] in rows
    assert ["sex", "M", "2 (2)", "1 (1)", "0 (0)", "below 2 test patients"] in rows
    assert ["sex", "not annotated", "1 (1)", "0 (0)", "1 (1)", ""] in rows
    assert "## Warnings" in text
