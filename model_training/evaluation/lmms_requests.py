"""What lmms-eval asks, as questions and options of `Chat`. Nothing here needs lmms-eval or torch."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...schemas.answering import AnswerOptions
from ...schemas.errors import ConfigError
from ...schemas.harness import Asking
from ..decoding.chat import Question
from ..model.layout import IMAGE

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_DEFAULT_UNTIL = "\n\n"
"""lmms-eval's own entry of `until` for tasks that have none. Its other chat models leave it out, too."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "top_k": (0, -1, None),
    "repetition_penalty": (1, 1.0, None),
    "n": (1, None),
    "best_of": (1, None),
    "num_return_sequences": (1, None),
}
"""Arguments that would change answers and that `Chat` does not have, with the values that change nothing."""

_WITHOUT_EFFECT = {"do_sample", "until", "max_gen_toks", "image_aspect_ratio"}
_reported: set[tuple[str, str]] = set()


def answer_options(kwargs: Mapping[str, Any] | None, asking: Asking, task: str) -> AnswerOptions:
    """How a request is answered.

    `max_new_tokens`, `until`, `temperature` and `top_p` are lmms-eval's. Any other field of `AnswerOptions`,
    such as `steps`, may stand in a task's `generation_kwargs`, too. An argument that is not known here is
    reported once in a log and has no effect.

    Args:
        kwargs: the task's `generation_kwargs`.
        asking: options that count more than these.
        task: name of the task, for messages.

    Raises:
        ConfigError: an argument asks for what a diffusion model does not do, such as a beam search, or a
            value is out of range.
    """
    given = dict(kwargs or {})
    fields = {name: given.pop(name) for name in tuple(given) if name in AnswerOptions.model_fields}
    fields = {name: value for name, value in fields.items() if value is not None}
    if "max_gen_toks" in given:
        fields.setdefault("max_new_tokens", given["max_gen_toks"])
    if stops := stop_texts(kwargs):
        fields["stop"] = stops
    if not given.get("do_sample", True) or not fields.get("temperature"):
        fields.pop("top_p", None)
        fields["temperature"] = 0.0
    for name, value in given.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise ConfigError(
                f"{task}: generation_kwargs.{name}: {value!r}, which this model does not have; leave it out "
                "of the task"
            )
        if name not in _NEUTRAL and name not in _WITHOUT_EFFECT and (task, name) not in _reported:
            _reported.add((task, name))
            log.warning("%s: generation_kwargs.%s is not known here and has no effect", task, name)
    fields |= asking.options
    if asking.most_new_tokens and fields.get("max_new_tokens", 0) > asking.most_new_tokens:
        fields["max_new_tokens"] = asking.most_new_tokens
    return AnswerOptions.checked(fields, f"{task}: generation_kwargs")


def stop_texts(kwargs: Mapping[str, Any] | None) -> list[str]:
    """The texts that end an answer, without the one that lmms-eval adds where a task names none."""
    until = (kwargs or {}).get("until") or []
    listed = [until] if isinstance(until, str) else list(until)
    return [text for text in listed if text and text != _DEFAULT_UNTIL]


def question_of_messages(messages: Any, where: str) -> Question:
    """Messages as lmms-eval's chat models get them, as a question with the turns before it.

    Images stand where the messages have them, each on a line of its own. What a system message says stands
    before the first question.

    Raises:
        ConfigError: a message has anything but text and images, or the last one is no user's.
    """
    if not isinstance(messages, Sequence) or not messages:
        raise ConfigError(f"{where}: no messages; correct `doc_to_messages` of the task")
    turns: list[tuple[str, str]] = []
    images: list[Any] = []
    asked: list[str] = []
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = _joined(parts, images, where)
        if role == "assistant":
            turns.append(("\n".join(asked), text))
            asked = []
        else:
            asked.append(text)
    if not asked:
        raise ConfigError(f"{where}: the last message is the model's; correct `doc_to_messages` of the task")
    return Question("\n".join(asked), images, turns)


def _joined(parts: Sequence[Mapping[str, Any]], images: list[Any], where: str) -> str:
    """The text of a message, with a mark for each of its images, which are added to the list."""
    written = ""
    for part in parts:
        if part["type"] == "text":
            written += without_marks(part["text"])
        elif part["type"] == "image":
            images.append(part["url"])
            written += f"{IMAGE}\n"
        else:
            raise ConfigError(
                f"{where}: {part['type']} in a message; only text and images can be asked about"
            )
    return written


def question_of_text(text: str, images: Sequence[Any], where: str) -> Question:
    """A text and its images, as lmms-eval's simple models get them.

    The images stand where the text says `<image>`, if it does so once for each, and else before it.
    """
    for image in images:
        if isinstance(image, Mapping):
            raise ConfigError(f"{where}: a video or sound; only text and images can be asked about")
    if images and text.count(IMAGE) == len(images):
        return Question(text, list(images))
    return Question(f"{IMAGE}\n" * len(images) + without_marks(text), list(images))


def without_marks(text: str) -> str:
    """A text that speaks of `<image>` without showing one."""
    return text.replace(IMAGE, "image")


def finish_question(
    question: Question, doc: Mapping[str, Any], asking: Asking, options: AnswerOptions, where: str
) -> Question:
    """A question with its options, and with prompt and images as `asking` says.

    Raises:
        ConfigError: the template of the prompt does not fit the document.
    """
    text = question.text
    images: list[Any] = [*question.images]
    if asking.prompt is not None:
        plain = text.replace(f"{IMAGE}\n", "").replace(IMAGE, "")
        marks = [f"Image-{number}: {IMAGE}\n" for number in range(1, len(images) + 1)]
        if len(images) == 1 or not asking.number_images:
            marks = [f"{IMAGE}\n"] * len(images)
        text = "".join(marks) + without_marks(write_prompt(asking.prompt, plain, doc, where))
    if images and asking.scale_first_image != 1:
        images[0] = _enlarged(images[0], asking.scale_first_image)
    return dataclasses.replace(question, text=text, images=images, options=options)


def write_prompt(template: str, text: str, doc: Mapping[str, Any], where: str) -> str:
    """The prompt that a template makes of lmms-eval's own and of the document.

    Raises:
        ConfigError: the template is wrong, or names a field that the document lacks.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined)
    environment.filters["lettered"] = lettered
    try:
        return environment.from_string(template).render(text=text, doc=doc)
    except (TemplateError, TypeError) as error:
        raise ConfigError(f"{where}: asking.prompt: {error}; the fields are {', '.join(doc)}") from error


def lettered(choices: Sequence[Any]) -> str:
    """Choices as lines `A. ...`, `B. ...`."""
    return "\n".join(f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(choices))


def cut_answer(text: str, kwargs: Mapping[str, Any] | None, asking: Asking) -> str:
    """An answer as lmms-eval gets it: up to the first stop text, and shortened if `asking` says so."""
    for stop in stop_texts(kwargs):
        text = text.partition(stop)[0]
    text = text.strip()
    return shorten_answer(text) if asking.short_answer else text


def shorten_answer(text: str) -> str:
    """The word or letter of a short answer, by the rule of PerceptionDLM's released code.

    Yes and No count if the answer has up to four characters; a letter A to F before a point always.
    """
    if len(text) <= 4 and (found := re.search("Yes|No", text)):
        return "Yes" if "Yes" in text else found[0]
    return text[0] if re.match(r"[A-F]\..", text, re.DOTALL) else text


def _enlarged(image: Image.Image, factor: int) -> Image.Image:
    from PIL import Image

    width, height = image.size
    return image.resize((width * factor, height * factor), Image.Resampling.BILINEAR)
