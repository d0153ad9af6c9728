"""COCONut and everything in COCO's panoptic layout: a label map per image, and a JSON record of its segments.

Two layouts. `panoptic`: JSON files (or a folder with one JSON per image, as `panseg_info/`), a folder of
label PNGs. `parquet`: the hub's rows with the PNG inside. Photos are found by name in the photo folders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from ...filters import rle
from ...schemas.config import CoconutSource, Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, ImageRecord, Region
from ..io import files, photos
from . import categories, coco_json, file_names, label_maps
from .categories import Category, Table
from .coco_json import Annotation, Image
from .common import drop, photo_notes
from .protocols import CatalogEntry, Note


class Record(msgspec.Struct, omit_defaults=True):
    """One image's annotation as the plan keeps it: what a worker needs besides label map and photo.

    Attributes:
        width: that the annotation declares, in pixels.
        height: likewise.
        segments: the publisher's own `segments_info`, as it was written.
        categories: those that the segments name.
        row: (row group, row in it) of the Parquet file that holds the label map.
        info: URL of the image's own JSON; then `segments` and `categories` are read from there.
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
    area: int | float | None = None
    category: str | None = None
    category_name: str | None = None


class _Categorised(msgspec.Struct):
    category_id: int | None = None
    category: str | None = None
    category_name: str | None = None


class _Row(NamedTuple):
    """One annotation on its way into the catalog; its record is made when its turn comes, to save memory."""

    image: Image | None
    annotation: Annotation
    record: Callable[[], Record]
    home: str


_SEGMENTS = msgspec.json.Decoder(list[Segment])
_CATEGORISED = msgspec.json.Decoder(list[_Categorised])
_RECORD = msgspec.json.Decoder(Record)


class Coconut:
    """The COCONut subset: all its sources, in the config's order."""

    subset = "coconut"

    def __init__(self, sources: list[CoconutSource]):
        self.sources = sources
        self.notes: list[Note] = []
        self._listings: dict[str, file_names.Listing] = {}
        self._labelled: dict[str, set[str]] = {}

    def fingerprint(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in self.sources:
            for url in file_names.expand_all(source.annotations, "coconut.annotations"):
                found[url] = (
                    self._list(url, "coconut.annotations").digest()
                    if files.is_folder(url)
                    else files.version(url)
                )
            for folder in [*source.photos, *([source.labels] if source.labels else [])]:
                found[folder] = self._list(folder, "a folder of coconut").digest()
            if source.categories:
                found[source.categories] = files.version(source.categories)
        return found

    def catalog(self) -> Iterator[CatalogEntry]:
        """Annotations in the order of their files, then the images of these files that have none."""
        self.notes = []
        self._labelled.clear()
        keys = file_names.Keys()
        for place, source in enumerate(self.sources):
            for url in file_names.expand_all(source.annotations, "coconut.annotations"):
                if source.layout == "parquet":
                    rows, leftover = list(self._parquet_rows(url, source)), []
                elif files.is_folder(url):
                    rows, leftover = self._folder_rows(url), []
                else:
                    rows, leftover = self._document_rows(url, source)
                yield from self._entries(place, source, rows, leftover, keys)
        self._note_strays()
        self._listings.clear()

    def read(self, entry: CatalogEntry, limits: Limits, notes: list[Note] | None = None) -> ImageRecord:
        image = ImageRecord(entry.key, self.subset, entry.photo, 0, 0, file_name=entry.file_name)
        try:
            self._fill(image, entry, limits, [] if notes is None else notes)
        except BadRecord as error:
            image.reject(drop(error.reason, error.detail))
        return image

    # The catalog.

    def _list(self, folder: str, setting: str) -> file_names.Listing:
        if folder not in self._listings:
            self._listings[folder] = file_names.list_folder(folder, setting)
        return self._listings[folder]

    def _document_rows(self, url: str, source: CoconutSource) -> tuple[list[_Row], list[Image]]:
        document = coco_json.read_document(url)
        table = self._table_of(document, url, source)
        images = document.images or []
        by_id = {image.id: image for image in reversed(images) if image.id is not None}
        by_stem: dict[str, Image] | None = None
        used: set[int] = set()
        rows = []
        for annotation in document.annotations or ():
            image = by_id.get(annotation.image_id) if annotation.image_id is not None else None
            if image is None and annotation.file_name:  # rows without an id are joined by their name
                if by_stem is None:
                    named = [image for image in reversed(images) if image.file_name]
                    by_stem = {file_names.stem(image.file_name or ""): image for image in named}
                image = by_stem.get(file_names.stem(annotation.file_name))
            if image is not None:
                used.add(id(image))
            rows.append(_Row(image, annotation, functools.partial(_record, image, annotation, table), url))
        return rows, [image for image in images if id(image) not in used]

    def _table_of(self, document: coco_json.Document, url: str, source: CoconutSource) -> Table:
        if source.categories is not None or bytes(document.categories).strip() in (b"", b"[]", b"null"):
            return categories.load(source.categories)
        try:
            return categories.table_of(coco_json.loads(bytes(document.categories)), url)
        except ValueError as error:
            raise ConfigError(f"{url}: categories: {error}") from error

    def _folder_rows(self, folder: str) -> list[_Row]:
        """A folder with one JSON per image: the files are opened by the workers."""
        rows = []
        for name in self._list(folder, "coconut.annotations").names or ():
            if name.endswith(".json"):
                url = f"{folder.rstrip('/')}/{name}"
                label = name.removesuffix(".json") + ".png"
                rows.append(_Row(None, Annotation(label), functools.partial(Record, info=url), url))
        if not rows:
            raise ConfigError(f"coconut.annotations: {folder}: no .json file in it")
        return rows

    def _parquet_rows(self, url: str, source: CoconutSource) -> Iterator[_Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = categories.load(source.categories)
        try:
            with files.open_url(url) as file:
                parquet = pq.ParquetFile(file)
                missing = {"mask", "segments_info"} - set(parquet.schema_arrow.names)
                if missing:
                    raise ConfigError(
                        f"{url}: no column {sorted(missing)}; give the hub's COCONut Parquet files"
                    )
                columns = [
                    name for name in ("segments_info", "image_info") if name in parquet.schema_arrow.names
                ]
                for group in range(parquet.num_row_groups):
                    for row, cells in enumerate(parquet.read_row_group(group, columns).to_pylist()):
                        annotation = coco_json.as_annotation(cells.get("segments_info"))
                        info = cells.get("image_info")
                        image = None if info is None else coco_json.as_image(info)
                        record = functools.partial(_record, image, annotation, table, (group, row))
                        yield _Row(image, annotation, record, url)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise ConfigError(f"{url}: not a readable Parquet file: {error}; fetch it again") from error

    def _entries(
        self,
        place: int,
        source: CoconutSource,
        rows: list[_Row],
        leftover: list[Image],
        keys: file_names.Keys,
    ) -> Iterator[CatalogEntry]:
        stems = {file_names.stem(_photo_name(row)) for row in rows}
        listings = [self._list(folder, "coconut.photos") for folder in source.photos]
        find_photo = file_names.Finder(listings, stems, file_names.PHOTO_ENDINGS, source.labels).find
        find_label = None
        if source.layout == "panoptic" and source.labels is not None:
            label_listing = self._list(source.labels, "coconut.labels")
            wanted = {file_names.stem(row.annotation.file_name or _photo_name(row)) for row in rows}
            find_label = file_names.Finder([label_listing], wanted, file_names.LABEL_ENDINGS).find
            self._labelled.setdefault(source.labels, set()).update(wanted)
        for number, row in enumerate(rows):
            yield self._entry(place, number, row, find_photo, find_label, keys)
        for image in leftover:
            name = image.file_name or str(image.id)
            key, _ = keys.claim(file_names.stem(name))
            dropped = drop(Reason.ANNOTATION_MISSING, f"{name}: listed under `images`, without an annotation")
            record = msgspec.json.encode(Record(image.width, image.height))
            yield CatalogEntry(key, place, None, None, record, name, dropped)

    def _entry(
        self, place: int, number: int, row: _Row, find_photo: Any, find_label: Any, keys: file_names.Keys
    ) -> CatalogEntry:
        photo_name = _photo_name(row)
        label_name = row.annotation.file_name or f"{file_names.stem(photo_name)}.png"
        key, again = keys.claim(file_names.stem(photo_name) or f"{file_names.stem(row.home)}-{number}")
        photo = annotation = None
        dropped = None
        if row.annotation.problem:
            dropped = drop(
                Reason.ANNOTATION_UNREADABLE, f"{row.home}: annotation {number}: {row.annotation.problem}"
            )
        elif not photo_name:
            dropped = drop(Reason.ANNOTATION_UNREADABLE, f"{row.home}: annotation {number}: names no file")
        elif not file_names.is_safe(photo_name) or not file_names.is_safe(label_name):
            dropped = drop(
                Reason.UNSAFE_NAME,
                f"{row.home}: {photo_name!r}, {label_name!r}: outside its folder; not opened",
            )
        else:
            photo_url = find_photo(photo_name)
            label_url = row.home if find_label is None else find_label(label_name)
            photo = None if photo_url is None else Blob(photo_url)
            annotation = None if label_url is None else Blob(label_url)
            if again:
                dropped = drop(
                    Reason.DUPLICATE_KEY, f"{row.home}: {photo_name}: annotated before; the first one counts"
                )
            elif photo is None:
                dropped = drop(
                    Reason.PHOTO_MISSING, f"{photo_name}: in none of the photo folders; put it there"
                )
            elif annotation is None:
                dropped = drop(
                    Reason.LABELS_UNREADABLE, f"{label_name}: not in the label folder; put it there"
                )
        record = msgspec.json.encode(row.record())
        return CatalogEntry(key, place, photo, annotation, record, photo_name, dropped)

    def _note_strays(self) -> None:
        for folder, wanted in self._labelled.items():
            for name in self._list(folder, "coconut.labels").names or ():
                if name.lower().endswith(".png") and file_names.stem(name) not in wanted:
                    self.notes.append(Note("label_map_without_record", f"{folder}/{name}"))
        self._labelled.clear()

    # One image.

    def _fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        where = f"annotation of {entry.file_name or entry.key} ({entry.annotation or 'no label map'})"
        record = _read_record(entry.record, limits, where)
        table = Table(record.categories)
        if record.info is not None:
            record = _read_info(record.info, limits)
            table = categories.load(self.sources[entry.source].categories)
        image.width, image.height = record.width or 0, record.height or 0
        segments = _segments(bytes(record.segments), where)
        regions = [_region(number, found, table, where) for number, found in enumerate(segments)]
        image.regions = regions
        if entry.drop is not None:
            image.reject(entry.drop)
            return
        if len(regions) > limits.max_masks:
            detail = f"{where}: {len(regions)} segments; limits.max_masks is {limits.max_masks}"
            raise BadRecord(Reason.TOO_MANY_MASKS, detail)
        assert entry.photo is not None and entry.annotation is not None, "otherwise the entry has a drop"
        header = photos.probe(entry.photo, limits.max_pixels)
        image.photo_format = header.format
        image.width, image.height = header.width, header.height
        notes += photo_notes(entry.photo, entry.file_name, header)

        name, data = _label_bytes(entry.annotation, record.row)
        size = label_maps.size_of(data, name)
        declared = (record.width or size[0], record.height or size[1])
        if not header[1:3] == size == declared:
            raise BadRecord(Reason.SIZE_MISMATCH, _sizes(header, size, record, where))
        largest = max((found.id for found in segments if isinstance(found, Segment)), default=0)
        masks = rle.encode_label_map(label_maps.decode(data, name, largest))
        _place_masks(regions, segments, masks, name)
        _note_segments(regions, segments, masks, name, notes)


def _photo_name(row: _Row) -> str:
    if row.image is not None and row.image.file_name:
        return row.image.file_name
    return file_names.stem(row.annotation.file_name) + ".jpg" if row.annotation.file_name else ""


def _record(
    image: Image | None, annotation: Annotation, table: Table, row: tuple[int, int] | None = None
) -> Record:
    record = Record(segments=annotation.segments_info) if annotation.segments_info else Record()
    if image is not None:
        record.width, record.height = image.width, image.height
    record.row = row
    record.categories = _categories(record.segments, table)
    return record


def _categories(segments: msgspec.Raw, table: Table) -> list[Category]:
    """The categories that segments name, so that a worker needs no category list."""
    try:
        found = _CATEGORISED.decode(segments)
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
        raw = coco_json.loads(data)  # NaN or a broken string inside the segments
        segments = coco_json.as_raw(raw.pop("segments"))
        record = msgspec.convert(raw, Record)
        record.segments = segments
        return record


def _read_info(url: str, limits: Limits) -> Record:
    """An image's own `panseg_info` file."""
    try:
        data = files.read(Blob(url))
    except OSError as error:
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"{url}: {error}") from error
    if len(data) > limits.max_record_bytes:
        detail = f"{url}: {len(data)} bytes; limits.max_record_bytes is {limits.max_record_bytes}"
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, detail)
    try:
        raw = coco_json.loads(data)
    except ValueError as error:
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"{url}: not JSON: {error}") from error
    segments = raw.get("segments_info") if isinstance(raw, dict) else raw
    size = coco_json.as_image(raw) if isinstance(raw, dict) else Image()
    return Record(size.width, size.height, coco_json.as_raw(segments))


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
        values = coco_json.loads(raw)
    except ValueError:
        values = None
    if not isinstance(values, list):
        if where:
            raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"{where}: `segments_info` is no list")
        return []
    found: list[Segment | BadRecord] = []
    for number, value in enumerate(values):
        problem = coco_json.problem_of(value)
        if not problem:
            try:
                found.append(msgspec.convert(value, Segment, strict=False))
                continue
            except msgspec.ValidationError as error:
                problem = str(error)
        found.append(BadRecord(Reason.ANNOTATION_UNREADABLE, f"{where}: segment {number}: {problem}"))
    return found


def _region(number: int, segment: Segment | BadRecord, table: Table, where: str) -> Region:
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
        region.drop = drop(Reason.VOID, f"{where}: segment {number} is declared with id 0")
    elif segment.iscrowd:
        region.drop = drop(Reason.CROWD, f"{where}: segment {segment.id}")
    elif category is None:
        named = name if segment.category_id is None else segment.category_id
        detail = f"{where}: segment {segment.id}: category {named} is not in the list; mend `categories`"
        region.drop = drop(Reason.UNKNOWN_CATEGORY, detail)
    return region


def _place_masks(
    regions: list[Region],
    segments: list[Segment | BadRecord],
    masks: dict[int, rle.Mask],
    name: str,
) -> None:
    taken: set[int] = set()
    for region, segment in zip(regions, segments, strict=True):
        if isinstance(segment, BadRecord):
            continue
        mask = masks.get(segment.id)
        if mask is not None:
            region.rle, region.area, region.bbox = mask
        if segment.id in taken and region.drop is None:
            region.drop = drop(Reason.DUPLICATE_KEY, f"{name}: id {segment.id} is declared twice")
        elif mask is None and region.drop is None:
            region.drop = drop(Reason.SEGMENT_ABSENT, f"{name}: no pixel has id {segment.id}")
        taken.add(segment.id)


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


def _label_bytes(annotation: Blob, row: tuple[int, int] | None) -> tuple[str, bytes]:
    """The label map's name for messages, and its bytes."""
    name = str(annotation) if row is None else f"{annotation}, row {row[1]} of row group {row[0]}"
    try:
        if row is None:
            return name, files.read(annotation)
        data = _masks_of_group(annotation.url, row[0])[row[1]].as_py()
    except (OSError, IndexError, ValueError, KeyError) as error:
        raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {error}; fetch it again") from error
    if data is None or data.get("bytes") is None:
        raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: no PNG in it")
    return name, data["bytes"]


@functools.lru_cache(maxsize=2)
def _masks_of_group(url: str, group: int) -> Any:
    """The `mask` column of a row group. Images of a unit follow one another: each group is read once."""
    import pyarrow.parquet as pq

    with files.open_url(url) as file:
        return pq.ParquetFile(file).read_row_group(group, columns=["mask"])["mask"]
