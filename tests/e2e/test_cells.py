"""The balancer `cells`: what the evaluation finds sets the weights of the next stage."""

import csv

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

CONFIGURATION = 2
CELLS = {
    "data.labels": ["even"],
    "evaluate": {"bootstrap": 20, "permutations": 0, "leakage": False, "conflict": False},
    "balance": {"kind": "cells", "group": "device", "options": {"support": 2}},
    "optim.accumulate": 2,
}


def test_what_a_report_says_sets_the_weights_of_the_next_stage(lab, stop_at, capsys):
    """And a run that was interrupted in between is one that was not."""
    out = lab.run("out", CELLS)
    first, second = (load_file(out / "measured" / f"{stage}.safetensors") for stage in ("warm", "full"))
    names = ["fair", "one", "two"]
    with (lab.images / "manifest.csv").open() as file:
        truth = {row["image"]: int(row["even"]) for row in csv.DictReader(file)}
    for measured, stage in ((first, "teachers"), (second, "warm")):
        table = pyarrow.parquet.read_table(out / "reports" / f"{stage}.scores.parquet").to_pandas()
        val = table[(table.split == "val") & (table.readout == "linear")]
        of_teacher = val.astype({"image": str, "predictor": str}).groupby("predictor")
        found = {name: roc_auc_score([truth[i] for i in part.image], part.score) for name, part in of_teacher}
        assert measured["right_S"].numpy() == pytest.approx([found[f"teacher/{name}"] for name in names])
    assert first["student_G"].isnan().all()
    assert not second["student_G"].isnan().any()
    assert (first["noise_GT"] > 0).all()
    assert (first["spread_GT"] > 0).all()
    assert (first["right_GS"] == second["right_GS"]).all(), "teachers are frozen"
    lines = lab.metrics(out)
    cells = [f"weight/{name}/{group}" for name in ("one", "two") for group in "AB"]
    weights = np.array([[line[cell] for cell in cells] for line in lines])
    assert (weights > 0).all()
    assert len(np.unique(weights.round(6))) > 4

    stop_at(9)  # after four micro-batches of the second stage
    assert lab.distill("again", CELLS) == 130
    lab.run("again", CELLS)
    again = lab.folder / "again"
    assert lab.same(lab.metrics(again), lines)
    assert lab.same(lab.weights(again), lab.weights(out))
    assert lab.distill("again", CELLS | {"data.min_support": 3}) != 0
    assert "config.data.min_support was 2 and is 3" in capsys.readouterr().err


def test_without_labels_it_asks_for_views(lab, capsys):
    changes = CELLS | {"data.labels": []}
    assert lab.distill("out", changes) == CONFIGURATION
    assert "balance.options.by: 'labels' asks how well probes read labels" in capsys.readouterr().err
    changes["balance"] = CELLS["balance"] | {"options": {"by": "views"}}
    out = lab.run("out", changes)
    assert load_file(out / "measured" / "full.safetensors")["right_GS"].isnan().all()
