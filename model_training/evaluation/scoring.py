"""The published protocol: what a judge is asked about a caption, how answers are read and scored.

A region's first question is the recognition (is it the right thing?). Positive questions follow (is what the
caption says right?), then negative ones (does it keep to its region?). Each choice has a score from -1 to 1.
If the recognition fails, no other answer scores above 0. An answer that names no choice scores 0.

Source: the evaluation scripts of PerceptionDLM (ParaDLC-Bench) and of Describe Anything (DLC-Bench). They
disagree, or stop with an error, in three cases. Here an empty answer names no choice, a letter beyond the
choices names none, and a recognition whose answer names no choice caps no other score and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from ...schemas.evaluation import BenchmarkKind

LETTERS = "ABCDE"
MAX_TOKENS = 300
"""Length of a judge's answer, at most."""

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
_WHERE: dict[BenchmarkKind, str] = {"paradlc": "this image", "dlc": "an image"}


class Choice(NamedTuple):
    """An answer that can be chosen, and its score: "correct" or "incorrect" for a recognition."""

    text: str
    score: float | str


class Question(NamedTuple):
    """A multiple-choice question about a caption.

    Attributes:
        text: the question.
        choices: at most five.
        type: "recognition", "positive" or "negative".
        subtype: kind of a negative question; "" where the benchmark gives none.
    """

    text: str
    choices: tuple[Choice, ...]
    type: str
    subtype: str = ""


class Scores(NamedTuple):
    """The scores of one region.

    Attributes:
        recognised: whether the recognition succeeded; None if its answer named no choice.
        positive, negative: mean score of the questions of that type; None if there are none.
        score: mean score of both types together.
        worth: score of each question in order, after the cap; of the recognition 1 or 0.
    """

    recognised: bool | None
    positive: float | None
    negative: float | None
    score: float
    worth: tuple[float, ...]


def recognition_question(kind: BenchmarkKind, class_name: str) -> Question:
    """The question that comes first: whether the caption describes an object of the region's class."""
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


def judge_prompt(kind: BenchmarkKind, caption: str, question: Question) -> str:
    """The text that the judge is sent, exactly as published."""
    lines = [question.text, *(f"{LETTERS[i]}. {choice.text}" for i, choice in enumerate(question.choices))]
    return _RULES.format(where=_WHERE[kind], caption=caption, question="\n".join(lines).strip())


def parse_answer(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that an answer names; None if it names none. The first rule that applies decides:

    1. The answer is a choice, a letter, or a letter and its choice.
    2. It contains exactly one choice.
    3. It begins with a letter and a full stop.
    4. It contains several choices: the one that begins last, and of those the longest.
    5. It is part of a choice: the longest such choice.
    6. It begins with a letter and a line break.
    """
    text = answer.strip().lower()
    if not text:
        return None
    texts = [choice.strip().lower() for choice in choices]
    letters = LETTERS.lower()[: len(texts)]
    for index, choice in enumerate(texts):
        if text in (choice, f"{letters[index]}. {choice}", letters[index]):
            return index
    contained = [
        (text.index(choice), len(choice), -index) for index, choice in enumerate(texts) if choice in text
    ]
    if len(contained) == 1:
        return -contained[0][2]
    lettered = letters.find(text[0])
    if lettered >= 0 and text[1:2] == ".":
        return lettered
    if contained:
        return -max(contained)[2]
    parts = [(len(choice), -index) for index, choice in enumerate(texts) if text in choice]
    if parts:
        return -max(parts)[1]
    return lettered if lettered >= 0 and text[1:2] in ("", "\n") else None


def score_region(questions: Sequence[Question], chosen: Sequence[int | None]) -> Scores:
    """Score the answers about one region.

    Args:
        questions: the region's questions, the recognition first.
        chosen: for each question the index of the chosen choice; None if the answer named none.

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
    return Scores(
        recognised,
        _mean(by_type["positive"]),
        _mean(by_type["negative"]),
        _mean(counted) or 0.0,
        (float(recognised is True), *worth),
    )


class Averages(NamedTuple):
    """Means over all regions. `average`, the mean of the other two, is the benchmark's number."""

    positive: float
    negative: float
    average: float


def average_scores(regions: Sequence[Scores]) -> Averages:
    """Average the scores of regions.

    As in the published scripts, a region without positive questions counts as 0 in their mean, and one
    without negative questions is left out of theirs.
    """
    positive = _mean([each.positive or 0.0 for each in regions]) or 0.0
    negative = _mean([each.negative for each in regions if each.negative is not None]) or 0.0
    return Averages(positive, negative, (positive + negative) / 2)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
