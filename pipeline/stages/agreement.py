"""The stage `agree_with_segmenter`: a segmenter that is given the category finds the object again."""

from __future__ import annotations

from typing import Any

import msgspec

from ...filters import agreement
from ...filters.verdict import Verdict
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord, Region, Rle
from ..models import answers
from ..models.protocols import Segmenter
from .base import ModelStage, Threshold


class Resegmented(msgspec.Struct):
    """The segmenter's best mask: the one with the largest IoU with the original.

    Attributes:
        iou: with the original.
        score: the segmenter's own score of that mask.
        counts: the mask's compressed RLE counts (its size is the image's); None if nothing was found.
        num_candidates: masks that the segmenter found.
    """

    iou: float
    score: float
    counts: str | None
    num_candidates: int

    def rle(self, size: tuple[int, int]) -> Rle | None:
        """The predicted mask, of an image of `size` (height, width)."""
        return None if self.counts is None else Rle(size, self.counts)


class AgreeWithSegmenter(ModelStage):
    """Predicts the masks of the core category and keeps a region that one of them overlaps enough."""

    name, title = "agree_with_segmenter", "agree with segmenter"
    does = "lets the segmenter find the region by its category, and compares the masks"
    needs = ("mask", "core_category")
    sections = ("min_iou",)
    reasons = (Reason.SEGMENTER_NONE, Reason.IOU_LOW)
    scores = ("iou", "segmenter_score")
    thresholds = (
        Threshold(
            "min_iou",
            "nullif(iou, 'nan'::DOUBLE)",
            True,
            Reason.IOU_LOW,
            (0, 1, 0.01),
            "least IoU with the segmenter's mask",
        ),
    )
    protocol, evidence = "segmenter", Resegmented

    @property
    def settings(self) -> float:
        return self.config.min_iou

    def question(self, region: Region) -> tuple:
        assert region.rle is not None
        return (region.core_category, region.rle.counts)

    def ask(self, model: Segmenter, images: list[ImageRecord]) -> list[list[Resegmented | BadRecord]]:
        import numpy as np

        from ..io.photos import read_pixels

        found = []
        for image in images:
            live = image.live()
            boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in (r.bbox for r in live)], np.float32)
            phrases = [region.core_category or "" for region in live]
            given = model.segment(read_pixels(image, self.config.limits.max_pixels), phrases, boxes)
            options = answers.listed(given, len(live), "the regions' candidates")
            size = (image.height, image.width)
            found.append(
                [_best(each, answers.candidates(own, size)) for each, own in zip(live, options, strict=True)]
            )
        return found

    def decide(self, region: Region, evidence: Resegmented) -> Verdict:
        return agreement.judge_iou(evidence.iou, evidence.score, evidence.num_candidates, self.config.min_iou)

    @classmethod
    def matches(cls, evidence: Resegmented, row: dict[str, Any]) -> bool:
        return row["iou"] is not None and evidence.iou == row["iou"]


def _best(region: Region, options: list[tuple[Rle | None, float]] | BadRecord) -> Resegmented | BadRecord:
    assert region.rle is not None
    if isinstance(options, BadRecord):
        return options
    masks = [(mask, score) for mask, score in options if mask is not None]
    best = agreement.best_candidate(masks, region.rle)
    if best is None:
        return Resegmented(0.0, 0.0, None, 0)
    index, iou = best
    mask, score = masks[index]
    return Resegmented(iou, score, mask.counts, len(options))
