"""Names that publishers gave: which are safe, which key they make, and which file in a folder they mean."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from ...schemas.errors import ConfigError
from ..io import files

PHOTO_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
LABEL_ENDINGS = (".png", ".tif", ".tiff", ".bmp")

_ENDINGS = {*PHOTO_ENDINGS, *LABEL_ENDINGS, ".json", ".jsonl", ".parquet", ".tar", ".txt", ".csv", ".npy"}
_ENDINGS |= {
    ".gif",
    ".jp2",
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".ppm",
    ".pgm",
    ".tga",
    ".gz",
}
"""Endings that a stem is without; others are part of a name."""

HIDDEN = "__"
"""What the names of members begin with that webdataset and `datasets` pass by; so does a dot, in no key."""

_LONGEST_KEY = 120
_ODD = re.compile(r"[^A-Za-z0-9_-]")
_UNSAFE = re.compile(r"^[/\\]|^.:|[\x00-\x1f]|(^|[/\\])\.\.([/\\]|$)")
_LIKE_DUPLICATE = re.compile(r"-dup\d+$")


def is_safe(name: str) -> bool:
    """Whether a name stays in its folder: relative, no `..`, no drive, no control characters."""
    return bool(name) and not _UNSAFE.search(name)


def why_unsafe(name: str) -> str:
    """What is wrong with a name that is not safe, in words."""
    if any(letter < " " for letter in name):
        return "has a control character"
    if name[1:2] == ":":
        return "begins with a drive letter (`C:`)"
    return "leads out of its folder"


def base_name(name: str) -> str:
    """The last part of a path."""
    return name.rsplit("/", 1)[-1]


def stem(name: str) -> str:
    """The last part of a path without its ending, if that is one of a known kind: `frame.0001` has none."""
    last = base_name(name)
    found = ending(last)
    return last[: -len(found)] if found in _ENDINGS else last


def folder(name: str) -> str:
    """The folders of a path, without a slash at their end; "" if it has none."""
    return name.rpartition("/")[0]


def path_stem(name: str) -> str:
    """A path without its ending, folders and all."""
    return name[: len(name) - len(base_name(name))] + stem(name)


def ending(name: str) -> str:
    """The ending of a path in lower case, with its dot; "" if it has none."""
    last = base_name(name)
    return last[last.rindex(".") :].lower() if "." in last[1:] else ""


def key_of(name: str, early: bool = False) -> str:
    """The key that a name makes: itself if it can be one, else its allowed characters and a hash of it.

    No key begins with two underscores, since webdataset and `datasets` pass such members by. `early` gives
    the keys of early releases, where some did.
    """
    is_key = name and len(name) <= _LONGEST_KEY and not _ODD.search(name) and not _LIKE_DUPLICATE.search(name)
    if is_key and (early or not name.startswith(HIDDEN)):
        return name
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    key = f"{_ODD.sub('_', name)[: _LONGEST_KEY - 13]}-{mark}"
    return f"x{key}" if key.startswith(HIDDEN) and not early else key


def plain(name: str) -> str:
    """A name as it is compared where no file has it exactly: composed (NFC), with `/` between its folders.

    macOS writes names decomposed, and lists that were made on Windows have backslashes in them.
    """
    if name.isascii():
        return name.replace("\\", "/")
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def compared_stem(name: str) -> str:
    """The stem under which a name is looked up: of its plain spelling."""
    return base_name(plain(stem(name)))


def is_text(name: str) -> bool:
    """Whether a name that was found on a disk is UTF-8, as what is written of it has to be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class Listing(NamedTuple):
    """The files of one folder.

    Attributes:
        url: the folder.
        names: paths relative to it, sorted; None if it cannot be listed (plain HTTP).
    """

    url: str
    names: list[str] | None

    def digest(self) -> str:
        """Changes when a file comes or goes, not when one is rewritten."""
        if self.names is None:
            return _NOT_LISTED
        joined = "\n".join(self.names).encode("utf-8", "surrogateescape")
        return f"{len(self.names)}{_OF_FILES}{hashlib.sha256(joined).hexdigest()}"


def is_listing(version: str) -> bool:
    """Whether this is the digest of a listing, and no version of a file."""
    return version == _NOT_LISTED or _OF_FILES in version


_NOT_LISTED = "not listed"
_OF_FILES = " files, sha256 "


def list_folder(url: str, setting: str) -> Listing:
    """List a folder.

    Raises:
        ConfigError: it is not there; `setting` is the config's name for it.
    """
    if url.startswith(("http://", "https://")):
        return Listing(url, None)
    if not files.is_folder(url):
        if files.exists(url):
            raise ConfigError(f"{setting}: {url} is a file; give a folder (unpack an archive)")
        raise ConfigError(f"{setting}: no folder {url}; correct the path, or mount the folder")
    return Listing(url, sorted(relative for _, relative in files.walk(url)))


class Finder:
    """Finds files by name in listed folders. Holds only the names it may be asked for.

    Args:
        listings: the folders in the order in which they are searched.
        stems: stems of all names that will be asked for.
        endings: of files that count.
        without: a folder of label maps, which never count, though it may lie inside the others. If it is
            one of these, or holds it, its files of other endings do count.
    """

    def __init__(
        self, listings: list[Listing], stems: set[str], endings: tuple[str, ...], without: str | None = None
    ):
        self._folders = [listing.url.rstrip("/") for listing in listings]
        self._unlisted = next((place for place, found in enumerate(listings) if found.names is None), None)
        self._by_stem: dict[str, list[tuple[int, str]]] = {}
        stems = {base_name(plain(each)) for each in stems}
        for place, listing in enumerate(listings):
            for name in listing.names or ():
                key = compared_stem(name)
                if key in stems and (name.lower().endswith(endings) or not _has_ending(name)):
                    if without and self._is_inside(without, self._folders[place], name):
                        continue
                    self._by_stem.setdefault(key, []).append((place, name))

    @staticmethod
    def _is_inside(without: str, folder_url: str, name: str) -> bool:
        """Whether a file is of the folder that never counts; by its ending, where that is listed itself."""
        inside = f"{without.rstrip('/')}/"
        is_listed = f"{folder_url}/".startswith(inside)
        may_be = not is_listed or name.lower().endswith(LABEL_ENDINGS)
        return may_be and f"{folder_url}/{name}".startswith(inside)

    def _in_first_folder(self, urls: list[str]) -> list[str]:
        """Those of the first folder that has any."""
        for folder_url in self._folders:
            inside = [url for url in urls if url.startswith(f"{folder_url}/")]
            if inside:
                return inside
        return []

    def hint(self, name: str) -> str:
        """For the message that nothing was found: files of this base name that `name` does not mean."""
        others = self._by_stem.get(compared_stem(name), [])
        if not others:
            return ""
        shown = [
            found.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for _, found in others[:2]
        ]
        if len(others) == 1:
            return f" ({shown[0]} exists, but in another folder than this name says)"
        return (
            f" ({len(others)} files may be meant, such as {' and '.join(shown)}; keep only one of them, or "
            "write the path of the right one into the annotation)"
        )

    def find(self, name: str) -> str | None:
        """The URL of the file meant, None if none is or several may be.

        It is the file of this very path in the first folder that has one. Else it is the only one in a folder
        whose path ends so: a name with folders never means a file of other folders. Else it is the only one
        of this very path with another ending (publishers' lists say .jpg where the file is .png). If no file
        is called so, the plain spellings of both are compared in the same way.
        """
        candidates = self._by_stem.get(compared_stem(name), [])
        urls = [f"{self._folders[place]}/{found}" for place, found in candidates]
        for spelled in (str, plain):
            spellings = [
                _Spelled(spelled(found), spelled(url), url)
                for (_, found), url in zip(candidates, urls, strict=True)
            ]
            if choices := _meant(spelled(name), spellings):
                first = choices[:1] if len(choices) == 1 else self._in_first_folder(choices)
                return first[0] if len(first) == 1 else None
        if self._unlisted is None:
            return None
        return "/".join((self._folders[self._unlisted], name.replace("\\", "/")))


class _Spelled(NamedTuple):
    """A listed file: its path in its folder and its URL, both as they are compared, and the URL itself."""

    name: str
    place: str
    url: str


def _meant(name: str, listed: list[_Spelled]) -> list[str]:
    """The URLs of the files that a name may mean, by the first rule of `Finder.find` that names any."""
    for each in listed:
        if each.name == name:
            return [each.url]
    if nested := [each.url for each in listed if each.place.endswith(f"/{name}")]:
        return nested
    path, photos = path_stem(name), [each for each in listed if _has_ending(each.name)]
    renamed = [each.url for each in photos if path_stem(each.name) == path]
    if folder(name) and not renamed:
        renamed = [each.url for each in photos if path_stem(each.place).endswith(f"/{path}")]
    return renamed


def _has_ending(name: str) -> bool:
    return ending(name) in _ENDINGS


def expand_paths(patterns: Iterable[str], setting: str) -> list[str]:
    """The files and folders that patterns name, in order, each once.

    Raises:
        ConfigError: a pattern that names nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = files.expand(pattern)
        if not matches:
            raise ConfigError(f"{setting}: nothing found at {pattern}; correct the path, or mount its folder")
        found.update(dict.fromkeys(matches))
    return list(found)
