"""The event log: who did what when. Feeds the progress view, the stall watch, the estimate, the reports.

Every worker appends to a file of its own under OUT/events/<run>/, one JSON object a line, or uploads it in
parts (`event_parts`). Nothing reads it back to decide what to build: a lost line costs a number on a screen,
and no more.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...schemas.secrets import shorten
from ..io.json_lines import LineReader, LineWriter
from ..io.location import Location, Prefix
from .event_parts import PartReader, PartWriter

log = logging.getLogger(__name__)


class Event(msgspec.Struct, omit_defaults=True):
    """One thing that happened.

    Attributes:
        time_s: seconds since the epoch, the worker's clock.
        what: "started" (a model was loaded), "ready" (a worker), "batch", "unit", "failed", "committed";
            of the driver also "ray" (it is up), "begun" and "ended" (the stream).
        stage: name of the step or stage.
        unit: name of the unit.
        images, regions: how many it was about.
        asked: regions the model was asked about (evidence that was lacking).
        seconds: how long it took.
        detail: for people.
        cpu: seconds of CPU time that the worker's process took meanwhile.
        busy: of `seconds`, those inside calls to the model.
        gpu: the GPU's mean utilization during these, 0..1; None if it is not known.
        report: the backend's own numbers, such as a cache's hit rate.
        away: seconds that the worker's process has worked for other subsets since its last "unit" here.
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
    cpu: float = 0.0
    busy: float = 0.0
    gpu: float | None = None
    report: dict[str, float] = {}
    away: float = 0.0


class EventLog:
    """Appends events to one file.

    Events decide nothing, so a disk that takes no more of them is one warning: whoever writes what matters
    fails with a clear error.

    Args:
        folder: OUT/events/<run>.
        who: the worker's name.
        on_event: called with each event, after it was appended.
    """

    def __init__(self, folder: Location, who: str, on_event: Callable[[Event], None] = lambda _: None):
        self.on_event = on_event
        self._name = f"{who}-{socket.gethostname()}-{os.getpid()}"
        self.path = folder / f"{self._name}.jsonl"
        self._lines: LineWriter | PartWriter | None = None
        self._complained = False

    def emit(self, what: str, **fields: Any) -> None:
        """Append one event, stamped now, its detail without secrets. Never raises an `OSError`."""
        self.on_event(self.append(what, **fields))

    def append(self, what: str, **fields: Any) -> Event:
        """The same without a call of `on_event`, for use in the middle of other work."""
        if detail := fields.get("detail"):
            fields["detail"] = shorten(detail)
        event = Event(time.time(), what, **fields)
        try:
            if self._lines is None:
                self._lines = self._open()
            self._lines.append(event)
        except OSError as error:
            if not self._complained:
                log.warning("%s: %s; events are lost, the build goes on", self.path, error)
                self._complained = True
        return event

    def add_files(self, read: Callable[[], Mapping[str, bytes]]) -> None:
        """Keep files of this machine next to the events in a bucket; in a folder they are there already.

        See `PartWriter.add_files`.
        """
        if isinstance(self.path, Prefix):
            self._lines = self._lines or self._open()
            assert isinstance(self._lines, PartWriter)
            self._lines.add_files(read)

    def _open(self) -> LineWriter | PartWriter:
        if isinstance(self.path, Prefix):
            return PartWriter(self.path.parent, f"{self._name}.{uuid.uuid4().hex[:6]}")
        return LineWriter(self.path)

    def close(self) -> None:
        """Close the file; another event would open it again."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


class EventReader:
    """Follows all event files of a run, reading only what is new."""

    def __init__(self, folder: Location):
        self.folder = folder
        self._readers: dict[Path, LineReader] = {}
        self._parts = PartReader(folder) if isinstance(folder, Prefix) else None

    def new(self) -> Iterator[Event]:
        """Events since the last call, file by file."""
        for _, event in self.named():
            yield event

    def named(self) -> Iterator[tuple[str, Event]]:
        """(worker, event) since the last call; a worker is known by the name of its file."""
        for worker, line in self._lines() if self._parts is None else self._parts.new():
            try:
                event = msgspec.json.decode(line, type=Event)
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                log.debug("%s: not an event: %r", worker, line)  # cut short by a full disk
            else:
                yield worker, event

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """(worker, line) of what was appended since the last call."""
        for path in sorted(Path(str(self.folder)).glob("*.jsonl")):
            for line in self._readers.setdefault(path, LineReader(path)).new():
                yield path.stem, line
