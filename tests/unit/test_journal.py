"""The record of a run: what was written after the checkpoint is forgotten, and a full disk is told."""

import errno
import json
from types import SimpleNamespace

import pytest

from agglom.errors import DataError
from agglom.journal import Journal, disk, duration


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def written(out, *numbers, resumed=0):
    journal = Journal(out, True, resumed)
    for step in numbers:
        journal.record(step, "full", {"loss": 1.0 / step})
    journal.close()
    return out / "metrics.jsonl"


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    assert steps(written(tmp_path, 1, 2, 3)) == [1, 2, 3]
    assert steps(written(tmp_path, 3, 4, resumed=2)) == [1, 2, 3, 4]


def test_a_new_run_starts_empty(tmp_path):
    written(tmp_path, 1, 2, 3)
    assert steps(written(tmp_path, 1)) == [1]


def test_half_a_line_is_none(tmp_path):
    """The process died while it wrote."""
    path = written(tmp_path, 1, 2)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps(written(tmp_path, 3, resumed=2)) == [1, 2, 3]


def test_what_is_not_finite_is_null(tmp_path):
    journal = Journal(tmp_path, True, 0)
    journal.record(1, "full", {"a": float("nan"), "b": float("inf"), "c": None, "d": 2.0})
    journal.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "stage": "full", "a": None, "b": None, "c": None, "d": 2.0}
    assert "NaN" not in text


def test_every_line_is_on_the_disk_at_once(tmp_path):
    journal = Journal(tmp_path, True, 0)
    journal.record(1, "full", {"loss": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    journal.close()


def test_other_ranks_write_nothing(tmp_path, capsys):
    journal = Journal(tmp_path, False, 0)
    journal.record(1, "full", {"loss": 1.0})
    journal.say("not heard")
    journal.report(1, "full", [{"split": "test", "value": 1.0}], "test")
    journal.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_full_disk_names_the_file_and_closes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(tmp_path, True, 0)
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        journal.record(1, "full", {"loss": 1.0})
    journal.close()


def test_disk_passes_on_what_is_not_its_business(tmp_path):
    with pytest.raises(DataError, match=r"x: cannot be written \(Read-only file system\); free space"), disk("x"):
        raise OSError(errno.EROFS, "ignored")
    with pytest.raises(ZeroDivisionError), disk("x"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (42.4, "42s"), (59.6, "1m00"), (425, "7m05"), (3599.6, "1h00"), (11400, "3h10"), (90000, "25h00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_no_two_rows_of_a_report_share_a_tag(tmp_path, studied):
    rows, _ = studied("even", ["student", "teacher/a"], {"site": ["N", "S"], "sex*view": ["F|AP", "M|PA"]})
    journal, tags = Journal(tmp_path, False, 0), []
    journal._board = SimpleNamespace(add_scalar=lambda tag, *_: tags.append(tag), flush=lambda: None)
    journal.report(7, "full", rows, "test")
    assert len(tags) == len(set(tags)) == len(rows)
    assert "eval/scarcity_auroc_gap/even/0.05/linear/student/site=all" in tags
