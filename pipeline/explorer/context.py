"""What every page can use: the corpus, its pictures and reviews, a training run, and the templates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import jinja2
from fastapi import Depends, Request
from fastapi.responses import HTMLResponse

from ...schemas.config import BuildConfig, Limits
from ...schemas.errors import ConfigError, IntegrityError
from ..io import figure
from ..io.confined import confine
from ..io.location import Location
from ..sources.registry import subset_title
from ..stages.recipes import stage_kinds
from ..stages.registry import stage_title
from . import charts, training
from .catalog import Catalog
from .pictures import Pictures, color_of, css_color, halo_of
from .query import format_number
from .reviews import Reviews

CACHED = {"Cache-Control": "private, max-age=300"}
"""Headers of what a browser may keep for some minutes."""


ODD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, OSError)
ODD += (MemoryError, RecursionError, jinja2.TemplateError)
"""What code that reads a corpus raises where a file has been damaged, or was made up by somebody."""


class Explorer:
    """A corpus that is shown.

    Args:
        out: the corpus.
        run: folder of a training run, for its page.
        shards: folder or fsspec URL of the shards, if they are not in the corpus.
        outside: show photos outside of the corpus; see `Pictures`.
        urls: fetch photos from URLs; see `Pictures`.

    Raises:
        ConfigError: there is no corpus, or no run.
    """

    def __init__(
        self,
        out: str | Location,
        run: str | Path | None = None,
        shards: str | None = None,
        outside: bool = False,
        urls: bool = False,
    ):
        self.catalog = Catalog(out)
        try:
            limits = self.config.limits
        except IntegrityError:  # its pages say so, and photos can be shown all the same
            limits = Limits()
        self.pictures = Pictures(self.catalog, shards, limits.max_pixels, outside, urls)
        self.reviews = Reviews(self.catalog)
        self.run = None if run is None else Path(run)
        if self.run is not None:
            confine(self.run)  # it may be a stranger's, too
            training.read_run(self.run)  # refuse a folder without a run now, and not when its page is opened
        self.templates = load_templates()
        self.templates.globals["explorer"] = self

    @property
    def config(self) -> BuildConfig:
        """The configuration of the last build; it is read again when other units are committed."""
        return self.catalog.remember("config", lambda: self.catalog.corpus.config)

    def kinds(self, subset: str) -> dict[str, str]:
        """The kind of each stage of a subset's recipe by its id; empty if the configuration cannot tell."""
        try:
            return stage_kinds(self.config, subset)
        except (ConfigError, IntegrityError):
            return {}

    def html(self, template: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
        """The page that a template makes of some values."""
        return HTMLResponse(self.templates.get_template(template).render(request=request, **values), status)


def _explorer_of(request: Request) -> Explorer:
    return request.app.state.explorer


CurrentExplorer = Annotated[Explorer, Depends(_explorer_of)]
"""The type of a route's parameter that is given the explorer."""


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def load_templates() -> jinja2.Environment:
    """The templates, which escape everything: captions and names come from models and strangers."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("paracaption.pipeline.explorer"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters |= {
        "words": lambda name: str(name).replace("_", " "),
        "stage_title": stage_title,
        "number": lambda value: f"{value:,}",
        "count": count,
        "share": lambda part, whole: f"{part / whole:.1%}" if whole else "",
        "score": lambda value: (
            "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
        ),
        "plain": format_number,
        "segment": lambda text: quote(str(text), safe=""),
        "subset_title": subset_title,
        "color": lambda region: css_color(color_of(region)),
        "halo": lambda region: halo_of(color_of(region)),
    }
    templates.globals.update(
        kept_color=figure.KEPT,
        dropped_color=figure.DROPPED,
        moved_color=figure.MOVED,
        width=charts.WIDTH,
        height=charts.HEIGHT,
    )
    return templates
