"""Readers: every format and layout to (3, H, W) in [0, 1], and every broken file to a DataError that names it."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agglom.data.readers import decode, read
from agglom.errors import DataError

GREY = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def saved(folder, name: str, stored) -> str:
    path = folder / name
    if isinstance(stored, Image.Image):
        stored.save(path)
    elif name.endswith(".npz"):
        np.savez(path, image=stored)
    else:
        np.save(path, stored)
    return str(path)


def check(image_CHW, expected_CHW, atol=1e-6):
    assert image_CHW.dtype == np.float32
    assert image_CHW.flags.c_contiguous
    np.testing.assert_allclose(image_CHW, np.broadcast_to(expected_CHW, (3, *image_CHW.shape[1:])), atol=atol)


def test_png_8_bit(tmp_path):
    grey = (GREY % 256).astype(np.uint8)
    check(read(saved(tmp_path, "l.png", Image.fromarray(grey))), grey[None] / 255)
    check(read(saved(tmp_path, "rgb.png", Image.fromarray(RGB))), RGB.transpose(2, 0, 1) / 255)


def test_png_16_bit_grey(tmp_path):
    stored = GREY * 100
    check(read(saved(tmp_path, "i16.png", Image.fromarray(stored))), stored[None] / 65535)
    check(read(str(tmp_path / "i16.png"), (0, 40000)), (stored[None] / 40000).clip(0, 1))


def test_png_other_modes(tmp_path):
    rgb = Image.fromarray(RGB)
    expected = RGB.transpose(2, 0, 1) / 255
    with_alpha = rgb.copy()
    with_alpha.putalpha(7)
    check(read(saved(tmp_path, "rgba.png", with_alpha)), expected)
    palette = rgb.quantize(16)
    check(read(saved(tmp_path, "p.png", palette)), np.asarray(palette.convert("RGB")).transpose(2, 0, 1) / 255)
    grey = rgb.convert("L")
    grey_expected = np.asarray(grey)[None] / 255
    check(read(saved(tmp_path, "la.png", grey.convert("LA"))), grey_expected)
    check(read(saved(tmp_path, "1.png", grey.point(lambda v: 255 * (v > 99)).convert("1"))), grey_expected > 99 / 255)


def test_jpeg_and_its_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    path = tmp_path / "x.jpg"
    smooth = Image.fromarray(RGB).resize((120, 80), Image.Resampling.BICUBIC)
    smooth.save(path, quality=98, subsampling=0, exif=exif)
    check(read(path), np.asarray(smooth).transpose(2, 0, 1) / 255, atol=0.06)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("layout", ["HW", "HWC", "CHW", "1HW", "HW1"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64", ">u2"])
def test_arrays(tmp_path, suffix, layout, dtype):
    unit = {"HW": GREY / 999, "HW1": GREY[..., None] / 999, "1HW": GREY[None] / 999}.get(layout, RGB / 255)
    unit = unit.transpose(2, 0, 1) if layout == "CHW" else unit
    scale = {"uint8": 255, "uint16": 65535, ">u2": 65535}.get(dtype, 1)
    stored = (unit * scale).round().astype(dtype) if scale > 1 else unit.astype(dtype)
    expected = stored / scale
    expected = {"HW": lambda x: x[None], "HWC": lambda x: x.transpose(2, 0, 1), "HW1": lambda x: x[None, ..., 0]}.get(
        layout, lambda x: x
    )(expected)
    check(read(saved(tmp_path, f"x.{suffix}", stored)), expected)


def test_value_range_is_a_window(tmp_path):
    stored = np.array([[-1000, -300, 400, 3000]], np.int16)
    path = saved(tmp_path, "ct.npy", stored)
    check(read(path, (-1000, 400)), np.array([[[0, 0.5, 1, 1]]]))
    with pytest.raises(DataError, match=r"ct\.npy: int16 pixels from -1000 to 3000.*data\.value_range"):
        read(path)


def test_grey_stays_one_channel_when_decoded(tmp_path):
    assert decode(saved(tmp_path, "x.npy", GREY)).shape == (1, 20, 30)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (np.array([[0.0, 1.5]]), r"from 0 to 1\.5.*Set data\.value_range"),
        (np.array([[0.0, -0.1]]), "data.value_range"),
        (np.array([[0.0, np.nan]]), "NaN"),
        (np.array([[0.0, np.inf]]), "infinite"),
        (np.zeros((0, 4)), "no pixels"),
        (np.zeros((2, 8, 8)), r"\(2, 8, 8\)"),
        (np.zeros((3, 8, 3)), "cannot tell"),
        (np.zeros((1, 3, 8, 8)), "cannot tell"),
        (np.zeros((8, 8), bool), "type bool"),
        (np.zeros((8, 8), complex), "type complex"),
        (np.array([[None, "code"]]), "pickle"),
    ],
)
def test_unusable_arrays(tmp_path, stored, says):
    with pytest.raises(DataError, match=says) as caught:
        read(saved(tmp_path, "x.npy", stored))
    assert "x.npy" in str(caught.value)


def test_npz_holds_one_array(tmp_path):
    np.savez(tmp_path / "x.npz", image=GREY, mask=GREY)
    with pytest.raises(DataError, match=r"holds 2 arrays \(image, mask\)"):
        read(tmp_path / "x.npz")


def test_absent(tmp_path):
    for name in ("x.png", "x.npy"):
        with pytest.raises(DataError, match=rf"{name}: the image file does not exist"):
            read(tmp_path / name)


def encoded(name: str) -> bytes:
    buffer = io.BytesIO()
    if name == "npy":
        np.save(buffer, RGB)
    elif name == "npz":
        np.savez(buffer, RGB)
    else:
        Image.fromarray(RGB).save(buffer, name)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["png", "jpeg", "npy", "npz"])
def test_truncated(tmp_path, name):
    raw = encoded(name)
    for kept in (0, 10, len(raw) // 2):
        path = tmp_path / f"x.{name}"
        path.write_bytes(raw[:kept])
        with pytest.raises(DataError, match=rf"x\.{name}"):
            read(path)


@pytest.mark.parametrize("name", ["png", "jpeg", "npy", "npz"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_escape(tmp_path_factory, name, data):
    """A damaged file gives an image or a DataError, nothing else."""
    raw = bytearray(encoded(name))
    for place in data.draw(st.lists(st.integers(0, min(len(raw), 200) - 1), min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{name}"
    path.write_bytes(raw)
    try:
        image_CHW = read(path)
    except DataError:
        return
    assert image_CHW.shape[0] == 3
    assert 0 <= image_CHW.min() <= image_CHW.max() <= 1
