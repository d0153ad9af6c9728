"""A build's time as `paracaption estimate` predicts it from a pilot of one tenth, against the time it takes.

    python -m benchmarks.estimate [--images 200]

Both are the real command in a process of its own: both subsets, the embedded backends, a Ray of its own. The
pilot builds the first tenth (`--limit-images`). Compared are the streams (start of Ray, actors and models,
all units) and the whole commands; the second prediction adds what the pilot's command took besides its
streams (imports, Prefect's server, planning, merging).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.corpus.utilization import list_runs
from paracaption.pipeline.executor.estimate.predict import estimate_build
from paracaption.pipeline.executor.estimate.rates import measure_rates
from paracaption.pipeline.executor.estimate.sizes import Size
from tests.synthetic import write_coconut, write_sa1b

SHARE = 10
SUBSETS = ("coconut", "sa1b")


def command(folder: Path, config: dict, *options: str) -> float:
    """Run `paracaption build`; returns its wall time."""
    path = folder / f"{Path(config['out']).name}.yaml"
    path.write_text(yaml.safe_dump(config))
    env = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "paracaption.flows.cli", "build", str(path), *options],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def streamed(out: Path) -> float:
    """Seconds from the start of Ray and of the streams to their ends. Subsets may share a stream."""
    runs = []
    for subset in SUBSETS:
        for run in list_runs(out)[subset]:
            events = {event.what: event for event in EventReader(run).new()}
            runs.append((events["begun"].time_s, events["ended"].time_s, events["ray"].seconds))
    total, until_s = 0.0, 0.0
    for begun_s, ended_s, ray_s in sorted(runs):
        if begun_s >= until_s:
            total += ray_s
        total += max(0.0, ended_s - max(begun_s, until_s))
        until_s = max(until_s, ended_s)
    return total


def cpu(out: Path) -> tuple[float, float]:
    """CPU seconds of all stages, and wall seconds in them for each: above 1 if others wanted the cores."""
    units = [
        event
        for subset in SUBSETS
        for run in list_runs(out)[subset]
        for event in EventReader(run).new()
        if event.what == "unit"
    ]
    used = sum(event.cpu for event in units)
    return used, sum(event.seconds for event in units) / used


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=200, help="of each subset; the pilot builds a tenth")
    parser.add_argument("--masks", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = (480, 640)
        base = {
            "images_per_shard": 5,
            "coconut": [write_coconut(folder / "coconut", arguments.images, arguments.masks, size)],
            "sa1b": [write_sa1b(folder / "sa1b", arguments.images, arguments.masks, size)],
        }
        tenth = arguments.images // SHARE
        pilot, full = folder / "pilot", folder / "full"
        pilot_s = command(folder, {**base, "out": str(pilot)}, "--limit-images", str(tenth))
        measured = measure_rates(pilot)
        config = load_config(folder / "pilot.yaml")
        sizes = {
            subset: Size(arguments.images, measured.subsets[subset].regions * SHARE) for subset in SUBSETS
        }
        cores = len(os.sched_getaffinity(0))
        estimated = estimate_build(config, measured, sizes, cpus=cores)
        full_s = command(folder, {**base, "out": str(full)})
        if os.environ.get("KEEP"):
            subprocess.run(["cp", "-r", name, os.environ["KEEP"]], check=True)
        actual = streamed(full)
        besides = pilot_s - streamed(pilot)
        print(
            f"pilot: {tenth} + {tenth} images, {pilot_s:.1f} s, of which {streamed(pilot):.1f} s in streams; "
            f"build: {arguments.images} + {arguments.images} images on {cores} cores"
        )
        for stream in estimated.streams:
            print(
                f"  {' and '.join(stream.subsets)}: {stream.wall_s:.1f} s, start-up "
                f"{stream.startup_s:.1f} s, bottleneck {stream.bottleneck}"
            )
        print(
            f"(e) streams: predicted {estimated.wall_s:.1f} s, took {actual:.1f} s: "
            f"ratio {estimated.wall_s / actual:.2f} (0.75 to 1.25)"
        )
        whole = estimated.wall_s + besides
        (used, waited), (_, pilot_waited) = cpu(full), cpu(pilot)
        expected = sum(subset.cpu_s for subset in estimated.subsets)
        print(
            f"    CPU seconds of the stages: predicted {expected:.1f}, took {used:.1f}: ratio "
            f"{expected / used:.2f}; wall seconds for each: pilot {pilot_waited:.2f}, build {waited:.2f}"
        )
        print(f"    whole command: predicted {whole:.1f} s, took {full_s:.1f} s: ratio {whole / full_s:.2f}")


if __name__ == "__main__":
    main()
