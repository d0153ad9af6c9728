"""COCONut and everything in COCO's panoptic layout: a label map per image, and a JSON record of its segments.

Two layouts. `panoptic`: JSON files (or a folder with one JSON per image, as `panseg_info/`), a folder of
label PNGs. `parquet`: the hub's rows with the PNG inside. Photos are found by name in the photo folders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import msgspec
from pydantic import Field, model_validator

from ...schemas.config import Limits
from ...schemas.errors import ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Credit, ImageRecord
from ...schemas.strict import Location
from ..io import files
from ..io.file_kinds import what_is
from ..io.tables import TableFile
from . import coco_json, file_names
from .categories import choose_table, load_categories
from .coco_json import Annotation, Image
from .common import PHOTO_FIXES
from .credits import Licenses, read_credit
from .pairing import Pairs
from .panoptic import Record, fill_image, make_record
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop


class CoconutOptions(SourceOptions):
    """One COCONut release, as COCO-panoptic JSON and PNGs or as Parquet with the PNGs inside."""

    layout: Literal["panoptic", "parquet"] = Field(
        default="panoptic",
        description="`panoptic`: JSON and a folder of PNGs. `parquet`: the form on the Hugging Face Hub, "
        "rows with the PNG inside.",
    )
    annotations: list[Location] = Field(
        min_length=1,
        description="Panoptic JSON files, folders of one JSON per image, or Parquet files. Globs are "
        "allowed.",
    )
    labels: Location | None = Field(
        default=None, description="Folder of the label PNGs, which the layout `panoptic` needs."
    )
    photos: list[Location] = Field(
        min_length=1, description="Folders in which to look for each photo by its file name, in this order."
    )
    categories: Location | None = Field(
        default=None,
        description="JSON file with the list of categories. null takes the list in the annotation file, "
        "or, if there is none, the 133 categories of COCO.",
    )

    @model_validator(mode="after")
    def _labels_given(self) -> CoconutOptions:
        if self.layout == "panoptic" and self.labels is None:
            raise ValueError("layout 'panoptic' needs `labels`, the folder of the label PNGs")
        return self


class _Row(NamedTuple):
    """One annotation on its way into the catalog; its record is made when its turn comes, to save memory."""

    image: Image | None
    annotation: Annotation
    record: Callable[[], Record]
    home: str
    licenses: Licenses
    doubt: str = ""


class Coconut(Source[CoconutOptions]):
    """One release of COCONut."""

    title = "COCONut"
    options_type = CoconutOptions
    recipe = "verify"
    paper_size = (334_000, 3_400_000)
    checks_masks = True
    fixes = PHOTO_FIXES | {
        Reason.SIZE_MISMATCH: "photo, label map and annotation come from different releases; "
        "fetch matching ones",
        Reason.DUPLICATE_KEY: "each image, and each segment id of an image, counts once; remove the repeated "
        "records from the annotations",
        Reason.UNKNOWN_CATEGORY: "give the release's category list as `categories`",
        Reason.LABELS_UNREADABLE: "put the label maps there, or fetch them again",
        Reason.SEGMENT_ABSENT: "COCONut has some of these; there is nothing to fix",
        Reason.VOID: "by design: id 0 is not a segment",
        "area_differs": "the area of the mask is used: the declared one is that of a polygon or of a crowd",
        "area_missing": "the area of the mask is used",
        "isthing_differs": "the category list is used",
        "undeclared_ids": "pixels without a record are not used",
        "label_map_without_record": "no annotation names them; they are not read",
    }

    def places(self) -> list[str]:
        return self.options.annotations

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        found: dict[str, str] = {}
        options = self.options
        for url in self._annotations():
            folder = files.is_folder(url)
            found[url] = self._list(catalog, url, "annotations").digest() if folder else files.version(url)
        for folder in options.photos:
            found[folder] = self._list(catalog, folder, "photos").digest()
        if options.labels:
            found[options.labels] = self._list(catalog, options.labels, "labels").digest()
        if options.categories:
            found[options.categories] = files.version(options.categories)
        return found

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Annotations in the order of their files, then the images of these files that have none."""
        for url in self._annotations():
            if self.options.layout == "parquet":
                rows, leftover = list(self._parquet_rows(url)), []
            elif files.is_folder(url):
                rows, leftover = self._folder_rows(url, catalog), []
            else:
                rows, leftover = self._document_rows(url)
            yield from self._entries(rows, leftover, catalog)

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        fill_image(image, entry, limits, notes, self.options.categories)

    def _annotations(self) -> list[str]:
        return file_names.expand_paths(self.options.annotations, f"{self.where}.annotations")

    def _list(self, catalog: Catalog, folder: str, option: str) -> file_names.Listing:
        return catalog.list_folder(folder, f"{self.where}.{option}")

    def _document_rows(self, url: str) -> tuple[list[_Row], list[Image]]:
        document = coco_json.read_document(url)
        table = choose_table(bytes(document.categories), url, self.options.categories)
        images = document.images or []
        licenses = Licenses(bytes(document.licenses))
        pairs = Pairs(images)
        used: set[str] = set()
        rows = []
        for annotation in document.annotations or ():
            image, doubt = pairs.find(annotation)
            if image is not None:
                used.add(_name_of(image))
            record = functools.partial(make_record, image, annotation, table)
            rows.append(_Row(image, annotation, record, url, licenses, doubt))
        return rows, [image for image in images if _name_of(image) not in used]

    def _folder_rows(self, folder: str, catalog: Catalog) -> list[_Row]:
        """A folder with one JSON per image: the files are opened by the workers."""
        rows, none = [], Licenses()
        for name in self._list(catalog, folder, "annotations").names or ():
            if name.lower().endswith(".json"):
                url = f"{folder.rstrip('/')}/{name}"
                if not file_names.is_text(name):
                    odd = Annotation(problem=f"the name {name!a} is not UTF-8; rename it")
                    rows.append(_Row(None, odd, Record, folder, none))
                    continue
                label = name[: -len(".json")] + ".png"
                rows.append(_Row(None, Annotation(label), functools.partial(Record, info=url), url, none))
        if not rows:
            raise ConfigError(f"{self.where}.annotations: {folder}: no .json file in it")
        return rows

    def _parquet_rows(self, url: str) -> Iterator[_Row]:
        import pyarrow as pa

        table, none = load_categories(self.options.categories), Licenses()
        try:
            parquet = TableFile(url)
            missing = {"mask", "segments_info"} - set(parquet.names)
            if missing:
                raise ConfigError(f"{url}: no column {sorted(missing)}; give the hub's COCONut Parquet files")
            columns = [name for name in ("segments_info", "image_info") if name in parquet.names]
            parquet.check_rows()
            for group in range(parquet.num_row_groups):
                batches = parquet.batches(group, columns)
                for row, cells in enumerate(cells for batch in batches for cells in batch.to_pylist()):
                    segments, info = map(_cell, (cells.get("segments_info"), cells.get("image_info")))
                    if isinstance(segments, list):
                        segments = {"segments_info": segments}
                    annotation = coco_json.as_annotation(segments)
                    image = None if info is None else coco_json.as_image(info)
                    record = functools.partial(make_record, image, annotation, table, (group, row))
                    yield _Row(image, annotation, record, url, none)
        except files.ReadError:
            raise
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            words = what_is(files.fetch(Blob(url), 0, 64), "Parquet file")
            detail = words or " ".join(str(error).split()) + "; fetch it again"  # Arrow's have several lines
            raise ConfigError(f"{url}: not a readable Parquet file: {detail}") from error

    def _refuse_swapped(self, photos: list[file_names.Listing], labels: file_names.Listing) -> None:
        """Refuse folders of which one has what is looked for in the other, and nothing else of use."""
        instead, here = _pictures_in(labels), [name for each in photos for name in _pictures_in(each)]
        if instead and here and all(map(_may_be_a_label, here)) and not any(map(_may_be_a_label, instead)):
            raise ConfigError(
                f"{self.where}: `photos` and `labels` are swapped: {labels.url} has photos, such as "
                f"{instead[0]}, and {photos[0].url} has label maps; exchange them"
            )

    def _entries(self, rows: list[_Row], leftover: list[Image], catalog: Catalog) -> Iterator[CatalogEntry]:
        options = self.options
        stems = {file_names.stem(_photo_name(row)) for row in rows}
        listings = [self._list(catalog, folder, "photos") for folder in options.photos]
        photos = file_names.Finder(listings, stems, file_names.PHOTO_ENDINGS, options.labels)
        find_label = None
        if options.layout == "panoptic" and options.labels is not None:
            label_listing = self._list(catalog, options.labels, "labels")
            self._refuse_swapped(listings, label_listing)
            wanted = {file_names.stem(row.annotation.file_name or _photo_name(row)) for row in rows}
            find_label = file_names.Finder([label_listing], wanted, file_names.LABEL_ENDINGS).find
            catalog.claim_files(options.labels, ".png", wanted, "label_map_without_record")
        for number, row in enumerate(rows):
            entry = _entry(number, row, photos, find_label, catalog)
            image = row.image or Image(row.annotation.image_id)
            yield catalog.without_benchmarks(entry, image.id, (image.width, image.height))
        for image in leftover:
            home = rows[0].home if rows else ""
            name = _name_of(image)
            key, _ = catalog.claim_key(file_names.path_stem(name) or "image", home)
            detail = f"{name}: listed under `images`, without an annotation"
            dropped = drop(Reason.ANNOTATION_MISSING, detail)
            if not name:
                detail = f"{home}: an element of `images` has neither an id nor a file name"
                dropped = drop(Reason.ANNOTATION_UNREADABLE, detail)
            record = msgspec.json.encode(Record(image.width, image.height))
            yield CatalogEntry(key, None, None, record, name, dropped, credit=Credit())


def _pictures_in(listing: file_names.Listing) -> list[str]:
    """The photos and label maps of a folder."""
    return [name for name in listing.names or () if name.lower().endswith(file_names.PHOTO_ENDINGS)]


def _may_be_a_label(name: str) -> bool:
    return name.lower().endswith(file_names.LABEL_ENDINGS)


def _cell(value: Any) -> Any:
    """A cell of a table, also one that is written as JSON text."""
    try:
        return coco_json.parse_json(value.encode()) if isinstance(value, str) else value
    except ValueError:
        return value


def _entry(
    number: int, row: _Row, photos: file_names.Finder, find_label: Any, catalog: Catalog
) -> CatalogEntry:
    photo_name = _photo_name(row)
    label_name = row.annotation.file_name or f"{file_names.path_stem(photo_name)}.png"
    numbered = f"{file_names.stem(row.home)}-{number}"
    name = "" if row.doubt else file_names.path_stem(photo_name)
    key, again = catalog.claim_key(name or numbered, row.home)
    photo = annotation = None
    dropped = None
    if row.annotation.problem:
        dropped = drop(
            Reason.ANNOTATION_UNREADABLE, f"{row.home}: annotation {number}: {row.annotation.problem}"
        )
    elif row.doubt:
        dropped = drop(Reason.PAIR_AMBIGUOUS, f"{row.home}: annotation {number}: {row.doubt}")
    elif not photo_name:
        dropped = drop(
            Reason.ANNOTATION_UNREADABLE,
            f"{row.home}: annotation {number}: names no file; give it a `file_name`",
        )
    elif not file_names.is_safe(photo_name) or not file_names.is_safe(label_name):
        dropped = drop(
            Reason.UNSAFE_NAME,
            f"{row.home}: {photo_name!r}, {label_name!r}: {_why_unsafe(photo_name, label_name)}; not opened",
        )
    else:
        photo_url = photos.find(photo_name)
        label_url = row.home if find_label is None else find_label(label_name)
        photo = None if photo_url is None else Blob(photo_url)
        annotation = None if label_url is None else Blob(label_url)
        if again:
            dropped = drop(
                Reason.DUPLICATE_KEY,
                f"{row.home}: {photo_name}: an image of this name was annotated before; the first one counts",
            )
        elif photo is not None and photo_url == label_url:
            dropped = drop(Reason.PHOTO_MISSING, f"{photo}: is the label map; put the photo there")
        elif photo is None:
            dropped = drop(
                Reason.PHOTO_MISSING,
                f"{photo_name}: not found in the folders of `photos`{photos.hint(photo_name)}",
            )
        elif annotation is None:
            dropped = drop(Reason.LABELS_UNREADABLE, f"{label_name}: not in the label folder; put it there")
    record = msgspec.json.encode(row.record())
    credit = Credit() if row.image is None else read_credit(row.image.record, row.licenses)
    return CatalogEntry(key, photo, annotation, record, photo_name, dropped, credit=credit)


def _why_unsafe(*names: str) -> str:
    return next(file_names.why_unsafe(name) for name in names if not file_names.is_safe(name))


def _photo_name(row: _Row) -> str:
    if row.image is not None and row.image.file_name:
        return row.image.file_name
    return file_names.path_stem(row.annotation.file_name) + ".jpg" if row.annotation.file_name else ""


def _name_of(image: Image) -> str:
    """What an image is called: "" if it has neither a file name nor an id."""
    return image.file_name or ("" if image.id is None else str(image.id))
