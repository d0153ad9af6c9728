"""Models that sleep as long as the paper's would work, for `benchmarks.mixed`. Sleeping takes no CPU.

The seconds are assumptions about one H100 or H200, because nothing has been measured on a GPU:

- GAR-8B, 0.1 s a region: a prompt of 2,700 tokens takes 43 TFLOP, 0.09 s at half of the GPU's peak.
- Qwen3-8B, 0.01 s a question whose category is known: 200 tokens that are not in the prefix cache take
  3 TFLOP, 0.007 s at half of the peak. An answer that names the category is a few tokens longer: 0.012 s.
- SAM 3, 0.03 s a photo, as its authors report, and 0.02 s for each phrase on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from paracaption.pipeline.models.protocols import Answer, Candidate, Question
from paracaption.schemas.records import ImageRecord
from tests.backends import InstantCaptioner, InstantJudge, InstantSegmenter

CAPTION_S = 0.1
QUESTION_S = {"verify": 0.01, "extract": 0.012}
PHOTO_S = 0.03
PHRASE_S = 0.02


class _Sleeping:
    """A model that takes `speed` times less than the paper's."""

    def __init__(self, speed: float = 1.0):
        super().__init__()
        self.speed = speed

    @classmethod
    def identity(cls, **_: object) -> dict[str, str]:
        return {}

    @contextmanager
    def takes(self, seconds: float) -> Iterator[None]:
        """Sleep until the block, which makes the answers, has taken that long."""
        end = time.perf_counter() + seconds / self.speed
        yield
        time.sleep(max(0.0, end - time.perf_counter()))


class SleepingCaptioner(_Sleeping, InstantCaptioner):
    """GAR-8B."""

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        with self.takes(CAPTION_S * sum(len(image.live()) for image in images)):
            return super().caption(images)


class SleepingJudge(_Sleeping, InstantJudge):
    """Qwen3-8B."""

    def ask(self, questions: list[Question]) -> list[Answer]:
        with self.takes(sum(QUESTION_S[question.kind] for question in questions)):
            return super().ask(questions)


class SleepingSegmenter(_Sleeping, InstantSegmenter):
    """SAM 3."""

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        with self.takes(PHOTO_S + PHRASE_S * len(phrases)):
            return super().segment(photo, phrases, boxes)
