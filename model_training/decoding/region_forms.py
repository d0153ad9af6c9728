"""Photos and regions as callers of the Python API hold them, made into arrays.

| a region | how it is read |
| --- | --- |
| an array or tensor of the photo's size, nested lists | see `mask_arrays` |
| a Pillow image, bytes, or the path of a mask image | see `mask_images` |
| `{"size": [height, width], "counts": ...}`, the `rle` of a corpus's region | COCO RLE, compressed or not |
| `[[x1, y1, x2, y2, x3, y3, ...], ...]`, an array (N, 2) or cv2's (N, 1, 2) | polygons in pixels |
| four numbers | a box in pixels: x1, y1, x2, y2, or x, y, width, height where `boxes` says so |
| a record of COCO or of SAM, with `segmentation` | what its `segmentation` is |

A photo is a path, the bytes of an image file, a Pillow image, an array (H, W, 3) uint8, or a tensor (3, H, W)
or (H, W, 3), uint8 or floats from 0 to 1. No URL is fetched.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...filters import rle
from ...pipeline.io import files, mask_images, photos
from ...pipeline.io.photos import to_rgb
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Rle
from ..model import tiling
from .mask_arrays import to_array, to_bool_mask

Boxes = Literal["xyxy", "xywh"]

_BOXES = {"xyxy": "x1, y1, x2, y2", "xywh": "x, y, width, height"}
_ROUNDING_PX = 1.0
"""How far a box may reach beyond its photo."""
_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/")
"""A URL, also one that `Path` has taken a slash from."""

_GIVE_PHOTO = "give a path, bytes, (H, W, 3) uint8 RGB, or an image that Pillow has opened"
_FORMS = "a mask of the photo's size, a path, an RLE, polygons or a box"


def to_pixels(photo: Any, name: str) -> np.ndarray:
    """A caller's photo as (H, W, 3) uint8 RGB.

    Args:
        photo: in one of the forms above. It is taken as it is stored: an EXIF rotation is not applied.
        name: what messages call it.

    Raises:
        ConfigError: the file is missing or no photo, or the values cannot be pixels.
    """
    from PIL import Image

    if isinstance(photo, str | os.PathLike):
        return _decode(name, _read(photo, name))
    if isinstance(photo, bytes | bytearray):
        return _decode(name, bytes(photo))
    if isinstance(photo, Image.Image):
        if photo.mode == "F":
            raise ConfigError(f"{name}: floats (mode F), whose range is not known; {_GIVE_PHOTO}")
        return np.asarray(to_rgb(photo))
    if hasattr(photo, "detach"):
        return _pixels_of_tensor(photo, name)
    if not isinstance(photo, np.ndarray):
        raise ConfigError(f"{name}: a {type(photo).__name__}; {_GIVE_PHOTO}")
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or not photo.size:
        raise ConfigError(f"{name}: {photo.shape} {photo.dtype}; {_GIVE_PHOTO}")
    return photo


def _pixels_of_tensor(tensor: Any, name: str) -> np.ndarray:
    values = to_array(tensor, name)
    if values.ndim == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    floats = values.dtype.kind == "f"
    if floats and values.size and 0 <= values.min() and values.max() <= 1:  # NaN is neither
        values = np.rint(values * 255).astype(np.uint8)
    if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8 or not values.size:
        raise ConfigError(
            f"{name}: a tensor {tuple(tensor.shape)} {values.dtype}; give (3, H, W) or (H, W, 3), as uint8 "
            "or as floats from 0 to 1"
        )
    return np.ascontiguousarray(values)


def to_masks(regions: Any, size: tuple[int, int], boxes: Boxes = "xyxy") -> list[np.ndarray]:
    """A caller's regions as (H, W) bool, in their order.

    Args:
        regions: a list of regions, each in one of the forms above, or an array or a tensor of masks (N, H, W)
            or of boxes (N, 4).
        size: (height, width) of the photo.
        boxes: what four numbers mean.

    Raises:
        ConfigError: a region cannot be read, is empty or of another size, and it says its number; there are
            more than a corpus may have in one image.
    """
    if boxes not in _BOXES:
        listed = " or ".join(f"{name!r} ({numbers})" for name, numbers in _BOXES.items())
        raise ConfigError(f"boxes: {boxes!r}; give {listed}, in pixels")
    listed, most = _listed(regions, size), Limits().max_masks
    if len(listed) > most:
        raise ConfigError(f"masks: {len(listed):,} regions; at most {most:,} fit into a call, make several")
    masks = [_to_mask(region, size, boxes, number) for number, region in enumerate(listed)]
    tiling.check_masks(masks, size, len(masks))
    return masks


def _listed(regions: Any, size: tuple[int, int]) -> list[Any]:
    """The regions one by one; a single one that was not put into a list is refused."""
    shape = getattr(regions, "shape", None)
    if shape is not None:
        if len(shape) == 3 or (len(shape) == 2 and shape[1] == 4 and tuple(shape) != size):
            return list(regions)
        if len(shape) == 2:
            advice = "put a single mask into a list; of a label map give [labels == i for i in its labels]"
            raise ConfigError(f"masks: an array of the shape {tuple(shape)}; {advice}")
    elif isinstance(regions, str | bytes | os.PathLike | Mapping | Rle) or not isinstance(regions, Iterable):
        raise ConfigError(f"masks: a {type(regions).__name__}; give a list, with {_FORMS} for each region")
    listed = list(regions)
    if listed and all(map(_is_number, listed)):
        raise ConfigError(f"masks: numbers; give a list of regions, such as [[{_BOXES['xyxy']}]] for one box")
    if len(listed) == size[0] and all(_is_flat(row, size[1]) for row in listed) and size[1] != 4:
        raise ConfigError("masks: the rows of a mask; give a list of masks, one for each region")
    return listed


def _to_mask(region: Any, size: tuple[int, int], boxes: Boxes, number: int) -> np.ndarray:
    from PIL import Image

    name = f"mask {number}"
    if isinstance(region, str | os.PathLike):
        return _of_file(region, size, name)
    if isinstance(region, bytes | bytearray):
        return mask_images.fit_mask(mask_images.decode_mask_image(bytes(region), name), size, name)
    if isinstance(region, Image.Image):
        return mask_images.to_mask(region, name)
    if isinstance(region, Mapping):
        return _of_record(region, size, boxes, number)
    if isinstance(region, Rle):
        return _decode_rle({"size": region.size, "counts": region.counts}, size, name)
    if isinstance(region, list | tuple):
        if len(region) == 4 and all(map(_is_number, region)):
            return _of_box(region, size, boxes, name)
        rings = None if _is_dense(region, size) else _rings(region)
        if rings is not None:
            return _of_polygons(rings, size, name)
    elif hasattr(region, "shape"):
        shape = tuple(region.shape)
        if shape == (4,):
            return _of_box(to_array(region, name).tolist(), size, boxes, name)
        if shape != size and len(shape) in (2, 3) and shape[0] >= 3 and shape[1:] in ((2,), (1, 2)):
            return _of_polygons([to_array(region, name).reshape(-1).tolist()], size, name)
    elif not isinstance(region, Iterable):
        raise ConfigError(f"{name}: a {type(region).__name__}; give {_FORMS}")
    array: Any = region
    return to_bool_mask(array, number)


def _of_file(path: str | os.PathLike[str], size: tuple[int, int], name: str) -> np.ndarray:
    text = _local(path, name)
    if Path(text).is_dir() or text.lower().endswith((".json", ".jsonl", ".tar", ".parquet")):
        raise ConfigError(
            f"{name}: {text} holds many regions; give one mask image for each, or the file to "
            "`paracaption caption`"
        )
    try:
        return mask_images.read_mask_image(text, size)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _of_record(record: Mapping[str, Any], size: tuple[int, int], boxes: Boxes, number: int) -> np.ndarray:
    name = f"mask {number}"
    if "segmentation" in record and not isinstance(record["segmentation"], str | None):
        return _to_mask(record["segmentation"], size, boxes, number)
    if "counts" not in record:
        keys = ", ".join(map(str, record)) or "nothing"
        raise ConfigError(f"{name}: a dict with {keys}; give an RLE with `size` and `counts`")
    if record.get("size") is None:
        raise ConfigError(f"{name}: an RLE without its size; give `size`, [height, width]")
    return _decode_rle(record, size, name)


def _decode_rle(record: Mapping[str, Any], size: tuple[int, int], name: str) -> np.ndarray:
    counts, shape = (
        to_array(each, name).tolist() if hasattr(each, "shape") else each
        for each in (record["counts"], record["size"])
    )
    try:
        found = rle.check(counts, shape)
    except BadRecord as error:
        _refuse_empty(error, name)
        raise ConfigError(f"{name}: {error.detail}; give the mask itself, or correct its RLE") from error
    if tuple(found.rle.size) != size:
        has = "x".join(map(str, reversed(found.rle.size)))
        raise ConfigError(f"{name} is {has}, the image {size[1]}x{size[0]}: give an RLE of this photo")
    return rle.decode(found.rle).astype(bool)


def _of_polygons(rings: list[list[float]], size: tuple[int, int], name: str) -> np.ndarray:
    (found,) = rle.check_all([rings], *size)
    if isinstance(found, BadRecord):
        _refuse_empty(found, name)
        form = "polygons are lists of x1, y1, x2, y2, x3, y3, ... in pixels"
        raise ConfigError(f"{name}: {found.detail}; {form}")
    return rle.decode(found.rle).astype(bool)


def _refuse_empty(error: BadRecord, name: str) -> None:
    if error.reason is Reason.MASK_EMPTY:
        raise ConfigError(f"{name} is empty: there is nothing to caption; leave it out") from error


def _of_box(numbers: Any, size: tuple[int, int], boxes: Boxes, name: str) -> np.ndarray:
    """The pixels whose middle is in a box; its far edge is exclusive."""
    first, second, third, fourth = map(float, numbers)
    shown = f"{name}: the box {', '.join(f'{each:g}' for each in map(float, numbers))}"
    means = f"`boxes` says that it is {_BOXES[boxes]} in pixels"
    if not all(map(math.isfinite, (first, second, third, fourth))):
        raise ConfigError(f"{shown} has NaN or an infinite number; give {_BOXES[boxes]} in pixels")
    x1, y1, x2, y2 = first, second, third, fourth
    if boxes == "xywh":
        x2, y2 = first + third, second + fourth
    height, width = size
    if x2 <= x1 or y2 <= y1:
        raise ConfigError(f"{shown} is empty; {means}")
    if max(x1, y1, x2, y2) <= 1 and min(size) > 1:
        raise ConfigError(f"{shown} has shares of the photo; {means}, so multiply by width and height")
    if min(x1, y1) < -_ROUNDING_PX or x2 > width + _ROUNDING_PX or y2 > height + _ROUNDING_PX:
        raise ConfigError(f"{shown} reaches beyond the photo, which is {width}x{height}; {means}")
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    mask = ((rows >= y1) & (rows < y2))[:, None] & ((columns >= x1) & (columns < x2))[None]
    if not mask.any():  # narrower than a pixel
        mask[min(height - 1, max(0, int(y1))), min(width - 1, max(0, int(x1)))] = True
    return mask


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_flat(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length and all(_is_bit(each) for each in value)


def _is_bit(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating)


def _is_dense(region: list[Any] | tuple[Any, ...], size: tuple[int, int]) -> bool:
    """Whether nested lists are the rows of a mask of the photo's size."""
    return len(region) == size[0] and all(_is_flat(row, size[1]) for row in region)


def _rings(region: list[Any] | tuple[Any, ...]) -> list[list[float]] | None:
    """The rings of polygons, each a flat list of at least three points; None if this is something else."""
    parts = [each.tolist() if hasattr(each, "tolist") else each for each in region]
    if len(parts) >= 6 and all(map(_is_number, parts)):
        return [list(map(float, parts))]
    if not parts or not all(isinstance(each, list | tuple) for each in parts):
        return None
    if len(parts) >= 3 and all(len(each) == 2 and all(map(_is_number, each)) for each in parts):
        return [[float(number) for each in parts for number in each]]
    flat = [[number for point in each for number in point] if _has_points(each) else each for each in parts]
    if all(len(each) >= 6 and len(each) % 2 == 0 and all(map(_is_number, each)) for each in flat):
        return [list(map(float, each)) for each in flat]
    return None


def _has_points(ring: Any) -> bool:
    return all(isinstance(point, list | tuple) and len(point) == 2 for point in ring)


# Files.


def _local(path: str | os.PathLike[str], name: str) -> str:
    text = os.fspath(path)
    if isinstance(text, bytes) or "\0" in text or not text:
        raise ConfigError(f"{name}: {text!r} is not a path; correct it")
    if text.startswith("data:"):
        raise ConfigError(f"{name}: {text[:30]}... is a data URL; give the bytes that it holds")
    if files.is_url(text) or _URL.match(text):
        raise ConfigError(f"{name}: {text} is a URL; download it first")
    return str(Path(files.local(text)).expanduser())


def _read(path: str | os.PathLike[str], name: str) -> bytes:
    text = _local(path, name)
    try:
        return files.read(Blob(text))
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: {text}: no such photo; correct the path") from error
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{name}: {text}: cannot be read ({why}); correct the path") from error


def _decode(name: str, data: bytes) -> np.ndarray:
    try:
        return photos.decode(Blob(name), data, Limits().max_pixels)
    except BadRecord as error:
        raise ConfigError(f"{error.detail}; {_GIVE_PHOTO}") from error
