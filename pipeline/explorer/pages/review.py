"""Review: is a decision right? One region after the other at random, and the precision so far."""

from __future__ import annotations

import secrets
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from ....schemas.errors import ConfigError
from ..context import CurrentExplorer
from ..query import MEASURES, Query
from ..reviews import KEPT, decision_of, list_decisions
from .image import REVIEWER, draw_regions

_Answer = TypeVar("_Answer", bound=Response)

LINK = ("/review", "Review")
router = APIRouter()


@router.get("/review")
def show_next(
    request: Request,
    explorer: CurrentExplorer,
    subset: str = "",
    decision: str = KEPT,
    skip: str = "0",
    key: str = "",
    region: int = -1,
) -> HTMLResponse:
    """The next region of a decision; or the one that `key` and `region` name, with its review."""
    catalog, reviews = explorer.catalog, explorer.reviews
    subset = subset or catalog.subsets()[0]
    catalog.check_subset(subset)
    num_skipped = int(skip) if skip.isdecimal() and len(skip) < 7 else 0
    reviewer = reviewer_of(request)
    found = reviews.next_unreviewed(subset, decision, num_skipped, reviewer)
    shown = (key, region) if key else found
    num_passed = num_skipped + (shown == found)  # one that was asked for is not among those to skip
    row, drawn, review = None, {}, None
    if shown is not None:
        key, region = shown
        row = next((row for row in catalog.image(subset, key) if row["region"] == region), None)
        if row is None:
            raise ConfigError(f"{subset}/{key}: no region {region}")
        decision = decision_of(row)
        drawn = draw_regions(explorer, [row])
        own = reviews.of_image(subset, key).get(region, [])
        review = next((each for each in own if each.reviewer == reviewer), None)
    precisions, num_void = reviews.precision()
    page = explorer.html(
        "review.html",
        request,
        subset=subset,
        decision=decision,
        decisions={name: list_decisions(catalog, name) for name in catalog.subsets()},
        row=row,
        **drawn,
        skip=num_skipped,
        num_passed=num_passed,
        review=review,
        last=reviews.last_of(reviewer),
        precisions=precisions,
        num_void=num_void,
        measures=MEASURES,
        reviewer=reviewer,
    )
    return remember_reviewer(page, reviewer)


_MOST_LETTERS = 60


def reviewer_of(request: Request) -> str:
    """The name of whoever sends a request: as they gave it, else one made up for their browser."""
    given = unquote(request.cookies.get(REVIEWER, "")).strip()[:_MOST_LETTERS]
    return given or f"reviewer {secrets.token_hex(2)}"


def remember_reviewer(answer: _Answer, reviewer: str) -> _Answer:
    """The answer with the reviewer's name in a cookie, so that two browsers are two reviewers."""
    answer.set_cookie(REVIEWER, quote(reviewer), httponly=True, samesite="lax", max_age=365 * 86_400)
    return answer


@router.post("/reviewer")
def name_reviewer(request: Request, name: str = Form("")) -> Response:
    """Take a name for the reviews that this browser makes from now on."""
    name = " ".join(name.split())[:_MOST_LETTERS] or reviewer_of(request)
    return remember_reviewer(RedirectResponse("/review", 303), name)


_RIGHT = {"right": True, "wrong": False, "none": None}


@router.post("/marks")  # as the address was in version 0.1
def save_review(
    request: Request,
    explorer: CurrentExplorer,
    subset: str = Form(),
    key: str = Form(),
    region: int = Form(),
    right: str = Form(),
    back: str = Form(""),
    query: str = Form(""),
    skip: str = Form("0"),
) -> Response:
    """Save or remove the review of a region.

    `back` is the page to show then, "" for none: "image", with the `query` that led to it; "again" for the
    region itself on the Review page; or a decision to go on with, still passing over the `skip` regions that
    were skipped.
    """
    if right not in _RIGHT:
        raise ConfigError("a review is right, wrong or none")
    reviewer = reviewer_of(request)
    explorer.reviews.save(subset, key, region, _RIGHT[right], reviewer)
    if back == "":
        return remember_reviewer(Response(status_code=204), reviewer)
    if back == "image":
        asked = Query.parse(dict(parse_qsl(query))).url()
        page = f"/image/{quote(subset, safe='')}/{quote(key, safe='')}" + (f"?{asked}" if asked else "")
    else:
        asked = {"subset": subset} | (
            {"key": key, "region": region} if back == "again" else {"decision": back}
        )
        if skip.isdecimal() and len(skip) < 7 and int(skip):
            asked["skip"] = skip
        page = f"/review?{urlencode(asked)}"
    return remember_reviewer(RedirectResponse(page, 303), reviewer)
