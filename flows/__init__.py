"""Prefect flows over the pipeline, and the command line over the flows."""

import os

from .. import pipeline as pipeline  # keeps Ray and vLLM from reporting home

# Set before prefect is imported, and inherited by the processes it starts.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

# The embedded server takes 10 s on two idle cores, and Prefect gives it 20: too few on a busy machine.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
