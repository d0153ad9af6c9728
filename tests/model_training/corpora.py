"""Ragged corpora for tests of the training data, committed by the pipeline's own writer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paracaption.filters import rle
from paracaption.model_training.data.loader import Loader
from paracaption.model_training.data.samples import FILLER, TrainBatch
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.pipeline.corpus import writer
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, Drop, ImageRecord, Region
from paracaption.schemas.training import CorpusSource, DataOptions
from tests.tiny.perceptiondlm_model import SMALLEST, byte_tokenizer, tiny_config

SIZES = [(32, 32), (60, 30), (40, 90), (24, 40)]
"""Of photos, (width, height): one to three tiles of 32 pixels."""


@lru_cache(None)
def processor(layout: str = "corrected", **changes: Any) -> PerceptionDLMProcessor:
    """The smallest model's."""
    tokenizer = byte_tokenizer()
    return PerceptionDLMProcessor(tokenizer, tiny_config(tokenizer, layout=layout, **SMALLEST | changes))


def masks_of(seed: int, regions: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Rectangles that may overlap, (H, W) bool."""
    draw, (width, height) = np.random.default_rng(seed), size
    masks = []
    for _ in range(regions):
        mask = np.zeros((height, width), bool)
        top, left = draw.integers(0, height - 2), draw.integers(0, width - 2)
        mask[top : top + draw.integers(1, height), left : left + draw.integers(1, width)] = True
        masks.append(mask)
    return masks


def write_unit(out: Path, number: int, counts: Sequence[int], subset: str = "coconut") -> None:
    """Commit a unit of images with so many kept regions, and a dropped one each; 0: none was kept."""
    photos = out.parent / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    writer.prepare(out / subset)
    images = []
    for place, count in enumerate(counts):
        seed = 1000 * number + place
        size = SIZES[seed % len(SIZES)]
        path = photos / f"{seed}.jpg"
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(path, "JPEG")
        regions = []
        for region, mask in enumerate(masks_of(seed, count + 1, size)):
            found = rle.from_mask(mask)
            text = f"number {region} of {seed}" + " very" * (region % 3) + " red"
            regions.append(Region(region, found.rle, found.bbox, found.area, caption=text))
        regions[0].drop = Drop("clean_text", Reason.TEXT_JUNK, "a test")
        images.append(
            ImageRecord(f"image_{seed}", subset, Blob(str(path)), *size, "jpeg", path.name, regions)
        )
    draft = writer.write_unit(out / subset, f"{subset}-{number:06d}", images, "plan", "recipe")
    writer.commit(out / subset, draft)


def write_photo(out: Path, pixels: np.ndarray, masks: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Commit a unit of one photo without loss."""
    writer.prepare(out / "coconut")
    path = out.parent / "photo.png"
    Image.fromarray(pixels).save(path)
    found = [rle.from_mask(mask) for mask in masks]
    regions = [
        Region(number, mask.rle, mask.bbox, mask.area, caption=text)
        for number, (mask, text) in enumerate(zip(found, captions, strict=True))
    ]
    height, width = pixels.shape[:2]
    image = ImageRecord("photo", "coconut", Blob(str(path)), width, height, "png", path.name, regions)
    draft = writer.write_unit(out / "coconut", "coconut-000000", [image], "plan", "recipe")
    writer.commit(out / "coconut", draft)


def write(out: Path, units: Sequence[Sequence[int]]) -> set[str]:
    """Commit units; every kept region as "subset/key#region"."""
    for number, counts in enumerate(units):
        write_unit(out, number, counts)
    return {
        f"coconut/image_{1000 * number + place}#{region}"
        for number, counts in enumerate(units)
        for place, count in enumerate(counts)
        for region in range(1, count + 1)
    }


def loader(out: Path, rank: int = 0, world: int = 1, **options: Any) -> Loader:
    """Of one corpus, with its cache beside it; options of `Loader` and of `DataOptions`."""
    given = {name: options.pop(name) for name in ("seed", "start_method") if name in options}
    sources = options.pop("sources", [CorpusSource(corpus=str(out))])
    made = options.pop("processor", None) or processor()
    options = {"max_tokens": 600, "workers": 0, "cache": str(out.parent / "cache")} | options
    return Loader(sources, made, DataOptions(**options), rank=rank, world_size=world, **given)


def regions_of(batches: Iterable[TrainBatch]) -> Counter[str]:
    """How often each region came with a weight."""
    found: Counter[str] = Counter()
    for batch in batches:
        for key, weight in zip(batch.keys, batch.weight_E.tolist(), strict=True):
            assert (key == FILLER) == (weight == 0)
            if weight:
                image, _, regions = key.partition("#")
                found.update(f"{image}#{region}" for region in regions.split(","))
    return found


def visits(units: Sequence[Sequence[int]]) -> dict[str, int]:
    """How often an epoch shows each image of what `write` committed."""
    return {
        f"coconut/image_{1000 * number + place}": math.ceil(count / 3.5)
        for number, counts in enumerate(units)
        for place, count in enumerate(counts)
        if count
    }
