"""A task of our flows: nothing is cached, since what is done is known from files, and a retry resumes."""

import base64
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from ..schemas.errors import Retryable

HELPED_BY_A_RETRY = (Retryable, ConnectionError, TimeoutError)
"""A lost engine, node or connection may come back. A mistake, ours or the user's, stays what it is."""


def _can_retry(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), HELPED_BY_A_RETRY)


step = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 60], retry_condition_fn=_can_retry)


def embedded(picture: Path) -> str:
    """A picture in Markdown that needs no server of files."""
    kind = "jpeg" if picture.suffix == ".jpg" else "png"
    data = base64.b64encode(picture.read_bytes()).decode()
    return f"![{picture.stem}](data:image/{kind};base64,{data})"
