"""Backends that answer about some regions and not about others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paracaption.pipeline.models.protocols import Answer, Question
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import ImageRecord
from tests.backends import InstantCaptioner, InstantJudge


class PickyJudge(InstantJudge):
    """Has no answer (or says `says`) for captions with `refuse` in them, until the file `mended` exists."""

    def __init__(self, refuse: str, mended: str, says: str = "", **options):
        super().__init__(**options)
        self.refuse, self.mended, self.says = refuse, Path(mended), says

    def ask(self, questions: list[Question]) -> list[Answer | BadRecord]:
        answers: list[Answer | BadRecord] = list(super().ask(questions))
        if self.mended.exists():
            return answers
        return [
            (Answer(self.says) if self.says else BadRecord(Reason.ANSWER_INVALID, "it said maybe"))
            if self.refuse in question.caption
            else answer
            for question, answer in zip(questions, answers, strict=True)
        ]


class OtherCaptioner(InstantCaptioner):
    """Says the same in other words."""

    @staticmethod
    def _words(image: ImageRecord, region: Any) -> str:
        return f"Another look. {InstantCaptioner._words(image, region)}"


class PickyCaptioner(InstantCaptioner):
    """Cannot caption the first region of each image."""

    def caption(self, images: list[ImageRecord]) -> list[list[str | BadRecord | None]]:
        return [
            [BadRecord(Reason.MODEL_ERROR, "no caption for this one"), *captions[1:]]
            for captions in super().caption(images)
        ]
