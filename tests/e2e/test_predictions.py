"""`agglom evaluate --predictions`: somebody's scores of real images, without a model, and what is wrong with them.

The images are scikit-learn's handwritten digits; two logistic regressions on their pixels are the systems to audit.
"""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from agglom import cli, report

TRAIN, VAL = 600, 1000


@pytest.fixture(scope="module")
def table():
    """Manifest rows as dicts, and by predictor the probability that a digit is even, on all rows."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    x, even = digits.data / 16, digits.target % 2 == 0
    ink, n = x.mean(1), len(digits.target)
    rows = [
        {
            "image": f"images/{i:04d}.png",
            "patient_id": f"w{i // 2}",
            "split": "train" if i < TRAIN else "val" if i < VAL else "test",
            "even": int(even[i]),
            "ink": round(float(ink[i]), 4),
            "hand": "" if i % 17 == 0 else "left" if (i // 2) % 3 == 0 else "right",
            "writer": f"writer {i // 2}",
        }
        for i in range(n)
    ]
    scores = {}
    for name, features in (("pixels", x), ("every eighth", x[:, ::8])):
        model = LogisticRegression(max_iter=500).fit(features[:TRAIN], even[:TRAIN])
        scores[name] = np.clip(model.predict_proba(features)[:, 1] + rng.normal(0, 0.02, n), 0, 1).round(6)
    return rows, scores


class Desk:
    """Writes the files of an audit and runs it in this process."""

    def __init__(self, folder, table):
        self.folder, (self.rows, self.scores) = folder, table
        self.manifest, self.predictions = folder / "m.csv", folder / "s.csv"
        self.write_manifest(self.rows)
        self.write_scores(self.long())

    def long(self):
        held = range(TRAIN, len(self.rows))
        return [
            {"image": self.rows[i]["image"], "predictor": name, "label": "even", "score": score[i]}
            for name, score in self.scores.items()
            for i in held
        ]

    def write_manifest(self, rows):
        self._write(self.manifest, rows)

    def write_scores(self, rows):
        self._write(self.predictions, rows)

    @staticmethod
    def _write(path, rows):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def argv(self, *more, out="out"):
        files = ["--predictions", str(self.predictions), "--manifest", str(self.manifest)]
        return ["evaluate", *files, "--out", str(self.folder / out), "--set", "evaluate.permutations=20", *more]

    def run(self, *more, out="out"):
        assert cli.main(self.argv(*more, out=out)) == 0
        return json.loads((self.folder / out / "report.json").read_text())


@pytest.fixture
def desk(tmp_path, table):
    return Desk(tmp_path, table)


def select(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


# ── What is written ──


def test_report_from_column_names(desk, capsys):
    found = desk.run()
    folder = desk.folder / "out"
    assert sorted(path.name for path in folder.iterdir()) == [f"report.{s}" for s in ("csv", "html", "json", "md")]
    assert capsys.readouterr().out.splitlines() == [str(folder / f"report.{s}") for s in ("json", "csv", "md", "html")]
    context, rows = found["context"], found["rows"]
    assert context["notes"] == ["Column writer is not used: 899 distinct values."]
    assert (context["split"], context["labels"], context["scores"]) == ("test", ["even"], "s.csv")
    assert {row["attribute"] for row in rows} == {"", "ink", "hand"}
    assert {row["predictor"] for row in rows} == {"pixels", "every eighth", "every eighth - pixels"}
    for name, score in desk.scores.items():
        for hand in ("left", "right"):
            mine = [i for i, row in enumerate(desk.rows) if row["split"] == "test" and row["hand"] == hand]
            (row,) = select(rows, predictor=name, metric="auroc", group=hand, split="test")
            assert row["value"] == pytest.approx(roc_auc_score([desk.rows[i]["even"] for i in mine], score[mine]))
            assert row["unknown_lo"] < row["value"] < row["unknown_hi"]
    assert len(select(rows, metric="auroc_curve", attribute="ink", predictor="pixels")) == 9
    (row,) = select(rows, predictor="every eighth - pixels", metric="auroc", attribute="", split="test")
    assert row["hi"] < 0
    assert row["p_value"] < 0.05
    assert report.load(folder / "report.json").stage == "report"
    for suffix in ("md", "html"):
        text = (folder / f"report.{suffix}").read_text()
        assert "pixels" in text
        assert "every eighth" in text


def test_all_forms_of_the_same_scores(desk):
    expected = desk.run()
    desk.predictions = desk.folder / "s.parquet"
    pq.write_table(pa.Table.from_pylist(desk.long()), desk.predictions)
    assert desk.run(out="parquet")["rows"] == expected["rows"]
    wide = {"image": [row["image"] for row in desk.rows[TRAIN:]]}
    wide |= {f"{name}:even": score[TRAIN:] for name, score in desk.scores.items()}
    # pandas adds the numbers of the rows, where it writes some of a table.
    pq.write_table(pa.table(wide | {"__index_level_0__": list(range(TRAIN, len(desk.rows)))}), desk.predictions)
    assert desk.run(out="wide")["rows"] == expected["rows"]


def test_schema_of_a_configuration(desk):
    """That of a whole job, whose teachers are not asked for; `--manifest` and `--set` go before it."""
    data = {
        "manifest": "none.csv",
        "patient": "patient_id",
        "labels": ["even"],
        "attributes": {"ink": {"kind": "continuous", "bins": [0.3]}, "hand": {}},
        "groups": ["hand", "hand*ink"],
    }
    path = desk.folder / "job.yaml"
    path.write_text(yaml.safe_dump({"data": data, "teachers": {"x": {"kind": "nothing"}}, "seed": 3}))
    found = desk.run("--config", str(path), "--set", "data.min_support=20")
    assert (found["context"]["seed"], found["context"]["min_support"]) == (3, 20)
    assert {row["attribute"] for row in found["rows"]} == {"", "hand", "hand*ink"}
    groups = {row["group"] for row in select(found["rows"], attribute="hand*ink", metric="auroc")}
    assert groups == {"left|<0.3", "left|>=0.3", "right|<0.3", "right|>=0.3"}


def test_without_a_split_all_rows_are_of_test(desk):
    desk.write_manifest([{k: v for k, v in row.items() if k != "split"} for row in desk.rows[VAL:]])
    desk.write_scores([row for row in desk.long() if int(row["image"][7:11]) >= VAL])
    found = desk.run()
    assert {row["split"] for row in found["rows"]} == {"test"}
    assert "even: no validation image is scored, so thresholds are .5." in found["context"]["notes"]
    assert {row["threshold"] for row in select(found["rows"], predictor="pixels", metric="tpr", rule="global")} == {0.5}


def test_a_label_of_several_classes(desk):
    """The digit modulo 3: each class against the rest, and all of them together."""
    digits = load_digits()
    third, x = digits.target % 3, digits.data / 16
    probability_NC = LogisticRegression(max_iter=500).fit(x[:TRAIN], third[:TRAIN]).predict_proba(x)
    desk.write_manifest([row | {"third": "abc"[k]} for row, k in zip(desk.rows, third, strict=True)])
    desk.write_scores(
        [
            {"image": desk.rows[i]["image"], "predictor": name, "label": f"third={k}", "score": shown[i, c]}
            for name, shown in (("model", probability_NC), ("reversed", probability_NC[:, ::-1]))
            for i in range(TRAIN, len(desk.rows))
            for c, k in enumerate("abc")
        ]
    )
    found = desk.run()
    assert found["context"]["classes"] == {"third": ["a", "b", "c"]}
    assert "third" not in {row["attribute"] for row in found["rows"]}
    mine = [i for i, row in enumerate(desk.rows) if row["split"] == "test" and row["hand"] == "left"]
    place = {"label": "third", "attribute": "hand", "group": "left", "split": "test", "rule": ""}
    (row,) = select(found["rows"], predictor="model", metric="auroc", **place)
    expected = roc_auc_score(np.eye(3)[third[mine]], probability_NC[mine], average="macro")
    assert (row["value"], row["n_pos"]) == (pytest.approx(expected, abs=1e-9), None)
    (row,) = select(found["rows"], predictor="model", metric="accuracy", **place)
    assert row["value"] == pytest.approx((probability_NC[mine].argmax(1) == third[mine]).mean())
    assert row["lo"] < row["value"] < row["hi"]
    (row,) = select(found["rows"], predictor="reversed - model", metric="auroc", **place)
    assert row["hi"] < 0
    assert row["p_holm"] < 0.05
    (row,) = select(found["rows"], predictor="model", metric="auroc_gap", label="third", attribute="hand", split="test")
    assert row["status"] == "ok"
    (row,) = select(found["rows"], predictor="model", label="third=b", metric="auroc", attribute="", split="test")
    test = [i for i, one in enumerate(desk.rows) if one["split"] == "test"]
    assert row["value"] == pytest.approx(roc_auc_score(third[test] == 1, probability_NC[test, 1]))


@pytest.fixture
def masks(desk):
    """Where there is ink, and two guesses at it; the true mask of one image is empty."""
    truth = load_digits().images[TRAIN:] > 8
    truth[0] = False
    arrays = {"image": np.array([row["image"] for row in desk.rows[TRAIN:]]), "truth": truth}
    arrays |= {"exact": truth.copy(), "shifted": np.roll(truth, 1, 2)}
    desk.predictions = desk.folder / "masks.npz"
    np.savez(desk.predictions, **arrays)
    return arrays


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def test_masks(desk, masks):
    found = desk.run()
    rows, truth, shifted = found["rows"], masks["truth"], masks["shifted"]
    assert found["context"]["labels"] == ["mask"]
    assert "images whose true mask is empty: 1" in found["context"]["notes"][-1]
    test = [i - TRAIN for i, row in enumerate(desk.rows) if row["split"] == "test" and row["hand"] == "right"]
    both = (truth[test] & shifted[test]).sum((1, 2))
    sizes = truth[test].sum((1, 2)) + shifted[test].sum((1, 2))
    place = {"attribute": "hand", "group": "right", "split": "test", "label": "mask"}
    for metric, value_N in (("dice", 2 * both / sizes), ("iou", both / (sizes - both))):
        (row,) = select(rows, predictor="shifted", metric=metric, **place)
        assert row["value"] == pytest.approx(value_N.mean(), abs=1e-12)
        assert row["lo"] < row["value"] < row["hi"]
        (row,) = select(rows, predictor="exact", metric=metric, **place)
        assert row["value"] == 1
        (row,) = select(rows, predictor="shifted - exact", metric=metric, **place)
        assert row["hi"] < 0
        assert row["p_value"] <= row["p_holm"] < 0.05
    (row,) = select(rows, predictor="shifted", metric="dice_gap", attribute="hand", split="test")
    assert (row["status"], row["group"]) == ("ok", "all")
    text = (desk.folder / "out" / "report.md").read_text()
    assert "shifted" in text
    assert "Dice" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("truth"), "no array 'truth'"),
        (lambda m: m.pop("image"), "no array 'image'"),
        (lambda m: [m.pop("exact"), m.pop("shifted")], "no predictor: add an array of masks"),
        (lambda m: m.update(exact=m["exact"][:, :4]), "array 'exact' has shape (1197, 4, 8); expected that"),
        (lambda m: m.update(exact=m["exact"] * 2), "array 'exact' holds values other than 0 and 1 in 1196 masks"),
        (lambda m: m.update({"exact:lung": m.pop("exact")}), "no array 'truth:lung'"),
        (lambda m: m["image"].__setitem__(3, "images/nobody.png"), "images that are not in the manifest: 1 image"),
        (lambda m: m["image"].__setitem__(3, m["image"][4]), "duplicate images: 1 row"),
        (lambda m: [m.update({k: v[:-9]}) for k, v in [*m.items()]], "images of the manifest without masks: 9 "),
    ],
)
def test_wrong_masks(desk, masks, capsys, change, message):
    change(masks)
    np.savez(desk.predictions, **masks)
    assert cli.main(desk.argv()) == 4
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("write", [lambda path: path.write_text("image,truth"), lambda path: one_array(path)])
def test_a_file_that_holds_no_masks(desk, masks, capsys, write):
    write(desk.predictions)
    assert cli.main(desk.argv()) == 4
    assert "not a readable file of masks" in capsys.readouterr().err


def test_a_run_is_audited_from_its_own_scores(labelled, tmp_path):
    """One path: the scores that a stage leaves behind give the rows that its report has."""
    argv = ["evaluate", "--predictions", str(labelled / "reports" / "full.scores.parquet")]
    assert cli.main([*argv, "--config", str(labelled / "config.yaml"), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    whole = report.load(labelled / "reports" / "full.json").rows
    # Variance unexplained and leakage are of features, not of scores.
    expected = [row for row in whole if row["readout"] != "none" and row["metric"] != "leakage"]
    assert len(found) == len(expected)
    key = ("predictor", "metric", "attribute", "group", "split", "readout", "rule")
    by_key = {tuple(row[k] for k in key): row for row in found}
    for row in expected:
        mine = by_key[tuple(row[k] for k in key)]
        assert {k: v for k, v in mine.items() if k != "stage"} == pytest.approx(
            {k: v for k, v in row.items() if k != "stage"}, abs=1e-9, nan_ok=True
        )


# ── What is refused ──


def scored(edit):
    def change(desk):
        rows = desk.long()
        edit(rows)
        desk.write_scores(rows)

    return change


def listed(edit):
    def change(desk):
        rows = [dict(row) for row in desk.rows]
        desk.write_manifest(edit(rows) or rows)

    return change


def put(index, **cells):
    return lambda rows: rows[index].update(cells)


def rename(old, new):
    return lambda rows: [{new if key == old else key: value for key, value in row.items()} for row in rows]


def gone(name):
    return lambda desk: (desk.folder / name).unlink()


WRONG = {
    "logits": (scored(put(0, score=3.2)), 4, "scores outside [0, 1]: 1 score. Give probabilities: a sigmoid is not"),
    "NaN": (scored(put(0, score="nan")), 4, "scores that are NaN: 1 score"),
    "text": (scored(put(0, score="high")), 4, "scores that are no numbers: 1 row"),
    "strange image": (scored(put(0, image="z.png")), 4, "images that are not in the manifest: 1 image"),
    "image not scored": (
        scored(lambda rows: [rows.pop(i) for i in (len(rows) - 1, len(rows) // 2 - 1)]),
        4,
        "images of the manifest without a score: 1 score.",
    ),
    "other images": (scored(lambda rows: rows.pop()), 4, "'images/1796.png' has none of predictor 'every eighth'"),
    "duplicate": (scored(lambda rows: rows.append(rows[0])), 4, "duplicate rows: 1 score"),
    "unknown label": (
        scored(lambda rows: [row.update(label="evn") for row in rows]),
        4,
        "missing column 'evn' (data.labels); did you mean 'even'?",
    ),
    "missing column": (
        lambda desk: desk.write_scores(rename("score", "scores")(desk.long())),
        4,
        "missing column 'score' (a long table holds image, predictor, label and score); did you mean 'scores'?",
    ),
    "no class": (
        listed(lambda rows: [row.update(even=0) for row in rows] and None),
        4,
        "no label has both a 0 and a 1",
    ),
    "label is no class": (listed(put(0, even=2)), 4, "label 'even' not 0 or 1: 1 row"),
    "no patient": (listed(rename("patient_id", "who")), 4, "missing column 'patient' (data.patient)"),
    "patient in two splits": (listed(put(0, split="test")), 4, "patients in two splits (1): 1 row"),
    "unknown split": (listed(put(0, split="dev")), 4, "unknown split values: 1 row"),
    "image twice": (listed(put(0, image="images/0001.png")), 4, "duplicate image rows: 1 row"),
    "no scores": (gone("s.csv"), 4, "s.csv: the table of scores does not exist"),
    "semicolons": (
        lambda desk: desk.predictions.write_text(desk.predictions.read_text().replace(",", ";")),
        4,
        "s.csv: its columns are separated by semicolons; write it with commas",
    ),
    "a folder": (
        lambda desk: [desk.predictions.unlink(), desk.predictions.mkdir()],
        4,
        "s.csv: the table of scores is a folder; name the file",
    ),
    "a spreadsheet": (
        lambda desk: desk.predictions.write_bytes(b"PK\x03\x04 and so on"),
        4,
        "s.csv: the table of scores is a spreadsheet or a zip archive; write it as CSV or Parquet",
    ),
    "no manifest": (gone("m.csv"), 4, "m.csv: the manifest does not exist; did you mean"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(desk, capsys, name):
    change, status, message = WRONG[name]
    change(desk)
    assert cli.main(desk.argv()) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (desk.folder / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "data.groups=[hnad]"], "data.groups[0]: 'hnad' is not one of the attributes"),
        (["--set", "data.mn_support=3"], "data: unknown key 'mn_support'; did you mean 'min_support'?"),
        (["--set", "optim.batch=3"], "an audit reads data, evaluate, seed; got 'optim'"),
        (["--config", "none.yaml"], "none.yaml: no such configuration"),
        (["--margin", "0.1"], "unrecognized arguments: --margin"),
    ],
)
def test_wrong_settings(desk, capsys, more, message):
    assert cli.main(desk.argv(*more)) == 2
    assert message in capsys.readouterr().err


def test_without_a_manifest(desk, capsys):
    argv = ["evaluate", "--predictions", str(desk.predictions), "--out", str(desk.folder / "out")]
    assert cli.main(argv) == 2
    assert "--manifest is missing" in capsys.readouterr().err
