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
_XMP_TAG = 0x02BC
_WIDTHS = {1: 1, 3: 2, 4: 4, 16: 8}
"""Bytes of a value by the type of a TIFF field: BYTE, SHORT, LONG, LONG8."""

_BIG_TIFF = (b"II+\0", b"MM\0+")
_TIFF = (b"II*\0", b"MM\0*", *_BIG_TIFF)

_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_XMP = b"XML:com.adobe.xmp\0\0"
_PROFILE = b"Raw profile type exif\0"
_HIDDEN = {_PROFILE: b"Raw profile type-exif\0", b"XML:com.adobe.xmp\0": b"XML-com.adobe.xmp\0"}
"""Names of a PNG's texts by which readers turn it, in their order. Of such a text, which may be compressed,
the name is changed, since it cannot get another number without moving a byte."""

_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MAX_TEXT = 1 << 20
"""Bytes of a text; Pillow refuses a PNG with a longer one."""

_IN_XMP = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)([0-9])")


class _Block(NamedTuple):
    """Where metadata lies in a photo. `chunk` is the place of a PNG chunk's type, whose CRC covers it."""

    kind: Literal["exif", "xmp", "text"]
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


class _Field(NamedTuple):
    """A field of a TIFF directory. `start` is where its value lies if that is short, else `place` is."""

    tag: int
    kind: int
    count: int
    start: int
    place: int
    order: Literal["little", "big"]


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
    if tag.block.kind == "text":
        return _renamed(data, hide=value == UPRIGHT)
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
    if (tag := _in_text(data, blocks)) is not None:
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
    found, inside = None, 8 if data[start : start + 4] in _BIG_TIFF else 4
    for field in _fields(data, start, block.end):
        width = _WIDTHS.get(field.kind)
        if field.tag == _TAG and field.count == 1 and width and width <= inside:
            value = int.from_bytes(data[field.start : field.start + width], field.order)
            found = _Tag(value, field.start, width, field.order, block)
    return found


def _fields(data: bytes, start: int, end: int) -> Iterator[_Field]:
    """The fields of the first directory of a TIFF structure, of BigTIFF, too."""
    magic = data[start : start + 4]
    if magic not in _TIFF:
        return
    order: Literal["little", "big"] = "little" if magic[:2] == b"II" else "big"
    is_big = magic in _BIG_TIFF
    size = 8 if is_big else 4  # of a place in the file, and of the value in a field

    def number(at: int, width: int) -> int:
        return int.from_bytes(data[at : at + width], order)

    at = start + number(start + size, size)
    length = 8 if is_big else 2
    each = 4 + 2 * size
    for entry in range(at + length, at + length + each * number(at, length), each):
        if entry + each > end:
            break
        value = entry + 4 + size
        yield _Field(
            number(entry, 2), number(entry + 2, 2), number(entry + 4, size), value, number(value, size), order
        )


def _blocks(data: bytes) -> Iterator[_Block]:
    if data.startswith(b"\xff\xd8"):
        yield from _jpeg_blocks(data)
    elif data.startswith(_PNG):
        yield from _png_blocks(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield from _webp_blocks(data)
    elif data[:4] in _TIFF:
        yield _Block("exif", 0, len(data))
        for field in _fields(data, 0, len(data)):
            if field.tag == _XMP_TAG and field.kind in (1, 7):
                yield _Block("xmp", field.place, min(field.place + field.count, len(data)))


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
    for kind, start, end in _png_chunks(data):
        if kind == b"eXIf":
            yield _Block("exif", start, end, start - 4)
        elif kind == b"iTXt" and data.startswith(_PNG_XMP, start):  # not the compressed form
            yield _Block("xmp", start, end, start - 4)
        elif kind in _TEXTS and data[start:end].startswith((*_HIDDEN, *_HIDDEN.values())):
            yield _Block("text", start, end, start - 4)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the data of each chunk before the last one."""
    at = len(_PNG)
    while at + 8 <= len(data):
        kind, start = data[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(data[at : at + 4], "big")
        if end > len(data) or kind == b"IEND":
            return
        yield kind, start, end
        at = end + 4


def _in_text(data: bytes, blocks: list[_Block]) -> _Tag | None:
    """The tag in the last profile or XMP that a PNG has as compressed or other text; upright if hidden."""
    texts = [block for block in blocks if block.kind == "text"]
    if any(data.startswith(tuple(_HIDDEN.values()), block.start) for block in texts):
        return _Tag(UPRIGHT, 0, 0, "big", texts[0])
    has_exif = any(block.kind == "exif" for block in blocks)
    for name in _HIDDEN:
        named = [block for block in blocks if data.startswith(name, block.start)]
        if not named or named[-1].kind != "text" or (name == _PROFILE and has_exif):
            continue
        text = _unpacked(data, named[-1])
        if name == _PROFILE:
            try:
                profile = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
            except ValueError:
                continue
            tag = _in_tiff(profile, _Block("exif", 0, len(profile)))
            value = None if tag is None else tag.value
        else:
            value = int(found[1]) if (found := _IN_XMP.search(text)) else None
        if value is not None:
            return _Tag(value, 0, 0, "big", named[-1])
    return None


def _unpacked(data: bytes, block: _Block) -> bytes:
    """The text of a PNG's chunk; nothing if it does not decode."""
    assert block.chunk is not None, "a text lies in a chunk"
    kind = data[block.chunk : block.start]
    _, _, text = data[block.start : block.end].partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    elif packed:
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, _MAX_TEXT) if packed else text
    except zlib.error:
        return b""


def _renamed(data: bytes, hide: bool) -> bytes:
    """A PNG whose texts that may turn it have names that readers do not know, or have their names back."""
    names = _HIDDEN if hide else {hidden: name for name, hidden in _HIDDEN.items()}
    changed = bytearray(data)
    for kind, start, end in _png_chunks(data):
        name = next((name for name in names if kind in _TEXTS and data.startswith(name, start)), None)
        if name is not None:
            changed[start : start + len(name)] = names[name]
            changed[end : end + 4] = zlib.crc32(changed[start - 4 : end]).to_bytes(4, "big")
    return bytes(changed)


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
