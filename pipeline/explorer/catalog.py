"""The committed ledgers of a corpus as one table, queried through DuckDB without loading them.

The commit log lists the ledgers, so answers are right while a build runs. In the corpus's order a page reads
only the ledgers around its place; an order by a score takes one pass over two columns. In a bucket, DuckDB
reads through `bucket_tables`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import duckdb

from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from ...schemas.records import SCORES
from ...schemas.summary import SubsetCounts
from ..corpus import log, merge, reader
from ..corpus.ledger import ledger_schema
from ..corpus.reader import Unit
from ..io import confined
from ..io.location import Location, Prefix, locate
from ..io.store import store_of
from .bucket_tables import SCHEME, CorpusFiles
from .query import CATEGORY, Query

T = TypeVar("T")

PAGE = 24
"""Images on a page: 24 fills rows of two, three, four or six."""

_MEMORY = "400MB"
_WINDOW = 8
"""Ledgers that are read first from a place on; each time that they are not enough, twice as many are read."""
_PAGES_AHEAD = 20
"""Pages of an order by score that are kept when one is asked for, because each pass costs the same."""
_MOST_LEARNED = 100_000
"""Images whose unit is remembered."""


_LEDGERS = "read_parquet($ledgers, union_by_name=true, file_row_number=true)"

_LEDGERS_OF_ALL_RELEASES = f"""
    SELECT * FROM {_LEDGERS} UNION ALL BY NAME
    SELECT {", ".join(f"NULL::DOUBLE AS {name}" for name in SCORES)} WHERE false"""
"""The same with every score, null where the unit was built without it."""


class ImagePlace(NamedTuple):
    """An image in a result.

    Attributes:
        subset, unit, key: which image.
        row: the row of its first matching region in the unit's ledger.
        num_regions: how many of its regions match.
        rank: the value that the result is sorted by; 0 in the corpus's order.
    """

    subset: str
    unit: str
    key: str
    row: int
    num_regions: int
    rank: float = 0.0

    @property
    def cursor(self) -> str:
        """The place as a URL has it; see `Catalog.find_place`."""
        return f"{self.unit}:{self.row}:{self.key}:{self.rank!r}"


class ResultPage(NamedTuple):
    """Some images of a result in order, and whether others come before and after."""

    images: list[ImagePlace]
    before: bool
    after: bool


class Catalog:
    """Answers questions about a corpus, from any number of threads.

    Args:
        out: the corpus.

    Raises:
        ConfigError: the folder is no corpus.
    """

    def __init__(self, out: str | Location):
        place = locate(out)
        self.out = place if isinstance(place, Prefix) else place.absolute()
        self.corpus = reader.open_corpus(self.out)
        self._lock = threading.Lock()
        self._units: dict[str, Unit] = {}
        self._version: tuple[Any, ...] = ()
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._places: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._db = duckdb.connect(
            config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        )
        self._db.execute(f"SET threads={min(4, len(os.sched_getaffinity(0)))}")
        self._db.execute(f"SET memory_limit='{_MEMORY}'")
        self._spilled = tempfile.TemporaryDirectory(prefix="paracaption-explorer-")
        self._db.execute("SET temp_directory=$folder", {"folder": self._spilled.name})
        self._db.execute("SET parquet_metadata_cache=true")
        self._files = CorpusFiles(str(self.out)) if isinstance(self.out, Prefix) else None
        if self._files is not None:
            self._db.register_filesystem(self._files)
        self._db.execute("SET allowed_directories=$folders", {"folders": _readable(self.out)})
        self._db.execute("SET enable_external_access=false")  # nothing outside of the corpus
        self._db.execute("SET lock_configuration=true")

    def units(self, subset: str = "") -> list[Unit]:
        """The committed units in order, of one subset or of all (""); always up to date."""
        self._refresh()
        return [unit for unit in self._units.values() if subset in ("", unit.subset)]

    @property
    def version(self) -> tuple[Any, ...]:
        """Identifies the committed units: it changes when others are committed."""
        self._refresh()
        return self._version

    def _refresh(self) -> None:
        version = self._find_version()
        with self._lock:
            if version == self._version:
                return
            self._units = {unit.name: unit for unit in self.corpus.units()}
            self._version = version
            self._kept.clear()

    def _find_version(self) -> tuple[Any, ...]:
        """A (subset, what changes with its units) for each subset.

        In a bucket that is the number of the log's newest record, which is asked for once in a second; or if
        a corpus of an early release was uploaded, without a log, the names of the manifests.
        """
        if isinstance(self.out, Prefix) and (state := log.recent_state(str(self.out))).number:
            return tuple((name, (state.number, state.nonce)) for name in log.subsets_of(state))
        store, found = store_of(self.out), []
        for name in self.corpus.subsets:
            folder = f"{self.out}/{name}/manifests"
            found.append((name, store.modified_s(folder) if store.moves else tuple(store.list(folder))))
        return tuple(found)

    def subsets(self) -> list[str]:
        """Names of the subsets, sorted."""
        return [name for name, _ in self.version]

    def check_subset(self, name: str) -> None:
        """Refuse a name that no subset has.

        Raises:
            ConfigError: there is no such subset.
        """
        if name not in self.subsets():
            raise ConfigError(f"{name[:40]!r}: no such subset")

    def counts(self, subset: str) -> SubsetCounts:
        """The funnel and the counts of a subset, as the terminal shows them."""
        return self.remember(("counts", subset), lambda: merge.count_subset(self.corpus, subset))

    def remember(self, what: Any, make: Callable[[], T], most: int = 256) -> T:
        """What `make` returns, kept under `what` until other units are committed."""
        name = (self.version, what)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        made = make()
        with self._lock:
            self._kept[name] = made
            while len(self._kept) > most:
                self._kept.popitem(last=False)
        return made

    def select(
        self, sql: str, args: dict[str, Any] | None = None, subset: str = "", units: list[Unit] | None = None
    ) -> list[tuple[Any, ...]]:
        """Rows of a query. It calls the ledgers' table LEDGERS, and takes values as named parameters.

        Raises:
            IntegrityError: a ledger is damaged or missing.
        """
        units = self.units(subset) if units is None else units
        if not units:
            return []
        ledgers = [unit.ledger for unit in units]
        if self._files is None:
            confined.check_all(ledgers)  # DuckDB follows links
        else:
            ledgers = self._files.allow(ledgers)
        values = {**(args or {}), "ledgers": ledgers}
        try:
            try:
                return self._db.cursor().execute(sql.replace("LEDGERS", _LEDGERS), values).fetchall()
            except duckdb.BinderException:  # all of them lack a column, as those of older releases do
                whole = f"({_LEDGERS_OF_ALL_RELEASES})"
                return self._db.cursor().execute(sql.replace("LEDGERS", whole), values).fetchall()
        except (duckdb.Error, UnicodeError, MemoryError) as error:
            what = _first_line(str(error))[:300]  # DuckDB shows the query below
            raise IntegrityError(f"{self.out}: {what}; run `paracaption verify`") from error

    # Pages.

    def page(
        self,
        query: Query,
        after: ImagePlace | None = None,
        before: ImagePlace | None = None,
        limit: int = PAGE,
    ) -> ResultPage:
        """Images with a region that the query chooses: the first, or those after or before a place."""
        forward = before is None
        edge = after if forward else before
        find = self._by_measure if query.sort else self._in_order
        found = find(query, edge, forward, limit + 1)
        more, found = len(found) > limit, found[:limit]
        if not forward:
            found.reverse()
        for place in found:
            self._learn(place.subset, place.key, place.unit)
        return ResultPage(found, edge is not None if forward else more, more if forward else True)

    def find_place(self, cursor: str) -> ImagePlace | None:
        """The place that a cursor names; None for "".

        Raises:
            ConfigError: this corpus has no such place.
        """
        if not cursor:
            return None
        try:
            unit, row, key, rank = cursor.split(":")
            self._refresh()
            return ImagePlace(self._units[unit].subset, unit, key, int(row), 0, float(rank))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"{cursor[:60]!r}: no place in this corpus; start from the first page"
            ) from error

    def _in_order(self, query: Query, edge: ImagePlace | None, forward: bool, limit: int) -> list[ImagePlace]:
        units = self.units(query.subset)
        if not forward:
            units.reverse()
        names = [unit.name for unit in units]
        start = names.index(edge.unit) if edge and edge.unit in names else 0
        found: list[ImagePlace] = []
        size = _WINDOW
        while start < len(units) and len(found) < limit:
            window = units[start : start + size]
            found += self._places_in(window, query, edge, forward, limit - len(found))
            start, size = start + size, size * 2
        return found

    def _by_measure(
        self, query: Query, edge: ImagePlace | None, forward: bool, limit: int
    ) -> list[ImagePlace]:
        ahead = self.remember(
            ("sorted", query),
            lambda: self._places_in(self.units(query.subset), query, None, True, PAGE * _PAGES_AHEAD),
            64,
        )
        numbers = {place.key + place.unit: number for number, place in enumerate(ahead)}
        at = -1 if edge is None else numbers.get(edge.key + edge.unit)
        if at is not None and not forward:
            return ahead[max(0, at - limit) : at][::-1]
        if at is not None and (at + limit < len(ahead) or len(ahead) < PAGE * _PAGES_AHEAD):
            return ahead[at + 1 : at + 1 + limit]
        return self._places_in(self.units(query.subset), query, edge, forward, limit)

    def _places_in(
        self,
        units: list[Unit],
        query: Query,
        edge: ImagePlace | None,
        forward: bool,
        limit: int,
        key: str | None = None,
    ) -> list[ImagePlace]:
        where, args = query.where_ranked()
        if key is not None:
            where, args = f"{where} AND key = $key", args | {"key": key}
        measure = query.measure
        falling = query.sort.startswith("-")
        rank = f"{'max' if falling else 'min'}({measure})" if measure else "0"
        edge_sql = "true"
        if edge is not None:
            side, ranked = (">" if forward else "<"), ("<" if forward == falling else ">")
            edge_sql = (
                f"NOT (key = $edge_key AND unit = $edge_unit) "
                f"AND (rank {ranked} $edge_rank OR (rank = $edge_rank AND "
                f"(unit {side} $edge_unit OR (unit = $edge_unit AND row {side} $edge_row))))"
            )
            args |= {
                "edge_key": edge.key,
                "edge_rank": edge.rank,
                "edge_unit": edge.unit,
                "edge_row": edge.row,
            }
        down, rank_down = ("" if forward else "DESC"), ("DESC" if forward == falling else "")
        sql = f"""
            SELECT subset, unit, key, min(file_row_number) AS row, count(*), ({rank})::DOUBLE AS rank
            FROM LEDGERS WHERE {where} GROUP BY subset, unit, key HAVING {edge_sql}
            ORDER BY rank {rank_down}, unit {down}, row {down} LIMIT {limit:d}"""
        return [ImagePlace(*row) for row in self.select(sql, args, units=units)]

    def total(self, query: Query, ranked: bool = False) -> tuple[int, int]:
        """How many (regions, images) the query chooses; if `ranked`, of those with its measure."""
        where, args = query.where_ranked() if ranked else query.where()
        sql = f"""
            SELECT coalesce(sum(regions), 0)::BIGINT, count(*)
            FROM (SELECT count(region) AS regions FROM LEDGERS WHERE {where} GROUP BY subset, unit, key)"""

        def counted() -> tuple[int, int]:
            rows = self.select(sql, args, query.subset)
            return rows[0] if rows else (0, 0)  # type: ignore[return-value]

        return self.remember(("total", where, tuple(args.items()), query.subset), counted)

    def categories(self) -> list[str]:
        """The most frequent categories of kept regions, as far as the corpus's statistics list them."""

        def listed() -> list[str]:
            with contextlib.suppress(ParaCaptionError):
                subsets = self.corpus.summary.subsets.values()
                ranked = sorted(
                    (pair for each in subsets for pair in each.categories), key=lambda pair: -pair[1]
                )
                return list(dict.fromkeys(name for name, _ in ranked if name))
            return []  # not merged yet

        return self.remember("categories", listed)

    # Images.

    def image(self, subset: str, key: str) -> list[dict[str, Any]]:
        """An image's rows of the ledger, masks included, in the order of its regions.

        Raises:
            ConfigError: no committed unit has the image.
            IntegrityError: its unit's ledger has not.
        """
        unit = self.find_unit(subset, key)
        names = [name for name, *_ in self.select("DESCRIBE SELECT * FROM LEDGERS", units=[unit])]
        sql = "SELECT * FROM LEDGERS WHERE key = $key AND subset = $subset ORDER BY file_row_number"
        rows = self.select(sql, {"key": key, "subset": subset}, units=[unit])
        if not rows:
            raise IntegrityError(f"{unit.ledger}: has no row of {key[:80]}; run `paracaption verify`")
        later = dict.fromkeys(ledger_schema().names)  # what the unit was built without
        return [later | dict(zip(names, row, strict=True)) for row in rows]

    def matching(self, places: list[ImagePlace], query: Query, most: int) -> Iterator[list[dict[str, Any]]]:
        """For each place the first `most` rows that the query chooses, without masks, in the query's order.

        So the row that gives an image its rank comes first. `measure` is what the query sorts by.
        """
        names = ("key", "region", "kept", "drop_stage", "drop_reason", "drop_detail", CATEGORY, "caption")
        where, args = query.where_ranked()
        args["keys"] = [place.key for place in places]
        measure = query.measure
        order = f"{measure} {'DESC' if query.sort.startswith('-') else ''}," if measure else ""
        sql = f"""
            SELECT unit, {", ".join(names)}, {measure or "NULL"} FROM LEDGERS
            WHERE {where} AND key IN (SELECT unnest($keys)) ORDER BY unit, {order} file_row_number"""
        units = [self._units[name] for name in dict.fromkeys(place.unit for place in places)]
        columns = ("unit", *names[:6], "category", "caption", "measure")
        by_image: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.select(sql, args, units=units):
            by_image.setdefault((row[0], row[1]), []).append(dict(zip(columns, row, strict=True)))
        for place in places:
            yield by_image.get((place.unit, place.key), [])[:most]

    def place_of(self, query: Query, subset: str, key: str) -> ImagePlace | None:
        """Where an image is in a result; None if no region of it is chosen.

        Raises:
            ConfigError: no committed unit has the image.
        """
        if query.subset not in ("", subset):
            return None
        found = self._places_in([self.find_unit(subset, key)], query, None, True, 1, key)
        return found[0] if found else None

    def find_unit(self, subset: str, key: str) -> Unit:
        """The committed unit that has an image.

        Raises:
            ConfigError: no committed unit has it.
        """
        self._refresh()
        with self._lock:
            unit = self._units.get(self._places.get((subset, key), ""))
        if unit is not None:
            return unit
        unit = self.corpus.find_unit(subset, key) if subset in self.subsets() else None
        if unit is None:
            raise ConfigError(f"{subset[:40]}/{key[:80]}: no such image is committed")
        self._learn(subset, key, unit.name)
        return unit

    def _learn(self, subset: str, key: str, unit: str) -> None:
        with self._lock:
            self._places[subset, key] = unit
            while len(self._places) > _MOST_LEARNED:
                self._places.popitem(last=False)


def _readable(out: Location) -> list[str]:
    """The folders that DuckDB may read in."""
    if isinstance(out, Prefix):
        return [f"{SCHEME}://"]
    return [f"{each.rstrip('/')}/" for each in confined.folders_of(out)]


def _first_line(text: str) -> str:
    """What an error of DuckDB says; of what a file system in Python has raised, the end of its traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and "Traceback" in lines[0]:
        raised = [line for line in lines[1:] if not line.startswith((" ", "LINE", "At:"))]
        return raised[0] if raised else lines[0]
    return lines[0] if lines else text
