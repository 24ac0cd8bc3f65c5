import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from agglom.core.heads import resample
from agglom.core.losses import (
    PATCHES,
    SUMMARY,
    Column,
    angle,
    columns,
    mfd,
    objective,
    overlap,
    table,
    teacher_index,
)
from agglom.core.types import Dims, Features

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())
NAN = float("nan")


def ref_angle(x, y):
    cos = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    return np.arccos(np.clip(cos, -1, 1))


def ref_smooth_l1(x, y):
    d = np.abs(x - y)
    return np.where(d < 1, d * d / 2, d - 0.5)


def ref_cosine(x, y):
    return (1 - np.cos(ref_angle(x, y))).reshape(len(x), -1).mean(1)


def ref_relational(x, y):
    """Patch by patch, with SciPy."""
    found = []
    for one in zip(x, y, strict=True):
        q, p = (z @ z.T / np.outer(*[np.linalg.norm(z, axis=1)] * 2) / 0.1 for z in one)
        others = ~np.eye(len(q), dtype=bool)
        found.append(np.mean([entropy(softmax(b[o]), softmax(a[o])) for a, b, o in zip(q, p, others, strict=True)]))
    return np.array(found)


REFERENCE = {
    "angular": lambda x, y, dispersion: ref_angle(x, y) ** 2 / dispersion,
    "cosine": lambda x, y, _: ref_cosine(x, y),
    "mse": lambda x, y, _: ((x - y) ** 2).reshape(len(x), -1).mean(1),
    "smooth_l1": lambda x, y, _: ref_smooth_l1(x, y).reshape(len(x), -1).mean(1),
    "hybrid": lambda x, y, _: 0.9 * ref_cosine(x, y) + 0.1 * ref_smooth_l1(x, y).reshape(len(x), -1).mean(1),
    "unic": lambda x, y, _: 0.5 * ref_cosine(x, y) + 0.5 * ref_smooth_l1(x, y).reshape(len(x), -1).mean(1),
    "relational": lambda x, y, _: ref_relational(x, y),
}


def run(names, predicted, targets, present=None, *, summary="angular", patches="mse", dispersion=1.3):
    return table(
        names,
        predicted,
        targets,
        set(targets) if present is None else present,
        summary=summary,
        patches=patches,
        dispersion={teacher: torch.tensor(dispersion) for teacher in predicted},
    )


@given(st.integers(0, 2**31), st.sampled_from(list(SUMMARY)), st.sampled_from(list(PATCHES)))
@settings(max_examples=40, deadline=None)
def test_each_loss_agrees_with_numpy_in_float64(seed, summary, patches):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 5, 7)) * 10 ** rng.uniform(-2, 2)
    p, q = rng.normal(size=(2, 5, 6, 4)) * 10 ** rng.uniform(-2, 2)
    pair = [Features(torch.from_numpy(a), torch.from_numpy(b), (2, 3)) for a, b in ((x, p), (y, q))]
    names = (Column("t", "summary", 0.5), Column("t", "patches", 2.0))
    found = run(names, {"t": pair[0]}, {"t": pair[1]}, summary=summary, patches=patches)
    expected = np.stack([0.5 * REFERENCE[summary](x, y, 1.3), 2 * REFERENCE[patches](p, q, None)], 1)
    assert found.loss_BT.dtype == torch.float32
    assert found.valid_BT.all()
    np.testing.assert_allclose(found.loss_BT, expected, rtol=2e-5, atol=1e-6)


def test_golden_values():
    """Inputs are sin and cos of their index, so that anybody can make them; tolerance 1e-5 relative."""
    index = np.arange(2 * 4 * 3, dtype=np.float64)
    x, y = np.sin(index).reshape(2, 12), np.cos(1.7 * index).reshape(2, 12)
    for name, expected in GOLDEN["summary"].items():
        found = SUMMARY[name](torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.tensor(0.69))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, expected in GOLDEN["patches"].items():
        x_BND, y_BND = (torch.from_numpy(a).float().reshape(2, 4, 3) for a in (x, y))
        np.testing.assert_allclose(PATCHES[name](x_BND, y_BND, None), expected, rtol=1e-5)


@pytest.mark.parametrize("theta", [0.0, 1e-5, 1e-3, 1.0, math.pi / 2, math.pi - 1e-3, math.pi - 1e-5, math.pi])
def test_angle_is_accurate_at_both_ends_in_float32(theta):
    x = torch.tensor([[3.0, 0.0, 0.0]])
    y = torch.tensor([[math.cos(theta), math.sin(theta), 0.0]], dtype=torch.float64).float() * 0.01
    assert float(angle(x, y)) == pytest.approx(theta, abs=1e-6, rel=1e-4)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, 1 + 1e-7, -1 - 1e-7, 1e-12])
@pytest.mark.parametrize("name", SUMMARY)
def test_gradients_are_finite_at_and_near_the_ends(factor, name):
    y = torch.tensor([[0.3, -2.0, 0.7], [1.0, 1.0, 1.0]])
    x = (factor * y).requires_grad_()
    SUMMARY[name](x, y, torch.tensor(1.0)).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 10


def test_relations_are_blind_to_a_rotation_and_need_company():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 6, 4, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    torch.testing.assert_close(PATCHES["relational"](3 * y @ rotation, y, None), torch.zeros(2), atol=1e-5, rtol=0)
    assert (PATCHES["relational"](y.flip(1), y, None) > 0.01).all()
    x = y[:, :2].clone().requires_grad_()
    loss = PATCHES["relational"](x, y.flip(1)[:, :2], None)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2))
    assert x.grad.isfinite().all()


def test_a_zero_vector_has_no_direction():
    zero, y = torch.zeros(1, 3), torch.tensor([[0.0, 2.0, 0.0]])
    assert float(angle(zero, y)) == pytest.approx(math.pi / 2)
    assert float(SUMMARY["cosine"](zero, y, None)) == 1.0


def test_gradient_of_the_angular_loss_is_right():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: SUMMARY["angular"](x, y, torch.tensor(2.0)), x.requires_grad_())


def test_bf16_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    low, high = [], []
    for _ in range(2):
        features = [torch.randn(size, generator=generator).bfloat16() for size in ((4, 8), (4, 6, 8))]
        low.append(Features(*features, (2, 3)))
        high.append(Features(*(feature.float() for feature in features), (2, 3)))
    names = columns({"t": Dims(8, 8)}, {})
    assert torch.equal(
        run(names, {"t": low[0]}, {"t": low[1]}).loss_BT, run(names, {"t": high[0]}, {"t": high[1]}).loss_BT
    )


@pytest.mark.parametrize(("mine", "theirs"), [((4, 4), (2, 2)), ((2, 3), (4, 6)), ((4, 2), (2, 4))])
def test_patches_meet_on_the_coarser_grid(mine, theirs):
    x, y = torch.randn(2, mine[0] * mine[1], 3), torch.randn(2, theirs[0] * theirs[1], 3)
    common = min(mine[0], theirs[0]), min(mine[1], theirs[1])
    names = (Column("t", "patches"),)
    found = run(names, {"t": Features(None, x, mine)}, {"t": Features(None, y, theirs)})
    expected = (resample(x, mine, common) - resample(y, theirs, common)).square().mean((1, 2))
    torch.testing.assert_close(found.loss_BT[:, 0], expected)


def test_columns_follow_teachers_and_carry_both_weights():
    teachers = {"b": Dims(4, 3), "a": Dims(None, 3), "c": Dims(5, None)}
    names = columns(teachers, {"a": 0.5, "c": 0.0}, summary_weight=2.0, patches_weight=3.0)
    assert names == (("b", "summary", 2.0), ("b", "patches", 3.0), ("a", "patches", 1.5))
    assert teacher_index(names).tolist() == [0, 0, 1]
    assert columns(teachers, {}, summary_weight=0.0)[0] == ("b", "patches", 1.0)


def leaf(value=None):
    summary, patches = (torch.randn(3, 4), torch.randn(3, 6, 2))
    if value is not None:
        summary, patches = torch.full_like(summary, value), torch.full_like(patches, value)
    return Features(summary.requires_grad_(), patches.requires_grad_(), (2, 3))


@pytest.mark.parametrize("how", ["not in targets", "not present", "masked"])
def test_an_absent_teacher_gives_zero_and_a_zero_gradient_even_from_nan(how):
    predicted = {"a": leaf(), "b": leaf(NAN)}
    targets = {"a": leaf(), "b": leaf(NAN)}
    present = {"a", "b"}
    if how == "not in targets":
        del targets["b"]
    elif how == "not present":
        present = {"a"}
    else:
        present = {"a": torch.ones(3, dtype=torch.bool), "b": torch.zeros(3, dtype=torch.bool)}
    found = run(columns({"a": Dims(4, 2), "b": Dims(4, 2)}, {}), predicted, targets, present)
    assert found.valid_BT.tolist() == [[True, True, False, False]] * 3
    assert (found.loss_BT[:, 2:] == 0).all()
    objective(found, torch.ones(3, 4)).backward()
    for part in predicted["b"][:2]:
        assert torch.equal(part.grad, torch.zeros_like(part))
    assert all((part.grad != 0).any() for part in predicted["a"][:2])


def test_a_mask_leaves_the_other_samples_alone():
    predicted, target = leaf(), leaf()
    mask = torch.tensor([True, False, True])
    names = columns({"t": Dims(4, 2)}, {})
    whole = run(names, {"t": predicted}, {"t": target})
    found = run(names, {"t": predicted}, {"t": target}, {"t": mask})
    assert torch.equal(found.valid_BT, mask[:, None].expand(3, 2))
    assert torch.equal(found.loss_BT[mask], whole.loss_BT[mask])
    objective(found, torch.ones(3, 2)).backward()
    assert (predicted.summary_BD.grad[1] == 0).all()
    assert (predicted.summary_BD.grad[0] != 0).any()


def test_objective_is_the_weighted_sum_over_valid_cells():
    predicted, target, mask = leaf(), leaf(), torch.tensor([True, True, False])
    found = run(columns({"t": Dims(4, 2)}, {}), {"t": predicted}, {"t": target}, {"t": mask})
    w_BT = torch.rand(3, 2)
    torch.testing.assert_close(objective(found, w_BT), (w_BT * found.loss_BT)[:2].sum())
    w_BT[2] = NAN
    assert objective(found, w_BT).isfinite()


def test_a_loss_that_is_not_finite_is_not_hidden():
    found = run((Column("t", "summary"),), {"t": leaf(NAN)}, {"t": leaf()})
    assert found.loss_BT.isnan().all()
    assert found.valid_BT.all()


def test_features_without_what_a_column_needs_are_refused():
    with pytest.raises(ValueError, match="features without patches"):
        run((Column("t", "patches"),), {"t": leaf()}, {"t": Features(torch.ones(3, 4), None)})


def windows(size, patch, at, image):
    """What an encoder that is the same everywhere makes of a window of `size` pixels at `at` (rows, columns)."""
    (top, left), (h, w) = at, size
    cut = image[:, :, top : top + h, left : left + w]
    tiles = cut.reshape(len(cut), 3, h // patch, patch, w // patch, patch).transpose(0, 2, 4, 1, 3, 5)
    return tiles.reshape(len(cut), -1, 3 * patch * patch).sum(-1, keepdims=True), (h // patch, w // patch)


@pytest.mark.parametrize("here", [(0, 0), (16, 0), (32, 16)])
@pytest.mark.parametrize("there", [(0, 16), (32, 32), (0, 0)])
@pytest.mark.parametrize(("mine", "theirs"), [(16, 16), (16, 8), (8, 16)])
def test_of_shifted_windows_the_shared_patches_are_compared(here, there, mine, theirs):
    """Patches of 16 and of 8 px on images of 96 × 80, windows of 64 × 48, units of 16 px; by the pixels they show."""
    image = np.random.default_rng(0).random((2, 3, 96, 80))
    units, shift = (4, 3), tuple((b - a) // 16 for a, b in zip(here, there, strict=True))
    shared = [(max(a, b), min(a, b) + side) for a, b, side in zip(here, there, (64, 48), strict=True)]
    sides = tuple(end - start for start, end in shared)
    for at, patch, by in ((here, mine, shift), (there, theirs, tuple(-one for one in shift))):
        patches, grid = windows((64, 48), patch, at, image)
        found = overlap(Features(torch.ones(2, 1), torch.from_numpy(patches), grid), by, units)
        expected, grid = windows(sides, patch, (shared[0][0], shared[1][0]), image)
        assert found.grid == grid
        np.testing.assert_array_equal(found.patches_BND, expected)
        assert torch.equal(found.summary_BD, torch.ones(2, 1))


def test_a_pair_that_moves_with_the_image_has_the_loss_of_the_whole_on_the_overlap():
    """A student and a teacher that are shift-equivariant, and a pattern fixed to the teacher's positions."""
    rng = np.random.default_rng(1)
    image, fixed = rng.random((2, 3, 64, 64)), torch.from_numpy(rng.random((1, 9, 1)))
    here, there, column = (0, 0), (16, 16), (Column("t", "patches"),)
    student, teacher = (
        Features(None, torch.from_numpy(windows((48, 48), 16, at, image)[0] * factor), (3, 3))
        for at, factor in ((here, 1.0), (there, 1.5))
    )

    def loss(teacher):
        pair = overlap(student, (1, 1), (3, 3)), overlap(teacher, (-1, -1), (3, 3))
        return run(column, {"t": pair[0]}, {"t": pair[1]}).loss_BT[:, 0]

    whole = windows((32, 32), 16, (16, 16), image)[0]
    np.testing.assert_allclose(loss(teacher), ((0.5 * whole) ** 2).mean((1, 2)), rtol=1e-5)
    same = student._replace(patches_BND=torch.from_numpy(windows((48, 48), 16, there, image)[0]))
    assert float(loss(same).abs().max()) == 0
    assert (loss(same._replace(patches_BND=same.patches_BND + fixed)) > 0.1).all()


@pytest.mark.parametrize(("grid", "shift", "message"), [((3, 4), (1, 0), "whole number"), ((4, 4), (0, 2), "nothing")])
def test_windows_that_cannot_be_compared_are_refused(grid, shift, message):
    with pytest.raises(ValueError, match=message):
        overlap(Features(None, torch.zeros(1, grid[0] * grid[1], 2), grid), shift, (2, 2))


def ref_mfd(student, teacher, label, group, groups):
    """½·Σ_c Σ_g MMD² by loops over pairs, after the formula of the paper."""
    known = np.isin(label, (0, 1))
    variance = np.mean([((t - s) ** 2).sum() for t in teacher[known] for s in student[known]])

    def mean_kernel(a, b):
        return np.mean([np.exp(-((x - y) ** 2).sum() / (2 * variance)) for x in a for y in b])

    total = 0.0
    for c in (0, 1):
        for g in range(groups):
            t, s = teacher[label == c], student[(label == c) & (group == g)]
            if len(s):
                total += mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(t, s)
    return total / 2


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_mfd_is_the_conditional_mmd_of_the_paper(seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 14, 5))
    label, group = rng.choice([0, 1, NAN], 14, p=[0.5, 0.3, 0.2]), rng.integers(-1, 3, 14)
    label[0] = 1
    teacher[np.isnan(label)] = NAN  # a specialist has nothing to say of those whom it does not serve
    found = mfd(*(torch.from_numpy(part) for part in (student, teacher, label, group)), groups=3)
    assert float(found) == pytest.approx(ref_mfd(student, teacher, label, group, 3), rel=1e-4, abs=1e-5)


def test_mfd_pulls_a_group_to_the_class_and_leaves_all_others():
    """Group 1 of class 0 is off; those of class 1 that are the teacher's very features are where they should be."""
    teacher_BD = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    label_B, group_B = torch.arange(40) % 2, torch.arange(40) // 2 % 2
    student_BD = teacher_BD.clone().requires_grad_()
    off_B = (label_B == 0) & (group_B == 1)
    moved_BD = student_BD + 2.0 * off_B[:, None]
    known_B = torch.where(group_B == 0, 1.0 * label_B, 0.0 * label_B).masked_fill(label_B == 1, NAN)
    loss = mfd(moved_BD, teacher_BD, known_B, group_B, 2)
    loss.backward()
    assert student_BD.grad[off_B].sum(-1).gt(0).all()
    assert student_BD.grad[label_B == 1].eq(0).all()
    assert float(loss.detach()) > float(mfd(teacher_BD, teacher_BD, known_B, group_B, 2)) >= 0


def test_mfd_without_labels_is_nothing_and_its_gradient_finite():
    student_BD, nothing_B = torch.zeros(4, 3, requires_grad=True), torch.full((4,), NAN)
    for label_B in (nothing_B, torch.ones(4)):
        (gradient,) = torch.autograd.grad(mfd(student_BD, torch.zeros(4, 3), label_B, torch.zeros(4), 1), student_BD)
        assert gradient.eq(0).all()
