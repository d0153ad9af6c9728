"""From what a region costs in each stage to GPU-hours, wall time, the bottleneck, and who waits for it.

The model of a build is simple and stated here whole. Every operator of a stream is a pool of actors, all
pools work at the same time, and a unit passes through them in order. So of one stream

    wall = start-up + the slowest pool's time + one unit through every other pool

where a pool's time is its work divided by its actors, in whole units, and no pool can be faster than the
machine's cores give it CPU seconds. Start-up is that of Ray, of the actors' processes and of the models that
take longest to load. Subsets that are built side by side share one stream: a pool has the work of all of
them. Streams follow one another. From the end of the first start-up on

    idle time of a pool = its actors x the time until the last commit - its time inside calls of its models
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from ....schemas.config import BuildConfig
from ....schemas.errors import ConfigError
from .allocate import allocate_actors
from .pools import Pool, find_groups, find_pools
from .rates import Rates, StageRate
from .sizes import Size


class PoolEstimate(msgspec.Struct, frozen=True):
    """One pool of a stream.

    Attributes:
        pool: its stages and resources.
        actors: how many it has.
        work_s: seconds that one actor would need for everything.
        busy_s: of these, seconds inside calls of its models; all of them if it has none.
        seconds: time that all its actors need, in whole units.
    """

    pool: Pool
    actors: int
    work_s: float
    busy_s: float
    seconds: float


class StreamEstimate(msgspec.Struct, frozen=True):
    """The build of one subset, or of several side by side.

    Attributes:
        subsets: their names.
        pools: in the stream's order.
        bottleneck: title of the slowest pool, or "CPU cores".
        startup_s: seconds until the first unit is under way, without Ray's own start.
        wall_s: seconds from the start of the stream to the last commit, start-up included.
        gpus, cpus: what all actors hold at once.
    """

    subsets: list[str]
    pools: list[PoolEstimate]
    bottleneck: str
    startup_s: float
    wall_s: float
    gpus: float
    cpus: float


class SubsetEstimate(msgspec.Struct, frozen=True):
    """One subset: its size, what is spent on it and written of it, and the stream that builds it alone.

    Attributes:
        subset: its name.
        size: its images and regions.
        units: of work, and so shards at most.
        kept: regions that end in the shards.
        pools, bottleneck, startup_s, wall_s: of the stream; see `StreamEstimate`.
        cpu_s: CPU seconds of all stages.
        gpu_s: GPU seconds inside calls of the models.
        shard_bytes, ledger_bytes, evidence_bytes: what is written.
    """

    subset: str
    size: Size
    units: int
    kept: int
    pools: list[PoolEstimate]
    bottleneck: str
    startup_s: float
    wall_s: float
    cpu_s: float
    gpu_s: float
    shard_bytes: float
    ledger_bytes: float
    evidence_bytes: float


class PoolUse(msgspec.Struct, frozen=True):
    """One pool over the whole build, from the moment when its first models are up until the last commit.

    Attributes:
        title: of the pool, such as "captioner".
        actors: the most that it has in a stream.
        gpus: that these hold.
        busy_s: seconds inside calls of its models, summed over its actors.
        idle_s: the other seconds, summed over its actors.
        idle_share: of the time of its actors, 0..1.
    """

    title: str
    actors: int
    gpus: float
    busy_s: float
    idle_s: float
    idle_share: float


class Estimate(msgspec.Struct, frozen=True):
    """A build.

    Attributes:
        streams: in the order in which they follow one another.
        pools: over all streams, in their order.
        subsets: each for itself.
        ray_s: seconds of the start of Ray.
        wall_s: seconds from the start of Ray to the last commit.
        apart_s: the same if the subsets are built one after the other.
        gpus: that are held at once.
        held_gpu_s: GPU seconds for which actors hold them.
    """

    streams: list[StreamEstimate]
    pools: list[PoolUse]
    subsets: list[SubsetEstimate]
    ray_s: float
    wall_s: float
    apart_s: float
    gpus: float
    held_gpu_s: float


def estimate_build(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None = None,
    cpus: float | None = None,
    balanced: bool = False,
    apart: bool = False,
) -> Estimate:
    """Estimate a build.

    Args:
        config: gives the pools and `images_per_shard`.
        rates: what a region costs.
        sizes: by subset, in the order of the build.
        gpus: of the cluster; None takes what the configured pools hold at most.
        cpus: cores of the cluster; None takes as many as the pools need.
        balanced: share out GPUs so that the slowest pool is fastest, instead of staying within the
            configuration's `concurrency`.
        apart: build the subsets one after the other, also where the GPUs hold the pools of several.

    Raises:
        ConfigError: the rates lack a subset or stage, or the GPUs do not hold the smallest pools.
    """
    for subset in sizes:
        if subset not in rates.subsets:
            raise ConfigError(
                f"no rates of {subset!r}, only of {', '.join(rates.subsets)}: run a pilot of it, "
                "or add it to the file of --rates"
            )
    have = _configured_gpus(config, list(sizes)) if gpus is None else gpus
    groups = (
        [[subset] for subset in sizes] if apart else find_groups(config, list(sizes), have, cpus, balanced)
    )

    def stream(subsets: Sequence[str]) -> StreamEstimate:
        return _estimate_stream(config, rates, {each: sizes[each] for each in subsets}, gpus, cpus, balanced)

    alone = {subset: stream([subset]) for subset in sizes}
    streams = [alone[group[0]] if len(group) == 1 else stream(group) for group in groups]
    return Estimate(
        streams=streams,
        pools=sum_up_pools(streams),
        subsets=[_estimate_subset(config, rates, sizes[each], alone[each]) for each in sizes],
        ray_s=rates.ray_s,
        wall_s=rates.ray_s + sum(each.wall_s for each in streams),
        apart_s=rates.ray_s + sum(each.wall_s for each in alone.values()),
        gpus=max((each.gpus for each in streams), default=0.0),
        held_gpu_s=sum(each.wall_s * each.gpus for each in streams),
    )


def sum_up_pools(streams: Sequence[StreamEstimate]) -> list[PoolUse]:
    """What each pool does over streams that follow one another, without the first start-up.

    In a stream that does not have a pool, its GPUs are idle, unless pools of that stream hold them.
    """
    held = max((stream.gpus for stream in streams), default=0.0)
    parts: dict[str, list[PoolEstimate]] = {}
    for stream in sorted(streams, key=lambda each: -len(each.pools)):
        for each in stream.pools:
            parts.setdefault(each.pool.title, []).append(each)
    actors = {title: max(each.actors for each in own) for title, own in parts.items()}
    price = {title: max(each.pool.num_gpus for each in own) for title, own in parts.items()}
    idle_s = dict.fromkeys(parts, 0.0)
    for number, stream in enumerate(streams):
        span_s = stream.wall_s - (0.0 if number else stream.startup_s)
        for each in stream.pools:
            idle_s[each.pool.title] += max(0.0, each.actors * span_s - each.busy_s)
        free = held - stream.gpus
        for title in [each for each in parts if each not in {own.pool.title for own in stream.pools}]:
            left = min(actors[title], free / price[title]) if price[title] else 0.0
            idle_s[title] += left * span_s
            free -= left * price[title]
    uses = []
    for title, own in parts.items():
        busy_s, idle = sum(each.busy_s for each in own), idle_s[title]
        share = idle / (idle + busy_s) if idle + busy_s else 0.0
        uses.append(PoolUse(title, actors[title], actors[title] * price[title], busy_s, idle, share))
    return uses


def _configured_gpus(config: BuildConfig, subsets: Sequence[str]) -> float:
    """What the pools hold at most when all subsets are built side by side."""
    return sum(pool.num_gpus * pool.max_actors for pool in find_pools(config, subsets))


def _estimate_stream(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None,
    cpus: float | None,
    balanced: bool,
) -> StreamEstimate:
    """Subsets side by side; the formula at the top of this file."""
    pools = find_pools(config, list(sizes))
    work = [{each: _work_s(pool, each, rates, sizes[each]) for each in pool.stages} for pool in pools]
    units = {each: _count_units(config, size) for each, size in sizes.items()}
    passing = [sum(units[each] for each in pool.stages) for pool in pools]
    actors = allocate_actors(pools, [sum(each.values()) for each in work], passing, gpus, cpus, balanced)
    rows = [
        PoolEstimate(
            pool,
            count,
            work_s=sum(own.values()),
            busy_s=_busy_s(pool, rates, sizes),
            seconds=_pool_s(pool, count, sum(own.values()), through, rates),
        )
        for pool, count, own, through in zip(pools, actors, work, passing, strict=True)
    ]
    slowest = max(range(len(rows)), key=lambda number: rows[number].seconds)
    cpu_s = sum(_cpu_s(pools, each, rates, size) for each, size in sizes.items())
    cores_s = cpu_s / cpus if cpus else 0.0
    load_s = max(_slowest_subset(pool, rates, "load_s") for pool in pools)
    startup_s = max(rates.subsets[each].launch_s for each in sizes) + load_s
    fill_s = max(
        sum(own.get(each, 0.0) / max(1, units[each]) for number, own in enumerate(work) if number != slowest)
        for each in sizes
    )
    busiest_s = max(rows[slowest].seconds, cores_s)
    return StreamEstimate(
        subsets=list(sizes),
        pools=rows,
        bottleneck=rows[slowest].pool.title if rows[slowest].seconds >= cores_s else "CPU cores",
        startup_s=startup_s,
        wall_s=(startup_s + busiest_s + fill_s) if any(units.values()) else 0.0,
        gpus=sum(each.actors * each.pool.num_gpus for each in rows),
        cpus=sum(each.actors * each.pool.num_cpus for each in rows),
    )


def _pool_s(pool: Pool, actors: int, work_s: float, units: int, rates: Rates) -> float:
    """Seconds that all actors need: in the last round some of them may be idle."""
    rounds = math.ceil(units / actors) * actors / max(1, units)
    return work_s / actors * rounds + _slowest_subset(pool, rates, "first_s") * (units > 0)


def _slowest_subset(pool: Pool, rates: Rates, field: str) -> float:
    """Sum of a field of the rates over the pool's stages, of the subset in which it is largest."""
    return max(
        sum(getattr(_rate(rates, subset, name), field) for name in names)
        for subset, names in pool.stages.items()
    )


def _estimate_subset(config: BuildConfig, rates: Rates, size: Size, alone: StreamEstimate) -> SubsetEstimate:
    (subset,) = alone.subsets
    measured = rates.subsets[subset]
    return SubsetEstimate(
        subset=subset,
        size=size,
        units=_count_units(config, size),
        kept=round(measured.kept * size.regions),
        pools=alone.pools,
        bottleneck=alone.bottleneck,
        startup_s=alone.startup_s,
        wall_s=alone.wall_s,
        cpu_s=_cpu_s([each.pool for each in alone.pools], subset, rates, size),
        gpu_s=sum(each.busy_s * each.pool.num_gpus for each in alone.pools),
        shard_bytes=measured.shard_bytes_per_image * size.images,
        ledger_bytes=measured.ledger_bytes_per_region * size.regions,
        evidence_bytes=measured.evidence_bytes_per_region * size.regions,
    )


def _count_units(config: BuildConfig, size: Size) -> int:
    return math.ceil(size.images / config.images_per_shard)


def _work_s(pool: Pool, subset: str, rates: Rates, size: Size) -> float:
    return sum(_rate(rates, subset, name).seconds(size.images, size.regions) for name in pool.stages[subset])


def _busy_s(pool: Pool, rates: Rates, sizes: dict[str, Size]) -> float:
    found = 0.0
    for subset, names in pool.stages.items():
        for rate in (_rate(rates, subset, name) for name in names):
            found += rate.seconds(sizes[subset].images, sizes[subset].regions) * rate.busy_share
    return found


def _cpu_s(pools: Sequence[Pool], subset: str, rates: Rates, size: Size) -> float:
    stages = [_rate(rates, subset, name) for pool in pools for name in pool.stages.get(subset, ())]
    return sum(each.seconds(size.images, size.regions) * each.cpu_share for each in stages)


def _rate(rates: Rates, subset: str, stage: str) -> StageRate:
    stages = rates.subsets[subset].stages
    if stage not in stages:
        raise ConfigError(
            f"no rate of the stage {stage!r}, only of {', '.join(stages)}: "
            "the pilot did not get that far; run it to its end, or add the stage to the file of --rates"
        )
    return stages[stage]
