"""Checks a corpus's commit log, and the files that it names besides those of units. Called by `verify`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ...schemas.errors import IntegrityError
from ...schemas.records import Blob
from ..io import files
from . import adopt, log, reader
from .log import LogState
from .problems import Problem, compare_file, guarded
from .records import Checkpoint, Commit, Config, LogFile, LogUnit

_RESTORE = "restore it from a backup: without it, nobody knows which units are committed"


class Vouched(NamedTuple):
    """What a corpus says is in it, before any of these files is looked at.

    Attributes:
        units: what the log says of each committed unit, by subset and unit; None where only the manifest
            says that it is committed.
        files: what the log says of the other files, by path.
        config: the newest record of a configuration.
        moves: temporary names, by path, of files that have not been moved to their places yet.
        number: of the newest record of the log; 0 if the corpus is of a release that wrote none.
        is_whole: False if a record cannot be read, so that units may be committed that are not in `units`.
        former: names of files in a bucket that were a part of the corpus, and stay there for some time.
    """

    units: dict[str, dict[str, LogUnit | None]]
    files: dict[str, LogFile] = {}
    config: Config | None = None
    moves: dict[str, str] = {}
    number: int = 0
    is_whole: bool = True
    former: frozenset[str] = frozenset()


def read_vouched(out: str) -> tuple[Vouched, list[Problem]]:
    """What a corpus says is in it, and what is wrong with how it says so.

    Args:
        out: the corpus.
    """
    if not log.exists(out):
        return Vouched(_units_with_manifests(out)), []
    state, problems, is_whole, former = _read_log(out)
    units: dict[str, dict[str, LogUnit | None]] = {}
    for name in sorted(state.units):
        subset, _, unit = name.partition("/")
        units.setdefault(subset, {})[unit] = state.units[name].unit
    moves: dict[str, str] = {}
    if state.unmoved is not None:
        with guarded(problems, log.LOG, "run `paracaption verify CORPUS` again"):
            moves = _unmoved(out, state)
        if moves:
            path = f"{log.LOG}/{state.unmoved.number:012}.json"
            what = f"{len(moves)} of its files still have temporary names ({min(moves.values())}): the run "
            problems.append(
                Problem(
                    path,
                    "",
                    f"{what}was interrupted or is still writing; the next run renames them",
                    note=True,
                )
            )
    vouched = Vouched(units, state.files, state.config, moves, state.number, is_whole, former)
    return vouched, problems + _check_marker(out)


def _units_with_manifests(out: str) -> dict[str, dict[str, LogUnit | None]]:
    return {
        subset: {unit.name: None for unit in reader.list_units(f"{out}/{subset}")}
        for subset in reader.Corpus(out).subsets
    }


def _read_log(out: str) -> tuple[LogState, list[Problem], bool, frozenset[str]]:
    """What the records that can be read say together, what is wrong with others, and whether it is all.

    Also the names for good of all files that they name.
    """
    problems: list[Problem] = []
    named: set[str] = set()
    state, checked, last = LogState(), True, log.newest_number(out)
    kept = {int(name) for name in files.list_names(f"{out}/{log.REPLACED}") if name.isdigit()}
    while state.number < last:
        number = state.number + 1
        path = log.record_path("", number)[1:]
        with guarded(problems, path, _RESTORE):
            try:
                record = log.read_record(out, number)
            except FileNotFoundError:
                problems.append(Problem(path, "", f"missing, although later records exist; {_RESTORE}"))
            except IntegrityError as error:
                problems.append(Problem(path, "", str(error).removeprefix(f"{out}/{path}: ")))
            else:
                named |= {file.name for file in log.files_of(record) if file.name}
                if isinstance(record, Checkpoint) and checked and not _says(record, state):
                    what = "contradicts the records before it"
                    problems.append(Problem(path, "", f"{what}; {_RESTORE}"))
                if isinstance(record, Commit) and number in kept:
                    problems += _check_replaced(out, state, record)
                if isinstance(record, Checkpoint) and not checked:
                    state, checked = log.state_of(record, out), True
                else:
                    state = state.after(record)
        if state.number < number:
            checked = False  # the next checkpoint knows what this record said
        state = state._replace(number=number)
    return state, problems, checked, frozenset(named)


def _says(record: Checkpoint, state: LogState) -> bool:
    own = {name: getattr(record, name) for name in ("number", "epoch", "nonce", "time_s")}
    return msgspec.structs.replace(state.checkpoint(), **own) == record


def _check_replaced(out: str, before: LogState, record: Commit) -> list[Problem]:
    """Notes on files that a record replaced and that are kept, but are not what they were."""
    folder = f"{log.REPLACED}/{record.number}"
    was = {
        file.path: file
        for name in record.units
        if (unit := before.units.get(name))
        for file in unit.unit.files()
    }
    problems: list[Problem] = []
    for path in sorted(was.keys() & set(record.replaced)):
        place, name = f"{folder}/{path}".rsplit("/", 1)
        if name in files.list_names(f"{out}/{place}"):
            fix = f"`undo` cannot restore this file; if you will not undo that record, delete {folder}"
            expected = (was[path].bytes, was[path].sha256)
            found = compare_file(out, f"{place}/{name}", expected, "the log", True, fix)
            problems += [problem._replace(note=True) for problem in found]
    return problems


def _unmoved(out: str, state: LogState) -> dict[str, str]:
    record = state.unmoved
    if record is None:
        return {}
    units = record.units.values() if isinstance(record, Commit) else ()
    named = [file for unit in units for file in unit.files()]
    named += [] if isinstance(record, Commit) else record.files
    there = {
        folder + name
        for folder in {file.temporary[: file.temporary.rfind("/") + 1] for file in named if file.temporary}
        for name in files.list_names(f"{out}/{folder}".rstrip("/"))
    }
    return {file.path: file.temporary for file in named if file.temporary in there}


def _check_marker(out: str) -> list[Problem]:
    problems: list[Problem] = []
    fix = "delete it and run `paracaption merge CONFIG`, which writes it"
    with guarded(problems, adopt.MARKER, fix):
        try:
            if files.read(Blob(f"{out}/{adopt.MARKER}")) != adopt.MARKER_TEXT:
                problems.append(Problem(adopt.MARKER, "", f"is not what a build writes; {fix}"))
        except FileNotFoundError:
            what = "missing; run `paracaption merge CONFIG`, which writes it"
            problems.append(Problem(adopt.MARKER, "", what))
    return problems


def check_named_files(out: str, vouched: Vouched, deep: bool) -> list[Problem]:
    """The files that the log names besides those of units: there, and as they were written."""
    problems: list[Problem] = []
    for path, file in sorted(vouched.files.items()):
        at, fix = vouched.moves.get(path, file.place), _fix(path)
        if path == reader.CONFIG and vouched.config is not None:
            expected = vouched.config.text.encode()
            if not compare_file(out, at, (len(expected), ""), "the log", False, fix):
                with guarded(problems, at, fix):
                    if files.read(Blob(f"{out}/{at}")) == expected:
                        continue
                    what = f"is not the configuration of record {vouched.config.number} of the log"
                    problems.append(Problem(at, "", f"{what}; {fix}"))
                    continue
        problems += compare_file(out, at, (file.bytes, file.sha256), "the log", deep, fix)
    return problems


def _fix(path: str) -> str:
    if path == reader.CONFIG:
        return "run `paracaption build CONFIG` again, which writes it"
    if "/plan/" in path:
        return "delete it and run `paracaption build CONFIG` again, which writes it"
    return "run `paracaption merge CONFIG`, which writes it"


def check_unchanged(out: str, vouched: Vouched) -> list[Problem]:
    """A note if the corpus was written to since `vouched` was read."""
    if not vouched.number or log.newest_number(out) == vouched.number:
        return []
    what = (
        "a build has written here meanwhile, so problems of its units may be wrong: run `paracaption "
        "verify CORPUS` again"
    )
    return [Problem(log.LOG, "", what, note=True)]
