"""Callbacks of a flow that runs in this process. Not in the flows' files, which Prefect pickles by value."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline.executor.engine import Engine
    from ..pipeline.executor.progress import Progress

on_build_progress: ContextVar[Callable[[Progress], None]] = ContextVar(
    "on_build_progress", default=lambda _: None
)
"""Called about twice a second with the progress of each subset that is being built."""

on_training_step: ContextVar[Callable[[dict[str, Any]], None]] = ContextVar(
    "on_training_step", default=lambda _: None
)
"""Called with the record of each training step."""

on_evaluation_progress: ContextVar[Callable[[str, int, int], None]] = ContextVar(
    "on_evaluation_progress", default=lambda *_: None
)
"""Called with the name of the work, how much of it is done, and its total."""

engine: ContextVar[Engine | None] = ContextVar("engine", default=None)
"""The engine that the command line has already started. Without one, the flow starts its own."""
