"""What people say about decisions: right or wrong. Kept next to the corpus, with the precision that follows.

`OUT/review/marks.parquet` (its name in version 0.1) has a row for each reviewed region and reviewer with the
decision that was reviewed. The whole file is written for each review, under a lock, so that two explorers of
one corpus do not lose each other's; on a file system without locks, only the threads of one explorer do not.
In a bucket there is no lock: the file is put on the condition that it is still the one that was read, else it
is read again.
"""

from __future__ import annotations

import errno
import fcntl
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.errors import ConfigError, IntegrityError
from ..io import bucket_versions, confined, files
from ..io.location import Prefix
from ..io.store import store_of
from ..io.tables import TableFile
from .catalog import Catalog

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "review"
FILE = "marks.parquet"
KEPT = "kept"

_WRITING = threading.Lock()

_Z = 1.959964
"""The quantile of the normal distribution for a 95% interval."""


class Review(NamedTuple):
    """A person's word on a region.

    Attributes:
        subset, key, region: which region.
        decision: "kept", or "stage/reason" of the drop, at the time of the review.
        right: whether that decision is right.
        time_s: seconds since the epoch.
        reviewer: who says so; "" in what was written before reviewers had names.
    """

    subset: str
    key: str
    region: int
    decision: str
    right: bool
    time_s: float
    reviewer: str = ""


class Precision(NamedTuple):
    """How often a decision was right, among the reviewed regions.

    Attributes:
        subset, decision: which decision.
        right, reviewed: numbers of regions. One with several reviewers is right if most of them say so; if as
            many say wrong, it is not.
        low, high: 95% interval by Wilson's score. It holds for all regions of the decision if the reviewed
            ones were drawn at random.
    """

    subset: str
    decision: str
    right: int
    reviewed: int
    low: float
    high: float
    disputed: int = 0
    """Reviewed regions on which reviewers disagree."""

    @property
    def share(self) -> float:
        return self.right / self.reviewed


class Reviews:
    """The reviews of a corpus."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.path = catalog.out / FOLDER / FILE

    def read_all(self) -> list[Review]:
        """All reviews.

        Raises:
            IntegrityError: the file cannot be read.
        """
        if isinstance(self.path, Prefix):
            return self._read_version(self.path)[0]
        return self._reviews_in(lambda: TableFile(str(self.path)).read())

    def _read_version(self, path: Prefix) -> tuple[list[Review], bucket_versions.Version | None]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        data, version = bucket_versions.read_version(str(path))
        if version is None:
            return [], None
        return self._reviews_in(lambda: pq.read_table(pa.BufferReader(data), use_threads=False)), version

    def _reviews_in(self, read: Callable[[], pa.Table]) -> list[Review]:
        import pyarrow as pa

        try:
            table = read()
            if "reviewer" not in table.column_names:
                table = table.append_column("reviewer", pa.array([""] * len(table), pa.string()))
            table = table.select(_schema().names).cast(_schema())
        except FileNotFoundError:
            return []
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            raise IntegrityError(
                f"{self.path}: not a file of reviews ({error}); move it away, and a new one is begun"
            ) from error
        return [Review(*row.values()) for row in table.to_pylist()]

    def of_image(self, subset: str, key: str) -> dict[int, list[Review]]:
        """The reviews of an image by region, one of each reviewer."""
        found: dict[int, list[Review]] = {}
        for each in self.read_all():
            if (each.subset, each.key) == (subset, key):
                found.setdefault(each.region, []).append(each)
        return found

    def save(self, subset: str, key: str, region: int, right: bool | None, reviewer: str = "") -> None:
        """Save a reviewer's review of the present decision on a region; None removes it.

        Those of other reviewers stay.

        Raises:
            ConfigError: there is no such region, or the corpus cannot be written.
        """
        row = next((row for row in self.catalog.image(subset, key) if row["region"] == region), None)
        if row is None:
            raise ConfigError(f"{subset}/{key}: no region {region}")
        place, review = (subset, key, region, reviewer), None
        if right is not None:
            now = round(time.time(), 3)
            review = Review(subset, key, region, decision_of(row), right, now, reviewer)
        if isinstance(self.path, Prefix):
            self._save_in_bucket(self.path, place, review)
            return
        with self._locked(self.path):
            data = _encode(_with(self.read_all(), place, review))
            with files.write_atomic(self.path) as file:
                file.write(data)

    def _save_in_bucket(self, path: Prefix, place: _Place, review: Review | None) -> None:
        try:
            with _WRITING:
                while True:
                    reviews, version = self._read_version(path)
                    if bucket_versions.put_version(
                        str(path), _encode(_with(reviews, place, review)), version
                    ):
                        return
        except OSError as error:
            raise _not_written(path, error) from error

    def last_of(self, reviewer: str) -> Review | None:
        """What a reviewer said last, of the regions that the corpus still has."""
        own = [each for each in self.read_all() if each.reviewer == reviewer]
        present = self._present_decisions(own)
        return max((each for each in own if each[:3] in present), key=lambda each: each.time_s, default=None)

    def precision(self) -> tuple[list[Precision], int]:
        """The precision by subset and decision, and the number of void reviews.

        A review is void if a rebuild has decided otherwise since.
        """
        reviews = self.read_all()
        present = self._present_decisions(reviews)
        words: dict[tuple[str, str], dict[tuple[str, str, int], list[bool]]] = {}
        num_valid = 0
        for review in reviews:
            if present.get(review[:3]) == review.decision:
                num_valid += 1
                of_decision = words.setdefault((review.subset, review.decision), {})
                of_decision.setdefault(review[:3], []).append(review.right)
        found = []
        for name, regions in sorted(words.items()):
            right = sum(2 * sum(said) > len(said) for said in regions.values())
            disputed = sum(len(set(said)) > 1 for said in regions.values())
            found.append(
                Precision(*name, right, len(regions), *wilson(right, len(regions)), disputed=disputed)
            )
        return found, len(reviews) - num_valid

    def _present_decisions(self, reviews: list[Review]) -> dict[tuple[str, str, int], str]:
        """The present decision on each reviewed region that the corpus still has."""
        if not reviews:
            return {}
        sql = f"SELECT subset, key, region, {DECISION} FROM LEDGERS WHERE key IN (SELECT unnest($keys))"
        rows = self.catalog.select(sql, {"keys": sorted({review.key for review in reviews})})
        return {(subset, key, region): decision for subset, key, region, decision in rows}

    def next_unreviewed(
        self, subset: str, decision: str, skip: int = 0, reviewer: str = ""
    ) -> tuple[str, int] | None:
        """(key, region) of a region that a reviewer has not reviewed, in a random order, the same for all.

        So several people review the same regions, and where they disagree is known. What was reviewed before
        reviewers had names counts for everyone.

        Args:
            subset: of the corpus.
            decision: "kept" or "stage/reason".
            skip: how many of them to pass over.
            reviewer: who reviews.
        """
        own = [each for each in self.read_all() if each.subset == subset and each.reviewer in ("", reviewer)]
        reviewed = {(each.key, each.region) for each in own}
        sql = f"""
            SELECT key, region FROM LEDGERS WHERE region IS NOT NULL AND {DECISION} = $decision
            ORDER BY hash(key, region), key, region LIMIT {len(reviewed) + skip + 1:d}"""
        rows = self.catalog.select(sql, {"decision": decision}, subset)
        left = [(key, region) for key, region in rows if (key, region) not in reviewed]
        return left[skip] if skip < len(left) else None

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        try:
            store_of(path).make_folder(str(path.parent))
            confined.check(path.with_name("lock"))
            with _WRITING, open(path.with_name("lock"), "ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise
                yield
        except OSError as error:
            raise _not_written(path, error) from error


_Place = tuple[str, str, int, str]
"""Subset, key, region and reviewer."""


def _with(reviews: list[Review], place: _Place, review: Review | None) -> list[Review]:
    """The reviews with another one at a place, or with none there, sorted."""
    found = {(*each[:3], each.reviewer): each for each in reviews}
    found.pop(place, None)
    return sorted([*found.values(), *([] if review is None else [review])])


def _encode(reviews: list[Review]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [list(column) for column in zip(*reviews, strict=True)] or [[] for _ in Review._fields]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, _schema().types, strict=True)]
    written = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=_schema()), written, compression="zstd")
    return written.getvalue().to_pybytes()


def _not_written(path: Path | Prefix, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: cannot be written ({error}); reviews are written into the corpus: "
        "give this user the permission to write there"
    )


DECISION = f"CASE WHEN kept THEN '{KEPT}' ELSE drop_stage || '/' || drop_reason END"
"""The decision on a row of the ledger, in SQL; as `decision_of`."""


def decision_of(row: dict[str, Any]) -> str:
    """The decision on a row of the ledger: "kept", or "stage/reason"."""
    return KEPT if row["kept"] else f"{row['drop_stage']}/{row['drop_reason']}"


def list_decisions(catalog: Catalog, subset: str) -> list[tuple[str, int]]:
    """Each decision of a subset with its number of regions, in the funnel's order."""
    counts = catalog.counts(subset)
    dropped = [(f"{s.stage}/{reason}", n) for s in counts.funnel for reason, n in s.reasons.items()]
    return [(KEPT, counts.kept), *dropped]


def wilson(right: int, reviewed: int) -> tuple[float, float]:
    """95% interval of a share by Wilson's score, which holds for few reviews and for shares of 0 and 1."""
    center = (right + _Z**2 / 2) / (reviewed + _Z**2)
    half = _Z / (reviewed + _Z**2) * math.sqrt(right * (reviewed - right) / reviewed + _Z**2 / 4)
    return max(0.0, center - half), min(1.0, center + half)


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = (pa.string(), pa.string(), pa.int32(), pa.string(), pa.bool_(), pa.float64(), pa.string())
    return pa.schema(list(zip(Review._fields, kinds, strict=True)))
