"""Which process owns a corpus, and whether it is known to be dead.

A process is known to be dead only from its own machine, in its own name space of process ids, since that
machine started: a container or another node sees other processes under the same numbers.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from .records import Claim


def claim_of_this_process(command: str) -> Claim:
    """A claim that names this process."""
    pid = os.getpid()
    return Claim(command=command, host=socket.gethostname(), boot=_boot(), process=_process(pid), pid=pid)


def is_dead(claim: Claim) -> bool:
    """Whether the process that made a claim has certainly ended; False where that cannot be known."""
    here = claim.host == socket.gethostname() and claim.boot == _boot() and bool(claim.boot)
    if not here or _name_space() != claim.process.partition("/")[0]:
        return False
    return _process(claim.pid) != claim.process


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _name_space() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _process(pid: int) -> str:
    """Name space, number and start of a process; the number may be another's later, the start is not."""
    return f"{_name_space()}/{pid}/{_started(pid)}"


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
