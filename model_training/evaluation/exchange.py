"""A benchmark in forms that other projects' scripts read, so that their captions can be scored here.

`predictions` reads what those scripts write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...pipeline.io import files
from ...pipeline.models import registry
from ...schemas.config import Backend
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.records import Blob
from .annotations import ANNOTATIONS, BenchImage, Benchmark, describe_missing
from .captioners import image_record

KEYS = "keys.json"


def write_coco(benchmark: Benchmark, folder: Path) -> int:
    """Write a benchmark as COCO instances, as the scripts of GAR, DAM and PixelRefer for DLC-Bench read them.

        FOLDER/
            annotations.json   images and masks; the only category is "region", so that no class is given away
            keys.json          {number of an annotation: the region's key in the benchmark}
            images/            copies of the photos

    Args:
        benchmark: the benchmark.
        folder: folder to write; created if need be.

    Returns:
        Number of regions.

    Raises:
        ConfigError: a photo is missing, or two photos have the same name.
    """
    _check_photos(benchmark)
    _check_names(benchmark)
    images, annotations, keys = [], [], {}
    for image in benchmark.images:
        height, width = image.size
        about = {"file_name": _file_name(image), "height": height, "width": width}
        images.append({"id": len(images) + 1, **about})
        for region in image.regions:
            number = len(annotations) + 1
            keys[str(number)] = region.key
            mask = {"size": [height, width], "counts": region.mask.rle.counts}
            annotation = {"id": number, "image_id": len(images), "category_id": 1, "iscrowd": 0}
            box = {"area": region.mask.area, "bbox": [*region.mask.bbox]}
            annotations.append({**annotation, "segmentation": mask, **box})
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in benchmark.images:
        with files.write_atomic(folder / "images" / _file_name(image)) as file:
            file.write(files.read(Blob(image.photo)))
    categories = [{"id": 1, "name": "region"}]
    files.write_json(folder / KEYS, keys)
    files.write_json(
        folder / ANNOTATIONS, {"images": images, "annotations": annotations, "categories": categories}
    )
    return len(annotations)


def write_requests(benchmark: Benchmark, captioner: Backend, path: Path) -> int:
    """Write the requests of the captioner `openai` as a batch: JSON lines, as OpenAI and vLLM run them.

    Each line has the region's key as `custom_id`. `predictions` reads the answers.

    Args:
        benchmark: the benchmark.
        captioner: the captioner `openai`, with its options.
        path: file to write.

    Returns:
        Number of requests, one for each region.

    Raises:
        ConfigError: it is another captioner, an option is wrong, or a photo is missing or unreadable.
    """
    if captioner.name != "openai":
        raise ConfigError(
            f"captioner.name: {captioner.name!r} asks no server; name `openai`, whose requests are written"
        )
    _check_photos(benchmark)
    model, count = registry.load_backend("captioner", captioner), 0
    with files.write_atomic(path) as file:
        for image in benchmark.images:
            for line in _request_lines(image, model):
                file.write(line)
                count += 1
    return count


def _request_lines(image: BenchImage, model: Any) -> Iterator[bytes]:
    try:
        for region, body in zip(image.regions, model.requests(image_record(image)), strict=True):
            request = {"custom_id": region.key, "method": "POST", "url": "/v1/chat/completions"}
            yield json.dumps({**request, "body": body}).encode() + b"\n"
    except BadRecord as error:
        raise ConfigError(error.detail) from error


def _check_photos(benchmark: Benchmark) -> None:
    if missing := benchmark.missing_photos():
        raise ConfigError(describe_missing(missing))


def _check_names(benchmark: Benchmark) -> None:
    names = [_file_name(image) for image in benchmark.images]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two photos of the benchmark are called {twice}; rename one in {ANNOTATIONS}")


def _file_name(image: BenchImage) -> str:
    return Path(image.name).name
