"""An image: its photo, every mask, and what each stage said about each region."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from ....schemas.errors import BadRecord, IntegrityError
from ....schemas.records import Rle
from ..catalog import ImagePlace
from ..context import CACHED, CurrentExplorer, Explorer
from ..evidence import read_evidence
from ..pictures import MOST_DRAWN, NotShown, draw_box, draw_layers, outline
from ..query import MEASURES, Query

REVIEWER = "paracaption-reviewer"
"""The cookie with the name of whoever reviews."""

LINK = None
router = APIRouter()


@router.get("/image/{subset}/{key}")
def show_image(request: Request, explorer: CurrentExplorer, subset: str, key: str) -> HTMLResponse:
    catalog = explorer.catalog
    rows = catalog.image(subset, key)
    query = Query.parse(request.query_params)
    here = catalog.place_of(query, subset, key)
    within = Query() if here is None else query  # of an image that was not asked for, those next to it
    here = here or ImagePlace(subset, rows[0]["unit"], key, rows[0]["file_row_number"], 0)
    earlier = catalog.page(within, before=here, limit=1).images
    later = catalog.page(within, after=here, limit=1).images
    drawn = draw_regions(explorer, rows)
    reviewer = unquote(request.cookies.get(REVIEWER, ""))
    reviews = explorer.reviews.of_image(subset, key)
    asked: list[int] = []
    if query.chips():
        [chosen] = catalog.matching([here], query, len(rows))
        asked = [row["region"] for row in chosen if row["region"] is not None]
    if asked:
        place = {region: number for number, region in enumerate(asked)}
        rows = sorted(rows, key=lambda row: place.get(row["region"], len(rows)))  # the others as they were
    back = {name: request.query_params.get(name, "") for name in ("after", "before")}
    if not any(back.values()) and earlier and within is query:
        back = {"after": earlier[0].cursor}  # the page that begins with this image
    return explorer.html(
        "image.html",
        request,
        subset=subset,
        key=key,
        rows=rows,
        query=query,
        asked=asked,
        back=back,
        earlier=earlier[0] if earlier else None,
        later=later[0] if later else None,
        numbers={layer.region for layer in drawn["layers"]},
        **drawn,
        reviews={r: each for r, all_of in reviews.items() for each in all_of if each.reviewer == reviewer},
        others={r: [each for each in all_of if each.reviewer != reviewer] for r, all_of in reviews.items()},
        measures=MEASURES,
    )


@router.get("/photo/{subset}/{key}")
def send_photo(explorer: CurrentExplorer, subset: str, key: str) -> Response:
    return _picture(lambda: explorer.pictures.photo(subset, key))


@router.get("/thumb/{subset}/{key}")
def send_thumb(explorer: CurrentExplorer, subset: str, key: str, r: str = "") -> Response:
    regions = [int(text) for text in r.split(",")[:MOST_DRAWN] if text.isdecimal() and len(text) < 10]
    return _picture(lambda: explorer.pictures.thumb(subset, key, regions))


def draw_regions(explorer: Explorer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a template needs to show some regions of one image.

    Args:
        explorer: of the corpus.
        rows: of the ledger, all of one image.

    Returns:
        `evidence` by region, `layers` (their masks as SVG, and the boxes of those without a mask), and
        `predicted` (the segmenter's masks as SVG paths, by region).
    """
    subset = rows[0]["subset"]
    evidence = read_evidence(explorer.catalog.out, subset, rows, explorer.kinds(subset))
    drawn: dict[str, Any] = {"evidence": evidence, "layers": [], "predicted": {}}
    size = (rows[0]["image_height"], rows[0]["image_width"])
    with contextlib.suppress(BadRecord):  # masks that cannot be read are listed without being drawn
        drawn["layers"] = draw_layers(
            [(row["region"], Rle(size, row["rle_counts"])) for row in rows if row["rle_counts"]]
        )
        drawn["layers"] += [
            draw_box(row["region"], tuple(row[f"bbox_{name}"] for name in "xywh"))
            for row in rows
            if row["bbox_w"] and not row["rle_counts"]
        ]
        drawn["predicted"] = {region: outline(each.mask) for region, each in evidence.items() if each.mask}
    return drawn


_NO_PHOTO = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 300" width="400" height="300">
<rect width="400" height="300" fill="#20262c"/><text x="200" y="155" fill="#fff" font-family="sans-serif"
font-size="15" text-anchor="middle">{}</text></svg>"""


def _picture(make: Callable[[], bytes]) -> Response:
    """A JPEG; for an image whose photo is missing or broken, a drawing that says so."""
    try:
        return Response(make(), media_type="image/jpeg", headers=CACHED)
    except NotShown as error:
        return Response(_NO_PHOTO.format(error.detail), media_type="image/svg+xml")
    except (BadRecord, IntegrityError):
        return Response(_NO_PHOTO.format("The photo cannot be read"), media_type="image/svg+xml")
