"""The one driver that may write to a corpus: it takes it over, writes records, and shows that it lives.

`log.py` says what makes that safe. Files are written under names that nobody else has. In a folder they are
moved to their places when their record stands; in a bucket they keep these names.
"""

from __future__ import annotations

import errno
import hashlib
import io
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from ...schemas.errors import ConfigError, Fenced, ParaCaptionError, StageFailed
from ...schemas.records import Blob
from ..io import files
from ..io.activity import NOW
from ..io.store import Store, store_of
from ..io.store_kind import give_up
from . import adopt, log, processes, records
from .log import BEAT, REPLACED, LogState, read_state, record_path
from .moves import moves_of
from .records import Claim, Commit, Config, Done, LogFile, Merged, Planned, Record

LEASE_S = 60.0
"""How long an owner may give no sign of life before another one takes over; `failures.lease_s`."""

BEATS_PER_LEASE = 6


class HashedFile(io.RawIOBase):
    """A new file of a corpus, under a name that nobody else has; what is written is hashed on its way.

    Used as a context, it is deleted again if the block raises.

    Args:
        out: the corpus.
        path: place below the corpus that the file is to get by a record.
    """

    def __init__(self, out: str, path: str):
        self._out = out
        self._store = store_of(out)
        self._path, self._name = path, self._store.new_name(path)
        self._file = self._store.write(f"{out}/{self._name}")
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
        names = {"temporary" if self._store.moves else "name": self._name}
        return LogFile(self._path, self._size, self._digest.hexdigest(), **names)

    def close(self) -> None:
        if not self.closed:
            try:
                self._file.close()
            finally:
                super().close()

    def discard(self) -> None:
        """Close and delete the file."""
        with suppress(OSError):
            give_up(self._file)
        with suppress(OSError):
            self.close()
        with suppress(OSError):
            self._store.delete(f"{self._out}/{self._name}")

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
        self._is_moved = True
        """Whether this owner has moved the files of all records that it has written."""

    def append(self, record: Record) -> None:
        """Write a record under the next number, and move its files to their places.

        Raises:
            Fenced: another driver has taken over.
            OSError: the record may or may not have been written, or not all of its files have been moved.
                Taking the corpus over again finds out, and moves them.
        """
        is_claim = isinstance(record, Claim)
        while True:
            if not self._is_moved:
                self.move()
            if (self.state.number + 1) % log.CHECKPOINT_EVERY == 0:
                if not self._append(self.state.checkpoint(), is_claim):
                    continue
            if self._append(record, is_claim):
                break
        self.move()

    def _append(self, record: Record, is_claim: bool = False) -> bool:
        """Write a record under the next number; False if one of its own is there that got no answer."""
        number, epoch = self.state.number + 1, self.state.epoch + isinstance(record, Claim)
        if not self._is_there():
            what = "the commit log is gone; mount or restore the folder first"
            raise FileNotFoundError(errno.ENOENT, what, record_path(self.out, self.state.number))
        record = msgspec.structs.replace(
            record, number=number, epoch=epoch, nonce=uuid.uuid4().hex, time_s=round(time.time(), 3)
        )
        if self._store.create(record_path(self.out, number), records.encode(record)):
            self.state, self._is_moved = self.state.after(record), False
            log.remember(self.out, self.state)
            return True
        if is_claim:
            raise self.fenced()
        self.check()
        if self.state.number < number:
            raise self.fenced()  # by a record that is not to be seen
        return False

    def _is_there(self) -> bool:
        """Whether the newest record lies where it was: no log is begun in the middle, in another folder."""
        number = self.state.number
        return number == 0 or self._store.size(record_path(self.out, number)) is not None

    def check(self) -> None:
        """Find out whether this is still the owner. What it has written without an answer is known then.

        Raises:
            Fenced: it is not.
        """
        now = read_state(self.out, self.state)
        if now.claim != self.state.claim:
            raise self.fenced()
        if now.number > self.state.number:  # by itself; another driver may only have summed up before a claim
            self.state, self._is_moved = now, False

    def fenced(self) -> Fenced:
        """The error that says who has taken over."""
        now = read_state(self.out, self.state)
        return Fenced(
            f"{self.out}: {who(now.claim)} has taken over; nothing is lost: that process continues, and this "
            "one stops"
        )

    def move(self) -> None:
        """Move the files of the newest record with files to their places; what has been moved stays.

        In a bucket, where nothing can be moved, the record has their names for good.
        """
        if self.state.unmoved is not None and self._store.moves:
            self._move(self.state.unmoved)
        self._is_moved = True

    def _move(self, record: Commit | Planned | Config | Merged) -> None:
        moves = moves_of(record)
        kept = f"{self.out}/{REPLACED}/{record.number}"
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
        """Write a file of the corpus under a name of its own, to be named by a record.

        Args:
            path: its place below the corpus.
            data: its content.
        """
        with self.open(path) as file:
            file.write(data)
        return file.entry

    def copy(self, path: str, source: Path) -> LogFile:
        """The same for a local file, which is copied piece by piece."""
        with files.open_url(str(source), 1 << 20) as read, self.open(path) as file:
            while data := read.read(1 << 20):
                file.write(data)
        return file.entry

    def open(self, path: str) -> HashedFile:
        """The same for a file that is written piece by piece; see `HashedFile`."""
        return HashedFile(self.out, path)

    def beat(self) -> None:
        """Show that this owner is alive; a beat that cannot be written is one that is missed."""
        with suppress(OSError, ConfigError):
            if not self._is_there():
                return
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
    with NOW.during("opening the output"):
        owner = _claim(out, command, lease_s)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(lease_s / BEATS_PER_LEASE):
            owner.beat()

    thread = threading.Thread(target=beat, daemon=True, name="beat")
    thread.start()
    try:
        with NOW.during("opening the output"):
            owner.move()
        yield owner
    except Fenced:
        raise
    except BaseException as error:
        if isinstance(error, OSError | StageFailed) and _is_fenced(owner):
            raise owner.fenced() from error  # who took over has swept what this one was writing
        # Without that record, the next owner waits for a lease, or finds this process dead.
        with suppress(OSError, ParaCaptionError), NOW.during("closing the output"):
            owner.append(Done(held_back=owner.held_back))
        raise
    else:
        with NOW.during("closing the output"):
            owner.append(Done(held_back=owner.held_back))
    finally:
        ended.set()
        thread.join()
        if owner.state.claim is not None:
            _ENDED.add(owner.state.claim.nonce)


def _is_fenced(owner: Owner) -> bool:
    try:
        owner.check()
    except Fenced:
        return True
    except (OSError, ParaCaptionError):
        return False
    return False


@contextmanager
def own_or(owner: Owner | None, out: str, command: str) -> Iterator[Owner]:
    """The owner that is given, or else a new one for the length of the block; see `own`."""
    if owner is not None:
        yield owner
    else:
        with own(out, command, LEASE_S) as owner:
            yield owner


_ENDED: set[str] = set()
"""Claims of this process that are over, also where the record that says so could not be written."""


def _claim(out: str, command: str, lease_s: float) -> Owner:
    state = read_state(out)
    if not state.number and log.is_being_copied(out):
        raise ConfigError(
            f"{out}: a copy of a corpus has begun here and is not complete; run `paracaption copy` again, or "
            "choose another `out`"
        )
    if state.claim is not None and not state.released:
        state = _wait_for_the_end_of(state, out, lease_s)
    adopt.mark(out)
    owner = Owner(out, state)
    try:
        owner.append(processes.claim_of_this_process(command))
    except Fenced as error:
        raise ConfigError(f"{out}: another driver has begun to write here; run it again later") from error
    owner.beat()
    if store_of(out).moves and not owner.state.units and not owner.state.files:  # of a release without log
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
    while not (owner.nonce in _ENDED or processes.is_dead(owner)):
        is_over = time.monotonic() >= end  # then it looks once more: this process may have been paused
        time.sleep(0.0 if is_over else min(1.0, lease_s / 10))
        state = read_state(out, state)
        if state.released and state.claim == owner:
            return state
        if (_last_beat(out, state), state.number) != (was, number):
            raise ConfigError(
                f"{out}: {who(state.claim)} is writing here; wait until that process ends, or choose another "
                "`out`"
            )
        if is_over:
            break
    return read_state(out, state)


def _last_beat(out: str, state: LogState) -> bytes:
    """What an owner wrote last to show that it is alive; b"" if it wrote nothing.

    Raises:
        OSError: it cannot be read, which says nothing of the owner.
    """
    with suppress(FileNotFoundError):
        return files.read(Blob(beat_path(out, state.epoch)))
    return b""
