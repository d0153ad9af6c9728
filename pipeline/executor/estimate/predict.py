"""The capacity plan: from what a region costs in each stage to GPU-hours, wall time and GPUs per stage.

The model of a build is simple and stated here whole. Every operator of the stream is a pool of actors
(`ray_data.steps_of`), all pools work at the same time, and a unit passes through them in order. So

    wall = start-up + the slowest pool's time + one unit through every other pool

where a pool's time is its work over its actors, in whole units, and no pool can be faster than the machine's
cores give it CPU seconds. Start-up is that of Ray, of the actors' processes and of the slowest pool's models.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import msgspec

from ....schemas.config import Backend, BuildConfig
from ....schemas.errors import ConfigError
from ...stages.base import RECIPES, ModelStage
from .. import ray_data
from .rates import Rates, StageRate, SubsetRates

_EMBEDDED = {"captioner": "classical", "judge": "lexical", "segmenter": "grabcut"}


class Size(msgspec.Struct, frozen=True):
    """A subset's images and the regions that its source declares."""

    images: int
    regions: int


PAPER = {"coconut": Size(334_000, 3_400_000), "sa1b": Size(83_000, 2_300_000)}
"""The subsets of the published corpus."""


class Pool(msgspec.Struct, frozen=True):
    """One operator of the stream: its stages, and what each of its actors holds.

    Attributes:
        name: its model stages, or else "source" or "write".
        stages: all of them, in order.
        num_gpus, num_cpus: of an actor.
        low, high: actors, from the configuration.
    """

    name: str
    stages: tuple[str, ...]
    num_gpus: float
    num_cpus: float
    low: int
    high: int


class PoolPlan(msgspec.Struct, frozen=True):
    """A pool in a plan.

    Attributes:
        pool: which.
        actors: how many.
        work_s: seconds of one actor for everything.
        seconds: with all its actors, in whole units.
    """

    pool: Pool
    actors: int
    work_s: float
    seconds: float


class SubsetPlan(msgspec.Struct, frozen=True):
    """One subset's build.

    Attributes:
        subset, size: what.
        units: shards, at most.
        kept: regions in them.
        pools: in the stream's order.
        bottleneck: name of the slowest pool, or "CPU cores".
        startup_s: until the first unit is under way, without Ray's own start.
        wall_s: from the stream's start to the last commit, start-up included.
        cpu_s: CPU seconds of all stages.
        gpu_s: GPU seconds inside stages.
        held_gpu_s: GPU seconds that the actors hold their GPUs.
        shard_bytes, ledger_bytes, evidence_bytes: what is written.
    """

    subset: str
    size: Size
    units: int
    kept: int
    pools: list[PoolPlan]
    bottleneck: str
    startup_s: float
    wall_s: float
    cpu_s: float
    gpu_s: float
    held_gpu_s: float
    shard_bytes: float
    ledger_bytes: float
    evidence_bytes: float

    @property
    def gpus(self) -> float:
        """Held at once."""
        return sum(each.actors * each.pool.num_gpus for each in self.pools)

    @property
    def cpus(self) -> float:
        """Asked of Ray at once."""
        return sum(each.actors * each.pool.num_cpus for each in self.pools)


class Plan(msgspec.Struct, frozen=True):
    """A build of several subsets, one after the other, with one start of Ray."""

    subsets: list[SubsetPlan]
    ray_s: float

    @property
    def wall_s(self) -> float:
        return self.ray_s + sum(subset.wall_s for subset in self.subsets)


def pools_of(config: BuildConfig, subset: str) -> list[Pool]:
    """The stream's operators for a subset. Neither weights nor the models' packages are needed for it."""
    embedded = {
        protocol: getattr(config, protocol).model_copy(update={"name": name, "options": {}})
        for protocol, name in _EMBEDDED.items()
    }
    bare = config.model_copy(update=embedded)
    found = []
    for step in ray_data.steps_of(RECIPES[subset](bare), bare):
        asked = ray_data.resources_of(step, bare)
        names = tuple(stage if isinstance(stage, str) else stage.name for stage in step)
        models = [stage.name for stage in step if isinstance(stage, ModelStage)]
        low, high = asked["concurrency"]
        name = "+".join(models) or (names[0] if names[0] == "source" else names[-1])
        found.append(Pool(name, names, float(asked["num_gpus"]), float(asked["num_cpus"]), low, high))
    return found


def plan(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None = None,
    cpus: float | None = None,
    balanced: bool = False,
) -> Plan:
    """Predict a build.

    Args:
        config: gives the pools and `images_per_shard`.
        rates: what a region costs.
        sizes: by subset, in the order of the build.
        gpus: of the cluster; default: what the configured pools hold at most.
        cpus: cores of the cluster; default: as many as it takes.
        balanced: give every pool the actors that make the slowest one fastest; else stay within the
            configuration's `concurrency`.

    Raises:
        ConfigError: the rates lack a subset or stage, or the GPUs do not hold the smallest pools.
    """
    planned = []
    for subset, size in sizes.items():
        if subset not in rates.subsets:
            raise ConfigError(
                f"no rates of {subset!r}, only of {', '.join(rates.subsets)}: run a pilot of it, "
                "or add it to the file of --rates"
            )
        pools = pools_of(config, subset)
        measured = rates.subsets[subset]
        actors = allocate(pools, measured, size, config.images_per_shard, gpus, cpus, balanced)
        planned.append(predict(subset, size, config.images_per_shard, pools, actors, measured, cpus))
    return Plan(planned, rates.ray_s)


def predict(
    subset: str,
    size: Size,
    images_per_shard: int,
    pools: list[Pool],
    actors: list[int],
    rates: SubsetRates,
    cpus: float | None,
) -> SubsetPlan:
    """One subset's build with so many actors in each pool; see the top of this file."""
    units = math.ceil(size.images / images_per_shard)
    each = []
    cpu_s = gpu_s = 0.0
    for pool, count in zip(pools, actors, strict=True):
        work_s = _work_s(pool, rates, size)
        cpu_s += sum(
            rates.stages[name].seconds(size.images, size.regions) * rates.stages[name].cpu_share
            for name in pool.stages
        )
        gpu_s += work_s * pool.num_gpus
        rounds = math.ceil(units / count) * count / max(1, units)  # the last round of units may be part idle
        first_s = sum(rates.stages[name].first_s for name in pool.stages)
        each.append(PoolPlan(pool, count, work_s, work_s / count * rounds + first_s * (units > 0)))
    slowest = max(each, key=lambda found: found.seconds)
    cores_s = cpu_s / cpus if cpus else 0.0
    startup_s = rates.launch_s + max(sum(_rate(rates, name).load_s for name in pool.stages) for pool in pools)
    fill_s = sum(found.work_s / max(1, units) for found in each if found is not slowest)
    wall_s = (startup_s + max(slowest.seconds, cores_s) + fill_s) if units else 0.0
    return SubsetPlan(
        subset=subset,
        size=size,
        units=units,
        kept=round(rates.kept * size.regions),
        pools=each,
        bottleneck=slowest.pool.name if slowest.seconds >= cores_s else "CPU cores",
        startup_s=startup_s,
        wall_s=wall_s,
        cpu_s=cpu_s,
        gpu_s=gpu_s,
        held_gpu_s=wall_s * sum(found.actors * found.pool.num_gpus for found in each),
        shard_bytes=rates.shard_bytes_per_image * size.images,
        ledger_bytes=rates.ledger_bytes_per_region * size.regions,
        evidence_bytes=rates.evidence_bytes_per_region * size.regions,
    )


def allocate(
    pools: list[Pool],
    rates: SubsetRates,
    size: Size,
    images_per_shard: int,
    gpus: float | None,
    cpus: float | None,
    balanced: bool,
) -> list[int]:
    """Actors of each pool: first the GPUs are divided, then pools without one get what keeps up with them.

    Raises:
        ConfigError: the GPUs do not hold one actor of each pool.
    """
    units = max(1, math.ceil(size.images / images_per_shard))
    work = [_work_s(pool, rates, size) for pool in pools]
    least = [1 if balanced else pool.low for pool in pools]
    most = [
        max(low, units if balanced else min(pool.high, units)) for pool, low in zip(pools, least, strict=True)
    ]
    on_gpus = [i for i, pool in enumerate(pools) if pool.num_gpus]
    actors = list(least)
    if on_gpus:
        budget = sum(pools[i].num_gpus * pools[i].high for i in on_gpus) if gpus is None else gpus
        found = _balance(on_gpus, work, [pool.num_gpus for pool in pools], budget, least, most)
        if found is None:
            asked = ", ".join(f"{pools[i].name}: {least[i]} x {pools[i].num_gpus:g}" for i in on_gpus)
            raise ConfigError(f"{budget:g} GPUs do not hold the smallest pools ({asked}): add GPUs")
        for i, count in zip(on_gpus, found, strict=True):
            actors[i] = count
    rest = [i for i in range(len(pools)) if i not in on_gpus]
    if cpus is None and on_gpus:
        slowest = max(work[i] / actors[i] for i in on_gpus)
        for i in rest:
            actors[i] = min(most[i], max(least[i], math.ceil(work[i] / slowest - 1e-9) if slowest else 1))
    elif rest:
        held = sum(pools[i].num_cpus * actors[i] for i in on_gpus)
        smallest = sum(pools[i].num_cpus * least[i] for i in rest)
        wanted = sum(pools[i].num_cpus * pools[i].high for i in rest)
        # Like Ray on one machine, which admits the smallest pools whatever its cores are.
        budget = wanted if cpus is None else max(smallest, cpus - held)
        found = _balance(rest, work, [pool.num_cpus for pool in pools], budget, least, most)
        for i, count in zip(rest, found or [least[i] for i in rest], strict=True):
            actors[i] = count
    return actors


def _balance(
    which: list[int],
    work: list[float],
    cost: list[float],
    budget: float,
    least: list[int],
    most: list[int],
) -> list[int] | None:
    def picked(values: list) -> list:
        return [values[i] for i in which]

    return balance(picked(work), picked(cost), budget, picked(least), picked(most))


def balance(
    work: Sequence[float],
    cost: Sequence[float],
    budget: float,
    least: Sequence[int] | None = None,
    most: Sequence[int] | None = None,
) -> list[int] | None:
    """Actors of each pool that make the slowest pool as fast as the budget allows; exact.

    The slowest pool's time is one of work / count, so the smallest of these times that fits is the best one.
    What is left over then goes, one by one, to whoever is slowest and fits.

    Args:
        work: seconds of one actor, by pool.
        cost: GPUs (or CPUs) of one actor.
        budget: of all together.
        least: actors of each; default: 1.
        most: actors of each; default: as many as the budget buys.

    Returns:
        Counts; None if the budget does not hold `least`.
    """
    least = [1] * len(work) if least is None else list(least)
    total = sum(price * count for price, count in zip(cost, least, strict=True))
    if total > budget + _EPS:
        return None
    bought = [
        low + (int((budget - total) / price + _EPS) if price > 0 else _FREE)
        for low, price in zip(least, cost, strict=True)
    ]
    most = bought if most is None else [min(a, b) for a, b in zip(bought, most, strict=True)]

    def counts(seconds: float) -> list[int]:
        """The fewest actors with which every pool takes at most so long, or its most."""
        return [
            min(high, max(low, math.ceil(amount / seconds - _EPS))) if amount > 0 else low
            for amount, low, high in zip(work, least, most, strict=True)
        ]

    def fits(seconds: float) -> bool:
        found = counts(seconds)
        slow = max((a / n for a, n in zip(work, found, strict=True)), default=0.0)
        spent = sum(price * count for price, count in zip(cost, found, strict=True))
        return slow <= seconds * (1 + _EPS) and spent <= budget + _EPS

    times = sorted(
        {
            amount / count
            for amount, low, high in zip(work, least, most, strict=True)
            if amount > 0
            for count in range(low, high + 1)
        }
    )
    if not times:
        return least
    # Whether a time fits is monotone: no, ..., no, yes, ..., yes; the last one always does.
    first = bisect.bisect_left(times, True, key=fits)
    found = counts(times[min(first, len(times) - 1)])
    left = budget - sum(price * count for price, count in zip(cost, found, strict=True))
    while True:
        open_to = [
            i for i, price in enumerate(cost) if work[i] > 0 and found[i] < most[i] and price <= left + _EPS
        ]
        if not open_to:
            return found
        slowest = max(open_to, key=lambda i: work[i] / found[i])
        found[slowest] += 1
        left -= cost[slowest]


_EPS = 1e-9
_FREE = 1_000
"""Actors of a pool that costs nothing of what is divided."""


def _work_s(pool: Pool, rates: SubsetRates, size: Size) -> float:
    return sum(_rate(rates, name).seconds(size.images, size.regions) for name in pool.stages)


def _rate(rates: SubsetRates, stage: str) -> StageRate:
    if stage not in rates.stages:
        raise ConfigError(
            f"no rate of the stage {stage!r}, only of {', '.join(rates.stages)}: "
            "the pilot did not get that far; run it to its end, or add the stage to the file of --rates"
        )
    return rates.stages[stage]


def doubts(config: BuildConfig, rates: Rates, sizes: dict[str, Size], pilot: BuildConfig | None) -> list[str]:
    """What makes this plan less sure than it looks.

    Args:
        config: of the plan.
        rates: of the plan.
        sizes: of the plan.
        pilot: the configuration that the rates were measured with, if it is known.
    """
    said = []
    for subset, size in sizes.items():
        measured = rates.subsets[subset]
        if measured.regions and size.regions > 1_000 * measured.regions:
            said.append(f"{subset}: {measured.regions:,} measured regions stand for {size.regions:,}")
        unasked = [name for name, rate in measured.stages.items() if not rate.image_s and not rate.region_s]
        if unasked:
            said.append(
                f"{subset}: {', '.join(unasked)} had no work in the pilot; counted as free, which it is not"
            )
        density, planned = measured.regions / max(1, measured.images), size.regions / max(1, size.images)
        if measured.images and not 0.67 < planned / max(density, _EPS) < 1.5:
            said.append(
                f"{subset}: the pilot has {density:.1f} regions an image, the plan {planned:.1f}; "
                "costs per image and per region are told apart only roughly"
            )
    if pilot is not None:
        for protocol in _EMBEDDED:
            then, now = (_what(getattr(each, protocol)) for each in (pilot, config))
            if then != now:
                said.append(
                    f"{protocol}: the pilot ran {then[0]} (num_gpus {then[2]:g}, num_cpus {then[3]:g}), the "
                    f"plan is for {now[0]} ({now[2]:g}, {now[3]:g}){'; other options' * (then[1] != now[1])}"
                )
    return said


def _what(backend: Backend) -> tuple:
    return (backend.name, backend.options, backend.num_gpus, backend.num_cpus)
