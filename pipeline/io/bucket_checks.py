"""What is looked at before a corpus is written to a bucket: its URL, and what the store can do."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Collection
from contextlib import suppress

from ...schemas.errors import ConfigError
from ...schemas.records import Blob
from . import addresses, files
from .bucket_clients import SCHEMES, place_of
from .store import Store, store_of

PROBE = f"{files.TEMPORARY}check-"
"""How the objects are named, in the corpus itself, with which a store is tried."""

_TURNS = 3
"""How often a store is tried that fails: whoever owns the corpus may sweep such an object meanwhile."""

_ABANDONED_S = 3600.0
"""An object of a trial that is older than this is what a killed process left."""

_tried: set[tuple[str, str]] = set()


def refuse_secrets(url: str) -> None:
    """Refuse a URL as `out` that holds a secret, or that no store writes to. A path of a folder passes.

    Raises:
        ConfigError: it does; the message has no secret.
    """
    if not files.is_url(url):
        return
    try:
        addresses.check_bucket(url, ", which would be published with the corpus")
    except ConfigError as error:
        raise ConfigError(f"out: {error}") from None
    scheme = place_of(url).scheme
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES if each != "memory")
        what = f"a corpus cannot be written to {scheme}://"
        raise ConfigError(f"out: {addresses.shown(url)}: {what}; give a folder, or a URL of {known}")


def check_store(out: str) -> None:
    """Try what a corpus needs of a bucket, once for each bucket and process; nothing is left there.

    A folder passes.

    Raises:
        ConfigError: the bucket is not there or may not be written; or its store lacks something, as those do
            that ignore the condition of a write: two drivers could both commit there.
        OSError: the store does not answer.
    """
    if not files.is_url(out):
        return
    scheme, bucket, _ = place_of(out)
    if (scheme, bucket) in _tried:
        return
    out, store, lacking = out.rstrip("/"), store_of(out), ""
    for _ in range(_TURNS):
        path = f"{out}/{PROBE}{uuid.uuid4().hex[:12]}"
        try:
            if not (lacking := _what_it_lacks(store, path)):
                _delete_abandoned(store, out, path)
        except OSError:  # it does not answer; a later trial deletes what this one may have left
            raise
        except BaseException:
            _delete(store, path)
            raise
        _delete(store, path)
        if not lacking:
            _tried.add((scheme, bucket))
            return
    raise ConfigError(
        f"{scheme}://{bucket}: {lacking}, so a corpus in it would not be safe; use a store that does, "
        "such as S3, Azure's or Google's, or a folder"
    )


def check_node(out: str, mark: str, variables_of_driver: Collection[str]) -> None:
    """Look whether this node reads what the driver of a corpus has written, and may write there, too.

    A folder passes.

    Args:
        out: the corpus.
        mark: an object that the driver has written.
        variables_of_driver: names of the environment variables with which it reaches the bucket.

    Raises:
        ConfigError: it does not; the message names the node, and which of these variables it lacks.
        OSError: the store does not answer.
    """
    if not files.is_url(out):
        return
    probe, store = f"{out.rstrip('/')}/{PROBE}{uuid.uuid4().hex[:12]}", store_of(out)
    try:
        if store.size(mark) is None:
            raise ConfigError(
                f"{mark}: the driver has just written it, and it is not there; let the same variables lead "
                "to the same store on every node"
            )
        store.create(probe, b"")
        store.delete(probe)
    except ConfigError as error:
        missing = [name for name in variables_of_driver if not os.environ.get(name)]
        what = f" (set where the driver runs, and not on this node: {', '.join(missing)})" if missing else ""
        raise ConfigError(f"node {socket.gethostname()}: {error}{what}") from None


def _what_it_lacks(store: Store, path: str) -> str:
    """What the store of a new name does not do, in words; "" if it does everything."""
    first, second, third = (uuid.uuid4().bytes for _ in range(3))
    if not store.create(path, first):
        return "the store says that a new name is taken"
    try:
        if store.create(path, second) or store.read(path) != first:
            return "the store ignores `If-None-Match: *`, and replaces what is there"
        store.put(path, third)
        if store.read(path) != third:
            return "the store does not give what was written last"
        if files.read(Blob(path), 3, 5) != third[3:8]:
            return "the store does not read ranges (it ignores `Range`)"
    except FileNotFoundError:
        return "the store loses what was written"
    store.delete(path)
    return "" if store.size(path) is None else "the store does not delete"


def _delete(store: Store, path: str) -> None:
    with suppress(OSError, ConfigError):
        store.delete(path)


def _delete_abandoned(store: Store, out: str, path: str) -> None:
    """Delete what trials of killed processes left, by the store's own clock."""
    left = [f"{out}/{name}" for name in store.list(out) if name.startswith(PROBE)]
    if not left:
        return
    store.put(path, b"")
    now_s = store.modified_s(path)
    for other in left:
        with suppress(FileNotFoundError):
            if now_s - store.modified_s(other) > _ABANDONED_S:
                store.delete(other)
