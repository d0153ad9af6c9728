"""The work list of a subset: its images in a stable order, cut into units. Same input, same list.

It lies in `OUT/<subset>/plan/`. `plan.parquet` has a row per image and a row group per unit, so that a worker
reads its own unit and nothing else. `plan.json` has a digest of the content, which every manifest names (as
`plan`), and a fingerprint of the source files: while that is unchanged, a resume does not parse the sources.

The digest covers what the sources declare: keys, names, annotations, lengths, lasting problems. It leaves out
where files lie and which were missing, so that a photo that is found later does not change the list.

A list grows with its sources (`growth.py`): what was planned keeps its place, new images make new units. Each
such change is a step of the list, with a digest of its own, and a unit's manifest names the step that planned
or changed it.

Each row has a check over all that is in it; the summary has one over itself, and the table's SHA-256. So a
damaged list is never another list: it is made again from the sources. Early releases wrote none of these.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError, IntegrityError
from ..io import files
from ..io.activity import NOW
from ..io.benchmark_photos import LIST_VERSION
from ..io.location import Location, locate
from ..io.store import store_of
from ..sources.earlier_keys import EarlierKeys
from ..sources.file_names import HIDDEN
from ..sources.protocols import CatalogEntry, SourceOptions
from ..sources.registry import SubsetSource, complete
from . import log as commit_log
from . import reader, work_list_table
from . import work_list_recovery as recovery
from .growth import (
    Growth,
    difference,
    grow,
    moved_sources,
    refuse_other_options,
    refuse_other_roles,
    with_known_photos,
)
from .owner import Owner, own_or
from .records import Planned
from .work_list_summary import (
    FOLDER,
    SUMMARY,
    TABLE,
    Step,
    WorkList,
    check_of_summary,
    fields_of,
    find_damage,
    find_work_list,
    first_steps,
    summary_path,
    table_path,
)
from .work_list_table import UnitReader

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """A work list, and what a build would publish of it.

    Attributes:
        work_list: as it is to be.
        table: where its table lies if it is to be published; None if the one on disk is current.
        growth: what is different in the sources since the list on disk was made.
    """

    work_list: WorkList
    table: Path | None = None
    growth: Growth = Growth()

    def read_unit(self, index: int) -> list[CatalogEntry]:
        """The images of a unit, published or not; see the function `read_unit`."""
        if self.table is None:
            return self.work_list.read_unit(index)
        return work_list_table.read_unit(self.table, index)


def is_current(
    work_list: WorkList, source: SubsetSource, config: BuildConfig, limit: int | None = None
) -> bool:
    """Whether `make_work_list` would return this list without parsing the sources again.

    Raises:
        ConfigError: the sources are not where the configuration says.
    """
    is_whole = not work_list.table or find_damage(work_list) is None
    return is_whole and _matches(work_list, _fingerprint(source, limit), config)


def _matches(work_list: WorkList, fingerprint: dict[str, str], config: BuildConfig) -> bool:
    same = work_list.fingerprint == fingerprint and work_list.images_per_shard == config.images_per_shard
    same = same and (not work_list.sources or work_list.sources == _sources_of(config, work_list.subset))
    leave_out(config, work_list)
    return same and files.exists(table_path(work_list.folder))


def leave_out(config: BuildConfig, work_list: WorkList | None) -> bool:
    """Whether photos of the published benchmarks are left out of a subset; a planned one goes on as it was.

    Raises:
        ConfigError: the configuration wants it otherwise than it was planned.
    """
    wanted = config.benchmarks.leave_out
    if work_list is None:
        return wanted is not False
    planned = work_list.benchmarks > 0
    if wanted is not None and wanted is not planned:
        was = "without the benchmarks' photos" if planned else "with all photos"
        raise ConfigError(
            f"benchmarks.leave_out: {str(wanted).lower()}, but the work list of {work_list.subset} was made "
            f"{was}; "
            "remove the key, or use a new `out`"
        )
    return planned


def plan(
    source: SubsetSource, config: BuildConfig, folder: str | Location, scratch: Path, limit: int | None = None
) -> Plan:
    """List a subset's images and cut them into units, or find that the list on disk is still current.

    Calling it again, at any time, gives the same list. If the sources have changed, the list on disk grows.
    If it is damaged, it is made again. Nothing is written but tables in `scratch`.

    Args:
        source: of the subset.
        config: of the build; `images_per_shard` cuts the units.
        folder: of the subset, `OUT/<subset>`.
        scratch: an empty folder.
        limit: list only the first N images; None lists all.

    Raises:
        ConfigError: the sources cannot be listed, or `benchmarks.leave_out` is not as planned.
        IntegrityError: the sources are read in another way than those that units were committed of, or the
            list on disk cannot grow; says how.
    """
    fingerprint = _fingerprint(source, limit)
    old = find_work_list(folder)
    damage = None
    if old is None and files.exists(summary_path(folder)):
        log.warning("%s: damaged; the work list is made again from the sources", summary_path(folder))
    elif old is not None:
        damage = find_damage(old)
        if damage is None and _matches(old, fingerprint, config):
            return Plan(old)
        if damage is not None:
            log.warning("%s: %s; it is made again from the sources", table_path(folder), damage)
        if old.sources and reader.list_units(old.folder):
            refuse_other_roles(old, _sources_of(config, old.subset), str(summary_path(folder)))
    fresh = scratch / TABLE
    source.leave_out = leave_out(config, old)
    steps = recovery.find_steps(folder, old) if old is None or damage is not None else []
    credits = old is None or old.credits  # planned without, it goes on so: units built again are the same

    def list_images(**keys: Any) -> WorkList:
        entries = NOW.after(islice(source.catalog(**keys), limit), lambda entry: entry.key)
        if old is not None and damage is None and not old.steps:
            if old.images_per_shard == config.images_per_shard:
                entries = with_known_photos(entries, old, fingerprint)
        return _write(entries, source.subset, config, fingerprint, fresh, source.leave_out, credits)

    made = list_images()
    if steps:
        early = recovery.earlier_keys(folder, fingerprint)
        return _recovered(old, list_images(earlier=early), steps, folder, fresh, config)
    if old is None and source.leave_out and config.benchmarks.leave_out is None:
        if (committed := _committed_plans(folder)) and made.digest not in committed:
            source.leave_out = False  # of an older release, whose work list is lost: planned with all photos
            made = list_images()
    if old is None or (old.digest == made.digest and not old.steps):
        return Plan(msgspec.structs.replace(made, folder=str(folder)), fresh)
    if not old.steps and _has_other_keys_now(fresh, made):
        made = list_images(early_keys=True)
        if old.digest == made.digest:
            return Plan(msgspec.structs.replace(made, folder=str(folder)), fresh)
    if refused := difference(old, made, str(table_path(folder)), damage):
        raise IntegrityError(refused)
    list_images(earlier=_keys_of(old, made))
    return _grown(old, made, fresh, config)


def _keys_of(old: WorkList, made: WorkList) -> EarlierKeys:
    # The lists of a source that was moved are none of the old places, but are not new either.
    moved = made.fingerprint if moved_sources(old, made.sources) else {}
    earlier, reader = EarlierKeys([*old.fingerprint, *moved]), UnitReader(old.table_path)
    for index in range(old.num_units):
        for entry in reader.read(index):
            earlier.add(entry.key, entry.file_name)
    return earlier


def _grown(old: WorkList, made: WorkList, fresh: Path, config: BuildConfig) -> Plan:
    """The list on disk with what its sources have today.

    Args:
        old: the list on disk.
        made: as if the sources were planned for the first time.
        fresh: table of the sources' images, with the keys that the old ones had.
        config: of the build.
    """
    table = fresh.with_name(f"grown-{fresh.name}")
    grown = grow(old, fresh, made.fingerprint, table)
    refuse_other_options(old, made.sources, grown.growth, str(summary_path(old.folder)))
    last = grown.steps[-1] if grown.steps else first_steps(old)[-1]
    work_list = msgspec.structs.replace(
        made,
        digest=last.digest,
        num_images=grown.written.num_images,
        num_units=grown.written.num_units,
        photo_bytes=grown.written.photo_bytes,
        table=grown.written.sha256,
        steps=grown.steps,
        gone=grown.growth.gone,
        gone_examples=grown.growth.examples["gone"],
        folder=old.folder,
    )
    return Plan(msgspec.structs.replace(work_list, check=check_of_summary(work_list)), table, grown.growth)


def _recovered(
    old: WorkList | None,
    made: WorkList,
    steps: list[Step],
    folder: str | Location,
    fresh: Path,
    config: BuildConfig,
) -> Plan:
    """A list that has grown and is damaged, made again from the sources and the committed units, and grown.

    Args:
        old: its summary; None if that is damaged, too.
        made: as if the sources were planned for the first time.
        steps: how it has grown.
        folder: of the subset.
        fresh: table of the sources' images, with the keys that the old ones had.
        config: of the build.
    """
    table = str(table_path(folder))
    if old is not None and (refused := difference(old, made, table, None)):
        raise IntegrityError(refused)
    if old is not None and old.sources != made.sources:
        raise IntegrityError(
            f"{table}: damaged, and the sources are configured otherwise than when it was made; build with "
            f"those in {reader.CONFIG} of the corpus first, or restore {FOLDER}/ from a copy"
        )
    again = fresh.parent / "recovered"
    store_of(again).make_folder(f"{again}/{FOLDER}")
    written = recovery.write_table(made, steps, folder, fresh, again / FOLDER / TABLE)
    log.warning(
        "%s: made again from the sources and the committed units. If files of the sources may have changed, "
        "run `paracaption build CONFIG --check-files`",
        table,
    )
    earlier = msgspec.structs.replace(
        made,
        digest=steps[-1].digest,
        num_images=written.num_images,
        num_units=written.num_units,
        photo_bytes=written.photo_bytes,
        table=written.sha256,
        steps=steps,
        folder=str(again),
    )
    grown = _grown(earlier, made, fresh, config)
    return grown._replace(work_list=msgspec.structs.replace(grown.work_list, folder=str(folder)))


def publish(
    made: Plan, folder: str | Location, owner: Owner, removed: int = 0, removed_from: Sequence[str] = ()
) -> None:
    """Make a plan the subset's work list, in `plan/` of its folder.

    Args:
        made: the plan; nothing is written if it is the list on disk.
        folder: of the subset, `OUT/<subset>`.
        owner: of the corpus.
        removed: number of images that are removed on request by it, and were not before.
        removed_from: names of the units that have them.
    """
    if made.table is None:
        return
    subset = locate(folder).name
    stored = msgspec.structs.replace(made.work_list, folder="")
    stored = msgspec.structs.replace(stored, check=check_of_summary(stored))
    text = msgspec.json.format(msgspec.json.encode(fields_of(stored), order="sorted"), indent=1) + b"\n"
    table = owner.copy(f"{subset}/{FOLDER}/{TABLE}", made.table)
    summary = owner.write(f"{subset}/{FOLDER}/{SUMMARY}", text)
    owner.append(
        Planned(
            subset=subset,
            plan=stored.digest,
            units=stored.num_units,
            images=stored.num_images,
            files=[table, summary],
            added=made.growth.added,
            changed=made.growth.changed,
            gone=made.growth.gone,
            removed=removed,
            removed_from=list(removed_from),
        )
    )


def make_work_list(
    source: SubsetSource,
    config: BuildConfig,
    folder: str | Location,
    limit: int | None = None,
    owner: Owner | None = None,
) -> WorkList:
    """Plan a subset and publish its work list; see `plan` for what it raises.

    Args:
        source: of the subset.
        config: of the build.
        folder: of the subset, `OUT/<subset>`.
        limit: list only the first N images; None lists all.
        owner: of the corpus; None takes the corpus over if there is something to write.
    """
    with tempfile.TemporaryDirectory(prefix="paracaption-") as scratch:
        made = plan(source, config, folder, Path(scratch), limit)
        if made.table is not None:
            with own_or(owner, str(locate(folder).parent), "plan") as owner:
                publish(made, folder, owner)
    return made.work_list


def _fingerprint(source: SubsetSource, limit: int | None) -> dict[str, str]:
    return source.fingerprint() | ({} if limit is None else {"limit": str(limit)})


def _has_other_keys_now(table: Path, made: WorkList) -> bool:
    """Whether early releases would have given out other keys for some of its images."""
    units = (work_list_table.read_unit(table, index) for index in range(made.num_units))
    return any(entry.key.startswith(f"x{HIDDEN}") for unit in units for entry in unit)


def _write(
    entries: Iterator[CatalogEntry],
    subset: str,
    config: BuildConfig,
    fingerprint: dict[str, str],
    path: Path,
    benchmarks: bool,
    credits: bool,
) -> WorkList:
    """Write the table, and tell what the summary will hold."""
    size = config.images_per_shard
    written = work_list_table.write_table(entries, subset, size, path, credits)
    made = WorkList(
        subset,
        written.digest,
        written.num_images,
        written.num_units,
        size,
        written.photo_bytes,
        fingerprint,
        sources=_sources_of(config, subset),
        table=written.sha256,
        benchmarks=LIST_VERSION if benchmarks else 0,
        credits=credits,
    )
    return msgspec.structs.replace(made, check=check_of_summary(made))


def _committed_plans(folder: str | Location) -> set[str]:
    """Digests of the work lists that the committed units of a subset are of."""
    out, _, subset = str(folder).rpartition("/")
    return {unit.plan for name, unit in commit_log.read_units(out).items() if name.startswith(f"{subset}/")}


def _sources_of(config: BuildConfig, subset: str) -> list[dict[str, Any]]:
    """The sources of a subset with every option that decides which files are read, and as what.

    What every kind of source has, as a license, is about the files and decides nothing.
    """
    about = SourceOptions.model_fields.keys()
    entries = complete(config).subsets[subset].sources
    found = [{name: value for name, value in each.items() if name not in about} for each in entries]
    return msgspec.json.decode(msgspec.json.encode(found, enc_hook=str))  # as it comes back from the summary
