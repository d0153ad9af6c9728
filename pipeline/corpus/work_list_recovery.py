"""Makes the work list of a corpus that has grown again, where its files are damaged.

A list that never grew is made again from its sources. One that has grown is not what its sources list today:
its units have their images in the order in which they came. But each committed unit says which images it has,
and the log says how the list has grown. So the units are taken from the ledgers, and each image from the
sources. What the ledgers do not tell, such as another annotation that waits to be built, is lost:
`paracaption build CONFIG --check-files` finds it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ...schemas.errors import IntegrityError
from ...schemas.reasons import Reason
from ...schemas.records import Drop
from ..io.location import Location
from ..sources.earlier_keys import EarlierKeys
from ..sources.protocols import SOURCE_STAGE, CatalogEntry
from . import log, reader, work_list_table
from .growth import GONE
from .records import LogUnit, Planned
from .work_list_summary import FOLDER, Step, WorkList, unit_index
from .work_list_table import UnitReader, Written

_COLUMNS = ["key", "file_name", "drop_reason", "drop_detail"]


class _Listed(NamedTuple):
    """An image as the ledger of its unit has it."""

    key: str
    file_name: str
    drop: Drop | None


def find_steps(folder: str | Location, old: WorkList | None) -> list[Step]:
    """How a work list has grown, from its summary or from the log; empty if it never has.

    Args:
        folder: of the subset, `OUT/<subset>`.
        old: its summary; None if that is damaged, too.

    Raises:
        IntegrityError: the log is damaged.
    """
    if old is not None:
        return old.steps
    out, _, subset = str(folder).rpartition("/")
    units = _units_of(folder)
    steps: list[Step] = []
    for record in log.read_records(out) if log.exists(out) else ():
        if not isinstance(record, Planned) or record.subset != subset:
            continue
        if steps and record.plan == steps[-1].digest:
            continue
        if not (record.added or record.changed or record.removed):
            steps = []  # planned again, and has not grown since
        names = record.removed_from or [name for name, unit in units.items() if unit.plan == record.plan]
        before = steps[-1].units if steps else 0
        changed = sorted(index for index in map(unit_index, names) if index < before)
        steps.append(Step(record.plan, record.units, record.images, changed, record.removed > 0))
    return steps if len(steps) > 1 else []


def earlier_keys(folder: str | Location, places: Iterable[str]) -> EarlierKeys:
    """The keys that the committed units have given out.

    Args:
        folder: of the subset, `OUT/<subset>`.
        places: the annotation files, tars and folders that the list was made of.
    """
    found = EarlierKeys(places)
    for _, images in _read_ledgers(folder):
        for image in images:
            found.add(image.key, image.file_name)
    return found


def write_table(
    made: WorkList, steps: list[Step], folder: str | Location, fresh: Path, path: Path
) -> Written:
    """Write the table of a list that has grown: the images of committed units, and then those that are left.

    Args:
        made: as if the sources were planned for the first time.
        steps: from `find_steps`.
        folder: of the subset, `OUT/<subset>`.
        fresh: table of the sources' images, with the keys that the old ones had.
        path: of the table to write.

    Raises:
        IntegrityError: it cannot be what it was; says why and what to do.
    """
    _refuse_unfinished_removal(steps, folder)
    committed, today = dict(_read_ledgers(folder)), _Today(fresh, made.images_per_shard)
    known = {image.key for images in committed.values() for image in images}
    left = (today.entry(key) for key in today.places if key not in known)
    size = made.images_per_shard

    def units() -> Iterator[list[CatalogEntry]]:
        first = first_image = number = 0
        for step in steps:
            for index in range(first, step.units):
                if index in committed:
                    unit = [_entry_of(image, today) for image in committed[index]]
                else:
                    unit = list(islice(left, min(size, step.images - first_image - size * (index - first))))
                number += len(unit)
                if not 0 < len(unit) <= size:
                    raise _other(folder, f"unit {index} would have {len(unit)} images")
                yield unit
            if number != step.images:
                raise _other(folder, f"{step.units} units would have {number} images, not {step.images}")
            first, first_image = step.units, step.images

    return work_list_table.write_units(units(), made.subset, size, path, made.credits)


class _Today:
    """The images that the sources list now, by key."""

    def __init__(self, table: Path, size: int):
        self._reader, self._size = UnitReader(table), size
        self.places = {key: place for place, key in enumerate(self._reader.keys())}

    def entry(self, key: str) -> CatalogEntry:
        index, place = divmod(self.places[key], self._size)
        return self._reader.read(index)[place]


def _entry_of(image: _Listed, today: _Today) -> CatalogEntry:
    """An image as its source lists it now, or what stays of one that was removed, or is gone from there."""
    is_removed = image.drop is not None and image.drop.reason is Reason.REMOVED
    if image.key in today.places and not is_removed:
        return today.entry(image.key)
    return CatalogEntry(image.key, None, None, b"", image.file_name, image.drop if is_removed else GONE)


def _other(folder: str | Location, what: str) -> IntegrityError:
    return IntegrityError(
        f"{folder}/{FOLDER}: damaged, and cannot be made again, because the sources or images_per_shard have "
        f"changed since ({what}); configure them as they were, or restore {FOLDER}/ from a copy"
    )


def _units_of(folder: str | Location) -> dict[str, LogUnit]:
    """The committed units of a subset by their names."""
    out, _, subset = str(folder).rpartition("/")
    units = log.read_units(out) if log.exists(out) else {}
    return {name.partition("/")[2]: unit for name, unit in units.items() if name.startswith(f"{subset}/")}


def _read_ledgers(folder: str | Location) -> Iterator[tuple[int, list[_Listed]]]:
    """The images of each committed unit, in their order."""
    for unit in reader.list_units(str(folder)):
        table = reader.read_ledger(
            unit.ledger, ["key", "file_name", "drop_stage", "drop_reason", "drop_detail"]
        )
        images: dict[str, _Listed] = {}
        for row in table.to_pylist():
            reason = row["drop_reason"]
            drop = Drop(SOURCE_STAGE, Reason(reason), row["drop_detail"] or "") if reason else None
            images.setdefault(row["key"], _Listed(row["key"], row["file_name"] or "", drop))
        yield unit_index(unit.name), list(images.values())


def _refuse_unfinished_removal(steps: list[Step], folder: str | Location) -> None:
    """Refuse to forget which images were to be removed.

    Raises:
        IntegrityError: a unit still has some of them.
    """
    place = {step.digest: number for number, step in enumerate(steps)}
    for name, unit in _units_of(folder).items():
        for number, step in enumerate(steps):
            if step.removes and unit_index(name) in step.changed and place.get(unit.plan, number) < number:
                raise IntegrityError(
                    f"{folder}/{FOLDER}: damaged, and a removal of images was not complete: {name} still has "
                    f"some that only this list knew; restore {FOLDER}/ from a copy, or use a new `out`"
                )
