"""The event log: who did what when. Feeds the progress view, the stall watch, the capacity plan and the reports.

Every worker appends to a file of its own under OUT/events/<run>/, one JSON object a line; nothing reads it back to
decide what to build, so a lost line costs a number on a screen and no more.
"""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec


class Event(msgspec.Struct, omit_defaults=True):
    """One thing that happened.

    Attributes:
        time_s: seconds since the epoch, the worker's clock.
        what: "started" (a model was loaded), "batch", "unit", "failed", "committed".
        stage: name of the step or stage.
        unit: name of the unit.
        images, regions: how many it was about.
        asked: regions the model was asked about (evidence that was lacking).
        seconds: how long it took.
        detail: for people.
    """

    time_s: float
    what: str
    stage: str = ""
    unit: str = ""
    images: int = 0
    regions: int = 0
    asked: int = 0
    seconds: float = 0.0
    detail: str = ""


class EventLog:
    """Appends events to one file; each line is one write, so a killed process leaves whole lines."""

    def __init__(self, folder: Path, who: str):
        self.path = folder / f"{who}-{socket.gethostname()}-{os.getpid()}.jsonl"
        self._file = open(self.path, "ab", buffering=0)

    def emit(self, what: str, **fields: object) -> None:
        """Append one event, stamped now."""
        self._file.write(msgspec.json.encode(Event(time.time(), what, **fields)) + b"\n")  # type: ignore[arg-type]


class EventReader:
    """Follows all event files of a run, reading only what is new."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[Path, int] = defaultdict(int)

    def new(self) -> Iterator[Event]:
        """Events since the last call, file by file."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._read[path])
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self._read[path] += whole
            for line in data[:whole].splitlines():
                yield msgspec.json.decode(line, type=Event)
