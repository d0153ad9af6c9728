"""Writes a unit as shard, ledger and manifest under temporary names, and commits it by a record of the log.

Two writers may write the same unit at once (a task that ran twice): their temporary names differ, their bytes
do not, and only the owner of the corpus commits. A crash leaves nothing but temporary files, which `sweep`
removes.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from ...schemas import manifest as manifests
from ...schemas.errors import BadRecord, StageFailed
from ...schemas.manifest import FileEntry, Manifest
from ...schemas.records import Blob, Drop, ImageRecord
from ...schemas.sample import PHOTO_ENDING, to_sample
from ..io import files, photos
from ..io.activity import NOW
from ..io.failures import kind_of
from ..io.location import Location
from ..io.orientation import make_upright
from ..io.store import store_of
from ..stages.base import PHOTO_CHANGED
from . import adopt
from .ledger import Place, ledger_table, table_bytes
from .owner import Fenced, HashedFile, Owner, own_or
from .records import Commit, LogFile, LogUnit
from .tar import TarWriter
from .units import Unit

WRITE_STAGE = "write"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


class Draft(msgspec.Struct):
    """A unit that is written but not committed.

    Attributes:
        manifest: of the unit.
        unit: its files, under the temporary names that they have until it is committed.
        failures: stages that failed on every image of the unit, with the last error: the driver holds such a
            unit back until it knows whether the stage or the data is to blame.
        held: why the unit must not be committed, because its source fails or a photo changed; "" if it may.
    """

    manifest: Manifest
    unit: LogUnit
    failures: dict[str, str] = {}
    held: str = ""

    @property
    def name(self) -> str:
        """Subset and unit with a slash between them, as the log names it."""
        return f"{self.manifest.subset}/{self.manifest.unit}"


def write_unit(folder: Location, unit: str, images: list[ImageRecord], plan: str, recipe: str) -> Draft:
    """Write a unit's files next to their final places. Photos that fail now are dropped here.

    The tar is the same to the last byte for the same images: members sorted by key, no times, no owners;
    photo bytes are copied, never re-encoded, and only an EXIF orientation in them is set to upright, which
    the sample notes. A unit without a kept region has a ledger but no shard.

    Args:
        folder: OUT/<subset>.
        unit: name of the unit.
        images: every image of the unit, in plan order.
        plan: content hash of the plan.
        recipe: digest of the recipe.

    Raises:
        StageFailed: the disk is full or the folder cannot be written; nothing of the unit is left behind.
    """
    out, subset = str(folder.parent), folder.name
    written: list[LogFile] = []
    try:
        places, shard, held = _write_tar(out, f"{subset}/shards/{unit}.tar", images)
        written += [shard] if shard else []
        NOW.at("its ledger")
        table = ledger_table(unit, images, places)
        ledger = write_file(out, f"{subset}/ledger/{unit}.parquet", table_bytes(table))
        written.append(ledger)
        record = _manifest_of(unit, images, plan, recipe, shard, ledger)
        manifest = write_file(out, f"{subset}/manifests/{unit}.json", manifests.encode(record))
    except BaseException as error:
        _remove(out, written)
        if isinstance(error, OSError):
            raise write_failed(folder, error) from error
        raise
    found = adopt.log_unit(record, subset, manifest)
    return Draft(record, msgspec.structs.replace(found, ledger=ledger, shard=shard), held=held)


def _manifest_of(
    unit: str, images: list[ImageRecord], plan: str, recipe: str, shard: LogFile | None, ledger: LogFile
) -> Manifest:
    regions_in = sum(len(image.regions) for image in images)
    kept = sum(len(image.live()) for image in images)
    dropped = Counter(f"{r.drop.stage}/{r.drop.reason}" for image in images for r in image.regions if r.drop)
    assert regions_in == kept + sum(dropped.values()), f"{unit}: a region is neither kept nor dropped"
    return Manifest(
        unit=unit,
        subset=images[0].subset,
        plan=plan,
        recipe=recipe,
        shard=shard and FileEntry(f"shards/{unit}.tar", shard.bytes, shard.sha256),
        ledger=FileEntry(f"ledger/{unit}.parquet", ledger.bytes, ledger.sha256),
        images={image.key: len(image.live()) for image in images},
        regions_in=regions_in,
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        images_dropped=dict(sorted(Counter(image.drop.reason for image in images if image.drop).items())),
        failed=dict(sorted(Counter(image.failed for image in images if image.failed).items())),
    )


def write_failed(folder: Location, error: OSError) -> StageFailed:
    """The error for an output folder that takes no more: what happened, and what to do."""
    name = error.filename or folder
    if error.errno in _FULL:
        return StageFailed(f"{name}: disk full; free space and run the same command again, it resumes")
    if error.errno in _REFUSED:
        return StageFailed(
            f"{name}: cannot write ({error.strerror}); fix the permissions or choose another `out`"
        )
    return StageFailed(f"{name}: {error.strerror or error}; run the same command again, it resumes")


def _write_tar(
    out: str, path: str, images: list[ImageRecord]
) -> tuple[dict[str, Place], LogFile | None, str]:
    """Write a shard under a temporary name.

    Returns:
        Where its images lie in it, the file, and why it must not be committed ("" if it may). There is no
        file if no image is left.
    """
    places: dict[str, Place] = {}
    held = ""
    with _Tar(HashedFile(out, path)) as tar:
        for image in sorted((image for image in images if image.live()), key=lambda image: image.key):
            NOW.at(image.key)
            photo = _read_photo(image)
            if photo is None:
                continue
            if image.photo_digest and image.photo_digest != photos.digest_of(photo):
                held = held or f"{image.photo}: {PHOTO_CHANGED}"
            photo, orientation = make_upright(photo)
            record = msgspec.json.encode(to_sample(image, orientation))
            photo_at = tar.member(f"{image.key}.{PHOTO_ENDING}", photo)
            json_at = tar.member(f"{image.key}.json", record)
            places[image.key] = Place(photo_at, len(photo), json_at, len(record))
        if places:
            tar.close_archive()
            return places, tar.file.entry, held
    tar.file.discard()
    return places, None, held


def copy_samples(
    unit: Unit, places: dict[str, Place], out: str, path: str
) -> tuple[dict[str, Place], LogFile | None]:
    """Write a shard with some samples of another one, to the byte as they are, under a temporary name.

    Args:
        unit: its shard has them.
        places: where they are in it, by key.
        out: the corpus.
        path: place below the corpus that the file is to get.

    Returns:
        Where they lie in the new shard, and its file; no file if there are no samples.
    """
    copied: dict[str, Place] = {}
    with _Tar(HashedFile(out, path)) as tar:
        for key, at in sorted(places.items()):
            photo = files.read(Blob(unit.shard, at.photo_offset, at.photo_length))
            record = files.read(Blob(unit.shard, at.json_offset, at.json_length))
            photo_at = tar.member(f"{key}.{PHOTO_ENDING}", photo)
            copied[key] = Place(photo_at, len(photo), tar.member(f"{key}.json", record), len(record))
        if copied:
            tar.close_archive()
            return copied, tar.file.entry
    tar.file.discard()
    return copied, None


def _read_photo(image: ImageRecord) -> bytes | None:
    """The bytes of an image's photo; None if it is dropped because they cannot be read."""
    assert image.photo is not None, f"{image.key}: live without a photo"
    try:
        return photos.fetch_as_published(image)
    except BadRecord as bad:
        image.reject(Drop(WRITE_STAGE, bad.reason, bad.detail), kind_of(bad))
        return None


class _Tar(TarWriter):
    """A tar in a file of the corpus."""

    def __init__(self, file: HashedFile):
        super().__init__(file)
        self.file = file

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *raised: object) -> None:
        self.file.__exit__(*raised)


def write_file(out: str, path: str, data: bytes) -> LogFile:
    """Write a file under a temporary name; the name it is to get is `path`, below the corpus."""
    with HashedFile(out, path) as file:
        file.write(data)
    return file.entry


def commit(folder: Location, *drafts: Draft, owner: Owner | None = None) -> None:
    """Make written units part of the corpus, all by one record of the log.

    A unit that is replaced (changed thresholds, a retry of failed records) stays committed until then. Its
    files go to `.replaced/`.

    Args:
        folder: OUT/<subset>.
        drafts: as `write_unit` returned them.
        owner: of the corpus; None takes the corpus over for the length of the call.

    Raises:
        StageFailed: the disk is full or the folder cannot be written. Either nothing of these units is
            committed, or all of it, and who owns the corpus next moves the files to their places.
        Fenced: another driver has taken over; nothing is committed.
    """
    try:
        with own_or(owner, str(folder.parent), "commit") as owner:
            _commit(owner, drafts)
    except OSError as error:
        raise write_failed(folder, error) from error


def _commit(owner: Owner, drafts: Sequence[Draft]) -> None:
    store = store_of(owner.out)
    units = {draft.name: draft.unit for draft in drafts}
    for file in (file for unit in units.values() for file in unit.files()):
        if (size := store.size(f"{owner.out}/{file.written_as}")) != file.bytes:
            owner.check()  # who took over has swept it
            what = "is gone" if size is None else f"has {size} bytes instead of {file.bytes}"
            raise StageFailed(
                f"{owner.out}/{file.written_as}: {what}; run the same command again, it resumes"
            )
    before = [found.unit for name in units if (found := owner.state.units.get(name))]
    replaced = sorted(file.path for unit in before for file in unit.files())
    try:
        owner.append(Commit(units=units, replaced=replaced))
    except Fenced:
        for draft in drafts:
            discard(owner.out, draft)
        raise


def discard(out: str | Location, draft: Draft) -> None:
    """Remove a draft's temporary files; what cannot be removed is left to `sweep`."""
    _remove(str(out), list(draft.unit.files()))


def _remove(out: str, written: list[LogFile]) -> None:
    for file in written:
        _delete(out, file.written_as)


def _delete(out: str, path: str) -> None:
    with suppress(OSError):
        store_of(out).delete(f"{out}/{path}")


def prepare(folder: Location) -> None:
    """Create a subset's folders."""
    try:
        for name in adopt.FOLDERS:
            store_of(folder).make_folder(f"{folder}/{name}")
    except OSError as error:
        raise write_failed(folder, error) from error
