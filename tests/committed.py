"""A small committed corpus without the stream: real sources, plan and writer; captions and drops by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from paracaption.filters import text
from paracaption.pipeline.corpus import adopt, log, work_list, writer
from paracaption.pipeline.corpus.owner import LEASE_S, own
from paracaption.pipeline.executor import driver
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages.base import apply_verdict
from paracaption.pipeline.stages.text import CleanText
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Drop, ImageRecord, Region
from tests.building import config_of
from tests.synthetic import write_coconut, write_sa1b

RECIPE = "recipe-of-the-tests"
PLACES = ("on the left", "near the top", "beside the others", "at the bottom")


def decide(images: list[ImageRecord], config: BuildConfig) -> None:
    """Captions for all, and drops of each kind: by the photo, the category, the segmenter, the text."""
    for image in images:
        number = int(image.key.rpartition("_")[2])
        if number == 2:
            image.reject(Drop("source", Reason.PHOTO_UNREADABLE, f"{image.file_name}: cut short"))
        for region in image.live():
            _describe(region, number, config)
            if number == 8:
                region.drop = Drop("caption", Reason.CAPTION_NONE, "the captioner returned nothing")


def _describe(region: Region, number: int, config: BuildConfig) -> None:
    what = region.category or "block"
    region.caption = f"A plain {what} with sharp edges, {PLACES[region.id % 4]} of picture number {number}."
    region.core_category = None if region.category else "block"
    if (number + region.id) % 5 == 0:
        region.scores = {"verdict_margin": -0.4}
        stage = "verify_category" if region.category else "agree_with_segmenter"
        reason = Reason.CATEGORY_WRONG if region.category else Reason.IOU_LOW
        region.drop = Drop(stage, reason, "0.12 is too little")
        return
    region.scores = {"verdict_margin": 0.9}
    if (number + region.id) % 7 == 3:
        region.caption = "A thing."
    apply_verdict(region, CleanText(config), text.clean(region.caption, config.text))


def write(
    out: Path,
    num_coconut: int = 9,
    num_sa1b: int = 3,
    decide: Callable[[list[ImageRecord], BuildConfig], None] = decide,
) -> BuildConfig:
    """Commit a corpus under `out`, sources beside it. Units have 4 images; COCONut's third has no shard."""
    config = config_of(
        out,
        coconut=write_coconut(out.parent / "coconut-source", num_coconut) | {"license": "CC BY 4.0 | test"},
        sa1b=write_sa1b(out.parent / "sa1b-source", num_sa1b) | {"license": "none: synthetic"},
    )
    for subset in config.subsets:
        folder = out / subset
        writer.prepare(folder)
        source = open_source(config, subset)
        planned = work_list.make_work_list(source, config, folder)
        for index in range(planned.num_units):
            images = [source.read(entry, config.limits) for entry in planned.read_unit(index)]
            decide(images, config)
            draft = writer.write_unit(folder, planned.unit_name(index), images, planned.digest, RECIPE)
            writer.commit(folder, draft)
    with own(str(out), "build", LEASE_S) as owner:
        driver.write_config(config, owner)
    return config


def uncommitted(out: Path, *units: str) -> Path:
    """Make a corpus one in which these units are not committed yet; their other files stay.

    The corpus is one without a log then: a log says for good what was committed.
    """
    unlogged(out)
    for unit in units:
        (out / unit.rpartition("-")[0] / "manifests" / f"{unit}.json").unlink()
    return out


def unlogged(out: Path) -> Path:
    """Make a corpus one of a release that wrote no log: its manifests say what is committed."""
    for name in (log.LOG, log.BEAT):
        shutil.rmtree(out / name)
    (out / adopt.MARKER).unlink()
    return out


@cache
def _original() -> Path:
    from paracaption.pipeline.corpus import merge

    out = Path(mkdtemp(prefix="paracaption-committed-")) / "out"
    write(out)
    merge.merge(out)
    return out


def merged(out: Path) -> Path:
    """A copy of the same merged corpus under `out`, to look at or to break."""
    shutil.copytree(_original(), out)
    return out
