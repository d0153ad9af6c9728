"""Writes a single file that somebody asked for, such as a report: into a folder or a bucket."""

from __future__ import annotations

from pathlib import Path

from . import files
from .location import Location, is_bucket, locate
from .store import store_of


def write_file(path: str | Location, data: bytes) -> None:
    """Write a file, or replace it: whole, or not at all. Its folder must be there.

    Raises:
        OSError: it cannot be written.
    """
    place = locate(path)
    if is_bucket(place):
        store_of(place).put(str(place), data)
        return
    with files.write_atomic(Path(str(place))) as file:
        file.write(data)
