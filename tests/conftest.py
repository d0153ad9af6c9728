"""Shared fixtures. Nothing in the tests reports home or reaches out."""

import os

# Two workers share two cores: a second thread of a small model only waits for its turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

import paracaption.flows  # noqa: F401 - switches telemetry off

pytest_plugins = ["tests.groups", "tests.machinery", "tests.vllm_judge"]
