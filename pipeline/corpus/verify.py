"""Checks every promise of a corpus, trusting nothing in it: files may be missing, cut, swapped or garbage.

The promises:
- the commit log has every record, each as it was written, and the files that it names are what it says:
  manifests, ledgers, shards, work lists, configuration, index, statistics, plots, card;
- every image of the work list is in exactly one manifest, and `regions_in == kept + dropped` in each;
- a manifest's files have its checksums, and the ledger counts what the manifest counts;
- each sample of a shard is a kept row of the ledger, and each kept row is where its offsets say;
- the photo of each sample is the one that its evidence names, where it names one;
- every RLE fills its image, and has the area and the box that stand next to it;
- every caption obeys the text rules;
- the work list is what was written; all units are of it and of one recipe, and index and statistics are of
  these units;
- evidence is what the models said.

A corpus of a release that wrote no log is checked from its manifests on. What is in a file is looked at only
if its checksum is right.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from ...schemas.config import Text
from ...schemas.errors import REBUILD, ConfigError, IntegrityError, ParaCaptionError
from ..io import files
from ..io.confined import confine
from ..io.disk_errors import fix_of
from ..io.holding import hold
from ..io.location import Location, is_bucket, locate
from ..io.tables import TableFile
from ..stages.recipes import text_rules
from ..stages.registry import configured_kinds
from . import log, merge, reader, work_list_summary
from .adopt import FOLDERS
from .problems import Problem, guarded, what_is_wrong
from .reader import Corpus, Unit
from .records import LogUnit
from .units import unit_of
from .verify_evidence import check_evidence, list_evidence
from .verify_log import Vouched, check_named_files, check_unchanged, read_vouched
from .verify_unit import EXAMPLES, UnitHead, check_unit, describe_difference, keys_digest
from .work_list_summary import WorkList

if TYPE_CHECKING:
    import pyarrow as pa

_KEYS_AT_ONCE = 4_000_000
"""Number of keys whose hashes are held at a time."""


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
        number = len(self.problems)
        found = f"{number:,} {'problem' if number == 1 else 'problems'}"
        verdict = f"{checked}: {'complete and undamaged' if self.ok else found}"
        return "\n".join([*map(str, self.notes), *map(str, self.problems), verdict])


def verify(corpus: str | Location, deep: bool = True, workers: int = 1) -> VerifyReport:
    """Check a corpus. Reads only; memory does not grow with the number of units. Nothing leads out of it.

    Args:
        corpus: path or URL of what a build wrote.
        deep: also read every shard: checksums, samples, offsets, photo headers, masks, captions. Without it
            only manifests, file sizes, ledgers and the work list are checked.
        workers: processes that look at units at the same time.

    Raises:
        ConfigError: there is no corpus at that path.
    """
    opened = Corpus(corpus, confined=True)
    if not log.exists(opened.path):
        reader.open_corpus(corpus)
    vouched, problems = read_vouched(opened.path)
    problems += check_named_files(opened.path, vouched, deep)
    damaged = {problem.file for problem in problems}
    totals: Counter[str] = Counter()
    subsets = sorted({*opened.subsets, *vouched.units, *_planned_subsets(vouched)})
    recipes = _recipes(opened, subsets, problems)
    with ExitStack() as stack:
        run = _runner(stack, opened.path, workers)
        for subset in subsets:
            problems += _check_subset(opened.path, recipes[subset], vouched, deep, run, totals, damaged)
    problems += _check_strays(opened.path, "", vouched, ("", log.LOG, merge.PLOTS))
    problems += _check_merged(opened, subsets, vouched, damaged, deep)
    problems += check_unchanged(opened.path, vouched)
    broken = [problem for problem in problems if not problem.note]
    notes = [problem for problem in problems if problem.note]
    return VerifyReport(broken, notes, totals["units"], totals["regions"])


_Run = Callable[..., Iterator[Any]]
"""Calls a function with each of the argument tuples, and yields what it returns, in their order."""


def _runner(stack: ExitStack, out: str, workers: int) -> _Run:
    if workers <= 1:
        return lambda function, jobs: (function(*job) for job in jobs)
    if is_bucket(out) and files.scheme_of(out) == "memory":
        raise ConfigError(f"{out}: is in this process's memory, where no other can check it; give 1 worker")
    spawn = get_context("spawn")
    pool = stack.enter_context(ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(out,)))
    return lambda function, jobs: pool.map(function, *zip(*jobs, strict=True)) if jobs else iter(())


def _begin(out: str) -> None:
    """Prepare a process that checks units."""
    confine(out)
    locate(out)


class _Recipe(NamedTuple):
    """What the recipe of a subset says of its files.

    Attributes:
        subset: its name.
        rules: what the kept captions obey; None if nothing says so.
        kinds: the kind of each of its stages, by id, where one may differ from the other.
    """

    subset: str
    rules: Text | None = None
    kinds: dict[str, str] = {}


def _recipes(corpus: Corpus, subsets: list[str], problems: list[Problem]) -> dict[str, _Recipe]:
    try:
        config = corpus.config
        return {
            name: _Recipe(name, text_rules(config, name), configured_kinds(config, name)) for name in subsets
        }
    except (ConfigError, IntegrityError) as error:
        if not any(problem.file == reader.CONFIG for problem in problems):  # else the log has said so
            why = what_is_wrong(error, log.place_of(corpus.path, reader.CONFIG))
            what = (
                f"{why}, so captions are not checked; run `paracaption build CONFIG` again, which writes "
                "this file"
            )
            problems.append(Problem(reader.CONFIG, "", what))
        return {name: _Recipe(name) for name in subsets}


_RESTORE_LIST = "restore {}/plan from a copy, or use a new `out`"


def _planned_subsets(vouched: Vouched) -> set[str]:
    end = f"/{work_list_summary.FOLDER}/{work_list_summary.SUMMARY}"
    return {path.removesuffix(end) for path in vouched.files if path.endswith(end)}


def _check_subset(
    out: str,
    recipe: _Recipe,
    vouched: Vouched,
    deep: bool,
    run: _Run,
    totals: Counter[str],
    damaged: set[str],
) -> list[Problem]:
    problems: list[Problem] = []
    subset, rules, kinds = recipe
    logged = vouched.units.get(subset, {})
    unmoved = [move for move in vouched.moves.items() if move[0].startswith(f"{subset}/")]
    units = [_unit(out, subset, name, logged[name], unmoved) for name in logged]
    heads: dict[str, UnitHead] = {}
    jobs = [(unit, logged[unit.name], rules, deep) for unit in units]
    for unit, (head, found) in zip(units, run(check_unit, jobs), strict=True):
        problems += found
        totals["units"] += 1
        if head:
            heads[unit.name] = head
            totals["regions"] += head.regions
    with hold(str(work_list_summary.table_path(f"{out}/{subset}"))):
        listed = _check_work_list(out, subset, vouched, heads, damaged, problems)
        if deep and listed is not None:
            indices = {name: index for index, name in enumerate(listed.unit_names())}
            evidence, notes = list_evidence(out, subset, indices, kinds)
            jobs = [
                (out, subset, indices[unit], unit, each, kinds) for unit, each in sorted(evidence.items())
            ]
            for found in run(check_evidence, jobs):
                problems += found
            problems += notes
    return problems + _check_strays(out, f"{subset}/", vouched, (*FOLDERS, work_list_summary.FOLDER))


def _unit(out: str, subset: str, name: str, logged: LogUnit | None, unmoved: list[tuple[str, str]]) -> Unit:
    if logged is None:
        return Unit(subset, name, f"{out}/{subset}", tuple(unmoved))
    return unit_of(out, f"{subset}/{name}", logged, unmoved)


# All units together.


def _check_work_list(
    out: str,
    subset: str,
    vouched: Vouched,
    heads: dict[str, UnitHead],
    damaged: set[str],
    problems: list[Problem],
) -> WorkList | None:
    """Check a work list, and the units against it; the list, if it can be read.

    `damaged` are files that the log has shown to be: of these nothing is said again.
    """
    folder, fix = locate(out) / subset, "delete it and run `paracaption build CONFIG` again, which writes it"
    name = f"{subset}/{work_list_summary.FOLDER}/{work_list_summary.TABLE}"
    table = str(work_list_summary.table_path(folder))
    try:
        planned = work_list_summary.load_work_list(folder)
    except IntegrityError as error:
        summary = f"{subset}/{work_list_summary.FOLDER}/{work_list_summary.SUMMARY}"
        if summary not in damaged:
            what = str(error).removeprefix(f"{work_list_summary.summary_path(folder)}: ")
            problems.append(Problem(summary, "", what))
        return None
    with guarded(problems, name, fix):
        try:
            damage = work_list_summary.find_damage(planned)
            if damage is None or not planned.table:
                problems += _compare_with_list(out, planned, vouched, heads, table)
            if damage is not None and name not in damaged:
                problems.append(Problem(name, "", f"{damage}; {fix}"))
        except (ParaCaptionError, OSError, ValueError) as error:
            what = f"not readable, so nothing says which images must be there ({error})"
            problems.append(Problem(name, "", f"{what}; {fix_of(error, fix)}"))
    return planned


def _compare_with_list(
    out: str, planned: WorkList, vouched: Vouched, heads: dict[str, UnitHead], path: str
) -> list[Problem]:

    subset = planned.subset
    name = f"{subset}/{work_list_summary.FOLDER}/{work_list_summary.TABLE}"
    problems: list[Problem] = []
    missing: list[str] = []
    table = TableFile(path)
    if table.num_row_groups != planned.num_units:
        what = (
            f"has {table.num_row_groups} units, but plan.json says {planned.num_units}; restore both files "
            "from a copy"
        )
        return [Problem(name, "", what)]
    problems += _check_keys_once(table, name)
    for index in range(planned.num_units):
        unit = planned.unit_name(index)
        if unit not in vouched.units.get(subset, {}):
            missing.append(unit)
        elif (head := heads.get(unit)) is not None:
            keys = table.read_row_group(index, ["key"])["key"].to_pylist()
            if keys_digest(keys) != head.keys:
                place = f"{subset}/manifests/{unit}.json"
                logged = vouched.units[subset][unit]
                manifest = logged.manifest.place if logged is not None else place
                what = describe_difference(set(_images_of(f"{out}/{manifest}")), set(keys), "the work list")
                problems.append(Problem(manifest, "", f"{what}; {REBUILD}"))
    if missing and vouched.is_whole:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        what = (
            f"{len(missing)} of {planned.num_units} units are not committed ({shown}); run `paracaption "
            "build CONFIG` again"
        )
        problems.append(Problem(f"{subset}/manifests", "", what))
    return problems + _check_one_recipe(subset, planned, heads)


def _images_of(path: str) -> dict[str, int]:
    with suppress(ParaCaptionError, OSError):
        return reader.read_manifest(path).images
    return {}


def _check_one_recipe(subset: str, planned: WorkList, heads: dict[str, UnitHead]) -> list[Problem]:
    problems = []
    expected = set(planned.unit_names())
    for unit in sorted(heads.keys() - expected):
        what = f"the work list has no such unit; {_RESTORE_LIST.format(subset)}"
        problems.append(Problem(f"{subset}/manifests/{unit}.json", "", what))
    plans = dict(zip(planned.unit_names(), planned.plans(), strict=True))
    known = {*plans.values(), *(step.digest for step in planned.steps)}
    changed = [unit for unit, head in heads.items() if head.plan in known and head.plan != plans.get(unit)]
    if changed:
        shown = ", ".join(changed[:3])
        what = (
            f"{len(changed)} units have images that were changed or removed since ({shown}); run "
            "`paracaption build CONFIG` again, which builds these units again"
        )
        problems.append(Problem(f"{subset}/manifests", "", what))
    other = [unit for unit, head in heads.items() if head.plan not in known and unit in expected]
    if other:
        shown = ", ".join(other[:3])
        what = (
            f"{len(other)} units were built from another work list than that of plan.json ({shown}); "
            f"{_RESTORE_LIST.format(subset)}"
        )
        problems.append(Problem(f"{subset}/manifests", "", what))
    recipes = Counter(head.recipe for head in heads.values())
    if len(recipes) > 1:
        counts = ", ".join(f"{recipe[:12]}: {count} units" for recipe, count in recipes.most_common())
        what = (
            f"units of {len(recipes)} configurations ({counts}); run `paracaption build CONFIG` again, which "
            "rebuilds the older ones"
        )
        problems.append(Problem(f"{subset}/manifests", "", what))
    return problems


def _check_keys_once(table: TableFile, name: str) -> list[Problem]:
    """Whether each key is listed once. There may be millions: of a part of them a hash is held at a time."""
    import numpy as np

    groups = range(table.num_row_groups)
    parts = 1 + table.num_rows // _KEYS_AT_ONCE
    suspects: set[int] = set()
    for part in range(parts):
        hashes = [each[each % parts == part] for each in map(_hashes, (_keys(table, i) for i in groups))]
        values, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
        suspects |= set(values[counts > 1][:EXAMPLES].tolist())
    if not suspects:
        return []
    found: Counter[str] = Counter()
    for index in groups:
        keys = _keys(table, index)
        found.update(
            key
            for key, each in zip(keys.to_pylist(), _hashes(keys).tolist(), strict=True)
            if each in suspects
        )
    twice = [key for key, count in found.items() if count > 1]
    return [
        Problem(name, key, f"the work list has this image {found[key]} times; use a new `out`")
        for key in twice[:EXAMPLES]
    ]


def _keys(table: TableFile, index: int) -> pa.ChunkedArray:
    return table.read_row_group(index, ["key"])["key"]


def _hashes(keys: pa.ChunkedArray) -> Any:
    import numpy as np

    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(digests, np.uint64)


def _check_strays(out: str, prefix: str, vouched: Vouched, folders: tuple[str, ...]) -> list[Problem]:
    """Notes on files that nobody reads: temporary ones, and those of units that are not committed."""
    problems: list[Problem] = []
    names: dict[str, list[str]] = {}
    for folder in folders:
        place = f"{prefix}{folder}"
        with guarded(problems, place.rstrip("/"), "replace a link by the folder that it leads to"):
            names[place] = files.list_names(f"{out}/{place}".rstrip("/"))
    expected = {*vouched.moves.values(), *(file.place for file in vouched.files.values()), *vouched.former}
    if prefix:
        expected |= _files_of_units(prefix, vouched)
    for folder, name in ((folder, name) for folder, each in names.items() for name in each):
        path = f"{folder}/{name}".lstrip("/")
        if path in expected:
            continue
        if name.startswith(files.TEMPORARY):
            what = (
                "a temporary file: a build is running, or it was interrupted and the next build removes this "
                "file"
            )
        elif prefix and folder != f"{prefix}{work_list_summary.FOLDER}" and vouched.is_whole:
            what = "belongs to no committed unit; readers ignore it, and the build replaces it"
        else:
            continue
        problems.append(Problem(path, "", what, note=True))
    return problems


def _files_of_units(prefix: str, vouched: Vouched) -> set[str]:
    found: set[str] = set()
    for name, unit in vouched.units.get(prefix.rstrip("/"), {}).items():
        if unit is not None:
            found |= {file.place for file in unit.files()}
        else:
            places = (f"shards/{name}.tar", f"ledger/{name}.parquet", f"manifests/{name}.json")
            found |= {prefix + place for place in places}
    return found


def _check_merged(
    corpus: Corpus, subsets: list[str], vouched: Vouched, damaged: set[str], deep: bool
) -> list[Problem]:
    """Whether index and statistics, if there are any, are of the units that are committed now.

    What is in them is looked at only if nothing is wrong with these files, and with the configuration, which
    names the steps of the funnel.
    """
    fix, merged = "run `paracaption merge CONFIG`", (reader.STATS, reader.INDEX)
    problems: list[Problem] = []
    if damaged.intersection((*merged, reader.CONFIG)) or not vouched.is_whole:
        return problems
    if not any(files.exists(log.place_of(corpus.path, name)) for name in merged):
        return [Problem(reader.INDEX, "", f"not there: the corpus is not merged; {fix}", note=True)]
    stats = log.place_of(corpus.path, reader.STATS)
    with guarded(problems, reader.STATS, fix):
        try:
            problems += _compare_with_units(corpus, subsets, deep, fix)
        except ConfigError as error:  # no statistics next to an index
            problems.append(Problem(reader.STATS, "", f"{what_is_wrong(error, stats)}; {fix}"))
    return problems


def _compare_with_units(corpus: Corpus, subsets: list[str], deep: bool, fix: str) -> list[Problem]:

    stats = log.place_of(corpus.path, reader.STATS)
    try:
        summary = corpus.summary
    except IntegrityError as error:
        return [Problem(reader.STATS, "", f"{what_is_wrong(error, stats)}; {fix}")]
    problems: list[Problem] = []
    index = log.place_of(corpus.path, reader.INDEX)
    rows = None
    with guarded(problems, reader.INDEX, fix):
        if deep and files.sha256_of(index) != summary.index.sha256:
            problems.append(
                Problem(reader.INDEX, "", f"its SHA-256 is not the one that {reader.STATS} records; {fix}")
            )
        else:
            rows = TableFile(index).num_rows
    kept = 0
    for subset in sorted({*subsets, *summary.subsets}):
        try:
            now = merge.count_subset(corpus, subset)
        except (ParaCaptionError, OSError):
            return problems  # reported above
        kept += now.kept
        then = summary.subsets.get(subset)
        if then is None or then.counts != now:
            problems.append(
                Problem(reader.STATS, subset, f"does not describe the units that are committed now; {fix}")
            )
    if rows is not None and rows != kept:
        problems.append(Problem(reader.INDEX, "", f"has {rows} rows, {kept} regions are kept; {fix}"))
    return problems
