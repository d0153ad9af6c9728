"""Draws from an iterator in a thread of its own, a bounded number of items ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")

_ENDING_S = 1.0
"""How long to wait for the thread. A read from a disk that hangs must not hold up a Ctrl-C."""


class _End(NamedTuple):
    error: BaseException | None


def ahead(items: Iterable[Item], depth: int) -> Generator[Item]:
    """The items in order, with up to `depth` of them made while the caller works on earlier ones.

    An error of `items` is raised where it would have been without the thread. Closing this iterator ends the
    thread, and waits a second for it: if the item that it is making takes longer, it ends after that item.
    With `depth` 0 there is no thread.
    """
    if not depth:
        yield from items
        return
    made: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        error = None
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as raised:  # noqa: BLE001 - raised again in the caller's thread
            error = raised
        put(_End(error))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = made.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join(_ENDING_S)
