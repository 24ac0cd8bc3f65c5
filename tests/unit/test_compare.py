"""`compare` on run folders made by hand: student against teachers, run against run, stage against stage."""

import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from agglom import cli, compare, report
from agglom.core import metrics
from agglom.errors import ConfigError, DataError
from agglom.reading import unique
from agglom.report import GroupReport

OK, USAGE, NO, DATA = 0, 2, 3, 4
JOB = """\
data:
  manifest: table.csv
  labels: [{labels}]
  attributes: {{sex: {{}}}}
  groups: [sex]
  min_support: {support}
teachers:
  one: {{kind: packaged, options: {{model: dinov2_vits14}}}}
  two: {{kind: packaged, options: {{model: dinov2_vits14}}}}
student: {{options: {{model: vit_tiny_patch16_224}}}}
stages:
  - {{name: full, length: 20 steps, size: 32}}
"""
PREDICTORS = ("student", "teacher/one", "teacher/two")


class Lab:
    """Writes run folders: 900 patients, 200 of val and 600 of test, two of three women, one image each."""

    def __init__(self, folder):
        self.folder = folder
        self.labels, self.support, self.splits = ("ill",), 30, ("train", "val", "test")
        self.rng = np.random.default_rng(0)
        n = 900
        self.sex = np.where(np.arange(n) % 3 < 2, "F", "M")
        self.split = np.repeat(["train", "val", "test"], [100, 200, 600])
        self.truth = {label: self.rng.integers(0, 2, n) for label in ("ill", "sick")}
        self.shared = {label: self.rng.normal(size=n) for label in self.truth}

    def scores(self, skill, label, seed):
        """Scores with a mean distance of `skill` (a number, or one by sex) between the classes."""
        noise = 0.95 * self.shared[label] + 0.3 * np.random.default_rng(seed).normal(size=len(self.sex))
        distance = np.array([skill if isinstance(skill, float) else skill[sex] for sex in self.sex])
        return 1 / (1 + np.exp(-(noise + distance * (self.truth[label] - 0.5))))

    def run(self, name="run", student=1.5, one=1.5, two=1.2, stage="full", index=1, scores=True):
        """A run folder whose last stage has these skills."""
        out = self.folder / name
        (out / "reports").mkdir(parents=True, exist_ok=True)
        kept = np.isin(self.split, self.splits)
        lines = ["image,patient,split,sex,ill,sick"]
        lines += [
            f"{i}.png,p{i},{self.split[i]},{self.sex[i]},{self.truth['ill'][i]},{self.truth['sick'][i]}"
            for i in np.flatnonzero(kept)
        ]
        (out / "table.csv").write_text("\n".join(lines) + "\n")
        (out / "config.yaml").write_text(JOB.format(labels=", ".join(self.labels), support=self.support))
        skills = {"student": student, "teacher/one": one, "teacher/two": two}
        found = {
            (label, predictor): self.scores(skill, label, seed=sum(map(ord, name + stage + predictor + label)))
            for label in self.labels
            for predictor, skill in skills.items()
        }
        judged = kept & (self.split != "train")
        if scores:
            self.write_scores(out / "reports" / f"{stage}.scores.parquet", found, judged)
        self.write_report(out / "reports", found, judged, stage, index)
        return out

    def write_scores(self, path, found, judged):
        images = [f"{i}.png" for i in np.flatnonzero(judged)]
        parts = [
            {
                "image": image,
                "predictor": predictor,
                "label": label,
                "readout": readout,
                "split": self.split[int(image[:-4])],
                "score": float(score) if readout == "linear" else 0.5,
            }
            for (label, predictor), score_N in found.items()
            for readout in ("linear", "knn")
            for image, score in zip(images, score_N[judged], strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(parts), path)

    def write_report(self, folder, found, judged, stage, index):
        rows = []
        splits = [split for split in ("val", "test") if split in self.splits]
        places = {
            ("", "all"): judged,
            ("sex", "F"): judged & (self.sex == "F"),
            ("sex", "M"): judged & (self.sex == "M"),
        }
        pairs = [(name, None) for name in PREDICTORS] + [("student", name) for name in PREDICTORS[1:]]
        for label in self.labels:
            for split in splits:
                for (attribute, group), mask in places.items():
                    mine = mask & (self.split == split)
                    y, patient = torch.as_tensor(self.truth[label][mine]), torch.as_tensor(np.flatnonzero(mine))
                    for metric in ("auroc", "tpr", "fpr"):
                        for a, b in pairs:
                            columns = [torch.as_tensor(found[label, name][mine]) for name in (a, b) if name]
                            cuts = [0.5] * len(columns)
                            if b:
                                one = metrics.paired(metric, y, *columns, patient, threshold_a=0.5, threshold_b=0.5)
                            else:
                                one = metrics.evaluate(metric, y, *columns, patient, threshold=0.5)
                            rows.append(
                                {
                                    **{"stage": stage, "predictor": f"{a} - {b}" if b else a, "metric": metric},
                                    **{"label": label, "attribute": attribute, "group": group, "split": split},
                                    **{"value": one.value, "lo": one.lo, "hi": one.hi, "n": one.n},
                                    **{"n_pos": one.n_pos, "n_neg": one.n_neg, "n_patients": one.n_patients},
                                    **{"status": one.status, "readout": "linear", "target": "", "note": ""},
                                    **{"threshold": None if b or metric == "auroc" else cuts[0]},
                                    "ci_method": one.method,
                                }
                            )
        context = {"index": index, "split": splits[-1], "min_support": self.support, "seed": 0}
        report.write(GroupReport(stage, rows, context), folder)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


@pytest.fixture
def ask(capsys):
    """Run the verb: status and what it printed."""

    def run(*arguments):
        status = cli.main(["compare", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out if status in (OK, NO) else printed.err

    return run


def several_classes(lab):
    """A run with one label of three classes, `kind`; its report has the numbers of `ill` for each of them."""
    out = lab.run()
    last = report.load(out / "reports" / "full.json")
    kind = np.array(list("abc"))[lab.rng.integers(0, 3, 900)]
    lines = (out / "table.csv").read_text().splitlines()
    head, *rows = [one.rsplit(",", 2)[0] for one in lines]
    told = [f"{head},kind", *(f"{row},{name}" for row, name in zip(rows, kind[-len(rows) :], strict=True))]
    (out / "table.csv").write_text("\n".join(told) + "\n")
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("[ill]", "[kind=a, kind=b, kind=c]"))
    found = {}
    for name in "abc":
        lab.truth[f"kind={name}"] = (kind == name).astype(int)
        lab.shared[f"kind={name}"] = lab.shared["ill"]
        for predictor in PREDICTORS:
            found[f"kind={name}", predictor] = lab.scores(1.5, f"kind={name}", seed=sum(map(ord, name + predictor)))
    lab.write_scores(out / "reports" / "full.scores.parquet", found, lab.split != "train")
    rows = [row for row in last.rows if row["metric"] == "auroc"]
    rows = [row | {"label": label} for label in ("kind", *(f"kind={name}" for name in "abc")) for row in rows]
    context = last.context | {"classes": {"kind": ["a", "b", "c"]}}
    report.write(GroupReport("full", rows, context), out / "reports")
    return out


def written_scores(out):
    """The linear test scores of a run by row of the manifest, a column a predictor."""
    cells = pq.read_table(out / "reports" / "full.scores.parquet").to_pandas()
    cells = cells[(cells.readout == "linear") & (cells.split == "test")]
    return cells.assign(row=cells.image.str[:-4].astype(int)).pivot(index="row", columns="predictor", values="score")


def line(text, start):
    return next(one for one in text.splitlines() if one.startswith(start))


# ── Verdicts ──


def test_non_inferior_is_status_0(lab, ask):
    out = lab.run(student=1.7)
    status, text = ask(out, "--margin", "0.05")
    assert status == OK
    for place in ("all", "sex F", "sex M"):
        assert re.match(rf"{place} +\d+ +non-inferior ", line(text, place))
    assert (
        text.splitlines()[-1]
        == "Verdict: yes, non-inferior at a margin of 0.05 wherever there are enough patients (non-inferior 3)."
    )
    assert ask("--out", out, "--margin", "0.05") == (status, text)


def test_inferior_is_status_3_whatever_fails(lab, ask):
    out = lab.run(student={"F": 1.6, "M": 0.7})
    status, text = ask(out, "--margin", "0.02")
    assert status == NO
    assert re.match(r"sex M +200 +inferior +0\.\d{3} +one +-0\.", line(text, "sex M"))
    assert "inferior" in text.splitlines()[-1]
    assert ask(out, "--margin", "0.02", "--fail-on", "inferior")[0] == NO


def test_inconclusive_is_status_3_unless_relaxed(lab, ask):
    out = lab.run(student=1.5)
    status, text = ask(out, "--margin", "0.01")
    assert status == NO
    assert text.splitlines()[-1].startswith("Verdict: no, non-inferiority at a margin of 0.01 is not shown (")
    assert "Needed: patients of the group that would decide it" in text
    needed = int(line(text, "sex M").split()[-1].replace(",", ""))
    assert needed > 200
    status, text = ask(out, "--margin", "0.01", "--fail-on", "inferior")
    assert status == OK
    assert "Verdict: yes, no group is shown to be inferior at a margin of 0.01, which is all that was asked (" in text


@pytest.mark.parametrize("fail_on", ["inconclusive", "inferior"])
def test_none_assessable_is_status_3(lab, ask, fail_on):
    """Everybody can be judged, but cannot stand in for the groups."""
    lab.support = 250
    status, text = ask(lab.run(student=2.5), "--margin", "0.1", "--fail-on", fail_on)
    assert status == NO
    assert re.match(r"all +600 +non-inferior", line(text, "all"))
    assert "not assessable, too few" in line(text, "sex M")
    assert "Verdict: no, no group can be assessed (" in text


def test_without_groups_everybody_is_judged(lab, ask):
    out = lab.run(student=1.7)
    last = report.load(out / "reports" / "full.json")
    report.write(GroupReport("full", [r for r in last.rows if not r["attribute"]], last.context), out / "reports")
    status, text = ask(out, "--margin", "0.05")
    assert status == OK
    assert text.endswith("(non-inferior 1).\n")


def test_the_printed_numbers_are_those_of_paired(lab):
    out = lab.run(student=1.4)
    text, yes = compare.main([out], compare.Question(margin=0.02))
    cells = written_scores(out)
    row = cells.index.to_numpy()
    mine = lab.sex[row] == "M"
    y, patient = torch.as_tensor(lab.truth["ill"][row][mine]), torch.as_tensor(row[mine])
    student, one = (torch.as_tensor(cells[name].to_numpy()[mine]) for name in ("student", "teacher/one"))
    expected = metrics.paired("auroc", y, student, one, patient, level=0.90)
    assert f"{expected.value:+.3f}" in line(text, "sex M")
    assert f"{expected.lo:+.4f}" in line(text, "sex M")
    assert not yes


def test_the_margin_shown_passes_and_less_does_not(lab, ask):
    out = lab.run(student=1.45)
    shown = max(float(line(ask(out, "--margin", "0.5")[1], place).split()[-5]) for place in ("all", "sex F", "sex M"))
    assert shown > 0.002
    assert ask(out, "--margin", shown)[0] == OK
    assert ask(out, "--margin", round(shown - 0.0011, 4))[0] == NO


def test_rates_use_the_thresholds_of_the_report_and_fpr_is_turned(lab, ask):
    out = lab.run(student=1.4)
    status, text = ask(out, "--margin", "0.2", "--metric", "fpr")
    assert status == OK
    assert "turned so that more is better" in text
    cells = written_scores(out)
    negative = (lab.truth["ill"] == 0) & (lab.sex == "M")
    rate = {name: (cells[name][negative[cells.index]] >= 0.5).mean() for name in PREDICTORS}
    assert any(f"{rate[name] - rate['student']:+.3f}" in line(text, "sex M") for name in PREDICTORS[1:])


def test_several_labels_are_judged_together_or_one_at_a_time(lab, ask):
    lab.labels = ("ill", "sick")
    out = lab.run(student=1.7)
    status, text = ask(out, "--margin", "0.05")
    assert status == OK
    assert text.endswith(" wherever there are enough patients (non-inferior 6).\n")
    _, text = ask(out, "--margin", "0.05", "--label", "sick")
    assert (
        text.splitlines()[-1]
        == "Verdict: yes, non-inferior at a margin of 0.05 wherever there are enough patients (non-inferior 3)."
    )
    assert "\nill\n" not in text


def test_without_a_test_split_val_is_used_and_said_to_flatter(lab, ask):
    lab.splits = ("train", "val")
    lab.support = 15
    _, text = ask(lab.run(), "--margin", "0.2")
    assert "val split" in text
    assert "the numbers flatter every model" in text


def test_val_on_demand(lab, ask):
    out = lab.run()
    status, text = ask(out, "--margin", "0.2", "--split", "val")
    assert status == OK
    assert re.match(r"all +200 ", line(text, "all"))
    assert "flatter" in text
    assert "flatter" not in ask(out, "--margin", "0.2")[1]


# ── The paired table ──


def test_the_paired_table_needs_no_torch(lab):
    code = "import sys; from agglom.cli import main; main(['compare', sys.argv[1]]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, lab.run()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_paired_table_needs_no_scores(lab, ask):
    out = lab.run(scores=False)
    status, text = ask(out)
    assert status == OK
    assert text.startswith("stage full, test split: AUROC of the student minus each teacher, linear readout")
    assert "smallest lower bound" in text
    assert ask("--out", out) == (status, text)
    assert ask(out, "--metric", "tpr")[1].startswith("stage full, test split: tpr of the student")
    assert ask(out, "--split", "val")[1].startswith("stage full, val split")


def test_the_paired_table_shows_adjusted_p_values_where_the_report_has_them(lab, ask):
    out = lab.run(student={"F": 1.5, "M": 3.0})
    assert "Holm" not in ask(out)[1]
    last = report.load(out / "reports" / "full.json")
    p_of = {"F": 0.25, "M": 0.00001}
    rows = [r | {"p_holm": p_of.get(r["group"]) if " - " in r["predictor"] else None} for r in last.rows]
    report.write(GroupReport("full", rows, last.context), out / "reports")
    _, text = ask(out)
    assert line(text, "group").endswith("the student is  p (Holm)")
    assert line(text, "sex F").endswith("0.250")
    assert line(text, "sex M").endswith("better          < 0.001")
    assert "adjusted over the groups of its attribute" in text


def test_a_lower_rate_is_better_in_every_table(lab, ask):
    out = lab.run(student=0.2, stage="warm", index=1)
    lab.run(student=3.0, one=1.0, two=0.8, stage="full", index=2)
    _, text = ask(out, "--metric", "fpr")
    assert re.match(r"sex F +400 +one +-0\.\d{3} +\[-0\.\d{3}, -0\.\d{3}\] +better", line(text, "sex F"))
    assert re.search(r"largest upper bound +-0\.\d{3} +against one", text)
    _, text = ask(out, "--metric", "fpr", "--stages")
    assert re.match(r"sex F +400 +warm +-0\.\d{3} +\[.*\] +better", line(text, "sex F"))
    assert "its upper bound" in text
    assert text.endswith("Chosen: full.\n")
    assert ask(out, "--metric", "fpr", "--margin", "0.02")[0] == OK


# ── Runs and stages ──


def test_runs_side_by_side(lab, ask):
    even, uneven = lab.run("even", student=1.4), lab.run("uneven", student={"F": 2.4, "M": 0.4})
    status, text = ask(even, uneven)
    assert status == OK
    assert re.search(r"group +patients +even +uneven", text)
    assert re.match(r"sex F +400 +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] +0\.\d{3} \[", line(text, "sex F"))
    assert re.search(r"uneven +sex M \(ill\) +0\.", text)
    assert text.splitlines()[-1] == "Chosen: even."
    assert "never the test split" in text


def test_runs_with_a_margin_must_all_keep_it(lab, ask):
    good, bad = lab.run("good", student=1.8), lab.run("bad", student=0.5)
    status, text = ask(good, bad, "--margin", "0.05")
    assert status == NO
    assert text.index("run good\n") < text.index("Verdict: yes") < text.index("run bad\n") < text.index("Verdict: no")
    assert ask(good, good.parent / "good" / ".", "--margin", "0.05")[0] == OK


def test_runs_of_other_data_are_refused(lab, ask):
    one = lab.run("one")
    lab.truth["ill"][-1] ^= 1
    other = lab.run("other")
    status, text = ask(one, other)
    assert status == DATA
    assert "other and one cannot be compared, they differ in the manifest (sha256)" in text


def test_runs_of_other_patients_are_refused(lab, ask):
    """The same manifest, but one calls test what the other calls val."""
    lab.support = 15
    one, other = lab.run("one"), lab.run("other")
    path = other / "config.yaml"
    path.write_text(path.read_text().replace("data:", "data:\n  splits: {val: test, test: val}"))
    status, text = ask(one, other)
    assert status == DATA
    assert "differ in the val images scored for ill, the test images scored for ill" in text


def test_selection_on_test_is_refused(lab, ask):
    runs = [lab.run(name) for name in ("one", "other")]
    for run in runs:
        path = run / "reports" / "full.scores.parquet"
        cells = pq.read_table(path)
        pq.write_table(cells.filter([split == "test" for split in cells["split"].to_pylist()]), path)
    status, text = ask(*runs)
    assert status == DATA
    assert "choosing a run on test is refused" in text


def test_stages(lab, ask):
    out = lab.run(student=1.0, stage="warm", index=1)
    lab.run(student=1.8, stage="full", index=2)
    status, text = ask(out, "--stages")
    assert status == OK
    assert "full, ill" in text
    assert re.match(r"sex F +400 +warm +\+0\.\d{3} +\[\+0\.\d{3}, \+0\.\d{3}\] +better", line(text, "sex F"))
    assert text.splitlines()[-1] == "Chosen: full."


def test_a_single_stage_has_no_other(lab, ask):
    status, text = ask(lab.run(), "--stages")
    assert status == DATA
    assert "'full' is the only stage with a student" in text


# ── Files ──


def written(folder):
    """What the JSON holds, once the CSV has been seen to hold the same rows."""
    found = json.loads((folder / "compare.json").read_text())
    with (folder / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    plain = [{key: "" if value is None else str(value) for key, value in row.items()} for row in found["rows"]]
    assert table == plain
    return found


def test_files_have_a_verdict_for_each_teacher_and_for_all_of_them(lab, ask):
    out, folder = lab.run(student={"F": 1.6, "M": 1.1}, two=0.9), lab.folder / "told"
    status, text = ask(out, "--margin", "0.03", "--report", folder)
    assert (status, text) == ask(out, "--margin", "0.03")
    found = written(folder)
    assert (found["schema"], found["split"], found["stages"], found["kept"]) == (
        1,
        "test",
        {"run": "full"},
        {"run": False},
    )
    assert found["question"] == dataclasses.asdict(compare.Question(margin=0.03))
    rows = {(row["group"], row["minus"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 9
    assert {row["kind"] for row in found["rows"]} == {"verdict"}
    of_m = {minus: rows["M", minus] for minus in ("teacher/one", "teacher/two", "")}
    assert [row["verdict"] for row in of_m.values()] == ["inferior", "non_inferior", "inferior"]
    assert of_m[""]["against"] == of_m["teacher/one"]["minus"]
    assert of_m[""]["bound"] == of_m["teacher/one"]["lo"] == of_m["teacher/one"]["bound"]
    cells = written_scores(out)
    mine = lab.sex[cells.index] == "M"
    row = torch.as_tensor(cells.index.to_numpy()[mine])
    for name in ("teacher/one", "teacher/two"):
        y, scored = (
            torch.as_tensor(lab.truth["ill"][row]),
            [torch.as_tensor(cells[n].to_numpy()[mine]) for n in ("student", name)],
        )
        expected = metrics.paired("auroc", y, *scored, row, level=0.90)
        assert [of_m[name][key] for key in ("value", "lo", "hi")] == pytest.approx(expected[:3])
        assert of_m[name]["smallest_margin"] == pytest.approx(max(0, -expected.lo))


def test_a_difference_in_a_lower_rate_is_turned_in_verdicts_only(lab, ask):
    out, folder = lab.run(student=3.0), lab.folder / "told"
    ask(out, "--metric", "fpr", "--report", folder)
    plain = written(folder)["rows"][0]
    assert (plain["kind"], plain["minus"], plain["level"]) == ("difference", "teacher/one", 0.95)
    assert "▲ better" in (folder / "compare.html").read_text()
    ask(out, "--metric", "fpr", "--margin", "0.1", "--report", folder)
    turned = written(folder)["rows"][0]
    assert turned["value"] == pytest.approx(-plain["value"])
    assert turned["value"] > 0
    assert -plain["hi"] < turned["lo"] < turned["value"] < turned["hi"] < -plain["lo"]


def test_the_page_says_the_finding_first_and_draws_the_margin(lab, ask):
    out, folder = lab.run(student={"F": 1.6, "M": 0.7}), lab.folder / "told"
    ask(out, "--margin", "0.02", "--report", folder)
    page = (folder / "compare.html").read_text()
    assert page.index("No, non-inferiority at a margin of 0.02 is not shown (non-inferior") < page.index("<svg")
    assert "▼ inferior" in page
    assert "▲ non-inferior" in page
    assert "http" not in page.replace("http-equiv", "")
    marks = set(re.findall(r'<path class="ref" d="M([\d.]+) ', page))
    [(left, nought)] = {
        tuple(float(re.search(rf'<text x="([\d.]+)"[^>]*>{tick}</text>', page)[1]) for tick in ("−0.2", "0"))
    }
    assert [float(mark) for mark in marks] == [pytest.approx(nought - 0.1 * (nought - left), abs=0.2)]
    text = (folder / "compare.md").read_text()
    assert re.search(r"\| \*\*sex M\*\* 200 patients \| \*\*inferior\*\* \| −0\.\d{3} \| −0\.\d{3} \|", text)


def test_files_of_several_runs_and_of_stages(lab, ask):
    even, uneven = lab.run("even", student=1.4), lab.run("uneven", student={"F": 2.4, "M": 0.4})
    folder = lab.folder / "told"
    ask(even, uneven, "--margin", "0.05", "--report", folder)
    found = written(folder)
    counts = Counter((row["kind"], row["run"]) for row in found["rows"])
    assert counts == {
        (kind, run): n for kind, n in (("value", 3), ("choice", 1), ("verdict", 9)) for run in ("even", "uneven")
    }
    assert [(row["run"], row["chosen"], row["group"]) for row in found["rows"] if row["kind"] == "choice"] == [
        ("even", True, "M"),
        ("uneven", False, "M"),
    ]
    page = (folder / "compare.html").read_text()
    assert "The margin of 0.05 is kept by 1 of 2 runs: even." in page
    assert "The students side by side" in page
    lab.run("even", student=0.9, stage="early", index=0)
    ask(even, "--stages", "--report", folder)
    steps = [row for row in written(folder)["rows"] if row["kind"] == "difference"]
    assert {(row["run"], row["stage"], row["minus"]) for row in steps} == {("even", "full", "early")}
    assert "Of 3 differences the student is behind in 0 and ahead in 3" in (folder / "compare.md").read_text()


def test_a_group_with_one_score_for_all_is_named_and_does_not_fail_the_rest(lab, ask):
    out, folder = lab.run(student=1.8), lab.folder / "told"
    path = out / "reports" / "full.scores.parquet"
    cells = pq.read_table(path).to_pandas()
    men = lab.sex[cells.image.str[:-4].astype(int)] == "M"
    cells.loc[men & (cells.predictor == "student"), "score"] = 0.5
    pq.write_table(pa.Table.from_pandas(cells, preserve_index=False), path)
    status, text = ask(out, "--margin", "0.2", "--report", folder)
    assert status == OK
    assert "not assessable, every image has the same score" in line(text, "sex M")
    assert text.splitlines()[-1].endswith("(non-inferior 2; not assessable 1: sex M).")
    assert "sex M: not assessable, every image has the same score." in (folder / "compare.md").read_text()
    [joint] = [row for row in written(folder)["rows"] if (row["group"], row["minus"]) == ("M", "")]
    assert (joint["verdict"], joint["status"], joint["value"]) == ("not_assessable", "constant_score", None)


def test_a_name_is_no_markup(lab, ask):
    out, folder = lab.run("<b>|*run*"), lab.folder / "told"
    ask(out, "--margin", "0.05", "--report", folder)
    assert "<b>" not in (folder / "compare.html").read_text()
    assert "# \\<b\\>\\|\\*run\\*," in (folder / "compare.md").read_text()


def test_a_report_that_cannot_be_written(lab, ask):
    (lab.folder / "file").touch()
    status, text = ask(lab.run(), "--report", lab.folder / "file")
    assert status == DATA
    assert "compare.json: cannot be written" in text


# ── Several classes ──


def test_a_label_of_several_classes_is_judged_as_one_and_class_by_class(lab, ask):
    out, folder = several_classes(lab), lab.folder / "told"
    status, text = ask(out, "--margin", "0.2", "--report", folder)
    assert status == OK
    labels = unique(row["label"] for row in written(folder)["rows"])
    assert labels == ["kind", "kind=a", "kind=b", "kind=c"]
    joint = {(row["label"], row["minus"]): row["value"] for row in written(folder)["rows"] if row["group"] == "all"}
    mean = np.mean([joint[f"kind={name}", "teacher/one"] for name in "abc"])
    assert joint["kind", "teacher/one"] == pytest.approx(mean)
    assert "kind=b" in text
    assert "\nkind=b\n" not in ask(out, "--margin", "0.2", "--label", "kind")[1]


# ── What is wrong ──


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--label", "il"), "--label il: the report of {out} has ill"),
        (("--metric", "selection_rate"), "--metric selection_rate: neither more nor less of it is better"),
        (("--metric", "auc"), "--metric auc: the report of {out} has auroc, tpr, fpr"),
        (("--readout", "svm"), "--readout svm: the report of {out} has linear"),
    ],
)
@pytest.mark.parametrize("margin", [(), ("--margin", "0.02")])
def test_what_the_report_does_not_hold(lab, ask, arguments, expected, margin):
    out = lab.run()
    status, text = ask(out, *arguments, *margin)
    assert status == USAGE
    assert expected.format(out=out) in text


def test_a_split_that_is_not_there(lab, ask):
    lab.splits = ("train", "val")
    status, text = ask(lab.run(), "--split", "test", "--margin", "0.1")
    assert status == USAGE
    assert "--split test: stage 'full'" in text


def test_a_folder_that_is_no_run(lab, ask):
    status, text = ask(lab.folder, "--margin", "0.02")
    assert status == DATA
    assert "holds no report" in text


def test_missing_scores(lab, ask):
    status, text = ask(lab.run(scores=False), "--margin", "0.02")
    assert status == DATA
    assert "full.scores.parquet: no such scores; `agglom evaluate --out" in text


def test_scores_that_cannot_be_read(lab, ask):
    out = lab.run()
    (out / "reports" / "full.scores.parquet").write_bytes(b"nothing")
    status, text = ask(out, "--margin", "0.02")
    assert status == DATA
    assert "full.scores.parquet: not a readable Parquet file" in text


def test_scores_of_an_image_that_the_manifest_lacks(lab, ask):
    out = lab.run()
    lines = (out / "table.csv").read_text().splitlines()
    (out / "table.csv").write_text("\n".join(lines[:-2]) + "\n")
    status, text = ask(out, "--margin", "0.02")
    assert status == DATA
    assert "images that are not in the manifest: 2 images" in text
    assert "'898.png'" in text


def test_teachers_on_other_images_than_the_student(lab, ask):
    out = lab.run()
    path = out / "reports" / "full.scores.parquet"
    cells = pq.read_table(path)
    keys = zip(cells["predictor"].to_pylist(), cells["image"].to_pylist(), strict=True)
    pq.write_table(cells.filter([key != ("teacher/two", "899.png") for key in keys]), path)
    status, text = ask(out, "--margin", "0.02")
    assert status == DATA
    assert "predictors on different images: 2 scores" in text
    assert "'899.png' has none of predictor 'teacher/two' (linear), label 'ill'" in text


def test_a_threshold_that_is_not_there(lab, ask):
    out = lab.run()
    path = out / "reports" / "full.json"
    path.write_text(path.read_text().replace('"threshold": 0.5', '"threshold": null'))
    status, text = ask(out, "--margin", "0.02", "--metric", "tpr")
    assert status == DATA
    assert "tpr needs a threshold" in text


def test_labels_are_needed(lab):
    out = lab.run()
    shutil.rmtree(out / "reports")
    row = {"stage": "full", "predictor": "student", "metric": "fvu", "target": "one/patches", "value": 0.5, "n": 3}
    row |= {"attribute": "", "group": "all", "split": "test", "readout": "none", "status": "ok", "label": ""}
    report.write(GroupReport("full", [row], {"index": 1}), out / "reports")
    assert compare.table(out).startswith("No labels")
    with pytest.raises(DataError, match="no labels, hence nothing to compare"):
        compare.main([out], compare.Question(margin=0.1))


def test_a_margin_outside_0_and_1(lab):
    for margin in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="expected a number between 0 and 1"):
            compare.main([lab.folder], compare.Question(margin=margin))
