"""Views: the same for the same (seed, row, view), crops within their bounds, clean views whole."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agglom.data.dataset import ImageDataset, augmented, collate, crop_box, resize, view_random
from agglom.data.manifest import Manifest
from agglom.data.sampler import loader
from agglom.errors import DataError
from agglom.job import Acquisition, Augment, Views

ROWS = 6
SIZE = (16, 16)
STRONG = Acquisition(blur=1.0, resolution=1.0, contrast=1.0, inversion=1.0, noise=1.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    images = []
    for row in range(ROWS):
        images.append(str(folder / f"{row}.png"))
        Image.fromarray(rng.integers(0, 256, (40, 48) if row % 2 else (40, 48, 3), dtype=np.uint8)).save(images[-1])
    return Manifest(
        path=Path("m.csv"),
        images=tuple(images),
        patient_N=np.arange(ROWS),
        patients=tuple("abcdef"),
        split_N=np.array(["train"] * ROWS),
        label_NL=np.array([[1], [0], [np.nan]] * 2, np.float32),
        labels=("sick",),
        attributes={},
        digest="",
    )


def dataset(manifest: Manifest, **options) -> ImageDataset:
    defaults = {"augment": Augment(), "group_N": np.array([0, 1, -1] * 2), "seed": 3}
    return ImageDataset(manifest, manifest.rows("train"), **{**defaults, **options})


def test_batch(manifest):
    data = dataset(manifest)
    batch = collate([data[2, 0, SIZE], data[1, -1, SIZE]])
    assert batch.pixels_BCHW.shape == (2, 3, 16, 16)
    assert batch.pixels_BCHW.dtype == torch.float32
    assert batch.row_B.tolist() == [2, 1]
    assert batch.view_B.tolist() == [0, -1]
    assert batch.group_B.tolist() == [-1, 1]
    assert {x.dtype for x in (batch.row_B, batch.view_B, batch.group_B)} == {torch.int64}
    torch.testing.assert_close(batch.label_BL, torch.tensor([[torch.nan], [0.0]]), equal_nan=True)
    assert 0 <= batch.pixels_BCHW.min() <= batch.pixels_BCHW.max() <= 1
    assert len(data) == ROWS


def test_without_labels(manifest):
    bare = replace(manifest, labels=(), label_NL=np.zeros((ROWS, 0), np.float32))
    assert collate([dataset(bare)[0, 0, SIZE]]).label_BL is None


def test_views_repeat_and_differ(manifest):
    pixels = {key: dataset(manifest)[*key, SIZE].pixels_BCHW for key in ((0, 0), (0, 1), (0, -1))}
    torch.manual_seed(99)
    for key, value in pixels.items():
        torch.testing.assert_close(dataset(manifest)[*key, SIZE].pixels_BCHW, value, rtol=0, atol=0)
    assert not torch.equal(pixels[0, 0], pixels[0, 1])
    assert not torch.equal(pixels[0, 0], dataset(manifest, seed=4)[0, 0, SIZE].pixels_BCHW)
    torch.testing.assert_close(dataset(manifest, augment=None)[0, 7, SIZE].pixels_BCHW, pixels[0, -1], rtol=0, atol=0)


def test_views_are_pinned():
    """A change of these numbers changes every run: say so in the release notes."""
    assert crop_box((100, 200), (0.5, 1.0), view_random(0, 1, 2)) == (1, 27, 94, 114)


def test_clean_view_is_the_whole_image():
    ramp_CHW = torch.linspace(0, 1, 64).expand(1, 32, 64)
    small_CHW = resize(ramp_CHW, (8, 8))
    assert small_CHW.shape == (1, 8, 8)
    torch.testing.assert_close(small_CHW[0, 0], torch.linspace(0, 1, 64).reshape(8, 8).mean(1), atol=0.02, rtol=0)


def test_grey_image_has_three_equal_channels(manifest):
    pixels_CHW = dataset(manifest)[1, 0, SIZE].pixels_BCHW
    assert torch.equal(pixels_CHW[0], pixels_CHW[2])


def test_size_is_height_and_width(manifest):
    tall = (24, 8)
    data = dataset(manifest)
    assert data[0, 0, tall].pixels_BCHW.shape == data[0, -1, tall].pixels_BCHW.shape == (3, *tall)
    # The same view at twice the size is the same crop.
    large_CHW = data[0, 0, (48, 16)].pixels_BCHW
    torch.testing.assert_close(resize(large_CHW, tall), data[0, 0, tall].pixels_BCHW, atol=0.15, rtol=0)


def test_crop_has_the_aspect_of_the_size():
    """A tall view of a wide image is a tall crop of it, squeezed by no more than a square view is."""
    boxes = [crop_box((300, 400), (0.2, 0.4), view_random(0, row, 0), 0.5) for row in range(50)]
    aspects = [w / h for _, _, h, w in boxes]
    assert 0.37 < min(aspects) < 0.42
    assert 0.6 < max(aspects) < 0.67


def test_flip_only_on_request():
    ramp_CHW = torch.linspace(0, 1, 32).expand(1, 32, 32)
    rising = {
        flip: [
            bool(
                (lambda v: v[0, 0, 0] < v[0, 0, -1])(
                    augmented(ramp_CHW, (8, 8), Augment(flip=flip), view_random(0, r, 0))
                )
            )
            for r in range(60)
        ]
        for flip in (False, True)
    }
    assert all(rising[False])
    assert 15 < sum(rising[True]) < 45


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: tuple(sorted(pair))),
    seed=st.integers(0, 10**9),
    aspect=st.sampled_from([1.0, 0.5, 4 / 3]),
)
def test_crops_lie_inside(height, width, scale, seed, aspect):
    top, left, h, w = crop_box((height, width), scale, random.Random(seed), aspect)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h >= 1
    assert w >= 1
    if min(h, w) > 50:
        assert 0.72 < w / h / aspect < 1.39


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_names_file_and_row(manifest, workers, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    data = dataset(replace(manifest, images=(str(broken),) * ROWS))
    with pytest.raises(DataError) as caught:
        next(loader(data, [[(4, 0, SIZE)]], workers))
    assert str(caught.value).startswith(f"{broken}: the image cannot be decoded")
    assert str(caught.value).endswith("(data row 5 of m.csv)")


@pytest.mark.parametrize("views", [None, Views(kinds=STRONG)], ids=["same view", "views apart"])
def test_workers_do_not_change_pixels(manifest, views):
    micro_batches = [[(row, view, size) for row in range(ROWS)] for view, size in ((-1, SIZE), (0, (8, 24)), (1, SIZE))]
    state = torch.get_rng_state()
    alone = list(loader(dataset(manifest, views=views), micro_batches, 0))
    shared = list(loader(dataset(manifest, views=views), micro_batches, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.pixels_BCHW, b.pixels_BCHW)
        assert torch.equal(a.view_B, b.view_B)
        assert views is None or torch.equal(a.student_BCHW, b.student_BCHW)


# ── What the student sees ──


def test_without_views_both_sides_see_the_same(manifest):
    assert collate([dataset(manifest)[0, 0, SIZE]]).student_BCHW is None


@pytest.mark.parametrize("flip", [False, True])
def test_teachers_see_what_they_see_without_views(manifest, flip):
    bare = dataset(manifest, augment=Augment(flip=flip))
    apart = dataset(manifest, augment=Augment(flip=flip), views=Views(kinds=STRONG, share=1.0))
    for row, view in ((0, 0), (1, 0), (0, 3), (2, -1)):
        assert torch.equal(apart[row, view, SIZE].pixels_BCHW, bare[row, view, SIZE].pixels_BCHW)
        assert torch.equal(apart[row, view, SIZE].student_BCHW, apart[row, view, SIZE].pixels_BCHW) == (view == -1)


def test_students_pixels_are_of_seed_row_view_and_size(manifest):
    """In any order, whatever was drawn before and however many threads there are."""
    keys = [(row, view, size) for row in range(ROWS) for view in range(3) for size in (SIZE, (8, 24))]
    first = dataset(manifest, views=Views(kinds=STRONG))
    seen = {key: first[key].student_BCHW for key in keys}
    torch.manual_seed(99)
    random.seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = dataset(manifest, views=Views(kinds=STRONG))
    assert all(torch.equal(again[key].student_BCHW, seen[key]) for key in reversed(keys))
    torch.set_num_threads(threads)
    other = dataset(manifest, views=Views(kinds=STRONG), seed=4, augment=None)
    same = dataset(manifest, views=Views(kinds=STRONG), augment=None)
    assert not all(torch.equal(other[key].student_BCHW, same[key].student_BCHW) for key in keys)


def simulated_rows(data, views=range(50)):
    """By row, in how many views what the student sees is not what its teachers see."""
    found = []
    for row in range(ROWS):
        seen = [data[row, view, (4, 4)] for view in views]
        found.append(sum(not torch.equal(one.student_BCHW, one.pixels_BCHW) for one in seen))
    return found


def test_share_of_the_views(manifest):
    """0.3 of 300: within 4 standard deviations of a binomial, and none of them the same in every view."""
    counts = simulated_rows(dataset(manifest, views=Views(kinds=Acquisition(inversion=1.0), share=0.3)))
    assert 58 < sum(counts) < 122
    assert min(counts) > 0
    assert simulated_rows(dataset(manifest, views=Views(kinds=Acquisition(inversion=1.0), share=1.0))) == [50] * ROWS


def test_views_of_some_groups_alone(manifest):
    """Those in any of the groups named; who is not annotated is in none."""
    table = replace(manifest, attributes={"device": ("A", "B", None) * 2, "sex": ("F", "F", "F", "M", None, "F")})

    def inverted(**groups):
        views = Views(kinds=Acquisition(inversion=1.0), share=1.0, groups=groups)
        return simulated_rows(dataset(table, views=views), [0])

    assert inverted(device=("A",)) == [1, 0, 0, 1, 0, 0]
    assert inverted(device=("A", "B")) == [1, 1, 0, 1, 1, 0]
    assert inverted(device=("B",), sex=("M",)) == [0, 1, 0, 1, 1, 0]
    assert inverted(**{"device*sex": ("A|F", "B|F")}) == [1, 1, 0, 0, 0, 0]


def test_students_pixels_are_pinned(manifest):
    """A change of these numbers changes every run with views: say so in the release notes."""
    data = dataset(manifest, augment=None, views=Views(kinds=STRONG, share=1.0))
    found = torch.stack([data[row, 2, (2, 2)].student_BCHW[0, 0] for row in range(ROWS)])
    pinned = [
        [0.5087, 0.5077],
        [0.4982, 0.4839],
        [0.4816, 0.4969],
        [0.4096, 0.4102],
        [0.4826, 0.4826],
        [0.3299, 0.3422],
    ]
    torch.testing.assert_close(found, torch.tensor(pinned), atol=1e-4, rtol=0)
