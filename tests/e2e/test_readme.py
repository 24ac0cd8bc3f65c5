"""The README is run: its commands, its code, its configurations; and what it says of files, verbs and outputs is so.

A block whose first line is a comment with a file name is that file. Blocks below `<!-- long -->` are slow tests.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from agglom import cli, config, errors, plugins, report, testing
from agglom.data import simulate

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Flags of other programs.
LAUNCHER = {"--num_gpus", "--num_accelerators", "--master_port"}
SIMULATE = {f"--{split}" for split in simulate.SHARE_B}
# What a copy of the checkout need not hold; the environment is linked, so that `make demo` finds it.
LEFT = shutil.ignore_patterns(".git", ".venv", "out", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "tests")


class Block(NamedTuple):
    """A fenced block: language, text, and whether it takes long."""

    language: str
    text: str
    long: bool

    @property
    def file(self):
        """The file that this block is, where its first line says so."""
        found = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return found and found[1]


def blocks(text):
    found = re.finditer(r"^(<!-- long -->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[2], match[3], match[1] is not None) for match in found]


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


BLOCKS = blocks(README)
PROSE = prose(README)


def commands():
    """The commands in blocks and in the text, as lists of words."""
    lines = [line for block in BLOCKS if block.language in ("bash", "text") for line in block.text.splitlines()]
    inline = re.findall(r"`([^`]+)`", PROSE)
    return [shlex.split(text) for text in [*lines, *inline] if re.match(r"(agglom|deepspeed|python) ", text)]


def checkout(folder):
    """A copy of this checkout as a new user has it, with the files of the README in it."""
    copy = folder / "agglom"
    shutil.copytree(ROOT, copy, ignore=LEFT)
    if (ROOT / ".venv" / "ready").is_file():
        (copy / ".venv").symlink_to(ROOT / ".venv")
        # Were they newer than the environment, `make demo` would install this copy into it.
        for path in (copy / "setup.cfg", *(copy / "requirements").iterdir()):
            os.utime(path, (0, 0))
    for block in BLOCKS:
        if block.file:
            (copy / block.file).write_text(block.text, encoding="utf-8")
    return copy


def run(block, folder):
    """Run a block of bash in `folder`, with this interpreter first on the path and one thread a process."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-e", "-o", "pipefail", "-c", block.text]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def bash(long):
    """The blocks of bash to run, in order; `make test` would run itself."""
    wanted = [block for block in BLOCKS if block.language == "bash" and block.long == long]
    return [block for block in wanted if "make test" not in block.text]


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A checkout in which the short blocks were run, and what they printed."""
    folder = checkout(tmp_path_factory.mktemp("readme"))
    return folder, "\n".join(run(block, folder) for block in bash(long=False))


def test_the_short_blocks_run_in_order(used):
    folder, printed = used
    assert "max abs diff" in printed
    assert "the student is" in printed  # the table of `compare`
    assert (folder / "out" / "mine" / "reports" / "full.html").is_file()


def test_the_code_runs_after_them(used, monkeypatch, capsys):
    """In this process, whose imports are paid for."""
    monkeypatch.chdir(used[0])
    for block in BLOCKS:
        if block.language == "python" and not block.file:
            exec(compile(block.text, "README.md", "exec"), {})
    assert "torch.Size([2, 16, 64])" in capsys.readouterr().out


def test_the_plug_ins_keep_their_contract(used):
    folder, _ = used
    options = {"checkpoint": str(folder / "my-teacher.safetensors")}
    assert "FAIL" not in testing.check(str(folder / "my_teacher.py"), "teachers", options)
    assert "FAIL" not in testing.check(str(folder / "my_student.py"), "students", {"depth": 2})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_long_blocks_run_in_order(used):
    folder, _ = used
    for block in bash(long=True):
        run(block, folder)
    assert (folder / "out" / "demo" / "export" / "model.safetensors").is_file()


def tree(text):
    """Paths in a drawing of a folder; a name that ends in '/' is a folder."""
    paths, parents = set(), []
    for line in text.splitlines()[1:]:
        lead, name = re.match(r"([│ ]*[├└]── )(\S+)", line).groups()
        parents = [*parents[: len(lead) // 4 - 1], name]
        paths.add("".join(parents))
    return paths


def test_the_output_tree_is_what_the_run_wrote(used):
    folder, _ = used
    out = folder / "out" / "mine"
    (drawn,) = [block.text for block in BLOCKS if block.text.startswith("out/mine/\n")]
    drawn = tree(drawn)
    for path in drawn:
        assert (out / path).is_dir() if path.endswith("/") else (out / path).is_file(), path
    written = {path.name + "/" * path.is_dir() for path in out.iterdir()}
    assert written == {path for path in drawn if "/" not in path[:-1]}
    exported = {path.name for path in (out / "export").iterdir()}
    assert exported == {path.removeprefix("export/") for path in drawn if path.startswith("export/")} - {""}
    reports = {path.name for path in (out / "reports").iterdir()}
    assert reports == {
        f"{stage}.{kind}" for stage in ("teachers", "full") for kind in ("html", "md", "json", "csv", "scores.parquet")
    }


def test_the_report_of_the_run_has_the_keys_and_predictors_that_are_named(used):
    folder, _ = used
    found = report.load(folder / "out" / "mine" / "reports" / "full.json")
    sentence = re.search(r"with the keys (.*?) and a few more", README)[1]
    assert set(re.findall(r"`(\w+)`", sentence)) < set(report.COLUMNS)
    assert {row["predictor"] for row in found.rows} == {"student", "teacher/mine", "ensemble", "student - teacher/mine"}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: b.file or "code")
def test_python_compiles(block):
    compile(block.text, block.file or "README.md", "exec")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: b.file or "part")
def test_configurations_are_valid(block, tmp_path):
    """A part of a job is merged over the job that the README writes."""
    for other in BLOCKS:
        if other.file:
            (tmp_path / other.file).write_text(other.text, encoding="utf-8")
    part = tmp_path / (block.file or "part.yaml")
    if not block.file:
        part.write_text(yaml.safe_dump({"extends": "my.yaml", **yaml.safe_load(block.text)}), encoding="utf-8")
    job, _ = config.load(part)
    config.deepspeed(job, 2)


def test_parts_of_a_job_in_the_text_are_valid(tmp_path):
    for block in BLOCKS:
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    job = yaml.safe_load((tmp_path / "my.yaml").read_text())
    parts = re.findall(r"[Ii]n the job it is `(.+?)`\.", README)
    assert len(parts) == 2
    for part in map(yaml.safe_load, parts):
        (key,) = part
        changed = job | (part if key == "student" else {"teachers": part})
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
        config.load(tmp_path / "changed.yaml")
    settings = [shlex.split(text)[1] for text in re.findall(r"`(--set [^`]*=[^`]*)`", PROSE)]
    assert settings
    config.load(tmp_path / "my.yaml", settings)


def test_languages_are_known_and_every_fence_is_closed():
    assert {block.language for block in BLOCKS} == {"bash", "yaml", "python", "text"}
    assert README.count("```") == 2 * len(BLOCKS)
    assert README.count("<!-- long -->") == sum(block.long for block in BLOCKS)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_files_exist(name):
    text = prose((ROOT / name).read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert not [link for link in links if not (ROOT / link).exists()]
    # Names in backticks that are paths in the checkout, unless they are an output, a placeholder or one's own file.
    paths = re.findall(r"`((?:agglom|teachers|students|configs|launch|tests|bench|docs)/[\w./-]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_verbs_and_their_flags_are_those_of_the_command_line():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*)\|$", README[README.index("\n## Verbs") :], re.MULTILINE)
    table = {verb: set(re.findall(r"`(--[\w-]+)`", flags)) for verb, flags in rows}
    hidden = {"--debug", *cli.LAUNCHED}
    assert table == {verb: set(flags) - hidden for verb, flags in cli.FLAGS.items()}


def test_every_command_has_a_verb_and_flags_that_exist():
    seen = set()
    for words in commands():
        flags = {word for word in words if word.startswith("--")}
        if words[0] == "agglom":
            seen.add(words[1])
            assert flags <= set(cli.FLAGS[words[1]]), words
        elif words[0] == "deepspeed":
            (script,) = [word for word in words if word.startswith("launch/")]
            assert flags <= LAUNCHER | set(cli.FLAGS[Path(script).stem]), words
        elif "agglom.data.simulate" in words:
            assert flags <= SIMULATE, words
    assert seen >= {"plan", "distill", "evaluate", "compare", "export", "list", "check"}
    known = {flag for flags in cli.FLAGS.values() for flag in flags} | LAUNCHER
    assert set(re.findall(r"(?<![\w-])(--\w[\w-]*)", PROSE)) <= known


def test_kinds_balancers_and_launch_scripts_are_those_that_there_are():
    start = README.index("## Bring your own teacher")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README[start : README.index("```python", start)], re.MULTILINE)
    assert {kind for row in rows for kind in re.findall(r"`(\w+)`", row)} == set(plugins.available("teachers"))
    said = re.search(r"`agglom list balancers` shows .*", README)[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(plugins.available("balancers"))
    said = re.search(r"The scripts in \[launch/\].*?for the DeepSpeed", README)[0]
    assert set(re.findall(r"`(\w+)`", said)) == {path.stem for path in (ROOT / "launch").glob("*.py")}


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert set(re.findall(r"\bmake ([\w-]+)[`\n]", text)) <= targets


def test_exit_statuses_are_those_of_the_errors():
    section = README[README.index("## Exit statuses") : README.index("## Limits")]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", section, re.MULTILINE)
    documented = {int(status): meaning for status, meaning in rows}
    classes = [value for value in vars(errors).values() if isinstance(value, type) and value is not errors.AgglomError]
    assert set(documented) == {0, errors.VERDICT_NO, *(one.exit_status for one in classes)}
    for status, meaning in documented.items():
        assert f"| {status} | {meaning}" in errors.__doc__
