"""What the licences of the teachers mean for the student: whether it may be used commercially. Imports no torch.

A student learns from its teachers' outputs; whether their licences bind it is a question of law that nobody has
settled. It is marked as if they did, and the mark names its causes. Nothing here is legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from agglom.errors import PluginError
from agglom.job import Job

UNKNOWN = ("unknown", "other", "none")  # what plug-ins and model cards write who do not name one
# In a name of lower case whose words are joined by "-". The names are those that timm and model cards of the hub use.
FORBIDS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b(non?|not)-?(for-)?commercial",  # also Meta's fair-noncommercial-research-license
        r"\bcc-?by-?nc|\bby-nc\b|\bnc\b",
        r"\bresearch-(only|use|purposes?)\b|\bonly\b.*\bresearch\b|\bresearch\b.*\bonly\b|\bacademic\b",
        r"\bnscl|nvidia-source-code-license",  # in all its versions for others than NVIDIA, "non-commercially"
        r"\bapple-amlr\b|apple-machine-learning-research",  # "exclusively for Research Purposes"
        r"\bseer-license\b",  # Meta's SEER models
        r"\bmsr-?la\b|microsoft-research-license",
    )
)
PERMITS = re.compile(
    r"apache(-license)?(-version)?(-2(\.0)?)?|mit(-license)?|(0?bsd)(-[234]-clause)?|isc|unlicense|cc0(-1\.0)?"
    r"|cc-by(-sa)?-[234]\.[05]|mpl-2\.0|afl-3\.0|academic-free-license.*|[al]?gpl-[23]\.[01](-only|-or-later)?"
    # Restricted in other ways, but open to commerce.
    r"|nvidia-open-model-license|dinov3-license|apple-ascl"
)


def name_of(licence: str) -> str:
    """A licence's name in lower case, its words joined by "-"."""
    return re.sub(r"[^a-z0-9.]+", "-", licence.casefold()).strip("-.")


def commercial_use(licence: str) -> bool | None:
    """Whether a licence permits commercial use; None where its name does not tell.

    Of several licences, "Apache-2.0; CC-BY-NC-4.0", all bind.
    """
    verdicts = [_one(name_of(part)) for part in licence.split(";")]
    return False if False in verdicts else None if None in verdicts else True


def _one(name: str) -> bool | None:
    if PERMITS.fullmatch(name):
        return True
    return False if any(pattern.search(name) for pattern in FORBIDS) else None


def of_student(licences: Mapping[str, str]) -> tuple[bool | None, list[str]]:
    """Whether the student of teachers with these licences may be used commercially, and the teachers to blame.

    False: these teachers forbid it. None: nobody forbids it, but the licences of these are unknown.
    """
    verdicts = {name: commercial_use(licence) for name, licence in licences.items()}
    verdict = False if False in verdicts.values() else None if None in verdicts.values() else True
    return verdict, [] if verdict else sorted(name for name, found in verdicts.items() if found is verdict)


def sentence(licences: Mapping[str, str]) -> str:
    """The verdict on the student in one line."""
    verdict, names = of_student(licences)
    listed = ", ".join(f"{name} ({licences[name]})" for name in names)
    if verdict is None:
        return f"commercial use of the student: unknown, since these licences are: {listed}"
    return "commercial use of the student: " + (f"no, forbidden by {listed}" if names else "no licence forbids it")


def resolve(teacher: str, known: str, given: str | None) -> str:
    """The licence of a teacher: what its plug-in knows, or where that is unknown, `teachers.X.licence`.

    Raises PluginError where there is neither, or where the two differ.
    """
    known = known.strip()
    if known and name_of(known) not in UNKNOWN:
        if given is not None and name_of(given) != name_of(known):
            raise PluginError(
                f"teachers.{teacher}: licence is {given!r}, but its weights come under {known!r}; remove this key"
            )
        return known
    if not (given or known):
        raise PluginError(
            f"teachers.{teacher}: licence is missing, its plug-in names none; set teachers.{teacher}.licence "
            f"({UNKNOWN[0]!r} where nobody can tell)"
        )
    return given or known


def planned(job: Job) -> list[str]:
    """Lines for the plan: what the configuration alone tells. A derived teacher has the licence of its source."""
    given = {name: spec.licence for name, spec in job.teachers.items() if spec.licence}
    forbidden = {name: licence for name, licence in given.items() if commercial_use(licence) is False}
    return [f"- {sentence(forbidden)}"] if forbidden else []
