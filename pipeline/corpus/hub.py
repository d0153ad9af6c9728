"""Lays a corpus out as a dataset repository that `datasets`, webdataset and the hub's viewer read.

    README.md  LICENSE.md                          the card, with what `datasets` reads at its head
    data/<subset>/<split>-00000-of-00012.tar       the samples, byte for byte, in the order of the corpus
    index/<split>.parquet                          a row per region

A repository is whole, or absent: everything is written into another folder that gets its name at the end. An
export that was interrupted goes on (`hub_unfinished`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ...schemas.errors import REBUILD, ConfigError, IntegrityError
from ...schemas.summary import CorpusSummary
from ..io.location import Location
from . import energon as energon_files
from . import hub_card, ledger, reader
from .hub_plan import INDEX, SHARD_MB, HubPlan, PlannedImage, Shard, images_of, plan_hub
from .hub_shards import Shards
from .hub_unfinished import Unfinished, unfinished
from .ledger import Place
from .reader import Corpus
from .shard import StoredSample, iter_stored
from .units import Unit

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_GROUP = 131_072

Written = Callable[[int], None]
"""Is given the bytes of every shard when it is written."""


class Repository(NamedTuple):
    """A dataset repository before it is written.

    Attributes:
        plan: its shards.
        texts: the text files by their names.
        energon: whether Megatron-Energon's metadata is written next to the shards.
    """

    plan: HubPlan
    texts: dict[str, str]
    energon: bool

    @property
    def front_matter(self) -> str:
        """The head of the card, as YAML."""
        return self.texts["README.md"].split("---\n")[1]


def plan_repository(
    corpus: str | Location, split: str | None = None, shard_mb: float = SHARD_MB, energon: bool = False
) -> Repository:
    """Plan a repository; nothing is written.

    Args:
        corpus: path or URL of a merged corpus.
        split: `train`, `held_out`, or `all`, which is the default.
        shard_mb: most megabytes (of 1,000,000 bytes) of a shard; a larger sample has a shard of its own.
        energon: whether to add Megatron-Energon's metadata.

    Raises:
        ConfigError: no such split, or nothing in it; or the corpus has no statistics or configuration.
        IntegrityError: the corpus is damaged.
    """
    plan = plan_hub(corpus, split, shard_mb)
    summary, config = _current_summary(plan.corpus), plan.corpus.config
    texts = {
        "README.md": hub_card.render_card(plan, summary, config, energon),
        hub_card.LICENSE_FILE: hub_card.render_license(summary, config),
    }
    if energon:
        texts |= energon_files.texts(plan)
    return Repository(plan, texts, energon)


def _current_summary(corpus: Corpus) -> CorpusSummary:
    summary = corpus.summary
    if not corpus.index_is_current():
        raise ConfigError(
            f"{corpus.path}: units were committed since the last merge; run `paracaption merge CONFIG`"
        )
    return summary


def write_repository(repository: Repository, to: str | Path, written: Written = lambda _: None) -> list[Path]:
    """Write a planned repository.

    Args:
        repository: as `plan_repository` made it.
        to: a folder that does not exist yet, or is empty.
        written: is called with the bytes of each shard that is written.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the folder has something in it, its disk is too small, or another process is at it.
        IntegrityError: the corpus is damaged, or was changed meanwhile; nothing is left.
    """
    to, plan = Path(to), repository.plan
    with unfinished(to, _identity(repository), {each.path: each.bytes for each in plan.shards}) as begun:
        _check_space(plan, to, begun.kept)
        _write(repository, begun, written)
        paths = begun.paths()
    return [to / path for path in paths]


def _identity(repository: Repository) -> str:
    """Of all that the shards depend on."""
    corpus = repository.plan.corpus
    digests = {subset: corpus.digest(subset) for subset in repository.plan.subsets}
    what = (version("paracaption"), repository.plan.shards, repository.texts, digests)
    return hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()


def _write(repository: Repository, begun: Unfinished, written: Written) -> None:
    plan, folder = repository.plan, begun.folder
    for name, text in repository.texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    with ExitStack() as opened:
        index = {split: opened.enter_context(_Index(folder, split)) for split in plan.splits}
        metadata = opened.enter_context(energon_files.Metadata(plan, folder)) if repository.energon else None

        def closed(shard: Shard, places: dict[str, Place], sha256: str) -> None:
            if sha256:
                begun.note(shard.path, sha256)
            if metadata is not None:
                metadata.add(shard, places)
            written(shard.bytes)

        shards = opened.enter_context(Shards(plan, folder, frozenset(begun.kept), closed))
        for unit in plan.corpus.units():
            _write_unit(unit, shards, index)
        shards.finish()
        _check_index(plan, index)


def _check_index(plan: HubPlan, index: dict[str, _Index]) -> None:
    for split, found in index.items():
        regions = sum(shard.regions for shard in plan.of(split=split))
        if found.num_rows != regions:
            raise IntegrityError(
                f"{plan.corpus.path}: the ledgers have {found.num_rows:,} rows for the {regions:,} regions "
                f"of the shards of {split}; run `paracaption verify CORPUS`"
            )


def _check_space(plan: HubPlan, to: Path, kept: Collection[str]) -> None:
    needed = sum(shard.bytes for shard in plan.shards if shard.path not in kept)
    folder = next(each for each in (to, *to.absolute().parents) if each.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{to}: the shards take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there; "
            "free space, or name a folder on another disk"
        )


def _write_unit(unit: Unit, shards: Shards, index: dict[str, _Index]) -> None:
    places: dict[str, dict[str, tuple[Shard, Place]]] = {split: {} for split in index}
    images = _images_of_kept(unit, shards)
    for image in images:
        if (split := shards.plan.split_of(image.key)) is not None:
            places[split][image.key] = shards.pass_over(unit.subset, split, image)
    for stored in () if images else stored_samples(unit):
        if (split := shards.plan.split_of(stored.sample.key)) is not None:
            places[split][stored.sample.key] = shards.add(unit.subset, split, stored)
    table = reader.read_ledger(unit.ledger, [*ledger.index_schema().names, "kept"])
    rows = table.filter(table["kept"]).drop_columns(["kept"])
    for split, found in places.items():
        index[split].add(rows, found)


def _images_of_kept(unit: Unit, shards: Shards) -> list[PlannedImage]:
    """The images of a unit, if all of them are in shards that are there already; else none."""
    if not shards.has_kept:
        return []
    images = list(images_of(unit))
    splits = Counter(split for image in images if (split := shards.plan.split_of(image.key)) is not None)
    are_kept = all(shards.are_kept(unit.subset, split, number) for split, number in splits.items())
    return images if are_kept else []


def stored_samples(unit: Unit) -> Iterator[StoredSample]:
    """The samples of a unit, of which each has the number of regions that its manifest says."""
    manifest = reader.read_manifest(unit.manifest)
    wanted = {key: kept for key, kept in manifest.images.items() if kept}
    for stored in iter_stored(unit.shard) if manifest.shard else ():
        sample = stored.sample
        regions = len(sample.regions)
        if sample.subset != unit.subset or wanted.pop(sample.key, None) != regions:
            number = manifest.images.get(sample.key)
            what = f"{sample.key!r} has {regions} regions, its manifest says {number}"
            raise IntegrityError(f"{unit.shard}: {what}; run `paracaption verify CORPUS`")
        yield stored
    if wanted:
        raise IntegrityError(f"{unit.shard}: {min(wanted)!r} is missing, its manifest has it; {REBUILD}")


class _Index:
    """`index/<split>.parquet`: the corpus's index, with the places in the repository's shards."""

    def __init__(self, folder: Path, split: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._split = split
        self.schema = ledger.index_schema().append(pa.field(ledger.SPLIT, pa.string(), False))
        options = ledger.writing_options()
        options["use_dictionary"] = [*options["use_dictionary"], ledger.SPLIT]
        (folder / INDEX).mkdir(exist_ok=True)
        file = self._file = open(folder / INDEX / f"{split}.parquet", "xb")
        self._writer = pq.ParquetWriter(file, self.schema, **options)
        self._waiting: list[pa.Table] = []
        self.num_rows = 0

    def __enter__(self) -> _Index:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._flush()
            self._writer.close()
        finally:
            self._file.close()

    def add(self, rows: pa.Table, places: dict[str, tuple[Shard, Place]]) -> None:
        """Append the rows of the images that have a place."""
        import pyarrow as pa

        keys = rows["key"].combine_chunks().dictionary_encode()
        found = [places.get(key) for key in keys.dictionary.to_pylist()]
        columns: dict[str, Any] = {"shard": [at and at[0].path for at in found]}
        for number, name in enumerate(Place._fields):
            columns[name] = [at and at[1][number] for at in found]
        for name, values in columns.items():
            at = rows.schema.get_field_index(name)
            field = rows.schema.field(at)
            rows = rows.set_column(at, field, pa.array(values, field.type).take(keys.indices))
        rows = rows.append_column(self.schema.field(ledger.SPLIT), pa.repeat(self._split, len(rows)))
        rows = rows.filter(rows["shard"].is_valid())
        self.num_rows += rows.num_rows
        self._waiting.append(rows)
        if sum(each.num_rows for each in self._waiting) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            table = pa.concat_tables(self._waiting).combine_chunks()
            self._waiting.clear()
            self._writer.write_table(table, row_group_size=1 << 30)
