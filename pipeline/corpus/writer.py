"""Writes a unit as a shard and a ledger under temporary names, and commits it; the manifest comes last.

Two writers may write the same unit at once (a task that ran twice): their temporary names differ, their bytes
do not, and only the driver commits. A crash leaves nothing but temporary files, which `sweep` removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from ...schemas import manifest as manifests
from ...schemas.errors import BadRecord, StageFailed
from ...schemas.manifest import FileEntry, Manifest
from ...schemas.records import Drop, ImageRecord
from ...schemas.sample import PHOTO_ENDING, to_sample
from ..io import files, photos
from ..io.failures import kind_of
from ..stages.base import PHOTO_CHANGED
from .ledger import Place, ledger_table, write_table

WRITE_STAGE = "write"
FOLDERS = ("shards", "ledger", "manifests")

_BLOCK = 512
_RECORD = 20 * _BLOCK
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


class Draft(msgspec.Struct):
    """A unit that is written but not committed: its manifest, and where its files lie until then.

    `failures` names the stages that failed on every image of the unit, with the last error: the driver holds
    such a unit back until it knows whether the stage or the data is to blame. `held` says why the unit must
    not be committed, because its source fails or a photo changed.
    """

    manifest: Manifest
    shard_temporary: str | None
    ledger_temporary: str
    failures: dict[str, str] = {}
    held: str = ""


class _Written(NamedTuple):
    path: Path
    bytes: int
    sha256: str


def write_unit(folder: Path, unit: str, images: list[ImageRecord], plan: str, recipe: str) -> Draft:
    """Write a unit's tar and ledger beside their final places. Photos that fail now are dropped here.

    The tar is the same to the last byte for the same images: members sorted by key, no times, no owners;
    photo bytes are copied, never re-encoded. A unit without a kept region has a ledger but no shard.

    Args:
        folder: OUT/<subset>; its `shards` and `ledger` exist.
        unit: name of the unit.
        images: every image of the unit, in plan order.
        plan: content hash of the plan.
        recipe: digest of the recipe.

    Raises:
        StageFailed: the disk is full or the folder cannot be written; nothing of the unit is left behind.
    """
    mark = uuid.uuid4().hex[:12]
    shard = folder / "shards" / f"{files.TEMPORARY}{unit}-{mark}.tar"
    ledger = folder / "ledger" / f"{files.TEMPORARY}{unit}-{mark}.parquet"
    try:
        places, written, held = _write_tar(shard, images)
        table = ledger_table(unit, images, places)
        recorded = _write_ledger(ledger, table)
    except BaseException as error:
        _remove(shard, ledger)
        if isinstance(error, OSError):
            raise write_failed(folder, error) from error
        raise
    regions_in = sum(len(image.regions) for image in images)
    kept = sum(len(image.live()) for image in images)
    dropped = Counter(f"{r.drop.stage}/{r.drop.reason}" for image in images for r in image.regions if r.drop)
    record = Manifest(
        unit=unit,
        subset=images[0].subset,
        plan=plan,
        recipe=recipe,
        shard=written and FileEntry(f"shards/{unit}.tar", written.bytes, written.sha256),
        ledger=FileEntry(f"ledger/{unit}.parquet", recorded.bytes, recorded.sha256),
        images={image.key: len(image.live()) for image in images},
        regions_in=regions_in,
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        images_dropped=dict(sorted(Counter(image.drop.reason for image in images if image.drop).items())),
        failed=dict(sorted(Counter(image.failed for image in images if image.failed).items())),
    )
    assert regions_in == kept + sum(dropped.values()), f"{unit}: a region is neither kept nor dropped"
    return Draft(record, str(written.path) if written else None, str(recorded.path), held=held)


def write_failed(folder: Path, error: OSError) -> StageFailed:
    """The error for an output folder that takes no more: what happened, and what to do."""
    name = error.filename or folder
    if error.errno in _FULL:
        return StageFailed(f"{name}: disk full; free space and run the same command again, it resumes")
    if error.errno in _REFUSED:
        return StageFailed(
            f"{name}: cannot write ({error.strerror}); fix the permissions or choose another `out`"
        )
    return StageFailed(f"{name}: writing failed: {error}; run the same command again, it resumes")


def _write_tar(path: Path, images: list[ImageRecord]) -> tuple[dict[str, Place], _Written | None, str]:
    """Where each sample lies, the file, and why it must not be committed ("" if it may)."""
    places: dict[str, Place] = {}
    held = ""
    with _Hashing(path) as tar:
        for image in sorted((image for image in images if image.live()), key=lambda image: image.key):
            assert image.photo is not None, f"{image.key}: live without a photo"
            try:
                photo = photos.fetch(image.photo)
            except BadRecord as bad:
                image.reject(Drop(WRITE_STAGE, bad.reason, bad.detail), kind_of(bad))
                continue
            if image.photo_digest and image.photo_digest != photos.digest_of(photo):
                held = held or f"{image.photo}: {PHOTO_CHANGED}"
            record = msgspec.json.encode(to_sample(image))
            photo_at = tar.member(f"{image.key}.{PHOTO_ENDING}", photo)
            json_at = tar.member(f"{image.key}.json", record)
            places[image.key] = Place(photo_at, len(photo), json_at, len(record))
        if places:
            tar.close_archive()
            return places, _Written(path, tar.position, tar.digest.hexdigest()), held
    path.unlink()
    return places, None, held


class _Hashing:
    """A tar being written and hashed in one pass."""

    def __init__(self, path: Path):
        self.path = path
        self.digest = hashlib.sha256()
        self.position = 0

    def __enter__(self) -> _Hashing:
        self.file: IO[bytes] = open(self.path, "xb", buffering=1 << 20)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)

    def member(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its first byte."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self.write(info.tobuf(tarfile.GNU_FORMAT))
        start = self.position
        self.write(data)
        self.write(b"\0" * (-len(data) % _BLOCK))
        return start

    def close_archive(self) -> None:
        self.write(b"\0" * 2 * _BLOCK)
        self.write(b"\0" * (-self.position % _RECORD))


def _write_ledger(path: Path, table: object) -> _Written:
    write_table(table, path)
    data = path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _Written(path, len(data), hashlib.sha256(data).hexdigest())


def commit(folder: Path, draft: Draft) -> None:
    """Make a written unit exist: move its files into place, then write its manifest.

    A unit that is replaced (changed thresholds, a retry of failed records) loses its manifest first, so that
    at no moment a manifest speaks of other files than those beside it. Only the driver that holds the lock
    calls this.

    Raises:
        StageFailed: the disk is full or the folder cannot be written; nothing of the unit is left behind.
    """
    record = draft.manifest
    target = folder / "manifests" / f"{record.unit}.json"
    shard = folder / "shards" / f"{record.unit}.tar"
    data = manifests.encode(record)
    try:
        if target.exists():
            target.unlink()
            files.sync_folder(target.parent)
        if draft.shard_temporary:
            os.replace(draft.shard_temporary, shard)
        else:
            shard.unlink(missing_ok=True)
        os.replace(draft.ledger_temporary, folder / record.ledger.path)
        files.sync_folder(shard.parent)
        files.sync_folder(folder / "ledger")
        with files.write_atomic(target) as file:
            file.write(data)
    except OSError as error:
        _remove(target)
        if not target.exists():
            _remove(shard, folder / record.ledger.path)
        discard(draft)
        raise write_failed(folder, error) from error


def discard(draft: Draft) -> None:
    """Remove a draft's temporary files; what cannot be removed is left to `sweep`."""
    _remove(*(Path(path) for path in (draft.shard_temporary, draft.ledger_temporary) if path))


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def prepare(folder: Path) -> None:
    """Create a subset's folders."""
    try:
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failed(folder, error) from error


def sweep(folder: Path) -> int:
    """Remove what crashed runs left: temporary files, and the files of units without a manifest.

    Returns how many files. Call only with the lock.

    Raises:
        StageFailed: the folder cannot be written.
    """
    leftovers = [path for path in folder.rglob(f"{files.TEMPORARY}*") if path.is_file()]
    committed = {path.stem for path in (folder / "manifests").glob("*.json")}
    for name in ("shards/*.tar", "ledger/*.parquet"):
        found = (path for path in folder.glob(name) if not path.name.startswith(files.TEMPORARY))
        leftovers += [path for path in found if path.stem not in committed]
    try:
        for path in leftovers:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise write_failed(folder, error) from error
    return len(leftovers)
