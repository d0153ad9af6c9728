"""SA-1B: photo + JSON pairs in tars, which are read in place by offset and never extracted, or in folders."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
from pydantic import Field

from ...filters import rle
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Credit, Drop, ImageRecord, Region
from ...schemas.strict import Location
from ..io import failures, files
from ..io.file_kinds import what_is
from . import coco_json, file_names
from .common import PHOTO_FIXES, declared_size, read_header, refuse
from .credits import read_credit
from .protocols import Catalog, CatalogEntry, Note, Source, SourceOptions, drop
from .sa1b_pairs import Groups


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


_HEADER_BLOCK = 16 << 10
"""Bytes asked of an object store for a tar's header; the next one is a photo away."""

_SIZE = msgspec.json.Decoder(_Size)
_PAIR = msgspec.json.Decoder(_Pair)


class _Member(NamedTuple):
    """A file of a tar or folder; `drop` says why it cannot be used."""

    name: str
    blob: Blob | None
    drop: Drop | None = None


class Sa1bOptions(SourceOptions):
    """A part of SA-1B, as tars of photo and JSON pairs, which are read in place, or as folders of pairs."""

    paths: list[Location] = Field(
        description="sa_*.tar files, or folders of pairs of a photo and a JSON. Globs are allowed."
    )


class Sa1b(Source[Sa1bOptions]):
    """Tars and folders of SA-1B."""

    title = "SA-1B"
    options_type = Sa1bOptions
    recipe = "identify"
    names_categories = False
    paper_size = (83_000, 2_300_000)
    checks_masks = True
    fixes = PHOTO_FIXES | {
        "area_differs": "the mask's own area counts",
        "other_file": "not read",
        "tar_after_end": "not read; fetch the tar again if it should hold more",
        "tar_without_end": "the tar may have been cut between two members; "
        "compare its size with the publisher's",
    }

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
        _place_masks(image, annotations, where, notes)

    def _paths(self) -> list[str]:
        return file_names.expand_paths(self.options.paths, f"{self.where}.paths")

    def _list(self, catalog: Catalog, folder: str) -> file_names.Listing:
        return catalog.list_folder(folder, f"{self.where}.paths")

    def _folder(self, folder: str, catalog: Catalog) -> Iterator[_Member]:
        names = self._list(catalog, folder).names or []
        endings = {file_names.ending(name) for name in names}
        if ".tar" in endings and endings.isdisjoint((".json", *file_names.PHOTO_ENDINGS)):
            raise ConfigError(f"{self.where}.paths: {folder} is a folder of tars; give {folder}/*.tar")
        for name in names:
            if file_names.is_text(name):
                yield _Member(name, Blob(f"{folder.rstrip('/')}/{name}"))
                continue
            shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            detail = f"{folder}: {name!a}: the name is not UTF-8; rename it"
            yield _Member(shown, None, drop(Reason.UNSAFE_NAME, detail))


def _tar(url: str, notes: list[Note]) -> Iterator[_Member]:
    """The members of a tar, from its headers alone. What is cut or broken becomes a member with a drop.

    Raises:
        ConfigError: nothing in it can be read.
    """
    found = 0
    try:
        with files.open_url(url, _HEADER_BLOCK) as file:
            size = file.seek(0, 2)
            file.seek(0)
            archive = _opened(file)
            after_end = None
            while True:
                if (member := _next(archive)) is None:
                    if (following := _after_zeros(archive.offset, file)) is None:
                        break
                    after_end, archive.offset = archive.offset, following
                    continue
                after_end = None
                vars(archive)["members"].clear()  # a tar of SA-1B has 22,000, which tarfile would keep
                found += 1
                if not member.isdir():
                    yield _checked(member, url, size)
            broken = None if after_end is not None else _broken_at(archive, file, size)
            if after_end is not None:
                what = f"the {size - archive.offset} bytes from byte {archive.offset} on are not read"
                notes.append(Note("tar_after_end", f"{url}: the tar ends at byte {after_end}; {what}"))
            if archive.offset == size:
                detail = f"{url}: ends at byte {size} without an end mark"
                notes.append(Note("tar_without_end", detail))
    except tarfile.TarError as error:
        start = b"" if found else files.fetch(Blob(url), 0, 64)
        if start and file_names.ending(url) == ".json":
            folder = url.rpartition("/")[0]
            raise ConfigError(f"{url}: not a tar, but one file of a folder; give {folder}") from error
        if start.startswith(b"\x1f\x8b"):
            raise ConfigError(f"{url}: gzipped; unpack it with gunzip, members are read by offset") from error
        if start and (words := what_is(start, "tar")):
            raise ConfigError(f"{url}: not a tar: {words}") from error
        raise ConfigError(f"{url}: not a readable tar ({error}); fetch it again") from error
    if broken is not None:
        if not found:
            raise ConfigError(f"{url}: broken at byte {broken}, no member can be read; fetch it again")
        detail = f"{url}: broken at byte {broken}; what follows cannot be read; fetch the tar again"
        yield _Member(
            f"{file_names.stem(url)}-from-byte-{broken}.json",
            None,
            drop(Reason.ANNOTATION_UNREADABLE, detail),
        )


def _pairs(
    url: str, members: Iterable[_Member], catalog: Catalog, across: dict[str, _Member]
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
    member: _Member


def _pairs_across(folders: dict[str, list[_Member]]) -> dict[str, _Member]:
    """The partners, by place, of photos and JSONs that are alone in their own folder."""
    if len(folders) < 2:
        return {}
    placed = [_Placed(_place(each), each) for members in folders.values() for each in members]
    pairs = [(picture, text) for picture, text, _ in Groups(placed).pairs() if picture and text]
    found = {picture.name: text.member for picture, text in pairs}
    return found | {text.name: picture.member for picture, text in pairs}


def _place(member: _Member) -> str:
    return member.name if member.blob is None else member.blob.url


def _opened(file: Any) -> tarfile.TarFile:
    """The archive, with its first header read.

    Raises:
        tarfile.TarError: it is not a tar.
    """
    try:
        return tarfile.open(fileobj=file, mode="r:", errorlevel=0)
    except (ValueError, EOFError, OverflowError) as error:
        raise tarfile.ReadError(str(error)) from error


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next header; None where headers end or break, which `_broken_at` tells apart."""
    try:
        return archive.next()
    except (tarfile.TarError, ValueError, EOFError, OverflowError):
        return None


def _after_zeros(start: int, file: Any) -> int | None:
    """Where something follows a tar's end mark, as in tars after one another; None if nothing does."""
    file.seek(start)
    at = start
    while block := file.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return at if at > start else None
        at += len(block)
    return None


def _broken_at(archive: tarfile.TarFile, file: Any, size: int) -> int | None:
    """Where a tar stops being one; None if it ends as it should, in zeros.

    Also None if the data of its last member is cut: that member has its own drop by then.
    """
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) == tarfile.BLOCKSIZE and not block.strip(b"\0"):
        return None
    return None if archive.offset >= size else archive.offset


def _checked(member: tarfile.TarInfo, url: str, size: int) -> _Member:
    name = member.name
    while name.startswith("./"):
        name = name[2:]
    where = f"{url}: member {name!r}"
    reason = Reason.ANNOTATION_UNREADABLE if file_names.ending(name) == ".json" else Reason.PHOTO_UNREADABLE
    if not file_names.is_safe(name):
        return _Member(
            name, None, drop(Reason.UNSAFE_NAME, f"{where}: {file_names.why_unsafe(name)}; not opened")
        )
    if member.issym() or member.islnk():
        return _Member(
            name,
            None,
            drop(Reason.UNSAFE_NAME, f"{where}: is a link, which is not followed; put the file itself there"),
        )
    if not member.isreg() or member.sparse is not None:
        return _Member(name, None, drop(reason, f"{where}: not a plain file"))
    if member.offset_data + member.size > size:
        detail = f"cut short at byte {size} of the tar, {member.offset_data + member.size} needed"
        return _Member(name, None, drop(reason, f"{where}: {detail}; fetch the tar again"))
    return _Member(name, Blob(url, member.offset_data, member.size))


def _entry(
    url: str, key: str, again: bool, picture: _Member | None, text: _Member | None, doubt: str
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


def _place_masks(
    image: ImageRecord, annotations: list[_Annotation | BadRecord], where: str, notes: list[Note]
) -> None:
    good = [
        (region, annotation)
        for region, annotation in zip(image.regions, annotations, strict=True)
        if isinstance(annotation, _Annotation)
    ]
    masks = rle.check_all([annotation.segmentation for _, annotation in good], image.height, image.width)
    for (region, annotation), mask in zip(good, masks, strict=True):
        if isinstance(mask, BadRecord):
            region.drop = drop(mask.reason, f"{where}: {_name(region.id, region.source_id)}: {mask.detail}")
            continue
        region.rle, region.area, region.bbox = mask
        if annotation.area is not None and annotation.area != region.area:
            detail = f"{where}: {_name(region.id, region.source_id)}: declared {annotation.area:g}"
            notes.append(Note("area_differs", f"{detail}, mask has {region.area}", region.id))


def _name(place: int, source_id: int | None) -> str:
    """An annotation by its id, or by its position if it has none."""
    return f"annotation at position {place}" if source_id is None else f"annotation {source_id}"
