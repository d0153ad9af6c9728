"""SA-1B: photo + JSON pairs in tars, which are read in place by offset and never extracted, or in folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import msgspec
from pydantic import Field

from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Credit, ImageRecord, Region
from ...schemas.strict import Location
from ..io import failures, files
from . import coco_json, file_names
from .common import PHOTO_FIXES, Segmented, declared_size, place_masks, read_header, refuse
from .credits import read_credit
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop
from .sa1b_pairs import Groups
from .tars import TAR_FIXES, Member, list_members


class _Size(msgspec.Struct):
    width: int | None = None
    height: int | None = None
    record: msgspec.Raw = msgspec.Raw()


class _Annotation(msgspec.Struct):
    segmentation: Any = None
    id: int | None = None
    area: float | None = None
    predicted_iou: float | None = None
    stability_score: float | None = None
    crop_box: list[float] | None = None
    point_coords: list[list[float]] | None = None


class _Pair(msgspec.Struct):
    image: msgspec.Raw = msgspec.Raw(b"{}")
    annotations: list[_Annotation] = []


_SIZE = msgspec.json.Decoder(_Size)
_PAIR = msgspec.json.Decoder(_Pair)


class Sa1bOptions(SourceOptions):
    """A part of SA-1B, as tars of photo and JSON pairs, which are read in place, or as folders of pairs."""

    paths: list[Location] = Field(
        min_length=1,
        description="sa_*.tar files, or folders of pairs of a photo and a JSON. Globs are allowed.",
    )


class Sa1b(Source[Sa1bOptions]):
    """Tars and folders of SA-1B."""

    title = "SA-1B"
    options_type = Sa1bOptions
    recipe = "identify"
    names_categories = False
    paper_size = (83_000, 2_300_000)
    checks_masks = True
    fixes = PHOTO_FIXES | TAR_FIXES | {"area_differs": "the mask's own area counts"}

    def places(self) -> list[str]:
        return self.options.paths

    def fingerprint(self, catalog: Catalog) -> dict[str, str]:
        return {
            url: self._list(catalog, url).digest() if files.is_folder(url) else files.version(url)
            for url in self._paths()
        }

    def catalog(self, catalog: Catalog) -> Iterator[CatalogEntry]:
        """Tars and folders in the configuration's order; in each, pairs by their first member."""
        paths = self._paths()
        folders = {url: list(self._folder(url, catalog)) for url in paths if files.is_folder(url)}
        across = _pairs_across(folders)
        for url in paths:
            members = folders[url] if url in folders else _tar(url, catalog.notes)
            yield from _pairs(url, members, catalog, across)

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        if entry.annotation is None:
            assert entry.drop is not None, "an image without an annotation has a drop"
            raise BadRecord(entry.drop.reason, entry.drop.detail)
        where = f"{entry.annotation}"
        image.credit = None
        size, annotations = _read_pair(entry.annotation, limits, where)
        if entry.credit is not None and (found := read_credit(size.record)) != Credit():
            image.credit = found  # SA-1B itself states nothing
        image.width, image.height = declared_size(size.width, size.height)
        image.regions = [_region(number, found, where) for number, found in enumerate(annotations)]
        refuse(image, entry, limits, where)
        header = read_header(image, entry, limits, notes)
        declared = (size.width or header.width, size.height or header.height)
        if declared != (header.width, header.height):
            detail = f"photo is {header.width}x{header.height}, annotation says {declared[0]}x{declared[1]}"
            raise BadRecord(Reason.SIZE_MISMATCH, f"{where}: {detail}")
        place_masks(image, list(map(_segmented, annotations, image.regions, repeat(where))), notes)

    def _paths(self) -> list[str]:
        return file_names.expand_paths(self.options.paths, f"{self.where}.paths")

    def _list(self, catalog: Catalog, folder: str) -> file_names.Listing:
        return catalog.list_folder(folder, f"{self.where}.paths")

    def _folder(self, folder: str, catalog: Catalog) -> Iterator[Member]:
        names = self._list(catalog, folder).names or []
        endings = {file_names.ending(name) for name in names}
        if ".tar" in endings and endings.isdisjoint((".json", *file_names.PHOTO_ENDINGS)):
            raise ConfigError(f"{self.where}.paths: {folder} is a folder of tars; give {folder}/*.tar")
        for name in names:
            if file_names.is_text(name):
                yield Member(name, Blob(f"{folder.rstrip('/')}/{name}"))
                continue
            shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            detail = f"{folder}: {name!a}: the name is not UTF-8; rename it"
            yield Member(shown, None, drop(Reason.UNSAFE_NAME, detail))


def _tar(url: str, notes: list[Note]) -> Iterator[Member]:
    if file_names.ending(url) == ".json":
        raise ConfigError(f"{url}: not a tar, but one file of a folder; give {url.rpartition('/')[0]}")
    return list_members(url, notes)


def _pairs(
    url: str, members: Iterable[Member], catalog: Catalog, across: dict[str, Member]
) -> Iterator[CatalogEntry]:
    groups = Groups(members)
    for name in groups.others:
        catalog.notes.append(Note("other_file", f"{url}: {name}: neither photo nor JSON"))
    for picture, text, doubt in groups.pairs():
        if picture is None and text is not None and _place(text) in across:
            continue  # it is listed with its photo
        if text is None and picture is not None and _place(picture) in across:
            text, doubt = across[_place(picture)], ""
        member = picture or text
        assert member is not None, "a pair has one of the two at least"
        key, again = catalog.claim_key(file_names.path_stem(member.name), url)
        yield _entry(url, key, again, picture, text, doubt)


class _Placed(NamedTuple):
    """A member of one of several folders, whose name has the folder in it."""

    name: str
    member: Member


def _pairs_across(folders: dict[str, list[Member]]) -> dict[str, Member]:
    """The partners, by place, of photos and JSONs that are alone in their own folder."""
    if len(folders) < 2:
        return {}
    placed = [_Placed(_place(each), each) for members in folders.values() for each in members]
    pairs = [(picture, text) for picture, text, _ in Groups(placed).pairs() if picture and text]
    found = {picture.name: text.member for picture, text in pairs}
    return found | {text.name: picture.member for picture, text in pairs}


def _place(member: Member) -> str:
    return member.name if member.blob is None else member.blob.url


def _entry(
    url: str, key: str, again: bool, picture: Member | None, text: Member | None, doubt: str
) -> CatalogEntry:
    photo = None if picture is None else picture.blob
    annotation = None if text is None else text.blob
    problems = [member.drop for member in (text, picture) if member is not None and member.drop is not None]
    name = picture.name if picture is not None else text.name if text is not None else key
    if problems:
        dropped = problems[0]
    elif again:
        dropped = drop(Reason.DUPLICATE_KEY, f"{url}: {name}: seen before; the first one counts")
    elif doubt:
        dropped = drop(Reason.PAIR_AMBIGUOUS, f"{url}: {name}: {doubt}")
    elif picture is None:
        dropped = drop(Reason.PHOTO_MISSING, f"{url}: {name}: no photo of this name next to it")
    elif text is None:
        dropped = drop(Reason.ANNOTATION_MISSING, f"{url}: {name}: there is no JSON of this name next to it")
    else:
        dropped = None
    return CatalogEntry(key, photo, annotation, b"", name, dropped, credit=Credit())


def _read_pair(annotation: Blob, limits: Limits, where: str) -> tuple[_Size, list[_Annotation | BadRecord]]:
    reason = Reason.ANNOTATION_UNREADABLE
    try:
        length = files.fetch_size(annotation)
        if length > limits.max_record_bytes:
            detail = f"{where}: {length} bytes; limits.max_record_bytes is {limits.max_record_bytes}"
            raise BadRecord(reason, detail)
        return files.decoded(lambda: files.fetch(annotation), lambda data: _decode(data, where))
    except _Odd as odd:
        return _read_tolerantly(odd.data, where)
    except OSError as error:
        raise failures.to_failure(error, reason, reason, "fetch it again", where) from error


class _Odd(BadRecord):
    """JSON that is not clean as a whole; its `data` may be so in parts."""

    def __init__(self, data: bytes, detail: str):
        super().__init__(Reason.ANNOTATION_UNREADABLE, detail)
        self.data = data


def _decode(data: bytes, where: str) -> tuple[_Size, list[_Annotation | BadRecord]]:
    try:
        pair = _PAIR.decode(data)
        size = _SIZE.decode(pair.image)
        size.record = pair.image
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _Odd(data, f"{where}: {error}") from error
    return size, list(pair.annotations)


def _read_tolerantly(data: bytes, where: str) -> tuple[_Size, list[_Annotation | BadRecord]]:
    """Annotations one by one, where something is wrong with one of them. The mask is what counts."""
    try:
        raw = coco_json.parse_json(data)
    except ValueError as error:
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"{where}: not JSON: {error}") from error
    values = coco_json.as_list(raw.get("annotations")) if isinstance(raw, dict) else None
    if values is None:
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, f"{where}: the list `annotations` is missing")
    image = coco_json.as_image(raw.get("image"))
    found: list[_Annotation | BadRecord] = []
    for number, value in enumerate(values):
        try:
            found.append(coco_json.as_struct(value, _Annotation, ("segmentation",)))
        except ValueError as problem:
            given = coco_json.as_whole(value.get("id")) if isinstance(value, dict) else None
            name = _name(number, given if type(given) is int else None)
            detail = f"{where}: {name}: {problem}"
            found.append(BadRecord(Reason.ANNOTATION_UNREADABLE, detail))
    return _Size(image.width, image.height, image.record), found


def _region(number: int, annotation: _Annotation | BadRecord, where: str) -> Region:
    if isinstance(annotation, BadRecord):
        return Region(number, None, drop=drop(annotation.reason, annotation.detail))
    scores = {
        name: value
        for name, value in (
            ("predicted_iou", annotation.predicted_iou),
            ("stability_score", annotation.stability_score),
        )
        if value is not None
    }
    return Region(
        number,
        None,
        source_id=annotation.id,
        source_scores=scores,
        crop_box=annotation.crop_box,
        point_coords=annotation.point_coords,
    )


def _segmented(annotation: _Annotation | BadRecord, region: Region, where: str) -> Segmented | None:
    if isinstance(annotation, BadRecord):
        return None
    name = f"{where}: {_name(region.id, region.source_id)}"
    return Segmented(annotation.segmentation, annotation.area, name)


def _name(place: int, source_id: int | None) -> str:
    """An annotation by its id, or by its position if it has none."""
    return f"annotation at position {place}" if source_id is None else f"annotation {source_id}"
