"""Tables on the disk: rows of fixed size and the bytes they point to. Processes share them by mapping."""

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
    """The folder for tables if the configuration names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paracaption" / "training"


class Table:
    """A table on the disk, mapped into memory: it takes none that grows with the rows or the processes.

    Attributes:
        folder: the folder of its files.
        rows: (N,) structured array.
        about: facts that the writer gave in `close`.
    """

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.rows = np.memmap(folder / _ROWS, dtype, "r")
        self.data = np.memmap(folder / _DATA, np.uint8, "r")
        self.about: dict[str, Any] = msgspec.json.decode((folder / _ABOUT).read_bytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.dtype)

    def bytes_at(self, start: int, length: int) -> bytes:
        """The bytes that a row points to."""
        return self.data[start : start + length].tobytes()


class TableWriter:
    """Writes a table into a folder without keeping it in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.position = self.num_rows = 0
        self.rows: IO[bytes] = open(folder / _ROWS, "xb")
        self.data: IO[bytes] = open(folder / _DATA, "xb")

    def put(self, data: bytes) -> int:
        """Append bytes; returns where they start."""
        start = self.position
        self.data.write(data)
        self.position += len(data)
        return start

    def add(self, rows: np.ndarray) -> None:
        """Append rows of the table's type."""
        rows.tofile(self.rows)
        self.num_rows += len(rows)

    def close(self, about: dict[str, Any]) -> None:
        """Finish the table; `about` goes to a JSON file next to it."""
        self.data.write(b"\0")  # an empty file cannot be mapped
        self.rows.close()
        self.data.close()
        (self.folder / _ABOUT).write_bytes(msgspec.json.encode(about))


def cached_folder(cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """A folder in the cache. If it is missing, one of the processes that ask for it writes it.

    Args:
        cache: a local folder, created if it is missing.
        name: the folder's name, which identifies everything that its content depends on.
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
