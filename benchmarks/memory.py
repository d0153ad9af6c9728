"""Peak memory of the driver and of the workers, at 2,000 and at 20,000 images.

    python -m benchmarks.memory [--images 2000 20000]

Each size is built in a process of its own. Memory is what a process holds for itself (USS), sampled five
times a second; for the workers it is the sum over all actor processes at its highest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

import paracaption.flows  # noqa: F401 - switches telemetry off
from tests.building import build, config_of
from tests.synthetic import write_coconut

DISTINCT = 200


def source_of(root: Path, num_images: int) -> dict:
    """A release of `num_images` images whose files are links to 200 distinct scenes."""
    source = write_coconut(root, DISTINCT, num_masks=10, size=(120, 160))
    path = Path(source["annotations"][0])
    content = json.loads(path.read_text())
    for i in range(DISTINCT, num_images):
        name, original = f"{i:012d}", f"{i % DISTINCT:012d}"
        os.link(root / "photos" / f"{original}.jpg", root / "photos" / f"{name}.jpg")
        os.link(root / "labels" / f"{original}.png", root / "labels" / f"{name}.png")
        content["images"].append({**content["images"][i % DISTINCT], "id": i, "file_name": f"{name}.jpg"})
        content["annotations"].append(
            {**content["annotations"][i % DISTINCT], "image_id": i, "file_name": f"{name}.png"}
        )
    path.write_text(json.dumps(content))
    return source


class Sampler(threading.Thread):
    """Samples this process and its Ray actors until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = self.workers = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.stopped.wait(0.2):
            self.driver = max(self.driver, me.memory_full_info().uss)
            total = 0
            for process in psutil.process_iter(["cmdline"]):
                if any("MapWorker" in part for part in process.info["cmdline"] or ()):
                    try:
                        total += process.memory_full_info().uss
                    except psutil.NoSuchProcess:
                        continue
            self.workers = max(self.workers, total)


def measure(num_images: int) -> None:
    """Build once and print the peaks as JSON."""
    from paracaption.pipeline.executor.ray_data import RayEngine

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = source_of(root / "source", num_images)
        config = config_of(root / "out", coconut=source, images_per_shard=200)
        engine = RayEngine()
        engine.start(config)
        sampler = Sampler()
        sampler.start()
        start = time.perf_counter()
        done = build(config, engine)["coconut"]
        seconds = time.perf_counter() - start
        sampler.stopped.set()
        sampler.join()
        assert done.kept == 10 * num_images
        peaks = {"driver": sampler.driver, "workers": sampler.workers, "seconds": seconds}
        print(json.dumps(peaks), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--one", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.images[0])
        return
    peaks = []
    for num_images in arguments.images:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", "--images", str(num_images)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(result.stdout.splitlines()[-1]))
        mb = {name: peaks[-1][name] / 1e6 for name in ("driver", "workers")}
        print(
            f"{num_images:,} images: driver {mb['driver']:.0f} MB, workers {mb['workers']:.0f} MB, "
            f"{peaks[-1]['seconds']:.0f} s"
        )
    for name in ("driver", "workers"):
        print(f"(d) {name}: ratio {peaks[-1][name] / peaks[0][name]:.2f} (at most 1.3)")


if __name__ == "__main__":
    main()
