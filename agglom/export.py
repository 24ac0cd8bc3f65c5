"""The student as others will load it: safetensors, a JSON configuration that timm understands, and a model card."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agglom import __version__, curriculum, evaluate, hosting, licences, plugins, report
from agglom.assemble import Run, assemble
from agglom.core import normalise
from agglom.core.heads import Distiller, Head
from agglom.core.types import Student
from agglom.engine import launched
from agglom.errors import DataError
from agglom.exported import CONFIG, HEADS, OWN, WEIGHTS, load
from agglom.job import Job, side
from agglom.journal import disk
from agglom.runtime import StopRequest
from agglom.survey import survey
from agglom.targets import Normaliser, input_size

SAMPLE, CARD = "sample.safetensors", "README.md"
TOLERANCE = 1e-5


def main(job: Job, base: Path, out: Path) -> None:
    """Export the student of the last checkpoint in `out`.

    Raises DataError where there is no checkpoint, CacheError where it belongs to another job.
    """
    with launched() as world, StopRequest().listening(world.has_launcher) as stop:
        run = assemble(curriculum.legs(job, out)[-1].job, base, out, world, stop)
        _, student, plain = evaluate.last_student(run)
        _, normalisers = survey(run, prompted=False)
        write(out / "export", run, student, plain, normalisers, print)


def write(
    folder: Path,
    run: Run,
    student: Student,
    model: Distiller,
    normalisers: dict[str, Normaliser],
    say: Callable[[str], None],
) -> None:
    """Write the export and reload it in a fresh process.

    `student` shares its modules with `model`. Heads are written with the normaliser folded in: they emit the
    teachers' raw features. Raises DataError when the reload differs by more than `TOLERANCE`.
    """
    model = copy.deepcopy(model).cpu().eval()
    for key, head in cast("dict[str, Head]", model.heads).items():
        name, kind = key.split(":")
        affine = getattr(normalisers[name].to(torch.device("cpu")), kind, None)  # a mixer's output is no target
        if affine is not None:
            head.last = normalise.fold(affine, head.last)
    pixels = torch.rand(2, 3, *run.plan.evaluate_size, generator=torch.Generator().manual_seed(run.job.seed))
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_plain(student.backbone.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
        save_file(_plain(model.heads.state_dict()), folder / HEADS)
        save_file(_plain({"pixels": pixels, **_outputs(model, pixels)}), folder / SAMPLE)
        if run.job.student.kind.endswith(".py"):
            shutil.copyfile(run.job.student.kind, folder / OWN)
        (folder / CONFIG).write_text(json.dumps(_config(run, student), indent=1) + "\n")
        (folder / CARD).write_text(_card(run, student), encoding="utf-8")
    say(licences.sentence(_taught(run)))
    say(_verify_afresh(folder))


def verify(folder: Path) -> float:
    """The largest absolute difference between what the reloaded student computes and what was computed at export."""
    sample = load_file(folder / SAMPLE)
    found = _outputs(load(folder), sample.pop("pixels"))
    return max(float((found[key] - value).abs().max()) for key, value in sample.items())


@torch.no_grad()
def _outputs(model: Distiller, pixels: Tensor) -> dict[str, Tensor]:
    trunk, predicted = model(pixels)
    outputs = {}
    for name, features in {"student": trunk, **predicted}.items():
        for kind, value in (("summary", features.summary_BD), ("patches", features.patches_BND)):
            if value is not None:
                outputs[f"{name}/{kind}"] = value
    return outputs


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def _verify_afresh(folder: Path) -> str:
    """Reload in a fresh process: what this one has in memory must not be needed."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment["PYTHONPATH"] = os.pathsep.join([str(plugins.HOME), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-m", "agglom.export", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # Ctrl-C is for the run, which is about to end
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise DataError(f"{folder}: the export does not reload: {said[-1]}")
    return done.stdout.strip()


def _config(run: Run, student: Student) -> dict[str, object]:
    """timm's own keys at the top, so that `timm.create_model("local-dir:…")` reads it; ours under "agglom"."""
    permitted, because = licences.of_student(_taught(run))
    return {
        **student.recipe,
        "num_classes": 0,
        "num_features": student.dims.summary,
        "agglom": {
            "version": __version__,
            "pixels": asdict(student.pixels)
            | {
                "range": [0, 1],
                "pinned": student.pixels.size is not None,
                "size": side(input_size(student.pixels, run.plan.evaluate_size)),
            },
            "student": _student(run.job),
            "heads": asdict(run.job.heads) | {"targets": {name: asdict(dims) for name, dims in run.targets.items()}},
            "teachers": {name: hosting.facts(teacher) for name, teacher in run.teachers.items()},
            "commercial_use": permitted,
            "commercial_use_because_of": because,
            "manifest": run.manifest.digest,
        },
    }


def _taught(run: Run) -> dict[str, str]:
    """The licences of the teachers that the student has learnt from; others were only compared with it."""
    return {name: run.teachers[name].licence for name in run.targets}


def _student(job: Job) -> dict[str, object]:
    """How to build the student again: its start is of no interest, and no path of this machine leaves it."""
    kind = OWN if job.student.kind.endswith(".py") else job.student.kind
    start = {"checkpoint": None, "pretrained": False}
    options = {key: start.get(key, value) for key, value in job.student.options.items()}
    return {"kind": kind, "options": options}


def _card(run: Run, student: Student) -> str:
    import jinja2

    last = run.out / "reports" / f"{run.plan.stages[-1].name}.json"
    found = report.load(last) if last.is_file() else None
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("card.md.j2").render(
        run=run,
        student=student,
        headline=report.headline(found) if found else None,
        version=__version__,
        commercial_use=licences.of_student(_taught(run))[0],
        verdict=licences.sentence(_taught(run)),
        notes=found.context.get("notes", []) if found else [],
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    difference = verify(place)
    print(f"reloaded in a fresh process: max abs diff {difference:.1e}")
    sys.exit(0 if difference <= TOLERANCE else f"{place}: differs by {difference:.1e}, more than {TOLERANCE:.0e}")
