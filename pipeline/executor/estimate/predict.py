"""From what a region costs in each stage to GPU-hours, wall time and the bottleneck.

The model of a build is simple and stated here whole. Every operator of the stream is a pool of actors, all
pools work at the same time, and a unit passes through them in order. So

    wall = start-up + the slowest pool's time + one unit through every other pool

where a pool's time is its work divided by its actors, in whole units, and no pool can be faster than the
machine's cores give it CPU seconds. Start-up is that of Ray, of the actors' processes and of the models that
take longest to load.
"""

from __future__ import annotations

import math

import msgspec

from ....schemas.config import BuildConfig
from ....schemas.errors import ConfigError
from .allocate import allocate_actors
from .pools import Pool, find_pools
from .rates import Rates, StageRate, SubsetRates
from .sizes import Size


class PoolEstimate(msgspec.Struct, frozen=True):
    """One pool of a subset's build.

    Attributes:
        pool: its stages and resources.
        actors: how many it has.
        work_s: seconds that one actor would need for everything.
        seconds: time that all its actors need, in whole units.
    """

    pool: Pool
    actors: int
    work_s: float
    seconds: float


class SubsetEstimate(msgspec.Struct, frozen=True):
    """One subset's build.

    Attributes:
        subset: its name.
        size: its images and regions.
        units: of work, and so shards at most.
        kept: regions that end in the shards.
        pools: in the stream's order.
        bottleneck: name of the slowest pool, or "CPU cores".
        startup_s: seconds until the first unit is under way, without Ray's own start.
        wall_s: seconds from the start of the stream to the last commit, start-up included.
        cpu_s: CPU seconds of all stages.
        gpu_s: GPU seconds inside the stages.
        held_gpu_s: GPU seconds for which the actors hold their GPUs.
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
    held_gpu_s: float
    shard_bytes: float
    ledger_bytes: float
    evidence_bytes: float

    @property
    def gpus(self) -> float:
        """GPUs that all actors hold at once."""
        return sum(each.actors * each.pool.num_gpus for each in self.pools)

    @property
    def cpus(self) -> float:
        """CPUs that all actors ask of Ray at once."""
        return sum(each.actors * each.pool.num_cpus for each in self.pools)


class Estimate(msgspec.Struct, frozen=True):
    """A build of several subsets, one after the other, with one start of Ray."""

    subsets: list[SubsetEstimate]
    ray_s: float

    @property
    def wall_s(self) -> float:
        """Seconds from the start of Ray to the last commit."""
        return self.ray_s + sum(subset.wall_s for subset in self.subsets)


def estimate_build(
    config: BuildConfig,
    rates: Rates,
    sizes: dict[str, Size],
    gpus: float | None = None,
    cpus: float | None = None,
    balanced: bool = False,
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

    Raises:
        ConfigError: the rates lack a subset or stage, or the GPUs do not hold the smallest pools.
    """
    estimates = []
    for subset, size in sizes.items():
        if subset not in rates.subsets:
            raise ConfigError(
                f"no rates of {subset!r}, only of {', '.join(rates.subsets)}: run a pilot of it, "
                "or add it to the file of --rates"
            )
        measured = rates.subsets[subset]
        pools = find_pools(config, subset)
        work_s = [_work_s(pool, measured, size) for pool in pools]
        units = math.ceil(size.images / config.images_per_shard)
        actors = allocate_actors(pools, work_s, units, gpus, cpus, balanced)
        rows = [
            _estimate_pool(pool, count, work, units, measured)
            for pool, count, work in zip(pools, actors, work_s, strict=True)
        ]
        estimates.append(_estimate_subset(subset, size, units, rows, measured, cpus))
    return Estimate(estimates, rates.ray_s)


def _estimate_pool(pool: Pool, actors: int, work_s: float, units: int, rates: SubsetRates) -> PoolEstimate:
    rounds = math.ceil(units / actors) * actors / max(1, units)  # in the last round some actors may be idle
    first_s = sum(rates.stages[name].first_s for name in pool.stages)
    return PoolEstimate(pool, actors, work_s, work_s / actors * rounds + first_s * (units > 0))


def _estimate_subset(
    subset: str, size: Size, units: int, pools: list[PoolEstimate], rates: SubsetRates, cpus: float | None
) -> SubsetEstimate:
    """One subset's build with these actors; the formula at the top of this file."""
    stages = [rates.stages[name] for each in pools for name in each.pool.stages]
    cpu_s = sum(stage.seconds(size.images, size.regions) * stage.cpu_share for stage in stages)
    slowest = max(pools, key=lambda each: each.seconds)
    cores_s = cpu_s / cpus if cpus else 0.0
    load_s = max(sum(rates.stages[name].load_s for name in each.pool.stages) for each in pools)
    startup_s = rates.launch_s + load_s
    fill_s = sum(each.work_s / max(1, units) for each in pools if each is not slowest)
    wall_s = (startup_s + max(slowest.seconds, cores_s) + fill_s) if units else 0.0
    return SubsetEstimate(
        subset=subset,
        size=size,
        units=units,
        kept=round(rates.kept * size.regions),
        pools=pools,
        bottleneck=slowest.pool.name if slowest.seconds >= cores_s else "CPU cores",
        startup_s=startup_s,
        wall_s=wall_s,
        cpu_s=cpu_s,
        gpu_s=sum(each.work_s * each.pool.num_gpus for each in pools),
        held_gpu_s=wall_s * sum(each.actors * each.pool.num_gpus for each in pools),
        shard_bytes=rates.shard_bytes_per_image * size.images,
        ledger_bytes=rates.ledger_bytes_per_region * size.regions,
        evidence_bytes=rates.evidence_bytes_per_region * size.regions,
    )


def _work_s(pool: Pool, rates: SubsetRates, size: Size) -> float:
    return sum(_rate(rates, name).seconds(size.images, size.regions) for name in pool.stages)


def _rate(rates: SubsetRates, stage: str) -> StageRate:
    if stage not in rates.stages:
        raise ConfigError(
            f"no rate of the stage {stage!r}, only of {', '.join(rates.stages)}: "
            "the pilot did not get that far; run it to its end, or add the stage to the file of --rates"
        )
    return rates.stages[stage]
