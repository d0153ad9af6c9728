"""Who a process is, so that another one can tell whether it is dead.

A process is known to be dead only from its own machine, in its own name space of process ids, since that
machine started: a container or another node sees other processes under the same numbers.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil


class Identity(NamedTuple):
    """A process of one machine, from one start of the machine to the next.

    Attributes:
        boot: a name of the machine's last start; "" if it has none.
        name_space: of the process ids; "" where there are none.
        started: when the process did; process ids are given again.
    """

    host: str
    boot: str
    name_space: str
    pid: int
    started: str


def this_process() -> Identity:
    """Who runs this."""
    pid = os.getpid()
    return Identity(socket.gethostname(), _boot(), _name_space(), pid, _started(pid))


def is_dead(process: Identity) -> bool:
    """Whether a process has certainly ended; False where that cannot be known."""
    here = process.host == socket.gethostname() and process.boot == _boot() and bool(process.boot)
    if not here or _name_space() != process.name_space:
        return False
    return _started(process.pid) != process.started


def name_of(process: Identity) -> str:
    """A process as a part of a file's name: PID~STARTED~NAMESPACE~BOOT~HOST."""
    name_space = "".join(filter(str.isdigit, process.name_space))
    return "~".join((str(process.pid), process.started, name_space, process.boot, process.host))


def process_named(text: str) -> Identity | None:
    """The process that `name_of` has named; None if it has named none."""
    parts = text.split("~", 4)
    if len(parts) != 5 or not parts[0].isdigit():
        return None
    pid, started, name_space, boot, host = parts
    return Identity(host, boot, f"pid:[{name_space}]" if name_space else "", int(pid), started)


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _name_space() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return "ended"
        with suppress(OSError):  # in ticks since the machine started, which no setting of the clock changes
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return str(process.create_time())
    except psutil.NoSuchProcess:
        return "ended"
