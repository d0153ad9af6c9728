"""Answers of an HTTP server by chance: JSON of any kind, streams, floods, trickles, and what is no HTTP.

Whatever it sends, each request ends in time with an answer, or with a reason.
"""

from __future__ import annotations

import gzip
import json
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from paracaption.model_training.evaluation import judges
from paracaption.pipeline.models import answers, chat_client, openai_compatible
from paracaption.pipeline.models.openai_compatible import OpenAICaptioner, OpenAIJudge
from paracaption.pipeline.models.protocols import Answer, Question
from paracaption.schemas.errors import BadRecord, ParaCaptionError
from paracaption.schemas.evaluation import Judge
from tests import odd_values
from tests.cases import damages, field_damages

TIMEOUT_S = 0.5
"""Of one request. A trickle goes on for longer than all requests of an input may take."""

_LONGEST_S = 10.0
"""Most seconds of an input, which has two tries and a look at the server's models; on a busy machine, too."""

_STATUS = (200, 200, 200, 200, 200, 204, 206, 302, 400, 401, 404, 413, 429, 500, 503, 599, 999, 100)
_RETRY = ("0", "-5", "nan", "inf", "1e400", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 400)
_RETRY += ("Mon, 01 Jan 99999 00:00:00 GMT", "\xff")


class Reply(NamedTuple):
    """What a server sends.

    Attributes:
        data: the bytes of the answer, its head included.
        trickle: what is sent after them, byte by byte, without an end.
    """

    data: bytes
    trickle: bytes = b""


def any_reply(random: Random, text: str) -> Reply:
    """A chat completion that says `text`, or what became of it."""
    kind = random.random()
    if kind < 0.06:
        return Reply(random.choice((b"", b"\r\n\r\n", b"HTTP/9.9 200\r\n\r\n", b"\x16\x03\x01", bytes(99))))
    body = _body(random, text)
    head = {"Content-Type": random.choice(("application/json", "text/event-stream; charset=zlib", "\xff"))}
    if random.random() < 0.1:
        head["Content-Encoding"] = random.choice(("gzip", "deflate", "br", "gzip, gzip", "identity", "odd"))
        body = gzip.compress(body, 1) if random.random() < 0.7 else body
    if random.random() < 0.2:
        head["Retry-After"] = random.choice(_RETRY)
    if random.random() < 0.1:
        head["X-Request-Id"] = random.choice(("x" * 9_000, "\x80\xff", "a\tb"))
    trickle, chunked = b"", random.random() < 0.2
    if chunked:
        head["Transfer-Encoding"] = "chunked"
        body = b"%x\r\n%s\r\n%s" % (
            len(body),
            body,
            random.choice((b"0\r\n\r\n", b"", b"zz\r\n", b"-1\r\n")),
        )
    elif random.random() < 0.8:
        wrong = random.choice((0, 0, 0, 0, 1, -1, 10**18))
        head["Content-Length"] = str(max(0, len(body) + wrong))
    if not chunked and random.random() < 0.03:
        head.pop("Content-Length", None)
        trickle = b" "
    lines = [
        f"HTTP/1.1 {random.choice(_STATUS)} x",
        *(f"{name}: {value}" for name, value in head.items()),
    ]
    if random.random() < 0.03:
        lines += [f"X-{number}: {'y' * 500}" for number in range(500)]  # more than HTTP libraries take
    data = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
    if random.random() < 0.05:
        data = damages.cut(random, data)
    return Reply(data, trickle)


def _body(random: Random, text: str) -> bytes:
    tokens = [{"token": each, "logprob": -0.1, "top_logprobs": []} for each in text]
    for each in tokens:
        each["top_logprobs"] = [{"token": each["token"], "logprob": -0.1}, {"token": "no", "logprob": -2.0}]
    message = {"role": "assistant", "content": text, "tool_calls": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": tokens}}
    value: Any = {"id": "x", "choices": [choice], "usage": {"total_tokens": 5}}
    kind = random.random()
    if kind < 0.5:
        for _ in range(random.randint(0, 3)):
            container, key = random.choice(list(field_damages.places(value)) or [({}, "")])
            container[key] = odd_values.json_value(random)
        return json.dumps(value).encode("utf-8", "surrogatepass")
    data = json.dumps(value).encode()
    if kind < 0.7:
        return random.choice((damages.cut, damages.flip, damages.insert, damages.recoded, damages.trailer))(
            random, data
        )
    if kind < 0.8:
        return b"data: " + data + b"\n\ndata: [DONE]\n\n"
    if kind < 0.85:
        deep = random.choice((b"[", b'{"choices":'))
        return deep * 100_000
    if kind < 0.88:
        return b" " * (40 << 20)
    if kind < 0.94:
        return json.dumps(odd_values.json_value(random)).encode("utf-8", "surrogatepass")
    message["content"] = random.choice(("[" * 50_000, '{"answer": ' + "9" * 5000 + "}", "word " * 100_000))
    return json.dumps(value).encode()


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        connection: socket.socket = self.request
        connection.settimeout(5.0)
        try:
            _read_request(connection)
            reply: Reply = self.server.reply  # pyright: ignore[reportAttributeAccessIssue]
            connection.sendall(reply.data)
            began = time.monotonic()
            while reply.trickle and time.monotonic() - began < 2 * _LONGEST_S:
                connection.sendall(reply.trickle)
                time.sleep(0.02)
        except OSError:
            return  # the client had enough


def _read_request(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    missing = int(lengths[0].split(b":")[1]) - len(body) if lengths else 0
    while missing > 0 and (part := connection.recv(65536)):
        missing -= len(part)


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """The URL of a server that sends the same to everybody; it is gone after the block."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), _Handler) as server:
        server.reply = reply  # pyright: ignore[reportAttributeAccessIssue]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def served(seed: int, _folder: Path) -> str:
    """A request ends in time, whatever is sent: by an answer that is clean, or by an error of ours."""
    random = Random(seed)
    kind = random.choice(("verify", "extract", "caption", "benchmark", "models"))
    text = "a cat sits here" if kind in ("caption", "benchmark") else '{"answer": "yes"}'
    reply = any_reply(random, text)
    chat_client.LONGEST_WAIT_S = 0.01  # whatever `Retry-After` says
    with serving(reply) as url:
        options = {"model": "tiny", "base_url": url, "timeout_s": TIMEOUT_S, "max_retries": 1}
        options |= {"max_concurrency": 2, "backoff_s": 0.0, "api_key_env": "NO_SUCH_KEY"}
        began = time.monotonic()
        try:
            found = _ask(kind, options)
        except ParaCaptionError as error:
            found = []
            if len(str(error)) > 2_000:
                return f"{kind}: a message of {len(str(error)):,} characters"
        seconds = time.monotonic() - began
    if seconds > _LONGEST_S:
        return f"{kind}: {seconds:.0f} s for one request"
    for each in found:
        if isinstance(each, BadRecord):
            if len(each.detail) > 2_000:
                return f"{kind}: a reason of {len(each.detail):,} characters"
            each = None
        clean = answers.judgment(each) if isinstance(each, Answer) else answers.caption(each)
        if isinstance(clean, BadRecord) and isinstance(each, Answer):
            return f"{kind}: {each!r:.200} is no answer: {clean.detail}"
    return ""


def _ask(kind: str, options: dict[str, Any]) -> list[Any]:
    if kind == "models":
        OpenAIJudge.check(**options)
        return []
    if kind == "benchmark":
        judge = judges.ServedChat(Judge(name="openai", options=options))
        return [answer for _, answer in judge.answer([judges.JudgeRequest("Which?")])]
    if kind == "caption":
        client = OpenAICaptioner(**options).client
        body = {"messages": [{"role": "user", "content": "What is it?"}]}
        return list(client.run(iter([chat_client.Ask(0, body)]), openai_compatible._caption).values())
    return list(OpenAIJudge(**options).ask([Question(kind, "A cat.", "cat")]))  # pyright: ignore
