"""WebDataset tars: a photo and its masks under one key, as JSON with RLEs or polygons, or as mask images.

The shards that a build writes are such tars, so a corpus can be the source of another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

import msgspec
from pydantic import Field

from ...filters import rle
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.plain import fits_int64
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Credit, Drop, ImageRecord, Region
from ...schemas.strict import Location
from ..io import failures, files, mask_images
from ..io.photos import Header
from . import coco_json, file_names
from .categories import CategoryTable, load_categories, make_table, plain_name
from .common import PHOTO_FIXES, declared_size, read_header, refuse
from .credits import read_credit
from .instances import Choice
from .mask_reading import check_size, read_indexed, read_mask
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop
from .tars import TAR_FIXES, Member, list_members

_LOOKED_AT = 8
"""Samples that are read when the source is listed, to see whether regions have names."""

_LISTS = ("regions", "annotations", "masks", "segments_info")
"""Where a JSON has its regions; the first one counts."""

_NAMES = ("category", "category_name", "core_category", "label", "name", "class")
"""Where a region has its name; the first one that is not empty counts."""


class WebDatasetOptions(SourceOptions):
    """Tars in WebDataset's layout, such as the shards of a corpus: photo and masks under one key."""

    paths: list[Location] = Field(
        min_length=1, description="The tars, such as `out/coconut/shards/*.tar`. Globs are allowed."
    )
    layout: Literal["files", "indexed"] = Field(
        default="files",
        description="What mask images are. `files`: a mask each. `indexed`: an image whose values are the "
        "regions of its sample.",
    )
    background: list[int] = Field(default=[0], description="Values of an indexed image that are no region.")
    categories: Location | None = Field(
        default=None,
        description="JSON file with the list of categories, for regions that have only a `category_id`, and "
        "for the values of indexed images. null "
        "takes the list in the sample's JSON, if it has one.",
    )
    crowds: Choice = Field(
        default="drop",
        description="What becomes of a region with `iscrowd`, many objects under one mask: `drop` drops it "
        "as `crowd`, `keep` reads it like any other.",
    )
    unnamed: Choice = Field(
        default="drop",
        description="What becomes of a region without a name: `drop` drops it as `unknown_category`, `keep` "
        "reads it, for a recipe such as `identify`.",
    )


class _Sample(NamedTuple):
    """The members of one key, in the tar's order."""

    photos: list[Member]
    texts: list[Member]
    images: list[Member]


class Record(msgspec.Struct, omit_defaults=True):
    """What a worker needs besides photo and JSON: the mask images by their names."""

    masks: list[tuple[str, Blob]] = []


_RECORD = msgspec.json.Decoder(Record)


class WebDataset(Source[WebDatasetOptions]):
    """Tars in WebDataset's layout."""

    title = "WebDataset"
    options_type = WebDatasetOptions
    recipe = "verify"
    checks_masks = True
    fixes = (
        PHOTO_FIXES
        | TAR_FIXES
        | {
            Reason.PHOTO_MISSING: "a photo has the key of its sample and its format as the only ending, as "
            "`cup.jpg`; a key ends at the first dot",
            Reason.ANNOTATION_MISSING: "put their JSON or their mask images into the tar, under the same key",
            Reason.UNKNOWN_CATEGORY: "give the category list as `categories`; or read these regions with "
            "`unnamed: keep`",
            Reason.LABELS_UNREADABLE: "write the tar again with these mask images in it",
            Reason.SEGMENT_ABSENT: "correct these values, or write the tar again with their indexed image",
            Reason.CROWD: "by design: many objects under one mask; `crowds: keep` reads them",
            "crowd_kept": "by the option `crowds`",
            "mask_resized": "the mask is scaled to the photo, to the nearest pixel",
        }
    )

    def places(self) -> list[str]:
        return self.options.paths

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        found = {url: files.version(url) for url in self._paths()}
        if self.options.categories:
            found[self.options.categories] = files.version(self.options.categories)
        return found

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Tars in the configuration's order; in each, keys by their first member."""
        if self.options.categories is not None:
            load_categories(self.options.categories)  # an error here, not a drop for each image
        entries = self._entries(catalog)
        first = list(islice(entries, _LOOKED_AT))
        self._refuse_unnamed(first)
        yield from first
        yield from entries

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        where = str(entry.annotation or entry.file_name or entry.key)
        check_size(len(entry.record), limits, where)
        masks = dict(_RECORD.decode(entry.record).masks)
        raw: Any = {} if entry.annotation is None else _read_json(entry.annotation, limits, where)
        elements = _elements(raw, where, bool(masks) or entry.drop is not None)
        image.credit = _describe(image, raw)
        table = self._table(raw, where)
        valued: list[Any] = []
        if self.options.layout == "indexed":
            valued = [each for each in elements if _value_of(each) is not None]
            elements = [each for each in elements if _value_of(each) is None]
        named = {_mask_name(element) for element in elements}
        rest = [name for name in masks if name not in named]
        if self.options.layout == "files":
            elements += [{"mask": name} for name in rest]
        image.regions = [
            self._region(place, each, table, where, notes) for place, each in enumerate(elements)
        ]
        refuse(image, entry, limits, where)
        header = read_header(image, entry, limits, notes)
        size = _size_of(raw)
        declared = (size[0] or header.width, size[1] or header.height)
        if declared != (header.width, header.height):
            detail = f"photo is {header.width}x{header.height}, JSON says {declared[0]}x{declared[1]}"
            raise BadRecord(Reason.SIZE_MISMATCH, f"{where}: {detail}")
        _place_masks(image, elements, masks, header, limits, notes, where)
        if self.options.layout == "indexed":
            values = {each["value"]: each for each in reversed(valued)}  # the first one of a value counts
            seen: set[int] = set()
            for name in rest:
                found = read_indexed(masks[name], header, limits, notes, self.options.background)
                seen |= found.keys()
                for value, mask in found.items():
                    element = {"category_id": value} | values.get(value, {})
                    region = self._region(len(image.regions), element, table, f"{where}: {name}", notes)
                    region.rle, region.area, region.bbox = mask
                    region.source_id = value
                    image.regions.append(region)
            for each in valued:
                if each["value"] not in seen or values[each["value"]] is not each:
                    region = self._region(len(image.regions), each, table, where, notes)
                    region.drop = _unused(each["value"], seen, where)
                    image.regions.append(region)
            refuse(image, entry, limits, where)

    def _paths(self) -> list[str]:
        found = file_names.expand_paths(self.options.paths, f"{self.where}.paths")
        for url in found:
            if files.is_folder(url):
                raise ConfigError(f"{self.where}.paths: {url} is a folder; give {url.rstrip('/')}/*.tar")
        return found

    def _entries(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        for url in self._paths():
            samples: dict[str, _Sample] = {}
            others: dict[str, list[str]] = {}
            for member in list_members(url, catalog.notes):
                key, ending = _split(member.name)
                sample = samples.setdefault(key, _Sample([], [], []))
                if f".{ending}" in file_names.PHOTO_ENDINGS:
                    sample.photos.append(member)
                elif file_names.ending(member.name) == ".json":
                    sample.texts.append(member)
                elif file_names.ending(member.name) in mask_images.ENDINGS:
                    sample.images.append(member)
                else:
                    if not any(sample):
                        del samples[key]
                    others.setdefault(ending, []).append(member.name)
            for ending, names in others.items():  # such as a text for each photo
                detail = f"{url}: {len(names)} with the ending {ending!r}, such as {names[0]}"
                catalog.notes.append(Note("other_file", detail))
            for key, sample in samples.items():
                yield _entry(url, key, sample, catalog)

    def _refuse_unnamed(self, entries: list[CatalogEntry]) -> None:
        """Refuse a source whose regions have no names, if they are needed.

        Raises:
            ConfigError: none of the first samples' regions has a name.
        """
        if self.options.unnamed == "keep":
            return
        regions = [region for entry in entries for region in self.read(entry, Limits()).regions]
        reasons = {region.drop.reason for region in regions if region.drop is not None}
        if Reason.UNKNOWN_CATEGORY in reasons and not any(region.category for region in regions):
            raise ConfigError(
                f"{self.where}: no region of the first {len(entries)} samples has a name; set `unnamed: "
                "keep` and a `recipe` of the subset, such as `identify`, which names each region from its "
                "caption; "
                "or give `categories`"
            )

    def _table(self, raw: Any, where: str) -> CategoryTable | None:
        own = raw.get("categories") if isinstance(raw, dict) else None
        try:
            if self.options.categories is not None:
                return load_categories(self.options.categories)
            return make_table(own, where) if isinstance(own, list) and own else None
        except ConfigError as error:
            raise BadRecord(Reason.ANNOTATION_UNREADABLE, str(error)) from error

    def _region(
        self, place: int, element: Any, table: CategoryTable | None, where: str, notes: list[Note]
    ) -> Region:
        region = Region(place, None)
        name = f"{where}: region at position {place}"
        if not isinstance(element, dict):
            region.drop = drop(Reason.ANNOTATION_UNREADABLE, f"{name}: not an object")
            return region
        number, category_id = (coco_json.as_whole(element.get(key)) for key in ("id", "category_id"))
        region.source_id = number if fits_int64(number) else None
        region.category_id = category_id if fits_int64(category_id) else None
        texts = [element.get(key) for key in _NAMES]
        given = next((text for text in texts if isinstance(text, str) and plain_name(text)), None)
        found = table.find(region.category_id, None) if table and region.category_id is not None else None
        if given is not None and not coco_json.problem_of(given):
            region.category = plain_name(given)
        elif found is not None:
            region.category = found.name
        region.is_thing = None if found is None else found.is_thing
        crowd = element.get("iscrowd")
        if crowd in (1, "1") and self.options.crowds == "drop":
            region.drop = drop(Reason.CROWD, name)
        elif crowd in (1, "1"):
            notes.append(Note("crowd_kept", name, place))
        elif crowd not in (None, 0, "0", ""):
            detail = f"{name}: iscrowd is {str(crowd)[:40]}, but it has to be 0 or 1"
            region.drop = drop(Reason.ANNOTATION_UNREADABLE, detail)
        if region.drop is None and region.category is None and self.options.unnamed == "drop":
            region.drop = drop(Reason.UNKNOWN_CATEGORY, f"{name}: has no name")
        return region


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member, as WebDataset has them: the key ends at the first dot of the base name."""
    folder, base = file_names.folder(name), file_names.base_name(name)
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def _entry(url: str, key: str, sample: _Sample, catalog: Catalog) -> CatalogEntry:
    photos = sorted(
        sample.photos, key=lambda each: file_names.PHOTO_ENDINGS.index(file_names.ending(each.name))
    )
    photo, texts = (photos[0] if photos else None), sample.texts
    images = [*photos[1:], *sample.images]
    name = photo.name if photo else f"{key}.jpg"
    claimed, again = catalog.claim_key(key, url)
    problems: list[Drop] = [each.drop for each in (*photos[:1], *texts[:1], *images) if each.drop is not None]
    if problems:
        dropped = problems[0]
    elif again:
        dropped = drop(Reason.DUPLICATE_KEY, f"{url}: {name}: seen before; the first one counts")
    elif photo is None:
        dropped = drop(Reason.PHOTO_MISSING, f"{url}: {key}: no photo of this key in the tar")
    elif len(texts) > 1:
        listed = " and ".join(each.name for each in texts[:3])
        dropped = drop(Reason.PAIR_AMBIGUOUS, f"{url}: {key}: {listed}; keep one JSON for each key")
    elif not texts and not images:
        dropped = drop(Reason.ANNOTATION_MISSING, f"{url}: {key}: no JSON and no mask image of this key")
    else:
        dropped = None
    masks = [(file_names.base_name(each.name), each.blob) for each in images if each.blob is not None]
    annotation = texts[0].blob if texts else None
    record = msgspec.json.encode(Record(masks))
    blob = photo.blob if photo else None
    return CatalogEntry(claimed, blob, annotation, record, name, dropped, credit=Credit())


def _read_json(annotation: Blob, limits: Limits, where: str) -> Any:
    reason = Reason.ANNOTATION_UNREADABLE

    def decode(data: bytes) -> Any:
        try:
            return coco_json.parse_json(data)
        except ValueError as error:
            raise BadRecord(reason, f"{where}: not JSON: {error}") from error

    try:
        check_size(files.fetch_size(annotation), limits, where)
        return files.decoded(lambda: files.fetch(annotation), decode)
    except OSError as error:
        raise failures.to_failure(error, reason, reason, "fetch it again", where) from error


def _elements(raw: Any, where: str, may_lack: bool) -> list[Any]:
    """The regions of a JSON.

    Raises:
        BadRecord: it has none, and there are no mask images either.
    """
    if isinstance(raw, list):
        return list(raw)
    if isinstance(raw, dict):
        for name in _LISTS:
            if (found := coco_json.as_list(raw.get(name))) is not None:
                return list(found)
    if may_lack:
        return []
    raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"{where}: no list `regions` or `annotations`")


def _describe(image: ImageRecord, raw: Any) -> Credit | None:
    """The credit in a sample's JSON, None if it has none; the image gets size and name that it states."""
    if not isinstance(raw, dict):
        return None
    own = _own(raw)
    image.width, image.height = declared_size(*_size_of(raw))
    name = coco_json.as_image({"file_name": own.get("file_name")}).file_name
    if name and file_names.is_safe(name):
        image.file_name = name
    found = read_credit(bytes(coco_json.as_raw(own)))
    return found if found != Credit() else None


def _own(raw: dict[str, Any]) -> dict[str, Any]:
    """What a JSON says of its image: at its top, under `image`, or as the only element of `images`."""
    listed = coco_json.as_list(raw.get("images")) or []
    for found in (raw.get("image"), listed[0] if len(listed) == 1 else None):
        if isinstance(found, dict):
            return found
    return raw


def _size_of(raw: Any) -> tuple[int | None, int | None]:
    """(width, height) that a JSON states in pixels."""
    if not isinstance(raw, dict):
        return None, None
    own = _own(raw)
    found = coco_json.as_image({"width": own.get("width"), "height": own.get("height")})
    return found.width, found.height


def _mask_name(element: Any) -> str | None:
    """The mask image that an element names."""
    name = element.get("mask") if isinstance(element, dict) else None
    return file_names.base_name(name) if isinstance(name, str) else None


def _value_of(element: Any) -> int | None:
    """The value of an indexed image that an element is about."""
    value = element.get("value") if isinstance(element, dict) else None
    return value if type(value) is int else None


def _unused(value: int, seen: set[int], where: str) -> Drop:
    """Why an element about a value of an indexed image is no region."""
    if value in seen:
        detail = f"{where}: value {value} is named again; the first one counts"
        return drop(Reason.ANNOTATION_UNREADABLE, detail)
    return drop(Reason.SEGMENT_ABSENT, f"{where}: value {value}: no indexed image of the sample has it")


def _place_masks(
    image: ImageRecord,
    elements: list[Any],
    masks: dict[str, Blob],
    header: Header,
    limits: Limits,
    notes: list[Note],
    where: str,
) -> None:
    """Give each region its mask: of the image that it names, else what its JSON has."""
    written: list[tuple[Region, Any]] = []
    for region, element in zip(image.regions, elements, strict=True):
        if not isinstance(element, dict):
            continue
        name = _mask_name(element)
        if name is None:
            segmentation = element.get("segmentation", element.get("rle", element.get("mask")))
            written.append((region, element if "counts" in element else segmentation))
        elif region.drop is None and name not in masks:
            detail = f"{where}: region at position {region.id}: the tar has no {name} under this key"
            region.drop = drop(Reason.LABELS_UNREADABLE, detail)
        elif region.drop is None:
            try:
                found = read_mask(masks[name], header, limits, notes, region.id)
                region.rle, region.area, region.bbox = found
            except BadRecord as error:
                region.drop = drop(error.reason, f"{name}: {error.detail}")
    checked = rle.check_all([segmentation for _, segmentation in written], image.height, image.width)
    for (region, _), mask in zip(written, checked, strict=True):
        if isinstance(mask, BadRecord):
            detail = f"{where}: region at position {region.id}: {mask.detail}"
            region.drop = region.drop or drop(mask.reason, detail)
        else:
            region.rle, region.area, region.bbox = mask
