"""Prefect's server of one command: there when it is needed, gone with its driver however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from paracaption.flows import prefect_server
from paracaption.flows.prefect_server import PrefectServer
from paracaption.pipeline.corpus.events import Event, EventReader
from paracaption.schemas.errors import StageFailed
from tests.machinery import alone
from tests.stopped import Stopped, run_and_stop

ROOT = Path(__file__).resolve().parents[2]

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


FORKING = """
import os, sys, time
from paracaption.flows.prefect_server import PrefectServer
with PrefectServer() as server:
    child = os.fork()
    if child:
        print(server.process.pid, child, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_with_its_driver_though_a_forked_child_lives_on(how):
    """A child that was forked holds the pipe that the server watches."""
    with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        server, child = map(int, driver.stdout.readline().split())
        driver.send_signal(how)
        driver.wait()
        try:
            assert gone(server)
            assert psutil.pid_exists(child)
        finally:
            psutil.Process(child).kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_with_its_driver(how):
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        server = int(driver.stdout.readline())
        assert psutil.pid_exists(server)
        driver.send_signal(how)
    assert gone(server)


def test_a_server_that_is_stopped_ends_with_its_command_too(monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with PrefectServer() as started:
        assert started.process is not None
        server = started.process.pid
        started.process.send_signal(signal.SIGSTOP)
    assert gone(server, limit_s=10)


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


LOSING = """
import os, sys
from pathlib import Path
from paracaption.flows import launch, prefect_server
from paracaption.pipeline.executor.local import LocalEngine
from tests.building import config_of
from tests.synthetic import write_coconut

class Engine(LocalEngine):
    address = None
    def start(self, config):
        pass

root, signum = Path(sys.argv[1]), int(sys.argv[2])
config = config_of(root / "out", coconut=write_coconut(root / "source", 24), captioner={"delay_s": 0.3})
started = []
enter = prefect_server.PrefectServer.__enter__

def enter_and_note(self):
    entered = enter(self)
    started.append(self.process.pid)
    return entered

prefect_server.PrefectServer.__enter__ = enter_and_note

def lose(progress):
    if progress.done == 1 and started:
        os.kill(started.pop(), signum)

print("kept", launch.build(config, Engine(), lose)["subsets"]["coconut"]["counts"]["kept"])
"""


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_build_ends_well_without_the_server_that_died_or_hangs(tmp_path, monkeypatch, how):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "WARNING")
    with alone():
        command = [sys.executable, "-c", LOSING, str(tmp_path), str(int(how))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["kept", "96"]
    assert "did not record the end of the run" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    begun, ended = (event.time_s for event in ends_of(tmp_path / "out"))
    assert ended - begun < 24 * 0.3 + 30, "commits waited for the server"


def ends_of(out: Path) -> list[Event]:
    """The events of a build's begin and end."""
    [run] = (out / "events").iterdir()
    return [event for event in EventReader(run).new() if event.what in ("begun", "ended")]


STOPPED = """
import sys
from pathlib import Path
from paracaption.flows import stopping

def command():
    from paracaption.flows import launch
    from paracaption.pipeline.executor.local import LocalEngine
    from tests.building import config_of
    from tests.synthetic import write_coconut

    class Engine(LocalEngine):
        address = None
        def start(self, config):
            pass

    root, said = Path(sys.argv[1]), []
    config = config_of(root / "out", coconut=write_coconut(root / "source", 24), captioner={"delay_s": 0.3})

    def ready(progress):
        if progress.stages["source"].units and not said:
            said.append(print("ready", flush=True))

    launch.build(config, Engine(), ready)

stopping.run(command)
"""


@pytest.fixture
def shared_server(tmp_path, monkeypatch):
    """A server of somebody's own, which outlives the command."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with PrefectServer() as server:
        assert server.process is not None
        server._wait(server.process)
        monkeypatch.setenv("PREFECT_API_URL", server._url)
        yield server


def stop_a_build(root: Path, number: int) -> Stopped:
    with alone():
        return run_and_stop([sys.executable, "-c", STOPPED, str(root)], (number,))


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_shared_server_learns_that_a_stopped_build_is_over(tmp_path, shared_server, number):
    found = stop_a_build(tmp_path, number)
    assert (found.code, found.errors, found.left) == (128 + number, "stopped\n", []), found
    (run,) = httpx.post(f"{shared_server._url}/flow_runs/filter", json={}, timeout=30).json()
    by_us = ("CANCELLED", f"stopped by {number.name}")
    by_prefect = ("CRASHED", "Execution was aborted by a termination signal.")  # which heeds SIGTERM, too
    known = [by_us] if number == signal.SIGINT else [by_us, by_prefect]
    assert (run["state_type"], run["state"]["message"]) in known


@pytest.mark.slow
@pytest.mark.soak
def test_a_shared_server_that_hangs_delays_no_stop(tmp_path, shared_server):
    assert shared_server.process is not None
    server, stopping = shared_server.process, []

    def hang() -> None:
        while not list(tmp_path.glob("out/coconut/journal/caption-*/*")):
            time.sleep(0.05)
        server.send_signal(signal.SIGSTOP)
        stopping.append(True)

    thread = threading.Thread(target=hang, daemon=True)
    thread.start()
    found = stop_a_build(tmp_path, signal.SIGINT)
    assert stopping and (found.code, found.left) == (130, []), found
    assert found.seconds < 10
