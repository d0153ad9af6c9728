"""What this process is doing now: a stage, a unit, a record, a file; so that a stall can say where it is.

Whoever begins a step says so (`NOW.during`), whoever goes from record to record names each (`NOW.at`), and
the two doors, `files` and `store`, name the file. Naming costs no I/O. `executor/stalls.py` looks at it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from ...schemas.secrets import shorten

Named = TypeVar("Named")


class Step(NamedTuple):
    """What is being done.

    Attributes:
        stage: such as "caption", "write", "planning coconut".
        unit: its name; "" if it is not about one.
        record: a key, or another word for where in the unit it is.
    """

    stage: str
    unit: str = ""
    record: str = ""


class Activity:
    """What one process is doing. Steps are of its main thread; files are of any thread.

    Attributes:
        step: None while the process waits for work.
        since_s: since when, by the monotonic clock: the last record or step was named then.
        on_move: called whenever `step` has changed.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.since_s = time.monotonic()
        self.on_move: Callable[[], None] = _nothing
        self._files: dict[int, tuple[float, str]] = {}

    @contextmanager
    def during(self, stage: str, unit: str = "", record: str = "") -> Iterator[None]:
        """Name a step for the length of the block; within another one, that one goes on afterwards."""
        before = self.step
        self._move(Step(stage, unit, record))
        try:
            yield
        finally:
            self._move(before)

    def at(self, record: str) -> None:
        """Name the record that comes now. Nothing outside of a step."""
        if self.step is not None:
            self._move(self.step._replace(record=record))

    def after(self, items: Iterable[Named], key: Callable[[Named], str]) -> Iterator[Named]:
        """The items, each named when it has come: what takes long is finding the next one."""
        for item in items:
            if self.step is not None:
                self._move(self.step._replace(record=f"after {key(item)}"))
            yield item

    @contextmanager
    def touching(self, path: str) -> Iterator[None]:
        """Name the file that this thread reads or writes in the block."""
        thread = threading.get_ident()
        before = self._files.get(thread)
        self._files[thread] = (time.monotonic(), path)
        try:
            yield
        finally:
            if before is None:
                self._files.pop(thread, None)
            else:
                self._files[thread] = before

    def words(self) -> str:
        """The step in words, with the file that has been waited for longest; "" if there is no step."""
        step, waiting = self.step, sorted(self._files.copy().values())
        if step is None:
            return ""
        words = [step.stage, f"unit {step.unit}" if step.unit else "", _place(step.record)]
        words.append(f"waiting for {shorten(waiting[0][1])}" if waiting else "")
        return ", ".join(word for word in words if word)

    def _move(self, step: Step | None) -> None:
        self.step, self.since_s = step, time.monotonic()
        self.on_move()


def _place(record: str) -> str:
    return record if not record or record.startswith(("after ", "saving ")) else f"at {record}"


def _nothing() -> None:
    pass


NOW = Activity()
"""Of this process."""


def touching(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a store whose first argument is the path that it reads or writes."""

    @functools.wraps(method)
    def run(self: Any, path: str, *rest: Any) -> Any:
        with NOW.touching(path):
            return method(self, path, *rest)

    return run
