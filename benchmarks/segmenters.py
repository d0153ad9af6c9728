"""The segmenters against one full forward per region, as the published examples have it.

    python -m benchmarks.segmenters [--device cuda --published] [--regions 16] [--phrases 8]

Same random weights, same dtype, same photo, both sides end with RLEs, and the masks are compared. At tiny
size on a CPU what is saved is mostly calls; at the published sizes it is the image encoder. Thresholds are
set so that a phrase finds about three objects, as a trained model does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from paracaption.filters import rle
from paracaption.pipeline.models.masks import products_in
from paracaption.pipeline.models.sam import SamSegmenter
from paracaption.pipeline.models.sam3 import Sam3Segmenter
from paracaption.schemas.records import Rle
from tests.synthetic import scene
from tests.tiny.sam import write_sam, write_sam3

WORDS = ["cat", "dog", "person", "red car", "tree", "wooden table", "cup", "street lamp", "bird", "hat"]
AT_LEAST = 2.0
INSTANCES = 3
Masks = list[list[Rle]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--published", action="store_true", help="SAM 3 and SAM ViT-H at their real sizes")
    parser.add_argument("--only", choices=["sam", "sam3"])
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument("--phrases", type=int, default=8, help="different ones among the regions")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], help="height and width of the photo")
    options = parser.parse_args()
    photo = scene(0, 9, tuple(options.size))[0]
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.6, (options.regions, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.4, corners.shape)], axis=1)
    boxes = np.floor(boxes * np.tile(photo.shape[1::-1], 2)).astype(np.float32)
    phrases = [WORDS[i % min(options.phrases, len(WORDS))] for i in range(options.regions)]
    bad = 0
    for name, compare in (("sam3", compare_sam3), ("sam", compare_sam)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                segmenter, ours, theirs = compare(Path(folder), options, photo, phrases, boxes)
                bad += report(name, segmenter, ours, theirs, options)
    return int(bad > 0)


def compare_sam3(
    folder: Path, options: Any, photo: np.ndarray, phrases: list[str], boxes: np.ndarray
) -> tuple[Any, Callable[[], Masks], Callable[[], Masks]]:
    import torch
    from PIL import Image

    write_sam3(folder, published=options.published)
    segmenter = Sam3Segmenter(model=str(folder), device=options.device, threshold=0)
    scores = [candidate.score for candidate in segmenter.segment(photo, ["cat"], boxes[:1])[0]]
    threshold = sorted(scores)[-INSTANCES - 1]
    segmenter.options = msgspec.structs.replace(segmenter.options, threshold=threshold)
    model, processor = segmenter.model, segmenter.processor
    image = Image.fromarray(photo)

    def one_by_one() -> Masks:
        found = []
        for phrase in phrases:
            inputs = processor(images=image, text=phrase, return_tensors="pt").to(segmenter.device)
            with torch.no_grad(), products_in(segmenter.device, segmenter.dtype):
                outputs = model(**inputs)
            for name in ("pred_masks", "pred_logits", "presence_logits"):
                outputs[name] = outputs[name].float()
            [result] = processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=[photo.shape[:2]]
            )
            order = result["scores"].argsort(descending=True, stable=True).tolist()
            masks = result["masks"].cpu().numpy()
            found.append([rle.from_mask(masks[i]).rle for i in order if masks[i].any()])
        return found

    return segmenter, lambda: masks_of(segmenter.segment(photo, phrases, boxes)), one_by_one


def compare_sam(
    folder: Path, options: Any, photo: np.ndarray, phrases: list[str], boxes: np.ndarray
) -> tuple[Any, Callable[[], Masks], Callable[[], Masks]]:
    import torch
    from segment_anything import SamPredictor, build_sam_vit_h

    if options.published:
        path = folder / "sam_vit_h_4b8939.pth"
        torch.manual_seed(0)
        torch.save(build_sam_vit_h().state_dict(), path)
    else:
        path = write_sam(folder)
    segmenter = SamSegmenter(model=str(path), device=options.device)
    predictor = SamPredictor(segmenter.model)
    limits = np.tile(photo.shape[1::-1], 2)

    def one_by_one() -> Masks:
        found = []
        for box in np.minimum(boxes, limits):
            with products_in(segmenter.device, segmenter.dtype):
                predictor.set_image(photo)
            predictor.features = predictor.features.float()  # pyright: ignore[reportOptionalMemberAccess]
            masks, _, _ = predictor.predict(
                box=np.concatenate([box[:2], box[2:] - 1]), multimask_output=False
            )
            found.append([rle.from_mask(np.asarray(mask)).rle for mask in masks if mask.any()])
        return found

    return segmenter, lambda: masks_of(segmenter.segment(photo, phrases, boxes)), one_by_one


def masks_of(found: list[list[Any]]) -> Masks:
    return [[candidate.rle for candidate in candidates] for candidates in found]


def report(
    name: str, segmenter: Any, ours: Callable[[], Masks], theirs: Callable[[], Masks], options: Any
) -> int:
    """Time both sides and print; returns 1 if the ratio falls short."""
    import torch

    cuda = segmenter.device.type == "cuda"

    def timed(work: Callable[[], Masks]) -> tuple[Masks, float]:
        result, seconds = work(), []
        for _ in range(options.runs):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = work()  # ends with masks on the CPU, so nothing is left running
            seconds.append(time.perf_counter() - start)
        return result, statistics.median(seconds)

    encoder = getattr(segmenter.model, "vision_encoder", None) or segmenter.model.image_encoder
    calls, watch = [0], [0.0, 0.0]
    before = encoder.register_forward_pre_hook(lambda *_: watch.__setitem__(0, clock(cuda)))

    def after(*_: Any) -> None:
        calls[0] += 1
        watch[1] += clock(cuda) - watch[0]

    hooks = [before, encoder.register_forward_hook(after)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found, our_s = timed(ours)
    share = watch[1] / calls[0] / our_s
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0
    for hook in hooks:
        hook.remove()
    expected, their_s = timed(theirs)
    num_params = sum(weight.numel() for weight in segmenter.model.parameters())
    pairs = list(zip(found, expected, strict=True))
    same = sum(one == other for one, other in pairs)
    overlap = [rle.iou(one, other).max(axis=1).mean() for one, other in pairs if one and other]
    print(f"{name}: {num_params / 1e6:.1f} M parameters, {options.regions} regions, {segmenter.dtype}")
    print(f"  one forward per region  {their_s:9.3f} s")
    print(f"  ours                    {our_s:9.3f} s, {100 * share:.0f}% of it in the image encoder")
    print(f"  image encoder           {calls[0] / (options.runs + 1):9.0f} call a photo")
    if cuda:
        print(f"  peak memory             {peak_gb:9.2f} GB")
    a_region = np.mean([len(one) for one in found])
    print(f"  masks                   {a_region:9.1f} a region")
    print(f"  regions with the same   {same:9d} of {len(pairs)}")
    print(f"  mean IoU of the masks   {np.mean(overlap or [np.nan]):9.4f}")
    print(f"  ratio                   {their_s / our_s:9.1f}   (at least {AT_LEAST})", flush=True)
    return int(their_s / our_s < AT_LEAST)


def clock(cuda: bool) -> float:
    """Seconds, after what runs on the GPU has ended."""
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
