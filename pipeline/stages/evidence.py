"""What models said, kept per stage and unit, so that it is paid for once.

`evidence/<stage>-<digest>/<unit>.parquet` holds a row per region. The digest covers everything the answer
depends on (backend, weights, prompt, settings, and the stages before it that used a model), so evidence of
another model is never taken for this one's. Each row also carries a fingerprint of what exactly was asked
(the mask, the caption, the phrase): a row whose question has changed counts as missing.

Each row also names the photo that the model saw, by the SHA-256 of its bytes: an answer about another photo
counts as missing, too. Rows of early releases name none, and count whatever the photo is.

A digest over the content lies in the file's metadata. A damaged file is never another answer: it counts as
absent, with a warning, and what it held is asked for again. Equal evidence is equal bytes.

A field of an answer that has a default was not in early releases. Its column is left out if it is null in
every row, so that the file is the one that they wrote; a field without a column is None.

Files appear whole. Two workers may save the same unit, as one does whose driver was replaced while it was
paused: the answer that was saved first stays. In a bucket a file is never written again: what is added is
another part, `<unit>.1.parquet` and so on, and of each number there is one. A copy of a bucket in a folder
has such parts, too; what is saved there is one file again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from ...schemas.errors import IntegrityError, StageFailed
from ...schemas.records import Blob
from ..io import files
from ..io.location import Location, is_bucket
from ..io.store import store_of

log = logging.getLogger(__name__)

E = TypeVar("E", bound=msgspec.Struct)


_TYPES = {"str": "string", "int": "int64", "float": "float64"}
_PHOTO = "photo"
_DIGEST = b"paracaption.sha256"
"""Key of the file's metadata under which the digest of its content lies."""

_ROWS_PER_BYTE = 1000
"""More rows than any file of its size can hold: what a damaged footer says is not allocated."""


class Answered(NamedTuple):
    """A row of evidence.

    Attributes:
        asked: fingerprint of the question.
        answer: the model's.
        photo: SHA-256 in hex of the photo that the model saw; "" if it saw none, or if that is not known.
    """

    asked: str
    answer: Any
    photo: str = ""


Evidence = dict[tuple[str, int], Answered]
"""(image key, region id) -> what was answered."""


class _Damaged(Exception):
    """An evidence file is not what was written; says in what."""


class EvidenceStore(Generic[E]):
    """The evidence of one stage.

    Args:
        folder: OUT/<subset>/evidence/<stage>-<digest>.
        kind: the struct of one row.
    """

    def __init__(self, folder: Location, kind: type[E]):
        self.folder = folder
        self.kind = kind
        self._loaded: dict[str, tuple[Evidence, int]] = {}
        """Of the unit that was loaded last from a bucket: what there was, and the number of the next part."""

    def path(self, unit: str, part: int = 0) -> Location:
        """Where the unit's evidence lies, or a further part of it."""
        return self.folder / (f"{unit}.{part}.parquet" if part else f"{unit}.parquet")

    def load(self, unit: str) -> Evidence:
        """All evidence of a unit, empty if there is none. A damaged file counts as missing, with a warning.

        Raises:
            StageFailed: the disk does not give the file. That says nothing of what is in it.
        """
        evidence, part = self._load_parts(unit)
        if is_bucket(self.folder):
            self._loaded = {unit: (dict(evidence), part)}  # who asks adds to what is returned
        return evidence

    def _load_parts(self, unit: str) -> tuple[Evidence, int]:
        """What all parts say together, and the number of the next part."""
        evidence, part = self._load(unit, 0), 0
        while evidence is not None:
            part += 1
            more = self._load(unit, part)
            if more is None:
                return evidence, part
            evidence = _with(evidence, more)
        return evidence or {}, part

    def _load(self, unit: str, part: int) -> Evidence | None:
        """One part, empty if it is damaged; None if there is none."""
        path = self.path(unit, part)
        try:
            return self._read_part(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StageFailed(
                f"{path}: cannot be read ({error.strerror or error}); run the same command again, or "
                "delete the file: what it held is asked for again"
            ) from error
        except IntegrityError as error:
            log.warning("%s; it is asked for again", error)
            return {}

    def read(self, unit: str, parts: int | None = None) -> Evidence:
        """The same of a file that must be there and undamaged, with its further parts.

        Args:
            unit: name of the unit.
            parts: how many there are, if that is known.

        Raises:
            IntegrityError: it is damaged.
            OSError: the disk does not give it.
        """
        evidence, part = self._read_part(self.path(unit)), 0
        while (part := part + 1) != parts:
            try:
                evidence = _with(evidence, self._read_part(self.path(unit, part)))
            except FileNotFoundError:
                break
        return evidence

    def _read_part(self, path: Location) -> Evidence:
        data = files.read(Blob(str(path)))
        try:
            keys, regions, asked, photos, *answers = self._read(data)
            return {
                (key, region): Answered(question, self.kind(*answer), photo or "")
                for key, region, question, photo, *answer in zip(
                    keys, regions, asked, photos, *answers, strict=True
                )
            }
        except Exception as error:  # whatever a reader of Parquet makes of damaged bytes
            raise IntegrityError(f"{path}: unreadable evidence ({error})") from error

    def exists(self, unit: str) -> bool:
        """Whether there is any evidence of a unit."""
        path = str(self.path(unit))
        return store_of(path).size(path) is not None

    def has_all(self, units: Collection[str]) -> bool:
        """Whether there is evidence of all these units. A bucket is listed, which may lack new ones."""
        listed = set(files.list_names(str(self.folder))) if is_bucket(self.folder) else set[str]()
        return all(self.path(unit).name in listed or self.exists(unit) for unit in units)

    def save(self, unit: str, evidence: Evidence) -> Evidence:
        """Add to a unit's evidence, atomically; rows sorted by image key and region.

        Returns:
            What is saved now: where somebody else has saved an answer to the same question first, that one.
        """
        if is_bucket(self.folder):
            return self._add_part(unit, evidence)
        saved, part = self._load_parts(unit)
        evidence = _with(saved, evidence)
        path = str(self.path(unit))
        store_of(path).put(path, self._encode(evidence))
        if part > 1:
            self._delete_parts(unit, 1)
        return evidence

    def _add_part(self, unit: str, evidence: Evidence) -> Evidence:
        """Add a part with what the others do not say, under the first number that is free."""
        while True:
            saved, part = self._loaded.pop(unit, None) or self._load_parts(unit)
            new = {place: row for place, row in evidence.items() if not _says(saved.get(place), row)}
            path = str(self.path(unit, part))
            if not new:
                return saved
            if store_of(path).create(path, self._encode(new)):
                self._loaded = {unit: (saved | new, part + 1)}
                return saved | new

    def forget(self, unit: str, keys: Collection[str]) -> bool:
        """Delete the answers about some images of a unit; returns whether there were any.

        Raises:
            IntegrityError: the file is damaged.
            OSError: the disk does not give it, or does not take the new one.
        """
        self._loaded = {}
        saved = self.read(unit)
        left = {place: row for place, row in saved.items() if place[0] not in keys}
        path = str(self.path(unit))
        if len(left) == len(saved):
            return False
        if left:
            store_of(path).put(path, self._encode(left))
            self._delete_parts(unit, 1)
        else:
            self.delete(unit)
        return True

    def delete(self, unit: str) -> None:
        """Delete the unit's evidence."""
        self._loaded = {}
        self._delete_parts(unit, 0)

    def _delete_parts(self, unit: str, first: int) -> None:
        """Delete all parts from a number on, the last one first: no number is left out at any time."""
        store, last = store_of(self.folder), first
        while store.size(str(self.path(unit, last))) is not None:
            last += 1
        for part in range(last - 1, first - 1, -1):
            store.delete(str(self.path(unit, part)))

    def _encode(self, evidence: Evidence) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [(*place, *row) for place, row in sorted(evidence.items(), key=lambda item: item[0])]
        columns = [[row[i] for row in rows] for i in range(3)]
        columns.append([row[4] or None for row in rows])
        answers = {name: [getattr(row[3], name) for row in rows] for name in self.kind.__struct_fields__}
        absent = {name for name in self._later if all(each is None for each in answers[name])}
        columns += [column for name, column in answers.items() if name not in absent]
        schema = self._schema(absent)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
        content = _content_digest(schema.names, [array.to_pylist() for array in arrays])
        schema = schema.with_metadata({_DIGEST: content})
        table, buffer = pa.Table.from_arrays(arrays, schema=schema), pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue().to_pybytes()

    def _read(self, data: bytes) -> list[list]:
        """The columns of a file's bytes, `photo` after `asked` in any case.

        Raises:
            Exception: the bytes are not an evidence file, in one way or another.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if file.metadata.num_rows > _ROWS_PER_BYTE * len(data):
            raise _Damaged(f"{file.metadata.num_rows} rows in {len(data)} bytes")
        found = file.schema_arrow
        absent = {_PHOTO, *self._later} - set(found.names)
        if not found.equals(self._schema(absent)):
            raise _Damaged(f"its columns are {', '.join(found.names)}")
        columns = [column.to_pylist() for column in file.read(use_threads=False).columns]
        digest = (found.metadata or {}).get(_DIGEST)  # early releases, without photos, wrote none
        if _PHOTO not in absent and digest != _content_digest(found.names, columns):
            raise _Damaged("its content is not what was written")
        named = dict(zip(found.names, columns, strict=True))
        return [named.get(name, [None] * len(columns[0])) for name in self._schema(set()).names]

    @property
    def _later(self) -> tuple[str, ...]:
        """The fields of an answer that early releases did not have."""
        names = self.kind.__struct_fields__
        return names[len(names) - len(self.kind.__struct_defaults__) :]

    def _schema(self, absent: set[str]) -> Any:
        import pyarrow as pa

        named = [("key", "string"), ("region", "int64"), ("asked", "string"), (_PHOTO, "string")]
        named += [
            (name, _TYPES[str(kind).split(" |")[0].strip()])
            for name, kind in self.kind.__annotations__.items()
        ]
        return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in named if name not in absent])


def unit_of_file(name: str) -> str:
    """The unit whose evidence a file of this name has, or a part of it."""
    unit, _, part = name.removesuffix(".parquet").rpartition(".")
    return unit if part.isdigit() and unit else name.removesuffix(".parquet")


def _with(saved: Evidence, added: Evidence) -> Evidence:
    """Both together; where both answer the same question, the first answer stays."""
    return saved | {place: row for place, row in added.items() if not _says(saved.get(place), row)}


def _says(saved: Answered | None, row: Answered) -> bool:
    return saved is not None and saved.asked == row.asked and saved.photo in ("", row.photo)


def _content_digest(names: list[str], columns: list[list]) -> bytes:
    """SHA-256 of what is in a file, in hex, however Parquet writes it."""
    return hashlib.sha256(msgspec.msgpack.encode([names, columns])).hexdigest().encode()


def fingerprint(*parts: object) -> str:
    """16 hex digits of what was asked."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def digest(*parts: object) -> str:
    """16 hex digits that identify a configuration; JSON with sorted keys underneath."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:16]
