"""Backends whose answers are odd: of another type, too many, endless, with what no column holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from paracaption.filters import rle
from paracaption.pipeline.models.protocols import Answer, Candidate, Question
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import ImageRecord, Rle
from tests import odd_values
from tests.backends import InstantCaptioner, InstantJudge, InstantSegmenter


class Words(str):
    """A harmless text of another class."""

    __slots__ = ()


class Mute(Exception):
    """An error whose text cannot be made."""

    def __str__(self) -> str:
        raise ValueError("no words")


def raises(make: Callable[[], BaseException]) -> Callable[[Any], Any]:
    def answer(_: Any) -> Any:
        raise make()

    return answer


def _endless(_: Any) -> Any:
    return itertools.repeat("A thing that is seen here again and again.")


HARMLESS: dict[str, Callable[[str], Any]] = {
    "numpy text": np.str_,
    "text of another class": Words,
    "text in an array": np.array,
}
"""Captions that mean what the text says."""

TEXTS: dict[str, Callable[[Any], Any]] = {
    "half an emoji": lambda _: "A cat \ud83d sits on the mat over there.",
    "nul": lambda _: "A cat\0 sits on the mat over there now.",
    "millions of words": lambda _: "word " * 3_000_000,
    "number": lambda _: 5,
    "huge number": lambda _: 10**400,
    "nan": lambda _: float("nan"),
    "bytes": lambda _: b"A cat sits on the mat over there.",
    "list": lambda _: ["A cat sits on the mat."],
    "object": lambda _: {"caption": "A cat sits on the mat."},
    "nothing": lambda _: None,
    "empty": lambda _: "",
    "control": lambda _: "\x1b[31mA cat sits on the mat over there.\x07",
    "class": lambda _: str,
    "refusal": lambda _: BadRecord(Reason.MODEL_ERROR, "x \ud83d y"),
}
"""Odd answers in the place of one text."""

ERRORS: dict[str, Callable[[Any], Any]] = {
    "error": raises(lambda: RuntimeError("bad \ud83d text\nof two lines")),
    "error without a text": raises(Mute),
    "error of a million letters": raises(lambda: RuntimeError("x" * 1_000_000)),
    "exit": raises(lambda: SystemExit(3)),
    "generator exit": raises(GeneratorExit),
    "end of iteration": raises(StopIteration),
    "no memory": raises(MemoryError),
    "disk full": raises(lambda: OSError(28, "No space left on device")),
    "refused": raises(lambda: BadRecord(Reason.PHOTO_UNREADABLE, "\ud83d")),
}
"""What a call may raise."""

LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "no list": lambda _: None,
    "letters": lambda answers: "x" * len(answers),
    "by name": lambda answers: dict(enumerate(answers)),
    "set": lambda answers: set(range(len(answers))),
    "too few": lambda answers: answers[:-1],
    "too many": lambda answers: [*answers, answers[-1]],
    "endless": _endless,
    **ERRORS,
}
"""Odd answers in the place of all answers about an image."""

FAIR_LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "generator": lambda answers: (each for each in answers),
    "tuple": tuple,
    "iterator": iter,
}
"""Other collections of the same answers."""


def _answer(**changes: Any) -> Callable[[Any], Any]:
    return lambda _: Answer(**{"text": "yes", "margin": 1.0, **changes})


JUDGED: dict[str, Callable[[Any], Any]] = {
    "half an emoji": _answer(text="b\ud83dx"),
    "nul": _answer(text="b\0x"),
    "text as a number": _answer(text=5),
    "text as bytes": _answer(text=b"yes"),
    "millions of letters": _answer(text="x" * 3_000_000),
    "empty": _answer(text="", margin=None),
    "margin of 400 digits": _answer(margin=10**400),
    "margin as text": _answer(margin="high"),
    "margin nan": _answer(margin=float("nan")),
    "margin infinite": _answer(margin=float("inf")),
    "margin of numpy": _answer(margin=np.float32(1)),
    "answer as a tuple": lambda _: ("yes", 1.0),
    "text alone": lambda _: "yes",
    "nothing": lambda _: None,
    "refusal": lambda _: BadRecord(Reason.ANSWER_INVALID, "x \ud83d y"),
}
"""Odd answers in the place of one judge's answer."""


def _mask(**changes: Any) -> Callable[[list[Candidate]], Any]:
    def change(found: list[Candidate]) -> list[Candidate]:
        mask = found[0].rle
        values = {name: make(mask) if callable(make) else make for name, make in changes.items()}
        return [Candidate(Rle(values.get("size", mask.size), values.get("counts", mask.counts)), 0.9)]

    return change


CANDIDATES: dict[str, Callable[[list[Candidate]], Any]] = {
    "of another size": _mask(size=(5, 5), counts="P1"),
    "of a huge size": _mask(size=(10**9, 10**9)),
    "without a size": _mask(size=None),
    "size of numpy": _mask(size=lambda mask: tuple(np.array(mask.size))),
    "counts that ask for memory": _mask(counts="o" * 50),
    "counts cut": _mask(counts=lambda mask: mask.counts[:-2]),
    "counts too long": _mask(counts=lambda mask: mask.counts + "1" * 5000),
    "counts of millions": _mask(counts="1" * (1 << 24)),
    "counts empty": _mask(counts=""),
    "counts half an emoji": _mask(counts="\ud83d"),
    "counts as bytes": _mask(counts=lambda mask: mask.counts.encode()),
    "counts as a list": _mask(counts=[1, 2, 3]),
    "score nan": lambda found: [Candidate(found[0].rle, float("nan"))],
    "score as text": lambda found: [Candidate(found[0].rle, "x")],  # pyright: ignore[reportArgumentType]
    "score of 400 digits": lambda found: [Candidate(found[0].rle, 10**400)],
    "no candidate": lambda _: [None],
    "candidate as a tuple": lambda found: [(found[0].rle, 0.9)],
    "without a pixel": lambda found: [Candidate(rle.from_mask(np.zeros(found[0].rle.size)).rle, 0.9)],
    "five thousand": lambda found: found * 5000,
    "endless": lambda found: itertools.cycle(found),
    "nothing": lambda _: None,
    "none": lambda _: [],
    "text": lambda _: "mask",
    "refusal": lambda _: BadRecord(Reason.MODEL_ERROR, "\ud83d"),
}
"""Odd answers in the place of one region's candidates, from the good ones."""


class _Odd:
    """`odd`: what is answered in the first call, in the second, and so on; the last one in all others.

    A name of `ODD`, or "any:SEED" for answers and "any list:SEED" for lists of them that are anything.
    """

    def __init__(self, odd: list[str], **options: Any):
        super().__init__(**options)
        self._odd = odd[::-1]

    @classmethod
    def identity(cls, odd: list[str], version: str = "1", **_: Any) -> dict[str, str]:
        return {"odd": str(odd), "version": version}

    def _answer(self, found: list[Any], each: dict[str, Callable[[Any], Any]], every: bool = True) -> Any:
        """The answers, odd ones in their place: all or the first one from `each`, or the list of them."""
        what = self._odd.pop() if len(self._odd) > 1 else self._odd[0]
        kind, _, seed = what.partition(":")
        if kind == "any":
            random = Random(seed)
            return [odd_values.value(random) if random.random() < 0.6 else one for one in found]
        if kind == "any list":
            return odd_values.value(Random(seed))
        if change := each.get(what):
            return [change(one) if every or not place else one for place, one in enumerate(found)]
        return (LISTS | FAIR_LISTS).get(what, list)(found)


class OddCaptioner(_Odd, InstantCaptioner):
    """Answers one of `TEXTS`, `HARMLESS`, `LISTS` or `FAIR_LISTS`; to be asked image by image."""

    def caption(self, images: list[ImageRecord]) -> Any:
        found = super().caption(images)
        for image in images:
            image.regions.clear()
        return [self._answer(captions, TEXTS | HARMLESS) for captions in found]


class OddJudge(_Odd, InstantJudge):
    """Answers one of `JUDGED`, `LISTS` or `FAIR_LISTS`, of `JUDGED` to the first question only."""

    def ask(self, questions: list[Question]) -> Any:
        return self._answer(super().ask(questions), JUDGED, every=False)


class OddSegmenter(_Odd, InstantSegmenter):
    """Answers one of `CANDIDATES`, `LISTS` or `FAIR_LISTS`, of `CANDIDATES` about the first region only."""

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> Any:
        return self._answer(super().segment(photo, phrases, boxes), CANDIDATES, every=False)


ODD: dict[str, dict[str, Callable[[Any], Any]]] = {
    "captioner": TEXTS | HARMLESS | LISTS | FAIR_LISTS,
    "judge": JUDGED | LISTS | FAIR_LISTS,
    "segmenter": CANDIDATES | LISTS | FAIR_LISTS,
}
"""By protocol, every odd answer by its name."""
