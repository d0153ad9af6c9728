"""The stage `automatic_masks`: a mask generator makes the regions of photos whose source brings none.

It is asked about whole images, since there is no region yet. The evidence of an image has a row with the id
-1, which says how many masks it has, and a row for each mask: its id is the region's. So an image without a
mask is known to have none, and is not asked about again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from ...filters import rle
from ...filters.verdict import Verdict
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Drop, ImageRecord, Region
from ..models import answers
from ..models.protocols import MaskGenerator
from .base import Failure, ModelStage, UnitAnswers, failed_drop
from .evidence import Answered, Evidence

WHOLE_IMAGE = -1
"""In the place of a region's id: the row of an image, and the region that stands for it while it is asked."""


class GeneratedMask(msgspec.Struct):
    """A row of evidence: a mask, or how many of them an image has.

    Attributes:
        num_masks: of the image.
        counts: the mask's compressed RLE counts (its size is the image's); None in the row of the image.
        score: the generator's own; None in the row of the image.
    """

    num_masks: int
    counts: str | None
    score: float | None


class AutomaticMasks(ModelStage):
    """Gives images without regions those that the mask generator finds. An image without any is dropped."""

    name, title = "automatic_masks", "automatic masks"
    does = "lets the mask generator find the regions of each photo"
    gives = ("mask",)
    reasons = (Reason.MASK_NONE, Reason.TOO_MANY_MASKS)
    protocol, evidence = "mask_generator", GeneratedMask
    makes_regions = True

    @property
    def settings(self) -> int:
        return self.config.limits.max_masks

    def places(self, image: ImageRecord) -> list[int]:
        return [WHOLE_IMAGE] if image.drop is None and not image.regions else []

    def answers(self, images: list[ImageRecord], known: Evidence) -> UnitAnswers:
        return _ImageAnswers(self, images, known)

    def question(self, region: Region) -> tuple:
        """The same of every image: the photo and the generator decide."""
        return ("masks",)

    def ask(
        self, model: MaskGenerator, images: list[ImageRecord]
    ) -> list[list[list[GeneratedMask] | BadRecord]]:
        """The masks of each image, as the one answer about it."""
        from ..io.photos import read_pixels

        found = []
        for image in images:
            pixels = read_pixels(image, self.config.limits.max_pixels)
            masks = answers.generated(model.generate(pixels), (image.height, image.width))
            if not isinstance(masks, BadRecord):
                masks = [GeneratedMask(len(masks), mask.rle.counts, score) for mask, score in masks]
            found.append([masks])
        return found

    def decide(self, region: Region, evidence: GeneratedMask) -> Verdict:
        """Every mask is kept: the stages after this one decide."""
        return Verdict()

    @classmethod
    def matches(cls, evidence: GeneratedMask, row: dict[str, Any]) -> bool:
        return evidence.counts is not None and evidence.counts == row["rle_counts"]

    def give_masks(self, image: ImageRecord, found: list[GeneratedMask]) -> None:
        """Make the regions of an image; drop it if it has none, or too many.

        Raises:
            BadRecord: the masks do not fit the image.
        """
        codes = [{"size": [image.height, image.width], "counts": each.counts} for each in found]
        masks = rle.check_all(codes, image.height, image.width)
        image.regions = [
            _region(number, mask, each.score)
            for number, (mask, each) in enumerate(zip(masks, found, strict=True))
        ]
        name = image.file_name or image.key
        if not found:
            image.reject(Drop(self.name, Reason.MASK_NONE, f"{name}: the generator finds nothing to mask"))
        elif len(found) > (most := self.config.limits.max_masks):
            detail = f"{name}: {len(found)} masks; limits.max_masks is {most}"
            image.reject(Drop(self.name, Reason.TOO_MANY_MASKS, detail))


def _region(number: int, mask: rle.Mask | BadRecord, score: float | None) -> Region:
    if isinstance(mask, BadRecord):
        raise mask
    return Region(number, mask.rle, mask.bbox, mask.area, source_scores={"predicted_iou": score or 0.0})


class _ImageAnswers(UnitAnswers):
    """The answers about whole images: of each, a region that stands for it is what is asked about."""

    stage: AutomaticMasks

    def __init__(self, stage: AutomaticMasks, images: list[ImageRecord], known: Evidence):
        self._waiting = [image for image in images if stage.places(image)]
        stand_ins = [
            msgspec.structs.replace(image, regions=[Region(WHOLE_IMAGE, None)]) for image in self._waiting
        ]
        super().__init__(stage, stand_ins, known)
        self._by_key = {image.key: image for image in images}  # they get the digest of the photo

    @property
    def num_asked(self) -> int:
        """The masks of the images that were asked about now: the cost of a mask is what an estimate needs."""
        asked = {image.key for image in self.missing}
        return sum(len(image.regions) for image in self._waiting if image.key in asked)

    def _store(self, image: ImageRecord, region: Region, answer: list[GeneratedMask], seen: str) -> None:
        asked = self._questions[image.key, region.id]
        self.known[image.key, WHOLE_IMAGE] = Answered(asked, GeneratedMask(len(answer), None, None), seen)
        for number, mask in enumerate(answer):
            self.known[image.key, number] = Answered(asked, mask, seen)

    def _find(self, image: ImageRecord, region: Region) -> list[GeneratedMask] | None:
        """All masks of an image if its row and theirs are of today's photo; else None."""
        whole = super()._find(image, region)
        if whole is None:
            return None
        first = self.known[image.key, WHOLE_IMAGE]
        rows = [self.known.get((image.key, number)) for number in range(whole.num_masks)]
        return [row.answer for row in rows if row is not None] if _belong(rows, first) else None

    def apply(self) -> None:
        """Give every image its regions, or the failure to get any."""
        for image in self._waiting:
            found = self._find(image, Region(WHOLE_IMAGE, None))
            failure = self.region_failures.get((image.key, WHOLE_IMAGE))
            if found is not None:
                try:
                    self.stage.give_masks(image, found)
                    continue
                except BadRecord as bad:
                    failure = Failure(bad.reason, bad.detail)
                    image.regions = []
            failure = failure or self.image_failures[image.key]
            image.reject(failed_drop(self.stage, failure.reason, failure.detail), failure.kind)


def _belong(rows: Iterable[Answered | None], first: Answered) -> bool:
    """Whether the rows of an image's masks are of one answer, which its own row counts."""
    return all(
        row is not None
        and (row.asked, row.photo, row.answer.num_masks) == (first.asked, first.photo, first.answer.num_masks)
        for row in rows
    )
