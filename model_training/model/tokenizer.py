"""A checkpoint's tokenizer without its code, and the tokens that the model needs in it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.io import weights
from ...schemas.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>", *(f"<|Mask_Cap_{i}|>" for i in range(16)))
"""Tokens that PerceptionDLM adds to LLaDA's, in this order."""

MASK, EOT, REGION, CAPTION = "<|mdm_mask|>", "<|eot_id|>", "<|reserved_token_{}|>", "<|Mask_Cap_{}|>"

_SETTINGS = "tokenizer_config.json"
_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_CODE = ("auto_map", "processor_class", "tokenizer_class")
"""Settings that name classes, among them those of a checkpoint's own code."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, as its tokenizer.json has it. No code of the checkpoint is run.

    transformers asks whether it may run code wherever a config.json names some. So it is shown a folder with
    the tokenizer's files alone, without the classes that they name.

    Raises:
        ConfigError: the folder has no tokenizer.json, or a damaged one.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder / 'tokenizer.json'}: no such file; download the tokenizer too")
    with tempfile.TemporaryDirectory() as bare:
        for name in _FILES:
            if (folder / name).is_file():
                Path(bare, name).symlink_to((folder / name).resolve())
        settings = weights.read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
        kept = {key: value for key, value in settings.items() if key not in _CODE}
        weights.write_json(Path(bare, _SETTINGS), kept)
        try:
            return PreTrainedTokenizerFast.from_pretrained(
                bare, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare Exceptions
            path = folder / "tokenizer.json"
            raise ConfigError(f"{path}: not a tokenizer ({error}); download it again") from error


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the `SPECIAL_TOKENS` that a tokenizer lacks, in their order; return how many were added."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    missing = (token for token in SPECIAL_TOKENS if token not in known)
    tokens: list[Any] = [AddedToken(token, normalized=False, special=True) for token in missing]
    return tokenizer.add_tokens(tokens, special_tokens=True)


def num_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows an embedding needs for the ids of this tokenizer."""
    return max(tokenizer.get_vocab().values()) + 1


def special_token_ids(tokenizer: PreTrainedTokenizerBase, prompts: int, folder: Path) -> dict[str, Any]:
    """The fields of the model's config that name tokens.

    Args:
        tokenizer: the model's.
        prompts: how many regions a sequence can hold.
        folder: where the tokenizer comes from, for the error.

    Raises:
        ConfigError: a token is missing, or a line break is not one token.
    """
    known = tokenizer.get_vocab()
    regions, captions = ([each.format(i) for i in range(prompts)] for each in (REGION, CAPTION))
    missing = [token for token in (*SPECIAL_TOKENS[:3], MASK, EOT, *regions, *captions) if token not in known]
    if missing:
        raise ConfigError(
            f"{folder}: its tokenizer lacks {len(missing)} tokens, among them {', '.join(missing[:3])}; "
            "give LLaDA's tokenizer"
        )
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(newline) != 1:
        raise ConfigError(
            f"{folder}: a line break is {len(newline)} tokens in its tokenizer, not one; "
            "give LLaDA's tokenizer"
        )
    return {
        "image_token_id": known[SPECIAL_TOKENS[0]],
        "mask_token_id": known[MASK],
        "eot_token_id": known[EOT],
        "newline_token_id": newline[0],
        "region_token_ids": [known[token] for token in regions],
        "caption_token_ids": [known[token] for token in captions],
    }
