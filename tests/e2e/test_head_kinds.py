"""Every kind of head trains under DeepSpeed, folds its normaliser in and comes back from its export."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from agglom import export

STUDENT = {"kind": "timm", "options": {"model": "test_vit", "class_tokens": 3, "registers": 1, "levels": 3}}
KINDS = ("mlp", "ladder", "transformer")


def job(kind, zero=1):
    """Three teachers, each with a class token of its own."""
    stages = [{"name": "full", "length": "2 steps", "size": 64}]
    heads = {"kind": kind, "tokens": "own", "hidden": 32}
    return {"student": STUDENT, "stages": stages, "heads": heads, "engine.zero": zero, "log.every": "1 step"}


@pytest.fixture(scope="module")
def trained(workshop):
    """One run for each kind of head. Only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_verify_afresh", lambda folder: "")
        return {kind: workshop.run(kind, job(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_comes_back_from_its_export(lab, trained, kind):
    out = trained[kind]
    assert {row["target"] for row in lab.rows(out)} == {
        f"{name}/{part}" for name in ("one", "two", "fair") for part in ("summary", "patches")
    }
    stored = json.loads((out / "export" / "config.json").read_text())["agglom"]["heads"]
    assert (stored["kind"], stored["tokens"]) == (kind, "own")
    assert export.verify(out / "export") <= export.TOLERANCE


def test_plain_timm_finds_the_class_tokens(trained):
    folder = trained["mlp"] / "export"
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    stored = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(stored[key])[:, None, None] for key in ("mean", "std"))
    sample = load_file(folder / "sample.safetensors")
    with torch.no_grad():
        tokens = backbone.forward_features((sample["pixels"] - mean) / std)
    assert tokens.shape[1] == 3 + 1 + 16
    torch.testing.assert_close(tokens[:, :3].mean(1), sample["student/summary"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, 4:], sample["student/patches"], rtol=1e-5, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "Of its tokens the first 3 are class tokens, and its summary is their mean." in card


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"tokens": "own"}, "student: heads.tokens: own needs a class token for each of 3 teachers, the student has 0"),
        ({"kind": "ladder"}, "student: heads.kind: ladder reads the student's blocks, and it serves none"),
    ],
)
def test_a_student_of_one_s_own_without_them_is_refused(lab, capsys, heads, message):
    assert lab.distill("out", {"heads": heads}) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ladder", "transformer"])
def test_zero_3_changes_no_loss(lab, trained, kind):
    """Levels and mixed tokens pass through its hooks."""
    out = lab.run("three", job(kind, zero=3))
    assert lab.same(lab.metrics(out), lab.metrics(trained[kind]))
    assert lab.same(lab.weights(out), lab.weights(trained[kind]))
