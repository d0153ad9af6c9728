"""Files of JSON lines that grow: a line counts when it has ended, and a torn last one was never written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec

from . import confined


def read_lines(path: Path) -> list[bytes]:
    """The whole lines of a file without their line breaks; none if there is no such file."""
    return LineReader(path).new()


class LineReader:
    """Follows a growing file. Where another file takes its name, it starts from the beginning.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path):
        self.path = path
        self._position, self._file_number = 0, -1

    def new(self) -> list[bytes]:
        """The lines that have ended since the last call."""
        confined.check(self.path)
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return []
        with file:
            number = os.fstat(file.fileno()).st_ino
            if number != self._file_number:
                self._position, self._file_number = 0, number
            file.seek(self._position)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._position += end
        return data[:end].split(b"\n")[:-1]


class LineWriter:
    """Appends records behind the last whole line of a file, of which it is the only writer.

    Each record is one unbuffered write, so a killed process leaves whole lines.

    Args:
        path: the file; created if need be.
        encode: makes the line of a record, without the line break.

    Raises:
        OSError: as the file system has it.
    """

    def __init__(self, path: Path, encode: Callable[[Any], bytes] = msgspec.json.encode):
        self.encode = encode
        self._file: IO[bytes] = open(path, "a+b", buffering=0)
        self._file.seek(0)
        self._end = self._file.read().rfind(b"\n") + 1
        self._file.truncate(self._end)

    def append(self, record: Any) -> None:
        """Write a record; where the disk takes only a part of it, the part is removed again.

        Raises:
            OSError: it was not written.
        """
        line = self.encode(record) + b"\n"
        if (self._file.write(line) or 0) < len(line):
            self._file.truncate(self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)

    def sync(self) -> None:
        """Wait until what was written is on the disk, so that it outlives the machine's end."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
