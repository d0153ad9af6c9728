"""Writes the shards of a dataset repository, and passes over those that an interrupted export has written."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

from ...schemas.errors import IntegrityError
from ...schemas.sample import PHOTO_ENDING
from ..io.orientation import make_upright
from .hub_plan import HubPlan, PlannedImage, Shard
from .ledger import Place
from .shard import StoredSample
from .tar import TarWriter, archive_size, header_size, member_size

Closed = Callable[[Shard, dict[str, Place], str], None]
"""Is given each shard that is whole, the places of its samples, and its SHA-256; "" if it was kept."""


class Shards:
    """Writes the planned shards: one at a time of each subset's split.

    Args:
        plan: says how many images each shard has.
        folder: of the repository.
        kept: paths of the shards that are there already.
        closed: is called with each shard.
    """

    def __init__(self, plan: HubPlan, folder: Path, kept: Collection[str], closed: Closed):
        self.plan, self._folder, self._kept, self._closed = plan, folder, kept, closed
        self._left = {
            (subset, split): deque(plan.of(subset, split)) for subset in plan.subsets for split in plan.splits
        }
        self._open: dict[tuple[str, str], _Written | _Kept] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._open.values():
            each.discard()

    @property
    def has_kept(self) -> bool:
        """Whether any shard was there already."""
        return bool(self._kept)

    def are_kept(self, subset: str, split: str, images: int) -> bool:
        """Whether the next `images` images of a series are all in shards that are there already."""
        opened = self._open.get((subset, split))
        coming = [] if opened is None else [(opened.shard, opened.shard.images - len(opened.places))]
        coming += [(shard, shard.images) for shard in self._left[subset, split]]
        for shard, left in coming:
            if images <= 0:
                break
            if shard.path not in self._kept:
                return False
            images -= left
        return True

    def add(self, subset: str, split: str, stored: StoredSample) -> tuple[Shard, Place]:
        """Append a sample to the shard that the plan has it in; returns the shard, and the place there."""
        opened, key = self._opened(subset, split, stored.sample.key), stored.sample.key
        photo, _ = make_upright(stored.photo)  # one of an early release has its tag still
        if isinstance(opened, _Written):
            place = opened.add(key, photo, stored.record, len(stored.sample.regions))
        else:
            place = opened.add(key, len(photo), len(stored.record))
        self._close_if_full(subset, split, opened)
        return opened.shard, place

    def pass_over(self, subset: str, split: str, image: PlannedImage) -> tuple[Shard, Place]:
        """The same of an image whose shard is kept, without reading it."""
        opened = self._opened(subset, split, image.key)
        assert isinstance(opened, _Kept)
        place = opened.add(image.key, image.photo, image.record)
        self._close_if_full(subset, split, opened)
        return opened.shard, place

    def _opened(self, subset: str, split: str, key: str) -> _Written | _Kept:
        series = subset, split
        if series not in self._open:
            if not self._left[series]:
                raise IntegrityError(
                    f"{self.plan.corpus.path}/{subset}: {key!r} was not there when the export began; run it "
                    "again"
                )
            shard = self._left[series].popleft()
            path = self._folder / shard.path
            self._open[series] = _Kept(shard) if shard.path in self._kept else _Written(shard, path)
        return self._open[series]

    def _close_if_full(self, subset: str, split: str, opened: _Written | _Kept) -> None:
        if len(opened.places) == opened.shard.images:
            del self._open[subset, split]
            self._closed(opened.shard, opened.places, opened.close())

    def finish(self) -> None:
        """Raise IntegrityError unless every planned shard was written."""
        missing = [each.shard for each in self._open.values()]
        missing += [shard for shards in self._left.values() for shard in shards]
        if missing:
            raise IntegrityError(
                f"{self.plan.corpus.path}/{missing[0].subset}: fewer images than when the export began, so "
                f"{missing[0].path} cannot be filled; run it again"
            )


class _Written:
    """A shard that is being filled; what is written is hashed on its way."""

    def __init__(self, shard: Shard, path: Path):
        self.shard, self._regions = shard, 0
        self.places: dict[str, Place] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "xb")
        self._digest = hashlib.sha256()
        self._tar = TarWriter(self)

    def write(self, data: Any) -> None:
        self._file.write(data)
        self._digest.update(data)

    def tell(self) -> int:
        return self._file.tell()

    def add(self, key: str, photo: bytes, record: bytes, regions: int) -> Place:
        photo_at = self._tar.member(f"{key}.{PHOTO_ENDING}", photo)
        record_at = self._tar.member(f"{key}.json", record)
        self.places[key] = Place(photo_at, len(photo), record_at, len(record))
        self._regions += regions
        return self.places[key]

    def close(self) -> str:
        """Make the file durable; returns its SHA-256."""
        self._tar.close_archive()
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        found, wanted = (size, self._regions), (self.shard.bytes, self.shard.regions)
        if found != wanted:
            raise IntegrityError(
                "{}: {:,} bytes with {:,} regions, where the ledgers have {:,} with {:,}; run `paracaption "
                "verify CORPUS`".format(self.shard.path, *found, *wanted)
            )
        return self._digest.hexdigest()

    def discard(self) -> None:
        self._file.close()


class _Kept:
    """A shard that is there already: its samples have the places that they would get again."""

    def __init__(self, shard: Shard):
        self.shard, self._at = shard, 0
        self.places: dict[str, Place] = {}

    def add(self, key: str, photo: int, record: int) -> Place:
        names = (f"{key}.{PHOTO_ENDING}", f"{key}.json")
        photo_at = self._at + header_size(names[0])
        self._at += member_size(names[0], photo)
        record_at = self._at + header_size(names[1])
        self._at += member_size(names[1], record)
        self.places[key] = Place(photo_at, photo, record_at, record)
        return self.places[key]

    def close(self) -> str:
        if archive_size(self._at) != self.shard.bytes:
            raise IntegrityError(
                f"{self.shard.path}: the ledgers have other sizes than when it was written; run the export "
                "again, which then begins at the start"
            )
        return ""

    def discard(self) -> None:
        """Nothing: its file stays."""
