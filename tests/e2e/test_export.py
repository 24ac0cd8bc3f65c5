"""The export reloads in a fresh process, and its backbone in plain timm."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from agglom import export, exported, plugins
from agglom.errors import DataError

STUDENTS = {
    "transformer": {"model": "test_vit", "size": 64},
    "transformer of any size": {"model": "test_vit"},
    "transformer with registers": {"model": "test_vit", "registers": 2},
    "convolutional": {"model": "test_efficientnet"},
}


SHORT = {"name": "full", "length": "2 steps", "size": 64}


@pytest.fixture(scope="module")
def exports(workshop):
    """One export for each student, none verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_verify_afresh", lambda folder: "")
        jobs = {
            name: {"student": {"kind": "timm", "options": options}, "stages": [SHORT]}
            for name, options in STUDENTS.items()
        }
        # One learns from a teacher that is not for commercial use; with another such it is only compared.
        taught = SHORT | {"teachers": ["two", "fair"]}
        jobs["convolutional"] |= {
            "stages": [taught],
            "teachers.two.licence": "CC-BY-NC-4.0",
            "teachers.one.licence": "MIT",
            "teachers.other": workshop.job()["teachers"]["one"] | {"licence": "NSCLv1"},
        }
        return {name: workshop.run(name, job) / "export" for name, job in jobs.items()}


@pytest.fixture
def folder(exports, tmp_path):
    """A copy of an export that may be touched."""
    shutil.copytree(exports["transformer"], tmp_path / "export")
    return tmp_path / "export"


def test_says_how_far_a_fresh_process_is_off(exports):
    text = export._verify_afresh(exports["transformer"])
    difference = re.fullmatch(r"reloaded in a fresh process: max abs diff (\S+)", text)
    assert float(difference[1]) <= export.TOLERANCE


@pytest.mark.parametrize("name", list(STUDENTS))
def test_plain_timm_loads_the_backbone(exports, name):
    """By the line of the model card, with the mean and std of config.json: the features of agglom's trunk."""
    import timm

    folder = exports[name]
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    stored = json.loads((folder / "config.json").read_text())
    assert stored["num_features"] == backbone.num_features
    mean, std = (torch.tensor(stored["pretrained_cfg"][key])[:, None, None] for key in ("mean", "std"))
    sample = load_file(folder / "sample.safetensors")
    with torch.no_grad():
        features = backbone.forward_features((sample["pixels"] - mean) / std)
        pooled = backbone.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, sample["student/summary"], rtol=1e-5, atol=1e-5)
    patches = features.flatten(2).mT if features.ndim == 4 else features[:, backbone.num_prefix_tokens :]
    torch.testing.assert_close(patches, sample["student/patches"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(STUDENTS))
def test_a_student_becomes_a_teacher(exports, name):
    sample = load_file(exports[name] / "sample.safetensors")
    teacher = plugins.build("timm", "teachers", {"model": f"local-dir:{exports[name]}"})
    summary, patches, _ = teacher.encode(sample["pixels"])[:3]
    torch.testing.assert_close(summary, sample["student/summary"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches, sample["student/patches"], rtol=1e-5, atol=1e-5)


def test_heads_predict_raw_features(exports):
    """The normaliser is folded in: predictions have the width and, after all, about the mean of the teacher."""
    folder = exports["transformer"]
    model = exported.load(folder)
    sample = load_file(folder / "sample.safetensors")
    with torch.no_grad():
        trunk, predicted = model(sample["pixels"])
    assert {name: (f.summary_BD.shape[1], f.patches_BND.shape[1:]) for name, f in predicted.items()} == {
        "one": (32, (16, 32)),
        "two": (24, (16, 24)),
        "fair": (32, (16, 32)),
    }
    assert trunk.grid == (4, 4)
    normaliser = load_file(folder.parent / "normaliser.safetensors")
    for name in predicted:
        last = model.heads[f"{name}:patches"].last
        assert not torch.allclose(last.bias, torch.zeros(()), atol=1e-3)
        scale = normaliser[f"{name}/patches/inverse_DD"].norm(dim=0).mean()
        assert 0.01 < last.weight.norm(dim=1).mean() / scale < 100


def test_the_card_speaks_of_licences_and_loading(exports):
    text = (exports["transformer"] / "README.md").read_text()
    assert 'timm.create_model("local-dir:.", pretrained=True)' in text
    assert "agglom.exported.load" in text
    for name in ("one", "two", "fair"):
        made = ", without the linear trace of device" if name == "fair" else ""
        assert f"| {name} | unknown{made} |  | none | " in text
    assert (
        "Commercial use of the student: unknown, since these licences are: fair (none), one (none), two (none)." in text
    )


def test_a_non_commercial_teacher_marks_the_student(exports):
    """Not those that it was only compared with; a derived teacher has the licence of its source."""

    def stored(name):
        return json.loads((exports[name] / "config.json").read_text())["agglom"]

    free, bound = stored("transformer"), stored("convolutional")
    assert (free["commercial_use"], free["commercial_use_because_of"]) == (None, ["fair", "one", "two"])
    assert (bound["commercial_use"], bound["commercial_use_because_of"]) == (False, ["two"])
    assert {name: teacher["licence"] for name, teacher in bound["teachers"].items()} == {
        "fair": "MIT",
        "one": "MIT",
        "other": "NSCLv1",
        "two": "CC-BY-NC-4.0",
    }
    assert set(bound["teachers"]["one"]) == {"fingerprint", "licence", "source", "revision"}
    text = (exports["convolutional"] / "README.md").read_text()
    assert "\nlicense_name: non-commercial\n" in text
    assert "**Commercial use of the student: no, forbidden by two (CC-BY-NC-4.0).**" in text
    report = json.loads((exports["convolutional"].parent / "reports" / "full.json").read_text())
    assert report["context"]["teachers"] == bound["teachers"]


def test_altered_weights_are_found(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({key: 1.01 * value for key, value in weights.items()}, folder / "model.safetensors")
    assert export.verify(folder) > export.TOLERANCE


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors", "config.json"])
def test_an_incomplete_export_is_no_export(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"not an export of agglom .*{re.escape(name)}.*agglom export"):
        exported.load(folder)


def test_a_broken_file_is_no_export(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match="not an export of agglom"):
        exported.load(folder)


def test_what_does_not_reload_is_an_error(tmp_path, monkeypatch):
    """What the fresh process complains of last is passed on."""
    monkeypatch.setattr(export.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match=f"{tmp_path}: the export does not reload"):
        export._verify_afresh(tmp_path)
