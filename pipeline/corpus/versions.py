"""The commit log in words, an entry for each record or for each run of commits, for people to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import yaml

from ..io import yaml_text
from . import log
from .log import LogState
from .records import (
    Adopt,
    Checkpoint,
    Claim,
    Commit,
    Config,
    Done,
    Merged,
    Planned,
    Record,
    Sweep,
)

_VALUE = 32
"""Longer values of a configuration are cut; `versions --config N` prints all of it."""

NOT_SET = "not set"


class Entry(NamedTuple):
    """A line of the log.

    Attributes:
        number: of the record; of the last one of a run of commits.
        time_s: when it was written, in seconds since the epoch, by its driver's clock.
        kind: of the record.
        text: what it says.
    """

    number: int
    time_s: float
    kind: str
    text: str


class _Commits:
    """Commits that follow one another in one run, added up."""

    def __init__(self) -> None:
        self.first = self.records = self.units = self.replaced = self.before = self.after = 0
        self.undoes = 0
        self.last: Commit | None = None

    def add(self, record: Commit, state: LogState) -> None:
        old = [state.units[name].unit for name in record.units if name in state.units]
        self.first = self.first or record.number
        self.records += 1
        self.units += len(record.units)
        self.replaced += len(old)
        self.before += sum(unit.kept for unit in old)
        self.after += sum(unit.kept for unit in record.units.values())
        self.undoes = record.undoes
        self.last = record

    def entry(self) -> Entry:
        assert self.last is not None
        text = f"{self.units:,} {_plural('unit', self.units)}"
        if self.replaced:
            text += " replaced" if self.replaced == self.units else f", {self.replaced:,} of them replaced"
        text += f", regions kept {self.before:,} -> {self.after:,}"
        if self.undoes:
            text = f"undo of the rebuild that began with record {self.undoes}: {text}"
        if self.records > 1:
            text += f" (records {self.first} to {self.last.number})"
        return Entry(self.last.number, self.last.time_s, "commit", text)


def describe(records: Iterable[Record], everything: bool = False) -> Iterator[Entry]:
    """The entries of a log, in order.

    Args:
        records: all of them.
        everything: an entry for each record. Otherwise claims, sweeps, checkpoints and the ends of runs that
            held nothing back are left out, and the commits of a run are added up.
    """
    state, commits = LogState(), _Commits()
    for record in records:
        joins = isinstance(record, Commit) and not record.undoes and not commits.undoes
        ends = not joins and not isinstance(record, Checkpoint)
        if commits.last is not None and (everything or ends):
            yield commits.entry()
            commits = _Commits()
        if isinstance(record, Commit):
            commits.add(record, state)
        elif everything or not _is_minor(record):
            yield Entry(record.number, record.time_s, _kind(record), _text(record, state))
        state = state.after(record)
    if commits.last is not None:
        yield commits.entry()


def list_versions(out: str, everything: bool = False) -> Iterator[Entry]:
    """The entries of a corpus's log; see `describe`. There are none if it has no log.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    return describe(log.read_records(out), everything)


def _is_minor(record: Record) -> bool:
    return isinstance(record, Claim | Sweep | Checkpoint) or (
        isinstance(record, Done) and not record.held_back
    )


def _kind(record: Record) -> str:
    return type(record).__name__.lower()


def _text(record: Record, state: LogState) -> str:
    match record:
        case Claim(command=command, pid=pid, host=host):
            return f"{command}, by {pid}@{host}"
        case Planned(subset=subset, images=images, units=units):
            return f"{subset}: {images:,} images in {units:,} {_plural('unit', units)}{_grown(record)}"
        case Config(text=text):
            if state.config is None:
                return "the first configuration"
            return "; ".join(changed_keys(state.config.text, text)) or "the same as before"
        case Adopt(units=units):
            kept = sum(unit.kept for unit in units.values())
            return (
                f"{len(units):,} {_plural('unit', len(units))} committed before there was a log, regions "
                f"kept {kept:,}"
            )
        case Merged():
            return "index, statistics, plots and card"
        case Done(held_back=held):
            return _held(held)
        case Sweep():
            return "temporary files of interrupted runs were removed"
        case _:
            return "a summary of all records so far, where readers start"


def _grown(record: Planned) -> str:
    """What came to a work list or went: "" if nothing did."""
    parts = [
        f"{number:,} {what}"
        for number, what in (
            (record.added, "new"),
            (record.changed, "changed"),
            (record.gone, "gone from the source"),
            (record.removed, "removed on request"),
        )
        if number
    ]
    return f"; of these images {', '.join(parts)}" if parts else ""


def _held(held: dict[str, str]) -> str:
    if not held:
        return "the run ended normally"
    name, why = next(iter(held.items()))
    more = f" (and {len(held) - 1:,} more)" if len(held) > 1 else ""
    return f"held back: {name}{more}: {why}"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


# Configurations.


def changed_keys(before: str, after: str) -> list[str]:
    """Which keys differ between two configurations, each as "key: old -> new"; long values are cut."""
    old, new = _flat(before), _flat(after)
    return [
        f"{key}: {_value(old, key)} -> {_value(new, key)}"
        for key in dict.fromkeys([*new, *old])
        if old.get(key, ...) != new.get(key, ...)
    ]


def _flat(text: str) -> dict[str, Any]:
    try:
        return dict(_leaves("", yaml_text.parse(text)))
    except yaml.YAMLError:
        return {"config.yaml": text}


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is no dictionary, by its keys with dots between them."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), each)
    else:
        yield prefix or "config.yaml", value


def _value(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return NOT_SET
    found = values[key]
    text = found if isinstance(found, str) else json.dumps(found, default=str, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= _VALUE else f"{text[: _VALUE - 1]}…"
