"""The command line: its flags are frozen, its errors are messages with a status, its plan needs no torch."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import agglom
from agglom import cli
from agglom.errors import DataError, NumericsError, PluginError

ROOT = Path(agglom.__file__).parents[1]
JOB = """\
data:
  manifest: table.csv
  labels: [ill]
  attributes: {sex: {}}
  groups: [sex]
  min_support: 2
teachers:
  dinov2: {kind: packaged, options: {model: dinov2_vits14}}
student: {options: {model: vit_tiny_patch16_224}}
stages:
  - {name: full, length: 20 steps, size: 32}
optim: {batch: 4}
"""


@pytest.fixture
def job(tmp_path):
    rows = ["image,patient,split,ill,sex"]
    for i in range(12):
        (tmp_path / f"{i}.png").touch()
        rows.append(f"{i}.png,p{i},{'train' if i < 6 else 'val' if i < 8 else 'test'},{i % 2},{'FM'[i % 2]}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture
def failing(monkeypatch, job, tmp_path):
    """Run `distill` with a training that raises, and return status and stderr."""

    def run(error, capsys, *more):
        module = type(sys)("agglom.distill")

        def distill(*arguments, **named):
            raise error

        module.distill = distill
        monkeypatch.setitem(sys.modules, "agglom.distill", module)
        monkeypatch.setattr(agglom, "distill", module, raising=False)
        status = cli.main(["distill", "--config", str(job), "--out", str(tmp_path / "out"), *more])
        return status, capsys.readouterr().err

    return run


def test_flags_are_frozen():
    """A new flag is a promise for years: put values in the configuration, or add a row here on purpose."""
    launched = {"--local_rank", "--deepspeed"}
    expected = {
        "plan": {"--config", "--set", "--out", "--debug", "--deepspeed_config", "--world", "--params"},
        "distill": {"--config", "--set", "--out", "--resume", "--debug", "--deepspeed_config"} | launched,
        "evaluate": {
            "--config",
            "--set",
            "--out",
            "--predictions",
            "--manifest",
            "--stream",
            "--debug",
            "--deepspeed_config",
        }
        | launched,
        "compare": {
            "--out",
            "--margin",
            "--fail-on",
            "--metric",
            "--label",
            "--readout",
            "--split",
            "--stages",
            "--report",
            "--debug",
        }
        | launched,
        "export": {"--config", "--set", "--out", "--debug"} | launched,
        "list": {"--debug"},
        "check": {"--config", "--set", "--doctor", "--out", "--debug"},
    }
    verbs = cli._parser()._subparsers._group_actions[0].choices
    found = {
        verb: {text for action in parser._actions for text in action.option_strings} - {"-h", "--help"}
        for verb, parser in verbs.items()
    }
    assert found == expected
    assert set(cli.FLAGS) == set(cli.VERBS) == set(expected)


# ── Usage ──


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "the following arguments are required: VERB"),
        (["distil"], "invalid choice: 'distil'"),
        (["plan", "--confg", "x"], "unrecognized arguments: --confg x"),
        (["plan", "--conf", "x"], "unrecognized arguments: --conf x"),
        (["plan"], "agglom: plan: --config is missing"),
        (["plan", "--config", "none.yaml"], "agglom: none.yaml: no such configuration"),
        (["plan", "--config", "configs/demo.yaml", "--world", "0"], "agglom: --world 0: a run has at least 1 rank"),
        (["plan", "--world", "two"], "invalid int value: 'two'"),
        (["distill", "--config", "configs/demo.yaml"], "agglom: distill: --out is missing"),
        (["compare", "--out", "none"], "agglom: --out none: there is no run"),
        (["compare", "configs", "none"], "agglom: none: there is no run"),
        (["compare", "configs", "--out", "configs"], "agglom: compare: name the runs or --out"),
        (["compare", "configs", "--margin", "2"], "agglom: --margin 2: expected a number between 0 and 1"),
        (["compare", "configs", "--margin", "-0.1"], "agglom: --margin -0.1: expected a number between 0 and 1"),
        (["compare", "configs", "--margin", "nan"], "agglom: --margin nan: expected a number between 0 and 1"),
        (["compare", "configs", "--fail-on", "inferior"], "there is no verdict without --margin"),
        (["compare", "configs", "--fail-on", "never"], "invalid choice: 'never'"),
        (["compare", "configs", "--stages", "--margin", ".1"], "--stages and --margin are two questions"),
        (["compare", "configs", "tests", "--stages"], "--stages compares the stages of one run"),
        (["evaluate", "--predictions", "s.csv", "--out", "x"], "agglom: evaluate: --manifest is missing"),
        (["evaluate", "--predictions", "s.csv", "--manifest", "m.csv"], "agglom: evaluate: --out is missing"),
        (["evaluate", "--manifest", "m.csv", "--out", "configs"], "--manifest belongs to --predictions"),
        (["evaluate", "--stream", "--out", "configs"], "--stream belongs to --predictions"),
        (["list"], "the following arguments are required: what"),
        (["check"], "agglom: check: name a plug-in"),
        (
            ["check", "timm", "--doctor"],
            "agglom: check: --doctor examines the teachers of a job; name it with --config",
        ),
        (["check", "--doctor"], "agglom: check: --doctor examines the teachers of a job; name it with --config"),
        (["check", "--doctor", "--out", "configs"], "agglom: check: --config is missing"),
        (["check", "--config", "configs/demo.yaml", "--out", "x"], "agglom: check: --out belongs to --doctor"),
        (["check", "teachers/tim"], "agglom: 'tim' is not one of the teachers; did you mean 'timm'?"),
        (["check", "timm", "--set", "modl=x"], "unknown key 'modl'; did you mean 'model'?"),
        (["check", "timm"], "key 'model' (str) is missing; kind 'timm' needs it"),
    ],
)
def test_wrong_usage(argv, expected, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_doctor_takes_the_configuration_of_a_run(tmp_path, monkeypatch):
    from agglom import doctor

    (tmp_path / "config.yaml").write_text(JOB)
    seen = []
    monkeypatch.setattr(doctor, "main", lambda job, base, out: seen.append((list(job.teachers), out)) or "")
    assert cli.main(["check", "--doctor", "--out", str(tmp_path)]) == 0
    [(teachers, out)] = seen
    assert (teachers, out) == (["dinov2"], tmp_path)


def test_help_and_version(capsys):
    assert cli.main(["--version"]) == 0
    assert agglom.__version__ in capsys.readouterr().out
    assert cli.main(["distill", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out


def test_out_is_tried_before_anything_else(tmp_path, capsys):
    (tmp_path / "file").touch()
    status = cli.main(["distill", "--config", "none.yaml", "--out", str(tmp_path / "file" / "out")])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"agglom: --out {tmp_path / 'file' / 'out'}: cannot write there (Not a directory)")


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["plan", "--config", "none.yaml", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("agglom: none.yaml: no such configuration")


# ── Status of errors ──


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (PluginError("no weights"), 2, "agglom: no weights"),
        (DataError("a row"), 4, "agglom: a row"),
        (NumericsError("step 3"), 5, "agglom: step 3"),
        (KeyboardInterrupt(), 130, "agglom: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 4, "agglom: out/x: No space left on device; free"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), 4, "agglom: out/x: Permission denied; check"),
        (OSError(errno.EROFS, "Read-only file system"), 4, "agglom: Read-only file system; choose another --out"),
    ],
)
def test_status_of_errors(failing, capsys, error, status, expected):
    got, text = failing(error, capsys)
    assert got == status
    assert text.startswith(expected)
    assert "Traceback" not in text


def test_what_is_not_the_users_fault_is_raised(failing, capsys):
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError(), capsys)


def test_one_rank_speaks_of_the_configuration_and_each_of_its_data(failing, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert failing(PluginError("no weights"), capsys) == (2, "")
    assert failing(DataError("a row"), capsys) == (4, "agglom (rank 1): a row\n")


def test_arguments_reach_the_training(monkeypatch, job, tmp_path):
    calls = []
    module = type(sys)("agglom.distill")
    module.distill = lambda job, base, out, resume: calls.append((job, base, out, resume))
    monkeypatch.setitem(sys.modules, "agglom.distill", module)
    monkeypatch.setattr(agglom, "distill", module, raising=False)
    flags = ["--set", "seed=7", "--set", "optim.batch=8", "--resume", "never", "--local_rank=0", "--deepspeed"]
    assert cli.main(["distill", "--config", str(job), "--out", str(tmp_path / "o"), *flags]) == 0
    ((got, base, out, resume),) = calls
    assert (got.seed, got.optim.batch, base, out, resume) == (7, 8, tmp_path, tmp_path / "o", "never")


# ── plan, list ──


def test_plan_prints_and_writes(job, tmp_path, capsys):
    assert cli.main(["plan", "--config", str(job), "--world", "2", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "plan.md").read_text()
    assert "global batch 4 = 2 images × 1 accumulation step × 2 ranks" in text
    assert "20 steps" in text


def test_plan_of_wrong_data(job, capsys):
    (job.parent / "3.png").unlink()
    assert cli.main(["plan", "--config", str(job)]) == 4
    assert "3.png" in capsys.readouterr().err


def test_plan_finds_conflicts_with_deepspeed(job, tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 5}')
    assert cli.main(["plan", "--config", str(job), "--deepspeed_config", str(tmp_path / "ds.json")]) == 2
    assert "engine.deepspeed.train_batch_size: 5 contradicts 4, set by optim.batch" in capsys.readouterr().err


def test_plan_needs_no_torch(job):
    code = (
        "import sys; from agglom.cli import main\n"
        "status = main(['plan', '--config', sys.argv[1]])\n"
        "assert not {'torch', 'pandas', 'deepspeed', 'timm'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(job)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_plan_counts_parameters(job, capsys):
    assert cli.main(["plan", "--config", str(job), "--params"]) == 0
    assert "5.52 M parameters without heads, summary 192, patches 192" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("teachers", ["erased: ", "    attribute: str", "timm: ", "    model: str"]),
        ("students", ["timm: A trainable timm backbone without classifier."]),
        ("balancers", ["uniform: ", "    cap: float = 10.0"]),
    ],
)
def test_list(what, expected, capsys):
    assert cli.main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in expected:
        assert any(line.startswith(start) for line in lines), start
    assert not any(line.startswith(("    source", "    cells")) for line in lines)


# ── Launch scripts ──


@pytest.mark.parametrize("verb", ["distill", "evaluate", "compare", "export"])
def test_launch_scripts_are_their_verb_from_any_folder(verb, tmp_path):
    script = ROOT / "launch" / f"{verb}.py"
    assert len(script.read_text().splitlines()) == 9
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, f"agglom: {verb}: --out is missing; name the folder of the run\n")


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m agglom list teachers | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) in ((0, ""), (-signal.SIGPIPE, ""))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(
    ("to", "status", "told"), [("> /dev/full", 4, "agglom: No space left on device"), (">&-", 0, "")]
)
def test_output_that_cannot_be_written(to, status, told):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = f"{sys.executable} -m agglom list teachers {to}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stderr.partition(";")[0].strip() == told


def test_threads_of_a_group_that_lives_on_do_not_change_the_status(tmp_path):
    """Collectives end while the process does: taking the interpreter down aborted it, status 134, now and then."""
    script = tmp_path / "late.py"
    script.write_text(LATE)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert "terminate" not in done.stderr


LATE = """
import sys, time
import torch
import torch.distributed as dist
from agglom import cli
from agglom.engine import launched

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(0.2)  # where the interpreter is taken down, the threads get their turn here

late, kept = Late(), []

def main(argv):
    with launched():
        kept.append(dist.group.WORLD)
        sys.setswitchinterval(60)  # the threads lag behind
        for _ in range(1000):
            dist.all_reduce(torch.ones(1000), async_op=True)
    return 4

cli.main = main
cli.run([])
"""
