"""Targets: one forward for all that share a source, and normalisers that come back from their file."""

import pytest
import torch

from agglom import plugins, targets
from agglom.core import normalise
from agglom.core.normalise import Moments
from agglom.core.types import Dims, Features, PixelSpec, Teacher
from agglom.errors import CacheError
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
    found.derived.fit([(Features(x, x[:, None].repeat(1, 2, 1)), torch.arange(40) % 2)])
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
    [(None, 14, 112, 112), (None, 14, 64, 70), (None, 16, 8, 16), (224, 14, 112, 224), (None, 32, 100, 96)],
)
def test_a_teacher_sees_whole_patches(size, patch, stage, expected):
    calls = []
    targets.encode({"one": teacher(size=size, patch=patch, calls=calls)}, ["one"], torch.rand(1, 3, stage, stage))
    assert calls == [(1, 3, expected, expected)]


def test_resize_keeps_constants_and_the_same_size():
    pixels = torch.rand(1, 3, 32, 32)
    assert targets.resize(pixels, 32) is pixels
    torch.testing.assert_close(targets.resize(torch.full((1, 3, 32, 32), 0.3), 20), torch.full((1, 3, 20, 20), 0.3))


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
        for a, b in zip(found(Features(x, x[:, None])), expected, strict=True):
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
