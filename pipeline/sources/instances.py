"""One image in COCO's instances layout: a record with a mask or a box of its own for each object."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, Literal, TypeVar

import msgspec

from ...filters import boxes
from ...schemas.config import Limits
from ...schemas.errors import BadRecord
from ...schemas.plain import fits_int64
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord, Region
from . import coco_json
from .categories import Category, CategoryTable
from .common import Segmented, declared_size, place_masks, read_header, refuse
from .protocols import CatalogEntry, Note, drop

Choice = Literal["drop", "keep"]


class Record(msgspec.Struct, omit_defaults=True):
    """One image's annotations as the work list keeps them: what a worker needs besides the photo.

    Attributes:
        width, height: size that the file declares, in pixels.
        annotations: the publisher's own, as they were written.
        categories: those that the annotations name.
    """

    width: int | None = None
    height: int | None = None
    annotations: list[msgspec.Raw] = []
    categories: list[Category] = []


class Annotated(msgspec.Struct):
    """An element of `annotations`, but for where its object is."""

    id: int | None = None
    category_id: int | None = None
    iscrowd: bool | int | None = None


class Instance(Annotated):
    """One with a mask. Only `segmentation` is needed."""

    area: float | None = None
    segmentation: Any = None


class Boxed(Annotated):
    """One with a box: x, y, width and height in pixels. Only `bbox` is needed."""

    bbox: list[float] | None = None


Kind = TypeVar("Kind", bound=Annotated)

_NEEDED = ("category_id", "iscrowd", "segmentation", "bbox")
"""Fields of an annotation that say where its object is, or whether it is used."""

_RECORD = msgspec.json.Decoder(Record)
_DECODERS: dict[type[Any], Any] = {kind: msgspec.json.Decoder(kind) for kind in (Instance, Boxed)}


def fill_instances(
    image: ImageRecord,
    entry: CatalogEntry,
    limits: Limits,
    notes: list[Note],
    crowds: Choice = "drop",
    unnamed: Choice = "drop",
) -> None:
    """Add size, regions and masks to an image; see `Source.fill`.

    Args:
        image: as far as the entry says what it is.
        entry: from the catalog, with a `Record`.
        limits: what is refused.
        notes: what is odd but usable is appended to it.
        crowds: what becomes of masks of many objects.
        unnamed: what becomes of regions whose category is not in the list.
    """
    where = f"annotations of {entry.file_name or entry.key} ({entry.annotation})"
    found = _fill_regions(image, entry, limits, notes, (crowds, unnamed), (Instance, where))
    place_masks(image, list(map(_segmented, found, image.regions, repeat(where))), notes)


def fill_boxes(
    image: ImageRecord,
    entry: CatalogEntry,
    limits: Limits,
    notes: list[Note],
    crowds: Choice = "drop",
    unnamed: Choice = "drop",
) -> None:
    """Add size, regions and their boxes, in whole pixels inside the photo; no masks. As `fill_instances`."""
    where = f"annotations of {entry.file_name or entry.key} ({entry.annotation})"
    found = _fill_regions(image, entry, limits, notes, (crowds, unnamed), (Boxed, where))
    _place_boxes(image, found, where, notes)


def _fill_regions(
    image: ImageRecord,
    entry: CatalogEntry,
    limits: Limits,
    notes: list[Note],
    choices: tuple[Choice, Choice],
    read_as: tuple[type[Kind], str],
) -> list[Kind | BadRecord]:
    """Add size and regions, and refuse what is not usable before a mask is made; the annotations."""
    (crowds, unnamed), (kind, where) = choices, read_as
    record = _read_record(entry.record, limits, where)
    image.width, image.height = declared_size(record.width, record.height)
    table = CategoryTable(record.categories)
    found = [_annotated(raw, kind, place, where, notes) for place, raw in enumerate(record.annotations)]
    image.regions = [_region(place, each, table, where, unnamed) for place, each in enumerate(found)]
    _judge_crowds(image, found, where, crowds, notes)
    refuse(image, entry, limits, where)
    header = read_header(image, entry, limits, notes)
    declared = (record.width or header.width, record.height or header.height)
    if declared != (header.width, header.height):
        detail = f"photo is {header.width}x{header.height}, annotation says {declared[0]}x{declared[1]}"
        raise BadRecord(Reason.SIZE_MISMATCH, f"{where}: {detail}")
    return found


def _read_record(data: bytes, limits: Limits, where: str) -> Record:
    if len(data) > limits.max_record_bytes:
        detail = f"{where}: {len(data)} bytes; limits.max_record_bytes is {limits.max_record_bytes}"
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, detail)
    try:
        return _RECORD.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raw = coco_json.parse_json(data)  # NaN or a broken string inside an annotation
        annotations = [coco_json.as_element(each) for each in raw.pop("annotations")]
        record = msgspec.convert(raw, Record)
        record.annotations = annotations
        return record


def _annotated(
    raw: msgspec.Raw, kind: type[Kind], place: int, where: str, notes: list[Note]
) -> Kind | BadRecord:
    """An annotation as far as it is what it should be. The mask or the box is what counts."""
    try:
        found = _DECODERS[kind].decode(raw)
        given: Any = found.id
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        try:
            value = coco_json.parse_json(bytes(raw))
            found = coco_json.as_struct(value, kind, _NEEDED)
            given = value.get("id")
        except ValueError as problem:
            detail = f"{where}: annotation at position {place}: {problem}"
            return BadRecord(Reason.ANNOTATION_UNREADABLE, detail)
    if given is not None and not fits_int64(found.id):
        detail = f"{where}: annotation at position {place}: id {coco_json.shortened(given)}"
        notes.append(Note("id_unusable", detail, place))
        found.id = None
    return found


def _region(
    place: int, found: Annotated | BadRecord, table: CategoryTable, where: str, unnamed: Choice
) -> Region:
    region = Region(place, None)
    if isinstance(found, BadRecord):
        region.drop = drop(found.reason, found.detail)
        return region
    region.source_id, region.category_id = found.id, found.category_id
    category = table.find(found.category_id, None)
    if category is not None:
        region.category, region.is_thing = category.name, category.is_thing
    elif unnamed == "drop":
        detail = (
            f"{_name(region, where)}: category {found.category_id} is not in the list; correct `categories`"
        )
        region.drop = drop(Reason.UNKNOWN_CATEGORY, detail)
    return region


def _judge_crowds(
    image: ImageRecord,
    found: Sequence[Annotated | BadRecord],
    where: str,
    crowds: Choice,
    notes: list[Note],
) -> None:
    """Drop or note the regions that are many objects under one mask."""
    for region, instance in zip(image.regions, found, strict=True):
        if isinstance(instance, BadRecord) or not instance.iscrowd:
            continue
        if crowds == "keep":
            notes.append(Note("crowd_kept", _name(region, where), region.id))
        elif region.drop is None:
            region.drop = drop(Reason.CROWD, _name(region, where))


def _segmented(instance: Instance | BadRecord, region: Region, where: str) -> Segmented | None:
    if isinstance(instance, BadRecord):
        return None
    is_rle = isinstance(instance.segmentation, dict)  # the area of a polygon is never that of its pixels
    return Segmented(instance.segmentation, instance.area if is_rle else None, _name(region, where))


def _place_boxes(
    image: ImageRecord, found: Sequence[Boxed | BadRecord], where: str, notes: list[Note]
) -> None:
    """Give each region its box inside the photo; drop those without one, and each box that is there twice."""
    seen: dict[tuple[int, int, int, int], list[Region]] = {}
    for region, boxed in zip(image.regions, found, strict=True):
        if isinstance(boxed, BadRecord):
            continue
        name = _name(region, where)
        try:
            region.bbox, outside = boxes.fit(boxed.bbox, image.width, image.height)
        except BadRecord as bad:
            region.drop = region.drop or drop(bad.reason, f"{name}: {bad.detail}")
            continue
        if outside:
            notes.append(Note("box_clipped", f"{name}: {outside}", region.id))
        if region.drop is not None:
            continue
        same = seen.setdefault(region.bbox, [])
        twin = next((each for each in same if each.category_id == region.category_id), None)
        if twin is not None:
            detail = f"{name}: the box and the category of {_short_name(twin)}"
            region.drop = drop(Reason.BOX_DUPLICATE, detail)
            continue
        if same:
            detail = f"{name} ({region.category}): the box of {_short_name(same[0])} ({same[0].category})"
            notes.append(Note("box_shared", detail, region.id))
        same.append(region)


def _name(region: Region, where: str) -> str:
    """An annotation by its id, or by its position if it has none."""
    return f"{where}: {_short_name(region)}"


def _short_name(region: Region) -> str:
    number = region.source_id
    return "annotation " + (f"at position {region.id}" if number is None else f"{number}")
