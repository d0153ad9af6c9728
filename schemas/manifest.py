"""The commit record of a unit. A shard exists if and only if its manifest does."""

from __future__ import annotations

import msgspec

from .reasons import Reason


class FileEntry(msgspec.Struct, frozen=True):
    """A committed file: path relative to the subset's folder, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a unit holds. Equal for two runs on the same evidence: no times, hosts or attempts.

    Attributes:
        unit: name of the unit, "coconut-000000".
        subset: name of the subset.
        plan: content hash of the plan the unit belongs to.
        recipe: digest of everything that decided: stages, thresholds, the models' evidence digests.
        shard: the tar; None if no image of the unit kept a region.
        ledger: the Parquet file with every region of the unit, kept or dropped.
        images: key of every image of the unit with its number of kept regions; on disk sorted by key.
        regions_in: regions that the source declared; `kept` plus the sum of `dropped` always equals it.
        kept: regions in the shard.
        dropped: number of dropped regions by "stage/reason".
        images_dropped: number of images dropped as a whole by reason.
        failed: number of images whose source could not be read, by the kind of the failure; not in the file
            if there are none.
    """

    unit: str
    subset: str
    plan: str
    recipe: str
    shard: FileEntry | None
    ledger: FileEntry
    images: dict[str, int]
    regions_in: int
    kept: int
    dropped: dict[str, int]
    images_dropped: dict[Reason, int]
    failed: dict[str, int] = {}


def encode(manifest: Manifest) -> bytes:
    """JSON with sorted keys and a final newline: equal manifests are equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1) + b"\n"


def decode(data: bytes) -> Manifest:
    """Read a manifest; raises `msgspec.ValidationError` on anything else.

    Also on one that names other files than those of its unit: they are known, and nothing else is opened.
    """
    found = msgspec.json.decode(data, type=Manifest)
    if not is_name(found.unit):
        raise msgspec.ValidationError(f"{found.unit[:100]!r} is not the name of a unit")
    for place, entry in (
        (f"shards/{found.unit}.tar", found.shard),
        (f"ledger/{found.unit}.parquet", found.ledger),
    ):
        if entry is not None and entry.path != place:
            raise msgspec.ValidationError(f"it names {entry.path[:100]} instead of {place}")
    return found


def is_name(name: str) -> bool:
    """Whether what a file of a corpus names, such as a unit, is the name of a file or folder, and no path."""
    return bool(name) and not name.startswith(".") and not {"/", "\\", "\0"}.intersection(name)


def is_shard(path: str) -> bool:
    """Whether a path below a subset's folder is that of a shard."""
    folder, _, name = path.partition("/")
    return folder == "shards" and is_name(name) and name.endswith(".tar")
