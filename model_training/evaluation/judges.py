"""The judges that answer questions about captions: a language model in this process or behind a server.

Both are asked as published: one user turn, greedy decoding, at most 300 tokens of free text, which
`scoring.parse_answer` reads. A judge that sees images also gets a crop around the region and its mask.
"""

from __future__ import annotations

import base64
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np

from ...pipeline.io import weights
from ...pipeline.models import vllm_judge
from ...pipeline.models.chat_client import Ask, ChatClient, ServerOptions
from ...pipeline.models.options import read_options
from ...schemas.errors import BadRecord
from ...schemas.evaluation import Judge
from ...schemas.reasons import Reason
from .scoring import MAX_TOKENS

if TYPE_CHECKING:
    from ...pipeline.models.vllm_engine import Engine

COMPACT_JSON = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
"""Settings of the engine. A small model that may put any white space into its JSON may never finish it."""

_LEAST_PX = 56
"""Least side of a region's box in pixels; smaller ones are enlarged before their surroundings are cut out."""


class JudgeRequest(NamedTuple):
    """One request to a judge.

    Attributes:
        prompt: text of the user's turn.
        pictures: PNG bytes of a crop and of its mask; empty for a judge that sees no images.
        schema: JSON schema that the answer must follow; None for free text.
        max_tokens: length of the answer, at most.
        check: raises `BadRecord` for an answer that cannot be read. A server is asked for another
            one then, less greedily, and twice at most; a judge in this process is not.
    """

    prompt: str
    pictures: tuple[bytes, ...] = ()
    schema: dict[str, Any] | None = None
    max_tokens: int = MAX_TOKENS
    check: Callable[[str], object] | None = None


class BenchJudge(Protocol):
    """Answers requests with text.

    Attributes:
        sees_images: whether it uses the pictures of a request.
    """

    sees_images: bool

    def answer(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, str | BadRecord]]:
        """Yield (position, answer) of each request, in any order; a `BadRecord` where there is no answer."""
        ...

    def close(self) -> None:
        """Free the engine or the connection."""
        ...


class ChatOptions(ServerOptions, frozen=True, kw_only=True):
    """The options of `openai`: those of the server, and `images`, whether the model is shown pictures."""

    images: bool = False


def identity(config: Judge) -> dict[str, str]:
    """Everything that a judge's answers depend on. The judge is not loaded.

    Raises:
        ConfigError: an option is wrong.
    """
    if config.name == "vllm":
        return {"name": "vllm", **vllm_judge.VllmJudge.identity(**config.options)}
    given = _chat_options(config)
    return {"name": "openai", "images": str(given.images), **given.identity()}


def load_judge(config: Judge) -> BenchJudge:
    """Build the judge that a configuration names.

    Raises:
        ConfigError: an option is wrong.
    """
    if config.name != "vllm":
        return ServedChat(config)
    options = read_options(vllm_judge.VllmOptions, config.options, "judge.options")
    options = msgspec.structs.replace(options, engine={**COMPACT_JSON, **options.engine})
    folder = weights.folder(options.model, "judge.options.model")
    return VllmChat(vllm_judge.start_engine(folder, options), options.max_in_flight)


def clocked(
    judge: BenchJudge, requests: Iterable[JudgeRequest]
) -> Iterator[tuple[int, str | BadRecord, float]]:
    """A judge's answers, each with the seconds since the one before it.

    All of them together are what the requests took, with making them, however many are asked side by side.
    """
    start = time.perf_counter()
    for position, answer in judge.answer([*requests]):
        now = time.perf_counter()
        yield position, answer, now - start
        start = now


class VllmChat:
    """A language model in this process. It sees no images.

    Args:
        engine: engine of a chat model.
        max_in_flight: number of prompts inside the engine at once.
    """

    sees_images = False

    def __init__(self, engine: Engine, max_in_flight: int = 512):
        self.engine, self.max_in_flight = engine, max_in_flight
        self._control = sorted(self.engine.tokenizer.get_added_vocab(), key=len, reverse=True)

    def answer(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, str | BadRecord]]:
        """See `BenchJudge.answer`."""
        from vllm import TokensPrompt

        from ...pipeline.models.vllm_engine import Request

        max_len = self.engine.engine.model_config.max_model_len
        prompts = [self._tokens(request.prompt) for request in requests]
        room = [max_len - request.max_tokens for request in requests]
        for number, tokens in enumerate(prompts):
            if len(tokens) > room[number]:
                detail = f"{len(tokens)} tokens, {room[number]} fit; raise judge.options.engine.max_model_len"
                yield number, BadRecord(Reason.MODEL_ERROR, detail)
        fitting = (
            Request(number, TokensPrompt(prompt_token_ids=tokens), _params(requests[number]))
            for number, tokens in enumerate(prompts)
            if len(tokens) <= room[number]
        )
        for number, output in self.engine.run(fitting, self.max_in_flight):
            yield number, _checked(output.text, requests[number].check)

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _tokens(self, prompt: str) -> list[int]:
        turn = {"role": "user", "content": vllm_judge.defused(prompt, self._control)}
        return vllm_judge.render_chat(self.engine.tokenizer, [turn])


def _checked(answer: str, check: Callable[[str], object] | None) -> str | BadRecord:
    try:
        if check:
            check(answer)
    except BadRecord as error:
        return error
    return answer


def _params(request: JudgeRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    constraint = StructuredOutputsParams(json=request.schema) if request.schema else None
    return SamplingParams(temperature=0.0, max_tokens=request.max_tokens, structured_outputs=constraint)


class ServedChat:
    """A model behind a server that speaks OpenAI's chat completions."""

    def __init__(self, config: Judge):
        self.options = _chat_options(config)
        self.sees_images = self.options.images
        self.client = ChatClient(self.options, "judge.options")

    def answer(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, str | BadRecord]]:
        """See `BenchJudge.answer`.

        Raises:
            StageFailed: the server is down, refuses the key or does not know the model.
        """
        bodies = (
            Ask(number, self._body(request), partial(_answer_of, check=request.check))
            for number, request in enumerate(requests)
        )
        yield from self.client.run(bodies, _answer_of).items()

    def close(self) -> None:
        """Do nothing: no connection is kept."""

    def _body(self, request: JudgeRequest) -> dict[str, Any]:
        content: Any = request.prompt
        if request.pictures:
            pairs = zip(("The image:\n", "\nThe mask of the image:\n"), request.pictures, strict=True)
            content = [part for title, png in pairs for part in (_text_part(title), _image_part(png))]
            content.append(_text_part(f"\n{request.prompt}\n"))
        limit = self.options.max_tokens or request.max_tokens
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": limit, "top_p": 1}
        if request.schema:
            named = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body


def _answer_of(choice: dict[str, Any], check: Callable[[str], object] | None = None) -> str:
    text = choice["message"].get("content")
    if not isinstance(text, str):
        raise BadRecord(Reason.ANSWER_INVALID, f"the answer is not a text: {str(text)[:60]!a}")
    if check:
        check(text)
    return text


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image_part(png: bytes) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"},
    }


def _chat_options(config: Judge) -> ChatOptions:
    return read_options(ChatOptions, config.options, "judge.options")


def crop_and_mask(pixels: np.ndarray, mask: np.ndarray) -> tuple[bytes, bytes]:
    """The pictures of a region that a judge sees: the photo around it, and the mask cut out in the same way.

    The crop has three times the height and the width of the region's box, which is in its middle and is
    enlarged to at least 56 pixels a side. What would lie outside of the photo is cut off.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, not empty.

    Returns:
        PNG bytes of the crop and of the mask.
    """
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    middle_y, middle_x = rows[0] + height / 2, columns[0] + width / 2
    height, width = max(int(height), _LEAST_PX), max(int(width), _LEAST_PX)
    top, left = int(middle_y - height / 2), int(middle_x - width / 2)
    cut = (
        slice(max(top - height, 0), top + 2 * height),
        slice(max(left - width, 0), left + 2 * width),
    )
    return _png(pixels[cut][..., ::-1]), _png(np.where(mask[cut], 255, 0).astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    cv2: Any = importlib.import_module("cv2")
    done, data = cv2.imencode(".png", np.ascontiguousarray(pixels))
    assert done
    return data.tobytes()
