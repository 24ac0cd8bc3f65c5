"""What no single field of a job can know: every problem of a well-shaped job, with its key. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from agglom import curriculum, plugins
from agglom.errors import ConfigError, PluginError
from agglom.job import Data, Duration, Job, Side, Size, Stage, TeacherSpec, Views, duration, pair, parse_duration
from agglom.yamls import Key, one_of, show

Problem = tuple[Key, str]
# Balancers that weigh the teachers, or nothing, or may do either: they do without balance.group.
GROUPLESS = ("uniform", "teacher_dropping", "ada_loss", "static", "agre")
T = TypeVar("T", str, Size)


def attributes(data: Data, name: str, *, one_value: bool = True) -> Iterator[str]:
    """What is wrong with an attribute's name or a crossing such as `sex*view`; `one_value`: it must be a partition."""
    parts = name.split("*")
    for part in parts:
        if part not in data.attributes:
            yield one_of(part, list(data.attributes), "attributes under data.attributes")
        elif one_value and data.attributes[part].separator is not None:
            yield f"{part!r} has a separator, so an image may be in several of its groups; name one without"
    if len(set(parts)) < len(parts):
        yield f"{name!r} crosses an attribute with itself"


def repeated(names: Sequence[T]) -> list[T]:
    return sorted({name for name in names if names.count(name) > 1})


def data_problems(data: Data) -> Iterator[Problem]:
    if not data.manifest:
        yield ("data", "manifest"), "is empty; name the CSV or Parquet file with one row per image"
    for name in repeated(data.labels):
        yield ("data", "labels"), f"{name!r} is given twice"
    for index, name in enumerate(data.labels):
        column, of_class, value = name.partition("=")
        if not column or (of_class and not value):
            yield ("data", "labels", index), f"{name!r} is not a column, nor a class of one such as 'finding=covid'"
        elif of_class and column in data.labels:
            yield ("data", "labels", index), f"{name!r} takes {column!r} for classes, another label for 0 and 1"
    splits = data.splits
    if len({splits.train, splits.val, splits.test}) < 3:
        yield ("data", "splits"), f"train, val and test must differ, got {splits.train}, {splits.val}, {splits.test}"
    for name, attribute in data.attributes.items():
        key = ("data", "attributes", name)
        if not name or re.search(r"[*|]", name):
            yield key, "an attribute's name may not be empty or hold '*' or '|', they write crossings"
        if attribute.kind == "continuous" and (
            not attribute.bins or list(attribute.bins) != sorted(set(attribute.bins))
        ):
            got = show(list(attribute.bins))
            yield (*key, "bins"), f"a continuous attribute needs increasing edges, for example [50, 65]; got {got}"
        if attribute.kind == "categorical" and attribute.bins:
            yield (*key, "bins"), "only a continuous attribute has bins; remove them or set kind: continuous"
        if attribute.separator is not None and (attribute.kind == "continuous" or not attribute.separator.strip()):
            yield (*key, "separator"), 'only a categorical attribute has a separator, and it may not be blank; try ";"'
    for index, name in enumerate(data.groups):
        for message in attributes(data, name, one_value=False):
            yield ("data", "groups", index), message
    for name in repeated(data.groups):
        yield ("data", "groups"), f"{name!r} is given twice"
    if data.value_range and data.value_range[0] >= data.value_range[1]:
        yield ("data", "value_range"), f"the first must be less than the second, got {show(data.value_range)}"


def _check_plugin(key: Key, kind: str, package: str, options: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        signature = plugins.schema(kind, package)
    except PluginError as error:
        yield (*key, "kind"), str(error)
        return
    for option, message in plugins.problems(signature, options, plugins.INJECTED[package]):
        yield (*key, "options", option) if option else (*key, "options"), message


def _check_teachers(job: Job) -> Iterator[Problem]:
    names = list(job.teachers)
    if not names:
        yield ("teachers",), "is empty; name at least one teacher"
    elif all(spec.weight == 0 for spec in job.teachers.values()):
        yield ("teachers",), "every weight is 0, nothing would be learned"
    for name, spec in job.teachers.items():
        key = ("teachers", name)
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            yield key, "a teacher's name may hold a-z, 0-9, '_' and '-' only; rename it"
        if spec.source is not None and spec.source not in job.teachers:
            yield (*key, "source"), one_of(spec.source, [n for n in names if n != name], "other teachers")
        else:
            chain = [name]
            while (source := job.teachers[chain[-1]].source) in job.teachers and len(chain) <= len(names):
                chain.append(str(source))
            if name in chain[1:]:
                yield (*key, "source"), f"a cycle: {' ← '.join(chain[: chain.index(name, 1) + 1])}"
        yield from _check_plugin(key, spec.kind, "teachers", spec.options)
        if spec.mosaic and spec.source is not None:
            yield (*key, "mosaic"), f"sees no image of its own; set this for its source {spec.source!r}"
        derives = plugins.takes(spec.kind, "teachers", "source")
        if derives and spec.source is None:
            others = ", ".join(n for n in names if n != name) or "none yet"
            yield (*key, "source"), f"kind {spec.kind!r} derives from another teacher; name one (there are: {others})"
        if derives is False and spec.source is not None:
            yield (*key, "source"), f"kind {spec.kind!r} has no source; remove this key"
        if spec.licence is not None and not spec.licence.strip():
            yield (*key, "licence"), "is empty; name the licence of its weights, or 'unknown'"
        if derives:
            for option in ("dtype", "placement", "micro_batch", "compile"):
                if getattr(spec, option) != getattr(TeacherSpec(kind=spec.kind), option):
                    yield (*key, option), "it computes on the features of its source; set this key there"
            yield from _check_columns(job.data, (*key, "options"), spec.options)


def _check_columns(data: Data, key: Key, options: Mapping[str, Any]) -> Iterator[Problem]:
    """The columns of the manifest that a derived teacher reads: `attribute`, one name or several, and `label`."""
    attribute, label = options.get("attribute"), options.get("label")
    names = [((*key, "attribute"), attribute)]
    if isinstance(attribute, Sequence) and not isinstance(attribute, str):
        names = [((*key, "attribute", index), name) for index, name in enumerate(attribute)]
    for place, name in names:
        for message in attributes(data, name) if isinstance(name, str) else ():
            yield place, message
    if isinstance(label, str) and label not in data.labels:
        yield (*key, "label"), one_of(label, list(data.labels), "labels under data.labels")


def _check_prompts(job: Job) -> Iterator[Problem]:
    key: Key = ("evaluate", "prompts")
    prompts, labels = job.evaluate.prompts, job.data.labels
    for label, texts in prompts.items():
        if label not in labels:
            yield (*key, label), one_of(label, labels, "labels under data.labels")
        for kind in ("positive", "negative"):
            if any(not text.strip() for text in getattr(texts, kind)):
                yield (*key, label, kind), "holds an empty text; remove it"
        if not texts.positive:
            yield (*key, label, "positive"), "is empty; describe an image that shows the label"
        if texts.negative:
            continue
        column, of_class, _ = label.partition("=")
        others = [one for one in labels if of_class and one != label and one.startswith(f"{column}=")]
        if not others:
            yield (*key, label), "needs negative, too: describe an image that does not show the label"
        for other in others:
            if other not in prompts or prompts[other].negative:
                state = "has no prompts" if other not in prompts else "has negative prompts"
                yield (*key, label), f"is told from the other classes of {column!r}, but {other!r} {state}"
    name = job.evaluate.prompted_by
    if name is not None and name not in job.teachers:
        yield ("evaluate", "prompted_by"), one_of(name, list(job.teachers), "teachers")


def _check_stages(job: Job) -> Iterator[Problem]:
    if not job.stages:
        yield ("stages",), "is empty; give at least one stage, for example [{name: full, length: 30 epochs}]"
    for name in repeated([stage.name for stage in job.stages]):
        yield ("stages",), f"two stages are called {name!r}; reports are files of that name, rename one"
    for index, stage in enumerate(job.stages):
        key: Key = ("stages", index)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage.name) or stage.name == "teachers":
            yield (
                (*key, "name"),
                (f"{stage.name!r} cannot name report files; use letters, digits, '_' and '-' ('teachers' is taken)"),
            )
        for name in dict.fromkeys(stage.teachers):
            if name not in job.teachers:
                yield (*key, "teachers"), one_of(name, list(job.teachers), "teachers")
        for name in repeated(stage.teachers):
            yield (*key, "teachers"), f"{name!r} is given twice"
        yield from _check_sizes((*key, "sizes"), stage.sizes)
        yield from _check_views(job.data, (*key, "views"), stage.views)
        if stage.sizes and pair(stage.size) not in map(pair, stage.sizes):
            yield (
                (*key, "size"),
                f"{show(stage.size)}, the size of the evaluation, is not one of sizes {show(stage.sizes)}; make it one",
            )
        try:
            length = parse_duration(stage.length)
        except ConfigError as error:
            yield (*key, "length"), str(error)
            continue
        if length.unit == "%":
            yield (*key, "length"), f"{stage.length!r} is a share of nothing; give it in steps, epochs or samples"
        elif length.amount == 0:
            yield (*key, "length"), f"{stage.length!r} trains nothing; make it longer or remove the stage"
        else:
            yield from _check_warmup(job, (*key, "warmup"), stage, length)


def _check_curriculum(job: Job) -> Iterator[Problem]:
    """Students that teach later ones, and what the heads need of each student."""
    legs = curriculum.parts(job)
    ends = [leg.stages[-1].name for leg in legs[:-1]]
    for name, spec in job.teachers.items():
        key: Key = ("teachers", name, "options")
        stage, folder = (spec.options.get(option) for option in ("stage", "folder"))
        if not curriculum.takes_stage(spec.kind):
            continue
        if stage is None and folder is None:
            yield key, "name the export: folder, or stage, the last one of an earlier student of this job"
        elif stage is not None and folder is not None:
            yield key, "folder and stage both name an export; keep one"
        elif isinstance(stage, str) and stage not in ends:
            yield (*key, "stage"), one_of(stage, ends, "stages after which another student starts")
    index = 0
    for leg in legs:
        own = job.stages and job.stages[index].student
        place: Key = ("stages", index, "student") if own else ("student",)
        yield from _check_plugin(place, leg.student.kind, "students", leg.student.options)
        yield from _check_heads(leg, (*place, "options"))
        for stage in leg.stages:
            for name in stage.teachers if leg.teachers else ():
                if name in job.teachers and name not in leg.teachers:
                    yield ("stages", index, "teachers"), f"{name!r} is not there yet: its own stage ends later"
            index += 1
        if job.teachers and not leg.teachers:
            yield ("stages", index - len(leg.stages), "teachers"), "every teacher's own stage ends later; add another"


def _check_heads(leg: Job, key: Key) -> Iterator[Problem]:
    wanted = {name for stage in leg.stages for name in stage.teachers or leg.teachers}
    kind, options = leg.student.kind, leg.student.options
    tokens, levels = (plugins.given(kind, "students", options, option) for option in ("class_tokens", "levels"))
    if leg.heads.tokens == "own" and isinstance(tokens, int) and tokens < len(wanted):
        yield (*key, "class_tokens"), f"heads.tokens: own needs one for each of {len(wanted)} teachers, got {tokens}"
    if leg.heads.kind == "ladder" and levels == 0:
        yield (*key, "levels"), "heads.kind: ladder needs at least 1, got 0"


def _check_sizes(key: Key, sizes: Sequence[Side]) -> Iterator[Problem]:
    for height, width in repeated([pair(size) for size in sizes]):
        yield key, f"{show([height, width])} is given twice"


def _check_views(data: Data, key: Key, views: Views | None) -> Iterator[Problem]:
    if views is None:
        return
    kinds = asdict(views.kinds)
    if not any(kinds.values()):
        yield (*key, "kinds"), f"no strength is above 0; give one of {', '.join(kinds)} one, or set views to null"
    for name, groups in views.groups.items():
        for message in attributes(data, name):
            yield (*key, "groups"), message
        if not groups:
            yield (*key, "groups", name), "is empty; name the groups whose images the student sees so, or remove it"
        for group in repeated(groups):
            yield (*key, "groups", name), f"{group!r} is given twice"


def _check_warmup(job: Job, key: Key, stage: Stage, length: Duration) -> Iterator[Problem]:
    try:
        warmup = parse_duration(stage.warmup)
    except ConfigError as error:
        yield key, str(error)
        return
    # An epoch is unknown until the manifest is read; `plan` compares the other pairs of units.
    comparable = warmup.unit == "%" or (warmup.unit == "epochs") == (length.unit == "epochs")
    steps = duration(stage.length, batch=job.optim.batch, samples=10**6)
    if comparable and duration(stage.warmup, batch=job.optim.batch, samples=10**6, total_steps=steps) > steps:
        yield key, f"{stage.warmup!r} is longer than the stage ({stage.length}); shorten it"


def problems(job: Job) -> Iterator[Problem]:
    """Every problem of a well-shaped job that needs more than one field to see."""
    yield from data_problems(job.data)
    yield from _check_teachers(job)
    yield from _check_plugin(("balance",), job.balance.kind, "balancers", job.balance.options)
    yield from _check_stages(job)
    yield from _check_curriculum(job)
    yield from _check_prompts(job)
    yield from _check_studies(job)
    if job.data.split is None:
        yield ("data", "split"), "is null, which is for audits only; name the column that parts train, val and test"
    weighs_groups = job.balance.kind not in GROUPLESS and plugins.takes(job.balance.kind, "balancers", "cells")
    if job.balance.group is not None:
        for message in attributes(job.data, job.balance.group):
            yield ("balance", "group"), message
    elif job.balance.over is None and weighs_groups:
        known = ", ".join(job.data.attributes) or "none yet"
        yield ("balance", "group"), f"kind {job.balance.kind!r} weighs groups; name an attribute (there are: {known})"
    if job.balance.proxies is not None:
        yield from _check_named(job, ("balance", "proxies", "teacher"), [job.balance.proxies.teacher])
    by = plugins.given(job.balance.kind, "balancers", job.balance.options, "by")
    if plugins.takes(job.balance.kind, "balancers", "measured") and by in ("labels", "images") and not job.data.labels:
        yield (
            ("balance", "options", "by"),
            f"{by!r} asks how well probes read labels from each teacher, and data.labels is empty; name labels there, "
            "or set this to views",
        )
    yield from _check_balanced_teachers(job)
    if job.balance.resample and job.balance.over is None:
        yield (
            ("balance", "resample"),
            "draws images by their group; name an attribute under balance.group, or set it to 0",
        )
    yield from _check_mfd(job)
    if job.heads.kind == "transformer" and job.heads.depth != 1:
        yield ("heads", "depth"), f"kind transformer is one block, got {job.heads.depth}; set 1"
    if job.loss.moments_by is not None:
        for message in attributes(job.data, job.loss.moments_by):
            yield ("loss", "moments_by"), message
    if job.loss.shift and not job.loss.patches_weight:
        yield ("loss", "shift"), "compares patches, and patches_weight is 0; set it to 0, too"
    if job.loss.refit == "stage" and job.loss.normaliser in ("standardise", "whiten"):
        yield (
            ("loss", "refit"),
            f"'stage' needs one scale for all dimensions; {job.loss.normaliser} has one for each, and a dimension that "
            "is nearly constant at one size would drown the others at another: set loss.normaliser to phi_s or "
            "global_std, or refit to once",
        )
    if not job.loss.summary_weight and not job.loss.patches_weight:
        yield ("loss",), "summary_weight and patches_weight are both 0, nothing would be learned"
    if job.augment.crop[0] > job.augment.crop[1]:
        yield ("augment", "crop"), f"the first may not exceed the second, got {show(job.augment.crop)}"
    if job.optim.batch % job.optim.accumulate:
        sizes = nearest(job.optim.batch, job.optim.accumulate)
        yield (
            ("optim", "batch"),
            f"{job.optim.batch} does not divide by accumulate = {job.optim.accumulate}; {sizes} do",
        )
    if job.engine.precision == "bf16" and job.engine.zero == 0:
        yield ("engine", "zero"), "bf16 with ZeRO 0 keeps no fp32 weights and drifts; set zero to 1, 2 or 3"
    for name in ("every", "checkpoint"):
        try:
            if parse_duration(getattr(job.log, name)).amount == 0:
                yield ("log", name), "must be more than 0"
        except ConfigError as error:
            yield ("log", name), str(error)


def _check_balanced_teachers(job: Job) -> Iterator[Problem]:
    """The teachers that the options of a balancer name, and what agre's gradients need."""
    kind, options = job.balance.kind, job.balance.options
    named = {"static": "teachers", "agre": "biased"}.get(kind)
    if named is None:
        return
    key: Key = ("balance", "options", named)
    given = options.get(named)
    yield from _check_named(job, key, [given] if isinstance(given, str) else list(given or ()))
    if kind == "static" and options.get("groups") and job.balance.over is None:
        yield ("balance", "group"), "the options weigh groups; name their attribute"
    if kind != "agre":
        return
    if job.engine.zero == 3:
        yield ("engine", "zero"), "balance.kind agre takes gradients within a step, which ZeRO 3 cannot; set 0, 1 or 2"
    if job.heads.tokens == "own":
        yield ("heads", "tokens"), "balance.kind agre takes gradients at the summary that all heads read; set shared"
    if not job.loss.summary_weight:
        yield ("loss", "summary_weight"), "is 0, and balance.kind agre takes the gradients of summary losses"


def _check_mfd(job: Job) -> Iterator[Problem]:
    mfd = job.loss.mfd
    if mfd is None:
        return
    key: Key = ("loss", "mfd")
    if mfd.label not in job.data.labels:
        yield (*key, "label"), one_of(mfd.label, list(job.data.labels), "labels under data.labels")
    if mfd.teacher is not None:
        yield from _check_named(job, (*key, "teacher"), [mfd.teacher])
    if job.balance.proxies is not None:
        yield key, "compares annotated groups, and balance.proxies makes groups of clusters; set one of them to null"
    elif job.balance.group is None:
        yield key, "compares groups with all; name an attribute under balance.group"
    if not job.loss.summary_weight:
        yield key, "compares summaries, and loss.summary_weight is 0; set mfd to null"


def _check_named(job: Job, key: Key, names: Sequence[str]) -> Iterator[Problem]:
    """Names of teachers that every student of the job has."""
    for name in names:
        if name not in job.teachers:
            yield key, one_of(name, list(job.teachers), "teachers")
        elif any(name not in leg.teachers for leg in curriculum.parts(job)):
            yield key, f"{name!r} does not teach the first student of this job; train that one in a job of its own"


def _check_studies(job: Job) -> Iterator[Problem]:
    evaluate = job.evaluate
    yield from _check_sizes(("evaluate", "sizes"), evaluate.sizes)
    for index, name in enumerate(evaluate.holdout):
        for message in attributes(job.data, name, one_value=False):
            yield ("evaluate", "holdout", index), message
    asked = {"scarcity": [f"{share:g}" for share in evaluate.scarcity], "holdout": evaluate.holdout}
    for key, values in asked.items():
        for value in repeated(values):
            yield ("evaluate", key), f"{value} is given twice"
        if values and not job.data.labels:
            yield ("evaluate", key), "fits probes of labels, and data.labels is empty; name them there"


def nearest(batch: int, divisor: int) -> str:
    """The multiples of `divisor` around `batch`, in words."""
    below = batch // divisor * divisor
    return " and ".join(str(size) for size in (below, below + divisor) if size)
