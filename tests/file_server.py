"""An HTTP server of a folder, on this machine alone, that can fail in the ways that servers of photos do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Fault = int | str | None
"""A status; "reset", "short" (less than was announced), "cut" (a body without a length that ends early),
"page" (a web page with status 200), "no length", "no ranges", "no head", "no listing"; None for the right
answer."""


@dataclass
class FileServer:
    """What is served, what goes wrong with it, and what was asked.

    Attributes:
        root: the folder.
        url: of the folder.
        fault: (method, path) -> what goes wrong.
        headers: of every answer that is a status.
        asked: (method, path, Range) of each request, in order.
    """

    root: Path
    url: str = ""
    fault: Callable[[str, str], Fault] = lambda _method, _path: None
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)


@contextmanager
def serving(root: Path) -> Iterator[FileServer]:
    """Serve a folder while the block runs."""
    files = FileServer(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": files}))
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        path = unquote(self.path)
        given = self.headers.get("Range", "")
        self.files.asked.append((method, path, given))
        fault = self.files.fault(method, path)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(fault, int):
            self._send(fault, b"", self.files.headers, method)
            return
        if fault == "page":
            page = {"Content-Type": "text/html; charset=utf-8"}
            self._send(200, b"<p>Back in an hour", page, method)
            return
        if fault == "no head" and method == "HEAD":
            self._send(405, b"", {}, method)
            return
        target = self.files.root / path.strip("/")
        if target.is_dir():
            self._folder(target, path, method, fault)
        elif target.is_file():
            self._file(target.read_bytes(), method, given, fault)
        else:
            self._send(404, b"", {}, method)

    def _folder(self, target: Path, path: str, method: str, fault: Fault) -> None:
        if fault == "no listing":
            self._send(403, b"", {}, method)
        elif not path.endswith("/"):
            self._send(301, b"", {"Location": f"{path}/"}, method)
        else:
            names = [each.name + "/" * each.is_dir() for each in sorted(target.iterdir())]
            links = "".join(f'<li><a href="{name}">{name}</a></li>' for name in ["../", *names])
            self._send(200, links.encode(), {"Content-Type": "text/html; charset=utf-8"}, method)

    def _file(self, data: bytes, method: str, given: str, fault: Fault) -> None:
        headers = {
            "Content-Type": "application/octet-stream",
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }
        status, size = 200, len(data)
        if given and fault != "no ranges":
            first, _, last = given.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(size, int(last or size) + 1)
            if start >= size:
                self._send(416, b"", {"Content-Range": f"bytes */{size}"}, method)
                return
            status, data = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(status, data, headers, method, fault)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], method: str, fault: Fault = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault in ("no length", "cut"):
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("short", "cut"):
            body = body[: len(body) // 2]
            self.close_connection = True
        if method == "GET":
            self.wfile.write(body)
