"""Which units of a work list are still to be built."""

from __future__ import annotations

from collections.abc import Iterable

from ...schemas.errors import IntegrityError
from ..io.listing import list_files
from ..io.location import is_bucket, locate
from . import log as commit_log
from .records import LogUnit
from .work_list_summary import FOLDER, WorkList, first_steps


def find_pending_units(work_list: WorkList, recipe: str) -> list[int]:
    """Indices of the units to build, in order.

    Those are units that are not committed, that were committed with another recipe or before an image of them
    changed, or of which a file is gone or has another size than when it was committed.

    Args:
        work_list: as it was read from a subset's folder.
        recipe: digest of the recipe.

    Raises:
        IntegrityError: a committed unit is of another work list, or of no unit of this one; or the commit
            log, or a manifest of a corpus without a log, cannot be read.
    """
    out, _, subset = work_list.folder.rpartition("/")
    units = {name: unit for name, unit in commit_log.read_units(out).items() if name.startswith(f"{subset}/")}
    pending, committed, plans = list[int](), dict[int, LogUnit](), work_list.plans()
    known = {step.digest for step in first_steps(work_list)}
    for index in range(work_list.num_units):
        unit = units.pop(f"{subset}/{work_list.unit_name(index)}", None)
        if unit is None:
            pending.append(index)
            continue
        if unit.plan not in known:
            raise IntegrityError(
                f"{out}/{unit.manifest.path}: this unit was built from the work list {unit.plan[:12]}, "
                f"but the corpus now has {work_list.digest[:12]}; restore {subset}/{FOLDER} from a "
                "copy, or use a new `out`"
            )
        if unit.plan != plans[index] or unit.recipe != recipe:
            pending.append(index)
        else:
            committed[index] = unit
    if units:
        path = f"{out}/{units[min(units)].manifest.path}"
        raise IntegrityError(
            f"{path}: the work list has no such unit; restore {subset}/{FOLDER} from a copy, or use a new "
            "`out`"
        )
    broken = {id(unit) for unit in _find_broken(out, committed.values())}
    return sorted([*pending, *(index for index, unit in committed.items() if id(unit) in broken)])


def _find_broken(out: str, units: Iterable[LogUnit]) -> list[LogUnit]:
    """Those of some committed units of which a file is gone or has another size; see `log.is_whole`.

    A bucket is listed; only what is not in the listing, which may be late, is asked for one by one.
    """
    if not is_bucket(out):
        return [unit for unit in units if not commit_log.is_whole(out, unit)]
    units = list(units)
    folders = {file.place.rpartition("/")[0] for unit in units for file in unit.files()}
    listed = {
        f"{folder}/{name}": found.bytes
        for folder in folders
        for name, found in list_files(locate(f"{out}/{folder}")).items()
    }
    doubted = [unit for unit in units if any(listed.get(file.place) != file.bytes for file in unit.files())]
    return [unit for unit in doubted if not commit_log.is_whole(out, unit)]
