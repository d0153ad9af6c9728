"""Merges the committed units into one corpus: index of the kept regions, statistics, plots, dataset card.

Everything streams unit by unit, so memory does not grow with the corpus, and everything comes from committed
units alone, so merging again gives the same bytes. Nothing here touches a shard.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ...filters.held_out import is_held_out
from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.manifest import FileEntry, Manifest
from ...schemas.summary import CorpusSummary, FunnelStep, Histogram, LicenseCount, SubsetCounts, SubsetSummary
from ..io import files
from ..io.activity import NOW
from ..io.location import Location
from ..sources.protocols import SOURCE_STAGE
from ..stages.recipes import shown_stages
from ..stages.registry import STAGES
from . import card, ledger, log, plots, reader
from .owner import Owner, own_or
from .reader import Corpus
from .records import LogFile, Merged
from .sweep import sweep

if TYPE_CHECKING:
    import pyarrow as pa

PLOTS = "plots"
CARD = "README.md"
TOP_CATEGORIES = 100
TOP_LICENSES = 100

_ROWS_PER_GROUP = 131_072
_CHARS_PER_BIN = 25
_LICENSE = ["license", "license_url", "license_id"]


def merge(
    out: str | Location, config: BuildConfig | None = None, owner: Owner | None = None
) -> dict[str, Any]:
    """Write `index.parquet`, `stats.json`, `plots/` and `README.md` of a corpus, by one record of the log.

    The index has a row per kept region, sorted by subset, unit, image and region. Its `shard` is a path from
    the corpus's folder, as in `coconut/shards/coconut-000000.tar`.

    Args:
        out: the corpus.
        config: of the build; default: `OUT/config.yaml`.
        owner: of the corpus; None takes the corpus over for the length of the call.

    Returns:
        What `stats.json` holds.

    Raises:
        ConfigError: a build is writing there.
        Fenced: another driver has taken over.
        IntegrityError: a manifest or ledger cannot be read, or they disagree; `verify` says more.
    """
    corpus = reader.open_corpus(out, confined=owner is None)
    config = config or corpus.config
    with own_or(owner, corpus.path, "merge") as found:
        if owner is None:
            sweep(found)  # what a merge that was killed has left
        return msgspec.to_builtins(_merge(corpus, config, found))


def _merge(corpus: Corpus, config: BuildConfig, owner: Owner) -> CorpusSummary:
    summaries, index = _write_index(corpus, config, owner)
    totals = {
        name: sum(getattr(summary.counts, name) for summary in summaries.values())
        for name in ("images", "images_captioned", "regions", "kept")
    }
    entry = FileEntry(index.path, index.bytes, index.sha256)
    summary = CorpusSummary(**totals, index=entry, subsets=summaries)
    if config.held_out_share:  # a 0 would be written, too, and older releases had none
        summary.held_out_share = config.held_out_share
    NOW.at("plots")
    drawn = plots.draw_plots(summary)
    NOW.at("card")
    text = card.render_card(summary, config)
    made = [
        index,
        owner.write(reader.STATS, files.json_text(summary)),
        *(owner.write(f"{PLOTS}/{name}", data) for name, data in drawn.items()),
        owner.write(CARD, text.encode()),
    ]
    owner.append(Merged(files=made))
    return summary


def is_merged(out: str | Location, held_out_share: float | None = None) -> bool:
    """Whether index, statistics, plots and card exist and are of the units that are committed now.

    Args:
        out: the corpus.
        held_out_share: that they have to hold out; None for any.

    Raises:
        ConfigError: there is no corpus at that path.
    """
    corpus = reader.open_corpus(out, confined=False)
    drawn = [CARD, *(f"{PLOTS}/{name}" for name in plots.NAMES)]
    if not all(files.exists(log.place_of(out, name)) for name in drawn) or not corpus.index_is_current():
        return False
    return held_out_share in (None, corpus.summary.held_out_share)


def count_subset(corpus: Corpus, subset: str) -> SubsetCounts:
    """The funnel and the counts of a subset from its manifests alone: cheap, and right while a build runs.

    Raises:
        IntegrityError: a manifest cannot be read.
    """
    sums = _ManifestSums(_stage_names(corpus, subset, None), _known_share(corpus))
    for unit, data in corpus.manifest_bytes(subset):
        sums.add(reader.decode_manifest(data, unit.manifest), data)
    return sums.result()


def _stage_names(corpus: Corpus, subset: str, config: BuildConfig | None) -> list[str]:
    """The stages of a subset's recipe; every stage, if the configuration of the last build cannot tell.

    Members of a composite stage are not among them: their drops are the composite's.
    """
    try:
        return list(shown_stages(config or corpus.config, subset))
    except (ConfigError, IntegrityError):
        return list(STAGES)


def _known_share(corpus: Corpus) -> float:
    """The share of held-out images; 0, so that none is counted, if a damaged configuration cannot tell."""
    try:
        return corpus.held_out_share
    except IntegrityError:
        return 0.0


def count_funnel(stages: Sequence[str], regions: int, dropped: dict[str, int]) -> list[FunnelStep]:
    """What each step of a recipe took away, in order.

    The source is the first step. Writing is one more, at the end, if it had to drop a photo that disappeared.

    Args:
        stages: names of the recipe's stages, in order.
        regions: declared by the source.
        dropped: regions by "stage/reason".
    """
    by_stage: dict[str, Counter[str]] = {stage: Counter() for stage in (SOURCE_STAGE, *stages)}
    for name in sorted(dropped):
        stage, _, reason = name.partition("/")
        by_stage.setdefault(stage, Counter())[reason] += dropped[name]
    steps = []
    for stage, reasons in by_stage.items():
        ranked = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
        steps.append(FunnelStep(stage, regions, reasons.total(), ranked))
        regions -= reasons.total()
    return steps


class _ManifestSums:
    """Adds up the manifests of a subset."""

    def __init__(self, stages: Sequence[str], held_out_share: float):
        self.stages, self.share = stages, held_out_share
        self.numbers: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.images_dropped: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.plans: set[str] = set()
        self.recipes: set[str] = set()
        self.digest = hashlib.sha256()

    def add(self, manifest: Manifest, data: bytes) -> None:
        self.digest.update(data)
        self.numbers["units"] += 1
        self.numbers["images"] += len(manifest.images)
        self.numbers["images_captioned"] += sum(kept > 0 for kept in manifest.images.values())
        self.numbers["regions"] += manifest.regions_in
        self.numbers["kept"] += manifest.kept
        self.numbers["shard_bytes"] += manifest.shard.bytes if manifest.shard else 0
        if self.share:
            held = [kept for key, kept in manifest.images.items() if kept and is_held_out(key, self.share)]
            self.numbers["images_held_out"] += len(held)
            self.numbers["kept_held_out"] += sum(held)
        self.dropped.update(manifest.dropped)
        self.images_dropped.update({reason.value: n for reason, n in manifest.images_dropped.items()})
        self.failed.update(manifest.failed)
        self.plans.add(manifest.plan)
        self.recipes.add(manifest.recipe)

    def result(self) -> SubsetCounts:
        names = ("units", "images", "images_captioned", "regions", "kept", "shard_bytes")
        names += ("images_held_out", "kept_held_out")
        numbers = {name: self.numbers[name] for name in names}
        return SubsetCounts(
            **numbers,
            images_dropped=dict(sorted(self.images_dropped.items())),
            funnel=count_funnel(self.stages, self.numbers["regions"], self.dropped),
            plans=sorted(self.plans),
            recipes=sorted(self.recipes),
            manifests=self.digest.hexdigest(),
            failed=dict(sorted(self.failed.items())),
        )


class _Tally:
    """A histogram of non-negative numbers that grows with its largest bin, not with the number of values."""

    def __init__(self, width: int = 1, octaves: bool = False):
        self.width = width
        self.octaves = octaves
        self.counts = np.zeros(1, np.int64)
        self.sum = 0

    def add(self, values: np.ndarray) -> None:
        if not values.size:
            return
        values = values.astype(np.int64)
        self.sum += int(values.sum())
        bins = np.frexp(np.maximum(values, 1))[1] - 1 if self.octaves else values // self.width
        fresh = np.bincount(bins, minlength=self.counts.size)
        fresh[: self.counts.size] += self.counts
        self.counts = fresh

    def result(self) -> Histogram:
        filled = np.flatnonzero(self.counts)
        first = int(filled[0]) if self.octaves and filled.size else 0
        last = int(filled[-1]) + 1 if filled.size else first
        edges = [1 << i if self.octaves else i * self.width for i in range(first, last + 1)]
        total = int(self.counts.sum())
        mean = round(self.sum / total, 3) if total else math.nan
        return Histogram(edges, self.counts[first:last].tolist(), mean if total else 0.0)


class _LedgerStatistics:
    """Adds up what the ledgers of a subset say of its regions."""

    def __init__(self) -> None:
        self.categories: Counter[str] = Counter()
        self.licenses: Counter[tuple[str, str]] = Counter()
        self.words = _Tally()
        self.chars = _Tally(_CHARS_PER_BIN)
        self.per_image = _Tally()
        self.per_image_declared = _Tally()
        self.area = _Tally(octaves=True)
        self.area_declared = _Tally(octaves=True)

    def add(self, table: pa.Table, kept: pa.Table) -> None:
        pc: Any = importlib.import_module("pyarrow.compute")  # its functions are made when it is imported
        named = pc.coalesce(kept["category"], kept["core_category"], "")
        self.categories.update({each["values"]: each["counts"] for each in named.value_counts().to_pylist()})
        images = kept.group_by(["key", *_LICENSE]).aggregate([]).select(_LICENSE).to_pylist()
        self.licenses.update(_license_of(image) for image in images)
        self.words.add(_numbers(kept["num_words"]))
        self.chars.add(_numbers(pc.utf8_length(kept["caption"])))
        self.area.add(_numbers(kept["area"]))
        self.area_declared.add(_numbers(table["area"]))
        for tally, rows in ((self.per_image, kept), (self.per_image_declared, table)):
            each = rows.group_by("key").aggregate([("region", "count")])
            tally.add(_numbers(each["region_count"]))

    def result(self, counts: SubsetCounts) -> SubsetSummary:
        ranked = sorted(self.categories.items(), key=lambda item: (-item[1], item[0]))
        licenses = sorted(self.licenses.items(), key=lambda item: (-item[1], item[0]))
        licenses = licenses if any(name for (name, _), _ in licenses) else []
        return SubsetSummary(
            counts=counts,
            categories=ranked[:TOP_CATEGORIES],
            num_categories=len(ranked),
            caption_words=self.words.result(),
            caption_chars=self.chars.result(),
            regions_per_image=self.per_image.result(),
            regions_per_image_declared=self.per_image_declared.result(),
            area_px=self.area.result(),
            area_px_declared=self.area_declared.result(),
            licenses=[LicenseCount(*names, number) for names, number in licenses[:TOP_LICENSES]],
            num_licenses=sum(name != "" for (name, _), _ in licenses),
        )


def _license_of(image: dict[str, str | None]) -> tuple[str, str]:
    """A license's name and address; of one that no list names, its id."""
    name, url, number = (image[column] or "" for column in _LICENSE)
    return name or url or (f"id {number}, not in the source's list" if number else ""), url


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.drop_null().to_numpy()


def _write_index(
    corpus: Corpus, config: BuildConfig, owner: Owner
) -> tuple[dict[str, SubsetSummary], LogFile]:
    import pyarrow.parquet as pq

    summaries: dict[str, SubsetSummary] = {}
    as_before, share = has_early_index(corpus), config.held_out_share
    names = ledger.index_schema(credits=not as_before).names
    schema, options = _index_form(as_before, share)
    with owner.open(reader.INDEX) as file, pq.ParquetWriter(file, schema, **options) as writer:
        waiting: list[pa.Table] = []
        for subset in corpus.subsets:
            sums = _ManifestSums(_stage_names(corpus, subset, config), share)
            statistics = _LedgerStatistics()
            for unit, data in corpus.manifest_bytes(subset):
                NOW.at(f"{subset}/{unit.name}")
                manifest = reader.decode_manifest(data, unit.manifest)
                table = reader.read_ledger(unit.ledger)
                kept = table.filter(table["kept"])
                if kept.num_rows != manifest.kept:
                    raise IntegrityError(
                        f"{unit.ledger}: has {kept.num_rows} kept regions, its manifest {manifest.kept}; "
                        "run `paracaption verify CORPUS`"
                    )
                sums.add(manifest, data)
                statistics.add(table, kept)
                rows = _index_rows(kept.select(names), "" if as_before else subset)
                waiting.append(_with_split(rows, share) if share else rows)
                if sum(each.num_rows for each in waiting) >= _ROWS_PER_GROUP:
                    _flush(writer, waiting)
            summaries[subset] = statistics.result(sums.result())
        _flush(writer, waiting)
    return summaries, file.entry


def _index_form(as_before: bool, held_out_share: float) -> tuple[pa.Schema, dict[str, Any]]:
    """The index's schema and how it is written. Only where images are held out, it has a column for that."""
    import pyarrow as pa

    schema, options = ledger.index_schema(credits=not as_before), ledger.writing_options()
    if held_out_share:
        schema = schema.append(pa.field(ledger.SPLIT, pa.string(), False))
        options["use_dictionary"] = [*options["use_dictionary"], ledger.SPLIT]
    return schema, options


def _with_split(rows: pa.Table, share: float) -> pa.Table:
    """Rows of the index with the split of their images, which each key decides."""
    import pyarrow as pa

    keys = rows["key"].combine_chunks().dictionary_encode()
    splits = ["held_out" if is_held_out(key, share) else "train" for key in keys.dictionary.to_pylist()]
    field = pa.field(ledger.SPLIT, pa.string(), False)
    return rows.append_column(field, pa.array(splits, pa.string()).take(keys.indices))


def has_early_index(corpus: Corpus) -> bool:
    """Whether there is an index of an early release, whose shards are seen from their subset's folder.

    It stays so: an old corpus that is built, merged or exported again keeps its bytes. Whoever wants the
    present form deletes the index, and merges.
    """
    try:
        first = next((table for table in corpus.index(["shard"]) if table.num_rows), None)
    except (ConfigError, IntegrityError, OSError):
        return False
    return first is not None and first["shard"][0].as_py().count("/") == 1


def _index_rows(kept: pa.Table, subset: str) -> pa.Table:
    """Kept rows of a ledger, with the shard's path from the corpus's folder; "" leaves the ledger's path."""
    if not subset:
        return kept
    pc: Any = importlib.import_module("pyarrow.compute")
    place = kept.schema.get_field_index("shard")
    return kept.set_column(
        place, kept.schema.field(place), pc.binary_join_element_wise(subset, kept["shard"], "/")
    )


def _flush(writer: Any, waiting: list[pa.Table]) -> None:
    import pyarrow as pa

    if waiting:
        writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=1 << 30)
        waiting.clear()
