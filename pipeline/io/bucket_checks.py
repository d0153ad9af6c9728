"""What is looked at before a corpus is written to a bucket: its URL, and what the store can do."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress

from ...schemas.errors import ConfigError
from ...schemas.records import Blob
from . import addresses, files
from .bucket_clients import SCHEMES, place_of
from .process_identity import is_dead, name_of, process_named, this_process
from .store import Store, store_of

PROBE = f"{files.TEMPORARY}check-"
"""How the objects are named, in the corpus itself, with which a store is tried."""

_TURNS = 3
"""How often a store is tried that fails: whoever owns the corpus may sweep such an object meanwhile."""

_ABANDONED_S = 3600.0
"""An object of a trial that is older than this is what a killed process of another machine left."""

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
    lacking = try_store(out, _what_it_lacks)
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
    store = store_of(out)
    try:
        if store.size(mark) is None:
            raise ConfigError(
                f"{mark}: the driver has just written it, and it is not there; let the same variables lead "
                "to the same store on every node"
            )
        with trial(out) as path:
            store.create(path, b"")
            store.delete(path)
    except ConfigError as error:
        missing = [name for name in variables_of_driver if not os.environ.get(name)]
        what = f" (set where the driver runs, and not on this node: {', '.join(missing)})" if missing else ""
        raise ConfigError(f"node {socket.gethostname()}: {error}{what}") from None


def try_store(folder: str, try_once: Callable[[Store, str], str]) -> str:
    """Try a store in a folder, again if it fails: an object may be swept meanwhile. Nothing is left there.

    Args:
        folder: URL of it.
        try_once: is given the store and a new name in the folder; returns what the store lacks, in words.

    Returns:
        What it lacks; "" if nothing.
    """
    store, lacking = store_of(folder), ""
    for _ in range(_TURNS):
        with trial(folder) as path:
            if not (lacking := try_once(store, path)):
                _delete_abandoned(folder, store.list(folder))
                break
    return lacking


@contextmanager
def trial(folder: str) -> Iterator[str]:
    """A name that nobody else has, for an object with which a store is tried.

    It is deleted afterwards if the store answers.
    """
    path = f"{folder.rstrip('/')}/{PROBE}{uuid.uuid4().hex[:12]}~{name_of(this_process())}"
    answers = True
    try:
        yield path
    except OSError:  # a later trial deletes what this one may have left
        answers = False
        raise
    finally:
        if answers:
            with suppress(OSError, ConfigError):
                store_of(path).delete(path)


def _delete_abandoned(folder: str, names: Iterable[str]) -> None:
    """Delete the objects of trials whose process is dead, or that are old by the store's own clock.

    Args:
        folder: URL of it.
        names: of what is in it.
    """
    store, left = store_of(folder), delete_of_the_dead(folder, names)
    if not left:
        return
    with trial(folder) as path:
        store.put(path, b"")
        now_s = store.modified_s(path)
    for other in left:
        with suppress(FileNotFoundError):
            if now_s - store.modified_s(other) > _ABANDONED_S:
                store.delete(other)


def delete_of_the_dead(folder: str, names: Iterable[str]) -> list[str]:
    """Delete those whose process is known to be dead; returns the URLs of those that are left."""
    left = list[str]()
    for name in names:
        if name.startswith(PROBE):
            path, process = f"{folder.rstrip('/')}/{name}", process_named(name.partition("~")[2])
            if process is not None and is_dead(process):
                store_of(folder).delete(path)
            else:
                left.append(path)
    return left


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
