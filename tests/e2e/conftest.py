"""A job small enough to run many times: 50 images, random teachers, ten steps in two stages, no labels."""

import copy
import csv
import itertools
import json
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from agglom import cli
from agglom.data import readers, simulate
from agglom.data.sampler import stream

HERE = Path(__file__).parent
TEACHER, STUDENT = str(HERE / "tiny_teacher.py"), str(HERE / "tiny_student.py")
LABELS = {"data.labels": ["even"], "evaluate.leakage": True}
TRAIN = 24
CLOCK = ("images_per_s", "memory_mib")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Digits with a simulated device; one image of train and one of test are not annotated."""
    folder = tmp_path_factory.mktemp("digits")
    simulate.digits(folder, train=TRAIN, val=10, test=16)
    path = folder / "manifest.csv"
    header, *rows = csv.reader(path.read_text().splitlines())
    rows[0][3] = rows[-1][3] = ""
    path.write_text("".join(",".join(row) + "\n" for row in [header, *rows]))
    return folder


def base_job(images):
    return {
        "data": {
            "manifest": str(images / "manifest.csv"),
            "attributes": {"device": {"simulated": True}},
            "groups": ["device"],
            "min_support": 2,
        },
        "teachers": {
            "one": {"kind": TEACHER, "options": {"seed": 0}},
            "two": {"kind": TEACHER, "options": {"seed": 1, "width": 24}},
            "fair": {"kind": "erased", "source": "one", "options": {"attribute": "device", "shrink": 0.1}},
        },
        "student": {"kind": STUDENT},
        "heads": {"hidden": 32},
        "balance": {"kind": "group_dro", "group": "device", "options": {"eta": 0.1}},
        "optim": {"batch": 8},
        "stages": [
            {"name": "warm", "length": "4 steps", "size": 32, "teachers": ["one", "two"], "warmup": "2 steps"},
            {"name": "full", "length": "6 steps", "size": 64},
        ],
        "evaluate": {"bootstrap": 20, "batch": 16, "leakage": False},
        "log": {"every": "2 steps", "checkpoint": "3 steps", "keep": 100},
    }


def changed(tree, changes):
    """A copy of a nested dict with each "a.b" set to its value; None removes the key."""
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
        if value is None:
            del node[leaf]
    return tree


class Lab:
    """Writes jobs and runs verbs on them, in this process."""

    def __init__(self, images, folder):
        self.images, self.folder, self.files = images, folder, 0

    def job(self):
        return base_job(self.images)

    def manifest(self, edit):
        """A manifest beside that of the images: `edit` changes its rows, dicts in the order of the file."""
        with (self.images / "manifest.csv").open() as file:
            rows = list(csv.DictReader(file))
        edit(rows)
        self.files += 1
        path = self.images / f"{self.folder.name}-{self.files}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return str(path)

    def brightness(self):
        """The mean of each image of the manifest."""
        with (self.images / "manifest.csv").open() as file:
            return [readers.read(self.images / row["image"]).mean() for row in csv.DictReader(file)]

    def damaged(self):
        """A job with a truncated image that the survey does not read, but rank 1 of 2 does for the third step.

        Returns what changes in the base job, the path of the image and its row.
        """
        folder = self.folder / "damaged"
        shutil.copytree(self.images, folder)
        surveyed = np.random.default_rng(0).choice(TRAIN, 8, replace=False)
        third = next(itertools.islice(stream(np.arange(TRAIN), [(64, 64)], seed=0, batch=8, micro=8), 2, None))
        row = next(row for row, *_ in third[4:] if row not in surveyed)
        path = folder / "images" / f"{row:05d}.png"
        path.write_bytes(path.read_bytes()[:100])
        change = {"data.manifest": str(folder / "manifest.csv"), "evaluate.probe_images": 8, "teachers.fair": None}
        return change, path, row

    def config(self, changes=None):
        self.files += 1
        path = self.folder / f"job{self.files}.yaml"
        path.write_text(yaml.safe_dump(changed(self.job(), changes or {}), sort_keys=False))
        return path

    def distill(self, name="out", changes=None, *flags):
        """The exit status of `agglom distill` on the base job and its `changes`, into the folder `name`."""
        return cli.main(["distill", "--config", str(self.config(changes)), "--out", str(self.folder / name), *flags])

    def run(self, name="out", changes=None, *flags):
        """The same, which must succeed: the output folder."""
        assert self.distill(name, changes, *flags) == 0
        return self.folder / name

    @staticmethod
    def metrics(out):
        """The lines of metrics.jsonl without what depends on the clock."""
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]

    @staticmethod
    def weights(out):
        names = ("model", "heads")
        return {f"{n}.{k}": v for n in names for k, v in load_file(out / "export" / f"{n}.safetensors").items()}

    @staticmethod
    def rows(out, stage="full"):
        return json.loads((out / "reports" / f"{stage}.json").read_text())["rows"]

    @staticmethod
    def same(found, expected):
        """Whether lines, rows or weights are equal up to rounding: where memory lies decides how a kernel sums. What
        a wrong resume changes (a step, a batch, Adam's moments) is orders of magnitude above it."""
        if isinstance(expected, dict):
            return found.keys() == expected.keys() and all(Lab.same(found[key], expected[key]) for key in expected)
        if isinstance(expected, list):
            return len(found) == len(expected) and all(map(Lab.same, found, expected))
        if isinstance(expected, torch.Tensor):
            return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        return (
            found == pytest.approx(expected, rel=1e-5, abs=1e-7) if isinstance(expected, float) else found == expected
        )

    @staticmethod
    def tree(out):
        """Every file with its content, to see that nothing has changed."""
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def quick_verify(patch):
    """A fresh process costs seconds of imports: test_export.py and the launches have it, the rest not."""
    from agglom import export

    patch.setattr(export, "_verify_afresh", lambda folder: f"max abs diff {export.verify(folder):.1e}")


@pytest.fixture
def lab(images, tmp_path, monkeypatch):
    quick_verify(monkeypatch)
    return Lab(images, tmp_path)


@pytest.fixture(scope="session")
def whole(images, tmp_path_factory):
    """The output of the base job, never interrupted. Only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        quick_verify(patch)
        return Lab(images, tmp_path_factory.mktemp("whole")).run()


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run, in the folder "out" of `lab`, that may be touched."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    return out


@pytest.fixture(scope="session")
def labelled(images, tmp_path_factory):
    """The output of the base job with labels. Only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        quick_verify(patch)
        return Lab(images, tmp_path_factory.mktemp("labelled")).run("out", LABELS)


@pytest.fixture(scope="module")
def workshop(images, tmp_path_factory):
    """A lab that a whole file shares, for what is launched in other processes."""
    return Lab(images, tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def stop_at(monkeypatch):
    """A function: a signal comes while optimizer step N of the next run is done, counted from its start."""
    from agglom.engine import Engine

    def arrange(step, signum=signal.SIGTERM):
        done, real = [0], Engine.step

        def stepping(self, *rates):
            real(self, *rates)
            done[0] += 1
            if done[0] == step:
                signal.raise_signal(signum)

        monkeypatch.setattr(Engine, "step", stepping)

    return arrange


@pytest.fixture(scope="session")
def browse():
    """Runs Chromium on a page and returns its standard output. Its sandbox needs what a container lacks; the page is
    ours."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH; install it: apt-get install chromium")

    def run(page, *flags, size=(1280, 1600)):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        window = [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={size[0]},{size[1]}"]
        done = subprocess.run(
            [*command, *window, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    return run
