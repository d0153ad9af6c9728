"""The commit log of a corpus: numbered records, each created only if its number is free.

    OUT/log/000000000001.json    records; what they say, and nothing else, is what is committed
    OUT/beat/000003              the sign of life of the third owner
    OUT/.replaced/17/...         files that record 17 replaced, until `failures.keep_replaced_days` are over

**The number is the fence.** A driver writes record n + 1 only after it has read record n. Whoever takes over
writes a claim under the next number; a driver that was paused meanwhile finds that number taken, also when
its request was stuck in the network, and stops (`Fenced`). The lease only decides when to take over: at once
if the owner has released the corpus or is known to be dead, else when its beat has not changed for a whole
lease, by the challenger's own monotonic clock. No clock of another machine is compared.

**Files of a folder move after their record.** A record names files under temporary names; then they are
moved to their places, old ones being kept under `.replaced/`. A driver that dies between leaves moves that
the next owner makes: only the newest record with files can have some left, since an owner finishes them
before it writes another. A file under a temporary name can be moved once, so it does no harm when two do it.

**Files of a bucket never move.** Each attempt to write one has a name of its own, which the record has.
Manifest, ledger and index name places, so their bytes are those of a build into a folder.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from ...schemas.errors import IntegrityError
from ...schemas.records import Blob
from ..io import files
from ..io.location import Location, is_bucket
from ..io.store import store_of
from . import adopt, records
from .records import (
    Adopt,
    Checkpoint,
    Claim,
    Commit,
    Config,
    Done,
    LogFile,
    LogUnit,
    Merged,
    Planned,
    Record,
    Sweep,
)

LOG, BEAT, REPLACED = "log", "beat", ".replaced"

COPYING = ".copying"
"""Lies in a place that a corpus is being copied to, until all of it is there; see `copy`."""

CHECKPOINT_EVERY = 100
"""Each record whose number is a multiple of this is a checkpoint, so readers know where to start."""


class UnitState(NamedTuple):
    """A committed unit, and the number of the record that committed it."""

    unit: LogUnit
    since: int


class LogState(NamedTuple):
    """What the records up to `number` say together; never changed once made.

    Attributes:
        number: of the newest record; 0 if there is none.
        units: the committed units by "subset/unit".
        files: of the newest records that are no unit's, by path.
        config, merged, claim: the newest record of each kind.
        released: whether the newest owner has released the corpus.
        unmoved: the newest record with files, which may not have been moved to their places yet.
        nonce: of the newest record.
    """

    number: int = 0
    units: dict[str, UnitState] = {}
    files: dict[str, LogFile] = {}
    config: Config | None = None
    merged: Merged | None = None
    claim: Claim | None = None
    released: bool = True
    unmoved: Commit | Planned | Config | Merged | None = None
    nonce: str = ""

    @property
    def epoch(self) -> int:
        """Number of claims so far."""
        return self.claim.epoch if self.claim else 0

    def after(self, record: Record) -> LogState:
        """The state with one more record."""
        if record.number != self.number + 1:
            raise IntegrityError(
                f"the commit log goes from record {self.number} to {record.number}; restore the records "
                "between them from a copy"
            )
        new = self._replace(number=record.number, nonce=record.nonce)
        match record:
            case Claim():
                return new._replace(claim=record, released=False)
            case Done():
                return new._replace(released=True)
            case Adopt(units=units, files=adopted):
                found = {name: UnitState(unit, record.number) for name, unit in units.items()}
                return new._replace(units=self.units | found, files=self.files | _by_path(adopted))
            case Commit(units=units):
                found = {name: UnitState(unit, record.number) for name, unit in units.items()}
                return new._replace(units=self.units | found, unmoved=record)
            case Planned(files=named):
                return new._replace(files=self.files | _by_path(named), unmoved=record)
            case Config(files=named):
                return new._replace(files=self.files | _by_path(named), config=record, unmoved=record)
            case Merged(files=named):
                return new._replace(files=self.files | _by_path(named), merged=record, unmoved=record)
            case Checkpoint():
                return new
            case Sweep():
                return new

    def checkpoint(self) -> Checkpoint:
        """A record that says all this."""
        return Checkpoint(
            units={name: found.unit for name, found in self.units.items()},
            since={name: found.since for name, found in self.units.items()},
            files=self.files,
            config=self.config,
            merged=self.merged,
            claim=self.claim,
            released=self.released,
            unmoved=self.unmoved.number if self.unmoved else 0,
        )


def state_of(checkpoint: Checkpoint, out: str) -> LogState:
    """What a checkpoint says.

    Raises:
        IntegrityError: the newest record with files cannot be read.
    """
    units = {name: UnitState(unit, checkpoint.since[name]) for name, unit in checkpoint.units.items()}
    unmoved = read_existing(out, checkpoint.unmoved) if checkpoint.unmoved else None
    assert unmoved is None or isinstance(unmoved, Commit | Planned | Config | Merged)
    return LogState(
        checkpoint.number,
        units,
        checkpoint.files,
        checkpoint.config,
        checkpoint.merged,
        checkpoint.claim,
        checkpoint.released,
        unmoved,
        checkpoint.nonce,
    )


def _by_path(named: list[LogFile]) -> dict[str, LogFile]:
    return {file.path: file for file in named}


def record_path(out: str, number: int) -> str:
    """Where a record lies."""
    return f"{out}/{LOG}/{number:012}.json"


def exists(out: str) -> bool:
    """Whether a corpus has a log."""
    if _recent(out) is not None:
        return True
    if not is_bucket(out):
        return any(_numbers(out))
    if _is_there(record_path(out, 1)):
        return True  # also where a listing is late
    return any(_numbers(out)) and not is_being_copied(out)


def is_being_copied(out: str) -> bool:
    """Whether a place without a log is one that a corpus is being copied to: it has no corpus yet."""
    return _is_there(f"{out}/{COPYING}")


def _is_there(path: str) -> bool:
    try:
        files.size_of(Blob(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


_RECENT_S = 1.0


def recent_state(out: str) -> LogState:
    """What the log said within the last second, for who asks for one sample after the other."""
    state = _recent(out)
    return read_state(out) if state is None else state


def present_state(out: str) -> LogState:
    """What the log says, to readers; of a bucket, where each look is a request, within the last second.

    What this process has written is always in it.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    return recent_state(out) if is_bucket(out) else read_state(out)


def _recent(out: str) -> LogState | None:
    asked_s, state = _RECENT.get(out, (-math.inf, None))
    if state is None or not state.number or time.monotonic() - asked_s > _RECENT_S:
        return None
    return state


_RECENT: dict[str, tuple[float, LogState]] = {}


def place_of(out: str | Location, path: str) -> str:
    """Path or URL of a file that is no unit's, such as "index.parquet". In a bucket, the log knows its name.

    Raises:
        IntegrityError: the log of a corpus in a bucket cannot be read.
    """
    out = str(out)
    if not is_bucket(out):
        return f"{out}/{path}"
    found = recent_state(out).files.get(path)
    return f"{out}/{found.place if found else path}"


def subsets_of(state: LogState) -> list[str]:
    """Names of the subsets of which something is planned or committed, sorted."""
    planned = {path.partition("/")[0] for path in state.files if path.endswith("/plan/plan.json")}
    return sorted(planned | {name.partition("/")[0] for name in state.units})


def planned_subsets(out: str) -> list[str]:
    """Names of the subsets that have a work list, sorted. In a bucket, the log knows them.

    Raises:
        IntegrityError: the log of a corpus in a bucket cannot be read.
    """
    if is_bucket(out):
        return subsets_of(recent_state(out)) if exists(out) else []
    names = [name for name in files.list_names(out) if not name.startswith(".")]
    return [name for name in names if adopt.is_planned(out, name)]


def last_number(out: str) -> int:
    """Number of the newest record in a listing of the log; 0 if there is none."""
    return max(_numbers(out), default=0)


def newest_number(out: str) -> int:
    """Number of the newest record; 0 if there is none. In a bucket, a listing may not have it yet."""
    number = last_number(out)
    while is_bucket(out) and store_of(out).size(record_path(out, number + 1)) is not None:
        number += 1
    return number


def read_state(out: str, known: LogState | None = None) -> LogState:
    """What the log says now.

    Args:
        out: the corpus.
        known: what it said before; only what is new is read then.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    if not is_bucket(out):
        return _read_state(out, known or LogState())
    seen = _SEEN.get(out)
    state = known or _still_true(out, seen)
    if state is None:
        state = _read_state(out, LogState())
    else:  # the next numbers are asked for, which is cheaper than a listing
        for record in _follow(out, state.number, state.number):
            state = state.after(record)
    with _REMEMBERING:
        if _SEEN.get(out) is seen:  # else another thread has written or read since, and knows more
            _remember(out, state)
    return state


_SEEN: dict[str, LogState] = {}
"""What this process has read of logs in buckets, where each record is a request."""

_REMEMBERING = threading.Lock()


def remember(out: str, state: LogState) -> None:
    """Keep what this process has written to the log of a corpus in a bucket, so that it is not read again."""
    if is_bucket(out):
        with _REMEMBERING:
            _remember(out, state)


def _remember(out: str, state: LogState) -> None:
    _SEEN[out] = state
    _RECENT[out] = time.monotonic(), state


def _still_true(out: str, seen: LogState | None) -> LogState | None:
    """What was read before, unless somebody has deleted the corpus since, and begun another one there."""
    if seen is None or not seen.number:
        return None
    try:
        return seen if read_record(out, seen.number).nonce == seen.nonce else None
    except FileNotFoundError:
        return None


def _read_state(out: str, state: LogState) -> LogState:
    last = last_number(out)
    if last - state.number > CHECKPOINT_EVERY:
        record = read_existing(out, last - last % CHECKPOINT_EVERY)
        if not isinstance(record, Checkpoint):
            raise IntegrityError(
                f"{record_path(out, record.number)}: not a checkpoint; restore it from a copy"
            )
        state = state_of(record, out)
    for record in read_records(out, state.number, last):
        state = state.after(record)
    return state


def read_units(out: str) -> dict[str, LogUnit]:
    """The committed units by "subset/unit", also of a corpus that has no log yet.

    Raises:
        IntegrityError: a record, or a manifest of a corpus without a log, cannot be read.
    """
    if exists(out):
        return {name: found.unit for name, found in read_state(out).units.items()}
    if is_bucket(out):  # what lies there is of a driver that has just begun
        return {}
    return adopt.find_units(out)


def is_whole(out: str, unit: LogUnit) -> bool:
    """Whether the files of a committed unit are there and have their sizes; what is in them is not read."""
    store = store_of(out)
    return all(
        store.size(f"{out}/{file.place}") == file.bytes
        or (file.temporary and store.size(f"{out}/{file.temporary}") == file.bytes)
        for file in unit.files()
    )


def files_of(record: Record) -> list[LogFile]:
    """The files that a record names."""
    match record:
        case Commit(units=units) | Adopt(units=units):
            named = [file for unit in units.values() for file in unit.files()]
            return [*named, *(record.files if isinstance(record, Adopt) else ())]
        case Planned(files=named) | Config(files=named) | Merged(files=named):
            return named
        case _:  # a checkpoint says what others have said
            return []


def read_many(out: str, first: int, last: int) -> list[Record]:
    """The records from one number to another, which must be there; a store is asked for all of them at once.

    Raises:
        IntegrityError: a record is missing or damaged, or is not given.
    """
    paths = [record_path(out, number) for number in range(first, last + 1)]
    found: list[Record] = []
    try:
        for number, data in enumerate(files.read_many(paths), start=first):
            found.append(_decode(data, record_path(out, number), number))
    except OSError as error:
        named = getattr(error, "url", error.filename)  # many are asked for at once
        at = paths.index(named) if named in paths else len(found)
        if isinstance(error, FileNotFoundError):
            raise _missing(out, first + at) from error
        raise _not_given(paths[at], error) from error
    return found


def read_records(out: str, after: int = 0, last: int | None = None) -> list[Record]:
    """All records after a number; by default from the first one.

    Args:
        out: the corpus.
        after: the number.
        last: what `last_number` has returned, if it was asked already.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    last = last_number(out) if last is None else last
    return [*read_many(out, after + 1, last), *_follow(out, max(after, last), last)]


def _follow(out: str, number: int, last: int) -> Iterator[Record]:
    """The records after a number. A listing may be late, so the next number is tried until there is none."""
    while True:
        number += 1
        try:
            yield read_record(out, number)
        except FileNotFoundError as error:
            if number <= last:
                raise _missing(out, number) from error
            return


def read_existing(out: str, number: int) -> Record:
    """A record that must be there, since a later one is.

    Raises:
        IntegrityError: it is missing or damaged, or the disk does not give it.
    """
    try:
        return read_record(out, number)
    except FileNotFoundError as error:
        raise _missing(out, number) from error


def _missing(out: str, number: int) -> IntegrityError:
    return IntegrityError(f"{record_path(out, number)}: missing; restore it from a copy of the log")


def read_record(out: str, number: int) -> Record:
    """One record.

    Raises:
        FileNotFoundError: there is none of this number.
        IntegrityError: it is damaged, or the disk does not give it.
    """
    path = record_path(out, number)
    try:
        data = files.read(Blob(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _not_given(path, error) from error
    return _decode(data, path, number)


def _not_given(path: str, error: OSError) -> IntegrityError:
    return IntegrityError(
        f"{path}: not readable ({error.strerror or error}); run the same command again, or restore the "
        "file from a copy of the log"
    )


def _decode(data: bytes, path: str, number: int) -> Record:
    record = records.decode(data, path)
    if record.number != number:
        raise IntegrityError(f"{path}: is record {record.number}; restore it from a copy of the log")
    return record


def _numbers(out: str) -> Iterator[int]:
    for name in files.list_names(f"{out}/{LOG}"):
        if len(name) == 17 and name.isascii() and name.endswith(".json") and name[:12].isdigit():
            yield int(name[:12])
