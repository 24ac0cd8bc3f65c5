"""Other methods for fair groups beside ours, from the configuration to the weights."""

import pytest

from agglom.core import losses

CONFIGURATION = 2
TOGETHER = {
    "data.labels": ["even"],
    "evaluate": {"bootstrap": 20, "permutations": 0, "leakage": False, "conflict": False},
    "balance": {"kind": "agre", "group": "device", "resample": 1.0, "options": {"biased": "two", "follow": 0.125}},
    "loss.mfd": {"label": "even", "weight": 2.0, "teacher": "one"},
    "optim.accumulate": 2,
    "stages": [
        {"name": "warm", "length": "4 steps", "size": 32, "teachers": ["two", "fair"], "warmup": "2 steps"},
        {"name": "full", "length": "6 steps", "size": 64},
    ],
    "teachers.local": {"kind": "specialist", "source": "one", "options": {"attribute": "device", "groups": ["A"]}},
}


def test_agre_mfd_and_resampling_together(lab, stop_at, monkeypatch):
    """A run that was interrupted is one that was not; what is not known between steps is said to be so."""
    terms, mfd = [], losses.mfd
    with monkeypatch.context() as patch:
        patch.setattr(losses, "mfd", lambda *parts: terms.append(mfd(*parts)) or terms[-1])
        out = lab.run("out", TOGETHER)
    told = (out / "plan.md").read_text()
    assert "- images: drawn with replacement, a group of share p with one ∝ p^0\n" in told
    assert "- MFD of even over device: 2 × that of the summaries of one\n" in told
    lines = lab.metrics(out)
    assert [line["mfd"] > 0 for line in lines] == [line["stage"] == "full" for line in lines]
    assert lines[-1]["mfd"] == pytest.approx(2 * sum(float(term.detach()) for term in terms[-2:]) / 2)
    assert {line["weight/two/A"] for line in lines} == {0.125}
    assert {line["weight/fair/A"] for line in lines} == {None}

    stop_at(9)  # after four micro-batches of the second stage
    assert lab.distill("again", TOGETHER) == 130
    lab.run("again", TOGETHER)
    again = lab.folder / "again"
    assert lab.same(lab.metrics(again), lines)
    assert lab.same(lab.weights(again), lab.weights(out))


def test_mfd_needs_a_summary_that_is_learnt(lab, capsys):
    changes = TOGETHER | {"teachers.one": lab.job()["teachers"]["one"] | {"weight": 0.0}}
    assert lab.distill("out", changes) == CONFIGURATION
    assert "loss.mfd: 'one' has no summary whose loss has a weight; name another teacher" in capsys.readouterr().err


def test_a_group_that_is_not_there_has_no_static_weight(lab, capsys):
    assert lab.distill("out", {"balance.kind": "static", "balance.options": {"groups": {"C": 2}}}) != 0
    assert "groups: 'C' is not one of A, B" in capsys.readouterr().err
