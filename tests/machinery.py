"""What takes long to start is started once: a Ray of this machine, and a Prefect server.

Ray gives a node 30 s to start and a vLLM engine takes all cores meanwhile, so no two of them start at the
same time: whoever starts one does so `alone()`.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from paracaption.pipeline.io import scratch
from tests.object_server import ObjectServer, serving

_LOCK = Path(tempfile.gettempdir()) / f"paracaption-tests-{os.getuid()}.lock"
_held = False


@contextmanager
def alone() -> Iterator[None]:
    """Hold the machine while an engine, a cluster or a server starts; within it, once more does nothing."""
    global _held
    if _held:
        yield
        return
    with open(_LOCK, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held = True
        try:
            yield
        finally:
            _held = False


@pytest.fixture(scope="session")
def ray_buckets() -> Iterator[ObjectServer]:
    """A server of S3 with the bucket `corpus`, which the shared Ray's processes find in their environment."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def ray_scratch(tmp_path_factory) -> Path:
    """The scratch of the shared Ray's processes."""
    return tmp_path_factory.mktemp("scratch-of-workers")


@pytest.fixture(scope="session")
def ray_cluster(ray_buckets, ray_scratch):
    """A Ray of four logical CPUs in this process, which the tests of a worker share."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a killed worker is noticed soon
    import ray

    with alone(), pytest.MonkeyPatch.context() as patch:
        for name, value in ray_buckets.environment.items():
            patch.setenv(name, value)
        patch.setenv(scratch.VARIABLE, str(ray_scratch))
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ending = threading.Thread(target=ray.shutdown, daemon=True)
    ending.start()
    ending.join(30)
    if ending.is_alive():  # it waits for an answer of its GCS, without a limit
        ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
        ending.join(30)


@pytest.fixture(scope="session")
def prefect_process(tmp_path_factory):
    """The Prefect server that a command starts, on a database of its own."""
    from paracaption.flows.prefect_server import PrefectServer

    with ExitStack() as until_the_end:
        with pytest.MonkeyPatch.context() as patch, alone():
            patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
            patch.delenv("PREFECT_API_URL", raising=False)
            server = until_the_end.enter_context(PrefectServer())
            with server.ready():
                pass
        yield server


@pytest.fixture(scope="module")
def prefect_server(prefect_process):
    """Flows and commands of this process talk to that server, and start none."""
    from prefect.settings import PREFECT_API_URL

    with prefect_process.ready(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
        yield
