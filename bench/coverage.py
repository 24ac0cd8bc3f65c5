"""How often the 95 % intervals of agglom.core hold the truth, by simulation.

Binormal scores with a known AUROC of .8 (.7 in a worse group, .75 for a second predictor), prevalence .3. Groups have n
patients each, with one image a patient or with four; those have an intra-class correlation of .5, both of the scores
and of the liability behind the labels. True values are exact (integrals over the scores), not estimates.

Intervals of summaries of groups (gap, worst, ratio, gap to overall, equalized odds, ES-AUROC) project a simultaneous
box: they are conservative, so ≥ 95 % is what they promise, and so are those of ECE, which uses 200 replicates here.
Coverage is of all samples that have an interval, those that a report would flag as below its minimum included.

Work is done in parts of 250 samples, all cells in turn. With `--parts FILE` each finished part becomes a line of JSON
there, and the same command goes on where it was cut off; delete the file when a method has changed.
`--markdown FILE` writes the record, tables and sentences. The default takes some 40 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from _common import number, table, versions
from torch import Tensor

from agglom.core import calibration, disparity, metrics
from agglom.core.metrics import Estimate

LEVEL, TOLERANCE, PREVALENCE, ICC = 0.95, 0.02, 0.3, 0.5
AUROC, WORSE, SECOND = 0.8, 0.7, 0.75
SHARED_NOISE = 0.6  # correlation of the two predictors within a class
STRETCH, SHIFT = 1.5, 0.3  # of the calibrated logit, so that scores are overconfident
SINGLE = tuple(metric for metric in metrics.METRICS if metric != "ece_debiased")  # which has the interval of ece
PAIRED, GROUPED = ("auroc", "auprc", "tpr", "brier", "ece"), ("auroc", "tpr")
EXACT, CONSERVATIVE = "95", "≥ 95"
GROUPS, IMAGES, PATIENTS = (2, 8), (1, 4), (50, 200, 1000, 5000)
ECE_REPLICATES, PART = 200, 250
GRID = torch.linspace(-12, 14, 400_001, dtype=torch.float64)

Measured = Callable[[float], Estimate]  # by level


class Sample(NamedTuple):
    """Images of one group: labels, probabilities of two predictors, whose images they are."""

    y_N: Tensor
    p_N: Tensor
    second_N: Tensor
    patient_N: Tensor


@dataclass
class Tally:
    """How a figure fared. `promise` is EXACT or CONSERVATIVE; the rest counts samples."""

    promise: str
    truth: float
    covered: int = 0
    measured: int = 0
    flagged: int = 0
    undefined: int = 0

    def add(self, estimate: Estimate, flagged: bool) -> None:
        self.flagged += flagged
        if math.isnan(estimate.lo):
            self.undefined += 1
            return
        self.measured += 1
        # Rounding must not turn a bound that equals the truth into a miss.
        self.covered += estimate.lo - 1e-12 <= self.truth <= estimate.hi + 1e-12

    @property
    def share(self) -> float:
        return self.covered / self.measured if self.measured else math.nan

    @property
    def error(self) -> float:
        """Monte Carlo standard error of `share`."""
        return math.sqrt(self.share * (1 - self.share) / self.measured) if self.measured else math.nan


@dataclass
class Design:
    """One size of group, and the tally of each figure by its name."""

    patients: int
    images: int
    repetitions: int
    tallies: dict[str, Tally] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.patients} × {self.images}"

    def join(self, part: Design) -> None:
        """Add the samples of `part`, which has the same patients and images."""
        self.repetitions += part.repetitions
        self.seconds += part.seconds
        for name, theirs in part.tallies.items():
            mine = self.tallies.setdefault(name, Tally(theirs.promise, theirs.truth))
            for count in ("covered", "measured", "flagged", "undefined"):
                setattr(mine, count, getattr(mine, count) + getattr(theirs, count))


def shift(auroc: float) -> float:
    """Distance of the class means of unit normals with this AUROC."""
    return math.sqrt(2) * float(torch.special.ndtri(torch.tensor(auroc, dtype=torch.float64)))


def probability(z_X: Tensor) -> Tensor:
    """An overconfident probability, rising with the score; the same for all groups, as one model's is."""
    mean = shift(AUROC)
    logit_X = mean * z_X - mean**2 / 2 + math.log(PREVALENCE / (1 - PREVALENCE))
    return torch.sigmoid(STRETCH * logit_X + SHIFT)


def cut() -> float:
    """The threshold: between the class means."""
    return float(probability(torch.tensor(shift(AUROC) / 2, dtype=torch.float64)))


@cache
def truth(metric: str, auroc: float) -> float:
    """The exact value in the population of a group."""
    mean, line = shift(auroc), shift(AUROC) / 2

    def tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2

    tpr, fpr, prevalence = tail(line - mean), tail(line), PREVALENCE
    said = prevalence * tpr + (1 - prevalence) * fpr
    rates = {
        "auroc": auroc,
        "tpr": tpr,
        "fpr": fpr,
        "accuracy": prevalence * tpr + (1 - prevalence) * (1 - fpr),
        "balanced_accuracy": (tpr + 1 - fpr) / 2,
        "ppv": prevalence * tpr / said,
        "npv": (1 - prevalence) * (1 - fpr) / (1 - said),
        "f1": 2 * prevalence * tpr / (said + prevalence),
        "selection_rate": said,
    }
    if metric in rates:
        return rates[metric]
    pos_X, neg_X = (torch.exp(-((GRID - m) ** 2) / 2) / math.sqrt(2 * math.pi) * (GRID[1] - GRID[0]) for m in (mean, 0))
    pos_X, neg_X, p_X = prevalence * pos_X, (1 - prevalence) * neg_X, probability(GRID)
    if metric == "brier":
        return float((pos_X * (1 - p_X) ** 2 + neg_X * p_X**2).sum())
    if metric == "ece":
        residual_X = pos_X * (p_X - 1) + neg_X * p_X
        return float(torch.bincount(calibration.bin_of(p_X), residual_X).abs().sum())
    if metric == "auprc":
        above_pos_X, above_neg_X = (torch.special.ndtr(m - GRID) for m in (mean, 0))
        hits_X, false_X = prevalence * above_pos_X, (1 - prevalence) * above_neg_X
        return float((pos_X / prevalence * hits_X / (hits_X + false_X).clamp(min=1e-300)).sum())
    raise ValueError(f"no truth of {metric}")


def draw(patients: int, images: int, auroc: float, generator: torch.Generator) -> Sample:
    """One group. The marginal distribution of an image is the same whatever the number of images."""

    def noise() -> Tensor:
        own_IJ = torch.randn(patients, images, generator=generator, dtype=torch.float64)
        if images == 1:
            return own_IJ
        shared_I1 = torch.randn(patients, 1, generator=generator, dtype=torch.float64)
        return math.sqrt(ICC) * shared_I1 + math.sqrt(1 - ICC) * own_IJ

    y_IJ = (torch.special.ndtr(noise()) < PREVALENCE).double()
    first_IJ, other_IJ = noise(), noise()
    second_IJ = SHARED_NOISE * first_IJ + math.sqrt(1 - SHARED_NOISE**2) * other_IJ
    p_IJ, q_IJ = probability(first_IJ + shift(auroc) * y_IJ), probability(second_IJ + shift(SECOND) * y_IJ)
    patient_N = torch.arange(patients).repeat_interleave(images)
    return Sample(y_IJ.flatten(), p_IJ.flatten(), q_IJ.flatten(), patient_N)


def measured(metric: str, sample: Sample, seed: int = 0) -> Measured:
    threshold = cut() if metric in metrics.THRESHOLDED else math.nan
    columns = sample.y_N, sample.p_N, sample.patient_N
    return metrics.at_level(metric, *columns, threshold=threshold, replicates=ECE_REPLICATES, seed=seed)


def pooled(samples: Sequence[Sample]) -> Sample:
    """All patients together, none of whom is in two samples."""
    first, patients = samples[0], int(samples[0].patient_N.max()) + 1
    patient_N = torch.cat([sample.patient_N + patients * group for group, sample in enumerate(samples)])
    y_N, p_N, second_N = (torch.cat([sample[column] for sample in samples]) for column in range(3))
    return first._replace(y_N=y_N, p_N=p_N, second_N=second_N, patient_N=patient_N)


def across(
    aurocs: Sequence[float], at: Mapping[str, Sequence[Measured]], overall: Mapping[str, Measured]
) -> Iterator[tuple[str, float, Estimate, bool]]:
    """Name, truth, estimate and whether a group is flagged, of every summary of groups with these AUROC.

    Groups are of one size, one prevalence and the same negatives: the metrics GROUPED of all patients together are the
    means of those of the groups.
    """
    groups = len(aurocs)

    def together(shares: int, all_measured: Iterable[Measured]) -> list[Estimate]:
        """As `agglom.audit` has them, but a report leaves flagged groups out; here they are on trial as well."""
        found = [one(metrics.simultaneous(LEVEL, shares)) for one in all_measured]
        return [one if math.isnan(one.lo) else one._replace(status="ok") for one in found]

    flagged = {name: any(one(LEVEL).status != "ok" for one in at[name]) for name in at}

    def spread(metric: str) -> float:
        true = [truth(metric, auroc) for auroc in aurocs]
        return max(true) - min(true)

    for metric in GROUPED:
        true = [truth(metric, auroc) for auroc in aurocs]
        mean, wide = statistics.fmean(true), together(groups, at[metric])
        everybody, *wider = together(groups + 1, [overall[metric], *at[metric]])
        distance = [abs(value - mean) for value in true]
        found = [
            ("gap", max(true) - min(true), metrics.gap(wide)),
            ("worst", min(true), metrics.worst(metric, wide)),
            ("ratio", min(true) / max(true), disparity.ratio(wide)),
            ("gap to overall", max(distance), disparity.gap_to_overall(everybody, wider)),
        ]
        if metric == "auroc":
            found += [
                ("ES, sum", mean / (1 + sum(distance)), disparity.equity_scaled(everybody, wider, "sum")),
                ("ES, std", mean / (1 + statistics.pstdev(true)), disparity.equity_scaled(everybody, wider, "std")),
            ]
        for name, value, summary in found:
            yield f"{metric} {name}", value, summary.estimate, flagged[metric]
    tpr, fpr = (together(2 * groups, at[metric]) for metric in ("tpr", "fpr"))
    summary = disparity.equalized_odds(tpr, fpr)
    few = flagged["tpr"] or flagged["fpr"]
    yield "equalized odds difference", max(spread("tpr"), spread("fpr")), summary.estimate, few


@torch.inference_mode()
def simulate(design: Design, seed: int, groups: Sequence[int] = GROUPS) -> Design:
    """Fill the tallies of `design`. The same for the same seed."""
    started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)

    def tally(name: str, promise: str, true: float, estimate: Estimate, flagged: bool) -> None:
        design.tallies.setdefault(name, Tally(promise, true)).add(estimate, flagged)

    for repetition in range(design.repetitions):
        kinds = [AUROC] * max(1, *groups) + [WORSE]
        *samples, worse = (draw(design.patients, design.images, auroc, generator) for auroc in kinds)
        y_N, p_N, second_N, patient_N = samples[0]
        for metric in SINGLE:
            found = measured(metric, samples[0], seed + repetition)(LEVEL)
            tally(metric, promised(metric), truth(metric, AUROC), found, found.status != "ok")
        for metric in PAIRED:
            compare = partial(metrics.paired, threshold_a=cut(), threshold_b=cut(), replicates=ECE_REPLICATES)
            found = compare(metric, y_N, p_N, second_N, patient_N, seed=seed + repetition)
            true = truth(metric, AUROC) - truth(metric, SECOND)
            tally(f"{metric}, paired difference", promised(metric), true, found, found.status != "ok")
        at = {metric: [measured(metric, sample) for sample in (*samples, worse)] for metric in (*GROUPED, "fpr")}
        for count in groups:
            for case, first in (("no gap", 0), ("a gap", -1)):
                chosen = [first, *range(1, count)]
                everybody = pooled([(*samples, worse)[index] for index in chosen])
                overall = {metric: measured(metric, everybody) for metric in GROUPED}
                mine = {metric: [found[index] for index in chosen] for metric, found in at.items()}
                for name, true, summary, flagged in across([kinds[index] for index in chosen], mine, overall):
                    tally(f"{name}, {count} groups, {case}", CONSERVATIVE, true, summary, flagged)
    design.seconds = time.perf_counter() - started
    return design


def promised(metric: str) -> str:
    return CONSERVATIVE if metric == "ece" else EXACT


# ── The record ──


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def few(design: Design, tally: Tally) -> bool:
    """Whether most samples are below the minimum of patients, so that nothing is promised."""
    return tally.flagged > design.repetitions / 2


def coverage(designs: Sequence[Design], names: Sequence[str]) -> str:
    """Lines are figures, columns designs; in parentheses where nothing is promised."""
    lines = []
    for name in names:
        cells = [(design, design.tallies[name]) for design in designs]
        shown = [f"({percent(one.share)})" if few(design, one) else percent(one.share) for design, one in cells]
        lines.append([name, number(cells[0][1].truth), cells[0][1].promise, *shown])
    return table(["figure", "truth", "promised", *(design.name for design in designs)], lines)


def flags(designs: Sequence[Design], names: Sequence[str]) -> str:
    """Shares of flagged samples; figures with the same ones share a line."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        shares = tuple(percent(design.tallies[name].flagged / design.repetitions) for design in designs)
        found.setdefault(shares, []).append(name)
    head = ["figures", *(design.name for design in designs)]
    return table(head, [["; ".join(several), *shares] for shares, several in found.items()])


def said(designs: Sequence[Design]) -> list[str]:
    """What the figures say, in sentences."""
    cells = [(design, name, one) for design in designs for name, one in design.tallies.items()]

    def among(cells: Sequence[tuple[Design, str, Tally]], lo: float, hi: float, within: str) -> str:
        """How many cells lie within, the least and the most of them, and what lies outside, how far."""
        if not cells:
            return "no cell"
        least, most = (pick(cells, key=lambda cell: cell[2].share) for pick in (min, max))
        ends = [f"{percent(one.share)} ({name}, {design.name})" for design, name, one in (least, most)]
        chance: list[str] = []
        defects: list[str] = []
        for design, name, one in cells:
            beyond, bound = max((lo - one.share, lo), (one.share - hi, hi))
            if beyond > 1e-9:
                errors = beyond / math.sqrt(max(bound * (1 - bound), 1e-9) / one.measured)
                told = f"{name}, {design.name}: {percent(one.share)}, by {errors:.1f}"
                (chance if errors <= 2 else defects).append(told)
        inside = len(cells) - len(chance) - len(defects)
        text = f"{f'all {inside}' if inside == len(cells) else f'{inside} of {len(cells)}'} cells {within}; "
        text += f"from {ends[0]} to {ends[1]}"
        if chance:
            text += f". Outside by no more than two Monte Carlo errors, as chance may do: {'; '.join(chance)}"
        if defects:
            text += f". Outside by more, which chance does not explain: {'; '.join(defects)}"
        return text

    exact = [cell for cell in cells if cell[2].promise == EXACT]
    enough, sparse = ([cell for cell in exact if few(cell[0], cell[2]) == side] for side in (False, True))
    ece = [cell for cell in cells if cell[1].startswith("ece")]
    rest = [cell for cell in cells if cell[2].promise == CONSERVATIVE and cell not in ece]
    inside, above = (LEVEL - TOLERANCE, LEVEL + TOLERANCE, "in 95 ± 2"), (LEVEL, 1.0, "at 95 or more")
    lines = [f"One group and paired differences, where 95 ± 2 is promised: {among(enough, *inside)}."]
    if sparse:
        lines.append(f"The same where most samples are below the minimum: {among(sparse, *inside)}.")
    lines += [
        f"ECE, conservative because |·| bends at 0: {among(ece, *above)}.",
        *(
            f"{title}, conservative by construction: {among([cell for cell in rest if match in cell[1]], *above)}."
            for title, match in (
                ("Gap between groups", " gap, "),
                ("Worst group", " worst, "),
                ("Ratio of groups", " ratio, "),
                ("Gap to overall", " gap to overall, "),
                ("Equalized odds", "equalized odds "),
                ("ES-AUROC, both forms", " ES, "),
            )
        ),
    ]
    undefined = sum(one.undefined for *_, one in cells)
    lines.append(f"Samples without an interval: {undefined or 'none'}.")
    return lines


def summary(designs: Sequence[Design]) -> str:
    """The sentences and tables."""
    names = [*designs[0].tallies]
    grouped = [name for name in names if " groups, " in name]
    single = [name for name in names if name not in grouped]
    flagged = [*single, *(name for name in grouped if name.endswith("no gap") and (" gap, " in name or "odds" in name))]
    error = [
        max((one.error for one in design.tallies.values() if one.promise == EXACT and not few(design, one)), default=0)
        for design in designs
    ]
    runs = table(
        ["", *(design.name for design in designs)],
        [
            ["repetitions", *(str(design.repetitions) for design in designs)],
            ["largest Monte Carlo error where 95 is promised", *map(percent, error)],
            ["minutes of one core", *(f"{design.seconds / 60:.0f}" for design in designs)],
        ],
    )
    points = "\n".join(f"- {sentence}" for sentence in said(designs))
    return f"""{points}

**Covered, %: one group, and the paired difference of two predictors.** Columns: patients a group × images a patient. \
In parentheses: most samples have fewer than {metrics.MIN_PATIENTS} patients of a class that the metric needs, and \
nothing is promised.

{coverage(designs, single)}

**Covered, %: summaries of groups.** “A gap”: one group is worse, the rest alike.

{coverage(designs, grouped)}

**Repetitions**

{runs}

**Samples with fewer than {metrics.MIN_PATIENTS} patients of a kind that the metric needs, %.** A report shows their \
values and intervals with that status, and leaves such groups out of its summaries.

{flags(designs, flagged)}
"""


def record(designs: Sequence[Design], command: str) -> str:
    """The whole Markdown file."""
    return f"""# Coverage of the 95 % intervals

Written by `{command}` on {os.cpu_count()} CPU cores, no GPU. {versions()}.

Binormal scores with a known AUROC of {AUROC}, of {WORSE} in a worse group and of {SECOND} for a second predictor; \
prevalence {PREVALENCE}; one image a patient, or four with an intra-class correlation of {ICC}, both of the scores and \
of the liability behind the labels. True values are exact. Coverage is of all samples that have an interval, those \
below the minimum of patients included. ECE used {ECE_REPLICATES} bootstrap replicates (a report uses 1,000).

{summary(designs)}"""


# ── Running ──


def part(patients: int, images: int, repetitions: int, seed: int, index: int) -> Design:
    """Part `index` of a cell: draws that no other part or cell has."""
    return simulate(Design(patients, images, repetitions), zlib.crc32(f"{seed} {patients} {images} {index}".encode()))


def finished(path: Path | None, seed: int) -> dict[tuple[int, int, int, int], Design]:
    """The parts with this seed in the file, by their arguments. A line that was cut off counts as not there."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ():
        try:
            raw = json.loads(line)
        except ValueError:
            continue
        if raw.pop("seed") == seed:
            index, tallies = raw.pop("part"), raw.pop("tallies")
            design = Design(**raw, tallies={name: Tally(**one) for name, one in tallies.items()})
            found[design.patients, design.images, design.repetitions, index] = design
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    cli.add_argument("--patients", type=int, nargs="+", default=PATIENTS, help="a group (default 50 200 1000 5000)")
    cli.add_argument("--images", type=int, nargs="+", default=IMAGES, help="a patient (default 1 4)")
    cli.add_argument(
        "--repetitions", type=int, nargs="+", default=[2000], help="one number, or one for each --patients"
    )
    cli.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--parts", type=Path, metavar="FILE", help="keep finished parts there, and go on from them")
    cli.add_argument("--markdown", type=Path, metavar="FILE", help="write the record there")
    options = cli.parse_args()
    if len(options.repetitions) not in (1, len(options.patients)):
        cli.error("--repetitions takes one number, or one for each number of --patients")
    repetitions = options.repetitions * (len(options.patients) // len(options.repetitions))
    sizes = zip(options.patients, repetitions, strict=True)
    todo = [
        (patients, images, min(PART, count - start), start // PART)
        for patients, count in sizes
        for images in options.images
        for start in range(0, count, PART)
    ]
    todo.sort(key=lambda job: job[-1])  # all cells grow together
    done = finished(options.parts, options.seed)
    left = [job for job in todo if job not in done]
    command = " ".join([f"{Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}", *sys.argv[1:]])

    def keep(job: tuple[int, int, int, int], design: Design) -> None:
        if options.parts:
            options.parts.parent.mkdir(parents=True, exist_ok=True)
            with options.parts.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seed": options.seed, "part": job[-1]} | asdict(design)) + "\n")
        done[job] = design

    def tell() -> list[Design]:
        """The cells so far, in the record once each of them has a part."""
        cells = {(patients, images): Design(patients, images, 0) for patients, images, *_ in todo}
        for job in todo:
            if job in done:
                cells[job[:2]].join(done[job])
        if options.markdown and all(cell.repetitions for cell in cells.values()):
            options.markdown.write_text(record([*cells.values()], command), encoding="utf-8")
        return [*cells.values()]

    # Spawned, as a fork of a process whose torch has threads may hang.
    with ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        running = {pool.submit(part, *job[:3], options.seed, job[3]): job for job in left}
        for future in as_completed(running):
            job, design = running[future], future.result()
            keep(job, design)
            tell()
            print(f"{design.name}, part {job[-1]}: {design.repetitions} in {design.seconds:.0f} s", flush=True)
    print(f"\n{summary(tell())}\n{versions()}")


if __name__ == "__main__":
    main()
