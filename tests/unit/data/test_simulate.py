"""The simulated device: visible, deterministic, the digit still there; and the files that are written."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from agglom.data.manifest import load
from agglom.data.readers import read
from agglom.data.simulate import main, simulate
from agglom.job import Attribute, Data

SMALL = ["--train", "50", "--val", "20", "--test", "20"]


def test_device_a_is_untouched_and_b_is_not():
    images_NHW = np.random.default_rng(0).random((4, 16, 16), np.float32)
    device_B = np.array([False, True, False, True])
    taken_NHW = simulate(images_NHW, device_B, seed=1)
    np.testing.assert_array_equal(taken_NHW[~device_B], images_NHW[~device_B])
    assert np.abs(taken_NHW[device_B] - images_NHW[device_B]).mean() > 0.1
    assert taken_NHW.min() >= 0
    assert taken_NHW.max() <= 1
    np.testing.assert_array_equal(simulate(images_NHW, device_B, seed=1), taken_NHW)
    np.testing.assert_array_equal(simulate(images_NHW, np.ones(4, bool), seed=1)[1], taken_NHW[1])
    assert not np.array_equal(simulate(images_NHW, device_B, seed=2), taken_NHW)


def test_device_b_is_another_world_to_a_classifier_but_keeps_the_digit():
    source = load_digits()
    images_NHW = np.kron(source.images / 16, np.ones((1, 4, 4))).astype(np.float32)
    b_NHW = simulate(images_NHW, np.ones(len(images_NHW), bool), seed=0)
    a_ND, b_ND = (x.reshape(len(x), 8, 4, 8, 4).mean((2, 4)).reshape(len(x), -1) for x in (images_NHW, b_NHW))
    fit, held = slice(0, 900), slice(900, None)
    on_a = LogisticRegression(max_iter=500).fit(a_ND[fit], source.target[fit])
    on_b = LogisticRegression(max_iter=500, C=10).fit(b_ND[fit], source.target[fit])
    assert on_a.score(b_ND[held], source.target[held]) < 0.5
    assert on_b.score(b_ND[held], source.target[held]) > 0.8


def test_digits(tmp_path, capsys):
    assert main(["digits", str(tmp_path / "a"), *SMALL]) == 0
    said = capsys.readouterr().out
    assert "simulated device" in said
    assert str(tmp_path / "a" / "manifest.csv") in said
    assert said.splitlines()[2].split() == ["train", "44", "6"]
    assert said.splitlines()[4].split() == ["test", "10", "10"]

    assert main(["digits", str(tmp_path / "b"), *SMALL]) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 91
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)

    spec = Data(manifest="manifest.csv", labels=("even",), attributes={"device": Attribute()})
    manifest = load(spec, tmp_path / "a")
    assert [manifest.rows(split).size for split in ("train", "val", "test")] == [50, 20, 20]
    assert set(manifest.attributes["device"]) == {"A", "B"}
    assert 0.3 < manifest.label_NL.mean() < 0.7
    assert read(manifest.images[0]).shape == (3, 64, 64)


def test_fashion(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        for name, array in (
            ("images-idx3", rng.integers(0, 256, (100, 28, 28), np.uint8)),
            ("labels-idx1", np.arange(100, dtype=np.uint8) % 10),
        ):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (tmp_path / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    assert main(["fashion", str(tmp_path / "out"), *SMALL, "--source", str(tmp_path)]) == 0
    assert "simulated device" in capsys.readouterr().out
    manifest = load(Data(manifest="out/manifest.csv", labels=("top",)), tmp_path)
    assert len(manifest) == 90
    assert read(manifest.images[0]).shape == (3, 28, 28)

    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    assert main(["fashion", str(tmp_path / "out"), *SMALL, "--source", str(tmp_path)]) == 4
    assert "t10k-labels-idx1-ubyte.gz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["digits", "--train", "1700", "--val", "90", "--test", "90"], 2, "up to 1797"),
        (["digits", "--train", "0"], 2, "at least 1"),
        (["fashion", "--source", "nowhere"], 4, "dataset-fashion-mnist"),
    ],
)
def test_refusals(tmp_path, capsys, argv, status, says):
    assert main([argv[0], str(tmp_path / "out"), *argv[1:]]) == status
    assert says in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()
