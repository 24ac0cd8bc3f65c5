"""Images that are not square, sizes drawn per step, the sweep over sizes and mosaics, from the job to the report."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from agglom import export, exported, plugins, targets
from agglom.data import readers
from agglom.data.sampler import drawn

TEACHER = str(Path(__file__).parent / "tiny_teacher.py")
LABELS = {"data.labels": ["even"]}
TALL = [64, 32]
STAGES = [
    {"name": "warm", "length": "4 steps", "size": 32, "teachers": ["one", "two"], "warmup": "2 steps"},
    {"name": "full", "length": "6 steps", "size": TALL, "sizes": [TALL, 48, [32, 80]]},
]
# Patches of 12 px beside those of 16.
SIZED = {"stages": STAGES, "teachers.two.options": {"seed": 1, "width": 24, "patch": 12}}
SWEPT = SIZED | LABELS | {"stages": STAGES[1:], "evaluate.sizes": [[32, 80], 96]}
SWEPT |= {"evaluate.permutations": 0, "evaluate.conflict": False}


def reload_here(folder):
    """A fresh process costs seconds of imports."""
    assert export.verify(folder) <= export.TOLERANCE
    return ""


@pytest.fixture(scope="module")
def swept(workshop):
    """The output of a run with everything that is new, and what it said. Only to be read."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agglom.journal.Journal.say", lambda self, line: said.append(line))
        patch.setattr(export, "_verify_afresh", reload_here)
        return workshop.run("out", SWEPT), "\n".join(said)


def test_every_teacher_says_how_it_sees_each_size(swept):
    _, said = swept
    assert "full  one: 64×32 px, grid 4×2 | 48 px, grid 3×3 | 32×80 px, grid 2×5\n" in said
    assert (
        "full  two: 64×32 → 60×36 px, grid 5×3, resampled to 4×2 | 48 px, grid 4×4, resampled to 3×3 | "
        "32×80 → 36×84 px, grid 3×7, resampled to 2×5\n"
    ) in said


def test_the_report_and_the_export_know_the_size(swept):
    out, _ = swept
    context = json.loads((out / "reports" / "full.json").read_text())["context"]
    assert context["image_size"] == TALL
    assert [note for note in context["notes"] if "64×32 → 60×36 px, grid 5×3, resampled to 4×2" in note]
    assert json.loads((out / "export" / "config.json").read_text())["agglom"]["pixels"]["size"] == TALL
    assert "64×32, 48, 32×80" in (out / "plan.md").read_text()


def test_the_sweep_has_every_size(lab, swept):
    out, _ = swept
    rows = lab.rows(out)
    sizes = ["64x32", "32x80", "96x96"]
    found = {row["target"] for row in rows if row["metric"] == "sweep_fvu"}
    kinds = [f"{name}/{kind}" for name in ("one", "two", "fair") for kind in ("summary", "patches")]
    assert found == {f"{kind}@{size}" for kind in kinds for size in sizes}
    swept_rows = [row for row in rows if row["metric"] == "sweep_auroc"]
    assert {(row["predictor"], row["target"]) for row in swept_rows} == {
        (name, size) for name in ("student", "teacher/one", "teacher/two", "teacher/fair") for size in sizes
    }
    assert {row["predictor"] for row in lab.rows(out, "teachers") if row["metric"] == "sweep_auroc"} == {
        *("teacher/one", "teacher/two", "teacher/fair")
    }


def test_at_the_size_of_the_evaluation_the_sweep_finds_what_the_evaluation_finds(lab, swept):
    """All 24 train images make the means in both."""
    out, _ = swept

    def key(row, metric):
        return metric, row["predictor"], row["target"], row["label"], row["attribute"], row["group"], row["split"]

    rows = {key(row, row["metric"]): row for row in lab.rows(out) if row["readout"] in ("none", "linear")}
    swept_rows = [row for row in rows.values() if row["metric"].startswith("sweep_") and "64x32" in row["target"]]
    assert len(swept_rows) == 2 * 3 * (6 + 4)
    for row in swept_rows:
        kind, _, _ = row["target"].rpartition("@")
        angular = "fvu_angular" if kind.endswith("summary") else "fvu"
        plain = rows[key(row | {"target": kind}, "auroc" if row["metric"] == "sweep_auroc" else angular)]
        assert (row["status"], row["n"]) == (plain["status"], plain["n"])
        assert row["value"] == pytest.approx(plain["value"], rel=1e-4) or row["value"] is plain["value"] is None


def test_the_sweep_is_that_of_raw_features_computed_anew(images, lab, swept):
    """PHI-S turns and scales, so the ratio of squared errors is that of the teacher's own features."""
    out, _ = swept
    model, teacher = exported.load(out / "export"), plugins.build(TEACHER, "teachers", {"seed": 0})
    with (images / "manifest.csv").open() as file:
        lines = list(csv.DictReader(file))

    def patches(split, encode):
        pixels = [
            torch.from_numpy(readers.decode(str(images / line["image"]), None)).expand(3, -1, -1)
            for line in lines
            if line["split"] == split
        ]
        pixels_BCHW = F.interpolate(torch.stack(pixels), (32, 80), mode="bilinear", antialias=True).clamp(0, 1)
        with torch.no_grad():
            return encode(pixels_BCHW).patches_BND.double().numpy()

    truth, guess = patches("test", teacher.encode), patches("test", lambda pixels: model(pixels)[1]["one"])
    mean = patches("train", teacher.encode).mean(0)
    expected = ((guess - truth) ** 2).mean((1, 2)).sum() / ((mean - truth) ** 2).mean((1, 2)).sum()
    key = {"metric": "sweep_fvu", "target": "one/patches@32x80", "split": "test", "group": "all"}
    [found] = [row for row in lab.rows(out) if row | key == row]
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert found["n"] == 16


def test_the_report_draws_the_sweep(swept):
    out, _ = swept
    for suffix in ("html", "md"):
        text = (out / "reports" / f"full.{suffix}").read_text()
        assert "At other image sizes" in text
        assert "64×32" in text
        assert "32×80" in text


@pytest.fixture(scope="module")
def drawn_sizes(workshop):
    """The output of a run without labels, whose reports are quicker made. Only to be read."""
    assert len({drawn([tuple(TALL), (48, 48), (32, 80)], 0, step) for step in range(4, 10)}) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_verify_afresh", reload_here)
        return workshop.run("drawn", SIZED)


def test_resumes_with_drawn_sizes(lab, drawn_sizes, stop_at):
    stop_at(7)
    assert lab.distill("out", SIZED) == 130
    out = lab.run("out", SIZED)
    assert lab.same(lab.metrics(out), lab.metrics(drawn_sizes))
    assert lab.same(lab.rows(out), lab.rows(drawn_sizes))
    assert lab.same(lab.weights(out), lab.weights(drawn_sizes))


def test_accumulation_sees_the_same_sizes(lab, drawn_sizes):
    out = lab.run("out", SIZED | {"optim.accumulate": 2})
    for a, b in zip(lab.metrics(out), lab.metrics(drawn_sizes), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_specialist_is_judged_on_those_it_serves(lab):
    """With too few train images to find one of them, the sweep says so and goes on."""
    special = {"kind": "specialist", "source": "one", "options": {"attribute": "device", "groups": ["B"]}}
    stages = [{"name": "full", "length": "2 steps", "size": 32}]
    change = {"teachers.fair": special, "stages": stages, "evaluate.sizes": [48], "balance": {"kind": "uniform"}}
    rows = lab.rows(lab.run("out", change))
    found = [row for row in rows if row["target"] == "fair/patches@48x48" and row["split"] == "test"]
    assert {row["group"]: row["n"] for row in found}["A"] == 0
    assert {row["group"]: row["n"] for row in found}["B"] == {row["group"]: row["n"] for row in found}["all"] > 0
    out = lab.run("few", change | {"evaluate.fvu_images": 1})
    context = json.loads((out / "reports" / "full.json").read_text())["context"]
    assert "fair serves none of the train images that the sweep draws for its means" in " ".join(context["notes"])
    assert not [row for row in lab.rows(out) if row["target"].startswith("fair/patches@")]


def test_without_sizes_there_is_no_sweep(lab, whole):
    assert not [row for row in lab.rows(whole) if row["metric"].startswith("sweep_")]
    assert "other image sizes" not in (whole / "reports" / "full.html").read_text()


def test_features_of_the_sweep_that_are_not_finite_are_named(lab, capsys):
    two = {"seed": 1, "width": 24, "nan_at": 96, "nan_above": 0.0}
    assert lab.distill("out", SWEPT | {"teachers.two.options": two}) == 4
    assert "teachers.two: its summary features are not finite at 96 px" in capsys.readouterr().err


def test_a_teacher_that_takes_no_such_image_is_named_at_the_start(lab, monkeypatch, capsys):
    real = targets.encode

    def encode(teachers, names, pixels_BCHW):
        if pixels_BCHW.shape[-1] == 80:
            raise AssertionError("80 is too wide")
        return real(teachers, names, pixels_BCHW)

    monkeypatch.setattr(targets, "encode", encode)
    assert lab.distill("out", SIZED) == 2
    message = "stages[1].sizes[2]: the teacher 'one' takes no image of 32×80 px (80 is too wide)"
    assert message in capsys.readouterr().err


# ── Mosaics ──


MOSAIC = {"teachers.two.options": {"seed": 1, "width": 24, "size": 128}, "teachers.two.mosaic": True}


def test_a_mosaic_teaches_patches(lab, whole, capsys):
    """A patchwise teacher in mosaics of 2×2 and of 4×4 teaches what it does alone; the images are of whole patches."""
    patches = {"loss.summary_weight": 0}
    alone = lab.metrics(lab.run("alone", patches))
    found = lab.metrics(lab.run("mosaic", patches | MOSAIC))
    said = capsys.readouterr().out
    assert "warm  two: 32 px, 4×4 of them in one of 128 px, grid 2×2" in said
    assert "full  two: 64 px, 2×2 of them in one of 128 px, grid 4×4" in said
    assert lab.same(found, alone)


def test_the_summary_of_a_mosaic_is_refused(lab, capsys):
    assert lab.distill("out", MOSAIC) == 2
    assert "teachers.two.mosaic: a summary of a mosaic is of no image in particular" in capsys.readouterr().err


def test_a_mosaic_needs_a_fixed_size(lab, capsys):
    assert lab.distill("out", {"teachers.two.mosaic": True, "loss.summary_weight": 0}) == 2
    assert "teachers.two.mosaic: is for a teacher of a fixed size" in capsys.readouterr().err


def test_a_derived_teacher_sees_no_mosaic(lab, capsys):
    assert lab.distill("out", {"teachers.fair.mosaic": True}) == 2
    assert "teachers.fair.mosaic: sees no image of its own; set this for its source 'one'" in capsys.readouterr().err


def test_the_size_of_the_evaluation_is_one_of_the_sizes(lab, capsys):
    assert lab.distill("out", {"stages": [STAGES[1] | {"size": 64}]}) == 2
    assert "stages[0].size: 64, the size of the evaluation, is not one of sizes" in capsys.readouterr().err
