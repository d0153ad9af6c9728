"""Reads what is committed, and only that: manifests first, then the shard and ledger that each one names."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.manifest import Manifest
from ...schemas.records import Blob
from ...schemas.sample import PHOTO_ENDING, Sample
from ..io import files
from . import writer

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index.parquet"

PHOTO_SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp", "tiff": "tif"}
"""File name endings by the sniffed format of a photo."""


class Found(NamedTuple):
    """An image of the corpus: its subset, and its ledger rows as dictionaries, in order of the regions."""

    subset: str
    rows: list[dict[str, Any]]


def subsets(out: str | Path) -> list[str]:
    """The subsets of a corpus, sorted.

    Raises:
        ConfigError: the folder is no corpus.
    """
    out = Path(out)
    found = sorted(path.parent.name for path in out.glob("*/manifests") if path.is_dir())
    if not found:
        raise ConfigError(f"{out}: no corpus here (no <subset>/manifests); give the `out` of a build")
    return found


def manifest_paths(out: str | Path, subset: str) -> list[Path]:
    """Manifests of a subset in the order of their units. Temporary files are none."""
    folder = Path(out) / subset / "manifests"
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def iter_committed(out: str | Path, subset: str) -> Iterator[tuple[Manifest, Path]]:
    """Every committed unit of a subset in order, with the path of its manifest.

    Raises:
        IntegrityError: a manifest does not parse.
    """
    for path in manifest_paths(out, subset):
        yield writer.read_manifest(path), path


def read_ledger(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """A unit's ledger, or some of its columns.

    Raises:
        IntegrityError: it is missing, unreadable or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file:
            return pq.ParquetFile(file).read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException, KeyError) as error:
        mend = "delete the unit's manifest and run the build again, which rebuilds the unit"
        raise IntegrityError(f"{path}: not readable ({error}); {mend}") from error


def iter_samples(shard: str | Path) -> Iterator[tuple[Sample, bytes]]:
    """Every sample of a shard with its photo's bytes, in one pass.

    Raises:
        IntegrityError: the tar is damaged or a member is not what a shard holds.
    """
    photos: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                key, _, ending = member.name.rpartition(".")
                if ending == PHOTO_ENDING:
                    photos[key] = data
                elif ending == "json" and key in photos:
                    yield decode_sample(data, f"{shard}: {member.name}"), photos.pop(key)
                else:
                    raise IntegrityError(f"{shard}: {member.name}: not a member of a shard; {_REBUILD}")
    except (OSError, tarfile.TarError) as error:
        raise IntegrityError(f"{shard}: not readable ({error}); {_REBUILD}") from error
    if photos:
        raise IntegrityError(f"{shard}: {min(photos)}: a photo without its JSON; {_REBUILD}")


def iter_corpus(out: str | Path, subsets: Iterable[str]) -> Iterator[tuple[str, Sample, bytes]]:
    """Every sample of the committed units with the name of its unit and its photo's bytes, in order.

    Raises:
        IntegrityError: a shard is damaged, or holds a sample of another subset or a key that is no file name.
    """
    for subset in subsets:
        for manifest, path in iter_committed(out, subset):
            if manifest.shard is None:
                continue
            shard = path.parent.parent / manifest.shard.path
            for sample, photo in iter_samples(shard):
                if not _SAFE_KEY.fullmatch(sample.key) or sample.subset != subset:
                    raise IntegrityError(
                        f"{shard}: {sample.key!r}: not of this shard; run `paracaption verify`"
                    )
                yield manifest.unit, sample, photo


_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_REBUILD = "delete the unit's manifest and run the build again, which rebuilds the unit"
_SAMPLE = msgspec.json.Decoder(Sample)


def decode_sample(data: bytes, where: str) -> Sample:
    """A sample from its JSON member; `where` is for the message.

    Raises:
        IntegrityError: it is none.
    """
    try:
        return _SAMPLE.decode(data)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise IntegrityError(f"{where}: not a sample ({error}); {_REBUILD}") from error


def read_sample(out: str | Path, row: Mapping[str, Any]) -> tuple[Sample, bytes]:
    """The sample of a kept row of a ledger or of the index, and its photo's bytes, by two reads into the
    shard.

    Raises:
        IntegrityError: the bytes there are not the sample of the row's key.
    """
    shard = str(Path(out) / row["subset"] / row["shard"])
    where = f"{shard}: {row['key']}"
    try:
        size = files.size_of(Blob(shard))
        if max(row["photo_offset"] + row["photo_length"], row["json_offset"] + row["json_length"]) > size:
            raise IntegrityError(f"{where}: the offsets lead behind the end; {_REBUILD}")
        record = files.read(Blob(shard, row["json_offset"], row["json_length"]))
        photo = files.read(Blob(shard, row["photo_offset"], row["photo_length"]))
    except OSError as error:
        raise IntegrityError(f"{where}: not readable ({error}); {_REBUILD}") from error
    sample = decode_sample(record, where)
    if sample.key != row["key"]:
        raise IntegrityError(f"{where}: the offsets lead elsewhere; {_REBUILD}")
    return sample, photo


def find_image(out: str | Path, key: str) -> Found:
    """An image by its key, or by "subset/key" if both subsets have the key.

    The index leads to the unit if it is there; otherwise the manifests are read until one names the key.

    Raises:
        ConfigError: no committed unit has the key, or two subsets have it.
    """
    out = Path(out)
    subset, slash, name = key.rpartition("/")
    wanted = [subset] if slash else subsets(out)
    found = [(each, unit) for each in wanted if (unit := _unit_of(out, each, name))]
    if not found:
        raise ConfigError(f"{out}: no image {key} is committed; keys are in the `key` column of the ledgers")
    if len(found) > 1:
        both = " or ".join(f"{each}/{name}" for each, _ in found)
        raise ConfigError(f"{out}: more than one image is called {key}; say {both}")
    (subset, unit), *_ = found
    table = read_ledger(out / subset / "ledger" / f"{unit}.parquet")
    return Found(subset, [row for row in table.to_pylist() if row["key"] == name])


def _unit_of(out: Path, subset: str, key: str) -> str | None:
    import pyarrow.parquet as pq

    if (out / INDEX).exists():
        wanted = [("subset", "=", subset), ("key", "=", key)]
        units = pq.read_table(out / INDEX, columns=["unit"], filters=wanted)["unit"].unique().to_pylist()
        if units and (out / subset / "manifests" / f"{units[0]}.json").exists():
            return units[0]
    quoted = msgspec.json.encode(key)
    for path in manifest_paths(out, subset):
        if quoted in path.read_bytes() and key in writer.read_manifest(path).images:
            return path.stem
    return None
