"""Where a corpus stands: what is committed, who writes to it, how fast, and what is lacking. Reads only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import msgspec

from ...schemas.errors import ConfigError
from ...schemas.records import Blob
from ..io import files
from ..io.location import is_bucket
from ..io.store import store_of
from . import history, log, processes
from .log import LogState
from .owner import beat_path
from .records import Claim, Commit, Done, LogUnit, Record
from .work_list_summary import WorkList

ALIVE, SILENT, ENDED, RELEASED = "alive", "not responding", "ended unexpectedly", "released"

_RECORDS_AT_ONCE = 32
_CHECK_EVERY_S = 30.0
"""Looking after each committed file takes a while on a shared file system, so it is not done each time."""


class SubsetStatus(NamedTuple):
    """How much of a subset is committed.

    Attributes:
        subset: its name.
        units, images: how many are committed.
        planned_units, planned_images: how many there are in all; None if the work list cannot be read.
        regions: declared in the committed units.
        kept: of those.
        older: committed units of another recipe than the newest one, which the next build does again.
        missing: committed units of which a file is gone or has another size.
        gone: number of images that the sources do not have any more; they stay in the corpus.
        gone_examples: keys of some of them.
    """

    subset: str
    units: int
    images: int
    planned_units: int | None
    planned_images: int | None
    regions: int
    kept: int
    older: int
    missing: list[str]
    gone: int = 0
    gone_examples: list[str] = []


class OwnerStatus(NamedTuple):
    """Who writes to the corpus, or did last.

    Attributes:
        claim: of the newest owner.
        state: "alive", "no sign of life" (for a lease), "ended without a word" or "released".
        beat_age_s: seconds since its last sign of life, by the store's clock and this machine's; None if it
            left none.
    """

    claim: Claim
    state: str
    beat_age_s: float | None


class RunStatus(NamedTuple):
    """The current run that commits units, or the last one.

    Attributes:
        command: of its claim.
        units, regions: committed by it.
        units_per_min, regions_per_min: of it; None until there are two moments to compare.
        left_s: estimate of the seconds until all is committed; None if it has ended or no rate is known.
    """

    command: str
    units: int
    regions: int
    units_per_min: float | None
    regions_per_min: float | None
    left_s: float | None


class Status(NamedTuple):
    """Where a corpus stands.

    Attributes:
        out: the corpus.
        number: of the newest record of its log; 0 if it has none yet.
        subsets: in order.
        owner: None if there is no log.
        run: None if no run has committed anything.
        held_back: units that the last build did not commit and nobody has since, by "subset/unit", and why.
    """

    out: str
    number: int
    subsets: list[SubsetStatus]
    owner: OwnerStatus | None
    run: RunStatus | None
    held_back: dict[str, str]


class Watcher:
    """Reads the status of a corpus again and again; what it knows of the log is not read twice.

    Args:
        out: the corpus.
    """

    def __init__(self, out: str):
        self.out = out
        self._state = LogState()
        self._records: dict[int, Record] = {}
        self._missing: dict[str, list[str]] = {}
        self._check_at_s = 0.0

    def read(self) -> Status:
        """The status now.

        Raises:
            ConfigError: there is no corpus.
            IntegrityError: the log, or a manifest of a corpus without a log, is damaged.
        """
        if log.exists(self.out):
            self._state = state = log.read_state(self.out, self._state)
            units = {name: found.unit for name, found in state.units.items()}
        else:
            state, units = LogState(), log.read_units(self.out)
        subsets = sorted({*(name.partition("/")[0] for name in units), *self._planned()})
        if not subsets and not state.number:
            raise ConfigError(f"{self.out}: no corpus here; give the `out` of a build")
        self._look_after(units)
        found = [self._subset(state, name, units) for name in subsets]
        owner = _owner_of(self.out, state)
        return Status(self.out, state.number, found, owner, self._run(found, owner), self._held_back())

    def _planned(self) -> Iterator[str]:
        if is_bucket(self.out):
            yield from log.subsets_of(self._state)
            return
        for name in files.list_names(self.out):
            if not name.startswith(".") and "plan.json" in files.list_names(f"{self.out}/{name}/plan"):
                yield name

    def _look_after(self, units: dict[str, LogUnit]) -> None:
        """Find committed units whose files are missing, now and then."""
        start = time.monotonic()
        if start < self._check_at_s:
            return
        self._missing = {}
        listed = self._list_files(units) if is_bucket(self.out) else frozenset[str]()
        for name, unit in sorted(units.items()):
            if all(file.place in listed for file in unit.files()):
                continue
            if not log.is_whole(self.out, unit):
                self._missing.setdefault(name.partition("/")[0], []).append(name)
        now = time.monotonic()
        self._check_at_s = now + max(_CHECK_EVERY_S, 20 * (now - start))

    def _list_files(self, units: dict[str, LogUnit]) -> frozenset[str]:
        """The files that lie in a bucket, where they are never cut short; a late listing may lack some."""
        folders = {file.place.rpartition("/")[0] for unit in units.values() for file in unit.files()}
        return frozenset(
            f"{folder}/{name}" for folder in folders for name in files.list_names(f"{self.out}/{folder}")
        )

    def _subset(self, state: LogState, subset: str, units: dict[str, LogUnit]) -> SubsetStatus:
        own = {name: unit for name, unit in units.items() if name.startswith(f"{subset}/")}
        plan = _read_plan(self.out, subset)
        newest = max(own, key=lambda name: state.units[name].since if state.units else 0, default=None)
        recipe = own[newest].recipe if newest else ""
        return SubsetStatus(
            subset,
            len(own),
            sum(_num_images(plan, name) for name in own) if plan else 0,
            plan and plan.num_units,
            plan and plan.num_images,
            sum(unit.regions for unit in own.values()),
            sum(unit.kept for unit in own.values()),
            sum(unit.recipe != recipe for unit in own.values()),
            self._missing.get(subset, []),
            plan.gone if plan else 0,
            plan.gone_examples if plan else [],
        )

    def _run(self, subsets: list[SubsetStatus], owner: OwnerStatus | None) -> RunStatus | None:
        commits: list[Commit] = []
        for record in self._backwards():
            if isinstance(record, Commit) and not record.undoes:
                commits.append(record)
            elif isinstance(record, Claim) and commits:
                is_running = (
                    owner is not None and owner.claim.number == record.number and owner.state == ALIVE
                )
                pending = sum(max(0, (each.planned_units or 0) - each.units + each.older) for each in subsets)
                return _rate(record, commits[::-1], pending if is_running else None)
        return None

    def _held_back(self) -> dict[str, str]:
        done: Done | None = None
        for record in self._backwards():
            if isinstance(record, Done):
                done = record
            elif isinstance(record, Claim) and record.command == "build" and done is not None:
                units, number = self._state.units, done.number
                return {
                    name: why
                    for name, why in done.held_back.items()
                    if name not in units or units[name].since < number
                }
            elif isinstance(record, Claim):
                done = None
        return {}

    def _backwards(self) -> Iterator[Record]:
        """The records from the newest one; what was read is kept."""
        for number in range(self._state.number, 0, -1):
            if number not in self._records:
                first = max(1, number - _RECORDS_AT_ONCE + 1) if is_bucket(self.out) else number
                for record in log.read_many(self.out, first, number):
                    self._records[record.number] = record
            yield self._records[number]


def _rate(claim: Claim, commits: list[Commit], pending: int | None) -> RunStatus:
    """What a run has committed, and how fast by the times in the log.

    The rate is that after the first commit, since models are loaded before it.
    """
    units, regions = _committed(commits)
    since, counted = (commits[0], commits[1:]) if len(commits) > 1 else (claim, commits)
    minutes = (commits[-1].time_s - since.time_s) / 60
    if minutes <= 0:
        return RunStatus(claim.command, units, regions, None, None, None)
    rates = [number / minutes for number in _committed(counted)]
    left_s = 60 * pending / rates[0] if pending and rates[0] else None
    return RunStatus(claim.command, units, regions, rates[0], rates[1], left_s)


def _committed(commits: list[Commit]) -> tuple[int, int]:
    units = [unit for commit in commits for unit in commit.units.values()]
    return len(units), sum(unit.regions for unit in units)


def _owner_of(out: str, state: LogState) -> OwnerStatus | None:
    if state.claim is None:
        return None
    age_s = None
    with suppress(OSError):
        path = beat_path(out, state.epoch)
        age_s = max(0.0, time.time() - store_of(out).modified_s(path))
    if state.released:
        return OwnerStatus(state.claim, RELEASED, age_s)
    if processes.is_dead(state.claim):
        return OwnerStatus(state.claim, ENDED, age_s)
    is_alive = age_s is not None and age_s < history.lease_of(state)
    return OwnerStatus(state.claim, ALIVE if is_alive else SILENT, age_s)


def _read_plan(out: str, subset: str) -> WorkList | None:
    with suppress(OSError, msgspec.MsgspecError, UnicodeError):
        return msgspec.json.decode(
            files.read(Blob(log.place_of(out, f"{subset}/plan/plan.json"))), type=WorkList
        )
    return None


def _num_images(plan: WorkList, unit: str) -> int:
    """How many images a unit of the work list has."""
    index = unit.rpartition("-")[2]
    return plan.num_images_of(int(index)) if index.isdigit() and int(index) < plan.num_units else 0
