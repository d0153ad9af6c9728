"""Where bytes are read from: one object for each scheme of URL, with the few calls that all reading needs.

A backend asks once and lets errors through as they are; `files.py` tries again and says whose fault they are.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import IO, Any, Literal, NamedTuple, Protocol

from ...schemas.errors import ConfigError
from ...schemas.secrets import shorten
from . import confined
from .failures import ShortRead
from .packages import how_to_install_extra

FileKind = Literal["file", "folder"]


class Backend(Protocol):
    """Reads files of one scheme. Every call may raise an OSError, or what its client raises."""

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes `[start, start + length)`, to the end if `length` is None; fewer only at the file's end."""
        ...

    def size(self, url: str) -> int:
        """Number of bytes of a file."""
        ...

    def version(self, url: str) -> str:
        """A string that changes when the file does."""
        ...

    def kind(self, url: str) -> FileKind | None:
        """What is there; None if there is nothing. An error is raised, never taken for nothing."""
        ...

    def list_names(self, folder: str) -> list[str]:
        """Names of the files and folders in a folder, as they are now.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such folder.
        """
        ...

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        """Every file below a folder as (URL, path relative to the folder), in no order."""
        ...

    def glob(self, pattern: str) -> list[str]:
        """URLs of the files and folders that a pattern names."""
        ...

    def read_many(self, urls: Sequence[str]) -> list[bytes]:
        """The bytes of small files in the given order."""
        ...


def open_plain(path: str) -> io.FileIO:
    """Open a file to read its bytes, unbuffered. A named pipe would never answer, nor would a device end.

    Raises:
        OSError: it cannot be opened, or is neither a file nor a folder (ESPIPE).
    """
    file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ESPIPE, "neither a file nor a folder", path)
    return file


class LocalFiles:
    """Plain paths."""

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        confined.check(url)
        with open_plain(local(url)) as file:
            if start:
                file.seek(start)
            data = file.read() if length is None else _read_up_to(file, length)
            if length is None and start + len(data) < (size := os.fstat(file.fileno()).st_size):
                raise ShortRead(f"{start + len(data)} of {size} bytes")
            return data

    def size(self, url: str) -> int:
        return os.stat(local(url)).st_size

    def version(self, url: str) -> str:
        found = os.stat(local(url))
        return f"{found.st_size}-{found.st_mtime_ns}"

    def kind(self, url: str) -> FileKind | None:
        try:
            os.stat(local(url))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return "folder" if os.path.isdir(local(url)) else "file"

    def list_names(self, folder: str) -> list[str]:
        confined.check(folder)
        return os.listdir(local(folder) or ".")

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        root = local(folder)
        confined.check(root)
        yield from _walk(root)

    def glob(self, pattern: str) -> list[str]:
        return expand_by_listing(self, local(pattern))

    def read_many(self, urls: Sequence[str]) -> list[bytes]:
        return [self.read(url) for url in urls]


class _Below(NamedTuple):
    """A folder on the way of a walk: its path from the root, the folders it lies in, and links to it."""

    path: str
    above: tuple[tuple[int, int], ...] = ()
    num_links: int = 0


_KEPT_BY_THE_DISK = "lost+found"
"""A folder of ext4 that only root may read. Nobody keeps files in it."""


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """Every file below a folder. Links to folders are followed, but no folder is entered inside itself.

    Behind more than one link, a folder is entered only if it was not before: folders that link to each other
    would be listed in every order otherwise. A link that leads nowhere is a file.
    """
    stack, seen = [_Below("")], set[tuple[int, int]]()
    while stack:
        below = stack.pop()
        place = os.path.join(root, below.path)
        looked = os.stat(place)
        this = looked.st_dev, looked.st_ino
        if this in below.above or (below.num_links > 1 and this in seen):
            continue
        seen.add(this)
        try:
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except PermissionError:
            if os.path.basename(below.path) == _KEPT_BY_THE_DISK:
                continue
            raise
        for entry in entries:
            relative = f"{below.path}/{entry.name}" if below.path else entry.name
            if _is_dir(entry):
                links = below.num_links + entry.is_symlink()
                stack.append(_Below(relative, (*below.above, this), links))
            else:
                yield f"{root}/{relative}", relative


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # a link to itself: a file nobody can open
            return False
        raise


def has_magic(pattern: str) -> bool:
    """Whether a path or URL is a pattern. A `?` in an HTTP URL begins its query."""
    if pattern.startswith(("http://", "https://")):
        pattern = pattern.replace("?", "")
    return glob.has_magic(pattern)


def local(path: str) -> str:
    """The plain local path of a path or file:// URL."""
    return path.removeprefix("file://")


def _read_up_to(file: IO[bytes], length: int) -> bytes:
    # A length may come from a damaged file, and `read` reserves what it is asked for.
    length = max(0, min(length, os.fstat(file.fileno()).st_size - file.tell()))
    data = file.read(length)
    if len(data) == length:
        return data
    parts = [data]
    remaining = length - len(data)
    while remaining and (data := file.read(remaining)):
        parts.append(data)
        remaining -= len(data)
    return b"".join(parts)


def expand_by_listing(backend: Backend, pattern: str) -> list[str]:
    """The URLs that a pattern of `*`, `?` and `[...]` names, found by listing one folder after the other.

    As `glob`, but that an error of a listing is raised: `glob` takes it for an empty folder, and a plan would
    silently lack what lies there. And a part that is a name as it stands, as in `data [1]/*.json`, is that
    name and no pattern.
    """
    head, *parts = pattern.split("/")
    if "://" in pattern:
        head, parts = "/".join([head, *parts[:2]]), parts[2:]
    found = [head]
    if has_magic(head):
        found, parts = [""], [head, *parts]
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        relative = found == [""] and place == 0 and has_magic(head)
        prefixes = [("", ".") if relative else (f"{each}/", each or "/") for each in found]
        if not has_magic(part):
            found = [prefix + part for prefix, _ in prefixes]
            if last:
                found = [url for url in found if backend.kind(url) is not None]
            continue
        found = [
            f"{prefix}{name}" for prefix, home in prefixes for name in _matches(backend, prefix, home, part)
        ]
    return found


def _matches(backend: Backend, prefix: str, folder: str, part: str) -> list[str]:
    if "*" not in part and backend.kind(prefix + part) is not None:
        return [part]
    try:
        names = backend.list_names(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    if part in names:
        return [part]
    hidden = part.startswith(".")
    return [name for name in names if fnmatchcase(name, part) and (hidden or not name.startswith("."))]


class FsspecFiles:
    """Everything that fsspec has a file system for. Options come from fsspec's own configuration."""

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        fs, path = _file_system(url)
        return fs.cat_file(path, start=start or None, end=None if length is None else start + length)

    def size(self, url: str) -> int:
        fs, path = _file_system(url)
        return int(fs.info(path)["size"])

    def version(self, url: str) -> str:
        fs, path = _file_system(url)
        info = fs.info(path)
        names = ("ETag", "etag", "md5", "LastModified", "mtime", "created")
        mark = next((str(info[name]) for name in names if info.get(name)), "")
        return f"{info.get('size')}-{mark}"

    def forget(self, url: str) -> None:
        """Ask the store about a file again, and not a listing that was had before."""
        fs, path = _file_system(url)
        fs.invalidate_cache(path)

    def kind(self, url: str) -> FileKind | None:
        fs, path = _file_system(url)
        try:
            info = fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return "folder" if info.get("type") == "directory" else "file"

    def list_names(self, folder: str) -> list[str]:
        fs, path = _file_system(folder)
        fs.invalidate_cache(path)  # what others have written since the last call
        return [found.rstrip("/").rpartition("/")[2] for found in fs.ls(path, detail=False)]

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        fs, path = _file_system(folder)
        root = path.rstrip("/")
        for found in fs.find(path, **_loud(fs)):
            yield fs.unstrip_protocol(found), found[len(root) :].lstrip("/")

    def glob(self, pattern: str) -> list[str]:
        fs, path = _file_system(pattern)
        parts = path.split("/")
        for place, part in enumerate(path.split("/")):
            if has_magic(part):  # `data [1]` is a folder, if there is one
                if (
                    "*" in part
                    or self.kind(fs.unstrip_protocol("/".join(path.split("/")[: place + 1]))) is None
                ):
                    break
                parts[place] = glob.escape(part)
        return [fs.unstrip_protocol(found) for found in fs.glob("/".join(parts))]

    def read_many(self, urls: Sequence[str]) -> list[bytes]:
        if any(has_magic(url) for url in urls):  # `cat` takes these names for patterns
            return [self.read(url) for url in urls]
        fs, _ = _file_system(urls[0])
        paths = [fs._strip_protocol(url) for url in urls]
        found = fs.cat(paths)
        return [found[path] for path in paths] if isinstance(found, dict) else [found]


_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
}
"""Scheme -> the package that reads it; the extra `remote` has them all."""


_USED: dict[int, Any] = {}
"""The file systems of fsspec that this process has read from; fsspec keeps them, too."""


def forget_listings() -> None:
    """Let the next listing of each store be one of now: fsspec remembers those that it has had."""
    for fs in list(_USED.values()):
        fs.invalidate_cache()


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    if "STORAGE_EMULATOR_HOST" in os.environ:  # gcsfs would ask it for a minute about kinds of buckets
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        fs, path = fsspec.core.url_to_fs(url)
        _USED[id(fs)] = fs
        return fs, path
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        if package is None:
            raise
        fix = f"{how_to_install_extra('remote')}, on every node"
        raise ConfigError(
            f"{shorten(url)}: {package} reads {scheme}://, and is not installed; {fix}"
        ) from error
    except ValueError as error:
        if "rotocol not known" in str(error):
            raise ImportError(str(error)) from error
        told = f"{shorten(url)}: {' '.join(str(error).split())}"
        fix = "set the store's credentials (docs/sources.md)"
        raise ConfigError(shorten(f"{told}; {fix}")) from error


def _loud(fs: Any) -> dict[str, str]:
    """The argument that makes fsspec's own way to walk raise errors, as clients' own ways do."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    if isinstance(fs, AsyncFileSystem):
        return {"on_error": "raise"} if type(fs)._find is AsyncFileSystem._find else {}
    return {"on_error": "raise"} if type(fs).find is AbstractFileSystem.find else {}
