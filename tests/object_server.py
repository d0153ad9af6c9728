"""An S3 server in memory, on this machine alone, that fails as object stores and networks do.

It answers what obstore, boto3, s3fs and ranged GETs of a shard ask: objects, conditions, ranges, listings,
bulk deletes, copies and multipart uploads, path-style, whatever the signature. It is strongly consistent, and
a conditional put is atomic. Faults (`tests/object_faults.py`), gates, counts and the log of requests are
reached from Python (`ObjectServer`), and from another process by `control(address, method, **arguments)`,
which calls the method of the same name:

    with serving() as server:                      # or: python -m tests.object_server --port 9000
        server.set_faults(shares={"503": 0.05, "lost_answer": 0.05}, seed=1)
        gate = server.gate("PUT", "corpus/log/*")  # the next such request waits here
        ...                                        # start a driver with server.environment
        server.held(gate, wait_s=10)
        server.release(gate)
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.object_faults import Draws, Faults, Gate, Logged, check_fault
from tests.object_requests import Answer, Bucket, Call, Refused, failure, read_body, read_headers

CONTROL = "/_control/"
"""No bucket is called so."""


class ObjectServer:
    """Buckets in memory, what goes wrong with them, and what was asked.

    Every public method may be called at any time, from any thread.

    Attributes:
        port: on 127.0.0.1.
        address: `http://127.0.0.1:PORT`.
        environment: the variables that obstore, boto3 and s3fs read.
    """

    def __init__(self, buckets: tuple[str, ...] = ("corpus",), port: int = 0) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._faults = Faults()
        self._buckets = {name: Bucket() for name in buckets}
        self._gates: dict[int, Gate] = {}
        self._log: list[Logged] = []
        self._draws = Draws()
        self._counts: dict[str, Counter[str]] = {
            "requests": Counter(),
            "faults": Counter(),
            "bytes": Counter(),
        }
        self._listener = _Listener(("127.0.0.1", port), self)
        self.port: int = self._listener.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.environment = s3_environment(self.address)

    def serve(self) -> None:
        """Answer until `stop()`."""
        self._listener.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        """Open all gates and close all connections."""
        for number in list(self._gates):
            self.release(number)
        self._listener.shutdown()
        self._listener.server_close()
        self._listener.close_connections()

    def set_faults(self, **changes: Any) -> None:
        """Change fields of `Faults`; the others stay. A new seed begins the draws anew."""
        with self._lock:
            self._faults = dataclasses.replace(self._faults, **changes)
            if "seed" in changes:
                self._draws = Draws()

    def faults(self) -> dict[str, Any]:
        """The fields of `Faults`."""
        return dataclasses.asdict(self._faults)

    def gate(
        self, kind: str = "", keys: str = "*", hold: str = "before", fault: str = "", count: int | None = 1
    ) -> int:
        """Stop the next `count` requests of a kind (see `Gate`) until `release`. Returns its number."""
        if hold not in ("", "before", "after"):
            raise ValueError(f"hold: unknown {hold!r}; choose 'before', 'after' or ''")
        if fault:
            check_fault(fault)
            if hold == "after" and (fault.isdigit() or fault in ("reset", "stuck")):
                raise ValueError(f"hold: {fault!r} comes before a request is done; choose 'before' or ''")
        with self._lock:
            number = len(self._gates)
            self._gates[number] = Gate(kind, keys, hold, fault, count)
        return number

    def fail(self, fault: str, kind: str = "", keys: str = "*", count: int | None = 1) -> int:
        """Let the next `count` requests of a kind meet a fault; `release` takes back what is left of it."""
        return self.gate(kind, keys, "", fault, count)

    def held(self, gate: int, wait_s: float = 0.0, count: int = 1) -> list[int]:
        """Numbers of the requests at a gate, once there are `count`; a TimeoutError after `wait_s`."""
        with self._lock:
            numbers = self._gates[gate].held
            if self._arrived.wait_for(lambda: len(numbers) >= count, wait_s) or not wait_s:
                return list(numbers)
        raise TimeoutError(f"gate {gate}: {len(numbers)} of {count} requests came within {wait_s} s")

    def release(self, gate: int) -> None:
        """Let those at the gate go on, and all later ones pass."""
        with self._lock:
            self._gates[gate].left = 0
        self._gates[gate].opened.set()

    def url(self, bucket: str = "corpus") -> str:
        """What obstore opens with the `environment` set."""
        return f"s3://{bucket}"

    def make_bucket(self, bucket: str) -> None:
        """Nothing happens if there is one."""
        with self._lock:
            self._buckets.setdefault(bucket, Bucket())

    def objects(self, bucket: str = "corpus", prefix: str = "") -> dict[str, int]:
        """Bytes of each object that is there now, whatever listings say, by key in order."""
        return self._buckets[bucket].sizes(prefix)

    def content(self, key: str, bucket: str = "corpus") -> bytes:
        """An object's bytes; a KeyError if there is none. Not for `control`."""
        return self._buckets[bucket].content(key)

    def uploads(self, bucket: str = "corpus") -> dict[str, str]:
        """The keys of unfinished multipart uploads, by id."""
        return self._buckets[bucket].unfinished()

    def counts(self) -> dict[str, dict[str, int]]:
        """`requests` by operation, `faults` by name, and `bytes` in and out of bodies."""
        with self._lock:
            return {name: dict(counter) for name, counter in self._counts.items()}

    def requests(self, after: int = -1) -> list[dict[str, Any]]:
        """The log (see `Logged`), of the requests with larger numbers than `after`."""
        with self._lock:
            return [dataclasses.asdict(logged) for logged in self._log[after + 1 :]]

    def forget_requests(self) -> None:
        """Begin counts and log anew; what is under way is still counted."""
        with self._lock:
            self._log.clear()
            for counter in self._counts.values():
                counter.clear()

    def _begin(self, call: Call) -> tuple[Logged, Gate | None]:
        """Log a request and settle what befalls it."""
        with self._lock:
            logged = Logged(len(self._log), call.operation, call.method, call.bucket, call.keys)
            self._log.append(logged)
            self._counts["requests"][call.operation] += 1
            self._counts["bytes"]["in"] += len(call.body)
            gate = next((gate for gate in self._gates.values() if gate.stops(call)), None)
            if gate is None:
                logged.fault = self._draws.next(call, self._faults)
                return logged, None
            gate.left = gate.left and gate.left - 1
            logged.fault = gate.fault
            return logged, gate

    def _arrive(self, gate: Gate | None, hold: str, logged: Logged) -> None:
        """Wait here if the gate holds at this point."""
        if gate is None or gate.hold != hold:
            return
        with self._lock:
            gate.held.append(logged.number)
            self._arrived.notify_all()
        if hold:
            gate.opened.wait()

    def _do(self, call: Call) -> Answer:
        """Carry out a request of S3."""
        faults = self._faults
        try:
            if call.operation == "CreateBucket":
                self.make_bucket(call.bucket)
                return Answer()
            if call.operation == "ListBuckets":
                buckets = [("Bucket", {"Name": b}) for b in self._buckets]
                return Answer.xml("ListAllMyBucketsResult", {"Buckets": buckets})
            if call.bucket not in self._buckets:
                raise Refused(404, "NoSuchBucket", call.bucket)
            return self._buckets[call.bucket].answer(call, faults)
        except Refused as refused:
            return refused.answer()

    def respond(self, call: Call, connection: _Connection) -> bool:
        """Do a request and answer it, with what befalls it. False: the connection is at its end."""
        logged, gate = self._begin(call)
        self._arrive(gate, "", logged)
        self._arrive(gate, "before", logged)
        fault, faults = logged.fault, self._faults
        if fault.isdigit():
            return self._send(connection, call, failure(int(fault)), logged)
        if fault in ("reset", "stuck"):
            if fault == "stuck":
                self._do_later(call, faults.later_s)
            self._note(logged, 0)
            return connection.reset()
        answer = self._do(call)
        if fault == "repeated":
            answer = self._do(call)
        self._arrive(gate, "after", logged)
        if fault == "repeated_late":
            self._do_later(call, faults.later_s)
        if fault == "lost_answer":
            self._note(logged, 0)
            return False
        if fault == "done_500":
            answer = failure(500)
        if fault == "cut_body" and (len(answer.body) < 2 or call.method == "HEAD"):
            logged.fault = ""
        return self._send(connection, call, answer, logged)

    def _do_later(self, call: Call, seconds: float) -> None:
        timer = threading.Timer(seconds, self._do, [call])
        timer.daemon = True
        timer.start()

    def _send(self, connection: _Connection, call: Call, answer: Answer, logged: Logged) -> bool:
        """Note it first: who has the answer finds it in the log."""
        self._note(logged, answer.status)
        with self._lock:
            self._counts["bytes"]["out"] += len(answer.body) * (call.method != "HEAD")
        return connection.send(call.method, answer, logged.fault, self._faults.slow_s)

    def _note(self, logged: Logged, status: int) -> None:
        with self._lock:
            logged.status = status
            if logged.fault:
                self._counts["faults"][logged.fault] += 1

    def respond_to_control(self, path: str, body: bytes) -> Answer:
        """Call the public method that the path names with the arguments of the body."""
        name = path.removeprefix(CONTROL)
        if name not in CONTROLS:
            return Answer(404, f"unknown: {name!r}; choose one of {', '.join(CONTROLS)}".encode())
        try:
            return Answer(200, json.dumps(getattr(self, name)(**json.loads(body or b"{}"))).encode())
        except (TypeError, ValueError, KeyError, TimeoutError) as error:
            return Answer(400, f"{type(error).__name__}: {error}".encode())


def s3_environment(address: str) -> dict[str, str]:
    """What obstore, boto3 and s3fs read. `AWS_REGION` is for obstore, `AWS_DEFAULT_REGION` for the others."""
    keys = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}  # the account that s3rver has
    where = {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true"}
    return {**where, **keys, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}


CONTROLS = (
    *("set_faults", "faults", "gate", "fail", "held", "release", "make_bucket"),
    *("objects", "uploads", "counts", "requests", "forget_requests"),
)


def control(address: str, method: str, **arguments: Any) -> Any:
    """Call a method of the `ObjectServer` at an address, of any process; a ValueError if it refuses."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    try:
        connection.request("POST", CONTROL + method, json.dumps(arguments))
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{method}: {text}")
    return json.loads(text)


@contextmanager
def serving(*buckets: str, port: int = 0) -> Iterator[ObjectServer]:
    """An object server in a thread while the block runs; with a bucket `corpus` if none is named."""
    server = ObjectServer(buckets or ("corpus",), port)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], objects: ObjectServer) -> None:
        self.objects = objects
        self.connections: set[socket.socket] = set()
        super().__init__(address, _Connection)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed by the other side
                continue

    def shutdown_request(self, request: Any) -> None:
        """Without the orderly end that would come before a reset."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error; the rest is a mistake in this file, and printed."""
        if not isinstance(sys.exception(), (ConnectionError, ValueError)):
            super().handle_error(request, client_address)


class _Connection(socketserver.StreamRequestHandler):
    """HTTP/1.1 with keep-alive; lean, since `http.server` takes three times as long for a request."""

    disable_nagle_algorithm = True
    rbufsize = 1 << 16
    server: _Listener

    def handle(self) -> None:
        self.server.connections.add(self.connection)
        try:
            while self._one_request():
                pass
        finally:
            self.server.connections.discard(self.connection)

    def _one_request(self) -> bool:
        """False: nothing more can come over this connection."""
        line = self.rfile.readline(1 << 16)
        if not line.strip():
            return False
        method, target, _ = line.decode("latin-1").split(" ", 2)
        headers = dict(read_headers(self.rfile))
        if headers.get("expect", "").lower() == "100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = read_body(self.rfile, headers)
        if body is None:  # the client went away in the middle of it
            return False
        path, _, query = target.partition("?")
        objects = self.server.objects
        if path.startswith(CONTROL):
            return self.send(method, objects.respond_to_control(path, body))
        bucket, _, key = unquote(path).removeprefix("/").partition("/")
        call = Call(method, bucket, key, dict(parse_qsl(query, keep_blank_values=True)), headers, body)
        return objects.respond(call, self) and headers.get("connection", "").lower() != "close"

    def send(self, method: str, answer: Answer, fault: str = "", slow_s: float = 0.0) -> bool:
        """Send an answer; `cut_body` and `slow_body` are done here."""
        reason = http.client.responses.get(answer.status, "")
        lines = [f"HTTP/1.1 {answer.status} {reason}"]
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
        body = b"" if method == "HEAD" or answer.status in (204, 304) else answer.body
        if fault == "slow_body":
            half = len(body) // 2
            self.connection.sendall(head + body[:half] if half else b"")
            time.sleep(slow_s)
            self.connection.sendall(body[half:] if half else head + body)
        elif fault == "cut_body":
            self.connection.sendall(head + body[: len(body) // 2])
            return False
        else:
            self.connection.sendall(head + body)
        return True

    def reset(self) -> bool:
        """Let the other side see a reset, no orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False


def main() -> None:
    """Serve until killed; the first line of the output is the address."""
    parser = argparse.ArgumentParser(description="An S3 server in memory on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--bucket", action="append", help="made at the start; default: corpus")
    given = parser.parse_args()
    server = ObjectServer(tuple(given.bucket or ["corpus"]), given.port)
    print(server.address, flush=True)  # noqa: T201 - its answer to who started it
    server.serve()


if __name__ == "__main__":
    main()
