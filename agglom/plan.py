"""What a job will do, before anything is touched: steps, batches, groups and their support. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agglom import config, curriculum, licences
from agglom.errors import ConfigError
from agglom.job import Job, Size, Views, duration, pair, show_size
from agglom.yamls import one_of

if TYPE_CHECKING:
    from agglom.data.manifest import Manifest

# PHI-S whitens with a covariance; below this many images its small eigenvalues are mostly noise (DATA.md).
NORMALISER_IMAGES = 3000
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ResolvedStage:
    """A stage in optimizer steps; `first_step` counts from the start of the run, `teachers` is never empty.

    One of `sizes`, each (height, width), is drawn for each step; `size` is one of them, that of the evaluation.
    """

    name: str
    index: int
    first_step: int
    steps: int
    warmup_steps: int
    size: Size
    sizes: tuple[Size, ...]
    teachers: tuple[str, ...]
    lr: float
    lr_end: float
    trunk_lr_scale: float
    views: Views | None


@dataclass(frozen=True)
class Plan:
    """`micro` images per rank and accumulation step make `global_batch`; intervals are in optimizer steps."""

    stages: tuple[ResolvedStage, ...]
    world: int
    micro: int
    global_batch: int
    total_steps: int
    log_every: int
    checkpoint_every: int
    evaluate_size: Size
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Support:
    """How many images and patients a group has in a split; group None: not annotated."""

    attribute: str
    group: str | None
    split: str
    images: int
    patients: int


def resolve(job: Job, base: Path, world: int, manifest: Manifest) -> Plan:
    """Turn durations into steps and the batch into its parts.

    Raises ConfigError where the batch does not divide over `world` ranks, DeepSpeed's keys contradict agglom's, or a
    warm-up is longer than its stage, or nobody is annotated with the group that is balanced or that views are of.
    """
    config.deepspeed(job, world)
    if job.balance.group and not any(len(rows) for rows in manifest.view(job.balance.group).members.values()):
        raise ConfigError(
            f"balance.group: nobody is annotated with {job.balance.group!r} in {manifest.path}; "
            "choose another attribute, or balance.kind: uniform without a group"
        )
    if (name := job.loss.moments_by) and not any(len(rows) for rows in manifest.view(name).members.values()):
        raise ConfigError(
            f"loss.moments_by: nobody is annotated with {name!r} in {manifest.path}; choose another attribute, or null"
        )
    batch, samples = job.optim.batch, len(manifest.rows("train"))
    stages: list[ResolvedStage] = []
    first_step = 0
    for index, stage in enumerate(job.stages):
        steps = duration(stage.length, batch=batch, samples=samples)
        warmup = duration(stage.warmup, batch=batch, samples=samples, total_steps=steps)
        if warmup > steps:
            raise ConfigError(
                f"stages[{index}].warmup: {stage.warmup!r} is {warmup} steps, longer than the stage "
                f"({stage.length} = {steps} steps); shorten it"
            )
        teachers = stage.teachers or tuple(job.teachers)
        rates = stage.lr, stage.lr_end, stage.trunk_lr_scale
        for name, groups in stage.views.groups.items() if stage.views else ():
            check_groups(f"stages[{index}].views.groups.{name}", name, groups, manifest)
        sizes = tuple(map(pair, stage.sizes or (stage.size,)))
        lengths = index, first_step, steps, warmup
        stages.append(ResolvedStage(stage.name, *lengths, pair(stage.size), sizes, teachers, *rates, stage.views))
        first_step += steps

    def interval(text: str) -> int:
        return max(1, duration(text, batch=batch, samples=samples, total_steps=first_step))

    return Plan(
        stages=tuple(stages),
        world=world,
        micro=config.micro_batch(job, world),
        global_batch=batch,
        total_steps=first_step,
        log_every=interval(job.log.every),
        checkpoint_every=interval(job.log.checkpoint),
        evaluate_size=pair(job.evaluate.size or job.stages[-1].size),
        warnings=tuple(_warnings(job, manifest)),
    )


def check_groups(key: str, attribute: str, groups: Sequence[str], manifest: Manifest) -> None:
    """The groups of an attribute exist, and train images are of each. Raises ConfigError that names the key."""
    members = manifest.view(attribute).members
    for index, group in enumerate(groups):
        if group not in members:
            raise ConfigError(f"{key}[{index}]: {one_of(group, list(members), f'values of {attribute}')}")
        if not (manifest.split_N[members[group]] == "train").any():
            raise ConfigError(f"{key}[{index}]: {group!r} has no train image in {manifest.path}; name a group that has")


def document(job: Job, base: Path, world: int, manifest: Manifest) -> str:
    """The plan of every leg of a job as Markdown. Raises ConfigError as `resolve`."""
    legs = curriculum.parts(job)
    texts = [render(resolve(leg, base, world, manifest), leg, manifest) for leg in legs]
    if len(legs) == 1:
        return texts[0]
    ends = [leg.stages[-1].name for leg in legs]
    titles = [f"# Plan of student {number} of {len(legs)}, until stage {end}" for number, end in enumerate(ends, 1)]
    return "\n".join(title + text.removeprefix("# Plan") for title, text in zip(titles, texts, strict=True))


def support(manifest: Manifest, names: Sequence[str]) -> list[Support]:
    """Counts per split of every group of the attributes and crossings in `names`, in the order of `Manifest.view`."""
    found = []
    for name in names:
        view = manifest.view(name)
        for split in SPLITS:
            for group, rows in (*view.members.items(), (None, view.unknown)):
                mine = rows[manifest.split_N[rows] == split]
                patients = len(np.unique(manifest.patient_N[mine]))
                found.append(Support(name, group, split, len(mine), patients))
    return found


def count(n: int, noun: str) -> str:
    """A number with its noun: 1 rank, 2 ranks."""
    return f"{n} {noun}{'s' * (n != 1)}"


def _names(job: Job) -> list[str]:
    return list(dict.fromkeys([*job.data.groups, *([job.balance.group] if job.balance.group else [])]))


def _warnings(job: Job, manifest: Manifest) -> Iterator[str]:
    train = len(manifest.rows("train"))
    fitted = min(train, job.loss.fit_images)
    if job.loss.normaliser != "none" and fitted < NORMALISER_IMAGES:
        yield (
            f"the normaliser is fitted on {fitted} images; below {NORMALISER_IMAGES} it fits the noise of small "
            "directions, too (loss.fit_images, or more train images)"
        )
    split = manifest.headline
    if split == "val":
        yield "there are no test rows: the report is on val, whose patients also set thresholds and regularisation"
    if not job.data.labels:
        yield "there are no labels: the evaluation reports variance unexplained only, no AUROC"
    for label, label_N in zip(manifest.labels, manifest.label_NL[manifest.split_N == "train"].T, strict=True):
        positive, negative = int((label_N == 1).sum()), int((label_N == 0).sum())
        if not (positive and negative):
            yield f"label {label}: train has {positive} positive and {negative} negative images, so no probe is fitted"
    if not job.data.groups:
        yield "data.groups is empty: the report has no groups"
    counts = support(manifest, _names(job))
    small = [c for c in counts if c.group and c.split == split and c.patients < job.data.min_support]
    if small:
        listed = ", ".join(f"{c.attribute} {c.group} ({c.patients})" for c in small)
        yield f"fewer than {job.data.min_support} {split} patients, so no interval is promised for: {listed}"
    if job.balance.group:
        unseen = [c.group for c in counts if c.attribute == job.balance.group and c.split == "train" and not c.images]
        if absent := [group for group in unseen if group]:
            yield f"balance.group: no train image of {job.balance.group} {', '.join(absent)}; no weight can help there"
    if job.optim.batch > train:
        yield f"optim.batch {job.optim.batch} exceeds the {train} train images: a batch holds images more than once"


def render(plan: Plan, job: Job, manifest: Manifest) -> str:
    """The plan as Markdown: stages, batch, work, groups with their support, warnings."""
    sizes = {split: len(manifest.rows(split)) for split in SPLITS}
    parts = (plan.micro, "image"), (job.optim.accumulate, "accumulation step"), (plan.world, "rank")
    per_rank = " × ".join(count(n, noun) for n, noun in parts)
    lines = [
        "# Plan",
        "",
        f"- images: {', '.join(f'{count} {split}' for split, count in sizes.items())} "
        f"({len(manifest.patients)} patients); manifest {manifest.path}",
        f"- teachers: {', '.join(f'{name} ({spec.kind})' for name, spec in job.teachers.items())}",
        f"- student: {job.student.kind} {job.student.options.get('model', '')}".rstrip(),
        f"- global batch {plan.global_batch} = {per_rank}; {job.engine.precision}, ZeRO {job.engine.zero}",
        f"- {plan.total_steps} steps, {plan.total_steps * plan.global_batch} images seen; a line every "
        f"{plan.log_every} steps, a checkpoint every {plan.checkpoint_every}, {job.log.keep} kept",
        f"- weights: {job.balance.kind}" + (f" over {job.balance.over}" if job.balance.over else ""),
        *_fairness(job),
        *_prompts(job),
        *licences.planned(job),
        "",
        "## Stages",
        "",
        *table(
            ("stage", "steps", "warm-up", "px", "lr", "epochs", "teachers", "pixels of a micro-batch"),
            [
                (
                    stage.name,
                    stage.steps,
                    stage.warmup_steps,
                    ", ".join(map(show_size, stage.sizes)),
                    f"{stage.lr:g} → {stage.lr_end:g}"
                    + (f", trunk × {stage.trunk_lr_scale:g}" if stage.trunk_lr_scale != 1 else ""),
                    f"{stage.steps * plan.global_batch / max(1, sizes['train']):.1f}",
                    ", ".join(stage.teachers),
                    f"{plan.micro * 3 * max(h * w for h, w in stage.sizes) * 4 / 2**20:.1f} MiB",
                )
                for stage in plan.stages
            ],
        ),
        "",
        "## Images encoded by each teacher",
        "",
        *table(("teacher", "in training", "in evaluation, at most"), _forwards(plan, job, sizes)),
        "",
        f"The evaluation runs at {show_size(plan.evaluate_size)} px before the first stage (teachers) and after each "
        "(student).",
        *_views(plan),
        *_sizes(plan, job),
    ]
    if names := _names(job):
        counts = {(c.attribute, c.group, c.split): c for c in support(manifest, names)}
        split = manifest.headline
        rows = []
        for attribute, group in dict.fromkeys((attribute, group) for attribute, group, _ in counts):
            cells = [counts[attribute, group, name] for name in SPLITS]
            if group is None and not any(cell.images for cell in cells):
                continue
            few = group is not None and counts[attribute, group, split].patients < job.data.min_support
            remark = f"below {job.data.min_support} {split} patients" if few else ""
            shown = [f"{cell.images} ({cell.patients})" for cell in cells]
            rows.append((attribute.replace("*", "\\*"), (group or "not annotated").replace("|", "\\|"), *shown, remark))
        lines += ["", "## Groups: images (patients)", "", *table(("attribute", "group", *SPLITS, ""), rows)]
    if plan.warnings:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in plan.warnings)]
    return "\n".join(lines) + "\n"


def _fairness(job: Job) -> Iterator[str]:
    if proxies := job.balance.proxies:
        images = f"images without {job.balance.group}" if job.balance.group else "all images"
        yield (
            f"- groups of {images}: {proxies.clusters} clusters of the summaries of {proxies.teacher}, the best of "
            f"{proxies.seeds} fits by k-means"
        )
    if power := job.balance.resample:
        yield f"- images: drawn with replacement, a group of share p with one ∝ p^{1 - power:g}"
    if mfd := job.loss.mfd:
        of = mfd.teacher or "all teachers"
        yield f"- MFD of {mfd.label} over {job.balance.group}: {mfd.weight:g} × that of the summaries of {of}"


def _views(plan: Plan) -> list[str]:
    told = []
    for stage in plan.stages:
        if views := stage.views:
            among = " or ".join(f"{name} {group}" for name, groups in views.groups.items() for group in groups)
            kinds = ", ".join(f"{kind} {strength:g}" for kind, strength in asdict(views.kinds).items() if strength)
            told.append(
                f"In stage {stage.name} the student sees {100 * views.share:g} % of {among or 'all'} images under a "
                f"simulated acquisition, at most: {kinds}. Teachers see the clean image, as evaluations do."
            )
    return told


def _sizes(plan: Plan, job: Job) -> list[str]:
    told = []
    if swept := sweep_sizes(plan, job):
        told.append(f"There it also looks at the held-out sample at {', '.join(map(show_size, swept))} px.")
    if any(len(stage.sizes) > 1 for stage in plan.stages):
        told.append("Where a stage has several sizes, one is drawn for each step, the same for all teachers.")
    if any(
        height != width for height, width in (*swept, plan.evaluate_size, *(s for p in plan.stages for s in p.sizes))
    ):
        told.append("Sizes are height × width.")
    return told


def sweep_sizes(plan: Plan, job: Job) -> list[Size]:
    """From small to large, that of the evaluation among them; none where no sweep is asked for."""
    asked = set(map(pair, job.evaluate.sizes))
    return sorted(asked | {plan.evaluate_size}, key=lambda size: (size[0] * size[1], size)) if asked else []


def _prompts(job: Job) -> list[str]:
    evaluate = job.evaluate
    if not evaluate.prompts:
        return []
    through = evaluate.prompted_by or "the first teacher with a text tower"
    return [f"- zero-shot prompts: {', '.join(evaluate.prompts)}; the student is read through {through}"]


def _forwards(plan: Plan, job: Job, sizes: dict[str, int]) -> list[tuple[str, object, object]]:
    """Images per teacher; one that others derive from is encoded wherever they are, and they cost nothing more."""
    evaluated = min(sizes["train"], max(job.evaluate.probe_images, job.loss.fit_images)) + sizes["val"] + sizes["test"]
    # The sweep keeps no features: after each stage it encodes its held-out sample again, its train sample once.
    train, *held = (min(sizes[split], job.evaluate.fvu_images) for split in SPLITS)
    evaluated += len(sweep_sizes(plan, job)) * (train + (1 + len(plan.stages)) * sum(held))

    def root(name: str) -> str:
        source = job.teachers[name].source
        return name if source is None else root(source)

    proxies = job.balance.proxies
    rows: list[tuple[str, object, object]] = []
    for name, spec in job.teachers.items():
        if spec.source is not None:
            rows.append((name, f"from {spec.source}", f"from {spec.source}"))
            continue
        active = [stage for stage in plan.stages if name in {root(teacher) for teacher in stage.teachers}]
        refits = sum(job.loss.refit == "stage" and stage.size != plan.evaluate_size for stage in active)
        fitted = refits * min(sizes["train"], job.loss.fit_images)
        # Images that the survey leaves out are encoded for their cluster.
        fitted += max(0, sizes["train"] - job.evaluate.probe_images) if proxies and name == root(proxies.teacher) else 0
        rows.append((name, sum(stage.steps for stage in active) * plan.global_batch, evaluated + fitted))
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table, aligned so that it also reads well in a terminal."""
    cells = [tuple(header), *(tuple(map(str, row)) for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
