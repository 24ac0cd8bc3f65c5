"""Zero-shot inside a run: teachers and student by prompts, from the configuration to the report."""

import csv
import json

import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from agglom import cli, config, evaluate
from agglom.assemble import assemble
from agglom.core.types import Features
from agglom.runtime import StopRequest, World
from agglom.survey import survey

CHANGES = {
    "data.labels": ["even", "digit"],
    "teachers.one.options.text": True,
    "evaluate.leakage": False,
    "evaluate.permutations": 0,
    "evaluate.prompts": {"even": {"positive": ["two", "four"], "negative": ["one"]}},
    "stages": [{"name": "full", "length": "2 steps", "size": 64}],
}


@pytest.fixture
def labelled_lab(lab):
    """A lab whose manifest has a second label, for which there are no prompts."""
    changes = CHANGES | {"data.manifest": lab.manifest(lambda rows: [row.update(digit=row["even"]) for row in rows])}
    return lab, changes


def select(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


class Perfect(nn.Module):
    """A distiller whose heads give the targets themselves, at any length where the loss sees directions alone."""

    def __init__(self, run, normalisers):
        super().__init__()
        self.run, self.normalisers = run, normalisers

    def forward(self, pixels):
        raw = {name: self.run.teachers[name].encode(pixels) for name in ("one", "two")}
        found = {name: self.normalisers[name](features) for name, features in raw.items()}
        if self.run.job.loss.summary == "angular":
            found = {name: one._replace(summary_BD=0.3 * one.summary_BD) for name, one in found.items()}
        return Features(raw["two"].summary_BD, None), found


@pytest.mark.parametrize("loss", ["angular", "mse"])
def test_a_student_with_perfect_heads_is_its_teacher(labelled_lab, loss):
    lab, changes = labelled_lab
    job, base = config.load(
        lab.config(changes | {"loss.summary": loss, "teachers.fair": None, "evaluate.conflict": False})
    )
    run = assemble(job, base, lab.folder / "out", World(0, 1, torch.device("cpu")), StopRequest())
    surveyed, normalisers = survey(run)
    found = evaluate.evaluate(run, surveyed, normalisers, "full", Perfect(run, normalisers))
    names = zip(found.scores.predictors, found.scores.readouts, strict=True)
    series = dict(zip(names, found.scores.score_PNL, strict=True))
    assert {name for name, kind in series if kind == "zeroshot"} == {"student", "teacher/one", "ensemble"}
    student, teacher = (torch.tensor(series[name, "zeroshot"]) for name in ("student", "teacher/one"))
    torch.testing.assert_close(student, teacher, atol=1e-4, rtol=0, equal_nan=True)
    assert teacher[:, 0].std() > 1e-3
    assert teacher[:, 1].isnan().all()
    for metric in ("auroc", "tpr"):
        for row in select(found.report.rows, predictor="student - teacher/one", readout="zeroshot", metric=metric):
            assert row["value"] == pytest.approx(0, abs=1e-6)


def test_prompts_belong_to_no_identity(labelled_lab):
    """A run goes on, and is evaluated again, with other prompts."""
    lab, changes = labelled_lab

    def identity(**more):
        job, base = config.load(lab.config(changes | {f"evaluate.{key}": value for key, value in more.items()}))
        return assemble(job, base, lab.folder / "out", World(0, 1, torch.device("cpu")), StopRequest()).identity

    assert identity() == identity(prompts={"digit": {"positive": ["4"], "negative": ["5"]}}, prompted_by="fair")
    assert identity() != identity(probe_images=3)


@pytest.mark.slow
def test_a_run_with_prompts(labelled_lab, capsys):
    lab, changes = labelled_lab
    out = lab.run("out", changes)
    rows = lab.rows(out)
    assert {row["label"] for row in select(rows, readout="zeroshot")} == {"even"}
    # The erased teacher has the text tower of its source.
    teachers = {"teacher/one", "teacher/fair"}
    differences = {f"student - {name}" for name in teachers}
    mine = select(rows, readout="zeroshot", metric="auroc", split="test", attribute="")
    assert {row["predictor"] for row in mine} == {"student", "ensemble"} | teachers | differences
    with (lab.images / "manifest.csv").open() as file:
        truth = {row["image"]: int(row["even"]) for row in csv.DictReader(file)}
    scores = pq.read_table(out / "reports" / "full.scores.parquet").to_pylist()
    for name in ("student", "ensemble", *teachers):
        found = select(scores, predictor=name, readout="zeroshot", label="even", split="test")
        value = roc_auc_score([truth[row["image"]] for row in found], [row["score"] for row in found])
        assert select(mine, predictor=name)[0]["value"] == pytest.approx(value)
    notes = json.loads((out / "reports" / "full.json").read_text())["context"]["notes"]
    assert "Zero-shot: the student is read through its head for one and the text tower of that teacher." in notes
    assert "zero-shot prompts: even; the student is read through the first" in (out / "plan.md").read_text()
    # Its scores are a table like any other, though a label has no zero-shot ones.
    assert cli.main(["compare", str(out), "--margin", "0.9", "--readout", "zeroshot", "--label", "even"]) in (0, 3)
    # Other prompts are another evaluation of the same run.
    prompts = {"digit": {"positive": ["4"], "negative": ["5"]}}
    other = changes | {"evaluate.prompts": prompts, "evaluate.prompted_by": "fair"}
    assert cli.main(["evaluate", "--config", str(lab.config(other)), "--out", str(out)]) == 0
    assert {row["label"] for row in select(lab.rows(out), readout="zeroshot")} == {"digit"}
    # Where nobody can read the prompts, nothing is touched.
    before = lab.tree(out)
    silent = changes | {"teachers.one.options.text": None}
    capsys.readouterr()
    assert cli.main(["evaluate", "--config", str(lab.config(silent)), "--out", str(out)]) == 2
    assert "evaluate.prompts: no teacher has a text tower (fair, one, two); add" in capsys.readouterr().err
    assert lab.tree(out) == before
