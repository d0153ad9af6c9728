"""The prompt of one region, and the text of an answer."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ....schemas.errors import ConfigError, one_line
from .checkpoint import GarConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "There are some objects I am curious about: <Prompt{k}>;\n"
    "<Prompt{k}>: <|reserved_special_token_{crop}|>Describe this masked region in detail."
)
"""What the published model was trained with; the reserved token stands for the replayed features."""

PROMPT = 1
"""Number of the prompt token for a single region, as published."""

_SPACES = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")]
_SPACES += [(" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]
"""The tokenizer's clean-up of spaces, in its order; transformers 5 no longer applies it to this tokenizer."""


class Layout(NamedTuple):
    """A prompt as token ids, and where features take their place.

    Attributes:
        ids: all token ids, placeholders included.
        image: first place of the image's features, and the place after their last one.
        crop: first place of the replayed features, and the place after their last one.
    """

    ids: list[int]
    image: tuple[int, int]
    crop: tuple[int, int]


class Prompts:
    """Writes prompts with a checkpoint's own tokenizer and chat template, and reads its answers.

    Raises:
        ConfigError: the checkpoint's tokenizer lacks a token or a template.
    """

    def __init__(self, config: GarConfig):
        self.config = config
        self.tokenizer = _load(config)
        settings = json.loads((config.folder / "tokenizer_config.json").read_text())
        self._clean = bool(settings.get("clean_up_tokenization_spaces", False))
        self.stop = self._token("<|eot_id|>")
        image = self._token("<|image|>")
        if image != config.image_token:
            raise ConfigError(
                f"{config.folder}: <|image|> is token {image} in tokenizer.json, config.json says "
                f"{config.image_token}; take both files from one checkpoint"
            )
        for k, crop in enumerate(config.crop_tokens):
            for name, wanted in ((f"<Prompt{k}>", None), (f"<|reserved_special_token_{k + 2}|>", crop)):
                found = self._token(name)
                if wanted not in (None, found):
                    raise ConfigError(
                        f"{config.folder}: {name} is token {found} in tokenizer.json, config.json's "
                        f"crop_tokens_ids say {wanted}; take both files from one checkpoint"
                    )
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= config.text["vocab_size"]:
            raise ConfigError(
                f"{config.folder}: tokenizer.json has {largest + 1} tokens, but config.json's "
                f"text_config.vocab_size is {config.text['vocab_size']}; take both files from one checkpoint"
            )
        self.write = lru_cache(maxsize=256)(self._write)

    def _write(self, num_tiles: int, prompt: int = PROMPT) -> Layout:
        """The prompt for a photo of `num_tiles` tiles, the thumbnail included.

        The template's text begins with the token of the beginning, and the tokenizer puts another one in
        front of it. The published model is asked like that.
        """
        message = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": self._text(prompt)}],
        }
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ConfigError(
                f"{self.config.folder}: the chat template fails ({one_line(error)}); take "
                "chat_template.jinja from the published checkpoint"
            ) from error
        assert isinstance(text, str)
        short = self.tokenizer(text)["input_ids"]
        crop_id, per_tile = self.config.crop_tokens[prompt], self.config.side**2
        if short.count(self.config.image_token) != 1 or short.count(crop_id) != 1:
            raise ConfigError(
                f"{self.config.folder}: the chat template does not put one <|image|> before the text; take "
                "chat_template.jinja from the published checkpoint"
            )
        at, crop_at = short.index(self.config.image_token), short.index(crop_id)
        images = [self.config.image_token] * (num_tiles * per_tile)
        crops = [crop_id] * per_tile
        ids = short[:at] + images + short[at + 1 : crop_at] + crops + short[crop_at + 1 :]
        start = crop_at + len(images) - 1
        return Layout(ids, (at, at + len(images)), (start, start + per_tile))

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.write(1 + self.config.max_tiles).ids)

    def read(self, tokens: list[int]) -> str:
        """The text of an answer."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        if self._clean:
            for loose, tight in _SPACES:
                text = text.replace(loose, tight)
        return text.strip()

    def _text(self, prompt: int) -> str:
        return TEMPLATE.format(k=prompt, crop=prompt + 2)

    def _token(self, name: str) -> int:
        found = self.tokenizer.get_vocab().get(name)
        if found is None:
            raise ConfigError(
                f"{self.config.folder / 'tokenizer.json'}: no token {name}; not a GAR tokenizer"
            )
        return found


def _load(config: GarConfig) -> PreTrainedTokenizerFast:
    """Not by AutoTokenizer: it would ask on stdin whether to run the checkpoint's code."""
    from transformers import PreTrainedTokenizerFast

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (config.folder / name).is_file():
            raise ConfigError(f"{config.folder / name}: not there; download the whole checkpoint")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            config.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ConfigError(f"{config.folder / 'tokenizer.json'}: {error}; download it again") from error
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{config.folder / 'chat_template.jinja'}: not there; download the whole checkpoint"
        )
    return tokenizer
