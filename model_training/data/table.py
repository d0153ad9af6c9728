"""Rows of fixed size and the bytes that they point to, in files that processes share by mapping them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from ...pipeline.io import files

_ROWS, _DATA, _ABOUT = "rows.bin", "data.bin", "about.json"


def default_cache() -> Path:
    """Where tables are kept unless the caller says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paracaption" / "training"


class Table:
    """A table on the disk. Its pages are the system's: memory does not grow with the rows or the processes.

    Attributes:
        folder: of its files.
        rows: (N,) structured.
        about: what the writer said of it.
    """

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.rows = np.memmap(folder / _ROWS, dtype, "r")
        self.data = np.memmap(folder / _DATA, np.uint8, "r")
        self.about: dict[str, Any] = msgspec.json.decode((folder / _ABOUT).read_bytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.dtype)

    def bytes_at(self, start: int, length: int) -> bytes:
        """Some of the bytes that rows point to."""
        return self.data[start : start + length].tobytes()


class Writer:
    """Writes a table in a folder; nothing of it is kept in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.position = self.num_rows = 0
        self.rows: IO[bytes] = open(folder / _ROWS, "xb")
        self.data: IO[bytes] = open(folder / _DATA, "xb")

    def put(self, data: bytes) -> int:
        """Append bytes; where they start."""
        start = self.position
        self.data.write(data)
        self.position += len(data)
        return start

    def add(self, rows: np.ndarray) -> None:
        """Append rows."""
        rows.tofile(self.rows)
        self.num_rows += len(rows)

    def close(self, about: dict[str, Any]) -> None:
        """Finish it."""
        self.data.write(b"\0")  # none at all could not be mapped
        self.rows.close()
        self.data.close()
        (self.folder / _ABOUT).write_bytes(msgspec.json.encode(about))


def cached(cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder of a name in the cache, written now if it is not there: once, however many processes ask.

    Args:
        cache: created if need be; local.
        name: says all that the content depends on.
        write: fills an empty folder.
    """
    target = cache / name
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{files.TEMPORARY}{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        with files.write_folder_atomic(target) as folder:
            write(folder)
    return target
