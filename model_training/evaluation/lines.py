"""Files of JSON lines that grow as work is done: whole lines count, a torn last one was never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from ...pipeline.io import files

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


def read(path: Path) -> list[bytes]:
    """The whole lines of a file; none if it is not there."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


@contextmanager
def appending(path: Path) -> Iterator[IO[bytes]]:
    """The file, behind its last whole line."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append(file: IO[bytes], record: Any) -> None:
    """A record as a line."""
    file.write(msgspec.json.encode(record) + b"\n")
    file.flush()


def write_json(path: Path, content: Any) -> None:
    """A JSON for people, whole or not at all."""
    with files.write_atomic(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
