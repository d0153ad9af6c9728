"""Where a corpus lies: a folder of this machine or of a shared file system, or a prefix of a bucket."""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import addresses, bucket_clients, variables


def is_url(path: str) -> bool:
    """Whether the path names another file system than the local one."""
    path = variables.expand(path)
    return "://" in path and not path.startswith("file://")


class Prefix:
    """A place of a corpus in a bucket, with the few calls of `Path` that name other places.

    A process that has one, also one that it was sent, reads that bucket over obstore (`io.bucket_files`).

    Args:
        url: such as "s3://bucket/corpus"; slashes at its end are left out.
    """

    __slots__ = ("url",)

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        bucket_clients.use_as_corpus(self.url)

    def __reduce__(self) -> tuple[type[Prefix], tuple[str]]:
        return Prefix, (self.url,)

    def __truediv__(self, name: str) -> Prefix:
        return Prefix(f"{self.url}/{name}")

    @property
    def parent(self) -> Prefix:
        """What it lies in."""
        return Prefix(self.url.rpartition("/")[0])

    @property
    def name(self) -> str:
        """Its last part."""
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prefix) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)


Location = Path | Prefix
"""Where files of a corpus lie; `str` of it is what `io.store` and `io.files` take."""


def locate(place: str | os.PathLike[str] | Prefix) -> Location:
    """The location of a path or URL of a corpus.

    Raises:
        ConfigError: a URL in a bucket that holds a secret or names no place, or a path that was meant as one.
    """
    if isinstance(place, Prefix):
        return place
    name = os.fspath(place)
    if not is_url(name):
        addresses.check_path(name)
        return Path(name)
    addresses.check_bucket(name)
    return Prefix(name)


_OWN_NAME = re.compile(r"-[0-9a-f]{12}\.[a-z]+$")
"""How the names end that a store gives to files of a bucket (`Store.new_name`)."""


def has_own_name(path: str) -> bool:
    """Whether a name in a bucket is one that a store gave to a single attempt to write."""
    return _OWN_NAME.search(path) is not None


def never_changes(place: str | Location) -> bool:
    """Whether a file is in a bucket under a name of its own: it may go, but its bytes stay what they are."""
    return is_bucket(place) and has_own_name(str(place))


def is_bucket(place: str | Location) -> bool:
    """Whether a place is in a bucket, so that nothing there can be moved or appended to."""
    return isinstance(place, Prefix) or (isinstance(place, str) and is_url(place))
