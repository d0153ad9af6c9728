"""The training loader alone, on one core, against bare JPEG decode and resize of the same photos.

    python -m benchmarks.loader                     # photos of noise shapes in the sizes of COCO and SA-1B
    python -m benchmarks.loader --photos FOLDER     # JPEGs of a folder
    python -m benchmarks.loader --plan 10000000     # seconds and memory to plan an epoch of so many images

A sample is a group of an image's regions. The bare side decodes the photo and stretches it with Pillow's
bicubic to the same tiles and thumbnail for each sample; the loader also reads the shard, decodes and marks
the masks, tokenizes, lays out and packs. Both take the samples in the same order.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageDraw

from benchmarks.decoder import SPECIAL
from paracaption.filters import rle
from paracaption.model_training.data.epoch_plan import EpochPlan, Mixture, count_batches
from paracaption.model_training.data.loader import Loader
from paracaption.model_training.model import tiling
from paracaption.model_training.model.config import PerceptionDLMConfig
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.pipeline.corpus import writer
from paracaption.schemas.records import Blob, ImageRecord, Region
from paracaption.schemas.training import CorpusSource, DataOptions

SIZES = {"coco": (640, 480), "sa1b": (2250, 1500)}
REGIONS = {"coco": 9, "sa1b": 40}
WANTED = 0.7
CAPTION = "A small red cup with a white handle stands at the left edge of the wooden table, "
CAPTION += "half hidden behind an open book with a torn cover."


def processor() -> PerceptionDLMProcessor:
    """The published model's sizes; a tokenizer of bytes and words."""
    from tests.tiny.perceptiondlm_model import byte_tokenizer, tiny_config

    tokenizer = byte_tokenizer()
    special = {name: getattr(tiny_config(tokenizer), name) for name in (*SPECIAL,)}
    return PerceptionDLMProcessor(tokenizer, PerceptionDLMConfig(**special))


def draw(size: tuple[int, int], regions: int, seed: int) -> tuple[bytes, list[np.ndarray]]:
    """A photo of soft noise and ellipses, as a JPEG of a photo's size in bytes, and the ellipses' masks."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    masks = []
    for _ in range(regions):
        mask = Image.new("L", size)
        width, height = (int(side * random.uniform(0.05, 0.5)) for side in size)
        x, y = random.integers(0, size[0] - width), random.integers(0, size[1] - height)
        ImageDraw.Draw(mask).ellipse((x, y, x + width, y + height), fill=1)
        masks.append(np.array(mask, bool))
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=85)
    return data.getvalue(), masks


def write(out: Path, photos: list[tuple[bytes, list[np.ndarray]]]) -> None:
    """Commit one unit with the pipeline's own writer."""
    folder = out / "coconut"
    writer.prepare(folder)
    (out / "photos").mkdir()
    images = []
    for number, (data, masks) in enumerate(photos):
        path = out / "photos" / f"{number}.jpg"
        path.write_bytes(data)
        regions = []
        for region, mask in enumerate(masks):
            found = rle.from_mask(mask)
            regions.append(Region(region, found.rle, found.bbox, found.area, caption=CAPTION))
        height, width = masks[0].shape
        image = ImageRecord(
            f"image_{number}", "coconut", Blob(str(path)), width, height, "jpeg", path.name, regions
        )
        images.append(image)
    writer.commit(folder, writer.write_unit(folder, "coconut-000000", images, "plan", "recipe"))


def bare(data: bytes, tile: int, most: int) -> list[np.ndarray]:
    """Decode and stretch, no more."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    grid = tiling.tile_grid(*image.size, tile, most)
    sizes = [(grid[0] * tile, grid[1] * tile)] + [(tile, tile)] * (grid != (1, 1))
    return [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes]


def measure(photos: list[tuple[bytes, list[np.ndarray]]], most: int) -> dict[str, float]:
    """Seconds a sample of both sides, interleaved batch by batch so that a busy machine hits both alike."""
    made = processor()
    tower = made.config.vision_config
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "out", photos)
        options = DataOptions(max_tokens=8192, workers=0, cache=f"{folder}/cache")
        loader = Loader([CorpusSource(corpus=f"{folder}/out")], made, options)
        ratios, ours, theirs, samples, fill = [], 0.0, 0.0, 0, []
        start = time.process_time()
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            spent = time.process_time() - start
            start = time.process_time()
            for key in batch.keys:
                bare(
                    photos[int(key.partition("#")[0].rpartition("_")[2])][0],
                    tower.image_size,
                    made.config.max_tiles,
                )
            alone = time.process_time() - start
            if samples:  # the first is a warm-up
                ratios.append(alone / spent)
                ours, theirs = ours + spent, theirs + alone
            samples += len(batch.keys)
            fill.append(batch.tokens.ids_BL.shape[1] / 8192)
            if samples >= most:
                break
            start = time.process_time()
        counted = samples * (len(ratios) / (len(ratios) + 1))
    return {
        "samples": samples,
        "ours_per_s": counted / ours,
        "bare_per_s": counted / theirs,
        "ratio": theirs / ours,
        "median_ratio": statistics.median(ratios),
        "fill": statistics.mean(fill),
    }


def profile(photos: list[tuple[bytes, list[np.ndarray]]]) -> None:
    """Print where the loader's time goes."""
    import cProfile
    import pstats

    with cProfile.Profile() as watched:
        measure(photos, 60)
    pstats.Stats(watched).sort_stats("tottime").print_stats(25)


def plan(images: int) -> None:
    """Print what it takes to order and cut an epoch of a corpus of so many images, 1 to 7 views each."""

    class Source:
        fingerprint = ""

        def __init__(self) -> None:
            self.num_items = 2 * images
            self.views = np.random.default_rng(0).integers(1, 8, images).astype(np.uint8)

        def lengths(self, items: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            views = self.views[items // 2].astype(np.int64)
            return 120 + views * 256, np.full(len(items), 120)

    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter()
    mixture = Mixture([Source()], [1.0], 0)
    found = EpochPlan(mixture, DataOptions(), 0, count_batches(mixture, DataOptions(), 0))
    spent = time.perf_counter() - start
    grown = (process.memory_info().rss - before - images) / 1e6
    start = time.perf_counter()
    found.batch(found.num_batches // 2)
    one = time.perf_counter() - start
    print(
        f"{images:,} images, {found.num_items:,} groups: planned in {spent:.1f} s with {grown:.0f} MB; "
        f"a batch in the middle in {one * 1e3:.1f} ms"
    )


def main() -> int:
    """Run what the arguments ask for; 1 if the loader is slower than wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--plan", type=int, metavar="IMAGES")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.plan:
        plan(arguments.plan)
        return 0
    sets: dict[str, Any] = {}
    if arguments.photos:
        sizes = {path: Image.open(path).size for path in sorted(arguments.photos.rglob("*.jpg"))}
        found = [path for path, size in sizes.items() if min(size) >= 100][:24]
        if not found:
            parser.error(f"{arguments.photos}: no *.jpg of 100 pixels or more a side in it")
        pairs = [(path.read_bytes(), draw(sizes[path], 12, i)[1]) for i, path in enumerate(found)]
        sets[str(arguments.photos)] = pairs
    else:
        for name, size in SIZES.items():
            sets[name] = [draw(size, REGIONS[name], seed) for seed in range(12 if name == "coco" else 5)]
    fine = True
    for name, photos in sets.items():
        if arguments.profile:
            profile(photos)
            continue
        found = measure(photos, arguments.samples)
        fine &= found["ratio"] >= WANTED
        print(
            f"{name}: {found['samples']:.0f} samples; loader {found['ours_per_s']:.1f}, "
            f"bare decode and resize {found['bare_per_s']:.1f} samples/s/core: "
            f"{found['ratio']:.2f} of it (median of batches {found['median_ratio']:.2f}, wanted {WANTED})"
        )
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
