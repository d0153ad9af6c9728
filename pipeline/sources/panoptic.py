"""One image in COCO's panoptic layout: a label map, and a JSON record of its segments."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ...filters import rle
from ...schemas.config import Limits
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord, Region
from ...schemas.secrets import open_json
from ..io import failures, files, photos
from ..io.failures import ReadError
from ..io.tables import TableFile
from . import coco_json, label_maps
from .categories import Category, CategoryTable, load_categories
from .coco_json import Annotation, Image
from .common import declared_size, read_header, refuse
from .credits import read_credit
from .protocols import CatalogEntry, Note, drop

Result = TypeVar("Result")


class Record(msgspec.Struct, omit_defaults=True):
    """One image's annotation as the work list keeps it: what a worker needs besides label map and photo.

    Attributes:
        width, height: size that the annotation declares, in pixels.
        segments: the publisher's own `segments_info`, as it was written.
        categories: those that the segments name.
        row: (row group, row in it) of the Parquet file that holds the label map.
        info: URL of the image's own JSON, if `segments` are to be read from there.
    """

    width: int | None = None
    height: int | None = None
    segments: msgspec.Raw = msgspec.Raw(b"[]")
    categories: list[Category] = []
    row: tuple[int, int] | None = None
    info: str | None = None


class Segment(msgspec.Struct):
    """An element of `segments_info`. Only `id` is needed; a category may be named instead of numbered."""

    id: int
    category_id: int | None = None
    iscrowd: bool | int | None = None
    isthing: bool | int | None = None
    area: float | None = None
    category: str | None = None
    category_name: str | None = None


_NEEDED = ("id", "category_id", "iscrowd")
"""Fields of a segment that say what its mask is, or whether it is used."""


class _Categorized(msgspec.Struct):
    category_id: int | None = None
    category: str | None = None
    category_name: str | None = None


_LABEL_BYTES_PER_PIXEL = 0.3
"""A PNG that is larger is no label map: those of COCO and COCONut have 0.01 to 0.06 bytes for a pixel."""

_SEGMENTS = msgspec.json.Decoder(list[Segment])
_CATEGORIZED = msgspec.json.Decoder(list[_Categorized])
_RECORD = msgspec.json.Decoder(Record)


def fill_image(
    image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note], categories: str | None
) -> None:
    """Add size, regions and masks to an image; `categories` is the list for a record that lies elsewhere.

    See `Source.fill`.
    """
    where = f"annotation of {entry.file_name or entry.key} ({entry.annotation or 'no label map'})"
    record = _read_record(entry.record, limits, where)
    table = CategoryTable(record.categories)
    if record.info is not None:
        record, own = _read_info(record.info, limits)
        image.credit = None if entry.credit is None else read_credit(own)
        table = load_categories(categories)
    image.width, image.height = declared_size(record.width, record.height)
    segments = _segments(bytes(record.segments), where)
    image.regions = [_region(number, found, table, where) for number, found in enumerate(segments)]
    refuse(image, entry, limits, where, "segments")
    header = read_header(image, entry, limits, notes)
    assert entry.annotation is not None, "an image without a label map has a drop"
    name = _label_name(entry.annotation, record.row)
    fetching = _label_bytes(entry.annotation, record.row, name)
    data, size = _decoded(fetching, lambda data: (data, label_maps.label_map_size(data, name)), name)
    declared = (record.width or size[0], record.height or size[1])
    if not header[1:3] == size == declared:
        raise BadRecord(Reason.SIZE_MISMATCH, _sizes(header, size, record, where))
    declared_segments = _declared(segments)
    masks = _decoded(
        fetching, lambda data: label_maps.read_label_map(data, name, declared_segments), name, data
    )
    _refuse_label_map_as_photo(entry.photo, header, declared_segments)
    _place_masks(image.regions, segments, masks, name)
    _note_segments(image.regions, segments, masks, name, notes)


def make_record(
    image: Image | None, annotation: Annotation, table: CategoryTable, row: tuple[int, int] | None = None
) -> Record:
    """The record of an annotation, with the categories of the table that its segments name."""
    segments = msgspec.Raw(open_json(bytes(annotation.segments_info)))
    record = Record(segments=segments) if annotation.segments_info else Record()
    if image is not None:
        record.width, record.height = image.width, image.height
    record.row = row
    record.categories = _categories(record.segments, table)
    return record


def _categories(segments: msgspec.Raw, table: CategoryTable) -> list[Category]:
    """The categories that segments name, so that a worker needs no category list."""
    try:
        found = _CATEGORIZED.decode(segments)
        named = {(each.category_id, each.category or each.category_name) for each in found}
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        parsed = [each for each in _parsed_list(bytes(segments), "") if isinstance(each, Segment)]
        named = {(each.category_id, each.category or each.category_name) for each in parsed}
    known = {table.find(number, name) for number, name in named}
    return sorted((category for category in known if category), key=lambda category: category.id)


def _read_record(data: bytes, limits: Limits, where: str) -> Record:
    if len(data) > limits.max_record_bytes:
        detail = f"{where}: {len(data)} bytes; limits.max_record_bytes is {limits.max_record_bytes}"
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, detail)
    try:
        return _RECORD.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raw = coco_json.parse_json(data)  # NaN or a broken string inside the segments
        segments = coco_json.as_raw(raw.pop("segments"))
        record = msgspec.convert(raw, Record)
        record.segments = segments
        return record


def _read_info(url: str, limits: Limits) -> tuple[Record, bytes]:
    """An image's own `panseg_info` file, and as JSON what it has besides the segments."""
    unreadable = Reason.ANNOTATION_UNREADABLE

    def decode(data: bytes) -> Any:
        if len(data) > limits.max_record_bytes:
            detail = f"{url}: {len(data)} bytes; limits.max_record_bytes is {limits.max_record_bytes}"
            raise BadRecord(unreadable, detail)
        try:
            return coco_json.parse_json(data)
        except ValueError as error:
            raise BadRecord(unreadable, f"{url}: not JSON: {error}") from error

    try:
        raw = files.decoded(lambda: files.fetch(Blob(url)), decode)
    except OSError as error:
        raise failures.to_failure(error, unreadable, unreadable, "fetch it again", url) from error
    segments = raw.pop("segments_info", None) if isinstance(raw, dict) else raw
    size = coco_json.as_image(raw) if isinstance(raw, dict) else Image()
    return Record(size.width, size.height, coco_json.as_raw(segments)), bytes(size.record)


def _segments(raw: bytes, where: str) -> list[Segment | BadRecord]:
    try:
        return list(_SEGMENTS.decode(raw))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _parsed_list(raw, where)


def _parsed_list(raw: bytes, where: str) -> list[Segment | BadRecord]:
    """Segments one by one, where something is wrong with one of them.

    Raises:
        BadRecord: they are no list at all (only if `where` says what to name).
    """
    try:
        values = coco_json.as_list(coco_json.parse_json(raw))
    except ValueError:
        values = None
    if values is None:
        if where:
            raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"{where}: `segments_info` is not a list")
        return []
    found: list[Segment | BadRecord] = []
    for number, value in enumerate(values):
        try:
            found.append(coco_json.as_struct(value, Segment, _NEEDED))
        except ValueError as problem:
            detail = f"{where}: segment at position {number}: {problem}"
            found.append(BadRecord(Reason.ANNOTATION_UNREADABLE, detail))
    return found


def _region(number: int, segment: Segment | BadRecord, table: CategoryTable, where: str) -> Region:
    region = Region(number, None)
    if isinstance(segment, BadRecord):
        region.drop = drop(segment.reason, segment.detail)
        return region
    region.source_id, region.category_id = segment.id, segment.category_id
    name = segment.category or segment.category_name
    category = table.find(segment.category_id, name)
    if category is not None:
        region.category, region.category_id = category.name, category.id
        region.is_thing = category.is_thing
    if segment.id == 0:
        region.drop = drop(Reason.VOID, f"{where}: segment at position {number} is declared with id 0")
    elif segment.iscrowd:
        region.drop = drop(Reason.CROWD, f"{where}: segment {segment.id}")
    elif category is None:
        named = name if segment.category_id is None else segment.category_id
        detail = f"{where}: segment {segment.id}: category {named} is not in the list; correct `categories`"
        region.drop = drop(Reason.UNKNOWN_CATEGORY, detail)
    return region


def _declared(segments: list[Segment | BadRecord]) -> list[label_maps.Declared]:
    """The ids of the segments. Of a crowd, or of an id that is declared twice, the area is no witness."""
    found: dict[int, label_maps.Declared] = {}
    for segment in segments:
        if isinstance(segment, Segment) and segment.id:
            area = None if segment.iscrowd or segment.id in found else label_maps.usable_area(segment.area)
            found[segment.id] = label_maps.Declared(segment.id, area)
    return list(found.values())


def _refuse_label_map_as_photo(
    photo: Blob | None, header: photos.Header, declared: list[label_maps.Declared]
) -> None:
    """Refuse a label map that lies where the photo should be, under its name.

    Raises:
        BadRecord: PHOTO_MISSING.
    """
    if photo is None or header.format not in ("png", "tiff", "bmp"):
        return
    data = photos.fetch(photo)
    if len(data) > _LABEL_BYTES_PER_PIXEL * header.width * header.height + 1024 and header.format == "png":
        return
    try:
        found = label_maps.looks_like(data, {each.id for each in declared})
    except BadRecord:  # no label map then; whoever needs its pixels says what is wrong with them
        return
    if found:
        detail = f"{photo}: a label map of this image, not its photo; put the photo there"
        raise BadRecord(Reason.PHOTO_MISSING, detail)


def _place_masks(
    regions: list[Region],
    segments: list[Segment | BadRecord],
    masks: dict[int, rle.Mask],
    name: str,
) -> None:
    by_id: dict[int, list[int]] = {}
    for place, (region, segment) in enumerate(zip(regions, segments, strict=True)):
        if isinstance(segment, BadRecord):
            continue
        by_id.setdefault(segment.id, []).append(place)
        mask = masks.get(segment.id)
        if mask is not None:
            region.rle, region.area, region.bbox = mask
        elif region.drop is None:
            region.drop = drop(Reason.SEGMENT_ABSENT, f"{name}: no pixel has id {segment.id}")
    for number, places in by_id.items():
        if len(places) > 1:
            _drop_repeated(number, [(regions[place], segments[place]) for place in places], name)


def _drop_repeated(number: int, found: list[tuple[Region, Segment | BadRecord]], name: str) -> None:
    """Drop all segments of one id but the one that the mask is of.

    That is the first if all are of one category, else the only one whose area is the mask's, else none.
    """
    words = "is declared twice"
    kept = found[0][0]
    if len({(region.category_id, region.category) for region, _ in found}) > 1:
        words = "is declared twice, with different categories; correct the one that is wrong"
        exact = [
            each for each, segment in found if isinstance(segment, Segment) and segment.area == each.area
        ]
        kept = exact[0] if len(exact) == 1 else None
    for region, _ in found:
        if region is not kept and region.drop is None:
            region.drop = drop(Reason.DUPLICATE_KEY, f"{name}: id {number} {words}")


def _note_segments(
    regions: list[Region],
    segments: list[Segment | BadRecord],
    masks: dict[int, rle.Mask],
    name: str,
    notes: list[Note],
) -> None:
    declared = {0}
    for region, segment in zip(regions, segments, strict=True):
        if isinstance(segment, BadRecord):
            continue
        declared.add(segment.id)
        if segment.area is None:
            notes.append(
                Note("area_missing", f"{name}: segment {segment.id}: computed from the mask", region.id)
            )
        elif region.rle is not None and segment.area != region.area:
            detail = f"{name}: segment {segment.id}: declared {segment.area:g}, mask has {region.area}"
            notes.append(Note("area_differs", detail, region.id))
        if None not in (segment.isthing, region.is_thing) and bool(segment.isthing) != region.is_thing:
            detail = f"{name}: segment {segment.id} ({region.category}): isthing is {segment.isthing}"
            notes.append(Note("isthing_differs", f"{detail}; the category list counts", region.id))
    strays = [label for label in masks if label not in declared]
    if strays:
        pixels = sum(masks[label].area for label in strays)
        detail = f"{name}: {len(strays)} ids on {pixels} pixels that no segment declares, as {strays[0]}"
        notes.append(Note("undeclared_ids", detail))


def _sizes(header: photos.Header, labels_size: tuple[int, int], record: Record, where: str) -> str:
    declared = "no size" if not record.width or not record.height else f"{record.width}x{record.height}"
    return (
        f"{where}: photo is {header.width}x{header.height}, label map {labels_size[0]}x{labels_size[1]}, "
        f"annotation says {declared}"
    )


def _label_name(annotation: Blob, row: tuple[int, int] | None) -> str:
    """The label map's name for messages."""
    return str(annotation) if row is None else f"{annotation}, row {row[1]} of row group {row[0]}"


def _label_bytes(annotation: Blob, row: tuple[int, int] | None, name: str) -> Callable[[], bytes]:
    """What fetches the label map; each call but the first reads it again."""
    if row is None:
        return lambda: files.fetch(annotation)
    calls = itertools.count()

    def fetch_cell() -> bytes:
        if next(calls):
            _masks_of_group.cache_clear()
        try:
            data = _masks_of_group(annotation.url, row[0])[row[1]].as_py()
        except ReadError:
            raise
        except (OSError, IndexError, ValueError, KeyError) as error:  # Arrow's own: the bytes are there
            detail = " ".join(str(error).split())  # Arrow's have several lines
            raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {detail}; fetch it again") from error
        data = data.get("bytes") if isinstance(data, dict) else data  # pandas writes the bytes alone
        if data is None:
            raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: no PNG in it")
        if not isinstance(data, bytes):
            detail = f"{name}: column `mask` has {type(data).__name__}, not the bytes of a PNG"
            raise BadRecord(Reason.LABELS_UNREADABLE, f"{detail}; write them as the hub's files do")
        return data

    return fetch_cell


def _decoded(
    fetching: Callable[[], bytes], decode: Callable[[bytes], Result], name: str, data: bytes | None = None
) -> Result:
    """As `files.decoded`, of a label map."""
    try:
        return files.decoded(fetching, decode, data)
    except OSError as error:
        reason = Reason.LABELS_UNREADABLE
        raise failures.to_failure(error, reason, reason, "fetch it again", name) from error


@functools.lru_cache(maxsize=2)
def _masks_of_group(url: str, group: int) -> Any:
    """The `mask` column of a row group. Images of a unit follow one another: each group is read once."""
    files.fetch_size(Blob(url))  # says whether it is gone, or only away
    return TableFile(url).read_row_group(group, ["mask"])["mask"]
