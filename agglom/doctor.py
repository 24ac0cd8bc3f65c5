"""What the teachers of a job are like, before a step is trained, and which of them serves whom: `check --doctor`.

Everything is measured on the images of the job's manifest. Whatever a stage report measures as well, it measures here
by the same code, so the numbers are equal.

Suffixes: N images, D width, B batch.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from agglom import curriculum, evaluate, findings, hosting, licences, plan, report, targets
from agglom.assemble import Run, assemble, batches
from agglom.core import diagnosis
from agglom.core.heads import resample
from agglom.core.normalise import Moments
from agglom.core.types import Batch, Features, Teacher
from agglom.engine import launched
from agglom.errors import PluginError
from agglom.job import Job, Side, Size, pair, side
from agglom.reading import MAIN, Reading
from agglom.report import GroupReport
from agglom.runtime import StopRequest
from agglom.survey import Survey, survey
from agglom.targets import Normaliser

STAGE = "doctor"
# Held-out images whose patches are looked at, and those that are encoded once more at every size.
PATCH_IMAGES, SIZE_IMAGES = 256, 64
# Batches timed after one that is not.
TIMED = 3
# Sizes relative to that of the evaluation, where the job names none.
SCALES = (0.5, 1.0, 1.5)
ON_CPU = "on the CPU, peak memory of a call is not known"


def main(job: Job, base: Path, out: Path | None) -> str:
    """Examine the teachers of a job in this process; the text, which with `out` is written there as doctor.md.

    doctor.json beside it is a report of stage "doctor" (`report.GroupReport`): `rows` are those of the teachers' stage
    that the map is made of, the main metric of each label by group (linear readout) and `leakage`. `context["doctor"]`:

    - `size`: of the images, as in the configuration; `device`, `split`, the headline split of the map;
    - `teachers`: by name a dict `kind`, `fingerprint`, `licence`, `commercial` (bool, null: its licence does not tell),
      `source` and `revision` of its weights, `from` (the teacher it is derived from, or null), `serves` (dict
      attribute, groups, or null), `input` (px at that size), `pinned` (whether at any size), and

      - `summary`, `patches`: null, or a dict `width`, `n_images`, `rms` (of raw features), `effective_rank`; a summary
        also `dispersion` (E[Θ²] about the mean direction, radians², that of its normaliser); patches also `grid`,
        `high_norm_share` and `largest_norm` (`diagnosis.high_norm`). Summaries are those of the train images that the
        probes are fitted on, patches those of at most `PATCH_IMAGES` held-out images; of a specialist, among those that
        it serves;
      - `sizes`: list of dicts `size`, `input`, `status` and, against the first one's size, on `SIZE_IMAGES` held-out
        images, `summary_cosine`, `summary_cka` and `patches_cosine` (on the coarser grid), see `diagnosis`. Status:
        "reference", "ok", "pinned" (its input has one size, to which images of any other are scaled), "same" (the
        input has the size that it has at the reference), or what the teacher said when it refused the size. The
        reference has no numbers, nor has what was refused;
      - `cost`: `images_per_s` (a batch of `evaluate.batch`; of a derived teacher, beyond its source), `weights_mib`
        (of its module), `peak_mib` (allocated on the accelerator during a call, beyond what lay there before; null on
        the CPU, whose allocator keeps no account, and `note` says so);

    - `map`: list of dicts `label`, `attribute`, `group` and `best`, the teacher that validation patients put first.

    With `out`, the features lie there for `distill` into the same folder. Where students teach later students, the
    teachers are those of the first one. Raises what `assemble` and `survey` raise.
    """
    asked = job.evaluate.sizes
    quick = replace(job.evaluate, leakage=True, scarcity=(), holdout=(), prompts={}, permutations=0, sizes=())
    with (
        launched() as world,
        StopRequest().listening(world.has_launcher) as stop,
        nullcontext(out) if out else TemporaryDirectory() as folder,
    ):
        leg = curriculum.legs(replace(job, evaluate=quick), Path(folder))[0]
        run = assemble(leg.job, base, leg.out, world, stop)
        surveyed, normalisers = survey(run, prompted=False)
        surveyed = cast(Survey, surveyed)
        measured = evaluate.evaluate(run, surveyed, normalisers, evaluate.TEACHERS_STAGE, None)
        found = examined(run, surveyed, normalisers, cast(evaluate.Evaluation, measured).report, asked)
        later = [name for name in job.teachers if name not in run.teachers]
        if later:
            found.context["notes"].append(f"Not there yet, so not examined: {findings.listed(later)}.")
        text = render(found)
        if out:
            report.put(out / "doctor.json", report.to_json(found))
            report.put(out / "doctor.md", text)
    return text


def examined(
    run: Run, surveyed: Survey, normalisers: Mapping[str, Normaliser], stage: GroupReport, sizes: Sequence[Side]
) -> GroupReport:
    """What is said of the teachers, given the report of their stage; `sizes` are those to look at besides."""
    rows = [
        row | {"stage": STAGE}
        for row in stage.rows
        if row["metric"] == "leakage"
        or (row["metric"] in MAIN and row["readout"] == "linear" and row["predictor"].startswith("teacher/"))
    ]
    at_sizes = _sizes(run, surveyed, sizes)
    teachers = {
        name: _identity(run, name)
        | _features(run, surveyed, name, normalisers[name])
        | {"sizes": at_sizes[name], "cost": _cost(run, surveyed, name)}
        for name in run.teachers
    }
    reading = GroupReport(STAGE, rows, stage.context).reading
    serving = [
        {"label": label, "attribute": place[0], "group": place[1], "best": reading.best_teacher(label, place)}
        for label in reading.labels
        for place in reading.places
    ]
    doctor = {
        "size": side(run.plan.evaluate_size),
        "device": run.world.device.type,
        "split": reading.split,
        "teachers": teachers,
        "map": serving,
    }
    kept = ("name", "split", "groups", "simulated", "labels", "classes", "min_support", "manifest", "seed", "notes")
    context = {"index": 0} | {key: stage.context[key] for key in kept} | {"doctor": doctor}
    return GroupReport(STAGE, rows, context)


# ── One teacher ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _identity(run: Run, name: str) -> dict[str, Any]:
    teacher = run.teachers[name]
    serves = teacher.serves
    return {
        "kind": run.job.teachers[name].kind,
        **hosting.facts(teacher),
        "commercial": licences.commercial_use(teacher.licence),
        "from": None if teacher.derived is None else teacher.derived.source,
        "serves": None if serves is None else {"attribute": serves.attribute, "groups": serves.groups},
        "input": side(targets.input_size(teacher.pixels, run.plan.evaluate_size)),
        "pinned": teacher.pixels.size is not None,
    }


def _features(run: Run, surveyed: Survey, name: str, normaliser: Normaliser) -> dict[str, Any]:
    """Of the two kinds of raw features, on the images that the teacher serves."""
    pool, summary, patches = surveyed.pools[name], None, None
    served = np.flatnonzero(run.served[name]) if name in run.served else np.arange(len(run.manifest))
    if pool.summary_ND is not None:
        train_N = np.isin(surveyed.rows_N, np.intersect1d(run.manifest.rows("train"), served))
        summary_ND = pool.summary_ND[torch.as_tensor(train_N)]
        summary = _spread(summary_ND) | {"n_images": len(summary_ND), "dispersion": normaliser.dispersion}
    if pool.patches_MND is not None:
        mine_M = torch.as_tensor(np.flatnonzero(np.isin(surveyed.held_M, served)))
        few_M = mine_M[_spaced(len(mine_M), PATCH_IMAGES)]
        patches_ND = pool.patches_MND[few_M].flatten(0, 1)
        share, largest = diagnosis.high_norm(patches_ND.norm(dim=1))
        patches = _spread(patches_ND) | {"n_images": len(few_M), "grid": pool.grid}
        patches |= {"high_norm_share": share, "largest_norm": largest}
    return {"summary": summary, "patches": patches}


def _spread(x_ND: Tensor) -> dict[str, Any]:
    moments = Moments.empty(x_ND.shape[1])
    for part_ND in x_ND.split(4096):
        moments = moments.update(part_ND)
    return {
        "width": x_ND.shape[1],
        "rms": diagnosis.rms(moments),
        "effective_rank": diagnosis.effective_rank(moments),
    }


def _spaced(total: int, most: int) -> Tensor:
    """At most so many of them, evenly spaced."""
    return torch.linspace(0, total - 1, min(total, most)).round().long()


# ── Cost ──


def _cost(run: Run, surveyed: Survey, name: str) -> dict[str, Any]:
    teacher, device = run.teachers[name], run.world.device
    pixels_BCHW = _pixels(run, surveyed.held_M[: run.job.evaluate.batch], run.plan.evaluate_size)
    weights = itertools.chain(teacher.module.parameters(), teacher.module.buffers())
    seconds, peak = _timed(_call(run.teachers, name, pixels_BCHW), device)
    return {
        "images_per_s": len(pixels_BCHW) / seconds,
        "weights_mib": sum(one.numel() * one.element_size() for one in weights) / 2**20,
        "peak_mib": peak,
        "note": "" if peak is not None else ON_CPU,
    }


def _call(teachers: Mapping[str, Teacher], name: str, pixels_BCHW: Tensor) -> Callable[[], Any]:
    """One forward of a batch; of a derived teacher on the features of its source."""
    derived = teachers[name].derived
    if derived is None:
        return lambda: targets.encode(teachers, [name], pixels_BCHW)
    features = targets.encode(teachers, [derived.source], pixels_BCHW)[derived.source]
    return lambda: derived.derive(features)


@torch.no_grad()
def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
    """Median seconds of a call, and the MiB that it allocates at its peak on an accelerator."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(1 + TIMED):
        started = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if on_gpu else None
    return statistics.median(seconds[1:]), peak


# ── Resolution ──


def _pixels(run: Run, rows: np.ndarray, size: Size) -> Tensor:
    """Clean views of these rows, at `size`, on the device."""
    parts = [cast(Batch, batch).pixels_BCHW for _, batch in batches(run, rows, size)]
    return torch.cat(parts).to(run.world.device)


def _sizes(run: Run, surveyed: Survey, sizes: Sequence[Side]) -> dict[str, list[dict[str, Any]]]:
    """By teacher, how its features at other sizes agree with those at the size of the evaluation."""
    first = run.plan.evaluate_size
    scaled = [(max(1, round(scale * first[0])), max(1, round(scale * first[1]))) for scale in SCALES]
    asked = [pair(size) for size in sizes] or scaled
    few_M = _spaced(len(surveyed.held_M), SIZE_IMAGES)
    at = torch.as_tensor(np.searchsorted(surveyed.rows_N, surveyed.held_M[few_M.numpy()]))
    reference = {
        name: Features(
            None if pool.summary_ND is None else pool.summary_ND[at],
            None if pool.patches_MND is None else pool.patches_MND[few_M],
            pool.grid,
        )
        for name, pool in surveyed.pools.items()
    }
    seen = {
        name: {size: targets.input_size(teacher.pixels, size) for size in (first, *asked)}
        for name, teacher in run.teachers.items()
    }
    found: dict[str, list[dict[str, Any]]] = {
        name: [{"size": side(first), "input": side(seen[name][first]), "status": "reference"}] for name in run.teachers
    }
    families: dict[str, list[str]] = {}
    for name in run.teachers:
        families.setdefault(targets.root(run.teachers, name), []).append(name)
    for size, (root, family) in itertools.product(dict.fromkeys(asked), families.items()):
        if size == first:
            continue
        pinned, same = run.teachers[root].pixels.size is not None, seen[root][size] == seen[root][first]
        status = "ok" if not same else "pinned" if pinned else "same"
        ones: dict[str, dict[str, Any]] = {
            name: {"size": side(size), "input": side(seen[name][size]), "status": status} for name in family
        }
        try:
            features = _encoded(run, family, surveyed.held_M[few_M.numpy()], size)
            ones = {name: one | _agreement(features[name], reference[name]) for name, one in ones.items()}
        except (PluginError, ValueError, RuntimeError, AssertionError) as error:
            status = f"refused: {str(error).splitlines()[0]}"
            ones = {name: one | {"status": status} for name, one in ones.items()}
        for name, one in ones.items():
            found[name].append(one)
    return found


def _encoded(run: Run, names: Sequence[str], rows: np.ndarray, size: Size) -> dict[str, Features]:
    parts: dict[str, list[Features]] = {name: [] for name in names}
    for _, batch in batches(run, rows, size):
        pixels_BCHW = cast(Batch, batch).pixels_BCHW.to(run.world.device)
        for name, features in targets.encode(run.teachers, names, pixels_BCHW).items():
            parts[name].append(features)
    return {
        name: Features(_joined(f.summary_BD for f in found), _joined(f.patches_BND for f in found), found[0].grid)
        for name, found in parts.items()
    }


def _joined(parts: Iterable[Tensor | None]) -> Tensor | None:
    found = [part.float().cpu() for part in parts if part is not None]
    return torch.cat(found) if found else None


def _agreement(one: Features, other: Features) -> dict[str, float]:
    found = {}
    if one.summary_BD is not None and other.summary_BD is not None:
        found["summary_cosine"] = diagnosis.centred_cosine(one.summary_BD, other.summary_BD)
        found["summary_cka"] = diagnosis.linear_cka(one.summary_BD, other.summary_BD)
    if one.patches_BND is not None and other.patches_BND is not None:
        grid = min(one.grid[0], other.grid[0]), min(one.grid[1], other.grid[1])
        both_ND = (
            resample(f.patches_BND, f.grid, grid).flatten(0, 1) for f in (one, other) if f.patches_BND is not None
        )
        found["patches_cosine"] = diagnosis.centred_cosine(*both_ND)
    return found


# ── In words ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NO_LABEL = "There are no labels that a probe could be fitted for, so nobody can say which teacher serves whom."
SERVES = """\
AUROC of a linear probe on each teacher, fitted on train patients. **Bold**: the teacher that validation patients put
first; it need not read highest here, and where intervals overlap much, these patients cannot tell. Why a teacher has
dashes alone stands at the end."""
READS = """\
AUROC with which a linear probe, {fitted}, tells a group from all others by a teacher's features: 0.5 is chance. What
can be read need not be used."""
FEATURES = """\
Scale: root mean square of the raw features. Effective rank: exp of the entropy of the centred singular values (RankMe).
Dispersion: mean squared angle to the mean direction, in radians², by which the angular loss is divided. High norm: the
share of patch tokens with more than {factor:g} times the median norm; beside it the largest norm by the median. Of a
specialist all is of the images that it serves."""
SIZES = """\
How the features of the same images agree with those at the first size: cosine after centring, CKA without the bias of
few images. At “pinned” and “same” the teacher's input keeps its size: smaller images are enlarged to it, larger ones
reduced, and what they lack or lose by that changes its features."""
COSTS = """\
Images per second of one batch, on {device}; of a derived teacher, beyond its source. Weights: of its module; peak: what
a call allocates beyond what lay on the accelerator. {licence}."""


def render(found: GroupReport) -> str:
    """The Markdown of doctor.md, which reads well in a terminal, too."""
    doctor, reading = found.context["doctor"], found.reading
    teachers = doctor["teachers"]
    given = {name: one["licence"] for name, one in teachers.items()}
    licence = licences.sentence(given)
    parts = [
        "# The teachers, before a step is trained",
        f"Images at {_size(doctor['size'])} px. Probes: {reading.split} split, intervals are 95 %.",
        "## Which teacher serves whom",
        *(_map(reading, teachers) if reading.labels else [NO_LABEL]),
        "## What a linear probe reads of the patients",
        *_reads(reading),
        "## Features",
        _table(
            ("teacher", "tokens", "width", "scale", "effective rank", "dispersion", "high norm", "images"),
            [_feature_line(name, kind, one[kind]) for name, one in teachers.items() for kind in KINDS if one[kind]],
        ),
        FEATURES.format(factor=diagnosis.HIGH_NORM),
        "## Other sizes",
        _table(
            ("teacher", "size", "sees", "summary, cosine", "summary, CKA", "patches, cosine", ""),
            [_size_line(name, at) for name, one in teachers.items() for at in one["sizes"]],
        ),
        SIZES,
        "## Cost and origin",
        _table(
            ("teacher", "kind", "images/s", "weights, MiB", "peak, MiB", "licence", "source", "serves"),
            [_origin_line(name, one) for name, one in teachers.items()],
        ),
        COSTS.format(device=doctor["device"], licence=licence[0].upper() + licence[1:]),
        "## What this cannot say",
        "\n".join(
            f"- {report.markdown(text)}" for text in [*findings.limits(reading, found.context), *_unmeasured(doctor)]
        ),
    ]
    return "\n\n".join(parts) + "\n"


KINDS = ("summary", "patches")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(plan.table(head, lines))


def _map(reading: Reading, teachers: Mapping[str, Any]) -> Iterator[str]:
    """A table a label: a line a group, a column a teacher."""
    for label in reading.labels:
        lines, best_of = [], dict[str, list[str]]()
        for place in reading.places:
            rows = {name: reading.level(label, f"teacher/{name}", place) for name in teachers}
            first = next((row for row in rows.values() if row), None)
            if first is None:
                continue
            best, title = reading.best_teacher(label, place), reading.title(place)
            best = best if best and not first["weak"] else None
            cells = [_marked(findings.estimate(row), name == best) for name, row in rows.items()]
            lines.append([report.markdown(title), *cells, findings.support(first), first["why"]])
            if best:
                best_of.setdefault(best, []).append(title)
        told = "; ".join(f"{name} in {findings.listed(titles)}" for name, titles in best_of.items())
        yield f"`{label}`, {reading.measure(label)}: " + (f"first is {told}." if told else "no group is large enough.")
        yield _table(("group", *teachers, "patients", ""), lines)
    yield SERVES


def _marked(text: str, best: bool) -> str:
    return f"**{text}**" if best and text != "–" else text


def _reads(reading: Reading) -> Iterator[str]:
    rows = {(row["attribute"], row["group"], row["predictor"]): row for row in reading.studies}
    lines = []
    for place in dict.fromkeys((row["attribute"], row["group"]) for row in reading.studies):
        mine = [rows.get((*place, f"teacher/{name}")) for name in reading.teachers]
        first = next(row for row in mine if row)
        told = [report.markdown(reading.title(place)), *map(findings.estimate, mine)]
        lines.append([*told, findings.support(first), first["why"]])
    if lines:
        yield _table(("group", *reading.teachers, "patients", ""), lines)
        yield READS.format(fitted=findings.leakage_fit(reading))
    else:
        yield "The job names no groups (data.groups)."


def _feature_line(name: str, kind: str, one: Mapping[str, Any]) -> list[str]:
    norms = "–"
    if kind == "patches" and one["high_norm_share"] is not None:
        norms = f"{100 * one['high_norm_share']:.2g} %, to {one['largest_norm']:.1f}"
    dispersion = findings.number(one.get("dispersion"))
    rank = "–" if one["effective_rank"] is None else f"{one['effective_rank']:.1f}"
    scale = "–" if one["rms"] is None else f"{one['rms']:#.3g}"
    return [name, kind, str(one["width"]), scale, rank, dispersion, norms, f"{one['n_images']:,}"]


def _size_line(name: str, at: Mapping[str, Any]) -> list[str]:
    numbers = [findings.number(at.get(key)) for key in ("summary_cosine", "summary_cka", "patches_cosine")]
    status = "" if at["status"] == "ok" else report.markdown(at["status"])
    return [name, _size(at["size"]), _size(at["input"]), *numbers, status]


def _origin_line(name: str, one: Mapping[str, Any]) -> list[str]:
    cost, serves = one["cost"], one["serves"]
    peak = "–" if cost["peak_mib"] is None else f"{cost['peak_mib']:.1f}"
    origin = (
        f"from {one['from']}" if one["from"] else one["source"] + (f"@{one['revision']}" if one["revision"] else "")
    )
    whom = "everybody" if serves is None else f"{serves['attribute']}: {', '.join(serves['groups'])}"
    measured = [f"{cost['images_per_s']:.0f}", f"{cost['weights_mib']:.1f}", peak]
    return [name, one["kind"], *measured, *map(report.markdown, (one["licence"], origin, whom))]


def _size(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else "×".join(map(str, size))


def _unmeasured(doctor: Mapping[str, Any]) -> Iterator[str]:
    notes = dict.fromkeys(one["cost"]["note"] for one in doctor["teachers"].values())
    yield from (f"{note[0].upper()}{note[1:]}." for note in notes if note)
    if notes:
        yield "Images per second are those of this machine while this ran."
