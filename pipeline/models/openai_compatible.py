"""The `openai` captioner and judge: any server that speaks OpenAI's chat completions, such as `vllm serve`.

The captioner sends the whole photo, plain, and then a crop around the region with its mask outlined: so a
server's prefix cache holds the photo once for all its regions. Both pictures show the pixels as stored, EXIF
orientation unapplied, because masks refer to them.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from ...filters import rle
from ...schemas.errors import BadRecord, ConfigError
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord, Region
from ..io import photos
from . import prompts
from .chat_client import Ask, ChatClient, ServerOptions, parse_json
from .logprob_margin import margin_of_text
from .options import read_options
from .protocols import Answer, Checked, Question
from .vllm_judge import PROMPTS

VERSION = "1"

CAPTION_PROMPT = "describe_region"
TOP_LOGPROBS = 20
"""Alternatives asked for per token: the most that OpenAI gives."""

LINE_RGB = (230, 30, 30)
RIM_RGB = (255, 255, 255)


class CaptionerOptions(ServerOptions, frozen=True, kw_only=True):
    """The options of the `openai` captioner, besides those of the server.

    Attributes:
        image_side_px: longest side of both pictures; larger ones are scaled down.
        context_px: least margin around the region's box in the crop, in pixels of the photo.
        context_share: least margin as a share of the box's longer side; the larger of the two counts.
        image_format: "jpeg", or "png" for no loss at five times the bytes.
        max_pixels: larger photos are refused.
    """

    image_side_px: Annotated[int, Meta(ge=32)] = 1024
    context_px: Annotated[int, Meta(ge=0)] = 16
    context_share: Annotated[float, Meta(ge=0)] = 0.25
    image_format: Literal["jpeg", "png"] = "jpeg"
    max_pixels: Annotated[int, Meta(ge=1)] = 200_000_000


class JudgeOptions(ServerOptions, frozen=True, kw_only=True):
    """The options of the `openai` judge, besides those of the server.

    Attributes:
        logprobs: whether to ask for log-probabilities, from which margins come; some servers refuse them.
    """

    logprobs: bool = True


class _Served:
    """What the captioner and the judge share.

    Args:
        options: see `CaptionerOptions` and `JudgeOptions`.

    Raises:
        ConfigError: an option is unknown, wrong, or would write a key down.
    """

    protocol: str
    kind: type[ServerOptions]
    names: tuple[str, ...]

    def __init__(self, **options: Any):
        self.options: Any = self._read(options)
        self.client = ChatClient(self.options, f"{self.protocol}.options")

    @classmethod
    def _read(cls, options: dict[str, Any]) -> Any:
        return read_options(cls.kind, options, f"{cls.protocol}.options")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Model, revision, prompts and generation settings; neither the server's address nor the key."""
        given = cls._read(options)
        return {
            "version": VERSION,
            **given.identity(),
            **prompts.prompts_identity(cls.names),
            **cls._also(given),
        }

    @classmethod
    def _also(cls, given: Any) -> dict[str, str]:
        return {}

    @classmethod
    def check(cls, **options: Any) -> Checked:
        """Ask the server for its models.

        Raises:
            ConfigError: it does not answer, refuses the key, or does not have the model.
        """
        given = cls._read(options)
        where = f"{cls.protocol}.options"
        served = ChatClient(given, where).models()
        if given.model not in served:
            raise ConfigError(
                f"{where}.model: {given.base_url} has no {given.model!r}; "
                f"name one that it has: {', '.join(served[:20])}"
            )
        return Checked(f"{given.model} at {given.base_url}")

    def report(self) -> dict[str, float]:
        """Requests sent and tried again, since the start."""
        return {"requests": self.client.num_requests, "requests_tried_again": self.client.num_retries}


class OpenAICaptioner(_Served):
    """Describes regions from two pictures each."""

    protocol, kind, names = "captioner", CaptionerOptions, (CAPTION_PROMPT,)

    @classmethod
    def _also(cls, given: Any) -> dict[str, str]:
        names = ("image_side_px", "context_px", "context_share", "image_format")
        return {"pictures": ", ".join(f"{name} {getattr(given, name)}" for name in names)}

    def caption(self, images: list[ImageRecord]) -> list[list[str | BadRecord | None]]:
        """One caption per live region of each image; a `BadRecord` for a region that has none.

        Raises:
            StageFailed: the server is down, refuses the key or does not know the model.
        """
        unread: dict[int, BadRecord] = {}
        found = self.client.run(self._asks(images, unread), _caption)
        found |= unread
        indices = iter(range(len(found)))
        return [[found[next(indices)] for _ in image.live()] for image in images]

    def requests(self, image: ImageRecord) -> Iterator[dict[str, Any]]:
        """The bodies of the requests about an image's live regions, for a model that no server has.

        Raises:
            BadRecord: the photo cannot be read.
        """
        unread: dict[int, BadRecord] = {}
        yield from (self.client.body(ask) for ask in self._asks([image], unread))
        for bad in unread.values():
            raise bad

    def _asks(self, images: list[ImageRecord], unread: dict[int, BadRecord]) -> Iterator[Ask]:
        """A request per region. A photo is decoded once, when its first region's turn comes."""
        prompt = prompts.load_prompt(CAPTION_PROMPT)
        index = 0
        for image in images:
            live = image.live()
            try:
                photo = photos.read_pixels(image, self.options.max_pixels)
            except BadRecord as bad:
                unread |= dict.fromkeys(range(index, index + len(live)), bad)
                index += len(live)
                continue
            whole = self._url(photo)
            for region in live:
                crop = self._url(outlined_crop(photo, region, self.options))
                system, user = prompt.messages()
                content = [
                    {"type": "image_url", "image_url": {"url": whole}},
                    {"type": "image_url", "image_url": {"url": crop}},
                    {"type": "text", "text": user["content"]},
                ]
                messages = [system, {"role": "user", "content": content}]
                yield Ask(
                    index, {"messages": messages, "max_tokens": self.options.max_tokens or prompt.max_tokens}
                )
                index += 1

    def _url(self, pixels: np.ndarray) -> str:
        cv2: Any = importlib.import_module("cv2")
        small = _shrunk(pixels, self.options.image_side_px)
        settings = [cv2.IMWRITE_JPEG_QUALITY, 92] if self.options.image_format == "jpeg" else []
        done, data = cv2.imencode(f".{self.options.image_format}", small[..., ::-1], settings)
        assert done
        return f"data:image/{self.options.image_format};base64,{base64.b64encode(data).decode()}"


class OpenAIJudge(_Served):
    """Answers questions about captions, in a JSON object that a schema constrains."""

    protocol, kind, names = "judge", JudgeOptions, tuple(PROMPTS.values())

    @classmethod
    def _also(cls, given: Any) -> dict[str, str]:
        return {"logprobs": str(given.logprobs)}

    def ask(self, questions: list[Question]) -> list[Answer | BadRecord]:
        """One answer per question, in order; a `BadRecord` for one that has none.

        Raises:
            ValueError: a question of a kind that is not known; a bug of the caller.
            StageFailed: the server is down, refuses the key or does not know the model.
        """
        unknown = {question.kind for question in questions} - set(PROMPTS)
        if unknown:
            raise ValueError(f"questions of kind {sorted(unknown)}; known are {sorted(PROMPTS)}")
        answers: dict[int, Answer | BadRecord] = {}
        for kind in sorted({question.kind for question in questions}):
            prompt = prompts.load_prompt(PROMPTS[kind])
            asks = (
                Ask(index, self._body(prompt, question))
                for index, question in enumerate(questions)
                if question.kind == kind
            )
            answers |= self.client.run(asks, lambda choice, prompt=prompt: _judged(prompt, choice))
        return [answers[index] for index in range(len(questions))]

    def _body(self, prompt: prompts.Prompt, question: Question) -> dict[str, Any]:
        fields = {"caption": question.caption}
        if question.kind == "verify":
            fields["category"] = question.category or ""
        body: dict[str, Any] = {
            "messages": prompt.messages(**fields),
            # the JSON around the answer takes some ten tokens
            "max_tokens": self.options.max_tokens or prompt.max_tokens + 24,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": prompt.name, "strict": True, "schema": prompt.schema()},
            },
        }
        if prompt.choices and self.options.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body


def _caption(choice: dict[str, Any]) -> str | None:
    """The caption; None if the model said nothing."""
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
        raise BadRecord(Reason.ANSWER_INVALID, f"the caption is not a text: {str(text)[:60]!a}")
    if choice.get("finish_reason") == "content_filter":
        raise BadRecord(Reason.ANSWER_INVALID, "the server's content filter stopped the caption")
    return (text or "").strip() or None


def _judged(prompt: prompts.Prompt, choice: dict[str, Any]) -> Answer:
    text = choice["message"].get("content")
    try:
        answer = parse_json(text)["answer"]
        valid = isinstance(answer, str) and prompt.accepts(answer)
    except (ValueError, TypeError, LookupError):
        answer, valid = "", False
    if not valid or not isinstance(text, str):
        raise BadRecord(Reason.ANSWER_INVALID, f"outside the schema of {prompt.name}: {str(text)[:60]!a}")
    if not prompt.choices:
        return Answer("" if answer == "none" else answer)
    return Answer(answer, _margin(prompt, answer, text, choice.get("logprobs")))


def _margin(prompt: prompts.Prompt, answer: str, text: str, logprobs: Any) -> float | None:
    """The margin of the first choice, where the listed tokens write the answer's value; None without them."""
    start = text.find(f'"{answer}"', text.find(":")) + 1
    try:
        position = -"".join(entry["token"] for entry in logprobs["content"]).index(text)
        for entry in logprobs["content"]:
            token = entry["token"]
            end = position + len(token)
            if end > start and position < start + len(answer):
                lead = text[max(position, 0) : max(position, start)]
                listed = [
                    (one["token"].removeprefix(lead), float(one["logprob"]))
                    for one in entry["top_logprobs"]
                    if one["token"].startswith(lead)
                ]
                margin = margin_of_text(prompt.choices, text[start:position], listed)
                if margin is not None:
                    return margin
            position = end
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None  # servers differ in what they send; a judge may have no margin
    return None


def outlined_crop(photo: np.ndarray, region: Region, options: CaptionerOptions) -> np.ndarray:
    """The photo around the region's box, at most `image_side_px` a side, with the mask's outline drawn.

    Args:
        photo: (H, W, 3) uint8 RGB.
        region: its mask is of the photo's size.
        options: how much is around it.

    Returns:
        (h, w, 3) uint8 RGB, a copy.
    """
    cv2: Any = importlib.import_module("cv2")
    assert region.rle is not None
    x, y, w, h = region.bbox
    around = max(options.context_px, round(options.context_share * max(w, h)))
    top, left = max(0, y - around), max(0, x - around)
    rows, columns = slice(top, y + h + around), slice(left, x + w + around)
    crop = np.ascontiguousarray(_shrunk(photo[rows, columns], options.image_side_px))
    mask = 255 * rle.decode(region.rle)[rows, columns]
    size = (crop.shape[1], crop.shape[0])
    mask = cv2.resize(np.ascontiguousarray(mask), size, interpolation=cv2.INTER_AREA)
    crop = crop.copy()
    outlines, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(max(size) / 300))
    for color, thickness in ((RIM_RGB, 3 * width), (LINE_RGB, width)):
        cv2.drawContours(crop, outlines, -1, color, thickness)
    return crop


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    cv2: Any = importlib.import_module("cv2")
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)
