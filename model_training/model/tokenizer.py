"""A checkpoint's tokenizer without its code, and the tokens that the model needs in it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.io import weights
from ...schemas.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("<IMG_CONTEXT>", "<img>", "</img>", *(f"<|Mask_Cap_{i}|>" for i in range(16)))
"""Tokens that the model adds to LLaDA's, in this order."""

MASK, EOT, REGION, CAPTION = "<|mdm_mask|>", "<|eot_id|>", "<|reserved_token_{}|>", "<|Mask_Cap_{}|>"

_SETTINGS = "tokenizer_config.json"
_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_CODE = ("auto_map", "processor_class", "tokenizer_class")
"""Settings that name classes, of the checkpoint's own code too."""


def load(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, as its tokenizer.json has it.

    transformers asks for leave to run code wherever a config.json names some; so it is shown the tokenizer's
    files only, without the classes that they name.

    Raises:
        ConfigError: none there, or an unsound one.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder / 'tokenizer.json'}: not there; download the tokenizer too")
    with tempfile.TemporaryDirectory() as bare:
        for name in _FILES:
            if (folder / name).is_file():
                Path(bare, name).symlink_to((folder / name).resolve())
        settings = weights.read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
        kept = {key: value for key, value in settings.items() if key not in _CODE}
        weights.write_json(Path(bare, _SETTINGS), kept)
        try:
            return PreTrainedTokenizerFast.from_pretrained(bare)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ConfigError(f"{folder / 'tokenizer.json'}: no sound tokenizer: {error}") from error


def add_special(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add what LLaDA's tokenizer lacks, in the original's order; how many tokens that were."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    tokens = [AddedToken(token, normalized=False, special=True) for token in SPECIAL if token not in known]
    return tokenizer.add_tokens(tokens, special_tokens=True)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for it."""
    return max(tokenizer.get_vocab().values()) + 1


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: int, folder: Path) -> dict[str, Any]:
    """The config's token ids.

    Args:
        tokenizer: the model's.
        prompts: regions of a sequence.
        folder: named in the error.

    Raises:
        ConfigError: a token is missing, or a line break is not one token.
    """
    known = tokenizer.get_vocab()
    regions, captions = ([each.format(i) for i in range(prompts)] for each in (REGION, CAPTION))
    absent = [token for token in (*SPECIAL[:3], MASK, EOT, *regions, *captions) if token not in known]
    if absent:
        raise ConfigError(
            f"{folder}: its tokenizer lacks {', '.join(absent[:3])}, {len(absent)} in all; is it LLaDA's?"
        )
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(newline) != 1:
        raise ConfigError(f"{folder}: a line break is {len(newline)} tokens in its tokenizer, not one")
    return {
        "image_token_id": known[SPECIAL[0]],
        "mask_token_id": known[MASK],
        "eot_token_id": known[EOT],
        "newline_token_id": newline[0],
        "region_token_ids": [known[token] for token in regions],
        "caption_token_ids": [known[token] for token in captions],
    }
