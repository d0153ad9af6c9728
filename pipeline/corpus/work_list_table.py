"""The table of a work list: a row per image, a row group per unit, a check per row over all its columns."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.errors import IntegrityError
from ...schemas.reasons import ERRORS, Reason
from ...schemas.records import Blob, Credit, Drop
from ...schemas.secrets import shorten
from ..io import files
from ..io.disk_errors import fix_of, refused_by_store
from ..io.location import Location, never_changes
from ..io.tables import TableFile
from ..sources.protocols import CatalogEntry

VERSION = 1
"""Of the work list's format; part of its digest."""

_SAMPLED_PHOTOS = 200
_UNITS_KEPT = 8
_TABLES_KEPT = 8

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
_CREDIT = "credit"
_CHECK = "check"


def _schema(credits: bool) -> Any:
    import pyarrow as pa

    kinds = {name: pa.int64() if name.endswith(("offset", "length")) else pa.string() for name in _COLUMNS}
    kinds |= {"source": pa.int32(), "record": pa.binary(), "content": pa.binary(16)}
    kinds |= {_CREDIT: pa.binary()} if credits else {}
    return pa.schema([*kinds.items(), (_CHECK, pa.binary(8))])


def _check_of_row(index: int, place: int, count: int, row: tuple[Any, ...], credit: bytes | None) -> bytes:
    """8 bytes over all columns of a row, its place in its unit, the unit's number and its number of rows.

    Early releases knew no credit: null is not part of it.
    """
    values = (index, place, count, *row) if credit is None else (index, place, count, *row, credit)
    return hashlib.blake2b(msgspec.msgpack.encode(values), digest_size=8).digest()


def _encoded(credit: Credit | None) -> bytes | None:
    return None if credit is None else msgspec.json.encode(credit)


def _begin_digest(subset: str, size: int) -> Any:
    return hashlib.sha256(f"{VERSION} {subset} {size}\n".encode())


class Written(NamedTuple):
    """What was written into a table.

    Attributes:
        digest: of the images in their order, and of the subset and the size of its units.
        num_images, num_units: how many.
        photo_bytes: size of all photos together, estimated from a sample.
        sha256: of the file, in hex.
    """

    digest: str
    num_images: int
    num_units: int
    photo_bytes: int
    sha256: str


def write_table(
    entries: Iterator[CatalogEntry], subset: str, size: int, path: Path, credits: bool = True
) -> Written:
    """Write the images in units of `size`, a row group for each. Same images, same bytes; not atomic.

    Credits decide nothing of what is read: the digest leaves them out, and without `credits` the table.
    """
    units = iter(lambda: list(islice(entries, size)), [])
    return write_units(units, subset, size, path, credits)


def write_units(
    units: Iterator[list[CatalogEntry]], subset: str, size: int, path: Path, credits: bool = True
) -> Written:
    """The same for images that are in units already, of which none has more than `size`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = _begin_digest(subset, size)
    num_images = num_units = 0
    sample: list[Blob] = []
    step = 1
    schema = _schema(credits)
    with (
        open(path, "wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", compression_level=1) as writer,
    ):
        for unit in units:
            contents = [content_of(entry) for entry in unit]
            for content in contents:
                digest.update(content)
            for entry in unit:
                if num_images % step == 0 and entry.photo is not None:
                    sample.append(entry.photo)
                num_images += 1
            if len(sample) > 2 * _SAMPLED_PHOTOS:
                sample, step = sample[::2], step * 2
            rows = list(map(_row, unit, contents))
            given = [_encoded(entry.credit) if credits else None for entry in unit]
            checks = [
                _check_of_row(num_units, place, len(rows), row, credit)
                for place, (row, credit) in enumerate(zip(rows, given, strict=True))
            ]
            columns = [*zip(*rows, strict=True), *([given] if credits else []), checks]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=size)
            num_units += 1
    photo_bytes = _photo_bytes(sample, num_images)
    return Written(digest.hexdigest(), num_images, num_units, photo_bytes, files.sha256_of(path))


def content_of(entry: CatalogEntry) -> bytes:
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
        *(
            (None, None, None)
            if drop is None
            else (drop.stage, drop.reason.value, _text(shorten(drop.detail, environment=False)))
        ),
        content,
    )


def _text(name: str) -> str:
    """File names of a POSIX system need not be UTF-8; Parquet's strings are."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def read_unit(path: str | Location, index: int) -> list[CatalogEntry]:
    """The images of one unit, in order; reads nothing of the other units.

    Raises:
        IntegrityError: the table cannot be read or has no such unit, or what is read is not what was written.
    """
    with _readable(path), _opened(str(path)) as table:
        if not 0 <= index < table.num_row_groups:
            raise IntegrityError(f"{path}: no unit {index}, it has {table.num_row_groups}")
        return _to_entries(table.read_row_group(index), index)


@contextmanager
def _opened(path: str) -> Iterator[TableFile]:
    """A table; one that never changes stays open, since its footer is a request for each unit otherwise."""
    if not never_changes(path):
        yield TableFile(path)
        return
    with _OPENING:
        table, lock = _kept_open(path)
    with lock:
        yield table


_OPENING = threading.Lock()


@lru_cache(_TABLES_KEPT)
def _kept_open(path: str) -> tuple[TableFile, threading.Lock]:
    return TableFile(path), threading.Lock()


@contextmanager
def _readable(path: str | Location) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except Exception as error:  # whatever a reader of Parquet makes of damaged bytes
        fix = "run `paracaption build CONFIG` again, which writes it, or delete it first"
        raise IntegrityError(f"{path}: not readable ({error}); {fix_of(error, fix)}") from error


class UnitReader:
    """Reads many units of one table; the units that were read last are kept.

    Args:
        path: of the table.

    Raises:
        IntegrityError: the table, or what is read of it, is damaged.
    """

    def __init__(self, path: str | Location):
        self._path = path
        with _readable(path):
            self._table = TableFile(str(path))
        self._read = lru_cache(_UNITS_KEPT)(self._read_unit)

    def keys(self) -> Iterator[str]:
        """The keys of all images, in order."""
        with _readable(self._path):
            for index in range(self._table.num_row_groups):
                yield from self._table.read_row_group(index, ["key"])["key"].to_pylist()

    def read(self, index: int) -> list[CatalogEntry]:
        """The images of a unit, in order."""
        return self._read(index)

    def _read_unit(self, index: int) -> list[CatalogEntry]:
        with _readable(self._path):
            return _to_entries(self._table.read_row_group(index), index)


def _to_entries(table: Any, index: int) -> list[CatalogEntry]:
    """The images of unit `index`, of which `table` has the rows.

    Raises:
        ValueError: they are not what was written.
    """
    added = table.column_names[len(_COLUMNS) :]
    if [*_COLUMNS, *added] != table.column_names or not set(added) <= {_CREDIT, _CHECK}:
        raise ValueError(f"its columns are {', '.join(table.column_names)}")
    rows = list(zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True))
    if not rows:
        raise ValueError(f"unit {index} has no row")
    credits: list[bytes | None] = [None] * len(rows)
    if _CREDIT in table.column_names:
        credits = table[_CREDIT].to_pylist()
    if _CHECK in table.column_names:
        checks = table[_CHECK].to_pylist()
        for place, (row, credit, check) in enumerate(zip(rows, credits, checks, strict=True)):
            if check != _check_of_row(index, place, len(rows), row, credit):
                raise ValueError(f"row {place} of unit {index} is damaged")
    return [
        CatalogEntry(
            key,
            None if photo_url is None else Blob(photo_url, photo_offset, photo_length),
            None if url is None else Blob(url, offset, length),
            record,
            file_name,
            None if stage is None else Drop(stage, Reason(reason), detail),
            source,
            None if credit is None else msgspec.json.decode(credit, type=Credit),
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
        ), credit in zip(rows, credits, strict=True)
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


def find_damage(path: str | Location, expected: Written, subset: str, size: int) -> str | None:
    """What is wrong with a table; None if it is what was written.

    Args:
        path: of the table.
        expected: what was written into it. If its `sha256` is "" (early releases wrote none), only what the
            digest covers and what cannot be decoded is found.
        subset: whose images it has.
        size: of a unit.

    Raises:
        IntegrityError: it is in a bucket, whose store does not give it.
    """
    try:
        if expected.sha256:
            found = files.sha256_of(path)
            return None if found == expected.sha256 else "damaged: it does not match its SHA-256 in plan.json"
        digest, num_images = _begin_digest(subset, size), 0
        table = TableFile(str(path))
        if table.num_row_groups != expected.num_units:
            return f"damaged: it has {table.num_row_groups} units, plan.json {expected.num_units}"
        for unit in table.row_groups():
            unit.validate(full=True)
            for content in unit["content"].to_pylist():
                digest.update(content)
            num_images += len(unit)
    except FileNotFoundError:
        return "gone"
    except Exception as error:  # whatever a reader of Parquet makes of damaged bytes
        if refused_by_store(error):
            raise IntegrityError(f"{path}: not readable ({error}); {fix_of(error, '')}") from error
        return f"damaged ({error})"
    same = (num_images, digest.hexdigest()) == (expected.num_images, expected.digest)
    return None if same else "damaged: its images are not those of plan.json"
