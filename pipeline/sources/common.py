"""What both sources say in the same words."""

from __future__ import annotations

from ...schemas.reasons import Reason
from ...schemas.records import Blob, Drop
from ..io import photos
from . import file_names
from .protocols import SOURCE_STAGE, Note

_FORMAT_OF = {".jpg": "jpeg", ".jpeg": "jpeg", ".tif": "tiff"}


def drop(reason: Reason, detail: str) -> Drop:
    """A drop by a source."""
    return Drop(SOURCE_STAGE, reason, detail)


def photo_notes(photo: Blob, file_name: str, header: photos.Header) -> list[Note]:
    """What is odd about a photo that can be used."""
    notes = []
    ending = file_names.ending(file_name)
    if ending and _FORMAT_OF.get(ending, ending[1:]) != header.format:
        notes.append(Note("photo_misnamed", f"{photo}: called {file_name}, is {header.format}"))
    if header.orientation != 1:
        detail = f"{photo}: EXIF orientation {header.orientation}; masks refer to the pixels as stored"
        notes.append(Note("photo_rotated", detail))
    return notes
