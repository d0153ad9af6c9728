"""A trained model on photos that it has not seen: its captions beside the corpus's, in numbers and pictures.

OUT/evaluation/ gets `captions.jsonl` (an image a line), `pictures/` and `summary.json`. The judged benchmarks
are another matter; this is what a run says of itself when it is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...pipeline.io import draw, files
from ...schemas.training import Evaluation
from ..decoding.read_regions import PhotoRegions, iter_photo_regions
from ..decoding.region_captioner import RegionCaptioner, RegionCaptions

FOLDER = "evaluation"


class Summary(NamedTuple):
    """Of a model's captions.

    Attributes:
        images, regions: how many were captioned.
        exact: share of captions equal to the corpus's.
        words: mean of a caption.
        empty: share of captions without a word.
        forwards: passes of the language model, an image.
        tokens_per_forward: slots filled by a pass.
        seconds: an image, on whatever it ran on.
        device: that.
    """

    images: int
    regions: int
    exact: float
    words: float
    empty: float
    forwards: float
    tokens_per_forward: float
    seconds: float
    device: str


def evaluate(model: Path, config: Evaluation, out: Path, device: str = "auto") -> Summary:
    """Caption a corpus's images, and write what came of it to OUT/evaluation.

    Args:
        model: folder of a saved model.
        config: which corpus, and how to decode.
        out: folder of the run.
        device: as torch names it, or "auto".

    Raises:
        ConfigError: no corpus, no model, or options that do not suit it.
    """
    captioner = RegionCaptioner.load(model, device)
    folder = out / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    records = []
    with files.write_atomic(folder / "captions.jsonl") as file:
        for number, (photo, found) in enumerate(_caption(captioner, config)):
            records.append(_record(photo, found))
            file.write(json.dumps(records[-1], ensure_ascii=False).encode() + b"\n")
            if number < config.pictures:
                _draw(photo, found.captions, folder / "pictures" / f"{number:03d}.jpg")
    summary = _summary(records, str(captioner.model.device))
    with files.write_atomic(folder / "summary.json") as file:
        file.write(json.dumps(summary._asdict(), indent=1).encode() + b"\n")
    return summary


def _caption(captioner: RegionCaptioner, config: Evaluation) -> Iterator[tuple[PhotoRegions, RegionCaptions]]:
    """Some photos at a time: batches are full, and few photos are in memory."""
    photos = islice(iter_photo_regions(config.corpus), config.images)
    while some := list(islice(photos, 8 * config.batch_size)):
        found = captioner.caption_photos(
            ((photo.pixels, photo.masks()) for photo in some),
            config,
            batch_size=config.batch_size,
            regions_per_call=config.regions_per_call,
        )
        yield from zip(some, found, strict=True)


def _record(photo: PhotoRegions, found: RegionCaptions) -> dict[str, Any]:
    rows = zip(photo.regions, found.captions, strict=True)
    return {
        "image": photo.name,
        "regions": [
            {"source": region.source, "caption": caption, "corpus_caption": region.caption}
            for region, caption in rows
        ],
        "forwards": found.forwards,
        "tokens": found.tokens,
        "seconds": round(found.seconds, 4),
    }


def _draw(photo: PhotoRegions, captions: list[str], path: Path) -> None:
    rows = zip(photo.regions, captions, strict=True)
    overlays = [draw.Overlay(region.mask.rle, caption, region.label) for region, caption in rows]
    draw.save_picture(draw.draw_image(photo.pixels, overlays, title=Path(photo.name).name), path)


def _summary(records: list[dict[str, Any]], device: str) -> Summary:
    pairs = [
        (region["caption"].strip(), region["corpus_caption"].strip())
        for record in records
        for region in record["regions"]
    ]
    images, num_regions = max(1, len(records)), max(1, len(pairs))
    forwards, tokens, seconds = (
        sum(record[name] for record in records) for name in ("forwards", "tokens", "seconds")
    )
    return Summary(
        images=len(records),
        regions=len(pairs),
        exact=sum(caption == wanted for caption, wanted in pairs) / num_regions,
        words=sum(len(caption.split()) for caption, _ in pairs) / num_regions,
        empty=sum(not caption for caption, _ in pairs) / num_regions,
        forwards=forwards / images,
        tokens_per_forward=tokens / max(1, forwards),
        seconds=seconds / images,
        device=device,
    )
