"""Reads a corpus: what is committed, and only that. The one way to do it, in a folder and behind a URL.

A unit is committed if the commit log says so; in a corpus of a release before 0.2, or in a copy without its
log, if its manifest exists. Files that an interrupted build left behind are never read, and answers are right
while a build runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ...schemas import manifest as manifests
from ...schemas.config import BuildConfig
from ...schemas.errors import REBUILD, ConfigError, IntegrityError
from ...schemas.manifest import Manifest
from ...schemas.records import Blob
from ...schemas.sample import Sample
from ...schemas.summary import CorpusSummary
from ..io import files, location
from ..io.confined import confine
from ..io.disk_errors import fix_of
from ..io.location import Location
from ..io.tables import TableFile
from . import log
from .corpus_files import (
    CONFIG,
    STATS,
    decode_manifest,
    read_config,
    read_ledger,
    read_manifest,
    read_summary,
    unreadable,
)
from .ledger import SPLIT
from .shard import decode_sample, iter_shard
from .units import Unit, list_units

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index.parquet"

PHOTO_SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp", "tiff": "tif"}
"""File name endings by the sniffed format of a photo."""

SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+")
"""What a key is made of: it names members of a tar, and files of an export."""


class FoundImage(NamedTuple):
    """An image of a corpus: its subset, and its rows of the ledger in the order of its regions."""

    subset: str
    rows: list[dict[str, Any]]


def open_corpus(path: str | Location, confined: bool = True) -> Corpus:
    """Open the folder that a build wrote, to read what is committed in it.

    Nothing leads out of it, as it may be a stranger's (`io/confined.py`). While it is being built, each call
    below sees the units that are committed by then::

        import io
        import paracaption
        import pyarrow.compute as pc
        from PIL import Image
        from pycocotools import mask

        corpus = paracaption.open_corpus("out/demo")
        print(corpus.subsets, corpus.summary.kept, corpus.config.min_iou)
        for sample, photo in corpus.samples("coconut"):
            image = Image.open(io.BytesIO(photo))
            for region in sample.regions:
                pixels = mask.decode({"size": region.rle.size, "counts": region.rle.counts})  # (H, W) of 0, 1
                print(sample.key, region.id, region.bbox, region.caption)

        for table in corpus.ledgers("coconut", ["key", "region", "drop_stage", "drop_reason", "drop_detail"]):
            print(table.filter(pc.field("drop_reason") == "text_too_short"))  # a pyarrow.Table per unit

        found = corpus.find_image("coconut/000000000139")
        sample, photo = corpus.read_sample(next(row for row in found.rows if row["kept"]))

    Args:
        path: the `out` of a build: a folder, or a URL such as `s3://bucket/corpus`.
        confined: False for a corpus that this process builds, in which links are its owner's.

    Raises:
        ConfigError: there is no corpus at that path.
    """
    corpus = Corpus(path, confined)
    try:
        found = corpus.subsets
    except OSError as error:
        what = f"cannot be read ({error.strerror or error}); correct the path or its permissions"
        raise ConfigError(f"{corpus.path}: {what}") from error
    if not found:
        raise ConfigError(f"{corpus.path}: no corpus here; give the `out` of a build")
    return corpus


class Corpus:
    """A corpus on disk or in a store; see `open_corpus` for an example.

    Nothing is held in memory but the names of the units that are being read: a sample, a ledger or a manifest
    at a time. A `Corpus` may be pickled, and used by several threads; one that is confined is so in every
    process that it comes to.

    Samples hold kept regions only. What was dropped, and why, is in the ledgers: a row for every region that
    the source declared. `corpus.ledger` names their columns.
    """

    def __init__(self, path: str | Location, confined: bool = False):
        self.path = files.local(str(path)).rstrip("/") or "/"
        location.locate(self.path)  # what is in its bucket is read over obstore from now on
        if confined:
            confine(self.path)
        self._confined = confined

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.path, self._confined)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets, sorted."""
        if location.is_bucket(self.path):
            if log.exists(self.path):
                return log.subsets_of(log.recent_state(self.path))
            if log.is_being_copied(self.path):
                return []
        names = files.list_names(self.path)
        return [name for name in names if files.is_folder(f"{self.path}/{name}/manifests")]

    @property
    def config(self) -> BuildConfig:
        """The resolved configuration that the corpus was built with; see `read_config`."""
        return read_config(self.path)

    @property
    def summary(self) -> CorpusSummary:
        """The statistics that the last merge wrote; see `read_summary`."""
        return read_summary(self.path)

    @property
    def held_out_share(self) -> float:
        """Share of the images that are held out of training, by the configuration, else the last merge; or 0.

        Raises:
            IntegrityError: the index has held-out images, but there is neither; or one is damaged.
        """
        try:
            return self.config.held_out_share
        except (ConfigError, IntegrityError) as error:
            damaged = error
        try:
            return self.summary.held_out_share
        except ConfigError:
            if isinstance(damaged, IntegrityError):
                raise damaged from None
        try:
            if not any(table.num_rows for table in self.index([SPLIT])):
                return 0.0
        except (ConfigError, IntegrityError):  # no index, or no such column
            return 0.0
        what = (
            f"marks images as held out of training, but {CONFIG} and {STATS}, which say the share, are "
            f"missing; copy {CONFIG} from the original corpus, or run `paracaption merge CONFIG`"
        )
        raise IntegrityError(f"{self.path}/{INDEX}: {what}")

    def units(self, subset: str | None = None) -> list[Unit]:
        """The committed units in order, of one subset or of all.

        Raises:
            ConfigError: the corpus has no such subset.
        """
        if subset is None:
            return [unit for name in self.subsets for unit in list_units(f"{self.path}/{name}")]
        found = list_units(f"{self.path}/{subset}")
        if not found and subset not in (names := self.subsets):
            raise ConfigError(f"{self.path}: no subset {subset}; it has {', '.join(names) or 'none'}")
        return found

    def manifests(self, subset: str | None = None) -> Iterator[tuple[Unit, Manifest]]:
        """Every committed unit in order with its manifest, of one subset or of all.

        Raises:
            IntegrityError: a manifest cannot be read.
        """
        for unit, data in self.manifest_bytes(subset):
            yield unit, decode_manifest(data, unit.manifest)

    def manifest_bytes(self, subset: str | None = None) -> Iterator[tuple[Unit, bytes]]:
        """Every committed unit in order with its manifest as it lies on the disk.

        Raises:
            IntegrityError: a manifest is gone.
        """
        units = self.units(subset)
        read = 0
        try:
            for read, data in enumerate(files.read_many([unit.manifest for unit in units]), start=1):
                yield units[read - 1], data
        except FileNotFoundError as error:
            what = (
                "gone, though its unit is committed; run `paracaption build CONFIG` again, which rebuilds "
                "the unit"
            )
            raise IntegrityError(f"{error.filename or units[read].manifest}: {what}") from error
        except OSError as error:
            raise unreadable(error.filename or units[read].manifest, error) from error

    def digest(self, subset: str) -> str:
        """SHA-256 over all manifests of a subset: it changes when what is committed does."""
        digest = hashlib.sha256()
        for _, data in self.manifest_bytes(subset):
            digest.update(data)
        return digest.hexdigest()

    def samples(self, subset: str | None = None) -> Iterator[tuple[Sample, bytes]]:
        """Every image with a kept region, and the bytes of its photo, of one subset or of all, in order.

        Raises:
            IntegrityError: a manifest or shard is damaged.
        """
        for unit, manifest in self.manifests(subset):
            yield from _samples_of(unit, manifest)

    def unit_samples(self, unit: Unit) -> Iterator[tuple[Sample, bytes]]:
        """The same for one unit; none if no region of it was kept."""
        yield from _samples_of(unit, read_manifest(unit.manifest))

    def ledgers(self, subset: str | None = None, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The ledger of each unit in order, of one subset or of all: a row for every region, kept or dropped.

        Args:
            subset: name of a subset; None for all.
            columns: names of the columns to read; None for all. Masks (`rle_counts`) are most of the bytes.

        Raises:
            IntegrityError: a ledger cannot be read.
            ConfigError: there is no such column.
        """
        for unit in self.units(subset):
            yield read_ledger(unit.ledger, columns)

    @property
    def index_path(self) -> str:
        """Path or URL of the index, whether there is one or not."""
        return log.place_of(self.path, INDEX)

    def index(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The index in parts of whole units: a row for every kept region, sorted by subset, unit and image.

        It is that of the last merge: `index_is_current` says whether units were committed since.

        Raises:
            ConfigError: the corpus is not merged.
            IntegrityError: the index cannot be read, or has no such column.
        """
        import pyarrow as pa

        path = self.index_path
        try:
            for table in TableFile(path).row_groups(columns):
                yield table if columns is None else table.select(columns)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path}: no index; give the `out` of a build, or run `paracaption merge CONFIG`"
            ) from error
        except (OSError, pa.ArrowException, KeyError) as error:
            fix = fix_of(error, "run `paracaption merge CONFIG`")
            raise IntegrityError(f"{path}: not readable ({error}); {fix}") from error

    def index_columns(self) -> list[str]:
        """Names of the index's columns.

        Raises:
            OSError, pyarrow.ArrowException: the index cannot be read.
        """
        return TableFile(log.place_of(self.path, INDEX)).names

    def index_is_current(self, digests: Mapping[str, str] | None = None) -> bool:
        """Whether index and statistics are of the units that are committed now.

        In a bucket the log says it; else every manifest is read.

        Args:
            digests: what `digest` returned of each subset that matters; None for all subsets.
        """
        try:
            summary, size = self.summary, files.size_of(Blob(self.index_path))
        except (ConfigError, IntegrityError, OSError):
            return False
        if summary.index.bytes != size:
            return False
        if location.is_bucket(self.path) and self._is_merged_last():
            return True
        merged = {name: each.counts.manifests for name, each in summary.subsets.items()}
        if digests is not None:
            return digests.items() <= merged.items()
        names = self.subsets
        return sorted(merged) == names and all(self.digest(name) == merged[name] for name in names)

    def _is_merged_last(self) -> bool:
        """Whether nothing was committed since the log's newest index. Who merges owns the corpus."""
        if not log.exists(self.path):
            return False
        state = log.read_state(self.path)
        number = 0 if state.merged is None else state.merged.number
        return all(found.since < number for found in state.units.values())

    def num_planned_units(self, subset: str) -> int:
        """Number of units in the subset's work list, committed or not.

        Raises:
            ConfigError: there is no work list.
            IntegrityError: it cannot be read.
        """
        path = log.place_of(self.path, f"{subset}/plan/plan.json")
        try:
            return msgspec.json.decode(files.read(Blob(path)))["num_units"]
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: no such file; run `paracaption build CONFIG`") from error
        except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError, KeyError, TypeError) as error:
            what = f"not a work list ({error}); run `paracaption build CONFIG` again"
            raise IntegrityError(f"{path}: {what}") from error

    def find_image(self, key: str) -> FoundImage:
        """An image by its key, or by "subset/key" if several subsets have that key.

        The index leads to the image's unit. Without an index, manifests are read until one has the key.

        Raises:
            ConfigError: no committed unit has the image, or several subsets have one.
            IntegrityError: a manifest or ledger cannot be read.
        """
        subset, slash, name = key.rpartition("/")
        found = [
            unit for each in ([subset] if slash else self.subsets) if (unit := self.find_unit(each, name))
        ]
        if not found:
            raise ConfigError(
                f"{self.path}: no image {key} is committed; `paracaption explore {self.path}` lists the "
                "images"
            )
        if len(found) > 1:
            both = " or ".join(f"{unit.subset}/{name}" for unit in found)
            raise ConfigError(f"{self.path}: more than one image is called {key}; give {both}")
        table = read_ledger(found[0].ledger)
        return FoundImage(found[0].subset, [row for row in table.to_pylist() if row["key"] == name])

    def find_unit(self, subset: str, key: str) -> Unit | None:
        """The committed unit that has an image; None if there is none."""
        import pyarrow as pa

        if not SAFE_KEY.fullmatch(key):
            return None
        units = {unit.name: unit for unit in self.units(subset)}
        try:
            rows = TableFile(self.index_path).find(["unit"], subset=subset, key=key)
            names = rows["unit"].unique().to_pylist()
        except (OSError, pa.ArrowException, KeyError):  # not merged, or damaged: the manifests say it, too
            names = []
        if names and names[0] in units:
            return units[names[0]]
        quoted = msgspec.json.encode(key)
        for unit, data in self.manifest_bytes(subset):
            if quoted in data and key in decode_manifest(data, unit.manifest).images:
                return unit
        return None

    def shard_path(self, row: Mapping[str, Any]) -> str:
        """Path of the shard that a kept row of a ledger or of the index names.

        A ledger has it from its subset's folder, as indices of early releases; the index from the corpus's.
        Whatever else a row names is an IntegrityError, and is not opened.
        """
        subset, below = row["subset"], str(row["shard"]).removeprefix(f"{row['subset']}/")
        if not manifests.is_name(subset) or not manifests.is_shard(below):
            what = f"names {below[:100]!r}, which is not a shard of a subset"
            raise IntegrityError(f"{self.path}: {row.get('key')!r}: its row {what}; {REBUILD}")
        if location.is_bucket(self.path):
            return self._shard_in_bucket(subset, below)
        return f"{self.path}/{subset}/{below}"

    def _shard_in_bucket(self, subset: str, below: str) -> str:
        """Where a shard lies that has the place `below` in its subset's folder."""
        name = f"{subset}/{below.removeprefix('shards/').removesuffix('.tar')}"
        found = log.recent_state(self.path).units.get(name)
        if found is None or found.unit.shard is None:
            raise IntegrityError(f"{self.path}/{subset}/{below}: no such shard is committed; {REBUILD}")
        return f"{self.path}/{found.unit.shard.place}"

    def read_sample(self, row: Mapping[str, Any], shard: str | None = None) -> tuple[Sample, bytes]:
        """The sample that a kept row of a ledger or of the index belongs to, and the bytes of its photo.

        Args:
            row: with `subset`, `shard`, `key`, and offsets and lengths of photo and JSON.
            shard: path or URL of the shard, if it was found before; None finds what the row names now.

        Raises:
            IntegrityError: the bytes there are not the sample of the row's key.
        """
        shard = self.shard_path(row) if shard is None else shard
        where = f"{shard}: {row['key']}"
        photo = Blob(shard, row["photo_offset"], row["photo_length"])
        record = Blob(shard, row["json_offset"], row["json_length"])
        try:
            data, text = files.read_pair(photo, record)
        except OSError as error:
            fix = fix_of(error, REBUILD)
            raise IntegrityError(f"{where}: not readable ({error.strerror or error}); {fix}") from error
        if len(data) < row["photo_length"] or len(text) < row["json_length"]:
            raise IntegrityError(f"{where}: the ledger's offsets lead beyond the end of the shard; {REBUILD}")
        sample = decode_sample(text, where)
        if sample.key != row["key"]:
            raise IntegrityError(f"{where}: the ledger's offsets lead to another image; {REBUILD}")
        return sample, data


def _samples_of(unit: Unit, manifest: Manifest) -> Iterator[tuple[Sample, bytes]]:
    if manifest.shard is None:
        return
    expected = sum(1 for kept in manifest.images.values() if kept)
    found = 0
    for sample, photo in iter_shard(unit.shard):
        if not SAFE_KEY.fullmatch(sample.key) or sample.subset != unit.subset:
            raise IntegrityError(
                f"{unit.shard}: {sample.key!r}: not of this shard; run `paracaption verify CORPUS`"
            )
        found += 1
        yield sample, photo
    if found != expected:
        raise IntegrityError(f"{unit.shard}: {found} images, its manifest says {expected}; {REBUILD}")
