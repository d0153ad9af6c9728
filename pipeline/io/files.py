"""Reads bytes from local paths and fsspec URLs, and writes local files that exist whole or not at all."""

from __future__ import annotations

import glob as local_glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from ...schemas.errors import ConfigError
from ...schemas.records import Blob

TEMPORARY = ".tmp-"
"""Prefix of every file that is not committed; readers ignore such names and the next run removes them."""

_ABANDONED_S = 6 * 3600
"""A temporary folder that nobody has touched for this long is what a killed process left behind."""


def is_url(path: str) -> bool:
    """Whether the path names another file system than the local one."""
    return "://" in path and not path.startswith("file://")


def local(path: str) -> str:
    """The plain local path of a path or file:// URL."""
    return path.removeprefix("file://")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Options come from fsspec's own configuration."""
    import fsspec

    return fsspec.core.url_to_fs(url)


def read(blob: Blob, start: int = 0, length: int | None = None) -> bytes:
    """Bytes `[start, start + length)` of a blob, to its end if `length` is None. Short at its end.

    Raises:
        OSError: as the file system has it (`FileNotFoundError` if it is not there).
    """
    if blob.length is not None:
        room = max(0, blob.length - start)
        length = room if length is None else min(length, room)
    if not is_url(blob.url):
        with open(local(blob.url), "rb", buffering=0) as file:
            if blob.offset + start:
                file.seek(blob.offset + start)
            return file.read() if length is None else _read_up_to(file, length)
    fs, path = file_system(blob.url)
    first = blob.offset + start
    return fs.cat_file(path, start=first or None, end=None if length is None else first + length)


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


_AT_ONCE = 1024


def read_many(urls: Sequence[str]) -> Iterator[bytes]:
    """The bytes of small files in the given order; a store is asked for many of them at a time.

    Raises:
        OSError: as the file system has it.
    """
    if not urls or not is_url(urls[0]):
        yield from (read(Blob(url)) for url in urls)
        return
    fs, _ = file_system(urls[0])
    for start in range(0, len(urls), _AT_ONCE):
        paths = [fs._strip_protocol(url) for url in urls[start : start + _AT_ONCE]]
        found = fs.cat(paths)
        yield from (found[path] for path in paths) if isinstance(found, dict) else [found]


def size_of(blob: Blob) -> int:
    """Number of bytes of a blob."""
    if blob.length is not None:
        return blob.length
    if not is_url(blob.url):
        return os.stat(local(blob.url)).st_size
    fs, path = file_system(blob.url)
    return int(fs.size(path))


def open_url(url: str, block_bytes: int | None = None) -> IO[bytes]:
    """A seekable binary file; `block_bytes` is read at a time where reading is a request."""
    if not is_url(url):
        return open(local(url), "rb")
    fs, path = file_system(url)
    return fs.open(path, "rb", block_size=block_bytes)


def expand(pattern: str) -> list[str]:
    """The files and folders a glob names, sorted; a plain path is returned as it is if it exists, else []."""
    if not is_url(pattern):
        found = local_glob.glob(local(pattern)) if local_glob.has_magic(pattern) else [local(pattern)]
        return sorted(path for path in found if os.path.exists(path))
    fs, path = file_system(pattern)
    if local_glob.has_magic(path):
        return sorted(fs.unstrip_protocol(found) for found in fs.glob(path))
    return [pattern] if fs.exists(path) else []


def list_names(folder: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; none if there is no such folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        if not is_url(folder):
            return sorted(os.listdir(local(folder)))
        fs, path = file_system(folder)
        fs.invalidate_cache(path)  # what others have written since the last call
        return sorted(found.rstrip("/").rpartition("/")[2] for found in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_folder(url: str) -> bool:
    """Whether the URL names a folder."""
    if not is_url(url):
        return os.path.isdir(local(url))
    fs, path = file_system(url)
    return fs.isdir(path)


def walk(folder: str) -> Iterator[tuple[str, str]]:
    """Every file below a folder as (URL, path relative to the folder), in no order: sort it."""
    if not is_url(folder):
        root = local(folder)
        stack = [""]
        while stack:
            below = stack.pop()
            with os.scandir(os.path.join(root, below)) as entries:
                for entry in entries:
                    relative = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_dir():
                        stack.append(relative)
                    else:
                        yield f"{root}/{relative}", relative
        return
    fs, path = file_system(folder)
    root = path.rstrip("/")
    for found in fs.find(path):
        yield fs.unstrip_protocol(found), found[len(root) :].lstrip("/")


def version(url: str) -> str:
    """A string that changes when the file does: size and mtime locally, what the store reports elsewhere."""
    if not is_url(url):
        stat = os.stat(local(url))
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    fs, path = file_system(url)
    info = fs.info(path)
    mark = next(
        (
            str(info[name])
            for name in ("ETag", "etag", "md5", "LastModified", "mtime", "created")
            if info.get(name)
        ),
        "",
    )
    return f"{info.get('size')}-{mark}"


@contextmanager
def write_atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a local file that appears under its name whole and durable, or not at all.

    A temporary file in the same folder, flushed to the disk, then renamed; removed if the block raises.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people to read, whole or not at all."""
    with write_atomic(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


@contextmanager
def write_folder_atomic(
    target: str | Path, *, replace: bool = False, temporary: Path | None = None
) -> Iterator[Path]:
    """Write a local folder that appears under its name whole and durable, or not at all.

    The block fills a temporary folder beside the target. When the block ends, every file is flushed to the
    disk and the folder gets its name; if the block raises, the temporary folder is removed. A killed process
    leaves its temporary folder behind; the next writer of the same target removes it.

    Args:
        target: name that the folder gets. Parent folders are made.
        replace: take the place of a folder that is there. Without it, only an empty folder is replaced.
        temporary: name to write under, for a caller that knows to be the only writer of this target: whatever
            lies there is removed at once. By default no two writers share a name, and what others left behind
            is removed when nobody has touched it for six hours.

    Raises:
        ConfigError: the target is there and is not to be replaced.
        OSError: as the file system has it.
    """
    target = Path(target)
    if not replace:
        refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if temporary is None:
        _remove_abandoned(target)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    old = temporary.with_name(f"{temporary.name.removesuffix('.partial')}.old.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        put_back(old, target)
        temporary.mkdir(exist_ok=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if replace and target.exists():  # a folder cannot be renamed over one that is not empty
            os.replace(target, old)
            os.utime(old)  # it is not abandoned, however old it is
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        put_back(old, target)


def put_back(old: Path, target: Path) -> None:
    """Undo a replacement that stopped between its two renames; remove what one left behind."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.*.partial"):
        with suppress(FileNotFoundError):  # another process removes it too
            if time.time() - left.stat().st_mtime <= _ABANDONED_S:
                continue
            if left.name.endswith(".old.partial"):
                put_back(left, target)
            shutil.rmtree(left, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raise ConfigError if there is something under this name, unless it is an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: is there already; move it away, or name another folder")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
