"""The committed units of a corpus: which there are, and where their files lie."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..io import files
from ..io.location import is_bucket
from . import log, moves
from .records import LogUnit


class Unit(NamedTuple):
    """A committed unit, and where its files lie.

    Attributes:
        subset: name of the subset.
        name: name of the unit, as `coconut-000000`. Names sort in the order of the work list.
        folder: path or URL of the subset's folder.
        names: (place, present name), below the corpus, of files that lie elsewhere: in a bucket each has a
            name of its own; in a folder a driver which died has not moved them to their places yet, and the
            next build does.
    """

    subset: str
    name: str
    folder: str
    names: tuple[tuple[str, str], ...] = ()

    @property
    def manifest(self) -> str:
        """Path or URL of the manifest."""
        return self._file(f"manifests/{self.name}.json")

    @property
    def ledger(self) -> str:
        """Path or URL of the Parquet file with every region."""
        return self._file(f"ledger/{self.name}.parquet")

    @property
    def shard(self) -> str:
        """Path or URL of the tar. It exists only if the unit kept a region: `manifest.shard` tells."""
        return self._file(f"shards/{self.name}.tar")

    @property
    def shard_place(self) -> str:
        """The shard's place below the corpus, by which index and ledger name it."""
        return f"{self.subset}/shards/{self.name}.tar"

    def _file(self, path: str) -> str:
        present = dict(self.names).get(f"{self.subset}/{path}")
        if present is None:
            return f"{self.folder}/{path}"
        return f"{self.folder.rpartition('/')[0]}/{present}"


def unit_of(out: str, name: str, unit: LogUnit, unmoved: Iterable[tuple[str, str]] = ()) -> Unit:
    """A unit as the log has it.

    Args:
        out: the corpus.
        name: "subset/unit".
        unit: of the log.
        unmoved: (place, present name) of its files that have not been moved yet.
    """
    subset, _, unit_name = name.partition("/")
    names = {file.path: file.name for file in unit.files() if file.name} | dict(unmoved)
    return Unit(subset, unit_name, f"{out}/{subset}", tuple(names.items()))


def find_unit(folder: str, name: str) -> Unit | None:
    """The committed unit of a name in a subset's folder; None if there is none.

    Raises:
        IntegrityError: the commit log is damaged.
    """
    out, _, subset = folder.rpartition("/")
    if not (is_bucket(out) and log.exists(out)):
        return next((unit for unit in list_units(folder) if unit.name == name), None)
    found = log.present_state(out).units.get(f"{subset}/{name}")
    return None if found is None else unit_of(out, f"{subset}/{name}", found.unit)


def list_units(folder: str) -> list[Unit]:
    """The committed units in a subset's folder, in order. Without such a folder there are none.

    Raises:
        IntegrityError: the commit log is damaged.
    """
    out, _, subset = folder.rpartition("/")
    if log.exists(out):
        state = log.present_state(out)
        unmoved = moves.find_unmoved(out, state)
        return [
            unit_of(out, name, found.unit, unmoved.get(name, ()))
            for name, found in sorted(state.units.items())
            if name.startswith(f"{subset}/")
        ]
    return [
        Unit(subset, name.removesuffix(".json"), folder)
        for name in files.list_names(f"{folder}/manifests")
        if name.endswith(".json") and not name.startswith(".") and not _is_attempt(out, name)
    ]


def _is_attempt(out: str, name: str) -> bool:
    """Whether a manifest in a bucket is of a driver that has begun there meanwhile; see `Store.new_name`."""
    return is_bucket(out) and re.search(r"-\d{6,}-[0-9a-f]{12}\.json$", name) is not None
