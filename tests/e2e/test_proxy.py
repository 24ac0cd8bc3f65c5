"""A student that was exported teaches another one."""

import torch

from agglom import exported, plugins, testing


def test_an_export_keeps_the_contract_of_teachers(labelled):
    for options in ({}, {"head": "two"}, {"size": 32}):
        results = testing.run("checkpoint", "teachers", {"folder": str(labelled / "export"), **options})
        assert all(result.ok for result in results), testing.render(results)


def test_it_says_what_the_export_says(labelled):
    model = exported.load(labelled / "export")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trunk, predicted = model(pixels)
    for head, expected in ((None, trunk), ("one", predicted["one"])):
        teacher = plugins.build("checkpoint", "teachers", {"folder": str(labelled / "export"), "head": head})
        found = teacher.encode(pixels)
        assert teacher.pixels.size == 64
        for mine, theirs in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(mine, theirs)


def test_a_student_of_a_student(lab, labelled):
    proxy = {"kind": "checkpoint", "options": {"folder": str(labelled / "export")}}
    changes = {
        "teachers": {"proxy": proxy},
        "stages": [{"name": "small", "length": "2 steps", "size": 64}],
        "data.labels": ["even"],
    }
    out = lab.run("proxy", changes)
    rows = lab.rows(out, "small")
    assert {row["predictor"] for row in rows} >= {"student", "teacher/proxy", "student - teacher/proxy"}
    assert {row["target"] for row in rows if row["metric"].startswith("fvu")} == {"proxy/summary", "proxy/patches"}
