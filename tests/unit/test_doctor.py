"""What the doctor measures of a teacher's features, and what it says."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agglom import doctor, evaluate, report
from agglom.core.types import Batch, Derived, Dims, Features, PixelSpec, Teacher
from agglom.report import GroupReport
from agglom.survey import Pool, Survey
from agglom.targets import Normaliser

ROWS, HELD = np.arange(40), np.arange(24, 40)


def teacher(encode, size=None, derived=None, refuses=()):
    def encoding(pixels_BCHW):
        if pixels_BCHW.shape[-1] in refuses:
            raise RuntimeError("too small\nby far")
        return encode(pixels_BCHW)

    spec = PixelSpec((0.5,) * 3, (1.0,) * 3, patch=2, size=size)
    return Teacher(torch.nn.Linear(3, 5), encoding, Dims(3, 3), spec, "f", "MIT", derived)


def means(pixels_BCHW):
    """A summary that the size does not change; patches that a shift of them does."""
    cells = torch.nn.functional.avg_pool2d(pixels_BCHW, 2)
    return Features(pixels_BCHW.mean((2, 3)), cells.flatten(2).mT, tuple(cells.shape[-2:]))


class Manifest:
    def rows(self, split):
        return np.arange(24) if split == "train" else HELD

    def __len__(self):
        return len(ROWS)


@pytest.fixture
def setting(monkeypatch):
    """Teachers of each kind; images whose mean is the same at every size."""
    torch.manual_seed(0)
    tint_RC = torch.rand(40, 3)

    def batches(run, rows, size):
        for part in np.array_split(rows, 3):
            nothing = torch.zeros(len(part))
            ramp = torch.linspace(-0.2, 0.2, size[1])
            pixels = (tint_RC[part][:, :, None, None] + ramp).expand(-1, -1, *size)
            yield part, Batch(pixels, torch.as_tensor(part), nothing, nothing)

    monkeypatch.setattr(doctor, "batches", batches)
    half = Derived("plain", lambda features: features._replace(summary_BD=features.summary_BD / 2, patches_BND=None))
    teachers = {
        "plain": teacher(means),
        "half": teacher(means, derived=half),
        "pinned": teacher(means, size=8),
        "picky": teacher(means, refuses=(4,)),
    }
    run = SimpleNamespace(
        teachers=teachers,
        world=SimpleNamespace(device=torch.device("cpu")),
        plan=SimpleNamespace(evaluate_size=(8, 8)),
        job=SimpleNamespace(evaluate=SimpleNamespace(batch=4)),
        manifest=Manifest(),
        served={},
    )
    pixels = torch.cat([batch.pixels_BCHW for _, batch in batches(run, ROWS, (8, 8))])
    full = means(pixels)
    pools = {name: Pool(full.summary_BD, full.patches_BND[24:], full.grid) for name in teachers}
    pools["half"] = Pool(full.summary_BD / 2, None, (0, 0))
    return run, Survey(ROWS, HELD, pools)


# ── Features ──


def test_features_are_those_of_train_summaries_and_held_out_patches(setting):
    run, surveyed = setting
    found = doctor._features(run, surveyed, "plain", Normaliser(dispersion=torch.tensor(0.25)))
    pool = surveyed.pools["plain"]
    x = pool.summary_ND[:24].double().numpy()
    assert found["summary"]["width"] == 3
    assert found["summary"]["n_images"] == 24
    assert found["summary"]["rms"] == pytest.approx(np.sqrt((x**2).mean()))
    sigma = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = sigma / sigma.sum()
    assert found["summary"]["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found["summary"]["dispersion"] == 0.25
    y = pool.patches_MND.double().flatten(0, 1).numpy()
    norm = np.linalg.norm(y, axis=1)
    assert found["patches"]["rms"] == pytest.approx(np.sqrt((y**2).mean()))
    assert found["patches"]["high_norm_share"] == np.mean(norm > 3 * np.median(norm))
    assert found["patches"]["n_images"] == 16
    assert found["patches"]["grid"] == (4, 4)
    assert doctor._features(run, surveyed, "half", Normaliser())["patches"] is None


def test_features_of_a_specialist_are_those_of_the_images_it_serves(setting):
    run, surveyed = setting
    pool, rows = surveyed.pools["plain"], np.r_[0:10, 30:36]
    run.served["plain"] = torch.zeros(40, dtype=torch.bool)
    run.served["plain"][rows] = True
    found = doctor._features(run, surveyed, "plain", Normaliser())
    mine, patches = pool.summary_ND[:10].double(), pool.patches_MND[6:12].double()
    assert (found["summary"]["n_images"], found["patches"]["n_images"]) == (10, 6)
    assert found["summary"]["rms"] == pytest.approx(float(mine.square().mean().sqrt()))
    assert found["patches"]["rms"] == pytest.approx(float(patches.square().mean().sqrt()))
    run.served["plain"][:] = False
    nobody = doctor._features(run, surveyed, "plain", Normaliser())
    assert [nobody[kind]["n_images"] for kind in doctor.KINDS] == [0, 0]
    assert all(math.isnan(nobody[kind][key]) for kind in doctor.KINDS for key in ("rms", "effective_rank"))


def test_patches_of_few_images_are_enough(setting, monkeypatch):
    monkeypatch.setattr(doctor, "PATCH_IMAGES", 5)
    run, surveyed = setting
    assert doctor._features(run, surveyed, "plain", Normaliser())["patches"]["n_images"] == 5
    assert doctor._spaced(16, 5).tolist() == [0, 4, 8, 11, 15]
    assert doctor._spaced(3, 5).tolist() == [0, 1, 2]


def test_summaries_that_are_all_alike_are_undefined(setting):
    run, surveyed = setting
    surveyed.pools["plain"] = Pool(torch.ones(40, 3), None, (0, 0))
    found = doctor._features(run, surveyed, "plain", Normaliser())["summary"]
    assert math.isnan(found["effective_rank"])
    assert found["rms"] == pytest.approx(1)


def test_few_images_are_said_of_teachers_that_erase_alone(monkeypatch):
    monkeypatch.setattr(evaluate, "fit_rows", lambda run: np.arange(150))

    def derived(**read):
        return teacher(means, derived=Derived("plain", lambda features: features, **read))

    teachers = {"plain": teacher(means), "erased": derived(attributes=("sex", "age"))}
    teachers |= {"probe": derived(groups=("sex",), labels=("ill",)), "specialist": derived()}
    run = SimpleNamespace(teachers=teachers)
    assert not list(evaluate._sample_limited(run))  # 50 for each of 3 dimensions
    monkeypatch.setattr(evaluate, "fit_rows", lambda run: np.arange(149))
    [said] = evaluate._sample_limited(run)
    assert said.startswith("erased was fitted on sex and age with 149 images;")
    assert "its 3 dimensions take about 150 (50 each)" in said


# ── Sizes ──


def test_other_sizes_agree_where_nothing_changes(setting):
    """A mean does not depend on the size; the derived teacher shares the forward of its source."""
    found = doctor._sizes(*setting, ())
    for name in ("plain", "half"):
        first, *others = found[name]
        assert first == {"size": 8, "input": 8, "status": "reference"}
        assert [one["size"] for one in others] == [4, 12]
        for one in others:
            assert one["status"] == "ok"
            assert one["summary_cosine"] == pytest.approx(1, abs=1e-4)
            assert one["summary_cka"] == pytest.approx(1, abs=1e-4)
            assert one.get("patches_cosine", 1) > 0.9
    assert "patches_cosine" not in found["half"][1]
    assert "patches_cosine" in found["plain"][1]


def test_unrelated_features_do_not_agree():
    torch.manual_seed(1)
    one, other = (Features(torch.randn(64, 40) + 5, torch.randn(64, 4, 40) + 5, (2, 2)) for _ in range(2))
    assert all(abs(value) < 0.2 for value in doctor._agreement(one, other).values())
    assert all(value == pytest.approx(1) for value in doctor._agreement(one, one).values())


def test_patches_agree_on_the_coarser_grid():
    fine = Features(None, torch.rand(5, 16, 3), (4, 4))
    maps = fine.patches_BND.mT.unflatten(2, (4, 4))
    coarse = torch.nn.functional.interpolate(maps, (2, 2), mode="bilinear", antialias=True).flatten(2).mT
    assert doctor._agreement(Features(None, coarse, (2, 2)), fine) == {"patches_cosine": pytest.approx(1)}


def test_a_pinned_teacher_and_one_that_refuses(setting):
    run, surveyed = setting
    found = doctor._sizes(run, surveyed, (9, 4, (8, 12)))
    assert [one["status"] for one in found["pinned"]] == ["reference", "pinned", "pinned", "pinned"]
    assert [one["input"] for one in found["pinned"]] == [8] * 4
    assert [one["status"] for one in found["picky"]] == ["reference", "same", "refused: too small", "ok"]
    assert [one["size"] for one in found["plain"]] == [8, 9, 4, (8, 12)]


def test_a_pinned_teacher_is_measured_on_what_smaller_images_have_lost(setting, monkeypatch):
    """Its input keeps its size, but a coarse image scaled up to it is not the fine one."""
    run, surveyed = setting
    torch.manual_seed(2)
    fine = torch.rand(40, 3, 8, 8)

    def batches(run, rows, size):
        nothing = torch.zeros(len(rows))
        pixels = torch.nn.functional.interpolate(fine[rows], size, mode="bilinear", antialias=True)
        yield rows, Batch(pixels, torch.as_tensor(rows), nothing, nothing)

    monkeypatch.setattr(doctor, "batches", batches)
    full = means(fine)
    surveyed.pools.update(dict.fromkeys(run.teachers, Pool(full.summary_BD, full.patches_BND[24:], full.grid)))
    _, coarse, close = doctor._sizes(run, surveyed, (4, 9))["pinned"]
    assert (coarse["status"], close["status"]) == ("pinned", "pinned")
    assert coarse["patches_cosine"] < close["patches_cosine"] - 0.02
    assert close["patches_cosine"] < 1 - 1e-4
    *_, same = doctor._sizes(run, surveyed, (4, 9))["plain"]
    assert same["status"] == "same"
    assert 0.5 < same["patches_cosine"] < 1 - 1e-4


# ── Cost ──


def test_cost_is_measured_or_absent_with_a_reason(setting):
    run, surveyed = setting
    for name in run.teachers:
        found = doctor._cost(run, surveyed, name)
        assert found["images_per_s"] > 0
        assert found["weights_mib"] == pytest.approx(20 * 4 / 2**20)
        assert found["peak_mib"] is None
        assert "CPU" in found["note"]


def test_a_derived_teacher_is_timed_without_its_source(setting):
    run, _ = setting
    calls = []
    run.teachers["plain"] = teacher(lambda pixels: calls.append(1) or means(pixels))
    call = doctor._call(run.teachers, "half", torch.rand(2, 3, 8, 8))
    doctor._timed(call, torch.device("cpu"))
    assert len(calls) == 1


# ── In words ──


def row(predictor, place, value, split="test", metric="auroc", **more):
    base = {"predictor": predictor, "metric": metric, "label": "ill", "attribute": place[0], "group": place[1]}
    base |= {"value": value, "lo": value - 0.1, "hi": value + 0.1, "n": 50, "n_pos": 20, "n_neg": 30, "n_patients": 40}
    return base | {"status": "ok", "split": split, "readout": "linear"} | more


def one_teacher(**more):
    summary = {"width": 384, "rms": 2.0, "effective_rank": 12.34, "dispersion": 0.7, "n_images": 1200}
    patches = {"width": 384, "rms": None, "effective_rank": None, "n_images": 256, "grid": [8, 8]}
    return {
        **{"kind": "timm", "licence": "cc-by-nc-4.0", "commercial": False, "fingerprint": "f", "from": None},
        **{"source": "hub/x", "revision": "7", "serves": None, "input": 112, "pinned": False},
        "summary": summary,
        "patches": patches | {"high_norm_share": 0.0237, "largest_norm": 11.5},
        "sizes": [
            {"size": 112, "input": 112, "status": "reference"},
            {"size": [56, 112], "input": [56, 112], "status": "ok", "summary_cosine": 0.5, "summary_cka": None},
            {"size": 28, "input": 28, "status": "refused: a|b"},
        ],
        "cost": {"images_per_s": 812.4, "weights_mib": 84.1, "peak_mib": None, "note": "not known here"},
    } | more


@pytest.fixture
def told():
    """Validation puts `a` first for everybody and `b` in group M; on test it is the other way round."""
    rows = []
    for split, values in (("val", (0.8, 0.7, 0.6, 0.9)), ("test", (0.75, 0.85, 0.95, 0.5))):
        rows += [
            row("teacher/a", ("", "all"), values[0], split),
            row("teacher/b", ("", "all"), values[1], split),
            row("teacher/a", ("sex", "M"), values[2], split),
            row("teacher/b", ("sex", "M"), values[3], split),
        ]
    few = {"status": "below_min_pos", "n_patients": 3}
    rows += [row(f"teacher/{name}", ("sex", "F"), 0.5, **few) for name in "ab"]
    leaks = {"metric": "leakage", "label": ""}
    rows += [row(f"teacher/{name}", ("sex", "M"), value, **leaks) for name, value in (("a", 0.91), ("b", 0.55))]
    nobody = {"from": "a", "serves": {"attribute": "sex", "groups": ["M"]}, "patches": None}
    teachers = {"a": one_teacher(), "b": one_teacher(**nobody)}
    context = {"split": "test", "notes": ["Digits, not patients."]}
    return GroupReport("doctor", rows, context | {"doctor": {"size": [56, 112], "device": "cpu", "teachers": teachers}})


def test_the_map_marks_whom_validation_puts_first(told):
    text = doctor.render(told)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    section = text.split("## What a linear probe")[0]
    cells = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("|")}
    assert "**0.750 (0.650 to 0.850)**" in cells["all patients"]
    assert "**0.850" not in cells["all patients"]
    assert "**0.500 (0.400 to 0.600)**" in cells["sex M"]
    assert "too few positive patients" in cells["sex F"]
    assert "**" not in cells["sex F"]
    assert "first is a in all patients; b in sex M." in section
    assert "0.910 (0.810 to 1.010)" in lines["sex M"]


def test_no_teacher_is_marked_where_no_group_is_large_enough(told):
    few = [one | {"status": "below_min_pos"} for one in told.rows]
    section = doctor.render(GroupReport("doctor", few, told.context)).split("## What a linear probe")[0]
    assert "no group is large enough." in section
    assert "**" not in section.replace("**Bold**", "")


def test_every_measurement_is_printed(told):
    text = doctor.render(told)
    for line in (
        r"\| a +\| summary \| 384 +\| 2\.00 +\| 12\.3 +\| 0\.700 +\| – +\| 1,200",
        r"\| a +\| patches \| 384 +\| – +\| – +\| – +\| 2\.4 %, to 11\.5 +\| 256",
        r"\| a +\| 56×112 +\| 56×112 +\| 0\.500 +\| – +\| – +\|",
        r"\| a +\| 28 .* refused: a\\\|b",
        r"\| a +\| timm \| 812 +\| 84\.1 +\| – +\| cc-by-nc-4\.0 +\| hub/x@7 +\| everybody",
        r"\| b +\| .* from a +\| sex: M",
    ):
        assert re.search(line, text), line
    assert "Images at 56×112 px" in text
    assert "Commercial use of the student: no, forbidden by a (cc-by-nc-4.0), b (cc-by-nc-4.0)." in text
    assert "- Not known here.\n" in text
    assert "- Digits, not patients.\n" in text
    assert "nan" not in text.lower()


def test_without_labels_nobody_is_first(told):
    rows = [one for one in told.rows if one["metric"] == "leakage"]
    text = doctor.render(GroupReport("doctor", rows, told.context))
    assert doctor.NO_LABEL in text
    assert "**" not in text
    assert "The job names no groups" in doctor.render(GroupReport("doctor", [], told.context))


def test_the_file_is_a_report(told, tmp_path):
    path = report.put(tmp_path / "doctor.json", report.to_json(told))
    assert report.load(path) == told
