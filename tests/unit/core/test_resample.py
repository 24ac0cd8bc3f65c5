"""agglom.core.resample against brute force on the same draws, DeLong and Obuchowski, and its own promises."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agglom.core import influence, metrics, resample
from agglom.core.metrics import THRESHOLDED, evaluate_groups
from agglom.core.resample import bootstrap_auroc, permutation_null

quick = settings(max_examples=30, deadline=None, derandomize=True)


def sample(seed, patients, images=1, groups=2, auroc=0.8, prevalence=0.4, mixed=False):
    """Binormal scores in (0, 1) with patient effects; one group a patient."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(rng.permutation(patients), images)
    y = rng.random(len(patient)) < prevalence if mixed else (rng.random(patients) < prevalence)[patient]
    noise = (rng.normal(size=patients)[patient] + rng.normal(size=len(patient))) / math.sqrt(2)
    score = noise + math.sqrt(2) * NormalDist().inv_cdf(auroc) * y
    group = rng.integers(0, groups, patients)[patient]
    return (torch.tensor(x) for x in (y, 1 / (1 + np.exp(-score)), patient, group))


def auroc_of(y, p, weight):
    """Weighted by rows, pair by pair."""
    kernel = (p[y][:, None] > p[~y]) + 0.5 * (p[y][:, None] == p[~y])
    pairs = weight[y][:, None] * weight[~y]
    return (kernel * pairs).sum() / pairs.sum() if pairs.sum() else math.nan


# ── Bootstrap ──


rows_of_a_case = st.lists(
    st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 5), st.integers(0, 6), st.integers(-1, 2)), max_size=30
)


@quick
@given(rows_of_a_case, st.booleans(), st.sampled_from([1, 40, 2**17]))
def test_every_replicate_is_the_auroc_under_the_weights_drawn(rows, settled, chunk):
    y, a, b, patient, group = torch.tensor(rows or np.zeros((0, 5))).long().T
    if settled and len(rows):  # every patient in one group
        group = (patient % 4) - 1
    drawn, draw = [], resample._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "CHUNK", chunk)
        patch.setattr(resample, "_draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
        found = bootstrap_auroc(y, torch.stack([a, b]), patient, group, 3, replicates=5, seed=1)
    assert found.shape == (5, 2, 4)
    if not rows:
        assert bool(found.isnan().all())
        return
    place, sizes = resample._strata(y.bool(), patient, group)
    times = torch.cat(drawn).view(-1, int(sizes.sum()))
    for replicate in range(5):
        weight = times[replicate].numpy()[place.numpy()]
        for p, predictor in ((a, 0), (b, 1)):
            for g in range(4):
                member = (group == g).numpy() if g < 3 else np.ones(len(y), bool)
                expected = auroc_of(y.bool().numpy(), p.numpy(), weight * member)
                assert float(found[replicate, predictor, g]) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    # Each stratum keeps its number of patients.
    for draws in times:
        assert [int(part.sum()) for part in draws.split(sizes.tolist())] == sizes.tolist()


def test_strata_are_patients_with_and_without_a_positive_in_each_group_when_nobody_is_in_two():
    y = torch.tensor([1, 0, 0, 0, 1, 0]).bool()
    patient, group = torch.tensor([7, 7, 9, 3, 4, 5]), torch.tensor([0, 0, 0, 1, -1, 1])
    assert sorted(resample._strata(y, patient, group)[1].tolist())[-4:] == [1, 1, 1, 2]
    group[1] = 1
    place, sizes = resample._strata(y, patient, group)
    assert sizes.tolist() == [3, 2]
    assert place.tolist() == [4, 4, 2, 0, 3, 1]


@pytest.mark.parametrize(("images", "mixed"), [(1, False), (4, False), (3, True)])
def test_the_standard_error_is_that_of_delong_and_obuchowski(images, mixed):
    y, p, patient, group = sample(0, 900, images, mixed=mixed)
    found = bootstrap_auroc(y, p[None], patient, group, 2, replicates=600, seed=0)[:, 0]
    rows = [group == 0, group == 1, group >= 0]
    for g, member in enumerate(rows):
        linear = influence.linearise("auroc", y[member], p[member], math.nan, metrics._codes(patient[member]))
        assert float(found[:, g].std()) == pytest.approx(math.sqrt(influence.moments(linear).variance), rel=0.1)
        assert float(found[:, g].mean()) == pytest.approx(linear.value, abs=0.003)


def test_draws_depend_on_the_seed_alone_and_are_the_same_for_all_predictors():
    y, p, patient, group = sample(1, 300, 2, mixed=True)
    options = {"groups": 2, "replicates": 20}
    both = bootstrap_auroc(y, torch.stack([p, p**2, 1 - p]), patient, group, **options, seed=3)
    assert torch.equal(both[:, 0], both[:, 1])
    assert torch.allclose(both[:, 0], 1 - both[:, 2])
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    shuffled = bootstrap_auroc(y[order], p[None, order], patient[order], group[order], **options, seed=3)
    assert torch.equal(both[:, :1], shuffled)
    other = bootstrap_auroc(y, p[None], patient, group, **options, seed=4)
    assert not torch.equal(both[:, :1], other)


def test_copies_of_a_patient_s_image_move_together():
    y, p, patient, group = sample(2, 200)
    options = {"groups": 2, "replicates": 10, "seed": 0}
    once = bootstrap_auroc(y, p[None], patient, group, **options)
    thrice = bootstrap_auroc(y.repeat(3), p[None].repeat(1, 3), patient.repeat(3), group.repeat(3), **options)
    assert torch.allclose(once, thrice)


# ── Permutation null ──


def gap_of(metric, y, p, patient, group, threshold):
    estimates = evaluate_groups(metric, y, p, patient, group, 2, threshold=threshold, min_patients=1)
    return metrics.gap(estimates).estimate.value


@pytest.mark.parametrize("metric", ["auroc", "tpr", "fpr", "accuracy"])
@pytest.mark.parametrize("images", [1, 3])
def test_the_null_is_that_of_a_loop_over_the_same_permutations(metric, images, monkeypatch):
    y, p, patient, group = sample(3, 80, images, mixed=True)
    p = (p * 8).round() / 8
    ids, permuted = [], resample._permuted
    monkeypatch.setattr(resample, "CHUNK", 3 * len(y))
    monkeypatch.setattr(resample, "_permuted", lambda *args: ids.append(permuted(*args)) or ids[-1])
    null = permutation_null(metric, y, p, patient, group, 2, threshold=0.5, permutations=20, seed=0)
    unit, own, sizes = resample._units(resample._condition(metric, y, p >= 0.5), patient, group)
    assert torch.equal(own[unit], group)
    gaps = [gap_of(metric, y, p, patient, id_U[unit], 0.5) for id_U in ids]
    seen = gap_of(metric, y, p, patient, group, 0.5)
    assert len(ids) == 20
    assert null.bias == pytest.approx(np.mean(gaps))
    assert null.quantile == pytest.approx(np.quantile(gaps, 0.95))
    assert null.p_value == pytest.approx((1 + sum(g >= seen - 1e-12 for g in gaps)) / 21)
    # Ids move within strata only.
    for id_U in ids:
        for before, after in zip(own.split(sizes.tolist()), id_U.split(sizes.tolist()), strict=True):
            assert torch.equal(before.sort().values, after.sort().values)


def test_what_a_metric_is_conditional_on_keeps_its_number_in_every_group():
    y, p, patient, group = sample(4, 60, mixed=True)
    chosen = p >= 0.5
    for metric, kind in (("auroc", y), ("tpr", y), ("ppv", chosen), ("selection_rate", None)):
        _, _, sizes = resample._units(resample._condition(metric, y, chosen), patient, group)
        expected = [60] if kind is None else [int((~kind).sum()), int(kind.sum())]
        assert [size for size in sizes.tolist() if size] == expected


def test_the_parts_of_a_patient_in_two_groups_move_apart_and_the_unknown_take_no_part():
    y, p, patient, group = sample(5, 100, 2, mixed=True)
    group = torch.arange(200) % 3 - 1
    known = group >= 0
    everything = permutation_null("auroc", y, p, patient, group, 2, permutations=50, seed=0)
    assert everything == permutation_null(
        "auroc", y[known], p[known], patient[known], group[known], 5, permutations=50, seed=0
    )
    _, own, _ = resample._units(y[known], patient[known], group[known])
    assert len(own) == len({(int(i), int(g)) for i, g in zip(patient[known], group[known], strict=True)})


@pytest.mark.parametrize("metric", ["auroc", "selection_rate", "ppv"])
def test_p_is_uniform_when_groups_do_not_differ(metric):
    p_values = []
    for seed in range(120):
        y, p, patient, group = sample(seed, 150, 2, groups=3, mixed=True)
        null = permutation_null(metric, y, p, patient, group, 3, threshold=0.6, permutations=79, seed=seed)
        p_values.append(null.p_value)
    for q in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(p_values) <= q) == pytest.approx(q, abs=3.3 * math.sqrt(q * (1 - q) / 120))


def test_a_difference_is_found_and_the_gap_of_noise_is_not():
    y, p, patient, group = sample(6, 1200, 2)
    p = torch.where((group == 1) & y, p - 0.15, p)
    null = permutation_null("auroc", y, p, patient, group, 2, permutations=199, seed=0)
    assert null.p_value == 1 / 200
    assert 0 < null.bias < null.quantile < gap_of("auroc", y, p, patient, group, 0.5)


def test_order_of_rows_and_seed():
    y, p, patient, group = sample(7, 100, 3, mixed=True)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for metric in ("auroc", *sorted(THRESHOLDED)):
        options = {"groups": 2, "threshold": 0.5, "permutations": 30}
        once = permutation_null(metric, y, p, patient, group, **options, seed=0)
        again = permutation_null(metric, y[order], p[order], patient[order], group[order], **options, seed=0)
        assert once == pytest.approx(again, abs=1e-12)
        assert once != permutation_null(metric, y, p, patient, group, **options, seed=1)


def test_one_group_has_no_null_and_a_draw_without_two_counts_against():
    y, p, patient, group = sample(8, 50)
    for rows in (group == 0, group > 5):
        null = permutation_null("auroc", y[rows], p[rows], patient[rows], group[rows], 2, permutations=9, seed=0)
        assert all(map(math.isnan, null))
    # Nothing is conditioned on for f1, so a group of one row may lose every row that f1 needs.
    y, p = torch.tensor([1] + [0] * 40), torch.tensor([0.9] + [0.1] * 39 + [0.8])
    group = torch.tensor([0] + [1] * 40)
    null = permutation_null("f1", y, p, torch.arange(41), group, 2, threshold=0.5, permutations=199, seed=0)
    assert null.p_value > 0.9


def test_wrong_input_is_named():
    y, p, patient, group = sample(9, 10)
    options = {"groups": 2, "seed": 0}

    def boot(y=y, p=p, patient=patient, group=group):
        return bootstrap_auroc(y, p[None], patient, group, **options, replicates=3)

    def null(metric="auroc", permutations=9):
        return permutation_null(metric, y, p, patient, group, **options, permutations=permutations)

    for match, call in {
        r"scores_PN has rows of shape \(9,\), y_N \(10,\)": lambda: boot(p=p[1:]),
        "patient_N has rows of shape": lambda: boot(patient=patient[1:]),
        "1 NaN among 10": lambda: boot(p=p.clone().index_fill_(0, torch.tensor([2]), math.nan)),
        "y_N holds values other than 0 and 1": lambda: boot(y=y * 2.0),
        "outside −1 … 1": lambda: boot(group=group + 5),
        "metric 'brier' has no null; known: auroc": lambda: null("brier"),
        "tpr needs a threshold": lambda: null("tpr"),
        "permutations is 0": lambda: null(permutations=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
