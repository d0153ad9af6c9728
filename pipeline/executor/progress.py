"""The progress of a build: what each stage has done, and whether anything still moves."""

from __future__ import annotations

import logging
import time
from collections import Counter

import msgspec

from ...schemas.errors import StageStalled
from ..corpus.event_parts import EVERY_S
from ..corpus.events import EventReader
from ..corpus.utilization import StageUtilization, UtilizationCounter
from ..io.location import Location, is_bucket
from .stalls import hanging, line

log = logging.getLogger(__name__)

STALL_GRACE_S = 5.0
"""How much later than the workers, which write their stacks at `stall_s`, the driver looks for them."""

_UPLOAD_S = 2 * EVERY_S
"""How much later still, where the stacks have to be uploaded."""


class StageProgress(msgspec.Struct):
    """What a stage has done in this run.

    Attributes:
        units: that passed through it.
        regions: that it worked on.
        asked: regions that its model was asked about.
        seconds: spent, summed over its actors.
    """

    units: int = 0
    regions: int = 0
    asked: int = 0
    seconds: float = 0.0


class Progress(msgspec.Struct):
    """The live view of one subset's build; all counts are of this run.

    Attributes:
        subset: its name.
        pending: units that this run has to build.
        done: units of these that are committed.
        images, regions, kept: of the committed units.
        seconds: since the stream started.
        dropped: regions of the committed units by "stage/reason".
        stages: by name, in the recipe's order.
        utilization: of the model stages whose actors are up.
        held: units that are held back because their source fails, each with what happened.
        ended: whether none of its units is left to come; others of the build may still run.
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
    held: dict[str, str] = {}
    ended: bool = False

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all units are committed, at the rate so far; None before the first commit.

        0 when it has ended.
        """
        if self.ended:
            return 0.0
        return None if not self.done else self.seconds / self.done * (self.pending - self.done)


class _Followed:
    def __init__(self, reader: EventReader, progress: Progress, run: Location):
        self.reader, self.progress, self.run = reader, progress, run
        self.counter = UtilizationCounter()
        self.is_final = False


class Watch:
    """Reads the workers' events into the progress views, and notices when nothing moves in any subset.

    Args:
        stall_s: how long nothing may move.
    """

    def __init__(self, stall_s: float):
        self.stall_s = stall_s
        self._grace_s = STALL_GRACE_S
        self._followed: list[_Followed] = []
        self.started = self.moved = time.monotonic()

    def follow(self, reader: EventReader, progress: Progress, run: Location) -> None:
        """Watch a subset, too.

        Args:
            reader: of the run's events.
            progress: is updated until it has ended.
            run: OUT/events/<run>, where its events and stacks are.
        """
        self._followed.append(_Followed(reader, progress, run))
        if is_bucket(run):
            self._grace_s = STALL_GRACE_S + _UPLOAD_S

    def update(self, moved: bool) -> None:
        """Read what is new. `moved` says that a unit was committed.

        Raises:
            StageStalled: nothing has moved for `stall_s`; the message says where, and where the stacks lie.
        """
        now = time.monotonic()
        for each in self._followed:
            moved = self._read(each) or moved
            if not each.is_final:
                each.progress.seconds = now - self.started
                each.progress.utilization = each.counter.stages(time.time())
                each.is_final = each.progress.ended
        if moved:
            self.moved = now
        elif now - self.moved > self.stall_s + self._grace_s:
            raise StageStalled(self._message())

    def _read(self, followed: _Followed) -> bool:
        moved = False
        try:
            found = list(followed.reader.named())
        except OSError as error:  # what matters fails with an error of its own
            log.debug("%s: its events cannot be read now: %s", followed.run, error)
            return False
        for worker, event in found:
            moved = True
            followed.counter.add(worker, event)
            if event.what == "unit" and event.stage in followed.progress.stages:
                stage = followed.progress.stages[event.stage]
                stage.units += 1
                stage.regions += event.regions
                stage.asked += event.asked
                stage.seconds += event.seconds
        return moved

    def _message(self) -> str:
        found = hanging(*(each.run for each in self._followed))
        if not found and any(is_bucket(each.run) for each in self._followed):
            return (
                f"no progress for {self.stall_s:.0f} s (failures.stall_s); no worker has uploaded a stack: "
                "either none is at work, since Ray may have too few free CPUs or GPUs (`ray status` shows "
                f"them), or the nodes do not reach {self._followed[0].run.parent.parent} any more; "
                "`paracaption doctor CONFIG --ray-address ...` looks from every node; what is committed stays"
            )
        if not found:
            return (
                f"no progress for {self.stall_s:.0f} s (failures.stall_s); no worker is at work: Ray may "
                "have too few free CPUs or GPUs (`ray status` shows them); lower `concurrency` or add nodes, "
                "and run the same command again; what is committed stays"
            )
        words, stack = found[0]
        others = [f"{doing} ({path or 'no stack'})" for doing, path in found[1:]]
        more = f"; also: {'; '.join(others)}" if others else ""
        return line(words, self.stall_s, stack, f"{_FIX}{more}")


_FIX = (
    "what is committed stays; run the same command again, and raise failures.stall_s if the step is only slow"
)
