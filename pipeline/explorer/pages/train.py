"""A training run: its curves, sample captions and pictures."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from ....schemas.errors import ConfigError
from .. import training
from ..context import CACHED, CurrentExplorer

LINK = ("/train", "Train")
router = APIRouter()


@router.get("/train")
def show_run(request: Request, explorer: CurrentExplorer) -> HTMLResponse:
    run = None if explorer.run is None else training.read_run(explorer.run)
    return explorer.html("train.html", request, run=run)


@router.get("/train/picture/{number}")
def send_picture(explorer: CurrentExplorer, number: int) -> Response:
    if explorer.run is None:
        raise ConfigError("no training run is shown; start `paracaption explore` again with --run FOLDER")
    return Response(training.read_picture(explorer.run, number), media_type="image/jpeg", headers=CACHED)
