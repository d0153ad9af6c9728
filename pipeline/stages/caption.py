"""The stage `caption`: the captioner describes each region."""

from __future__ import annotations

from typing import Any

import msgspec

from ...filters import category
from ...filters.verdict import Verdict
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord, Region
from ..models.protocols import Captioner
from .base import ModelStage


class Captioned(msgspec.Struct):
    """What the captioner said about a region; None if it said nothing."""

    caption: str | None


class Caption(ModelStage):
    """Describes each region, and drops those that the captioner has nothing to say about."""

    name, title = "caption", "caption"
    reasons = (Reason.CAPTION_NONE,)
    protocol, evidence = "captioner", Captioned

    def question(self, region: Region) -> tuple:
        assert region.rle is not None
        return (region.rle.counts, region.category)

    def ask(self, model: Captioner, images: list[ImageRecord]) -> list[list[Captioned | BadRecord]]:
        return [[_captioned(caption) for caption in captions] for captions in model.caption(images)]

    def decide(self, region: Region, evidence: Captioned) -> Verdict:
        region.caption = evidence.caption
        return category.captioned(evidence.caption)

    @classmethod
    def matches(cls, evidence: Captioned, row: dict[str, Any]) -> bool:
        return evidence.caption == row["caption"]


def _captioned(caption: str | BadRecord | None) -> Captioned | BadRecord:
    if caption is None or isinstance(caption, str):
        return Captioned(caption)
    if isinstance(caption, BadRecord):
        return caption
    raise TypeError(f"a caption is a string or None, not {type(caption).__name__}")
