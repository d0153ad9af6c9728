"""The work list of a subset: its images in a stable order, cut into units. Same input, same list.

It lies in `OUT/<subset>/plan/`. `plan.parquet` has a row per image and a row group per unit, so that a worker
reads its own unit and nothing else. `plan.json` has a digest of the content, which every manifest names (as
`plan`), and a fingerprint of the source files: while that is unchanged, a resume does not parse the sources.

The digest covers what the sources declare: keys, names, annotations, lengths, lasting problems. It leaves out
where files lie and which were missing, so that a photo that is found later does not change the list.

Each row has a check over all that is in it; the summary has one over itself, and the table's SHA-256. So a
damaged list is never another list: it is made again from the sources. Early releases wrote none of these.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.reasons import Reason
from ...schemas.records import Blob
from ..io import files
from ..io.activity import NOW
from ..io.benchmark_photos import LIST_VERSION
from ..sources.file_names import HIDDEN
from ..sources.protocols import CatalogEntry, SourceOptions
from ..sources.registry import SubsetSource, complete, option_texts
from . import log as commit_log
from . import work_list_table
from .owner import Owner, own_or
from .reader import list_units
from .records import Planned
from .work_list_table import VERSION, Written

log = logging.getLogger(__name__)

FOLDER = "plan"
TABLE = "plan.parquet"
SUMMARY = "plan.json"


class WorkList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the driver knows of a work list. The images are in the table next to it.

    Attributes:
        subset: name of the subset.
        digest: of the images in their order and of `images_per_shard`.
        num_images: number of images in all units.
        num_units: number of units: `unit_name(0)` to `unit_name(num_units - 1)`.
        images_per_shard: number of images in each unit but the last, which has what is left.
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

    def unit_name(self, index: int) -> str:
        """Name of a unit. Names sort by the index."""
        return f"{self.subset}-{index:06d}"

    def unit_names(self) -> list[str]:
        """Names of all units in order."""
        return [self.unit_name(index) for index in range(self.num_units)]

    def read_unit(self, index: int) -> list[CatalogEntry]:
        """The images of a unit; see the function `read_unit`."""
        return read_unit(self.folder, index)

    def is_current(self, source: SubsetSource, config: BuildConfig, limit: int | None = None) -> bool:
        """Whether `make_work_list` would return this list without parsing the sources again.

        Raises:
            ConfigError: the sources are not where the configuration says.
        """
        is_whole = not self.table or find_damage(self) is None
        return is_whole and self._matches(_fingerprint(source, limit), config)

    def _matches(self, fingerprint: dict[str, str], config: BuildConfig) -> bool:
        same = self.fingerprint == fingerprint and self.images_per_shard == config.images_per_shard
        same = same and (not self.sources or self.sources == _sources_of(config, self.subset))
        leave_out(config, self)
        return same and files.exists(table_path(self.folder))


def table_path(folder: str | Path) -> Path:
    """Where the table of the images lies in a subset's folder."""
    return Path(folder) / FOLDER / TABLE


def summary_path(folder: str | Path) -> Path:
    """Where the work list itself lies in a subset's folder; it exists only once the table is complete."""
    return Path(folder) / FOLDER / SUMMARY


class Plan(NamedTuple):
    """A work list, and where its table lies if it is to be published; None if the one on disk is current."""

    work_list: WorkList
    table: Path | None = None

    def read_unit(self, index: int) -> list[CatalogEntry]:
        """The images of a unit, published or not; see the function `read_unit`."""
        if self.table is None:
            return self.work_list.read_unit(index)
        return work_list_table.read_unit(self.table, index)


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
    source: SubsetSource, config: BuildConfig, folder: str | Path, scratch: Path, limit: int | None = None
) -> Plan:
    """List a subset's images and cut them into units, or find that the list on disk is still current.

    Calling it again, at any time, gives the same list. A list on disk that is damaged is made again. Nothing
    is written but a table in `scratch`.

    Args:
        source: of the subset.
        config: of the build; `images_per_shard` cuts the units.
        folder: of the subset, `OUT/<subset>`.
        scratch: an empty folder.
        limit: list only the first N images; None lists all.

    Raises:
        ConfigError: the sources cannot be listed, or `benchmarks.leave_out` is not as planned.
        IntegrityError: the sources have changed since the list on disk was made, or are read in another way
            than those that units were committed of; says how.
    """
    fingerprint = _fingerprint(source, limit)
    old = find_work_list(folder)
    damage = None
    if old is None and files.exists(summary_path(folder)):
        log.warning("%s: damaged; the work list is made again from the sources", summary_path(folder))
    elif old is not None:
        damage = find_damage(old)
        if damage is None and old._matches(fingerprint, config):
            return Plan(old)
        if damage is not None:
            log.warning("%s: %s; it is made again from the sources", table_path(folder), damage)
        _refuse_other_roles(old, config)
    fresh = scratch / TABLE
    source.leave_out = leave_out(config, old)
    credits = old is None or old.credits  # planned without, it goes on so: units built again are the same

    def list_images(**early: bool) -> WorkList:
        entries = NOW.after(islice(source.catalog(**early), limit), lambda entry: entry.key)
        if old is not None and damage is None and old.images_per_shard == config.images_per_shard:
            entries = _with_known_photos(entries, old, fingerprint)
        return _write(entries, source.subset, config, fingerprint, fresh, source.leave_out, credits)

    made = list_images()
    if old is None and source.leave_out and config.benchmarks.leave_out is None:
        if (committed := _committed_plans(folder)) and made.digest not in committed:
            source.leave_out = False  # of an older release, whose work list is lost: planned with all photos
            made = list_images()
    if old is not None and old.digest != made.digest and _has_other_keys_now(fresh, made):
        made = list_images(early_keys=True)
    if old is not None and old.digest != made.digest:
        raise IntegrityError(_difference(table_path(folder), fresh, old, made, damage))
    return Plan(msgspec.structs.replace(made, folder=str(folder)), fresh)


def publish(made: Plan, folder: str | Path, owner: Owner) -> None:
    """Make a plan the subset's work list, in `plan/` of its folder."""
    if made.table is None:
        return
    subset = Path(folder).name
    stored = msgspec.structs.replace(made.work_list, folder="")
    text = msgspec.json.format(msgspec.json.encode(_fields(stored), order="sorted"), indent=1) + b"\n"
    table = owner.copy(f"{subset}/{FOLDER}/{TABLE}", made.table)
    summary = owner.write(f"{subset}/{FOLDER}/{SUMMARY}", text)
    owner.append(
        Planned(
            subset=subset,
            plan=stored.digest,
            units=stored.num_units,
            images=stored.num_images,
            files=[table, summary],
        )
    )


def make_work_list(
    source: SubsetSource,
    config: BuildConfig,
    folder: str | Path,
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
            with own_or(owner, str(Path(folder).parent), "plan") as owner:
                publish(made, folder, owner)
    return made.work_list


def _fingerprint(source: SubsetSource, limit: int | None) -> dict[str, str]:
    return source.fingerprint() | ({} if limit is None else {"limit": str(limit)})


def _has_other_keys_now(table: Path, made: WorkList) -> bool:
    """Whether early releases would have given out other keys for some of its images."""
    units = (work_list_table.read_unit(table, index) for index in range(made.num_units))
    return any(entry.key.startswith(f"x{HIDDEN}") for unit in units for entry in unit)


def _with_known_photos(
    entries: Iterator[CatalogEntry], old: WorkList, fingerprint: dict[str, str]
) -> Iterator[CatalogEntry]:
    """The entries, where a photo that the list on disk has in one of today's folders stays where it was.

    That it is not listed now may mean that its folder is away. Who reads the photo finds out, and a unit of
    which too many are missing is held back. A plan without it would commit the unit as if it had never been.
    """
    known: list[CatalogEntry] = []
    for number, entry in enumerate(entries):
        index, place = divmod(number, old.images_per_shard)
        if place == 0:
            known = old.read_unit(index) if index < old.num_units else []
        before = known[place] if place < len(known) and known[place].key == entry.key else None
        is_missing = entry.drop is not None and entry.drop.reason is Reason.PHOTO_MISSING
        photo = before.photo if is_missing and before is not None and before.drop is None else None
        if photo is not None and photo.length is None and entry.annotation is not None:
            if any(photo.url.startswith(f"{each.rstrip('/')}/") for each in fingerprint):
                entry = msgspec.structs.replace(entry, photo=photo, drop=None)
        yield entry


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
    return msgspec.structs.replace(made, check=_check_of_summary(made))


def _committed_plans(folder: str | Path) -> set[str]:
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


def _refuse_other_roles(old: WorkList, config: BuildConfig) -> None:
    """Refuse the same places in other roles or in another order than those that units were committed of.

    Places that are new, or are gone, are no reason: photos are found later or elsewhere.

    Raises:
        IntegrityError: they are; shows both.
    """
    roles = [option_texts(sources) for sources in (old.sources, _sources_of(config, old.subset))]
    common = {place for _, place in roles[0]} & {place for _, place in roles[1]}
    was, now = ([each for each in found if each[1] in common] for found in roles)
    if not old.sources or was == now or not list_units(old.folder):
        return
    changed = [
        f"{option} was {', '.join(before)}, is {', '.join(after)}"
        for option in sorted({name for name, _ in was + now})
        if (before := _of_role(was, option)) != (after := _of_role(now, option))
    ]
    raise IntegrityError(
        f"{summary_path(old.folder)}: the committed units were read with other settings: "
        f"{'; '.join(changed)}; change this back, or use a new `out`"
    )


def _of_role(found: list[tuple[str, str]], option: str) -> list[str]:
    return [value for name, value in found if name == option] or ["none of these"]


def find_work_list(folder: str | Path) -> WorkList | None:
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


def load_work_list(folder: str | Path) -> WorkList:
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
        raise IntegrityError(
            f"{path}: not a work list ({error}); run `paracaption build CONFIG` again, or delete it if that "
            "does not help"
        ) from error
    return _opened(found, folder)


def _decode_summary(data: bytes) -> WorkList:
    found = msgspec.json.decode(data, type=WorkList)
    if found.check and found.check != _check_of_summary(found):
        raise msgspec.ValidationError("its checksum is not that of its content")
    return found


def _check_of_summary(work_list: WorkList) -> str:
    content = msgspec.structs.replace(work_list, check="", folder="")
    return hashlib.sha256(msgspec.json.encode(_fields(content), order="sorted")).hexdigest()[:16]


def _fields(work_list: WorkList) -> dict[str, Any]:
    """The fields of the summary. One that early releases did not know is left out when empty."""
    fields = msgspec.structs.asdict(work_list)
    return {name: value for name, value in fields.items() if value or name not in ("benchmarks", "credits")}


def _opened(found: WorkList, folder: str | Path) -> WorkList:
    path = summary_path(folder)
    if found.version != VERSION:
        raise IntegrityError(
            f"{path}: work list of version {found.version}, expected {VERSION}; use a new `out`"
        )
    return msgspec.structs.replace(found, folder=str(folder))


def read_unit(folder: str | Path, index: int) -> list[CatalogEntry]:
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


def find_pending_units(work_list: WorkList, recipe: str) -> list[int]:
    """Indices of the units to build, in order.

    Those are units that are not committed, that were committed with another recipe, or of which a file is
    gone or has another size than when it was committed.

    Args:
        work_list: as it was read from a subset's folder.
        recipe: digest of the recipe.

    Raises:
        IntegrityError: a committed unit is of another work list, or of no unit of this one; or the commit
            log, or a manifest of a corpus without a log, cannot be read.
    """
    out, _, subset = work_list.folder.rpartition("/")
    units = {name: unit for name, unit in commit_log.read_units(out).items() if name.startswith(f"{subset}/")}
    pending = []
    for index in range(work_list.num_units):
        unit = units.pop(f"{subset}/{work_list.unit_name(index)}", None)
        if unit is None:
            pending.append(index)
            continue
        if unit.plan != work_list.digest:
            raise IntegrityError(
                f"{out}/{unit.manifest.path}: this unit was built from the work list {unit.plan[:12]}, "
                f"but the corpus now has {work_list.digest[:12]}; restore {subset}/{FOLDER} from a "
                "copy, or use a new `out`"
            )
        if unit.recipe != recipe or not commit_log.is_whole(out, unit):
            pending.append(index)
    if units:
        path = f"{out}/{units[min(units)].manifest.path}"
        raise IntegrityError(
            f"{path}: the work list has no such unit; restore {subset}/{FOLDER} from a copy, or use a new "
            "`out`"
        )
    return pending


def _difference(old_path: Path, new_path: Path, old: WorkList, new: WorkList, damage: str | None) -> str:
    """The message that refuses a resume: in what the two lists differ, with examples."""
    head = f"{old_path}: the sources or the configuration have changed since this work list was made: "
    fix = "; change them back, or use a new `out`"
    if old.images_per_shard != new.images_per_shard:
        return f"{head}images_per_shard was {old.images_per_shard}, is now {new.images_per_shard}{fix}"
    limits = [each.fingerprint.get("limit", "none") for each in (old, new)]
    if limits[0] != limits[1]:
        head += f"the limit of images was {limits[0]}, is now {limits[1]}; "
    if damage is not None:
        return f"{head}the images that differ cannot be named, because the old work list is {damage}{fix}"
    parts = work_list_table.find_changes(old_path, new_path)
    return head + (", ".join(parts) or "the same images in another order") + fix
