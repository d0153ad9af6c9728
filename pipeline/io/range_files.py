"""A file that is read where it lies, range by range."""

from __future__ import annotations

import errno
import io
import os
from typing import Any

from .backends import Backend
from .failures import RETRYING, ShortRead


class RangeFile(io.RawIOBase):
    """A file whose reads are reads of ranges; `first` are bytes of it that are known already."""

    def __init__(self, backend: Backend, url: str, size: int, first: bytes = b""):
        self._backend, self._url, self._size, self._at = backend, url, size, 0
        self._first = first

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        start, length = self._at, max(0, min(len(buffer), self._size - self._at))
        if start < len(self._first):
            data = self._first[start : start + length]
            buffer[: len(data)] = data
            self._at += len(data)
            return len(data)

        def once() -> bytes:
            data = self._backend.read(self._url, start, length)
            if len(data) < length:
                raise ShortRead(f"{len(data)} of {length} bytes from byte {start} on")
            return data

        data = RETRYING.call(once, self._url) if length else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
