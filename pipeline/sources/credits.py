"""License and origin of an image, as the records of COCO, LVIS, Objects365 or Open Images name them.

What a record says goes out with the corpus, so nothing of it may be a secret: of an address only what leads
to the page is kept, and a path of somebody's machine is left out.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from ...schemas.records import Credit
from . import coco_json

_NAMES = {
    "license": ("license", "licence", "licensename", "licencename"),
    "license_url": ("licenseurl", "licenceurl"),
    "license_id": ("licenseid", "licenceid"),
    "attribution": ("attribution", "attributiontext", "credit", "creditline", "copyright", "rights"),
    "author": ("author", "authorname", "creator", "creatorname", "photographer", "artist"),
    "author_url": ("authorurl", "authorprofileurl", "creatorurl", "photographerurl", "artisturl"),
    "title": ("title", "imagetitle"),
    "source_url": (
        "sourceurl",
        "landingurl",
        "originallandingurl",
        "foreignlandingurl",
        "pageurl",
        "originalurl",
        "url",
        "imageurl",
    ),
    "coco_url": ("cocourl",),
    "flickr_url": ("flickrurl",),
}
"""By field of `Credit`, the names of its value in records, in lower case, without `_`; the first counts."""

_NOTHING = frozenset({"none", "null", "nan", "n/a"})
_MAX_CHARS = 1000
"""Longer texts are cut, longer addresses left out: such as pictures in a `data:` address."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]*")
_SCHEMES = frozenset({"http", "https", "ftp"})
_OPEN_QUERIES = frozenset(
    {"id", "curid", "oldid", "title", "page", "photo", "photo_id", "image_id", "v", "lang"}
)
"""Parts of a query that name a page. With any other in it, which may sign or name a user, all of it goes."""

_THIS_MACHINE = re.compile(r"(?:localhost|127\.[\d.]+|0\.0\.0\.0|\[::1?\])(?::|$)")
_HIDDEN = re.compile(r";[^/]*=[^/]*|(?:%3[Ff]|%3[Bb]).*")
"""What a path carries as a query does: `;name=value`, and a query whose mark is escaped."""

_OPEN_VALUE = re.compile(r"[^=&;?#%]{0,200}")
_OPEN_FRAGMENT = re.compile(r"(?:/media/[^=&;?#]*|[\w.,()-]{0,80})")

_PATH = re.compile(r"(?:[/~\\]|[A-Za-z]:[\\/]|data:|file:)")
_PATH_INSIDE = re.compile(
    r"(?<![\w/:.~-])(?:/(?:home|root|Users|mnt|media|tmp|var|data|srv|opt|work\w*)/|~/|\\\\|[A-Za-z]:\\)[^\s\"'<>]*"
)
"""A path of somebody's machine within a text."""

_LOOSE_QUERY = re.compile(r"(?:[?&]|%3[Ff]|%26)[^\s\"'<>]*(?:=|%3[Dd])[^\s\"'<>]*")
_LOOSE_LOGIN = re.compile(r"(?<![^\s/\"'<>(])(?!mailto:)[^\s/@:\"'<>]+:[^\s/@\"'<>]+@(?=\w)")
"""A query, and a name with a password, of an address without `https://` or with a blank in it."""


class Licenses:
    """The block `licenses` of a document: what its images' license ids mean.

    Args:
        raw: the block as it was written; empty if there is none. What is wrong in it counts for nothing.
    """

    def __init__(self, raw: bytes = b""):
        self._by_id: dict[str, dict[str, str]] = {}
        self._by_text: dict[str, dict[str, str]] = {}
        for each in _listed(_parsed(raw)):
            number, name, url = _id_of(each.get("id")), _text(each.get("name")), _url(each.get("url"))
            if not (name or url):
                number = ""
            found = _filled(license=name or url, license_url=url, license_id=number)
            self._by_id.setdefault(_id_of(each.get("id")), found)
            for text in filter(None, (name, url)):
                self._by_text.setdefault(text.casefold(), found)

    def find(self, value: Any) -> dict[str, str]:
        """The fields of a `Credit` that an image's `license` stands for: an id, a name, an address."""
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            name, url = _text(value.get("name") or value.get("title")), _url(value.get("url"))
            return self.find(value.get("id")) | _filled(license=name or url, license_url=url)
        number, text = _id_of(value), _text(value)
        found = self._by_id.get(number) if number else None
        if found is None:
            found = self._by_text.get(text.casefold())
        if found is not None:
            return found
        if number.isdecimal():
            return _filled(license_id=number.strip("0") and number)  # many tools write 0 for none
        return _filled(license=text, license_url=_url(value) if "://" in text else "")


def read_credit(record: bytes, licenses: Licenses | None = None) -> Credit:
    """What an image's record says of its license and origin; a field that cannot be read counts for nothing.

    Args:
        record: the element of `images`, or the like, as JSON; empty if there is none.
        licenses: of its document; None takes those in the record itself.
    """
    values = _parsed(record)
    if not isinstance(values, dict):
        return Credit()
    if licenses is None:
        licenses = Licenses(bytes(coco_json.as_raw(values.get("licenses"))))
    named = {name.lower().replace("_", ""): value for name, value in values.items()}
    found: dict[str, str] = {}
    for field, names in _NAMES.items():
        read = _url if field.endswith("_url") else _text
        given = [named[name] for name in names if name in named]
        if field == "license":
            found |= next(filter(None, map(licenses.find, given)), {})
        elif field == "license_id":
            found |= next(filter(None, map(licenses.find, given)), {}) | found
        elif value := next(filter(None, map(read, given)), ""):
            found.setdefault(field, value)
    return Credit(**found)


def _parsed(data: bytes) -> Any:
    """Parsed JSON; None if it cannot be parsed."""
    try:
        return json.loads(bytes(data)) if data else None
    except (ValueError, RecursionError):
        return None


def _listed(block: Any) -> list[dict[str, Any]]:
    """The licenses of a block, which some write as an object by id."""
    if isinstance(block, dict):
        block = [
            {"id": number} | (each if isinstance(each, dict) else {"name": each})
            for number, each in block.items()
        ]
    return [each for each in block if isinstance(each, dict)] if isinstance(block, list) else []


def _id_of(value: Any) -> str:
    value = coco_json.as_whole(value)
    return "" if isinstance(value, bool) or not isinstance(value, int | str) else _text(value)


def _filled(**fields: str) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value}


def _text(value: Any) -> str:
    """A value as text for strangers; "" for what is no text, or a path."""
    if isinstance(value, dict):
        value = value.get("name")
    if isinstance(value, list):
        value = ", ".join(filter(None, map(_text, value)))
    value = coco_json.as_whole(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    if _PATH.match(text) or text.casefold() in _NOTHING:
        return ""
    text = _without_secrets(text[: 8 * _MAX_CHARS])  # no text makes the patterns slow
    return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}..."


def _without_secrets(text: str) -> str:
    """A text whose addresses are open, and in which nothing else is an address with a secret, or a path."""
    kept, end = [], 0
    for found in _ADDRESS.finditer(text):
        kept += [_loose(text[end : found.start()]), _open(found[0])]
        end = found.end()
    return " ".join("".join([*kept, _loose(text[end:])]).split())


def _loose(text: str) -> str:
    """The part of a text between its addresses."""
    for secret in (_LOOSE_LOGIN, _LOOSE_QUERY, _PATH_INSIDE):
        text = secret.sub("", text)
    return text


def _url(value: Any) -> str:
    """An address that may be published; "" if it is not one."""
    if isinstance(value, dict):
        value = value.get("url")
    text = value.strip() if isinstance(value, str) else ""
    found = _ADDRESS.fullmatch(text.encode("utf-8", "replace").decode())
    return _open(found[0]) if found and len(text) <= _MAX_CHARS else ""


def _open(url: str) -> str:
    """An address without what only some may know: names, passwords, signatures; "" for a machine's path."""
    try:
        address = urlsplit(url)
        query = parse_qsl(address.query, keep_blank_values=True)
    except ValueError:
        return ""
    host = (address.netloc.rpartition("@")[2]).lower()
    if address.scheme.lower() not in _SCHEMES or not host or _THIS_MACHINE.match(host):
        return ""
    kept: dict[str, str] = {}
    if (path := _HIDDEN.sub("", address.path)) != address.path:
        kept["path"] = path
    if "@" in address.netloc:
        kept["netloc"] = address.netloc.rpartition("@")[2]
    if not all(name.lower() in _OPEN_QUERIES and _OPEN_VALUE.fullmatch(value) for name, value in query):
        kept["query"] = ""
    if not _OPEN_FRAGMENT.fullmatch(address.fragment):
        kept["fragment"] = ""
    return urlunsplit(address._replace(**kept)) if kept else url
