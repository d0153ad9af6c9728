"""The one door through which a corpus is written: a file appears whole and durable, or not at all.

A place is a local path, or a URL whose scheme has a registered store. Nothing else in `pipeline/` creates,
moves or deletes a file of a corpus, so what a full disk, a kill or a slow network does to it can be tried in
one place.

The two calls that the commit log rests on:

- `create` gives a name to one writer only, whoever asks and how often;
- `move` moves a file once: whoever comes second finds that it is gone.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TypeVar

from ...schemas.errors import ConfigError
from ...schemas.secrets import shorten
from . import bucket_clients, confined, files, variables
from .activity import NOW, touching
from .location import Location
from .store_kind import Store

TEMPORARY = files.TEMPORARY

_SWEPT_TIMES = 3
"""How often a file is written again whose temporary name was gone before it got its own."""

Result = TypeVar("Result")


class FolderStore(Store):
    """A folder of a POSIX file system that has hard links: ext4, XFS, NFS, Lustre, GPFS.

    Files are flushed to the disk before they get their name, and the folder after it, so that a power cut
    takes nothing back. No lock is used: many file systems have none that holds between machines.
    """

    moves = True

    def new_name(self, path: str) -> str:
        return temporary_name(path)

    @touching
    def create(self, path: str, data: bytes) -> bool:
        return _unless_swept(lambda: self._create(path, data))

    def _create(self, path: str, data: bytes) -> bool:
        temporary = self._written(path, data)
        try:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if not self._is_ours(path, data):
                    return False
            except OSError as error:
                # Over NFS the answer may be lost. Two names say that the file got the second one (open(2)).
                if os.stat(temporary).st_nlink != 2:
                    raise _without_links(error, path) from error
        finally:
            with suppress(OSError):
                os.unlink(temporary)
        _sync(os.path.dirname(path))
        return True

    @touching
    def put(self, path: str, data: bytes) -> None:
        _unless_swept(lambda: self._put(path, data))

    def _put(self, path: str, data: bytes) -> None:
        temporary = self._written(path, data)
        try:
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync(os.path.dirname(path))

    @touching
    def write(self, path: str) -> IO[bytes]:
        _make(_parent(path))
        return _Named(_Durable(path, "xb"), 1 << 20)

    @touching
    def move(self, path: str, target: str) -> bool:
        confined.check(_parent(path))
        _make(_parent(target))
        is_there = True
        try:
            os.replace(path, target)
        except FileNotFoundError:
            is_there = False
        _sync(os.path.dirname(target))  # also where somebody else moved it, whose flush may have failed
        return is_there

    @touching
    def keep(self, path: str, target: str) -> bool:
        confined.check(path)
        _make(_parent(target))
        try:
            os.link(path, target)
        except FileNotFoundError:
            return False
        except FileExistsError:
            pass
        _sync(os.path.dirname(target))
        return True

    @touching
    def flush(self, folder: str) -> None:
        confined.check(folder)
        with suppress(FileNotFoundError, NotADirectoryError):
            _sync(folder)

    @touching
    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            confined.check(_parent(path))
            os.unlink(path)

    @touching
    def delete_folder(self, path: str) -> None:
        confined.check(path)
        shutil.rmtree(path, ignore_errors=True)

    @touching
    def make_folder(self, path: str) -> None:
        confined.check(path)
        _make(path)

    @touching
    def size(self, path: str) -> int | None:
        try:
            return os.stat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    @touching
    def read(self, path: str) -> bytes:
        confined.check(path)
        with open(path, "rb", buffering=0) as file:
            return file.read()

    @touching
    def list(self, folder: str) -> list[str]:
        confined.check(folder)
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @touching
    def modified_s(self, path: str) -> float:
        return os.stat(path).st_mtime

    def _written(self, path: str, data: bytes) -> str:
        """A temporary file next to `path` with this content."""
        temporary = temporary_name(path)
        _make(_parent(path))
        try:
            with io.BufferedWriter(_Durable(temporary, "xb"), 1 << 20) as file:
                file.write(data)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        return temporary

    def _is_ours(self, path: str, data: bytes) -> bool:
        """Whether the file under a name that is taken is the very one that was to be created."""
        with suppress(FileNotFoundError):
            return self.read(path) == data
        return False


class _Durable(io.FileIO):
    """A file whose content is on the disk when it is closed."""

    def write(self, data: Any) -> int:
        with NOW.touching(str(self.name)):
            return super().write(data)

    def close(self) -> None:
        if not self.closed:
            try:
                with NOW.touching(str(self.name)):
                    os.fsync(self.fileno())
            finally:
                super().close()


class _Named(io.BufferedWriter):
    """A file that has its name on the disk, too, when it is closed: a record may name it then."""

    def close(self) -> None:
        if not self.closed:
            super().close()
            _sync(os.path.dirname(str(self.raw.name)))  # type: ignore[attr-defined]


def _unless_swept(write: Callable[[], Result]) -> Result:
    """Write once more if whoever owns the corpus has swept the temporary file meanwhile.

    A driver that is about to claim a corpus writes next to its owner. The names that it gives are safe.
    """
    for _ in range(_SWEPT_TIMES):
        with suppress(FileNotFoundError):
            return write()
    return write()


def _without_links(error: OSError, path: str) -> OSError:
    """Say it where the file system has no hard links at all."""
    if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
        what = f"this file system has no hard links ({error.strerror}), which a corpus needs"
        return OSError(error.errno, f"{what}; choose another `out`", path)
    return error


def _parent(path: str) -> str:
    """The folder of a file that is written or moved; it must not lie elsewhere than it says."""
    folder = os.path.dirname(path)
    confined.check(folder)
    return folder


def _make(folder: str) -> None:
    """Make a folder and those above it; their names are on the disk before a file lies in them."""
    folder = folder.rstrip("/")
    if not folder:
        return
    try:
        os.mkdir(folder)
    except FileNotFoundError:
        _make(os.path.dirname(folder))
        _make(folder)
        return
    except FileExistsError:
        if os.path.isfile(folder):
            raise
        return
    except OSError:  # some systems say so of folders that are there
        if os.path.isdir(folder):
            return
        raise
    with suppress(PermissionError):  # a folder above `out` that may be entered but not listed
        _sync(os.path.dirname(folder))


def _sync(folder: str) -> None:
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_STORES: dict[str, Store] = {}
_FOLDERS = FolderStore()


def register(scheme: str, store: Store) -> None:
    """Make a store answer for the URLs of a scheme, such as "s3"."""
    _STORES[scheme] = store


def store_of(path: str | Location) -> Store:
    """The store of a path. What is below its bucket is read over obstore from then on (`files.backend_of`).

    Raises:
        ConfigError: it is a URL of a scheme that cannot be written, or its package is not installed.
    """
    name = variables.expand(str(path))
    if not files.is_url(name):
        return _FOLDERS
    scheme = files.scheme_of(name)
    if scheme in bucket_clients.SCHEMES and scheme not in _STORES:
        from .buckets import BucketStore

        register(scheme, BucketStore())
    if scheme not in _STORES:
        schemes = ", ".join(f"{each}://" for each in bucket_clients.SCHEMES)
        what = f"{shorten(str(path))}: a corpus cannot be written to {scheme}://"
        raise ConfigError(f"{what}; give a folder, or {schemes}")
    bucket_clients.use_as_corpus(name)
    return _STORES[scheme]


def temporary_name(path: str) -> str:
    """A name next to a path that nobody else has, and that readers ignore."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{TEMPORARY}{name}-{uuid.uuid4().hex[:12]}"
