"""Makes samples/model, by the toy world's recipe at a smaller size: configs/train/sample.yaml. Measures it.

    python -m benchmarks.sample_model             # draws the world, builds, trains, copies, measures: an hour
    python -m benchmarks.sample_model --measure   # measures the model that is in samples/model
    python -m benchmarks.sample_model --scenes    # draws samples/scenes
    python -m benchmarks.sample_model --ends      # how captions end, with and without `end_of_text_last`

The training goes on where it was stopped. What is measured goes into the model's card by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paracaption.model_training.decoding.read_regions import (
    PhotoRegions,
    iter_photo_regions,
    read_photo_regions,
)
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.scores import compare_decoding
from paracaption.schemas.decoding import DecodeOptions, Strategy

from .toy import FOLDER, HELD_OUT, ROOT, TRAINED, run_command, world

CONFIG = ROOT / "configs/train/sample.yaml"
MODEL, SCENES = ROOT / "samples/model", ROOT / "samples/scenes"
ENDS: list[tuple[Strategy, int, int]] = [
    ("threshold", 12, 12),
    ("per-region", 12, 12),
    ("per-region", 12, 3),
    ("per-region", 32, 8),
    ("remask", 12, 12),
]
"""Strategies, tokens and steps of `measure_ends`."""
DECODE = DecodeOptions(strategy="threshold", threshold=0.95, max_new_tokens=12, steps=12)


def make_model() -> None:
    """Train the model, or go on with it, and put it into the samples, next to its card."""
    world("train", TRAINED)
    run_command("train", CONFIG)
    MODEL.mkdir(exist_ok=True)
    for file in (FOLDER / "sample/model").iterdir():
        shutil.copyfile(file, MODEL / file.name)


def make_scenes() -> None:
    """Draw scenes whose contents no scene of the training has, whatever its seed."""
    drawn = FOLDER / "scenes"
    shutil.rmtree(drawn, ignore_errors=True)
    toy.write_world(drawn, 6, seed=1, options=toy.EASY, split="heldout").unlink()
    shutil.copytree(drawn, SCENES, dirs_exist_ok=True)


def measure() -> None:
    """Print how often the model is right, and how sure it is: of scenes like its own, and of photographs."""
    captioner = RegionCaptioner.load(MODEL, "cpu")
    scenes = list(iter_photo_regions(world("heldout", HELD_OUT)))
    for name, scores in compare_decoding(captioner, scenes, DECODE).items():
        print(f"{name}: {scores.exact:.1%} of {scores.regions:,} captions are exactly right")
        print("  wrong:", ", ".join(f"{each} {share:.1%}" for each, share in scores.wrong.items()))
    sure, right = (np.array(each) for each in zip(*_judged(captioner, scenes), strict=True))
    print(f"confidence on held-out scenes: mean {sure.mean():.4f}, median {np.median(sure):.4f}")
    for name, chosen in (("right", right), ("wrong", ~right)):
        if chosen.any():
            print(f"  of {chosen.sum():,} {name} captions: mean {sure[chosen].mean():.4f}")
    if right.any() and not right.all():
        above = (sure[right][:, None] > sure[~right]) + 0.5 * (sure[right][:, None] == sure[~right])
        print(f"  a right caption is surer than a wrong one in {above.mean():.1%} of all pairs")
        for least in (0.5, 0.8, 0.9, 0.95, 0.98):
            kept = sure >= least
            print(f"  at least {least}: {kept.mean():.1%} kept, {right[kept].mean():.1%} of them right")
    photos = list(iter_photo_regions(_photographs()))
    sure = np.concatenate([each.confidences for each in _captioned(captioner, photos)])
    print(f"confidence on {len(photos)} photographs, {len(sure)} regions: mean {sure.mean():.4f}")


def measure_ends(num_scenes: int = 60) -> None:
    """Print how long captions are and how many are right, with and without `end_of_text_last`."""
    folder = FOLDER / "ends"
    shutil.rmtree(folder, ignore_errors=True)
    toy.write_world(folder, num_scenes, seed=0, options=toy.EASY, split="heldout")
    truths = json.loads((folder / "captions.json").read_text())
    photos = [
        read_photo_regions(path, [folder / "panoptic.json"]) for path in sorted(folder.glob("photos/*"))
    ]
    true = [
        truths[Path(photo.name).stem][region.source.split()[-1]]
        for photo in photos
        for region in photo.regions
    ]
    captioner = RegionCaptioner.load(MODEL, "cpu")
    print(f"{len(true)} regions; their true captions have {_words(true):.2f} words")
    for strategy, tokens, steps in ENDS:
        options = DecodeOptions(strategy=strategy, threshold=0.95, max_new_tokens=tokens, steps=steps)
        for last in (False, True):
            chosen = options.model_copy(update={"end_of_text_last": last})
            found = captioner.caption_photos(((photo.pixels, photo.masks()) for photo in photos), chosen)
            said = [caption for each in found for caption in each.captions]
            right = sum(one == other for one, other in zip(said, true, strict=True)) / len(true)
            short = sum(len(one.split()) < len(other.split()) for one, other in zip(said, true, strict=True))
            print(
                f"{strategy}, {tokens} tokens in {steps} steps, {'last' if last else 'as usual'}: "
                f"{_words(said):.2f} words, {short / len(true):.1%} too short, {right:.1%} right, "
                f"{sum(each.forwards for each in found) / len(photos):.1f} forwards"
            )


def _words(captions: list[str]) -> float:
    return sum(len(each.split()) for each in captions) / len(captions)


def _photographs() -> Path:
    """The corpus of `paracaption demo`, built if it is not there."""
    out = ROOT / "out/demo"
    if not (out / "stats.json").exists():
        run_command("build", ROOT / "samples/build.yaml")
    return out


def _captioned(captioner: RegionCaptioner, photos: list[PhotoRegions]) -> list:
    return captioner.caption_photos(((photo.pixels, photo.masks()) for photo in photos), DECODE)


def _judged(captioner: RegionCaptioner, photos: list[PhotoRegions]) -> Iterator[tuple[float, bool]]:
    """Confidence of each caption, and whether it is exactly right."""
    for photo, found in zip(photos, _captioned(captioner, photos), strict=True):
        for region, caption, sure in zip(photo.regions, found.captions, found.confidences, strict=True):
            yield sure, caption == region.caption


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--scenes", action="store_true")
    parser.add_argument("--ends", action="store_true")
    args = parser.parse_args()
    if args.scenes:
        make_scenes()
        return
    if args.ends:
        measure_ends()
        return
    if not args.measure:
        make_model()
    measure()


if __name__ == "__main__":
    main()
