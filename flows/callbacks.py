"""Who watches what runs in this process. Apart from the flows, which Prefect pickles by value."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline.executor.engine import Engine
    from ..pipeline.executor.progress import Progress

watcher: ContextVar[Callable[[Progress], None]] = ContextVar("watcher", default=lambda _: None)
"""Called about twice a second with the progress of the subset being built; the command line draws it."""

trainer: ContextVar[Callable[[dict[str, Any]], None]] = ContextVar("trainer", default=lambda _: None)
"""Called with each step's record of the training."""

counter: ContextVar[Callable[[str, int, int], None]] = ContextVar("counter", default=lambda *_: None)
"""Called with what is being done, how much of it is done, and of how much."""

engine: ContextVar[Engine | None] = ContextVar("engine", default=None)
"""What the command line has already started to build on; without one, the flow makes its own."""
