"""The overview: the funnel of each subset, its model stages, and its distributions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from ...corpus.utilization import read_utilization
from ...stages.recipes import gpus_of_stages
from ..charts import Chart, draw_chart, read_distributions
from ..context import CurrentExplorer, Explorer

LINK = ("/", "Overview")
router = APIRouter()


@router.get("/")
def show_overview(request: Request, explorer: CurrentExplorer) -> HTMLResponse:
    parts = summarize_subsets(explorer, distributions="distributions" in request.query_params)
    return explorer.html("overview.html", request, parts=parts)


@router.get("/distributions/{subset}")
def show_distributions(request: Request, explorer: CurrentExplorer, subset: str) -> HTMLResponse:
    return explorer.html("distributions.html", request, charts=draw_distributions(explorer, subset))


def summarize_subsets(explorer: Explorer, distributions: bool) -> list[dict[str, Any]]:
    """The counts of each subset and the utilization of its stages; distributions take one more pass."""
    return [
        {
            "name": name,
            "counts": explorer.catalog.counts(name),
            "stages": summarize_stages(explorer, name),
            "charts": draw_distributions(explorer, name) if distributions else None,
        }
        for name in explorer.catalog.subsets()
    ]


def summarize_stages(explorer: Explorer, subset: str) -> list[dict[str, Any]]:
    """What the event log says about a subset's model stages: speed, and GPU seconds held and used.

    GPU seconds are those of the actors, with the GPUs that the configuration gives to each.
    """

    def summarize() -> list[dict[str, Any]]:
        rows = []
        held = gpus_of_stages(explorer.config, subset)
        for name, stage in read_utilization(explorer.catalog.out, subset).items():
            gpus = held.get(name, 0.0)
            seconds = {"gpu_held_s": stage.alive_s * gpus, "gpu_busy_s": stage.busy_s * gpus}
            rows.append({"name": name, "stage": stage, **seconds})
        return rows

    return explorer.catalog.remember(("stages", subset), summarize)


def draw_distributions(explorer: Explorer, subset: str) -> list[Chart]:
    """The distributions of a subset as charts.

    Raises:
        ConfigError: there is no such subset.
    """
    explorer.catalog.check_subset(subset)
    return [draw_chart(each) for each in read_distributions(explorer.catalog, subset, explorer.config)]
