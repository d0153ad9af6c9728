"""Masks as people keep them in image files: which pixels of such an image are the region.

| the file | what counts |
| --- | --- |
| two values, without loss (1 bit, 0 and 1, 0 and 255, a palette of two colors) | the brighter one |
| more values (JPEG's noise, soft edges, 16 bits) | brighter than half of the range |
| alpha that differs between pixels | alpha, unless the opaque pixels are black and white |
| colors | their brightest channel; three colors or more, without loss, are a label map and refused |
| flat areas of three grays or more, without loss | a label map and refused; not for a trimap's middle gray |

Pixels are those stored: EXIF orientation is never applied.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from ...schemas.errors import ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob
from . import files, photos
from .orientation import unturned

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_LOSSY = {"JPEG", "MPO", "WEBP"}
_FORMATS = (*photos.FORMATS, "GIF")
_MAX_UNCLEAR = 0.1
"""Share of pixels that may be neither dark nor bright; with more, it is a photo or a label map."""
_MAX_THIRD = 0.002
"""Share of pixels that may have a third color, or be inside areas of a third gray."""
_SHADE = 32
"""A color's distance, of 255, from the line between two others up to which it is a shade between them."""
_MAX_GRAYS = 64
"""Grays of a label map that is distinguished from a mask: more are a wide soft edge, or noise."""
_MIDDLE = 0.05
"""How far a trimap's gray may be from the middle, as a share of the range."""
_ASPECT = 0.03
"""A mask is scaled if its aspect ratio differs from the photo's by no more than this share."""


class UnusableMask(ConfigError):
    """A mask image that cannot be used; `reason` is what a build drops its region for."""

    def __init__(self, detail: str, reason: Reason = Reason.MASK_UNDECODABLE):
        super().__init__(detail)
        self.reason = reason


def read_mask_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """Read a mask from an image file.

    Args:
        path: a local path or an fsspec URL.
        size: (height, width) of its photo. A mask of another size is scaled if its aspect ratio is the
            photo's.

    Returns:
        (H, W) bool with at least one pixel.

    Raises:
        ConfigError: the file is missing, or is no image; or the image is no mask, is empty, or has another
            aspect ratio than the photo.
    """
    mask = fit_mask(decode_mask_image(_bytes(path), path), size, path)
    if not mask.any():
        detail = f"{path}: no pixel is left at the photo's {size[1]}x{size[0]}; leave the mask out"
        raise UnusableMask(detail, Reason.MASK_EMPTY)
    return mask


def decode_mask_image(data: bytes, name: str, max_pixels: int = photos.MAX_PIXELS) -> np.ndarray:
    """The region in the bytes of a mask image, as (H, W) bool with at least one pixel.

    Args:
        data: the bytes of an image file.
        name: what messages call it.
        max_pixels: a larger image is refused before it is decoded.

    Raises:
        UnusableMask: the bytes are no image, or the image is no mask or an empty one.
    """
    from PIL import Image

    try:
        with photos.quiet(), Image.open(io.BytesIO(unturned(data)), formats=_FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                found = f"{opened.width}x{opened.height} pixels; at most {max_pixels:,} are decoded"
                raise UnusableMask(f"{name}: {found}; give the mask at its photo's size")
            opened.load()
            lossy = opened.format in _LOSSY
            values, most = _brightness(opened, name)
    except ConfigError:
        raise
    except photos.BROKEN as error:
        why = "not an image that can be read, or cut short" if data else "empty file"
        raise UnusableMask(f"{name}: {why}; give a PNG or JPEG of the mask") from error
    return _threshold(values, most, lossy, name)


def to_mask(image: Any, name: str) -> np.ndarray:
    """The region in a Pillow image, as (H, W) bool with at least one pixel.

    Raises:
        ConfigError: the image is no mask or an empty one; `name` is what messages call it.
    """
    return _threshold(*_brightness(image, name), image.format in _LOSSY, name)


def fit_mask(mask: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """The mask at its photo's size (height, width), scaled to the nearest pixel where it has another size.

    Raises:
        ConfigError: the mask has another aspect ratio than the photo.
    """
    if mask.shape == size:
        return mask
    (height, width), (tall, wide) = mask.shape, size
    rounding = min(abs(height - tall * width / wide), abs(tall - height * wide / width))
    if rounding > 1 or abs(height * wide / (width * tall) - 1) > _ASPECT:
        rotated = " (width and height are swapped: photos are read as stored, and EXIF rotation is ignored)"
        raise UnusableMask(
            f"{name}: the mask is {width}x{height}, the photo {wide}x{tall}"
            f"{rotated if (width, height) == (tall, wide) else ''}; give a mask of this photo",
            Reason.SIZE_MISMATCH,
        )
    rows = (np.arange(tall) + 0.5) * height // tall
    columns = (np.arange(wide) + 0.5) * width // wide
    return mask[rows.astype(np.intp)][:, columns.astype(np.intp)]


def _bytes(path: str) -> bytes:
    try:
        return files.read(Blob(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; correct the path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); correct the path") from error


def _brightness(opened: Any, name: str) -> tuple[np.ndarray, float]:
    """Brightness of each pixel, (H, W), and the brightest value that the format can hold."""
    lossy = opened.format in _LOSSY
    if opened.mode == "P":
        opened = opened.convert("RGBA" if "transparency" in opened.info else "RGB")
    if opened.mode == "1":
        return np.asarray(opened, np.uint8), 1
    if opened.mode in ("L", "I", "F") or opened.mode.startswith("I;16"):
        values = np.asarray(opened)
        return values, _brightest_value(values, opened.mode)
    if opened.mode in ("LA", "La", "PA", "RGBa"):
        opened = opened.convert("RGBA")
    if opened.mode != "RGBA":
        return _brightest_channel(np.asarray(opened.convert("RGB")), lossy, name), 255
    pixels = np.asarray(opened)
    alpha = pixels[..., 3]
    if (alpha == alpha.flat[0]).all():
        return _brightest_channel(pixels[..., :3], lossy, name), 255
    shown = pixels[..., :3].max(axis=2)
    opaque = shown[alpha > 127]
    both = opaque.size and opaque.min() < 64 and opaque.max() > 191
    if both and _unclear(opaque, 255) <= _MAX_UNCLEAR and _gray(pixels[alpha > 127]):
        return np.where(alpha > 127, shown, 0), 255  # black and white with a transparent margin
    return alpha, 255


def _brightest_value(values: np.ndarray, mode: str) -> float:
    if mode == "L":
        return 255
    peak = float(values.max())
    return next(most for most in (1, 255, 65_535, max(peak, 65_535)) if peak <= most)


def _brightest_channel(pixels: np.ndarray, lossy: bool, name: str) -> np.ndarray:
    """The brightest channel of (H, W, 3).

    Raises:
        UnusableMask: different colors are equally bright, or there are three without loss.
    """
    values = pixels.max(axis=2)
    if values.min() == values.max() and (pixels != pixels[0, 0]).any():
        raise UnusableMask(
            f"{name}: its colors have the same brightness, so that region and background cannot be told "
            "apart; "
            "give the mask white on black"
        )
    if not lossy and _third_color(pixels, values) > _MAX_THIRD:
        raise UnusableMask(
            f"{name}: three colors or more, as in a picture or a label map, and no mask; give the region "
            "white on black, one file for each"
        )
    return values


def _third_color(pixels: np.ndarray, values: np.ndarray) -> float:
    """Share of the pixels that are no shade between the darkest and the brightest color of (H, W, 3)."""
    flat = pixels.reshape(-1, 3)
    dark, bright = (flat[place].astype(np.float32) for place in (values.argmin(), values.argmax()))
    along = bright - dark
    if not along.any():
        return 0.0
    away = flat - dark
    away -= (away @ along / (along @ along))[:, None] * along
    return float((np.abs(away).max(axis=1) > _SHADE).mean())


def _threshold(values: np.ndarray, most: float, lossy: bool, name: str) -> np.ndarray:
    if not lossy:
        low, high = values.min(), values.max()
        if low == high:
            if not high:
                detail = f"{name}: the mask is empty, there is nothing to caption; leave it out"
                raise UnusableMask(detail, Reason.MASK_EMPTY)
            return np.ones(values.shape, bool)
        if ((values == low) | (values == high)).all():
            return values == high
    if _unclear(values, most) > _MAX_UNCLEAR:
        raise UnusableMask(
            f"{name}: a picture, not a mask; give the region white on black, one file for each"
        )
    mask = values > most / 2
    if not mask.any():
        peak = f"{values.max():g} of {most:g}"
        raise UnusableMask(
            f"{name}: the mask is empty (brightest pixel {peak}); a label map is not a mask: give one file "
            "for each region, white on black",
            Reason.MASK_EMPTY,
        )
    if not lossy and _is_label_map(values, most):
        raise UnusableMask(
            f"{name}: areas of several grays, as in a label map, and no mask; give the region white on "
            "black, one file for each"
        )
    return mask


def _is_label_map(values: np.ndarray, most: float) -> bool:
    """Whether a gray besides the darkest and the brightest fills an area, and most grays fill one.

    Soft edges and the noise of a JPEG are lines and single pixels of many grays. A pixel is inside an area if
    its four neighbors have its value.
    """
    grays = np.unique(values)
    if len(grays) > _MAX_GRAYS:
        return False
    inner = values[1:-1, 1:-1]
    inside = (inner == values[:-2, 1:-1]) & (inner == values[2:, 1:-1])
    inside &= (inner == values[1:-1, :-2]) & (inner == values[1:-1, 2:])
    filling, counts = np.unique(inner[inside], return_counts=True)
    between = (filling > grays[0]) & (filling < grays[-1])
    between &= np.abs(filling / most - 0.5) > _MIDDLE
    return len(filling) * 2 >= len(grays) and bool((counts[between] > _MAX_THIRD * values.size).any())


def _unclear(values: np.ndarray, most: float) -> float:
    """Share of the pixels that are neither dark nor bright."""
    return float(((values > most / 4) & (values < most * 3 / 4)).mean())


def _gray(pixels: np.ndarray) -> bool:
    channels = pixels[..., :3].astype(np.int16)
    return bool((channels.max(axis=-1) - channels.min(axis=-1) < 32).mean() > 1 - _MAX_UNCLEAR)
