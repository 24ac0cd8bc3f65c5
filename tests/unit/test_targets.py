"""Targets: one forward for all that share a source, and normalisers that come back from their file."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from agglom import plugins, targets
from agglom.core import normalise
from agglom.core.normalise import Moments
from agglom.core.types import Dims, Features, PixelSpec, Teacher
from agglom.errors import CacheError, ConfigError
from agglom.targets import Normaliser

IDENTITY = {"config.seed": "0", "manifest": "abc"}


def teacher(factor=1.0, size=None, patch=16, calls=None):
    """Summary and patches of width 4 out of the mean colour."""

    def encode(pixels_BCHW):
        if calls is not None:
            calls.append(tuple(pixels_BCHW.shape))
        grid = pixels_BCHW.shape[-2] // patch, pixels_BCHW.shape[-1] // patch
        colour_B3 = factor * pixels_BCHW.mean((2, 3))
        x_B4 = torch.cat([colour_B3, colour_B3[:, :1]], 1)
        return Features(x_B4, x_B4[:, None].repeat(1, grid[0] * grid[1], 1), grid)

    spec = PixelSpec((0.5,) * 3, (0.5,) * 3, patch, size)
    return Teacher(torch.nn.Identity(), encode, Dims(4, 4), spec, f"print-{factor}", "none")


def erased(source):
    return plugins.build("erased", "teachers", {"attribute": "sex"}, source=source, source_name="one")


def fitted(source, seed=0):
    found = erased(source)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    found.derived.fit([(Features(x, x[:, None].repeat(1, 2, 1)), {"sex": torch.arange(40) % 2})])
    return found


def test_a_shared_source_is_computed_once():
    calls = []
    one = teacher(calls=calls)
    teachers = {"fair": fitted(one), "fairer": fitted(one, 1), "one": one}
    found = targets.encode(teachers, ["fair", "fairer"], torch.rand(2, 3, 32, 32))
    assert list(found) == ["fair", "fairer"]
    assert calls == [(2, 3, 32, 32)]
    targets.encode(teachers, ["one", "fair"], torch.rand(2, 3, 32, 32))
    assert len(calls) == 2


def test_derived_features_are_those_of_its_own_encode():
    one = teacher()
    fair, pixels = fitted(one), torch.rand(2, 3, 32, 32)
    found = targets.encode({"one": one, "fair": fair}, ["fair"], pixels)["fair"]
    torch.testing.assert_close(found.summary_BD, fair.encode(pixels).summary_BD)


def test_no_gradient_reaches_a_teacher():
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not targets.encode({"one": teacher()}, ["one"], pixels)["one"].summary_BD.requires_grad


@pytest.mark.parametrize(
    ("size", "patch", "stage", "expected"),
    [
        *[(None, 14, (112, 112), (112, 112)), (None, 14, (64, 64), (70, 70)), (None, 16, (8, 8), (16, 16))],
        *[(224, 14, (112, 112), (224, 224)), (None, 32, (100, 100), (96, 96))],
        *[(None, 14, (128, 96), (126, 98)), (None, 16, (8, 40), (16, 32)), (224, 14, (128, 96), (224, 224))],
    ],
)
def test_a_teacher_sees_whole_patches(size, patch, stage, expected):
    calls = []
    found = targets.encode({"one": teacher(size=size, patch=patch, calls=calls)}, ["one"], torch.rand(1, 3, *stage))
    assert calls == [(1, 3, *expected)]
    assert found["one"].grid == (expected[0] // patch, expected[1] // patch)


def patchwise(size=None, calls=None):
    """Each token is a linear map of its own 16 pixels' square, to the bit whatever else the image holds."""
    weight = torch.randn(5, 3 * 16 * 16, generator=torch.Generator().manual_seed(0))

    def encode(pixels_BCHW):
        if calls is not None:
            calls.append(tuple(pixels_BCHW.shape))
        squares_BhwX = pixels_BCHW.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3)
        patches_BhwD = (squares_BhwX[..., None, :] * weight).sum(-1)
        return Features(None, patches_BhwD.flatten(1, 2), tuple(patches_BhwD.shape[1:3]))

    spec = PixelSpec((0.5,) * 3, (0.5,) * 3, 16, size)
    return Teacher(torch.nn.Identity(), encode, Dims(None, 5), spec, "patchwise", "none")


@pytest.mark.parametrize(
    ("side", "images", "size", "tile", "inputs"),
    [
        *[(96, 6, (32, 48), (32, 48), 1), (96, 8, (32, 48), (32, 48), 2), (96, 2, (32, 48), (32, 48), 1)],
        (112, 3, (48, 48), (48, 48), 1),  # a rim of one patch
        (96, 5, (28, 28), (32, 32), 1),  # to whole patches
        (128, 5, (56, 44), (64, 64), 2),  # 48 to whole patches, and larger, since no third of them fits
        (96, 2, (64, 32), (96, 32), 1),  # one row
        (96, 2, (64, 64), (96, 96), 2),  # one alone: as without
        (96, 2, (200, 200), (96, 96), 2),
    ],
)
def test_a_mosaic_gives_each_image_its_own_patches(side, images, size, tile, inputs):
    calls = []
    pixels = torch.rand(images, 3, *size, generator=torch.Generator().manual_seed(1))
    found = targets.encode({"one": targets.mosaicked("one", patchwise(side, calls))}, ["one"], pixels)["one"]
    assert calls == [(inputs, 3, side, side)]
    alone = patchwise().encode(targets.resize(pixels, tile))
    assert found.grid == alone.grid
    assert torch.equal(found.patches_BND, alone.patches_BND)
    assert found.summary_BD is None


def test_what_cannot_be_a_mosaic_is_refused():
    with pytest.raises(ConfigError, match=r"teachers\.one\.mosaic: is for a teacher of a fixed size"):
        targets.mosaicked("one", patchwise())
    with pytest.raises(ConfigError, match=r"teachers\.one\.mosaic: this teacher has no patches"):
        targets.mosaicked("one", replace(patchwise(96), dims=Dims(5, None)))
    assert targets.mosaicked("one", replace(patchwise(96), dims=Dims(4, 5))).dims == Dims(None, 5)


def test_how_a_teacher_sees_a_size_is_told():
    free, pinned = teacher(patch=14).pixels, teacher(size=224, patch=14).pixels
    assert targets.told(free, (112, 112), (8, 8)) == "112 px, grid 8×8"
    assert targets.told(free, (128, 96), (8, 6)) == "128×96 → 126×98 px, grid 9×7, resampled to 8×6"
    assert targets.told(free, (128, 96), None) == "128×96 → 126×98 px"
    assert targets.told(pinned, (128, 96), (8, 6)) == "128×96 → 224 px, grid 16×16, resampled to 8×6"
    text = targets.told(free, (112, 64), (14, 4))
    assert text == "112×64 → 112×70 px, grid 8×5, resampled to 8×4; the student's 14×4 is resampled to 8×4"
    tiled = replace(pinned, size=448, mosaic=True)
    assert targets.told(tiled, (96, 96), (6, 6)) == (
        "96 → 112 px, 4×4 of them in one of 448 px, grid 8×8, resampled to 6×6"
    )


def test_resize_keeps_constants_and_the_same_size():
    pixels = torch.rand(1, 3, 32, 32)
    assert targets.resize(pixels, (32, 32)) is pixels
    torch.testing.assert_close(
        targets.resize(torch.full((1, 3, 32, 32), 0.3), (20, 20)), torch.full((1, 3, 20, 20), 0.3)
    )


# ── The file ──


@pytest.fixture
def stored(tmp_path):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))

    def affine():
        return normalise.fit("phi_s", Moments.empty(4).update(x), 0)

    one = teacher()
    teachers = {"one": one, "fair": fitted(one)}
    normalisers = {
        "one": Normaliser(affine(), None, *normalise.cone(x + 3)),
        "fair": Normaliser(affine(), affine(), *normalise.cone(x + 4)),
    }
    path = tmp_path / "normaliser.safetensors"
    targets.save(path, normalisers, teachers, IDENTITY)
    return path, normalisers, teachers


def test_normalisers_come_back(stored):
    path, normalisers, teachers = stored
    x = torch.randn(5, 4)
    for name, found in targets.load(path, teachers, IDENTITY).items():
        expected = normalisers[name](Features(x, x[:, None]))
        for a, b in zip(found(Features(x, x[:, None]))[:3], expected[:3], strict=True):
            assert a == b if isinstance(a, tuple) else torch.allclose(a, b, atol=1e-5)
        torch.testing.assert_close(found.direction_D.double(), normalisers[name].direction_D.double())
        torch.testing.assert_close(found.dispersion.double(), normalisers[name].dispersion.double())
    assert targets.load(path, teachers, IDENTITY)["one"].summary is None


def test_derived_teachers_get_their_fit_back(stored):
    path, _, teachers = stored
    fresh = {"one": teachers["one"], "fair": erased(teachers["one"])}
    targets.load(path, fresh, IDENTITY)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(fresh["fair"].encode(pixels), teachers["fair"].encode(pixels), rtol=0, atol=0)


def test_the_file_of_another_job_is_refused_by_field(stored):
    path, _, teachers = stored
    with pytest.raises(CacheError, match=r"normaliser.safetensors: of another job: manifest is 'abc' there and 'xyz'"):
        targets.load(path, teachers, IDENTITY | {"manifest": "xyz"})
    with pytest.raises(CacheError, match="teacher two is None there"):
        targets.load(path, teachers, IDENTITY | {"teacher two": "new"})


@pytest.mark.parametrize("content", [b"", b"\0" * 30])
def test_a_broken_file_says_what_to_do(stored, content):
    path, _, teachers = stored
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"cannot be read .* delete it and it is fitted again"):
        targets.load(path, teachers, IDENTITY)


def test_a_normaliser_leaves_out_what_is_not_there():
    normaliser = Normaliser(normalise.fit("standardise", Moments.empty(4).update(torch.randn(50, 4))))
    assert normaliser(Features(None, None)) == Features(None, None)
    summary = torch.randn(2, 4)
    assert normaliser(Features(summary, None)).summary_BD is summary
    moved = normaliser.to(torch.device("cpu"))
    assert moved.summary is None
    assert moved.direction_D is None


def spec(patch, size=None):
    return PixelSpec((0.5,) * 3, (0.5,) * 3, patch, size)


@pytest.mark.parametrize(
    ("size", "patches", "student", "teachers", "unit", "most"),
    [
        ((224, 224), 2, 16, {}, (16, 16), (2, 2)),
        ((224, 224), 3, 16, {"a": spec(16), "b": spec(32)}, (32, 32), (3, 3)),  # patches of the coarsest grid
        ((112, 112), 1, 16, {"dinov2": spec(14, 98)}, (16, 16), (1, 1)),  # both have 7 × 7
        ((224, 224), 7, 16, {"dinov2": spec(14)}, (112, 112), (1, 1)),  # 14 and 16 patches: half of the image
        ((64, 128), 1, 16, {"a": spec(8)}, (16, 16), (1, 1)),
    ],
)
def test_a_shift_is_whole_patches_of_every_grid(size, patches, student, teachers, unit, most):
    found = targets.shift(teachers, spec(student), size, patches)
    assert (found.unit, found.most) == (unit, most)
    assert found.view == (size[0] + most[0] * unit[0], size[1] + most[1] * unit[1])
    pixels = torch.arange(found.view[0] * found.view[1]).reshape(1, 1, *found.view)
    source = random.Random(0)
    places = {found.draw(source) for _ in range(200)}
    assert places == set(itertools.product(range(most[0] + 1), range(most[1] + 1)))
    for y, x in places:
        seen = found.window(pixels, (y, x))
        assert seen.shape[-2:] == size
        assert int(seen[0, 0, 0, 0]) == y * unit[0] * found.view[1] + x * unit[1]


@pytest.mark.parametrize(
    ("size", "patches", "teachers", "message"),
    [
        (
            (224, 224),
            6,
            {"dinov2": spec(14)},
            "student 14×14, dinov2 16×16: the shortest .* is 7 patches of the coarsest",
        ),
        ((64, 64), 4, {"a": spec(16)}, "share nothing; set loss.shift below 4"),
        ((100, 100), 1, {}, "the student's patches of 16 px do not fill the image"),
    ],
)
def test_a_shift_that_cannot_be_is_refused(size, patches, teachers, message):
    with pytest.raises(ConfigError, match=f"loss.shift: {patches}: at .*{message}"):
        targets.shift(teachers, spec(16), size, patches)


def test_without_a_shift_there_is_one_window_the_image():
    found, pixels = targets.shift({"dinov2": spec(14)}, spec(16), (50, 60), 0), torch.rand(1, 3, 50, 60)
    features = Features(None, torch.rand(1, 12, 2), (3, 4))
    at = found.draw(random.Random(0))
    assert (found.view, at) == ((50, 60), (0, 0))
    assert torch.equal(found.window(pixels, at), pixels)
    assert found.overlap(features, at, at) is features


def test_a_derived_teacher_sees_what_its_source_does():
    calls = []
    one = teacher(calls=calls)
    teachers = {"fair": fitted(one), "one": one, "two": teacher(2.0, calls=calls)}
    seen = []

    def see(name, pixels_BCHW):
        seen.append(name)
        return pixels_BCHW[..., :16, :32] if name == "one" else pixels_BCHW

    targets.encode(teachers, ["fair", "two"], torch.rand(2, 3, 64, 64), see)
    assert seen == ["one", "two"]
    assert calls == [(2, 3, 16, 32), (2, 3, 64, 64)]
