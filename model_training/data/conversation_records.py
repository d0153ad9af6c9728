"""Reads the records of conversations and of the released code's region data, in every form they come in.

Files are `.json` (a list), `.jsonl` and `.parquet`; a folder stands for its Parquet files, a glob for the
files it names. Records of all forms become `Record`, so that nothing else needs to know about them.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from ...filters import rle
from ...pipeline.io import files
from ...pipeline.io.file_kinds import what_is
from ...pipeline.io.tables import TableFile
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import Blob
from ..model.layout import IMAGE

_log = logging.getLogger(__name__)

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
"""What the forms call the two who take turns."""

_COLUMNS = (
    *("id", "image_id", "image_name", "image", "images", "image_file", "image_path", "video"),
    *("conversations", "messages"),
    *("mask_rle", "mask_rles", "captions", "annotations"),
)


class Turn(msgspec.Struct):
    """What one speaker says in one turn, named as the file names them."""

    speaker: str = msgspec.field(name="from")
    value: str = ""


class CaptionedMask(msgspec.Struct):
    """A region of the released code's region data: its number in the record, canonical mask and caption."""

    id: int
    size: tuple[int, int]
    counts: str
    caption: str


class Record(msgspec.Struct):
    """One conversation, or one group of an image's regions.

    Its JSON is part of what identifies the data to checkpoints: what a release has not known yet is left out
    where it is unset.

    Attributes:
        conversations: the turns, without a system turn; empty for regions.
        image: path of the only photo, or None if it is embedded or there is none.
        images: of several photos, the path of each, "" where it is embedded.
        photo_bytes: of several photos, the number of bytes of each that is embedded, 0 where it is a file.
        regions: the regions to caption; a mask without counts is the whole image.
        problem: reason and detail, if the record cannot be trained on.
    """

    conversations: list[Turn]
    id: str | int | None = None
    image: str | None = None
    images: list[str] | UnsetType = UNSET
    photo_bytes: list[int] | UnsetType = UNSET
    regions: list[CaptionedMask] | UnsetType = UNSET
    problem: tuple[str, str] | UnsetType = UNSET


class _Unusable(Exception):
    """A record that cannot be trained on, although its form is known: the reason and the detail."""


class Photo(NamedTuple):
    """A photo as a record names it: its path, or "" and its bytes; and its file's name, "" if not known."""

    path: str
    data: bytes
    name: str


class Found(NamedTuple):
    """What becomes of a record, or of a group of its regions.

    Attributes:
        record: the record.
        photo: its embedded photos, one after the other.
        place: number of the record in its file, from 0.
        names: of the files of its photos, "" where it is not known.
        number: the id that its publisher may have given to its photo.
        first: false for the further groups of an image's regions.
    """

    record: Record
    photo: bytes
    place: int
    names: tuple[str, ...] = ()
    number: str | int | None = None
    first: bool = True


def list_files(path: str) -> list[str]:
    """The files that a path, folder or glob stands for, sorted.

    Raises:
        ConfigError: there is none, or one of another form.
    """
    found: dict[str, None] = {}  # a glob may name a folder and the files in it
    try:
        for each in files.expand(path):
            found |= dict.fromkeys(_parquet_files(each) if files.is_folder(each) else [each])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give a file of conversations") from error
    if not found:
        raise ConfigError(f"{path}: no such file; give a file of conversations, or a folder of Parquet files")
    for each in found:
        if Path(each).suffix.lower() not in _READERS:
            raise ConfigError(f"{each}: conversations have to be a .json, .jsonl or .parquet file")
    return list(found)


def _parquet_files(folder: str) -> list[str]:
    inside = sorted((url, name) for url, name in files.walk(folder))
    seen = [url for url, name in inside if not any(part.startswith(".") for part in name.split("/"))]
    if found := [url for url in seen if url.lower().endswith(".parquet")]:
        return found
    if any(url.endswith(".arrow") for url in seen):
        what = (
            "a folder of `save_to_disk`, which is not read; write the data set with `to_parquet`, and give "
            "that file"
        )
        raise ConfigError(f"{folder}: {what}")
    raise ConfigError(f"{folder}: no .parquet file in this folder; give a file, or another folder")


def read_records(path: str, regions_per_group: float) -> Iterator[Found]:
    """The records of one file; an image with many regions becomes several of them.

    Each region that cannot be used becomes a record of its own, whose `problem` says why. Images without
    regions become no record, which a warning says.

    Raises:
        ConfigError: the file cannot be read, or a record is of no known form; the message names it.
    """
    import pyarrow as pa

    broken = (OSError, msgspec.MsgspecError, UnicodeError, ValueError, KeyError, RecursionError)
    broken += (pa.ArrowException,)
    rows = _READERS[Path(path).suffix.lower()](path)
    number = 0
    empty: list[int] = []
    while True:
        try:
            row = next(rows, None)
        except ConfigError:
            raise
        except broken as error:
            raise ConfigError(f"{path}: {_why(path, number, error)}") from error
        if row is None:
            break
        number += 1
        try:
            found = list(_records_of(row, number - 1, regions_per_group))
        except (*broken, TypeError, AttributeError) as error:
            name = row.get("id") if isinstance(row, dict) else None
            which = f"record {number}" + (f" (id {name})" if name is not None else "")
            raise ConfigError(f"{path}: {which}: {_line(error)}; correct the record") from error
        if not found:
            empty.append(number)
        yield from found
    if empty:
        what = (
            f"{len(empty):,} of {number:,} records have no regions and are left out; the first is record "
            f"{empty[0]}"
        )
        _log.warning("%s: %s", path, what)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _why(path: str, number: int, error: BaseException) -> str:
    """Why the rest of a file cannot be read after the given number of records, and what to do."""
    wanted = "Parquet file" if Path(path).suffix.lower() == ".parquet" else "JSON"
    if not number and not isinstance(error, OSError):
        if words := what_is(files.fetch(Blob(path), 0, 64), wanted):
            return f"no {wanted}: {words}"
    where = f"after record {number:,}: " if number else ""
    return f"{where}{_line(error)}; repair the file"


def _from_json(path: str) -> Iterator[Any]:
    data = files.read(Blob(path)).removeprefix(_MARK)
    if data.lstrip()[:1] == b"{":  # JSON Lines by another name
        if data.split(maxsplit=1)[0] == b"{":
            raise ValueError(
                "the file has to be a list of records, or JSON Lines (one record per line), but it is a "
                "single mapping"
            )
        yield from (_decoded(line) for line in data.splitlines() if line.strip())
        return
    try:
        raws = msgspec.json.decode(data, type=list[msgspec.Raw])
    except msgspec.DecodeError:
        yield from _decoded(data, list)
        return
    yield from map(_decoded, raws)


def _from_lines(path: str) -> Iterator[Any]:
    with files.open_url(path, 8 << 20) as file:
        for number, line in enumerate(file):
            line = line if number else line.removeprefix(_MARK)
            if line.strip():
                yield _decoded(line)


def _decoded(data: bytes | msgspec.Raw, kind: type = object) -> Any:
    """JSON as Python writes it, too, where NaN and infinity, which are no JSON, stand for what is absent."""
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        try:
            found = json.loads(bytes(data), parse_constant=lambda _: None)
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a character (a lone surrogate)") from None
        except (ValueError, RecursionError):
            raise error from None
    if not isinstance(found, kind):
        raise ValueError("the file has to be a list of records, or JSON Lines (one record per line)")
    return found


_MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""


def _from_parquet(path: str) -> Iterator[Any]:
    table = TableFile(path)
    columns = [name for name in _COLUMNS if name in table.names]
    if not columns:
        seen = ", ".join(table.names)
        raise ConfigError(
            f"{path}: the table has neither a column `conversations` nor `mask_rles` (its columns: {seen}); "
            "leave this file out"
        )
    for group in table.row_groups(columns):
        for batch in group.to_batches(64):
            yield from batch.to_pylist()


_READERS = {".json": _from_json, ".jsonl": _from_lines, ".parquet": _from_parquet}


def _records_of(row: Any, place: int, regions_per_group: float) -> Iterator[Found]:
    if not isinstance(row, dict):
        raise ValueError("a record is a mapping with `conversations`, or with `mask_rles` and `captions`")
    name = row.get("id")
    name = name if isinstance(name, str | int) or name is None else str(name)
    if _has_regions(row):
        yield from _region_groups(row, name, place, regions_per_group)
        return
    try:
        turns = _turns(row)
        photos = [_photo(each) for each in _images(row, turns)]
        _check_supported(row)
    except _Unusable as error:
        yield Found(_unusable(name, error), b"", place)
        return
    record = _with_photos(Record(_with_system([turn for turn, _ in turns]), name), photos)
    yield Found(record, _joined(photos), place, tuple(each.name for each in photos), name)


def _region_groups(
    row: dict[str, Any], name: str | int | None, place: int, regions_per_group: float
) -> Iterator[Found]:
    number = name if name is not None else row.get("image_id")
    number = number if isinstance(number, str | int) else None
    name = place if name is None else name
    try:
        regions, problems = _regions(row)
        photos = [_photo(each) for each in _images(row, ())]
        _check_supported(row)
        if len(photos) != 1 and regions:
            told = f"the record has regions and {len(photos) or 'no'} image{'s' * (len(photos) > 1)}"
            reason = "regions_unusable" if photos else "conversation_without_image"
            raise _Unusable(reason, f"{told}; give the image of the regions as `image`")
    except _Unusable as error:
        yield Found(_unusable(name, error), b"", place)
        return
    groups = -int(-len(regions) // regions_per_group)
    parts = [Record([], name, regions=regions[group::groups]) for group in range(groups)]
    embedded = _joined(photos)  # one object for all, which is stored once
    found = [(_with_photos(part, photos), embedded) for part in parts]
    found += [(_unusable(name, problem), b"") for problem in problems]
    names = tuple(each.name for each in photos)
    for count, (record, data) in enumerate(found):
        yield Found(record, data, place, names, number, first=not count)


def _has_regions(row: dict[str, Any]) -> bool:
    """Whether a record is one of regions. With a conversation besides them, they have to be there."""
    masks, annotations = row.get("mask_rles"), row.get("annotations")
    if row.get("conversations") is None and row.get("messages") is None:
        return masks is not None or annotations is not None
    captioned = isinstance(annotations, list) and [
        isinstance(x, dict) and "caption" in x for x in annotations
    ]
    return bool(masks) or (bool(captioned) and all(captioned))


def _unusable(name: str | int | None, error: _Unusable) -> Record:
    reason, detail = error.args
    return Record([], name, problem=(reason, detail))


def _with_photos(record: Record, photos: Sequence[Photo]) -> Record:
    if len(photos) == 1:
        record.image = photos[0].path or None
    elif photos:
        record.images = [photo.path for photo in photos]
        record.photo_bytes = [len(photo.data) for photo in photos]
    return record


def _joined(photos: Sequence[Photo]) -> bytes:
    return b"".join(photo.data for photo in photos)


def _check_supported(row: dict[str, Any]) -> None:
    for name, what in (("video", "a video"), ("mask_rle", "a crop of its image to a mask")):
        if row.get(name) is not None:
            detail = f"`{name}` asks for {what}, which is not trained on; leave it out"
            raise _Unusable("conversation_unusable", detail)


def _images(row: dict[str, Any], turns: Sequence[tuple[Turn, list[Any]]]) -> list[Any]:
    for name in ("images", "image", "image_file", "image_path"):
        given = row.get(name)
        if given := [each for each in (given if isinstance(given, list) else [given]) if _is_given(each)]:
            return given
    return [image for _, images in turns for image in images if _is_given(image)]


def _is_given(image: Any) -> bool:
    """Whether an image is there at all; in Parquet, what is absent may be an empty mapping."""
    return any(image.values()) if isinstance(image, dict) else image not in (None, "", b"")


def _photo(image: Any) -> Photo:
    name = ""
    if isinstance(image, dict):
        data, image = image.get("bytes"), image.get("path") or image.get("url")
        name = image if isinstance(image, str) else ""
        image = data or image
        if data and isinstance(data, str):
            return Photo("", _base64(data), name)
    if isinstance(image, bytes):
        return Photo("", image, name)
    if not isinstance(image, str) or not image:
        raise ValueError("an image is a path, bytes, or a mapping of `bytes` and `path`")
    if image.startswith("data:"):
        return Photo("", _base64(image.partition(",")[2]), "")
    if len(image) > _SHORTEST_PHOTO and image.startswith(_BASE64_OF_PHOTOS):
        return Photo("", _base64(image), "")
    return Photo(image, b"", image)


_BASE64_OF_PHOTOS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk")
_SHORTEST_PHOTO = 64
"""How JPEG, PNG, WebP, GIF and BMP begin in base64, and fewer characters than any of them has."""


def _base64(text: Any) -> bytes:
    try:
        if data := base64.b64decode("".join(text.split()), validate=True):
            return data
        raise ValueError("nothing in it")
    except (binascii.Error, AttributeError, ValueError) as error:
        raise _Unusable("photo_unreadable", f"an embedded image is not base64 ({error})") from error


def _turns(row: dict[str, Any]) -> list[tuple[Turn, list[Any]]]:
    """The turns with the images that are named within them."""
    turns = row.get("conversations")
    if turns is None:
        turns = row.get("messages")
    if isinstance(turns, str):
        try:
            turns = msgspec.json.decode(turns)
        except msgspec.DecodeError as error:
            raise ValueError(f"`conversations` is a text that is not JSON ({error})") from error
    if not isinstance(turns, list):
        raise ValueError("neither a list `conversations` nor `mask_rles` with `captions`")
    return [_turn(turn) for turn in turns]


def _turn(turn: Any) -> tuple[Turn, list[Any]]:
    if not isinstance(turn, dict):
        raise ValueError("a turn is a mapping of `from` and `value`, or of `role` and `content`")
    llava = turn.get("value") is not None or turn.get("content") is None
    speaker = turn.get("from") if llava else turn.get("role")
    said = turn.get("value", "") if llava else turn["content"]
    if speaker is None or said is None:
        raise ValueError("a turn is a mapping of `from` and `value`, or of `role` and `content`")
    images: list[Any] = []
    if isinstance(said, list):
        said = "".join(_part(part, images) for part in said)
    return msgspec.convert({"from": speaker, "value": said}, Turn), images


def _part(part: Any, images: list[Any]) -> str:
    """The text of a part of a turn; an image's place, and the image goes to `images` if it is named there."""
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("video", "audio"):
        raise _Unusable("conversation_unusable", f"a turn has a part of {kind}, which is not trained on")
    if kind not in ("image", "image_url"):
        raise ValueError("a part of a turn is a mapping of `type: text` and `text`, or of `type: image`")
    images += [each for each in (part.get("image") or part.get("image_url"),) if each]
    return IMAGE


def _with_system(turns: list[Turn]) -> list[Turn]:
    """The turns without a leading system turn, whose text follows every question, as in the released code."""
    if not turns or turns[0].speaker != "system":
        return turns
    said, rest = turns[0].value.strip(), turns[1:]
    if said:
        for turn in rest:
            turn.value += f"\n{said}" if SPEAKERS.get(turn.speaker) == "human" else ""
    return rest


def _regions(row: dict[str, Any]) -> tuple[list[CaptionedMask], list[_Unusable]]:
    """The regions of a record, and why others of it cannot be used."""
    if row.get("mask_rles"):
        masks, captions = row["mask_rles"], row.get("captions")
        masks = [masks] if isinstance(masks, dict) else list(masks)
        captions = [captions] if isinstance(captions, str) else list(captions or [])
    else:
        annotations = row.get("annotations") or []
        if not all(isinstance(each, dict) for each in annotations):
            raise ValueError("an annotation is a mapping of `segmentation` and `caption`")
        masks = [each.get("segmentation") or _WHOLE_IMAGE for each in annotations]
        captions = [each.get("caption") for each in annotations]
    if len(masks) != len(captions):
        detail = f"{len(masks)} masks and {len(captions)} captions; correct the record"
        raise _Unusable("regions_unusable", detail)
    regions, problems = [], []
    for number, (mask, caption) in enumerate(zip(masks, captions, strict=True)):
        try:
            regions.append(_region(number, mask, caption))
        except _Unusable as error:
            problems.append(error)
    return regions, problems


_WHOLE_IMAGE = {"size": (0, 0), "counts": ""}


def _region(number: int, mask: Any, caption: Any) -> CaptionedMask:
    if not isinstance(caption, str) or not caption.strip():
        raise _Unusable("regions_unusable", f"region {number}: no caption; correct the record")
    if mask is _WHOLE_IMAGE:
        return CaptionedMask(number, (0, 0), "", caption)
    if not isinstance(mask, dict):
        raise _Unusable("regions_unusable", f"region {number}: no RLE of `size` and `counts`; correct it")
    try:
        checked = rle.check(mask.get("counts"), mask.get("size"))
    except BadRecord as error:
        raise _Unusable(str(error.reason), f"region {number}: {error.detail}; correct the record") from error
    return CaptionedMask(number, checked.rle.size, checked.rle.counts, caption)
