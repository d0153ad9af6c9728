"""What a copy of a corpus consists of: its files, where each lies and is to lie, and its records.

A copy keeps every record under its number, with its nonce and time, so the two logs tell the same story. Only
names of files differ: in a folder a file lies at its place, and what a record replaced below `.replaced/`; in
a bucket each has a name for good. A name that a bucket gave is kept in another bucket. A file of a folder
gets one made of its place and its SHA-256: the same each time, so an interrupted copy goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from ..io.store import TEMPORARY
from . import log
from .log import LogState
from .records import Adopt, Checkpoint, Commit, Config, LogFile, LogUnit, Merged, Planned, Record


class CopyFile(NamedTuple):
    """A file of a copy.

    Attributes:
        unit: "subset/unit" that it belongs to; "" if it is no unit's.
        file: as the log of the corpus has it.
        source: where it lies, below the corpus.
        target: where it is to lie, below the copy.
        is_former: a later record has replaced it, so it may not be kept any more.
    """

    unit: str
    file: LogFile
    source: str
    target: str
    is_former: bool = False


def name_in_bucket(file: LogFile) -> str:
    """The name of a file in a bucket: the one that it has there, or one that only this content gets."""
    if file.name:
        return file.name
    folder, slash, name = file.path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return f"{folder}{slash}{stem or suffix}-{_nonce(file)}{dot}{suffix if stem else ''}"


def _staged_name(file: LogFile, number: int) -> str:
    """The name, in a folder, of a file of a record that is not written yet."""
    folder, slash, name = file.path.rpartition("/")
    return f"{folder}{slash}{TEMPORARY}{name}-{_nonce(file, number)}"


def _nonce(file: LogFile, number: int = 0) -> str:
    return hashlib.sha256(f"{number} {file.path} {file.sha256}".encode()).hexdigest()[:12]


class CopyPlan:
    """A copy of what the records of a corpus say together.

    Args:
        records: of the corpus, from the first one on.
        from_bucket, to_bucket: whether the corpus, and the copy, are in buckets.
        known: number of the newest record that the copy has already; 0 if it is a new one.
        names: (path, SHA-256) -> the name that a copy in a bucket has given to a file. It is another one than
            here if the copy is what this corpus was copied from.

    Attributes:
        known: as given.
        state: what the records say.
        files: the files of the copy, each once: those of `state`, and former ones that records name.
    """

    def __init__(
        self,
        records: Sequence[Record],
        from_bucket: bool,
        to_bucket: bool,
        known: int,
        names: Mapping[tuple[str, str], str] = MappingProxyType({}),
    ):
        self._records, self.known, self._names = records, known, names
        self._from_bucket, self._to_bucket = from_bucket, to_bucket
        self.state = LogState()
        self._former: list[tuple[int, str, LogFile]] = []
        """(record that replaced it, unit, file)."""
        self._since: dict[str, int] = {}
        """The newest record of each file that is no unit's."""
        for record in records:
            if isinstance(record, Commit):
                self._former += _replaced_by(self.state, record)
            else:
                self._since |= {file.path: record.number for file in log.files_of(record)}
            self.state = self.state.after(record)
        self.files: list[CopyFile] = list(self._list_files().values())

    def _list_files(self) -> dict[str, CopyFile]:
        """By target; what is present comes first, and stays where two have one name."""
        found: dict[str, CopyFile] = {}
        present = [("", file, self._since[path]) for path, file in self.state.files.items()]
        for name, (unit, since) in sorted(self.state.units.items()):
            present += [(name, file, since) for file in unit.files()]
        for unit, file, since in present:
            each = CopyFile(unit, file, file.place, self._target(file, since))
            found.setdefault(each.target, each)
        for number, unit, file in self._former:
            for each in self._former_files(number, unit, file):
                found.setdefault(each.target, each)
        return found

    def _target(self, file: LogFile, since: int) -> str:
        if self._to_bucket:
            return self._name(file)
        return _staged_name(file, since) if self.known and since > self.known else file.path

    def _former_files(self, number: int, unit: str, file: LogFile) -> Iterable[CopyFile]:
        """A file that a record replaced. In a folder that has an earlier copy, the log's moves keep it."""
        kept = f"{log.REPLACED}/{number}/{file.path}"
        source = file.name if self._from_bucket else kept
        if self._to_bucket:
            if number > self.known:  # others came with their record
                yield CopyFile(unit, file, source, self._name(file), True)
        elif number <= self.known or not self.known:
            yield CopyFile(unit, file, source, kept, True)
        else:
            for record in self._records[self.known : number]:
                if isinstance(record, Commit) and unit in record.units:
                    if file in record.units[unit].files():
                        yield CopyFile(unit, file, source, _staged_name(file, record.number), True)

    def written_records(self) -> list[Record]:
        """The records of the copy, from the first one on."""
        written, state = list[Record](), LogState()
        for record in self._records:
            if isinstance(record, Checkpoint):
                summed = state.checkpoint()
                new = msgspec.structs.replace(
                    summed,
                    number=record.number,
                    epoch=record.epoch,
                    nonce=record.nonce,
                    time_s=record.time_s,
                )
            else:
                new = self._written(record)
            state = state.after(new)
            written.append(new)
        return written

    def _written(self, record: Record) -> Record:
        number = record.number
        match record:
            case Commit(units=units):
                named = {name: self._unit(unit, number) for name, unit in units.items()}
                return msgspec.structs.replace(record, units=named)
            case Adopt(units=units, files=named):
                changed = {name: self._unit(unit, number) for name, unit in units.items()}
                return msgspec.structs.replace(
                    record, units=changed, files=[self._file(file, number) for file in named]
                )
            case Planned(files=named) | Config(files=named) | Merged(files=named):
                return msgspec.structs.replace(record, files=[self._file(file, number) for file in named])
            case _:
                return record

    def _unit(self, unit: LogUnit, number: int) -> LogUnit:
        return msgspec.structs.replace(
            unit,
            manifest=self._file(unit.manifest, number),
            ledger=self._file(unit.ledger, number),
            shard=unit.shard and self._file(unit.shard, number),
        )

    def _name(self, file: LogFile) -> str:
        return self._names.get((file.path, file.sha256)) or name_in_bucket(file)

    def _file(self, file: LogFile, number: int) -> LogFile:
        """A file as record `number` of the copy names it."""
        if self._to_bucket:
            return msgspec.structs.replace(file, temporary="", name=self._name(file))
        is_staged = self.known and number > self.known
        return msgspec.structs.replace(
            file, temporary=_staged_name(file, number) if is_staged else "", name=""
        )


def _replaced_by(state: LogState, record: Commit) -> list[tuple[int, str, LogFile]]:
    """The files that a record replaces, as the state before it has them."""
    paths = set(record.replaced)
    return [
        (record.number, name, file)
        for name in record.units
        if name in state.units
        for file in state.units[name].unit.files()
        if file.path in paths
    ]
