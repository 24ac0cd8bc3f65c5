"""How teachers agree: gradients and losses against plain autograd and NumPy, and what the report says of them."""

import html
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from agglom import conflict, findings, report
from agglom.core.losses import Column
from agglom.core.types import Batch, Features
from agglom.report import GroupReport
from agglom.survey import Pool, Survey
from agglom.targets import Normaliser

HELD, WIDTH, GRID = 30, 6, (2, 2)


class Trunk(nn.Module):
    """A summary and four patches; `idle` is used by nothing, dropout would change every gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, WIDTH), nn.Linear(3, WIDTH)
        self.idle = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels_BCHW):
        summary = torch.tanh(self.first(self.dropout(pixels_BCHW.flatten(1))))
        patches = torch.tanh(self.second(self.dropout(pixels_BCHW.flatten(2).mT)))
        return Features(summary, patches, GRID)


class Student(nn.Module):
    """Heads that are plain Linear layers; `c` has patches alone."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("as", "ap", "bs", "bp", "cp")})

    def forward(self, pixels_BCHW):
        summary, patches, grid = self.trunk(pixels_BCHW)[:3]
        heads = self.heads
        return None, {
            "a": Features(heads["as"](summary), heads["ap"](patches), grid),
            "b": Features(heads["bs"](summary), heads["bp"](patches), grid),
            "c": Features(None, heads["cp"](patches), grid),
        }


@dataclass(frozen=True)
class Run:
    """What `measure` reads of a run."""

    job: SimpleNamespace
    world: SimpleNamespace
    columns: tuple[Column, ...]
    plan: SimpleNamespace
    manifest: SimpleNamespace
    served: dict[str, torch.Tensor]


@pytest.fixture
def setting(monkeypatch):
    """Everything that `measure` takes, with 20 images of group A, 5 of B and 5 of nobody; the pixels of all rows."""
    torch.manual_seed(0)
    rows_N = np.arange(100, 150)
    held_M = rows_N[5 : 5 + HELD]
    pixels = torch.rand(200, 3, 2, 2)
    pools = {
        name: Pool(torch.randn(50, WIDTH) if name != "c" else None, torch.randn(HELD, 4, WIDTH), GRID) for name in "abc"
    }
    normalisers = {"a": Normaliser(dispersion=torch.tensor(0.7)), "b": Normaliser(dispersion=torch.tensor(2.0))}
    normalisers["c"] = Normaliser()
    columns = [Column(*one) for one in (("a", "summary"), ("a", "patches", 0.5), ("b", "summary"), ("c", "patches"))]
    view = SimpleNamespace(members={"A": held_M[:20], "B": held_M[20:25]})
    evaluate = SimpleNamespace(batch=7)
    run = Run(
        job=SimpleNamespace(
            seed=3,
            loss=SimpleNamespace(summary="angular", patches="mse"),
            balance=SimpleNamespace(group=None),
            data=SimpleNamespace(groups=("tags", "device")),
            evaluate=evaluate,
        ),
        world=SimpleNamespace(device=torch.device("cpu")),
        columns=tuple(columns),
        plan=SimpleNamespace(micro=4, evaluate_size=(2, 2)),
        manifest=SimpleNamespace(separators={"tags": ";"}, view=lambda name: view if name == "device" else None),
        served={},
    )

    def batches(run, rows, size):
        assert run.world.size == 1
        for start in range(0, len(rows), 7):
            mine = rows[start : start + 7]
            nothing = torch.zeros(len(mine))
            yield mine, Batch(pixels[mine], torch.as_tensor(mine), nothing, nothing)

    monkeypatch.setattr(conflict, "batches", batches)
    student = Student()
    with torch.no_grad():
        student.eval()
        _, predicted = student(pixels[held_M])
        student.train()
    predicted = {name: Pool(f.summary_BD, f.patches_BND, f.grid) for name, f in predicted.items()}
    surveyed = Survey(rows_N, held_M, pools)
    stage = SimpleNamespace(teachers=("a", "b", "c"))
    return SimpleNamespace(
        arguments=(run, surveyed, normalisers, stage, student, predicted), pixels=pixels, held_M=held_M
    )


def expected_losses(setting):
    """(M, 4) by the formulae, differentiable."""
    _, surveyed, _, _, student, _ = setting.arguments
    student.eval()
    _, predicted = student(setting.pixels[setting.held_M])
    at = slice(5, 5 + HELD)

    def angular(x, y, dispersion):
        cos = torch.nn.functional.cosine_similarity(x.double(), y.double())
        return torch.arccos(cos) ** 2 / dispersion

    pools = surveyed.pools
    return torch.stack(
        [
            angular(predicted["a"].summary_BD, pools["a"].summary_ND[at], 0.7),
            0.5 * (predicted["a"].patches_BND - pools["a"].patches_MND).double().square().mean((1, 2)),
            angular(predicted["b"].summary_BD, pools["b"].summary_ND[at], 2.0),
            (predicted["c"].patches_BND - pools["c"].patches_MND).double().square().mean((1, 2)),
        ],
        1,
    )


def test_correlations_are_those_of_numpy_and_scipy():
    draw = torch.Generator().manual_seed(0)
    loss_MT = torch.rand(40, 3, generator=draw).round(decimals=1)  # with ties
    valid_MT = torch.ones(40, 3, dtype=torch.bool)
    valid_MT[:25, 2] = False
    pearson, spearman = (np.array(conflict.correlations(loss_MT, valid_MT, m)) for m in ("pearson", "spearman"))
    x = loss_MT.double().numpy()
    np.testing.assert_allclose(pearson[:2, :2], np.corrcoef(x[:, :2].T), atol=1e-12)
    np.testing.assert_allclose(pearson[:, 2], np.corrcoef(x[25:].T)[2], atol=1e-12)
    assert spearman[0, 1] == pytest.approx(stats.spearmanr(x[:, 0], x[:, 1]).statistic)
    assert spearman[2, 1] == pytest.approx(stats.spearmanr(x[25:, 2], x[25:, 1]).statistic)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_undefined_correlations(method):
    loss_MT = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    valid_MT = torch.ones(3, 2, dtype=torch.bool)
    found = np.array(conflict.correlations(loss_MT, valid_MT, method))
    assert np.isnan(found[0]).all()
    assert found[1, 1] == pytest.approx(1)
    assert np.isnan(conflict.correlations(loss_MT[:2], valid_MT[:2], method)).all()


def test_correlations_are_of_the_losses(setting):
    found = conflict.measure(*setting.arguments)
    loss = expected_losses(setting).detach().numpy()
    assert found["columns"] == ["a/summary", "a/patches", "b/summary", "c/patches"]
    assert found["n_images"] == HELD
    np.testing.assert_allclose(found["pearson"], np.corrcoef(loss.T), atol=1e-5)
    np.testing.assert_allclose(found["spearman"], stats.spearmanr(loss).statistic, atol=1e-6)


def test_cosines_are_of_the_gradients_on_the_trunk(setting, monkeypatch):
    monkeypatch.setattr(conflict, "GRADIENT_IMAGES", 3 * HELD)
    found = conflict.measure(*setting.arguments)
    loss_MT = expected_losses(setting)
    student = setting.arguments[4]

    def gradients(mine):
        vectors = []
        for columns in ([0, 1], [2], [3]):
            student.zero_grad()
            loss_MT[mine][:, columns].sum(1).mean().backward(retain_graph=True)
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.trunk.parameters()]
            vectors.append(torch.cat([part.flatten() for part in parts]).double().numpy())
        return np.array(vectors)

    everybody = gradients(slice(None))
    norm = np.linalg.norm(everybody, axis=1)
    assert found["teachers"] == ["a", "b", "c"]
    assert found["n_gradient"] == HELD
    assert found["n_both"] == [[HELD] * 3] * 3
    np.testing.assert_allclose(found["norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(found["cosine"], everybody @ everybody.T / np.outer(norm, norm), atol=1e-5)
    mine = gradients(slice(0, 20))
    norm = np.linalg.norm(mine, axis=1)
    assert found["attribute"] == "device"  # a row may have several tags
    big, small = found["groups"]
    assert (big["group"], big["n_images"]) == ("A", 20)
    np.testing.assert_allclose(big["cosine"], mine @ mine.T / np.outer(norm, norm), atol=1e-5)
    assert small == {"group": "B", "n_images": 5, "cosine": None}


def test_everybody_is_weighted_by_the_shares_of_the_groups(setting, monkeypatch):
    """Where all images of a group are alike, some of them tell what all do."""
    surveyed = setting.arguments[1]
    for group in (slice(0, 20), slice(20, 25), slice(25, 30)):
        rows = setting.held_M[group]
        setting.pixels[rows] = setting.pixels[rows[:1]].clone()
        for pool in surveyed.pools.values():
            pool.patches_MND[group] = pool.patches_MND[group][:1].clone()
            if pool.summary_ND is not None:
                at = slice(5 + group.start, 5 + group.stop)
                pool.summary_ND[at] = pool.summary_ND[at][:1].clone()
    few = conflict.measure(*setting.arguments)
    monkeypatch.setattr(conflict, "GRADIENT_IMAGES", 3 * HELD)
    everything = conflict.measure(*setting.arguments)
    assert few["n_gradient"] < everything["n_gradient"] == HELD
    np.testing.assert_allclose(few["cosine"], everything["cosine"], atol=1e-5)
    np.testing.assert_allclose(few["norm"], everything["norm"], rtol=1e-5)


def test_a_summary_and_patches_share_no_parameter_here(setting):
    """b has the summary and c the patches alone: what one does not reach counts as 0."""
    found = conflict.measure(*setting.arguments)
    assert found["cosine"][1][2] == 0


def test_the_sample_is_limited_and_a_function_of_the_seed(setting):
    first, again = (conflict.measure(*setting.arguments) for _ in range(2))
    assert first == again
    assert [one["n_images"] for one in first["groups"]] == [8, 5]  # a third of 24, and all there are
    assert first["n_gradient"] == 18
    assert first["n_images"] == HELD
    setting.arguments[0].job.seed = 4
    other = conflict.measure(*setting.arguments)
    assert other["cosine"] != first["cosine"]
    assert other["pearson"] == first["pearson"]


def test_nothing_is_changed(setting):
    student = setting.arguments[4].train()
    conflict.measure(*setting.arguments)
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_specialist_is_asked_for_those_it_serves(setting, monkeypatch):
    """b serves group B and nobody of A."""
    run, held_M = setting.arguments[0], setting.held_M
    serves_N = torch.zeros(200, dtype=torch.bool)
    serves_N[held_M[20:25]] = True
    run.served["b"] = serves_N
    monkeypatch.setattr(conflict, "GRADIENT_IMAGES", 3 * HELD)
    found = conflict.measure(*setting.arguments)
    loss_MT = expected_losses(setting)
    mine = loss_MT[20:25].detach().numpy()
    assert found["pearson"][0][2] == pytest.approx(np.corrcoef(mine[:, 0], mine[:, 2])[0, 1], abs=1e-4)
    trunk = setting.arguments[4].trunk
    grads = torch.autograd.grad(loss_MT[20:25, 2].mean(), list(trunk.parameters()), allow_unused=True)
    norm = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
    assert found["norm"][1] == pytest.approx(float(norm), rel=1e-4)
    assert found["n_both"] == [[HELD, 5, HELD], [5, 5, 5], [HELD, 5, HELD]]
    assert all(math.isnan(found["groups"][0]["cosine"][i][1]) for i in range(3))


def test_only_teachers_of_the_stage_take_part(setting):
    setting.arguments[3].teachers = ("a", "c")
    assert conflict.measure(*setting.arguments)["teachers"] == ["a", "c"]
    setting.arguments[3].teachers = ("c",)
    assert conflict.measure(*setting.arguments) is None


# ── In a report ──

GIVEN = {
    "columns": ["a/summary", "a/patches", "<b>/patches"],
    "n_images": 1200,
    "pearson": [[1.0, 0.5, 0.4], [0.5, 1.0, None], [0.4, None, 1.0]],
    "spearman": [[1.0, 0.61, 0.001], [0.61, 1.0, -0.25], [0.001, -0.25, 1.0]],
    "teachers": ["a", "<b>", "c"],
    "n_gradient": 64,
    "n_both": [[64, 41, 64], [41, 41, 41], [64, 41, 64]],
    "cosine": [[1.0, -0.125, 0.3], [-0.125, 1.0, 0.2], [0.3, 0.2, 1.0]],
    "norm": [1.0, 2.0, 0.1],
    "attribute": "sex*view",
    "groups": [
        {"group": "F|AP", "n_images": 30, "cosine": [[1.0, -0.4, 0.3], [-0.4, 1.0, 0.2], [0.3, 0.2, 1.0]]},
        {"group": "F|PA", "n_images": 29, "cosine": [[1.0, 0.05, 0.3], [0.05, 1.0, 0.2], [0.3, 0.2, 1.0]]},
        {"group": "M|PA", "n_images": 5, "cosine": None},
    ],
}


def rendered(tmp_path, given):
    found = GroupReport("full", [], {"index": 1, "conflict": given})
    paths = report.write(found, tmp_path)
    assert report.load(paths[0]) == found
    return paths[2].read_text(), paths[3].read_text()


def test_every_number_is_in_both_reports(tmp_path):
    markdown, page = rendered(tmp_path, GIVEN)
    said = "most against each other are those of a and <b>: cosine −0.125 over 64 images, of which both serve 41; "
    said += "by group from −0.400 (F · AP)"
    assert said in html.unescape(page)
    assert said.replace("<b>", "\\<b\\>") in markdown
    assert "| gradients of, cosine | all (64) | F · AP (30) | F · PA (29) | M · PA (5) |" in markdown
    assert "| a, \\<b\\> | −0.125 | −0.400 | 0.050 | – |" in markdown
    assert "| a/patches, \\<b\\>/patches | – | −0.250 |" in markdown
    section = re.search(r'<section aria-labelledby="conflict">.*?</section>', page, re.S)[0]
    cells = re.findall(r'<td class="(\w*)(?: start)?" style="--far: (\d+)%">([^<]*)</td>', section)
    assert len(cells) == 3 * 3 + 3 * 4
    assert {("over", "61", "0.61"), ("under", "25", "−0.25"), ("", "0", "0.00"), ("", "0", "–")} <= set(cells)
    assert "<b>" not in page
    assert '<th scope="col">&lt;b&gt;/<wbr>patches</th>' in section
    assert re.findall("<summary>(.*?)</summary>", section) == ["The numbers: losses", "The numbers: gradients"]
    assert page.count('href="#conflict"') == 1


def test_no_conflict_no_section(tmp_path):
    markdown, page = rendered(tmp_path, None)
    assert "How the teachers agree" not in markdown + page
    assert findings.conflict_finding(None) == ""


NO_PULL = "No two teachers pull the student's trunk clearly against each other (a cosine below −0.1);"


@pytest.mark.parametrize(
    ("cosine", "said"),
    [
        (0.25, f"{NO_PULL} least alike are a and b: cosine 0.250 over 1 image."),
        (-0.031, f"{NO_PULL} least alike are a and b: cosine −0.031"),
        (-0.11, "The gradients that pull most against each other are those of a and b: cosine −0.110 over 1 image."),
        (math.nan, ""),
    ],
)
def test_what_is_said_of_two_teachers(cosine, said):
    given = {"teachers": ["a", "b"], "n_gradient": 1, "cosine": [[1.0, cosine], [cosine, 1.0]], "groups": []}
    given |= {"n_both": [[1, 1], [1, 1]]}
    given = GroupReport("s", [], given).context
    assert findings.conflict_finding(given).startswith(said)
    assert bool(said) == bool(findings.conflict_finding(given))


def test_one_teacher_has_losses_alone(tmp_path):
    alone = GIVEN | {"teachers": ["a"], "cosine": [[1.0]], "norm": [1.0], "groups": []}
    markdown, page = rendered(tmp_path, alone)
    assert "losses of, 1,200 images" in markdown
    assert "gradients of" not in markdown + page
