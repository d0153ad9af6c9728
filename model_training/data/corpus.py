"""A committed corpus for training: which image lies where, with how many kept regions, and one read for each.

Manifests are the truth. `index.parquet` says where images lie if it is of these manifests; if it is stale or
not there, the ledgers say it, one small file a unit. What they say is written to a table once, and mapped.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import yaml
from pydantic import ValidationError

from ...pipeline.corpus import merge, reader, work_list
from ...pipeline.io import files
from ...schemas import manifest as manifests
from ...schemas.config import BuildConfig
from ...schemas.errors import BadSample, ConfigError, IntegrityError
from ...schemas.manifest import Manifest
from ...schemas.records import Blob
from ...schemas.sample import Sample
from ...schemas.summary import CorpusSummary
from ...schemas.training import CorpusSource, DataOptions
from ..model import tiling
from .order import even_groups, keys_of, num_groups, varied_groups
from .table import Table, TableWriter, cached_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from ..model.processor import PerceptionDLMProcessor

_log = logging.getLogger(__name__)

_REBUILD = "delete the unit's manifest and run the build again, which rebuilds the unit"
_GAP_BYTES = 1 << 16
"""Bytes between photo and JSON that are read rather than asked for twice."""

_VERSION = 1
_PLACES = ("photo_offset", "photo_length", "json_offset", "json_length")
_COLUMNS = ["unit", "key", "caption", "image_width", "image_height", "shard", *_PLACES]
_IMAGE = np.dtype(
    [
        ("shard", "u4"),
        ("regions", "u2"),
        ("longest", "u2"),
        ("views", "u1"),
        ("key_bytes", "u1"),
        ("key", "u8"),
    ]
    + [(name, "u8" if name.endswith("offset") else "u4") for name in _PLACES]
)
"""`longest` of its captions in tokens; `key` where it starts in the table's bytes."""


class _Unit(NamedTuple):
    folder: str
    path: str
    manifest: Manifest


class Place(NamedTuple):
    """An item's image, which of its groups it is, and which of the image's shuffled regions are in it."""

    image: int
    group: int
    regions: slice


class Corpus:
    """The images of a corpus, and its items: groups of an image's regions, image after image."""

    def __init__(
        self, table: Table, out: str, options: DataOptions, seed: int, processor: PerceptionDLMProcessor
    ):
        self.table, self.out, self.options, self.seed = table, out, options, seed
        config = processor.config
        self.num_prompts = config.num_prompts
        self.prefix_tokens = processor.prefix(0, 0).shape[1]
        self.view_tokens, self.region_tokens = config.tokens_per_tile, config.replay_tokens + 1
        self.item_image = np.memmap(table.folder / "item_image.bin", np.uint32, "r")
        self.item_group = np.memmap(table.folder / "item_group.bin", np.uint16, "r")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.table, self.options, self.__dict__ | {"item_image": None, "item_group": None})

    @property
    def num_items(self) -> int:
        """Groups of regions."""
        return len(self.item_image)

    @property
    def fingerprint(self) -> str:
        """Changes when the items do."""
        return self.table.folder.name

    def groups(self, items: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where items' groups begin among their images' shuffled regions, and their sizes: both (N,) int64.

        Args:
            items: (N,); a group may be empty.
            passes: (N,) index of the pass over the corpus (0, 1, ...).
        """
        image, group = self.item_image[items], self.item_group[items].astype(np.int64)
        regions = self.table.rows["regions"][image].astype(np.int64)
        groups = num_groups(regions, self.options.regions_per_group)
        if self.options.group_sizes == "even":
            return even_groups(regions, groups, group)
        keys = keys_of(image, passes, self.seed, "groups")
        return varied_groups(regions, groups, group, self.num_prompts, keys)

    def lengths(self, items: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of items before their captions, and at most of the captions: both (N,) int64; 0 if empty."""
        image = self.table.rows[self.item_image[items]]
        _, size = self.groups(items, passes)
        views = image["views"].astype(np.int64)
        prefix = self.prefix_tokens + views * self.view_tokens + size * self.region_tokens
        longest, limit = image["longest"].astype(np.int64), self.options.caption_limit()
        if self.options.caption_length == "fixed":
            longest = np.full_like(longest, self.options.max_new_tokens)
        elif limit is not None:
            longest = np.minimum(longest, limit)
        return np.where(size > 0, prefix, 0), size * (2 + longest)

    def place(self, item: int, turn: int) -> Place:
        """What an item is in some pass over the corpus."""
        (start,), (size,) = self.groups(np.array([item]), np.array([turn]))
        return Place(int(self.item_image[item]), int(self.item_group[item]), slice(start, start + size))

    def name(self, image: int) -> tuple[str, str]:
        """The image's shard, and its key."""
        row = self.table.rows[image]
        key = self.table.bytes_at(int(row["key"]), int(row["key_bytes"])).decode()
        return f"{self.out}/{self.table.about['shards'][row['shard']]}", key

    def read(self, image: int) -> tuple[Sample, bytes]:
        """An image's sample and its photo's bytes, by one read.

        Raises:
            BadSample: the bytes there are not this image's; names shard and key.
        """
        row = self.table.rows[image]
        shard, key = self.name(image)
        where = f"{shard}: {key}"
        photo, photo_end, json, json_end = (int(row[name]) for name in _PLACES)
        photo_end, json_end = photo + photo_end, json + json_end
        try:
            if 0 <= json - photo_end < _GAP_BYTES:
                span = files.read(Blob(shard, photo, json_end - photo))
                data, record = span[: photo_end - photo], span[json - photo :]
            else:
                data = files.read(Blob(shard, photo, photo_end - photo))
                record = files.read(Blob(shard, json, json_end - json))
        except OSError as error:
            raise BadSample("shard_unreadable", f"{where}: {error.strerror or error}; {_REBUILD}") from error
        if len(data) < photo_end - photo or len(record) < json_end - json:
            raise BadSample("shard_unreadable", f"{where}: the shard ends before it; {_REBUILD}")
        try:
            sample = reader.decode_sample(record, where)
        except IntegrityError as error:
            raise BadSample("shard_unreadable", str(error)) from error
        if sample.key != key or len(sample.regions) != row["regions"]:
            raise BadSample("shard_unreadable", f"{where}: the shard has another image there; {_REBUILD}")
        return sample, data


def _reopen(table: Table, options: DataOptions, state: dict[str, Any]) -> Corpus:
    opened = Corpus.__new__(Corpus)
    opened.__dict__.update(state)
    opened.item_image = np.memmap(table.folder / "item_image.bin", np.uint32, "r")
    opened.item_group = np.memmap(table.folder / "item_group.bin", np.uint16, "r")
    return opened


def open_corpus(
    source: CorpusSource, processor: PerceptionDLMProcessor, options: DataOptions, seed: int, cache: Path
) -> Corpus:
    """A corpus, through the table in the cache that is of its manifests.

    Raises:
        ConfigError: no corpus, or none of its regions was kept.
        IntegrityError: a manifest or ledger is damaged; names the file and the mend.
    """
    units, digest, fresh = _committed(source)
    tower = processor.config.vision_config
    facts = [_VERSION, digest, tower.image_size, processor.config.max_tiles, options.regions_per_group]
    name = hashlib.sha256(repr([*facts, tokenizer_digest(processor)]).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        _write(folder, source, units, fresh, processor, options)

    folder = cached_folder(cache, f"corpus-{name}", write)
    return Corpus(Table(folder, _IMAGE), source.corpus.rstrip("/"), options, seed, processor)


def unfinished(source: CorpusSource) -> str:
    """What a build has still to do before the corpus is whole; "" if nothing.

    Raises:
        IntegrityError: a file of the corpus is damaged.
    """
    out = source.corpus.rstrip("/")
    try:
        built = BuildConfig.from_stored(yaml.safe_load(files.read(Blob(f"{out}/config.yaml"))))
        names = source.subsets or tuple(built.subsets)
        planned = {name: _num_units(f"{out}/{name}/plan/{work_list.SUMMARY}") for name in names}
        units, _, fresh = _committed(source.model_copy(update={"subsets": names}))
    except FileNotFoundError as error:
        return f"{error.filename or error}: not there yet"
    except ConfigError as error:
        return str(error)
    except (yaml.YAMLError, ValidationError) as error:
        raise IntegrityError(f"{out}/config.yaml: not a build's ({error}); run the build again") from error
    done = Counter(unit.manifest.subset for unit in units)
    left = [f"{number - done[name]:,} units of {name}" for name, number in planned.items()]
    missing = [text for text, name in zip(left, planned, strict=True) if done[name] < planned[name]]
    return ", ".join(missing) or ("" if fresh else "the index, which `paracaption merge` writes")


def _num_units(path: str) -> int:
    try:
        return msgspec.json.decode(files.read(Blob(path)))["num_units"]
    except (msgspec.MsgspecError, UnicodeError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: not a plan ({error}); run the build again") from error


def tokenizer_digest(processor: PerceptionDLMProcessor) -> str:
    """Changes when texts have other tokens."""
    return hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def token_lists(processor: PerceptionDLMProcessor, texts: list[str]) -> list[list[int]]:
    """The tokens of texts; what is written like a special token is text."""
    if not texts:
        return []
    return processor.tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
    )["input_ids"]


def _committed(source: CorpusSource) -> tuple[list[_Unit], str, bool]:
    """Every committed unit in order, a digest of all manifests, and whether the index is of them."""
    paths = [
        path
        for path in files.expand(f"{source.corpus.rstrip('/')}/*/manifests/*.json")
        if not path.rpartition("/")[2].startswith(".")
    ]
    by_subset: dict[str, list[str]] = {}
    for path in paths:
        by_subset.setdefault(path.split("/")[-3], []).append(path)
    wanted = source.subsets or tuple(by_subset)
    if absent := [subset for subset in wanted if subset not in by_subset]:
        raise ConfigError(
            f"{source.corpus}: nothing of {', '.join(absent)} is committed; it has {by_subset.keys()}"
        )
    if not by_subset:
        raise ConfigError(
            f"{source.corpus}: no corpus here (no <subset>/manifests); give the `out` of a build"
        )
    units, digests = [], {}
    for subset in sorted(wanted):
        digest = hashlib.sha256()
        for path, data in _read_all(sorted(by_subset[subset])):
            digest.update(data)
            units.append(_Unit(path.rpartition("/manifests/")[0], path, _manifest(path, data)))
        digests[subset] = digest.hexdigest()
    return units, repr(sorted(digests.items())), _is_fresh(source.corpus, digests)


def _read_all(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Small files one after the other; from a store many at a time."""
    if not files.is_url(paths[0]):
        for path in paths:
            yield path, files.read(Blob(path))
        return
    fs, _ = files.file_system(paths[0])
    for start in range(0, len(paths), 1024):
        some = paths[start : start + 1024]
        inside = [fs._strip_protocol(path) for path in some]
        found = fs.cat(inside)
        yield from (
            ((path, found[name]) for path, name in zip(some, inside, strict=True))
            if isinstance(found, dict)
            else [(some[0], found)]
        )


def _manifest(path: str, data: bytes) -> Manifest:
    try:
        return manifests.decode(data)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise IntegrityError(
            f"{path}: not a manifest ({error}); delete it and run the build again, which rebuilds the unit"
        ) from error


def _is_fresh(out: str, digests: dict[str, str]) -> bool:
    """Whether the index was merged from these very manifests."""
    try:
        stats = files.read(Blob(f"{out.rstrip('/')}/{merge.STATS}"))
        summary = msgspec.json.decode(stats, type=CorpusSummary)
        size = files.size_of(Blob(f"{out.rstrip('/')}/{reader.INDEX}"))
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return False
    merged = {subset: each.counts.manifests for subset, each in summary.subsets.items()}
    return summary.index.bytes == size and digests.items() <= merged.items()


def _write(
    folder: Path,
    source: CorpusSource,
    units: list[_Unit],
    fresh: bool,
    processor: PerceptionDLMProcessor,
    options: DataOptions,
) -> None:
    by_unit = {unit.manifest.unit: unit for unit in units}
    shards = [f"{unit.manifest.subset}/{unit.manifest.shard.path}" for unit in units if unit.manifest.shard]
    numbers = {shard: number for number, shard in enumerate(shards)}
    if not fresh:
        _log.warning(
            "%s: no index of these manifests; the ledgers are read. `paracaption merge`", source.corpus
        )
    tables = _index(source.corpus, by_unit) if fresh else _ledgers(units)
    writer, seen = TableWriter(folder), 0
    with open(folder / "item_image.bin", "xb") as images, open(folder / "item_group.bin", "xb") as groups:
        for table in tables:
            rows, firsts = _images(table, processor, writer)
            rows["shard"] = _shard_numbers(table, firsts, by_unit, numbers)
            _compare(table, by_unit)
            counts = num_groups(rows["regions"], options.regions_per_group)
            np.repeat(np.arange(len(rows), dtype=np.uint32) + np.uint32(writer.num_rows), counts).tofile(
                images
            )
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            (np.arange(counts.sum()) - starts).astype(np.uint16).tofile(groups)
            writer.add(rows)
            seen += table.num_rows
    kept = sum(unit.manifest.kept for unit in units)
    if seen != kept:
        what = "index" if fresh else "ledgers"
        raise IntegrityError(
            f"{source.corpus}: {seen:,} kept regions in the {what}, {kept:,} in the manifests; "
            "run `paracaption verify`"
        )
    if not seen:
        raise ConfigError(f"{source.corpus}: no region was kept; there is nothing to train on")
    writer.close({"shards": shards, "regions": seen})


def _index(out: str, by_unit: dict[str, _Unit]) -> Iterator[pa.Table]:
    """The index's rows, whole units at a time, as it was written."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = f"{out.rstrip('/')}/{reader.INDEX}"
    wanted = pa.array(sorted(by_unit))
    try:
        with files.open_url(path, 8 << 20) as file:
            opened = pq.ParquetFile(file)
            for number in range(opened.num_row_groups):
                table = opened.read_row_group(number, columns=_COLUMNS, use_threads=False)
                table = table.filter(pc.is_in(table["unit"], wanted))
                if table.num_rows:
                    yield table.combine_chunks()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise IntegrityError(f"{path}: not readable ({error}); run `paracaption merge`") from error


def _ledgers(units: list[_Unit]) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for unit in units:
        path = f"{unit.folder}/{unit.manifest.ledger.path}"
        try:
            with files.open_url(path, 1 << 20) as file:
                table = pq.ParquetFile(file).read(columns=[*_COLUMNS, "kept"], use_threads=False)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise IntegrityError(f"{path}: not readable ({error}); {_REBUILD}") from error
        table = table.filter(table["kept"])
        if table.num_rows != unit.manifest.kept:
            raise IntegrityError(
                f"{path}: has {table.num_rows} kept regions, its manifest {unit.manifest.kept}; {_REBUILD}"
            )
        if table.num_rows:
            yield table.combine_chunks()


def _images(
    table: pa.Table, processor: PerceptionDLMProcessor, writer: TableWriter
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images of a table with a row for each region, and the table's row where each begins."""
    import pyarrow.compute as pc

    names = pc.binary_join_element_wise(table["unit"], table["key"], "/").to_numpy(zero_copy_only=False)
    firsts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    rows = np.zeros(len(firsts), _IMAGE)
    rows["regions"] = np.diff(np.append(firsts, table.num_rows))
    tokens = [len(ids) for ids in token_lists(processor, table["caption"].to_pylist())]
    rows["longest"] = np.maximum.reduceat(np.minimum(tokens, 65_535), firsts)
    for name in _PLACES:
        rows[name] = table[name].to_numpy()[firsts]
    sizes = np.stack([table[f"image_{side}"].to_numpy()[firsts] for side in ("width", "height")], axis=1)
    rows["views"] = views_of(sizes, processor)
    keys = [key.encode() for key in table["key"].take(firsts).to_pylist()]
    rows["key_bytes"] = lengths = np.array([len(key) for key in keys])
    rows["key"] = writer.put(b"".join(keys)) + np.cumsum(lengths) - lengths
    return rows, firsts


def views_of(sizes: np.ndarray, processor: PerceptionDLMProcessor) -> np.ndarray:
    """How many views images of such sizes have: (N, 2) width and height to (N,)."""
    tile, most = processor.config.vision_config.image_size, processor.config.max_tiles
    kinds, which = np.unique(sizes, axis=0, return_inverse=True)
    views = [tiling.num_views(tiling.tile_grid(w, h, tile, most)) for w, h in kinds.tolist()]
    return np.array(views)[which.ravel()]


def _shard_numbers(
    table: pa.Table, firsts: np.ndarray, by_unit: dict[str, _Unit], numbers: dict[str, int]
) -> list[int]:
    units = table["unit"].take(firsts).to_pylist()
    shards = table["shard"].take(firsts).to_pylist()
    found = []
    for unit, shard in zip(units, shards, strict=True):
        entry = by_unit[unit].manifest.shard
        if entry is None or entry.path != shard:
            raise IntegrityError(
                f"{by_unit[unit].path}: its ledger names {shard}, which it does not; {_REBUILD}"
            )
        found.append(numbers[f"{by_unit[unit].manifest.subset}/{shard}"])
    return found


def _compare(table: pa.Table, by_unit: dict[str, _Unit]) -> None:
    """Every image has as many regions as its manifest says."""
    counts = table.group_by(["unit", "key"]).aggregate([("caption", "count")]).to_pydict()
    for unit, key, count in zip(*counts.values(), strict=True):
        promised = by_unit[unit].manifest.images.get(key)
        if promised != count:
            raise IntegrityError(
                f"{by_unit[unit].path}: {key} has {promised} kept regions, {count} elsewhere; "
                "run `paracaption merge`"
            )
