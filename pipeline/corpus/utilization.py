"""What model stages did with their actors, from the event log: start-up, speed, share of time in calls."""

from __future__ import annotations

from collections import Counter, defaultdict

import msgspec

from ..io import files
from ..io.location import Location, locate
from .events import Event, EventReader


class StageUtilization(msgspec.Struct):
    """One model stage of a run.

    Attributes:
        actors: how many came up with its model; one that replaces a dead one counts too.
        startup_s: mean seconds to load the model.
        asked: regions the model was asked about.
        busy_s: seconds inside calls to the model, summed over all actors.
        alive_s: seconds from an actor's start-up to the end of the run, summed over all actors, without those
            in which the actor worked for another subset.
        gpu: mean GPU utilization during calls, 0..1; None if it is not known.
        report: the backend's own numbers: the last report of each actor, averaged.
    """

    actors: int = 0
    startup_s: float = 0.0
    asked: int = 0
    busy_s: float = 0.0
    alive_s: float = 0.0
    gpu: float | None = None
    report: dict[str, float] = {}

    @property
    def regions_per_s(self) -> float | None:
        """The rate of one actor while it is inside calls."""
        return self.asked / self.busy_s if self.asked and self.busy_s else None

    @property
    def busy_share(self) -> float | None:
        """The share of `alive_s` that its actors spend inside calls."""
        return min(1.0, self.busy_s / self.alive_s) if self.alive_s > 0 else None


class UtilizationCounter:
    """Adds up the events of one run."""

    def __init__(self) -> None:
        self._ready: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._loads: dict[str, list[float]] = defaultdict(list)
        self._asked: Counter[str] = Counter()
        self._busy_s: dict[str, float] = defaultdict(float)
        self._gpu: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._reports: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        self._away_s: dict[str, float] = defaultdict(float)
        self._last_s = 0.0

    def add(self, worker: str, event: Event) -> None:
        """Count one event of a worker; a worker is known by the name of its event file."""
        self._last_s = max(self._last_s, event.time_s)
        if event.what == "ready":
            self._ready[worker] = (event.time_s, tuple(event.stage.split("+")))
        elif event.what == "started":
            self._loads[event.stage].append(event.seconds)
        elif event.what == "unit":
            self._away_s[worker] += event.away
            self._asked[event.stage] += event.asked
            self._busy_s[event.stage] += event.busy
            if event.gpu is not None:
                self._gpu[event.stage].append((event.gpu, event.busy))
            if event.report:
                self._reports[event.stage][worker] = event.report

    def stages(self, now_s: float | None = None) -> dict[str, StageUtilization]:
        """The model stages by name, in the order in which they came up.

        Args:
            now_s: the end of the run so far, in seconds since the epoch; default: its last event.
        """
        end_s = self._last_s if now_s is None else now_s
        found = {}
        for stage, loads in self._loads.items():
            since = [
                ready_s + self._away_s[worker]
                for worker, (ready_s, stages) in self._ready.items()
                if stage in stages
            ]
            gpu = self._gpu[stage]
            weight = sum(busy for _, busy in gpu)
            found[stage] = StageUtilization(
                actors=len(since),
                startup_s=sum(loads) / len(loads),
                asked=self._asked[stage],
                busy_s=self._busy_s[stage],
                alive_s=sum(max(0.0, end_s - ready_s) for ready_s in since),
                gpu=sum(share * busy for share, busy in gpu) / weight if weight else None,
                report=_mean(list(self._reports[stage].values())),
            )
        return found


def read_utilization(out: str | Location, subset: str) -> dict[str, StageUtilization]:
    """The model stages of a subset over all runs into a corpus; empty if its events are gone."""
    runs = []
    for folder in list_runs(out).get(subset, []):
        counter = UtilizationCounter()
        for worker, event in EventReader(folder).named():
            counter.add(worker, event)
        runs.append(counter.stages())
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: _joined([run[name] for run in runs if name in run]) for name in names}


def list_runs(out: str | Location) -> dict[str, list[Location]]:
    """The folders OUT/events/<date>-<time>-<subset>-<random>/ by subset, the oldest first."""
    runs: dict[str, list[Location]] = {}
    for name in files.list_names(f"{out}/events"):
        if name.count("-") >= 3:
            subset = name.split("-", 2)[2].rpartition("-")[0]
            runs.setdefault(subset, []).append(locate(out) / "events" / name)
    return runs


def _joined(runs: list[StageUtilization]) -> StageUtilization:
    known = [(run.gpu, run.busy_s) for run in runs if run.gpu is not None]
    weight = sum(busy for _, busy in known)
    return StageUtilization(
        actors=max(run.actors for run in runs),
        startup_s=sum(run.startup_s for run in runs) / len(runs),
        asked=sum(run.asked for run in runs),
        busy_s=sum(run.busy_s for run in runs),
        alive_s=sum(run.alive_s for run in runs),
        gpu=sum(share * busy for share, busy in known) / weight if weight else None,
        report=next((run.report for run in reversed(runs) if run.report), {}),
    )


def _mean(reports: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for report in reports for name in report)
    return {
        name: sum(report.get(name, 0.0) for report in reports) / sum(name in report for report in reports)
        for name in names
    }
