"""How often the 95 % intervals of agglom.core.metrics hold the truth, by simulation.

Binormal scores with a known AUROC of .8 (.7 in a worse group, .75 for a second predictor), prevalence .3. Groups have n
patients each, with one image a patient or with four; those have an intra-class correlation of .5, both of the scores
and of the liability behind the labels. True values are exact (integrals over the scores), not estimates.

Intervals of gap, worst and ratio project a simultaneous box: they are conservative, so ≥ 95 % is what they promise.
Coverage is of all samples that have an interval, those that a report would flag as below its minimum included; the
shares of flagged and of undefined samples are in the second table. ECE only up to 1,000 patients a group, with 200
replicates. The default takes about half an hour of one core.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from _common import number, parser, table, versions, write_json
from torch import Tensor

from agglom.core import calibration, disparity, metrics
from agglom.core.metrics import Estimate

LEVEL, PREVALENCE, ICC = 0.95, 0.3, 0.5
AUROC, WORSE, SECOND = 0.8, 0.7, 0.75
SHARED_NOISE = 0.6  # correlation of the two predictors within a class
STRETCH, SHIFT = 1.5, 0.3  # of the calibrated logit, so that scores are overconfident
SINGLE = tuple(metric for metric in metrics.METRICS if metric not in ("ece", "ece_debiased"))
PAIRED, GROUPED = ("auroc", "tpr"), ("auroc", "tpr")
GROUPS, IMAGES, PATIENTS = (2, 8), (1, 4), (50, 200, 1000, 5000)
ECE_PATIENTS, ECE_REPLICATES = 1000, 200
GRID = torch.linspace(-12, 14, 400_001, dtype=torch.float64)


class Sample(NamedTuple):
    """Images of one group: labels, probabilities of two predictors, whose images they are."""

    y_N: Tensor
    p_N: Tensor
    second_N: Tensor
    patient_N: Tensor


@dataclass
class Tally:
    """How a figure fared. `promise` is "95" or, where it is conservative, "≥ 95"; the rest counts samples."""

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


def measure(metric: str, sample: Sample, level: float, seed: int = 0) -> Estimate:
    threshold = cut() if metric in metrics.THRESHOLDED else math.nan
    columns = sample.y_N, sample.p_N, sample.patient_N
    return metrics.evaluate(metric, *columns, threshold=threshold, level=level, replicates=ECE_REPLICATES, seed=seed)


def across(groups: int, samples: Sequence[Sample], worse: Sample) -> Iterator[tuple[str, float, Estimate, bool]]:
    """Name, truth, estimate and whether a group is flagged of gap, worst and ratio, with no true gap and with one."""
    for metric in GROUPED:
        level = metrics.simultaneous(LEVEL, groups)
        alike = [measure(metric, sample, level) for sample in samples[:groups]]
        usual, low = truth(metric, AUROC), truth(metric, WORSE)
        for case, found, least in (
            ("no gap", alike, usual),
            ("a gap", [measure(metric, worse, level), *alike[1:]], low),
        ):
            flagged = any(one.status != "ok" for one in found)
            # A report leaves such groups out; here their intervals are on trial as well.
            usable = [one if math.isnan(one.lo) else one._replace(status="ok") for one in found]
            for name, true, estimate in (
                ("gap", usual - least, metrics.gap(usable).estimate),
                ("worst", least, metrics.worst(metric, usable).estimate),
                ("ratio", least / usual, disparity.ratio(usable).estimate),
            ):
                yield f"{metric} {name}, {groups} groups, {case}", true, estimate, flagged


def simulate(design: Design, seed: int, groups: Sequence[int] = GROUPS) -> Design:
    """Fill the tallies of `design`. The same for the same seed."""
    started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)

    def tally(name: str, promise: str, true: float, estimate: Estimate, flagged: bool) -> None:
        design.tallies.setdefault(name, Tally(promise, true)).add(estimate, flagged)

    single = (*SINGLE, "ece") if design.patients <= ECE_PATIENTS else SINGLE
    for repetition in range(design.repetitions):
        kinds = [AUROC] * max(1, *groups) + [WORSE]
        *samples, worse = (draw(design.patients, design.images, auroc, generator) for auroc in kinds)
        for metric in single:
            found = measure(metric, samples[0], LEVEL, seed=repetition)
            tally(metric, "95", truth(metric, AUROC), found, found.status != "ok")
        y_N, p_N, second_N, patient_N = samples[0]
        for metric in PAIRED:
            found = metrics.paired(metric, y_N, p_N, second_N, patient_N, threshold_a=cut(), threshold_b=cut())
            true = truth(metric, AUROC) - truth(metric, SECOND)
            tally(f"{metric}, paired difference", "95", true, found, found.status != "ok")
        for count in groups:
            for name, true, found, flagged in across(count, samples, worse):
                tally(name, "≥ 95", true, found, flagged)
    design.seconds = time.perf_counter() - started
    return design


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def summary(designs: Sequence[Design]) -> str:
    """Coverage, and the samples that were flagged or undefined."""
    names = list(dict.fromkeys(name for design in designs for name in design.tallies))
    head = [design.name for design in designs]
    covered, flagged = [], []
    for name in names:
        tallies = [design.tallies.get(name) for design in designs]
        known = next(one for one in tallies if one)
        covered.append([name, number(known.truth), known.promise, *(percent(t.share) if t else "–" for t in tallies)])
        # Gap, worst and ratio are of the same groups.
        if known.promise == "95" or name.split(",")[0].endswith(" gap"):
            shares = [t.flagged / d.repetitions if t else math.nan for t, d in zip(tallies, designs, strict=True)]
            flagged.append([name, *map(percent, shares)])
    errors = [max(t.error for t in design.tallies.values() if t.promise == "95") for design in designs]
    covered.append(["repetitions", "", "", *(str(design.repetitions) for design in designs)])
    covered.append(["largest Monte Carlo error of the rows with 95", "", "", *map(percent, errors)])
    undefined = sum(t.undefined for design in designs for t in design.tallies.values())
    return (
        "Covered, % (columns: patients a group × images a patient)\n\n"
        f"{table(['figure', 'truth', 'promised', *head], covered)}\n\n"
        f"Samples with fewer than {metrics.MIN_PATIENTS} patients of a kind that the metric needs, %: a report shows "
        "their values and intervals with that status, and leaves such groups out of gap, worst and ratio\n\n"
        f"{table(['figure', *head], flagged)}\n\nSamples without an interval: {undefined or 'none'}"
    )


def figures(designs: Sequence[Design]) -> list[dict[str, object]]:
    """One entry for each figure of each design."""
    return [
        {"patients": design.patients, "images": design.images, "repetitions": design.repetitions, "figure": name}
        | vars(tally)
        | {"share": tally.share, "error": tally.error}
        for design in designs
        for name, tally in design.tallies.items()
    ]


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--patients", type=int, nargs="+", default=PATIENTS, help="a group (default 50 200 1000 5000)")
    cli.add_argument("--images", type=int, nargs="+", default=IMAGES, help="a patient (default 1 4)")
    cli.add_argument(
        "--repetitions", type=int, nargs="+", default=[2000], help="one number, or one for each --patients"
    )
    cli.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    cli.add_argument("--seed", type=int, default=0)
    options = cli.parse_args()
    if len(options.repetitions) not in (1, len(options.patients)):
        cli.error("--repetitions takes one number, or one for each number of --patients")
    repetitions = options.repetitions * (len(options.patients) // len(options.repetitions))
    sizes = zip(options.patients, repetitions, strict=True)
    todo = [Design(patients, images, count) for patients, count in sizes for images in options.images]
    designs = []
    # Spawned, as a fork of a process whose torch has threads may hang.
    with ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        for design in pool.map(simulate, todo, itertools.repeat(options.seed)):
            print(f"{design.name}: {design.repetitions} repetitions in {design.seconds:.0f} s", flush=True)
            designs.append(design)
            write_json(options.json, {"versions": versions(), "seed": options.seed, "figures": figures(designs)})
    print(f"\n{summary(designs)}\n\n{versions()}")


if __name__ == "__main__":
    main()
