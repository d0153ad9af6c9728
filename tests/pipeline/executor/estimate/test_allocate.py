"""GPUs and cores go where the work is, and no other allocation is faster."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.pipeline.executor.estimate.allocate import balance


@pytest.mark.soak
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_other_allocation_is_faster(data):
    count = data.draw(st.integers(1, 3))
    work = data.draw(st.lists(st.floats(0.01, 1000), min_size=count, max_size=count))
    cost = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=count, max_size=count))
    budget = data.draw(st.integers(1, 12))
    found = balance(work, cost, budget)
    options = [range(1, int(budget / price) + 1) for price in cost]
    fitting = [
        counts
        for counts in itertools.product(*options)
        if sum(n * price for n, price in zip(counts, cost, strict=True)) <= budget
    ]
    if found is None:
        assert not fitting
        return
    assert sum(n * price for n, price in zip(found, cost, strict=True)) <= budget + 1e-6
    best = min(max(w / n for w, n in zip(work, counts, strict=True)) for counts in fitting)
    assert max(w / n for w, n in zip(work, found, strict=True)) <= best * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(
    work=st.lists(st.floats(0.01, 1e6), min_size=1, max_size=4),
    spare=st.integers(0, 40),
    high=st.integers(1, 9),
)
def test_bounds_hold_and_nothing_is_left_that_somebody_could_use(work, spare, high):
    found = balance(work, [1.0] * len(work), len(work) + spare, [1] * len(work), [high] * len(work))
    assert found is not None and all(1 <= n <= high for n in found)
    assert sum(found) == min(len(work) + spare, high * len(work))


def test_gpus_go_where_the_work_is():
    assert balance([60, 20, 20], [1, 1, 1], 10) == [6, 2, 2]
    assert balance([10, 1], [1, 1], 8) == [7, 1]
    assert balance([10, 10], [2, 0.5], 4) == [1, 4]  # a second actor of the first would leave the other none
    assert balance([1, 1], [1, 1], 1) is None
    assert balance([5, 5], [1, 1], 9, least=[3, 1]) == [5, 4]
