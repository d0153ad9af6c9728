"""Tells of what takes longer than `failures.stall_s`: where it is, and where the stack lies.

A process that hangs can say so in two ways, and neither is enough alone. `StackFile` is written by C code
that needs no lock of Python's, so it tells of a call that holds that lock, in a file of the run that the
driver reads from any node. For a corpus in a bucket, that file is on the node's scratch, and the processes of
the node upload it when it holds a stack. `telling` is a thread that keeps its stack in the temporary folder
of its own machine, so it tells of a file system of the output that hangs.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ...schemas.errors import ConfigError
from ..io import files
from ..io.activity import NOW
from ..io.location import Location, Prefix
from ..io.store import store_of
from .run_folders import STACK_MARK, run_folder

log = logging.getLogger(__name__)

_HEAD_BYTES = 1024
"""The start of a stack file: what its process is doing, padded, so that it is written over in place."""

_REARM_SHARE = 0.1
"""The clock is set again with the first record after this share of `stall_s`: each time takes a thread."""

_LOOKS = 4
"""How often within `stall_s` the thread looks."""

ONLY_SLOW = "if the step is only slow, raise failures.stall_s; else press Ctrl-C: what is committed stays"


class StackFile:
    """What a worker is doing, and its stack if that takes longer than `stall_s`.

    Args:
        path: of the file.
        stall_s: seconds.
        on_progress: called now and then while the worker goes from record to record.
    """

    def __init__(self, path: Path, stall_s: float, on_progress: Callable[[], None] = lambda: None):
        self.path = path
        self._stall_s = stall_s
        self._on_progress = on_progress
        self._armed = False
        self._armed_s = time.monotonic()
        self._file = self._opened()

    def _opened(self) -> IO[bytes]:
        try:
            return open(self.path, "wb", buffering=0)
        except OSError as error:  # the unit's own writing will say so
            log.warning(
                "%s: cannot be written (%s); if the build stalls, no stack can be shown", self.path, error
            )
            return open(os.devnull, "wb", buffering=0)

    def __enter__(self) -> StackFile:
        NOW.on_move = self._note
        self._note()
        return self

    def __exit__(self, *_: object) -> None:
        NOW.on_move = lambda: None
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def _note(self) -> None:
        now, is_idle = time.monotonic(), NOW.step is None
        if is_idle or not self._armed or now - self._armed_s > _REARM_SHARE * self._stall_s:
            faulthandler.cancel_dump_traceback_later()
            self._write(clear=now - self._armed_s > self._stall_s / 2)
            was_armed, self._armed, self._armed_s = self._armed, not is_idle, now
            if self._armed:
                faulthandler.dump_traceback_later(self._stall_s, file=self._file)
            if was_armed and self._armed:
                self._on_progress()
        else:
            self._write()

    def _write(self, clear: bool = False) -> None:
        """Write the head, and remove the stack of a call that has come back after all."""
        head = (NOW.words() or _IDLE).encode("utf-8", "replace")[: _HEAD_BYTES - 1].ljust(_HEAD_BYTES - 1)
        try:
            os.pwrite(self._file.fileno(), head + b"\n", 0)
            if clear:
                self._file.truncate(_HEAD_BYTES)
            self._file.seek(_HEAD_BYTES)
        except OSError:  # whoever writes what matters reports a full disk
            log.debug("no room for a stack", exc_info=True)


_IDLE = "waiting for work"

_LONGEST_NAME = 150
"""Of a worker in the name of its stack file."""

_STACK, _TEXT = "stack-", ".txt"


def stack_file(run: str, stall_s: float, name: str, on_progress: Callable[[], None]) -> StackFile:
    """The stack file of this process in the folder of a run; `name` is the worker's."""
    who = f"{name[:_LONGEST_NAME]}-{socket.gethostname()}-{os.getpid()}"
    return StackFile(run_folder(run) / f"{_STACK}{who}{_TEXT}", stall_s, on_progress)


def stack_files(run: str) -> list[Path]:
    """The stack files of the run's workers on this machine; in a folder, of all its workers."""
    return sorted(run_folder(run).glob(f"{_STACK}*{_TEXT}"))


def read_stacks(run: str) -> dict[str, bytes]:
    """The stack files of this machine that hold a stack, by name.

    Each worker uploads those of its whole machine: one that holds Python's lock uploads nothing.
    """
    texts = {path.name: path.read_bytes() for path in stack_files(run)}
    return {name: text for name, text in texts.items() if STACK_MARK.encode() in text}


def hanging(*runs: Location) -> list[tuple[str, Location | None]]:
    """What the workers of runs are doing too long, and where their stacks lie.

    Args:
        runs: OUT/events/<run> of each.

    Returns:
        Of the workers that have left a stack. If none has, of those that are in a step: their stacks may
        be kept from the folder by what they hang in; then the place is that of a copy on this machine, or
        None.
    """
    found: list[tuple[str, Location | None]] = []
    for place, text in _stack_texts(runs):
        doing = text.partition("\n")[0].strip()
        others = [other for other, stack in found if stack is not None]
        known = any(other.startswith(doing) or doing.startswith(other) for other in others)
        if doing and doing != _IDLE and not known:
            found.append((doing, place if STACK_MARK in text else None))
    with_stack = [each for each in found if each[1] is not None]
    return with_stack or list(dict.fromkeys(found))


def _stack_texts(runs: tuple[Location, ...]) -> Iterator[tuple[Location, str]]:
    """Those in a bucket come first: they stay when the driver's machine is gone."""
    uploaded = set[str]()
    for run in runs:
        for place, text in _uploaded_texts(run):
            uploaded.add(place.name)
            yield place, text
    paths = [path for run in runs for path in _copies(run.name)]
    paths += [path for run in runs for path in stack_files(str(run)) if path.name not in uploaded]
    for path in paths:
        yield path, path.read_text(errors="replace")


def _uploaded_texts(run: Location) -> list[tuple[Location, str]]:
    if not isinstance(run, Prefix):
        return []
    try:
        names = [name for name in files.list_names(str(run)) if name.startswith(_STACK)]
        return [(run / name, store_of(run).read(str(run / name)).decode(errors="replace")) for name in names]
    except (OSError, ConfigError) as error:  # those of this machine are read all the same
        log.debug("%s: its stacks cannot be read now: %s", run, error)
        return []


def _copies(run: str) -> list[Path]:
    """The stacks of a run's workers that lie in this machine's temporary folder."""
    paths = Path(tempfile.gettempdir()).glob(f"{_COPY}{run}-*.txt")
    return sorted(path for path in paths if not path.is_symlink() and path.stat().st_uid == os.getuid())


_COPY = "paracaption-stack-"

_telling = threading.Lock()


@contextmanager
def telling(stall_s: float, what_to_do: str = ONLY_SLOW, run: str = "") -> Iterator[None]:
    """Log a line when a step of this process takes longer than `stall_s`; once for each.

    Within another such block it does nothing.

    Args:
        stall_s: seconds.
        what_to_do: the end of the line.
        run: name of the run whose driver looks for the stack on this machine; "" for the driver itself.
    """
    if not _telling.acquire(blocking=False):
        yield
        return
    ended = threading.Event()
    watched = (stall_s, what_to_do, run, ended)
    thread = threading.Thread(target=_watch, args=watched, daemon=True, name="stalls")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _telling.release()


def _watch(stall_s: float, what_to_do: str, run: str, ended: threading.Event) -> None:
    told_s = 0.0
    while not ended.wait(min(1.0, stall_s / _LOOKS)):
        since_s, words = NOW.since_s, NOW.words()
        waited_s = time.monotonic() - since_s
        if words and since_s != told_s and waited_s > stall_s:
            told_s = since_s
            log.error("%s", line(words, waited_s, _keep_stack(words, run), what_to_do))


def line(words: str, seconds: float, stack: Location | None, what_to_do: str) -> str:
    """The line that tells of a stall."""
    where = f"the stack is in {stack}" if stack else "its process could leave no stack"
    return f"{words}: no progress for {seconds:.0f} s (failures.stall_s); {where}; {what_to_do}"


def _keep_stack(words: str, run: str) -> Path | None:
    """The stacks of this process's threads, in a file that is left in the machine's temporary folder."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"{_COPY}{run or os.getpid()}-", suffix=".txt", delete=False, errors="replace"
        ) as file:
            file.write(f"{words}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            return Path(file.name)
    except OSError as error:
        log.debug("no room for a stack: %s", error)
        return None
