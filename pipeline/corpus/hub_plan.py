"""Plans a dataset repository: which shards it gets, and how large each becomes, from ledgers and manifests.

No shard of the corpus is read for it, so a large corpus is planned in seconds. The writer has to arrive
at the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...filters.held_out import Split, is_held_out
from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.sample import PHOTO_ENDING
from ..io.location import Location
from . import merge, reader
from .reader import Corpus
from .tar import archive_size, member_size
from .units import Unit

SPLITS = {"train": "train", "held_out": "validation"}
"""The splits of a corpus by the names that hubs and loaders know. The order is that of the card."""

INDEX = "index"
SHARD_MB = 1000
"""Default size of a shard, in MB: hubs advise files of some hundred MB to a few GB."""


class Shard(NamedTuple):
    """A shard of a repository.

    Attributes:
        path: below the repository.
        subset, split: what it has images of; the split by its name in the repository.
        images, regions: how many it has.
        bytes: size of the file.
        content: bytes of its photos and JSONs.
    """

    path: str
    subset: str
    split: str
    images: int
    regions: int
    bytes: int
    content: int


class HubPlan(NamedTuple):
    """What a repository gets.

    Attributes:
        corpus: what it is made from.
        share: of the images that the corpus holds out of training.
        split: the split that was asked for; "all" takes both.
        shards: in order of their subsets and splits.
    """

    corpus: Corpus
    share: float
    split: Split
    shards: list[Shard]

    @property
    def subsets(self) -> list[str]:
        """The subsets with a shard."""
        return list(dict.fromkeys(shard.subset for shard in self.shards))

    @property
    def splits(self) -> list[str]:
        """The splits with a shard, by their names in the repository."""
        found = {shard.split for shard in self.shards}
        return [name for name in SPLITS.values() if name in found]

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(shard.images for shard in self.shards)

    @property
    def regions(self) -> int:
        """Number of regions."""
        return sum(shard.regions for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def of(self, subset: str | None = None, split: str | None = None) -> list[Shard]:
        """The shards of a subset, of a split, or of both."""
        return [each for each in self.shards if subset in (None, each.subset) and split in (None, each.split)]

    def split_of(self, key: str) -> str | None:
        """The repository's name of the split that an image is in; None if it is not asked for."""
        found = "held_out" if is_held_out(key, self.share) else "train"
        return SPLITS[found] if self.split in ("all", found) else None


def plan_hub(corpus: str | Location, split: str | None = None, shard_mb: float = SHARD_MB) -> HubPlan:
    """Plan the shards of a repository.

    Args:
        corpus: path or URL of what a build wrote.
        split: `train`, `held_out`, or `all`, which is the default.
        shard_mb: most megabytes (of 1,000,000 bytes) of a shard; a larger sample has a shard of its own.

    Raises:
        ConfigError: no such split, or nothing in it, or no such size.
        IntegrityError: ledgers and manifests disagree, or cannot be read.
    """
    opened = reader.open_corpus(corpus)
    share = opened.held_out_share
    if split not in (None, "all", *SPLITS):
        raise ConfigError(f"split {split!r}: no such split; there are {', '.join(SPLITS)}, all")
    if not shard_mb > 0:
        raise ConfigError(f"--shard-mb {shard_mb:g}: has to be more than 0")
    plan = HubPlan(opened, share, "all" if split is None else split, [])  # type: ignore[arg-type]
    for subset in opened.subsets:
        series = {name: _Series(subset, name, shard_mb * 1e6) for name in SPLITS.values()}
        for unit in opened.units(subset):
            for stored in images_of(unit):
                if (name := plan.split_of(stored.key)) is not None:
                    series[name].add(stored)
        plan.shards.extend(shard for each in series.values() for shard in each.shards())
    _check_sums(plan)
    if not plan.shards:
        what = f"has no image with a kept region in the split {plan.split}, so there is nothing to publish"
        raise ConfigError(f"{corpus}: {what}; choose another --split")
    return plan


class PlannedImage(NamedTuple):
    """An image with a kept region, as its ledger has it.

    Attributes:
        key: of the image.
        regions: how many are kept.
        photo, record: bytes of the photo and of the JSON in the shard.
    """

    key: str
    regions: int
    photo: int
    record: int

    def size(self) -> int:
        """Bytes that it takes in a tar."""
        names = (f"{self.key}.{PHOTO_ENDING}", f"{self.key}.json")
        return sum(map(member_size, names, (self.photo, self.record)))


def images_of(unit: Unit) -> Iterator[PlannedImage]:
    """The images of a unit in the order of its shard, which is that of their keys."""
    table = reader.read_ledger(unit.ledger, ["key", "kept", "photo_length", "json_length"])
    sums = [("photo_length", "max"), ("json_length", "max"), ("key", "count")]
    found = table.filter(table["kept"]).group_by("key", use_threads=False).aggregate(sums)
    for row in sorted(found.to_pylist(), key=lambda row: row["key"]):
        image = PlannedImage(row["key"], row["key_count"], row["photo_length_max"], row["json_length_max"])
        if None in image:
            raise IntegrityError(
                f"{unit.ledger}: {image.key}: kept, but without a place in the shard; run "
                "`paracaption verify CORPUS`"
            )
        yield image


class _Series:
    """The shards of a subset's split, which are filled one after the other."""

    def __init__(self, subset: str, split: str, most: float):
        self._subset, self._split, self._most = subset, split, most
        self._filled: list[list[int]] = []
        """Of each shard: images, regions, bytes of members, bytes of content."""

    def add(self, image: PlannedImage) -> None:
        size = image.size()
        if not self._filled or archive_size(self._filled[-1][2] + size) > self._most:
            self._filled.append([0, 0, 0, 0])
        last = self._filled[-1]
        for place, more in enumerate((1, image.regions, size, image.photo + image.record)):
            last[place] += more

    def shards(self) -> Iterator[Shard]:
        total = len(self._filled)
        for number, (images, regions, members, content) in enumerate(self._filled):
            path = f"data/{self._subset}/{self._split}-{number:05d}-of-{total:05d}.tar"
            size = archive_size(members)
            yield Shard(path, self._subset, self._split, images, regions, size, content)


def _check_sums(plan: HubPlan) -> None:
    """Raise IntegrityError if the plan has another number of images or regions than the manifests count."""
    for subset in plan.corpus.subsets:
        counts = merge.count_subset(plan.corpus, subset)
        held = (counts.images_held_out, counts.kept_held_out)
        whole = (counts.images_captioned, counts.kept)
        wanted = {"validation": held, "train": (whole[0] - held[0], whole[1] - held[1])}
        for name, split in SPLITS.items():
            if plan.split not in ("all", name):
                continue
            shards = plan.of(subset, split)
            found = sum(shard.images for shard in shards), sum(shard.regions for shard in shards)
            if found != wanted[split]:
                ledgers = "{:,} images with {:,} kept regions".format(*found)
                manifests = "{:,} with {:,}".format(*wanted[split])
                raise IntegrityError(
                    f"{plan.corpus.path}/{subset}: the ledgers have {ledgers} in the split {name}, the "
                    f"manifests {manifests}; run `paracaption verify CORPUS`"
                )
