"""Where a run keeps what only its own machines need: stacks, and notes of what is in flight.

Next to a corpus in a folder; on the scratch of each machine for a corpus in a bucket.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ..io import scratch
from ..io.location import Location, is_bucket, locate
from ..io.store import store_of

STACK_MARK = "most recent call first"
"""Stands in a stack file when something took longer than `failures.stall_s`."""


def local_folder(out: str, place: str) -> Path:
    """The folder of this machine for a place below a corpus. It is made.

    Args:
        out: the corpus.
        place: below it, such as "events/<run>".

    Raises:
        OSError: it cannot be made.
    """
    folder = (scratch.folder_of(out) if is_bucket(out) else Path(out)) / place
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def begin_run(run: str) -> None:
    """Make the folder of a new run on the driver's machine, and in a bucket what its workers look for.

    Raises:
        OSError: it cannot be made.
    """
    folder = run_folder(run)
    if is_bucket(run):
        scratch.note_driver(folder)
        store_of(run).create(f"{run}/{BEGUN}", b"")


def end_run(run: str) -> None:
    """Remove the files of stacks that are none, and where a run has scratch of its own, that."""
    folder, is_left = run_folder(run), False
    for stack in folder.glob("stack-*.txt"):
        if STACK_MARK in stack.read_text(errors="replace"):
            is_left = True
        else:
            stack.unlink()
    if is_bucket(run) and not is_left:
        scratch.remove_run(folder)


def run_folder(run: str) -> Path:
    """The folder of this machine for a run, OUT/events/<run>. It is made."""
    location: Location = locate(run)
    return local_folder(str(location.parent.parent), f"{location.parent.name}/{location.name}")


def forget_old(out: str, runs: Collection[str]) -> None:
    """Remove the notes and stacks that this machine has kept for a corpus in a bucket, and nobody looks for.

    A driver removes those of its own machine; on others they wait for the next worker.

    Args:
        out: the corpus; one in a folder has no such notes.
        runs: names of the runs that go on.
    """
    if not is_bucket(out):
        return
    root, oldest_s = scratch.folder_of(out), time.time() - _KEEP_S
    stacks = [path for path in root.glob(f"{_EVENTS}/*/*") if path.parent.name not in runs]
    for path in [*stacks, *root.glob(f"*/{JOURNAL}/*/*")]:
        with suppress(OSError):  # another worker removes it, too
            if path.stat().st_mtime < oldest_s:
                path.unlink()
                path.parent.rmdir()  # while others are in it, it stays


BEGUN = "begun"
"""Name of an object of a run in a bucket: a worker that does not see it is led to another bucket."""

_KEEP_S = 86_400.0
"""How long a note is kept that no process has written to."""

_EVENTS, JOURNAL = "events", "journal"
