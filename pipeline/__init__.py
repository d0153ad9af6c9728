"""The machinery: sources, models, stages, the stream on Ray Data, shards, and the corpus."""

import os

# Nothing here reports home. Set before ray or vllm is imported, and inherited by the processes they start.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# A thread that still asks Ray for something while a command ends must not start another Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
