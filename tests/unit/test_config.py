"""The configuration: what is read, what is refused and how, and that a dumped job is the job."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agglom import config
from agglom.errors import ConfigError
from agglom.job import Attribute, Balance, Data, Job, Optim, Stage, StudentSpec, TeacherSpec, duration

ROOT = Path(config.__file__).parents[1]
GOOD = """\
data:
  manifest: table.csv
  labels: [ill]
  attributes:
    sex: {}
    age: {kind: continuous, bins: [50, 65]}
  groups: [sex, sex*age]
teachers:
  dinov2: {kind: packaged, options: {model: dinov2_vits14}}
  erased: {kind: erased, source: dinov2, options: {attribute: sex}}
student: {options: {model: vit_tiny_patch16_224}}
stages:
  - {name: full, length: 20 steps}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="job.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def good(write):
    return write(GOOD)


def message(path, *overrides, **more):
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides, **more)
    assert caught.value.exit_status == 2
    return str(caught.value)


# ── What is read ──


def test_load_gives_the_job_and_its_folder(good):
    job, base = config.load(good)
    assert base == good.parent
    assert job.data.manifest == str(good.parent / "table.csv")
    assert job.stages == (Stage(name="full", length="20 steps"),)
    assert job.data.attributes["age"] == Attribute(kind="continuous", bins=(50, 65))
    assert job.optim == Optim()


def test_scalars_are_those_of_yaml_1_2(write):
    path = write(GOOD + "optim: {weight_decay: 1e-4, batch: 1_024}\n")
    job, _ = config.load(path, ["data.attributes.sex.missing=[no, 12:30, 2020-01-01, '']"])
    assert job.optim.weight_decay == 1e-4
    assert job.optim.batch == 1024
    assert job.data.attributes["sex"].missing == ("no", "12:30", "2020-01-01", "")


@pytest.mark.parametrize("kind", ["uniform", "teacher_dropping", "ada_loss", "static"])
def test_what_weighs_teachers_needs_no_group(good, kind):
    job, _ = config.load(good, [f"balance.kind={kind}"])
    assert job.balance.group is None


def test_clusters_do_for_groups(good):
    proxies = "proxies: {teacher: dinov2}"
    for balance in ("kind: group_dro, resample: .5", "kind: static, options: {groups: {cluster 1: 2}}"):
        job, _ = config.load(good, [f"balance={{{balance}, {proxies}}}"])
        assert job.balance.over == "clusters of dinov2"


def test_set_reaches_maps_and_lists(good):
    texts = ["stages[0].size=64", "stages.0.length=3 epochs", "data.attributes.site={}", "balance.group=site"]
    job, _ = config.load(good, texts)
    assert (job.stages[0].size, job.stages[0].length) == (64, "3 epochs")
    assert job.data.attributes["site"] == Attribute()


def test_extends_merges_maps_and_replaces_lists(tmp_path, write):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(GOOD)
    path = write("extends: shared/base.yaml\ndata: {groups: [age]}\noptim: {batch: 8}\n")
    job, _ = config.load(path)
    assert job.data.groups == ("age",)
    assert job.data.labels == ("ill",)
    assert job.optim.batch == 8
    # A path starts at the folder of the file that says it.
    assert job.data.manifest == str(tmp_path / "shared" / "table.csv")


def test_paths_of_set_start_at_the_current_folder(good, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    job, _ = config.load(good, ["data.manifest=mine.csv", "data.root=/images"])
    assert job.data.manifest == str(tmp_path / "elsewhere" / "mine.csv")
    assert job.data.root == "/images"


def test_options_that_look_like_paths_are_made_absolute(good, tmp_path):
    text = good.read_text().replace("vit_tiny_patch16_224", "vit_tiny_patch16_224, checkpoint: ./weights.pth")
    good.write_text(text)
    assert config.load(good)[0].student.options["checkpoint"] == str(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["demo.yaml", "nih.yaml"])
def test_shipped_configurations_load(name):
    job, _ = config.load(ROOT / "configs" / name)
    assert job.stages


def test_base_yaml_is_the_defaults(write):
    plain, _ = config.load(write(GOOD))
    extending, _ = config.load(write(f"extends: {ROOT}/configs/base.yaml\n{GOOD}", "extending.yaml"))
    assert extending == plain


def test_json_schema_is_fresh():
    assert (ROOT / "configs" / "schema.json").read_text() == config.schema(), "run `python -m agglom.config`"


# ── What is refused ──

WRONG = {
    "unknown key": ("optim.bach=3", "optim: unknown key 'bach'; did you mean 'batch'?"),
    "unknown top-level key": ("sede=3", "top level: unknown key 'sede'; did you mean 'seed'?"),
    "unknown key, nothing near": ("heads.xyz=3", "heads: unknown key 'xyz'; known keys: kind, tokens, hidden, depth"),
    "wrong type": ("optim.batch=many", 'optim.batch: expected a whole number, got "many"'),
    "quoted number": ("optim.batch='3'", 'optim.batch: expected a whole number, got "3"'),
    "fraction": ("optim.batch=3.5", "optim.batch: expected a whole number, got 3.5"),
    "number for text": ("data.image=3", "data.image: expected text (put it in quotes), got 3"),
    "map for list": ("stages={}", "stages: expected a list, got {}"),
    "list for map": ("optim=[1]", "optim: expected a map of keys, got [1]"),
    "no is not false": ("augment.flip=no", 'augment.flip: expected true or false, got "no"'),
    "infinity": ("optim.clip=.inf", "optim.clip: expected a finite number"),
    "choice": ("loss.normaliser=phis", "did you mean 'phi_s'?"),
    "pair": ("optim.betas=[0.9]", "optim.betas: value 1 is missing, got [0.9]"),
    "triple": ("optim.betas=[0.9, 0.9, 0.9]", "optim.betas: expected 2 values, got [0.9, 0.9, 0.9]"),
    "negative batch": ("optim.batch=-4", "optim.batch: must be at least 1, got -4"),
    "negative size": ("stages[0].size=-224", "stages[0].size: must be at least 1, got -224"),
    "size of one number": ("stages[0].size=[64]", "stages[0].size: expected a number of pixels or [height, width]"),
    "negative width": ("evaluate.sizes=[64, [64, -1]]", "evaluate.sizes[1]: expected a number of pixels or [height, w"),
    "size with a fraction": ("evaluate.size=64.5", "size: expected a number of pixels or [height, width], got 64.5"),
    "zero rate": ("stages[0].lr=0", "stages[0].lr: must be more than 0, got 0"),
    "beta of one": ("optim.betas=[0.9, 1]", "optim.betas[1]: must be less than 1, got 1"),
    "missing key": ("stages=[{name: full}]", "stages[0]: key 'length' is missing"),
    "no stages": ("stages=[]", "stages: is empty"),
    "two stages of a name": (
        "stages=[{name: a, length: 1 steps}, {name: a, length: 1 steps}]",
        "two stages are called 'a'",
    ),
    "stage name": ("stages[0].name=a/b", "stages[0].name: 'a/b' cannot name report files"),
    "reserved stage name": ("stages[0].name=teachers", "'teachers' is taken"),
    "stage's teacher": (
        "stages[0].teachers=[dinov3]",
        "stages[0].teachers: 'dinov3' is not one of the teachers: dinov2, erased; did you mean 'dinov2'?",
    ),
    "teacher name": ("teachers.CLIP={kind: timm, options: {model: a}}", "teachers.CLIP: a teacher's name may hold"),
    "unknown kind": (
        "teachers.x={kind: pakaged}",
        "teachers.x.kind: 'pakaged' is not one of the teachers; did you mean",
    ),
    "unknown student": ("student.kind=tim", "student.kind: 'tim' is not one of the students; did you mean 'timm'?"),
    "unknown balancer": ("balance.kind=groupdro", "did you mean 'group_dro'?"),
    "option": ("teachers.dinov2.options={modle: dinov2_vits14}", "options: unknown key 'modle'; did you mean 'model'?"),
    "missing option": ("student.options={}", "student.options: key 'model' (str) is missing"),
    "option's type": ("student.options.pretrained=3", "student.options.pretrained: expected bool, got 3"),
    "option's choice": ("teachers.dinov2.options.model=dino", "teachers.dinov2.options.model: expected Literal["),
    "engine's option": ("teachers.erased.options.source_name=x", "options: unknown key 'source_name'"),
    "source": (
        "teachers.erased.source=dino",
        "'dino' is not one of the other teachers: dinov2; did you mean 'dinov2'?",
    ),
    "no source": ("teachers.erased.source=null", "kind 'erased' derives from another teacher; name one"),
    "needless source": ("teachers.dinov2.source=erased", "kind 'packaged' has no source; remove this key"),
    "cycle": ("teachers.erased.source=erased", "teachers.erased.source: a cycle: erased ← erased"),
    "erased attribute": ("teachers.erased.options.attribute=sx", "did you mean 'sex'?"),
    "negative weight": ("teachers.dinov2.weight=-1", "teachers.dinov2.weight: must be at least 0"),
    "group": ("data.groups=[sex*vew]", "data.groups[0]: 'vew' is not one of the attributes"),
    "held-out group": (
        "evaluate.holdout=[sex, aeg]",
        "evaluate.holdout[1]: 'aeg' is not one of the attributes under data.attributes: sex, age; did you mean 'age'?",
    ),
    "held out twice": ("evaluate.holdout=[sex, sex]", "evaluate.holdout: sex is given twice"),
    "share of nobody": ("evaluate.scarcity=[0, .5]", "evaluate.scarcity[0]: must be more than 0"),
    "share of more than all": ("evaluate.scarcity=[1.5]", "evaluate.scarcity[0]: must be at most 1"),
    "share given twice": ("evaluate.scarcity=[.1, 0.10]", "evaluate.scarcity: 0.1 is given twice"),
    "no draw": ("evaluate.scarcity_seeds=0", "evaluate.scarcity_seeds: must be at least 1"),
    "self-crossing": ("data.groups=[sex*sex]", "crosses an attribute with itself"),
    "balance group": ("balance.group=sx", "balance.group: 'sx' is not one of the attributes"),
    "refit of a scale for each dimension": (
        "loss={refit: stage, normaliser: standardise}",
        "loss.refit: 'stage' needs one scale for all dimensions; standardise has one for each",
    ),
    "moments by": ("loss.moments_by=sx", "loss.moments_by: 'sx' is not one of the attributes"),
    "shift of nothing": ("loss={shift: 2, patches_weight: 0}", "loss.shift: compares patches, and patches_weight is 0"),
    "balancer without group": ("balance.kind=group_dro", "kind 'group_dro' weighs groups; name an attribute"),
    "static weight of a stranger": (
        "balance={kind: static, options: {teachers: {dinov3: 2}}}",
        "balance.options.teachers: 'dinov3' is not one of the teachers: dinov2, erased; did you mean 'dinov2'?",
    ),
    "static weight of nothing": (
        "balance={kind: static, options: {groups: {F: 2}}}",
        "balance.group: the options weigh groups; name their attribute",
    ),
    "biased stranger": ("balance={kind: agre, options: {biased: dino}}", "balance.options.biased: 'dino' is not one"),
    "no biased model": ("balance={kind: agre}", "balance.options: key 'biased' (str) is missing"),
    "agre in ZeRO 3": (
        ["balance={kind: agre, options: {biased: erased}}", "engine.zero=3"],
        "engine.zero: balance.kind agre takes gradients within a step, which ZeRO 3 cannot; set 0, 1 or 2",
    ),
    "agre of class tokens": (
        ["balance={kind: agre, options: {biased: erased}}", "heads.tokens=own", "student.options.class_tokens=2"],
        "heads.tokens: balance.kind agre takes gradients at the summary that all heads read; set shared",
    ),
    "agre of patches": (
        ["balance={kind: agre, options: {biased: erased}}", "loss.summary_weight=0"],
        "loss.summary_weight: is 0, and balance.kind agre takes the gradients of summary losses",
    ),
    "proxies of a stranger": (
        "balance={kind: group_dro, proxies: {teacher: dino}}",
        "balance.proxies.teacher: 'dino' is not one of the teachers: dinov2, erased; did you mean 'dinov2'?",
    ),
    "one cluster": ("balance.proxies={teacher: dinov2, clusters: 1}", "balance.proxies.clusters: must be at least 2"),
    "one fit": ("balance.proxies={teacher: dinov2, seeds: 1}", "balance.proxies.seeds: must be at least 2"),
    "MFD of clusters": (
        ["balance={group: sex, proxies: {teacher: dinov2}}", "loss.mfd={label: ill}"],
        "loss.mfd: compares annotated groups, and balance.proxies makes groups of clusters; set one of them to null",
    ),
    "resampled by nothing": ("balance.resample=.5", "balance.resample: draws images by their group; name an attribute"),
    "resampled too much": (["balance.group=sex", "balance.resample=1.5"], "balance.resample: must be at most 1"),
    "label of MFD": (
        ["balance.group=sex", "loss.mfd={label: il}"],
        "loss.mfd.label: 'il' is not one of the labels under data.labels: ill; did you mean 'ill'?",
    ),
    "teacher of MFD": (
        ["balance.group=sex", "loss.mfd={label: ill, teacher: x}"],
        "loss.mfd.teacher: 'x' is not one of the teachers: dinov2, erased",
    ),
    "MFD without groups": ("loss.mfd={label: ill}", "loss.mfd: compares groups with all; name an attribute under"),
    "MFD of patches": (
        ["balance.group=sex", "loss={mfd: {label: ill}, summary_weight: 0}"],
        "loss.mfd: compares summaries, and loss.summary_weight is 0; set mfd to null",
    ),
    "MFD of a label": (["balance.group=sex", "loss.mfd={}"], "loss.mfd: key 'label' is missing"),
    "no bins": (
        "data.attributes.age.bins=[]",
        "data.attributes.age.bins: a continuous attribute needs increasing edges",
    ),
    "falling bins": (
        "data.attributes.age.bins=[65, 50]",
        "needs increasing edges, for example [50, 65]; got [65.0, 50.0]",
    ),
    "bins of a category": ("data.attributes.sex.bins=[1]", "only a continuous attribute has bins"),
    "separator of numbers": ('data.attributes.age.separator=";"', "only a categorical attribute has a separator"),
    "blank separator": ('data.attributes.site={separator: " "}', "data.attributes.site.separator: only a categorical"),
    "erasure of several values": (
        'data.attributes.sex.separator=";"',
        "teachers.erased.options.attribute: 'sex' has a separator",
    ),
    "no split column": ("data.split=null", "data.split: is null, which is for audits only"),
    "attribute name": ("data.attributes.a*b={}", "data.attributes.a*b: an attribute's name may not"),
    "equal splits": ("data.splits.val=train", "data.splits: train, val and test must differ"),
    "value range": ("data.value_range=[1, 0]", "data.value_range: the first must be less"),
    "zero-length stage": ("stages[0].length=0 epochs", "stages[0].length: '0 epochs' trains nothing"),
    "duration": ("stages[0].length=3 weeks", "stages[0].length: '3 weeks' is not a duration"),
    "share of nothing": ("stages[0].length=5%", "stages[0].length: '5%' is a share of nothing"),
    "long warm-up": ("stages[0].warmup=30 steps", "stages[0].warmup: '30 steps' is longer than the stage (20 steps)"),
    "warm-up over 100 %": ("stages[0].warmup=120%", "is longer than the stage"),
    "warm-up in samples": ("stages[0].warmup=2000 samples", "is longer than the stage"),
    "accumulate": ("optim.accumulate=7", "optim.batch: 64 does not divide by accumulate = 7; 63 and 70 do"),
    "bf16 with ZeRO 0": ("engine={precision: bf16, zero: 0}", "engine.zero: bf16 with ZeRO 0"),
    "zero weights": (
        "loss={summary_weight: 0, patches_weight: 0}",
        "loss: summary_weight and patches_weight are both 0",
    ),
    "crop": ("augment.crop=[1, 0.5]", "augment.crop: the first may not exceed the second"),
    "log interval": ("log.every=0 steps", "log.every: must be more than 0"),
    "no equals sign": ("optim.batch", "--set optim.batch: expected key.path=value"),
    "list index": ("stages[3].size=1", "--set stages[3].size=1: stages has 1 entries, counted from 0; got '3'"),
    "set is not YAML": ("seed=[1", "--set seed:"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value(good, case):
    override, expected = WRONG[case]
    text = message(good, *([override] if isinstance(override, str) else override))
    assert expected in text
    # One mistake is one problem; a needless source of the erased teacher's own source is a cycle of both, too.
    count = "3 problems" if case == "needless source" else "1 problem"
    assert text.startswith(f"{good}: {count}\n")


def test_every_problem_at_once(good):
    text = message(
        good, "optim.bach=3", "stages[0].teachers=[dinov3]", "teachers.dinov2.options.modle=x", "seed=-1", "x"
    )
    lines = text.splitlines()
    assert lines[0] == f"{good}: 5 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "--set x",
        "optim",
        "seed",
        "teachers.dinov2.options",
        "stages[0].teachers",
    ]


def test_no_teachers(write):
    text = GOOD[: GOOD.index("teachers:")] + "teachers: {}\n" + GOOD[GOOD.index("student:") :]
    assert "teachers: is empty; name at least one teacher" in message(write(text))


def test_set_below_a_scalar(write):
    assert "--set seed.x=1: seed is 3, it has no keys" in message(write(GOOD + "seed: 3\n"), "seed.x=1")


def test_duplicate_key_names_both_lines(write):
    path = write(GOOD + "seed: 1\nseed: 2\n")
    assert message(path) == f"{path}:15: key 'seed' is given twice, first in line 14; keep one"


def test_yaml_error_names_the_line(write):
    path = write(GOOD + "optim: {batch: 3\nseed: 1\n")
    assert message(path).startswith(f"{path}:15: ")


@pytest.mark.parametrize("text", ["[a]: 1", "seed: !!python/name:os.system", "seed: *nowhere", "a: b: c", "\x00"])
def test_not_yaml(write, text):
    assert message(path := write(text)).startswith(f"{path}:")


@pytest.mark.parametrize("text", ["", "- 1", "7"])
def test_not_a_map(write, text):
    assert "expected a map of keys" in message(write(text))


def test_missing_file_suggests_a_neighbour(good):
    assert message(good.with_name("jobs.yaml")).endswith("jobs.yaml: no such configuration; did you mean 'job.yaml'?")


def test_extends_cycle(write):
    write("extends: a.yaml\n", "b.yaml")
    path = write("extends: b.yaml\n", "a.yaml")
    assert "a cycle, a.yaml extends b.yaml extends a.yaml" in message(path)


def test_extends_a_missing_file(write):
    assert "none.yaml: no such configuration" in message(write("extends: none.yaml\n"))


def test_a_wrong_configuration_needs_no_heavy_library(good):
    code = (
        "import sys; from agglom.cli import main\n"
        "status = main(['plan', '--config', sys.argv[1], '--set', 'optim.bach=1'])\n"
        "heavy = {'torch', 'pandas', 'numpy', 'pyarrow', 'timm', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code, str(good)], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"agglom: {good}: 1 problem")
    # Processor time: the wall clock of a shared machine says little.
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 2


def test_weights_need_one_group_per_image(good):
    several = ['data.attributes.sex.separator=";"', "balance.group=sex"]
    text = message(good, *several)
    assert "balance.group: 'sex' has a separator, so an image may be in several of its groups" in text
    assert "data.groups" not in text


@pytest.mark.parametrize("study", ["scarcity=[.1, 1]", "holdout=[sex, sex*age]"])
def test_studies_of_labels_need_labels(good, study):
    job, _ = config.load(good, [f"evaluate.{study}"])
    assert job.evaluate.leakage
    assert (job.evaluate.scarcity, job.evaluate.holdout) in [((0.1, 1.0), ()), ((), ("sex", "sex*age"))]
    name = study.partition("=")[0]
    expected = f"evaluate.{name}: fits probes of labels, and data.labels is empty"
    assert expected in message(good, f"evaluate.{study}", "data.labels=[]")


# ── What an audit reads ──


def test_an_audit_reads_its_parts_of_a_job(good):
    job, base = config.load(good)
    audit, folder = config.load_audit(good, ["seed=3", "data.min_support=7"], manifest="/other.csv")
    assert folder == base
    assert (audit.seed, audit.evaluate) == (3, job.evaluate)
    assert audit.data == dataclasses.replace(job.data, manifest="/other.csv", min_support=7)


def test_an_audit_needs_no_teachers(write):
    path = write("data: {manifest: m.csv, split: null}\nevaluate: {permutations: 0}\n")
    audit, folder = config.load_audit(path)
    assert (audit.data.split, audit.evaluate.permutations) == (None, 0)
    assert audit.data.manifest == str(folder / "m.csv")
    assert config.load_audit(None, manifest="/m.csv", labels=["ill"])[0].data.labels == ("ill",)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("dta: {manifest: m.csv}\n", [], "top level: unknown key 'dta'; did you mean 'data'?"),
        ("data: {labels: [ill]}\n", [], "data: key 'manifest' is missing"),
        ("data: {manifest: m.csv}\n", ["data.groups=[sex]"], "data.groups[0]: 'sex' is not one of the attributes"),
        ("data: {manifest: m.csv}\n", ["data.min_suport=3"], "did you mean 'min_support'?"),
        ("data: {manifest: m.csv}\n", ["evaluate.permutations=-1"], "evaluate.permutations: must be at least 0"),
        ("data: {manifest: m.csv}\n", ["optim.batch=3"], "top level: an audit reads data, evaluate, seed; got 'optim'"),
    ],
)
def test_a_wrong_audit(write, text, overrides, expected):
    with pytest.raises(ConfigError) as caught:
        config.load_audit(write(text), overrides)
    assert expected in str(caught.value)


# ── Round trip ──

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = st.from_regex(r"[a-z0-9_-]{1,6}", fullmatch=True)
numbers = st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
attributes = st.one_of(
    st.builds(Attribute, missing=st.lists(words).map(tuple), column=st.none() | words),
    st.builds(
        Attribute,
        kind=st.just("continuous"),
        bins=st.lists(numbers, min_size=1, max_size=4, unique=True).map(lambda edges: tuple(sorted(edges))),
    ),
)
lengths = st.sampled_from(["7 steps", "1 epoch", "0.5 epochs", "20_000 samples"])


@pytest.fixture(scope="module")
def kind(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "anything.py"
    path.write_text("def build(*, tree=None, number: float = 0.0): ...\n")
    return str(path)


@settings(deadline=None, max_examples=30, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_load_of_dump_is_the_job(kind, tmp_path, data):
    draw = data.draw
    columns = draw(st.dictionaries(names, attributes, max_size=3))
    teachers = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    job = Job(
        data=Data(
            manifest=f"/data/{draw(names)}.csv",
            labels=tuple(draw(st.lists(names, unique=True, max_size=2))),
            attributes=columns,
            groups=tuple(columns),
            value_range=draw(st.none() | st.just((-1.0, 1e-7))),
        ),
        teachers={
            name: TeacherSpec(kind=kind, options={"tree": draw(trees)}, weight=draw(st.floats(1e-9, 1e9)))
            for name in teachers
        },
        student=StudentSpec(kind=kind, options={"number": draw(numbers)}),
        balance=Balance(group=next(iter(columns), None)),
        stages=(Stage(name=f"s{draw(names)}", length=draw(lengths), warmup="0%", lr=draw(st.floats(1e-9, 1))),),
        seed=draw(st.integers(0, 2**62)),
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(config.dump(job), encoding="utf-8")
    assert config.load(path)[0] == job


# ── Durations ──


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("2000 steps", 2000),
        ("1 step", 1),
        ("30 epochs", 300),
        ("0.25 epochs", 3),
        ("20000 samples", 200),
        ("1 sample", 1),
        ("1e3 steps", 1000),
        ("5%", 50),
        ("0.1%", 1),
        ("0 steps", 0),
        ("100%", 1000),
    ],
)
def test_duration(text, steps):
    assert duration(text, batch=100, samples=1000, total_steps=1000) == steps


@pytest.mark.parametrize("text", ["", "5", "steps", "-3 steps", "3 steps and more", "five steps", "3 %%"])
def test_not_a_duration(text):
    with pytest.raises(ConfigError, match="is not a duration; write it as"):
        duration(text, batch=1, samples=1)


def test_a_share_needs_a_whole():
    with pytest.raises(ConfigError, match="share of nothing"):
        duration("5%", batch=1, samples=1)


# ── DeepSpeed ──


def test_deepspeed_is_given_what_agglom_owns(good):
    job, _ = config.load(good, ["optim.batch=24", "optim.accumulate=3", "engine.precision=bf16", "engine.zero=2"])
    final = config.deepspeed(job, 2)
    assert final == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
    }


def test_deepspeed_file_is_merged_and_may_repeat_or_leave_open(good, tmp_path):
    file = tmp_path / "ds.json"
    zero = {"stage": 1, "overlap_comm": False, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}}
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98], "weight_decay": 0.05}}
    file.write_text(
        json.dumps(
            {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": "auto",
                "zero_optimization": zero,
                "optimizer": optimizer,
                "scheduler": "auto",
                "wall_clock_breakdown": True,
            }
        )
    )
    job, _ = config.load(good, ["engine.deepspeed.steps_per_print=7"], deepspeed_config=file)
    final = config.deepspeed(job, 2)
    assert final["zero_optimization"] == {"stage": 1, "overlap_comm": False, "offload_optimizer": {"device": "none"}}
    assert final["wall_clock_breakdown"] is True
    assert final["steps_per_print"] == 7
    assert not {"optimizer", "scheduler"} & set(final)


def test_deepspeed_conflicts_in_one_error(good):
    settings = {
        "train_batch_size": 32,
        "gradient_clipping": 5,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "Lamb", "params": {"eps": 1e-3}},
        "scheduler": {"type": "WarmupLR"},
    }
    job, _ = config.load(good, [f"engine.deepspeed={json.dumps(settings)}"])
    with pytest.raises(ConfigError) as caught:
        config.deepspeed(job, 1)
    text = str(caught.value)
    assert text.startswith("engine.deepspeed: 7 conflicts with keys that agglom owns")
    assert "engine.deepspeed.train_batch_size: 32 contradicts 64, set by optim.batch" in text
    for name in (
        "gradient_clipping",
        "fp16.enabled",
        "zero_optimization.stage",
        "optimizer.type",
        "optimizer.params.eps",
    ):
        assert f"engine.deepspeed.{name}: " in text
    assert "engine.deepspeed.scheduler.type: agglom makes the scheduler itself" in text


def test_batch_that_does_not_divide_over_the_ranks(good):
    job, _ = config.load(good, ["optim.batch=30", "optim.accumulate=2"])
    with pytest.raises(ConfigError, match="30 images do not divide over 4 ranks × 2 accumulation steps; 24 and 32 do"):
        config.deepspeed(job, 4)


def test_deepspeed_file_that_is_no_json(good, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{\n"zero_optimization": {\n')
    assert f"{file}:3: not JSON" in message(good, deepspeed_config=file)
    assert "no such DeepSpeed configuration" in message(good, deepspeed_config=tmp_path / "none.json")
