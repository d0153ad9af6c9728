"""The committed units of a corpus: which there are, and where their files lie."""

from __future__ import annotations

from typing import NamedTuple

from ..io import files
from . import log


class Unit(NamedTuple):
    """A committed unit, and where its files lie.

    Attributes:
        subset: name of the subset.
        name: name of the unit, as `coconut-000000`. Names sort in the order of the work list.
        folder: path or URL of the subset's folder.
        unmoved: (place, present name), below the corpus, of files that a driver which died has not moved to
            their places yet; the next build moves them.
    """

    subset: str
    name: str
    folder: str
    unmoved: tuple[tuple[str, str], ...] = ()

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

    def _file(self, path: str) -> str:
        present = dict(self.unmoved).get(f"{self.subset}/{path}")
        if present is None:
            return f"{self.folder}/{path}"
        return f"{self.folder.rpartition('/')[0]}/{present}"


def list_units(folder: str) -> list[Unit]:
    """The committed units in a subset's folder, in order. Without such a folder there are none.

    Raises:
        IntegrityError: the commit log is damaged.
    """
    out, _, subset = folder.rpartition("/")
    if log.exists(out):
        state = log.read_state(out)
        unmoved = log.find_unmoved(out, state)
        return [
            Unit(subset, name.partition("/")[2], folder, tuple(unmoved.get(name, ())))
            for name in sorted(state.units)
            if name.startswith(f"{subset}/")
        ]
    return [
        Unit(subset, name.removesuffix(".json"), folder)
        for name in files.list_names(f"{folder}/manifests")
        if name.endswith(".json") and not name.startswith(".")
    ]
