"""EXIF orientation in the bytes of a photo: found, and set to upright, without re-encoding anything.

Masks fit the pixels as stored, while browsers, `datasets` and detectron2 turn a photo by its tag. What we
write therefore says "upright" in the tag's place. Nothing else changes and no byte moves, so that the
source's bytes can be had back from the orientation alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

UPRIGHT = 1
"""The orientation that turns nothing; a photo without a tag has it too."""

_TURNING = range(2, 9)
_TAG = 0x0112
_WIDTHS = {1: 1, 3: 2, 4: 4}
"""Bytes of a value by the type of a TIFF field: BYTE, SHORT, LONG."""

_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_XMP = b"XML:com.adobe.xmp\0\0"
_IN_XMP = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)([0-9])")


class _Block(NamedTuple):
    """Where metadata lies in a photo. `chunk` is the place of a PNG chunk's type, whose CRC covers it."""

    kind: Literal["exif", "xmp"]
    start: int
    end: int
    chunk: int | None = None


class _Tag(NamedTuple):
    """The tag that readers go by. `width` is that of its number in bytes, 0 for a digit in text."""

    value: int
    start: int
    width: int
    order: Literal["little", "big"]
    block: _Block


def orientation_of(data: bytes) -> int:
    """The orientation (1 to 8) by which readers turn a photo; 1 if nothing turns it. Its head is enough.

    Read from EXIF, or from XMP if EXIF has no such tag, of JPEG, PNG, WebP and TIFF.
    """
    tag = _find(data)
    return tag.value if tag is not None and tag.value in _TURNING else UPRIGHT


def make_upright(data: bytes) -> tuple[bytes, int]:
    """A photo's bytes with an orientation of 1, and the one that they had. Without a tag they stay as is."""
    tag = _find(data)
    if tag is None or tag.value not in _TURNING:
        return data, UPRIGHT
    return _with_value(data, tag, UPRIGHT), tag.value


def unturned(data: bytes) -> bytes:
    """The bytes for Pillow, which turns a TIFF by its tag when it decodes it, and nothing else."""
    return make_upright(data)[0] if data[:2] in (b"II", b"MM") else data


def restore(data: bytes, orientation: int) -> bytes:
    """The bytes of which `make_upright` made these; `orientation` is the one that it returned."""
    tag = None if orientation == UPRIGHT else _find(data)
    return data if tag is None else _with_value(data, tag, orientation)


def _with_value(data: bytes, tag: _Tag, value: int) -> bytes:
    changed = bytearray(data)
    written = value.to_bytes(tag.width, tag.order) if tag.width else str(value).encode()
    changed[tag.start : tag.start + len(written)] = written
    if tag.block.chunk is not None:
        end = tag.block.end
        changed[end : end + 4] = zlib.crc32(changed[tag.block.chunk : end]).to_bytes(4, "big")
    return bytes(changed)


def _find(data: bytes) -> _Tag | None:
    """The tag in the first EXIF block, else the one in the last block of XMP, as Pillow looks for it."""
    blocks = list(_blocks(data))
    for block in [block for block in blocks if block.kind == "exif"][:1]:
        if (tag := _in_tiff(data, block)) is not None:
            return tag
    for block in [block for block in blocks if block.kind == "xmp"][-1:]:
        if found := _IN_XMP.search(data, block.start, block.end):
            return _Tag(int(found[1]), found.start(1), 0, "big", block)
    return None


def _in_tiff(data: bytes, block: _Block) -> _Tag | None:
    """The tag in the first directory of a TIFF structure; the last of several, as Pillow takes it."""
    start = block.start
    while data.startswith(_EXIF, start):
        start += len(_EXIF)
    magic = data[start : start + 4]
    if magic not in (b"II*\0", b"MM\0*"):
        return None
    order: Literal["little", "big"] = "little" if magic[:2] == b"II" else "big"

    def number(at: int, width: int) -> int:
        return int.from_bytes(data[at : at + width], order)

    at = start + number(start + 4, 4)
    first, found = at + 2, None
    for entry in range(first, first + 12 * number(at, 2), 12):
        if entry + 12 > block.end:
            break
        width = _WIDTHS.get(number(entry + 2, 2))
        if number(entry, 2) == _TAG and number(entry + 4, 4) == 1 and width:
            found = _Tag(number(entry + 8, width), entry + 8, width, order, block)
    return found


def _blocks(data: bytes) -> Iterator[_Block]:
    if data.startswith(b"\xff\xd8"):
        yield from _jpeg_blocks(data)
    elif data.startswith(_PNG):
        yield from _png_blocks(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield from _webp_blocks(data)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        yield _Block("exif", 0, len(data))


def _jpeg_blocks(data: bytes) -> Iterator[_Block]:
    """The APP1 segments before the picture begins."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            return
        start, end = at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data.startswith(_EXIF, start):
            yield _Block("exif", start, min(end, len(data)))
        elif marker == 0xE1 and data.startswith(_XMP, start):
            yield _Block("xmp", start, min(end, len(data)))
        at = max(end, at + 2)


def _png_blocks(data: bytes) -> Iterator[_Block]:
    at = len(_PNG)
    while at + 8 <= len(data):
        kind, start = data[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(data[at : at + 4], "big")
        if end > len(data) or kind == b"IEND":
            return
        if kind == b"eXIf":
            yield _Block("exif", start, end, at + 4)
        elif kind == b"iTXt" and data.startswith(_PNG_XMP, start):  # not the compressed form
            yield _Block("xmp", start, end, at + 4)
        at = end + 4


def _webp_blocks(data: bytes) -> Iterator[_Block]:
    at = 12
    while at + 8 <= len(data):
        kind, start = data[at : at + 4], at + 8
        end = start + int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"EXIF":
            yield _Block("exif", start, min(end, len(data)))
        elif kind == b"XMP ":
            yield _Block("xmp", start, min(end, len(data)))
        at = end + end % 2
