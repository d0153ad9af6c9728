"""The page of a benchmark's results: one HTML file that needs no network, with every question and answer."""

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
    """An image on the page: its picture as a data URL ("" without a photo), and its regions' details."""

    name: str
    picture: str
    regions: list[dict[str, Any]]


def write_page(bench: Bench, label: str, folder: Path) -> Path:
    """Write the page of the results that `run_benchmark.score_answers` left in a folder.

    Args:
        bench: the benchmark.
        label: name of the captioner.
        folder: folder with details.json and summary.json; it gets `page.html`.

    Returns:
        The page's path.

    Raises:
        ConfigError: the folder has no scores yet.
    """
    if not (folder / run_benchmark.DETAILS).exists():
        raise ConfigError(f"{folder / run_benchmark.DETAILS}: no such file; score the answers first")
    details = msgspec.json.decode((folder / run_benchmark.DETAILS).read_bytes())
    summary = msgspec.json.decode((folder / run_benchmark.SUMMARY).read_bytes())
    photos = _photos(run_benchmark.open_benchmark(bench).images, details)
    page = load_template("results_page.html").generate(label=label, summary=summary, photos=photos)
    path = folder / PAGE
    with files.write_atomic(path) as file:
        file.writelines(part.encode() for part in page)
    return path


def load_template(name: str) -> Any:
    """A Jinja2 template of this folder. Everything that is put into it is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        name
    )


def draw_regions(image: BenchImage) -> str:
    """The photo with its numbered masks as a data URL; "" if the photo does not exist."""
    if not files.expand(image.photo):
        return ""
    overlays = [draw.Overlay(region.mask.rle, "") for region in image.regions]
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
            yield _Photo(image.name, draw_regions(image), regions)
