"""JSON as publishers ship it: fast when it is clean, otherwise tolerant, so that a bad record costs only
itself.

A document of COCO's panoptic or instances layout is parsed by msgspec with segments and instances left as
bytes. If msgspec refuses anything, the document is read again element by element, and what is not clean JSON
is kept to be reported by whoever reads it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from ...schemas.errors import ConfigError
from ...schemas.secrets import open_name
from ..io import failures, files
from ..io.file_kinds import what_is

log = logging.getLogger(__name__)

Record = TypeVar("Record", bound=msgspec.Struct)


class Image(msgspec.Struct):
    """An element of `images`; sizes in pixels. `record` is all of it as it was written."""

    id: int | str | None = None
    file_name: str | None = None
    width: int | None = None
    height: int | None = None
    record: msgspec.Raw = msgspec.Raw()


class Annotation(msgspec.Struct):
    """An element of `annotations`: one image's label map and segments, and what is wrong with it."""

    file_name: str | None = None
    image_id: int | str | None = None
    segments_info: msgspec.Raw = msgspec.Raw()
    problem: str = ""


class Document(msgspec.Struct):
    """A COCO-panoptic JSON file, or one image's own `panseg_info` file with `segments_info` at the top."""

    images: list[Image] | None = None
    annotations: list[Annotation] | None = None
    categories: msgspec.Raw = msgspec.Raw()
    segments_info: msgspec.Raw = msgspec.Raw()
    file_name: str | None = None
    image_id: int | str | None = None
    licenses: msgspec.Raw = msgspec.Raw()


class Instances(msgspec.Struct):
    """A COCO-instances JSON file; each element of `annotations` is left as it was written."""

    images: list[Image] | None = None
    annotations: list[msgspec.Raw] | None = None
    categories: msgspec.Raw = msgspec.Raw()
    licenses: msgspec.Raw = msgspec.Raw()


AnyDocument = TypeVar("AnyDocument", Document, Instances)


class _Layout(NamedTuple, Generic[AnyDocument]):
    """How a document is read: its type, an element of `annotations` made of a parsed value, what to give."""

    kind: type[AnyDocument]
    element: Callable[[Any], Any]
    give: str


class _Records(msgspec.Struct):
    """A document's images as they were written."""

    images: list[msgspec.Raw] | None = None


_MAX_DIGITS = 1_000

_BLANK = re.compile(r"[ \t\r\n]*")


def read_document(url: str) -> Document:
    """Parse a panoptic annotation file. Local files are mapped: segments stay on the disk until asked for.

    Raises:
        ConfigError: it cannot be read, is not JSON, or is no such document; names file and place.
        SourceUnavailable: it cannot be read now.
    """
    document = _read(url, _Layout(Document, as_annotation, "give the panoptic JSON"))
    if document.segments_info and document.annotations is None:
        single = Annotation(document.file_name, document.image_id, document.segments_info)
        document.annotations = [single]
    _open_names(url, [*(document.images or ()), *(document.annotations or ())])
    if document.annotations is None:
        raise ConfigError(f"{url}: the list `annotations` is missing; give the panoptic JSON")
    if document.annotations and not any(
        found.segments_info or found.problem for found in document.annotations
    ):
        raise ConfigError(
            f"{url}: annotations without `segments_info`; give the panoptic JSON, or read an instances file "
            "as `source: coco`"
        )
    return document


def read_instances(url: str, field: str = "segmentation") -> Instances:
    """Parse an instances file, or a bare list of its annotations. Local files are mapped.

    Args:
        url: of the file.
        field: that says where an object is: "segmentation", or "bbox" of a file that is read for its boxes.

    Raises:
        ConfigError, SourceUnavailable: as `read_document`.
    """
    document = _read(url, _Layout(Instances, as_element, "give the instances JSON"))
    _open_names(url, document.images or [])
    if document.annotations is None:
        raise ConfigError(f"{url}: the list `annotations` is missing; give the instances JSON")
    if document.annotations and not _any_has(field, document.annotations):
        what = "give a file with masks" if field == "segmentation" else "give a file with boxes"
        if _any_has("segments_info", document.annotations):
            what = "a panoptic file: read it as `source: coconut`"
        elif field == "segmentation" and _any_has("bbox", document.annotations):
            what = "a file with boxes only: read it as `source: boxes`, which makes the masks"
        raise ConfigError(f"{url}: annotations without `{field}`; {what}")
    return document


def _any_has(field: str, annotations: Sequence[msgspec.Raw]) -> bool:
    name = f'"{field}"'.encode()
    return any(name in bytes(each) for each in annotations)


def _read(url: str, layout: _Layout[AnyDocument]) -> AnyDocument:
    try:
        data = files.read_mapped(url)
        try:
            return _decode(url, data, layout)
        except ConfigError:
            again = files.read_mapped(url)
            if bytes(again) == bytes(data):
                raise
            return _decode(url, again, layout)
    except OSError as error:
        if failures.classify(error) is failures.Kind.TRANSIENT:
            raise failures.SourceUnavailable(
                f"{url}: {failures.describe(error)}; run the same command again when the source answers"
            ) from error
        raise ConfigError(f"{url}: cannot be read ({failures.describe(error)}); correct the path") from error


def _open_names(url: str, elements: Sequence[Image | Annotation]) -> None:
    """Take secrets out of the names of files, which are published with the corpus."""
    signed = 0
    for each in elements:
        if each.file_name is not None and (name := open_name(each.file_name)) is not each.file_name:
            signed += name != each.file_name
            each.file_name = name
    if signed:
        log.warning(
            "%s: %d file names hold signed URLs, whose signatures were removed: %s", url, signed, _SIGNED
        )


_SIGNED = (
    "they would be published. Photos and label maps are found by the names without signatures; if only the "
    "signed addresses can be read, fetch the files first and give their folder"
)


def _decode(url: str, data: Any, layout: _Layout[AnyDocument]) -> AnyDocument:
    try:
        document = msgspec.json.decode(data, type=layout.kind)
        records = msgspec.json.decode(data, type=_Records).images
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _read_tolerantly(url, bytes(data), layout)
    for image, record in zip(document.images or (), records or (), strict=True):
        image.record = record
    return document


def parse_json(data: bytes) -> Any:
    """Parse JSON with NaN and broken UTF-8 let through (as lone surrogates); `problem_of` finds them.

    Raises:
        ValueError: not JSON even so; the message says where.
    """
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if words := what_is(data):
            raise ValueError(words) from error
        raise


def _whole(digits: str) -> int | float:
    """A whole number; one of more digits than Python reads is infinite, which `problem_of` finds."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def problem_of(value: Any) -> str:
    """What keeps a parsed value from being clean JSON: "" if nothing does."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "text that is not UTF-8"
    except ValueError:
        return "NaN or infinity"
    except RecursionError:
        return "nested too deeply"
    return ""


def as_struct(value: Any, kind: type[Record], needed: tuple[str, ...]) -> Record:
    """A parsed value as far as it is what it should be: a field that nobody needs costs no mask.

    Args:
        value: an element of a list, from `parse_json`.
        kind: what it should be. Numbers may be text or whole floats; fields that it does not have count
            for nothing.
        needed: fields that must be right where they are; any other gets its default if it is not.

    Raises:
        ValueError: it is no object, or a needed field is missing or is not what it should be.
    """
    if not isinstance(value, dict):
        raise ValueError("not an object")
    kept = {}
    for field in msgspec.structs.fields(kind):
        if field.encode_name not in value:
            if field.required:
                raise ValueError(f"no `{field.encode_name}`")
            continue
        found = value[field.encode_name]
        problem = problem_of(found)
        try:
            if not problem:
                read = msgspec.convert(found, field.type, strict=False)
                problem = problem_of(read)  # the text "nan" is a number by then
                kept |= {} if problem else {field.name: read}
        except msgspec.ValidationError:
            problem = f"cannot read {shortened(found)}"
        if problem and field.encode_name in needed:
            raise ValueError(f"`{field.encode_name}`: {problem}")
    return kind(**kept)


_ELEMENT = frozenset({"id", "image_id", "file_name", "segments_info", "segmentation"})
"""Fields by which an object is an element itself, and not a list of them by id."""


def as_list(value: Any) -> list[Any] | None:
    """The elements of a list, also of one that is written as an object of them by id, or as its only element.

    An element without an `id` gets the one that it is listed by. None if the value is something else.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return None
    if not _ELEMENT.isdisjoint(value):
        return [value]
    if not value or not all(isinstance(each, dict) for each in value.values()):
        return None
    return [{"id": key} | each for key, each in value.items()]


def shortened(value: Any, length: int = 40) -> str:
    """A parsed value as JSON for a message."""
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _read_tolerantly(url: str, data: bytes, layout: _Layout[AnyDocument]) -> AnyDocument:
    """Read a document one element after the other; only one is held as Python objects at a time."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    document = layout.kind()
    images: list[Image] = []
    annotations: list[Any] = []
    bare = layout.kind is Instances and text.lstrip().startswith("[")  # the list `annotations` alone
    if bare:
        text = f'{{"annotations":\n{text}}}'
    blocks = {field.name for field in msgspec.structs.fields(layout.kind)}
    try:
        for name, value, is_element in _members(text, ("images", "annotations")):
            if name in ("images", "annotations"):
                values = [value] if is_element else as_list(value)
                if values is None and value:
                    detail = f"`{name}` is {shortened(value)}, not a list; {layout.give}"
                    raise ConfigError(f"{url}: {detail}")
                if values is not None and name == "images":
                    document.images = images
                    images.extend(map(as_image, values))
                elif values is not None:
                    document.annotations = annotations
                    annotations.extend(map(layout.element, values))
            elif name in ("categories", "segments_info", "licenses") and name in blocks:
                setattr(document, name, as_raw(value))
            elif name in ("file_name", "image_id") and name in blocks and isinstance(value, str | int):
                setattr(document, name, value)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno - bare}, column {error.colno}"
        if text.lstrip().startswith("["):
            detail = f"a list, not an object; {layout.give}, or the folder of one JSON per image"
            raise ConfigError(f"{url}: {detail}") from error
        told = what_is(data) or f"{error.msg} at {place}"
        told += "" if "; " in told else "; fetch it again or correct it there"
        raise ConfigError(f"{url}: not JSON: {told}") from error
    except RecursionError as error:
        raise ConfigError(f"{url}: not an annotation file: nested too deeply") from error
    return document


def _members(text: str, lists: tuple[str, ...]) -> Iterator[tuple[str, Any, bool]]:
    """The top object's members as (name, value, False); the named lists' elements one by one, with True."""
    decoder = json.JSONDecoder(parse_int=_whole)

    def blank(at: int) -> int:
        found = _BLANK.match(text, at)
        return found.end() if found else at

    def expect(at: int, choices: str) -> int:
        at = blank(at)
        if text[at : at + 1] not in tuple(choices):
            raise json.JSONDecodeError(f"expected {' or '.join(choices)}", text, at)
        return at + 1

    at = blank(expect(0, "{"))
    if text[at : at + 1] == "}":
        return
    while True:
        name, at = decoder.raw_decode(text, blank(at))
        if not isinstance(name, str):
            raise json.JSONDecodeError("expected a name", text, at)
        at = blank(expect(at, ":"))
        if name in lists and text[at : at + 1] == "[":
            at = blank(at + 1)
            if text[at : at + 1] == "]":
                yield name, [], False
                at += 1
            else:
                while True:
                    value, at = decoder.raw_decode(text, blank(at))
                    yield name, value, True
                    at = expect(at, ",]")
                    if text[at - 1] == "]":
                        break
        else:
            value, at = decoder.raw_decode(text, at)
            yield name, value, False
        at = expect(at, ",}")
        if text[at - 1] == "}":
            break
    if blank(at) != len(text):
        raise json.JSONDecodeError("text after the end", text, blank(at))


def as_image(value: Any) -> Image:
    """An image as far as it is clean; what is not is left out, and its annotation then misses it."""
    if not isinstance(value, dict):
        return Image()
    image = as_struct(value | {"id": as_whole(value.get("id"))}, Image, ())
    image.file_name = image.file_name and open_name(image.file_name)
    image.record = as_raw(value)
    return image


def as_whole(value: Any) -> Any:
    """A float without a fraction as the whole number it is; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_annotation(value: Any) -> Annotation:
    """An annotation as far as it is clean, with its problem."""
    if not isinstance(value, dict):
        return Annotation(problem="not an object")
    name, image_id = value.get("file_name"), as_whole(value.get("image_id"))
    found = Annotation(segments_info=as_raw(value.get("segments_info")))
    if isinstance(image_id, str | int):
        found.image_id = image_id
    elif image_id is not None:
        found.problem = "`image_id` is neither a number nor a text"
    if isinstance(name, str):
        found.file_name = name
    elif name is not None:
        found.problem = "`file_name` is not a text"
    if problem_of([name, image_id]):
        found.problem = problem_of([name, image_id])
        found.file_name = None if name is None else str(name).encode("utf-8", "replace").decode()
    found.file_name = found.file_name and open_name(found.file_name)
    return found


def as_element(value: Any) -> msgspec.Raw:
    """An element of a list as JSON text, also one that is null."""
    return as_raw(value) if value is not None else msgspec.Raw(b"null")


def as_raw(value: Any) -> msgspec.Raw:
    """The value as JSON text again: ASCII, with NaN and lone surrogates where it had them.

    What JSON does not know, as a time in a Parquet file, is written as text.
    """
    return msgspec.Raw() if value is None else msgspec.Raw(json.dumps(value, default=str).encode())
