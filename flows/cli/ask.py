"""The command `ask`: questions about images, or about regions of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...schemas.answering import AnswerOptions
from ...schemas.errors import ConfigError
from .arguments import Device, Dtype, options_of

if TYPE_CHECKING:
    from rich.console import Console

    from ...model_training.decoding.answered import Answered, AskedAbout


@options_of(AnswerOptions)
def ask(
    model: Annotated[Path, typer.Option(help="Folder of a saved PerceptionDLM.", show_default=False)],
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTION...",
            help="What is asked. <image> says where an image stands; without it, all stand first. Several "
            "questions are answered apart, or with --conversation one after the other.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image. Repeat the option for several; leave it out for text alone."),
    ] = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask about regions of the image, each alone: their masks, as `paracaption caption` takes "
            "them. Give the question before, since several paths may follow.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="The image in what --masks gives, as of `caption`.")] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X1,Y1,X2,Y2",
            help="Ask about a box of the image, in pixels. Repeat the option for several, each asked alone.",
            show_default=False,
        ),
    ] = None,
    conversation: Annotated[
        bool, typer.Option("--conversation", help="Ask the questions as turns of one conversation.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print an answer while it is decoded. For one question.")
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(help="File to write with a JSON object a line for each answer; - prints them alone."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that are answered at once.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **decoding: Any,
) -> None:
    """Answer questions about images, about regions of one, or about text alone."""
    from rich.console import Console

    from ...model_training.decoding import answered as answering
    from ...model_training.decoding.caption_photo import check_outputs
    from ...model_training.decoding.chat import Chat

    options = AnswerOptions.checked(decoding)
    if not questions:
        swallowed = f"; {masks[-1]!r} after --masks counts as masks" if masks else ""
        raise ConfigError(
            f"no question{swallowed}; give the question first, as in `paracaption ask 'What is it?' ...`"
        )
    for each in filter(_is_file, questions):
        raise ConfigError(f"{each!r} counts as a question, and is a file; for another image, repeat --image")
    check_outputs(record=json)
    asked = _asked(questions, image or [], masks, key, box)
    if conversation and (masks or box):
        raise ConfigError("--conversation is about whole images; leave out --masks and --box")
    if stream and (len(asked) > 1 or json is not None):
        raise ConfigError(
            "--stream prints one answer; give one question about one region or all of it, and no --json"
        )
    notices = Console(stderr=True)
    with notices.status("loading the model"):
        chat = Chat.load(model, device, dtype)
    if stream:
        answering.stream(chat, asked[0], options, lambda part: print(part, end="", flush=True))
        print()
        return
    if conversation:
        answers = answering.converse(chat, asked, options)
    else:
        answers = answering.ask_in_turn(chat, asked, options, batch_size)
    found: list[Answered] = []
    try:
        for each in _awaited(answers, notices):
            found.append(each)
            if json == "-":
                print(answering.to_lines([each], chat, options), end="", flush=True)
            else:
                print(_shown(each, len(questions) > 1), flush=True)
    finally:  # what was answered before one that fails is kept
        if json not in (None, "-") and found:
            answering.write_lines(found, chat, options, json)
            print(json)


def _awaited(answers: Iterator[Answered], notices: Console) -> Iterator[Answered]:
    """Answers, with a notice while each is waited for and none while it is printed."""
    while True:
        with notices.status("answering"):
            each = next(answers, None)
        if each is None:
            return
        yield each


def _is_file(question: str) -> bool:
    with suppress(OSError, ValueError):  # longer than a name may be
        return Path(question).is_file()
    return False


def _shown(answered: Answered, several: bool) -> str:
    """An answer with the number of its region; of several questions, each stands above its first answer."""
    (question, _, _, number), answer = answered
    line = f"{number}  {answer.text}" if number else answer.text
    if not several:
        return line
    return f"  {line}" if number > 1 else f"{question.text}\n  {line}"


def _asked(
    questions: list[str],
    images: list[Path],
    masks: list[str] | None,
    key: str | None,
    boxes: list[str] | None,
) -> list[AskedAbout]:
    """The questions, each with what it is about."""
    from ...model_training.decoding import answered as answering
    from ...model_training.decoding.read_regions import read_photo_regions

    if key is not None and not masks:
        raise ConfigError("--key names an image in what --masks gives; give --masks too, or leave it out")
    if not masks and not boxes:
        return answering.about_images(questions, images)
    if masks and boxes:
        raise ConfigError("--masks and --box both give regions; give one of the two")
    if len(images) > 1:
        raise ConfigError(f"{len(images)} images; a question about a region has one: give --image once")
    if masks:
        return answering.about_regions(
            questions, read_photo_regions(images[0] if images else None, masks, key)
        )
    if not images:
        raise ConfigError("--box needs the photo; give it with --image")
    return answering.about_boxes(questions, images[0], boxes or [])
