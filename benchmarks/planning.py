"""Planning 417,000 images (334k COCONut with 3.4M segments, 83k SA-1B in tars) of which 90% are committed.

    python -m benchmarks.planning [--share 1.0]

The time and the memory to find out what is left, when the plan is there (a resume) and when it is not (a
first run). The sources are real in layout and empty in content: planning reads lists and headers only.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from paracaption.pipeline.corpus import work_list, work_list_summary, writer
from paracaption.pipeline.corpus.pending import find_pending_units
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas import manifest as manifests
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.manifest import FileEntry, Manifest

COCONUT_IMAGES, SEGMENTS_EACH, SA1B_IMAGES, IMAGES_PER_TAR = 334_000, 10, 83_000, 11_186
COMMITTED = 0.9


def write_sources(root: Path, share: float) -> dict:
    """Both subsets' lists: a panoptic JSON with folders of empty files, and tars of empty members."""
    num_coconut, num_sa1b = int(COCONUT_IMAGES * share), int(SA1B_IMAGES * share)
    (root / "photos").mkdir(parents=True)
    (root / "labels").mkdir()
    images, annotations = [], []
    for i in range(num_coconut):
        name = f"{i:012d}"
        (root / "photos" / f"{name}.jpg").touch()
        (root / "labels" / f"{name}.png").touch()
        images.append({"id": i, "file_name": f"{name}.jpg", "height": 480, "width": 640})
        segments = [
            {
                "id": 1 + k,
                "category_id": 1 + k,
                "iscrowd": 0,
                "isthing": 1,
                "area": 1000 + k,
                "bbox": [k, k, 90, 90],
            }
            for k in range(SEGMENTS_EACH)
        ]
        annotations.append({"image_id": i, "file_name": f"{name}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": []}
    (root / "panoptic.json").write_text(json.dumps(content))
    for number, first in enumerate(range(0, num_sa1b, IMAGES_PER_TAR)):
        with tarfile.open(root / f"sa_{number:06d}.tar", "w") as tar:
            for i in range(first, min(first + IMAGES_PER_TAR, num_sa1b)):
                for ending in ("jpg", "json"):
                    info = tarfile.TarInfo(f"./sa_{i}.{ending}")
                    info.size = 1
                    tar.addfile(info, io.BytesIO(b"x"))
    return {
        "coconut": [
            {
                "annotations": [str(root / "panoptic.json")],
                "labels": str(root / "labels"),
                "photos": [str(root / "photos")],
            }
        ],
        "sa1b": [{"paths": [str(root / "sa_*.tar")]}],
    }


def pending(config: BuildConfig) -> tuple[int, int]:
    """(images, pending units) of both subsets: what a build does before it starts."""
    num_images = left = 0
    for subset in config.subsets:
        folder = Path(config.out) / subset
        writer.prepare(folder)
        planned = work_list.make_work_list(open_source(config, subset), config, folder)
        left += len(find_pending_units(planned, "recipe"))
        num_images += planned.num_images
    return num_images, left


def commit_most(config: BuildConfig) -> None:
    """Write the manifests of nine units in ten."""
    for subset in config.subsets:
        folder = Path(config.out) / subset
        planned = work_list_summary.load_work_list(folder)
        for index in range(int(planned.num_units * COMMITTED)):
            entries = work_list_summary.read_unit(folder, index)
            unit = planned.unit_name(index)
            entry = FileEntry(f"ledger/{unit}.parquet", 1, "0" * 64)
            kept = {e.key: SEGMENTS_EACH for e in entries}
            total = SEGMENTS_EACH * len(entries)
            record = Manifest(
                unit, subset, planned.digest, "recipe", entry, entry, kept, total, total, {}, {}
            )
            (folder / "manifests" / f"{unit}.json").write_bytes(manifests.encode(record))


def peak_gb() -> float:
    """This program's peak of resident memory, mapped files included; `ru_maxrss` has its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0, help="of the full size")
    parser.add_argument(
        "--config", help="measure one planning of this configuration (used by the run itself)"
    )
    arguments = parser.parse_args()
    if arguments.config:
        start = time.perf_counter()
        num_images, left = pending(BuildConfig.model_validate_json(arguments.config))
        seconds = time.perf_counter() - start
        peak = peak_gb()
        print(f"{num_images:,} images, {left} units pending: {seconds:.1f} s, {peak:.2f} GB")
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = BuildConfig.model_validate(
            {"out": str(root / "out"), **write_sources(root / "source", arguments.share)}
        )
        command = [sys.executable, "-m", "benchmarks.planning", "--config", config.model_dump_json()]
        for title in ("first planning", "(c) resume with 90% committed (under 10 s and 1 GB)"):
            print(
                f"{title}: "
                f"{subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"
            )
            commit_most(config)


if __name__ == "__main__":
    main()
