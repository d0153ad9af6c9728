"""COCO's instances layout, as COCO, LVIS and most tools write it: one JSON, with a mask for each object.

The driver parses the JSON once. Each image's annotations go into the work list as they were written, so a
worker parses only those of its own images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import msgspec
from pydantic import Field

from ...schemas.config import Limits
from ...schemas.plain import fits_int64
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Credit, Drop, ImageRecord
from ...schemas.secrets import open_json
from ...schemas.strict import Location
from ..io import files
from . import coco_json, file_names
from .categories import CategoryTable, choose_table
from .coco_json import Image
from .common import PHOTO_FIXES
from .credits import Licenses, read_credit
from .instances import Choice, Record, fill_instances
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop


class CocoOptions(SourceOptions):
    """Files in COCO's instances layout: polygons or run-length encodings, with the names of the objects."""

    annotations: list[Location] = Field(
        min_length=1,
        description="Instances JSON files, such as `instances_train2017.json` or `lvis_v1_train.json`. Globs "
        "are allowed.",
    )
    photos: list[Location] = Field(
        min_length=1, description="Folders in which to look for each photo by its file name, in this order."
    )
    categories: Location | None = Field(
        default=None,
        description="JSON file with the list of categories. null takes the list in the annotation file, "
        "or, if there is none, the categories of COCO.",
    )
    crowds: Choice = Field(
        default="drop",
        description="What becomes of a region with `iscrowd`, many objects under one mask: `drop` drops it "
        "as `crowd`, `keep` reads it like any other.",
    )
    unnamed: Choice = Field(
        default="drop",
        description="What becomes of a region whose category is not in the list: `drop` drops it as "
        "`unknown_category`, `keep` reads it without a category, for a recipe such as `identify`.",
    )


class _Annotated(msgspec.Struct):
    """What the driver reads of an annotation."""

    image_id: Any = None
    id: Any = None
    category_id: Any = None


class _Place(msgspec.Struct):
    coco_url: Any = None


class _Row(NamedTuple):
    """An image on its way into the catalog.

    Attributes:
        image: as its list has it.
        names: those under which its photo is looked for, in this order.
        annotations: its own, as they were written.
        drop: what is wrong with it.
    """

    image: Image
    names: list[str]
    annotations: list[msgspec.Raw]
    drop: Drop | None = None


class Coco(Source[CocoOptions]):
    """Files in COCO's instances layout.

    Attributes:
        field: of an annotation that says where its object is.
    """

    field: ClassVar[str] = "segmentation"
    title = "COCO"
    options_type = CocoOptions
    recipe = "verify"
    checks_masks = True
    fixes = PHOTO_FIXES | {
        Reason.PHOTO_MISSING: "put the photos there, or add their folder to `photos`; LVIS's validation "
        "images are in train2017 too",
        Reason.ANNOTATION_MISSING: "COCO has images without any object; there is nothing to fix",
        Reason.UNKNOWN_CATEGORY: "give the category list as `categories`; or read these regions with "
        "`unnamed: keep`",
        Reason.PAIR_AMBIGUOUS: "give each image an id of its own",
        Reason.CROWD: "by design: many objects under one mask; `crowds: keep` reads them",
        Reason.MASK_UNDECODABLE: "correct these masks, or leave them out: pycocotools makes no mask of "
        "them, or one of another shape than was drawn",
        "area_differs": "the area of the mask is used",
        "crowd_kept": "by the option `crowds`",
        "id_unusable": "the region has no `source_id`; its position names it",
        "repeated_ids": "each is read as a region of its own",
    }

    def places(self) -> list[str]:
        return self.options.annotations

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        options = self.options
        found = {url: files.version(url) for url in self._annotations()}
        for folder in options.photos:
            found[folder] = self._photos(catalog, folder).digest()
        if options.categories:
            found[options.categories] = files.version(options.categories)
        return found

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Images in the order of their files, then the annotations whose image is in no list."""
        for url in self._annotations():
            document = coco_json.read_instances(url, self.field)
            table = choose_table(bytes(document.categories), url, self.options.categories)
            rows = _rows(url, document, catalog.notes, self.names_of)
            listings = [self._photos(catalog, folder) for folder in self.options.photos]
            stems = {file_names.stem(name) for row in rows for name in row.names}
            photos = file_names.Finder(listings, stems, file_names.PHOTO_ENDINGS)
            licenses = Licenses(bytes(document.licenses))
            for number, row in enumerate(rows):
                entry = _entry(url, number, row, photos, catalog)
                size = (row.image.width, row.image.height)
                entry = msgspec.structs.replace(
                    entry, record=_record(row, table), credit=read_credit(row.image.record, licenses)
                )
                yield catalog.without_benchmarks(entry, row.image.id, size)

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        fill_instances(image, entry, limits, notes, self.options.crowds, self.options.unnamed)

    def names_of(self, image: Image) -> list[str]:
        """The names under which an image's photo is looked for, in this order."""
        return _names(image)

    def _annotations(self) -> list[str]:
        return file_names.expand_paths(self.options.annotations, f"{self.where}.annotations")

    def _photos(self, catalog: Catalog, folder: str) -> file_names.Listing:
        return catalog.list_folder(folder, f"{self.where}.photos")


def _rows(
    url: str, document: coco_json.Instances, notes: list[Note], names_of: Callable[[Image], list[str]]
) -> list[_Row]:
    """The images of a document with their annotations, then what no image of the list has."""
    by_image: dict[str | None, list[msgspec.Raw]] = {}
    counts: Counter[Any] = Counter()
    for raw in document.annotations or ():
        found = _annotated(raw)
        by_image.setdefault(_id_of(found.image_id), []).append(raw)
        if isinstance(found.id, int | str | float):
            counts[found.id] += 1
    repeated = [number for number, count in counts.items() if count > 1]
    if repeated:
        detail = f"{url}: {len(repeated)} annotation ids are used more than once, such as {repeated[0]}"
        notes.append(Note("repeated_ids", detail))
    images = document.images or []
    same_id: dict[str, set[str | None]] = {}
    for image in images:
        same_id.setdefault(str(image.id), set()).add(image.file_name)
    rows = []
    for image in images:
        own = [] if image.id is None else by_image.pop(str(image.id), [])
        names, dropped = names_of(image), None
        shared = same_id[str(image.id)]
        if image.id is not None and len(shared) > 1:
            listed = " and ".join(sorted(map(str, shared))[:3])
            detail = f"{url}: the image id {image.id} belongs to {listed}; give each image an id of its own"
            dropped = drop(Reason.PAIR_AMBIGUOUS, detail)
        rows.append(_Row(image, names, own, dropped))
    for number, own in by_image.items():
        rows.append(_without_image(url, number, own, None if images else names_of))
    return rows


def _without_image(
    url: str, number: str | None, own: list[msgspec.Raw], names_of: Callable[[Image], list[str]] | None
) -> _Row:
    """Annotations whose image is in no list. Without any list, the photo is looked for by COCO's names."""
    if number is None:
        detail = f"{url}: {len(own)} annotations have no usable `image_id`; give each the id of its image"
        return _Row(Image(), [], own, drop(Reason.ANNOTATION_UNREADABLE, detail))
    whole, shown = _whole(number), number if len(number) <= 40 else f"{number[:37]}..."
    image = Image(number if whole is None else whole)
    if names_of is None:
        detail = f"{url}: `images` has no image {shown}, which {len(own)} annotations name; add it"
        return _Row(image, [], own, drop(Reason.ANNOTATION_UNREADABLE, detail))
    return _Row(image, names_of(image), own)


def _annotated(raw: msgspec.Raw) -> _Annotated:
    try:
        return msgspec.json.decode(raw, type=_Annotated)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    try:
        value = coco_json.parse_json(bytes(raw))
    except ValueError:
        return _Annotated()
    if not isinstance(value, dict):
        return _Annotated()
    return _Annotated(value.get("image_id"), value.get("id"), value.get("category_id"))


def _id_of(value: Any) -> str | None:
    """An image id as it is compared: 7, 7.0 and "7" are one. None if it is no id."""
    value = coco_json.as_whole(value)
    if isinstance(value, str):
        return None if coco_json.problem_of(value) else value
    return str(value) if type(value) is int else None


def _names(image: Image) -> list[str]:
    """The names of an image's photo: its file name; where COCO has it, as LVIS says; COCO's name of an id."""
    names = [image.file_name] if image.file_name else []
    if at_coco := _coco_name(bytes(image.record)):
        names += [at_coco, file_names.base_name(at_coco)]
    if not names and isinstance(image.id, int) and image.id >= 0:
        names.append(f"{image.id:012}.jpg")
    return names


def _coco_name(record: bytes) -> str:
    """Folder and name of the photo that a record's `coco_url` leads to; "" without one."""
    try:
        found = msgspec.json.decode(record, type=_Place).coco_url if b'"coco_url"' in record else None
        path = urlsplit(found).path if isinstance(found, str) else ""
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
        return ""
    return "/".join(path.strip("/").split("/")[-2:])


def _entry(url: str, number: int, row: _Row, photos: file_names.Finder, catalog: Catalog) -> CatalogEntry:
    name = row.names[0] if row.names else ""
    key, again = catalog.claim_key(file_names.path_stem(name) or f"{file_names.stem(url)}-{number}", url)
    photo, dropped = None, row.drop
    unsafe = [each for each in row.names if not file_names.is_safe(each)]
    if unsafe:
        detail = f"{url}: {unsafe[0]!r}: {file_names.why_unsafe(unsafe[0])}; not opened"
        dropped = drop(Reason.UNSAFE_NAME, detail)
    elif dropped is None and not name:
        detail = f"{url}: an element of `images` has neither an id nor a file name"
        dropped = drop(Reason.ANNOTATION_UNREADABLE, detail)
    elif dropped is None and again:
        detail = f"{url}: {name}: an image of this name was listed before; the first one counts"
        dropped = drop(Reason.DUPLICATE_KEY, detail)
    elif dropped is None and not row.annotations:
        dropped = drop(Reason.ANNOTATION_MISSING, f"{url}: {name}: no annotation names this image")
    elif dropped is None:
        found = next(filter(None, map(photos.find, row.names)), None)
        photo = None if found is None else Blob(found)
        if photo is None:
            detail = f"{name}: not found in the folders of `photos`{photos.hint(name)}"
            dropped = drop(Reason.PHOTO_MISSING, detail)
    return CatalogEntry(key, photo, Blob(url), b"", name, dropped, credit=Credit())


def _record(row: _Row, table: CategoryTable) -> bytes:
    """What a worker needs of an image, with the categories that its annotations name."""
    numbers = {_whole(_annotated(raw).category_id) for raw in row.annotations}
    known = {table.find(number, None) for number in numbers}
    categories = sorted((each for each in known if each is not None), key=lambda each: each.id)
    annotations = [msgspec.Raw(open_json(bytes(raw))) for raw in row.annotations]
    return msgspec.json.encode(Record(row.image.width, row.image.height, annotations, categories))


def _whole(value: Any) -> int | None:
    """A number of 64 bits, also one that is written as text; None for anything else."""
    value = coco_json.as_whole(value)
    if isinstance(value, str) and len(value) < 32:
        try:
            value = int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and fits_int64(value) else None
