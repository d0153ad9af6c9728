"""A task of our flows: nothing is cached, since what is done is known from files, and a retry resumes."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from schemas.errors import ParaCaptionError, Retryable


def _can_retry(_task: Any, _run: Any, state: Any) -> bool:
    """A mistake in the config does not mend itself; a lost engine, node or file system may."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, Retryable) or not isinstance(error, ParaCaptionError)


step = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 60], retry_condition_fn=_can_retry)
