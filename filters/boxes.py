"""Boxes as annotators draw them: inside their photo, in whole pixels, and which mask is that of a box."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..schemas.errors import BadRecord
from ..schemas.reasons import Reason
from ..schemas.records import Rle
from . import rle
from .verdict import Verdict

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


def fit(given: Sequence[float] | None, width: int, height: int) -> tuple[Box, str]:
    """A published box in whole pixels: all that it touches, as far as it is in the photo.

    Args:
        given: x, y, width, height in pixels, fractions allowed.
        width: of the photo.
        height: of the photo.

    Returns:
        The box, and what of it lies outside of the photo, in words: "" if that is less than a pixel.

    Raises:
        BadRecord: ANNOTATION_UNREADABLE for what is no box, BOX_EMPTY for one without area or outside of its
            photo. The detail names no file: the caller knows it.
    """
    if given is None or len(given) != 4:
        what = "missing" if given is None else f"a list of {len(given)} numbers"
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"`bbox` is {what}; it has to be [x, y, width, height]")
    x, y, w, h = (round(number, _DIGITS) for number in given)
    shown = f"the box [{x:g}, {y:g}, {w:g}, {h:g}]"
    if w <= 0 or h <= 0:
        raise BadRecord(Reason.BOX_EMPTY, f"{shown} has no area")
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        raise BadRecord(Reason.BOX_EMPTY, f"{shown} is outside of the photo, which is {width}x{height}")
    first, last = (math.floor(left), math.floor(top)), (_ceil(right), _ceil(bottom))
    box = (*first, last[0] - first[0], last[1] - first[1])
    most = max(-x, -y, x + w - width, y + h - height)
    return box, f"{shown} leaves the photo, which is {width}x{height}" if most >= 1 else ""


_DIGITS = 2
"""Digits of a pixel that count: more are noise of floating point, which would add a row or a column."""


def _ceil(number: float) -> int:
    return math.ceil(round(number, _DIGITS))


def best_in_box(candidates: Sequence[Rle | None], box: Box) -> int | None:
    """The index of the mask whose own box is most like a box; None if no mask has a pixel's row and column
    in common with it.

    Of equal ones the earlier counts, of which the segmenter is surer. A mask may reach over the edges of the
    box: people draw boxes too small as well.

    Args:
        candidates: the segmenter's masks, the best one first; None for an empty one.
        box: that was asked about.
    """
    overlaps = [0.0 if mask is None else box_iou(_measure(mask), box) for mask in candidates]
    best = max(overlaps, default=0.0)
    return overlaps.index(best) if best > 0 else None


def box_iou(one: Box, other: Box) -> float:
    """IoU of two boxes, 0 to 1."""
    x, y = max(one[0], other[0]), max(one[1], other[1])
    right = min(one[0] + one[2], other[0] + other[2])
    bottom = min(one[1] + one[3], other[1] + other[3])
    shared = max(0, right - x) * max(0, bottom - y)
    both = one[2] * one[3] + other[2] * other[3] - shared
    return shared / both if both else 0.0


def judge_found(num_candidates: int) -> Verdict:
    """The drop of a region without a mask. That nothing was found is a verdict and no error."""
    if num_candidates:
        return Verdict(Reason.SEGMENTER_NONE, f"none of the segmenter's {num_candidates} masks is in the box")
    return Verdict(Reason.SEGMENTER_NONE, "the segmenter found nothing in the box")


def _measure(mask: Rle) -> Box:
    return rle.check(mask.counts, mask.size).bbox
