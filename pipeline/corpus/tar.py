"""Writes tars that are the same to the last byte for the same members: no times, no owners."""

from __future__ import annotations

import tarfile
from typing import Any, Protocol

BLOCK = 512
_RECORD = 20 * BLOCK


class Writable(Protocol):
    """What a tar is written to."""

    def write(self, data: Any, /) -> Any: ...

    def tell(self) -> int: ...


def header_size(name: str) -> int:
    """Bytes that stand before a member's data; a long name needs more than one block."""
    return BLOCK if len(name.encode()) <= tarfile.LENGTH_NAME else len(_header(name, 0))


def member_size(name: str, data: int) -> int:
    """Bytes that a member with `data` bytes takes in a tar: its header, and itself in whole blocks."""
    return header_size(name) + data + -data % BLOCK


def archive_size(members: int) -> int:
    """Bytes of a tar whose members take this number of bytes together."""
    end = members + 2 * BLOCK
    return end + -end % _RECORD


class TarWriter:
    """A tar without times and owners.

    Args:
        file: an empty file, which the caller closes.
    """

    def __init__(self, file: Writable):
        self._file = file

    def member(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its first byte."""
        self._file.write(_header(name, len(data)))
        start = self._file.tell()
        self._file.write(data)
        self._file.write(b"\0" * (-len(data) % BLOCK))
        return start

    def close_archive(self) -> None:
        """Write what ends a tar."""
        self._file.write(b"\0" * 2 * BLOCK)
        self._file.write(b"\0" * (-self._file.tell() % _RECORD))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT)
