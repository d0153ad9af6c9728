"""What the steps of all flows share.

Prefect caches nothing: files say what is done, and a retried step resumes.
"""

import base64
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from ..schemas.errors import Retryable

HELPED_BY_A_RETRY = (Retryable, ConnectionError, TimeoutError)
"""A lost engine, node or connection may come back. Any other error would only come again."""


def _can_retry(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), HELPED_BY_A_RETRY)


step = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 60], retry_condition_fn=_can_retry)


def artifact_key(*parts: str) -> str:
    """A key as Prefect wants it: lower case letters, digits and dashes."""
    text = "-".join(parts).lower()
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text)


def embedded(picture: Path) -> str:
    """A picture as Markdown that holds the picture's bytes, so that no server has to serve the file."""
    kind = "jpeg" if picture.suffix == ".jpg" else "png"
    data = base64.b64encode(picture.read_bytes()).decode()
    return f"![{picture.stem}](data:image/{kind};base64,{data})"
