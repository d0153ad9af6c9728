"""Starts the explorer's server."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from ...schemas.errors import ConfigError
from ..io.location import Location
from . import connections
from .access import is_loopback
from .app import make_app
from .context import Explorer


def serve(
    out: str | Location,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    run: str | Path | None = None,
    shards: str | None = None,
    outside: bool = False,
    urls: bool = False,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the pages of a corpus until interrupted.

    Args:
        out: the corpus.
        host: to bind to. A host that other machines reach needs a token.
        port: 0 for any free port.
        token: asked of every request; by default none on loopback, and a random one elsewhere.
        run: folder of a training run to show.
        shards: folder or fsspec URL of the shards, if they are not in the corpus.
        outside: show photos outside of the corpus; see `Pictures`.
        urls: fetch photos from URLs; see `Pictures`.
        on_ready: called with the address to open, token included, when the server accepts connections.

    Raises:
        ConfigError: there is no corpus or no run, or the port is taken.
    """
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    if token is not None and len(token) < 8:
        raise ConfigError("--token: give 8 characters or more, or leave it out to have one made")
    app = make_app(Explorer(out, run, shards, outside, urls), token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        fix = "choose another --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "correct --host"
        raise ConfigError(f"{host}:{port}: {error.strerror or error}; {fix}") from error
    with listening:
        name = socket.gethostname() if host in ("0.0.0.0", "::") else host.strip("[]")
        name = f"[{name}]" if ":" in name else name
        query = "" if token is None else f"?token={token}"
        on_ready(f"http://{name}:{listening.getsockname()[1]}/{query}")
        config = uvicorn.Config(
            app,
            http=connections.TimedConnection,
            ws="none",
            limit_concurrency=connections.MOST_OPEN,
            log_level="warning",
            server_header=False,
            access_log=False,
            proxy_headers=False,
        )
        uvicorn.Server(config).run(sockets=[listening])
