"""The program that a stopped command becomes: it ends the command's children, says so, and exits.

    python end_children.py EXIT_CODE LINE    # an empty LINE is not said

It has the command's process id, and so its children; `stopping.py` says why. Only the standard library and
psutil are imported: it has to be there at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

import psutil

POLITE_S = 1.0
"""How long processes have to end by themselves, before they are killed."""

LONGEST_S = 3.0
"""After that, whoever is still there waits for a disk that does not answer, and is not waited for."""


def main() -> None:
    """End the children, print the line, exit."""
    code, line = int(sys.argv[1]), sys.argv[2]
    _end_all()
    if line and sys.stderr.isatty():
        line = f"\r\x1b[J\x1b[?25h{line}"  # what is left of a live table, and the cursor that it hid
    with suppress(OSError):
        os.write(2, f"{line}\n".encode() if line else b"")
    os._exit(code)


def _end_all() -> None:
    start = time.monotonic()
    _signal_all(signal.SIGTERM, _children())
    while _children() and time.monotonic() - start < POLITE_S:
        time.sleep(0.02)
    while _children() and time.monotonic() - start < LONGEST_S:
        # Python's trackers remove the shared memory of processes that were killed, and end when all are gone.
        # A child may have had children meanwhile.
        others = [child for child in _children() if not _is_tracker(child)]
        _signal_all(signal.SIGKILL, others)
        time.sleep(0.02)
    _signal_all(signal.SIGKILL, _children())


def _signal_all(number: int, children: list[psutil.Process]) -> None:
    for child in children:
        with suppress(psutil.Error):
            child.send_signal(number)


def _is_tracker(child: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("multiprocessing.resource_tracker" in each for each in child.cmdline())
    return False


def _children() -> list[psutil.Process]:
    """Every process below this one that runs; those that have ended are waited for."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    running = []
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE:
                    running.append(child)
    return running


if __name__ == "__main__":
    main()
