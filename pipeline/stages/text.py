"""The stage `clean_text`: length and anti-repetition rules for captions."""

from __future__ import annotations

from typing import Any

from ...filters import text
from ...filters.verdict import Verdict
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord
from .base import FilterStage, Threshold

_CHARS = "length(trim(caption, $space))"


class CleanText(FilterStage):
    """Drops captions that are too short or too long, repeat themselves, or are no prose."""

    name, title = "clean_text", "clean text"
    does = "drops captions that break the rules for text"
    needs = ("caption",)
    sections = ("text",)
    reasons = (
        Reason.TEXT_TOO_SHORT,
        Reason.TEXT_TOO_LONG,
        Reason.TEXT_REPEATS,
        Reason.TEXT_ENUMERATES,
        Reason.TEXT_REFUSAL,
        Reason.TEXT_BOILERPLATE,
        Reason.TEXT_JUNK,
        Reason.TEXT_UNSURE,
    )
    scores = ("num_words", "repeat_share")
    thresholds = (
        Threshold("text.min_words", "num_words", True, Reason.TEXT_TOO_SHORT, (0, 60, 1), "fewest words"),
        Threshold("text.max_words", "num_words", False, Reason.TEXT_TOO_LONG, (1, 400, 1), "most words"),
        Threshold("text.min_chars", _CHARS, True, Reason.TEXT_TOO_SHORT, (0, 300, 1), "fewest characters"),
        Threshold("text.max_chars", _CHARS, False, Reason.TEXT_TOO_LONG, (1, 3000, 1), "most characters"),
        Threshold(
            "text.max_repeat_share",
            "repeat_share",
            False,
            Reason.TEXT_REPEATS,
            (0, 1, 0.01),
            "largest share of repeated 4-grams",
        ),
        Threshold(
            "text.min_confidence",
            "confidence",
            True,
            Reason.TEXT_UNSURE,
            (0, 1, 0.001),
            "least confidence of the captioner",
        ),
    )

    @property
    def settings(self) -> dict[str, Any]:
        rules = self.config.text.model_dump()
        if rules["min_confidence"] is None:  # as in releases that did not have it, with the same digest
            del rules["min_confidence"]
        return rules

    def decide(self, image: ImageRecord) -> list[Verdict]:
        return [
            text.clean(region.caption or "", self.config.text, region.scores.get("confidence"))
            for region in image.live()
        ]
