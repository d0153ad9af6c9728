"""Reads bytes from local paths and fsspec URLs, and writes local files that exist whole or not at all."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import Blob
from ...schemas.secrets import shorten
from . import bucket_clients, confined, variables
from .backends import Backend, FsspecFiles, LocalFiles, has_magic, local, open_plain
from .expanded import ExpandedBackend
from .failures import RETRYING, Kind, ReadError, ShortRead, SourceFailure
from .location import Location, is_url
from .range_files import RangeFile

Result = TypeVar("Result")

TEMPORARY = ".tmp-"
"""Prefix of every file that is not committed; readers ignore such names and the next run removes them."""

_ABANDONED_S = 6 * 3600
"""A temporary folder that nobody has touched for this long is what a killed process left behind."""


_BACKENDS: dict[str, Backend] = {}
_CORPORA = "(corpus)"
"""Stands for the schemes of buckets that a corpus lies in."""


def scheme_of(url: str) -> str:
    """The scheme of a URL; "file" for a plain path."""
    return url.partition("://")[0] if "://" in url else "file"


def register(scheme: str, backend: Backend) -> None:
    """Read URLs of this scheme with this backend, in this process; "file" are plain paths, too."""
    _BACKENDS[scheme] = backend


def backend_of(url: str) -> Backend:
    """What reads this URL."""
    if (expanded := variables.expand(url)) != url:
        return ExpandedBackend(backend_of(expanded))
    scheme = _CORPORA if bucket_clients.is_of_corpus(url) else scheme_of(url)
    if scheme not in _BACKENDS:
        if scheme == _CORPORA:
            from .bucket_files import BucketFiles

            register(scheme, BucketFiles())
        elif scheme == "file":
            register(scheme, LocalFiles())
        elif scheme in ("http", "https"):
            from .http_files import HttpFiles

            register(scheme, HttpFiles())
        else:
            register(scheme, FsspecFiles())
    return _BACKENDS[scheme]


def read(blob: Blob, start: int = 0, length: int | None = None) -> bytes:
    """Bytes `[start, start + length)` of a blob, to its end if `length` is None. Short at its end.

    What fails for a while is asked again (`failures.RETRYING`).

    Raises:
        OSError: as the file system has it (`FileNotFoundError` if it is not there), or as `ReadError`.
    """
    length = _room(blob, start, length)
    return _ask(lambda each: each.read(blob.url, blob.offset + start, length), blob.url)


_GAP_BYTES = 1 << 16
"""Up to this many bytes between two parts of a file are read and thrown away, instead of reading twice."""


def read_pair(first: Blob, second: Blob) -> tuple[bytes, bytes]:
    """Two parts of one file, by one read if the second follows the first closely. Raises what `read` does."""
    assert first.length is not None and second.length is not None
    skipped = second.offset - first.offset - first.length
    if not 0 <= skipped < _GAP_BYTES:
        return read(first), read(second)
    data = read(Blob(first.url, first.offset, first.length + skipped + second.length))
    return data[: first.length], data[first.length + skipped :]


def fetch(blob: Blob, start: int = 0, length: int | None = None) -> bytes:
    """The same for a blob of a source, of which not everything is believed.

    That it is missing is believed if a fresh listing of its folder agrees, and fewer bytes than the blob has
    are asked for again.

    Raises:
        ReadError: says whose fault it is.
    """
    length = _room(blob, start, length)

    def once() -> bytes:
        data = backend_of(blob.url).read(blob.url, blob.offset + start, length)
        if blob.length is not None and length is not None and len(data) < length:
            raise ShortRead(f"{len(data)} of {length} bytes from byte {blob.offset + start} on")
        return data

    return RETRYING.call(once, blob.url, lambda: is_gone(blob.url))


def fetch_size(blob: Blob) -> int:
    """Number of bytes of a blob of a source; raises as `fetch`."""
    if blob.length is not None:
        return blob.length
    return RETRYING.call(lambda: backend_of(blob.url).size(blob.url), blob.url, lambda: is_gone(blob.url))


def _room(blob: Blob, start: int, length: int | None) -> int | None:
    if blob.length is None:
        return length
    room = max(0, blob.length - start)
    return room if length is None else min(length, room)


def decoded(
    fetching: Callable[[], bytes], decode: Callable[[bytes], Result], data: bytes | None = None
) -> Result:
    """What `decode` makes of fetched bytes; what it refuses is refused only if a second read gives the same.

    Args:
        fetching: reads the bytes again with each call.
        decode: raises `BadRecord` for bytes that are not what they should be.
        data: the bytes, if they were fetched before.

    Raises:
        BadRecord: as `decode` does, of bytes that were read twice.
        ReadError: no two reads gave the same.
    """
    data, last = fetching() if data is None else data, None
    for _ in range(_READS):
        try:
            return decode(data)
        except SourceFailure:
            raise
        except BadRecord as refused:
            again = fetching()
            if again == data:
                raise
            data, last = again, refused
    raise ReadError("", f"every read gives other bytes ({last})", Kind.TRANSIENT)


_READS = 4
"""How often bytes are read that are other ones each time."""


def read_mapped(url: str) -> Any:
    """All bytes of a file. A local one is mapped: what is not looked at stays on the disk. As `read`."""
    if type(backend_of(url)) is LocalFiles:
        return _ask(lambda _: _mapped(local(url)), url)
    return read(Blob(url))


def _mapped(path: str) -> Any:
    confined.check(path)
    with open_plain(path) as file:
        if not file.seek(0, 2):
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def is_gone(url: str) -> bool:
    """Whether a fresh listing of its folder agrees that there is no file of this name.

    A listing that cannot be had does not agree: a folder that is away takes its files with it. One that has
    the name agrees if it is a link that leads nowhere.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    backend, now = backend_of(url), time.monotonic()
    try:
        listed_s, names = _LISTED.get(folder, (-_LISTED_S, {name}))
        if name in names or now - listed_s > _LISTED_S:
            names = set(backend.list_names(folder or ("/" if url.startswith("/") else ".")))
            _LISTED.clear()
            _LISTED[folder] = now, names
        elif backend.kind(folder) != "folder":
            return False
    except Exception:  # noqa: BLE001 - whatever it is, it does not agree
        return False
    return name not in names or _leads_nowhere(url)


def _leads_nowhere(url: str) -> bool:
    """Whether this is a symbolic link on this machine to a file that is not there."""
    if is_url(url):
        return False
    path = local(variables.expand(url))
    try:
        if not os.path.islink(path):
            return False
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


_LISTED: dict[str, tuple[float, set[str]]] = {}
"""The folder that was listed last, when, and its names: what is missing is seldom alone."""

_LISTED_S = 30.0
"""How long a listing that lacks a name is fresh."""


_AT_ONCE = 1024


def read_many(urls: Sequence[str]) -> Iterator[bytes]:
    """The bytes of small files in the given order; a store is asked for many of them at a time.

    Raises:
        OSError: as `read`.
    """
    if not urls or not is_url(urls[0]):
        yield from (read(Blob(url)) for url in urls)
        return
    for start in range(0, len(urls), _AT_ONCE):
        yield from _ask(lambda each, start=start: each.read_many(urls[start : start + _AT_ONCE]), urls[start])


def size_of(blob: Blob) -> int:
    """Number of bytes of a blob. Raises as `read`."""
    return blob.length if blob.length is not None else _ask(lambda each: each.size(blob.url), blob.url)


def open_url(url: str, block_bytes: int | None = None) -> IO[bytes]:
    """A seekable binary file; `block_bytes` is read at a time where reading is a request.

    Every read of it is tried again as `read` does, and raises a `ReadError` in the end. Opening raises as
    `read`.
    """
    backend = backend_of(url)
    if block_bytes is None:
        block_bytes = _REMOTE_BLOCK if is_url(url) else _LOCAL_BLOCK
    begin = getattr(backend, "begin", None)
    if begin is None:
        ranges = RangeFile(backend, url, _ask(lambda each: each.size(url), url))
    else:  # a bucket tells an object's size with its first bytes
        first, size = _ask(lambda _: begin(url, block_bytes), url)
        ranges = RangeFile(backend, url, size, first)
    return io.BufferedReader(ranges, block_bytes)


_REMOTE_BLOCK = 1 << 20
_LOCAL_BLOCK = 64 << 10


def expand(pattern: str) -> list[str]:
    """The files and folders a glob names, sorted; a path that exists is that path, whatever is in its name.

    [] if nothing is there.

    Raises:
        OSError: as `read`, where it cannot be known what is there.
    """
    remote = is_url(pattern)
    if remote and "*" in pattern:  # no name of a store; and a server may answer 200 to whatever it is asked
        return sorted(_ask(lambda each: each.glob(pattern), pattern))
    if _ask(lambda each: each.kind(pattern), pattern) is not None:
        return [pattern if remote else local(pattern)]
    return sorted(_ask(lambda each: each.glob(pattern), pattern)) if has_magic(pattern) else []


def list_names(folder: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; none if there is no such folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        return sorted(_ask(lambda each: each.list_names(folder), folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def sha256_of(path: str | Location) -> str:
    """SHA-256 of a file, in hex; it is read piece by piece."""
    return measure(path)[1]


def measure(path: str | Location) -> tuple[int, str]:
    """Number of bytes of a file, and their SHA-256 in hex; it is read piece by piece."""
    digest, size = hashlib.sha256(), 0
    with open_url(str(path), _WHOLE_BLOCK if is_url(str(path)) else None) as file:
        while data := file.read(_WHOLE_BLOCK if is_url(str(path)) else 1 << 20):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


_WHOLE_BLOCK = 8 << 20
"""How much of a file that is read from its beginning to its end is asked for at a time."""


def exists(path: str | Location) -> bool:
    """Whether there is a file or folder. An error is raised, never taken for nothing."""
    return _ask(lambda each: each.kind(str(path)), str(path)) is not None


def is_folder(url: str) -> bool:
    """Whether the URL names a folder.

    Raises:
        OSError: as `read`, where it cannot be known what is there.
    """
    return _ask(lambda each: each.kind(url), url) == "folder"


def walk(folder: str) -> Iterator[tuple[str, str]]:
    """Every file below a folder as (URL, path relative to the folder), in no order: sort it."""
    yield from _ask(lambda each: list(each.walk(folder)), folder)


def version(url: str) -> str:
    """A string that changes when the file does: size and mtime locally, what the store reports elsewhere."""
    return _ask(lambda each: each.version(url), url)


def present_version(url: str) -> str:
    """The same, never from what this process remembers of a listing."""
    forget = getattr(backend_of(url), "forget", None)
    if forget is not None:
        forget(url)
    return version(url)


def _ask(question: Callable[[Backend], Result], url: str) -> Result:
    """The answer of the URL's backend, tried again; in the end its own OSError, or a ReadError."""
    try:
        return RETRYING.call(lambda: question(backend_of(url)), url)
    except ReadError as failure:
        cause = failure.__cause__
        known = isinstance(cause, FileNotFoundError | NotADirectoryError)
        if known or (isinstance(cause, OSError) and cause.errno is not None):
            if cause.errno is not None and cause.filename is None:  # of a read of an open file
                cause.filename = shorten(url)
            raise cause from cause.__cause__
        raise


@contextmanager
def write_atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a local file that appears under its name whole and durable, or not at all.

    A temporary file in the same folder, flushed to the disk, then renamed; removed if the block raises.
    """
    path = Path(path)
    confined.check(path.parent)
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


def json_text(content: Any) -> bytes:
    """JSON for people to read."""
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people to read, whole or not at all."""
    with write_atomic(path) as file:
        file.write(json_text(content))


@contextmanager
def write_folder_atomic(
    target: str | Path, *, replace: bool = False, temporary: Path | None = None
) -> Iterator[Path]:
    """Write a local folder that appears under its name whole and durable, or not at all.

    The block fills a temporary folder next to the target. When the block ends, every file is flushed to the
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
        sync_tree(temporary)
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
        raise ConfigError(f"{target}: already exists; move it away, or name another folder")


def sync_tree(folder: Path) -> None:
    """Make a folder and all in it durable, but not yet its name."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
