"""Whether a segmenter that gets only the category finds the same object again."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from ..schemas.errors import BadRecord
from ..schemas.reasons import Reason
from ..schemas.records import Rle
from .verdict import Verdict


def best_candidate(candidates: Sequence[tuple[Rle, float]], original: Rle) -> tuple[int, float] | None:
    """The candidate that overlaps the original most, as (index, IoU); None if all are empty or there is none.

    The segmenter finds every object of the category, so the best one is not the one it is surest of. Of equal
    IoUs the higher score wins, then the earlier candidate.

    Args:
        candidates: (mask, the segmenter's score) pairs.
        original: the mask that the caption was made for.

    Raises:
        BadRecord: a candidate's size is not the original's (`MODEL_ERROR`: the backend's fault).
    """
    for index, (rle, _) in enumerate(candidates):
        if tuple(rle.size) != tuple(original.size):
            detail = (
                f"the mask of candidate {index} has (height, width) {rle.size}, the region {original.size}"
            )
            raise BadRecord(Reason.MODEL_ERROR, detail)
    coco: Any = importlib.import_module("pycocotools.mask")  # compiled, without types
    codes = [_code(rle) for rle, _ in candidates]
    found = [index for index, code in enumerate(codes) if coco.area(code) > 0]
    if not found:
        return None
    ious = coco.iou([codes[index] for index in found], [_code(original)], [0])[:, 0].tolist()
    iou, _, negative = max(
        (iou, candidates[index][1], -index) for index, iou in zip(found, ious, strict=True)
    )
    return -negative, iou


def judge_iou(iou: float, score: float, num_candidates: int, min_iou: float) -> Verdict:
    """Keep the region if the segmenter found the same object again.

    An empty prediction is a drop, not an error. Decides from the numbers that are kept as evidence, so
    that a changed `min_iou` needs no mask.

    Args:
        iou: of the best candidate with the original.
        score: the segmenter's own score of that candidate.
        num_candidates: 0 if the segmenter found nothing.
        min_iou: threshold.
    """
    if num_candidates == 0:
        return Verdict(Reason.SEGMENTER_NONE, "the segmenter found nothing", {"iou": 0.0})
    scores = {"iou": iou, "segmenter_score": score}
    if not iou >= min_iou:  # so that NaN is a drop
        return Verdict(Reason.IOU_LOW, f"IoU {iou:.3f}, at least {min_iou:g} needed", scores)
    return Verdict(scores=scores)


def _code(rle: Rle) -> dict[str, Any]:
    return {"size": list(rle.size), "counts": rle.counts.encode()}
