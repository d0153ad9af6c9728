"""Regions per second of the whole stream with instant models, against a bare loop of the same I/O.

    python -m benchmarks.stream [--images 2000]

The bare loop is one process: it reads the same PNGs and JSON, makes RLEs with pycocotools one segment at a
time, and writes the same tar members. The stream does that on Ray, with captions, verdicts, evidence,
ledgers, checksums and manifests on top. Both are given as regions per second and core, the stream's from the
moment all its actors are up; the start of Ray and of the actors is counted apart.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from pycocotools import mask as coco

import paracaption.flows  # noqa: F401 - switches telemetry off
from paracaption.pipeline.corpus.events import EventReader
from paracaption.pipeline.executor.ray_data import RayEngine
from tests.building import build, config_of
from tests.synthetic import write_coconut


def bare_loop(source: dict, target: Path) -> int:
    """The same photos, masks and records, with nothing around it. Returns the number of regions."""
    content = json.loads(Path(source["annotations"][0]).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    photos = {image["id"]: image for image in content["images"]}
    regions = 0
    with tarfile.open(target, "w") as tar:
        for annotation in content["annotations"]:
            image = photos[annotation["image_id"]]
            rgb = np.array(Image.open(Path(source["labels"]) / annotation["file_name"]), dtype=np.uint32)
            labels = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
            record = {
                "key": image["file_name"][:-4],
                "width": image["width"],
                "height": image["height"],
                "regions": [],
            }
            for segment in annotation["segments_info"]:
                rle = coco.encode(np.asfortranarray(labels == segment["id"]))
                record["regions"].append(
                    {
                        "rle": {"size": rle["size"], "counts": rle["counts"].decode()},
                        "bbox": coco.toBbox(rle).tolist(),
                        "area": int(coco.area(rle)),
                        "category": names[segment["category_id"]],
                    }
                )
                regions += 1
            photo = (Path(source["photos"][0]) / image["file_name"]).read_bytes()
            for ending, data in (("jpg", photo), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{record['key']}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return regions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--masks", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ratios, cpu_ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_coconut(root / "source", arguments.images, arguments.masks, size=(480, 640))
        start = time.perf_counter()
        config = config_of(
            root / "out",
            coconut=source,
            images_per_shard=100,
            io={"num_cpus": 0.1, "concurrency": [cores, cores]},
        )
        engine = RayEngine()
        engine.start(config)
        print(f"Ray's start: {time.perf_counter() - start:.1f} s")
        for repeat in range(arguments.repeats):
            start, start_cpu = time.perf_counter(), time.process_time()
            regions = bare_loop(source, root / "bare.tar")
            bare = regions / (time.perf_counter() - start)
            bare_cpu = regions / (time.process_time() - start_cpu)
            out = root / f"out{repeat}"
            fresh = config.model_copy(update={"out": str(out)})
            start = time.perf_counter()
            with CpuMeter(out / "events", cores) as meter:
                done = build(fresh, engine)["coconut"]
            whole_s = time.perf_counter() - start
            assert done.kept == regions, f"the stream kept {done.kept} of {regions} regions"
            steady, num_regions = steady_rate(out)
            ratios.append(steady / cores / bare)
            cpu_ratios.append(num_regions / meter.seconds / bare_cpu)
            print(
                f"bare loop {bare:,.0f} regions/s; "
                f"stream {steady / cores:,.0f} regions/s and core on {cores} cores: "
                f"ratio {ratios[-1]:.2f}; per CPU second of all processes {cpu_ratios[-1]:.2f}; "
                f"the actors' start counted in ({whole_s:.1f} s in all): "
                f"{regions / whole_s / cores / bare:.2f}"
            )
    print(
        f"(a) stream / bare loop, per core: median {statistics.median(ratios):.2f} by the clock, "
        f"{statistics.median(cpu_ratios):.2f} by CPU seconds (at least 1)"
    )


def steady_rate(out: Path) -> tuple[float, int]:
    """(regions per second, regions) of the units begun once all workers were up, until the last commit."""
    events = [event for run in (out / "events").iterdir() for event in EventReader(run).new()]
    ready_s = max(event.time_s for event in events if event.what == "ready")
    begun = [
        e for e in events if e.stage == "source" and e.what == "unit" and e.time_s - e.seconds >= ready_s
    ]
    last_s = max(event.time_s for event in events if event.what == "committed")
    num_regions = sum(event.regions for event in begun)
    return num_regions / (last_s - ready_s), num_regions


class CpuMeter:
    """CPU seconds of this process and of all Ray processes, from the moment that all workers are up.

    The time is the kernel's accounting, so other jobs on the machine do not count.
    """

    def __init__(self, events: Path, num_workers: int):
        self.events, self.num_workers = events, num_workers
        self.seconds = 0.0

    def __enter__(self) -> CpuMeter:
        self.up = 0.0
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()
        return self

    def _wait(self) -> None:
        while (
            sum(b'"ready"' in path.read_bytes() for path in self.events.glob("*/*.jsonl")) < self.num_workers
        ):
            time.sleep(0.05)
        self.up = self._total()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        self.thread.join()
        self.seconds = self._total() - self.up

    @staticmethod
    def _total() -> float:
        me = psutil.Process()
        times = [process.cpu_times() for process in [me, *me.children(recursive=True)]]
        return sum(used.user + used.system for used in times)


if __name__ == "__main__":
    main()
