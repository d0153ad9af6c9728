"""Review: is a decision right? One region after the other at random, and the precision so far."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from ....schemas.errors import ConfigError
from ..context import CurrentExplorer
from ..query import MEASURES
from ..reviews import KEPT, list_decisions
from .image import draw_regions

LINK = ("/review", "Review")
router = APIRouter()


@router.get("/review")
def show_next(
    request: Request, explorer: CurrentExplorer, subset: str = "", decision: str = KEPT, skip: str = "0"
) -> HTMLResponse:
    catalog, reviews = explorer.catalog, explorer.reviews
    subset = subset or catalog.subsets()[0]
    catalog.check_subset(subset)
    num_skipped = int(skip) if skip.isdecimal() and len(skip) < 7 else 0
    found = reviews.next_unreviewed(subset, decision, num_skipped)
    row, drawn = None, {}
    if found is not None:
        key, region = found
        row = next(row for row in catalog.image(subset, key) if row["region"] == region)
        drawn = draw_regions(catalog.out, [row])
    precisions, num_void = reviews.precision()
    return explorer.html(
        "review.html",
        request,
        subset=subset,
        decision=decision,
        decisions={name: list_decisions(catalog, name) for name in catalog.subsets()},
        row=row,
        **drawn,
        skip=num_skipped,
        precisions=precisions,
        num_void=num_void,
        measures=MEASURES,
    )


_RIGHT = {"right": True, "wrong": False, "none": None}


@router.post("/marks")  # as the address was in version 0.1
def save_review(
    explorer: CurrentExplorer,
    subset: str = Form(),
    key: str = Form(),
    region: int = Form(),
    right: str = Form(),
    back: str = Form(""),
) -> Response:
    """Save or remove the review of a region; `back` is the page to show then, "" for none."""
    if right not in _RIGHT:
        raise ConfigError("a review is right, wrong or none")
    explorer.reviews.save(subset, key, region, _RIGHT[right])
    if back == "":
        return Response(status_code=204)
    if back == "image":
        return RedirectResponse(f"/image/{quote(subset, safe='')}/{quote(key, safe='')}", 303)
    return RedirectResponse(f"/review?{urlencode({'subset': subset, 'decision': back})}", 303)
