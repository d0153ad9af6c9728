"""Stages on masks alone: `usable_masks` and `whole_objects`."""

from __future__ import annotations

from typing import Any

from ...filters import masks
from ...filters.verdict import Verdict
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord
from .base import FilterStage


class UsableMasks(FilterStage):
    """Drops masks that are too small, and masks of an object that a better mask shows already."""

    name, title = "usable_masks", "usable masks"
    does = "drops masks that are too small, or duplicates of one with a better score or more area"
    needs = ("mask",)
    sections = ("masks",)
    reasons = (Reason.MASK_TOO_SMALL, Reason.MASK_DUPLICATE)
    scores = ("duplicate_iou",)

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.masks.model_dump()

    def decide(self, image: ImageRecord) -> list[Verdict]:
        return masks.usable(
            image.live(), (image.height, image.width), self.config.masks, _measure_overlaps(image)
        )


class WholeObjects(FilterStage):
    """Drops masks that are completely occluded, and masks of parts of a larger object."""

    name, title = "whole_objects", "whole objects"
    does = "drops masks that are hidden behind others or are parts of a larger object"
    needs = ("mask",)
    sections = ("masks",)
    reasons = (Reason.MASK_OCCLUDED, Reason.MASK_PART)
    scores = ("visible_share", "container_share")

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.masks.model_dump()

    def decide(self, image: ImageRecord) -> list[Verdict]:
        return masks.whole_objects(
            image.live(), (image.height, image.width), self.config.masks, _measure_overlaps(image)
        )


_measured: list[tuple[ImageRecord, masks.Overlaps]] = []


def _measure_overlaps(image: ImageRecord) -> masks.Overlaps:
    """How the image's masks overlap, measured once for the stages that follow each other on one image."""
    if not _measured or _measured[0][0] is not image:
        undecided = [] if image.drop else [each for each in image.regions if each.drop is None]
        _measured[:] = [(image, masks.measure_overlaps(undecided))]  # also those that another member sees
    return _measured[0][1]
