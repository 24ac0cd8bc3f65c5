"""The record of a run on NIH ChestX-ray14 images and of the erasure benches, as Markdown in bench/results/.

Reads OUT/reports/STAGE.json of `launch/distill.py --config configs/nih.yaml --out OUT` and what
`bench/erasure.py --json` wrote, and writes nih.md, erasure.md and erasure-nih1000.md. What is not there is left out,
and said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _common import ROOT, interval, parser, table, versions, write_json

from agglom import report

MACHINE = "two CPU cores, no GPU"
RESULTS = ROOT / "bench" / "results"
FVU_BAR, FVU_BOUND = 0.8, 1.0
# In the repository root; a copy of shared/ lies beside it.
MANIFEST = "../shared/data/nih1000/manifest.csv"
START = """\
.venv/bin/python -c "from agglom import plugins; from safetensors.torch import save_file; \\
    net = plugins.build('packaged', 'teachers', {'model': 'efficientnet_lite0'}).module.net; \\
    save_file(net.state_dict(), 'out/efficientnet_lite0.safetensors')\""""
DISTIL = f"""\
OMP_NUM_THREADS=1 .venv/bin/deepspeed --num_accelerators 2 launch/distill.py --config configs/nih.yaml --out out/nih \\
    --set data.manifest={MANIFEST} --set data.workers=0 \\
    --set student.options.model=tf_efficientnet_lite0 \\
    --set student.options.checkpoint=./out/efficientnet_lite0.safetensors \\
    --set student.options.fixed_statistics=true \\
    --set teachers.erased.options.shrink=0.1 --set 'augment.crop=[0.8,1.0]' --set optim.batch=32 \\
    --set 'stages[0].length=60 steps' --set 'stages[0].size=128' --set 'stages[0].trunk_lr_scale=0.1' \\
    --set 'stages[1].length=240 steps' --set 'stages[1].size=128' --set 'stages[1].trunk_lr_scale=0.3' \\
    --set 'stages[1].lr=1e-3'"""
SEX = f".venv/bin/python bench/erasure.py --manifest {MANIFEST} --json out/erasure-nih1000.json"
DEVICE = ".venv/bin/python bench/erasure.py --data fashion --json out/erasure-fashion.json"
RECORD = ".venv/bin/python bench/nih.py --out out/nih --stage full"

Row = dict[str, Any]


def pick(rows: list[Row], **wanted: Any) -> dict[tuple[str, str, str], Row]:
    """The rows with these fields, by (attribute, group, predictor or target)."""
    kept = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return {(row["attribute"], row["group"], row["target"] or row["predictor"]): row for row in kept}


def group_table(found: dict[tuple[str, str, str], Row]) -> str:
    """One line per group, one column per predictor or target; n, patients and status are those of the group."""
    groups = dict.fromkeys((attribute, group) for attribute, group, _ in found)
    names = list(dict.fromkeys(name for _, _, name in found))
    lines = []
    for attribute, group in groups:
        rows = [found.get((attribute, group, name)) for name in names]
        first = next(row for row in rows if row)
        counts = [str(first["n"]), str(first["n_patients"]), first["status"]]
        cells = [interval(row["value"], row["lo"], row["hi"]) if row else "–" for row in rows]
        lines.append([f"{attribute} {group}".strip(), *counts, *cells])
    return table(["group", "images", "patients", "status", *names], lines)


def fvu_lines(rows: list[Row]) -> tuple[str, bool]:
    """Everybody's variance unexplained on both splits, and whether every teacher meets the bar."""
    lines, met = [], []
    for row in rows:
        if row["metric"] in ("fvu", "fvu_angular") and (row["attribute"], row["group"]) == ("", "all"):
            value, hi = row["value"], row["hi"]
            met.append(None not in (value, hi) and value < FVU_BAR and hi < FVU_BOUND)
            what, verdict = interval(value, row["lo"], hi), "yes" if met[-1] else "no"
            lines.append([row["target"], row["metric"], row["split"], row["n"], what, verdict])
    head = ["target", "metric", "split", "images", "value", f"< {FVU_BAR}, bound < {FVU_BOUND:g}"]
    return table(head, lines), bool(met) and all(met)


def leak(figures: dict[str, Any]) -> str:
    """The tables of an erasure bench."""
    about = figures["about"][0].upper() + figures["about"][1:]
    parts = [
        f"{about}. {figures['repeats']} repeats, each with three disjoint sets of patients for eraser, probe and test. "
        f"Software: {figures['versions']}."
    ]
    parts += [
        f"**{figure['title'][0].upper()}{figure['title'][1:]}**\n\n{figure['text']}." for figure in figures["figures"]
    ]
    parts.append(
        "Value and interval are means over the repeats, of AUROC (of a number: of Spearman's correlation) and of its "
        "interval (DeLong with Obuchowski's variance by patient, for given eraser and probe; of a correlation, a "
        "bootstrap of patients): conservative, as the mean of equally precise estimates varies no more than each. "
        "`drop` is raw minus erased, paired on the same images. Null inside: repeats whose own interval holds .5 "
        "(`drop` and correlations: 0)."
    )
    return "\n\n".join(parts)


def nih(found: report.GroupReport) -> tuple[str, dict[str, Any]]:
    """The record of the run and its figures."""
    rows, split = found.rows, found.context["split"]
    fvu, met = fvu_lines(rows)
    label = found.context["labels"][0]
    parts = [
        f"# NIH ChestX-ray14 extract: student and teachers after stage `{found.stage}`",
        f"776 real chest X-rays of 197 patients; headline split `{split}`. Made on {MACHINE}; {versions()}:",
        "```\n" + "\n".join((START, DISTIL, RECORD)) + "\n```",
        "The student starts from the weights of its teacher `lite0`: its variance unexplained tells how much of "
        "`lite0` was kept, that of `dinov2` and `erased` how much was learnt.",
        "A row with a status other than `ok` has fewer than 30 patients of one class: its value is given, its interval "
        "is not promised. `all` is below that minimum too where the split has fewer.",
    ]
    for readout, name in (("linear", "linear probe"), ("knn", "kNN")):
        chosen = pick(rows, metric="auroc", label=label, readout=readout, split=split)
        sides = {key: row for key, row in chosen.items() if " - " not in key[2]}
        pairs = {key: row for key, row in chosen.items() if " - " in key[2]}
        parts += [f"## AUROC of `{label}`, {name}", group_table(sides)]
        parts += [f"### Student minus each teacher, {name}, paired on the same images", group_table(pairs)]
    parts += [
        "## Variance unexplained on held-out images",
        "`fvu`: squared error over that of the train mean per patch position, normalised patches. `fvu_angular`: the "
        "same with squared angles to the train mean direction, raw summaries. 1 = no better than the mean.",
        fvu,
        f"Below {FVU_BAR} with an upper bound below {FVU_BOUND:g} for every teacher: **{'yes' if met else 'no'}**.",
        f"### By group, `{split}`",
        group_table({**pick(rows, metric="fvu", split=split), **pick(rows, metric="fvu_angular", split=split)}),
    ]
    parts.append("What is read of sex and age from `dinov2` and `erased`: [erasure-nih1000.md](erasure-nih1000.md).")
    return "\n\n".join(parts) + "\n", {"stage": found.stage, "split": split, "fvu_met": met, "rows": rows}


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--out", type=Path, default=Path("out/nih"), help="folder of the run (default out/nih)")
    cli.add_argument("--stage", default="full", help="stage whose report is read (default full)")
    cli.add_argument("--erasure", type=Path, default=Path("out/erasure-nih1000.json"), help="of bench/erasure.py")
    cli.add_argument("--fashion", type=Path, default=Path("out/erasure-fashion.json"), help="of bench/erasure.py")
    cli.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default bench/results)")
    options = cli.parse_args()
    stage = options.out / "reports" / f"{options.stage}.json"
    texts: dict[str, str] = {}
    written: dict[str, Any] = {}
    read = {path: json.loads(path.read_text()) for path in (options.erasure, options.fashion) if path.is_file()}
    if stage.is_file():
        texts["nih.md"], written["nih"] = nih(report.load(stage))
    for path, name, head, command in (
        (options.fashion, "erasure.md", "a simulated device and exposure, Fashion-MNIST", DEVICE),
        (options.erasure, "erasure-nih1000.md", "sex and age, 776 chest X-rays of 197 patients", SEX),
    ):
        if path in read:
            written[name] = read[path]
            made = f"Made on {MACHINE}:\n\n```\n{command}\n{RECORD}\n```"
            texts[name] = f"# Erasure of {head}, DINOv2 ViT-S/14\n\n{made}\n\n{leak(read[path])}"
    for name, text in texts.items():
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / name).write_text(text.rstrip() + "\n", encoding="utf-8")
        print(text)
    for path in (stage, options.erasure, options.fashion):
        if not path.is_file():
            print(f"{path}: not there, left out")
    write_json(options.json, written)


if __name__ == "__main__":
    main()
