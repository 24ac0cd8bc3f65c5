"""Group reports: schema, nulls, words that never claim more than an interval allows, and files that stand alone."""

from __future__ import annotations

import csv
import errno
import html
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agglom import compare, figures, findings, report
from agglom.errors import DataError
from agglom.report import GroupReport

TEACHERS = ("dinov2", "dinov2-erased-device", "efficientnet-lite0")
SKILL = {
    "student": 0.0,
    "teacher/dinov2": 0.03,
    "teacher/dinov2-erased-device": 0.01,
    "teacher/efficientnet-lite0": -0.04,
    "ensemble": 0.035,
}
PLACES = {
    ("", "all"): (400, "ok", 0.9),
    ("device", "A"): (200, "ok", 0.94),
    ("device", "B"): (200, "ok", 0.86),
    ("sex*view", "F|AP"): (190, "ok", 0.9),
    ("sex*view", "F|PA"): (170, "ok", 0.91),
    ("sex*view", "M|AP"): (12, "below_min_pos", 0.83),
    ("sex*view", "M|PA"): (0, "empty", math.nan),
}


def row(stage, predictor, metric, label, place, value, half, n, status, **more):
    undefined = status in ("empty", "single_class", "constant_score")
    value = math.nan if undefined else value
    lo, hi = value - half, value + half
    if " - " not in predictor:
        lo, hi = (max(0.0, lo), hi if metric.startswith("fvu") else min(1.0, hi)) if not undefined else (lo, hi)
    base = {
        **{"stage": stage, "predictor": predictor, "metric": metric, "label": label},
        **{"attribute": place[0], "group": place[1], "value": value, "lo": lo, "hi": hi},
        **{"n": n, "n_pos": n * 2 // 5, "n_neg": n - n * 2 // 5, "n_patients": n * 9 // 10, "status": status},
        **{
            "split": "test",
            "readout": "linear",
            "target": "",
            "threshold": math.nan,
            "ci_method": "delong",
            "note": "",
        },
    }
    return base | more


def make_rows(stage="full", labels=("even",), lift=0.0, student=True, seed=0):
    """Rows as an evaluation writes them: three teachers, devices A and B, a crossing with a small and an empty cell."""
    draw = random.Random(f"{stage}{seed}")
    rows = []
    names = [name for name in SKILL if student or name != "student"]
    for label in labels:
        level = {
            (p, place): base + SKILL[p] / 2 + lift + draw.gauss(0, 0.006)
            for p in names
            for place, (*_, base) in PLACES.items()
        }
        for place, (n, status, _) in PLACES.items():
            half = 0.9 / math.sqrt(n) * 0.6 if n else math.nan
            for p in names:
                value = level[p, place]
                for readout, less in (("linear", 0.0), ("knn", 0.02)):
                    rows.append(row(stage, p, "auroc", label, place, value - less, half, n, status, readout=readout))
                for metric, centre in (
                    ("accuracy", value - 0.08),
                    ("tpr", value - 0.1),
                    ("fpr", 0.95 - value),
                    ("ece", 0.04),
                ):
                    found = abs(centre + draw.gauss(0, 0.01))
                    rows.append(row(stage, p, metric, label, place, found, half, n, status, threshold=0.41))
                if p.startswith("teacher/") and student:
                    delta = level["student", place] - value
                    rows.append(row(stage, f"student - {p}", "auroc", label, place, delta, half * 0.5, n, status))
        for p in names:
            for metric, base in (("auroc", 0.08), ("tpr", 0.12), ("fpr", 0.09)):
                place, more = ("device", "all"), {"n": 400, "status": "ok"}
                null = {"p_value": 0.021, "null_hi": 0.057, "corrected": base - 0.033, "detectable": 0.063}
                rows.append(row(stage, p, f"{metric}_gap", label, place, base, 0.05, note="A − B", **more, **null))
                rows.append(row(stage, p, f"{metric}_worst", label, place, 0.86, 0.06, note="B", **more))
    return rows + (make_fvu(stage, draw) if student else [])


def make_fvu(stage="full", draw=None):
    draw = draw or random.Random(stage)
    rows = []
    for place, (n, status, base) in PLACES.items():
        for teacher, level in zip(TEACHERS, (0.62, 0.7, 0.55), strict=True):
            for metric, kind in (("fvu_angular", "summary"), ("fvu", "patches")):
                value = level + 1.2 * (0.9 - base) + draw.gauss(0, 0.01)
                status = "ok" if n else "empty"
                half, more = (
                    0.4 / math.sqrt(n or 1),
                    {"readout": "none", "target": f"{teacher}/{kind}", "note": "teacher at 112 px"},
                )
                rows.append(row(stage, "student", metric, "", place, value, half, n, status, **more))
    return rows


def make_context(**more):
    groups = []
    for split, scale in (("train", 3), ("val", 0.5), ("test", 1)):
        for (attribute, group), (n, *_) in PLACES.items():
            groups.append(
                {
                    "attribute": attribute,
                    "group": group,
                    "split": split,
                    "n_images": int(n * scale),
                    "n_patients": int(n * scale * 0.9),
                }
            )
        groups.append(
            {
                "attribute": "sex*view",
                "group": None,
                "split": split,
                "n_images": int(28 * scale),
                "n_patients": int(25 * scale),
            }
        )
    base = {
        "index": 2,
        "name": "digits",
        "split": "test",
        "groups": groups,
        "min_support": 30,
        "simulated": ["device"],
        "notes": ["The images are handwritten digits, not patients."],
        "history": [("teachers", make_rows("teachers", student=False)), ("warm", make_rows("warm", lift=-0.05))],
    }
    return base | more


@pytest.fixture(scope="module")
def one() -> GroupReport:
    return GroupReport("full", make_rows(), make_context())


@pytest.fixture(scope="module")
def texts(one, tmp_path_factory) -> dict[str, str]:
    paths = report.write(one, tmp_path_factory.mktemp("out") / "reports")
    return {path.suffix: path.read_text(encoding="utf-8") for path in paths}


def render(tmp_path, rows, **context) -> tuple[str, str]:
    paths = report.write(GroupReport("full", rows, make_context(**context)), tmp_path)
    return paths[2].read_text(encoding="utf-8"), paths[3].read_text(encoding="utf-8")


def lead(markdown: str) -> str:
    return re.search(r"^\*\*(.+)\*\*$", markdown, re.M)[1]


def visible(page: str) -> str:
    """The text of a page without its style sheet and its tags."""
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))


class Outline(HTMLParser):
    """Checks that tags nest, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# ── Files ──


def test_json_has_every_column_and_null_for_undefined(texts):
    raw = json.loads(texts[".json"], parse_constant=lambda name: pytest.fail(name))
    assert raw["schema"] == 1
    assert raw["stage"] == "full"
    assert all(list(row) == list(report.COLUMNS) for row in raw["rows"])
    empty = [row for row in raw["rows"] if row["status"] == "empty"]
    assert empty
    assert all(row["value"] is row["lo"] is row["hi"] is None for row in empty)
    assert {row["status"] for row in raw["rows"]} == {"ok", "below_min_pos", "empty"}


def test_array_scalars_and_infinities_become_plain_values():
    numpy = pytest.importorskip("numpy")
    found = GroupReport("s", [{"value": numpy.float64("nan"), "hi": math.inf, "n": numpy.int64(3)}]).rows[0]
    assert found["value"] is found["hi"] is None
    assert found["n"] == 3
    assert type(found["n"]) is int


def test_load_gives_back_what_was_written(one, tmp_path):
    assert report.load(report.write(one, tmp_path)[0]) == one


def test_csv_holds_the_same_rows(one, texts):
    rows = list(csv.DictReader(texts[".csv"].splitlines()))
    assert [dict(row) for row in rows] == [
        {key: "" if value is None else str(value) for key, value in row.items()} for row in one.rows
    ]


def test_full_disk_names_the_file_and_leaves_the_old_one(one, tmp_path, monkeypatch):
    before = report.write(one, tmp_path)[0].read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"full\.json: cannot be written \(No space left on device\).*agglom evaluate"):
        report.write(one, tmp_path)
    assert (tmp_path / "full.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_folder_that_cannot_be_made_is_a_data_error(one, tmp_path):
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(DataError, match=r"full\.json: cannot be written"):
        report.write(one, tmp_path / "reports")


BROKEN = {
    "cut short": (lambda raw: json.dumps(raw)[:-20], "not a readable report"),
    "not json": (lambda raw: json.dumps(raw).replace("null", "NaN"), "NaN is not JSON"),
    "list": (lambda raw: "[]", "expected an object, got list"),
    "schema": (lambda raw: json.dumps(raw | {"schema": 2}), "schema: expected 1, got 2"),
    "no context": (lambda raw: json.dumps(raw | {"context": None}), "context: expected a dict"),
    "row": (lambda raw: json.dumps(raw | {"rows": [3]}), r"rows\[0\]: expected an object, got int"),
    "column": (lambda raw: json.dumps(raw | {"rows": [{"status": "ok"}]}), r"rows\[0\]: 'stage' is missing"),
    "status": (lambda raw: json.dumps(raw).replace('"ok"', '"fine"'), "'fine' is not one of ok, empty"),
    "type": (lambda raw: json.dumps(raw).replace('"n": 400', '"n": "400"'), r"rows\[0\]\.n: expected a number or null"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_report_is_a_data_error_with_a_remedy(one, tmp_path, name):
    path = report.write(one, tmp_path)[0]
    spoil, message = BROKEN[name]
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(DataError, match=message) as caught:
        report.load(path)
    assert str(path) in str(caught.value)
    assert "agglom evaluate" in str(caught.value)


def test_missing_report_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no such report"):
        report.load(tmp_path / "full.json")


# ── Pages ──


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_every_number_shown_is_a_rows(one, texts, suffix):
    rows = one.rows + [row for _, past in one.context["history"] for row in past]
    keys = [key for key in report.NUMBERS if key not in ("n", "n_pos", "n_neg", "n_patients")]
    known = {f"{abs(row[key]):.3f}" for row in rows for key in keys if row.get(key) is not None}
    text = visible(texts[suffix])
    shown = set(re.findall(r"(?<![\d.])\d+\.\d{3}(?!\d)", text))
    assert len(shown) > 100
    assert shown <= known
    groups = one.context["groups"]
    counts = {f"{n:,}" for row in rows for n in (row["n"], row["n_patients"], row["n_pos"])}
    counts |= {f"{n:,}" for group in groups for n in (group["n_images"], group["n_patients"])}
    assert set(re.findall(r"([\d,]+) (?:patients?|images?|positive)\b", text)) <= counts


def test_page_stands_alone_and_is_well_formed(texts):
    page = texts[".html"]
    for word in ("http:", "https:", "//", "src=", "<script", "<link", "url(", "@import", "/*"):
        assert word not in page
    assert "default-src 'none'" in page
    for word in ("prefers-color-scheme: dark", "@media print", 'lang="en"'):
        assert word in page
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    levels = [int(tag[1]) for tag, _ in outline.seen if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later - sooner <= 1 for sooner, later in itertools.pairwise(levels))
    drawings = [attrs for tag, attrs in outline.seen if tag == "svg"]
    assert all(attrs.get("aria-hidden") or attrs.get("aria-labelledby") for attrs in drawings)
    names = [attrs["id"] for _, attrs in outline.seen if "id" in attrs]
    assert len(names) == len(set(names))
    assert {attrs["href"][1:] for tag, attrs in outline.seen if tag == "a"} <= set(names)


def test_models_are_told_apart_by_shape(texts):
    rows = re.findall(r'<th scope="row">([\w-]+)</th>\s*<td class="plot">(.*?)</td>', texts[".html"], re.S)
    shapes = {}
    for name, drawing in rows[:5]:
        shapes[name] = re.search(r'<path class="(dot|open)" d="([^"]+)"', drawing).groups()
    assert list(shapes) == ["student", *TEACHERS, "ensemble"]
    assert len(set(shapes.values())) == 5


def test_names_cannot_act_as_markup(tmp_path):
    nasty = "<b>|`*x*`"
    rows = [one | {"label": nasty, "group": one["group"].replace("AP", "A<i>P")} for one in make_rows()]
    markdown, page = render(tmp_path, rows, notes=["<script>"])
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<script" not in page
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(re.search(r"(?<!\\)\|$", line) for line in tables)
    assert "\\<b\\>\\|\\`\\*x\\*\\`" in markdown
    assert "<i>" not in markdown


def test_output_is_deterministic(one, texts, tmp_path):
    again = {path.suffix: path.read_text(encoding="utf-8") for path in report.write(one, tmp_path)}
    assert again == texts


# ── Words ──


@pytest.mark.parametrize(
    ("shift", "word", "others"),
    [
        (-0.2, "scores worse there", "better|cannot tell"),
        (0.2, "scores better there", "worse|cannot tell"),
        (0.0, "these patients cannot tell", "scores better|scores worse"),
    ],
)
def test_finding_claims_no_more_than_the_interval(tmp_path, shift, word, others):
    rows = make_rows()
    for one in rows:
        if one["predictor"].startswith("student - "):
            half = one["hi"] - one["value"]
            one |= {"value": shift, "lo": shift - half, "hi": shift + half}
    text = lead(render(tmp_path, rows)[0])
    assert word in text
    assert not re.search(others, text)


def test_a_claim_on_a_group_is_adjusted_for_the_groups(tmp_path):
    rows = [
        one | ({"value": -0.2, "lo": -0.3, "hi": -0.1, "p_holm": 0.06} if " - " in one["predictor"] else {})
        for one in make_rows()
    ]
    markdown, _ = render(tmp_path, rows)
    assert "these patients cannot tell" in lead(markdown)
    assert "leaves 0 out, but several groups are tested, and allowing for that (p = 0.060) we cannot tell" in markdown
    assert "the student cannot be told to be better or worse in" in markdown
    adjusted = [one | ({"p_holm": 0.04} if " - " in one["predictor"] else {}) for one in rows]
    assert "scores worse there" in lead(render(tmp_path, adjusted)[0])


def test_the_best_teacher_is_chosen_on_validation_patients(tmp_path):
    """The one that the headline's patients would choose had luck."""
    rows = [one for one in make_rows() if not one["metric"].startswith("fvu")]
    levels = {
        one["predictor"]: one["value"]
        for one in rows
        if (one["metric"], one["readout"], one["attribute"], one["group"]) == ("auroc", "linear", "device", "B")
        and one["predictor"].startswith("teacher/")
    }
    luckiest = max(levels, key=levels.__getitem__)
    other = next(name for name in levels if name != luckiest)
    prior = [
        one | {"split": "val", "value": 0.99 if one["predictor"] == other else 0.5}
        for one in rows
        if one["metric"] == "auroc" and one["predictor"] in levels and one["value"] == one["value"]
    ]
    markdown, _ = render(tmp_path, rows + prior)
    assert f"{other.removeprefix('teacher/')}, the best teacher there on validation patients" in markdown
    assert f"{luckiest.removeprefix('teacher/')}, the best" not in markdown


def test_one_outcome_everywhere(tmp_path):
    rows = [one | {"status": "single_class", "value": None} for one in make_rows() if one["metric"] == "auroc"]
    markdown, _ = render(tmp_path, rows, history=[])
    assert lead(markdown) == "For “even”, only one outcome occurs, so there is no finding."


def test_equal_groups_have_no_lowest(tmp_path):
    rows = [
        one
        | ({"value": 0.9, "lo": 0.8, "hi": 0.95} if one["metric"] == "auroc" and " - " not in one["predictor"] else {})
        for one in make_rows()
        if one["group"] not in ("M|AP", "M|PA")
    ]
    assert lead(render(tmp_path, rows)[0]).startswith("For “even”, the student scores the same in every group.")


def test_finding_is_drawn_from_groups_with_support_only(tmp_path):
    markdown, page = render(tmp_path, make_rows())
    assert "scores lowest in device B (simulated)" in lead(markdown)
    scored = [one for one in make_rows() if one["metric"] == "auroc" and one["predictor"] == "student"]
    groups = [one for one in scored if one["group"] != "all" and one["status"] != "empty"]
    lowest = min(groups, key=lambda one: one["value"])
    assert lowest["group"] == "M|AP"
    assert "too few to judge" in page
    assert "No finding, too few positive patients: sex × view M · AP (10 patients, 12 images, 4 positive)." in page
    assert "No finding, no image: sex × view M · PA (0 patients, 0 images)." in page
    assert "28 images of 25 patients lack sex × view" in page


def test_gap_that_reaches_zero_is_not_a_difference(tmp_path):
    rows = [one | {"lo": 0.0, "p_value": 0.4} if one["metric"] == "auroc_gap" else one for one in make_rows()]
    assert "this reaches 0, so we cannot tell whether they differ" in render(tmp_path, rows)[0]
    assert "apart: the groups differ." in render(tmp_path, make_rows())[0]


def gap_of(**more):
    rows = [one | more if one["metric"] == "auroc_gap" else one for one in make_rows()]
    return [{"unknown_lo": None, "unknown_hi": None} | one for one in rows]


@pytest.mark.parametrize(
    ("more", "said", "unsaid"),
    [
        ({}, "the groups differ. Groups that do not differ would show up to 0.057", "smallest gap"),
        (
            {"lo": 0.0},
            "reaches 0, but groups that do not differ would rarely show so large a gap (p = 0.021)",
            "tell w",
        ),
        ({"lo": 0.0, "p_value": 0.4}, "cannot tell whether they differ. Groups that do not differ would", "rarely"),
        ({"lo": 0.0, "p_value": 0.4}, "would show four times in five is 0.063", "seem to differ"),
        ({"lo": 0.0, "detectable": 1.2}, "No gap between these groups would be found", "smallest gap"),
        ({"p_value": 0.0001}, "by chance in 19 of 20 cases (p < 0.001); less", "p = 0.000"),
    ],
)
def test_gap_is_told_with_its_null_and_with_what_could_be_found(tmp_path, more, said, unsaid):
    for text in render(tmp_path, gap_of(**more), history=[]):
        first = html.unescape(text).replace("\\<", "<").split("How well")[0]
        assert said in first
        assert unsaid not in first


def test_bounds_of_the_unknown_are_one_sentence(tmp_path):
    rows = gap_of(unknown_lo=0.0123, unknown_hi=0.456)
    unknown = {"attribute": "device", "group": None, "split": "test", "n_images": 28, "n_patients": 25}
    markdown, page = render(tmp_path, rows, history=[], groups=[unknown])
    sentence = "the AUROC gap would be 0.012 to 0.456 for “even” and the student, before the play of chance"
    assert sentence in markdown
    assert sentence in page
    assert "unknown: 0.012 to 0.456" in visible(page)


def test_thresholds_of_groups_are_a_labelled_variant(tmp_path):
    own = [
        one | {"rule": "group", "threshold": 0.77, "value": 0.987654, "lo": 0.9, "hi": 1.0}
        for one in make_rows()
        if one["metric"] in ("tpr", "fpr") and one["group"] != "all"
    ]
    plain = make_rows()
    assert "a threshold for each group" not in render(tmp_path, plain, history=[])[1]
    for text in render(tmp_path, plain + own, history=[]):
        before, after = text.split("Variant: a threshold for each group")
        assert "0.988" not in before
        assert "0.988" in after
        assert "0.770" in after


def make_audit():
    """Three systems, of which nothing is known but their scores, with a curve over age."""
    names = {"student": "vendor-a", "teacher/dinov2": "vendor-b", "ensemble": "triage"}
    rows = [one | {"predictor": names[one["predictor"]]} for one in make_rows() if one["predictor"] in names]
    rows = [one | {"readout": "scores"} for one in rows if one["readout"] == "linear"]
    pairs = [one for one in make_rows() if one["predictor"] == "student - teacher/dinov2" and one["metric"] == "auroc"]
    rows += [one | {"predictor": "vendor-b - vendor-a", "readout": "scores", "p_holm": 0.0321} for one in pairs]
    for name, age in itertools.product(names.values(), (20, 50, 80)):
        made = row("full", name, "auroc_curve", "even", ("age", f"{age}"), 0.8 + age / 1000, 0.05, 99, "ok")
        rows.append(made | {"readout": "scores"})
    return rows


def test_audit_of_somebodys_scores(tmp_path):
    markdown, page = render(tmp_path, make_audit(), history=[])
    assert "score" in lead(markdown)
    assert "device B (simulated)" in lead(markdown)
    for text in (markdown, visible(page)):
        assert not re.search("student|teacher|linear probe", text)
        assert "On the same patients, vendor-b minus vendor-a is" in text
        assert "vendor-b − vendor-a" in text
        assert "0.032" in text
    assert "the first scores" in page
    assert re.search(r"\| vendor-a \| 0\.820 .*\| 0\.850 .*\| 0\.880 ", markdown)
    assert "age 50" not in page


def test_figures_for_models_attributes_and_curves(one, tmp_path):
    _, page = render(tmp_path, make_audit(), history=[])
    assert page.count('class="area"') == 3
    chart = re.search(r'<title id="tradeoff-1-1">(.*?)</title>', page, re.S)[1]
    assert all(name in chart for name in ("vendor-a", "vendor-b", "triage"))
    _, page = render(tmp_path, one.rows)
    chart = re.search(r'<title id="tradeoff-1-1">(.*?)</title>', page, re.S)[1]
    assert re.search(r"student: warm \d\.\d{3}, 0\.860; \d\.\d{3}, 0\.860\.", chart)


def test_split_and_simulation_are_named(tmp_path):
    rows = [one | {"split": "val"} for one in make_rows()]
    markdown, page = render(tmp_path, rows, split="val", history=[])
    for text in (markdown, page):
        assert "validation patients" in text
        assert "There is no test split" in text
        assert "simulated by image processing" in text
    markdown, page = render(tmp_path, make_rows(), simulated=[])
    assert "test patients" in markdown
    assert "simulated" not in markdown + page
    assert "no test split" not in page


def test_rows_of_the_other_split_are_left_out(tmp_path):
    other = [one | {"split": "val", "value": 0.123456} for one in make_rows()]
    assert "0.123" not in render(tmp_path, make_rows() + other)[0]


def test_without_labels(tmp_path):
    markdown, page = render(tmp_path, make_fvu(), history=[("warm", make_fvu("warm"))])
    assert "explains least of dinov2-erased-device" in lead(markdown)
    assert "There are no labels" in page
    assert "AUROC" not in page
    assert "Stage by stage" in page
    assert "fvu" in report.headline(GroupReport("full", make_fvu())).lower()


def test_fvu_of_a_handful_of_patients_is_no_finding(tmp_path):
    rows = [one | ({"value": 5.0, "hi": 6.0} if one["group"] == "M|AP" else {}) for one in make_fvu()]
    markdown, _ = render(tmp_path, rows, history=[])
    assert "M · AP" not in lead(markdown)
    assert "No finding, too few patients: sex × view M · AP" in markdown


def test_several_labels(tmp_path):
    labels = ("Effusion", "Mass", "Nodule", "Hernia")
    markdown, page = render(tmp_path, make_rows(labels=labels), history=[])
    assert "of 16 combinations of a label and a group" in lead(markdown)
    for label in labels:
        assert f"How well “{label}” is recognised" in page
        assert f"For “{label}”, the student scores lowest in" in page
    assert "labels left for the report: 1" in report.headline(GroupReport("s", make_rows(labels=labels)))


def test_teachers_alone(tmp_path):
    markdown, page = render(tmp_path, make_rows(student=False), history=[])
    assert "the teacher dinov2 scores lowest in" in lead(markdown)
    assert "Student minus each teacher" not in page


def test_too_few_patients_everywhere(tmp_path):
    rows = [one | {"status": "below_min_neg"} for one in make_rows() if one["metric"] == "auroc"]
    markdown, _ = render(tmp_path, rows, history=[])
    assert lead(markdown) == "For “even”, there are too few patients for a finding."
    assert not re.search("scores (better|worse) ", markdown)


def test_gap_without_two_groups_says_why(tmp_path):
    none = {"status": "below_min_neg", "value": None, "lo": None, "hi": None, "note": ""}
    rows = [one | none if one["metric"] == "auroc_gap" else one for one in make_rows()]
    for text in render(tmp_path, rows):
        assert "– too few negative patients" in text
        assert "apart" not in text


def test_one_undefined_model_says_why(tmp_path):
    rows = [
        one | {"status": "constant_score", "value": None, "lo": None, "hi": None}
        if TEACHERS[1] in one["predictor"] and one["group"] == "B"
        else one
        for one in make_rows()
    ]
    markdown, page = render(tmp_path, rows)
    assert "every image has the same score" in page
    assert f"No finding, every image has the same score of {TEACHERS[1]}: device B" in markdown


# ── Masks and classes ──


def make_masks(rows):
    """What a label of masks has: Dice and IoU of somebody's systems, no AUROC, no rates, no positives."""
    plain = {"readout": "scores", "n_pos": None, "n_neg": None}
    found = []
    for one in rows:
        if one["metric"].startswith("auroc") and one["readout"] in ("linear", "scores"):
            found.append(one | plain | {"metric": one["metric"].replace("auroc", "dice")})
            if one["metric"] == "auroc":
                found.append(one | plain | {"metric": "iou", "value": 0.7654, "lo": 0.7, "hi": 0.8})
    return [one for one in found if one["metric"] != "dice_curve"]


def test_a_label_of_masks_is_judged_by_dice(tmp_path):
    rows = make_masks(make_audit())
    markdown, page = render(tmp_path, rows, history=[])
    text = visible(page)
    for said in (markdown, text):
        assert "reaches Dice 0." in said
        assert "Dice gap" in said
        assert "worst Dice" in said
        assert "apart: the groups differ" in said
        assert not re.search("AUROC|Decisions|Accuracy and calibration|ROC and|positive image|[0-9] positive", said)
    assert "| group, model | Dice | IoU |" in markdown
    assert "0.765" in markdown
    assert "difference in Dice" in text
    assert "No finding, too few patients: sex × view M · AP (10 patients, 12 images)." in markdown
    assert report.headline(GroupReport("s", rows)).splitlines()[2].startswith("Dice, even")


def test_masks_beside_an_ordinary_label(tmp_path):
    rows = [one | {"label": "heart"} for one in make_masks(make_audit())] + make_audit()
    markdown, page = render(tmp_path, rows, history=[])
    assert "For “heart”" in markdown
    assert "For “even”" in markdown
    assert page.count("Dice is twice the common area") == page.count("AUROC is the chance") == 1
    unknown = {"attribute": "device", "group": None, "split": "test", "n_images": 28, "n_patients": 25}
    bounds = [one | {"unknown_lo": 0.1, "unknown_hi": 0.2} if one["metric"].endswith("_gap") else one for one in rows]
    said = findings.limits(GroupReport("s", bounds).reading, {"groups": [unknown]})
    assert any("the Dice gap would be 0.100" in one and "and the AUROC gap would be 0.100" in one for one in said)


CLASSES = ("normal", "covid", "flu")


def make_classes(student=True):
    """The rows of the classes come first, as an evaluation may write them; those of all follow."""
    labels = [*(f"finding={name}" for name in CLASSES), "finding"]
    rows = make_rows(labels=labels, student=student)
    whole = {"n_pos": None, "n_neg": None}
    rows = [one for one in rows if one["label"] != "finding" or one["metric"] not in ("tpr", "fpr", "ece")]
    return [one | whole if one["label"] == "finding" else one for one in rows]


def test_the_label_of_several_classes_comes_first_and_is_told_once(tmp_path):
    context = {"classes": {"finding": CLASSES}, "history": []}
    markdown, page = render(tmp_path, make_classes(), **context)
    reading = GroupReport("s", make_classes(), context).reading
    assert reading.labels == ["finding", *(f"finding={name}" for name in CLASSES)]
    assert reading.heads == ["finding"]
    assert lead(markdown).startswith("For “finding”, the student scores lowest")
    # Of the label as a whole alone: its classes are not counted again.
    assert "in 2 of 4 groups" in findings.tally(reading)
    for said in (markdown, visible(page)):
        assert said.count("macro average over 3 classes, one against the rest: normal, covid and flu") == 1
        assert said.count("For “finding”") == 1
        assert said.count("For “finding=covid”") == 1
    first = page.split("How well “finding” is recognised")[1].split("How well “finding=normal”")[0]
    assert "Decisions at a threshold" not in first
    assert "accuracy" in first
    assert "calibration error (ECE)" not in first
    assert page.count("Decisions at a threshold") == len(CLASSES)
    limits = [one for one in findings.limits(reading, context) if "M · AP" in one]
    place = "sex × view M · AP (10 patients, 12 images)"
    assert limits == [
        f"No finding, too few patients of a class: {place} for finding.",
        f"No finding, too few positive patients: {place} for finding (normal 4, covid 4, flu 4 positive).",
    ]


# ── Studies ──

SYSTEMS = ("student", *(f"teacher/{name}" for name in TEACHERS))
GROUPS = {"device": ["A", "B"], "sex*view": ["F|AP", "F|PA", "M|AP"]}


@pytest.fixture(scope="module")
def rich(studied):
    rows, context = studied("even", SYSTEMS, GROUPS)
    return GroupReport("full", make_rows() + rows, make_context(**context))


@pytest.fixture(scope="module")
def shown(rich, tmp_path_factory):
    """Markdown and page."""
    paths = report.write(rich, tmp_path_factory.mktemp("rich"))
    return paths[2].read_text(encoding="utf-8"), paths[3].read_text(encoding="utf-8")


def part(page, name):
    """One section of a page."""
    return re.search(rf'<section aria-labelledby="{name}">(.*?)</section>', page, re.S)[1]


def test_studies_change_nothing_else(one, rich):
    plain, more = one.reading, rich.reading
    for name in ("labels", "places", "attributes", "teachers", "others", "cells"):
        assert getattr(plain, name) == getattr(more, name)
    assert findings.tally(plain) == findings.tally(more)
    assert findings.limits(plain, one.context) == findings.limits(more, rich.context)
    assert report.headline(one) == report.headline(rich)
    assert len(more.studies) == len(rich.rows) - len(one.rows)


def test_figures_without_rows_are_absent(texts):
    for text in (texts[".md"], texts[".html"]):
        said = "reveal of the patients|counted in training|With fewer labels|Trained on one group|ROC and calibration"
        assert not re.search(said, text)
    assert not re.search('"(leakage|weights|operating|scarcity)', texts[".html"])


def test_every_number_of_a_study_is_a_rows_or_the_contexts(rich, shown):
    numbers = [row[key] for row in rich.rows for key in report.NUMBERS]
    numbers += [row.get(key) for _, past in rich.context["history"] for row in past for key in report.NUMBERS]
    for one in rich.context["curves"]:
        numbers += one["roc"]["tpr"] + [
            cell[key] for cell in one["calibration"] for key in ("score", "rate", "lo", "hi")
        ]
    known = {f"{abs(value):.3f}" for value in numbers if value is not None}
    for text in shown:
        assert set(re.findall(r"(?<![\d.])\d+\.\d{3}(?!\d)", visible(text))) <= known


def test_page_of_studies_is_well_formed_and_every_plot_has_its_table(shown):
    outline = Outline()
    outline.feed(shown[1])
    assert not outline.open
    names = [attrs["id"] for _, attrs in outline.seen if "id" in attrs]
    assert len(names) == len(set(names))
    assert {attrs["aria-labelledby"] for _, attrs in outline.seen if "aria-labelledby" in attrs} <= set(names)
    plots = re.findall(r'<figure class="chart".*?</figure>', shown[1], re.S)
    # ROC and calibration of 2 attributes, 3 of scarcity, 2 stage charts and their gaps, the path of weights.
    assert len(plots) == 4 + 3 + 3 + 1
    assert all("<details><summary>The numbers</summary>" in plot and "<td>" in plot for plot in plots)


def test_lines_are_told_apart_without_colour(shown):
    plot = re.search(r'<figcaption id="operating-1-2-1">.*?</figure>', shown[1], re.S)[0]
    tones = re.findall(r'<g class="(c\d)">', plot)
    assert tones == ["c3", "c2", "c1", "c0"]
    dashes = [re.search(rf"\.{tone} \.line {{ stroke-dasharray: ([\d. ]+)", shown[1]) for tone in tones]
    assert len({dash and dash[1] for dash in dashes}) == 4
    legend = re.findall(r'H?h28"/><g[^>]*>\s*<path class="dot" d="([^"]+)"', plot)
    assert len(set(legend)) == 4
    assert all(name in plot for name in ("all patients", "F · AP", "F · PA", "M · AP"))


def test_the_threshold_is_marked_on_the_curve(rich, shown):
    plot = re.search(r'<figcaption id="operating-1-1-1">ROC, by device.*?</figure>', shown[1], re.S)[0]
    for group in ("A", "B"):
        rows = {row["metric"]: row for row in rich.rows if (row["predictor"], row["group"]) == ("student", group)}
        x, y = 44 + figures.UNIT.at(rows["fpr"]["value"]), 268 - figures.UNIT.at(rows["tpr"]["value"])
        assert f'transform="translate({x} {y})"' in plot
        assert f"<td>{findings.estimate(rows['tpr'])}</td>" in plot


def test_sensitivity_is_read_off_the_curve(studied):
    rows, context = studied("even", SYSTEMS[:1], {"device": ["A", "B"]})
    reading = GroupReport("s", make_rows() + rows).reading
    [panels] = figures.operating(reading, "even", context["curves"])
    for one, cells in zip(context["curves"], panels["roc"]["table"]["lines"], strict=True):
        known = list(zip(one["roc"]["fpr"], one["roc"]["tpr"], strict=True))
        assert cells[-3:] == [f"{max(y for x, y in known if x <= most):.3f}" for most in (0.05, 0.1, 0.2)]


def test_calibration_lies_between_its_ends(studied):
    _, context = studied("even", SYSTEMS[:1], {"device": ["A", "B"]})
    rare = [
        one
        | {
            "calibration": [
                cell | {"rate": cell["rate"] / 9, "lo": 0.0, "hi": cell["hi"] / 9} for cell in one["calibration"][:2]
            ]
        }
        for one in context["curves"]
    ]
    [panels] = figures.operating(GroupReport("s", make_rows()).reading, "even", rare)
    chart = panels["calibration"]
    assert chart["axis"].lo == 0
    assert 0.15 <= chart["axis"].hi < 0.5
    assert len(chart["table"]["lines"]) == 2 * len(rare)
    none = [one | {"calibration": []} for one in context["curves"]]
    assert figures.operating(GroupReport("s", make_rows()).reading, "even", none)[0]["calibration"] is None


def test_gaps_are_followed_over_the_stages(rich, shown):
    plot = re.search(
        r"<figcaption[^>]*>even, AUROC gap between the groups of an attribute.*?</figure>", shown[1], re.S
    )[0]
    assert plot.count('class="area"') == 1
    last = next(row for row in rich.rows if (row["metric"], row["predictor"]) == ("auroc_gap", "student"))
    assert f"<td>{findings.estimate(last)}</td>" in plot
    assert "device (simulated)" in plot


def test_weights_are_printed_in_every_cell(rich, shown):
    table = part(shown[1], "weights")
    assert re.findall(r"<th scope=\"colgroup\" colspan=\"3\">(\w+)</th>", table) == ["warm", "full"]
    given = rich.context["weights"]
    for stage in given["stages"]:
        for cells in stage["weight"]:
            for cell in cells:
                assert f">{cell:.2f}</td>" in table
                assert f" {cell:.2f} |" in shown[0]
    sides = dict(re.findall(r'<td class="(over|under)[^>]*>([\d.]+)<', table))
    assert float(sides["over"]) > 1 > float(sides["under"])
    assert '<td class="" style="--far: 0%">1.00</td>' in table
    none = {
        **given,
        "stages": [{"stage": "warm", "weight": [[None, 1.0, 0.0]] * 3}],
        "path": {"step": [1], "weight": [[None] * 3]},
    }
    drawn = figures.weights(none)
    assert [cell["text"] for cell in drawn["lines"][0][1][0]] == ["–", "1.00", "0.00"]
    assert drawn["path"] is None


def test_leakage_names_what_is_revealed_most(shown):
    for text in (shown[0], part(shown[1], "leakage")):
        assert (
            "The features of the student reveal most: a linear probe tells device A (simulated) from all others" in text
        )
        assert "AUROC 0.830 (0.790 to 0.870), picked as the highest of 20." in text
        assert "at chance (0.5) is no proof that nothing is revealed" in text
    assert part(shown[1], "leakage").count('class="plot"') == 1 + 20
    assert "A linear probe, fitted on train patients, tells each group" in part(shown[1], "leakage")
    assert "The probes were fitted on train patients." in shown[0]


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (["device"], "fitted on train patients, but for device (simulated) on validation patients, as a teacher"),
        (
            ["device", "sex*view"],
            "fitted on validation patients, as a teacher was fitted on device (simulated) and sex × view of",
        ),
    ],
)
def test_leakage_says_on_whom_its_probes_were_fitted(studied, tmp_path, seen, said):
    rows = [one for one in studied("even", SYSTEMS, GROUPS)[0] if one["metric"] == "leakage"]
    noted = {"note": "fitted on validation patients, as a teacher was on it of train patients"}
    rows = [one | noted if one["attribute"] in seen else one for one in rows]
    markdown, page = render(tmp_path, make_rows() + rows)
    for text in (markdown, part(page, "leakage")):
        assert said in text


def test_leakage_that_reaches_chance_is_no_finding(studied, tmp_path):
    rows = [one | {"value": 0.52, "lo": 0.48, "hi": 0.56} for one in studied("even", SYSTEMS, GROUPS)[0]]
    text = render(tmp_path, make_rows() + rows, history=[])[0]
    assert "We cannot tell whether a linear probe reads any group" in text
    assert "reveal most" not in text
    sure = [one | {"value": 1.0, "lo": 0.97, "hi": 1.0} for one in rows if one["group"] in ("A", "B")]
    told = findings.leakage_finding(GroupReport("s", sure[: len(sure) // 2]).reading)
    assert told.startswith(
        "The features of the student and the teacher dinov2 reveal most: a linear probe tells device A"
    )
    # A higher value with a wide interval does not hide what is certain.
    leaks = [one for one in rows if one["metric"] == "leakage"]
    leaks[3] |= {"value": 0.51, "lo": 0.505, "hi": 0.515}
    assert "AUROC 0.510" in findings.leakage_finding(GroupReport("s", leaks).reading)
    few = make_rows() + [one | {"status": "below_min_pos"} for one in leaks]
    markdown, page = render(tmp_path, few, history=[])
    assert "No group has enough patients to tell what the features reveal. A linear probe at chance" in markdown
    assert "500 patients, 600 images, 200 of the group: too few patients of the group" in part(page, "leakage")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            {},
            "0.100 (0.076 to 0.124) with 1 % of the labelled patients and 0.040 (0.040 to 0.040) with 100 %: it grows",
        ),
        ({"value": 0.05, "lo": 0.03, "hi": 0.07}, "the ranges over seeds overlap, so we cannot tell"),
        ({"value": 0.01, "lo": 0.005, "hi": 0.02}, "it shrinks with the labels"),
        ({"lo": 0.1, "hi": 0.1}, "of one seed, which cannot tell"),
        ({"value": None, "lo": None, "hi": None}, "0.079 (0.063 to 0.095) with 5 % of the labelled patients"),
    ],
)
def test_scarcity_claims_no_more_than_the_seeds(studied, spoil, said):
    rows = [one | (spoil if one["target"] == "0.01" else {}) for one in studied("even", SYSTEMS, GROUPS)[0]]
    text = findings.scarcity_finding(GroupReport("s", make_rows() + rows).reading, "even")
    assert text.startswith("The AUROC gap of the student: between the groups of device it is ")
    assert text.count(said) == 2


def test_scarcity_is_a_table_of_shares(rich, shown):
    markdown, page = shown
    head = "| labels used | 1 % | 5 % | 10 % | 25 % | 100 % |"
    assert markdown.count(head) == page.count('<th scope="col">labels used</th><th scope="col">1 %</th>') == 3
    assert re.search(r"\| dinov2, worst group \| 0\.680 \(0\.656 to 0\.704\) \|", markdown)
    for name in ("gap", "worst group", "F · PA"):
        assert f"| student, {name} |" in markdown
    assert "scarcity" not in visible(page)


def test_holdout_is_a_matrix(rich, shown):
    cells = {
        (row["target"], row["group"]): findings.estimate(row)
        for row in rich.rows
        if (row["metric"], row["predictor"], row["attribute"]) == ("holdout_auroc", "teacher/dinov2", "sex*view")
    }
    table = re.search(r"\| sex × view, dinov2 \|.*?\n\n", shown[0], re.S)[0].strip().splitlines()
    assert table[0] == "| sex × view, dinov2 | tested on F · AP | tested on F · PA | tested on M · AP |"
    for line, trained in zip(table[2:], ["all", *GROUPS["sex*view"]], strict=True):
        numbers = [cells[trained, tested] for tested in GROUPS["sex*view"]]
        assert line == f"| trained on {trained.replace('|', ' · ')} | {' | '.join(numbers)} |"
    assert shown[1].count('class="same"') == 4 * (2 + 3)


def test_names_in_studies_cannot_act_as_markup(studied, tmp_path):
    nasty = "<b>|`*x*`"
    rows, context = studied(nasty, SYSTEMS, {"<i>site": ["<u>A", "B"]})
    context["weights"]["teachers"] = ["<s>x"] * 3
    markdown, page = render(tmp_path, [one | {"label": nasty} for one in make_rows()] + rows, history=[], **context)
    for tag in ("<b>", "<i>", "<u>", "<s>"):
        assert tag not in page
        assert tag not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(re.search(r"(?<!\\)\|$", line) for line in tables)


def test_a_large_report_stays_small(studied, tmp_path):
    groups = {name: ["A", "B", "C", "D"] for name in ("device", "sex*view", "race", "age")}
    rows, curves = [], []
    for label in ("even", "odd"):
        found, context = studied(label, SYSTEMS, groups)
        rows += [*found, *make_rows(labels=(label,))]
        curves += context["curves"]
    path = report.write(GroupReport("full", rows, make_context(**context | {"curves": curves})), tmp_path)[3]
    assert path.stat().st_size < 1_000_000


# ── Terminal ──


def test_headline_is_a_table_of_models_and_groups(one):
    lines = report.headline(one).splitlines()
    assert lines[0] == "stage full, test split, by device (simulated); 95 % intervals"
    assert lines[2].split() == ["AUROC,", "even", "all", "A", "B"]
    names = [line.split()[0] for line in lines[3:]]
    assert names == ["student", *(f"teacher/{name}" for name in TEACHERS), "ensemble", "images"]
    assert lines[-1].split() == ["images", "400", "200", "200"]


@pytest.mark.parametrize("groups", [1, 4, 9, 40])
def test_headline_fits_the_terminal(groups):
    places = [("", "all"), *(("vendor", f"Manufacturer number {i}") for i in range(groups))]
    names, label = ("student", f"teacher/{'very-long-name-' * 4}"), "Pleural thickening of uncertain kind" * 2
    rows = [row("s", name, "auroc", label, place, 0.8, 0.1, 50, "ok") for place in places for name in names]
    lines = report.headline(GroupReport("s", rows)).splitlines()
    assert max(map(len, lines)) <= 100
    assert ("groups left" in lines[-1]) == (groups > 2)


def test_headline_marks_what_is_weak_or_undefined(one):
    rows = [
        r | {"attribute": "" if r["group"] == "all" else "sex*view"} for r in one.rows if r["attribute"] != "device"
    ]
    text = report.headline(GroupReport("s", rows))
    assert re.search(r"student +0\.\d{3} +0\.\d{3} +0\.\d{3} +0\.\d{3}\* +-", text)
    assert "* too few positive patients" in text
    assert "- no image" in text


def test_compare_prints_the_last_stage(one, tmp_path):
    report.write(GroupReport("warm", make_rows("warm"), {"index": 1}), tmp_path / "reports")
    report.write(one, tmp_path / "reports")
    text = compare.table(tmp_path)
    assert text.startswith("stage full, test split")
    assert max(map(len, text.splitlines())) <= 110
    pairs = [r for r in one.rows if r["predictor"].startswith("student - ") and r["group"] == "B"]
    for r in pairs:
        assert f"{r['value']:+.3f}" in text
        assert f"[{r['lo']:+.3f}, {r['hi']:+.3f}]" in text
    assert f"smallest lower bound  {min(r['lo'] for r in pairs):+.3f}" in text
    assert re.search(r"sex\*view M\|PA +0 .*no image", text)


def test_compare_without_labels_shows_what_is_unexplained(tmp_path):
    report.write(GroupReport("full", make_fvu(), {"index": 1}), tmp_path / "reports")
    text = compare.table(tmp_path)
    assert text.startswith("No labels")
    assert "dinov2/patches" in text


def test_compare_explains_what_it_lacks(tmp_path):
    with pytest.raises(DataError, match="holds no report"):
        compare.table(tmp_path)
    path = report.write(GroupReport("teachers", make_rows(student=False), {"index": 0}), tmp_path / "reports")[0]
    with pytest.raises(DataError, match="no stage with a student"):
        compare.table(tmp_path)
    report.write(GroupReport("full", make_rows()), tmp_path / "reports")
    with pytest.raises(DataError, match=r"full\.json: context\.index must be an integer"):
        compare.table(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"not a readable report|context\.index"):
        compare.table(tmp_path)


# ── Parts ──


def test_numbers_have_a_true_minus_and_no_negative_zero():
    assert findings.number(-0.0123) == "−0.012"
    assert findings.number(-0.0001, signed=True) == "0.000"
    assert findings.number(0.5, signed=True) == "+0.500"
    assert findings.number(None) == "–"


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.one_of(st.none(), st.floats(-1, 1)))
def test_axis_holds_all_values_between_round_ticks(values, mark):
    rows = [{"value": value, "lo": value - 0.1, "hi": None, "weak": value < 0} for value in values]
    axis = figures.axis(rows, mark, whole=True)
    assert list(axis.ticks) == sorted(axis.ticks)
    assert 2 <= len(axis.ticks) <= 7
    assert not any(axis.beyond(value) for value in values)
    assert mark is None or not axis.beyond(mark)
    assert all(0 <= axis.at(value) <= axis.size for value in values)


def test_import_is_light():
    code = "import sys, agglom.report; print({'torch', 'matplotlib', 'pandas', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


AGREED = {
    **{"teacher": "dino", "attribute": "sex*view", "clusters": ["cluster 1", "cluster 2"], "n_fitted": 1200},
    **{"n_train": [800, 400], "n_grouped": [500, 90], "fits": 5, "stability": 0.81, "stability_lo": 0.625},
    "agreement": [
        {"attribute": name, "n_images": n, "nmi": nmi, "ari": ari, "purity": purity, "largest": largest}
        | {"chance": chance, "chance_hi": chance + 0.03, "why": why}
        for name, n, nmi, ari, purity, largest, chance, why in (
            ("device", 1900, 0.01, 0.0, 0.41, 0.4, 0.41, ""),
            ("sex*view", 1800, 0.62, 0.5, 0.91, 0.55, 0.57, ""),
            ("<i>site", 3, *[math.nan] * 5, "fewer images than clusters"),
        )
    ],
}


def test_clusters_are_compared_with_the_groups_that_are_known():
    said = findings.proxies_finding(AGREED)
    assert said.startswith(
        "Images without sex × view are grouped by 2 clusters of the summaries of dino, fitted on 1,200"
    )
    assert "5 fits from different starts agree by an adjusted Rand index of 0.810 on average and 0.625 at least" in said
    assert "Better than by chance, they go with sex × view (NMI 0.620, purity 0.910 where 0.570 is chance)." in said
    assert "No better than by chance, with device (NMI 0.010, purity 0.410 where 0.410 is chance)." in said
    assert "site" not in said
    nothing = AGREED | {"attribute": None, "agreement": AGREED["agreement"][2:]}
    said = findings.proxies_finding(nothing)
    assert said.startswith("Images of all patients are grouped by")
    assert "There are no groups that they could be compared with, so whom they stand for is not known." in said
    for finding in (said, findings.proxies_finding(AGREED)):
        assert finding.endswith("A weight on a cluster is not a weight on a group.")
    assert findings.proxies_finding(None) == ""


def test_proxy_groups_have_a_section_of_their_own(tmp_path):
    rows, context = make_rows(), make_context()
    without = {path.suffix: path.read_text() for path in report.write(GroupReport("full", rows, context), tmp_path)}
    assert "Proxy groups" not in without[".html"] + without[".md"]
    found = GroupReport("full", rows, context | {"proxies": AGREED})
    texts = {path.suffix: path.read_text() for path in report.write(found, tmp_path)}
    assert '<h2 id="proxies">Proxy groups</h2>' in texts[".html"]
    assert texts[".html"].count('href="#proxies"') == 1
    assert "&lt;i&gt;site" in texts[".html"]
    assert "\n## Proxy groups\n" in texts[".md"]
    assert "| sex × view | 1,800 | 0.620 | 0.500 | 0.910 | 0.570 | 0.600 | 0.550 |  |\n" in texts[".md"]
    assert "site | 3 | – | – | – | – | – | – | fewer images than clusters |\n" in texts[".md"]
    assert "| cluster 2 | 400 | 90 |\n" in texts[".md"]
    assert report.load(tmp_path / "full.json") == found
