"""Label maps: images in which a pixel's color, or its value, is the id of its segment.

Which of the two it is, the annotation's own ids and areas decide. Published areas are exact: of 85
segments of COCO and COCONut that were measured, crowds among them, none differs by a pixel from what is
declared.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ...filters import rle
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ..io import photos
from ..io.file_kinds import what_is
from ..io.orientation import unturned

_FORMATS = ("PNG", "TIFF", "BMP")
_COLORS = ("RGB", "RGBA")
_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_LOSSY = {"jpeg": "a JPEG", "tiff_jpeg": "a JPEG", "webp": "a WebP file", "jpeg2000": "a JPEG 2000"}
"""Compressions of a TIFF, by Pillow's names, that change colors."""

_SAVE_RGB = "save it as an RGB PNG with 8 bits, in which the id is R + 256 G + 65,536 B, as in COCO"

_NO_COLOR = 0xFFFF_FFFF
"""The id of an index that the palette does not have: no declared id is as large."""


class Declared(NamedTuple):
    """A segment of an annotation: its id, and its area in pixels; None if that says nothing."""

    id: int
    area: float | None


class _Reading(NamedTuple):
    """One way to read a label map.

    Attributes:
        what: the way, for messages.
        masks: of every id in it.
        present: declared ids that have pixels.
        differing: of these, the segments whose area is another one than declared.
        agreeing: how many have the declared area.
        fits: whether each id of the map is declared, or each declared id is in the map.
    """

    what: str
    masks: dict[int, rle.Mask]
    present: set[int]
    differing: list[Declared]
    agreeing: int
    fits: bool


def label_map_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) in pixels from a label map's header.

    Raises:
        BadRecord: LABELS_UNREADABLE; `name` is for its message.
    """
    from PIL import Image

    try:
        with photos.quiet(), Image.open(io.BytesIO(unturned(data)), formats=_FORMATS) as opened:
            return opened.size
    except photos.BROKEN as error:
        raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {_why(data, error)}") from error


def read_label_map(data: bytes, name: str, declared: list[Declared]) -> dict[int, rle.Mask]:
    """The mask of each id in a label map, 0 included.

    Colors name ids (COCO's R + 256 G + 65536 B), also those of a palette or of gray: a lossless optimizer
    chooses freely how it stores them. A value means an id only where the colors do not: they have no declared
    id, or other areas than declared. 16 and 32 bits in one channel are the id itself.

    Args:
        data: the file.
        name: for messages.
        declared: the segments of the annotation. Declared areas are a witness. They have to be exact; if one
            of the image has a fraction, they are areas of polygons, which differ from a count of pixels by at
            most the width and height of the segment together (0.48 of that in COCO's own polygons).

    Raises:
        BadRecord: LABELS_UNREADABLE, or LABELS_DISAGREE if the areas in it are not those that are declared,
            or nothing tells how it is to be read.
    """
    values, tables = _decode(data, name)
    readings = []
    for what, table in tables.items():
        labels = values if table is None else table[values]
        readings.append(_reading(what, rle.encode_label_map(labels), declared))
    return _choose(readings, name).masks


def read_values(data: bytes, name: str) -> np.ndarray:
    """The values of an indexed image, (H, W) unsigned integers, as they are stored.

    Of a palette they are its indices, of gray the gray values or fewer bits, of 16 bits these, and of colors
    R + 256 G + 65536 B.

    Raises:
        BadRecord: LABELS_UNREADABLE.
    """
    values, tables = _decode(data, name)
    for what in ("palette indices", "stored values", "gray values", "values"):
        if what in tables:
            table = tables[what]
            return values if table is None else table[values]
    return values


def _choose(readings: list[_Reading], name: str) -> _Reading:
    """The reading that the declared ids and areas confirm; the first one counts where several do."""
    with_ids = [reading for reading in readings if reading.present]
    if not with_ids:
        return readings[-1]
    possible = [reading for reading in with_ids if not reading.differing]
    if not possible:
        raise BadRecord(Reason.LABELS_DISAGREE, f"{name}: {_differences(with_ids[0])}")
    confirmed = [reading for reading in possible if reading.agreeing] or possible
    if len(confirmed) > 1 and not confirmed[0].fits:
        ways = " or ".join(reading.what for reading in confirmed)
        detail = f"its {ways} could be the ids, and the declared areas do not decide; {_SAVE_RGB}"
        raise BadRecord(Reason.LABELS_DISAGREE, f"{name}: {detail}")
    return confirmed[0]


def _differences(reading: _Reading) -> str:
    first = reading.differing[0]
    count = len(reading.differing) + reading.agreeing
    return (
        f"{len(reading.differing)} of {count} segments do not have the declared area (segment {first.id}: "
        f"declared {first.area:g}, in the map {reading.masks[first.id].area}); the map belongs to another "
        "image or release, or is damaged: fetch the map and the annotation again"
    )


def _reading(what: str, masks: dict[int, rle.Mask], declared: list[Declared]) -> _Reading:
    ids = {each.id for each in declared}
    present = ids & masks.keys()
    counted = [each for each in declared if each.area is not None and each.id in present]
    polygons = any(each.area is not None and not float(each.area).is_integer() for each in declared)
    differing = [each for each in counted if not _agrees(each.area or 0, masks[each.id], polygons)]
    fits = len(present) == len(ids) or masks.keys() <= ids | {0}
    return _Reading(what, masks, present, differing, len(counted) - len(differing), fits)


def _agrees(area: float, mask: rle.Mask, polygons: bool) -> bool:
    return abs(area - mask.area) <= (mask.bbox[2] + mask.bbox[3] if polygons else 0)


def _decode(data: bytes, name: str) -> tuple[np.ndarray, dict[str, np.ndarray | None]]:
    """The stored values, (H, W), and what each is in each way to read them; None if a value is the id."""
    from PIL import Image

    if damage := _damaged_chunk(data):
        detail = f"the checksum of its chunk {damage} is wrong: the file is damaged; fetch it again"
        raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {detail}")
    try:
        with photos.quiet(), Image.open(io.BytesIO(unturned(data)), formats=_FORMATS) as opened:
            photos.check_pixels(opened)
            stored = str(opened.tile[0][3]) if opened.tile else ""
            lossy = opened.info.get("compression") if opened.format == "TIFF" else None
            opened.load()
            mode = opened.mode
            if lossy in _LOSSY:
                detail = f"a TIFF with {_LOSSY[lossy]} inside cannot hold segment ids; get the PNG"
                raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {detail}")
            if mode in _COLORS and ";16" not in stored:
                raw = opened.tobytes("raw", "RGBX" if mode == "RGB" else "RGBA")
                packed = np.frombuffer(raw, "<u4") & 0xFFFFFF
                return packed.reshape(opened.height, opened.width), {"colors": None}
            if mode in _WIDE:
                return np.asarray(opened).astype(np.uint32), {"values": None}
            if mode == "P":
                return np.asarray(opened), {"colors": _palette(opened), "palette indices": _values(256)}
            if mode in ("L", "LA", "1") and ";16" not in stored:
                gray = opened.convert("L") if mode == "1" else opened.getchannel(0)
                return np.asarray(gray), _gray_tables(1 if mode == "1" else _bits(stored))
    except photos.BROKEN as error:
        raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {_why(data, error)}") from error
    detail = f"an image of mode {mode}{' with 16 bits' if ';16' in stored else ''} holds no segment ids"
    raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {detail}; {_SAVE_RGB}")


def _palette(image: Any) -> np.ndarray:
    """The color of each index as an id, (256,)."""
    colors = np.array(image.getpalette("RGB") or [], np.uint32).reshape(-1, 3)
    table = np.full(256, _NO_COLOR, np.uint32)
    table[: len(colors)] = colors @ np.array([1, 256, 65_536], np.uint32)
    return table


def _values(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32)


def _bits(stored: str) -> int:
    """Bits of a gray value in the file; Pillow spreads fewer than 8 over 0 to 255."""
    return next((bits for bits in (1, 2, 4) if f"L;{bits}" in stored or f"1;{bits}" in stored), 8)


def _gray_tables(bits: int) -> dict[str, np.ndarray | None]:
    """Gray as colors, as gray values, and as the stored values if these are others."""
    values = _values(256)
    tables: dict[str, np.ndarray | None] = {"colors": values * 0x010101, "gray values": values}
    if bits < 8:
        tables["stored values"] = values // (255 // (2**bits - 1))
    return tables


def _damaged_chunk(data: bytes) -> str:
    """The name of a PNG's first chunk with a wrong checksum, or "". Pillow does not check that of pixels."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        kind = bytes(view[at + 4 : at + 8])
        if end + 4 > len(data):
            return ""  # cut short, which the decoder says
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return kind.decode("ascii", "replace")
        if kind == b"IEND":
            return ""
        at = end + 4
    return ""


_KINDS: Iterable[tuple[bytes, str]] = (
    (b"\xff\xd8", "a JPEG cannot hold segment ids; get the PNG"),
    (b"RIFF", "a WebP file is not read as a label map; get the PNG"),
    (b"\x93NUMPY", f"not an image: a NumPy array; {_SAVE_RGB}"),
    (b"{", "not an image: JSON; give the folder of the PNGs as `labels`"),
    (b"[", "not an image: JSON; give the folder of the PNGs as `labels`"),
)
"""How files begin that are no label map, and what to say of them; `what_is` knows more."""


def _why(data: bytes, error: BaseException) -> str:
    from PIL import UnidentifiedImageError

    if not data:
        return "empty file; fetch it again"
    found = next((words for start, words in _KINDS if data.lstrip().startswith(start)), None)
    if found is not None:
        return found
    if not data.strip(b"\0"):
        return "only zero bytes; fetch it again"
    if words := what_is(data, "PNG"):
        return f"not a label map: {words}"
    if isinstance(error, UnidentifiedImageError):  # its text has a memory address
        return f"not an image of {', '.join(_FORMATS)}; fetch it again"
    return f"does not decode ({str(error)[:120] or type(error).__name__}); fetch it again"


def looks_like(data: bytes, ids: set[int]) -> bool:
    """Whether a photo's bytes are a label map of these ids: most of it are they, in areas of one value.

    Raises:
        BadRecord: it does not decode.
    """
    values, tables = _decode(data, "photo")
    edges = np.count_nonzero(values[:, 1:] != values[:, :-1])
    if not ids or edges > values.size // 10:
        return False
    for table in tables.values():
        found, counts = np.unique(values if table is None else table[values], return_counts=True)
        declared = np.isin(found, list(ids))
        filled = counts[found != 0].sum()
        if 2 * declared.sum() >= len(ids) and 2 * counts[declared].sum() > filled:
            return True
    return False


def usable_area(area: float | None) -> float | None:
    """A declared area if it says anything: None for one that is missing, zero, negative or not finite."""
    return area if area is not None and math.isfinite(area) and area > 0 else None
