"""The summary of a work list, `OUT/<subset>/plan/plan.json`: all that it says without its images."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from ...schemas.errors import IntegrityError
from ...schemas.records import Blob
from ..io import files
from ..io.disk_errors import fix_of
from ..io.location import Location, locate
from ..sources.protocols import CatalogEntry
from . import log, work_list_table
from .work_list_table import VERSION, Written

FOLDER = "plan"
TABLE = "plan.parquet"
SUMMARY = "plan.json"

_LATER = {"benchmarks", "credits", "steps", "gone", "gone_examples"}
"""Fields of the summary that early releases did not know."""


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """A state of a work list that has grown or changed: what it had from then on.

    Attributes:
        digest: of the work list; the units that the step added or changed name it as their `plan`.
        units: number of units.
        images: number of images.
        changed: indices of earlier units of which an image was changed or removed.
        removes: whether those images were removed on request.
    """

    digest: str
    units: int
    images: int
    changed: list[int] = []
    removes: bool = False


class WorkList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the driver knows of a work list. The images are in the table next to it.

    Attributes:
        subset: name of the subset.
        digest: of the images in their order and of `images_per_shard`.
        num_images: number of images in all units.
        num_units: number of units: `unit_name(0)` to `unit_name(num_units - 1)`.
        images_per_shard: number of images in each unit but the last of each step, which has what is left.
        photo_bytes: size of all photos together, estimated from a sample.
        fingerprint: version of every annotation file, tar and folder, by URL.
        version: of this format.
        folder: the subset's folder that the list was read from. Empty on disk.
        sources: the sources with their options, as the list was made from them; empty if that is not known.
        table: SHA-256 of the table in hex; "" if that is not known.
        check: over the other fields; "" if there is none.
        benchmarks: version of the list of benchmarks' photos that are left out; 0, and not in the file, if it
            was planned with all photos.
        credits: whether it has license and origin of the images; not in the file if it does not.
        steps: how it has grown, from the list as it was made first; empty, and not in the file, if it never
            has.
        gone: number of images that its sources do not have any more; not in the file if there are none.
        gone_examples: keys of some of them.
    """

    subset: str
    digest: str
    num_images: int
    num_units: int
    images_per_shard: int
    photo_bytes: int
    fingerprint: dict[str, str]
    version: int = VERSION
    folder: str = ""
    sources: list[dict[str, Any]] = []
    table: str = ""
    check: str = ""
    benchmarks: int = 0
    credits: bool = False
    steps: list[Step] = []
    gone: int = 0
    gone_examples: list[str] = []

    @property
    def table_path(self) -> str:
        """Where the table of the images lies."""
        return str(table_path(self.folder))

    def plans(self) -> list[str]:
        """Of each unit, the digest of the step that planned it or changed it last: its manifest's `plan`."""
        found: list[str] = []
        for step in first_steps(self):
            for index in step.changed:
                found[index] = step.digest
            found += [step.digest] * (step.units - len(found))
        return found

    def num_images_of(self, index: int) -> int:
        """Number of images of a unit: of each step the last unit has what is left."""
        first = first_image = 0
        for step in first_steps(self):
            if index < step.units:
                before = self.images_per_shard * (index - first)
                return min(self.images_per_shard, step.images - first_image - before)
            first, first_image = step.units, step.images
        raise IndexError(f"{self.subset}: no unit {index}")

    def unit_name(self, index: int) -> str:
        """Name of a unit. Names sort by the index."""
        return f"{self.subset}-{index:06d}"

    def unit_names(self) -> list[str]:
        """Names of all units in order."""
        return [self.unit_name(index) for index in range(self.num_units)]

    def read_unit(self, index: int) -> list[CatalogEntry]:
        """The images of a unit; see the function `read_unit`."""
        return read_unit(self.folder, index)


def unit_index(name: str) -> int:
    """The index of a unit, from its name."""
    return int(name.rpartition("-")[2])


def first_steps(work_list: WorkList) -> list[Step]:
    """The steps of a work list so far; a list that never grew is one step."""
    return work_list.steps or [Step(work_list.digest, work_list.num_units, work_list.num_images)]


def table_path(folder: str | Location) -> Location:
    """Where the table of the images lies in a subset's folder."""
    return _place(folder, TABLE)


def summary_path(folder: str | Location) -> Location:
    """Where the work list itself lies in a subset's folder; it exists only once the table is complete."""
    return _place(folder, SUMMARY)


def _place(folder: str | Location, name: str) -> Location:
    folder = locate(folder)
    return locate(log.place_of(folder.parent, f"{folder.name}/{FOLDER}/{name}"))


def find_work_list(folder: str | Location) -> WorkList | None:
    """The work list in a subset's folder; None if it is missing or damaged: the build makes it again.

    Raises:
        IntegrityError: it is of another version, or the disk does not give it.
    """
    path = summary_path(folder)
    try:
        found = _decode_summary(files.read(Blob(str(path))))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise IntegrityError(f"{path}: not readable ({error}); run the same command again") from error
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return _opened(found, folder)


def load_work_list(folder: str | Location) -> WorkList:
    """The work list in a subset's folder.

    Raises:
        IntegrityError: there is none, or it cannot be read.
    """
    path = summary_path(folder)
    try:
        found = _decode_summary(files.read(Blob(str(path))))
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{path}: no work list; run `paracaption build CONFIG`, which writes it"
        ) from error
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        fix = fix_of(error, "run `paracaption build CONFIG` again, or delete it if that does not help")
        raise IntegrityError(f"{path}: not a work list ({error}); {fix}") from error
    return _opened(found, folder)


def _decode_summary(data: bytes) -> WorkList:
    found = msgspec.json.decode(data, type=WorkList)
    if found.check and found.check != check_of_summary(found):
        raise msgspec.ValidationError("its checksum is not that of its content")
    return found


def check_of_summary(work_list: WorkList) -> str:
    content = msgspec.structs.replace(work_list, check="", folder="")
    return hashlib.sha256(msgspec.json.encode(fields_of(content), order="sorted")).hexdigest()[:16]


def fields_of(work_list: WorkList) -> dict[str, Any]:
    """The fields of the summary. One that early releases did not know is left out when empty."""
    fields = msgspec.structs.asdict(work_list)
    return {name: value for name, value in fields.items() if value or name not in _LATER}


def _opened(found: WorkList, folder: str | Location) -> WorkList:
    path = summary_path(folder)
    if found.version != VERSION:
        raise IntegrityError(
            f"{path}: work list of version {found.version}, expected {VERSION}; use a new `out`"
        )
    return msgspec.structs.replace(found, folder=str(folder))


def read_unit(folder: str | Location, index: int) -> list[CatalogEntry]:
    """The images of one unit, in order; reads nothing of the other units.

    Args:
        folder: of the subset, `OUT/<subset>`.
        index: of the unit.

    Raises:
        IntegrityError: the table cannot be read or has no such unit, or what is read is not what was written.
    """
    return work_list_table.read_unit(table_path(folder), index)


def find_damage(work_list: WorkList) -> str | None:
    """What is wrong with the table of a work list that was read from a folder; None if nothing is.

    Of a table of an early release, only what its digest covers and what cannot be decoded is found.

    Raises:
        IntegrityError: it is in a bucket, whose store does not give it.
    """
    expected = Written(
        work_list.digest,
        work_list.num_images,
        work_list.num_units,
        work_list.photo_bytes,
        work_list.table,
    )
    path = table_path(work_list.folder)
    return work_list_table.find_damage(path, expected, work_list.subset, work_list.images_per_shard)
