"""From an image file to an array: PNG and JPEG by Pillow, .npy and .npz by numpy.

Stored values are scaled to [0, 1]: unsigned 8 and 16 bit by their full range, floats as they are, and anything by
`value_range` where it is declared (values outside of it are clipped, as in a CT window).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from agglom.errors import DataError

ARRAYS = (".npy", ".npz")
# Resampled floats overshoot by rounding; more than that is another unit.
ROUNDING = 1e-4


def read(path: str | Path, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """The image as float32 (3, H, W) in [0, 1]; a grey image is repeated. EXIF orientation is ignored.

    Raises:
        DataError: naming the file, if it is absent, corrupt, of a layout or type that is not known, or out of range.
    """
    image_CHW = decode(path, value_range)
    return np.repeat(image_CHW, 3, axis=0) if image_CHW.shape[0] == 1 else image_CHW


def decode(path: str | Path, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Like `read`, but a grey image stays (1, H, W), so that resizing it costs a third."""
    path = Path(path)
    stored = _array(path) if path.suffix.lower() in ARRAYS else _image(path)
    if stored.size == 0:
        raise DataError(f"{path}: the image has no pixels, its shape is {stored.shape}. Drop its row")
    return _unit(path, _channels_first(path, stored), value_range)


def _image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or image.mode in ("L", "RGB"):
                return np.asarray(image)
            if image.mode in ("1", "LA", "La"):
                return np.asarray(image.convert("L"))
            if image.mode in ("I", "F"):
                return np.asarray(image)
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise _absent(path) from None
    except MemoryError:
        raise
    # Pillow's decoders fail with whatever the broken bytes led them into.
    except Exception as error:
        raise _corrupt(path, error) from error


def _array(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                names = list(loaded.files)
                if len(names) == 1:
                    return loaded[names[0]]
    except FileNotFoundError:
        raise _absent(path) from None
    except MemoryError:
        raise
    # Numpy parses the header as Python and a zip archive: as many kinds of errors.
    except Exception as error:
        raise _corrupt(path, error) from error
    raise DataError(f"{path}: holds {len(names)} arrays ({', '.join(names)}), one was expected. Write the image alone")


def _absent(path: Path) -> DataError:
    return DataError(f"{path}: the image file does not exist. Check data.root and the image column")


def _corrupt(path: Path, error: Exception) -> DataError:
    reason = str(error).split("\n")[0] or type(error).__name__
    return DataError(
        f"{path}: the image cannot be decoded ({reason}). "
        "Known are PNG, JPEG, .npy and .npz without pickled objects; copy the file again or drop its row"
    )


def _channels_first(path: Path, stored: np.ndarray) -> np.ndarray:
    if stored.ndim == 2:
        return stored[None]
    if stored.ndim == 3:
        first, last = stored.shape[0] in (1, 3), stored.shape[2] in (1, 3)
        if first != last:
            return stored if first else stored.transpose(2, 0, 1)
    raise DataError(
        f"{path}: cannot tell rows, columns and channels from shape {stored.shape}. "
        "Expected (H, W), (H, W, C) or (C, H, W) with 1 or 3 channels"
    )


def _unit(path: Path, stored_CHW: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    kind = stored_CHW.dtype.kind
    if kind not in "uif":
        raise DataError(f"{path}: pixels of type {stored_CHW.dtype}. Expected uint8, uint16 or floats")
    if kind == "f" and not np.isfinite(stored_CHW).all():
        raise DataError(f"{path}: holds pixels that are NaN or infinite. Write finite values or drop its row")
    if value_range is not None:
        low, high = value_range
    elif stored_CHW.dtype.kind == "u" and stored_CHW.dtype.itemsize <= 2:
        low, high = 0.0, float(np.iinfo(stored_CHW.dtype).max)
    else:
        low, high = 0.0, 1.0
        least, most = stored_CHW.min(), stored_CHW.max()
        if kind != "f" or least < -ROUNDING or most > 1 + ROUNDING:
            raise DataError(
                f"{path}: {stored_CHW.dtype} pixels from {least:g} to {most:g}, and only uint8, uint16 and floats "
                "in [0, 1] have a known range. Set data.value_range to the values of black and white"
            )
    unit_CHW = stored_CHW.astype(np.float32)
    unit_CHW -= np.float32(low)
    unit_CHW /= np.float32(high - low)
    return np.ascontiguousarray(np.clip(unit_CHW, 0.0, 1.0, out=unit_CHW))
