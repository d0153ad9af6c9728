"""Checks what models said, the evidence next to a corpus, without opening a model. Called by `verify`.

A folder's name has a digest of a configuration, which cannot be computed without the model's files. Which
answers it holds is known from the stage's id: their columns must be those of the stage's kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import msgspec

from ...schemas.errors import IntegrityError
from ..io import files
from ..io.location import locate
from ..io.store import store_of
from ..stages.base import ModelStage
from ..stages.evidence import EvidenceStore, unit_of_file
from ..stages.registry import STAGES
from . import work_list_summary
from .problems import Problem, guarded

ASK_AGAIN = "delete it; the next build that needs these answers asks the model again"

_FOLDER = re.compile(r"([a-z0-9_]+)-[0-9a-f]{16}")


def list_evidence(
    out: str, subset: str, units: Iterable[str], kinds: Mapping[str, str]
) -> tuple[dict[str, dict[str, int]], list[Problem]]:
    """The evidence of a subset, and notes on what nobody reads.

    Args:
        out: the corpus.
        subset: name of the subset.
        units: those of the work list.
        kinds: the kind of each stage of the recipe by its id, where one may differ from the other.

    Returns:
        By unit, the names of the evidence folders that have a file of it, and how many each has.
    """
    found: dict[str, dict[str, int]] = {}
    notes: list[Problem] = []
    planned = set(units)
    for folder in files.list_names(f"{out}/{subset}/evidence"):
        path = f"{subset}/evidence/{folder}"
        if _store(out, subset, folder, kinds) is None:
            match = _FOLDER.fullmatch(folder)
            own = bool(match) and ":" in kinds.get(match[1], "")
            what = "is of a stage of the user's own, which is not imported; it is not checked"
            what = what if own else "belongs to no stage of the recipe; nothing reads it"
            notes.append(Problem(path, "", what, note=True))
            continue
        for name in files.list_names(f"{out}/{path}"):
            unit = unit_of_file(name)
            if name.startswith(files.TEMPORARY):
                what = (
                    "a temporary file: a build is running, or it was interrupted and the next build removes "
                    "this file"
                )
            elif unit == name or unit not in planned:
                what = "belongs to no unit of the work list; nothing reads it"
            else:
                counts = found.setdefault(unit, {})
                counts[folder] = counts.get(folder, 0) + 1
                continue
            notes.append(Problem(f"{path}/{name}", "", what, note=True))
    return found, notes


def _store(out: str, subset: str, folder: str, kinds: Mapping[str, str]) -> EvidenceStore | None:
    match = _FOLDER.fullmatch(folder)
    stage = STAGES.get(kinds.get(match[1], match[1])) if match else None
    if stage is None or not issubclass(stage, ModelStage):
        return None
    return EvidenceStore(locate(out) / subset / "evidence" / folder, stage.evidence)


def forget(out: str, subset: str, unit: str, keys: Collection[str], kinds: Mapping[str, str]) -> int:
    """Delete what models said of some images of a unit. A file that cannot be read is deleted as a whole.

    Args:
        out: the corpus.
        subset: name of the subset.
        unit: name of the unit.
        keys: of the images.
        kinds: the kind of each stage by its id, where one may differ from the other.

    Returns:
        The number of files that had answers about them, or were deleted.
    """
    changed = 0
    for folder in files.list_names(f"{out}/{subset}/evidence"):
        path = f"{out}/{subset}/evidence/{folder}/{unit}.parquet"
        if store_of(path).size(path) is None:
            continue
        store = _store(out, subset, folder, kinds)
        with suppress(IntegrityError):
            if store is not None:
                changed += store.forget(unit, keys)
                continue
        (store or EvidenceStore(locate(path).parent, msgspec.Struct)).delete(unit)
        changed += 1
    return changed


def check_evidence(
    out: str, subset: str, index: int, unit: str, folders: Mapping[str, int], kinds: Mapping[str, str]
) -> list[Problem]:
    """Check the evidence of one unit: each file is what was written, and about images of the unit.

    Args:
        out: the corpus.
        subset: name of the subset.
        index: of the unit in the work list.
        unit: its name.
        folders: those that have a file of the unit, each with the number of its files.
        kinds: as `list_evidence` takes them.
    """
    problems: list[Problem] = []
    planned: set[str] | None = None
    with guarded([], "", ""):  # a damaged work list is reported elsewhere
        planned = {entry.key for entry in work_list_summary.read_unit(f"{out}/{subset}", index)}
    for folder, parts in folders.items():
        path = f"{subset}/evidence/{folder}/{unit}.parquet"
        store = _store(out, subset, folder, kinds)
        assert store is not None
        with guarded(problems, path, ASK_AGAIN):
            try:
                keys = {key for key, _ in store.read(unit, parts)}
            except IntegrityError as error:
                problems.append(Problem(path, "", f"damaged ({error.__cause__ or error}); {ASK_AGAIN}"))
                continue
            if planned is not None and (foreign := keys - planned):
                what = f"has answers about images that are not in this unit ({min(foreign)})"
                problems.append(Problem(path, "", f"{what}; {ASK_AGAIN}"))
    return problems
