"""Looks back in the commit log: what was committed after any record, where its files lie now, what changed.

Files that a record replaced are kept below `.replaced/<its number>/` for `failures.keep_replaced_days`. An
older version is its configuration, which the log has, built into another folder: evidence is paid for once.
"""

from __future__ import annotations

import hashlib
import heapq
import importlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import yaml

from ...schemas.errors import ConfigError
from ..io import files, yaml_text
from ..io.store import store_of
from . import log, reader
from .log import LogState, UnitState
from .owner import LEASE_S
from .records import Checkpoint, Commit, LogFile, LogUnit, Record

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = ["key", "region", "kept", "drop_stage", "drop_reason", "drop_detail", "caption"]


def read_log(out: str) -> list[Record]:
    """All records of a corpus's log.

    Raises:
        ConfigError: it has none.
        IntegrityError: a record is missing or damaged.
    """
    records = log.read_records(out)
    if not records:
        if not files.is_folder(out):
            raise ConfigError(f"{out}: no such folder; give the `out` of a build")
        hint = "a corpus of an early release gets its log from its next build"
        raise ConfigError(f"{out}: no commit log here; give the `out` of a build ({hint})")
    return records


def state_at(out: str, number: int) -> LogState:
    """What the log said after one of its records.

    Raises:
        ConfigError: it has no record of that number.
        IntegrityError: a record is missing or damaged.
    """
    newest = log.read_state(out).number or len(read_log(out))
    if not 0 <= number <= newest:
        raise ConfigError(
            f"{out}: no record {number} in the commit log; its records are 1 to {newest}; `paracaption "
            f"versions {out}` lists them"
        )
    state, start = LogState(), number - number % log.CHECKPOINT_EVERY
    if start:
        checkpoint = log.read_existing(out, start)
        if isinstance(checkpoint, Checkpoint):
            state = log.state_of(checkpoint, out)
    for each in range(state.number + 1, number + 1):
        state = state.after(log.read_existing(out, each))
    return state


def config_at(out: str, number: int) -> str:
    """The text of the configuration that was in force after a record.

    Raises:
        ConfigError: there is no such record, or no configuration in the log by then.
        IntegrityError: a record is missing or damaged.
    """
    config = state_at(out, number).config
    if config is None:
        raise ConfigError(
            f"{out}: record {number} of the commit log comes before the first configuration; give a later one"
        )
    return config.text


def lease_of(state: LogState) -> float:
    """`failures.lease_s` of the configuration in force; the default if the log does not have it."""
    try:
        return float(yaml_text.parse(state.config.text)["failures"]["lease_s"]) if state.config else LEASE_S
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return LEASE_S


class Places:
    """Where the files of a version lie now that it may have been replaced.

    Args:
        out: the corpus.
        number: the version is what is committed after this record.

    Raises:
        ConfigError: there is no such record.
        IntegrityError: a record is missing or damaged.
    """

    def __init__(self, out: str, number: int):
        self.out = out
        self.then = state = state_at(out, number)
        self._replaced_by: dict[tuple[str, str], list[int]] = {}
        for record in log.read_records(out, number):
            if isinstance(record, Commit) and record.replaced:
                for file in _files_of(state, record):
                    self._replaced_by.setdefault((file.path, file.sha256), []).append(record.number)
            state = state.after(record)
        self.now = state
        newest = state.unmoved
        self._moving = newest.number if isinstance(newest, Commit) else 0
        self._store = store_of(out)

    def find(self, unit: str, file: LogFile) -> str | None:
        """Where a file of that version lies, below the corpus; None if it is not kept any more.

        Args:
            unit: "subset/unit" that the file belongs to.
            file: of that version.
        """
        if file.name:  # for good
            return file.name if self._has(file.name, file) else None
        present = self._present(unit, file.path)
        if present is not None and present.sha256 == file.sha256:
            for path in (present.temporary, present.path):
                if path and self._has(path, file):
                    return path
        for number in reversed(self._replaced_by.get((file.path, file.sha256), ())):
            kept = f"{log.REPLACED}/{number}/{file.path}"
            if self._has(kept, file):
                return kept
            is_waiting = present is None or (present.temporary and self._has(present.temporary, present))
            if number == self._moving and is_waiting and self._has(file.path, file):
                return file.path
        return None

    def replaced_by(self, file: LogFile) -> int:
        """The newest record that replaced a file of that version; 0 if none did."""
        return max(self._replaced_by.get((file.path, file.sha256), (0,)))

    def _present(self, unit: str, path: str) -> LogFile | None:
        found = self.now.units.get(unit)
        return found and next((file for file in found.unit.files() if file.path == path), None)

    def _has(self, path: str, file: LogFile) -> bool:
        return self._store.size(f"{self.out}/{path}") == file.bytes


def _files_of(state: LogState, record: Commit) -> Iterator[LogFile]:
    """The files that a record replaces, as the state before it has them."""
    paths = set(record.replaced)
    for name in record.units:
        if name in state.units:
            yield from (file for file in state.units[name].unit.files() if file.path in paths)


def unit_files_at(out: str, number: int) -> Iterator[tuple[str, LogUnit, list[str | None]]]:
    """Every unit that was committed after a record, and where its files lie now.

    Yields:
        "subset/unit"; what the log says of it; the place below the corpus of each of `LogUnit.files`, None
        for one that is not kept any more.

    Raises:
        ConfigError: there is no such record.
        IntegrityError: a record is missing or damaged.
    """
    places = Places(out, number)
    for name, found in sorted(places.then.units.items()):
        yield name, found.unit, [places.find(name, file) for file in found.unit.files()]


# What changed between two versions.


class RegionChange(NamedTuple):
    """A region that one of two versions keeps and the other one drops.

    Attributes:
        subset, key, region: which one.
        caption: in the version that keeps it.
        reason: "stage/reason" of its drop in the other one; "not there" if that does not have the region.
        detail: of that drop.
    """

    subset: str
    key: str
    region: int
    caption: str
    reason: str
    detail: str


class SubsetDiff(msgspec.Struct):
    """What changed in a subset between two versions.

    Attributes:
        kept: regions kept in all units, in the earlier version and in the later one.
        changed, unchanged: number of units that both versions have, with other content or the same.
        added, removed: number of units that only the later or only the earlier version has.
        added_kept, removed_kept: regions that those keep; they are in `kept`, and nowhere below.
        lost: regions kept before and not after, by the reason of the drop after.
        gained: regions kept after and not before, by the reason of the drop before.
        recaptioned: regions that both keep with different captions.
        gone: changed units that could not be compared, because replaced files are not kept any more.
    """

    kept: tuple[int, int] = (0, 0)
    changed: int = 0
    unchanged: int = 0
    added: int = 0
    removed: int = 0
    added_kept: int = 0
    removed_kept: int = 0
    lost: Counter[str] = msgspec.field(default_factory=Counter)
    gained: Counter[str] = msgspec.field(default_factory=Counter)
    recaptioned: int = 0
    gone: int = 0


class Diff(msgspec.Struct):
    """What changed between two versions of a corpus.

    Attributes:
        before, after: numbers of the records that end them.
        subsets: by name.
        lost, gained: examples, spread over the corpus; the same ones each time.
        gone: the versions, as numbers of records, of which replaced files are not kept any more.
        held_out: the share of images that is held out of training, in the earlier version and in the later.
    """

    before: int
    after: int
    subsets: dict[str, SubsetDiff]
    lost: list[RegionChange]
    gained: list[RegionChange]
    gone: list[int]
    held_out: tuple[float, float] = (0.0, 0.0)


def diff(out: str, before: int, after: int, limit: int = 20) -> Diff:
    """The regions gained and lost between what was committed after one record and after another.

    Goes from unit to unit, and reads only ledgers that differ, so memory does not grow with the corpus.

    Args:
        out: the corpus.
        before: number of a record.
        after: number of another one; it may also be the earlier one.
        limit: number of examples of each kind.

    Raises:
        ConfigError: there is no such record.
        IntegrityError: a record or a ledger is damaged.
    """
    places = [Places(out, before), Places(out, after)]
    then = [each.then.units for each in places]
    subsets: dict[str, SubsetDiff] = {}
    examples = {"lost": _Examples(limit), "gained": _Examples(limit)}
    gone: set[int] = set()
    for name in sorted({*then[0], *then[1]}):
        subset = name.partition("/")[0]
        found = subsets.setdefault(subset, SubsetDiff())
        old, new = (units.get(name) for units in then)
        if not _count(found, old, new):
            continue
        assert old is not None and new is not None
        ledgers = [place.find(name, each.unit.ledger) for place, each in zip(places, (old, new), strict=True)]
        missing = [n for n, ledger in zip((before, after), ledgers, strict=True) if ledger is None]
        if missing:
            found.gone += 1
            gone.update(missing)
            continue
        tables = [reader.read_ledger(f"{out}/{ledger}", _COLUMNS) for ledger in ledgers]
        _compare(subset, found, tables, examples)
    lost, gained = examples["lost"].sorted(), examples["gained"].sorted()
    held_out = (_held_out_share(places[0].then), _held_out_share(places[1].then))
    return Diff(before, after, subsets, lost, gained, sorted(gone), held_out)


def _held_out_share(state: LogState) -> float:
    try:
        return float(yaml_text.parse(state.config.text).get("held_out_share", 0)) if state.config else 0.0
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):  # of a release that wrote it otherwise
        return 0.0


def _count(found: SubsetDiff, old: UnitState | None, new: UnitState | None) -> bool:
    """Count a unit; returns whether its ledgers have to be compared."""
    kept = [each.unit.kept if each else 0 for each in (old, new)]
    found.kept = (found.kept[0] + kept[0], found.kept[1] + kept[1])
    if old is None:
        found.added, found.added_kept = found.added + 1, found.added_kept + kept[1]
    elif new is None:
        found.removed, found.removed_kept = found.removed + 1, found.removed_kept + kept[0]
    elif old.unit.ledger.sha256 == new.unit.ledger.sha256:
        found.unchanged += 1
    else:
        found.changed += 1
        return True
    return False


def _compare(subset: str, found: SubsetDiff, tables: list[pa.Table], examples: dict[str, _Examples]) -> None:
    pc: Any = importlib.import_module("pyarrow.compute")  # its functions are made when it is imported
    regions = [table.filter(table["region"].is_valid()) for table in tables]
    joined = regions[0].join(
        regions[1], ["key", "region"], join_type="full outer", left_suffix=".0", right_suffix=".1"
    )
    kept = [pc.fill_null(joined[f"kept.{side}"], False) for side in (0, 1)]
    same = pc.equal(joined["caption.0"], joined["caption.1"])
    both = pc.and_(*kept)
    found.recaptioned += joined.filter(pc.and_(both, pc.invert(pc.fill_null(same, False)))).num_rows
    for kind, side in (("lost", 0), ("gained", 1)):
        rows: pa.Table = joined.filter(pc.and_(kept[side], pc.invert(kept[1 - side])))
        for row in rows.to_pylist():
            change = _change(subset, row, side)
            getattr(found, kind)[change.reason] += 1
            examples[kind].add(change)


def _change(subset: str, row: dict[str, Any], side: int) -> RegionChange:
    """The change of a joined row that is kept on a side."""
    other = 1 - side
    stage, reason = row[f"drop_stage.{other}"], row[f"drop_reason.{other}"]
    return RegionChange(
        subset,
        row["key"],
        row["region"],
        row[f"caption.{side}"] or "",
        f"{stage}/{reason}" if reason else "not there",
        row[f"drop_detail.{other}"] or "",
    )


class _Examples:
    """The changes with the smallest hashes: spread over the corpus, and the same ones each time."""

    def __init__(self, limit: int):
        self._limit = limit
        self._heap: list[tuple[int, RegionChange]] = []

    def add(self, change: RegionChange) -> None:
        name = f"{change.subset}/{change.key}/{change.region}".encode()
        item = (-int.from_bytes(hashlib.sha256(name).digest()[:8], "big"), change)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, item)
        elif self._heap:
            heapq.heappushpop(self._heap, item)

    def sorted(self) -> list[RegionChange]:
        return sorted((change for _, change in self._heap), key=lambda each: (each.reason, *each[:3]))


def describe_gone(out: str, found: Diff) -> str:
    """What to do about versions whose replaced files are gone, in one line; "" if there is none."""
    if not found.gone:
        return ""
    units = sum(each.gone for each in found.subsets.values())
    numbers = " and ".join(map(str, found.gone))
    return (
        f"{units:,} changed unit{'s'[: units > 1]} cannot be compared: the files of record {numbers} are "
        "deleted after failures.keep_replaced_days; to see them, build that version into another folder with "
        f"the configuration that `paracaption versions {out} --config {found.gone[0]}` prints"
    )
