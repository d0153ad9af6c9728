"""Objects of a bucket that are held on this machine while they are checked, so that each is fetched once.

Only for names that are never written again (`Store.new_name`). What is held is read from the copy by the
thread that holds it, and by no other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import bucket_clients
from .scratch import Staged

STEP_BYTES = 64 << 20
"""How much is fetched with one request."""


class Copy:
    """An object's bytes on this machine: in memory if it is small, else on scratch."""

    def __init__(self, staged: Staged):
        self._staged, self._descriptor = staged, -1
        content = staged.content()
        self._data = content if isinstance(content, bytes) else b""
        if isinstance(content, Path):
            self._descriptor = os.open(content, os.O_RDONLY)
        self.size = staged.size

    def read(self, start: int, length: int | None) -> bytes:
        """Bytes `[start, start + length)`, to the end if `length` is None."""
        stop = self.size if length is None else min(self.size, start + length)
        if self._descriptor < 0:
            return self._data[start:stop]
        parts = []
        while start < stop and (part := os.pread(self._descriptor, stop - start, start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Forget the bytes."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._staged.discard()


_held = threading.local()


def find(url: str) -> Copy | None:
    """The copy of an object that this thread holds."""
    return getattr(_held, "copies", {}).get(url)


@contextmanager
def hold(url: str) -> Iterator[None]:
    """Read an object from a copy within the block. A file of a folder is read where it lies.

    An object that is not there, or cannot be fetched, is not held: whoever reads it says what is wrong.
    """
    copy = _fetch(url) if bucket_clients.is_of_corpus(url) and find(url) is None else None
    if copy is None:
        yield
        return
    copies = _held.__dict__.setdefault("copies", {})
    copies[url] = copy
    try:
        yield
    finally:
        del copies[url]
        copy.close()


def _fetch(url: str) -> Copy | None:
    from . import files

    scheme, bucket, key = bucket_clients.place_of(url)
    staged = Staged(f"{scheme}://{bucket}", key.rpartition("/")[2])
    try:
        with files.open_url(url, STEP_BYTES) as file:
            while data := file.read(STEP_BYTES):
                staged.write(data)
    except OSError:
        staged.discard()
        return None
    except BaseException:
        staged.discard()
        raise
    return Copy(staged)
