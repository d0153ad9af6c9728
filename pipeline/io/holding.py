"""Fetches objects of a bucket whole, to hold them while they are checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import bucket_clients, files, held_copies
from .scratch import Staged

STEP_BYTES = 64 << 20
"""How much is fetched with one request."""


@contextmanager
def hold(url: str) -> Iterator[None]:
    """Read an object from a copy within the block. A file of a folder is read where it lies.

    An object that is not there, or cannot be fetched, is not held: whoever reads it says what is wrong.

    Args:
        url: a name that is never written again.
    """
    copy = None
    if bucket_clients.is_of_corpus(url) and held_copies.find(url) is None:
        copy = _fetch(url)
    if copy is None:
        yield
    else:
        with held_copies.held(url, copy):
            yield


def _fetch(url: str) -> held_copies.Copy | None:
    scheme, bucket, key = bucket_clients.place_of(url)
    staged = Staged(f"{scheme}://{bucket}", key.rpartition("/")[2])
    try:
        with files.open_url(url, STEP_BYTES) as file:
            while data := file.read(STEP_BYTES):
                staged.write(data)
        return held_copies.Copy(staged)
    except OSError:
        staged.discard()
        return None
    except BaseException:
        staged.discard()
        raise
