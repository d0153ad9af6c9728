"""Removes what drivers and workers left behind that died: files that no record names.

The order makes it safe next to a driver that was only paused: list first, then write a record, which fails if
somebody else has claimed the corpus since, then delete what the list has and nothing names. Data files have a
name for each attempt, so what is deleted is never written again under the same name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress

from ..io import bucket_checks, files
from ..io.location import has_own_name
from ..io.store import TEMPORARY, store_of
from . import adopt, history, log
from .log import LogState
from .owner import Owner
from .records import Sweep

_SHARED = ("", log.LOG, log.BEAT, "plots")
_OURS = ((*adopt.FOLDERS, "plan"), {"shards": "tar", "ledger": "parquet", "manifests": "json"})


def sweep(owner: Owner, keep_replaced_s: float = float("inf")) -> int:
    """Remove temporary files and the files of units that are not committed; returns how many.

    Only names of our own form are touched, in our own folders of a corpus that is marked as one.

    Args:
        owner: of the corpus; none of its workers may be at work.
        keep_replaced_s: for how long files that a record replaced are kept.

    Raises:
        Fenced: another driver has taken over; nothing was deleted.
        OSError: the folder cannot be written.
    """
    store = store_of(owner.out)
    if not store.moves:
        return _sweep_bucket(owner, keep_replaced_s)
    for subset in [name for name, is_ours in _subsets(owner) if is_ours]:
        for folder in _folders_of(owner.out, subset):
            # Evidence or a moved file that a power cut could still take away must not be built upon.
            store.flush(f"{owner.out}/{subset}/{folder}")
    found = sorted(_leftovers(owner))
    if found:
        owner.append(Sweep())
        for path in found:
            store.delete(f"{owner.out}/{path}")
        for folder in sorted({path.rpartition("/")[0] for path in found}):
            store.flush(f"{owner.out}/{folder}")
    for path in _paths(owner.out, log.BEAT):  # of owners before; one that wakes up writes its own again
        if path != f"{log.BEAT}/{owner.state.epoch:06}":
            store_of(owner.out).delete(f"{owner.out}/{path}")
    _forget_replaced(owner, keep_replaced_s)
    return len(found)


def _sweep_bucket(owner: Owner, keep_s: float) -> int:
    """Remove attempts that no record names, and what was replaced more than `keep_s` ago.

    What was a part of the corpus at any moment since then stays, since somebody may be reading it.
    """
    store, listed = store_of(owner.out), files.list_names(owner.out)
    bucket_checks.delete_of_the_dead(owner.out, listed)
    names = {*listed, *log.subsets_of(owner.state)}  # a listing may be late
    names -= {*_SHARED, "events", adopt.MARKER}
    subsets = {name for name in names if not (name.startswith(TEMPORARY) or has_own_name(name))}
    folders = ["", "plots", *(f"{subset}/{folder}" for subset in sorted(subsets) for folder in _OURS[0])]
    found = {path for folder in folders for path in _paths(owner.out, folder) if has_own_name(path)}
    found -= _named(owner.state)
    if found:
        found -= _named_since(owner, keep_s)
    if found:
        owner.append(Sweep())
        for path in sorted(found):
            store.delete(f"{owner.out}/{path}")
    for path in _paths(owner.out, log.BEAT):
        if path != f"{log.BEAT}/{owner.state.epoch:06}":
            store.delete(f"{owner.out}/{path}")
    return len(found)


def _named(state: LogState) -> set[str]:
    """The names of the files that a state has."""
    units = {file.place for found in state.units.values() for file in found.unit.files()}
    return units | {file.place for file in state.files.values()}


def _named_since(owner: Owner, keep_s: float) -> set[str]:
    """The names of the files that were a part of the corpus at any moment of the last `keep_s`."""
    number, oldest_s, names = owner.state.number, time.time() - keep_s, set[str]()
    while number > 0:
        first = max(0, number - log.CHECKPOINT_EVERY)
        records = log.read_many(owner.out, first + 1, number)
        for record in reversed(records):
            if record.time_s < oldest_s:
                return names | _named(history.state_at(owner.out, record.number))
            names |= {file.place for file in log.files_of(record)}
        number = first
    return names


def is_swept(out: str) -> bool:
    """Whether no killed merge or driver has left a temporary file next to the subsets. Writes nothing.

    In a bucket there are none but those of trials (`bucket_checks`), which may be another process's.
    """
    return not store_of(out).moves or not any(_temporary(out, folder) for folder in _SHARED)


def _temporary(out: str, folder: str) -> list[str]:
    return [path for path in _paths(out, folder) if path.rpartition("/")[2].startswith(TEMPORARY)]


def _leftovers(owner: Owner) -> Iterator[str]:
    named = {file.path for found in owner.state.units.values() for file in found.unit.files()}
    for folder in _SHARED:
        yield from _temporary(owner.out, folder)
    endings = _OURS[1]
    for subset, is_ours in _subsets(owner):
        for folder in _folders_of(owner.out, subset):
            ending = endings.get(folder, "$")
            form = re.compile(rf"{re.escape(subset)}-\d{{6,}}\.{ending}")
            unfinished = re.compile(rf"{re.escape(TEMPORARY + subset)}-\d{{6,}}\.{ending}-[0-9a-f]+")
            for path in _paths(owner.out, f"{subset}/{folder}"):
                name = path.rpartition("/")[2]
                if unfinished.fullmatch(name) or (
                    is_ours and (name.startswith(TEMPORARY) or (form.fullmatch(name) and path not in named))
                ):
                    yield path


def _subsets(owner: Owner) -> Iterator[tuple[str, bool]]:
    """Folders that may be subsets, and whether they are known to be some of this corpus."""
    known = {name.partition("/")[0] for name in owner.state.units}
    for name in files.list_names(owner.out):
        if not name.startswith(".") and name not in _SHARED:
            yield name, name in known or adopt.is_planned(owner.out, name)


def _folders_of(out: str, subset: str) -> list[str]:
    """Folders of a subset, below its own, in which we write."""
    stages = [f"evidence/{name}" for name in files.list_names(f"{out}/{subset}/evidence")]
    return [*_OURS[0], *stages]


def _paths(out: str, folder: str) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    return [f"{prefix}{name}" for name in files.list_names(f"{out}/{folder}")]


def _forget_replaced(owner: Owner, keep_s: float) -> None:
    """Delete the replaced files of records that are old by now."""
    for name in files.list_names(f"{owner.out}/{log.REPLACED}"):
        if not (name.isascii() and name.isdigit()):
            continue
        with suppress(FileNotFoundError):  # a folder that no record made
            if time.time() - log.read_record(owner.out, int(name)).time_s > keep_s:
                store_of(owner.out).delete_folder(f"{owner.out}/{log.REPLACED}/{name}")
