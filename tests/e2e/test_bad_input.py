"""Mistakes that people make: each is answered by a message that says what to do and by an exit status.

No traceback, and nothing that is already in the output folder is lost.
"""

import shutil

import numpy as np
import pytest

from agglom import cli
from agglom.engine import checkpoints, latest

CONFIGURATION, DATA = 2, 4


@pytest.fixture
def refuses(lab, capsys):
    """A function: `agglom distill` on the changed base job must end with `status` and every one of `parts`."""

    def run(status, parts, changes=None, *flags, out="out"):
        capsys.readouterr()
        assert lab.distill(out, changes, *flags) == status
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        assert printed.err.startswith("agglom: ")
        for part in parts:
            assert part in printed.err
        return printed.err

    return run


# ── The configuration ──


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"optim.bacth": 8}, ["optim: unknown key 'bacth'; did you mean 'batch'?"]),
        ({"optim.batch": "many"}, ['optim.batch: expected a whole number, got "many"']),
        ({"teachers.one.options.widht": 8}, ["teachers.one.options: unknown key 'widht'; did you mean 'width'?"]),
        ({"teachers.one.options.width": "wide"}, ["teachers.one.options.width: expected int, got 'wide'"]),
        ({"teachers.one.kind": "dinov5"}, ["teachers.one.kind: 'dinov5' is not one of the teachers", "timm"]),
        ({"teachers.one.kind": "./gone.py"}, ["teachers.one.kind: no such file: ", "gone.py"]),
        ({"teachers.fair.source": "three"}, ["teachers.fair.source: 'three' is not one of"]),
        ({"stages": [{"name": "a", "length": "1 steps", "teachers": ["tow"]}]}, ["'tow' is not one of", "'two'?"]),
        ({"stages": [{"name": "a", "length": "0 steps"}]}, ["stages[0].length: '0 steps' trains nothing"]),
        ({"stages": [{"name": "a", "length": "100"}]}, ["stages[0].length: '100' is not a duration"]),
        ({"stages": []}, ["stages: is empty"]),
        ({"balance.group": "sex"}, ["balance.group: 'sex' is not one of"]),
        ({"balance.options.eta": "fast"}, ["balance.options.eta: expected float, got 'fast'"]),
        ({"optim.accumulate": 3}, ["optim.batch: 8 does not divide by accumulate = 3; 6 and 9 do"]),
        (
            {"engine.deepspeed": {"train_batch_size": 7, "scheduler": {"type": "WarmupLR"}}},
            ["engine.deepspeed.train_batch_size: 7 contradicts 8, set by optim.batch", "engine.deepspeed.scheduler"],
        ),
        ({"engine": {"precision": "bf16", "zero": 0}}, ["engine.zero: bf16 with ZeRO 0"]),
        ({"data.manifest": None}, ["data: key 'manifest' is missing"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_configuration(lab, finished, refuses, changes, parts):
    before = lab.tree(finished)
    refuses(CONFIGURATION, parts, changes)
    assert lab.tree(finished) == before


def test_every_problem_is_told_at_once(refuses):
    message = refuses(CONFIGURATION, ["3 problems"], {"optim.bacth": 8, "seed": -1, "stages": []})
    assert len(message.splitlines()) == 4


def test_missing_configuration(tmp_path, capsys):
    (tmp_path / "demo.yaml").touch()
    wrong = tmp_path / "dmeo.yaml"
    assert cli.main(["distill", "--config", str(wrong), "--out", str(tmp_path / "out")]) == CONFIGURATION
    assert f"{wrong}: no such configuration" in (message := capsys.readouterr().err)
    assert "did you mean 'demo.yaml'?" in message


def test_unwritable_output(lab, capsys):
    (lab.folder / "file").write_text("kept")
    assert lab.distill("file/out") == CONFIGURATION
    assert "cannot write there (Not a directory); choose another folder" in capsys.readouterr().err
    assert (lab.folder / "file").read_text() == "kept"


def test_absent_group(lab, finished, refuses):
    """The column is there, but nobody is annotated."""
    before = lab.tree(finished)
    nobody = lab.manifest(lambda rows: [row.update(device="") for row in rows])
    changes = {"data.manifest": nobody, "data.groups": [], "teachers.fair": None}
    refuses(CONFIGURATION, ["balance.group: nobody is annotated with 'device'", nobody], changes)
    assert lab.tree(finished) == before


def test_missing_teacher_weights(lab, finished, refuses, tmp_path):
    before, path = lab.tree(finished), str(tmp_path / "gone.pth")
    spec = {"kind": "timm", "options": {"model": "test_vit", "checkpoint": path}}
    refuses(CONFIGURATION, [path, "no such file"], {"teachers.two": spec})
    assert lab.tree(finished) == before


# ── The manifest and its images ──


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda rows: rows[0].update(image="images/gone.png"), ["missing image files: 1 row", "images/gone.png"]),
        (lambda rows: rows[-1].update(patient=rows[0]["patient"]), ["patients in two splits", "'p00000'"]),
        (lambda rows: rows[5].update(split="dev"), ["unknown split values: 1 row", "'dev'"]),
        (lambda rows: rows[5].update(even="yes"), ["label 'even' not 0 or 1: 1 row", "'yes'"]),
        (lambda rows: rows[5].update(patient=""), ["empty patient cells: 1 row"]),
        (lambda rows: [row.pop("device") for row in rows], ["missing column 'device'"]),
        (lambda rows: rows[1].update(image=rows[0]["image"]), ["duplicate image rows: 1 row"]),
    ],
    ids=["missing image", "two splits", "split", "label", "no patient", "no column", "twice"],
)
def test_wrong_manifest(lab, finished, refuses, edit, parts):
    before = lab.tree(finished)
    path = lab.manifest(edit)
    refuses(DATA, [path, *parts], {"data.manifest": path, "data.labels": ["even"]})
    assert lab.tree(finished) == before


def test_missing_manifest(lab, finished, refuses, images):
    before = lab.tree(finished)
    path = str(images / "manifset.csv")
    refuses(DATA, [f"{path}: the manifest does not exist; did you mean", "manifest.csv"], {"data.manifest": path})
    assert lab.tree(finished) == before


def test_pixels_out_of_range(lab, refuses, images):
    np.save(images / "images" / "hounsfield.npy", np.full((64, 64), -800, np.int16))
    path = lab.manifest(lambda rows: rows[2].update(image="images/hounsfield.npy"))
    parts = ["hounsfield.npy: int16 pixels from -800 to -800", "Set data.value_range", f"data row 3 of {path}"]
    refuses(DATA, parts, {"data.manifest": path})


def test_corrupt_image_met_while_training(lab, refuses, capsys):
    """A checkpoint of the step before is kept; with the image repaired, the same command goes on from it."""
    changes, image, row = lab.damaged()
    refuses(DATA, [f"{image}: the image cannot be decoded", f"data row {row + 1} of "], changes)
    folder = lab.folder / "out" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-00000002"]
    shutil.copy(lab.images / "images" / image.name, image)
    lab.run("out", changes)
    assert "goes on after step 2" in capsys.readouterr().out
    assert [line["step"] for line in lab.metrics(lab.folder / "out")] == [2, 4, 6, 8, 10]


# ── Teachers ──


def test_an_attribute_that_is_constant_cannot_be_erased(lab, refuses):
    """Only B in train; device is not balanced, so the eraser is the first to need two groups."""
    one = lab.manifest(lambda rows: [row.update(device="B") for row in rows if row["split"] == "train"])
    changes = {"data.manifest": one, "balance": {"kind": "uniform"}}
    refuses(DATA, ["teachers.fair: cannot fit on the train patients", "'device' is the same in all 2"], changes)


def test_features_that_are_not_finite(refuses):
    """In the survey, before anything is fitted on them."""
    changes = {"teachers.two.options": {"nan_at": 64}}
    refuses(DATA, ["teachers.two: its summary features are not finite", "check its weights"], changes)


# ── The disk ──


def test_full_disk_while_logging(lab, finished, refuses):
    """The line cannot be written; the checkpoint before it is still there, and the run goes on with space."""
    metrics = finished / "metrics.jsonl"
    shutil.rmtree(finished / "checkpoints" / "step-00000010")
    (finished / "checkpoints" / "latest").write_text("step-00000009")
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    before = lab.tree(finished / "checkpoints")
    refuses(DATA, [f"{metrics}: cannot be written (No space left on device)", "free space"])
    assert lab.tree(finished / "checkpoints") == before
    metrics.unlink()
    lab.run()


def test_full_disk_at_a_checkpoint(lab, refuses):
    tag = lab.folder / "out" / "checkpoints" / "step-00000003"
    tag.mkdir(parents=True)
    (tag / "mp_rank_00_model_states.pt").symlink_to("/dev/full")
    refuses(DATA, [f"{tag}: cannot write the checkpoint", "free space there"])
    assert latest(tag.parent) is None
    shutil.rmtree(tag)
    lab.run()


@pytest.mark.parametrize("name", ["export/config.json", "plan.md", "config.yaml"])
def test_full_disk_at_the_end(lab, finished, refuses, name):
    """What was trained stays."""
    path = finished / name
    path.unlink()
    path.symlink_to("/dev/full")
    before = lab.tree(finished / "checkpoints")
    refuses(DATA, ["No space left on device", "free space"])
    assert lab.tree(finished / "checkpoints") == before


# ── Checkpoints ──


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_corrupt_checkpoint(lab, finished, refuses, name):
    file = finished / "checkpoints" / "step-00000010" / name
    file.write_bytes(file.read_bytes()[:1000])
    before = lab.tree(finished / "checkpoints")
    refuses(DATA, [f"{file.parent}: cannot read the checkpoint", "--resume PATH"])
    assert lab.tree(finished / "checkpoints") == before
    lab.run("out", None, "--resume", str(finished / "checkpoints" / "step-00000009"))


def test_what_is_no_checkpoint(lab, finished, refuses):
    for place in (lab.folder / "nowhere", finished / "reports"):
        refuses(DATA, [f"{place}: not a checkpoint of agglom"], None, "--resume", str(place))


def test_pointer_to_a_checkpoint_that_is_gone(lab, finished, refuses):
    shutil.rmtree(finished / "checkpoints" / "step-00000010")
    refuses(DATA, ["step-00000010: not a checkpoint of agglom"])


@pytest.mark.parametrize("verb", ["evaluate", "export", "compare"])
def test_verbs_without_a_run(lab, capsys, verb):
    empty = lab.folder / "empty"
    empty.mkdir()
    config = [] if verb == "compare" else ["--config", str(lab.config())]
    assert cli.main([verb, *config, "--out", str(empty)]) == DATA
    assert str(empty) in (message := capsys.readouterr().err)
    assert "agglom distill" in message
    assert cli.main([verb, *config, "--out", str(lab.folder / "gone")]) == CONFIGURATION
    assert "there is no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"student": {"kind": "timm", "options": {"model": "test_vit"}}, "evaluate.size": 50},
            "evaluate.size: the student takes no image of 50 px",
        ),
        (
            {"student": {"kind": "timm", "options": {"model": "test_vit", "drop_path": 5}}},
            "drop_path is 5; expected a rate in [0, 1)",
        ),
        ({"engine.deepspeed": {"zero_optimizaton": {"stage": 1}}}, "unknown key; did you mean 'zero_optimization'?"),
        (
            {"engine.deepspeed": {"zero_optimization": {"reduce_bucket_size": "abc"}}},
            "engine.deepspeed: DeepSpeed refuses",
        ),
    ],
    ids=["size", "drop_path", "typo", "type"],
)
def test_what_the_student_and_deepspeed_refuse_is_said_before_training(lab, capsys, change, said):
    assert lab.distill("out", change) == CONFIGURATION
    assert said in capsys.readouterr().err
    assert not list((lab.folder / "out").glob("checkpoints/*"))
