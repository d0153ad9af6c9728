"""Where a run keeps what only its own machines need: stacks, and notes of what is in flight.

Next to a corpus in a folder; on the scratch of each machine for a corpus in a bucket.
"""

from __future__ import annotations

from pathlib import Path

from ..io import scratch
from ..io.location import Location, is_bucket, locate

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
    """Make the folder of a new run on this machine, the driver's.

    Raises:
        OSError: it cannot be made.
    """
    folder = run_folder(run)
    if is_bucket(run):
        scratch.note_driver(folder)


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
    """The folder of this machine for a run, OUT/events/<run>."""
    location: Location = locate(run)
    return local_folder(str(location.parent.parent), f"events/{location.name}")
