"""A benchmark's results to look at: one file that needs no network, with all that was asked and answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...pipeline.io import draw, files
from ...schemas.errors import ConfigError
from ...schemas.evaluation import Bench
from . import run_benchmark
from .annotations import BenchImage

PAGE = "page.html"
_SIDE_PX = 640


class _Photo(NamedTuple):
    """An image as the page has it: its picture as a data URL, "" without a photo; its regions' details."""

    name: str
    picture: str
    regions: list[dict[str, Any]]


def write(bench: Bench, label: str, folder: Path) -> Path:
    """Write the page of what `run_benchmark.score` left in a folder.

    Args:
        bench: the benchmark.
        label: the captioner's name.
        folder: with details and summary; gets `page.html`.

    Raises:
        ConfigError: it has not been scored.
    """
    if not (folder / run_benchmark.DETAILS).exists():
        raise ConfigError(f"{folder / run_benchmark.DETAILS}: not there yet; score before you look")
    details = msgspec.json.decode((folder / run_benchmark.DETAILS).read_bytes())
    summary = msgspec.json.decode((folder / run_benchmark.SUMMARY).read_bytes())
    photos = _photos(run_benchmark.open_benchmark(bench).images, details)
    page = template("page.html").generate(label=label, summary=summary, photos=photos)
    path = folder / PAGE
    with files.write_atomic(path) as file:
        file.writelines(part.encode() for part in page)
    return path


def template(name: str) -> Any:
    """A Jinja2 template of this package; everything that goes into it is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        name
    )


def picture_of(image: BenchImage, captions: dict[str, str]) -> str:
    """The photo with its numbered masks as a data URL; "" if the photo is not there."""
    if not files.expand(image.photo):
        return ""
    overlays = [draw.Overlay(region.mask.rle, captions.get(region.key, "")) for region in image.regions]
    drawn = io.BytesIO()
    draw.draw_masks(image.pixels(), overlays, _SIDE_PX).save(drawn, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(drawn.getvalue()).decode()}"


def _photos(images: list[BenchImage], details: dict[str, Any]) -> Iterator[_Photo]:
    for image in images:
        regions = [
            {"key": region.key, "number": number, **details[region.key]}
            for number, region in enumerate(image.regions, 1)
            if region.key in details
        ]
        if regions:
            yield _Photo(image.name, picture_of(image, {}), regions)
