"""Reads photos by reference: a header check for two small reads, pixels only when a model wants them.

The stored pixels count: EXIF orientation is never applied, because masks refer to the pixels as stored.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from ...schemas.config import Limits
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord
from . import failures, files
from .file_kinds import what_is
from .orientation import orientation_of, restore, unturned

if TYPE_CHECKING:
    from PIL import Image

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "MPO")
"""What is decoded, by Pillow's names; MPO is the JPEG with previews that some cameras write."""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError)
BROKEN += (AttributeError, MemoryError, struct.error, zlib.error)
"""What Pillow raises on files that are broken in one way or another."""

MAX_PIXELS = Limits().max_pixels
"""Most pixels of whatever is decoded where no configuration says how many: masks, label maps, pictures."""

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
    """Read a photo's header and its last bytes; its pixels only if there is no end mark in those.

    What follows the picture's end (a motion photo's video, padding) is no reason to refuse it.

    Raises:
        BadRecord: PHOTO_MISSING, PHOTO_UNREADABLE (no image, or cut short) or PHOTO_TOO_LARGE; a
            `SourceFailure` if the photo could not be read, which says nothing of it.
        ConfigError: the source cannot be read with this set-up.
    """
    head = _decoded(
        photo,
        lambda: _fetch(photo, 0, _HEADER_BYTES),
        lambda data: (data, _parse(photo, data, max_pixels, whole=len(data) < _HEADER_BYTES)),
    )
    header = head[1]
    if not _has_end(header, _decoded(photo, lambda: _tail(photo, *head), lambda data: data)):
        # Padding, a video or notes may follow the picture; only its pixels tell whether it is whole.
        _decoded(photo, lambda: fetch(photo), lambda data: decode_image(photo, data, max_pixels))
    return header


def _tail(photo: Blob, head: bytes, header: Header) -> bytes:
    """The last bytes of a photo whose format has a mark at its end."""
    if header.format.upper() not in _ENDINGS:
        return b""
    if len(head) < _HEADER_BYTES:
        return head
    try:
        size = files.fetch_size(photo)
    except OSError as error:
        raise _failure(photo, error) from error
    return _fetch(photo, max(0, size - _TAIL_BYTES), None)


def _has_end(header: Header, tail: bytes) -> bool:
    """Whether the mark is at the end, where no preview's mark inside the photo is taken for it."""
    return _ENDINGS.get(header.format.upper(), b"") in tail[-_TAIL_BYTES:]


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
    photo = image.photo

    def decode_noted(data: bytes) -> np.ndarray:
        image.photo_digest = digest_of(restore(data, image.removed_orientation))
        return decode(photo, data, max_pixels)

    pixels = _decoded(photo, lambda: fetch(photo), decode_noted)
    if pixels.shape[:2] != (image.height, image.width):
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise BadRecord(
            Reason.SIZE_MISMATCH, f"{image.photo}: photo is {found}, annotation {image.width}x{image.height}"
        )
    return pixels


def digest_of(data: bytes) -> str:
    """SHA-256 in hex of a photo's bytes: what tells one photo from another."""
    return hashlib.sha256(data).hexdigest()


def hash_photo(photo: Blob, removed_orientation: int = 1) -> str:
    """`digest_of` a photo that is not decoded, as its source has it; see `ImageRecord.removed_orientation`.

    Raises:
        SourceFailure: it could not be read.
    """
    return digest_of(restore(fetch(photo), removed_orientation))


def fetch_as_published(image: ImageRecord) -> bytes:
    """All bytes of an image's photo as its source has them, though they may lie in a shard.

    Raises as `fetch`.
    """
    assert image.photo is not None, f"{image.key}: an image without a photo is dropped before it is read"
    return restore(fetch(image.photo), image.removed_orientation)


def decode(photo: Blob, data: bytes, max_pixels: int) -> np.ndarray:
    """Decode a photo's bytes to (H, W, 3) uint8 RGB; `photo` is only for messages. Raises as `probe`."""
    return np.array(decode_image(photo, data, max_pixels))


def decode_image(photo: Blob, data: bytes, max_pixels: int) -> Image.Image:
    """The same as Pillow's RGB image, which resizes without a copy."""
    from PIL import Image

    _parse(photo, data, max_pixels, whole=True)
    try:
        with quiet(), Image.open(io.BytesIO(unturned(data)), formats=FORMATS) as opened:
            opened.load()
            return to_rgb(opened)
    except BROKEN as error:
        raise BadRecord(Reason.PHOTO_UNREADABLE, f"{photo}: {error}; fetch the file again") from error


def check_pixels(opened: Image.Image, most: int = MAX_PIXELS) -> None:
    """Refuse an image by its header, before its pixels are decoded.

    Raises:
        ValueError: it has more pixels than `most`.
    """
    width, height = opened.size
    if width * height > most:
        raise ValueError(f"{width}x{height} pixels; at most {most:,} are decoded")


def to_rgb(opened: Image.Image) -> Image.Image:
    """The image in RGB; of 16 bits a channel the higher 8, which Pillow would cut off at 255 instead."""
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
        with quiet(), Image.open(io.BytesIO(unturned(head)), formats=FORMATS) as opened:
            kind = (opened.format or "").lower().replace("mpo", "jpeg")
            header = Header(kind, *opened.size, orientation_of(head))
    except Image.DecompressionBombError as error:
        raise BadRecord(Reason.PHOTO_TOO_LARGE, f"{photo}: {error}") from error
    except BROKEN as error:
        if not whole:  # a header that is longer than the first read (large EXIF or ICC blocks)
            return _parse(photo, fetch(photo), max_pixels, whole=True)
        kind = (
            "empty file" if not head else f"not a supported image; convert it to one of {', '.join(FORMATS)}"
        )
        if head and (words := what_is(head, "photo")):
            kind = f"not a supported photo: {words}"
        if isinstance(error, ValueError):  # it is one of these, and says what is wrong with it
            long = "MAX_TEXT_CHUNK" in str(error)
            fix = "save it without its long text or color profile" if long else "fetch it again"
            kind = f"not readable: {error}; {fix}"
        raise BadRecord(Reason.PHOTO_UNREADABLE, f"{photo}: {kind}") from error
    if header.width * header.height > max_pixels:
        detail = f"{photo}: {header.width}x{header.height} pixels; limits.max_pixels is {max_pixels}"
        raise BadRecord(Reason.PHOTO_TOO_LARGE, detail)
    return header


def fetch(photo: Blob) -> bytes:
    """All bytes of a photo as they are; see `files.fetch`.

    Raises:
        SourceFailure: it could not be read.
        ConfigError: the source cannot be read with this set-up.
    """
    return _fetch(photo, 0, None)


def _fetch(photo: Blob, start: int, length: int | None) -> bytes:
    try:
        return files.fetch(photo, start, length)
    except OSError as error:
        raise _failure(photo, error) from error


def _failure(photo: Blob, error: OSError) -> Exception:
    fix = "put it there or correct `photos`" if failures.is_missing(error) else "fetch it again"
    return failures.to_failure(error, Reason.PHOTO_MISSING, Reason.PHOTO_UNREADABLE, fix, str(photo))


def _decoded(photo: Blob, fetching: Callable[[], bytes], decode: Callable[[bytes], Result]) -> Result:
    try:
        return files.decoded(fetching, decode)
    except OSError as error:
        raise _failure(photo, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Open images without Pillow's warnings and pixel limit: our own limits decide."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
