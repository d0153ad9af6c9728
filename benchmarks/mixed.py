"""How long each pool of a mixed build is idle, against what `paracaption estimate` predicts from a pilot.

    python -m benchmarks.mixed [--apart] [--shrink 1000] [--speed 0.5] [--shard 2]

The build has both recipes, the pools of configs/gpu.yaml (captioner 6, judge 1, segmenter 1) and the sizes of
the paper's corpus divided by `--shrink`. It runs through Ray on pretended GPUs, with models that sleep
(`benchmarks.sleeping`): by default twice as long as the paper's are taken to work, so that the work of the
few real cores hardly counts. Idle shares depend on ratios of times alone. The pilot is a build of one tenth.

The share of a pool's GPU time outside calls of its model is counted twice:

- measured: from the moment when all models are up until the last commit. It includes the time until the first
  unit reaches a pool, the time after the last unit has left it, and a restart of the models between subsets.
- steady: of that, only from the first call of the last pool until the last call of the bottleneck begins.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import paracaption.flows  # noqa: F401 - switches telemetry off
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.executor.estimate.predict import Estimate, estimate_build
from paracaption.pipeline.executor.estimate.rates import measure_rates
from paracaption.pipeline.executor.estimate.sizes import Size
from paracaption.pipeline.executor.ray_data import RayEngine
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.config import BuildConfig
from tests.building import build, config_of
from tests.synthetic import write_coconut, write_sa1b

POOLS = {"captioner": 6, "judge": 1, "segmenter": 1}
"""GPUs of each model in configs/gpu.yaml."""

MASKS = {"coconut": 10, "sa1b": 28}
"""Of an image; the paper has 10.2 and 27.7."""

PAPER_IMAGES = {"coconut": 334_000, "sa1b": 83_000}
PILOT_SHARE = 10


class Sources(NamedTuple):
    """Where the small sources lie, in the form of the configuration, and how many images each has."""

    coconut: dict
    sa1b: dict
    images: dict[str, int]


def write_sources(folder: Path, shrink: float) -> Sources:
    """Sources with the paper's numbers of images divided by `shrink`."""
    images = {subset: math.ceil(number / shrink) for subset, number in PAPER_IMAGES.items()}
    return Sources(
        write_coconut(folder / "coconut", images["coconut"], MASKS["coconut"]),
        write_sa1b(folder / "sa1b", images["sa1b"], MASKS["sa1b"]),
        images,
    )


def mixed_config(out: Path, sources: Sources, pools: dict[str, int], speed: float, shard: int) -> BuildConfig:
    """Both recipes, with sleeping models on `pools` GPUs."""
    models = {
        name: {
            "name": f"benchmarks.sleeping:Sleeping{name.capitalize()}",
            "num_gpus": 1,
            "num_cpus": 0.1,
            "concurrency": [number, number],
            "options": {"speed": speed},
        }
        for name, number in pools.items()
    }
    base = config_of(out, coconut=sources.coconut, sa1b=sources.sa1b, images_per_shard=shard)
    values = base.model_dump(mode="json") | models
    return BuildConfig.model_validate(values)


@contextmanager
def pretended_gpus(number: int) -> Iterator[RayEngine]:
    """An engine on a Ray of its own that believes in this many GPUs."""
    import ray

    ray.init(
        "local",
        num_cpus=max(4, os.cpu_count() or 1),
        num_gpus=number,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        yield RayEngine()
    finally:
        ray.shutdown()


class Call(NamedTuple):
    """What a model worked on one unit: when it ended, how long the stage took, and the model's part of it."""

    end_s: float
    seconds: float
    busy_s: float

    def busy_within(self, since_s: float, until_s: float) -> float:
        """Its busy seconds in a part of the build."""
        begin_s = self.end_s - self.seconds
        inside = max(0.0, min(until_s, self.end_s) - max(since_s, begin_s))
        return self.busy_s * inside / self.seconds if self.seconds else 0.0


class Measured(NamedTuple):
    """When models were up, and what they did.

    Attributes:
        up_s: all models were up for the first time, in seconds since the epoch.
        last_s: the last commit.
        calls: by pool.
    """

    up_s: float
    last_s: float
    calls: dict[str, list[Call]]

    def idle_share(self, pool: str, actors: int, since_s: float, until_s: float) -> float:
        """The share of a pool's GPU time in a part of the build in which no model was asked."""
        busy_s = sum(call.busy_within(since_s, until_s) for call in self.calls[pool])
        return 1 - busy_s / (actors * (until_s - since_s))

    def steady(self, bottleneck: str) -> tuple[float, float] | None:
        """The part of the build in which every pool has had work and the bottleneck still gets new work."""
        first_s = max(min(call.end_s - call.seconds for call in calls) for calls in self.calls.values())
        last_s = max(call.end_s - call.seconds for call in self.calls[bottleneck])
        since_s = max(self.up_s, first_s)
        return (since_s, last_s) if since_s < last_s else None


def measure(out: Path, config: BuildConfig) -> Measured:
    """Read the events of a build into a fresh folder."""
    pool_of = {
        stage.name: stage.place
        for subset in config.subsets
        for stage in recipe_of(config, subset)
        if isinstance(stage, ModelStage)
    }
    runs = [list(EventReader(run).new()) for run in sorted((out / "events").iterdir())]
    begun_s = [next(event.time_s for event in run if event.what == "begun") for run in runs]
    first_end_s = next(event.time_s for event in runs[begun_s.index(min(begun_s))] if event.what == "ended")
    first = [
        event for run, since_s in zip(runs, begun_s, strict=True) if since_s < first_end_s for event in run
    ]
    calls: dict[str, list[Call]] = {place: [] for place in pool_of.values()}
    for event in (event for run in runs for event in run):
        if event.what == "unit" and event.stage in pool_of:
            calls[pool_of[event.stage]].append(Call(event.time_s, event.seconds, event.busy))
    return Measured(
        up_s=max(event.time_s for event in first if event.what == "ready"),
        last_s=max(event.time_s for run in runs for event in run if event.what == "committed"),
        calls=calls,
    )


class Row(NamedTuple):
    """The idle shares of one pool, 0..1.

    Attributes:
        pool, gpus: its title, and its GPUs.
        predicted, whole: predicted and measured, from the first start-up to the last commit.
        steady: measured in the part in which no pool starts or ends; None if there is no such part, as where
            the subsets are built one after the other.
    """

    pool: str
    gpus: float
    predicted: float
    whole: float
    steady: float | None


class Result(NamedTuple):
    """A build beside its prediction; seconds are those from the first start-up to the last commit."""

    rows: list[Row]
    bottleneck: str
    predicted_s: float
    took_s: float

    def table(self) -> str:
        """For the documents."""
        lines = ["| GPUs of | number | idle, predicted | idle, measured | idle, steady |"]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        for row in self.rows:
            steady = "" if row.steady is None else f"{row.steady:.1%}"
            lines.append(f"| {row.pool} | {row.gpus:g} | {row.predicted:.1%} | {row.whole:.1%} | {steady} |")
        return "\n".join(lines)


def compare(measured: Measured, estimated: Estimate) -> Result:
    """A build beside what was predicted."""
    bottleneck = estimated.streams[0].bottleneck
    steady = measured.steady(bottleneck) if len(estimated.streams) == 1 else None
    rows = []
    for use in estimated.pools:
        if use.gpus:
            whole = measured.idle_share(use.title, use.actors, measured.up_s, measured.last_s)
            then = None if steady is None else measured.idle_share(use.title, use.actors, *steady)
            rows.append(Row(use.title, use.gpus, use.idle_share, whole, then))
    predicted_s = sum(each.wall_s for each in estimated.streams) - estimated.streams[0].startup_s
    return Result(rows, bottleneck, predicted_s, measured.last_s - measured.up_s)


class Mixed(NamedTuple):
    """A measurement.

    Attributes:
        folder: for sources and corpora.
        shrink: the paper's numbers of images, divided by the build's.
        speed: seconds of the paper's models, divided by the build's.
        shard: images of a unit.
        pools: GPUs of each model.
    """

    folder: Path
    shrink: float = 1_000
    speed: float = 0.5
    shard: int = 2
    pools: dict[str, int] = POOLS


def run_mixed(mixed: Mixed, engine: RayEngine, apart: bool) -> Result:
    """Build a pilot of a tenth, predict, build, and compare.

    Args:
        mixed: what is built.
        engine: on pretended GPUs.
        apart: build the subsets one after the other.
    """

    def prepared(name: str, shrink: float) -> tuple[BuildConfig, Sources]:
        sources = write_sources(mixed.folder / f"sources-{name}", shrink)
        return mixed_config(mixed.folder / name, sources, mixed.pools, mixed.speed, mixed.shard), sources

    pilot, _ = prepared("pilot", mixed.shrink * PILOT_SHARE)
    build(pilot, engine)
    config, sources = prepared("apart" if apart else "together", mixed.shrink)
    sizes = {subset: Size(number, number * MASKS[subset]) for subset, number in sources.images.items()}
    gpus = sum(mixed.pools.values())
    estimated = estimate_build(config, measure_rates(Path(pilot.out)), sizes, gpus=gpus, apart=apart)
    for subset in config.subsets if apart else [None]:
        only = config.subsets if subset is None else {subset: config.subsets[subset]}
        build(config.model_copy(update={"subsets": only}), engine)
    return compare(measure(Path(config.out), config), estimated)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="keep what is built here; default: it is deleted")
    parser.add_argument("--shrink", type=float, default=1_000, help="the paper's numbers of images, divided")
    parser.add_argument("--speed", type=float, default=0.5, help="seconds of the paper's models, divided")
    parser.add_argument("--shard", type=int, default=2, help="images of a unit")
    parser.add_argument("--apart", action="store_true", help="build the subsets one after the other")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        mixed = Mixed(folder, arguments.shrink, arguments.speed, arguments.shard)
        with pretended_gpus(sum(POOLS.values())) as engine:
            result = run_mixed(mixed, engine, arguments.apart)
        order = "one after the other" if arguments.apart else "side by side"
        print(
            f"(o) subsets {order}: predicted {result.predicted_s:.0f} s from the first start-up to the last "
            f"commit, took {result.took_s:.0f} s; bottleneck {result.bottleneck}\n{result.table()}"
        )


if __name__ == "__main__":
    main()
