"""A folder of photos, captioned by batches and in a stream: photos per second, steps, and the same captions.

200 drawn scenes with 2 to 6 regions, the model in samples/, the strategy `threshold`, whose captions end
after different numbers of steps: at 0.999 after 2 to 8. "By batches" is how photos were captioned before
there was a stream: 8 are read and laid out, and decoded until the slowest of them has ended. "Stream" is what
`paracaption caption --out` does.

    python -m benchmarks.photos                         # 200 photos, three turns
    python -m benchmarks.photos --photos 40 --turns 1   # quicker
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from paracaption.model_training.decoding import loop as loop_module
from paracaption.model_training.decoding import sampler
from paracaption.model_training.decoding.caption_folder import PhotoTask, find_photos
from paracaption.model_training.decoding.read_regions import read_photo_regions
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.model.batch import collate
from paracaption.model_training.toy import world as toy
from paracaption.schemas.decoding import DecodeOptions

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = DecodeOptions(strategy="threshold", threshold=0.999, max_new_tokens=12, steps=12)
ROWS = 8

Captions = list[list[str]]


class Measured(NamedTuple):
    """A turn: captions, seconds by the clock and of the CPU, steps, and the sum of their rows at work."""

    captions: Captions
    seconds: float
    cpu_s: float
    steps: int
    busy_rows: int


def make_folder(folder: Path, count: int) -> None:
    """Draw scenes: `photos/STEM.jpg`, and `masks/STEM/` with a PNG for each region."""
    toy.write_world(folder, count, seed=1, options=toy.EASY, split="heldout")
    for photo in sorted((folder / "photos").iterdir()):
        (folder / "masks" / photo.stem).mkdir(parents=True)
        for number, mask in enumerate(read_photo_regions(photo, [folder / "panoptic.json"]).masks()):
            Image.fromarray(mask).save(folder / "masks" / photo.stem / f"{number}.png")


def by_batches(captioner: RegionCaptioner, tasks: list[PhotoTask]) -> Iterator[list[str]]:
    """Read, lay out and decode so many photos at a time; none has more regions than one sequence can."""
    decoder = sampler.Decoder(captioner.model)
    left = iter(tasks)
    while some := list(islice(left, ROWS)):
        photos = [task.read() for task in some]
        made = [
            captioner.processor.make_example(each.pixels, each.masks(), OPTIONS.max_new_tokens)
            for each in photos
        ]
        found = decoder.decode(collate(made), OPTIONS)
        for example, tokens_NS in zip(made, found.tokens_BNS, strict=True):
            yield captioner.processor.read_captions(tokens_NS[: len(example.order)].numpy(), example.order)


def in_a_stream(captioner: RegionCaptioner, tasks: list[PhotoTask]) -> Iterator[list[str]]:
    """Caption photos as the command does."""
    photos = (task.read() for task in tasks)
    pairs = ((photo.pixels, photo.masks()) for photo in photos)
    for found in captioner.iter_captions(pairs, OPTIONS, batch_size=ROWS):
        yield found.captions


def measure(run: Callable[[], Iterator[list[str]]]) -> Measured:
    """Caption all photos once."""
    busy: list[int] = []
    launch = loop_module.Loop.launch

    def counted(loop: loop_module.Loop) -> None:
        busy.append(int(np.count_nonzero(loop.open_RN.any(1))))
        launch(loop)

    with mock.patch.object(loop_module.Loop, "launch", counted):
        start, cpu_start = time.perf_counter(), time.process_time()
        captions = list(run())
        spent = time.perf_counter() - start, time.process_time() - cpu_start
    return Measured(captions, *spent, len(busy), sum(busy))


def report(name: str, turns: list[Measured]) -> None:
    """Print the medians of some turns."""
    photos, first = len(turns[0].captions), turns[0]
    rate, cpu_rate = (
        photos / statistics.median(getattr(turn, what) for turn in turns) for what in ("seconds", "cpu_s")
    )
    print(
        f"{name}: {rate:.1f} photos a second, {cpu_rate:.1f} a second of the CPU; {first.steps:,} steps, "
        f"{first.busy_rows / first.steps:.2f} of {ROWS} rows at work"
    )


def main() -> int:
    """Measure both ways in turn; 1 if a caption differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    count = given.photos
    captioner = RegionCaptioner.load(ROOT / "samples/model", "cpu")
    folder = Path(tempfile.mkdtemp(prefix="photos-"))
    try:
        make_folder(folder, count)
        tasks = find_photos(str(folder / "photos"), str(folder / "masks"))
        ways = {"by batches": by_batches, "stream": in_a_stream}
        turns: dict[str, list[Measured]] = {name: [] for name in ways}
        for way in ways.values():
            measure(lambda way=way: way(captioner, tasks[: 2 * ROWS]))  # a warm-up
        for _ in range(given.turns):
            for name, way in ways.items():
                turns[name].append(measure(lambda way=way: way(captioner, tasks)))
    finally:
        shutil.rmtree(folder)
    regions = sum(map(len, turns["stream"][0].captions))
    print(f"{count} photos, {regions} regions, {torch.get_num_threads()} threads")
    for name, measured in turns.items():
        report(name, measured)
    ratios = [a.cpu_s / b.cpu_s for a, b in zip(turns["by batches"], turns["stream"], strict=True)]
    print(f"the stream is {statistics.median(ratios):.2f} times as fast, by seconds of the CPU")
    pairs = zip(tasks, *(each[0].captions for each in turns.values()), strict=True)
    differ = [task.name for task, one, other in pairs if one != other]
    print(f"photos whose captions differ: {len(differ)} {' '.join(differ)}")
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
