"""Takes back the last rebuild, while the files that it replaced are kept.

**The last rebuild** is all that replaced units since the configuration last changed in what decides about
regions: thresholds, models, recipes (not `io`, `failures`, actors, places of sources). Images that changed in
their source begin a rebuild, too, unless one was not complete yet. So runs that were interrupted and resumed,
and a `--retry-failed` after them, are taken back together. Units that the rebuild added stay; those that it
built once more are as before, unless images of them were removed on request since.
An undo counts as a rebuild of its own, so undoing it is a redo.

One record names all units under the places where their former files are kept, from which they are moved back.
A driver that dies in between leaves moves that the next owner makes. Then follow the former configuration and
the merge; an undo that died before these is finished by calling it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import yaml

from ...schemas.errors import ConfigError
from ..io import files, yaml_text
from ..io.location import locate
from ..models.registry import METHODS
from . import history, log, merge, reader, writer
from .log import LogState
from .owner import Owner, own
from .records import Commit, Config, LogFile, LogUnit, Merged, Planned, Record
from .sweep import sweep
from .versions import changed_keys

_HOW_IT_RUNS = {"out", "io", "failures", "audit_images", "held_out_share", "subsets"}


class Rebuild(NamedTuple):
    """What an undo takes back.

    Attributes:
        first: number of the first record that it takes back.
        last: number of the last one.
        before: what was committed before the rebuild.
        units: "subset/unit" of those that get their former version.
        added: number of units that are committed now and were not before; they stay.
        kept: regions kept in `units`, now and before the rebuild.
        is_begun: an undo has taken the units back already and ended before it wrote configuration and index.
        changes: which keys of the configuration change, as "key: now -> then".
    """

    first: int
    last: int
    before: LogState
    units: list[str]
    added: int
    kept: tuple[int, int]
    is_begun: bool
    changes: list[str]


class _Version(NamedTuple):
    """What was written from one change of what decides to the next.

    Attributes:
        before: the state that it began with.
        is_undo: it began with an undo.
        first, last: numbers of its first and last record that replaced units; 0 if none did.
        names: of the units that it replaced.
        is_merged: the index was written since `last`.
    """

    before: LogState
    is_undo: bool = False
    first: int = 0
    last: int = 0
    names: frozenset[str] = frozenset()
    is_merged: bool = False


def find_rebuild(out: str) -> Rebuild:
    """The last rebuild of a corpus; reads the log and nothing else.

    Raises:
        ConfigError: nothing was rebuilt, or there is no log.
        IntegrityError: the log is damaged.
    """
    records = history.read_log(out)
    version, now = _last_version(records)
    is_begun = version is not None and version.is_undo and not version.is_merged
    if is_begun:  # what it takes back
        assert version is not None
        version, _ = _last_version(records[: version.first - 1])
    if version is None:
        raise ConfigError(f"{out}: nothing to undo: no build has replaced earlier results")
    before = version.before
    removed = _removed_since(records, before)
    names = version.names & before.units.keys() - removed
    units = [name for name in sorted(names) if _differs(before, now, name)]
    if not units and not is_begun:
        why = "the last rebuild gave every unit the same files as before"
        if any(_differs(before, now, name) for name in version.names & before.units.keys() & removed):
            why = "images were removed on request from what the last rebuild changed, and do not come back"
        raise ConfigError(f"{out}: nothing to undo: {why}")
    return Rebuild(
        first=version.first,
        last=version.last,
        before=before,
        units=units,
        added=len(now.units.keys() - before.units.keys()),
        kept=(_kept(now, units), _kept(before, units)),
        is_begun=is_begun,
        changes=_changes(now, before),
    )


def _removed_since(records: Sequence[Record], before: LogState) -> set[str]:
    """The units that have images which were removed on request since: what they were does not come back."""
    return {
        name
        for record in records
        if isinstance(record, Planned)
        for unit in record.removed_from
        if (name := f"{record.subset}/{unit}") in before.units and record.number > before.units[name].since
    }


def _last_version(records: Sequence[Record]) -> tuple[_Version | None, LogState]:
    """The last version that replaced units, and the state after all records."""
    state = LogState()
    current, found = _Version(state), None
    takes_config = False  # the configuration that an undo writes belongs to it
    for record in records:
        match record:
            case Config():
                if not takes_config and _decides_otherwise(state.config, record):
                    current = _Version(state)
                takes_config = False
            case Planned() if record.changed and (not current.first or current.is_merged):
                current = _Version(state)
            case Commit():
                if record.undoes:
                    current, takes_config = _Version(state, is_undo=True), True
                if replaced := record.units.keys() & state.units.keys():
                    if not (current.first or current.is_undo or current.before.units):  # nothing was before
                        current = _Version(state)
                    current = found = current._replace(
                        first=current.first or record.number,
                        last=record.number,
                        names=current.names | replaced,
                        is_undo=current.is_undo and bool(record.undoes),
                        is_merged=False,
                    )
            case Merged() if found is not None:
                is_same = found is current
                found = found._replace(is_merged=True)
                current = found if is_same else current
        state = state.after(record)
    return found, state


def _decides_otherwise(before: Config | None, after: Config) -> bool:
    if before is None:
        return False
    try:
        (was, recipes_before), (now, recipes_after) = _decisions(before.text), _decisions(after.text)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):  # of a release that wrote it otherwise
        return before.text != after.text
    common = recipes_before.keys() & recipes_after.keys()
    return was != now or any(recipes_before[name] != recipes_after[name] for name in common)


def _decisions(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a configuration decides which regions are kept, with which captions; and subsets' recipes."""
    values = yaml_text.parse(text)
    found = {key: value for key, value in values.items() if key not in _HOW_IT_RUNS}
    subsets = values.get("subsets", {})
    return _asked(found), {name: _asked(each.get("recipe")) for name, each in subsets.items()}


def _asked(values: Any) -> Any:
    """The same, of each backend only what its answers depend on."""
    if isinstance(values, list):
        return [_asked(each) for each in values]
    if not isinstance(values, dict):
        return values
    return {
        key: {name: each.get(name) for name in ("name", "options")}
        if key in METHODS and isinstance(each, dict)
        else _asked(each)
        for key, each in values.items()
    }


def _differs(before: LogState, now: LogState, name: str) -> bool:
    return before.units[name].unit.manifest.sha256 != now.units[name].unit.manifest.sha256


def _kept(state: LogState, names: list[str]) -> int:
    return sum(state.units[name].unit.kept for name in names)


def _changes(now: LogState, before: LogState) -> list[str]:
    if now.config is None or before.config is None:
        return []
    return changed_keys(now.config.text, before.config.text)


def undo(out: str, rebuild: Rebuild) -> dict[str, Any]:
    """Give the units of a rebuild their former files, restore the configuration, and merge.

    Args:
        out: the corpus.
        rebuild: as `find_rebuild` returned it.

    Returns:
        What `stats.json` holds.

    Raises:
        ConfigError: files that the rebuild replaced are not kept any more, or are damaged; or the corpus
            has changed since `rebuild` was found, or another driver is writing there. Nothing is changed.
        Fenced: another driver has taken over.
        StageFailed: the disk is full or the folder cannot be written; undo again.
    """
    units = find_former_files(out, rebuild)
    try:
        _refuse_damaged(out, rebuild, units)
        with own(out, "undo", history.lease_of(log.read_state(out))) as owner:
            found = find_rebuild(out)
            if (found.first, found.last, found.is_begun) != (rebuild.first, rebuild.last, rebuild.is_begun):
                raise ConfigError(f"{out}: the corpus has changed meanwhile; look again, then undo")
            sweep(owner)
            if not found.is_begun:
                units = find_former_files(out, found)
                in_place = {
                    file.path
                    for unit in units.values()
                    for file in unit.files()
                    if not file.temporary and not file.name
                }
                now = [owner.state.units[name].unit for name in units]
                replaced = sorted({file.path for unit in now for file in unit.files()} - in_place)
                owner.append(Commit(units=units, replaced=replaced, undoes=found.first))
            _restore_config(owner, found.before)
            return merge.merge(out, owner=owner)
    except OSError as error:
        raise writer.write_failed(locate(out), error) from error


def _instead(out: str, rebuild: Rebuild) -> str:
    """What to do where nothing can be undone."""
    return (
        "nothing was undone. To have the earlier results again, run `paracaption versions "
        f"{out} --config {rebuild.before.number} > old.yaml` and then `paracaption build old.yaml`; this "
        "build asks no model again"
    )


def find_former_files(out: str, rebuild: Rebuild) -> dict[str, LogUnit]:
    """The units as they were before a rebuild, each file under the name where it is kept.

    Raises:
        ConfigError: some are not kept any more.
    """
    if rebuild.is_begun:
        return {}
    places = history.Places(out, rebuild.before.number)
    units: dict[str, LogUnit] = {}
    for name in rebuild.units:
        unit = rebuild.before.units[name].unit
        found = [_placed(places, name, file) for file in unit.files()]
        if any(file is None for file in found):
            record = places.replaced_by(unit.ledger)
            raise ConfigError(
                f"{out}: {name}: the files that record {record} replaced are deleted by now "
                f"(failures.keep_replaced_days); {_instead(out, rebuild)}"
            )
        by_path = {file.path: file for file in found if file is not None}
        units[name] = msgspec.structs.replace(
            unit,
            manifest=by_path[unit.manifest.path],
            ledger=by_path[unit.ledger.path],
            shard=unit.shard and by_path[unit.shard.path],
        )
    return units


def _refuse_damaged(out: str, rebuild: Rebuild, units: dict[str, LogUnit]) -> None:
    """Refuse to put a damaged file in the place of a good one.

    Raises:
        ConfigError: a file that is kept is not the one that was replaced.
    """
    for unit in units.values():
        for file in unit.files():
            path = f"{out}/{file.written_as}"
            if files.sha256_of(path) != file.sha256:
                raise ConfigError(
                    f"{path}: this kept file is damaged: its SHA-256 is not that of the file that was "
                    f"replaced; {_instead(out, rebuild)}"
                )


def _placed(places: history.Places, name: str, file: LogFile) -> LogFile | None:
    """A file of a former version, with the name that it has now if that is not its place."""
    path = places.find(name, file)
    if path is None:
        return None
    return msgspec.structs.replace(file, temporary="" if path in (file.path, file.name) else path)


def _restore_config(owner: Owner, before: LogState) -> None:
    if before.config is not None:
        text = before.config.text
        owner.append(Config(text=text, files=[owner.write(reader.CONFIG, text.encode())]))
