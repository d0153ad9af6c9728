"""A committed corpus for training: where each image lies, how many regions it has, and one read for each.

Manifests are the truth. If `index.parquet` was merged from these manifests, it tells where images lie. If it
is missing or outdated, the ledgers tell, one small file per unit. The answer is written once to a table, and
the table is mapped into memory.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...pipeline.corpus import reader
from ...pipeline.io.failures import Kind, SourceUnavailable, classify, describe
from ...pipeline.io.location import is_bucket
from ...schemas.errors import BadSample, ConfigError, IntegrityError, ParaCaptionError
from ...schemas.manifest import Manifest
from ...schemas.sample import Sample
from ...schemas.training import CorpusSource, DataOptions
from ..model import tiling
from . import left_out
from .order import even_groups, keys_of, num_groups, varied_groups
from .read_ahead import ReadAhead, Wanted
from .table import Table, TableWriter, cached_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from ..model.processor import PerceptionDLMProcessor

_log = logging.getLogger(__name__)

_VERSION = 1
_OFFSETS = ("photo_offset", "photo_length", "json_offset", "json_length")
_COLUMNS = ["subset", "unit", "key", "caption", "image_width", "image_height", "shard", *_OFFSETS]
_COLUMNS += [left_out.FILE_NAME]
_IMAGE = np.dtype(
    [
        ("shard", "u4"),
        ("regions", "u2"),
        ("longest", "u2"),
        ("views", "u1"),
        ("key_bytes", "u1"),
        ("key", "u8"),
    ]
    + [(name, "u8" if name.endswith("offset") else "u4") for name in _OFFSETS]
)
"""An image: `longest` is the length of its longest caption in tokens, and `key` the offset of its key in the
table's bytes."""


class RegionGroup(NamedTuple):
    """A group of an image's regions, which is an item to train on.

    Attributes:
        image: index of the image in the corpus.
        group: index of the group among those of the image.
        regions: which of the image's shuffled regions are in it.
    """

    image: int
    group: int
    regions: slice


class TrainingCorpus:
    """The images of a corpus, and its items: groups of regions, those of one image after those of another.

    Args:
        table: the images, with the items next to them.
        path: folder or URL of the corpus.
        options: how images are cut into groups.
        seed: decides the sizes of the groups.
        processor: the model's processor, which decides the lengths of items.
        shards: in a bucket, the URL of each shard by its place below the corpus, as it was when the table's
            manifests were read. A rebuild gives new shards new names, and the old ones are kept for a while,
            so a run goes on with what it began with.
    """

    def __init__(
        self,
        table: Table,
        path: str,
        options: DataOptions,
        seed: int,
        processor: PerceptionDLMProcessor,
        shards: Mapping[str, str] = {},
    ):
        self.table, self.options, self.seed = table, options, seed
        self.corpus = reader.Corpus(path, confined=True)
        self.is_in_bucket = is_bucket(self.corpus.path)
        self._shards = [shards[place] for place in table.about["shards"]] if self.is_in_bucket else []
        self._ahead: ReadAhead[tuple[Sample, bytes]] | None = None
        config = processor.config
        self.num_prompts = config.num_prompts
        self.prefix_tokens = processor.make_prefix(0, 0).shape[1]
        self.view_tokens, self.region_tokens = config.tokens_per_tile, config.replay_tokens + 1
        self.item_image = np.memmap(table.folder / "item_image.bin", np.uint32, "r")
        self.item_group = np.memmap(table.folder / "item_group.bin", np.uint16, "r")

    def __reduce__(self) -> tuple[Any, ...]:
        own = {"item_image": None, "item_group": None, "_ahead": None}  # a process opens them by itself
        return _reopen, (self.table, self.__dict__ | own)

    @property
    def num_items(self) -> int:
        """Number of groups of regions."""
        return len(self.item_image)

    @property
    def fingerprint(self) -> str:
        """Identifies the items: it changes when they do."""
        return self.table.folder.name

    @property
    def left_out(self) -> dict[str, int]:
        """Number of images with kept regions that are not trained on, by reason."""
        return self.table.about.get("left_out", {})

    def groups(self, items: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The groups that items are in some passes over the corpus. A group may be empty.

        Args:
            items: (N,) indices of items.
            passes: (N,) index of the pass over the corpus (0, 1, ...).

        Returns:
            Where each group starts among its image's shuffled regions, and its size: (N,) int64 each.
        """
        image, group = self.item_image[items], self.item_group[items].astype(np.int64)
        regions = self.table.rows["regions"][image].astype(np.int64)
        groups = num_groups(regions, self.options.regions_per_group)
        if self.options.group_sizes == "even":
            return even_groups(regions, groups, group)
        keys = keys_of(image, passes, self.seed, "groups")
        return varied_groups(regions, groups, group, self.num_prompts, keys)

    def lengths(self, items: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of items in tokens.

        Args:
            items: (N,) indices of items.
            passes: (N,) index of the pass over the corpus (0, 1, ...).

        Returns:
            Tokens before the captions, and the most tokens that the captions can have: (N,) int64 each. Both
            are 0 for an empty group.
        """
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

    def region_group(self, item: int, pass_index: int) -> RegionGroup:
        """The group that an item is in a pass over the corpus."""
        (start,), (size,) = self.groups(np.array([item]), np.array([pass_index]))
        regions = slice(int(start), int(start + size))
        return RegionGroup(int(self.item_image[item]), int(self.item_group[item]), regions)

    def shard_and_key(self, image: int) -> tuple[str, str]:
        """The path or URL of an image's shard, and the image's key."""
        row = self.table.rows[image]
        key = self.table.bytes_at(int(row["key"]), int(row["key_bytes"])).decode()
        if self._shards:
            return self._shards[row["shard"]], key
        return f"{self.corpus.path}/{self.table.about['shards'][row['shard']]}", key

    def expect(self, images: Iterable[int]) -> None:
        """Say which images `read_sample` is asked for next, in order; from a bucket they are read ahead."""
        if not self.is_in_bucket:
            return
        if self._ahead is None:
            self._ahead = ReadAhead(self._read)
        rows, sizes = self.table.rows, ("photo_length", "json_length")
        self._ahead.expect(Wanted(each, sum(int(rows[name][each]) for name in sizes)) for each in images)

    def read_sample(self, image: int) -> tuple[Sample, bytes]:
        """An image's sample and the bytes of its photo, by one read.

        Raises:
            BadSample: the bytes there do not belong to this image; the message names shard and key.
            SourceUnavailable: they cannot be had now, and could not within `data.read_retry_s`.
            ConfigError: the bucket gives nothing to this user.
        """
        return self._read(image) if self._ahead is None else self._ahead.take(image)

    def _read(self, image: int) -> tuple[Sample, bytes]:
        row = self.table.rows[image]
        shard, key = self.shard_and_key(image)
        subset, path = self.table.about["shards"][row["shard"]].split("/", 1)
        offsets = {name: int(row[name]) for name in _OFFSETS}
        named = {"subset": subset, "shard": path, "key": key} | offsets
        try:
            sample, data = self.corpus.read_sample(named, shard if self._shards else None)
        except IntegrityError as error:
            raise self._failure(error, f"{shard}: {key}") from error
        if len(sample.regions) != row["regions"]:
            detail = (
                f"the shard has {len(sample.regions)} regions, but the ledger keeps {row['regions']}; "
                f"{reader.REBUILD}"
            )
            raise BadSample("shard_unreadable", f"{shard}: {key}: {detail}")
        return sample, data

    def _failure(self, error: IntegrityError, where: str) -> ParaCaptionError:
        """What to raise for a sample that could not be read: a store that is away is no verdict on it."""
        cause = error.__cause__
        if not isinstance(cause, OSError):
            return BadSample("shard_unreadable", str(error))
        kind = classify(cause)
        if self.is_in_bucket and isinstance(cause, FileNotFoundError):
            what = (
                "no such object: the corpus was built again after this run had begun, and what it replaced "
                "is kept for failures.keep_replaced_days; train in another `out`"
            )
            return BadSample("shard_unreadable", f"{where}: {what}")
        if self.is_in_bucket and kind in (Kind.REFUSED, Kind.SETUP):
            return ConfigError(f"{where}: {describe(cause)}; check the credentials and their permissions")
        if kind is Kind.TRANSIENT and cause.errno != errno.EIO:  # which a bad sector is, too, for ever
            return SourceUnavailable(
                f"{where}: {describe(cause)}; run the same command again when it can be read: training goes "
                "on from the last checkpoint"
            )
        return BadSample("shard_unreadable", str(error))


def _reopen(table: Table, state: dict[str, Any]) -> TrainingCorpus:
    opened = TrainingCorpus.__new__(TrainingCorpus)
    opened.__dict__.update(state)
    opened.item_image = np.memmap(table.folder / "item_image.bin", np.uint32, "r")
    opened.item_group = np.memmap(table.folder / "item_group.bin", np.uint16, "r")
    return opened


def open_training_corpus(
    source: CorpusSource,
    processor: PerceptionDLMProcessor,
    options: DataOptions,
    seed: int,
    cache: Path,
    held_out_share: float = 0.0,
) -> TrainingCorpus:
    """Open a corpus through its table in the cache, which is written if it is missing.

    The table's name covers all manifests, so that another state of the corpus has another table.

    Args:
        source: the corpus, and which of its subsets to take.
        processor: the model's processor.
        options: how images are cut into groups.
        seed: decides the sizes of the groups.
        cache: local folder of the tables.
        held_out_share: share of the images that are left out, as `filters.held_out` chooses them; that of
            the corpus, if it is larger.

    Raises:
        ConfigError: there is no corpus, or none of its regions was kept.
        IntegrityError: a manifest or ledger is damaged; the message names the file and what to do.
    """
    corpus = reader.open_corpus(source.corpus)
    committed = [name for name in corpus.subsets if corpus.units(name)]
    if absent := [name for name in source.subsets or () if name not in committed]:
        raise ConfigError(
            f"{source.corpus}: nothing of {', '.join(absent)} is committed; it has {', '.join(committed)}"
        )
    digests, shards = _committed(corpus, sorted(source.subsets or committed))
    current = corpus.index_is_current(digests)
    columns = _COLUMNS
    if current and not left_out.has_file_names(corpus):
        columns = [each for each in _COLUMNS if each != left_out.FILE_NAME]
    looked_at = [each for each in columns if each in ("subset", *left_out.COLUMNS, left_out.FILE_NAME)]
    tables = (table for _, table in _kept_regions(corpus, list(digests), current, looked_at))
    share = max(held_out_share, corpus.held_out_share)
    rules = left_out.rules_of(share, options, digests, tables, cache)
    config = processor.config
    facts = [_VERSION, repr(sorted(digests.items())), config.tile_px, config.max_tiles]
    facts += [options.regions_per_group, tokenizer_digest(processor), *rules.facts()]
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        if not current:
            warning = (
                "the index does not match the manifests, so all ledgers are read, which is slower; "
                "`paracaption merge CONFIG` writes the index"
            )
            _log.warning("%s: %s", corpus.path, warning)
        parts = _kept_regions(corpus, list(digests), current, columns)
        _write_table(folder, corpus, parts, rules, processor, options)

    folder = cached_folder(cache, f"corpus-{name}", write)
    return TrainingCorpus(Table(folder, _IMAGE), corpus.path, options, seed, processor, shards)


def _committed(corpus: reader.Corpus, subsets: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The digest of each subset's manifests, and where the shards of these manifests lie, by their places."""
    digests, shards = {}, {}
    for subset in subsets:
        digest = hashlib.sha256()
        for unit, manifest in corpus.manifest_bytes(subset):
            digest.update(manifest)
            shards[unit.shard_place] = unit.shard
        digests[subset] = digest.hexdigest()
    return digests, shards


def unfinished(source: CorpusSource) -> str:
    """What a build still has to do before the corpus is complete, as a text; "" if it is complete.

    Raises:
        IntegrityError: a file of the corpus is damaged.
    """
    corpus = reader.Corpus(source.corpus, confined=True)
    try:
        names = source.subsets or tuple(corpus.config.subsets)
    except ConfigError:
        return f"{source.corpus}: not there yet"
    try:
        left = {name: corpus.num_planned_units(name) - len(corpus.units(name)) for name in names}
    except ConfigError as error:
        return str(error)
    if missing := [f"{number:,} units of {name}" for name, number in left.items() if number > 0]:
        return ", ".join(missing)
    current = corpus.index_is_current({name: corpus.digest(name) for name in names})
    return "" if current else "the index, which `paracaption merge CONFIG` writes"


def tokenizer_digest(processor: PerceptionDLMProcessor) -> str:
    """Identifies a tokenizer: it changes when a text could have other tokens."""
    return hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def token_lists(processor: PerceptionDLMProcessor, texts: list[str]) -> list[list[int]]:
    """The tokens of some texts. A text that looks like a special token is tokenized as text."""
    if not texts:
        return []
    return processor.tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
    )["input_ids"]


def _write_table(
    folder: Path,
    corpus: reader.Corpus,
    parts: Iterator[tuple[_Units, pa.Table]],
    rules: left_out.Rules,
    processor: PerceptionDLMProcessor,
    options: DataOptions,
) -> None:
    shards: list[str] = []
    writer, seen, omitted = TableWriter(folder), 0, Counter[str]()
    with open(folder / "item_image.bin", "xb") as images, open(folder / "item_group.bin", "xb") as groups:
        for units, whole in parts:
            _compare(corpus, whole, units)
            numbers = {unit.name: len(shards) + number for number, (unit, _) in enumerate(units)}
            shards += [f"{unit.subset}/{each.shard.path}" for unit, each in units if each.shard]
            table, reasons = left_out.apply(rules, whole)
            omitted.update(reasons)
            if not table.num_rows:
                continue
            rows, firsts = _images(table, processor, writer)
            rows["shard"] = [numbers[name] for name in table["unit"].take(firsts).to_pylist()]
            counts = num_groups(rows["regions"], options.regions_per_group)
            np.repeat(np.arange(len(rows), dtype=np.uint32) + np.uint32(writer.num_rows), counts).tofile(
                images
            )
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            (np.arange(counts.sum()) - starts).astype(np.uint16).tofile(groups)
            writer.add(rows)
            seen += table.num_rows
    if not seen and omitted:
        raise ConfigError(
            f"{corpus.path}: nothing is left to train on after leaving out {left_out.said(omitted)}"
        )
    if not seen:
        raise ConfigError(
            f"{corpus.path}: no region was kept, so there is nothing to train on; name another corpus"
        )
    writer.close({"shards": shards, "regions": seen} | ({"left_out": omitted} if omitted else {}))


_Units = list[tuple[reader.Unit, Manifest]]


def _kept_regions(
    corpus: reader.Corpus, subsets: list[str], from_index: bool, columns: list[str]
) -> Iterator[tuple[_Units, pa.Table]]:
    """Rows of kept regions in the index's order, some whole units at a time, with these units' manifests."""
    import pyarrow as pa

    units = ((unit, each) for subset in subsets for unit, each in corpus.manifests(subset) if each.kept)
    if not from_index:
        for unit, manifest in units:
            table = reader.read_ledger(unit.ledger, [*columns, "kept"])
            yield [(unit, manifest)], table.filter(table["kept"]).combine_chunks()
        return
    for table in corpus.index(columns):
        table = table.filter(pa.array(np.isin(table["subset"].to_numpy(), subsets))).combine_chunks()
        if table.num_rows:
            yield list(islice(units, len(table["unit"].unique()))), table
    if missing := next(units, None):
        index = f"{corpus.path}/{reader.INDEX}"
        raise IntegrityError(
            f"{index}: the unit {missing[0].name} is not in it; run `paracaption merge CONFIG`"
        )


def _images(
    table: pa.Table, processor: PerceptionDLMProcessor, writer: TableWriter
) -> tuple[np.ndarray, np.ndarray]:
    """From a table with a row per region, the rows of the images, and in which row each image starts."""
    firsts, keys = left_out.first_rows(table), table["key"].to_numpy()
    rows = np.zeros(len(firsts), _IMAGE)
    rows["regions"] = np.diff(np.append(firsts, table.num_rows))
    tokens = [len(ids) for ids in token_lists(processor, table["caption"].to_pylist())]
    rows["longest"] = np.maximum.reduceat(np.minimum(tokens, 65_535), firsts)
    for name in _OFFSETS:
        rows[name] = table[name].to_numpy()[firsts]
    sizes = np.stack([table[f"image_{side}"].to_numpy()[firsts] for side in ("width", "height")], axis=1)
    rows["views"] = views_of(sizes, processor)
    encoded = [key.encode() for key in keys[firsts]]
    rows["key_bytes"] = lengths = np.array([len(key) for key in encoded])
    rows["key"] = writer.put(b"".join(encoded)) + np.cumsum(lengths) - lengths
    return rows, firsts


def views_of(sizes: np.ndarray, processor: PerceptionDLMProcessor) -> np.ndarray:
    """How many views images have: (N,) from their widths and heights (N, 2)."""
    tile, most = processor.config.tile_px, processor.config.max_tiles
    kinds, which = np.unique(sizes, axis=0, return_inverse=True)
    views = [tiling.num_views(tiling.tile_grid(w, h, tile, most)) for w, h in kinds.tolist()]
    return np.array(views)[which.ravel()]


def _compare(corpus: reader.Corpus, table: pa.Table, units: _Units) -> None:
    """Check that every image has as many regions, and lies in the shard, as the manifest of its unit says."""
    found: dict[str, dict[str, int]] = {unit.name: {} for unit, _ in units}
    counts = table.group_by(["unit", "key"]).aggregate([("caption", "count")]).to_pydict()
    for name, key, count in zip(*counts.values(), strict=True):
        found.setdefault(name, {})[key] = count
    for unit, manifest in units:
        expected = {key: kept for key, kept in manifest.images.items() if kept}
        if different := expected.items() ^ found.pop(unit.name).items():
            key = min(different)[0]
            raise IntegrityError(
                f"{unit.manifest}: {key} has {expected.get(key, 0)} kept regions, but the index or the "
                "ledger has another number; "
                "run `paracaption verify CORPUS`"
            )
    if found:
        index = f"{corpus.path}/{reader.INDEX}"
        raise IntegrityError(f"{index}: {min(found)} is not a committed unit; run `paracaption merge CONFIG`")
    known = {unit.name: (unit, manifest.shard and manifest.shard.path) for unit, manifest in units}
    for row in table.group_by(["unit", "shard"]).aggregate([]).to_pylist():
        (unit, path), shard = known[row["unit"]], row["shard"]
        # Without a path, the shards behind this one would be miscounted.
        if path is None or shard not in (path, f"{unit.subset}/{path}"):
            names = f"its ledger names {shard or 'no shard'}, the manifest {path or 'none'}"
            raise IntegrityError(f"{unit.manifest}: {names}; {reader.REBUILD}")
