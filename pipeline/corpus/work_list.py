"""The work list of a subset: its images in a stable order, cut into units. Same input, same list.

It lies in `OUT/<subset>/plan/`. `plan.parquet` has a row per image and a row group per unit, so that a worker
reads its own unit and nothing else. `plan.json` has a digest of the content, which every manifest names (as
`plan`), and a fingerprint of the source files: while that is unchanged, a resume does not parse the sources.

The digest covers what the sources declare: keys, names, annotations, lengths, lasting problems. It leaves out
where files lie and which were missing, so that a photo that is found later does not change the list.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ...schemas.config import BuildConfig
from ...schemas.errors import IntegrityError
from ...schemas.reasons import ERRORS, Reason
from ...schemas.records import Blob, Drop
from ..io import files
from ..sources.protocols import CatalogEntry
from ..sources.registry import SubsetSource
from .reader import list_units

FOLDER = "plan"
TABLE = "plan.parquet"
SUMMARY = "plan.json"

_VERSION = 1
_EXAMPLES = 5
_SAMPLED_PHOTOS = 200


class WorkList(msgspec.Struct, frozen=True):
    """What the driver knows of a work list. The images are in the table beside it.

    Attributes:
        subset: name of the subset.
        digest: of the images in their order and of `images_per_shard`.
        num_images: number of images in all units.
        num_units: number of units: `unit_name(0)` to `unit_name(num_units - 1)`.
        images_per_shard: number of images in each unit but the last, which has what is left.
        photo_bytes: size of all photos together, estimated from a sample.
        fingerprint: version of every annotation file, tar and folder, by URL.
        version: of this format.
        folder: the subset's folder that the list was read from. Empty on disk.
    """

    subset: str
    digest: str
    num_images: int
    num_units: int
    images_per_shard: int
    photo_bytes: int
    fingerprint: dict[str, str]
    version: int = _VERSION
    folder: str = ""

    def unit_name(self, index: int) -> str:
        """Name of a unit. Names sort by the index."""
        return f"{self.subset}-{index:06d}"

    def unit_names(self) -> list[str]:
        """Names of all units in order."""
        return [self.unit_name(index) for index in range(self.num_units)]

    def read_unit(self, index: int) -> list[CatalogEntry]:
        """The images of a unit; see the function `read_unit`."""
        return read_unit(self.folder, index)

    def is_current(self, source: SubsetSource, config: BuildConfig, limit: int | None = None) -> bool:
        """Whether `make_work_list` would return this list without parsing the sources again.

        Raises:
            ConfigError: the sources are not where the configuration says.
        """
        return self._matches(_fingerprint(source, limit), config)

    def _matches(self, fingerprint: dict[str, str], config: BuildConfig) -> bool:
        same = self.fingerprint == fingerprint and self.images_per_shard == config.images_per_shard
        return same and table_path(self.folder).is_file()


def table_path(folder: str | Path) -> Path:
    """Where the table of the images lies in a subset's folder."""
    return Path(folder) / FOLDER / TABLE


def summary_path(folder: str | Path) -> Path:
    """Where the work list itself lies in a subset's folder; it exists only once the table is complete."""
    return Path(folder) / FOLDER / SUMMARY


def make_work_list(
    source: SubsetSource, config: BuildConfig, folder: str | Path, limit: int | None = None
) -> WorkList:
    """List a subset's images and cut them into units, or find that the list on disk is still current.

    Calling it again, at any time, gives the same list.

    Args:
        source: of the subset.
        config: of the build; `images_per_shard` cuts the units.
        folder: of the subset, `OUT/<subset>`; the list goes to `plan/` in it.
        limit: list only the first N images; None lists all.

    Raises:
        ConfigError: the sources cannot be listed.
        IntegrityError: the sources have changed since the list on disk was made; says how.
    """
    folder = Path(folder)
    table = table_path(folder)
    table.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(source, limit)
    old = load_work_list(folder) if summary_path(folder).exists() else None
    if old is not None and old._matches(fingerprint, config):
        return old
    entries = islice(source.catalog(), limit)
    fresh = table.with_name(f"{files.TEMPORARY}{TABLE}-{os.getpid()}")
    try:
        made = _write_table(entries, source.subset, config.images_per_shard, fingerprint, fresh)
        if old is not None and old.digest != made.digest:
            raise IntegrityError(_difference(table, fresh, old, made))
        os.replace(fresh, table)
    finally:
        fresh.unlink(missing_ok=True)
    with files.write_atomic(summary_path(folder)) as file:
        file.write(msgspec.json.format(msgspec.json.encode(made, order="sorted"), indent=1) + b"\n")
    return msgspec.structs.replace(made, folder=str(folder))


def _fingerprint(source: SubsetSource, limit: int | None) -> dict[str, str]:
    return source.fingerprint() | ({} if limit is None else {"limit": str(limit)})


def load_work_list(folder: str | Path) -> WorkList:
    """The work list in a subset's folder.

    Raises:
        IntegrityError: there is none, or it cannot be read.
    """
    path = summary_path(folder)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=WorkList)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: no work list; run the build to make one") from error
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise IntegrityError(f"{path}: not a work list ({error}); delete it and build again") from error
    if found.version != _VERSION:
        raise IntegrityError(
            f"{path}: work list of version {found.version}, expected {_VERSION}; use a new `out`"
        )
    return msgspec.structs.replace(found, folder=str(folder))


def read_unit(folder: str | Path, index: int) -> list[CatalogEntry]:
    """The images of one unit, in order; reads nothing of the other units.

    Args:
        folder: of the subset, `OUT/<subset>`.
        index: of the unit.

    Raises:
        IntegrityError: the table cannot be read or has no such unit.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = table_path(folder)
    try:
        with pq.ParquetFile(path) as table:
            if not 0 <= index < table.num_row_groups:
                raise IntegrityError(f"{path}: no unit {index}, it has {table.num_row_groups}")
            return _to_entries(table.read_row_group(index, use_threads=False))
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path}: not readable ({error}); delete `plan/` and build again") from error


def find_pending_units(work_list: WorkList, recipe: str) -> list[int]:
    """Indices of the units that are not committed, or were committed with another recipe; in order.

    Args:
        work_list: as it was read from a subset's folder.
        recipe: digest of the recipe.

    Raises:
        IntegrityError: a manifest cannot be read, or is of another work list or of no unit of this one.
    """
    committed = {unit.name: unit.manifest for unit in list_units(work_list.folder)}
    pending = []
    for index in range(work_list.num_units):
        path = committed.pop(work_list.unit_name(index), None)
        if path is None:
            pending.append(index)
            continue
        found = _read_head(Path(path))
        if found.plan != work_list.digest:
            raise IntegrityError(
                f"{path}: of work list {found.plan[:12]}, not {work_list.digest[:12]}; use a new `out`"
            )
        if found.recipe != recipe:
            pending.append(index)
    if committed:
        raise IntegrityError(f"{min(committed.values())}: of no unit of this work list; use a new `out`")
    return pending


class _Head(msgspec.Struct):
    """The part of a manifest that says whether its unit is done."""

    plan: str
    recipe: str
    unit: str


_HEAD = msgspec.json.Decoder(_Head)


def _read_head(path: Path) -> _Head:
    try:
        head = _HEAD.decode(path.read_bytes())
        if head.unit != path.stem:
            raise msgspec.ValidationError(f"it is of unit {head.unit}")
        return head
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise IntegrityError(
            f"{path}: not a manifest ({error}); delete it, and its unit is built again"
        ) from error


# The table.

_COLUMNS = (
    "key",
    "source",
    "photo_url",
    "photo_offset",
    "photo_length",
    "annotation_url",
    "annotation_offset",
)
_COLUMNS += (
    "annotation_length",
    "record",
    "file_name",
    "drop_stage",
    "drop_reason",
    "drop_detail",
    "content",
)


def _schema() -> Any:
    import pyarrow as pa

    numbers = {"source": pa.int32(), "record": pa.binary(), "content": pa.binary(16)}
    kinds = {name: pa.int64() if name.endswith(("offset", "length")) else pa.string() for name in _COLUMNS}
    return pa.schema(list((kinds | numbers).items()))


def _write_table(
    entries: Iterator[CatalogEntry], subset: str, size: int, fingerprint: dict[str, str], path: Path
) -> WorkList:
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = hashlib.sha256(f"{_VERSION} {subset} {size}\n".encode())
    num_images = num_units = 0
    sample: list[Blob] = []
    step = 1
    schema = _schema()
    with (
        open(path, "wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", compression_level=1) as writer,
    ):
        while unit := list(islice(entries, size)):
            contents = [_content(entry) for entry in unit]
            for content in contents:
                digest.update(content)
            for entry in unit:
                if num_images % step == 0 and entry.photo is not None:
                    sample.append(entry.photo)
                num_images += 1
            if len(sample) > 2 * _SAMPLED_PHOTOS:
                sample, step = sample[::2], step * 2
            columns = list(zip(*map(_row, unit, contents), strict=True))
            arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=size)
            num_units += 1
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what was written, whoever wrote it
    total = _photo_bytes(sample, num_images)
    return WorkList(subset, digest.hexdigest(), num_images, num_units, size, total, fingerprint)


def _content(entry: CatalogEntry) -> bytes:
    """16 bytes for an image's content: not where its files lie, nor a problem that may go away."""
    reason = None if entry.drop is None else entry.drop.reason
    lasting = "" if reason is None or reason in ERRORS else reason.value
    parts = (entry.key, str(entry.source), entry.file_name, lasting)
    # A length tells that a tar's member is another one now; whole files have none here.
    annotation = "" if entry.annotation is None else str(entry.annotation.length)
    text = "\0".join((*parts, annotation)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text + b"\0" + entry.record, digest_size=16).digest()


def _row(entry: CatalogEntry, content: bytes) -> tuple[Any, ...]:
    photo, annotation, drop = entry.photo, entry.annotation, entry.drop
    return (
        _text(entry.key),
        entry.source,
        *((None, None, None) if photo is None else (_text(photo.url), photo.offset, photo.length)),
        *(
            (None, None, None)
            if annotation is None
            else (_text(annotation.url), annotation.offset, annotation.length)
        ),
        entry.record,
        _text(entry.file_name),
        *((None, None, None) if drop is None else (drop.stage, drop.reason.value, _text(drop.detail))),
        content,
    )


def _text(name: str) -> str:
    """File names of a POSIX system need not be UTF-8; Parquet's strings are."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _to_entries(table: Any) -> list[CatalogEntry]:
    return [
        CatalogEntry(
            key,
            None if photo_url is None else Blob(photo_url, photo_offset, photo_length),
            None if url is None else Blob(url, offset, length),
            record,
            file_name,
            None if stage is None else Drop(stage, Reason(reason), detail),
            source,
        )
        for (
            key,
            source,
            photo_url,
            photo_offset,
            photo_length,
            url,
            offset,
            length,
            record,
            file_name,
            stage,
            reason,
            detail,
            _,
        ) in zip(*(column.to_pylist() for column in table.columns), strict=True)
    ]


def _photo_bytes(sample: list[Blob], num_images: int) -> int:
    """Size of all photos, from that of some; 0 where none can be asked."""
    known = [photo.length for photo in sample if photo.length is not None]
    for photo in [photo for photo in sample if photo.length is None and not files.is_url(photo.url)][
        :_SAMPLED_PHOTOS
    ]:
        try:
            known.append(files.size_of(photo))
        except (OSError, ValueError):  # a name with a NUL in it is a ValueError
            continue  # gone since it was listed; its reader will say so
    return sum(known) * num_images // len(known) if known else 0


def _difference(old_path: Path, new_path: Path, old: WorkList, new: WorkList) -> str:
    """The message that refuses a resume: in what the two lists differ, with examples."""
    import pyarrow.parquet as pq

    head = f"{old_path}: the sources or the config are not those that this work list was made from: "
    fix = "; restore them, or use a new `out`"
    if old.images_per_shard != new.images_per_shard:
        return f"{head}images_per_shard was {old.images_per_shard}, is {new.images_per_shard}{fix}"
    limits = [each.fingerprint.get("limit", "none") for each in (old, new)]
    if limits[0] != limits[1]:
        head += f"the limit of images was {limits[0]}, is {limits[1]}: "
    if not old_path.is_file():
        return f"{head}which images differ cannot be said, it is gone{fix}"
    tables = [pq.read_table(path, columns=["key", "content"]) for path in (old_path, new_path)]
    before, after = (
        dict(zip(table["key"].to_pylist(), table["content"].to_pylist(), strict=True)) for table in tables
    )
    groups = {
        "added": [key for key in after if key not in before],
        "removed": [key for key in before if key not in after],
        "changed": [key for key, content in after.items() if key in before and before[key] != content],
    }
    parts = [
        f"{len(keys)} images {what} ({', '.join(keys[:_EXAMPLES])}{', ...' if len(keys) > _EXAMPLES else ''})"
        for what, keys in groups.items()
        if keys
    ]
    return head + (", ".join(parts) or "the same images in another order") + fix
