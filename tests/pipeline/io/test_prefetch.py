"""What is drawn ahead in a thread, and how it ends."""

import threading
import time

import pytest

from paracaption.pipeline.io.prefetch import ahead


def test_items_come_in_order_and_an_error_where_it_would_have_come():
    def items():
        yield from range(5)
        raise ValueError("the sixth")

    found = ahead(items(), 2)
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the sixth"):
        next(found)


def test_a_read_that_hangs_holds_up_no_one_who_wants_to_end_and_its_thread_ends_after_it():
    goes_on, made = threading.Event(), []

    def items():
        yield 0
        goes_on.wait(60)
        made.append(1)
        yield 1
        made.append(2)
        yield 2

    before = set(threading.enumerate())
    found = ahead(items(), 1)
    assert next(found) == 0
    [thread] = set(threading.enumerate()) - before
    start = time.monotonic()
    found.close()
    assert time.monotonic() - start < 30 and thread.is_alive()
    goes_on.set()
    thread.join(30)
    assert not thread.is_alive() and made == [1]
