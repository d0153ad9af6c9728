"""The forms in which publishers and tools write a mask: packed counts, run lengths, polygons.

What can only mean one mask is read, however it was written; anything else is refused with what it is. Whether
the counts fill their image is not looked at here: `rle` judges what comes out.
"""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import numpy as np

from ..schemas.errors import BadRecord
from ..schemas.reasons import Reason

MAX_PIXELS = 1 << 31
"""More pixels than this do not fit pycocotools' 32-bit counts."""

_MARGIN_PX = 64
"""How far outside its image a polygon's point may lie; annotators round, and draw over the edge."""

_MAX_OUTLINE_PX = 20_000_000
"""Longest outline of one mask: pycocotools needs about 100 bytes for each pixel of it."""

_MAX_RING = 100_000
"""Most numbers of one polygon."""

_NUMBER = re.compile(r"-?\d{1,12}(?:\.\d*)?", re.ASCII)
_RUN_LENGTHS = re.compile(r"\[?[\d.\s,]+\]?", re.ASCII)


def read_counts(segmentation: Any, height: int, width: int) -> bytes | np.ndarray:
    """The counts of a mask as they are, packed or as int64; all about them but their values is checked.

    Args:
        segmentation: as in `rle.check_all`.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        BadRecord: MASK_UNDECODABLE, or SIZE_MISMATCH for the size of another image.
    """
    if segmentation is None:
        raise undecodable("`segmentation` is missing")
    if isinstance(segmentation, str):
        segmentation = _json_of(segmentation)
    if isinstance(segmentation, list):
        if not any(isinstance(each, dict) for each in segmentation):
            return _polygons(segmentation, height, width)
        if len(segmentation) != 1:
            raise undecodable(f"a list of {len(segmentation)} masks; give one, or a list of polygons")
        segmentation = segmentation[0]
    if not isinstance(segmentation, dict):
        raise undecodable(f"a mask is an object with size and counts, not {_kind(segmentation)}")
    size = read_size(segmentation.get("size"))
    if size != (height, width):
        swapped = " (height and width are swapped)" if size == (width, height) else ""
        detail = f"mask is {size[1]}x{size[0]}, image {width}x{height}{swapped}"
        raise BadRecord(Reason.SIZE_MISMATCH, detail)
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = _unwrapped(counts)
    if isinstance(counts, str):
        try:
            return counts.encode("ascii")
        except UnicodeEncodeError:
            raise undecodable("counts hold characters that no RLE has") from None
    if isinstance(counts, bytes):
        return counts
    if isinstance(counts, list):
        return _run_lengths(counts, height * width)
    if counts is None:
        raise undecodable("the mask has no `counts`")
    raise undecodable(f"`counts` has to be text or a list of run lengths; it is {_kind(counts)}")


def read_size(size: Any) -> tuple[int, int]:
    """(height, width) in pixels of a mask's `size`.

    Raises:
        BadRecord: MASK_UNDECODABLE.
    """
    if isinstance(size, list | tuple):
        size = list(map(_whole, size))
    match size:
        case [int(height), int(width)] if height > 0 and width > 0 and height * width < MAX_PIXELS:
            return height, width
    if size is None:
        raise undecodable("the mask has no `size`")
    raise undecodable(f"`size` has to be [height, width] in pixels; it is {str(size)[:80]}")


def undecodable(detail: str) -> BadRecord:
    """The error of a mask that cannot be read."""
    return BadRecord(Reason.MASK_UNDECODABLE, detail)


def _kind(value: Any) -> str:
    """What a parsed JSON value is, in a person's words."""
    words = {str: "text", dict: "an object", list: "a list", bool: "true or false", bytes: "bytes"}
    return "null" if value is None else words.get(type(value), "a number")


def _json_of(text: str) -> Any:
    """A mask that was written as JSON text, as tables do."""
    if text.lstrip()[:1] not in ("{", "["):
        raise undecodable("the mask is text; it has to be an object with `size` and `counts`")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise undecodable("the mask is text that is not JSON") from None


def _unwrapped(counts: str) -> str | list[str]:
    """Counts that were written as text once more: run lengths with blanks or commas, or Python's `b'...'`.

    No RLE has a blank, a comma or a quotation mark, so nothing else can be meant.
    """
    counts = counts.strip()
    if counts[:2] in ("b'", 'b"') and counts[2:] and counts[-1] == counts[1]:
        return counts[2:-1].replace("\\\\", "\\")
    if re.search(r"[\s,]", counts) and _RUN_LENGTHS.fullmatch(counts):
        return re.findall(r"[\d.]+", counts)
    return counts


def _number(value: Any) -> Any:
    """A number that was written as text; anything else as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def _whole(value: Any) -> Any:
    """A whole number that was written as 5.0 or "5"; anything else as it is."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _run_lengths(counts: list[Any], pixels: int) -> np.ndarray:
    if len(counts) <= pixels + 1 and not all(type(count) is int for count in counts):
        counts = list(map(_whole, counts))
    if len(counts) > pixels + 1 or not all(type(count) is int and 0 <= count <= pixels for count in counts):
        raise undecodable(f"a run length is not a whole number between 0 and {pixels}")
    return np.array(counts, np.int64)


def _polygons(rings: list[Any], height: int, width: int) -> bytes:
    """Polygons through pycocotools, which cuts off what is outside the image, and allocates by their length.

    The first ring has three points or more: pycocotools takes four numbers there for a box. Others may be
    shorter, and have no pixel then.
    """
    rings = _rings(rings)
    if not rings:
        raise undecodable("the list of polygons is empty")
    if len(rings) == height and all(len(ring) == width and all(n in (0, 1) for n in ring) for ring in rings):
        raise undecodable("the mask is a bitmap (a list of rows); write it as RLE")
    length = 0.0
    for place, ring in enumerate(rings):
        if len(ring) < (0 if place else 6) or len(ring) % 2 or len(ring) > _MAX_RING:
            raise undecodable("a polygon has to be a list of at least 3 points, x and y in turn")
        if not all(type(number) in (int, float) for number in ring):
            raise undecodable("a polygon has a value that is not a number")
        try:
            points = np.array(ring, np.float64).reshape(-1, 2)
        except OverflowError:
            raise undecodable("a polygon has a number with hundreds of digits") from None
        far = np.array([width, height]) + _MARGIN_PX
        if not ((points >= -_MARGIN_PX) & (points <= far)).all():
            raise undecodable(f"a polygon leaves its image by more than {_MARGIN_PX} pixels")
        length += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1, initial=0).sum())
    if length > _MAX_OUTLINE_PX:
        raise undecodable(f"outlines of {length:.0f} pixels; the most is {_MAX_OUTLINE_PX}")
    coco = importlib.import_module("pycocotools.mask")
    counts = coco.merge(coco.frPyObjects(rings, height, width))["counts"]
    return counts if isinstance(counts, bytes) else counts.encode()


def _rings(rings: list[Any]) -> list[list[Any]]:
    """Rings as lists of x, y in turn, also of one ring alone, and of points in pairs."""
    if rings and not isinstance(rings[0], list):
        rings = [rings]
    elif len(rings) > 2 and all(map(_is_point, rings)):
        rings = [rings]
    found = []
    for ring in rings:
        if not isinstance(ring, list):
            raise undecodable(f"a polygon is a list of numbers, not {_kind(ring)}")
        if ring and len(ring) <= _MAX_RING and all(map(_is_point, ring)):
            ring = [number for point in ring for number in point]
        found.append(list(map(_number, ring)) if any(isinstance(each, str) for each in ring) else ring)
    return found


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and not any(isinstance(each, list) for each in value)
