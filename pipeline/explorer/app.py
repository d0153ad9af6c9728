"""The server's application: the pages, the static files, and errors as pages.

A new page is a file in `pages/` with a template of the same name, and a line in `PAGES`.
"""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from ...schemas.errors import BadRecord, ConfigError, ParaCaptionError
from .access import Guard
from .context import CACHED, Explorer
from .pages import browse, image, overview, review, train, whatif

PAGES = (overview, browse, image, whatif, review, train)
"""The pages; those with a `LINK` are in the navigation, in this order."""

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
        status = 404 if isinstance(error, ConfigError | BadRecord) else 500
        return explorer.html("error.html", request, status, message=str(error))

    return Guard(app, token)


def _serve_static(app: FastAPI) -> None:
    folder = resources.files("paracaption.pipeline.explorer").joinpath("static")
    files = {name: folder.joinpath(name).read_bytes() for name in STATIC}

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in files:
            raise ConfigError("no such file")
        return Response(files[name], media_type=STATIC[name], headers=CACHED)
