"""What if: how many regions, and which, other thresholds would newly drop or keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from ....schemas.errors import ConfigError
from ...stages.registry import THRESHOLDS
from .. import whatif
from ..charts import draw_chart, read_distributions
from ..context import CurrentExplorer, Explorer

LINK = ("/whatif", "What if")
router = APIRouter()


@router.get("/whatif")
def show_what_if(request: Request, explorer: CurrentExplorer) -> HTMLResponse:
    return explorer.html("whatif.html", request, **_compare(explorer, request.query_params))


@router.get("/whatif/result")
def show_result(request: Request, explorer: CurrentExplorer) -> HTMLResponse:
    """The part of the page that changes with a slider."""
    return explorer.html("whatif_result.html", request, **_compare(explorer, request.query_params))


def _compare(explorer: Explorer, params: Mapping[str, str]) -> dict[str, Any]:
    """What the thresholds in a URL do to each subset."""
    catalog, config = explorer.catalog, explorer.config
    given = {key: text for key in THRESHOLDS if (text := params.get(key, "").strip())}
    try:
        values = {key: float(text) for key, text in given.items()}
    except ValueError as error:
        raise ConfigError(f"a threshold has to be a number: {error}") from error
    wanted = whatif.change_config(config, values)
    left_out = {name: why for name in catalog.subsets() if (why := whatif.why_not(config, name))}
    changes = {
        name: whatif.compare(catalog, name, config, wanted, exact="exact" in params)
        for name in catalog.subsets()
        if name not in left_out
    }
    moved = {key for key in values if THRESHOLDS[key].value(wanted) != THRESHOLDS[key].value(config)}
    charts = [
        (name, draw_chart(each))
        for name, (change, _) in changes.items()
        for each in (read_distributions(catalog, name, config, wanted, change.moves) if moved else [])
        if moved & {line.key for line in each.lines}
    ]
    return {
        "config": config,
        "charts": charts,
        "wanted": wanted,
        "thresholds": THRESHOLDS,
        "changes": changes,
        "lines": whatif.changed_lines(config, wanted),
        "left_out": left_out,
        "own": {name: keys for name in changes if (keys := whatif.set_by_recipe(config, name))},
        "mixed": [name for name in changes if len(catalog.counts(name).recipes) > 1],
        "stale": [name for name in changes if whatif.contradicts(catalog, name, config)],
        "exact_url": "/whatif?" + urlencode({**given, "exact": "1"}),
    }
