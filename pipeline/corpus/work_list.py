"""The plan of a subset: its images in a stable order, cut into units. Same sources and config, same plan.

`OUT/<subset>/plan/plan.parquet` has a row per image and a row group per unit, so that a worker reads its own
unit and nothing else. `plan.json` has the content hash, which every manifest names, and the fingerprint of
the source
files: while that is unchanged, a resume does not parse the sources again.

The hash covers what the sources declare: keys, names, annotations, lengths, lasting problems. It leaves out
where files lie and what was missing, so that a photo that is found later does not make another plan.
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

TABLE = "plan.parquet"
SUMMARY = "plan.json"

_VERSION = 1
_EXAMPLES = 5
_SAMPLED_PHOTOS = 200


class Plan(msgspec.Struct, frozen=True):
    """What the driver knows of a plan; the images are in the table beside it.

    Attributes:
        subset: name of the subset.
        digest: content hash over the ordered images and `images_per_shard`.
        num_images: in all units.
        num_units: units are `unit_name(0)` to `unit_name(num_units - 1)`.
        images_per_shard: images of a unit; the last has what is left.
        photo_bytes: of all photos together, estimated from a sample.
        fingerprint: version of every annotation file, tar and folder, by URL.
        version: of this format.
        folder: where this plan was read from; not part of it.
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
        """Name of a unit, which sorts by its index."""
        return f"{self.subset}-{index:06d}"

    def unit_names(self) -> list[str]:
        """All units in order."""
        return [self.unit_name(index) for index in range(self.num_units)]

    def read_unit(self, index: int) -> list[CatalogEntry]:
        """The images of a unit; see the function `read_unit`."""
        return read_unit(Path(self.folder) / TABLE, index)


def make_plan(source: SubsetSource, config: BuildConfig, folder: Path, limit: int | None = None) -> Plan:
    """Plan a subset, or find that the plan that is there still holds.

    Args:
        source: of the subset.
        config: of the build; `images_per_shard` cuts the units.
        folder: of the subset, `OUT/<subset>`; the plan goes to `plan/` in it.
        limit: plan only this many images, the first ones.

    Returns:
        The plan on disk. Calling it again, at any time, gives the same one.

    Raises:
        ConfigError: the sources cannot be listed.
        IntegrityError: a plan is there and the sources have changed since; names the difference.
    """
    folder = Path(folder) / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(source, limit)
    old = load_plan(folder.parent) if (folder / SUMMARY).exists() else None
    if old is not None and _holds(old, fingerprint, config):
        return old
    entries = islice(source.catalog(), limit)
    fresh = folder / f"{files.TEMPORARY}{TABLE}-{os.getpid()}"
    try:
        plan = _write_table(entries, source.subset, config.images_per_shard, fingerprint, fresh)
        if old is not None and old.digest != plan.digest:
            raise IntegrityError(_difference(folder / TABLE, fresh, old, plan))
        os.replace(fresh, folder / TABLE)
    finally:
        fresh.unlink(missing_ok=True)
    with files.write_atomic(folder / SUMMARY) as file:
        file.write(msgspec.json.format(msgspec.json.encode(plan, order="sorted"), indent=1) + b"\n")
    return msgspec.structs.replace(plan, folder=str(folder))


def holds(plan: Plan, source: SubsetSource, config: BuildConfig, limit: int | None = None) -> bool:
    """Whether `make_plan` would return this plan without reading the sources anew.

    Raises:
        ConfigError: the sources are not where the configuration says.
    """
    return _holds(plan, _fingerprint(source, limit), config)


def _fingerprint(source: SubsetSource, limit: int | None) -> dict[str, str]:
    return source.fingerprint() | ({} if limit is None else {"limit": str(limit)})


def _holds(plan: Plan, fingerprint: dict[str, str], config: BuildConfig) -> bool:
    same = plan.fingerprint == fingerprint and plan.images_per_shard == config.images_per_shard
    return same and (Path(plan.folder) / TABLE).is_file()


def load_plan(folder: Path) -> Plan:
    """The plan of a subset's folder.

    Raises:
        IntegrityError: there is none, or it cannot be read.
    """
    path = Path(folder) / "plan" / SUMMARY
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: no plan; run the build to make one") from error
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise IntegrityError(f"{path}: not a plan ({error}); delete it and build again") from error
    if plan.version != _VERSION:
        raise IntegrityError(f"{path}: plan of version {plan.version}, expected {_VERSION}; use a new `out`")
    return msgspec.structs.replace(plan, folder=str(path.parent))


def read_unit(path: str | Path, index: int) -> list[CatalogEntry]:
    """The images of one unit, in order; reads only its own row group.

    Args:
        path: of `plan.parquet`.
        index: of the unit.

    Raises:
        IntegrityError: the table cannot be read or has no such unit.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            if not 0 <= index < table.num_row_groups:
                raise IntegrityError(f"{path}: no unit {index}, it has {table.num_row_groups}")
            return _to_entries(table.read_row_group(index, use_threads=False))
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path}: not readable ({error}); delete `plan/` and build again") from error


def pending(plan: Plan, manifests_folder: str | Path, recipe: str) -> list[int]:
    """Indices of the units that have no manifest yet, or one of another recipe; in order.

    Raises:
        IntegrityError: a manifest cannot be read, is of another plan, or of no unit of this one.
    """
    folder = Path(manifests_folder)
    try:
        there = {name for name in os.listdir(folder) if name.endswith(".json") and name[0] != "."}
    except FileNotFoundError:
        return list(range(plan.num_units))
    left = []
    for index in range(plan.num_units):
        name = f"{plan.unit_name(index)}.json"
        if name not in there:
            left.append(index)
            continue
        there.remove(name)
        found = _read_manifest(folder / name)
        if found.plan != plan.digest:
            raise IntegrityError(
                f"{folder / name}: of plan {found.plan[:12]}, not {plan.digest[:12]}; use a new `out`"
            )
        if found.recipe != recipe:
            left.append(index)
    if there:
        raise IntegrityError(f"{folder / min(there)}: of no unit of this plan; use a new `out`")
    return left


class _Head(msgspec.Struct):
    """The part of a manifest that says whether its unit is done."""

    plan: str
    recipe: str
    unit: str


_HEAD = msgspec.json.Decoder(_Head)


def _read_manifest(path: Path) -> _Head:
    try:
        data = path.read_bytes()
        head = _HEAD.decode(data)
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
) -> Plan:
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
    return Plan(subset, digest.hexdigest(), num_images, num_units, size, total, fingerprint)


def _content(entry: CatalogEntry) -> bytes:
    """What an image is to the plan: 16 bytes. Not where its files lie, nor what a second look may turn."""
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


def _difference(old_path: Path, new_path: Path, old: Plan, new: Plan) -> str:
    """The message that refuses a resume: what the plans disagree on, with examples."""
    import pyarrow.parquet as pq

    head = f"{old_path}: the sources or the config are not those that this build was planned with: "
    mend = "; restore them, or use a new `out`"
    if old.images_per_shard != new.images_per_shard:
        return f"{head}images_per_shard was {old.images_per_shard}, is {new.images_per_shard}{mend}"
    limits = [plan.fingerprint.get("limit", "none") for plan in (old, new)]
    if limits[0] != limits[1]:
        head += f"the limit of images was {limits[0]}, is {limits[1]}: "
    if not old_path.is_file():
        return f"{head}which images differ cannot be said, it is gone{mend}"
    tables = [pq.read_table(path, columns=["key", "content"]) for path in (old_path, new_path)]
    before, after = (
        dict(zip(table["key"].to_pylist(), table["content"].to_pylist(), strict=True)) for table in tables
    )
    groups = {
        "added": [key for key in after if key not in before],
        "removed": [key for key in before if key not in after],
        "changed": [key for key, content in after.items() if key in before and before[key] != content],
    }
    said = [
        f"{len(keys)} images {what} ({', '.join(keys[:_EXAMPLES])}{', ...' if len(keys) > _EXAMPLES else ''})"
        for what, keys in groups.items()
        if keys
    ]
    return head + (", ".join(said) or "the same images in another order") + mend
