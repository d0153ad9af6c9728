"""Which files of a folder a record moves to their places, and which have not been moved yet.

Why they are moved after their record stands in `log`. In a bucket nothing is moved.
"""

from __future__ import annotations

from typing import NamedTuple

from ..io import files
from ..io.location import is_bucket
from ..io.store import store_of
from .log import LogState
from .records import Commit, Config, LogFile, Merged, Planned


def find_unmoved(out: str, state: LogState) -> dict[str, list[tuple[str, str]]]:
    """Files of the newest commit that still have their temporary names, because its driver died or is at it.

    Returns:
        By "subset/unit": (place, temporary name) of each, below the corpus.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    if isinstance(state.unmoved, Commit) and not is_bucket(out):  # where nothing moves
        folders = {
            file.temporary.rpartition("/")[0]
            for unit in state.unmoved.units.values()
            for file in unit.files()
            if file.temporary
        }
        there = {f"{folder}/{name}" for folder in folders for name in files.list_names(f"{out}/{folder}")}
        for name, unit in state.unmoved.units.items():
            found[name] = [(file.path, file.temporary) for file in unit.files() if file.temporary in there]
    return found


class Moves(NamedTuple):
    """What a record does to names.

    Attributes:
        files: files that get their places.
        replaced: places whose files are kept elsewhere before.
        removed: of these, the ones that nothing takes: a unit that had a shard may have none now.
    """

    files: list[LogFile]
    replaced: set[str]
    removed: list[str]


def moves_of(record: Commit | Planned | Config | Merged) -> Moves:
    if not isinstance(record, Commit):
        return Moves([file for file in record.files if file.temporary], set(), [])
    named = [file for unit in record.units.values() for file in unit.files()]
    removed = set(record.replaced) - {file.path for file in named}
    return Moves([file for file in named if file.temporary], set(record.replaced), sorted(removed))


def is_moved(out: str, state: LogState) -> bool:
    """Whether every file that a record names has its place; if not, the next owner moves it there."""
    if state.unmoved is None:
        return True
    moves = moves_of(state.unmoved)
    names = [*(file.temporary for file in moves.files), *moves.removed]
    return all(store_of(out).size(f"{out}/{name}") is None for name in names)
