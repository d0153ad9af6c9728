"""The pages. Each is HTML that works without a script; `explorer.js` makes it quicker to use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from fastapi import FastAPI, Form, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from ...schemas.config import BuildConfig
from ...schemas.errors import BadRecord, ConfigError, ParaCaptionError
from ...schemas.records import Rle
from ..corpus import merge, plots, utilization
from ..sources.registry import subset_title
from ..stages.base import ModelStage, Stage
from ..stages.registry import STAGES, THRESHOLDS, stage_title
from . import charts, evidence, training, whatif
from .access import Guard
from .catalog import PAGE, Catalog, Place
from .pictures import MOST_DRAWN, Pictures, color_of, halo_of, hexadecimal, layers, outline
from .query import MEASURES, Query, plain
from .reviews import KEPT, Marks

STATIC = {"explorer.css": "text/css", "explorer.js": "text/javascript", "icon.svg": "image/svg+xml"}
_CACHE = {"Cache-Control": "private, max-age=300"}


class Explorer:
    """What the pages are made of.

    Args:
        out: the corpus.
        run: folder of a training run, for its page.
        shards: folder or fsspec URL of the shards, if they are not in the corpus.

    Raises:
        ConfigError: there is no corpus, or no run.
    """

    def __init__(self, out: str | Path, run: str | Path | None = None, shards: str | None = None):
        self.catalog = Catalog(out)
        self.pictures = Pictures(self.catalog, shards, self.config.limits.max_pixels)
        self.marks = Marks(self.catalog)
        self.run = None if run is None else Path(run)
        if self.run is not None:
            training.read(self.run)
        self.templates = templates()
        self.templates.globals.update(explorer=self, subsets=self.catalog.subsets)

    @property
    def config(self) -> BuildConfig:
        """That of the last build; read again when other units are committed."""
        return self.catalog.remember("config", lambda: merge.read_config(self.catalog.out))

    def html(self, template: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
        """A page."""
        return HTMLResponse(self.templates.get_template(template).render(request=request, **values), status)

    def overview(self, distributions: bool) -> list[dict[str, Any]]:
        """Of each subset its counts and the activity of its stages; its distributions take a pass more."""
        return [
            {
                "name": name,
                "counts": self.catalog.counts(name),
                "stages": self.stages(name),
                "charts": self.charts(name) if distributions else None,
            }
            for name in self.catalog.subsets()
        ]

    def stages(self, subset: str) -> list[dict[str, Any]]:
        """What the event log says of a subset's model stages: speed, and GPU seconds held and used."""
        return self.catalog.remember(
            ("stages", subset), lambda: stage_costs(self.catalog.out, subset, self.config)
        )

    def charts(self, subset: str) -> list[charts.Chart]:
        """The distributions of a subset, drawn.

        Raises:
            ConfigError: there is no such subset.
        """
        if subset not in self.catalog.subsets():
            raise ConfigError(f"{subset[:40]!r}: no such subset")
        return [charts.chart(each) for each in charts.distributions(self.catalog, subset, self.config)]

    def decisions(self, subset: str) -> list[tuple[str, int]]:
        """The word "kept" and each "stage/reason" of a subset, with its regions."""
        counts = self.catalog.counts(subset)
        dropped = [(f"{s.stage}/{reason}", n) for s in counts.funnel for reason, n in s.reasons.items()]
        return [(KEPT, counts.kept), *dropped]


def templates() -> jinja2.Environment:
    """Everything is escaped: captions and names come from models and strangers."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("paracaption.pipeline.explorer"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {
        "words": lambda name: str(name).replace("_", " "),
        "stage_title": stage_title,
        "number": lambda value: f"{value:,}",
        "share": lambda part, whole: f"{part / whole:.1%}" if whole else "",
        "score": lambda value: (
            "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
        ),
        "plain": plain,
        "segment": lambda text: quote(str(text), safe=""),
        "subset_title": subset_title,
        "color": lambda region: hexadecimal(color_of(region)),
        "halo": lambda region: halo_of(color_of(region)),
    }
    made.globals.update(
        kept_color=plots.KEPT, dropped_color=plots.DROPPED, width=charts.WIDTH, height=charts.HEIGHT
    )
    return made


def stage_costs(out: Path, subset: str, config: BuildConfig) -> list[dict[str, Any]]:
    """See `Explorer.stages`. GPU seconds are those of the actors, with the configuration's GPUs for each."""
    rows = []
    for name, stage in utilization.read_utilization(out, subset).items():
        kind = STAGES.get(name, Stage)
        gpus = getattr(config, kind.protocol).num_gpus if issubclass(kind, ModelStage) else 0.0
        rows.append(
            {
                "name": name,
                "stage": stage,
                "gpu_held_s": stage.alive_s * gpus,
                "gpu_busy_s": stage.busy_s * gpus,
            }
        )
    return rows


def make_app(explorer: Explorer, token: str | None = None) -> Guard:
    """The server's application, for uvicorn."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    catalog = explorer.catalog
    static = {
        name: resources.files("paracaption.pipeline.explorer").joinpath("static", name).read_bytes()
        for name in STATIC
    }

    @app.exception_handler(ParaCaptionError)
    def failed(request: Request, error: ParaCaptionError) -> HTMLResponse:
        status = 404 if isinstance(error, ConfigError | BadRecord) else 500
        return explorer.html("error.html", request, status, message=str(error))

    @app.get("/")
    def overview(request: Request) -> HTMLResponse:
        parts = explorer.overview(distributions="distributions" in request.query_params)
        return explorer.html("overview.html", request, parts=parts)

    @app.get("/distributions/{subset}")
    def distributions(request: Request, subset: str) -> HTMLResponse:
        return explorer.html("distributions.html", request, charts=explorer.charts(subset))

    @app.get("/static/{name}")
    def fixed(name: str) -> Response:
        if name not in static:
            raise ConfigError("no such file")
        return Response(static[name], media_type=STATIC[name], headers=_CACHE)

    @app.get("/browse")
    def browse(request: Request) -> HTMLResponse:
        query = Query.parse(request.query_params)
        after, before = (catalog.place_of(request.query_params.get(name, "")) for name in ("after", "before"))
        page = catalog.page(query, after, before)
        cards = [
            (place, rows, thumb_url(place, rows))
            for place, rows in zip(page.images, catalog.matching(page.images, query, MOST_DRAWN), strict=True)
        ]
        funnels = {name: catalog.counts(name).funnel for name in catalog.subsets()}
        return explorer.html(
            "browse.html",
            request,
            query=query,
            page=page,
            cards=cards,
            funnels=funnels,
            measures=MEASURES,
            categories=catalog.categories(),
            size=PAGE,
        )

    @app.get("/total")
    def total(request: Request) -> PlainTextResponse:
        regions, images = catalog.total(Query.parse(request.query_params))
        return PlainTextResponse(f"{regions:,} regions of {images:,} images")

    @app.get("/image/{subset}/{key}")
    def image(request: Request, subset: str, key: str) -> HTMLResponse:
        rows = catalog.image(subset, key)
        query = Query.parse(request.query_params)
        here = catalog.place_of(request.query_params.get("at", ""))
        if here is None or here.key != key:
            query = Query()
            here = Place(subset, rows[0]["unit"], key, rows[0]["file_row_number"], 0)
        earlier = catalog.page(query, before=here, limit=1).images
        later = catalog.page(query, after=here, limit=1).images
        shown = drawn(catalog.out, rows)
        return explorer.html(
            "image.html",
            request,
            subset=subset,
            key=key,
            rows=rows,
            query=query,
            here=here,
            earlier=earlier[0] if earlier else None,
            later=later[0] if later else None,
            numbers={layer.region for layer in shown["layers"]},
            **shown,
            marks=explorer.marks.of(subset, key),
            measures=MEASURES,
        )

    @app.get("/photo/{subset}/{key}")
    def photo(subset: str, key: str) -> Response:
        return picture(lambda: explorer.pictures.photo(subset, key))

    @app.get("/thumb/{subset}/{key}")
    def thumb(subset: str, key: str, r: str = "") -> Response:
        regions = [int(text) for text in r.split(",")[:MOST_DRAWN] if text.isdecimal() and len(text) < 10]
        return picture(lambda: explorer.pictures.thumb(subset, key, regions))

    @app.get("/whatif")
    def what_if(request: Request) -> HTMLResponse:
        return explorer.html("whatif.html", request, **compared(explorer, request))

    @app.get("/whatif/result")
    def what_if_result(request: Request) -> HTMLResponse:
        return explorer.html("whatif_result.html", request, **compared(explorer, request))

    @app.get("/review")
    def review(request: Request) -> HTMLResponse:
        return explorer.html("review.html", request, **reviewed(explorer, request))

    @app.post("/marks")
    def mark(
        subset: str = Form(),
        key: str = Form(),
        region: int = Form(),
        right: str = Form(),
        back: str = Form(""),
    ) -> Response:
        words = {"right": True, "wrong": False, "none": None}
        if right not in words:
            raise ConfigError("a mark is right, wrong or none")
        explorer.marks.set(subset, key, region, words[right])
        if back == "":
            return Response(status_code=204)
        if back == "image":
            return RedirectResponse(f"/image/{quote(subset, safe='')}/{quote(key, safe='')}", 303)
        return RedirectResponse(f"/review?{urlencode({'subset': subset, 'decision': back})}", 303)

    @app.get("/train")
    def train(request: Request) -> HTMLResponse:
        found = None if explorer.run is None else training.read(explorer.run)
        return explorer.html("train.html", request, run=found)

    @app.get("/train/picture/{number}")
    def train_picture(number: int) -> Response:
        if explorer.run is None:
            raise ConfigError("no training run is given; see --run")
        return Response(training.picture(explorer.run, number), media_type="image/jpeg", headers=_CACHE)

    return Guard(app, token)


_NO_PHOTO = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 300" width="400" height="300">
<rect width="400" height="300" fill="#20262c"/><text x="200" y="155" fill="#fff" font-family="sans-serif"
font-size="20" text-anchor="middle">the photo cannot be read</text></svg>"""


def picture(make: Callable[[], bytes]) -> Response:
    """A JPEG. Images that were dropped since their photo is missing or broken are shown, too, as such."""
    try:
        return Response(make(), media_type="image/jpeg", headers=_CACHE)
    except BadRecord:
        return Response(_NO_PHOTO, media_type="image/svg+xml")


def drawn(out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Evidence on some regions of one image, their masks, and those that the segmenter predicted, as SVG."""
    said = evidence.of_image(out, rows[0]["subset"], rows)
    found: dict[str, Any] = {"evidence": said, "layers": [], "predicted": {}}
    size = (rows[0]["image_height"], rows[0]["image_width"])
    with contextlib.suppress(BadRecord):  # masks that cannot be read are listed without being drawn
        masks = [(row["region"], Rle(size, row["rle_counts"])) for row in rows if row["rle_counts"]]
        found["layers"] = layers(masks)
        found["predicted"] = {region: outline(each.mask) for region, each in said.items() if each.mask}
    return found


def thumb_url(place: Place, rows: list[dict[str, Any]]) -> str:
    """Of a card: the photo with the regions that the query chose."""
    regions = ",".join(str(row["region"]) for row in rows if row["region"] is not None)
    return f"/thumb/{quote(place.subset, safe='')}/{quote(place.key, safe='')}?r={regions}"


def compared(explorer: Explorer, request: Request) -> dict[str, Any]:
    """What the thresholds in a URL do to each subset."""
    given = {key: request.query_params.get(key, "").strip() for key in THRESHOLDS}
    try:
        values = {key: float(text) for key, text in given.items() if text}
    except ValueError as error:
        raise ConfigError(f"a threshold is a number: {error}") from error
    wanted = whatif.change_config(explorer.config, values)
    exact = "exact" in request.query_params
    changes = {
        name: whatif.compare(explorer.catalog, name, explorer.config, wanted, exact)
        for name in explorer.catalog.subsets()
    }
    moved = {key for key in values if THRESHOLDS[key].value(wanted) != THRESHOLDS[key].value(explorer.config)}
    shown = [
        (name, charts.chart(each))
        for name in changes
        for each in (charts.distributions(explorer.catalog, name, wanted) if moved else [])
        if moved & {line.key for line in each.lines}
    ]
    return {
        "config": explorer.config,
        "charts": shown,
        "wanted": wanted,
        "thresholds": THRESHOLDS,
        "changes": changes,
        "lines": whatif.lines(explorer.config, wanted),
        "mixed": [name for name in changes if len(explorer.catalog.counts(name).recipes) > 1],
        "stale": [name for name in changes if whatif.contradicts(explorer.catalog, name, explorer.config)],
        "exact_url": "/whatif?" + urlencode({**{k: v for k, v in given.items() if v}, "exact": "1"}),
    }


def reviewed(explorer: Explorer, request: Request) -> dict[str, Any]:
    """The next region to look at, and the precision so far."""
    names = explorer.catalog.subsets()
    subset = request.query_params.get("subset", names[0])
    if subset not in names:
        raise ConfigError(f"{subset[:40]!r}: no such subset")
    decision = request.query_params.get("decision", KEPT)
    skip_text = request.query_params.get("skip", "0")
    skip = int(skip_text) if skip_text.isdecimal() and len(skip_text) < 7 else 0
    found = explorer.marks.next_unmarked(subset, decision, skip)
    row, shown = None, {}
    if found is not None:
        row = next(row for row in explorer.catalog.image(subset, found[0]) if row["region"] == found[1])
        shown = drawn(explorer.catalog.out, [row])
    precisions, void = explorer.marks.precision()
    return {
        "subset": subset,
        "decision": decision,
        "decisions": {name: explorer.decisions(name) for name in names},
        "row": row,
        **shown,
        "skip": skip,
        "precisions": precisions,
        "void": void,
        "measures": MEASURES,
    }
