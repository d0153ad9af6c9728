"""The overview and samples of each drop reason as one HTML file that loads nothing else."""

from __future__ import annotations

import base64
from importlib import resources
from typing import NamedTuple

from ...schemas.errors import ConfigError, IntegrityError, ParaCaptionError, one_line
from ..corpus import inspect
from ..io import files
from ..io.location import Location, is_bucket, locate
from ..io.outputs import write_file
from .context import ODD, Explorer
from .pages.overview import summarize_subsets
from .reviews import KEPT, list_decisions

NAME = "report.html"

_KEPT_SHOWN = 6
_DROPPED_SHOWN = 3


class ShownSample(NamedTuple):
    """A sample with its picture as a data URL; "" if the photo cannot be shown."""

    sample: inspect.ShownRegion
    picture: str


def write_report(
    out: str | Location, to: str | Location | None = None, outside: bool = False, urls: bool = False
) -> Location:
    """Write the report of a corpus, completely or not at all. Its samples are those of `paracaption inspect`.

    Args:
        out: the corpus.
        to: the file, in a folder or a bucket; by default `OUT/report.html`.
        outside: show photos outside of the corpus; see `Pictures`.
        urls: fetch photos from URLs; see `Pictures`.

    Raises:
        ConfigError: there is no corpus, or no folder for the file.
        IntegrityError: the corpus is damaged.
    """
    path = locate(out) / NAME if to is None else locate(to)
    if not is_bucket(path) and not files.is_folder(str(path.parent)):
        raise ConfigError(f"{path.parent}: no such folder; make it first")
    try:
        data = render_report(Explorer(out, outside=outside, urls=urls)).encode()
    except ParaCaptionError:
        raise
    except ODD as error:
        what = f"holds something that no build writes ({one_line(error)[:300]})"
        raise IntegrityError(f"{out}: {what}; `paracaption verify` names the file") from error
    write_file(path, data)
    return path


def render_report(explorer: Explorer) -> str:
    """The report's HTML."""
    css = resources.files("paracaption.pipeline.explorer").joinpath("static", "explorer.css").read_text()
    parts = [
        (part, _groups(explorer, part["name"])) for part in summarize_subsets(explorer, distributions=True)
    ]
    return explorer.templates.get_template("report.html").render(
        css=css, parts=parts, kept_shown=_KEPT_SHOWN, dropped_shown=_DROPPED_SHOWN
    )


def _groups(explorer: Explorer, subset: str) -> list[tuple[str, list[ShownSample]]]:
    """Samples by decision, in the funnel's order."""
    kept, dropped = inspect.sample_regions(explorer.catalog.corpus, subset, _KEPT_SHOWN, _DROPPED_SHOWN)
    groups = {KEPT: kept, **dropped}
    order = [name for name, _ in list_decisions(explorer.catalog, subset)]
    ranked = sorted(groups, key=lambda name: order.index(name) if name in order else len(order))
    return [(name, [_shown(explorer, subset, sample) for sample in groups[name]]) for name in ranked]


def _shown(explorer: Explorer, subset: str, sample: inspect.ShownRegion) -> ShownSample:
    regions = [] if sample.region == -1 else [sample.region]
    try:
        data = explorer.pictures.thumb(subset, sample.key, regions)
    except ParaCaptionError:
        return ShownSample(sample, "")
    return ShownSample(sample, f"data:image/jpeg;base64,{base64.b64encode(data).decode()}")
