"""Shared fixtures. Nothing in the tests reports home or reaches out."""

import os

import flows  # noqa: F401 - switches telemetry off

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
