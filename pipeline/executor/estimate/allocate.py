"""Shares out GPUs and CPU cores among the pools of a stream."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from ....schemas.errors import ConfigError
from ..gpus import MANY_POOLS
from .pools import Pool

_EPS = 1e-9
_UNBOUNDED = 1_000
"""Actors of a pool that costs nothing of what is shared out."""


def allocate_actors(
    pools: list[Pool],
    work_s: list[float],
    units: list[int],
    gpus: float | None,
    cpus: float | None,
    balanced: bool,
) -> list[int]:
    """Find how many actors each pool gets: first GPUs are shared out, then cores among the other pools.

    Args:
        pools: of the stream.
        work_s: seconds that one actor of each pool would need for everything.
        units: that pass through each pool; it gets no more actors than that.
        gpus: of the cluster; None takes what the configured pools hold at most.
        cpus: cores of the cluster; None takes as many as it needs to keep up with the GPUs.
        balanced: give each pool what makes the slowest one fastest, instead of staying within the
            configuration's `concurrency`.

    Raises:
        ConfigError: the GPUs do not hold the smallest pools.
    """
    least = [1 if balanced else pool.min_actors for pool in pools]
    most: list[int] = [
        max(low, passing if balanced else min(pool.max_actors, max(1, passing)))
        for pool, low, passing in zip(pools, least, units, strict=True)
    ]
    with_gpus = [i for i, pool in enumerate(pools) if pool.num_gpus]
    others = [i for i, pool in enumerate(pools) if not pool.num_gpus]
    actors = dict(enumerate(least))
    if with_gpus:
        budget = sum(pools[i].num_gpus * pools[i].max_actors for i in with_gpus) if gpus is None else gpus
        found = _balance_some(with_gpus, work_s, [pool.num_gpus for pool in pools], budget, least, most)
        if found is None:
            needed = ", ".join(f"{pools[i].name}: {least[i]} x {pools[i].num_gpus:g}" for i in with_gpus)
            raise ConfigError(
                f"{budget:g} GPUs do not hold the smallest pools ({needed}): add GPUs, or {MANY_POOLS}"
            )
        actors |= found
    if with_gpus and cpus is None:
        slowest_s = max(work_s[i] / actors[i] for i in with_gpus)
        for i in others:
            keeps_up = math.ceil(work_s[i] / slowest_s - _EPS) if slowest_s else 1
            actors[i] = min(most[i], max(least[i], keeps_up))
    elif others:
        held = sum(pools[i].num_cpus * actors[i] for i in with_gpus)
        smallest = sum(pools[i].num_cpus * least[i] for i in others)
        wanted = sum(pools[i].num_cpus * pools[i].max_actors for i in others)
        # Ray on one machine admits the smallest pools however few cores it has; so does this.
        budget = wanted if cpus is None else max(smallest, cpus - held)
        actors |= _balance_some(others, work_s, [pool.num_cpus for pool in pools], budget, least, most) or {}
    return list(actors.values())


def _balance_some(
    which: list[int], work_s: list[float], cost: list[float], budget: float, least: list[int], most: list[int]
) -> dict[int, int] | None:
    """`balance` among some of the pools, by their numbers."""

    def pick(values: list) -> list:
        return [values[i] for i in which]

    counts = balance(pick(work_s), pick(cost), budget, pick(least), pick(most))
    return None if counts is None else dict(zip(which, counts, strict=True))


def balance(
    work_s: Sequence[float],
    cost: Sequence[float],
    budget: float,
    least: Sequence[int] | None = None,
    most: Sequence[int] | None = None,
) -> list[int] | None:
    """The actors of each pool that make the slowest pool as fast as the budget allows. The result is exact.

    The slowest pool's time is one of work / count, so the smallest of these times that fits is the best one.
    What is left of the budget then goes, actor by actor, to the slowest pool that can still take one.

    Args:
        work_s: seconds that one actor of each pool would need.
        cost: GPUs (or cores) of one actor of each pool.
        budget: GPUs (or cores) for all pools together.
        least: the fewest actors of each pool; 1 by default.
        most: the most actors of each pool; by default as many as the budget buys.

    Returns:
        Actors of each pool; None if the budget does not hold `least`.
    """
    least = [1] * len(work_s) if least is None else list(least)
    left = budget - _total(cost, least)
    if left < -_EPS:
        return None
    bought = [
        low + (int(left / price + _EPS) if price > 0 else _UNBOUNDED)
        for low, price in zip(least, cost, strict=True)
    ]
    most = bought if most is None else [min(pair) for pair in zip(bought, most, strict=True)]
    times_s = sorted(
        {
            work / count
            for work, low, high in zip(work_s, least, most, strict=True)
            if work > 0
            for count in range(low, high + 1)
        }
    )
    if not times_s:
        return least

    def fits(seconds: float) -> bool:
        counts = _fewest(seconds, work_s, least, most)
        slowest = max(work / count for work, count in zip(work_s, counts, strict=True))
        return slowest <= seconds * (1 + _EPS) and _total(cost, counts) <= budget + _EPS

    # Whether a time fits is monotone: no, ..., no, yes, ..., yes; the longest always does.
    first = bisect.bisect_left(times_s, True, key=fits)
    counts = _fewest(times_s[min(first, len(times_s) - 1)], work_s, least, most)
    return _spend_rest(counts, work_s, cost, budget, most)


def _fewest(seconds: float, work_s: Sequence[float], least: list[int], most: list[int]) -> list[int]:
    """The fewest actors with which each pool takes at most `seconds`, within its bounds."""
    return [
        min(high, max(low, math.ceil(work / seconds - _EPS))) if work > 0 else low
        for work, low, high in zip(work_s, least, most, strict=True)
    ]


def _spend_rest(
    counts: list[int], work_s: Sequence[float], cost: Sequence[float], budget: float, most: list[int]
) -> list[int]:
    """Spend what is left on the slowest pool that it buys an actor for, again and again."""
    left = budget - _total(cost, counts)
    while affordable := [
        i for i, price in enumerate(cost) if work_s[i] > 0 and counts[i] < most[i] and price <= left + _EPS
    ]:
        slowest = max(affordable, key=lambda i: work_s[i] / counts[i])
        counts[slowest] += 1
        left -= cost[slowest]
    return counts


def _total(cost: Sequence[float], counts: Sequence[int]) -> float:
    return sum(price * count for price, count in zip(cost, counts, strict=True))
