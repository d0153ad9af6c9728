"""Writes a corpus as MDS, which mosaicml-streaming reads: a folder per split, with its own writer.

A sample has the columns `key`, `jpg` (the photo's bytes) and `json` (what the JSON of the shard has). An
export is whole, or absent: everything is written into a temporary folder that gets its name at the end.
"""

from __future__ import annotations

import importlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.sample import PHOTO_ENDING
from ..io import files, packages
from ..io.location import Location
from ..io.orientation import make_upright
from .hub import stored_samples
from .hub_plan import HubPlan, plan_hub

PACKAGE = "mosaicml-streaming"
SHARD_MB = 64
"""Default size of a shard, in MB; MDSWriter's own."""

_COLUMNS = {"key": "str", PHOTO_ENDING: "bytes", "json": "json"}


def export_mds(
    corpus: str | Location, to: str | Path, split: str | None = None, shard_mb: float = SHARD_MB
) -> list[Path]:
    """Write the kept regions of a corpus as MDS, by `streaming.MDSWriter`.

    Args:
        corpus: path or URL of what a build wrote.
        to: a folder that does not exist yet, or is empty.
        split: `train`, `held_out`, or `all`, which is the default.
        shard_mb: most megabytes (of 1,000,000 bytes) of a shard.

    Returns:
        The folder of each split.

    Raises:
        ConfigError: mosaicml-streaming is not installed; or as `plan_hub`.
        IntegrityError: the corpus is damaged, or was changed meanwhile; nothing is left.
    """
    make_writer, to = _mds_writer(), Path(to)
    files.refuse_existing(to)
    plan = plan_hub(corpus, split, shard_mb)
    options = {"columns": _COLUMNS, "size_limit": int(shard_mb * 1e6), "hashes": ["xxh64"]}
    with files.write_folder_atomic(to) as temporary, ExitStack() as opened:
        writers = {
            name: opened.enter_context(make_writer(out=f"{temporary / name}", **options))
            for name in plan.splits
        }
        _write(plan, writers)
        opened.close()  # the last shards are written
    return [to / name for name in plan.splits]


def _mds_writer() -> Any:
    try:
        return importlib.import_module("streaming").MDSWriter
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(
            f"the format mds is written by {PACKAGE}, which cannot be imported ({error}); "
            f"{packages.install_with(PACKAGE)}"
        ) from error


def _write(plan: HubPlan, writers: dict[str, Any]) -> None:
    images: Counter[str] = Counter()
    regions: Counter[str] = Counter()
    for unit in plan.corpus.units():
        for stored in stored_samples(unit):
            if (split := plan.split_of(stored.sample.key)) is None:
                continue
            if split not in writers:
                raise IntegrityError(_changed(plan, split, "has images, not none"))
            photo, _ = make_upright(stored.photo)  # one of an early release has its tag still
            record = msgspec.json.decode(stored.record)
            writers[split].write({"key": stored.sample.key, PHOTO_ENDING: photo, "json": record})
            images[split] += 1
            regions[split] += len(stored.sample.regions)
    for split in plan.splits:
        wanted = [sum(getattr(each, name) for each in plan.of(split=split)) for name in ("images", "regions")]
        if [images[split], regions[split]] != wanted:
            found = f"has {images[split]:,} images with {regions[split]:,} regions, not {wanted[0]:,} with "
            raise IntegrityError(_changed(plan, split, f"{found}{wanted[1]:,}"))


def _changed(plan: HubPlan, split: str, what: str) -> str:
    return (
        f"{plan.corpus.path}: the split {split} {what} as when the export began; run it again, and "
        "`paracaption verify CORPUS` if it fails again"
    )
