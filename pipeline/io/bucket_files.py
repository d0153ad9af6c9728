"""Reads what lies in the buckets of corpora, over obstore, for `files.backend_of`.

Only buckets that a corpus lies in are read here, in a process that has named one: `store_of` and `Prefix`
call `bucket_clients.use_as_corpus`. Sources in other buckets stay with fsspec, whose options (`FSSPEC_S3`,
profiles in `~/.aws`) obstore does not know; and `memory://` is fsspec's unless a corpus was written there.
obstore asks the bucket each time; fsspec remembers listings, and others write to a corpus meanwhile.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import held_copies
from .backends import FileKind, expand_by_listing
from .bucket_clients import BucketError, ask, key_of, names_in, place_of
from .failures import ShortRead

_AT_ONCE = 16


class BucketFiles:
    """Objects of S3, Azure, Google or this process's memory."""

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        if length is not None and length <= 0:
            return b""
        if (copy := held_copies.find(url)) is not None:
            return copy.read(start, length)
        try:
            return ask(lambda calls, client: _read(calls, client, key_of(url), start, length), url)
        except BucketError as error:
            if _is_behind_the_end(error):
                return b""
            raise

    def size(self, url: str) -> int:
        if (copy := held_copies.find(url)) is not None:
            return copy.size
        return _head(url)["size"]

    def begin(self, url: str, length: int) -> tuple[bytes, int]:
        """The first bytes of an object, at most `length`, and its size, by one request."""
        if (copy := held_copies.find(url)) is not None:
            return b"", copy.size
        try:
            return ask(lambda calls, client: _begin(calls, client, key_of(url), length), url)
        except BucketError as error:
            if _is_behind_the_end(error):  # it is empty
                return b"", 0
            raise

    def version(self, url: str) -> str:
        """Size and etag, as fsspec's file system of S3 has them, too."""
        head = _head(url)
        return f"{head['size']}-{head['e_tag'] or head['last_modified'].timestamp()}"

    def kind(self, url: str) -> FileKind | None:
        key = place_of(url).key
        if key and not url.endswith("/"):
            try:
                _head(url)
                return "file"
            except FileNotFoundError:
                pass
        return "folder" if ask(lambda calls, client: _has_any(calls, client, key), url) else None

    def list_names(self, folder: str) -> list[str]:
        names = ask(lambda calls, client: names_in(calls, client, place_of(folder).key), folder)
        if not names:
            raise FileNotFoundError(errno.ENOENT, "no such folder", folder)
        return names

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        place = place_of(folder)
        for each in ask(lambda calls, client: calls.list(client, place.key or None).collect(), folder):
            yield place.url(each["path"]), each["path"][len(place.key) :].lstrip("/")

    def glob(self, pattern: str) -> list[str]:
        return expand_by_listing(self, pattern)

    def read_many(self, urls: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self.read, urls))


def _head(url: str) -> Any:
    return ask(lambda calls, client: calls.head(client, key_of(url)), url)


def _has_any(calls: Any, client: Any, key: str) -> bool:
    return bool(next(iter(calls.list(client, key or None, chunk_size=1)), None))


def _read(calls: Any, client: Any, key: str, start: int, length: int | None) -> bytes:
    if length is not None:
        return calls.get_range(client, key, start=start, length=length).to_bytes()
    result = calls.get(client, key, options={"range": {"offset": start}} if start else None)
    data, (first, stop) = result.bytes().to_bytes(), result.range
    if len(data) != stop - first:
        raise ShortRead(f"{len(data)} of {stop - first} bytes from byte {first} on")
    return data


def _begin(calls: Any, client: Any, key: str, length: int) -> tuple[bytes, int]:
    result = calls.get(client, key, options={"range": (0, length)})
    data, size = result.bytes().to_bytes(), result.meta["size"]
    if len(data) != min(length, size):
        raise ShortRead(f"{len(data)} of {min(length, size)} bytes from byte 0 on")
    return data, size


def _is_behind_the_end(error: BucketError) -> bool:
    return error.status == 416 or "Wanted range starting at" in str(error)
