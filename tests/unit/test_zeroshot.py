"""Zero-shot: the protocol against NumPy, who is read through whom, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from agglom import config, zeroshot
from agglom.core.types import Dims, Text
from agglom.errors import ConfigError
from agglom.job import Prompts
from agglom.scores import Scores

BINARY = {"sick": Prompts(positive=("ill", "sick"), negative=("well", "healthy", "fine"))}
CLASSES = {f"finding={name}": Prompts(positive=(name, f"a picture of {name}")) for name in ("a", "b", "c")}
WIDTH, SHARED = 6, 5


def vector(text):
    """Embeddings of very different lengths, so that it matters when they are normalised."""
    rng = np.random.default_rng(list(text.encode()))
    return rng.standard_normal(SHARED) * 10 ** rng.uniform(-2, 2)


def speaking(scale=20.0):
    matrix = torch.tensor(np.random.default_rng(7).standard_normal((WIDTH, SHARED)))
    return Text(
        embed=lambda texts: torch.tensor(np.stack([vector(text) for text in texts]), dtype=torch.float32),
        project=lambda summary: summary @ matrix.float(),
        scale=scale,
    )


def teacher(text=None, summary=WIDTH, derived=None):
    return SimpleNamespace(text=text, dims=Dims(summary, 4), derived=derived)


def summaries(n=50):
    return torch.tensor(np.random.default_rng(0).standard_normal((n, WIDTH)), dtype=torch.float32)


def reference(texts, scale=20.0):
    """Softmax over sides, one image and one text at a time (Radford et al. 2021, section 3.1.4)."""
    project = speaking().project
    found = []
    for row in summaries():
        image = project(row[None])[0].double().numpy()
        cosines = []
        for side in texts:
            mean = np.mean([vector(text) / np.linalg.norm(vector(text)) for text in side], axis=0)
            cosines.append(image @ mean / np.linalg.norm(image) / np.linalg.norm(mean))
        power = np.exp(scale * np.array(cosines))
        found.append(power / power.sum())
    return np.array(found)


def probability(prompts, label):
    prompted = zeroshot.embed({"one": teacher(speaking)}, prompts)["one"]
    return 1 / (1 + np.exp(-prompted.logit(label, summaries())))


def test_a_binary_label_is_told_from_its_negative():
    expected = reference([BINARY["sick"].positive, BINARY["sick"].negative])
    np.testing.assert_allclose(probability(BINARY, "sick"), expected[:, 0], atol=1e-6)


def test_a_class_is_told_from_the_other_classes():
    expected = reference([prompts.positive for prompts in CLASSES.values()])
    found = np.stack([probability(CLASSES | BINARY, label) for label in CLASSES], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_class_with_negative_prompts_is_told_from_them():
    prompts = {"finding=a": Prompts(positive=("a",), negative=("b",))}
    np.testing.assert_allclose(probability(prompts, "finding=a"), reference([("a",), ("b",)])[:, 0], atol=1e-6)


def test_a_tower_is_loaded_once_and_only_for_prompts():
    loaded = []

    def load():
        loaded.append(1)
        return speaking()

    teachers = {"clip": teacher(load), "fair": teacher(load), "plain": teacher(), "patches": teacher(load, None)}
    assert zeroshot.embed(teachers, {}) == {}
    assert not loaded
    assert list(zeroshot.embed(teachers, BINARY)) == ["clip", "fair"]
    assert len(loaded) == 1


# ── Calibration ──


def read(scale, label_N, val_N):
    prompted = zeroshot.embed({"one": teacher(lambda: speaking(scale))}, BINARY)["one"]
    return prompted.logit("sick", summaries()), zeroshot.readout(prompted, "sick", summaries(), label_N, val_N)


@pytest.mark.parametrize("scale", [0.01, 1, 100])
def test_calibration_is_platts_and_keeps_ranks(scale):
    """Whatever the scale of a teacher: one of 100 gives probabilities that a clip would tie, one of .01 hardly any."""
    logit_N, _ = read(scale, np.zeros(50), np.zeros(50, bool))
    val_N = np.arange(50) < 30
    noise_N = np.random.default_rng(1).standard_normal(50)
    label_N = (logit_N / logit_N.std() + noise_N > 0).astype(float)
    _, readout = read(scale, label_N, val_N)
    platt = LogisticRegression(C=1e9, tol=1e-8, max_iter=1000).fit(logit_N[val_N, None] / logit_N.std(), label_N[val_N])
    expected = platt.predict_proba(logit_N[:, None] / logit_N.std())[:, 1]
    np.testing.assert_allclose(readout.scores_N, expected, atol=1e-3)
    np.testing.assert_array_equal(np.argsort(readout.scores_N), np.argsort(logit_N))
    assert readout.note == ""


@pytest.mark.parametrize("val", [0, 30])
def test_without_both_classes_in_validation_the_softmax_stays(val):
    logit_N, readout = read(20, np.zeros(50), np.arange(50) < val)
    np.testing.assert_allclose(readout.scores_N, 1 / (1 + np.exp(-logit_N)))
    assert "not calibrated" in readout.note


def test_summaries_without_a_difference_are_no_division_by_zero():
    prompted = zeroshot.embed({"one": teacher(speaking)}, BINARY)["one"]
    label_N = np.tile([0.0, 1.0], 5)
    readout = zeroshot.readout(prompted, "sick", torch.ones(10, WIDTH), label_N, np.ones(10, bool))
    assert np.isfinite(readout.scores_N).all()
    assert np.ptp(readout.scores_N) < 1e-9


# ── Through whom the student is read ──


def run(teachers, prompted_by=None, prompts=BINARY, learnt=None):
    evaluate = SimpleNamespace(prompts=prompts, prompted_by=prompted_by)
    targets = {name: Dims(one.dims.summary, 4) for name, one in teachers.items()} | (learnt or {})
    return SimpleNamespace(job=SimpleNamespace(evaluate=evaluate), teachers=teachers, targets=targets)


def test_the_student_is_read_through_the_named_teacher_or_the_first_that_can():
    teachers = {"a": teacher(), "b": teacher(speaking), "c": teacher(speaking)}
    assert zeroshot.reader(run(teachers)) == "b"
    assert zeroshot.reader(run(teachers | {"a": teacher(speaking, derived="b")})) == "b"
    assert zeroshot.reader(run(teachers, "c")) == "c"
    assert zeroshot.reader(run(teachers, learnt={"b": Dims(None, 4)})) == "c"
    assert zeroshot.reader(run(teachers, prompts={})) is None
    assert zeroshot.reader(run({"a": teacher()})) is None
    for one in (run(teachers), run(teachers, "c"), run({"a": teacher()}, prompts={})):
        zeroshot.check(one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (run({"a": teacher(), "b": teacher()}), r"evaluate\.prompts: no teacher has a text tower \(a, b\); add"),
        (run({"a": teacher(speaking, None)}), r"evaluate\.prompts: no teacher has a text tower \(a\)"),
        (
            run({"a": teacher(), "b": teacher(speaking)}, "a"),
            r"evaluate\.prompted_by: 'a' has no text tower; those that have one: b",
        ),
        (
            run({"b": teacher(speaking)}, "b", learnt={"b": Dims(None, 4)}),
            r"evaluate\.prompted_by: the student learns no summary of 'b'; name it in a stage, and keep",
        ),
    ],
)
def test_nobody_to_read_the_prompts(given, message):
    with pytest.raises(ConfigError, match=message):
        zeroshot.check(given)


# ── The configuration ──

JOB = """
data: {manifest: m.csv, labels: [sick, "finding=a", "finding=b", "finding=c", "lone=x"]}
teachers: {clip: {kind: timm, options: {model: test_vit}}}
student: {options: {model: test_vit}}
stages: [{name: full, length: 1 steps}]
"""


def load(tmp_path, *settings):
    (tmp_path / "job.yaml").write_text(JOB)
    return config.load(tmp_path / "job.yaml", [f"evaluate.{one}" for one in settings])[0]


def test_prompts_are_read_and_written(tmp_path):
    settings = ["prompts={sick: {positive: [ill], negative: [well]}}", "prompted_by=clip"]
    job = load(tmp_path, *settings)
    assert job.evaluate.prompts == {"sick": Prompts(positive=("ill",), negative=("well",))}
    (tmp_path / "dumped.yaml").write_text(config.dump(job))
    assert config.load(tmp_path / "dumped.yaml")[0] == job


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prompts={sick: {positive: [ill]}}", "evaluate.prompts.sick: needs negative, too: describe"),
        ("prompts={'lone=x': {positive: [x]}}", "evaluate.prompts.lone=x: needs negative, too"),
        ("prompts={sikc: {positive: [a], negative: [b]}}", "'sikc' is not one of the labels under data.labels"),
        ("prompts={sikc: {positive: [a], negative: [b]}}", "did you mean 'sick'?"),
        ("prompts={sick: {positive: [], negative: [b]}}", "evaluate.prompts.sick.positive: is empty"),
        ("prompts={sick: {positive: [' '], negative: [b]}}", "evaluate.prompts.sick.positive: holds an empty text"),
        (
            "prompts={sick: {positive: ill, negative: [b]}}",
            'prompts.sick.positive: expected a list, got "ill"',
        ),
        ("prompts={sick: {postive: [a]}}", "evaluate.prompts.sick: unknown key 'postive'; did you mean 'positive'?"),
        ("prompts={'finding=a': {positive: [a]}}", "told from the other classes of 'finding', but 'finding=b' has no"),
        (
            "prompts={'finding=a': {positive: [a]}, 'finding=b': {positive: [b], negative: [c]}}",
            "evaluate.prompts.finding=a: is told from the other classes of 'finding', but 'finding=b' has negative",
        ),
        ("prompted_by=clap", "evaluate.prompted_by: 'clap' is not one of the teachers: clip; did you mean 'clip'?"),
    ],
)
def test_wrong_prompts(tmp_path, setting, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, setting)
    assert message in str(caught.value)


def test_a_label_without_prompts_has_no_zero_shot_scores():
    nan = np.nan
    score_PNL = np.array([[[0.1, 0.2], [0.3, nan]], [[0.4, nan], [0.5, nan]]])
    found = Scores(("clip", "clip"), ("linear", "zeroshot"), ("sick", "old"), np.arange(2), score_PNL)
    assert list(found.of("zeroshot", "sick")) == ["clip"]
    assert found.of("zeroshot", "old") == {}
    assert list(found.of("linear", "old")) == ["clip"]
