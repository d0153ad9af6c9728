"""Prefect's server for one command: a process that starts early and ends with the command.

    with PrefectServer() as server:     # returns at once; the server starts next to whatever comes next
        ...                             # import prefect, start Ray
        with server.ready():            # waits, and points Prefect at it
            flow(...)

If PREFECT_API_URL names a server, none is started. The process watches a pipe that the command holds open and
the command itself, whose forked children may hold the pipe longer: it ends with the command, even if that is
killed.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from ..schemas.errors import StageFailed

START_S = 120.0
"""How long the server may take to answer. On two idle cores it takes under ten."""

_MODULE = "paracaption.flows.prefect_server"
_WATCH_EVERY_S = 0.5

_HEALTH_S = 5.0

_RETRIES = 2
"""How often a call of the flow itself is tried again. Prefect's five cost seven minutes without a server."""

_QUIET = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",  # only the services that record runs
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "0",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "0",  # and so nothing to vacuum
}


class PrefectServer:
    """A server in a process of its own, for the time of a `with` block.

    Attributes:
        process: the server; None outside the block, and if the environment names another server.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._url = ""

    def __enter__(self) -> PrefectServer:
        if os.environ.get("PREFECT_API_URL"):
            return self
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self._url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._log = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(listener.fileno()), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal is the driver's to handle
                env=os.environ | _QUIET,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """End the server, also one that hangs, without waiting for it."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.kill()  # it would end at once, too; one that is stopped would not
            self.process = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Wait until the server answers; within the block, Prefect talks to it.

        Raises:
            StageFailed: the server ended or did not answer in time, with its last line; or the server that
                the environment names does not answer.
        """
        from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        few: dict[Any, Any] = (
            {} if "PREFECT_CLIENT_MAX_RETRIES" in os.environ else {PREFECT_CLIENT_MAX_RETRIES: _RETRIES}
        )
        if self.process is None or PREFECT_API_URL.value():  # Prefect's own configuration names one
            self.__exit__()
            try:
                with temporary_settings(few):
                    _lose_quickly()
                    yield
            except RuntimeError as error:
                if not str(error).startswith("Failed to reach API"):  # Prefect's words
                    raise
                raise StageFailed(
                    f"Prefect: {error}; start that server, or unset PREFECT_API_URL, so that this command "
                    "starts a server of its own (`prefect config view` shows where it is set)"
                ) from error
            return
        self._wait(self.process)
        with temporary_settings({PREFECT_API_URL: self._url, **few}):
            try:
                _lose_quickly()
                yield
            finally:
                _flush()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        import httpx

        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{self._url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:  # it accepts, and answers when it is up
                time.sleep(0.05)
        how = "did not answer" if process.poll() is None else f"ended with code {process.returncode}"
        raise StageFailed(
            f"Prefect's server {how}: {self._last_words()}; set PREFECT_API_URL to a running server, or "
            "run a build without one: `paracaption build CONFIG --local`"
        )

    def _last_words(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


def answers(tries: int = 3) -> bool:
    """Whether the server that Prefect is pointed at is there now, whatever it answers. Waits for seconds."""
    import httpx
    from prefect.settings import PREFECT_API_URL

    for left in reversed(range(tries)):
        try:
            httpx.get(f"{PREFECT_API_URL.value()}/health", timeout=_HEALTH_S)
            return True
        except httpx.TransportError:
            time.sleep(1.0 if left else 0.0)
    return False


def _flush() -> None:
    """Send the events and logs that Prefect still holds back, or forget them where no server takes them.

    Prefect would try each of them ten times before the process may end.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    if not answers():
        for worker in (APILogWorker, EventsWorker):
            for each in list(getattr(worker, "_instances", {}).values()):
                with suppress(queue.Empty):
                    while True:
                        each._queue.get_nowait()
    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)


def _lose_quickly() -> None:
    """Let Prefect's events, of which its page is made, not be tried again and again without a server."""
    from prefect.events.clients import PrefectEventsClient
    from prefect.events.worker import EventsWorker, emit_events_to_cloud

    if not emit_events_to_cloud():
        EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=1)


def main() -> None:
    """Serve on the socket that was inherited: `python -m paracaption.flows.prefect_server FD DRIVER`."""
    threading.Thread(target=_end_with_pipe, daemon=True).start()
    threading.Thread(target=_end_with_driver, args=(int(sys.argv[2]),), daemon=True).start()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        fd=int(sys.argv[1]),
        log_level="error",
        lifespan="on",
    )


def _end_with_pipe() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(0)


def _end_with_driver(driver: int) -> None:
    """End as soon as this is another process's child: whoever started it is dead.

    Not by prctl(PR_SET_PDEATHSIG), which also fires when the thread ends that started this process.
    """
    while os.getppid() == driver:
        time.sleep(_WATCH_EVERY_S)
    os._exit(0)


if __name__ == "__main__":
    main()
