"""The figures of docs/audits.md, from real tables of chest X-rays: a text-mined label, and a view that is missing.

The tables are files of the package torchxrayvision 1.5.7, which need not be installed:

    pip download --no-deps --dest out/tables torchxrayvision==1.5.7
    python -m zipfile -e out/tables/torchxrayvision-1.5.7-py3-none-any.whl out/tables

Writes a manifest and a table of scores of two audits to OUT/nih and OUT/openi, and reports on them as `agglom evaluate
--predictions OUT/nih/scores.csv --manifest OUT/nih/manifest.csv --out OUT/nih/report` does.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from _common import interval, number, parser, table, versions, write_json

from agglom import audit, report
from agglom.core import disparity, metrics

ADJUDICATED = "google2019_nih-chest-xray-labels.csv.gz"
HEADERS, REPORTS = "nlmcxr_dicom_metadata.csv.gz", "NLMCXR_reports.tgz"
PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
# The radiologists' column, and what NIH's text miner calls the same.
FINDINGS = {
    "pneumothorax": ("Pneumothorax", {"Pneumothorax"}),
    "nodule_or_mass": ("Nodule or mass", {"Nodule", "Mass"}),
}
OLDEST = 110  # years; NIH has ages above, which cannot be
OPENI_VIEWS = {"PA": "PA", "AP": "AP", "LL": "lateral", "RL": "lateral", "LATERAL": "lateral"}
PADCHEST_VIEWS = {"POSTEROANTERIOR": "PA", "PA": "PA", "ANTEROPOSTERIOR": "AP", "AP": "AP"}
CROSSED = "data.groups=[sex, age, view, set, view*set]"
MEASURES = ("tpr", "fpr", "ppv", "accuracy")
Row = dict[str, Any]


def folder(named: Path | None) -> Path | None:
    """Where the tables are: the folder named, else that of an installed torchxrayvision, else None."""
    if named is not None:
        return named
    spec = importlib.util.find_spec("torchxrayvision")
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((Path(place) / "data" for place in places), None)


def lines(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(2**24)  # PadChest's columns hold whole reports
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def audited(place: Path, manifest: Sequence[Row], scores: Sequence[Row], overrides: Sequence[str] = ()) -> list[Row]:
    """The rows of the report on these scores, by way of the files that the command line would read."""
    write_csv(place / "manifest.csv", manifest)
    write_csv(place / "scores.csv", scores)
    audit.main(place / "scores.csv", place / "manifest.csv", None, overrides, place / "report")
    return report.load(place / "report" / "report.json").rows


def cell(row: Row) -> str:
    flag = "" if row["status"] == "ok" else f" ({row['status']})"
    return interval(row["value"], row["lo"], row["hi"]) + flag


def by(rows: Iterable[Row], **wanted: str) -> dict[tuple[str, str, str], Row]:
    """The rows with these fields and thresholds chosen for all, by attribute, group and metric."""
    kept = (row for row in rows if row["rule"] != "group" and all(row[key] == value for key, value in wanted.items()))
    return {(row["attribute"], row["group"], row["metric"]): row for row in kept}


# ── NIH: the text miner against radiologists ──


def nih(tables: Path, out: Path) -> list[Row]:
    """Label: what radiologists agreed on. Score: 1 where the text miner found it in the original report."""
    manifest, scores = [], []
    for row in lines(tables / ADJUDICATED):
        image, age = row["Image Index"], int(row["Patient Age"])
        truth = {label: int(row[column] == "YES") for label, (column, _) in FINDINGS.items()}
        who = {
            "sex": row["Patient Gender"],
            "age": age if age <= OLDEST else "",
            "view": row["View Position"],
            "set": row["Set Id"],
        }
        manifest.append({"image": image, "patient": row["Patient ID"], **truth, **who})
        mined = set(row["Finding Labels"].split("|"))
        for label, (_, names) in FINDINGS.items():
            scores.append(
                {"image": image, "predictor": "text-mined", "label": label, "score": int(bool(mined & names))}
            )
    return audited(out / "nih", manifest, scores, [CROSSED])


def nih_table(rows: Sequence[Row], label: str) -> str:
    """Rates of each group with intervals and their gaps; then what the gaps would be by chance."""
    found = by(rows, label=label, predictor="text-mined")
    places = [(attribute, group) for attribute, group, metric in found if metric == "tpr"]
    body, chance = [], []
    for attribute, group in places:
        counts = [str(found[attribute, group, "tpr"][key]) for key in ("n", "n_patients", "n_pos")]
        cells = [cell(found[attribute, group, metric]) for metric in MEASURES]
        body.append([f"{attribute} {group}" if attribute else "everybody", *counts, *cells])
    for attribute in dict.fromkeys(attribute for attribute, _ in places if attribute):
        gaps = {metric: found[attribute, "all", f"{metric}_gap"] for metric in MEASURES}
        body.append([f"gap over {attribute}", "", "", "", *map(cell, gaps.values())])
        for metric in audit.NULLED:
            if metric in gaps:
                facts = (gaps[metric][key] for key in ("value", "null_hi", "p_value", "corrected", "detectable"))
                chance.append([f"{metric} over {attribute}", *map(number, facts)])
    head = ["gap", "seen", "95 % of chance gaps below", "p", "less chance", "detectable"]
    return f"{table(['group', 'images', 'patients', 'positives', *MEASURES], body)}\n\n{table(head, chance)}"


# ── Open-I: a view that is missing, kept apart and folded into the smaller group ──


def openi(tables: Path, out: Path) -> list[Row]:
    """Label: cardiomegaly as an indexer coded the report. Score: 1 where the automatic indexer has it.

    `view` is the header's, empty where that is; `folded` is the same with every empty one called AP.
    """
    coded: dict[str, tuple[int, int]] = {}
    with tarfile.open(tables / REPORTS) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".xml") else None
            if file is None:
                continue
            root = ElementTree.parse(io.BytesIO(file.read())).getroot()
            terms = {
                kind: {(one.text or "").split("/")[0].strip().lower() for one in root.iterfind(f"MeSH/{kind}")}
                for kind in ("major", "automatic")
            }
            (key,) = (one.get("id", "").removeprefix("CXR") for one in root.iterfind("uId"))
            coded[key] = int("cardiomegaly" in terms["major"]), int("cardiomegaly" in terms["automatic"])
    manifest, scores = [], []
    for row in lines(tables / HEADERS):
        truth, mined = coded[row["Patient ID"]]
        view = OPENI_VIEWS.get(row["View Position"], "")
        who = {"patient": row["Patient ID"], "cardiomegaly": truth, "view": view, "folded": view or "AP"}
        manifest.append({"image": row["imageid"], **who})
        scores.append({"image": row["imageid"], "predictor": "automatic", "label": "cardiomegaly", "score": mined})
    return audited(out / "openi", manifest, scores)


def openi_table(rows: Sequence[Row]) -> str:
    found = by(rows, label="cardiomegaly", predictor="automatic")
    sizes, body = [], []
    for group in ("PA", "AP", "lateral"):
        sides = [found[attribute, group, "accuracy"] for attribute in ("view", "folded")]
        sizes.append([group, *(str(side[key]) for side in sides for key in ("n", "n_patients", "n_pos"))])
    for metric in ("tpr", "accuracy", "selection_rate"):
        for group, name in (("PA", metric), ("AP", metric), ("lateral", metric), ("all", f"{metric}_gap")):
            apart, folded = found["view", group, name], found["folded", group, name]
            bounds = f"[{number(apart['unknown_lo'])}, {number(apart['unknown_hi'])}]"
            body.append([metric, "gap" if group == "all" else group, cell(apart), bounds, cell(folded)])
    counted = [f"{what}{where}" for where in ("", ", folded") for what in ("images", "patients", "positives")]
    head = ["metric", "group", "unknown kept apart", "its bounds", "unknown called AP"]
    return f"{table(['group', *counted], sizes)}\n\n{table(head, body)}"


# ── PadChest: the same, where the missing view was looked up later ──


def padchest(tables: Path) -> str:
    """How often a labelling network says cardiomegaly, by the header's view and by the view that was looked up."""
    rows = [row for row in lines(tables / PADCHEST) if row["MethodLabel"] == "RNN_model"]
    rows = [row for row in rows if row["Projection"] in ("PA", "AP", "AP_horizontal")]
    said_N = torch.tensor(["'cardiomegaly'" in row["Labels"] for row in rows]).double()
    codes = {patient: code for code, patient in enumerate(dict.fromkeys(row["PatientID"] for row in rows))}
    patient_N = torch.tensor([codes[row["PatientID"]] for row in rows])
    headers = [PADCHEST_VIEWS.get(row["ViewPosition_DICOM"], "") for row in rows]
    kinds = {
        "header, unknown kept apart": headers,
        "header, unknown called AP": [view or "AP" for view in headers],
        "looked up": [row["Projection"][:2] for row in rows],
    }
    names, body = ("PA", "AP"), []
    for kind, views in kinds.items():
        group_N = torch.tensor([names.index(view) if view else -1 for view in views])
        # A share of images has no truth to be compared with: the label stands in for it.
        columns = "selection_rate", said_N, said_N, patient_N, group_N, len(names)
        single = metrics.evaluate_groups(*columns, threshold=0.5)
        wide = metrics.evaluate_groups(*columns, threshold=0.5, level=metrics.simultaneous(0.95, len(names)))
        bounds = disparity.unknown_bounds("selection_rate", said_N, said_N, group_N, len(names), threshold=0.5)
        for name, one, (lo, hi) in zip(names, single, bounds, strict=True):
            bound = f"[{number(lo)}, {number(hi)}]" if lo < hi else ""
            body.append([kind, name, str(one.n), str(one.n_patients), interval(one.value, one.lo, one.hi), bound])
        size, difference = metrics.gap(wide).estimate, single[1].value - single[0].value
        body.append(
            [kind, "gap", "", "", f"{interval(size.value, size.lo, size.hi)}, AP − PA {number(difference)}", ""]
        )
    lacking = [row for row, view in zip(rows, headers, strict=True) if not view]
    found = Counter(row["Projection"][:2] for row in lacking)
    guessed = sum(row["MethodProjection"] != "Manual review of DICOM fields" for row in lacking)
    return (
        f"{len(rows)} frontal images with labels of the network; {len(lacking)} without a view in the header: "
        f"{found['PA']} PA, {found['AP']} AP when looked up, {guessed} of them by a network\n\n"
        f"{table(['view', 'group', 'images', 'patients', 'called cardiomegaly', 'bounds'], body)}"
    )


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument(
        "--tables", type=Path, metavar="DIR", help="torchxrayvision/data (default: that of the installed one)"
    )
    cli.add_argument("--out", type=Path, default=Path("out/audits"), help="(default out/audits)")
    options = cli.parse_args()
    tables = folder(options.tables)
    if tables is None:
        print(f"Nothing done: torchxrayvision is not installed and no --tables given.\n\n{__doc__}")
        return
    if not (tables / ADJUDICATED).is_file():
        cli.error(f"{tables}: no {ADJUDICATED} there; the top of bench/audits.py tells how to get it")
    first = nih(tables, options.out)
    for label in FINDINGS:
        print(f"NIH, {label}: text-mined against radiologists\n\n{nih_table(first, label)}\n", flush=True)
    second = openi(tables, options.out)
    print(f"Open-I, cardiomegaly: automatic against coded\n\n{openi_table(second)}\n", flush=True)
    third = padchest(tables)
    print(f"PadChest, cardiomegaly\n\n{third}\n\n{versions()}")
    write_json(options.json, {"versions": versions(), "nih": first, "openi": second, "padchest": third})


if __name__ == "__main__":
    main()
