"""Local scratch of a corpus in a bucket: what is staged for an upload, and notes of runs.

    $PARACAPTION_SCRATCH/paracaption-scratch-UID/CORPUS-HASH/             `folder_of`
    .../staged~PID~STARTED~NAMESPACE~BOOT~HOST/NAME-NONCE                 `Staged`
    .../events/RUN/driver                                                 `note_driver`; stacks lie next to it

A folder's name, or a run's file `driver`, says whose files are in it, so the next process on that machine
removes what a dead one left, and nobody else's. Without the variable, scratch is in the system's folder for
temporary files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...schemas.errors import ConfigError
from .process_identity import Identity, is_dead, name_of, process_named, this_process

VARIABLE = "PARACAPTION_SCRATCH"
"""The environment variable that names the folder for scratch."""

IN_MEMORY_BYTES = 4 << 20
"""Up to this size, what is staged stays in memory."""

_STEP_BYTES = 64 << 20
"""How much is written before the free space is looked at again."""

_ABANDONED_S = 86_400.0
"""After this time without a change, staged files are removed also of a process that may be alive: one of an
earlier container, whose process ids mean nothing in this one, is never known to be dead. So is what a run
left on a machine without its driver."""

_PREFIX = "staged"
_RUNS, _DRIVER = "events", "driver"

_cleaned: dict[str, int] = {}
_lock = threading.Lock()


def folder_of(out: str) -> Path:
    """The scratch of a corpus on this machine: the same for every process of this user. It is made.

    Args:
        out: path or URL of the corpus.

    Raises:
        ConfigError: the folder is another user's, or cannot be made.
    """
    out = out.rstrip("/")
    root = Path(os.environ.get(VARIABLE) or tempfile.gettempdir()) / f"paracaption-scratch-{os.getuid()}"
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", out.partition("://")[2] or out).strip("-")[-60:]
    folder = root / f"{words}-{hashlib.sha256(out.encode()).hexdigest()[:12]}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: {error.strerror}; set {VARIABLE} to a folder of this machine"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{root}: another user may write there; remove it, or set {VARIABLE}")
    return folder


def clean(out: str) -> int:
    """Remove what dead processes of this machine have left of a corpus; returns the bytes of it."""
    num_bytes, folder = 0, folder_of(out)
    for left in (*folder.glob(f"{_PREFIX}~*"), *folder.glob(f"{_RUNS}/*")):
        if _is_staged_by_the_dead(left) if left.parent == folder else _is_of_a_dead_run(left):
            with suppress(OSError):
                num_bytes += sum(file.stat().st_size for file in left.iterdir())
            shutil.rmtree(left, ignore_errors=True)
    return num_bytes


def note_driver(run: Path) -> None:
    """Note in the folder of a run that it is this process's, so that it is removed after it."""
    (run / _DRIVER).write_text(_folder_name(this_process()))


def remove_run(run: Path) -> None:
    """Remove the folder of a run that has ended."""
    shutil.rmtree(run, ignore_errors=True)


def _is_staged_by_the_dead(folder: Path) -> bool:
    owner = _owner_of(folder.name)
    return owner is not None and (is_dead(owner) or _is_abandoned(folder))


def _is_of_a_dead_run(run: Path) -> bool:
    try:
        driver = _owner_of((run / _DRIVER).read_text())
        return driver is not None and is_dead(driver)
    except FileNotFoundError:
        return _is_abandoned(run)
    except OSError:  # a file that is not ours
        return False


def _is_abandoned(folder: Path) -> bool:
    try:
        newest_s = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:  # at work, or removed by another process
        return False
    return time.time() - newest_s > _ABANDONED_S


def make_room(folder: Path, num_bytes: int) -> None:
    """Refuse to stage what there is no room for.

    Raises:
        OSError: ENOSPC; it names the folder and the variable.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        what = f"{free >> 20} MiB are free for staging, and {num_bytes >> 20} MiB are needed"
        raise OSError(errno.ENOSPC, f"{what}; set {VARIABLE} to a folder with more room", str(folder))


class Staged:
    """Bytes that are kept for an upload: in memory while they are few, else in a file of this process.

    Args:
        out: path or URL whose scratch is used.
        name: of the file, for people.
    """

    def __init__(self, out: str, name: str):
        _clean_once(out)
        self._out, self._name = out, name
        self._buffer = bytearray()
        self._file: Any = None
        self._path: Path | None = None
        self._room = 0
        self.size = 0

    def write(self, data: Any) -> int:
        """Keep more bytes.

        Raises:
            OSError: the disk is full or failing.
        """
        view = memoryview(data).cast("B")
        if self._file is None and self.size + len(view) > IN_MEMORY_BYTES:
            self._spill()
        if self._file is None:
            self._buffer += view
        else:
            self._room -= len(view)
            if self._room < 0:
                assert self._path is not None
                make_room(self._path.parent, len(view) + _STEP_BYTES)
                self._room = _STEP_BYTES
            self._file.write(view)
        self.size += len(view)
        return len(view)

    def content(self) -> bytes | Path:
        """All bytes: as they are, or the file that has them."""
        if self._file is None:
            return bytes(self._buffer)
        self._file.flush()
        assert self._path is not None
        return self._path

    def discard(self) -> None:
        """Forget the bytes."""
        self._buffer = bytearray()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            assert self._path is not None
            self._path.unlink(missing_ok=True)

    def _spill(self) -> None:
        folder = own_folder(self._out)
        path = folder / f"{self._name[-100:]}-{uuid.uuid4().hex[:12]}"
        make_room(folder, len(self._buffer) + _STEP_BYTES)
        self._file, self._path = path.open("xb", buffering=1 << 20), path
        self._file.write(self._buffer)
        self._buffer = bytearray()


def _clean_once(out: str) -> None:
    """Remove what dead processes left, before this one stages its first file."""
    with _lock:
        if _cleaned.get(out) != os.getpid():
            clean(out)
            _cleaned[out] = os.getpid()


def own_folder(out: str) -> Path:
    """The folder of this process in a corpus's scratch; the next process removes it if this one dies."""
    _clean_once(out)
    own = folder_of(out) / _folder_name(this_process())
    own.mkdir(mode=0o700, exist_ok=True)
    return own


def _folder_name(process: Identity) -> str:
    return f"{_PREFIX}~{name_of(process)}"


def _owner_of(name: str) -> Identity | None:
    return process_named(name.partition("~")[2])
