"""agglom.stream against the report of all scores at once, its errors, and the sum of two processes."""

import csv
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from agglom import audit, report, stream
from agglom.core.metrics import METRICS, THRESHOLDED
from agglom.core.streaming import ScoreHistogram
from agglom.errors import DataError

ROWS = 900
MANIFEST = ("image", "patient", "split", "mass", "sex", "site")


def table(images=1, bins=4096, seed=0):
    """A manifest (one image, or several, a patient) and the scores of two predictors, at edges of the bins."""
    rng = np.random.default_rng(seed)
    patient = np.arange(ROWS) // images
    split = np.where(patient % 3 == 0, "val", "test")
    y = rng.random(ROWS) < 0.3
    sex = rng.choice(["F", "M"], patient.max() + 1)[patient]
    site = rng.choice(["a", "b", "c", ""], patient.max() + 1)[patient]
    names = [f"x/{row}.png" for row in range(ROWS)]
    label = np.where(rng.random(ROWS) < 0.02, "", y.astype(int).astype(str))
    manifest = list(zip(names, patient, split, label, sex, site, strict=True))
    scores = {
        name: np.floor(bins / (1 + np.exp(1 - rng.normal(size=ROWS) - slope * y))) / bins
        for name, slope in (("one", 1.5), ("two", 0.5))
    }
    cells = [(names[row], name, score[row]) for name, score in scores.items() for row in range(ROWS)]
    return manifest, cells


def saved(folder, manifest, cells):
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([MANIFEST, *manifest])
    columns = dict(zip(("image", "predictor", "score"), map(list, zip(*cells, strict=True)), strict=True))
    pyarrow.parquet.write_table(pa.table(columns | {"label": ["mass"] * len(cells)}), folder / "s.parquet")
    return folder / "s.parquet", folder / "m.csv"


def reports(folder, *tables):
    paths = saved(folder, *tables)
    found = []
    for name, main in (("stream", stream.main), ("whole", audit.main)):
        main(*paths, None, ["evaluate.permutations=0"], folder / name)
        found.append(report.load(folder / name / "report.json"))
    return found


def keyed(found):
    return {
        tuple(row[key] for key in ("predictor", "metric", "label", "attribute", "group", "split", "readout")): row
        for row in found.rows
        if row["rule"] != "group" and " - " not in row["predictor"]
    }


def test_with_one_image_a_patient_the_report_is_that_of_the_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BATCH", 256)
    streamed, whole = (keyed(one) for one in reports(tmp_path, *table()))
    kinds = {metric for _, metric, *_ in streamed}
    assert set(METRICS) <= kinds
    assert {"auroc_gap", "tpr_worst", "equalized_odds_difference", "auroc_es", "accuracy_gap_to_overall"} <= kinds
    for key, row in streamed.items():
        other, metric = whole[key], key[1]
        for count in ("n", "n_pos", "n_neg", "n_patients", "status"):
            assert row[count] == other[count], key
        if metric == "auprc" and row["value"] is not None:
            low, high = map(float, row["note"].removeprefix("exact value from ").split(" to "))
            assert low - 1e-6 <= other["value"] <= high + 1e-6
        elif row["value"] is not None or other["value"] is not None:
            assert row["value"] == pytest.approx(other["value"], abs=1e-12), key
        base = metric.split("_")[0]
        if row["lo"] is not None and base in ("tpr", "fpr", "ppv", "npv", "accuracy", "f1"):
            assert [row["lo"], row["hi"]] == pytest.approx([other["lo"], other["hi"]], abs=1e-12), key
        elif metric == "auroc" and row["lo"] is not None:
            # Wider by the bounds, as scores are at the edges.
            assert other["lo"] - 0.005 < row["lo"] <= other["lo"] + 1e-12
            assert other["hi"] - 1e-12 <= row["hi"] < other["hi"] + 0.005
        if metric in ("auprc", "brier", "ece", "ece_debiased", "balanced_accuracy"):
            assert (row["lo"], row["hi"], row["ci_method"]) == (None, None, "none")
    missing = {key[1] for key in whole if key not in streamed}
    assert {one for one in missing if not one.startswith("ece_")} == set()


def test_scores_between_edges_lie_in_the_bounds(tmp_path):
    manifest, cells = table()
    rng = np.random.default_rng(1)
    cells = [(image, name, min(1.0, score + rng.random() / 4096)) for image, name, score in cells]
    streamed, whole = (keyed(one) for one in reports(tmp_path, manifest, cells))
    checked = 0
    for key, row in streamed.items():
        if key[1] in ("auroc", "auprc") and row["value"] is not None:
            low, high = map(float, row["note"].removeprefix("exact value from ").split(" to "))
            assert low - 1e-6 <= whole[key]["value"] <= high + 1e-6
            assert row["value"] == pytest.approx((low + high) / 2, abs=1e-6)
            checked += 1
    assert checked > 20


def test_with_several_images_a_patient_there_are_values_but_no_intervals(tmp_path):
    streamed, whole = (keyed(one) for one in reports(tmp_path, *table(images=3, bins=64)))
    assert {metric for _, metric, *_ in streamed} == set(METRICS)
    for key, row in streamed.items():
        assert (row["lo"], row["hi"], row["ci_method"]) == (None, None, "none")
        if key[1] in THRESHOLDED | {"brier", "ece"} and row["value"] is not None:
            assert row["value"] == pytest.approx(whole[key]["value"], abs=1e-12)
            assert row["n_patients"] == whole[key]["n_patients"]
        assert (row["value"] is None) >= (key[1] == "ece_debiased")


def test_what_is_kept_does_not_grow_with_the_rows(tmp_path):
    paths = saved(tmp_path, *table())
    asked = {"manifest": str(paths[1]), "labels": ["mass"], "attributes": {"sex": {}}, "groups": ["sex"]}
    from agglom import config
    from agglom.data import manifest as manifests

    job, base = config.load_audit(None, [], **asked)
    manifest = manifests.load(job.data, base, check_files=False, needed=())
    found = stream.read(paths[0], manifest, ("mass",), [manifest.view(), manifest.view("sex")])
    # Of each predictor: val and test, of everybody, women and men.
    for histogram in found.histograms.values():
        assert histogram.count_G2C.shape == (7, 2, 4096)
    known = ~np.isnan(manifest.label_NL[:, 0])
    for seen in found.seen.values():
        assert seen.dtype == bool
        assert len(seen) == ROWS
    everybody = [int(histogram.count_G2C[[0, 3]].sum()) for histogram in found.histograms.values()]
    assert everybody == [int(known.sum())] * 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda cells: [(*cells[0][:2], math.nan), *cells[1:]], "scores that are NaN: 1 score"),
        (lambda cells: [*cells[:300], (*cells[300][:2], 1.5), *cells[301:]], "row 301: 'x/300.png', predictor 'one'"),
        (lambda cells: [("y.png", *cells[0][1:]), *cells[1:]], "images that are not in the manifest: 1 image"),
        (lambda cells: [*cells[:10], cells[3], *cells[10:]], "duplicate rows: 1 score"),
        (lambda cells: [*cells, cells[3]], "row 1801: 'x/3.png', predictor 'one', label 'mass'"),
        (lambda cells: cells[:-7], "predictors on different images: "),
        (lambda cells: [cell for cell in cells if cell[0] != "x/4.png"], "images of the manifest without a score: 1"),
    ],
)
def test_wrong_tables_are_told(tmp_path, monkeypatch, change, expected):
    monkeypatch.setattr(stream, "BATCH", 128)
    manifest, cells = table()
    with pytest.raises(DataError) as error:
        stream.main(*saved(tmp_path, manifest, change(cells)), None, [], tmp_path / "out")
    assert expected in str(error.value)


def test_files_that_cannot_be_streamed(tmp_path):
    scores, manifest = saved(tmp_path, *table())
    scores.with_suffix(".csv").write_text("image,predictor,score\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for path, expected in (
        (scores.with_suffix(".csv"), "reads Parquet only; write the table as Parquet, or leave out --stream"),
        (tmp_path / "none.parquet", "does not exist. Name it with --predictions"),
        (tmp_path / "broken.parquet", "not a readable Parquet file"),
    ):
        with pytest.raises(DataError, match=expected):
            stream.main(path, manifest, None, [], tmp_path / "out")


HALF = """
import sys, torch
from torch import distributed as dist
from agglom.core.streaming import ScoreHistogram
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
columns = torch.load(f"{folder}/columns.pt")
packed = ScoreHistogram.empty(3, 64).update(*(x[rank::2] for x in columns)).pack()
dist.all_reduce(packed)
torch.save(packed, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_add_up_to_the_whole_in_one_all_reduce(tmp_path):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (501,), generator=generator)
    columns = y, torch.rand(501, generator=generator, dtype=torch.float64), y.roll(1) + 1 - y
    torch.save(columns, tmp_path / "columns.pt")
    processes = [subprocess.Popen([sys.executable, "-c", HALF, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    empty = ScoreHistogram.empty(3, 64)
    whole = empty.update(*columns)
    for rank in range(2):
        both = empty.unpack(torch.load(tmp_path / f"{rank}.pt"))
        assert torch.equal(both.count_G2C, whole.count_G2C)
        assert torch.allclose(both.calibration_GB3, whole.calibration_GB3, rtol=1e-12)
