"""The report in a browser, as a reader sees it: not blank in light and dark, complete, and no wider than the window."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from agglom import report, samples
from agglom.core.metrics import Estimate
from agglom.report import GroupReport

WIDTH, HEIGHT = 1280, 1600
NARROW, MIDDLE = 400, 1200
SCHEMES = {"dark": 0, "light": 1}  # Blink's preferredColorScheme
NAMES = ("student", "teacher/dinov2-large", "teacher/efficientnet-lite0", "ensemble")
SITES = ("Harbour", "North", "South")
PLACES = (("", "all"), *(("site", site) for site in SITES), ("sex*view", "F|AP"), ("sex*view", "M|PA"))
RATES = ("tpr", "fpr", "ppv", "npv", "selection_rate", "accuracy", "balanced_accuracy", "f1", "brier", "ece")
# The page allows no script; this copy reports on itself, to the window that frames it: a window of its own cannot be
# as narrow as a telephone.
PROBE = """<script>
const root = document.documentElement, figures = [...document.querySelectorAll("figure")];
const cut = figures.filter(one => one.scrollWidth > one.clientWidth).length;
const over = root.scrollWidth - root.clientWidth;
parent.postMessage({over, cut, width: root.clientWidth, text: document.body.innerText}, "*");
</script>"""
FRAME = """<!doctype html><html><body>
<iframe style="border: 0; height: 900px; width: {width}px" srcdoc="{inner}"></iframe><pre id="found"></pre><script>
addEventListener("message", ({{data}}) => document.getElementById("found").textContent = JSON.stringify(data));
</script></body></html>"""

pytestmark = pytest.mark.slow


def rows():
    """Every kind of row that a report of a stage may have; the third site is too small for a finding."""

    def one(name, metric, place, value, status="ok", **more):
        estimate = Estimate(value, value - 0.04, value + 0.04, 1200, 400, 800, 900, status, "delong")
        plain = {"label": "effusion", "readout": "linear", "stage": "full"}
        return samples.row(name, metric, place, "test", estimate, **plain | more)

    found = []
    for i, name in enumerate(NAMES):
        for g, place in enumerate(PLACES):
            status = "below_min_pos" if place[1] == SITES[2] else "ok"
            level = 0.9 - 0.02 * i - 0.01 * g
            found += [one(name, "auroc", place, level, status, readout=kind) for kind in ("linear", "knn")]
            for rule in ("global", "group") if place[0] else ("global",):
                more = {"threshold": 0.3 + 0.05 * i, "rule": rule}
                found += [one(name, metric, place, level - 0.1, status, **more) for metric in RATES]
            if name.startswith("teacher/"):
                found.append(one(f"student - {name}", "auroc", place, 0.02 * i, status, p_holm=0.02 * i))
        for place in (("site", "all"), ("sex*view", "all")):
            gap = {
                "p_value": 0.31,
                "null_hi": 0.061,
                "corrected": 0.012,
                "detectable": 0.083,
                "note": "North − Harbour",
            }
            gap |= {"unknown_lo": 0.003, "unknown_hi": 0.191}
            names = ("auroc_gap", "tpr_gap", "fpr_gap", "equalized_odds_difference", "demographic_parity_difference")
            found += [one(name, metric, place, 0.04, **gap) for metric in names]
            found += [one(name, f"auroc_{summary}", place, 0.8 - 0.02 * i) for summary in ("worst", "ratio", "es")]
        found += [one(name, "auroc_curve", ("age", f"{age}"), 0.95 - age / 500) for age in (30, 45, 60, 75)]
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory, studied):
    folder = tmp_path_factory.mktemp("browser")
    earlier = [{**one, "value": (one["value"] or 0) - 0.1} for one in rows() if one["predictor"] == "student"]
    studies, more = studied("effusion", NAMES, {"site": list(SITES), "sex*view": ["F|AP", "M|PA"]})
    context = {"index": 1, "split": "test", "min_support": 30, "history": [("warm", earlier)]}
    report.write(GroupReport("full", [*rows(), *studies], context | more), folder)
    return folder / "full.html"


@pytest.fixture(scope="module")
def rendered(page, browse):
    """By width of the window, what the page says of itself: how far it is too wide, and the text that is shown."""
    source = page.read_text(encoding="utf-8")
    probed = re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</body>", f"{PROBE}</body>")
    frame, found = page.with_name("frame.html"), {}
    for width in (NARROW, MIDDLE):
        frame.write_text(FRAME.format(width=width, inner=html.escape(probed)), encoding="utf-8")
        dumped = browse(frame, "--dump-dom", "--virtual-time-budget=5000")
        told = re.search(r'<pre id="found">(.+?)</pre>', dumped, re.S)[1]
        found[width] = json.loads(html.unescape(told))
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_screenshot_is_not_blank(page, browse, scheme):
    shot = page.with_name(f"{scheme}.png")
    browse(page, f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (HEIGHT, WIDTH)
    paper = np.bincount(pixels.ravel(), minlength=256).argmax()
    assert paper > 240 if scheme == "light" else paper < 40
    inked = np.abs(pixels.astype(int) - paper) > 90
    assert 0.01 < inked.mean() < 0.3
    # Ink in every fifth of the page, so figures are drawn and not only its head.
    assert all(part.mean() > 0.002 for part in np.array_split(inked, 5))


def test_text_has_the_finding_and_every_group(rendered):
    text = rendered[MIDDLE]["text"]
    assert "For “effusion”, the student scores lowest in" in text
    for site in SITES:
        assert f"site {site}" in text
    for group in ("sex × view F · AP", "sex × view M · PA", "all patients"):
        assert group in text
    for said in ("we cannot tell whether they differ", "four times in five is 0.083", "unknown: 0.003 to 0.191"):
        assert said in text
    for heading in ("Along age", "Everybody against the worst group", "Variant: a threshold for each group"):
        assert heading in text


@pytest.mark.parametrize(
    "said",
    [
        *("ROC and calibration of each group", "ROC, by site", "Calibration, by sex × view"),
        *("With fewer labels", "it grows as labels shrink", "AUROC gap, by site"),
        *("Trained on one group, tested on another", "tested on Harbour", "trained on all"),
        *("What the features reveal of the patients", "no proof that nothing is revealed"),
        *("How much each group counted in training", "Weight of each group over the steps"),
    ],
)
def test_text_has_the_studies(rendered, said):
    assert said in rendered[MIDDLE]["text"]


def test_tables_wait_behind_their_figures(rendered):
    text = rendered[MIDDLE]["text"]
    # ROC and calibration of two attributes, three of scarcity, two of stages and their gaps, weights, age.
    assert text.count("The numbers") == 4 + 3 + 3 + 1 + 1
    assert "sensitivity at the threshold" not in text


@pytest.mark.parametrize("width", [NARROW, MIDDLE])
def test_nothing_is_wider_than_the_window(rendered, width):
    found = rendered[width]
    assert (found["width"], found["over"]) == (width, 0)
    # On a telephone wide tables scroll within their figures; else nothing has to.
    assert width == NARROW or found["cut"] == 0


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext on PATH: apt-get install poppler-utils")
def test_print_parts_no_heading_from_what_it_heads(page, browse):
    path = page.with_name("page.pdf")
    browse(page, "--no-pdf-header-footer", f"--print-to-pdf={path}")
    text = subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, text=True, check=True).stdout
    sheets = [sheet.split() for sheet in text.split("\f") if sheet.strip()]
    headings = [one.split() for one in re.findall(r"<h[23][^>]*>(.*?)</h[23]>", page.read_text(encoding="utf-8"))]
    assert len(sheets) > 5
    for sheet in sheets:
        assert not [one for one in headings if sheet[-len(one) :] == one]
    assert "The numbers" not in text
