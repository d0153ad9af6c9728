"""The server's application: the pages, the static files, and errors as pages.

A new page is a file in `pages/` with a template of the same name, and a line in `PAGES`.
"""

from __future__ import annotations

import logging
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from ...schemas.errors import BadRecord, ConfigError, ParaCaptionError, one_line
from .access import Guard
from .context import CACHED, ODD, Explorer
from .pages import browse, image, overview, review, train, whatif

log = logging.getLogger(__name__)

PAGES = (overview, browse, image, whatif, review, train)
"""The pages; those with a `LINK` are in the navigation, in this order."""

DAMAGED = 409
"""The status of a page that the state of the corpus, and not of the server, keeps from being shown."""

STATIC = {"explorer.css": "text/css", "explorer.js": "text/javascript", "icon.svg": "image/svg+xml"}


def make_app(explorer: Explorer, token: str | None = None) -> Guard:
    """The application for uvicorn.

    Args:
        explorer: what is shown.
        token: asked of every request; None for none, see `Guard`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.explorer = explorer
    for page in PAGES:
        app.include_router(page.router)
    links = [page.LINK for page in PAGES if page.LINK and (page is not train or explorer.run)]
    explorer.templates.globals["links"] = links
    _serve_static(app)

    @app.exception_handler(ParaCaptionError)
    def show_error(request: Request, error: ParaCaptionError) -> HTMLResponse:
        status = 404 if isinstance(error, ConfigError | BadRecord) else DAMAGED
        return explorer.html("error.html", request, status, message=str(error))

    def show_damage(request: Request, error: Exception) -> HTMLResponse:
        log.warning("%s: %s", request.url.path, one_line(error))
        log.debug("%s", request.url.path, exc_info=error)
        what = f"{explorer.catalog.out}: holds something that no build writes ({one_line(error)[:300]})"
        message = f"{what}; `paracaption verify` names the file"
        return explorer.html("error.html", request, DAMAGED, message=message)

    for kind in ODD:
        app.add_exception_handler(kind, show_damage)
    return Guard(app, token)


def _serve_static(app: FastAPI) -> None:
    folder = resources.files("paracaption.pipeline.explorer").joinpath("static")
    files = {name: folder.joinpath(name).read_bytes() for name in STATIC}

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in files:
            raise ConfigError("no such file")
        return Response(files[name], media_type=STATIC[name], headers=CACHED)
