"""What a run says: the rows of its reports, and the verbs that read it afterwards."""

import csv
import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from agglom import cli, exported, plugins, probes, report
from agglom.core.metrics import METRICS, THRESHOLDED
from agglom.data import readers
from agglom.report import COLUMNS

PROBED = ("auroc", "accuracy", "tpr", "fpr", "ece")
TEACHERS = {f"teacher/{name}" for name in ("one", "two", "fair")}


@pytest.fixture
def out(labelled, tmp_path):
    """A copy of a finished run that may be touched."""
    shutil.copytree(labelled, tmp_path / "out")
    return tmp_path / "out"


def select(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_rows_have_every_column(lab, labelled):
    for stage in ("teachers", "warm", "full"):
        rows = lab.rows(labelled, stage)
        assert rows
        for row in rows:
            assert tuple(row) == COLUMNS
            assert row["stage"] == stage
            assert row["status"] in report.STATUSES
            for key in ("value", "lo", "hi", "threshold"):
                assert row[key] is None or math.isfinite(row[key])
            if row["status"] == "ok" and row["value"] is not None:
                assert row["lo"] is None or row["lo"] <= row["value"] <= row["hi"]


def test_predictors(lab, labelled):
    before, after = lab.rows(labelled, "teachers"), lab.rows(labelled, "full")
    assert {row["predictor"] for row in before} == TEACHERS | {"ensemble"}
    assert {row["predictor"] for row in after} == TEACHERS | {"ensemble", "student"} | {
        f"student - {name}" for name in TEACHERS
    }


def test_every_cell_is_reported(lab, labelled):
    """Predictor × metric × group × split × readout, gaps and worst groups, and paired differences."""
    rows = lab.rows(labelled)
    groups = [("", "all"), ("device", "A"), ("device", "B")]
    for predictor in ["student", "ensemble", *TEACHERS]:
        for readout, measured in (("linear", METRICS), ("knn", ("auroc",))):
            for split in ("val", "test"):
                mine = select(rows, predictor=predictor, readout=readout, split=split, label="even")
                assert {row["metric"] for row in mine} & set(METRICS) == set(measured)
                for metric in measured:
                    found = [row for row in select(mine, metric=metric) if row["rule"] != "group"]
                    assert [(r["attribute"], r["group"]) for r in found] == groups
                    for summary in ("gap", "worst") if metric in PROBED else ():
                        (row,) = select(mine, metric=f"{metric}_{summary}")
                        assert (row["attribute"], row["group"]) == ("device", "all")
    for name in TEACHERS:
        for metric in set(METRICS) - {"ece_debiased"}:
            found = select(rows, predictor=f"student - {name}", metric=metric, split="test", readout="linear")
            assert [(r["attribute"], r["group"]) for r in found] == groups


def test_scores_of_the_report_lie_beside_it(lab, labelled, images):
    """AUROC by hand from the table of scores."""
    with (images / "manifest.csv").open() as file:
        truth = {row["image"]: int(row["even"]) for row in csv.DictReader(file)}
    rows = pq.read_table(labelled / "reports" / "full.scores.parquet").to_pylist()
    for name in ("student", "ensemble", *TEACHERS):
        for readout in ("linear", "knn"):
            mine = select(rows, predictor=name, readout=readout, label="even", split="test")
            value = roc_auc_score([truth[row["image"]] for row in mine], [row["score"] for row in mine])
            (row,) = select(
                lab.rows(labelled), predictor=name, readout=readout, metric="auroc", attribute="", split="test"
            )
            assert row["value"] == pytest.approx(value)


def test_differences_are_differences(lab, labelled):
    rows = select(lab.rows(labelled), split="test", readout="linear", metric="auroc")
    for group in ("all", "A", "B"):
        (student,), (teacher,), (paired,) = (
            select(rows, predictor=name, group=group) for name in ("student", "teacher/one", "student - teacher/one")
        )
        assert paired["value"] == pytest.approx(student["value"] - teacher["value"])


def test_counts_are_those_of_the_manifest(lab, labelled, images):
    with (images / "manifest.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["split"] == "test"]
    for group in ("A", "B", "all"):
        members = [row for row in table if group in ("all", row["device"])]
        positive = sum(row["even"] == "1" for row in members)
        (row,) = select(
            lab.rows(labelled), predictor="student", metric="auroc", group=group, split="test", readout="linear"
        )
        assert (row["n"], row["n_pos"], row["n_neg"]) == (len(members), positive, len(members) - positive)
        assert row["n_patients"] == len(members)


def test_thresholds_come_from_validation(lab, labelled):
    """The same threshold on val and test, for each predictor and readout; metrics without one have none."""
    rows = lab.rows(labelled)
    for row in rows:
        assert not row["threshold"] or row["rule"] in ("global", "group")
    for metric in THRESHOLDED:
        found = select(rows, predictor="student", readout="linear", metric=metric, rule="global")
        assert {row["split"] for row in found} == {"val", "test"}
        assert len({row["threshold"] for row in found}) == 1
    assert not any(row["threshold"] for row in rows if row["metric"] in set(METRICS) - THRESHOLDED)


def test_rates_are_counted_at_the_threshold(lab, labelled, images):
    """From the stored features, by hand: a teacher's linear probe on test images of device B."""
    with (images / "manifest.csv").open() as file:
        table = list(csv.DictReader(file))
    label = np.array([float(row["even"]) for row in table])
    train, val, test = (np.array([row["split"] == name for row in table]) for name in ("train", "val", "test"))
    summary = load_file(labelled / "features" / "one.safetensors")["summary"]
    readout = probes.linear(summary, label, train, val)
    mine = test & np.array([row["device"] == "B" for row in table])
    threshold = probes.youden(readout.scores_N[val], label[val])
    called = readout.scores_N >= threshold
    for metric, value in (
        ("accuracy", (called == label)[mine].mean()),
        ("tpr", called[mine & (label == 1)].mean()),
        ("fpr", called[mine & (label == 0)].mean()),
    ):
        found = select(lab.rows(labelled), predictor="teacher/one", metric=metric, split="test", readout="linear")
        (row,) = select(found, group="B", rule="global")
        assert row["threshold"] == pytest.approx(threshold)
        assert row["value"] == pytest.approx(value)


def test_the_device_is_read_from_every_summary(lab, labelled, images):
    """Leakage: of a teacher by hand from its stored features, without the images that are not annotated.

    The device was erased from train patients for one of the teachers: the probes are fitted on those of validation.
    """
    with (images / "manifest.csv").open() as file:
        table = list(csv.DictReader(file))
    device = np.array([{"A": 0.0, "B": 1.0}.get(row["device"], np.nan) for row in table])
    val, test = (np.array([row["split"] == name for row in table]) & ~np.isnan(device) for name in ("val", "test"))
    judge = np.isin(np.arange(len(table)), np.random.default_rng(0).permutation(np.flatnonzero(val))[: val.sum() // 5])
    summary = load_file(labelled / "features" / "one.safetensors")["summary"]
    scores = probes.linear(summary[val | test], *(one[val | test] for one in (device, val & ~judge, judge))).scores_N
    rows = select(lab.rows(labelled), metric="leakage", readout="linear")
    assert {row["split"] for row in rows} == {"test"}
    assert [(row["predictor"], row["group"]) for row in rows] == [
        (name, group) for name in ("student", *sorted(TEACHERS)) for group in "AB"
    ]
    for row in select(rows, predictor="teacher/one"):
        assert row["value"] == pytest.approx(roc_auc_score(device[test], scores[test[val | test]]))
        assert (row["n"], row["n_pos"]) == (test.sum(), (device[test] == (row["group"] == "B")).sum())


def test_variance_unexplained_of_each_target(lab, labelled):
    rows = [row for row in lab.rows(labelled) if row["metric"].startswith("fvu")]
    for name in ("one", "two", "fair"):
        for metric, kind in (("fvu", "patches"), ("fvu_angular", "summary")):
            found = select(rows, metric=metric, target=f"{name}/{kind}", split="test")
            assert [(r["attribute"], r["group"]) for r in found] == [("", "all"), ("device", "A"), ("device", "B")]
            assert all(row["predictor"] == "student" and row["note"] == "teacher at 64 px" for row in found)


def test_variance_unexplained_by_hand(lab, labelled, images):
    """From the exported student, raw features and images alone: PHI-S is a rotation and a factor, which cancels."""
    with (images / "manifest.csv").open() as file:
        table = list(csv.DictReader(file))
    pixels = torch.stack([torch.from_numpy(readers.read(images / row["image"])) for row in table])
    split = np.array([row["split"] for row in table])
    device = np.array([row["device"] for row in table])
    model = exported.load(labelled / "export")
    with torch.no_grad():
        _, predicted = model(pixels)
    for name in ("one", "two"):
        spec = lab.job()["teachers"][name]
        truth = plugins.build(spec["kind"], "teachers", spec["options"]).encode(pixels).patches_BND
        error = (predicted[name].patches_BND - truth).square().sum((1, 2))
        baseline = (truth[split == "train"].mean(0) - truth).square().sum((1, 2))
        for group in ("all", "A", "B"):
            mine = (split == "test") & ((device == group) | (group == "all"))
            (row,) = select(lab.rows(labelled), metric="fvu", target=f"{name}/patches", split="test", group=group)
            assert row["value"] == pytest.approx(float(error[mine].sum() / baseline[mine].sum()), rel=1e-3)
            assert row["n"] == mine.sum()


def test_one_class_is_a_status_and_no_error(lab):
    """A label that test images of device B have all, and one that train images have all: null, and a sentence."""

    def classes(rows):
        for row in rows:
            test_b = row["split"] == "test" and row["device"] == "B"
            row |= {"constant": 1, "rare": 1 if test_b else row["even"]}

    out = lab.run("out", {"data.manifest": lab.manifest(classes), "data.labels": ["constant", "rare"]})
    (row,) = select(
        lab.rows(out), label="rare", predictor="student", metric="auroc", group="B", split="test", readout="knn"
    )
    assert (row["value"], row["lo"], row["hi"], row["status"]) == (None, None, None, "single_class")
    assert select(lab.rows(out), label="constant") == []
    notes = json.loads((out / "reports" / "full.json").read_text())["context"]["notes"]
    assert [note for note in notes if note.startswith("constant: all train images have one class")]


def test_the_same_numbers_are_in_tensorboard(lab, labelled):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(labelled / "tb"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"loss", "lr", "images_per_s", "memory_mib", "loss/one/summary", "loss_group/one/summary/B"} <= set(tags)
    (row,) = select(lab.rows(labelled), predictor="student", metric="auroc", group="B", split="test", readout="linear")
    found = events.Scalars("eval/auroc/even/linear/student/device=B")
    assert found[-1].step == 10
    assert found[-1].value == pytest.approx(row["value"])


# ── Verbs on a finished run ──


def test_a_finished_run_runs_again_at_no_cost(lab, whole, out, capsys):
    before = {path: path.stat().st_mtime_ns for path in (out / "reports").iterdir()}
    assert cli.main(["distill", "--config", str(out / "config.yaml"), "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "reports").iterdir()} == before


def test_evaluate_writes_the_same_report_again(lab, labelled, out, capsys):
    """From the configuration that the run has left in its folder."""
    shutil.rmtree(out / "reports")
    assert cli.main(["evaluate", "--out", str(out)]) == 0
    assert lab.same(lab.rows(out, "full"), lab.rows(labelled, "full"))
    assert lab.same(lab.rows(out, "teachers"), lab.rows(labelled, "teachers"))
    assert str(out / "reports" / "full.html") in capsys.readouterr().out


def test_evaluate_with_other_groups(lab, out):
    assert cli.main(["evaluate", "--out", str(out), "--set", "data.groups=[]"]) == 0
    assert {row["attribute"] for row in lab.rows(out, "full")} == {""}


def test_evaluate_with_studies(lab, labelled, out):
    """Shares of the train patients, and fits on one device: options of a finished run, whose other rows stay."""
    settings = ["evaluate.scarcity=[.5, 1]", "evaluate.scarcity_seeds=2", "evaluate.holdout=[device]"]
    assert cli.main(["evaluate", "--out", str(out), *(word for one in settings for word in ("--set", one))]) == 0
    for stage in ("teachers", "full"):
        rows, asked = lab.rows(out, stage), ("scarcity", "holdout")
        kept, studied = ([r for r in rows if r["metric"].startswith(asked) is found] for found in (False, True))
        assert lab.same(kept, lab.rows(labelled, stage))
        assert {row["predictor"] for row in studied} == TEACHERS | ({"student"} if stage == "full" else set())
        whole = select(studied, metric="scarcity_auroc", target="1")
        values = {(row["predictor"], row["split"], row["group"]): row["value"] for row in whole}
        for row in select(kept, metric="auroc", readout="linear"):
            if (key := (row["predictor"], row["split"], row["group"])) in values:
                assert values.pop(key) == row["value"]
        assert not values
        places = {(row["target"], row["group"]) for row in select(studied, metric="holdout_auroc")}
        assert places == {(target, group) for target in ("all", "A", "B") for group in "AB"}


def test_evaluate_with_a_label_of_several_classes(lab, out):
    """The run had no labels: probes are fitted for each class, and averaged over the classes."""
    assert cli.main(["evaluate", "--out", str(out), "--set", "data.labels=[device=A, device=B]"]) == 0
    auroc = {
        row["label"]: row["value"]
        for row in lab.rows(out, "full")
        if (row["metric"], row["readout"], row["predictor"]) == ("auroc", "linear", "student")
        and (row["split"], row["attribute"]) == ("test", "")
    }
    assert list(auroc) == ["device", "device=A", "device=B"]
    assert auroc["device"] == pytest.approx((auroc["device=A"] + auroc["device=B"]) / 2)


def test_compare_prints_the_paired_table(out, capsys):
    assert cli.main(["compare", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "student minus each teacher" in text
    for name in ("one", "two", "fair"):
        assert name in text


def test_export_writes_the_same_weights_again(lab, labelled, out, capsys):
    shutil.rmtree(out / "export")
    assert cli.main(["export", "--out", str(out)]) == 0
    expected = lab.weights(labelled)
    found = lab.weights(out)
    assert found.keys() == expected.keys()
    assert all((found[key] == value).all() for key, value in expected.items())
    assert "max abs diff" in capsys.readouterr().out


def test_plan_of_the_stored_configuration(out, capsys):
    assert cli.main(["plan", "--config", str(out / "config.yaml")]) == 0
    assert capsys.readouterr().out == (out / "plan.md").read_text()


@pytest.mark.parametrize(
    ("what", "kinds"),
    [
        ("teachers", ("timm", "open_clip", "transformers", "packaged", "erased")),
        ("students", ("timm",)),
        ("balancers", ("uniform", "inverse_frequency", "group_dro")),
    ],
)
def test_list(what, kinds, capsys):
    assert cli.main(["list", what]) == 0
    text = capsys.readouterr().out
    for kind in kinds:
        assert f"{kind}: " in text


def test_check_of_a_file(lab, capsys):
    teacher = lab.job()["teachers"]["one"]["kind"]
    assert cli.main(["check", teacher, "--set", "width=24"]) == 0
    assert "determin" in capsys.readouterr().out


def test_check_of_a_job_says_what_is_broken(lab, capsys):
    """The teachers pass; the student of these tests is none that plain timm could build."""
    assert cli.main(["check", "--config", str(lab.config())]) == 2
    message = capsys.readouterr().err
    for name in ("one", "two", "fair"):
        assert f"teachers.{name}\nok " in message
    assert message.count("FAIL ") == 1
    assert "FAIL  plain timm rebuilds the backbone from the recipe" in message
