"""Cleans what a source has read, so that every format of ours can hold it.

A number that no column can hold becomes null, and a text becomes valid Unicode. A mask of a source of the
user's own is checked like published ones. A region without something that it needs is dropped.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from itertools import islice
from typing import Any

import msgspec

from ...filters import rle
from ...schemas.errors import BadRecord
from ...schemas.plain import fits_int64, plain_text, words_of
from ...schemas.reasons import Reason
from ...schemas.records import Credit, Drop, ImageRecord, Region, Rle

_MAX_SIDE = (1 << 31) - 1

_MOST_REGIONS = 1 << 20
"""Most regions that are taken from what does not say how many it has, such as a generator without an end."""


def clean_image(
    image: ImageRecord, stage: str, are_masks_checked: bool, are_masks_made_later: bool = False
) -> None:
    """Make an image clean, in place; see above. Never raises.

    Args:
        image: as its source left it.
        stage: name of the stage that drops.
        are_masks_checked: whether its masks come from `filters.rle`, which has checked and measured them.
        are_masks_made_later: whether a region may have a box in the place of its mask.
    """
    image.width, image.height = _side(image.width), _side(image.height)
    image.file_name, image.photo_format = _text(image.file_name) or "", _text(image.photo_format) or ""
    if image.credit is not None:
        values = msgspec.structs.asdict(image.credit)
        if not all(type(value) is str and value.isascii() for value in values.values()):
            image.credit = Credit(**{name: _text(value) or "" for name, value in values.items()})
    try:
        regions = _listed(image.regions)
    except Exception as error:  # noqa: BLE001 - a stranger's collection may raise anything
        regions = []
        detail = f"the source has to give a list of `Region`: {words_of(error)}"
        image.regions = regions
        image.reject(Drop(stage, Reason.ANNOTATION_UNREADABLE, detail))
    image.regions = [_clean(region, place, stage) for place, region in enumerate(regions)]
    if len({region.id for region in image.regions}) < len(regions):
        for place, region in enumerate(image.regions):
            region.id = place
        image.reject(
            Drop(stage, Reason.ANNOTATION_UNREADABLE, "the source gives several regions the same id")
        )
    if not are_masks_checked:
        _check_masks(image, stage)
    for region in image.regions:
        if region.rle is None:
            region.bbox = _box(region.bbox, image) if are_masks_made_later else (0, 0, 0, 0)
    for region in image.live():
        if region.rle is None and not are_masks_made_later:
            region.drop = Drop(stage, Reason.MASK_UNDECODABLE, "the source gives no mask for this region")
        elif region.rle is None and region.bbox == (0, 0, 0, 0):
            detail = f"region {region.id}: the source gives neither a mask nor a box inside the photo"
            region.drop = Drop(stage, Reason.BOX_EMPTY, detail)


def _listed(given: Any) -> list[Any]:
    """Regions as a list. The letters of a text are none; what has no order has no positions."""
    if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise TypeError(type(given).__name__)
    return list(given if isinstance(given, Sized) else islice(given, _MOST_REGIONS))


def _clean(region: Region, place: int, stage: str) -> Region:
    if not isinstance(region, Region):
        detail = (
            f"the region at position {place} is a {type(region).__name__}; the source has to give a `Region`"
        )
        return Region(place, None, drop=Drop(stage, Reason.ANNOTATION_UNREADABLE, detail))
    try:
        number = _whole(region.id)
        region.id = place if number is None or not 0 <= number <= _MAX_SIDE else number
        region.source_id, region.category_id = _whole(region.source_id), _whole(region.category_id)
        region.category, region.caption = _text(region.category), _text(region.caption)
        region.core_category = _text(region.core_category)
        region.is_thing = None if region.is_thing is None else bool(region.is_thing)
        for name in ("source_scores", "scores"):
            if (scores := getattr(region, name)) != {}:
                found = {plain_text(key): _number(value) for key, value in dict(scores or ()).items()}
                setattr(region, name, {key: value for key, value in found.items() if value is not None})
        region.crop_box = _each(region.crop_box, _number)
        region.point_coords = _each(region.point_coords, lambda point: _each(point, _number))
        return region
    except Exception as error:  # noqa: BLE001 - a record of somebody's own source may be anything
        detail = f"the region at position {place} cannot be read: {words_of(error)}"
        return Region(place, None, drop=Drop(stage, Reason.ANNOTATION_UNREADABLE, detail))


def _check_masks(image: ImageRecord, stage: str) -> None:
    """Check and measure the masks as those of published files are."""
    given = [region for region in image.regions if region.rle is not None]
    for region in image.regions:
        region.area = 0
    codes = [_code(region.rle) for region in given]
    if image.height and image.width:
        masks = rle.check_all(codes, image.height, image.width)
    else:
        masks = [BadRecord(Reason.SIZE_MISMATCH, "its source gives its image no size") for _ in codes]
    for region, mask in zip(given, masks, strict=True):
        if isinstance(mask, BadRecord):
            region.rle, region.bbox = None, (0, 0, 0, 0)
            region.drop = region.drop or Drop(stage, mask.reason, f"region {region.id}: {mask.detail}")
        else:
            region.rle, region.area, region.bbox = mask


def _box(given: Any, image: ImageRecord) -> tuple[int, int, int, int]:
    """A box in whole pixels inside its photo; zeros for anything else."""
    try:
        x, y, width, height = map(_whole, given)
    except (TypeError, ValueError):
        return (0, 0, 0, 0)
    if x is None or y is None or width is None or height is None:
        return (0, 0, 0, 0)
    is_inside = min(x, y) >= 0 and x + width <= image.width and y + height <= image.height
    return (x, y, width, height) if is_inside and min(width, height) > 0 else (0, 0, 0, 0)


def _code(mask: Any) -> Any:
    """A mask as `rle.check_all` takes it."""
    if not isinstance(mask, Rle):
        return mask
    size = mask.size
    if isinstance(size, list | tuple):
        size = [int(side) if isinstance(side, numbers.Integral) else side for side in size]
    return {"size": size, "counts": mask.counts}


def _side(value: Any) -> int:
    found = _whole(value)
    return found if found is not None and 0 <= found <= _MAX_SIDE else 0


def _whole(value: Any) -> int | None:
    """A whole number that 64 bits hold; None for any other value."""
    if value is None or fits_int64(value):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value) if fits_int64(int(value)) else None
    return None


def _number(value: Any) -> float | None:
    """A finite number; None for any other value."""
    if type(value) is float and math.isfinite(value):
        return value
    try:
        found = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _text(value: Any) -> str | None:
    return plain_text(value) if isinstance(value, str) else None


def _each(values: Any, read: Callable[[Any], Any]) -> list[Any] | None:
    """A list of what `read` makes of each value; None if it makes None of one."""
    if values is None:
        return None
    found = list(map(read, values))
    return None if None in found else found
