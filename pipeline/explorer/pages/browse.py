"""Browse: the images that have regions like those that were asked for."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse

from ..catalog import ImagePlace
from ..context import CurrentExplorer, count
from ..pictures import MOST_DRAWN
from ..query import MEASURES, Query

LINK = ("/browse", "Browse")
router = APIRouter()


@router.get("/browse")
def show_results(request: Request, explorer: CurrentExplorer) -> HTMLResponse:
    catalog = explorer.catalog
    query = Query.parse(request.query_params)
    after, before = (catalog.find_place(request.query_params.get(name, "")) for name in ("after", "before"))
    page = catalog.page(query, after, before)
    matching = catalog.matching(page.images, query, MOST_DRAWN)
    return explorer.html(
        "browse.html",
        request,
        query=query,
        here={name: text for name in ("after", "before") if (text := request.query_params.get(name))},
        page=page,
        cards=[
            (place, rows, _thumb_url(place, rows)) for place, rows in zip(page.images, matching, strict=True)
        ],
        funnels={name: catalog.counts(name).funnel for name in catalog.subsets()},
        measures=MEASURES,
        categories=catalog.categories(),
    )


@router.get("/total")
def count_results(request: Request, explorer: CurrentExplorer) -> PlainTextResponse:
    query = Query.parse(request.query_params)
    regions, images = explorer.catalog.total(query)
    ranked, ranked_images = explorer.catalog.total(query, ranked=True)
    text = f"{count(regions, 'region')} of {count(images, 'image')}"
    if ranked != regions:
        name = query.measure.replace("_", " ")
        shown = f"{count(ranked, 'region')} of {count(ranked_images, 'image')}"
        text += f"; only the {shown} with a value for {name} {'is' if ranked == 1 else 'are'} shown"
    return PlainTextResponse(text)


def _thumb_url(place: ImagePlace, rows: list[dict[str, Any]]) -> str:
    """The picture of a card: the photo with the regions that the query chose."""
    regions = ",".join(str(row["region"]) for row in rows if row["region"] is not None)
    return f"/thumb/{quote(place.subset, safe='')}/{quote(place.key, safe='')}?r={regions}"
