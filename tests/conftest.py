"""Shared fixtures. Nothing in the tests reports home or reaches out."""

import gc
import os

# Two workers share two cores: a second thread of a small model only waits for its turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; what an engine allocates it also fills with zeros
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

import pytest

import paracaption.flows  # noqa: F401 - switches telemetry off
from paracaption.pipeline.io import failures

pytest_plugins = [
    "tests.buckets",
    "tests.drawn_once",
    "tests.groups",
    "tests.machinery",
    "tests.servers",
    "tests.vllm_judge",
]


def pytest_collection_finish() -> None:
    """What was collected lives to the end: no search for garbage need look at these 700,000 objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reads_are_not_tried_again():
    """What a test has set for this process ends with it; a test that waits says so."""
    failures.RETRYING.set_budget(0)
    yield
    failures.RETRYING.set_budget(0)
