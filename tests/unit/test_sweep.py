"""What a report says and draws of the sweep over image sizes, from made-up rows."""

import pytest

from agglom import figures, findings, report
from agglom.reading import read

SIZES = ("64x64", "64x32", "128x96")


def row(target, value, half=0.02, predictor="student", **more):
    base = dict.fromkeys(report.COLUMNS) | {
        **{
            "predictor": predictor,
            "metric": "sweep_fvu",
            "label": "",
            "attribute": "",
            "group": "all",
            "split": "test",
        },
        **{"value": value, "lo": value - half, "hi": value + half, "n": 90, "n_patients": 80, "status": "ok"},
        **{"readout": "none", "target": target, "note": "", "rule": ""},
    }
    return base | more


def reading(values, **more):
    """`values` by kind, one a size."""
    rows = [row(f"{kind}@{size}", x, **more) for kind, xs in values.items() for size, x in zip(SIZES, xs, strict=True)]
    return read(rows, {"min_support": 30})


def test_sizes_go_from_small_to_large():
    assert findings.sweep_sizes(reading({"a/patches": (0.5, 0.5, 0.5)})) == ["64x32", "64x64", "128x96"]


def test_the_kind_that_changes_most_is_named():
    found = findings.sweep_finding(reading({"a/patches": (0.5, 0.4, 0.6), "b/summary": (0.3, 0.35, 0.9)}))
    assert (
        "changes most for b/summary: 0.300 (0.280 to 0.320) at 64×64 px, 0.900 (0.880 to 0.920) at 128×96 px." in found
    )
    assert "cannot tell" not in found
    assert "worse than a guess" not in found


def test_intervals_that_meet_allow_no_claim():
    found = findings.sweep_finding(reading({"a/patches": (0.5, 0.51, 0.52)}))
    assert "these intervals meet, so we cannot tell whether it changes." in found


def test_what_is_worse_than_a_guess_is_said():
    found = findings.sweep_finding(reading({"a/patches": (0.5, 0.5, 1.2), "b/patches": (0.5, 0.5, 1.01)}))
    assert found.endswith("At some size the student is worse than a guess that sees no image for a/patches.")


@pytest.mark.parametrize("more", [{"n_patients": 20}, {"lo": None, "hi": None}, {"group": "F", "attribute": "sex"}])
def test_no_finding_of_few_patients_or_without_intervals_or_of_a_group(more):
    assert findings.sweep_finding(reading({"a/patches": (0.5, 0.4, 0.9)}, **more)) == ""


def test_no_sweep_no_section():
    empty = read([], {})
    assert findings.sweep_finding(empty) == ""
    assert figures.sweep(empty) == []


def test_charts_have_a_line_a_target_and_a_predictor():
    rows = [row(f"{kind}@{size}", 0.5) for kind in ("a/patches", "a/summary", "b/patches") for size in SIZES]
    more = {"metric": "sweep_auroc", "label": "ill", "readout": "linear"}
    rows += [row(size, 0.7, predictor=name, **more) for name in ("student", "teacher/a") for size in SIZES]
    rows.append(row("", 0.7, metric="auroc", label="ill", readout="linear"))
    unexplained, auroc = figures.sweep(read(rows, {}))
    assert [text for _, text in unexplained["ticks"]] == ["64×32", "64×64", "128×96"]
    assert [one["name"] for one in unexplained["lines"]] == ["a/patches", "a/summary", "b/patches"]
    assert [one["tone"] for one in unexplained["lines"]] == ["c1", "c1", "c2"]
    assert [one["name"] for one in auroc["lines"]] == ["student", "a"]
    assert [len(one["points"]) for one in auroc["lines"]] == [3, 3]
    assert auroc["table"]["head"] == ["image size, px", "64×32", "64×64", "128×96"]
