"""What the rows of a report say, in words; `figures` draws them. Nothing is said here that is not a row.

Words follow the interval: where it contains 0, the report says that it cannot tell. Groups below the minimum support
are shown, but no finding is drawn from them, and an undefined number is a dash with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agglom.reading import FVU_BAR, ON_VALIDATION, OVERALL, Place, Reading, Row, unique

RARE = 0.05
# Gradients of many parameters that have nothing to do with each other have a cosine near 0, on few images more or less.
AGAINST = -0.1
CHANCE = 0.5

# ── Numbers in words ──


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals and a true minus; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def interval(row: Row, signed: bool = False) -> str:
    """`0.81 to 0.89`, which cannot be misread where a bound is negative."""
    if row["lo"] is None or row["hi"] is None:
        return "no interval"
    return f"{number(row['lo'], signed)} to {number(row['hi'], signed)}"


def estimate(row: Row | None, signed: bool = False) -> str:
    """Value and interval."""
    if row is None or row["value"] is None:
        return "–"
    return f"{number(row['value'], signed)} ({interval(row, signed)})"


def count(n: int, noun: str) -> str:
    """`1 image`, `1,200 images`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def support(row: Row, positives: bool = True) -> str:
    """How many stand behind a number; a mask and a feature have no positives."""
    counts = [] if row["n_patients"] is None else [count(row["n_patients"], "patient")]
    counts += [] if row["n"] is None else [count(row["n"], "image")]
    if positives and row["n_pos"] is not None and row["n"] and row["metric"] not in ("dice", "iou"):
        told = "positive" if row["label"] else "of the group" if row["metric"] == "leakage" else ""
        counts += [f"{row['n_pos']:,} {told}"] if told else []
    return ", ".join(counts)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def p_value(value: float | None, name: str = "") -> str:
    """What three decimals would round to 0 is below 0.001; with a name `p = 0.020`."""
    tiny = value is not None and value < 0.0005
    text = "0.001" if tiny else number(value)
    return f"{name} {'<' if tiny else '='} {text}" if name else f"{'< ' if tiny else ''}{text}"


def gap_finding(gap: Row, which: str) -> str:
    """How far groups lie apart, whether that is a finding, what chance alone would show, what could have been found."""
    missed = gap["lo"] <= 0
    rare = missed and gap["p_value"] is not None and gap["p_value"] < RARE
    if not missed:
        truth = "the groups differ"
    elif rare:
        truth = (
            "this interval, which errs on the wide side, reaches 0, but groups that do not differ would rarely show "
            f"so large a gap ({p_value(gap['p_value'], 'p')}), so they seem to differ"
        )
    else:
        truth = "this reaches 0, so we cannot tell whether they differ"
    said = [f"{which} lie {estimate(gap)} apart: {truth}."]
    if gap["null_hi"] is not None and gap["corrected"] is not None:
        share = "" if rare or gap["p_value"] is None else f" ({p_value(gap['p_value'], 'p')})"
        said.append(
            f"Groups that do not differ would show up to {number(gap['null_hi'])} by chance in 19 of 20 cases{share}; "
            f"less what chance adds on average, {number(gap['corrected'])} of the gap remains."
        )
    if missed and gap["detectable"] is not None:
        said.append(
            "No gap between these groups would be found four times in five, so few are the patients."
            if gap["detectable"] > 1
            else f"The smallest gap that these patients would show four times in five is {number(gap['detectable'])}."
        )
    return " ".join(said)


def gap_notes(row: Row | None) -> list[str]:
    """The same in a table: what stands below the gap."""
    if row is None or row["value"] is None:
        return []
    notes, second = [], []
    if row["null_hi"] is not None:
        share = "" if row["p_value"] is None else f", {p_value(row['p_value'], 'p')}"
        notes.append(f"by chance to {number(row['null_hi'])}{share}")
    if row["corrected"] is not None:
        second.append(f"corrected {number(row['corrected'])}")
    if row["detectable"] is not None and row["lo"] is not None and row["lo"] <= 0:
        second.append("could show none" if row["detectable"] > 1 else f"could show {number(row['detectable'])}")
    notes += [", ".join(second)] if second else []
    if row["unknown_lo"] is not None and row["unknown_hi"] is not None:
        notes.append(f"unknown: {number(row['unknown_lo'])} to {number(row['unknown_hi'])}")
    return notes


def verdict(row: Row | None) -> str:
    """What a paired difference allows to say: better | worse | cannot tell | too few to judge | undefined.

    A claim on a single group is adjusted for the groups of its attribute: the interval must leave 0 out, and Holm's
    p-value, where there is one, must be below .05.
    """
    if row is None or None in (row["value"], row["lo"], row["hi"]):
        return "undefined"
    if row["weak"]:
        return "too few to judge"
    if row["p_holm"] is not None and row["p_holm"] >= RARE:
        return "cannot tell"
    return "better" if row["lo"] > 0 else "worse" if row["hi"] < 0 else "cannot tell"


# ── The finding ──

_CONCLUSIONS = {
    "better": ("It scores better there than {}.", "lies above 0: there the student scores better"),
    "worse": ("It scores worse there than {}.", "lies below 0: there the student scores worse"),
    "cannot tell": (
        "Whether it is as good there as {}, these patients cannot tell.",
        "contains 0: from these patients we cannot tell whether the student is better or worse",
    ),
}


def label_finding(reading: Reading, label: str) -> tuple[str, str]:
    """One sentence or two to lead with, and the figures behind them."""
    subject, who = reading.first(label)
    measure = reading.measure(label)
    rows = {place: reading.level(label, subject, place) for place in reading.places}
    judged = {place: row for place, row in rows.items() if row and not row["weak"] and row["value"] is not None}
    groups = [place for place in judged if place != OVERALL]
    if groups:
        worst = min(groups, key=lambda place: judged[place]["value"])
        alike = len({judged[place]["value"] for place in groups}) == 1 < len(groups)
        told = f"{who} scores the same in every group" if alike else _scores([who], reading, worst)
        lead = f"For “{label}”, {_lowest(reading, label) if reading.is_audit else told}."
        said = [f"There {who} reaches {measure} {estimate(judged[worst])}"]
        said[-1] += f"; over all patients, {estimate(judged[OVERALL])}." if OVERALL in judged else "."
    elif OVERALL in judged:
        worst = OVERALL
        lead = f"For “{label}”, no group has enough patients for a finding."
        said = [f"Over all patients, {who} reaches {measure} {estimate(judged[worst])}."]
    else:
        alike = all(row["status"] == "single_class" for row in rows.values() if row and row["n"])
        reason = (
            "only one outcome occurs, so there is no finding" if alike else "there are too few patients for a finding"
        )
        lead = f"For “{label}”, {reason}."
        return lead, "The numbers below are shown for completeness; nothing follows from them."
    best = reading.best_teacher(label, worst)
    pair = reading.level(label, f"student - teacher/{best}", worst)
    if pair and verdict(pair) in _CONCLUSIONS:
        short, long = _CONCLUSIONS[verdict(pair)]
        if verdict(pair) == "cannot tell" and not pair["lo"] <= 0 <= pair["hi"]:
            long = (
                f"leaves 0 out, but several groups are tested, and allowing for that ({p_value(pair['p_holm'], 'p')}) "
                "we cannot tell whether the student is better or worse"
            )
        chosen = f"{best}, the best teacher{' there' if groups else ''} on validation patients"
        lead += f" {short.format(chosen)}" if groups else ""
        reaches = estimate(reading.level(label, f"teacher/{best}", worst))
        said.append(f"{best} reaches {reaches}.")
        said.append(f"Student minus teacher is {estimate(pair, signed=True)}; this interval {long}.")
    for one in [] if reading.teachers else reading.pairs(label):
        pair = reading.level(label, one.predictor, worst)
        name, other = one.predictor.split(" - ", 1)
        word = verdict(pair)
        if word in _CONCLUSIONS:
            told = "we cannot tell which is better" if word == "cannot tell" else f"{name} scores {word} there"
            said.append(f"On the same patients, {name} minus {other} is {estimate(pair, signed=True)}: {told}.")
    gap = reading.level(label, subject, (worst[0], "all"), "gap")
    if groups and gap and not gap["weak"] and None not in (gap["value"], gap["lo"]):
        left_out = any(place[0] == worst[0] and place not in judged for place in reading.places)
        which = f"The groups of {worst[0].replace('*', ' × ')}{' that are large enough' if left_out else ''}"
        said.append(gap_finding(gap, f"{which}, as {who} scores them," if reading.is_audit else which))
    return lead, " ".join(said)


def _scores(names: Sequence[str], reading: Reading, place: Place) -> str:
    return f"{listed(names)} score{'s' if len(names) == 1 else ''} lowest in {reading.title(place)}"


def _lowest(reading: Reading, label: str) -> str:
    """Where each predictor of an audit scores lowest among the groups that bear a finding."""
    found: dict[Place, list[str]] = {}
    for name in reading.others:
        rows = {place: reading.level(label, name, place) for place in reading.places}
        levels = {place: row["value"] for place, row in rows.items() if place[0] and row and not row["weak"]}
        if levels:
            alike = len(set(levels.values())) == 1 < len(levels)
            found.setdefault(OVERALL if alike else min(levels, key=levels.__getitem__), []).append(name)
    return ", ".join(
        _scores(names, reading, place)
        if place != OVERALL
        else f"{listed(names)} score{'s' if len(names) == 1 else ''} the same in every group"
        for place, names in found.items()
    )


def tally(reading: Reading) -> str:
    """In how many groups the student is worse, better, or cannot be told from the teacher that validation chose there.

    Without teachers the same for each pair of predictors.
    """
    cells = [(label, place) for label in reading.heads for place in reading.places if place != OVERALL]
    if reading.teachers:
        rivals = [(label, place, reading.best_teacher(label, place)) for label, place in cells]
        rows = [reading.level(label, f"student - teacher/{best}", place) for label, place, best in rivals]
        return _counted(
            reading, "Against the best teacher of each group, chosen on validation patients, the student", rows
        )
    told = []
    for one in reading.pairs(""):
        name, other = one.predictor.split(" - ", 1)
        rows = [reading.level(label, one.predictor, place) for label, place in cells]
        told.append(_counted(reading, f"Against {other}, {name}", rows))
    return " ".join(text for text in told if text)


def _counted(reading: Reading, who: str, rows: Sequence[Row | None]) -> str:
    verdicts = [verdict(row) for row in rows]
    judged = [word for word in verdicts if word in _CONCLUSIONS]
    if not judged:
        return ""
    one_label = len(reading.heads) == 1
    noun = "group" if one_label else "combination"
    scope = f"{count(len(judged), noun)}{'' if one_label else ' of a label and a group'}"
    unsure = judged.count("cannot tell")
    counts = [f"{word} in {judged.count(word)}" for word in ("worse", "better") if word in judged]
    if counts:
        told = f"{who} scores {' and '.join(counts)} of {scope}{f'; in {unsure} we cannot tell' if unsure else ''}"
    else:
        told = f"{who} cannot be told to be better or worse in {unsure} of {scope}"
    left = len(verdicts) - len(judged)
    rest = f" {count(left, f'more {noun}')} {'has' if left == 1 else 'have'} too few patients, or none." if left else ""
    return f"{told}.{rest}"


def fvu_finding(reading: Reading) -> tuple[str, str]:
    """Where the student explains least of a teacher's features; how much, and how many cells meet the bar."""
    cells = [
        (one, place, row)
        for one, variant in reading.targets()
        for place in reading.places
        if (row := reading.row(variant, one.subject, one.predictor, place))
        and not row["weak"]
        and row["value"] is not None
    ]
    if not cells:
        return "", ""
    one, place, row = max(cells, key=lambda cell: cell[2]["value"])
    met = sum(row["value"] < FVU_BAR and row["hi"] is not None and row["hi"] < 1 for *_, row in cells)
    lead = f"Of the teachers' features, the student explains least of {one.name} in {reading.title(place)}."
    said = f"There {estimate(row)} of their variance stays unexplained. "
    return lead, said + f"The bar of {FVU_BAR} is met in {met} of {len(cells)} combinations of features and group."


def limits(reading: Reading, context: Mapping[str, Any]) -> list[str]:
    """What the report cannot say, from the statuses of its rows and from the context."""
    said = []
    if reading.split == "val":
        said.append(
            "There is no test split. These are the validation patients, on whom thresholds and weights were chosen: "
            "the numbers flatter every model."
        )
    said += [
        f"The groups of {name} are simulated by image processing. They show how the method behaves, not how real "
        "patients fare."
        for name in reading.simulated
    ]
    said += _weak(reading)
    for group in context.get("groups", ()):
        if group["group"] is None and group["split"] == reading.split and group["n_images"]:
            images, patients = count(group["n_images"], "image"), count(group["n_patients"], "patient")
            name = group["attribute"].replace("*", " × ")
            said.append(f"{images} of {patients} lack {name}; they count in “all patients” only.")
            said[-1] += _assigned(reading, group["attribute"])
    return [*said, *context.get("notes", ())]


def _weak(reading: Reading) -> list[str]:
    """From which groups no finding is drawn, and why: a reason and a group are named once for all labels."""
    series = [(one, reading.main(label)) for label in reading.labels for one in reading.models(label)]
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for one, variant in series or reading.targets():
        for place in reading.places:
            row = reading.row(variant, one.subject, one.predictor, place)
            if row and row["weak"]:
                who = f" of {one.name}" if row["status"] == "constant_score" else ""
                counts = support(row, positives=len(reading.labels) == 1)
                places = found.setdefault(f"{row['why']}{who}", {})
                places.setdefault(f"{reading.title(place)} ({counts})", {}).setdefault(one.subject, row)
    return [
        f"No finding, {why}: {'; '.join(place + _positives(reading, rows) for place, rows in places.items())}."
        for why, places in found.items()
    ]


def _positives(reading: Reading, rows: Mapping[str, Row]) -> str:
    """Where there are several labels, which, with their positives; the classes of one label share its name."""
    told = []
    for head in reading.heads if len(reading.labels) > 1 else []:
        known = {one: rows[one]["n_pos"] for one in reading.members(head) or [head] if one in rows}
        counts = [
            f"{one.removeprefix(f'{head}=')} {n:,}" if one != head else f"{n:,}"
            for one, n in known.items()
            if n is not None
        ]
        named = known or head in rows
        told += [f"{head} ({', '.join(counts)} positive)" if counts else head] if named else []
    return f" for {', '.join(told)}" if told else ""


def _assigned(reading: Reading, attribute: str) -> str:
    """How small and how large the gap may be if those of unknown group are assigned at worst."""
    told: dict[str, list[str]] = {}
    for label in reading.heads:
        subject, who = reading.first(label)
        gap = reading.level(label, subject, (attribute, "all"), "gap")
        if gap and None not in (gap["unknown_lo"], gap["unknown_hi"]):
            bounds = f"{number(gap['unknown_lo'])} to {number(gap['unknown_hi'])}"
            told.setdefault(reading.measure(label), []).append(f"{bounds} for “{label}” and {who}")
    gaps = [f"the {measure} gap would be {listed(bounds)}" for measure, bounds in told.items()]
    return f" Whichever groups they belong to, {listed(gaps)}, before the play of chance." if gaps else ""


def conflict_finding(given: Mapping[str, Any] | None) -> str:
    """Which two teachers ask most different things of the student's trunk, and whether groups differ in that."""
    names = given["teachers"] if given else []
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    known = [pair for pair in pairs if given and given["cosine"][pair[0]][pair[1]] is not None]
    if not given or not known:
        return ""
    i, j = min(known, key=lambda pair: given["cosine"][pair[0]][pair[1]])
    value = given["cosine"][i][j]
    both, images = given["n_both"][i][j], count(given["n_gradient"], "image")
    told = f"{names[j]} and {names[i]}: cosine {number(value)} over {images}"
    told += f", of which both serve {both:,}" if both < given["n_gradient"] else ""
    said = f"The gradients that pull most against each other are those of {told}"
    if value >= AGAINST:
        clearly = f"clearly against each other (a cosine below −{-AGAINST:g})"
        said = f"No two teachers pull the student's trunk {clearly}; least alike are {told}"
    by = [(one["cosine"][i][j], one["group"].replace("|", " · ")) for one in given["groups"] if one["cosine"]]
    by = sorted(one for one in by if one[0] is not None)
    if len(by) > 1:
        (low, lowest), (high, highest) = by[0], by[-1]
        said += f"; by group from {number(low)} ({lowest}) to {number(high)} ({highest})"
    return f"{said}."


def proxies_finding(given: Mapping[str, Any] | None) -> str:
    """Whom clusters stand for: the groups with which they go better than clusters that are dealt out anew."""
    if not given:
        return ""
    whose = f"without {given['attribute'].replace('*', ' × ')}" if given["attribute"] else "of all patients"
    said = [
        f"Images {whose} are grouped by {count(len(given['clusters']), 'cluster')} of the summaries of "
        f"{given['teacher']}, fitted on {count(given['n_fitted'], 'train image')}; {given['fits']} fits from different "
        f"starts agree by an adjusted Rand index of {number(given['stability'])} on average and "
        f"{number(given['stability_lo'])} at least (1: the same clusters, 0: chance)."
    ]
    known = [one for one in given["agreement"] if not one["why"]]
    for better, start in ((True, "Better than by chance, they go with"), (False, "No better than by chance, with")):
        mine = [one for one in known if (one["purity"] > one["chance_hi"]) == better]
        names = [
            f"{one['attribute'].replace('*', ' × ')} (NMI {number(one['nmi'])}, purity {number(one['purity'])} where "
            f"{number(one['chance'])} is chance)"
            for one in sorted(mine, key=lambda one: one["chance"] - one["purity"])
        ]
        said += [f"{start} {listed(names)}."] if names else []
    if not known:
        said.append("There are no groups that they could be compared with, so whom they stand for is not known.")
    return " ".join([*said, "A weight on a cluster is not a weight on a group."])


# ── Studies of their own ──


_NO_PROOF = (
    f"A linear probe at chance ({CHANCE}) is no proof that nothing is revealed: another probe, or more patients, might "
    "read it."
)


def leakage_finding(reading: Reading) -> str:
    """Whose features reveal which group most, and what a probe at chance does not prove."""
    rows = [row for row in reading.studies if row["metric"] == "leakage" and not row["weak"]]
    known = [row for row in rows if None not in (row["value"], row["lo"])]
    if not known:
        few = any(row["metric"] == "leakage" for row in reading.studies)
        return f"No group has enough patients to tell what the features reveal. {_NO_PROOF}" if few else ""
    top = max(known, key=lambda row: (row["lo"] > CHANCE, row["value"]))
    place = top["attribute"], top["group"]
    level = [row for row in known if (row["attribute"], row["group"]) == place and estimate(row) == estimate(top)]
    group, who = reading.title(place), listed([reading.called(row["predictor"]) for row in level])
    if top["lo"] > CHANCE:
        said = f"The features of {who} reveal most: a linear probe tells {group} from all others with AUROC"
    else:
        said = f"We cannot tell whether a linear probe reads any group from features: highest is {group}, {who}, AUROC"
    return f"{said} {estimate(top)}, picked as the highest of {len(known)}. {_NO_PROOF}"


def leakage_fit(reading: Reading) -> str:
    """On whom the probes of `leakage` were fitted, as the notes of its rows say."""
    rows = [row for row in reading.studies if row["metric"] == "leakage"]
    unseen = unique(row["attribute"] for row in rows if ON_VALIDATION in (row["note"] or ""))
    if not unseen:
        return "fitted on train patients"
    names = listed([reading.title((attribute, "all")) for attribute in unseen])
    why = f"as a teacher was fitted on {names} of train patients"
    if all(row["attribute"] in unseen for row in rows):
        return f"{ON_VALIDATION}, {why}"
    return f"fitted on train patients, but for {names} on validation patients, {why}"


def sweep_sizes(reading: Reading) -> list[str]:
    """The sizes of the sweep as its rows have them, `HxW`, from small to large."""
    found = unique(row["target"].rpartition("@")[2] for row in reading.studies if row["metric"].startswith("sweep_"))
    return sorted(found, key=lambda size: (math.prod(map(int, size.split("x"))), size))


def sweep_finding(reading: Reading) -> str:
    """Of which teacher's features the share that stays unexplained changes most from size to size."""
    rows = [row for row in reading.studies if row["metric"] == "sweep_fvu" and row["value"] is not None]
    by: dict[str, list[Row]] = {}
    for row in rows:
        if (row["attribute"], row["group"]) == OVERALL and not row["weak"] and None not in (row["lo"], row["hi"]):
            by.setdefault(row["target"].rpartition("@")[0], []).append(row)
    ends = {kind: (min(mine, key=_value), max(mine, key=_value)) for kind, mine in by.items() if len(mine) > 1}
    if not ends:
        return ""
    kind, (low, high) = max(ends.items(), key=lambda item: item[1][1]["value"] - item[1][0]["value"])
    sizes = [row["target"].rpartition("@")[2].replace("x", "×") for row in (low, high)]
    said = (
        f"Between sizes, what the student leaves unexplained of a teacher changes most for {kind}: "
        f"{estimate(low)} at {sizes[0]} px, {estimate(high)} at {sizes[1]} px"
    )
    if low["hi"] >= high["lo"]:
        said += "; these intervals meet, so we cannot tell whether it changes"
    lost = [one for one, (_, most) in ends.items() if most["lo"] > 1]
    worse = f" At some size the student is worse than a guess that sees no image for {listed(lost)}." if lost else ""
    return f"{said}.{worse}"


def _value(row: Row) -> float:
    return row["value"]


def scarcity_finding(reading: Reading, label: str) -> str:
    """By attribute, whether the gap grows as labels shrink: the smallest share of labels against the largest."""
    rows = [row for row in reading.studies if (row["metric"], row["label"]) == ("scarcity_auroc_gap", label)]
    usable = [row for row in rows if not row["weak"] and None not in (row["value"], row["lo"], row["hi"])]
    if not usable:
        return ""
    subject = min((row["predictor"] for row in usable), key=lambda name: name != reading.first(label)[0])
    told = []
    for attribute in unique(row["attribute"] for row in usable):
        mine = [row for row in usable if (row["predictor"], row["attribute"]) == (subject, attribute)]
        if len(mine) < 2:
            continue
        few, *_, full = sorted(mine, key=lambda row: float(row["target"]))
        if few["lo"] == few["hi"]:
            truth = "of one seed, which cannot tell whether it changes with the labels"
        elif few["lo"] > full["hi"]:
            truth = "it grows as labels shrink"
        elif few["hi"] < full["lo"]:
            truth = "it shrinks with the labels"
        else:
            truth = "the ranges over seeds overlap, so we cannot tell whether it changes with the labels"
        told.append(
            f"between the groups of {reading.title((attribute, 'all'))} it is {estimate(few)} with {share(few)} of the "
            f"labelled patients and {estimate(full)} with {share(full)}: {truth}"
        )
    return f"The AUROC gap of {reading.called(subject)}: {'; '.join(told)}." if told else ""


def share(row: Row) -> str:
    """The share of the train patients whose labels were used: `5 %`."""
    return f"{100 * float(row['target']):g} %"
