"""What model stages did with their actors, from the event log: start-up, speed, share of time in calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import msgspec

from .events import Event, EventReader


class StageActivity(msgspec.Struct):
    """One model stage of a run.

    Attributes:
        actors: that came up with its model; one that replaces a dead one counts too.
        startup_s: mean seconds to load the model.
        asked: regions the model was asked about.
        busy_s: inside calls to the model, over all actors.
        alive_s: from an actor's start-up to the end of the run, over all actors.
        gpu: the GPU's mean utilisation during calls, 0..1; None if it is not known.
        report: the backend's own numbers, the last of each actor, averaged.
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
        """Of one actor, while it is inside calls."""
        return self.asked / self.busy_s if self.asked and self.busy_s else None

    @property
    def busy_share(self) -> float | None:
        """Of its actors' life while the stream ran."""
        return min(1.0, self.busy_s / self.alive_s) if self.alive_s > 0 else None


class Activity:
    """Adds a run's events up."""

    def __init__(self) -> None:
        self._ready: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._loads: dict[str, list[float]] = defaultdict(list)
        self._asked: Counter[str] = Counter()
        self._busy_s: dict[str, float] = defaultdict(float)
        self._gpu: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._reports: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        self._last_s = 0.0

    def add(self, worker: str, event: Event) -> None:
        """Count one event of a worker; workers are told apart by their files' names."""
        self._last_s = max(self._last_s, event.time_s)
        if event.what == "ready":
            self._ready[worker] = (event.time_s, tuple(event.stage.split("+")))
        elif event.what == "started":
            self._loads[event.stage].append(event.seconds)
        elif event.what == "unit":
            self._asked[event.stage] += event.asked
            self._busy_s[event.stage] += event.busy
            if event.gpu is not None:
                self._gpu[event.stage].append((event.gpu, event.busy))
            if event.report:
                self._reports[event.stage][worker] = event.report

    def stages(self, now_s: float | None = None) -> dict[str, StageActivity]:
        """By model stage, in the order in which they came up.

        Args:
            now_s: end of the run so far; default: its last event.
        """
        end_s = self._last_s if now_s is None else now_s
        found = {}
        for stage, loads in self._loads.items():
            since = [ready_s for ready_s, stages in self._ready.values() if stage in stages]
            gpu = self._gpu[stage]
            weight = sum(busy for _, busy in gpu)
            found[stage] = StageActivity(
                actors=len(since),
                startup_s=sum(loads) / len(loads),
                asked=self._asked[stage],
                busy_s=self._busy_s[stage],
                alive_s=sum(max(0.0, end_s - ready_s) for ready_s in since),
                gpu=sum(share * busy for share, busy in gpu) / weight if weight else None,
                report=_mean(list(self._reports[stage].values())),
            )
        return found


def of_runs(out: str | Path, subset: str) -> dict[str, StageActivity]:
    """The model stages of a subset over all runs into a corpus; empty if its events are gone."""
    runs = []
    for folder in run_folders(out, subset):
        activity = Activity()
        for worker, event in EventReader(folder).named():
            activity.add(worker, event)
        runs.append(activity.stages())
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: _joined([run[name] for run in runs if name in run]) for name in names}


def run_folders(out: str | Path, subset: str) -> list[Path]:
    """OUT/events/<run>/ of the subset's runs, in order."""
    return sorted(path for path in (Path(out) / "events").glob("*") if subset in path.name.split("-"))


def _joined(runs: list[StageActivity]) -> StageActivity:
    known = [(run.gpu, run.busy_s) for run in runs if run.gpu is not None]
    weight = sum(busy for _, busy in known)
    return StageActivity(
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
