"""What the sources check of an image, each in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...filters import rle
from ...schemas.config import Limits
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord
from ..io import photos
from . import file_names
from .protocols import CatalogEntry, Note, drop

PHOTO_FIXES = {
    "photo_misnamed": "the format is read from the bytes, not from the name",
    "photo_rotated": (
        "masks refer to the pixels as stored; in shards and exports the EXIF orientation is set to upright"
    ),
}
"""What to do about the notes of `read_header`."""

_FORMAT_OF = {".jpg": "jpeg", ".jpe": "jpeg", ".jfif": "jpeg", ".tif": "tiff"}


def refuse(
    image: ImageRecord, entry: CatalogEntry, limits: Limits, where: str, regions: str = "masks"
) -> None:
    """Refuse an image that its lists dropped, or that has too many regions, before a mask is made.

    Args:
        image: with its regions.
        entry: of the catalog.
        limits: what is refused.
        where: names the annotation.
        regions: the publisher's word for them.

    Raises:
        BadRecord: it is refused.
    """
    if entry.drop is not None:
        raise BadRecord(entry.drop.reason, entry.drop.detail)
    if len(image.regions) > limits.max_masks:
        detail = f"{where}: {len(image.regions)} {regions}; limits.max_masks is {limits.max_masks}"
        raise BadRecord(Reason.TOO_MANY_MASKS, detail)


def declared_size(width: int | None, height: int | None) -> tuple[int, int]:
    """A declared size in pixels, as far as it is possible; 0 for what is not, which no ledger could hold."""
    first, second = (value if value is not None and 0 < value < 1 << 31 else 0 for value in (width, height))
    return first, second


def read_header(image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> photos.Header:
    """Read the photo's header; the image gets its format and its size as stored.

    Raises:
        BadRecord: it is no photo, or too large.
    """
    assert entry.photo is not None, "an image without a photo has a drop"
    header = photos.probe(entry.photo, limits.max_pixels)
    image.photo_format = header.format
    image.width, image.height = header.width, header.height
    notes += _photo_notes(entry.photo, entry.file_name, header)
    return header


def _photo_notes(photo: Blob, file_name: str, header: photos.Header) -> list[Note]:
    notes = []
    ending = file_names.ending(file_name)
    if ending and _FORMAT_OF.get(ending, ending[1:]) != header.format:
        notes.append(Note("photo_misnamed", f"{photo}: called {file_name}, is {header.format}"))
    if header.orientation != 1:
        detail = f"{photo}: EXIF orientation {header.orientation}; masks refer to the pixels as stored"
        notes.append(Note("photo_rotated", detail))
    return notes


class Segmented(NamedTuple):
    """What a list says of a region's mask.

    Attributes:
        segmentation: as `rle.check_all` takes it.
        area: of the mask in pixels, if the list states it.
        name: of the annotation, for messages.
    """

    segmentation: Any
    area: float | None
    name: str


def place_masks(image: ImageRecord, found: Sequence[Segmented | None], notes: list[Note]) -> None:
    """Give the regions of an image their masks. A mask that cannot be used drops its region.

    Args:
        image: with its regions and its size.
        found: of each region; None if it has a drop already.
        notes: an area that is not the stated one is noted in it.
    """
    good = [pair for pair in zip(image.regions, found, strict=True) if pair[1] is not None]
    masks = rle.check_all([each.segmentation for _, each in good if each], image.height, image.width)
    for (region, each), mask in zip(good, masks, strict=True):
        assert each is not None
        if isinstance(mask, BadRecord):
            region.drop = region.drop or drop(mask.reason, f"{each.name}: {mask.detail}")
            continue
        region.rle, region.area, region.bbox = mask
        if each.area is not None and each.area != region.area:
            detail = f"{each.name}: declared {each.area:g}, mask has {region.area}"
            notes.append(Note("area_differs", detail, region.id))
