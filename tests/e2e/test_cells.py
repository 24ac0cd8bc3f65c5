"""The balancer `cells`: what the evaluation finds sets the weights of the next stage."""

import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from agglom import confidence, measure
from agglom.core import borrowing, losses
from agglom.core.cells import listening

CONFIGURATION = 2
CELLS = {
    "data.labels": ["even"],
    "evaluate": {"bootstrap": 20, "permutations": 0, "leakage": False, "conflict": False},
    "balance": {"kind": "cells", "group": "device", "options": {"support": 2, "by": "labels"}},
    "optim.accumulate": 2,
}


@pytest.mark.parametrize("by", ["labels", "images"])
def test_what_a_report_says_sets_the_weights_of_the_next_stage(lab, stop_at, capsys, by):
    """And a run that was interrupted in between is one that was not."""
    changes = CELLS | {"balance": CELLS["balance"] | {"options": {"support": 2, "by": by}}}
    out = lab.run("out", changes)
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
    for line in lines:
        active = ("one", "two") if line["stage"] == "warm" else ("fair", "one", "two")
        mean = {group: np.mean([line[f"weight/{name}/{group}"] for name in active]) for group in "AB"}
        assert (20 * mean["A"] + 3 * mean["B"]) / 23 == pytest.approx(1), "whoever teaches, all count as much as before"
    assert len({line["weight/one/B"] for line in lines}) > 2

    stop_at(9)  # after four micro-batches of the second stage
    assert lab.distill("again", changes) == 130
    lab.run("again", changes)
    again = lab.folder / "again"
    assert lab.same(lab.metrics(again), lines)
    assert lab.same(lab.weights(again), lab.weights(out))
    assert lab.distill("again", changes | {"data.min_support": 3}) != 0
    assert "data.min_support, by which teachers are measured, was 2 and is 3" in capsys.readouterr().err


def test_images_of_a_group_hear_teachers_by_how_sure_these_are_of_them(lab, monkeypatch):
    changes = CELLS | {"balance": CELLS["balance"] | {"options": {"support": 2, "by": "images", "temperature": 0.5}}}
    seen, real = [], losses.objective

    def objective(table, weight_BT):
        seen.append((table.row_B, table.valid_BT, weight_BT))
        return real(table, weight_BT)

    monkeypatch.setattr(losses, "objective", objective)
    out = lab.run("out", changes)
    first, second = (load_file(out / "measured" / f"{stage}.safetensors")["sure_NS"] for stage in ("warm", "full"))
    with (lab.images / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    train_N = torch.tensor([row["split"] == "train" for row in rows])
    assert first.dtype == torch.float32
    assert first[~train_N].isnan().all()
    assert ((first[train_N] > 0) & (first[train_N] < 1)).all()
    assert torch.equal(first[train_N], second[train_N]), "teachers are frozen"
    row_B, valid_BT, weight_BT = (torch.cat(parts) for parts in zip(*seen[-2:], strict=True))
    rho_BS = listening(first[row_B], torch.ones(len(row_B), 3, dtype=torch.bool), 0.5)
    share_BT = weight_BT / weight_BT.sum(1, keepdim=True)
    expected_BT = rho_BS.repeat_interleave(2, 1).float() / 6
    torch.testing.assert_close(share_BT, expected_BT)
    assert valid_BT.all()
    assert len(share_BT[:, 0].unique()) > 2, "more than one for each group"
    found = json.loads((out / "reports" / "full.json").read_text())["context"]["reasons"]
    group_N = np.array([row["device"] for row in rows])
    for group, right_T in zip(("A", "B"), found["right"], strict=True):
        assert right_T == pytest.approx(first[train_N & torch.tensor(group_N == group)].mean(0).tolist(), rel=1e-5)


def test_a_group_borrows_what_a_teacher_does_not_know_of_it(lab, stop_at, monkeypatch):
    """B asks two which images of A are like its own, for what one says of them, but where one is as sure of an image as
    two; and so it does after a resume."""
    # AUROC by group, of fair, one and two: one knows A alone, and fair nobody.
    found = torch.tensor([[0.7, 0.95, 0.95], [0.7, 0.6, 0.95]], dtype=torch.float64)
    judge = measure.judged
    monkeypatch.setattr(
        measure, "judged", lambda *given: judge(*given)._replace(shrunk_GP=found[:, : given[1].shape[1]])
    )
    monkeypatch.setattr(borrowing, "LEAST", 10)
    with (lab.images / "manifest.csv").open() as file:
        manifest = list(csv.DictReader(file))
    group_N = np.array([row["device"] for row in manifest])
    train_N = np.array([row["split"] == "train" for row in manifest])
    asks_N = train_N & (group_N == "B")
    knows_N = asks_N & (asks_N.cumsum() == 2)  # the second of them
    sure_NS = torch.full((len(manifest), 3), 0.7)
    sure_NS[asks_N & ~knows_N, 1] = 0.6
    monkeypatch.setattr(confidence, "measure", lambda *given: sure_NS)
    seen, real = [], losses.table

    def table(columns, predicted, wanted, present, **more):
        found = real(columns, predicted, wanted, present, **more)
        seen.append({name: one.summary_BD for name, one in wanted.items()})
        return found

    rows, objective = [], losses.objective

    def weighed(table, weight_BT):
        rows.append((table.row_B, seen[-1]))
        return objective(table, weight_BT)

    monkeypatch.setattr(losses, "table", table)
    monkeypatch.setattr(losses, "objective", weighed)
    changes = CELLS | {"balance": CELLS["balance"] | {"options": {"support": 2, "borrow": 3}}}
    # Nothing else moves the targets: all sees the whole image, at the size of the evaluation.
    changes |= {"augment.crop": [1.0, 1.0], "evaluate.size": 64}
    out = lab.run("out", changes)
    raw = {name: load_file(out / "features" / f"{name}.safetensors")["summary"] for name in ("one", "two")}
    lent_N = train_N & (group_N == "A")
    near = NearestNeighbors(n_neighbors=3).fit(raw["two"][lent_N]).kneighbors(raw["two"], return_distance=False)
    borrowed_ND = raw["one"][lent_N][torch.as_tensor(near)].mean(1)
    borrows_N = torch.as_tensor(asks_N & ~knows_N)
    assert borrows_N.any()
    expected_ND = torch.where(borrows_N[:, None], borrowed_ND, raw["one"])
    asked = [(row_B, told) for row_B, told in rows[-12:]]  # those of the second stage
    assert any(borrows_N[row_B].any() for row_B, _ in asked)
    for row_B, told in asked:
        torch.testing.assert_close(told["one"], expected_ND[row_B], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(told["two"], raw["two"][row_B], atol=1e-4, rtol=1e-4)
    reasons = json.loads((out / "reports" / "full.json").read_text())["context"]["reasons"]
    who = {"teacher": "one", "groups": ["B"], "by": ["two"], "of": ["A"]}
    assert reasons["borrowed"] == [who | {"images": int(borrows_N.sum()), "of_images": int(asks_N.sum())}]
    for report in ("full.md", "full.html"):
        said = (out / "reports" / report).read_text()
        assert "B: what one says of images of A, those that two finds most alike, for 2 of 3 train images" in said

    stop_at(9)
    assert lab.distill("again", changes) == 130
    lab.run("again", changes)
    assert lab.same(lab.weights(lab.folder / "again"), lab.weights(out))
    alone = {"balance": CELLS["balance"] | {"options": {"support": 2, "borrow": 0}}}
    kept = lab.run("kept", changes | alone)
    assert not lab.same(lab.weights(kept), lab.weights(out))
    own_GT, spread_GT = (load_file(one / "measured" / "full.safetensors")["spread_GT"] for one in (kept, out))
    assert torch.equal(own_GT[0], spread_GT[0])
    assert own_GT[1, 2] != spread_GT[1, 2], "noise and spread are of what is asked for"


def test_without_labels_it_asks_for_views(lab, capsys):
    changes = CELLS | {"data.labels": [], "balance": {"kind": "cells", "group": "device"}}
    assert lab.distill("out", changes) == CONFIGURATION
    assert "balance.options.by: 'images' asks how well probes read labels" in capsys.readouterr().err
    changes["balance"] = CELLS["balance"] | {"options": {"by": "views"}}
    out = lab.run("out", changes)
    assert load_file(out / "measured" / "full.safetensors")["right_GS"].isnan().all()
