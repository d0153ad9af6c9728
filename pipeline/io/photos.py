"""Reads photos by reference: a header check for two small reads, pixels only when a model wants them.

The stored pixels count: EXIF orientation is never applied, because masks refer to the pixels as stored.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord
from . import files

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "MPO")
"""What is decoded, by Pillow's names; MPO is the JPEG with previews that some cameras write."""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError)
BROKEN += (AttributeError, MemoryError, struct.error, zlib.error)
"""What Pillow raises on files that are broken in one way or another."""

_HEADER_BYTES = 64 << 10
_TAIL_BYTES = 64
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class Header(NamedTuple):
    """What a photo says of itself: format in lower case, size in pixels, EXIF orientation (1: upright)."""

    format: str
    width: int
    height: int
    orientation: int = 1


def probe(photo: Blob, max_pixels: int) -> Header:
    """Read a photo's header and its last bytes, not its pixels.

    Raises:
        BadRecord: PHOTO_MISSING, PHOTO_UNREADABLE (no image, or cut short) or PHOTO_TOO_LARGE.
    """
    head = _fetch(photo, 0, _HEADER_BYTES)
    header = _parse(photo, head, max_pixels, whole=len(head) < _HEADER_BYTES)
    ending = _ENDINGS.get(header.format.upper())
    if ending is not None:
        tail = (
            head
            if len(head) < _HEADER_BYTES
            else _fetch(photo, max(0, files.size_of(photo) - _TAIL_BYTES), None)
        )
        if ending not in tail[-_TAIL_BYTES:].rstrip(b"\0") and ending not in tail:
            raise BadRecord(
                Reason.PHOTO_UNREADABLE, f"{photo}: cut short (no end marker); fetch the file again"
            )
    return header


def read_pixels(image: ImageRecord, max_pixels: int = 200_000_000) -> np.ndarray:
    """Decode an image's photo, and note on the image which bytes they were, in `photo_digest`.

    Returns:
        (H, W, 3) uint8 RGB as stored. Gray is repeated, CMYK and palettes converted, 16 bits scaled to 8.

    Raises:
        BadRecord: as `probe`, or SIZE_MISMATCH if the pixels are not `image.width` x `image.height`.
    """
    assert image.photo is not None, (
        f"{image.key}: an image without a photo is dropped before its pixels are read"
    )
    data = _fetch(image.photo, 0, None)
    image.photo_digest = digest_of(data)
    pixels = decode(image.photo, data, max_pixels)
    if pixels.shape[:2] != (image.height, image.width):
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise BadRecord(
            Reason.SIZE_MISMATCH, f"{image.photo}: photo is {found}, annotation {image.width}x{image.height}"
        )
    return pixels


def digest_of(data: bytes) -> str:
    """SHA-256 in hex of a photo's bytes: what tells one photo from another."""
    return hashlib.sha256(data).hexdigest()


def hash_photo(photo: Blob) -> str:
    """`digest_of` a photo that is not decoded.

    Raises:
        BadRecord: PHOTO_MISSING or PHOTO_UNREADABLE.
    """
    return digest_of(_fetch(photo, 0, None))


def decode(photo: Blob, data: bytes, max_pixels: int) -> np.ndarray:
    """Decode a photo's bytes to (H, W, 3) uint8 RGB; `photo` is only for messages. Raises as `probe`."""
    return np.array(decode_image(photo, data, max_pixels))


def decode_image(photo: Blob, data: bytes, max_pixels: int) -> Image.Image:
    """The same as Pillow's RGB image, which resizes without a copy."""
    from PIL import Image

    _parse(photo, data, max_pixels, whole=True)
    try:
        with quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.load()
            return _to_rgb(opened)
    except BROKEN as error:
        raise BadRecord(Reason.PHOTO_UNREADABLE, f"{photo}: {error}; fetch the file again") from error


def _to_rgb(opened: Image.Image) -> Image.Image:
    from PIL import Image

    if opened.mode.startswith("I;16") or opened.mode == "I":
        gray = np.clip(np.asarray(opened).astype(np.int64), 0, 65_535) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if opened.mode == "P" and "transparency" in opened.info:
        opened = opened.convert("RGBA")
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def _parse(photo: Blob, head: bytes, max_pixels: int, whole: bool) -> Header:
    from PIL import Image

    try:
        with quiet(), Image.open(io.BytesIO(head), formats=FORMATS) as opened:
            kind = (opened.format or "").lower().replace("mpo", "jpeg")
            header = Header(kind, *opened.size, _orientation(opened))
    except Image.DecompressionBombError as error:
        raise BadRecord(Reason.PHOTO_TOO_LARGE, f"{photo}: {error}") from error
    except BROKEN as error:
        if not whole:  # a header that is longer than the first read (large EXIF or ICC blocks)
            return _parse(photo, _fetch(photo, 0, None), max_pixels, whole=True)
        kind = "empty file" if not head else "not an image that we read (" + ", ".join(FORMATS) + ")"
        raise BadRecord(Reason.PHOTO_UNREADABLE, f"{photo}: {kind}") from error
    if header.width * header.height > max_pixels:
        detail = f"{photo}: {header.width}x{header.height} pixels; limits.max_pixels is {max_pixels}"
        raise BadRecord(Reason.PHOTO_TOO_LARGE, detail)
    return header


def _orientation(opened: Image.Image) -> int:
    if "exif" not in opened.info:  # Pillow would decode a whole PNG to look for it
        return 1
    try:
        return int(opened.getexif().get(0x0112, 1))
    except BROKEN:
        return 1  # broken metadata; the pixels are read as stored all the same


def _fetch(photo: Blob, start: int, length: int | None) -> bytes:
    try:
        data = files.read(photo, start, length)
        if length is None and photo.length is not None:
            check_length(photo, data, photo.length - start)
        return data
    except FileNotFoundError as error:
        raise BadRecord(
            Reason.PHOTO_MISSING, f"{photo}: no such file; put it there or correct `photos`"
        ) from error
    except OSError as error:
        raise BadRecord(Reason.PHOTO_UNREADABLE, f"{photo}: {error}") from error


def check_length(photo: Blob, data: bytes, expected: int | None) -> None:
    """Refuse bytes that come short of what was planned: a file that was cut, or an answer that was.

    Raises:
        OSError: they do.
    """
    if expected is not None and len(data) < expected:
        raise OSError(f"{len(data)} of {expected} bytes came")


@contextmanager
def quiet() -> Iterator[None]:
    """Open images without Pillow's warnings and pixel limit: our own limits decide."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
