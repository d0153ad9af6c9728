"""Where a run keeps what only its own machines need: stacks, and notes of what is in flight.

Next to a corpus in a folder; on the scratch of each machine for a corpus in a bucket.
"""

from __future__ import annotations

from pathlib import Path

from ..io import scratch
from ..io.location import Location, is_bucket, locate


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


def run_folder(run: str) -> Path:
    """The folder of this machine for a run, OUT/events/<run>."""
    location: Location = locate(run)
    return local_folder(str(location.parent.parent), f"events/{location.name}")
