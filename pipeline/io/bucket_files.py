"""Reads what lies in the buckets of corpora, over obstore, as `files.backend_of` asks it.

Only buckets that a corpus lies in are read here, in a process that has named one: `store_of` and `locate` call
`bucket_clients.use_as_corpus`. Sources in other buckets stay with fsspec, whose own options (`FSSPEC_S3`,
profiles in `~/.aws`) obstore does not know; and `memory://` is fsspec's unless a corpus was written there. obstore
asks the bucket each time, where fsspec remembers what it has listed: others write to a corpus meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .backends import FileKind, expand_by_listing
from .bucket_clients import BucketError, ask, client_of, place_of
from .failures import ShortRead

Result = TypeVar("Result")

_AT_ONCE = 16


class BucketFiles:
    """Objects of S3, Azure, Google or this process's memory."""

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        import obstore

        key = place_of(url).key
        if length is not None and length <= 0:
            return b""
        try:
            if length is not None:
                return _ask(lambda b: obstore.get_range(b, key, start=start, length=length), url).to_bytes()
            options: Any = {"range": {"offset": start}} if start else None
            return _ask(lambda b: _whole(obstore.get(b, key, options=options)), url)
        except BucketError as error:
            if _is_behind_the_end(error):
                return b""
            raise

    def size(self, url: str) -> int:
        return self._head(url)["size"]

    def version(self, url: str) -> str:
        head = self._head(url)
        return f"{head['size']}-{head['e_tag'] or head['last_modified'].timestamp()}"

    def kind(self, url: str) -> FileKind | None:
        import obstore

        key = place_of(url).key
        if key and not url.endswith("/"):
            try:
                self._head(url)
                return "file"
            except FileNotFoundError:
                pass
        found = _ask(lambda b: next(iter(obstore.list(b, key or None, chunk_size=1)), None), url)
        return "folder" if found else None

    def list_names(self, folder: str) -> list[str]:
        import obstore

        key = place_of(folder).key
        found = _ask(lambda b: obstore.list_with_delimiter(b, key or None), folder)
        keys = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        names = {name for each in keys if (name := each[len(key) :].strip("/"))}
        if not names:
            raise FileNotFoundError(2, "no such folder", folder)
        return sorted(names)

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        import obstore

        place = place_of(folder)
        found = _ask(lambda b: obstore.list(b, place.key or None).collect(), folder)
        for each in found:
            yield place.url(each["path"]), each["path"][len(place.key) :].lstrip("/")

    def glob(self, pattern: str) -> list[str]:
        return expand_by_listing(self, pattern)

    def read_many(self, urls: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self.read, urls))

    def _head(self, url: str) -> Any:
        import obstore

        return _ask(lambda b: obstore.head(b, place_of(url).key), url)


def _ask(question: Callable[[Any], Result], url: str) -> Result:
    bucket = client_of(place_of(url))
    return ask(lambda: question(bucket), url)


def _whole(result: Any) -> bytes:
    data, (start, stop) = result.bytes().to_bytes(), result.range
    if len(data) != stop - start:
        raise ShortRead(f"{len(data)} of {stop - start} bytes from byte {start} on")
    return data


def _is_behind_the_end(error: BucketError) -> bool:
    return error.status == 416 or "Wanted range starting at" in str(error)
