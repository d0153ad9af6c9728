"""Checks every promise of a corpus, trusting nothing in it: files may be missing, cut, swapped or garbage.

The promises:
- every image of the work list is in exactly one manifest, and `regions_in == kept + dropped` in each;
- a manifest's files have its checksums, and the ledger counts what the manifest counts;
- each sample of a shard is a kept row of the ledger, and each kept row is where its offsets say;
- the photo of each sample is the one that its evidence names, where it names one;
- every RLE fills its image, and has the area and the box that stand beside it;
- every caption obeys the text rules;
- the work list is what was written; all units are of it and of one recipe, and index and statistics are of
  these units.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.config import Text
from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from ..io import files
from . import merge, reader, work_list
from .reader import Corpus
from .verify_unit import (
    EXAMPLES,
    REBUILD,
    Problem,
    UnitHead,
    check_unit,
    describe_difference,
    keys_digest,
    sha256_of,
)
from .work_list import WorkList

if TYPE_CHECKING:
    import pyarrow as pa


class VerifyReport(NamedTuple):
    """What `verify` found.

    Attributes:
        problems: broken promises, in the order of subsets and units.
        notes: what breaks no promise.
        units, regions: how many were checked. Dropped regions count, too.
    """

    problems: list[Problem]
    notes: list[Problem]
    units: int
    regions: int

    @property
    def ok(self) -> bool:
        """No promise is broken."""
        return not self.problems

    def text(self) -> str:
        """A line for each note and problem, and a verdict."""
        checked = f"{self.units:,} units, {self.regions:,} regions checked"
        verdict = (
            f"{checked}: every promise holds" if self.ok else f"{checked}: {len(self.problems):,} problems"
        )
        return "\n".join([*map(str, self.notes), *map(str, self.problems), verdict])


def verify(corpus: str | Path, deep: bool = True, workers: int = 1) -> VerifyReport:
    """Check a corpus. Reads only; memory does not grow with the number of units.

    Args:
        corpus: path of the folder that a build wrote.
        deep: also read every shard: checksums, samples, offsets, photo headers, masks, captions. Without it
            only manifests, file sizes, ledgers and the work list are checked.
        workers: processes that look at units at the same time.

    Raises:
        ConfigError: there is no corpus at that path, or the path is a URL.
    """
    if files.is_url(str(corpus)):
        raise ConfigError(f"{corpus}: verify reads local files; mount the corpus, and name its folder")
    opened, out = reader.open_corpus(corpus), Path(corpus)
    problems: list[Problem] = []
    rules = _text_rules(opened, problems)
    totals: Counter[str] = Counter()
    for subset in opened.subsets:
        units = opened.units(subset)
        jobs = [(out, unit, rules, deep) for unit in units]
        heads: dict[str, UnitHead] = {}
        for unit, (head, found) in zip(units, _check_units(jobs, workers), strict=True):
            problems += found
            totals["units"] += 1
            if head:
                heads[unit.name] = head
                totals["regions"] += head.regions
        problems += _check_work_list(out, subset, heads)
        problems += _check_strays(out, subset, {unit.name for unit in units})
    problems += _check_merged(opened, deep)
    broken = [problem for problem in problems if not problem.note]
    return VerifyReport(
        broken, [problem for problem in problems if problem.note], totals["units"], totals["regions"]
    )


def _check_units(jobs: list[tuple], workers: int) -> Iterable[tuple[UnitHead | None, list[Problem]]]:
    if workers <= 1 or len(jobs) <= 1:
        yield from (check_unit(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(check_unit, *zip(*jobs, strict=True))


def _text_rules(corpus: Corpus, problems: list[Problem]) -> Text | None:
    try:
        return corpus.config.text
    except (ConfigError, IntegrityError) as error:
        problems.append(Problem(reader.CONFIG, "", f"{error}; captions are not checked without it"))
        return None


# All units together.


def _check_work_list(out: Path, subset: str, heads: dict[str, UnitHead]) -> list[Problem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{subset}/plan/{work_list.TABLE}"
    try:
        planned = work_list.load_work_list(out / subset)
        with pq.ParquetFile(work_list.table_path(out / subset)) as table:
            problems = _compare_with_list(out, subset, heads, planned, table)
    except (IntegrityError, OSError, pa.ArrowException, ValueError) as error:
        fix = "build again, which makes it anew"
        return [
            Problem(name, "", f"not readable, so nothing says which images must be there ({error}); {fix}")
        ]
    if damage := work_list.find_damage(planned):
        problems.append(Problem(name, "", f"{damage}; build again, which makes it anew"))
    return problems


def _compare_with_list(
    out: Path, subset: str, heads: dict[str, UnitHead], planned: WorkList, table: Any
) -> list[Problem]:
    name = f"{subset}/plan/{work_list.TABLE}"
    problems: list[Problem] = []
    if table.num_row_groups != planned.num_units:
        what = f"has {table.num_row_groups} units, plan.json says {planned.num_units}; restore them"
        return [Problem(name, "", what)]
    problems += _check_keys_once(table, name)
    missing: list[str] = []
    for index in range(planned.num_units):
        unit = planned.unit_name(index)
        head = heads.get(unit)
        if head is None:
            missing.append(unit)
            continue
        keys = table.read_row_group(index, columns=["key"])["key"].to_pylist()
        if keys_digest(keys) != head.keys:
            found = set(_images_of(out / subset / "manifests" / f"{unit}.json"))
            what = f"{describe_difference(found, set(keys), 'the plan')}; {REBUILD}"
            problems.append(Problem(f"{subset}/manifests/{unit}.json", "", what))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        what = f"{len(missing)} of {planned.num_units} units are not committed ({shown}); run the build again"
        problems.append(Problem(f"{subset}/manifests", "", what))
    return problems + _check_one_recipe(subset, planned, heads)


def _images_of(path: Path) -> dict[str, int]:
    with suppress(ParaCaptionError, OSError):
        return reader.read_manifest(path).images
    return {}


def _check_one_recipe(subset: str, planned: WorkList, heads: dict[str, UnitHead]) -> list[Problem]:
    problems = []
    expected = set(planned.unit_names())
    for unit in sorted(heads.keys() - expected):
        what = "of no unit of the plan; delete it if the plan is right"
        problems.append(Problem(f"{subset}/manifests/{unit}.json", "", what))
    other = [unit for unit, head in heads.items() if head.plan != planned.digest and unit in expected]
    if other:
        shown = ", ".join(other[:3])
        what = f"{len(other)} units are of another plan than plan.json's ({shown}); use a new `out`"
        problems.append(Problem(f"{subset}/manifests", "", what))
    recipes = Counter(head.recipe for head in heads.values())
    if len(recipes) > 1:
        counts = ", ".join(f"{recipe[:12]}: {count} units" for recipe, count in recipes.most_common())
        what = f"{len(recipes)} recipes ({counts}); run the build again, which renews the units of the others"
        problems.append(Problem(f"{subset}/manifests", "", what))
    return problems


def _check_keys_once(table: Any, name: str) -> list[Problem]:
    """Whether each key is listed once. Only eight bytes of a hash per key are held: there may be millions."""
    import numpy as np

    groups = range(table.num_row_groups)
    hashes = [_hashes(table.read_row_group(index, columns=["key"])["key"]) for index in groups]
    values, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return []
    found: Counter[str] = Counter()
    for index, each in enumerate(hashes):
        if suspects.intersection(each.tolist()):
            found.update(table.read_row_group(index, columns=["key"])["key"].to_pylist())
    twice = [key for key, count in found.items() if count > 1]
    return [Problem(name, key, f"is planned {found[key]} times; use a new `out`") for key in twice[:EXAMPLES]]


def _hashes(keys: pa.ChunkedArray) -> Any:
    import numpy as np

    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(digests, np.uint64)


def _check_strays(out: Path, subset: str, units: set[str]) -> list[Problem]:
    problems = []
    for folder, suffix in (("shards", ".tar"), ("ledger", ".parquet"), ("manifests", ".json")):
        for path in sorted((out / subset / folder).glob("*")):
            if path.name.startswith(files.TEMPORARY):
                what = "left by a run that ended early, or a build is running; the next build removes it"
            elif path.suffix != suffix or path.stem not in units:
                what = "of no committed unit; readers ignore it, and the build replaces it"
            else:
                continue
            problems.append(Problem(str(path.relative_to(out)), "", what, note=True))
    return problems


def _check_merged(corpus: Corpus, deep: bool) -> list[Problem]:
    """Whether index and statistics, if there are any, are of the units that are committed now."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fix, out = "run `paracaption merge`", Path(corpus.path)
    found = [name for name in (reader.STATS, reader.INDEX) if (out / name).exists()]
    if not found:
        return [Problem(reader.INDEX, "", f"not there: the corpus is not merged; {fix}", note=True)]
    try:
        summary = corpus.summary
        with pq.ParquetFile(out / reader.INDEX) as index:
            rows = index.metadata.num_rows
    except (ParaCaptionError, OSError, pa.ArrowException) as error:
        name = reader.STATS if isinstance(error, ParaCaptionError) else reader.INDEX
        return [Problem(name, "", f"not readable ({error}); {fix}")]
    problems: list[Problem] = []
    kept = 0
    for subset in corpus.subsets:
        try:
            now = merge.count_subset(corpus, subset)
        except (IntegrityError, OSError):
            return problems  # reported above
        kept += now.kept
        then = summary.subsets.get(subset)
        if then is None or then.counts != now:
            problems.append(Problem(reader.STATS, subset, f"not of the units committed now; {fix}"))
    if deep and sha256_of(out / reader.INDEX) != summary.index.sha256:
        problems.append(Problem(reader.INDEX, "", f"its SHA-256 is not that of {reader.STATS}; {fix}"))
    elif rows != kept:
        problems.append(Problem(reader.INDEX, "", f"has {rows} rows, {kept} regions are kept; {fix}"))
    return problems
