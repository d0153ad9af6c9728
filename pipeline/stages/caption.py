"""The stage `caption`: the captioner describes each region."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ...filters import category
from ...filters.verdict import Verdict
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord, Region
from ..models import answers
from ..models.protocols import Captioner
from .base import ModelStage


class Captioned(msgspec.Struct):
    """What the captioner said about a region.

    Attributes:
        caption: None if it said nothing.
        confidence: how sure it is, 0 to 1; None if it does not say.
    """

    caption: str | None
    confidence: float | None = None


class Caption(ModelStage):
    """Describes each region, and drops those that the captioner has nothing to say about."""

    name, title = "caption", "caption"
    does = "asks the captioner for a caption of each region"
    needs = ("mask",)
    gives = ("caption",)
    reasons = (Reason.CAPTION_NONE,)
    scores = ("confidence",)
    protocol, each, evidence = "captioner", "caption_each", Captioned

    def question(self, region: Region) -> tuple:
        assert region.rle is not None
        return (region.rle.counts, region.category)

    def ask(self, model: Captioner, images: list[ImageRecord]) -> list[list[Captioned | BadRecord]]:
        counts = [len(image.live()) for image in images]
        given = answers.listed(model.caption(images), len(images), "answers")
        return [_of_image(captions, place, counts) for place, captions in enumerate(given)]

    def ask_each(self, model: Any, images: list[ImageRecord]) -> Iterator[tuple[int, list[Any]]]:
        counts = [len(image.live()) for image in images]
        for place, captions in answers.placed(model.caption_each(images), len(images), "images"):
            yield place, _of_image(captions, place, counts)

    def decide(self, region: Region, evidence: Captioned) -> Verdict:
        region.caption = evidence.caption
        sure = {} if evidence.confidence is None else {"confidence": evidence.confidence}
        region.scores = {name: each for name, each in region.scores.items() if name != "confidence"}
        return category.captioned(evidence.caption)._replace(scores=sure)

    @classmethod
    def matches(cls, evidence: Captioned, row: dict[str, Any]) -> bool:
        return evidence.caption == row["caption"]


def _of_image(captions: Any, place: int, counts: list[int]) -> list[Captioned | BadRecord]:
    """Evidence from the captions of the image at a place, whose number of live regions `counts` has."""
    most = counts[place] if place < len(counts) else 0
    return [_captioned(each) for each in answers.listed(captions, most, "an image's captions")]


def _captioned(answer: Any) -> Captioned | BadRecord:
    caption, confidence = answers.caption(answer), answers.confidence(answer)
    if isinstance(caption, BadRecord):
        return caption
    return confidence if isinstance(confidence, BadRecord) else Captioned(caption, confidence)
