"""A trained model on held-out photos: its captions next to the corpus's, in numbers and pictures.

A training run ends with this, and needs no judge for it. OUT/evaluation/ gets `captions.jsonl` (one line per
image), `pictures/` and `summary.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...pipeline.io import draw, files
from ...pipeline.models.batching import Batches
from ...schemas.errors import ConfigError
from ...schemas.training import Evaluation
from ..decoding.caption_folder import PhotoTask, tasks_of_corpus
from ..decoding.fitting import caption_each
from ..decoding.read_regions import PhotoRegions
from ..decoding.region_captioner import RegionCaptioner, RegionCaptions

FOLDER = "evaluation"


class Summary(NamedTuple):
    """Numbers of a model's captions.

    Attributes:
        images, regions: number of images and regions that were captioned.
        exact: share of captions that equal the corpus's.
        words: mean number of words in a caption.
        empty: share of captions without a word.
        forwards: forward passes of the language model per image.
        tokens_per_forward: tokens decoded by one forward pass.
        seconds: time per image.
        device: the device that it ran on.
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


def evaluate_held_out(model: Path, config: Evaluation, out: Path, device: str = "auto") -> Summary:
    """Caption the images of a held-out corpus, and write captions, pictures and numbers to OUT/evaluation.

    Of a corpus that holds images out of training, only these are captioned.

    Args:
        model: folder of a saved model.
        config: the corpus, and how captions are decoded.
        out: folder of the training run.
        device: a device of torch, or "auto".

    Raises:
        ConfigError: there is no corpus, no image in it to caption or no model, or an option does not suit the
            model.
        OutOfMemory: one sequence does not fit.
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
    if not records:
        raise ConfigError(
            f"{config.corpus}: no image to caption; name a corpus with kept regions, or raise the "
            "held_out_share of its build"
        )
    summary = _summary(records, str(captioner.model.device))
    with files.write_atomic(folder / "summary.json") as file:
        file.write(json.dumps(summary._asdict(), indent=1).encode() + b"\n")
    return summary


def _caption(captioner: RegionCaptioner, config: Evaluation) -> Iterator[tuple[PhotoRegions, RegionCaptions]]:
    """Caption photos, of which few are in memory at once."""

    def read(numbered: tuple[int, PhotoTask]) -> tuple[PhotoRegions, np.ndarray, list[np.ndarray]]:
        number, task = numbered
        photo = task.read()
        kept = photo if number < config.pictures else photo.without_pixels()
        return kept, photo.pixels, photo.masks()

    tasks = tasks_of_corpus(config.corpus, held_out=True)[: config.images]
    batches = Batches(config.batch_size, "evaluation: sequences of regions")
    return caption_each(
        captioner, [*enumerate(tasks)], read, batches, config, regions_per_call=config.regions_per_call
    )


def _record(photo: PhotoRegions, found: RegionCaptions) -> dict[str, Any]:
    """A line of `captions.jsonl`. Photos are named by corpus and key: its folder is of this machine."""
    name = Path(photo.name).name
    rows = zip(photo.regions, found.captions, strict=True)
    return {
        "image": name,
        "regions": [
            {
                "region": region.number,
                "source": f"{name}: region {region.number}",
                "caption": caption,
                "corpus_caption": region.caption,
            }
            for region, caption in rows
        ],
        "forwards": found.forwards,
        "tokens": found.tokens,
        "seconds": round(found.seconds, 4),
    }


def _draw(photo: PhotoRegions, captions: list[str], path: Path) -> None:
    """Regions have the numbers and colors that they have in the corpus, the explorer and `captions.jsonl`."""
    overlays = [
        draw.Overlay(
            region.mask.rle,
            caption,
            region.label,
            draw.color_of_region(region.number or 0),
            region.number,
        )
        for region, caption in zip(photo.regions, captions, strict=True)
    ]
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
