"""From photos to shards on a GPU: `paracaption build` with GAR, Qwen3 and SAM 3 at tiny size.

The SA-1B images of `samples/`, whose stages use all three models. It shows that the whole stream runs on the
device, engines and Ray included; tiny models say nothing about speed. The floor is the time inside calls to
the model that takes longest: the stream cannot be faster.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.rows import Measured, Rows

ROOT = Path(__file__).resolve().parents[2]
SHARES = {"captioner": 0.4, "judge": 0.3, "segmenter": 0.3}
"""Of the GPU, for Ray."""

MEMORY = {"captioner": 0.2, "judge": 0.2}
"""Of the GPU's memory, for vLLM."""


def run(rows: Rows, machine: Machine) -> None:
    """One build."""
    with tempfile.TemporaryDirectory() as folder:
        rows.measure("SA-1B samples", lambda: _build(Path(folder), machine), needs_s=20)


def config_of(folder: Path, machine: Machine) -> dict[str, Any]:
    """The build's configuration; the three models share the device."""
    import yaml

    from tests.tiny.backends import ACCEPT_ALL, write_backends

    config = yaml.safe_load((ROOT / "samples/build.yaml").read_text())
    del config["subsets"]["coconut"]
    source = config["subsets"]["sa1b"]["sources"]
    source["paths"] = [str(ROOT / "samples" / path) for path in source["paths"]]
    backends = write_backends(folder)
    if machine.device.type == "cuda":
        for name, backend in backends.items():
            backend["num_gpus"] = SHARES[name]
            if name in MEMORY:
                engine = {"enforce_eager": True, "gpu_memory_utilization": MEMORY[name]}
                backend["options"]["engine"] = engine
        backends["captioner"]["options"]["dtype"] = "bfloat16"
    for backend in backends.values():
        backend["concurrency"] = [1, 1]
    return config | backends | ACCEPT_ALL | {"out": str(folder / "out")}


def _build(folder: Path, machine: Machine) -> Measured:
    import yaml

    from paracaption.pipeline.corpus.events import EventReader
    from paracaption.pipeline.corpus.utilization import UtilizationCounter

    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(config_of(folder, machine)))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "paracaption.flows.cli", "build", str(path)], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    out = folder / "out"
    counter = UtilizationCounter()
    images = regions = 0
    for run_folder in sorted((out / "events").iterdir()):
        for worker, event in EventReader(run_folder).named():
            counter.add(worker, event)
            if event.what == "committed":
                images, regions = images + event.images, regions + event.regions
    stages = counter.stages()
    busy_s = {f"{name}_s": stage.busy_s for name, stage in stages.items()}
    floor_s = max([*busy_s.values(), 0.0])
    numbers = {
        "seconds": seconds,
        "images": images,
        "regions": regions,
        "shards": len(list(out.glob("*/shards/*.tar"))),
        **busy_s,
    }
    roofline = {"floor_s": floor_s, "bound": "the busiest model", "share": floor_s / seconds}
    return Measured(f"{images} images, {regions} regions in {seconds:.0f} s", numbers, roofline)
