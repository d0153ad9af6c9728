"""A real HTTP server on loopback that speaks chat completions as it is told, and keeps what it was sent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Reply:
    """What the server answers: a text, or a status with headers, or raw bytes; after a delay."""

    def __init__(self, text: str | None = "", status: int = 200, **how: Any):
        self.text, self.status = text, status
        self.headers = how.get("headers", {})
        self.raw: bytes | None = how.get("raw")
        self.delay_s = how.get("delay_s", 0.0)
        self.choice = how.get("choice", {})

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.text}}).encode()
        choice = {"message": {"role": "assistant", "content": self.text}, "finish_reason": "stop"}
        return json.dumps({"choices": [{**choice, **self.choice}]}).encode()


class ChatServer:
    """Attributes: `url`; `requests`, the bodies in order; `headers` of each; `most`, the most at one time."""

    def __init__(self, answer: Callable[[dict, int], Reply]):
        self.answer = answer
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.models_reply = Reply(raw=b'{"data": [{"id": "tiny"}]}')
        self.most = self._now = 0
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                chat.headers.append(dict(self.headers))
                self._send(chat.models_reply)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat._lock:
                    chat._now += 1
                    chat.most = max(chat.most, chat._now)
                    chat.requests.append(body)
                    chat.headers.append(dict(self.headers))
                    number = len(chat.requests)
                reply = chat.answer(body, number)
                time.sleep(reply.delay_s)
                with chat._lock:
                    chat._now -= 1
                self._send(reply)

            def _send(self, reply: Reply) -> None:
                data = reply.body()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                try:
                    self.wfile.write(data)
                except OSError:
                    pass  # a client that did not wait

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def serving(answer: Callable[[dict, int], Reply]):
    """A running server; it is gone after the block."""
    chat = ChatServer(answer)
    thread = threading.Thread(target=chat.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.server.shutdown()
        chat.server.server_close()
        thread.join()
