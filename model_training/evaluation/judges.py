"""Who answers the questions about captions: a language model in this process, or one behind a server.

Both are asked as published: one user turn, greedy, at most 300 tokens, the answer free text that
`protocol.parse` reads. A judge that sees images first gets a crop around the region and its mask.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterator, Sequence
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
from .protocol import MAX_TOKENS

if TYPE_CHECKING:
    from ...pipeline.models.engine import Engine

COMPACT = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
"""Of the engine: a small model that may put any white space into its JSON never comes to the end of it."""

_LEAST_PX = 56
"""A region's box is taken to be at least so large before its surroundings are cut out with it."""


class Asked(NamedTuple):
    """What a judge is asked.

    Attributes:
        prompt: the user's turn.
        pictures: that it looks at, PNG bytes each: a crop and its mask, or none.
        schema: JSON schema that constrains the answer; None: free text.
        max_tokens: of the answer.
    """

    prompt: str
    pictures: tuple[bytes, ...] = ()
    schema: dict[str, Any] | None = None
    max_tokens: int = MAX_TOKENS


class BenchJudge(Protocol):
    """Answers prompts in free text.

    Attributes:
        sees_images: whether it wants pictures.
    """

    sees_images: bool

    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[int, str | BadRecord]]:
        """(position, answer) of each, in whatever order they come; a `BadRecord` for one that has none."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class ChatOptions(ServerOptions, frozen=True, kw_only=True):
    """The options of `openai`: those of the server, and `images`: whether the model is shown pictures."""

    images: bool = False


def identity(config: Judge) -> dict[str, str]:
    """What a judge's answers depend on, without loading it.

    Raises:
        ConfigError: an option is wrong.
    """
    if config.name == "vllm":
        return {"name": "vllm", **vllm_judge.VllmJudge.identity(**config.options)}
    given = _chat_options(config)
    return {"name": "openai", "images": str(given.images), **given.identity()}


def load(config: Judge) -> BenchJudge:
    """Build a judge.

    Raises:
        ConfigError: an option is wrong.
    """
    if config.name != "vllm":
        return ServedChat(config)
    options = read_options(vllm_judge.VllmOptions, config.options, "judge.options")
    options = msgspec.structs.replace(options, engine={**COMPACT, **options.engine})
    folder = weights.folder(options.model, "judge.options.model")
    return VllmChat(vllm_judge.start_engine(folder, options), options.max_in_flight)


class VllmChat:
    """A language model in this process; it sees no images.

    Args:
        engine: with a chat model.
        max_in_flight: prompts inside the engine at once.
    """

    sees_images = False

    def __init__(self, engine: Engine, max_in_flight: int = 512):
        self.engine, self.max_in_flight = engine, max_in_flight
        self._control = sorted(self.engine.tokenizer.get_added_vocab(), key=len, reverse=True)

    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[int, str | BadRecord]]:
        """As `BenchJudge`."""
        from vllm import TokensPrompt

        from ...pipeline.models.engine import Request

        most = self.engine.engine.model_config.max_model_len
        prompts = [self._tokens(each.prompt) for each in asked]
        fit = [len(tokens) + each.max_tokens <= most for tokens, each in zip(prompts, asked, strict=True)]
        for number, tokens in enumerate(prompts):
            if not fit[number]:
                room = most - asked[number].max_tokens
                detail = f"{len(tokens)} tokens, {room} fit; raise judge.options.engine.max_model_len"
                yield number, BadRecord(Reason.MODEL_ERROR, detail)
        requests = (
            Request(number, TokensPrompt(prompt_token_ids=tokens), _params(asked[number]))
            for number, tokens in enumerate(prompts)
            if fit[number]
        )
        for number, output in self.engine.run(requests, self.max_in_flight):
            yield number, output.text

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _tokens(self, prompt: str) -> list[int]:
        turn = {"role": "user", "content": vllm_judge.defused(prompt, self._control)}
        return self.engine.tokenizer.apply_chat_template(
            [turn], add_generation_prompt=True, enable_thinking=False, tokenize=True, return_dict=False
        )


def _params(asked: Asked) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    constraint = StructuredOutputsParams(json=asked.schema) if asked.schema else None
    return SamplingParams(temperature=0.0, max_tokens=asked.max_tokens, structured_outputs=constraint)


class ServedChat:
    """A model behind a server that speaks OpenAI's chat completions."""

    def __init__(self, config: Judge):
        self.options = _chat_options(config)
        self.sees_images = self.options.images
        self.client = ChatClient(self.options, "judge.options")

    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[int, str | BadRecord]]:
        """As `BenchJudge`.

        Raises:
            StageFailed: the server is down, refuses the key or does not know the model.
        """
        bodies = (Ask(number, self._body(each)) for number, each in enumerate(asked))
        yield from self.client.run(bodies, _text).items()

    def close(self) -> None:
        """Nothing is held."""

    def _body(self, asked: Asked) -> dict[str, Any]:
        content: Any = asked.prompt
        if asked.pictures:
            pairs = zip(("The image:\n", "\nThe mask of the image:\n"), asked.pictures, strict=True)
            content = [part for title, picture in pairs for part in (_said(title), _picture(picture))]
            content.append(_said(f"\n{asked.prompt}\n"))
        limit = self.options.max_tokens or asked.max_tokens
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": limit, "top_p": 1}
        if asked.schema:
            named = {"name": "answer", "strict": True, "schema": asked.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body


def _text(choice: dict[str, Any]) -> str:
    text = choice["message"].get("content")
    if not isinstance(text, str):
        raise BadRecord(Reason.ANSWER_INVALID, f"the answer is no text: {str(text)[:60]!a}")
    return text


def _said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(data: bytes) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"},
    }


def _chat_options(config: Judge) -> ChatOptions:
    return read_options(ChatOptions, config.options, "judge.options")


def focal(pixels: np.ndarray, mask: np.ndarray) -> tuple[bytes, bytes]:
    """What a judge sees of a region: the photo around it and the mask, as PNGs of three boxes a side.

    The box in the middle is the region's, grown to 56 pixels a side where it is smaller; what would lie
    outside of the photo is cut off.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, not empty.
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
