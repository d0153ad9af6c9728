"""The whole chain of SA-1B mask filters on a real image: masks as RLE against masks as boolean arrays.

    python benchmarks/mask_filters.py [sa_226381.json] [--runs N]

Both sides start from the RLEs of the annotation and end with a verdict per mask (reason, detail and
scores), and the verdicts are compared. The dense side is what one writes with numpy without cutting corners
or wasting work: each mask is decoded once, each pair is intersected once (`count_nonzero` of an `and` into
one buffer), and visibility is one pass from the top mask to the bottom. What limits it is memory traffic:
every pair reads two masks of one byte per pixel. What limits ours is stepping through the runs of the few
masks that overlap most others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from paracaption.filters import masks
from paracaption.filters.verdict import Verdict
from paracaption.schemas.config import Masks
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Region, Rle

SHARED = Path(__file__).resolve().parents[2] / "shared/data/sa1b_real/sa_226381.json"
AT_LEAST = 300


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("annotation", nargs="?", type=Path, default=SHARED, help="an SA-1B JSON")
    arguments.add_argument(
        "--runs", type=int, default=5, help="of the dense side; ours runs 20 times as often"
    )
    options = arguments.parse_args()
    regions, size = read(options.annotation)
    config = Masks()

    ours, ours_s = timed(lambda: chain(regions, size, config), 20 * options.runs)
    dense, dense_s = timed(lambda: dense_chain(regions, size, config), options.runs)
    assert ours == dense, [pair for pair in zip(ours, dense, strict=True) if pair[0] != pair[1]]

    ratio = dense_s / ours_s
    print(f"{options.annotation.name}: {len(regions)} masks at {size[1]}x{size[0]}, verdicts equal:")
    for reason, count in Counter(str(verdict.reason or "kept") for verdict in ours).most_common():
        print(f"  {count:4d} {reason}")
    print(f"boolean arrays {dense_s * 1e3:9.2f} ms (median of {options.runs})")
    print(f"RLE            {ours_s * 1e3:9.2f} ms (median of {20 * options.runs})")
    print(f"ratio          {ratio:9.0f}    (at least {AT_LEAST})")
    return 0 if ratio >= AT_LEAST else 1


def read(path: Path) -> tuple[list[Region], tuple[int, int]]:
    """The regions of an SA-1B annotation and the (height, width) of its image."""
    record = json.loads(path.read_text())
    regions = [
        Region(
            id=position,
            rle=Rle(tuple(mask["segmentation"]["size"]), mask["segmentation"]["counts"]),
            source_scores={name: mask[name] for name in ("predicted_iou", "stability_score")},
        )
        for position, mask in enumerate(record["annotations"])
    ]
    return regions, (record["image"]["height"], record["image"]["width"])


def timed(work: Callable[[], list[Verdict]], runs: int) -> tuple[list[Verdict], float]:
    """The result and the median seconds of some runs after one to warm up."""
    result = work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def chain(regions: list[Region], size: tuple[int, int], config: Masks) -> list[Verdict]:
    """What the recipe's two mask stages decide."""
    overlaps = masks.measure_overlaps(regions)
    first = masks.usable(regions, size, config, overlaps)
    live = [region for region, verdict in zip(regions, first, strict=True) if verdict.keep]
    second = iter(masks.whole_objects(live, size, config, overlaps))
    return [next(second) if verdict.keep else verdict for verdict in first]


def dense_chain(regions: list[Region], size: tuple[int, int], config: Masks) -> list[Verdict]:
    """The same decisions on boolean arrays."""
    count = len(regions)
    pixels = np.empty((count, *size), bool)
    for i, region in enumerate(regions):
        pixels[i] = coco.decode({"size": list(size), "counts": region.rle.counts})
    area = [int(np.count_nonzero(mask)) for mask in pixels]
    shared = np.zeros((count, count), np.int64)
    both = np.empty(size, bool)
    for i in range(count):
        for j in range(i + 1, count):
            np.logical_and(pixels[i], pixels[j], out=both)
            shared[i, j] = shared[j, i] = np.count_nonzero(both)

    verdicts: list[Verdict] = [Verdict()] * count
    best_first = sorted(
        range(count), key=lambda i: (*(-score for score in regions[i].source_scores.values()), -area[i], i)
    )
    live: list[int] = []
    for i in best_first:
        if area[i] < config.min_area_px:
            verdicts[i] = Verdict(
                Reason.MASK_TOO_SMALL, f"{area[i]} px, at least {config.min_area_px} needed"
            )
            continue
        iou, other = max(
            ((shared[i, j] / (area[i] + area[j] - shared[i, j]), j) for j in live),
            key=lambda pair: pair[0],
            default=(0.0, -1),
        )
        if iou >= config.duplicate_iou:
            detail = f"IoU {iou:.3f} with region {other}, has to be below {config.duplicate_iou:g}"
            verdicts[i] = Verdict(Reason.MASK_DUPLICATE, detail, {"duplicate_iou": float(iou)})
        else:
            live.append(i)

    top_first = sorted(live, key=lambda i: (area[i], -i))
    painted = np.zeros(size, bool)
    visible = {}
    for i in top_first:
        np.logical_and(pixels[i], painted, out=both)
        visible[i] = 1 - np.count_nonzero(both) / area[i]
        np.logical_or(painted, pixels[i], out=painted)
    seen = [i for i in top_first if visible[i] > config.min_visible_share]
    for i in set(live) - set(seen):
        detail = f"{visible[i]:.3f} visible, more than {config.min_visible_share:g} needed"
        verdicts[i] = Verdict(Reason.MASK_OCCLUDED, detail, {"visible_share": visible[i]})
    for i in seen:
        share, other = max(
            (
                (shared[i, j] / area[i], -j)
                for j in seen
                if area[i] <= config.part_max_area_ratio * area[j]
                and area[j] <= config.container_max_image_share * size[0] * size[1]
            ),
            default=(0.0, 1),
        )
        scores = {"visible_share": visible[i], "container_share": float(share)}
        if share >= config.part_container_share:
            detail = f"{share:.3f} inside region {-other}, has to be below {config.part_container_share:g}"
            verdicts[i] = Verdict(Reason.MASK_PART, detail, scores)
        else:
            verdicts[i] = Verdict(scores=scores)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
