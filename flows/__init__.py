"""Prefect flows over the pipeline, and the command line over the flows."""

import os

# Nothing here reports home. Set before prefect or ray is imported, and inherited by the processes they start.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# A thread that still asks Ray for something while a command ends must not start another Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

# The embedded server takes 10 s on two idle cores, and Prefect gives it 20: too few on a busy machine.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
