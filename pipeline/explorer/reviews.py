"""What people say of decisions: right or wrong, kept beside the corpus, and the precision that follows.

`OUT/review/marks.parquet` has a row per marked region with the decision that was looked at. It is written
whole for each mark, under a lock, so two explorers of one corpus do not lose each other's.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.errors import ConfigError, IntegrityError
from ..io import files
from .catalog import Catalog

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "review"
MARKS = "marks.parquet"
KEPT = "kept"

_Z = 1.959964
"""Of the normal distribution, for 95%."""


class Mark(NamedTuple):
    """A person's word on a region.

    Attributes:
        subset, key, region: which.
        decision: "kept", or "stage/reason" of the drop, when it was looked at.
        right: whether that decision is right.
        time_s: seconds since the epoch.
    """

    subset: str
    key: str
    region: int
    decision: str
    right: bool
    time_s: float


class Precision(NamedTuple):
    """How often a decision was right, of those marked.

    Attributes:
        subset, decision: of what.
        right, marked: counts.
        low, high: 95% interval by Wilson; it is the decision's as a whole if the marked ones were drawn at
            random.
    """

    subset: str
    decision: str
    right: int
    marked: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.right / self.marked


class Marks:
    """The marks of a corpus."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.path = catalog.out / FOLDER / MARKS

    def read(self) -> list[Mark]:
        """All of them.

        Raises:
            IntegrityError: the file is not readable.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with open(self.path, "rb") as file:
                table = pq.ParquetFile(file).read().cast(_schema())
        except FileNotFoundError:
            return []
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise IntegrityError(f"{self.path}: no marks ({error}); move it away, and mark anew") from error
        return [Mark(*row.values()) for row in table.to_pylist()]

    def of(self, subset: str, key: str) -> dict[int, Mark]:
        """By region, of an image."""
        return {mark.region: mark for mark in self.read() if (mark.subset, mark.key) == (subset, key)}

    def set(self, subset: str, key: str, region: int, right: bool | None) -> None:
        """Mark the present decision on a region; None takes the mark away.

        Raises:
            ConfigError: there is no such region, or the corpus cannot be written.
        """
        row = next((row for row in self.catalog.image(subset, key) if row["region"] == region), None)
        if row is None:
            raise ConfigError(f"{subset}/{key}: no region {region}")
        with self._locked():
            marks = {mark[:3]: mark for mark in self.read()}
            marks.pop((subset, key, region), None)
            if right is not None:
                mark = Mark(subset, key, region, decision_of(row), right, round(time.time(), 3))
                marks[mark[:3]] = mark
            self._write(sorted(marks.values()))

    def precision(self) -> tuple[list[Precision], int]:
        """By subset and decision; and the number of marks that are void: a rebuild has decided otherwise."""
        marks = self.read()
        now = self._decisions(marks)
        counts: dict[tuple[str, str], list[int]] = {}
        for mark in marks:
            if now.get(mark[:3]) == mark.decision:
                tally = counts.setdefault((mark.subset, mark.decision), [0, 0])
                tally[0] += mark.right
                tally[1] += 1
        found = [Precision(*name, right, n, *wilson(right, n)) for name, (right, n) in sorted(counts.items())]
        return found, len(marks) - sum(each.marked for each in found)

    def _decisions(self, marks: list[Mark]) -> dict[tuple[str, str, int], str]:
        """The present decision on each marked region that is still there."""
        if not marks:
            return {}
        sql = f"SELECT subset, key, region, {DECISION} FROM LEDGERS WHERE key IN (SELECT unnest($keys))"
        rows = self.catalog.select(sql, {"keys": sorted({mark.key for mark in marks})})
        return {(subset, key, region): decision for subset, key, region, decision in rows}

    def next_unmarked(self, subset: str, decision: str, skip: int = 0) -> tuple[str, int] | None:
        """(key, region) of a decision's region without a mark: the same random order for everyone.

        Args:
            subset: of the corpus.
            decision: "kept" or "stage/reason".
            skip: this many of them.
        """
        marked = {(mark.key, mark.region) for mark in self.read() if mark.subset == subset}
        sql = f"""
            SELECT key, region FROM LEDGERS WHERE region IS NOT NULL AND {DECISION} = $decision
            ORDER BY hash(key, region), key, region LIMIT {len(marked) + skip + 1:d}"""
        rows = self.catalog.select(sql, {"decision": decision}, subset)
        left = [(key, region) for key, region in rows if (key, region) not in marked]
        return left[skip] if skip < len(left) else None

    def _write(self, marks: list[Mark]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [list(column) for column in zip(*marks, strict=True)] or [[] for _ in Mark._fields]
        arrays = [pa.array(column, kind) for column, kind in zip(columns, _schema().types, strict=True)]
        with files.write_atomic(self.path) as file:
            pq.write_table(pa.Table.from_arrays(arrays, schema=_schema()), file, compression="zstd")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(exist_ok=True)
            with open(self.path.with_name("lock"), "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written ({error}); marks are kept beside the corpus"
            ) from error


DECISION = f"CASE WHEN kept THEN '{KEPT}' ELSE drop_stage || '/' || drop_reason END"


def decision_of(row: dict[str, Any]) -> str:
    """Of a ledger's row: "kept", or "stage/reason"."""
    return KEPT if row["kept"] else f"{row['drop_stage']}/{row['drop_reason']}"


def wilson(right: int, marked: int) -> tuple[float, float]:
    """95% interval of a share, by Wilson's score: sound for few marks and for shares of 0 and 1."""
    centre = (right + _Z**2 / 2) / (marked + _Z**2)
    half = _Z / (marked + _Z**2) * math.sqrt(right * (marked - right) / marked + _Z**2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = (pa.string(), pa.string(), pa.int32(), pa.string(), pa.bool_(), pa.float64())
    return pa.schema(list(zip(Mark._fields, kinds, strict=True)))
