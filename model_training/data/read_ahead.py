"""Reads from a bucket before it is needed, in threads, so that a worker waits for few answers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

Result = TypeVar("Result")

AT_ONCE = 16
"""Reads under way at a time, in each process that makes batches."""

MOST_BYTES = 64 << 20
"""Of what is being read, or has been read and was not taken yet, in each process."""


class Wanted(NamedTuple):
    """Something that will be taken, and the bytes that it is."""

    key: int
    num_bytes: int


class ReadAhead(Generic[Result]):
    """What will be taken next is read in that order, within a bound of bytes. Used by one thread.

    Args:
        read: reads one thing by its key; called in several threads.
        at_once: reads under way at a time.
        most_bytes: bound of what is held; one thing is read whatever its size.
    """

    def __init__(self, read: Callable[[int], Result], at_once: int = AT_ONCE, most_bytes: int = MOST_BYTES):
        self._read, self._most_bytes = read, most_bytes
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="read-ahead")
        self._waiting: deque[Wanted] = deque()
        self._uses: Counter[int] = Counter()
        self._reading: dict[int, tuple[Wanted, Future[Result]]] = {}
        self.held_bytes = 0

    def expect(self, wanted: Iterable[Wanted]) -> None:
        """Name all that will be taken next, in order, instead of what was named before.

        What is no longer wanted is forgotten; what is, and was begun before, is not read again.
        """
        ordered = list(wanted)
        self._uses = Counter(each.key for each in ordered)
        for key in self._reading.keys() - self._uses.keys():
            self._forget(key)
        self._waiting = deque(each for each in dict.fromkeys(ordered) if each.key not in self._reading)
        self._fill()

    def take(self, key: int) -> Result:
        """What `read` returns for the key, or raises."""
        if key not in self._reading:  # there was no room for it, or nobody has named it
            self._waiting = deque(each for each in self._waiting if each.key != key)
            self._uses[key] -= 1
            return self._read(key)
        _, future = self._reading[key]
        try:
            return future.result()
        finally:
            self._uses[key] -= 1
            if self._uses[key] <= 0 or future.exception() is not None:
                self._forget(key)
                self._fill()

    def _fill(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            if self._reading and self.held_bytes + first.num_bytes > self._most_bytes:
                return
            self._waiting.popleft()
            self.held_bytes += first.num_bytes
            self._reading[first.key] = first, self._pool.submit(self._read, first.key)

    def _forget(self, key: int) -> None:
        wanted, future = self._reading.pop(key)
        future.cancel()
        self.held_bytes -= wanted.num_bytes
