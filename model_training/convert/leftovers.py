"""The tensors that published checkpoints store and never use: SigLIP's text model, last block, norm, head.

Our model has no place for them. They are kept in a folder of their own, so that a converted model can be
converted back completely. Without that folder they are taken from a SigLIP 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.io import tensor_files, weights
from ...pipeline.io.tensor_files import LazyTensor, check_tensors, list_tensors
from ...schemas.errors import ConfigError
from ..model.config import PerceptionDLMConfig
from ..model.tokenizer import load_tokenizer
from . import state_dict_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "unused"
"""Folder inside a converted model. It also holds the published folder's small files."""

_CONSTANT = re.compile(r"(\.embeddings\.position_ids|\.rotary_emb\.inv_freq)$")
"""Names of constants that old versions of transformers stored."""


def constants(found: Iterable[str]) -> dict[str, None]:
    """The stored tensors that are constants, not weights; `check_tensors` allows them in any shape."""
    return dict.fromkeys(filter(_CONSTANT.search, found))


def kept_aside(
    folder: Path,
    config: PerceptionDLMConfig,
    theirs: Mapping[str, LazyTensor],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Any], dict[str, LazyTensor], bool]:
    """Read `unused/`.

    Returns:
        The content of the published config.json, the unused tensors, and whether all small files are as
        published.

    Raises:
        ConfigError: the folder is missing, not whole, or of another model.
    """
    aside = folder / FOLDER
    file = aside / "config.json"
    if not (file.is_file() and (aside / weights.INDEX).is_file()):
        raise ConfigError(
            f"{aside}: missing or incomplete; copy this folder from the checkpoint that training started "
            "from, "
            "or give the folder of the full SigLIP 2 (with its text model): --vision SIGLIP2_DIR"
        )
    raw, unused = weights.read_json(file), list_tensors(aside)
    fields, own = state_dict_adapter.fields_of(raw, file, config.text.vocab_size), _own_fields(config)
    is_base = raw["model_type"] == state_dict_adapter.BASE_TYPE
    for key, value in fields.items():
        if value != own[key] and not (is_base and key in ("num_prompts", "replay_size")):
            raise ConfigError(
                f"{file}: {key} is {value}, but the model has {own[key]}; copy this folder from the model's "
                "own checkpoint"
            )
    check_tensors(aside, unused, {}, spare(raw["vision_model_config"], file, theirs, unused))
    same_tokens = load_tokenizer(aside).get_vocab() == tokenizer.get_vocab()
    if is_base or not same_tokens:
        raw = {**state_dict_adapter.region_stage(raw, own), "image_token_id": config.image_token_id}
        raw["language_model_config"] |= {"vocab_size": config.text.vocab_size}
        return raw, unused, False
    return raw, unused, True


def from_siglip(
    vision: str | Path, config: PerceptionDLMConfig, theirs: Mapping[str, LazyTensor]
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Make up what `unused/` would hold from a SigLIP 2.

    Returns:
        The content of a published config.json, and the unused tensors.

    Raises:
        ConfigError: the folder is not a whole SigLIP 2, or its sizes are not those of the model's tower.
    """
    folder = weights.folder(vision, "--vision")
    file = folder / "config.json"
    raw, found, own = weights.read_json(file), list_tensors(folder), _own_fields(config)
    if raw.get("model_type") == "siglip_vision_model":
        raise ConfigError(
            f"{folder}: has no text model, which the released checkpoint has; give the folder of the full "
            "SigLIP 2"
        )
    sizes = state_dict_adapter.vision_fields(raw, file)
    if sizes != own["vision_config"]:
        raise ConfigError(
            f"{file}: the sizes are {sizes}, but those of the model's tower are {own['vision_config']}; give "
            "the SigLIP 2 that the model was made from"
        )
    fixed = constants(found)
    check_tensors(folder, found, state_dict_adapter.siglip_shapes(raw, file), fixed)
    unused = {f"vision_model.{name}": entry for name, entry in found.items() if name not in fixed}
    unused = {name: entry for name, entry in unused.items() if name not in theirs}
    assert config.image_token_id is not None  # every saved model has it
    dtype = tensor_files.FLOATS[theirs["language_model.lm_head.weight"].dtype]
    return state_dict_adapter.published_config(own, raw, config.image_token_id, dtype), unused


def spare(
    siglip: Mapping[str, Any], file: Path, used: Iterable[str], found: Iterable[str]
) -> dict[str, tuple[int, ...] | None]:
    """Names and shapes of the tensors that a published checkpoint may hold and our model does not use."""
    used = set(used)
    stored = {
        f"vision_model.{name}": shape
        for name, shape in state_dict_adapter.siglip_shapes(siglip, file).items()
    }
    fixed = constants(found)
    return {name: shape for name, shape in {**stored, **fixed}.items() if name not in used}


def _own_fields(config: PerceptionDLMConfig) -> dict[str, Any]:
    """The config of our model in the form of `state_dict_adapter.fields_of`."""
    vision, text = config.vision, config.text
    llama = {**text.to_dict(), "rope_parameters": dict(text.rope_parameters or {})}
    return {
        "vision_config": state_dict_adapter.vision_fields(vision.to_dict(), Path("config.json")),
        "text_config": state_dict_adapter.llama_fields(llama, Path("config.json"), text.vocab_size),
        "vision_select_layer": config.vision_select_layer,
        "num_prompts": config.num_prompts,
        "replay_size": config.replay_size,
    }
