"""Who may look: a token if others can reach the server, and protection against pages of other sites.

Requests must be addressed to a name of this machine, POSTs must come from our own pages, and the headers
allow a page to load nothing but our own files.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse

COOKIE = "paracaption-token"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_LOCAL = {"localhost", "127.0.0.1", "::1"}

App = Callable[[Any, Any, Any], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that binds to the host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets requests through to the pages.

    Without a token only requests to a name of this machine pass: a page of another site that has its own name
    point here (DNS rebinding) is refused. With one, each request needs it, in the cookie, in
    `Authorization: Bearer`, or once as `?token=`, which sets the cookie. A POST must come from our own pages.

    Args:
        app: the pages.
        token: asked of every request; None for none.
    """

    def __init__(self, app: App, token: str | None = None):
        self.app = app
        self.token = token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                named = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *named]}
            await send(message)

        answer = self._refusal(Request(scope))
        await (self.app if answer is None else answer)(scope, receive, sending)

    def _refusal(self, request: Request) -> Any:
        host = request.headers.get("host", "")
        if self.token is None:
            if _name_of(host) not in _LOCAL:
                return PlainTextResponse(
                    "this server answers to localhost only; for other machines start it with --host\n",
                    403,
                )
        elif (given := request.query_params.get("token")) is not None:
            if not _same(given, self.token):
                return _denied()
            if request.method == "GET":
                return self._welcome(request)
        elif not _same(request.cookies.get(COOKIE, ""), self.token) and not _same(
            _bearer(request), self.token
        ):
            return _denied()
        if request.method not in ("GET", "HEAD") and not _is_own(request, host):
            return PlainTextResponse("this request came from another site and was refused\n", 403)
        return None

    def _welcome(self, request: Request) -> RedirectResponse:
        """Set the cookie, and go to the same page without the token, which the history would keep."""
        rest = urlencode([pair for pair in parse_qsl(request.url.query) if pair[0] != "token"])
        path = "/" + request.url.path.lstrip("/")  # "//host" would lead elsewhere
        answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        answer.set_cookie(COOKIE, self.token or "", httponly=True, samesite="lax", max_age=30 * 86_400)
        return answer


def _is_own(request: Request, host: str) -> bool:
    """Whether a POST comes from our pages, as browsers say; a program that says nothing has no cookie."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    return site == "same-origin" and (origin is None or urlsplit(origin).netloc == host)


def _name_of(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _bearer(request: Request) -> str:
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    return value if kind.lower() == "bearer" else ""


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _denied() -> PlainTextResponse:
    return PlainTextResponse("open the address that the server printed; it has the token\n", 401)
