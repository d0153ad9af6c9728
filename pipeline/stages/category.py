"""Stages that ask the judge about captions: `verify_category` and `extract_category`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import msgspec

from ...filters import category
from ...filters.verdict import Verdict
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord, Region
from ..models import answers
from ..models.protocols import Judge, Question
from .base import ModelStage, Threshold


class Judged(msgspec.Struct):
    """What the judge answered, and how sure it was; `margin` is None if it has no such number."""

    answer: str
    margin: float | None


class _JudgeStage(ModelStage):
    """What the two stages share: questions to the judge, and refusing answers outside their schema."""

    protocol, each, evidence = "judge", "ask_each", Judged
    needs: ClassVar[tuple[str, ...]] = ("caption",)
    sees_photo = False
    question_kind: ClassVar[str]
    """Of the question: "verify" or "extract"."""

    def ask(self, model: Judge, images: list[ImageRecord]) -> list[list[Judged | BadRecord]]:
        questions = [self._question_to_judge(region) for image in images for region in image.live()]
        counts = [len(image.live()) for image in images]
        given = answers.listed(model.ask(questions), len(questions), "answers")
        if len(given) != len(questions):
            raise ValueError(f"asked {len(questions)} questions, answered {len(given)}")
        rest = iter(given)
        return [[self._judged(answer) for answer in islice(rest, count)] for count in counts]

    def ask_each(self, model: Any, images: list[ImageRecord]) -> Iterator[tuple[int, list[Any]]]:
        places = [
            (number, place) for number, image in enumerate(images) for place in range(len(image.live()))
        ]
        questions = [self._question_to_judge(region) for image in images for region in image.live()]
        found: list[list[Any]] = [[None] * len(image.live()) for image in images]
        missing = [len(each) for each in found]
        for index, answer in answers.placed(model.ask_each(questions), len(questions), "questions"):
            number, place = places[index]
            found[number][place] = self._judged(answer)
            missing[number] -= 1
            if not missing[number]:
                yield number, found[number]

    def _question_to_judge(self, region: Region) -> Question:
        return Question(self.question_kind, region.caption or "")

    def _judged(self, given: Any) -> Judged | BadRecord:
        """An answer as evidence; one outside its schema is not kept, so that it can be asked for again."""
        answer = answers.judgment(given)
        if isinstance(answer, BadRecord):
            return answer
        verdict = self._parse(answer.text)
        if verdict.reason is Reason.ANSWER_INVALID:
            return BadRecord(verdict.reason, verdict.detail)
        return Judged(answer.text, answer.margin)

    @abstractmethod
    def _parse(self, answer: str) -> Verdict:
        """The verdict on an answer alone, to tell whether it is within its schema."""


class VerifyCategory(_JudgeStage):
    """Asks whether the caption describes the annotated category."""

    name, title = "verify_category", "verify category"
    does = "asks the judge whether the caption describes the annotated category"
    needs = ("caption", "category")
    sections = ("min_verdict_margin",)
    reasons = (Reason.CATEGORY_WRONG, Reason.ANSWER_INVALID)
    scores = ("verdict_margin",)
    thresholds = (
        Threshold(
            "min_verdict_margin",
            "verdict_margin",
            True,
            Reason.CATEGORY_WRONG,
            (-30, 30, 0.1),
            "least margin of the judge's verdict",
        ),
    )
    question_kind = "verify"

    @property
    def settings(self) -> float | None:
        return self.config.min_verdict_margin

    def question(self, region: Region) -> tuple:
        return (self.question_kind, region.caption, region.category)

    def decide(self, region: Region, evidence: Judged) -> Verdict:
        return category.judge_verdict(evidence.answer, evidence.margin, self.config.min_verdict_margin)

    @classmethod
    def matches(cls, evidence: Judged, row: dict[str, Any]) -> bool:
        return evidence.margin == row["verdict_margin"]

    def _question_to_judge(self, region: Region) -> Question:
        return Question(self.question_kind, region.caption or "", region.category)

    def _parse(self, answer: str) -> Verdict:
        return category.judge_verdict(answer)


class ExtractCategory(_JudgeStage):
    """Asks which category the caption describes."""

    name, title = "extract_category", "extract category"
    does = "asks the judge which category the caption describes"
    gives = ("core_category",)
    reasons = (Reason.CATEGORY_NONE, Reason.ANSWER_INVALID)
    question_kind = "extract"

    def question(self, region: Region) -> tuple:
        return (self.question_kind, region.caption)

    def decide(self, region: Region, evidence: Judged) -> Verdict:
        region.core_category, verdict = category.core_category(evidence.answer)
        return verdict

    @classmethod
    def matches(cls, evidence: Judged, row: dict[str, Any]) -> bool:
        return category.core_category(evidence.answer)[0] == row["core_category"]

    def _parse(self, answer: str) -> Verdict:
        return category.core_category(answer)[1]
