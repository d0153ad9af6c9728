"""What the steps of all flows share.

Prefect caches nothing: files say what is done, and a retried step resumes.
"""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from ..schemas.errors import Retryable

_LONGEST_NAME = 100

HELPED_BY_A_RETRY = (Retryable, ConnectionError, TimeoutError)
"""A lost engine, node or connection may come back. Any other error would only come again."""


def _can_retry(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), HELPED_BY_A_RETRY)


step = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 60], retry_condition_fn=_can_retry)


def run_name() -> str:
    """What Prefect calls a run of a flow: the last folder of its `out`; an evaluation's label after it.

    Parameters that are not those of a flow have a name, too: a served flow gets to see them.
    """
    from prefect.runtime import flow_run

    config = (flow_run.parameters or {}).get("config")
    values = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    parts = [str(values.get("out") or "").rstrip("/").rpartition("/")[2], str(values.get("label") or "")]
    return "/".join(filter(None, parts))[:_LONGEST_NAME] or "no corpus"
