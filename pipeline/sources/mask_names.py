"""Lists that say which mask is of which photo and what it shows: CSV, as of Open Images, or JSON lines."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import msgspec

from ...schemas.errors import ConfigError
from ...schemas.records import Blob
from ..io import failures, files
from ..io.file_kinds import what_is
from . import coco_json, file_names
from .categories import load_categories, plain_name

_COLUMNS = {
    "mask": ("mask", "maskpath", "maskfile", "maskfilename"),
    "photo": ("photo", "imageid", "image", "imagepath", "filename"),
    "value": ("value", "index"),
    "category": ("category", "labelname", "label", "name", "class", "classname", "displayname"),
    "group": ("group", "isgroupof", "iscrowd"),
}
"""By field of `Named`, the names of its column in lower case, without `_`; the first one counts."""

_YES = frozenset({"1", "1.0", "true", "yes"})


class Class(NamedTuple):
    """What a mask shows: its plain name, and of a list of categories its id and whether it is a thing."""

    name: str
    id: int | None = None
    is_thing: bool | None = None


class Named(msgspec.Struct, frozen=True):
    """What a line says of a mask.

    Attributes:
        line: its number in the file, for messages.
        mask: name of the mask's file; "" if the line names none.
        photo: name of the photo; "" if the line names none.
        value: value of the region in an indexed image.
        shows: what it shows; None if the line does not say so.
        group: whether it is many objects under one mask.
    """

    line: int
    mask: str = ""
    photo: str = ""
    value: int | None = None
    shows: Class | None = None
    group: bool = False


def read_names(url: str, setting: str, classes: dict[str, Class]) -> list[Named]:
    """The lines of a list.

    Args:
        url: a CSV with a header, or JSON lines.
        setting: the configuration's name for it.
        classes: by code, such as "/m/01yrx" or "17"; a category without such a code is its own name.

    Raises:
        ConfigError: the file is missing, is neither, or has no column that says what a line is about.
    """
    rows = _json_rows(url) if file_names.ending(url) in (".json", ".jsonl") else _csv_rows(url)
    found = []
    for line, row in rows:
        given = {_plain(str(name)): value for name, value in row.items()}
        fields = {field: _first(given, names) for field, names in _COLUMNS.items()}
        if not found and not (fields["mask"] or fields["photo"] or fields["value"]):
            columns = ", ".join(map(str, row))
            raise ConfigError(
                f"{setting}: {url}: no column names a mask or a photo ({columns}); call it `mask` or `photo`"
            )
        name = fields["category"]
        shows = classes.get(name) or (Class(plain_name(name)) if plain_name(name) else None)
        is_group = fields["group"].lower() in _YES
        found.append(Named(line, fields["mask"], fields["photo"], _whole(fields["value"]), shows, is_group))
    return found


@functools.lru_cache(maxsize=16)
def read_classes(url: str | None) -> dict[str, Class]:
    """Classes by code: of a JSON list of categories, or of a CSV of codes and names without a header.

    Raises:
        ConfigError: it is missing, or is no such file.
    """
    if url is None:
        return {}
    if file_names.ending(url) != ".csv":
        known = load_categories(url).by_id
        return {str(number): Class(each.name, number, each.is_thing) for number, each in known.items()}
    found = {}
    for _, row in _rows(url):
        if len(row) >= 2 and plain_name(row[1]):
            code = row[0].strip()
            found[code] = Class(plain_name(row[1]), _whole(code))
    if not found:
        raise ConfigError(f"{url}: no line has a code and a name; give a CSV such as `/m/01yrx,Cat`")
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace(" ", "")


def _csv_rows(url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = _rows(url)
    _, header = next(rows, (0, []))
    for line, row in rows:
        yield line, dict(zip_longest(header, row[: len(header)], fillvalue=""))


def _rows(url: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV that are not empty, each with the number of its last line.

    Raises:
        ConfigError: the file is no CSV; it names the line at which the bad row begins.
    """
    line, reader = 0, csv.reader(io.StringIO(_text(url)), strict=True)
    try:
        for row in reader:
            line = reader.line_num
            if row:
                yield line, row
    except csv.Error as error:
        raise ConfigError(f"{url}: line {line + 1}: not CSV ({error}); correct it there") from error


def _json_rows(url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(url).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = coco_json.parse_json(line.encode())
        except ValueError as error:
            raise ConfigError(f"{url}: line {number}: not JSON ({error}); give one object a line") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{url}: line {number}: not an object; give one object a line")
        yield number, row


def _text(url: str) -> str:
    try:
        data = files.fetch(Blob(url))
    except OSError as error:
        if failures.classify(error) is failures.Kind.TRANSIENT:
            raise
        raise ConfigError(f"{url}: cannot be read ({failures.describe(error)}); correct the path") from error
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        why = what_is(data) or f"byte {error.start} is not UTF-8; save it as UTF-8"
        fix = "" if "; " in why else "; give the CSV or the JSON lines"
        raise ConfigError(f"{url}: not a text file: {why}{fix}") from error


def _first(given: dict[str, Any], names: Iterable[str]) -> str:
    """The first value that is a text or a number, as text."""
    for name in names:
        value = coco_json.as_whole(given.get(name))
        if isinstance(value, bool):
            return str(int(value))
        if isinstance(value, str | int) and not coco_json.problem_of(value) and str(value).strip():
            return str(value).strip()
    return ""


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else None
