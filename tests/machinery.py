"""What takes long to start is started once: a Ray of this machine, and a Prefect server.

Ray gives a node 30 s to start and a vLLM engine takes all cores meanwhile, so no two of them start at the
same time: whoever starts one does so `alone()`.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

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
def ray_cluster():
    """A Ray of four logical CPUs in this process, which the tests of a worker share."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a killed worker is noticed soon
    import ray

    with alone():
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """The commands' own Prefect server on a database of its own; flows of this process talk to it."""
    from flows.server import PrefectServer

    with pytest.MonkeyPatch.context() as patch, ExitStack() as until_the_end:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.delenv("PREFECT_API_URL", raising=False)
        with alone():
            server = until_the_end.enter_context(PrefectServer())
            until_the_end.enter_context(server.ready())
        yield
