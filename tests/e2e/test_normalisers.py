"""Normalisers in a run: fitted again for a stage, group-balanced; and shifted windows. The base job's warm stage is at
32 px, its evaluation and second stage at 64."""

import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agglom import plugins
from agglom.core.normalise import Affine, Moments, apply, fit
from agglom.data import readers
from agglom.data.dataset import resize

REFIT = {"loss": {"refit": "stage", "summary": "mse"}}
SHIFTED = {"loss": {"shift": 1}}


def features(lab, size):
    """The tiny teacher `one` on the train images: patches (N, P, D), and their device, "" where unknown."""
    with (lab.images / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    images = [torch.from_numpy(readers.decode(lab.images / row["image"], None)) for row in rows]
    pixels = torch.stack([resize(image, (size, size)).expand(3, -1, -1) for image in images])
    teacher = plugins.build(lab.job()["teachers"]["one"]["kind"], "teachers", {"seed": 0})
    return teacher.encode(pixels), np.array([row["device"] for row in rows])


def stored(path, prefix):
    tensors = load_file(path)
    return Affine(*(tensors[f"{prefix}/{field}"] for field in Affine._fields))


def test_refit_fits_each_stage_at_its_size(lab, whole):
    out = lab.run("out", REFIT)
    path = out / "normaliser.warm.safetensors"
    raw, _ = features(lab, 32)
    for kind, raw_ND in (("patches", raw.patches_BND.flatten(0, 1)), ("summary", raw.summary_BD)):
        expected = fit("phi_s", Moments.empty(32).update(raw_ND))
        found = stored(path, f"one/{kind}")
        torch.testing.assert_close(found.mean_D, expected.mean_D, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(apply(found, raw_ND), apply(expected, raw_ND), atol=2e-2, rtol=1e-3)
        assert not torch.allclose(stored(out / "normaliser.safetensors", f"one/{kind}").mean_D, found.mean_D)
    assert sorted(key.split("/")[0] for key in load_file(path) if key.endswith("patches/mean_D")) == ["one", "two"]
    assert not (out / "normaliser.full.safetensors").exists()  # it has the size of the evaluation
    first = next(line for line in lab.metrics(out) if "loss/one/patches" in line)
    assert 0.5 < first["loss/one/patches"] < 2  # of a student that knows nothing yet, in units of this size
    assert [(whole / name).exists() for name in ("normaliser.safetensors", "normaliser.warm.safetensors")] == [
        True,
        False,
    ]


@pytest.mark.slow
def test_a_refitted_run_resumes_exactly(lab, stop_at):
    expected = lab.run("expected", REFIT)
    stop_at(2)
    assert lab.distill("out", REFIT) == 130
    path = lab.folder / "out" / "normaliser.warm.safetensors"
    before = path.stat().st_mtime_ns
    out = lab.run("out", REFIT)
    assert path.stat().st_mtime_ns == before
    assert lab.same(lab.metrics(out), lab.metrics(expected))
    assert lab.same(lab.weights(out), lab.weights(expected))


def test_moments_by_counts_the_devices_the_same(lab):
    out = lab.run("out", {"loss": {"moments_by": "device", "summary": "mse"}, "stages": lab.job()["stages"][:1]})
    raw, device_N = features(lab, 32)
    means = {device: raw.patches_BND[device_N == device].mean((0, 1)) for device in set(device_N)}
    known = [means[device] for device in means if device]
    share = (device_N == "").mean()
    expected = share * means[""] + (1 - share) * sum(known) / len(known)
    found = stored(out / "normaliser.safetensors", "one/patches").mean_D
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, raw.patches_BND.mean((0, 1)), atol=1e-4)


def test_a_shifted_run_trains_and_resumes_exactly(lab, stop_at, whole):
    expected = lab.run("expected", SHIFTED)
    assert not lab.same(lab.weights(expected), lab.weights(whole))
    stop_at(5)
    assert lab.distill("out", SHIFTED) == 130
    out = lab.run("out", SHIFTED)
    assert lab.same(lab.metrics(out), lab.metrics(expected))
    assert lab.same(lab.weights(out), lab.weights(expected))


def test_a_shift_without_a_common_patch_is_refused(lab, capsys):
    assert lab.distill("out", {"loss": {"shift": 2}}) == 2
    message = (
        "loss.shift: 2: at 32 px the grids are the student 2×2, one 2×2, two 2×2: windows so far apart share nothing"
    )
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher_dropping", "ada_loss"])
def test_a_balancer_of_teachers_resumes_exactly(lab, stop_at, kind):
    change = {"balance": {"kind": kind}}
    expected = lab.run("expected", change)
    stop_at(7)
    assert lab.distill("out", change) == 130
    out = lab.run("out", change)
    assert lab.same(lab.metrics(out), lab.metrics(expected))
    assert lab.same(lab.weights(out), lab.weights(expected))
