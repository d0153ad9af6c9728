"""The stage `box_masks`: the segmenter makes the mask of each region that its source gives as a box."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import msgspec

from ...filters import boxes, rle
from ...filters.verdict import Verdict
from ...schemas.config import Backend
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord, Region, Rle
from ..models import answers
from ..models.protocols import Segmenter
from ..models.registry import BACKENDS, find_backend
from .base import ModelStage


class BoxMask(msgspec.Struct):
    """The mask that the segmenter found in a box: of all that it found, the one whose own box fits best.

    Attributes:
        counts: its compressed RLE counts; None if there is none in the box.
        height, width: of the photo, in pixels.
        score: the segmenter's own score of the mask; 0 without one.
        num_candidates: masks that the segmenter found, also those outside of the box.
    """

    counts: str | None
    height: int
    width: int
    score: float
    num_candidates: int


class BoxMasks(ModelStage):
    """Makes the mask of each region that has a box and no mask, and drops those in which nothing is found."""

    name, title = "box_masks", "box masks"
    does = "lets the segmenter find the mask of each region in its box"
    gives = ("mask",)
    reasons = (Reason.SEGMENTER_NONE,)
    protocol, evidence = "segmenter", BoxMask

    def takes(self, region: Region) -> bool:
        return region.rle is None

    def check_backend(self) -> None:
        if getattr(find_backend(self.protocol, self.backend), "reads_boxes", True):
            return
        ours = [name for name in BACKENDS[self.protocol] if _reads_boxes(name)]
        named = " or ".join(f"`{name}`" for name in ours)
        raise ConfigError(
            f"{self.place}: the segmenter `{self.backend.name}` does not read boxes, from which "
            f"`{self.name}` makes masks; use {named}, for all stages or for this one alone, as in "
            f"{{stage: {self.kind}, segmenter: {{name: {ours[0]}}}}}"
        )

    @cached_property
    def _reads_phrases(self) -> bool:
        return getattr(find_backend(self.protocol, self.backend), "reads_phrases", True)

    def _phrase(self, region: Region) -> str:
        return (region.category or "") if self._reads_phrases else ""

    def question(self, region: Region) -> tuple:
        return (*region.bbox, self._phrase(region))

    def ask(self, model: Segmenter, images: list[ImageRecord]) -> list[list[BoxMask | BadRecord]]:
        import numpy as np

        from ..io.photos import read_pixels

        found = []
        for image in images:
            live = image.live()
            corners = np.array([(x, y, x + w, y + h) for x, y, w, h in (r.bbox for r in live)], np.float32)
            phrases = [self._phrase(region) for region in live]
            given = model.segment(read_pixels(image, self.config.limits.max_pixels), phrases, corners)
            options = answers.listed(given, len(live), "the regions' candidates")
            size = (image.height, image.width)
            found.append(
                [
                    _best(region, answers.candidates(own, size), size)
                    for region, own in zip(live, options, strict=True)
                ]
            )
        return found

    def decide(self, region: Region, evidence: BoxMask) -> Verdict:
        if evidence.counts is None:
            return boxes.judge_found(evidence.num_candidates)
        mask = rle.check(evidence.counts, (evidence.height, evidence.width))
        region.rle, region.area, region.bbox = mask
        region.source_scores = {**region.source_scores, "predicted_iou": evidence.score}
        return Verdict()

    @classmethod
    def matches(cls, evidence: BoxMask, row: dict[str, Any]) -> bool:
        return evidence.counts == row["rle_counts"]


def _reads_boxes(name: str) -> bool:
    return getattr(find_backend("segmenter", Backend(name=name)), "reads_boxes", True)


def _best(
    region: Region, options: list[tuple[Rle | None, float]] | BadRecord, size: tuple[int, int]
) -> BoxMask | BadRecord:
    if isinstance(options, BadRecord):
        return options
    best = boxes.best_in_box([mask for mask, _ in options], region.bbox)
    if best is None:
        return BoxMask(None, *size, 0.0, len(options))
    mask, score = options[best]
    assert mask is not None
    return BoxMask(mask.counts, *size, score, len(options))
