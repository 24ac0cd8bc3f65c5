"""Teachers that erase, that serve some patients only, and that are robust over groups, in one run from end to end."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from agglom import compare

CONFIGURATION, DATA = 2, 4


def with_age(rows):
    """A number for each image but two, correlated with the device."""
    for index, row in enumerate(rows):
        row["age"] = "" if index in (3, 30) else 20 + 5 * (index % 7) + 15 * (row["device"] == "B")


def changes(lab, **more):
    return {
        "data.manifest": lab.manifest(with_age),
        "data.labels": ["even"],
        "data.attributes.age": {"kind": "continuous", "bins": [40]},
        "data.groups": ["device", "device*age"],
        "teachers": {
            "one": lab.job()["teachers"]["one"],
            "blind": {"kind": "erased", "source": "one", "options": {"attribute": ["device", "age"], "shrink": "auto"}},
            "local": {
                "kind": "specialist",
                "source": "blind",
                "options": {"attribute": "device", "groups": ["A"]},
            },
            "robust": {
                "kind": "group_dro_probe",
                "source": "one",
                "options": {"label": "even", "attribute": "age", "hidden": 8, "steps": 20},
            },
        },
        "evaluate.leakage": True,
        "evaluate.permutations": 0,
        "evaluate.conflict": False,
        "stages": [{"name": "full", "length": "2 steps", "size": 32}],
    } | more


def pick(rows, **keys):
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def test_a_run_with_all_of_them(lab):
    out = lab.run("out", changes(lab))
    report = json.loads((out / "reports" / "full.json").read_text())
    rows, lines = report["rows"], lab.metrics(out)
    assert all(math.isfinite(line["loss"]) for line in lines)
    # What is fitted comes back from its file, and erasing a number is not erasing its bins.
    fitted = load_file(out / "normaliser.safetensors")
    assert torch.linalg.matrix_rank(fitted["blind/fitted/summary_matrix_DD"], rtol=1e-8) == 2
    assert fitted["robust/fitted/weight_HD"].shape[0] == 8
    # A specialist has no loss in groups that it does not serve, and no row in groups that hold others.
    (line,) = lines
    assert line["loss_group/local/summary/A"] > 0
    assert line["loss_group/local/summary/B"] is None
    assert line["loss_group/blind/summary/B"] > 0
    local = [row for row in rows if "teacher/local" in row["predictor"]]
    assert {(row["attribute"], row["group"]) for row in local} == {
        *(("device", "A"), ("device*age", "A|<40"), ("device*age", "A|>=40"))
    }
    assert pick(rows, predictor="teacher/blind", attribute="", group="all", metric="auroc")
    assert pick(rows, predictor="student - teacher/local", attribute="device", group="A", metric="auroc")
    assert {one["predictor"] for one in report["context"]["curves"] if one["attribute"] == ""} == {
        *("student", "ensemble", "teacher/one", "teacher/blind", "teacher/robust")
    }
    served = {row["group"]: row["n"] for row in pick(rows, metric="fvu", target="local/patches", split="test")}
    every = {row["group"]: row["n"] for row in pick(rows, metric="fvu", target="one/patches", split="test")}
    assert served["A"] == every["A"] == served["all"] < every["all"]
    assert served["B"] == 0
    # What a teacher was fitted on is read by a probe of other patients.
    leaked = pick(rows, metric="leakage", attribute="device", group="A")
    assert {row["predictor"] for row in leaked} == {"student", "teacher/one", "teacher/blind", "teacher/robust"}
    assert {row["split"] for row in leaked} == {"test"}
    assert all("fitted on validation patients" in row["note"] for row in leaked)
    # Verdicts: everybody is compared with the teachers of everybody.
    verdicts = compare.compare([out], compare.Question(margin=0.5)).of("verdict")
    against = {one.place for one in verdicts if one.minus == "teacher/local"}
    assert against == {("device", "A"), ("device*age", "A|<40"), ("device*age", "A|>=40")}
    assert {one.minus for one in verdicts if one.group == "B"} == {
        *("", "teacher/one", "teacher/blind", "teacher/robust")
    }


ATTRIBUTES, VALUES = "attributes under data.attributes: device, age", "values of device: A, B; did you mean 'A'?"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("local.options.groups", ["AA"], f"local.options.groups[0]: 'AA' is not one of the {VALUES}"),
        ("local.options.attribute", "sex", f"local.options.attribute: 'sex' is not one of the {ATTRIBUTES}"),
        (
            "blind.options.attribute",
            ["device", "sex"],
            f"blind.options.attribute[1]: 'sex' is not one of the {ATTRIBUTES}",
        ),
        ("robust.options.label", "odd", "robust.options.label: 'odd' is not one of the labels under data.labels: even"),
        ("blind.options.shrink", 2.0, "blind: shrink is 2.0, expected a number in [0, 1] or auto"),
    ],
)
def test_what_is_not_there_is_named(lab, capsys, option, value, message):
    assert lab.distill("out", changes(lab) | {f"teachers.{option}": value}) == CONFIGURATION
    assert f"teachers.{message}" in capsys.readouterr().err


def test_a_group_without_train_images_has_no_specialist(lab, capsys):
    one = lab.manifest(lambda rows: [row.update(device="B") for row in rows if row["split"] == "train"])
    local = {"kind": "specialist", "source": "one", "options": {"attribute": "device", "groups": ["B", "A"]}}
    assert lab.distill("out", {"data.manifest": one, "teachers.local": local}) == CONFIGURATION
    assert "teachers.local.options.groups[1]: 'A' has no train image in" in capsys.readouterr().err


def test_a_label_that_does_not_vary_is_refused(lab, capsys):
    one = lab.manifest(lambda rows: [row.update(even="1") for row in rows if row["split"] == "train"])
    robust = {"kind": "group_dro_probe", "source": "one", "options": {"label": "even", "attribute": "device"}}
    asked = {"data.manifest": one, "data.labels": ["even"], "teachers.robust": robust}
    assert lab.distill("out", asked) == DATA
    assert "teachers.robust: cannot fit on the train patients: label 'even' has one value" in capsys.readouterr().err
