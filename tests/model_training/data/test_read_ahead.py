"""Reading ahead: what is taken is what was read, in the order that was named, within its bound of bytes."""

from __future__ import annotations

import threading
import time

import pytest

from paracaption.model_training.data.read_ahead import ReadAhead, Wanted
from paracaption.schemas.errors import BadSample


class Slow:
    """Reads that wait until they may go on, and note what was asked."""

    def __init__(self, is_open: bool = True):
        self.may_go = threading.Event()
        self.asked: list[int] = []
        self._lock = threading.Lock()
        if is_open:
            self.may_go.set()

    def __call__(self, key: int) -> int:
        with self._lock:
            self.asked.append(key)
        assert self.may_go.wait(30)
        if key == 13:
            raise BadSample("shard_unreadable", "thirteen")
        return key * 10

    def until(self, number: int) -> list[int]:
        deadline = time.monotonic() + 30
        while len(self.asked) < number and time.monotonic() < deadline:
            time.sleep(0.001)
        return sorted(self.asked)


def wanted(*keys: int, num_bytes: int = 1) -> list[Wanted]:
    return [Wanted(key, num_bytes) for key in keys]


def test_what_is_expected_is_read_at_once_and_given_in_any_order():
    read = Slow()
    ahead = ReadAhead(read)
    ahead.expect(wanted(3, 1, 2))
    assert read.until(3) == [1, 2, 3]
    assert [ahead.take(key) for key in (3, 1, 2)] == [30, 10, 20]
    assert (read.until(3), ahead.held_bytes) == ([1, 2, 3], 0)


def test_many_are_under_way_while_the_first_is_waited_for():
    read = Slow(is_open=False)
    ahead = ReadAhead(read, at_once=4)
    ahead.expect(wanted(*range(9)))
    assert read.until(4) == [0, 1, 2, 3]
    read.may_go.set()
    assert [ahead.take(key) for key in range(9)] == list(range(0, 90, 10))


def test_no_more_bytes_are_held_than_the_bound_says():
    read = Slow()
    ahead = ReadAhead(read, most_bytes=25)
    ahead.expect([*wanted(1, 2, num_bytes=10), Wanted(3, 10), Wanted(4, 99)])
    assert (read.until(2), ahead.held_bytes) == ([1, 2], 20)
    assert (ahead.take(1), read.until(3), ahead.held_bytes) == (10, [1, 2, 3], 20)
    assert (ahead.take(2), ahead.take(3)) == (20, 30)
    assert (read.until(4), ahead.held_bytes) == ([1, 2, 3, 4], 99)  # alone, whatever its size
    assert (ahead.take(4), ahead.held_bytes) == (40, 0)


def test_what_there_was_no_room_for_is_read_when_it_is_taken():
    read = Slow()
    ahead = ReadAhead(read, most_bytes=10)
    ahead.expect(wanted(1, 2, 3, num_bytes=10))
    assert [ahead.take(key) for key in (2, 1, 3)] == [20, 10, 30]
    assert (read.until(3), ahead.held_bytes) == ([1, 2, 3], 0)


def test_what_is_named_again_is_not_read_again_and_what_is_not_is_forgotten():
    read = Slow()
    ahead = ReadAhead(read)
    ahead.expect(wanted(1, 2, num_bytes=5))
    assert read.until(2) == [1, 2]
    ahead.expect(wanted(2, 2, 3, num_bytes=5))
    assert read.until(3) == [1, 2, 3]
    assert ahead.held_bytes == 10
    assert [ahead.take(key) for key in (2, 2, 3)] == [20, 20, 30]
    assert (sorted(read.asked), ahead.held_bytes) == ([1, 2, 3], 0)


def test_an_error_comes_to_who_takes_it_and_the_next_one_asks_again():
    read = Slow()
    ahead = ReadAhead(read)
    ahead.expect(wanted(13, 1))
    for _ in range(2):
        with pytest.raises(BadSample, match="thirteen"):
            ahead.take(13)
    assert ahead.take(1) == 10
    assert sorted(read.asked) == [1, 13, 13]


def test_what_nobody_has_named_is_read_when_it_is_taken():
    assert ReadAhead(Slow()).take(7) == 70
