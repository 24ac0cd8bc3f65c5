"""`agglom check --doctor`: the numbers of the teachers' stage before there is any, and features that are not lost."""

from safetensors import safe_open

from agglom import cli, report

LABELS = {"data.labels": ["even"], "evaluate.leakage": True}  # those of `labelled`
SAME = ("predictor", "metric", "label", "attribute", "group", "split", "value", "lo", "hi", "n", "n_patients", "status")


def scores(rows):
    kept = [row for row in rows if row["metric"] in ("auroc", "leakage") and row["readout"] == "linear"]
    return [{key: row[key] for key in SAME} for row in kept if row["predictor"].startswith("teacher/")]


def test_the_numbers_are_those_of_the_teachers_stage(lab, labelled, capsys):
    out = lab.folder / "out"
    assert cli.main(["check", "--doctor", "--config", str(lab.config(LABELS)), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    found = report.load(out / "doctor.json")
    assert lab.same(scores(found.rows), scores(lab.rows(labelled, "teachers")))
    assert scores(found.rows)
    assert (out / "doctor.md").read_text() in text
    assert "a linear probe, fitted on validation patients, as a teacher was fitted on device" in text
    limited = (
        "- fair was fitted on device with 24 images; for linear erasure to hold for new patients, its 32 dimensions"
    )
    assert limited in text
    assert limited in (labelled / "reports" / "full.md").read_text()

    doctor = found.context["doctor"]
    assert list(doctor["teachers"]) == ["fair", "one", "two"]
    fair, one = doctor["teachers"]["fair"], doctor["teachers"]["one"]
    assert (fair["from"], one["from"]) == ("one", None)
    assert [at["size"] for at in one["sizes"]] == [64, 32, 96]
    assert all(-1 <= at["summary_cka"] <= 1 + 1e-6 for at in (*fair["sizes"][1:], *one["sizes"][1:]))
    assert 1 < one["summary"]["effective_rank"] <= 23  # 24 train images
    assert {place["attribute"] for place in doctor["map"]} == {"", "device"}
    assert {place["best"] for place in doctor["map"]} <= set(doctor["teachers"])

    # A run into the same folder would find its features: they are stored with the same identity.
    files = [folder / "features" / "one.safetensors" for folder in (out, labelled)]
    ours, theirs = (safe_open(path, "pt").metadata() for path in files)
    assert ours == theirs


def test_without_out_nothing_is_written(lab, capsys, monkeypatch):
    monkeypatch.chdir(lab.folder)
    config = lab.config({"evaluate.sizes": [48], "teachers.fair": None})
    before = set(lab.folder.iterdir())
    assert cli.main(["check", "--doctor", "--config", str(config)]) == 0
    text = capsys.readouterr().out
    assert "nobody can say which teacher serves whom" in text
    assert "| two     | 48 " in text
    assert set(lab.folder.iterdir()) == before


def test_features_that_are_not_finite_are_named(lab, capsys):
    config = lab.config({"teachers.one.options.nan_at": 64})
    assert cli.main(["check", "--doctor", "--config", str(config)]) == 4
    assert "teachers.one: its summary features are not finite" in capsys.readouterr().err


def test_students_that_do_not_exist_yet_are_named_together(lab, capsys):
    proxies = {
        f"teachers.{name}": {"kind": "checkpoint", "options": {"stage": "large"}} for name in ("first", "second")
    }
    student = {"kind": lab.job()["student"]["kind"], "options": {"width": 16}}
    stages = [{"name": "large", "length": "2 steps", "size": 32}]
    stages += [{"name": "small", "length": "2 steps", "size": 32, "student": student}]
    config = lab.config(proxies | {"stages": stages, "teachers.fair": None})
    assert cli.main(["check", "--doctor", "--config", str(config)]) == 0
    assert "- Not there yet, so not examined: first and second.\n" in capsys.readouterr().out
