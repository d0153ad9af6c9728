"""Backends for tests: they answer at once, write down what they were asked, and misbehave on request.

`log` is a file to which every call appends one line a region, so that tests count what was paid for, across
processes and crashes. `misbehave` maps an image key to what happens on it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paracaption.filters import rle
from paracaption.pipeline.models.protocols import Answer, Candidate, Question
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import ImageRecord


def _note(log: str | None, lines: list[str]) -> None:
    if log and lines:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, ("\n".join(lines) + "\n").encode())
        os.close(descriptor)


class _Options:
    def __init__(
        self,
        log: str | None = None,
        misbehave: dict[str, str] | None = None,
        delay_s: float = 0.0,
        version: str = "1",
    ):
        self.log, self.misbehave, self.delay_s = log, misbehave or {}, delay_s

    @classmethod
    def identity(cls, version: str = "1", **_: Any) -> dict[str, str]:
        return {"version": version}


class InstantCaptioner(_Options):
    """Captions that are a function of the region alone, so that two builds agree to the last byte."""

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        for image in images:
            what = self.misbehave.get(image.key) or self.misbehave.get("*")
            if what == "raise":
                raise RuntimeError(f"cannot caption {image.key}")
            if what and what.startswith("raise-unless:") and not Path(what.partition(":")[2]).exists():
                raise RuntimeError(f"cannot caption {image.key}")
            if what == "bad":
                raise BadRecord(Reason.PHOTO_UNREADABLE, f"{image.key} is bad")
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hang":
                time.sleep(3600)
            if what and what.startswith("sleep:"):
                time.sleep(float(what[6:]))
            if what and what.startswith("once:") and not Path(what[5:]).exists():
                Path(what[5:]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.delay_s * len(images))
        _note(self.log, [f"{image.key}/{region.id}" for image in images for region in image.live()])
        return [[self._words(image, region) for region in image.live()] for image in images]

    @staticmethod
    def _words(image: ImageRecord, region: Any) -> str:
        x, y, w, h = region.bbox
        return f"A {region.category or 'thing'} of {region.area} pixels at {x} by {y}, {w} wide and {h} high."


class OneByOneCaptioner(InstantCaptioner):
    """One that keeps an engine full by itself: it gives each image's captions as soon as it has them."""

    def caption_each(self, images: list[ImageRecord]) -> Iterator[tuple[int, list[str | None]]]:
        _note(self.log and f"{self.log}.calls", [str(len(images))])
        for place, image in enumerate(images):
            yield place, self.caption([image])[0]


class InstantJudge(_Options):
    """Says yes, and names the category "box"."""

    def ask(self, questions: list[Question]) -> list[Answer]:
        _note(self.log, [f"{question.kind} {question.caption}" for question in questions])
        time.sleep(self.delay_s)
        return [Answer("yes", 1.0) if question.kind == "verify" else Answer("box") for question in questions]


class LastFirstJudge(InstantJudge):
    """One that keeps an engine full by itself, and has the last answer first."""

    def ask_each(self, questions: list[Question]) -> Iterator[tuple[int, Answer]]:
        yield from reversed(list(enumerate(self.ask(questions))))


class InstantSegmenter(_Options):
    """Predicts the box: IoU with the mask is the share of the box that the mask fills."""

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        _note(self.log, [f"segment {' '.join(f'{v:g}' for v in box)}" for box in boxes])
        time.sleep(self.delay_s)
        found = []
        for x1, y1, x2, y2 in boxes.astype(int):
            mask = np.zeros(photo.shape[:2], np.uint8)
            mask[y1:y2, x1:x2] = 1
            found.append([Candidate(rle.from_mask(mask).rle, 0.9)])
        return found


class InstantGenerator(_Options):
    """Masks of a photo whose first pixel says how many: red is a name for `misbehave`, green the number.

    The masks are squares of 8 pixels side by side, the last one first.
    """

    def generate(self, photo: np.ndarray) -> list[Candidate]:
        name, count = str(photo[0, 0, 0]), int(photo[0, 0, 1])
        what = self.misbehave.get(name, "")
        if what == "raise" or (what.startswith("raise-unless:") and not Path(what[13:]).exists()):
            raise RuntimeError(f"no masks of {name}")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.delay_s)
        _note(self.log, [f"generate {name}"])
        found = []
        for number in reversed(range(count)):
            mask = np.zeros((1, 1) if what == "wrong" else photo.shape[:2], np.uint8)
            mask[:8, 8 * number : 8 * number + 8] = 1
            found.append(Candidate(rle.from_mask(mask).rle, (number + 1) / 10))
        return found
