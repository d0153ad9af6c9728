"""Prefect's server of one command: there when it is needed, gone with its driver however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from paracaption.flows import prefect_server
from paracaption.flows.prefect_server import PrefectServer
from paracaption.schemas.errors import StageFailed

DRIVER = """
import time
from paracaption.flows.prefect_server import PrefectServer
with PrefectServer() as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


def gone(pid: int, limit_s: float = 60.0) -> bool:
    """Whether a process ends before the limit."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_with_its_driver(how):
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        server = int(driver.stdout.readline())
        assert psutil.pid_exists(server)
        driver.send_signal(how)
    assert gone(server)


def test_no_server_is_started_where_the_environment_names_one(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with PrefectServer() as server:
        assert server.process is None


def test_a_server_that_cannot_start_is_one_clear_error(monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        PrefectServer() as server,
        pytest.raises(StageFailed, match=r"Prefect's server ended with code 1: .*--local"),
        server.ready(),
    ):
        pass


def test_what_prefect_holds_back_is_sent_when_a_flow_fails_too(monkeypatch):
    sent = []
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(prefect_server, "_flush", lambda: sent.append("flushed"))
    monkeypatch.setattr(PrefectServer, "_wait", lambda self, process: None)
    with PrefectServer() as started, pytest.raises(KeyboardInterrupt), started.ready():
        raise KeyboardInterrupt
    assert sent == ["flushed"]


def test_a_named_server_that_is_not_there_is_one_line_and_other_errors_stay(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with PrefectServer() as named:
        with pytest.raises(StageFailed, match=r"127\.0\.0\.1:9.*unset PREFECT_API_URL"), named.ready():
            raise RuntimeError("Failed to reach API at http://127.0.0.1:9/api/")
        with pytest.raises(RuntimeError, match=r"^something else$"), named.ready():
            raise RuntimeError("something else")
