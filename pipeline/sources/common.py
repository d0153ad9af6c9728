"""What the sources check of an image, each in the same words."""

from __future__ import annotations

from ...schemas.config import Limits
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord
from ..io import photos
from . import file_names
from .protocols import CatalogEntry, Note

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
