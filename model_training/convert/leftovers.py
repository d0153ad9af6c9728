"""What the original stores and never uses: SigLIP's text model, last block, final norm and pooling head.

Our model has no place for it. It is kept in a folder of its own, so that the way back is complete, or taken
from a SigLIP 2 again.
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
"""Within ours. Holds the published folder's small files too."""

_CONSTANT = re.compile(r"(\.embeddings\.position_ids|\.rotary_emb\.inv_freq)$")
"""Constants that old versions of transformers stored."""


def constants(found: Iterable[str]) -> dict[str, None]:
    """Names of tensors that are no weights, for `check_tensors`."""
    return dict.fromkeys(filter(_CONSTANT.search, found))


def kept_aside(
    folder: Path,
    config: PerceptionDLMConfig,
    theirs: Mapping[str, LazyTensor],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Any], dict[str, LazyTensor], bool]:
    """(config.json, unused tensors, whether all small files are as published) from `unused/`."""
    aside = folder / FOLDER
    file = aside / "config.json"
    if not (file.is_file() and (aside / weights.INDEX).is_file()):
        raise ConfigError(
            f"{aside}: not there, or not whole; copy it from the converted checkpoint that training started "
            "from, or name a SigLIP 2 that has the tensors which the original loads and never uses: --vision "
            "SIGLIP2_DIR"
        )
    raw, unused = weights.read_json(file), list_tensors(aside)
    fields, own = state_dict_adapter.fields_of(raw, file, config.text_config.vocab_size), _own_fields(config)
    is_base = raw["model_type"] == state_dict_adapter.BASE_TYPE
    for key, value in fields.items():
        if value != own[key] and not (is_base and key in ("num_prompts", "replay_size")):
            raise ConfigError(
                f"{file}: says {key} {value}, but the model has {own[key]}: it is another model's"
            )
    check_tensors(aside, unused, {}, spare(raw["vision_model_config"], file, theirs, unused))
    same_tokens = load_tokenizer(aside).get_vocab() == tokenizer.get_vocab()
    if is_base or not same_tokens:
        raw = state_dict_adapter.region_stage(raw, own) | {"image_token_id": config.image_token_id}
        raw["language_model_config"] |= {"vocab_size": config.text_config.vocab_size}
        return raw, unused, False
    return raw, unused, True


def from_siglip(
    vision: str | Path, config: PerceptionDLMConfig, theirs: Mapping[str, LazyTensor]
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """(config.json, unused tensors) with a SigLIP 2's."""
    folder = weights.folder(vision, "--vision")
    file = folder / "config.json"
    raw, found, own = weights.read_json(file), list_tensors(folder), _own_fields(config)
    if raw.get("model_type") == "siglip_vision_model":
        raise ConfigError(f"{folder}: has no text model, which the original loads too; name a whole SigLIP 2")
    sizes = state_dict_adapter.vision_fields(raw, file)
    if sizes != own["vision_config"]:
        raise ConfigError(f"{file}: has sizes {sizes}, but the model's tower {own['vision_config']}")
    fixed = constants(found)
    check_tensors(folder, found, state_dict_adapter.siglip_shapes(raw, file), fixed)
    unused = {f"vision_model.{name}": entry for name, entry in found.items() if name not in fixed}
    unused = {name: entry for name, entry in unused.items() if name not in theirs}
    dtype = tensor_files.FLOATS[theirs["language_model.lm_head.weight"].dtype]
    return state_dict_adapter.published_config(own, raw, config.image_token_id, dtype), unused


def spare(
    siglip: Mapping[str, Any], file: Path, used: Iterable[str], found: Iterable[str]
) -> dict[str, tuple[int, ...] | None]:
    """What a published checkpoint may hold beside what our model uses, with shapes."""
    used = set(used)
    stored = {
        f"vision_model.{name}": shape
        for name, shape in state_dict_adapter.siglip_shapes(siglip, file).items()
    }
    fixed = constants(found)
    return {name: shape for name, shape in {**stored, **fixed}.items() if name not in used}


def _own_fields(config: PerceptionDLMConfig) -> dict[str, Any]:
    """As `published.fields_of` gives them."""
    vision, text = config.vision_config, config.text_config
    llama = {**text.to_dict(), "rope_parameters": dict(text.rope_parameters)}
    return {
        "vision_config": state_dict_adapter.vision_fields(vision.to_dict(), Path("config.json")),
        "text_config": state_dict_adapter.llama_fields(llama, Path("config.json"), text.vocab_size),
        "vision_select_layer": config.vision_select_layer,
        "num_prompts": config.num_prompts,
        "replay_size": config.replay_size,
    }
