"""The commit log of a corpus: numbered records, each created only if its number is free.

    OUT/log/000000000001.json    records; what they say, and nothing else, is what is committed
    OUT/beat/000003              the sign of life of the third owner
    OUT/.replaced/17/...         files that record 17 replaced, until `failures.keep_replaced_days` are over

**The number is the fence.** A driver writes record n + 1 only after it has read record n. Whoever takes over
writes a claim under the next number; a driver that was paused meanwhile finds that number taken, also when
its request was stuck in the network, and stops (`Fenced`). The lease only decides when to take over: at once
if the owner has released the corpus or is known to be dead, else when its beat has not changed for a whole
lease, by the challenger's own monotonic clock. No clock of another machine is compared.

**Files move after their record.** A record names files under temporary names; then they are moved to their
places, old ones being kept under `.replaced/`. A driver that dies between leaves moves that the next owner
makes: only the newest record with files can have some left, since an owner finishes them before it writes
another. A file under a temporary name can be moved once, so it does no harm when two do it.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from ...schemas.records import Blob
from ..io import files
from ..io.store import Store, store_of, temporary_name
from . import adopt, owners, records
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

CHECKPOINT_EVERY = 100
"""Each record whose number is a multiple of this is a checkpoint, so readers know where to start."""

LEASE_S = 60.0
"""How long an owner may give no sign of life before another one takes over; `failures.lease_s`."""

BEATS_PER_LEASE = 6


class Fenced(ParaCaptionError):
    """Another driver has taken the corpus over while this one was paused; nothing is lost."""


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
    """

    number: int = 0
    units: dict[str, UnitState] = {}
    files: dict[str, LogFile] = {}
    config: Config | None = None
    merged: Merged | None = None
    claim: Claim | None = None
    released: bool = True
    unmoved: Commit | Planned | Config | Merged | None = None

    @property
    def epoch(self) -> int:
        """Number of claims so far."""
        return self.claim.epoch if self.claim else 0

    def after(self, record: Record) -> LogState:
        """The state with one more record."""
        if record.number != self.number + 1:
            raise IntegrityError(f"record {record.number} of the commit log says it follows {self.number}")
        new = self._replace(number=record.number)
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
        FileNotFoundError, IntegrityError: the newest record with files cannot be read.
    """
    units = {name: UnitState(unit, checkpoint.since[name]) for name, unit in checkpoint.units.items()}
    unmoved = read_record(out, checkpoint.unmoved) if checkpoint.unmoved else None
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
    )


def _by_path(named: list[LogFile]) -> dict[str, LogFile]:
    return {file.path: file for file in named}


def record_path(out: str, number: int) -> str:
    """Where a record lies."""
    return f"{out}/{LOG}/{number:012}.json"


def exists(out: str) -> bool:
    """Whether a corpus has a log."""
    return any(_numbers(out))


def last_number(out: str) -> int:
    """Number of the newest record in a listing of the log; 0 if there is none."""
    return max(_numbers(out), default=0)


def read_state(out: str, known: LogState | None = None) -> LogState:
    """What the log says now.

    Args:
        out: the corpus.
        known: what it said before; only what is new is read then.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    last = last_number(out)
    state = known or LogState()
    if last - state.number > CHECKPOINT_EVERY:
        record = read_record(out, last - last % CHECKPOINT_EVERY)
        if not isinstance(record, Checkpoint):
            raise IntegrityError(
                f"{record_path(out, record.number)}: is no checkpoint; restore it from a copy"
            )
        state = state_of(record, out)
    for record in _follow(out, state.number, last):
        state = state.after(record)
    return state


def read_units(out: str) -> dict[str, LogUnit]:
    """The committed units by "subset/unit", also of a corpus that has no log yet.

    Raises:
        IntegrityError: a record, or a manifest of a corpus without a log, cannot be read.
    """
    if exists(out):
        return {name: found.unit for name, found in read_state(out).units.items()}
    return adopt.find_units(out)


def find_unmoved(out: str, state: LogState) -> dict[str, list[tuple[str, str]]]:
    """Files of the newest commit that still have their temporary names, because its driver died or is at it.

    Returns:
        By "subset/unit": (place, temporary name) of each, below the corpus.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    if isinstance(state.unmoved, Commit):
        folders = {
            file.temporary.rpartition("/")[0]
            for unit in state.unmoved.units.values()
            for file in unit.files()
        }
        there = {f"{folder}/{name}" for folder in folders for name in files.list_names(f"{out}/{folder}")}
        for name, unit in state.unmoved.units.items():
            found[name] = [(file.path, file.temporary) for file in unit.files() if file.temporary in there]
    return found


class _Moves(NamedTuple):
    """What a record does to names.

    Attributes:
        files: files that get their places.
        replaced: places whose files are kept elsewhere before.
        removed: of these, the ones that nothing takes: a unit that had a shard may have none now.
    """

    files: list[LogFile]
    replaced: set[str]
    removed: list[str]


def _moves_of(record: Commit | Planned | Config | Merged) -> _Moves:
    if not isinstance(record, Commit):
        return _Moves([file for file in record.files if file.temporary], set(), [])
    named = [file for unit in record.units.values() for file in unit.files()]
    removed = set(record.replaced) - {file.path for file in named}
    return _Moves([file for file in named if file.temporary], set(record.replaced), sorted(removed))


def is_moved(out: str, state: LogState) -> bool:
    """Whether every file that a record names has its place; if not, the next owner moves it there."""
    if state.unmoved is None:
        return True
    moves = _moves_of(state.unmoved)
    names = [*(file.temporary for file in moves.files), *moves.removed]
    return all(store_of(out).size(f"{out}/{name}") is None for name in names)


def is_whole(out: str, unit: LogUnit) -> bool:
    """Whether the files of a committed unit are there and have their sizes; what is in them is not read."""
    store = store_of(out)
    return all(
        store.size(f"{out}/{file.path}") == file.bytes
        or (file.temporary and store.size(f"{out}/{file.temporary}") == file.bytes)
        for file in unit.files()
    )


def read_records(out: str, after: int = 0) -> list[Record]:
    """All records after a number; by default from the first one.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    return list(_follow(out, after, last_number(out)))


def _follow(out: str, number: int, last: int) -> Iterator[Record]:
    """The records after a number. A listing may be late, so the next number is tried until there is none."""
    while True:
        number += 1
        try:
            yield read_record(out, number)
        except FileNotFoundError as error:
            if number <= last:
                path = record_path(out, number)
                raise IntegrityError(f"{path}: missing; restore it from a copy of the log") from error
            return


def read_record(out: str, number: int) -> Record:
    """One record.

    Raises:
        FileNotFoundError: there is none of this number.
        IntegrityError: it is damaged.
    """
    path = record_path(out, number)
    record = records.decode(files.read(Blob(path)), path)
    if record.number != number:
        raise IntegrityError(f"{path}: is record {record.number}; restore it from a copy of the log")
    return record


def _numbers(out: str) -> Iterator[int]:
    for name in files.list_names(f"{out}/{LOG}"):
        if len(name) == 17 and name.endswith(".json") and name[:12].isdigit():
            yield int(name[:12])


class HashedFile(io.RawIOBase):
    """A new file of a corpus under a temporary name; what is written is hashed on its way.

    Used as a context, it is deleted again if the block raises.

    Args:
        out: the corpus.
        path: place below the corpus that the file is to get by a record.
    """

    def __init__(self, out: str, path: str):
        self._out = out
        self._path, self._temporary = path, temporary_name(path)
        self._file = store_of(out).write(f"{out}/{self._temporary}")
        self._digest, self._size = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    @property
    def entry(self) -> LogFile:
        """What a record says of the file."""
        return LogFile(self._path, self._size, self._digest.hexdigest(), self._temporary)

    def close(self) -> None:
        if not self.closed:
            try:
                self._file.close()
            finally:
                super().close()

    def discard(self) -> None:
        """Close and delete the file."""
        with suppress(OSError):
            self.close()
        with suppress(OSError):
            store_of(self._out).delete(f"{self._out}/{self._temporary}")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.discard()
        else:
            try:
                self.close()
            except BaseException:
                self.discard()
                raise


class Owner:
    """The one driver that may write to a corpus, until another one takes over; made by `own`.

    Attributes:
        out: the corpus.
        state: what the log says, as far as this owner has read and written it.
        held_back: units that were not committed in this run, by "subset/unit", and why.
    """

    def __init__(self, out: str, state: LogState):
        self.out = out
        self.state = state
        self.held_back: dict[str, str] = {}
        self._store: Store = store_of(out)

    def append(self, record: Record) -> None:
        """Write a record under the next number, and move its files to their places.

        Raises:
            Fenced: another driver has taken over.
            OSError: the record may or may not have been written, or not all of its files have been moved.
                Taking the corpus over again finds out, and moves them.
        """
        if (self.state.number + 1) % CHECKPOINT_EVERY == 0:
            self._append(self.state.checkpoint())
        self._append(record)
        self.move()

    def _append(self, record: Record) -> None:
        number, epoch = self.state.number + 1, self.state.epoch + isinstance(record, Claim)
        record = msgspec.structs.replace(
            record, number=number, epoch=epoch, nonce=uuid.uuid4().hex, time_s=round(time.time(), 3)
        )
        if not self._store.create(record_path(self.out, number), records.encode(record)):
            raise self._fenced()
        self.state = self.state.after(record)

    def check(self) -> None:
        """Find out whether this is still the owner.

        Raises:
            Fenced: it is not.
        """
        if read_state(self.out, self.state).number > self.state.number:
            raise self._fenced()

    def _fenced(self) -> Fenced:
        now = read_state(self.out, self.state)
        return Fenced(f"{self.out}: {who(now.claim)} has taken over; nothing is lost, and it goes on there")

    def move(self) -> None:
        """Move the files of the newest record with files to their places; what has been moved stays."""
        if self.state.unmoved is None:
            return
        moves = _moves_of(self.state.unmoved)
        kept = f"{self.out}/{REPLACED}/{self.state.unmoved.number}"
        for file in moves.files:
            temporary, path = f"{self.out}/{file.temporary}", f"{self.out}/{file.path}"
            if file.path in moves.replaced and self._store.size(temporary) is not None:
                self._store.keep(path, f"{kept}/{file.path}")
            self._store.move(temporary, path)
        if moves.removed:
            self.check()  # a name that is used again does not tell who moves it
            for path in moves.removed:
                self._store.move(f"{self.out}/{path}", f"{kept}/{path}")

    def write(self, path: str, data: bytes) -> LogFile:
        """Write a file of the corpus under a temporary name, to be named by a record.

        Args:
            path: its place below the corpus.
            data: its content.
        """
        with self.open(path) as file:
            file.write(data)
        return file.entry

    def copy(self, path: str, source: Path) -> LogFile:
        """The same for a local file, which is copied piece by piece."""
        with open(source, "rb") as read, self.open(path) as file:
            while data := read.read(1 << 20):
                file.write(data)
        return file.entry

    def open(self, path: str) -> HashedFile:
        """The same for a file that is written piece by piece; see `HashedFile`."""
        return HashedFile(self.out, path)

    def beat(self) -> None:
        """Show that this owner is alive; a beat that cannot be written is one that is missed."""
        with suppress(OSError):
            data = f"{uuid.uuid4().hex}\n".encode()
            self._store.put(beat_path(self.out, self.state.epoch), data)


def beat_path(out: str, epoch: int) -> str:
    """Where the owner of an epoch shows that it is alive."""
    return f"{out}/{BEAT}/{epoch:06}"


def who(claim: Claim | None) -> str:
    """An owner in words."""
    if claim is None:
        return "another driver"
    return f"`{claim.command}` of process {claim.pid} on {claim.host}"


@contextmanager
def own(out: str, command: str, lease_s: float) -> Iterator[Owner]:
    """Be the one driver that writes to a corpus, for the length of the block.

    Args:
        out: the corpus.
        command: "build", "merge" or "undo".
        lease_s: how long another owner's sign of life may be unchanged before it counts as gone; the owner
            gives one several times in that time.

    Raises:
        ConfigError: another driver is writing here, or has just begun to.
        IntegrityError: the log is damaged.
        OSError: the folder cannot be written.
    """
    owner = _claim(out, command, lease_s)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(lease_s / BEATS_PER_LEASE):
            owner.beat()

    thread = threading.Thread(target=beat, daemon=True, name="beat")
    thread.start()
    try:
        owner.move()
        yield owner
    except Fenced:
        raise
    except BaseException:
        with suppress(
            OSError, ParaCaptionError
        ):  # the next owner waits for a lease, or finds this process dead
            owner.append(Done(held_back=owner.held_back))
        raise
    else:
        owner.append(Done(held_back=owner.held_back))
    finally:
        ended.set()
        thread.join()


@contextmanager
def own_or(owner: Owner | None, out: str, command: str) -> Iterator[Owner]:
    """The owner that is given, or else a new one for the length of the block; see `own`."""
    if owner is not None:
        yield owner
    else:
        with own(out, command, LEASE_S) as owner:
            yield owner


def _claim(out: str, command: str, lease_s: float) -> Owner:
    state = read_state(out)
    if state.claim is not None and not state.released:
        state = _wait_for_the_end_of(state, out, lease_s)
    adopt.mark(out)
    owner = Owner(out, state)
    try:
        owner.append(owners.claim_of_this_process(command))
    except Fenced as error:
        raise ConfigError(f"{out}: another driver has begun to write here; run it again later") from error
    owner.beat()
    if not owner.state.units and not owner.state.files:
        found = adopt.find(out)
        if found.units or found.files:
            owner.append(found)
            if config := adopt.find_config(out):
                owner.append(config)
    return owner


def _wait_for_the_end_of(state: LogState, out: str, lease_s: float) -> LogState:
    """The state when the owner counts as gone.

    Raises:
        ConfigError: it gives a sign of life.
    """
    owner = state.claim
    assert owner is not None
    was, number, end = _last_beat(out, state), state.number, time.monotonic() + lease_s
    while not owners.is_dead(owner) and time.monotonic() < end:
        time.sleep(min(1.0, lease_s / 10))
        state = read_state(out, state)
        if state.released and state.claim == owner:
            return state
        if (_last_beat(out, state), state.number) != (was, number):
            raise ConfigError(
                f"{out}: {who(state.claim)} is writing here; wait for it, or choose another `out`"
            )
    return read_state(out, state)


def _last_beat(out: str, state: LogState) -> bytes:
    with suppress(OSError):
        return files.read(Blob(beat_path(out, state.epoch)))
    return b""
