"""What lies in a folder: a corpus with a log, one of a release that had none, or something else.

Before release 0.2 a unit was committed if its manifest existed. Such a corpus is adopted as it is: the first
owner writes a record that names what lies there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from ...schemas import manifest as manifests
from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.manifest import FileEntry, Manifest
from ...schemas.reasons import RETRIED
from ...schemas.records import Blob
from ..io import files
from ..io.store import TEMPORARY, store_of
from .records import Adopt, Config, LogFile, LogUnit, check_names

MARKER = "corpus.json"
MARKER_TEXT = b'{"format": "paracaption corpus", "version": 1}\n'
"""A folder with this file is a corpus of ours; only in such a folder anything is ever removed."""

FOLDERS = ("shards", "ledger", "manifests")
MERGED = ("index.parquet", "stats.json", "README.md")
PLAN = ("plan/plan.parquet", "plan/plan.json")


def mark(out: str) -> None:
    """Make a folder a corpus of ours.

    Raises:
        OSError: it cannot be written.
    """
    store_of(out).create(f"{out}/{MARKER}", MARKER_TEXT)


def refuse_foreign(out: str, subsets: Iterable[str]) -> None:
    """Refuse a folder in which files of others lie where a corpus has its own.

    Args:
        out: the folder; it may be a corpus that lacks some of the subsets.
        subsets: those that will be built and of which the log knows no unit.

    Raises:
        ConfigError: names one of them.
    """
    # What a driver wrote that died before its first commit has a temporary name, or is evidence.
    folders = FOLDERS
    if _is_marked_bucket(out):
        return
    names = files.list_names(out)
    if MARKER not in names:
        folders = (*FOLDERS, "evidence", "plan", "journal")
        if not any(is_planned(out, name) or files.list_names(f"{out}/{name}/manifests") for name in names):
            _refuse_replaced(out)
    for subset in subsets:
        if is_planned(out, subset):
            continue
        for folder in folders:
            found = [
                name
                for name in files.list_names(f"{out}/{subset}/{folder}")
                if not name.startswith(TEMPORARY)
            ]
            if found and not _is_marked_bucket(out):  # who has begun meanwhile has marked it first
                raise ConfigError(
                    f"{out}/{subset}/{folder}/{found[0]}: this folder has other files and is not a corpus; "
                    "choose another `out`"
                )


def _is_marked_bucket(out: str) -> bool:
    """Whether a place in a bucket is a corpus of ours, also while listings do not show it yet."""
    return not store_of(out).moves and store_of(out).size(f"{out}/{MARKER}") is not None


def _refuse_replaced(out: str) -> None:
    """Refuse files that a build would write over, in a folder that has nothing else of a corpus."""
    for path in ("config.yaml", *MERGED):
        if files.exists(f"{out}/{path}"):
            raise ConfigError(
                f"{out}/{path}: a build would write over it, and this folder is not a corpus; "
                "choose another `out`, or move the file away"
            )


def is_planned(out: str, subset: str) -> bool:
    """Whether a folder has a work list, which a build writes there before anything else."""
    return "plan.json" in files.list_names(f"{out}/{subset}/plan")


def find(out: str) -> Adopt:
    """A record of what a corpus without a log holds.

    Raises:
        IntegrityError: a manifest cannot be read.
    """
    named: list[LogFile] = []
    for subset in files.list_names(out):
        named += _named(out, *(f"{subset}/{path}" for path in PLAN))
    named += _named(out, "config.yaml", *MERGED)
    named += _named(out, *(f"plots/{name}" for name in files.list_names(f"{out}/plots") if name[0] != "."))
    return Adopt(units=find_units(out), files=named)


def find_config(out: str) -> Config | None:
    """A record of the configuration of a corpus without a log; None if it has none that can be read."""
    try:
        text = files.read(Blob(f"{out}/config.yaml")).decode()
    except (OSError, UnicodeError):
        return None
    return Config(text=text, files=_named(out, "config.yaml"))


def find_units(out: str) -> dict[str, LogUnit]:
    """The units of a corpus without a log, by "subset/unit": those that have a manifest.

    Raises:
        IntegrityError: a manifest cannot be read.
    """
    return {
        f"{subset}/{name.removesuffix('.json')}": _unit(out, subset, name)
        for subset in files.list_names(out)
        for name in files.list_names(f"{out}/{subset}/manifests")
        if name.endswith(".json") and not name.startswith(".")
    }


def _unit(out: str, subset: str, name: str) -> LogUnit:
    path = f"{subset}/manifests/{name}"
    data = files.read(Blob(f"{out}/{path}"))
    try:
        manifest = manifests.decode(data)
        if manifest.unit != name.removesuffix(".json"):
            raise msgspec.ValidationError(f"it is of unit {manifest.unit}")
        unit = log_unit(manifest, subset, LogFile(path, len(data), hashlib.sha256(data).hexdigest()))
        check_names({f"{subset}/{manifest.unit}": unit})
        return unit
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{out}/{path}: not a manifest ({error}); delete it, and its unit is built again"
        ) from error


def log_unit(manifest: Manifest, subset: str, file: LogFile) -> LogUnit:
    """What the log says of a unit whose files lie at their places.

    Args:
        manifest: of the unit.
        subset: name of the subset's folder.
        file: the manifest's file.
    """

    def entry(found: FileEntry) -> LogFile:
        return LogFile(f"{subset}/{found.path}", found.bytes, found.sha256)

    reasons = {key.partition("/")[2] for key in manifest.dropped} | set(manifest.images_dropped)
    return LogUnit(
        plan=manifest.plan,
        recipe=manifest.recipe,
        regions=manifest.regions_in,
        kept=manifest.kept,
        manifest=file,
        ledger=entry(manifest.ledger),
        shard=entry(manifest.shard) if manifest.shard else None,
        failed=bool(manifest.failed or reasons & RETRIED),
    )


def _named(out: str, *paths: str) -> list[LogFile]:
    sizes = [(path, store_of(out).size(f"{out}/{path}")) for path in paths]
    return [LogFile(path, size, files.sha256_of(f"{out}/{path}")) for path, size in sizes if size is not None]
