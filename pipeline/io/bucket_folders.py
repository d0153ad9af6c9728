"""A folder of new files that is written into a bucket: staged on this machine, then uploaded."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

from ...schemas.errors import ConfigError
from . import files, scratch
from .bucket_clients import place_of
from .location import Prefix
from .store import store_of

_AT_ONCE = 16
_PIECE_BYTES = 8 << 20


def refuse_existing(target: Prefix) -> None:
    """Refuse a prefix below which there is something.

    Raises:
        ConfigError: there is.
    """
    if files.exists(target):
        raise ConfigError(f"{target}: already exists; delete it, or name another prefix")


@contextmanager
def staged_folder(target: Prefix) -> Iterator[Path]:
    """A folder on local scratch for what is to be uploaded below a prefix; it is removed after the block.

    Raises:
        ConfigError: there is something below the prefix, or no scratch.
    """
    refuse_existing(target)
    scheme, bucket, _ = place_of(target.url)
    folder = scratch.own_folder(f"{scheme}://{bucket}") / f"folder-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def upload_folder(folder: Path, target: Prefix, last: Sequence[Path] = ()) -> None:
    """Upload all files in a folder and below it.

    What is uploaded before an error is deleted again, and nothing else that is there.

    Args:
        folder: of this machine.
        target: where they come to lie, under their paths from the folder.
        last: files that are uploaded when all others are there: those that readers open first.

    Raises:
        ConfigError, OSError: as the store.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    first = [path for path in paths if path not in last]
    store, begun = store_of(target), list[str]()

    def upload(path: Path) -> None:
        begun.append(url := f"{target}/{path.relative_to(folder)}")
        with path.open("rb") as source, store.write(url) as file:
            shutil.copyfileobj(source, file, _PIECE_BYTES)
        path.unlink()  # scratch is small

    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for ended in as_completed([pool.submit(upload, path) for path in first]):
                    ended.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for path in last:
            upload(path)
    except BaseException:
        for url in begun:
            with suppress(OSError, ConfigError):
                store.delete(url)
        raise
