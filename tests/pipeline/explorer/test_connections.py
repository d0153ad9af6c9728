"""Connections that are opened and left, or whose answer nobody takes, do not hold the server."""

import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from paracaption.pipeline.explorer import connections

WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answer(scope, receive, send):
    """After the whole body: a megabyte for /large, else a word; `/slow` takes longer than a request may."""
    import asyncio

    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(1.2)
    body = b"x" * (64 << 20) if scope["path"] == "/large" else b"answered"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_S", 0.6)
    monkeypatch.setattr(connections, "STALLED_S", 0.6)
    config = uvicorn.Config(answer, http=connections.TimedConnection, ws="none", log_level="critical")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join(20)


def seconds_to_the_end(port, sent, then=b""):
    """How long a connection lives that sends something, and then a byte every now and again."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as opened:
        opened.sendall(sent)
        opened.settimeout(0.1)
        while time.monotonic() - started < 15:
            with contextlib.suppress(TimeoutError):
                try:
                    if not opened.recv(1 << 16):
                        break
                    opened.sendall(then)
                except ConnectionError:
                    break
            with contextlib.suppress(OSError):
                opened.sendall(then)
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("sent", "then"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\n", b""),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n", b""),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n", b"x"),
        (WHOLE, b""),
    ],
    ids=[
        "nothing",
        "a line",
        "a header now and then",
        "no body",
        "a byte of the body now and then",
        "after it",
    ],
)
@pytest.mark.soak(keep=2)
def test_a_connection_without_a_whole_request_ends(port, sent, then):
    assert seconds_to_the_end(port, sent, then) < 10


@pytest.mark.soak
def test_an_answer_that_nobody_takes_is_given_up(port):
    with socket.create_connection(("127.0.0.1", port)) as opened:
        opened.sendall(WHOLE.replace(b" / ", b" /large "))
        time.sleep(4)
        taken = 0
        opened.settimeout(10)
        with contextlib.suppress(ConnectionError):
            while data := opened.recv(1 << 20):
                taken += len(data)
    assert taken < 64 << 20


@pytest.mark.soak
def test_an_answer_may_take_longer_than_a_request(port):
    with socket.create_connection(("127.0.0.1", port)) as opened:
        opened.settimeout(10)
        for path in (b" /slow ", b" / ", b" /slow "):  # and one connection may ask again
            opened.sendall(WHOLE.replace(b" / ", path))
            text = b""
            while b"answered" not in text:
                data = opened.recv(1 << 16)
                assert data
                text += data


def test_others_are_answered_while_many_wait(port):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            waiting = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            waiting.sendall(b"GET / HTTP/1.1\r\n")
        with socket.create_connection(("127.0.0.1", port)) as opened:
            opened.settimeout(10)
            opened.sendall(WHOLE)
            assert b"200" in opened.recv(1 << 16)
