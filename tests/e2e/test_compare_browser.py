"""The page of a comparison in a browser: not blank in light and dark, no wider than the window, no figure cut."""

import html
import re

import numpy as np
import pytest
from PIL import Image

from agglom import comparison
from agglom.compare import Comparison, Line, Question

SCHEMES = {"dark": 0, "light": 1}  # Blink's preferredColorScheme
RUNS = {"uniform": "full", "balanced-by-group": "full"}
PLACES = (("", "all"), *(("site", name) for name in ("Harbour", "North", "South")), ("sex*view", "F|AP"))
# The page allows no script; this copy reports on itself.
PROBE = """<script>
const root = document.documentElement;
const cut = [...document.querySelectorAll("figure")].filter(one => one.scrollWidth > one.clientWidth).length;
document.title = `over ${root.scrollWidth - root.clientWidth}, cut ${cut}`;
</script>"""

pytestmark = pytest.mark.slow


def lines():
    """Two runs with every verdict, side by side, and the choice between them; the third site is too small."""
    found = []
    for run, stage in RUNS.items():
        head = {"run": run, "stage": stage, "label": "effusion", "metric": "auroc", "readout": "linear"}
        for g, (attribute, group) in enumerate(PLACES):
            few = {"status": "below_min_pos", "why": "too few positive patients"} if group == "South" else {}
            at = head | {"split": "test", "attribute": attribute, "group": group, "n_patients": 1200 - 200 * g} | few
            level = 0.9 - 0.02 * g
            found.append(Line(kind="value", value=level, lo=level - 0.03, hi=level + 0.02, level=0.95, **at))
            for minus, shift in (
                ("teacher/dinov2-large", -0.012 * g),
                ("teacher/efficientnet-lite0", 0.03),
                ("", -0.012 * g),
            ):
                kind = "not_assessable" if few else ("non_inferior", "inconclusive", "inferior")[min(2, g // 2)]
                ends = {"value": shift, "lo": shift - 0.02, "hi": shift + 0.02 if minus else None, "level": 0.9}
                bound = None if few else shift - 0.02
                more = {"bound": bound, "smallest_margin": None if few else max(0.0, 0.02 - shift), "verdict": kind}
                more |= {
                    "patients_needed": 1840 if kind == "inconclusive" else None,
                    "against": minus or "teacher/dinov2-large",
                }
                found.append(Line(kind="verdict", minus=minus, **at, **ends, **more))
        at = head | {"split": "val", "attribute": "site", "group": "North", "bound": 0.81, "level": 0.9}
        found.append(Line(kind="choice", chosen=run == "uniform", **at))
    return tuple(found)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    kept = dict.fromkeys(RUNS, False)
    comparison.write(Comparison(Question(margin=0.03), "test", False, lines(), RUNS, kept), folder)
    return folder / "compare.html"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_screenshot_is_not_blank(page, browse, scheme):
    shot = page.with_name(f"{scheme}.png")
    browse(page, f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("L"))
    paper = np.bincount(pixels.ravel(), minlength=256).argmax()
    assert paper > 240 if scheme == "light" else paper < 40
    inked = np.abs(pixels.astype(int) - paper) > 90
    assert all(part.mean() > 0.002 for part in np.array_split(inked, 4))


def test_fits_the_window_and_cuts_no_figure(page, browse):
    source = page.read_text(encoding="utf-8")
    copy = page.with_name("probed.html")
    copy.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</body>", f"{PROBE}</body>"), encoding="utf-8"
    )
    told = html.unescape(browse(copy, "--dump-dom", "--virtual-time-budget=5000"))
    assert "<title>over 0, cut 0</title>" in told
    for said in (
        "The margin of 0.03 is kept by 0 of 2 runs.",
        "▼ inferior",
        "◇ inconclusive",
        "1,840",
        "600 patients: too few positive patients",
    ):
        assert said in told
