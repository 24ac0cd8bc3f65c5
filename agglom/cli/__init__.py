"""The command line: a few verbs, few flags, everything else is in the configuration file.

Imports nothing heavy, so that a wrong configuration is answered in under a second.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from agglom import __version__
from agglom.errors import VERDICT_NO, AgglomError, ConfigError, DataError, Interrupted, PluginError

VERBS = {
    "plan": "resolve stages, steps, batches and groups, print them and stop",
    "distill": "train the student, evaluate after each stage, export",
    "evaluate": "evaluate the teachers and the last student of a run again, or anybody's predictions",
    "compare": "print student against teachers, run against run or stage against stage, with a verdict at a margin",
    "export": "write the student of a run as safetensors, with a model card",
    "list": "show the plug-ins there are, with their options",
    "check": "run the contract suite on a plug-in, or examine the teachers of a job",
}
LAUNCHED = ("--local_rank", "--deepspeed")
# An issue may add rows for its own verb; a test holds the rest.
FLAGS: dict[str, tuple[str, ...]] = {
    "plan": ("--config", "--set", "--out", "--debug", "--deepspeed_config", "--world", "--params"),
    "distill": ("--config", "--set", "--out", "--resume", "--debug", "--deepspeed_config", *LAUNCHED),
    "evaluate": (
        *("--config", "--set", "--out", "--predictions", "--manifest", "--stream", "--debug", "--deepspeed_config"),
        *LAUNCHED,
    ),
    "compare": (
        *("--out", "--margin", "--fail-on", "--metric", "--label", "--readout", "--split", "--stages", "--report"),
        "--debug",
        *LAUNCHED,
    ),
    "export": ("--config", "--set", "--out", "--debug", *LAUNCHED),
    "list": ("--debug",),
    "check": ("--config", "--set", "--doctor", "--out", "--debug"),
}
_ARGUMENTS: dict[str, dict[str, object]] = {
    "--config": {"metavar": "FILE", "help": "the job, a YAML file (default: OUT/config.yaml where a run left one)"},
    "--set": {"metavar": "KEY.PATH=VALUE", "action": "append", "default": [], "help": "change one value; repeatable"},
    "--out": {"metavar": "OUT", "help": "the folder of the run"},
    "--resume": {
        "metavar": "{auto,never,PATH}",
        "default": "auto",
        "help": "go on from the last checkpoint in OUT if there is one (default), never, or from this checkpoint",
    },
    "--predictions": {
        "metavar": "FILE",
        "help": "evaluate this table of scores (or .npz of masks), without any model, into OUT",
    },
    "--manifest": {"metavar": "FILE", "help": "labels and attributes of the images of --predictions"},
    "--stream": {
        "action": "store_true",
        "help": "read --predictions (Parquet) batch by batch: AUROC and average precision to the bound that is stated, "
        "no differences or p-values, intervals of rates and AUROC only where each patient has one image",
    },
    "--margin": {"type": float, "metavar": "M", "help": "judge non-inferiority at this margin; status 3 unless shown"},
    "--fail-on": {
        "choices": ("inconclusive", "inferior"),
        "default": "inconclusive",
        "help": "the mildest verdict of a group that gives status 3 (default inconclusive)",
    },
    "--metric": {"default": "auroc", "help": "a metric of the report (default auroc)"},
    "--label": {"help": "one label of the report (default: all)"},
    "--readout": {"default": "linear", "help": "a readout of the report (default linear)"},
    "--split": {"choices": ("test", "val"), "help": "the split (default: test, or val where there is no test)"},
    "--stages": {"action": "store_true", "help": "each stage minus the one before"},
    "--report": {"metavar": "DIR", "help": "write what is found as DIR/compare.{json,csv,md,html}, too"},
    "--doctor": {
        "action": "store_true",
        "help": "examine the teachers of --config on its images, before a step is trained; with --out, write doctor.md "
        "and doctor.json there",
    },
    "--debug": {"action": "store_true", "help": "show the traceback of an error"},
    "--deepspeed_config": {"metavar": "FILE", "help": "DeepSpeed's own keys as JSON, merged under engine.deepspeed"},
    "--world": {"type": int, "default": 1, "metavar": "N", "help": "plan for N ranks (default 1)"},
    "--params": {"action": "store_true", "help": "count the student's parameters, too (imports torch)"},
    "--local_rank": {"type": int, "default": 0, "help": argparse.SUPPRESS},
    "--deepspeed": {"action": "store_true", "help": argparse.SUPPRESS},
}


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: `main`, then the end of this process with the status it returned.

    The interpreter is not taken down. DeepSpeed keeps process groups alive to the end, and a thread of theirs that
    then lets go of a tensor aborts the process (pytorch/pytorch#179291): 134 in place of the status.
    """
    status = 1

    def end() -> None:
        _flush()
        os._exit(status)

    atexit.register(end)  # the first to be registered is the last to be called
    status = main(argv)
    sys.exit(status)


def _flush() -> None:
    """What cannot be written by now is lost, and `main` has told so."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status (see `agglom.errors`); no error of the user's shows a traceback."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        status = _RUN[arguments.verb](arguments)
        if sys.stdout is not None:  # it is where the shell has closed it
            sys.stdout.flush()
        return status
    except AgglomError as error:
        return _report(error, arguments.debug)
    except KeyboardInterrupt:
        return _report(Interrupted("interrupted"), arguments.debug)
    except BrokenPipeError:
        # Whoever read the output has left; without this Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.strerror is None:
            raise
        file = f"{error.filename}: " if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0, "check the path and its permissions")
        return _report(DataError(f"{file}{error.strerror}; {remedy}"), arguments.debug)


_FULL = "free space or choose another --out, then go on with --resume auto"
_REMEDIES = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EROFS: "choose another --out", errno.EIO: "the disk fails"}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report(error: AgglomError, debug: bool) -> int:
    # All ranks read the same configuration, so one says what is wrong with it; data may fail on one alone.
    if _rank() == 0 or not isinstance(error, (ConfigError, PluginError)):
        if debug:
            traceback.print_exc()
        rank = f" (rank {_rank()})" if _rank() else ""
        print(f"agglom{rank}: {error}", file=sys.stderr, flush=True)
    return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agglom", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"agglom {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        if verb == "list":
            sub.add_argument("what", choices=("teachers", "students", "balancers"))
        if verb == "check":
            sub.add_argument(
                "plugin", nargs="?", help="a kind (teachers/timm, students/timm), a file or module:function"
            )
        if verb == "compare":
            sub.add_argument("runs", nargs="*", metavar="RUN", help="the folder of a run; several are put side by side")
        for flag in FLAGS[verb]:
            sub.add_argument(flag, **_ARGUMENTS[flag])  # type: ignore[arg-type]
    return parser


# ── Arguments ──


def _out(arguments: argparse.Namespace) -> Path:
    """The folder of the run, made if need be and seen to be writable before any work is done for it."""
    if not arguments.out:
        raise ConfigError(f"{arguments.verb}: --out is missing; name the folder of the run")
    out = Path(arguments.out).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"\0")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot write there ({error.strerror}); choose another folder") from error
    return out


def _load(arguments: argparse.Namespace, out: Path | None = None):
    from agglom import config

    path = arguments.config
    if path is None and out is not None and (out / "config.yaml").is_file():
        path = out / "config.yaml"
    if path is None:
        raise ConfigError(f"{arguments.verb}: --config is missing; name a configuration, for example configs/demo.yaml")
    return config.load(path, arguments.set, deepspeed_config=getattr(arguments, "deepspeed_config", None))


def _run_folder(arguments: argparse.Namespace) -> Path:
    """The folder of a run that exists."""
    if arguments.out and not Path(arguments.out).is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no run; name the folder that `agglom distill` wrote")
    return _out(arguments)


# ── Verbs ──


def _plan(arguments: argparse.Namespace) -> int:
    out = _out(arguments) if arguments.out else None
    if arguments.world < 1:
        raise ConfigError(f"--world {arguments.world}: a run has at least 1 rank")
    job, base = _load(arguments, out)
    from agglom import config, curriculum, plan
    from agglom.data import manifest as manifests

    config.deepspeed(job, arguments.world)
    manifest = manifests.load(job.data, base)
    text = plan.document(job, base, arguments.world, manifest)
    if arguments.params:
        legs = curriculum.parts(job)
        for leg in legs:
            text += _parameters(leg, "Student" if len(legs) == 1 else f"Student of stage {leg.stages[0].name}")
    if out:
        (out / "plan.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


def _parameters(leg, title: str) -> str:
    """Parameters of a leg's student, built on the meta device: no weights, no memory, no network."""
    import torch

    from agglom import plugins

    bare = {"pretrained": False, "checkpoint": None}
    options = leg.student.options | {key: bare[key] for key in bare if key in leg.student.options}
    with torch.device("meta"):
        student = plugins.build(leg.student.kind, "students", options)
    count = sum(parameter.numel() for parameter in student.module.parameters())
    # fp32 weights and two Adam moments; bf16 keeps them all and a half-width copy.
    size = count * (12 if leg.engine.precision == "fp32" else 14) / 2**20
    return (
        f"\n## {title}\n\n{count / 1e6:.2f} M parameters without heads, summary {student.dims.summary}, patches "
        f"{student.dims.patches}; a checkpoint takes {size:.0f} MiB and the heads.\n"
    )


def _distill(arguments: argparse.Namespace) -> int:
    out = _out(arguments)
    job, base = _load(arguments, out)
    from agglom.distill import distill

    distill(job, base, out, resume=arguments.resume)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.predictions is not None:
        return _audit(arguments)
    if arguments.manifest is not None:
        raise ConfigError("evaluate: --manifest belongs to --predictions; a run has its own, data.manifest")
    if arguments.stream:
        raise ConfigError("evaluate: --stream belongs to --predictions; it reads a table of scores batch by batch")
    out = _run_folder(arguments)
    job, base = _load(arguments, out)
    from agglom import evaluate

    evaluate.main(job, base, out)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    if _rank() != 0:
        return 0
    if arguments.manifest is None and arguments.config is None:
        raise ConfigError(
            "evaluate: --manifest is missing; name the table with the labels and attributes of the images"
        )
    out = _out(arguments)
    if arguments.stream:
        from agglom.stream import main
    else:
        from agglom.audit import main

    manifest, config = (None if name is None else Path(name) for name in (arguments.manifest, arguments.config))
    for path in main(Path(arguments.predictions), manifest, config, arguments.set, out):
        print(path)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    if _rank() != 0:
        return 0
    if arguments.runs and arguments.out:
        raise ConfigError("compare: name the runs or --out, which is another spelling for one run, not both")
    if not arguments.runs and not arguments.out:
        raise ConfigError("compare: --out is missing; name the folder of the run")
    runs, spelling = (arguments.runs, "") if arguments.runs else ([arguments.out], "--out ")
    for run in runs:
        if not Path(run).is_dir():
            raise ConfigError(f"{spelling}{run}: there is no run; name the folder that `agglom distill` wrote")
    from agglom import compare

    asked = ("margin", "metric", "label", "readout", "split", "fail_on", "stages")
    question = compare.Question(**{key: getattr(arguments, key) for key in asked})
    files = None if arguments.report is None else Path(arguments.report)
    text, yes = compare.main([Path(run) for run in runs], question, files)
    print(text)
    return 0 if yes else VERDICT_NO


def _export(arguments: argparse.Namespace) -> int:
    if _rank() == 0:
        out = _run_folder(arguments)
        job, base = _load(arguments, out)
        from agglom import export

        export.main(job, base, out)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from agglom import plugins

    for kind in plugins.available(arguments.what):
        signature = plugins.schema(kind, arguments.what)
        print(f"{kind}: {signature.doc.splitlines()[0] if signature.doc else ''}")
        for name, option in signature.options.items():
            if name not in plugins.INJECTED[arguments.what]:
                print(f"    {name}: {option}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    if arguments.doctor:
        return _doctor(arguments)
    if (arguments.plugin is None) == (arguments.config is None):
        raise ConfigError("check: name a plug-in (agglom check teachers/timm --set model=…) or a job with --config")
    if arguments.out:
        raise ConfigError("check: --out belongs to --doctor; the contract suite is only printed")
    if arguments.config:
        job, _ = _load(arguments)
        from agglom import testing

        print(testing.check_job(job))
        return 0
    from agglom import config, plugins

    kind, package = plugins.place(arguments.plugin)
    options = config.options(arguments.set)
    plugins.check(plugins.schema(kind, package), options, plugins.INJECTED[package])
    from agglom import testing

    print(testing.check(kind, package, options))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.plugin or not (arguments.config or arguments.out):
        raise ConfigError("check: --doctor examines the teachers of a job; name it with --config")
    out = _out(arguments) if arguments.out else None
    job, base = _load(arguments, out)
    from agglom import doctor

    print(doctor.main(job, base, out), end="")
    return 0


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "distill": _distill,
    "evaluate": _evaluate,
    "compare": _compare,
    "export": _export,
    "list": _list,
    "check": _check,
}
