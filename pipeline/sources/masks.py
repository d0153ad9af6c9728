"""Mask images: files of a mask each, or one indexed image for each photo. A list may name the regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from pydantic import Field, PositiveInt

from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Credit, ImageRecord, Region
from ...schemas.strict import Location
from ..io import files, mask_images
from ..io.photos import Header
from . import file_names
from .common import PHOTO_FIXES, read_header, refuse
from .instances import Choice
from .mask_files import PhotoNames
from .mask_names import Class, Named, read_classes, read_names
from .mask_reading import check_size, read_indexed, read_mask
from .photo_folders import claim, images_in
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop


class MasksOptions(SourceOptions):
    """Photos and mask images: a file for each mask, or one indexed image for each photo."""

    photos: list[Location] = Field(min_length=1, description="Folders of the photos.")
    masks: Location | list[Location] = Field(
        description="Folder of the mask images, or a list of such folders. It may be the folder of the "
        "photos if `names` has a line for each mask."
    )
    layout: Literal["files", "indexed"] = Field(
        default="files",
        description="`files`: an image for each mask, in a folder with the photo's name or with the photo's "
        "name at its beginning. `indexed`: an image for each photo, whose values are its regions.",
    )
    names: Location | None = Field(
        default=None,
        description="CSV or JSON lines that say which mask is of which photo, and what it shows. The columns "
        "are `mask` (Open Images: `MaskPath`), `photo` (`ImageID`), `category` (`LabelName`), `group` "
        "(`IsGroupOf`), and `value` for indexed images.",
    )
    categories: Location | None = Field(
        default=None,
        description="Names of the codes in `names`, or of the values of indexed images: a JSON list with id, "
        "name and isthing, or a CSV of code and name (Open Images: `class-descriptions-boxable.csv`).",
    )
    divisor: PositiveInt | None = Field(
        default=None,
        description="A value of an indexed image is category * divisor + number. 1000 for the instance ids "
        "of Cityscapes; null if the value is the category.",
    )
    background: list[int] = Field(
        default=[0], description="Values of an indexed image that are no region. Many tools use 255, too."
    )
    photo_suffix: str = Field(
        default="",
        description="End of a photo's name that a mask's does not have. Cityscapes: `_leftImg8bit`.",
    )
    mask_suffix: str = Field(
        default="", description="End of a mask's name. Cityscapes: `_gtFine_instanceIds`."
    )
    crowds: Choice = Field(
        default="drop",
        description="What becomes of a region that is many objects under one mask: `drop` drops it as "
        "`crowd`, `keep` reads it like any other.",
    )
    unnamed: Choice | None = Field(
        default=None,
        description="What becomes of a region without a name: `drop` drops it as `unknown_category`, `keep` "
        "reads it. null drops it if `names` or `categories` is given, and reads it otherwise.",
    )


class Piece(msgspec.Struct, omit_defaults=True):
    """A mask as the work list keeps it.

    Attributes:
        url: its file; "" if there is none.
        name: what messages call it.
        value: its value in an indexed image.
        shows: what it shows; None if nothing says so.
        group: whether it is many objects under one mask.
    """

    url: str = ""
    name: str = ""
    value: int | None = None
    shows: Class | None = None
    group: bool = False


class Record(msgspec.Struct, omit_defaults=True):
    """What a worker needs of an image: its masks, or what is known of the values of its indexed image."""

    pieces: list[Piece] = []


_RECORD = msgspec.json.Decoder(Record)


class _Photo(NamedTuple):
    url: str
    name: str


class Masks(Source[MasksOptions]):
    """Folders of photos and of mask images."""

    title = "Mask images"
    options_type = MasksOptions
    recipe = "verify"
    checks_masks = True
    fixes = PHOTO_FIXES | {
        Reason.ANNOTATION_MISSING: "put their masks there, or leave these photos out",
        Reason.PHOTO_MISSING: "put the photos there, or give these masks the names of their photos, or name "
        "them in `names`",
        Reason.SIZE_MISMATCH: "give the masks of these photos: a mask of another size is only scaled if its "
        "aspect ratio is the photo's",
        Reason.LABELS_UNREADABLE: "put these mask images there, or fetch them again",
        Reason.MASK_UNDECODABLE: "give a mask white on black, one file for each region; an image whose "
        "values are the regions needs `layout: indexed`",
        Reason.MASK_EMPTY: "leave these masks out",
        Reason.UNKNOWN_CATEGORY: "name them in `names` or `categories`; or read them with `unnamed: keep`",
        Reason.CROWD: "by design: many objects under one mask; `crowds: keep` reads them",
        "crowd_kept": "by the option `crowds`",
        "mask_resized": "the mask is scaled to the photo, to the nearest pixel",
        "line_without_mask": "no photo has such a mask; it is not read",
    }

    @classmethod
    def recipe_for(cls, options: Mapping[str, Any]) -> str | None:
        is_named = options.get("names") or options.get("categories")
        return super().recipe_for(options) if is_named else None

    def places(self) -> list[str]:
        return self._folders()

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        options = self.options
        found = {folder: self._list(catalog, folder, "photos").digest() for folder in options.photos}
        for folder in self._folders():
            found[folder] = self._list(catalog, folder, "masks").digest()
        for url in filter(None, (options.names, options.categories)):
            found[url] = files.version(url)
        return found

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Photos in the order of their folders and names, then the masks that have none."""
        options = self.options
        listings = [self._list(catalog, folder, "masks") for folder in self._folders()]
        masks = {url: name for listing in listings for url, name in images_in(listing, mask_images.ENDINGS)}
        classes = read_classes(options.categories)
        lines = read_names(options.names, f"{self.where}.names", classes) if options.names else []
        named = _named_files(listings, lines)
        listed = self._photos(catalog, masks, set(named.values()))
        found: dict[str, list[Piece]] = {photo.url: [] for photo in listed}
        lost: dict[str, tuple[list[Piece], str]] = {}
        for_all = _place_lines(lines, named, listed, found, lost, options.layout == "indexed", catalog.notes)
        if options.layout == "indexed":
            self._place(masks, listed, found, lost)
            for pieces in found.values():  # a line with the photo's name counts more than one for all photos
                if any(piece.value is None for piece in pieces):
                    pieces[:0] = for_all
        else:
            taken = {*named.values(), *found}
            rest = {url: name for url, name in masks.items() if url not in taken}
            self._place(rest, listed, found, lost)
        for photo in listed:
            yield self._entry(photo, found[photo.url], catalog)
        for name, (pieces, doubt) in lost.items():
            key, _ = catalog.claim_key(file_names.path_stem(name) or "mask", self.where)
            reason = Reason.PAIR_AMBIGUOUS if doubt else Reason.PHOTO_MISSING
            detail = doubt or f"{name}: no photo of this name in the folders of `photos`"
            record = msgspec.json.encode(Record(pieces))
            yield CatalogEntry(key, None, None, record, name, drop(reason, detail), credit=Credit())

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        where = f"masks of {entry.file_name or entry.key}"
        check_size(len(entry.record), limits, where)
        pieces = _RECORD.decode(entry.record).pieces
        if self.options.layout == "indexed" and entry.drop is None:
            self._fill_indexed(image, entry, pieces, limits, notes)
            return
        image.regions = [Region(place, None) for place in range(len(pieces))]
        for region, piece in zip(image.regions, pieces, strict=True):
            self._name(region, piece.shows, piece.group, piece.name, notes)
        refuse(image, entry, limits, where)
        header = read_header(image, entry, limits, notes)
        for region, piece in zip(image.regions, pieces, strict=True):
            if region.drop is None:
                _place_mask(region, piece, header, limits, notes)

    def _fill_indexed(
        self, image: ImageRecord, entry: CatalogEntry, pieces: list[Piece], limits: Limits, notes: list[Note]
    ) -> None:
        header = read_header(image, entry, limits, notes)
        assert entry.annotation is not None, "an image without an indexed image has a drop"
        name = str(entry.annotation)
        masks = read_indexed(entry.annotation, header, limits, notes, self.options.background)
        known = {piece.value: piece for piece in pieces if piece.value is not None}
        image.regions = []
        for place, (value, mask) in enumerate(masks.items()):
            region = Region(place, mask.rle, mask.bbox, mask.area, source_id=value)
            image.regions.append(region)
            shows, group = self._of_value(value)
            if piece := known.get(value):
                shows, group = piece.shows or shows, piece.group or group
            self._name(region, shows, group, f"{name}: value {value}", notes)

    def _of_value(self, value: int) -> tuple[Class | None, bool]:
        """What a value of an indexed image shows, and whether it is a group, which has no number."""
        divisor = self.options.divisor or 0
        is_numbered = bool(divisor) and value >= divisor
        shows = read_classes(self.options.categories).get(str(value // divisor if is_numbered else value))
        is_group = bool(divisor) and not is_numbered and shows is not None and shows.is_thing is True
        return shows, is_group

    def _name(self, region: Region, shows: Class | None, group: bool, name: str, notes: list[Note]) -> None:
        """Give a region its category; drop it if it is not to be used."""
        if shows is not None:
            region.category, region.category_id, region.is_thing = shows
        if group and self.options.crowds == "drop":
            region.drop = drop(Reason.CROWD, name)
        elif group:
            notes.append(Note("crowd_kept", name, region.id))
        if shows is None and region.drop is None and self._drops_unnamed():
            region.drop = drop(Reason.UNKNOWN_CATEGORY, f"{name}: nothing says what it shows")

    def _drops_unnamed(self) -> bool:
        options = self.options
        return options.unnamed == "drop" or (
            options.unnamed is None and bool(options.names or options.categories)
        )

    def _folders(self) -> list[str]:
        masks = self.options.masks
        return [masks] if isinstance(masks, str) else masks

    def _list(self, catalog: Catalog, folder: str, option: str) -> file_names.Listing:
        return catalog.list_folder(folder, f"{self.where}.{option}")

    def _photos(self, catalog: Catalog, masks: dict[str, str], named: set[str]) -> list[_Photo]:
        """The photos of the folders: what is no mask."""
        shared = {folder.rstrip("/") for folder in self._folders()} & {
            folder.rstrip("/") for folder in self.options.photos
        }
        found: dict[str, _Photo] = {}
        for folder in self.options.photos:
            listing = self._list(catalog, folder, "photos")
            for url, name in images_in(listing, file_names.PHOTO_ENDINGS):
                is_mask = url in named or (url in masks and folder.rstrip("/") not in shared)
                if not is_mask:
                    found.setdefault(url, _Photo(url, name))
        if not found:
            raise ConfigError(f"{self.where}.photos: no photo in {', '.join(self.options.photos)}")
        return list(found.values())

    def _place(
        self,
        masks: dict[str, str],
        listed: list[_Photo],
        found: dict[str, list[Piece]],
        lost: dict[str, tuple[list[Piece], str]],
    ) -> None:
        """Give each image that no line names to its photo, by their names; an indexed one comes first."""
        urls, suffix = {photo.name: photo.url for photo in listed}, self.options.mask_suffix
        names = PhotoNames(urls, self.options.photo_suffix, suffix)
        indexed = self.options.layout == "indexed"
        for url, name in masks.items():
            if indexed and (url in found or (suffix and not file_names.stem(name).endswith(suffix))):
                continue
            photo, doubt = names.find(name, is_whole=indexed)
            if photo is None:
                group = name if indexed else file_names.folder(name) or name
                lost.setdefault(group, ([], doubt))[0].append(Piece(url, url))
            elif indexed:
                found[urls[photo]].insert(0, Piece(url, url))
            else:
                found[urls[photo]].append(Piece(url, url))

    def _entry(self, photo: _Photo, pieces: list[Piece], catalog: Catalog) -> CatalogEntry:
        key, dropped = claim(photo.url, photo.name, catalog, self.where)
        indexed = self.options.layout == "indexed"
        indexes = [piece for piece in pieces if indexed and piece.value is None]
        rest = [piece for piece in pieces if not indexed or piece.value is not None]
        annotation = None
        if dropped is None and not (indexes if indexed else pieces):
            dropped = drop(Reason.ANNOTATION_MISSING, f"{photo.url}: no mask is of this photo")
        elif dropped is None and len(indexes) > 1:
            listed = " and ".join(piece.name for piece in indexes[:3])
            dropped = drop(Reason.PAIR_AMBIGUOUS, f"{photo.url}: {listed}; keep one of them")
        elif dropped is None and indexed:
            annotation = Blob(indexes[0].url)
        record = msgspec.json.encode(Record(rest))
        return CatalogEntry(key, Blob(photo.url), annotation, record, photo.name, dropped, credit=Credit())


def _named_files(listings: list[file_names.Listing], lines: list[Named]) -> dict[str, str]:
    """The URL of each mask file that lines name and that is there."""
    names = {line.mask for line in lines if line.mask and file_names.is_safe(line.mask)}
    finder = file_names.Finder(listings, {file_names.stem(name) for name in names}, mask_images.ENDINGS)
    return {name: url for name in sorted(names) if (url := finder.find(name)) is not None}


def _place_lines(
    lines: list[Named],
    named: dict[str, str],
    listed: list[_Photo],
    found: dict[str, list[Piece]],
    lost: dict[str, tuple[list[Piece], str]],
    indexed: bool,
    notes: list[Note],
) -> list[Piece]:
    """Give each line to its photo: the one that it names, else the one that its mask's name begins with.

    Returns those that name no photo and are for the indexed images of all photos.
    """
    folders: dict[str, list[str]] = {}
    for photo in listed:
        folders.setdefault(photo.url[: -len(photo.name) - 1], []).append(photo.name)
    listings = [file_names.Listing(url, names) for url, names in folders.items()]
    stems = {file_names.stem(line.photo) for line in lines if line.photo}
    finder = file_names.Finder(listings, stems, file_names.PHOTO_ENDINGS)
    urls = {photo.name: photo.url for photo in listed}
    by_name = PhotoNames(urls)
    for_all: list[Piece] = []
    for line in lines:
        if indexed and line.value is None:
            notes.append(Note("line_without_mask", f"line {line.line} of `names` has no `value`"))
            continue
        url, doubt = finder.find(line.photo) if line.photo else None, ""
        if not line.photo and line.mask:
            photo, doubt = by_name.find(line.mask, is_whole=False)
            url = urls[photo] if photo is not None else None
        name = f"line {line.line} of `names`: {line.mask or line.value}"
        piece = Piece(named.get(line.mask, ""), name, line.value, line.shows, line.group)
        if not indexed and not line.mask:
            notes.append(Note("line_without_mask", f"line {line.line} of `names` names no mask"))
        elif url is not None:
            found[url].append(piece)
        elif indexed and not line.photo:
            for_all.append(piece)
        else:
            lost.setdefault(line.photo or line.mask, ([], doubt))[0].append(piece)
    return for_all


def _place_mask(region: Region, piece: Piece, header: Header, limits: Limits, notes: list[Note]) -> None:
    """Give a region the mask of its own file, or a drop."""
    if not piece.url:
        detail = f"{piece.name}: not in the folders of `masks`; put it there"
        region.drop = drop(Reason.LABELS_UNREADABLE, detail)
        return
    try:
        region.rle, region.area, region.bbox = read_mask(Blob(piece.url), header, limits, notes, region.id)
    except BadRecord as error:
        region.drop = drop(error.reason, error.detail)
