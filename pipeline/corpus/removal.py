"""Takes images out of a corpus on request: their photos, captions, and what models said of them.

The work list says first that the images are removed, which is a record of the log: no later build brings them
back, and one that finds a unit which still has them builds it without them. Then the models' answers are
deleted, and each unit that has such an image is committed without it. Nothing else of the unit changes: its
other rows and samples are copied, so neither the source nor a model is asked.

A removal that died is finished by calling it again. What it replaced is kept like the files of any rebuild,
until `failures.keep_replaced_days` are over.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ...schemas import manifest as manifests
from ...schemas.errors import ConfigError
from ...schemas.manifest import FileEntry, Manifest
from ...schemas.reasons import RETRIED, Reason
from ...schemas.records import Blob, Drop, ImageRecord
from ..io import files
from ..io.activity import NOW
from ..io.location import locate
from ..sources.protocols import SOURCE_STAGE, CatalogEntry
from ..stages.registry import configured_kinds
from . import adopt, history, log, merge, reader, work_list, writer
from .growth import cover, plan_without
from .ledger import Place, align_ledger, ledger_table, table_bytes, without_unknown
from .owner import Owner, own
from .records import LogUnit
from .sweep import sweep
from .units import Unit, list_units
from .verify_evidence import forget
from .work_list import Plan
from .work_list_summary import TABLE, Step, WorkList, first_steps, load_work_list
from .work_list_table import UnitReader, write_units

if TYPE_CHECKING:
    import pyarrow as pa

_UNITS_AT_ONCE = 64
_EXAMPLES = 5

REMOVED = Drop(SOURCE_STAGE, Reason.REMOVED, "removed on request")


class SubsetRemoval(NamedTuple):
    """Images of a subset that are to be taken out.

    Attributes:
        work_list: of the subset.
        keys: of the images.
        units: indices of the units that they are in, each with the keys that it has.
        new: number of images that the work list does not call removed yet.
    """

    work_list: WorkList
    keys: set[str]
    units: dict[int, set[str]]
    new: int


def read_keys(path: str | Path) -> list[str]:
    """The keys in a file: one in a line, `KEY` or `SUBSET/KEY`; a line that begins with a `#` is a note.

    Raises:
        ConfigError: it cannot be read, or there is none in it.
    """
    try:
        lines = files.read(Blob(str(path))).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"{path}: not readable ({error}); give a text file with a key in each line"
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise ConfigError(f"{path}: no key in it; give a text file with a key in each line")
    return found


def find_images(out: str, keys: Iterable[str]) -> dict[str, SubsetRemoval]:
    """What a removal would take out, by subset; reads only.

    Args:
        out: the corpus.
        keys: `KEY`, of any subset, or `SUBSET/KEY`.

    Raises:
        ConfigError: there is no such image, or no corpus.
        IntegrityError: a work list or the log is damaged.
    """
    wanted, found = list(dict.fromkeys(keys)), dict[str, SubsetRemoval]()
    subsets = log.planned_subsets(out)
    if not subsets:
        raise ConfigError(f"{out}: no corpus here; give the `out` of a build")
    missing = dict.fromkeys(wanted)
    for subset in subsets:
        own_keys = {
            key.rpartition("/")[2] for key in wanted if "/" not in key or key.startswith(f"{subset}/")
        }
        listed = load_work_list(f"{out}/{subset}")
        units, new = dict[int, set[str]](), 0
        for index, entry in _entries(listed):
            if entry.key in own_keys:
                units.setdefault(index, set()).add(entry.key)
                new += not _is_removed(entry)
                for name in (entry.key, f"{subset}/{entry.key}"):
                    missing.pop(name, None)
        if units:
            found[subset] = SubsetRemoval(listed, set().union(*units.values()), units, new)
    if missing:
        shown = ", ".join(list(missing)[:_EXAMPLES]) + (", ..." if len(missing) > _EXAMPLES else "")
        what = f"{len(missing):,} of {len(wanted):,} keys are of no image of this corpus"
        raise ConfigError(f"{out}: {what} ({shown}); correct them: nothing was removed")
    return found


def _entries(listed: WorkList) -> Iterator[tuple[int, CatalogEntry]]:
    table = UnitReader(listed.table_path)
    for index in range(listed.num_units):
        yield from ((index, entry) for entry in table.read(index))


def _is_removed(entry: CatalogEntry) -> bool:
    return entry.drop is not None and entry.drop.reason is Reason.REMOVED


def remove(out: str, keys: Iterable[str], delete_replaced: bool = False) -> dict[str, int]:
    """Take images out of a corpus, and merge it again if it was merged.

    Args:
        out: the corpus.
        keys: as `find_images` takes them.
        delete_replaced: also delete all files that this and earlier rebuilds have replaced.

    Returns:
        The number of images that were not removed before, and of units that were written again.

    Raises:
        ConfigError: there is no such image, or another driver is writing there. Nothing is changed.
        Fenced: another driver has taken over.
        StageFailed: the disk is full or the folder cannot be written; run it again.
    """
    wanted = list(keys)
    try:
        find_images(out, wanted)
        config = reader.read_config(out)
        with own(out, "remove", history.lease_of(log.read_state(out))) as owner:
            sweep(owner)
            counts = Counter(images=0, units=0)
            for subset, removal in find_images(out, wanted).items():
                counts["images"] += removal.new
                now = _call_removed(out, subset, removal, owner) if removal.new else removal.work_list
                kinds = configured_kinds(config, subset)
                for index in removal.units:
                    forget(out, subset, now.unit_name(index), removal.keys, kinds)
                counts["units"] += _rewrite_units(out, subset, removal, now, owner)
            # The index of a corpus of an early release is in no record of the log.
            if owner.state.merged is not None or files.exists(log.place_of(out, reader.INDEX)):
                merge.merge(out, owner=owner)
            if delete_replaced:
                sweep(owner, keep_replaced_s=-1.0)
            return dict(counts)
    except OSError as error:
        raise writer.write_failed(locate(out), error) from error


def _call_removed(out: str, subset: str, removal: SubsetRemoval, owner: Owner) -> WorkList:
    """Publish the work list in which the images are removed, as a step of its own."""
    listed = removal.work_list
    table = UnitReader(listed.table_path)
    digest = hashlib.sha256(f"{listed.digest}\n".encode())

    def units() -> Iterator[list[CatalogEntry]]:
        for index in range(listed.num_units):
            unit = table.read(index)
            if index in removal.units:
                unit = [_tombstone(entry) if entry.key in removal.keys else entry for entry in unit]
                cover(digest, index, unit)
            yield unit

    with tempfile.TemporaryDirectory(prefix="paracaption-") as scratch:
        path = Path(scratch) / TABLE
        written = write_units(units(), subset, listed.images_per_shard, path, listed.credits)
        step = Step(digest.hexdigest(), listed.num_units, listed.num_images, sorted(removal.units), True)
        steps = [*first_steps(listed), step]
        now = msgspec.structs.replace(
            listed, digest=step.digest, photo_bytes=written.photo_bytes, table=written.sha256, steps=steps
        )
        names = [now.unit_name(index) for index in sorted(removal.units)]
        work_list.publish(Plan(now, path), f"{out}/{subset}", owner, removal.new, names)
    return load_work_list(f"{out}/{subset}")


def _tombstone(entry: CatalogEntry) -> CatalogEntry:
    """What stays of an image in the work list: its names, so that it is known when its source lists it."""
    return CatalogEntry(entry.key, None, None, b"", entry.file_name, REMOVED, entry.source)


def _rewrite_units(out: str, subset: str, removal: SubsetRemoval, now: WorkList, owner: Owner) -> int:
    """Commit every unit that still has some of the images without them; returns how many."""
    folder, number = f"{out}/{subset}", 0
    waiting: list[writer.Draft] = []
    there = {unit.name: unit for unit in list_units(folder)}
    for index, keys in sorted(removal.units.items()):
        name = removal.work_list.unit_name(index)
        if (unit := there.get(name)) is None:
            continue
        NOW.at(f"{subset}/{name}")
        logged = owner.state.units[f"{subset}/{name}"].unit
        plan = plan_without(now, index, logged.plan)
        if draft := _without(unit, keys, plan, logged):
            waiting.append(draft)
            number += 1
        if len(waiting) == _UNITS_AT_ONCE:
            writer.commit(locate(folder), *waiting, owner=owner)
            waiting = []
    if waiting:
        writer.commit(locate(folder), *waiting, owner=owner)
    return number


def _without(unit: Unit, keys: set[str], plan: str, logged: LogUnit) -> writer.Draft | None:
    """A unit as it is committed, without some of its images; None if it has none of them.

    Raises:
        IntegrityError: a file of it is damaged.
    """
    before = reader.read_manifest(unit.manifest)
    table = reader.read_ledger(unit.ledger)
    rows = table.select(["key", "kept", "drop_stage", "drop_reason", "drop_detail"]).to_pylist()
    has = {row["key"] for row in rows if row["key"] in keys and row["drop_reason"] != Reason.REMOVED}
    if not has and plan == logged.plan:
        return None
    folder = locate(unit.folder)
    out, subset = str(folder.parent), folder.name
    places, shard = writer.copy_samples(unit, _places(table, keys), out, f"{subset}/shards/{unit.name}.tar")
    new = without_unknown(_placed(_replaced(table, keys, unit), places))
    ledger = writer.write_file(out, f"{subset}/ledger/{unit.name}.parquet", table_bytes(new))
    found = _manifest_of(before, new, [row for row in rows if row["key"] in has], keys, plan)
    found = msgspec.structs.replace(
        found,
        shard=shard and FileEntry(f"shards/{unit.name}.tar", shard.bytes, shard.sha256),
        ledger=FileEntry(f"ledger/{unit.name}.parquet", ledger.bytes, ledger.sha256),
    )
    manifest = writer.write_file(out, f"{subset}/manifests/{unit.name}.json", manifests.encode(found))
    entry = adopt.log_unit(found, subset, manifest)
    return writer.Draft(found, msgspec.structs.replace(entry, ledger=ledger, shard=shard))


def _places(table: pa.Table, keys: set[str]) -> dict[str, Place]:
    """Where the images that stay are in the shard, by key."""
    names = [*Place._fields]
    kept = table.filter(table["kept"]).select(["key", *names]).to_pylist()
    return {row["key"]: Place(*(row[name] for name in names)) for row in kept if row["key"] not in keys}


def _replaced(table: pa.Table, keys: set[str], unit: Unit) -> pa.Table:
    """The rows of a ledger, with one that says so for each image that is removed."""
    import pyarrow as pa

    parts: list[pa.Table] = []
    listed, start = table["key"].to_pylist(), 0
    for at in range(1, len(listed) + 1):
        if at < len(listed) and listed[at] == listed[start]:
            continue
        key = listed[start]
        if key in keys:
            image = ImageRecord(key, unit.subset, None, 0, 0, drop=REMOVED)
            parts.append(align_ledger(ledger_table(unit.name, [image], {}), unit.ledger))
        else:
            parts.append(table.slice(start, at - start))
        start = at
    return pa.concat_tables(parts).combine_chunks()


def _placed(table: pa.Table, places: dict[str, Place]) -> pa.Table:
    """The rows, with the places that their images have in the new shard."""
    import pyarrow as pa

    rows = table.select(["key", "kept"]).to_pylist()
    found = [places[row["key"]] if row["kept"] else None for row in rows]
    for number, name in enumerate(Place._fields):
        column = pa.array([each and each[number] for each in found], pa.int64())
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return table


def _manifest_of(
    before: Manifest, table: pa.Table, removed: list[dict[str, Any]], keys: set[str], plan: str
) -> Manifest:
    """The manifest of the rows that are left; its files are those of the old one."""
    rows = table.select(["key", "region", "kept", "drop_stage", "drop_reason"]).to_pylist()
    regions = [row for row in rows if row["region"] is not None]
    kept = Counter(row["key"] for row in regions if row["kept"])
    dropped = Counter(f"{row['drop_stage']}/{row['drop_reason']}" for row in regions if not row["kept"])
    whole = Counter(before.images_dropped)
    whole.subtract(_dropped_as_a_whole(removed))
    whole[Reason.REMOVED] = sum(row["drop_reason"] == Reason.REMOVED for row in rows)
    fails = any(row["drop_reason"] in RETRIED for row in rows)
    return msgspec.structs.replace(
        before,
        plan=plan,
        images={key: kept[key] for key in before.images},
        regions_in=len(regions),
        kept=kept.total(),
        dropped=dict(sorted(dropped.items())),
        images_dropped={reason: number for reason, number in sorted(whole.items()) if number > 0},
        failed=before.failed if fails else {},
    )


def _dropped_as_a_whole(rows: list[dict[str, Any]]) -> Counter[Reason]:
    """By reason, the images all of whose rows were dropped by their source or by the writer, alike."""
    by_key: dict[str, set[tuple[str, str, str]]] = {}
    for row in rows:
        found = (row["drop_stage"], row["drop_reason"], row["drop_detail"])
        by_key.setdefault(row["key"], set()).add(found)
    shared = [next(iter(each)) for each in by_key.values() if len(each) == 1]
    return Counter(
        Reason(reason) for stage, reason, _ in shared if stage in (SOURCE_STAGE, writer.WRITE_STAGE)
    )
