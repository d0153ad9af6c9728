"""Copies a corpus from a folder or a bucket to another one: data first, the log last, each file verified.

A copy has the records of its corpus up to a number, and the files that they name (`copy_plan.py`), the
evidence and the reviews. What is committed later is not in it: copying again brings it up to date. Events are
not copied, nor signs of life.

- **Nothing is visible before all of it is there.** A new copy in a folder is made next to it, in
  `.NAME.copying`, and gets its name by one rename. In a bucket its log comes when everything else has
  arrived, from the last record down to the first, without which there is no corpus; until then a note lies
  there (`log.COPYING`), so that no reader takes it for one and no build begins in it.
- **An update is written as an owner writes it**, record by record, each created if its number is free. Who
  has built in the copy meanwhile has taken that number, and the copy is refused.
- **It goes on where it stopped.** Names are the same each time; a file that is there with its size is read
  and kept if it has its SHA-256. One that the copy's own log names was verified when it was copied.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import IO, NamedTuple

from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from ..io import bucket_checks, files
from ..io.confined import confine
from ..io.failures import RETRYING, describe
from ..io.listing import Listed, list_files
from ..io.location import is_bucket, locate
from ..io.store import TEMPORARY, store_of
from ..io.store_kind import give_up
from . import adopt, history, log, records
from .copy_plan import CopyFile, CopyPlan
from .log import COPYING, LogState
from .owner import Owner
from .records import Record

THREADS = 8
"""How many files are copied at a time."""

RETRY_S = 120.0
"""For how long a request is tried again that fails for a while."""

_STEP = 8 << 20
"""How much of a file is read at a time."""

_REVIEWS = "review/"
_BESIDE = re.compile(rf"([^/]+)/evidence/[^/.][^/]*/[^/.][^/]*\.parquet|{_REVIEWS}[^/.][^/]*")
"""What belongs to a corpus and is in no record: evidence and reviews."""

Progress = Callable[[str, int, int], None]
"""Gets what is counted, how much of it is done, and how much there is."""


class CopyReport(NamedTuple):
    """What was copied, or is to be.

    Attributes:
        number: the newest record of the copy.
        before: the newest record that it had.
        files, bytes: copied.
        present, present_bytes: that were there.
        lost: former files that the corpus does not keep any more, so that the copy cannot go back to them.
    """

    number: int
    before: int
    files: int
    bytes: int
    present: int
    present_bytes: int
    lost: int


class _Job(NamedTuple):
    """A file to copy. Without SHA-256, as evidence has none in the log, its size alone is verified."""

    source: str
    target: str
    bytes: int
    sha256: str = ""
    file: CopyFile | None = None
    is_there: bool = False
    """Something of this size is there, and is kept if it has the SHA-256."""


def copy(
    corpus: str,
    to: str,
    *,
    dry_run: bool = False,
    threads: int = THREADS,
    progress: Progress = lambda *_: None,
) -> CopyReport:
    """Copy a corpus, or bring a copy up to date. Calling it again goes on where it was stopped.

    Args:
        corpus: path or URL of the corpus. A build may be writing there.
        to: path or URL of the copy: an empty place, or an earlier copy of this corpus in which nothing was
            built since.
        dry_run: copy nothing, and tell what would be.
        threads: number of files that are copied at a time.
        progress: called with "bytes copied", how many are, and how many there are.

    Raises:
        ConfigError: there is no corpus with a log, or `to` is something else.
        IntegrityError: a file or record of the corpus is damaged or missing; names it.
        OSError: a place cannot be read or written.
    """
    budget = RETRYING.budget_s
    RETRYING.set_budget(max(budget, RETRY_S))
    try:
        return _copy(_place(corpus), _place(to), dry_run, threads, progress)
    finally:
        RETRYING.set_budget(budget)


def _copy(corpus: str, to: str, dry_run: bool, threads: int, progress: Progress) -> CopyReport:
    _refuse_same(corpus, to)
    bucket_checks.refuse_secrets(to)
    confine(corpus)
    found = history.read_log(corpus)
    known = _known(corpus, to, found)
    names = _names_given(to) if known and is_bucket(to) else {}
    plan = CopyPlan(found, is_bucket(corpus), is_bucket(to), known, names)
    made = to if known or is_bucket(to) else _beside(to)
    jobs, report = _Inventory(corpus, made, plan).jobs()
    if dry_run:
        return report
    bucket_checks.check_store(to)
    if not known:
        _begin(made, found[0])
    copier = _Copier(corpus, made, plan, progress)
    copier.copy(jobs, threads)
    _finish(made, to, plan.written_records(), known, threads)
    return report._replace(
        files=report.files + copier.replaced,
        bytes=report.bytes + copier.replaced_bytes,
        present=report.present - copier.replaced,
        present_bytes=report.present_bytes - copier.replaced_bytes,
    )


def _place(place: str) -> str:
    return str(locate(place)).rstrip("/") or "/"


def _refuse_same(corpus: str, to: str) -> None:
    names = [each if is_bucket(each) else os.path.realpath(each) for each in (corpus, to)]
    for one, other in (names, names[::-1]):
        if f"{one}/".startswith(f"{other}/"):
            raise ConfigError(f"{to}: this is {corpus}, or one lies in the other; copy to another place")


# What is there.


def _known(corpus: str, to: str, found: Sequence[Record]) -> int:
    """Number of the newest record that a copy has already; 0 for a place where a copy may begin.

    Raises:
        ConfigError: something else is there.
    """
    if log.exists(to):
        number = log.read_state(to).number
        last = log.read_existing(to, number)
        if number <= len(found) and last.nonce == found[number - 1].nonce:
            return number
        first = log.read_existing(to, 1)
        if first.nonce != found[0].nonce:
            raise ConfigError(f"{to}: another corpus is here; copy to another place")
        raise ConfigError(
            f"{to}: a copy of {corpus} in which something was built since it was copied, so it cannot be "
            "brought up to date; copy to another place"
        )
    begun = _begun(to if is_bucket(to) else _beside(to))
    if begun and begun != found[0].nonce:
        raise ConfigError(f"{to}: a copy of another corpus was begun here; copy to another place")
    begun = begun if is_bucket(to) else ""
    if not begun and (names := [name for name in files.list_names(to) if not _is_trial(name)]):
        raise ConfigError(f"{to}/{names[0]}: this place is not empty, and no copy; copy to another place")
    return 0


def _names_given(to: str) -> dict[tuple[str, str], str]:
    """(path, SHA-256) -> the name of a file in a copy in a bucket, as its own log has it."""
    state = log.read_state(to)
    files_of_units = [file for found in state.units.values() for file in found.unit.files()]
    return {(file.path, file.sha256): file.place for file in (*files_of_units, *state.files.values())}


def _beside(to: str) -> str:
    """Where a new copy in a folder is made."""
    folder, _, name = os.path.abspath(to).rpartition("/")
    return f"{folder}/.{name}.copying"


def _is_trial(name: str) -> bool:
    return name.startswith(bucket_checks.PROBE)


def _begun(to: str) -> str:
    """Nonce of the first record of the corpus whose copy was begun here; "" if none was."""
    with suppress(FileNotFoundError):
        return store_of(to).read(f"{to}/{COPYING}").decode(errors="replace").strip()
    return ""


def _begin(to: str, first: Record) -> None:
    """Note that a copy begins."""
    store = store_of(to)
    store.make_folder(to)
    store.create(f"{to}/{COPYING}", f"{first.nonce}\n".encode())
    if _begun(to) != first.nonce or (is_bucket(to) and log.exists(to)):
        raise ConfigError(f"{to}: another copy or build has begun here; copy to another place")


class _Inventory:
    """Compares what is to be copied with what is there, by a listing of each place."""

    def __init__(self, corpus: str, to: str, plan: CopyPlan):
        self._plan = plan
        self._here = list_files(locate(corpus))
        self._there = list_files(locate(to))
        self._vouched = self._names_known(to) if plan.known else set[str]()

    def jobs(self) -> tuple[list[_Job], CopyReport]:
        """The files to copy or to look at, and what they come to. Large ones are first."""
        found, lost = list[_Job](), 0
        present = list[int]()
        for each in self._plan.files:
            if each.is_former and not self._is_here(each):
                lost += 1
            elif self._is_there(each.target, each.file.bytes) and each.target in self._vouched:
                present.append(each.file.bytes)
            else:
                is_there = self._is_there(each.target, each.file.bytes)
                found.append(
                    _Job(each.source, each.target, each.file.bytes, each.file.sha256, each, is_there)
                )
        subsets = log.subsets_of(self._plan.state)
        for path, listed in self._here.items():
            match = _BESIDE.fullmatch(path)
            if match and (match[1] is None or match[1] in subsets):
                if self._is_newer(path, listed):
                    found.append(_Job(path, path, listed.bytes))
                else:
                    present.append(listed.bytes)
        fresh = [each.bytes for each in found if not each.is_there]
        present += [each.bytes for each in found if each.is_there]
        report = CopyReport(
            self._plan.state.number,
            self._plan.known,
            len(fresh),
            sum(fresh),
            len(present),
            sum(present),
            lost,
        )
        return sorted(found, key=lambda job: -job.bytes), report

    def _is_here(self, each: CopyFile) -> bool:
        listed = self._here.get(each.source)
        return listed is not None and listed.bytes == each.file.bytes

    def _is_there(self, target: str, size: int) -> bool:
        listed = self._there.get(target)
        return listed is not None and listed.bytes == size

    def _is_newer(self, path: str, listed: Listed) -> bool:
        """Whether evidence or reviews are others than the copy has, which has them from an earlier time.

        Reviews that were made in the copy since stay there.
        """
        there = self._there.get(path)
        if there is None or there.modified_s <= listed.modified_s:
            return True
        return there.bytes != listed.bytes and not path.startswith(_REVIEWS)

    def _names_known(self, to: str) -> set[str]:
        state = log.read_state(to)
        units = {file.place for found in state.units.values() for file in found.unit.files()}
        return units | {file.place for file in state.files.values()} | self._former_known()

    def _former_known(self) -> set[str]:
        return {each.target for each in self._plan.files if each.is_former and TEMPORARY not in each.target}


# The way of a file.


class _Copier:
    """Copies files, several at a time, and hashes each on its way."""

    def __init__(self, corpus: str, to: str, plan: CopyPlan, progress: Progress):
        self._corpus, self._to, self._plan, self._progress = corpus, to, plan, progress
        self._store = store_of(to)
        self._done = self._total = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.replaced = self.replaced_bytes = 0
        """Files that were there with their size and another content."""

    def copy(self, jobs: Sequence[_Job], threads: int) -> None:
        """Copy all files.

        Raises:
            IntegrityError: one is damaged or missing; what was copied stays, and the same call goes on.
            OSError: a place cannot be read or written.
        """
        self._total = sum(each.bytes for each in jobs)
        with ThreadPoolExecutor(max(1, threads), thread_name_prefix="copy") as pool:
            try:
                for ended in as_completed([pool.submit(self._copy, job) for job in jobs]):
                    ended.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _copy(self, job: _Job) -> None:
        target = f"{self._to}/{job.target}"
        if job.is_there and files.sha256_of(target) == job.sha256:
            self._count(job.bytes)
            return
        if job.is_there:
            with self._lock:
                self.replaced, self.replaced_bytes = self.replaced + 1, self.replaced_bytes + job.bytes
        if self._transfer(job, job.source):
            return
        moved = self._elsewhere(job)
        if not (moved and self._transfer(job, moved)):
            raise self._damaged(job)

    def _transfer(self, job: _Job, source: str) -> bool:
        """Copy a file; False if it is not there, or is not what it should be: then nothing is written."""
        target = f"{self._to}/{job.target}"
        written_as = self._store.new_name(target) if self._store.moves else target
        digest, size = hashlib.sha256(), 0
        try:
            read = files.open_url(f"{self._corpus}/{source}", _STEP)
        except FileNotFoundError:
            return False
        with read:
            file = self._store.write(written_as)
            try:
                while data := read.read(_STEP):
                    if self._stopped.is_set():
                        raise ConfigError("the copy was stopped; run the same command again")
                    file.write(data)
                    digest.update(data)
                    size += len(data)
                    self._count(len(data))
                is_right = size == job.bytes and job.sha256 in ("", digest.hexdigest())
            except BaseException:
                self._give_up(file, written_as)
                raise
            if not is_right:
                self._count(-size)
                self._give_up(file, written_as)
                return False
            file.close()
        if self._store.moves:
            self._store.move(written_as, target)
        return True

    def _give_up(self, file: IO[bytes], path: str) -> None:
        with suppress(OSError):
            give_up(file)
        if self._store.moves:  # in a bucket nothing is there, or what another copy of this corpus has written
            with suppress(OSError):
                self._store.delete(path)

    def _elsewhere(self, job: _Job) -> str | None:
        """Where a file of a folder lies that is not at its place: not moved there yet, or replaced since."""
        if job.file is None or job.file.is_former or is_bucket(self._corpus):
            return None
        file = job.file.file
        if job.file.unit:
            return history.Places(self._corpus, self._plan.state.number).find(job.file.unit, file)
        return file.temporary or None

    def _damaged(self, job: _Job) -> ParaCaptionError:
        path = f"{self._corpus}/{job.source}"
        if log.newest_number(self._corpus) > self._plan.state.number or not job.sha256:
            return ConfigError(
                f"{path}: was replaced while the corpus was copied; run the same command again, which goes on"
            )
        listed = store_of(self._corpus).size(path)
        what = (
            "missing"
            if listed is None
            else f"damaged: it has {listed} bytes instead of {job.bytes}"
            if listed != job.bytes
            else "damaged: its SHA-256 is not that of the commit log"
        )
        return IntegrityError(
            f"{path}: {what}; restore it from a copy, or build its unit again "
            f"(`paracaption verify {self._corpus}` says how), then run the same command again"
        )

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._progress("bytes copied", self._done, self._total)


# The log.


def _finish(made: str, to: str, written: Sequence[Record], known: int, threads: int) -> None:
    """Write the records that the copy lacks, and give a new one in a folder its name."""
    adopt.mark(made)
    if known:
        _append(to, written[known:], log.read_state(to))
    elif is_bucket(to):
        _write_downwards(to, written, threads)
    else:
        _give_name(made, to, written)
    store_of(to).delete(f"{to}/{COPYING}")


def _append(to: str, new: Sequence[Record], state: LogState) -> None:
    """Write records as an owner does: one after the other, and their files are moved to their places."""
    owner = Owner(to, state)
    owner.move()  # what a copy that was stopped has left
    for record in new:
        _create(to, record)
        owner.state = owner.state.after(record)
        owner.move()
    log.remember(to, owner.state)


def _create(to: str, record: Record) -> None:
    path = log.record_path(to, record.number)
    if not store_of(to).create(path, records.encode(record)):
        if log.read_record(to, record.number).nonce != record.nonce:
            raise ConfigError(f"{to}: something was built here while it was copied to; copy to another place")


def _give_name(made: str, to: str, written: Sequence[Record]) -> None:
    """Write the log of a new copy in a folder, and let it appear."""
    store = store_of(to)
    for record in written:
        _create(made, record)
    for path in list_files(locate(made)):
        if path.rpartition("/")[2].startswith(TEMPORARY):  # of a copy that was stopped
            store.delete(f"{made}/{path}")
    try:
        store.move(made, to)
    except OSError as error:
        if not files.is_folder(to):
            raise
        what = "it is a mount point; give a folder below it" if os.path.ismount(to) else describe(error)
        raise ConfigError(f"{to}: the copy in {made} cannot get this name: {what}") from error


def _write_downwards(to: str, written: Sequence[Record], threads: int) -> None:
    """The log of a new copy in a bucket: the first record, without which there is no corpus, is the last."""
    if log.exists(to):
        raise ConfigError(f"{to}: something was built here while it was copied to; copy to another place")
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(lambda record: _create(to, record), reversed(written[1:])):
            pass
    _create(to, written[0])
