"""One object of a bucket that several processes change: each replaces only the version that it has read.

That needs more of a store than a corpus itself does: a put with `If-Match`. It is tried once for each bucket.
"""

from __future__ import annotations

from typing import Any

from ...schemas.errors import ConfigError
from .bucket_checks import try_store
from .bucket_clients import insist, key_of, place_of
from .store import Store, store_of

Version = dict[str, Any]
"""What obstore calls an UpdateVersion: etag, and on some stores a number."""

_tried: set[tuple[str, str]] = set()


def read_version(url: str) -> tuple[bytes, Version | None]:
    """An object, and which version of it that is; b"" and None if there is none.

    Raises:
        OSError, ConfigError: as `bucket_clients.insist`.
    """
    store_of(url)

    def read(calls: Any, client: Any) -> tuple[bytes, Version]:
        found = calls.get(client, key_of(url))
        meta = found.meta
        version = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
        return found.bytes().to_bytes(), version

    try:
        return insist(read, url)
    except FileNotFoundError:
        return b"", None


def put_version(url: str, data: bytes, known: Version | None) -> bool:
    """Put an object in the place of the version that is known, or of none; False if that has changed.

    False may also be said of a put that was done, if its answer was lost: read again what is there.

    Raises:
        ConfigError: the store ignores the condition, so changes would be lost.
        OSError: as `bucket_clients.insist`.
    """
    _refuse_careless(url)
    return _put(url, data, known)


def _put(url: str, data: bytes, known: Version | None) -> bool:
    def put(calls: Any, client: Any) -> bool:
        refused = (
            calls.exceptions.PreconditionError,
            calls.exceptions.AlreadyExistsError,
            FileNotFoundError,  # deleted meanwhile
        )
        try:
            calls.put(client, key_of(url), data, mode=known or "create")
        except refused:
            return False
        return True

    return insist(put, url)


def _refuse_careless(url: str) -> None:
    scheme, bucket, _ = place_of(url)
    if (scheme, bucket) in _tried:
        return
    if lacking := try_store(url.rpartition("/")[0], _what_it_lacks):
        raise ConfigError(
            f"{scheme}://{bucket}: {lacking}, so of two people who write at the same time one would lose; "
            "use a store that does not"
        )
    _tried.add((scheme, bucket))


def _what_it_lacks(store: Store, path: str) -> str:
    store.put(path, b"first")
    _, first = read_version(path)
    if first is None:
        return "the store loses what was written"
    is_kept = _put(path, b"second", first) and not _put(path, b"third", first)
    return "" if is_kept else "the store ignores `If-Match`"
