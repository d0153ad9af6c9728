"""All files below a folder or a prefix of a bucket, with their sizes, by as few requests as there can be."""

from __future__ import annotations

import os
from typing import NamedTuple

from . import confined
from .bucket_clients import insist, place_of
from .location import Location, Prefix


class Listed(NamedTuple):
    """A file as a listing has it: its size, and when it was written, by the store's clock."""

    bytes: int
    modified_s: float


def list_files(place: Location) -> dict[str, Listed]:
    """The files below a place by their path from there. No such place, no files. Links to files are followed.

    Raises:
        ConfigError: the bucket may not be listed, or is not there.
        OSError: it cannot be listed.
    """
    if isinstance(place, Prefix):
        return _in_bucket(place)
    confined.check(str(place))
    found: dict[str, Listed] = {}
    root = str(place)
    for folder, _, names in os.walk(root, onerror=_raise):
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except FileNotFoundError:  # gone since
                continue
            found[os.path.relpath(path, root)] = Listed(status.st_size, status.st_mtime)
    return found


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _in_bucket(place: Prefix) -> dict[str, Listed]:
    key = place_of(place.url).key
    try:
        listed = insist(lambda calls, client: calls.list(client, key or None).collect(), place.url)
    except FileNotFoundError:
        return {}
    return {
        each["path"][len(key) :].lstrip("/"): Listed(each["size"], each["last_modified"].timestamp())
        for each in listed
    }
