"""The report in a browser, as a reader sees it: not blank in light and dark, complete, and no wider than the window."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from agglom import audit, report
from agglom.core.metrics import Estimate
from agglom.report import GroupReport

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH, HEIGHT = 1280, 1600
SCHEMES = {"dark": 0, "light": 1}  # Blink's preferredColorScheme
NAMES = ("student", "teacher/dinov2-large", "teacher/efficientnet-lite0", "ensemble")
SITES = ("Harbour", "North", "South")
PLACES = (("", "all"), *(("site", site) for site in SITES), ("sex*view", "F|AP"), ("sex*view", "M|PA"))
RATES = ("tpr", "fpr", "ppv", "npv", "selection_rate", "accuracy", "balanced_accuracy", "f1", "brier", "ece")
# The page allows no script; this copy reports on itself.
PROBE = """<pre id="text"></pre><script>
const root = document.documentElement, text = document.body.innerText;
root.dataset.over = root.scrollWidth - root.clientWidth;
root.dataset.cut = [...document.querySelectorAll("figure")].filter(one => one.scrollWidth > one.clientWidth).length;
document.getElementById("text").textContent = text;
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; install it: apt-get install chromium"),
]


def rows():
    """Every kind of row that a report of a stage may have; the third site is too small for a finding."""

    def one(name, metric, place, value, status="ok", **more):
        estimate = Estimate(value, value - 0.04, value + 0.04, 1200, 400, 800, 900, status, "delong")
        plain = {"label": "effusion", "readout": "linear", "stage": "full"}
        return audit.row(name, metric, place, "test", estimate, **plain | more)

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
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    earlier = [{**one, "value": (one["value"] or 0) - 0.1} for one in rows() if one["predictor"] == "student"]
    context = {"index": 1, "split": "test", "min_support": 30, "history": [("warm", earlier)]}
    report.write(GroupReport("full", rows(), context), folder)
    return folder / "full.html"


def browse(page, *flags):
    """Chromium's standard output. Its sandbox needs what a container lacks; the page is ours."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    window = [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={WIDTH},{HEIGHT}"]
    done = subprocess.run(
        [*command, *window, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def rendered(page):
    """What a copy of the page says of itself: attributes of its root, and the text that is shown."""
    source = page.read_text(encoding="utf-8")
    probed = re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</body>", f"{PROBE}</body>")
    copy = page.with_name("probed.html")
    copy.write_text(probed, encoding="utf-8")
    found = browse(copy, "--dump-dom")
    text = re.search(r'<pre id="text">(.*?)</pre>', found, re.S)[1]
    return dict(re.findall(r'data-(\w+)="(\d+)"', found)), html.unescape(text)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_screenshot_is_not_blank(page, scheme):
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
    _, text = rendered
    assert "For “effusion”, the student scores lowest in" in text
    for site in SITES:
        assert f"site {site}" in text
    for group in ("sex × view F · AP", "sex × view M · PA", "all patients"):
        assert group in text
    for said in ("we cannot tell whether they differ", "four times in five is 0.083", "unknown: 0.003 to 0.191"):
        assert said in text
    for heading in ("Along age", "Everybody against the worst group", "Variant: a threshold for each group"):
        assert heading in text


def test_nothing_is_wider_than_the_window(rendered):
    measured, _ = rendered
    assert measured == {"over": "0", "cut": "0"}
