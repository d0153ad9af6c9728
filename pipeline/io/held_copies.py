"""Objects of a bucket that are held on this machine while they are checked, so that each is fetched once.

Only for names that are never written again (`Store.new_name`). What is held is read from the copy by the
thread that holds it, and by no other. `holding.hold` fetches them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .scratch import Staged


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
def held(url: str, copy: Copy) -> Iterator[None]:
    """Let this thread read an object from its copy within the block."""
    copies = _held.__dict__.setdefault("copies", {})
    copies[url] = copy
    try:
        yield
    finally:
        del copies[url]
        copy.close()
