"""How a build is going: what each stage has done, and whether anything still moves."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import msgspec

from ...schemas.errors import StageStalled
from ..corpus.events import EventReader
from ..corpus.utilization import StageUtilization, UtilizationCounter
from .worker import STACK_MARK

STALL_GRACE_S = 5.0
"""The workers dump their stacks at `stall_s`; the driver looks a little later."""


class StageProgress(msgspec.Struct):
    """What a stage has done in this run: units, regions seen, regions a model was asked about, seconds."""

    units: int = 0
    regions: int = 0
    asked: int = 0
    seconds: float = 0.0


class Progress(msgspec.Struct):
    """The live view of one subset's build. `pending` units are this run's; `done` of them are committed.

    Attributes:
        seconds: since the stream started.
        dropped: regions by "stage/reason", of this run's units.
        stages: by stage name, in recipe order.
        utilization: of the model stages whose actors are up: start-up seconds, share of time in calls.
    """

    subset: str
    pending: int
    done: int = 0
    images: int = 0
    regions: int = 0
    kept: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = msgspec.field(default_factory=Counter)
    stages: dict[str, StageProgress] = {}
    utilization: dict[str, StageUtilization] = {}

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None before the first commit."""
        return None if not self.done else self.seconds / self.done * (self.pending - self.done)


class Watch:
    """Reads the workers' events into the progress view, and notices when nothing moves."""

    def __init__(self, reader: EventReader, progress: Progress, stall_s: float, run_folder: Path):
        self.reader = reader
        self.progress = progress
        self.stall_s = stall_s
        self.run_folder = run_folder
        self.counter = UtilizationCounter()
        self.started = self.moved = time.monotonic()

    def look(self, moved: bool) -> None:
        for worker, event in self.reader.named():
            moved = True
            self.counter.add(worker, event)
            if event.what == "unit" and event.stage in self.progress.stages:
                stage = self.progress.stages[event.stage]
                stage.units += 1
                stage.regions += event.regions
                stage.asked += event.asked
                stage.seconds += event.seconds
        now = time.monotonic()
        self.progress.seconds = now - self.started
        self.progress.utilization = self.counter.stages(time.time())
        if moved:
            self.moved = now
        elif now - self.moved > self.stall_s + STALL_GRACE_S:
            raise StageStalled(self._message())

    def _message(self) -> str:
        stacks = [path.read_text() for path in sorted(self.run_folder.glob("stack-*.txt"))]
        hanging = [text for text in stacks if STACK_MARK in text]
        where = (
            "\n\n".join(hanging) or "No worker is inside a call: Ray could not place them; see `ray status`."
        )
        return f"no progress for {self.stall_s:.0f} s (failures.stall_s). Committed units are safe.\n{where}"
