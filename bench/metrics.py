"""Grouped metrics, a bootstrap, and streams of scores: seconds and memory, beside fairlearn in the same run.

Simulated scores, one image a patient, two attributes: race (4 groups, the smallest 5 %) and sex (2). Both sides get the
same arrays of labels, scores and integer group ids. What each computes is in its row: agglom always does at least as
much. fairlearn's MetricFrame is timed per replicate on a handful of them; its resampling also yields the ratio between
groups, and draws rows, not strata of patients.

Memory is what a new process has resident at its peak, beyond what it has when its inputs are there (VmHWM − VmRSS), as
a multiple of the scores in float64. The allocator gives freed memory back at once there, or what the inputs left behind
would be used again and not be seen. The last rows are `agglom evaluate --stream`: a Parquet table of scores against a
manifest of one image a patient, views race, sex and race*sex, val and test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import number, parser, table, versions, write_json
from torch import Tensor

from agglom.core import metrics
from agglom.core.resample import bootstrap_auroc
from agglom.core.streaming import ScoreHistogram

RACES, SEXES, THRESHOLD, BATCH, PREDICTORS = 4, 2, 0.5, 2**16, 10
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # label, score, race, sex


def simulated(rows: int, seed: int) -> Data:
    """Binormal scores with an AUROC of about .80, prevalence .15."""
    rng = np.random.default_rng(seed)
    y, race = rng.random(rows) < 0.15, rng.choice(RACES, rows, p=(0.6, 0.2, 0.15, 0.05))
    p = 1 / (1 + np.exp(1.5 - rng.normal(size=rows) - 1.19 * y))
    return torch.tensor(y), torch.tensor(p), torch.tensor(race), torch.tensor(rng.integers(0, SEXES, rows))


def timed(function: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Seconds of the fastest call, and what the last one returned."""
    seconds, value = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        value = function()
        seconds.append(time.perf_counter() - started)
    return min(seconds), value


def views(race_N: Tensor, sex_N: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Group ids and their number for each marginal and the crossing."""
    return {"race": (race_N, RACES), "sex": (sex_N, SEXES), "race*sex": (race_N * SEXES + sex_N, RACES * SEXES)}


def frame(kind: str, data: Data, attributes: tuple[str, ...], **options: Any) -> Any:
    """fairlearn's MetricFrame of AUROC, or of selection rate, TPR and FPR, all it derives from it computed."""
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
    from sklearn.metrics import roc_auc_score

    y, p, race, sex = (column.numpy() for column in data)
    rates = {"selection_rate": selection_rate, "tpr": true_positive_rate, "fpr": false_positive_rate}
    functions, said = ({"auroc": roc_auc_score}, p) if kind == "auroc" else (rates, (p >= THRESHOLD).astype(int))
    features = {name: {"race": race, "sex": sex}[name] for name in attributes}
    return MetricFrame(metrics=functions, y_true=y.astype(int), y_pred=said, sensitive_features=features, **options)


def points(rows: int) -> dict[str, Any]:
    """Every marginal and crossing: all metrics of agglom against four of fairlearn."""
    data = simulated(rows, 0)
    y, p, race, sex = data

    def ours() -> dict[str, dict[str, Tensor]]:
        order = p.argsort()
        return {
            name: metrics.tabulate(y, p, group, groups, THRESHOLD, order)
            for name, (group, groups) in views(race, sex).items()
        }

    seconds, found = timed(ours, 3)
    for kind in ("auroc", "rates"):
        frame(kind, simulated(1000, 0), ("sex",))  # imports
    theirs = {
        (kind, name): timed(lambda kind=kind, name=name: frame(kind, data, tuple(name.split("*"))))
        for kind in ("auroc", "rates")
        for name in found
    }
    differ = max(
        float(np.abs(column.to_numpy() - found[name][metric][:-1].numpy()).max())
        for (_, name), (_, made) in theirs.items()
        for metric, column in made.by_group.items()
    )
    peer = {kind: sum(s for (k, _), (s, _) in theirs.items() if k == kind) for kind in ("auroc", "rates")}
    return {"rows": rows, "seconds": seconds, "metrics": len(found["race"]), "fairlearn": peer, "differ": differ}


def bootstrap(rows: int, replicates: int, few: int) -> dict[str, Any]:
    """AUROC of eight groups, overall, gap and worst group, per replicate."""
    data = simulated(rows, 1)
    y, p, race, sex = data
    group, groups = views(race, sex)["race*sex"]

    def ours() -> Tensor:
        drawn = bootstrap_auroc(y, p[None], torch.arange(rows), group, groups, replicates=replicates, seed=0)[:, 0]
        by_group, levels = drawn[:, :-1], torch.tensor((0.025, 0.975), dtype=torch.float64)
        gap, worst = by_group.amax(1) - by_group.amin(1), by_group.amin(1)
        return torch.cat([drawn, gap[:, None], worst[:, None]], dim=1).quantile(levels, dim=0)

    seconds, found = timed(ours, 3)
    options = {"ci_quantiles": [0.025, 0.975], "random_state": 0}
    once, _ = timed(lambda: frame("auroc", data, ("race", "sex")))
    several, made = timed(lambda: frame("auroc", data, ("race", "sex"), n_boot=few, **options))
    assert len(made.by_group_ci[0]) == groups
    peer = (several - once) / few
    return {
        "rows": rows,
        "replicates": replicates,
        "seconds": seconds,
        "per_replicate": seconds / replicates,
        "fairlearn_replicates": few,
        "fairlearn_per_replicate": peer,
        "ratio": peer / (seconds / replicates),
        "interval_overall": found[:, groups].tolist(),
    }


def batches(rows: int) -> Iterator[Data]:
    for start in range(0, rows, BATCH):
        yield simulated(min(BATCH, rows - start), start)


def stream(rows: int) -> tuple[float, ScoreHistogram]:
    """Seconds of the updates alone, and the histogram: no more than one batch is in memory."""
    seconds, histogram = 0.0, ScoreHistogram.empty(RACES * SEXES)
    for y, p, race, sex in batches(rows):
        spent, histogram = timed(lambda y=y, p=p, g=race * SEXES + sex, h=histogram: h.update(y, p, g))
        seconds += spent
    started = time.perf_counter()
    histogram.auroc(), histogram.confusion(THRESHOLD), histogram.brier(), histogram.ece()
    return seconds + time.perf_counter() - started, histogram


def resident(field: str) -> int:
    """Bytes of this process now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def growth(work: str, rows: int) -> float:
    """Peak memory beyond the inputs of one piece of work, as a multiple of the scores (float64). In a new process."""
    if work == "product":
        return product(rows)
    if work == "stream":
        stream(BATCH)
        call: Callable[[], Any] = lambda: stream(rows)  # noqa: E731
    else:
        y, p, race, sex = (torch.cat(columns) for columns in zip(*batches(rows), strict=True))
        group, patient, small = race * SEXES + sex, torch.arange(rows), slice(0, 1000)
        calls: dict[str, Callable[[slice], Any]] = {
            "tabulate": lambda s: metrics.tabulate(y[s], p[s], group[s], RACES * SEXES, THRESHOLD),
            "bootstrap": lambda s: bootstrap_auroc(
                y[s], p[None, s], patient[s], group[s], RACES * SEXES, replicates=3, seed=0
            ),
        }
        calls[work](small)
        call = lambda: calls[work](slice(None))  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / (8 * rows)


def write_tables(folder: Path, images: int) -> None:
    """A manifest of so many images, and their scores by `PREDICTORS` predictors, one after the other."""
    import pyarrow as pa
    import pyarrow.parquet

    y, p, race, sex = simulated(images, 0)
    names = pa.array([f"images/{row:08d}.png" for row in range(images)])
    label, race, sex = (
        np.char.mod(text, x.numpy().astype(int)) for text, x in (("%d", y), ("r%d", race), ("s%d", sex))
    )
    split = np.where(np.arange(images) % 4 == 0, "val", "test")
    manifest = {"image": names, "patient": names, "split": split, "mass": label, "race": race, "sex": sex}
    pyarrow.parquet.write_table(pa.table(manifest), folder / "manifest.parquet")
    schema = pa.schema([(name, pa.string()) for name in ("image", "predictor", "label")] + [("score", pa.float64())])
    with pyarrow.parquet.ParquetWriter(folder / "scores.parquet", schema) as file:
        for predictor in range(PREDICTORS):
            noisy = (p.numpy() + np.random.default_rng(predictor).random(images) / 4) / 1.25
            name, mass = (pa.array([text] * images) for text in (f"model {predictor}", "mass"))
            file.write_table(pa.table([names, name, mass, pa.array(noisy)], schema=schema))


def product(rows: int) -> float:
    """Peak memory of reading a table of scores in a stream, the manifest in memory; prints seconds and what is kept."""
    from agglom import config
    from agglom import stream as product
    from agglom.data import manifest as manifests

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(folder, rows // PREDICTORS)
        data = {"manifest": "manifest.parquet", "labels": ["mass"], "attributes": {"race": {}, "sex": {}}}
        asked, _ = config.load_audit(None, [], **data, groups=["race", "sex", "race*sex"])
        manifest = manifests.load(asked.data, folder, check_files=False, needed=())
        all_views = [manifest.view(name) for name in ("", *asked.data.groups)]
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident("VmRSS")
        read = partial(product.read, folder / "scores.parquet", manifest, asked.data.labels, all_views)
        seconds, found = timed(read)
        peak = resident("VmHWM") - before
    kept = sum(one.pack().nbytes for one in found.histograms.values()) + sum(s.nbytes for s in found.seen.values())
    print(seconds, kept / 2**20, peak / 2**20)
    return peak / (8 * rows)


def streaming(rows: int, product_rows: int, threads: int) -> dict[str, Any]:
    """A stream against all scores at once: seconds, how far AUROC may be off, memory."""
    seconds, histogram = stream(rows)
    y, p, race, sex = (torch.cat(columns) for columns in zip(*batches(rows), strict=True))
    group = race * SEXES + sex
    whole, table_G = timed(lambda: metrics.tabulate(y, p, group, RACES * SEXES, THRESHOLD), 3)
    auroc = histogram.auroc()
    inside = bool(((auroc.lo_G <= table_G["auroc"]) & (table_G["auroc"] <= auroc.hi_G)).all())
    me = [sys.executable, __file__, "--threads", str(threads), "--stream-rows"]
    settings, said = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, {}
    for work, count in (("stream", rows), ("tabulate", rows), ("bootstrap", rows), ("product", product_rows)):
        command = [*me, str(count), "--growth", work]
        said[work] = subprocess.run(command, check=True, capture_output=True, text=True, env=settings).stdout.split()
    read, kept, peak, _ = map(float, said["product"])
    memory = {work: float(words[-1]) for work, words in said.items()}
    return {
        "rows": rows,
        "seconds": {"stream": seconds, "tabulate": whole},
        "bound": float((auroc.hi_G - auroc.lo_G).max() / 2),
        "error": float((auroc.value_G - table_G["auroc"]).abs().max()),
        "inside": inside,
        "memory": memory,
        "product": {"rows": product_rows, "seconds": read, "kept_mib": kept, "peak_mib": peak},
    }


def lines(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> str:
    peer = sum(a["fairlearn"].values())
    work = "race, sex, race*sex"
    first = [
        (f"{a['rows']:,} rows, agglom", f"{a['metrics']} metrics and overall: {work}", f"{a['seconds']:.2f} s", ""),
        ("fairlearn", f"AUROC: {work}", f"{a['fairlearn']['auroc']:.1f} s", ""),
        ("fairlearn", f"selection rate, TPR, FPR: {work}", f"{a['fairlearn']['rates']:.1f} s", ""),
        ("ratio", "fairlearn's four metrics ÷ agglom's", f"{peer / a['seconds']:.0f} ×", f"differ {a['differ']:.0e}"),
    ]
    eight = "AUROC of 8 groups, overall, gap, worst"
    ours, theirs = b["per_replicate"] * 1000, b["fairlearn_per_replicate"] * 1000
    count, few = f"{b['replicates']} in {b['seconds']:.2f} s", f"{b['fairlearn_replicates']} timed"
    second = [
        (f"{b['rows']:,} rows, agglom", f"replicate: {eight}", f"{ours:.2f} ms", count),
        ("fairlearn", f"replicate: {eight}, ratio", f"{theirs:.0f} ms", few),
        ("ratio", "fairlearn ÷ agglom, per replicate", f"{b['ratio']:.0f} ×", ""),
    ]
    m, s = c["memory"], c["seconds"]
    bound = f"AUROC ± {c['bound']:.1e}, off by {c['error']:.1e}, {'inside' if c['inside'] else 'OUTSIDE'} the bounds"
    third = [
        (f"{c['rows']:,} rows, agglom", f"stream, batches of {BATCH:,}; {bound}", f"{s['stream']:.2f} s", m["stream"]),
        ("agglom", "all at once (tabulate, race*sex)", f"{s['tabulate']:.2f} s", m["tabulate"]),
        ("agglom", "bootstrap, memory alone", "", m["bootstrap"]),
    ]
    third = [(*row[:3], f"{number(row[3])} × the scores") for row in third]
    d = c["product"]
    what = f"evaluate --stream, {PREDICTORS} predictors, 15 groups, val and test: reading"
    memory = f"{d['peak_mib']:.0f} MiB, {d['kept_mib']:.0f} kept; scores {8 * d['rows'] / 2**20:.0f}"
    third.append((f"{d['rows']:,} scores, agglom", what, f"{d['seconds']:.1f} s", memory))
    return table(("", "work", "time", "memory or note"), [*first, *second, *third])


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--rows", type=int, default=1_000_000, help="of the point metrics")
    cli.add_argument("--boot-rows", type=int, default=100_000, help="of the bootstrap")
    cli.add_argument("--stream-rows", type=int, default=4_000_000, help="of the stream")
    cli.add_argument("--product-rows", type=int, default=10_000_000, help="of the table of evaluate --stream")
    cli.add_argument("--replicates", type=int, default=1000)
    cli.add_argument("--few", type=int, default=5, help="replicates of fairlearn that are timed")
    cli.add_argument("--threads", type=int, default=1, help="of torch; fairlearn uses one")
    cli.add_argument(
        "--growth", choices=("stream", "tabulate", "bootstrap", "product"), help="print the memory of one work only"
    )
    options = cli.parse_args()
    torch.set_num_threads(options.threads)
    if options.growth:
        print(growth(options.growth, options.stream_rows))
        return
    warnings.simplefilter("ignore", FutureWarning)
    a = points(options.rows)
    b = bootstrap(options.boot_rows, options.replicates, options.few)
    c = streaming(options.stream_rows, options.product_rows, options.threads)
    software = f"{versions()}, fairlearn {version('fairlearn')}, scikit-learn {version('scikit-learn')}"
    print(f"{lines(a, b, c)}\n\n{options.threads} thread(s) of torch; {software}")
    figures = {"points": a, "bootstrap": b, "streaming": c, "threads": options.threads, "versions": software}
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
