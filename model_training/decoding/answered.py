"""Questions of the command line, and their answers as text and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...pipeline.io import files
from ...schemas.answering import AnswerOptions
from ...schemas.errors import ConfigError
from .chat import Answer, Chat, Question

if TYPE_CHECKING:
    from .read_regions import PhotoRegions, Region


class AskedAbout(NamedTuple):
    """A question, and what its record says of it.

    Attributes:
        question: as `Chat` takes it.
        images: names of the images.
        region: the region that it is about; None for whole images.
        number: of the region, from 1 on.
    """

    question: Question
    images: list[str]
    region: Region | None = None
    number: int = 0


class Answered(NamedTuple):
    """A question with its answer."""

    asked: AskedAbout
    answer: Answer


def about_images(texts: Sequence[str], images: Sequence[str | Path]) -> list[AskedAbout]:
    """Each question about all images together."""
    return [AskedAbout(Question(text, [*images]), [str(image) for image in images]) for text in texts]


def about_regions(texts: Sequence[str], photo: PhotoRegions) -> list[AskedAbout]:
    """Each question about each region of a photo."""
    return [
        AskedAbout(Question(text, [photo.pixels], region=region.mask.rle), [photo.name], region, number)
        for text in texts
        for number, region in enumerate(photo.regions, 1)
    ]


def about_boxes(texts: Sequence[str], image: str | Path, boxes: Sequence[str]) -> list[AskedAbout]:
    """Each question about each box of a photo.

    Raises:
        ConfigError: a box is not four numbers.
    """
    corners = [_corners(box) for box in boxes]
    return [
        AskedAbout(Question(text, [image], region=box), [str(image)], None, number)
        for text in texts
        for number, box in enumerate(corners, 1)
    ]


def ask_in_turn(
    chat: Chat, asked: Sequence[AskedAbout], options: AnswerOptions, batch_size: int = 8
) -> Iterator[Answered]:
    """Answer questions that do not know of each other, all before the first answer is given."""
    answers = chat.ask_all([each.question for each in asked], options, batch_size=batch_size)
    yield from map(Answered, asked, answers)


def converse(chat: Chat, asked: Sequence[AskedAbout], options: AnswerOptions) -> Iterator[Answered]:
    """Answer the questions of one conversation, each after the answers to those before it."""
    turns: list[tuple[str, str]] = []
    for each in asked:
        each = each._replace(question=replace(each.question, turns=tuple(turns)))
        [answer] = chat.ask_all([each.question], options)
        turns.append((each.question.text, answer.text))
        yield Answered(each, answer)


def stream(chat: Chat, asked: AskedAbout, options: AnswerOptions, show: Callable[[str], None]) -> str:
    """Answer a question, and show each part of the answer when nothing of it can change any more."""
    shown = ""
    for step in chat.ask_steps(asked.question, options):
        if len(step.settled) > len(shown):
            show(step.settled[len(shown) :])
            shown = step.settled
    return shown


def to_lines(answered: Sequence[Answered], chat: Chat, options: AnswerOptions) -> str:
    """One JSON object for each answer, a line each."""
    return "".join(json.dumps(to_record(each, chat, options), ensure_ascii=False) + "\n" for each in answered)


def write_lines(answered: Sequence[Answered], chat: Chat, options: AnswerOptions, path: str | Path) -> None:
    """Write the JSON lines, which appear whole or not at all."""
    with files.write_atomic(path) as file:
        file.write(to_lines(answered, chat, options).encode())


def to_record(answered: Answered, chat: Chat, options: AnswerOptions) -> dict[str, Any]:
    """An answer with its question, and how it was made; `bbox` is x, y, width, height in pixels."""
    (question, images, region, number), answer = answered
    record: dict[str, Any] = {"question": question.text, "images": images}
    if question.turns:
        record["turns"] = [list(turn) for turn in question.turns]
    if region is not None:
        record["region"] = {"number": number, "label": region.label, "bbox": list(region.mask.bbox)}
    elif question.region is not None:
        x1, y1, x2, y2 = question.region
        record["region"] = {"number": number, "label": None, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    return record | {
        "answer": answer.text,
        "ended": answer.ended,
        "tokens": len(answer.tokens),
        "confidence": round(answer.confidence, 6),
        "forwards": answer.forwards,
        "seconds": round(answer.seconds, 4),
        "agreement": answer.agreement,
        "options": options.model_dump(),
        "model": chat.about(),
    }


def _corners(box: str) -> list[float]:
    try:
        corners = [float(number) for number in box.split(",")]
    except ValueError:
        corners = []
    if len(corners) != 4:
        raise ConfigError(f"--box {box}: give four numbers x1,y1,x2,y2 in pixels, such as 10,20,110,90")
    return corners
