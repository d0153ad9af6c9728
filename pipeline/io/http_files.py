"""Reads files over HTTP by requests that keep their status: fsspec takes a 503 for a missing file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from ...schemas.errors import ConfigError
from . import failures
from .backends import FileKind, expand_by_listing

if TYPE_CHECKING:
    import httpx

_AT_ONCE = 16
_CONNECT_S = 10.0
_READ_S = 30.0

_FARTHEST_BYTES = 64 << 20
"""Without ranges, this many bytes are read and thrown away to get at what follows them."""

_NO_HEAD = {400, 403, 405, 501}
"""Statuses with which servers refuse HEAD where GET works, as for links that are signed for GET."""


class HttpError(OSError):
    """A status that is no success, with what the server says of when to ask again."""

    def __init__(self, status: int, phrase: str, retry_after: float | None = None):
        super().__init__(f"HTTP {status} {phrase}".rstrip())
        self.status, self.retry_after = status, retry_after


class HttpMissing(HttpError, FileNotFoundError):
    """404."""


class _Head(NamedTuple):
    url: str
    size: int | None
    mark: str


class HttpFiles:
    """Files behind http:// and https://. Redirects are followed; headers come from fsspec's configuration."""

    def __init__(self) -> None:
        self._opened: tuple[int, httpx.Client] | None = None

    def read(self, url: str, start: int = 0, length: int | None = None) -> bytes:
        data, is_whole = self._read(url, start, length)
        if not is_whole:
            # Nothing but the end of the connection ended this body: it may have been cut.
            again, _ = self._read(url, start, length)
            if again != data:
                raise failures.ShortRead(f"two reads gave {len(data)} and {len(again)} bytes")
        return data

    def size(self, url: str) -> int:
        found = self._head(url).size
        return len(self.read(url)) if found is None else found

    def version(self, url: str) -> str:
        head = self._head(url)
        return f"{head.size}-{head.mark}"

    def kind(self, url: str) -> FileKind | None:
        try:
            head = self._head(url)
        except FileNotFoundError:
            return None
        return "folder" if urlsplit(head.url).path.endswith("/") else "file"

    def list_names(self, folder: str) -> list[str]:
        """The links of a folder's page that lead into it."""
        url = folder.rstrip("/") + "/"
        with self._get(url, {}) as response:
            if "html" not in response.headers.get("content-type", ""):
                raise failures.ShortRead("the server lists no folder")
            base, text = str(response.url), response.read().decode("utf-8", "replace")
        links = _Links()
        links.feed(text)
        return sorted(set(_names_below(base, links.found)))

    def walk(self, folder: str) -> Iterator[tuple[str, str]]:
        root = folder.rstrip("/")
        for name in self.list_names(folder):
            yield f"{root}/{name}", name

    def glob(self, pattern: str) -> list[str]:
        return expand_by_listing(self, pattern)

    def read_many(self, urls: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self.read, urls))

    def _read(self, url: str, start: int, length: int | None) -> tuple[bytes, bool]:
        """The bytes, and whether their number is known to be right."""
        if length == 0:
            return b"", True
        ranged = bool(start) or length is not None
        last = "" if length is None else start + length - 1
        with self._get(url, {"Range": f"bytes={start}-{last}"} if ranged else {}) as response:
            if response.status_code == 416:
                return b"", True
            if response.status_code == 206:
                return _range_of(response, start)
            if start > _FARTHEST_BYTES:
                raise ConfigError(
                    f"{url}: the server does not serve ranges (it ignores `Range`); "
                    "fetch the file and name the local one"
                )
            stop = None if length is None else start + length
            if _is_page_instead(response, url):
                raise failures.ShortRead("the server sent a web page instead of the file")
            data, ended = bytearray(), True
            for chunk in response.iter_bytes():
                data += chunk
                if stop is not None and len(data) >= stop:
                    ended = False
                    break
            return bytes(data[start:stop]), not ended or _says_its_length(response)

    def _head(self, url: str) -> _Head:
        response = self._client().head(url)
        if response.status_code in _NO_HEAD or (
            response.is_success and "content-length" not in response.headers
        ):
            with self._get(url, {"Range": "bytes=0-0"}) as response:
                return _Head(str(response.url), _total(response), _mark(response))
        _refuse(response)
        return _Head(str(response.url), int(response.headers["content-length"]), _mark(response))

    @contextmanager
    def _get(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        with self._client().stream("GET", url, headers=headers) as response:
            if response.status_code != 416:
                _refuse(response)
            yield response

    def _client(self) -> httpx.Client:
        """The client of this process: a forked one must not share its parent's connections."""
        if self._opened is None or self._opened[0] != os.getpid():
            import httpx

            self._opened = (
                os.getpid(),
                httpx.Client(
                    follow_redirects=True,
                    headers={"Accept-Encoding": "identity", **_configured_headers()},
                    timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S),
                ),
            )
        return self._opened[1]


def _refuse(response: httpx.Response) -> None:
    if not response.is_success:
        kind = HttpMissing if response.status_code == 404 else HttpError
        asked = failures.parse_retry_after(response.headers.get("retry-after", ""))
        raise kind(response.status_code, response.reason_phrase, asked)


def _range_of(response: httpx.Response, start: int) -> tuple[bytes, bool]:
    given, _, _ = response.headers.get("content-range", "").removeprefix("bytes ").partition("/")
    first, _, last = given.partition("-")
    data = b"".join(response.iter_bytes())
    if not first.isdigit() or not last.isdigit():
        return data, False
    if int(first) != start or len(data) != int(last) - int(first) + 1:
        raise failures.ShortRead(f"asked for bytes from {start}, got {len(data)} of {given}")
    return data, True


def _is_page_instead(response: httpx.Response, url: str) -> bool:
    """Whether a success is a page for people: of a login, a proxy, or a server that is being repaired."""
    is_page = "text/html" in response.headers.get("content-type", "").lower()
    return is_page and not urlsplit(url).path.lower().endswith((".html", ".htm", "/"))


def _says_its_length(response: httpx.Response) -> bool:
    """Whether a body that was cut would have been noticed."""
    headers = response.headers
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    return "content-length" in headers or chunked or response.http_version == "HTTP/2"


def _total(response: httpx.Response) -> int | None:
    if response.status_code == 206:
        total = response.headers.get("content-range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    if response.status_code == 416:  # an empty file has no first byte
        return 0
    length = response.headers.get("content-length")
    return None if length is None else int(length)


def _mark(response: httpx.Response) -> str:
    return response.headers.get("etag") or response.headers.get("last-modified") or ""


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _names_below(base: str, links: list[str]) -> Iterator[str]:
    folder = urlsplit(base).path
    for link in links:
        path = urlsplit(urljoin(base, link)).path
        name = path.removeprefix(folder).rstrip("/")
        if path.startswith(folder) and name and "/" not in name:
            yield unquote(name)


def _configured_headers() -> dict[str, str]:
    """Headers that fsspec's configuration gives for `http` and `https`, as those of an authorization."""
    import fsspec.config

    found: dict[str, str] = {}
    for scheme in ("http", "https"):
        options: dict[str, Any] = fsspec.config.conf.get(scheme, {})
        found |= options.get("headers", {}) | options.get("client_kwargs", {}).get("headers", {})
    return found
