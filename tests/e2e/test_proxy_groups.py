"""Clusters that stand in for groups of images that nobody has annotated, in a run from end to end."""

import json
import re

import numpy as np
import pytest
from safetensors.torch import load_file

from agglom import cli, proxies, report

OVER = "device, else clusters of one"
SENTENCE = "Images without device are grouped by 3 clusters of the summaries of one, fitted on 10 train images; 2 fits"


def half_known(rows):
    """Every other device is unknown."""
    for row in rows[::2]:
        row["device"] = ""


def test_a_run_on_partly_annotated_images(lab, stop_at, monkeypatch, capsys):
    changes = {
        "data.manifest": lab.manifest(half_known),
        "teachers.fair": None,
        "balance": {
            **{"kind": "inverse_frequency", "group": "device", "resample": 0.5},
            "proxies": {"teacher": "one", "clusters": 3, "seeds": 2},
        },
        "stages": [{"name": "full", "length": "4 steps", "size": 32}],
        "evaluate.probe_images": 10,
        "evaluate.conflict": False,
    }
    stop_at(2)
    assert lab.distill("out", changes) == 130
    out = lab.folder / "out"
    bits = (out / "proxies.safetensors").read_bytes()
    assert capsys.readouterr().out.count(SENTENCE) == 1

    def fit(*_):
        raise AssertionError("clusters are fitted once")

    monkeypatch.setattr(proxies, "fit", fit)
    assert lab.run("out", changes) == out
    assert cli.main(["evaluate", "--out", str(out)]) == 0
    assert (out / "proxies.safetensors").read_bytes() == bits
    assert f"- weights: inverse_frequency over {OVER}" in (out / "plan.md").read_text()
    assert f"over `{OVER}`" in (out / "export" / "README.md").read_text()

    # Every train image is in a group, and drawn and weighed by it.
    with open(changes["data.manifest"]) as file:
        device = np.array([line.split(",")[3] for line in file.read().splitlines()[1:25]])
    cluster = load_file(out / "proxies.safetensors")["cluster_N"].numpy()[:24]
    group = np.where(device == "", np.char.add("cluster ", (cluster + 1).astype(str)), device)
    names, images = np.unique(group, return_counts=True)
    assert (cluster[device == ""] >= 0).all()
    assert {"A", "B"} < set(names)
    drawn = images**0.5 / (images**0.5).sum()
    line = lab.metrics(out)[-1]
    for name, share in zip(names, drawn, strict=True):
        assert line[f"weight/one/{name}"] == pytest.approx(1 / share / len(names), rel=1e-5)

    for stage in ("teachers", "full"):
        context = json.loads((out / "reports" / f"{stage}.json").read_text())["context"]
        assert context["balance"]["group"] == OVER
        assert [one["attribute"] for one in context["proxies"]["agreement"]] == ["device"]
        assert sum(context["proxies"]["n_grouped"]) == (device == "").sum()
    assert context["weights"]["attribute"] == OVER
    # No cluster is ever a group of the attribute.
    named = report.load(out / "reports" / "full.json")
    said = [*named.rows, *context["groups"], *context["curves"]]
    assert {one["group"] for one in said if one["attribute"] == "device"} <= {"A", "B", "all", None}
    assert not any("cluster" in str(one["group"]) for one in said)
    for suffix in ("html", "md"):
        text = (out / "reports" / f"full.{suffix}").read_text()
        assert len(re.findall("(?m)^(?:## |<h2 .*>)Proxy groups", text)) == 1
        assert SENTENCE in text
        assert "A weight on a cluster is not a weight on a group" in text
        assert OVER in text
        assert not re.search(r"device[ ·:=×(]*cluster \d", text)


def test_too_few_images_for_the_clusters(lab, capsys):
    changes = {"teachers.fair": None, "balance.proxies": {"teacher": "two", "clusters": 25}}
    assert lab.distill("out", changes) == 4
    assert "balance.proxies.clusters: 25 clusters need as many different images, and the 24" in capsys.readouterr().err
