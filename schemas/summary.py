"""`OUT/stats.json`, the statistics of a corpus: what was declared, dropped and kept, with distributions."""

from __future__ import annotations

import msgspec

from .manifest import FileEntry
from .reasons import Reason


class FunnelStep(msgspec.Struct):
    """One step of the funnel: regions that reached it, how many it dropped, and why (most frequent first)."""

    stage: str
    regions_in: int
    dropped: int
    reasons: dict[str, int]


class SubsetCounts(msgspec.Struct, omit_defaults=True):
    """The sum of a subset's manifests.

    Attributes:
        units: number of committed units.
        images: number of images in all units.
        images_captioned: number of images with at least one kept region.
        images_dropped: number of images that were dropped as a whole, by reason.
        regions: number of regions that the source declared.
        kept: number of regions in the shards.
        funnel: the steps in order. A step's `regions_in` is that of the step before it, less what that step
            dropped.
        shard_bytes: size of all shards together.
        plans, recipes: digests of the work lists and recipes of the units. A sound corpus has one recipe, and
            a plan for each step in which it has grown.
        manifests: SHA-256 over the bytes of all manifests in the order of their units. Index and statistics
            are current as long as it is the same.
        failed: number of images whose source could not be read, by the kind of the failure; `--retry-failed`
            reads them again. Not in the file if there are none.
        images_held_out, kept_held_out: how many of the images with a kept region, and of the kept regions,
            are held out of training. Not in the file if there are none.
    """

    units: int
    images: int
    images_captioned: int
    images_dropped: dict[str, int]
    regions: int
    kept: int
    funnel: list[FunnelStep]
    shard_bytes: int
    plans: list[str]
    recipes: list[str]
    manifests: str
    failed: dict[str, int] = {}
    images_held_out: int = 0
    kept_held_out: int = 0

    @property
    def benchmark_photos(self) -> int:
        """Number of images that are left out because they are photos of benchmarks."""
        return self.images_dropped.get(Reason.BENCHMARK_PHOTO, 0)


class Histogram(msgspec.Struct):
    """Number of values per bin: `edges[i] <= value < edges[i + 1]`. `mean` is exact, over all values."""

    edges: list[int]
    counts: list[int]
    mean: float

    @property
    def total(self) -> int:
        """Number of values."""
        return sum(self.counts)

    def quantile(self, share: float) -> int:
        """The lower edge of the bin in which the given share of values is reached; 0 if there are none."""
        left = share * self.total
        for edge, count in zip(self.edges, self.counts, strict=False):
            left -= count
            if left <= 0 and count:
                return edge
        return 0


class LicenseCount(msgspec.Struct):
    """Number of images with a kept region under one license; `license` is "" where none is stated."""

    license: str
    license_url: str
    images: int


class SubsetSummary(msgspec.Struct, omit_defaults=True):
    """The statistics of a subset. Distributions cover kept regions, except those named `..._declared`.

    Attributes:
        counts: the sum of the manifests.
        categories: the most frequent categories as (name, number of regions). A region's category is the
            annotated one, or else the one that the judge named from the caption.
        num_categories: number of different categories.
        caption_words, caption_chars: lengths of the captions in words and in characters.
        regions_per_image: over images with at least one kept region.
        regions_per_image_declared: over all images.
        area_px, area_px_declared: areas of the masks in pixels; each bin spans a factor of two.
        licenses: the most frequent licenses, as the images' records name them. Not in the file if none does.
        num_licenses: number of different licenses.
    """

    counts: SubsetCounts
    categories: list[tuple[str, int]]
    num_categories: int
    caption_words: Histogram
    caption_chars: Histogram
    regions_per_image: Histogram
    regions_per_image_declared: Histogram
    area_px: Histogram
    area_px_declared: Histogram
    licenses: list[LicenseCount] = []
    num_licenses: int = 0


class CorpusSummary(msgspec.Struct, omit_defaults=True):
    """The statistics of a corpus. Equal for equal committed units.

    Attributes:
        images, images_captioned, regions, kept: as in `SubsetCounts`, summed over the subsets.
        index: the `index.parquet` that was written together with these statistics.
        subsets: the statistics of each subset by its name.
        held_out_share: share of the images that are held out of training; not in the file if it is 0.
    """

    images: int
    images_captioned: int
    regions: int
    kept: int
    index: FileEntry
    subsets: dict[str, SubsetSummary]
    held_out_share: float = 0.0
