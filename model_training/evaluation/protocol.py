"""The published protocol: what a judge is asked of a caption, how its answer is read, and what it is worth.

Every region has a recognition question first (is it the right thing?), then positive ones (is what it says
right?) and negative ones (does it keep to its region?). Each choice has a score from -1 to 1. If the wrong
thing was recognised, no other answer scores above 0. An answer in which no choice is found scores 0.

Source: the evaluation scripts of PerceptionDLM (ParaDLC-Bench) and of Describe Anything (DLC-Bench). Where
they stop or are of two minds, this goes on: an empty answer, a part of every choice for the former and an
error for the latter, names none; nor does a letter beyond the choices; and a recognition that names no
choice, an error for both, caps nothing and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

Kind = Literal["paradlc", "dlc"]

LETTERS = "ABCDE"
MAX_TOKENS = 300
"""Of a judge's answer."""

_RULES = """Answer the multiple-choice question based on the text description of an object in {where}. \
You need to follow these rules:
1. Do not output any reasoning. Do not perform correction. Please output exactly one answer from the choices \
for each question. Do not repeat the question.
2. There is no need for exact matching. Please choose the closest option based on the description.

The description is:
{caption}

From the description above, please answer the following question with one of the choices:
{question}
"""
_WHERE = {"paradlc": "this image", "dlc": "an image"}


class Choice(NamedTuple):
    """An answer that can be chosen, and its worth: "correct" or "incorrect" for a recognition."""

    text: str
    score: float | str


class Question(NamedTuple):
    """A multiple-choice question about a caption.

    Attributes:
        text: the question.
        choices: at most five.
        type: "recognition", "positive" or "negative".
        subtype: of negative ones; "" if none is given.
    """

    text: str
    choices: tuple[Choice, ...]
    type: str
    subtype: str = ""


class Marks(NamedTuple):
    """What the answers about one region are worth.

    Attributes:
        recognised: None if the answer named no choice.
        positive, negative: means over the questions of that type; None if there is none.
        score: mean over both types together.
        worth: of each question in order, the recognition first; what it counts after the cap, and 1 or 0 for
            the recognition.
    """

    recognised: bool | None
    positive: float | None
    negative: float | None
    score: float
    worth: tuple[float, ...]


def recognition(kind: Kind, class_name: str) -> Question:
    """The question that comes first."""
    if kind == "paradlc":
        text = (
            f"The object in the image is {class_name}. Based on the image, is it likely that the object in "
            f"the description is given class: {class_name} or object of a similar type?"
        )
    else:
        text = (
            f"Is it likely that the {_subject(class_name)} of a similar type? "
            "Again, It does not have to be an exact match."
        )
    return Question(text, (Choice("Yes", "correct"), Choice("No", "incorrect")), "recognition")


def _subject(class_name: str) -> str:
    if class_name != "bus" and _english().singular_noun(class_name):
        return f"objects in the description are {class_name} or objects"
    return f"object in the description is {_english().a(class_name)} or an object"


@cache
def _english() -> Any:
    import inflect

    return inflect.engine()


def prompt(kind: Kind, caption: str, question: Question) -> str:
    """What the judge is sent, to the letter."""
    lines = [question.text, *(f"{LETTERS[i]}. {choice.text}" for i, choice in enumerate(question.choices))]
    return _RULES.format(where=_WHERE[kind], caption=caption, question="\n".join(lines).strip())


def parse(answer: str, choices: Sequence[str]) -> int | None:
    """Which choice an answer names; None if none is found. The rules, first to last:

    it is a choice, a letter, or a letter and its choice; it holds exactly one choice; it begins with a letter
    and a full stop; of several choices that it holds, the one that begins last, of those the longest; it is
    part of a choice, of those the longest; it begins with a letter and a line break.
    """
    said = answer.strip().lower()
    if not said:
        return None
    texts = [choice.strip().lower() for choice in choices]
    letters = LETTERS.lower()[: len(texts)]
    for index, text in enumerate(texts):
        if said in (text, f"{letters[index]}. {text}", letters[index]):
            return index
    held = [(said.index(text), len(text), -index) for index, text in enumerate(texts) if text in said]
    if len(held) == 1:
        return -held[0][2]
    lettered = letters.find(said[0])
    if lettered >= 0 and said[1:2] == ".":
        return lettered
    if held:
        return -max(held)[2]
    parts = [(len(text), -index) for index, text in enumerate(texts) if said in text]
    if parts:
        return -max(parts)[1]
    return lettered if lettered >= 0 and said[1:2] in ("", "\n") else None


def mark(questions: Sequence[Question], chosen: Sequence[int | None]) -> Marks:
    """What the chosen answers are worth.

    Args:
        questions: of one region, the recognition first.
        chosen: an index into each one's choices, or None.

    Raises:
        ValueError: the recognition does not come first.
    """
    if not questions or questions[0].type != "recognition":
        raise ValueError("a region's first question is the recognition")
    found = [
        0 if index is None else question.choices[index].score
        for question, index in zip(questions, chosen, strict=True)
    ]
    recognised = {"correct": True, "incorrect": False}.get(str(found[0]))
    worth = [float(min(0, score) if recognised is False else score) for score in found[1:]]  # pyright: ignore
    by_type = {
        kind: [value for value, question in zip(worth, questions[1:], strict=True) if question.type == kind]
        for kind in ("positive", "negative")
    }
    counted = by_type["positive"] + by_type["negative"]
    return Marks(
        recognised,
        _mean(by_type["positive"]),
        _mean(by_type["negative"]),
        _mean(counted) or 0.0,
        (float(recognised is True), *worth),
    )


class Averages(NamedTuple):
    """Of all regions: means of their means, and the mean of those two, the benchmark's number."""

    positive: float
    negative: float
    average: float


def average(marks: Sequence[Marks]) -> Averages:
    """A region without negative questions is left out of their mean; one without positive ones counts 0."""
    positive = _mean([each.positive or 0.0 for each in marks]) or 0.0
    negative = _mean([each.negative for each in marks if each.negative is not None]) or 0.0
    return Averages(positive, negative, (positive + negative) / 2)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
