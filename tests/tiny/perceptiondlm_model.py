"""A random PerceptionDLM in our own layout: tiny, and its captions are words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paracaption.model_training.model.config import PerceptionDLMConfig
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from paracaption.model_training.model.tokenizer import SPECIAL_TOKENS

_LLADA = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_LLADA += ["<|mdm_mask|>"]
_RESERVED = [f"<|reserved_token_{number}|>" for number in range(16)]
_WORDS = """
a the an of on in with and at by near under over red blue green yellow white black brown small large
round flat tall old new wooden metal plastic paper glass soft smooth striped cup dog cat table chair tree
window road sky wall flower hat coat ball book plate spoon lamp boat bird horse hand face ear eye leg
wheel leaf grass sand water sits stands lies leans hangs looks holds wears shows moves rests faces beside
between behind left right top bottom edge corner side middle bright dark pale shiny it its two three
""".split()
_VOCAB = 400


SMALLEST: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": _VOCAB,
    },
    "replay_size": 2,
}
"""Changes of the config for tests of many models: four tokens a tile, four a region."""


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model and its processor.

    Args:
        folder: created.
        seed: of the weights.
        changes: fields of the config that differ from the tiny one's.
    """
    model, processor = tiny_model(seed, **changes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    """A model and its processor whose captions are words without sense and differ between regions.

    Args:
        seed: of the weights, which are drawn in float32.
        dtype: of the weights.
        changes: fields of the config that differ from the tiny one's.
    """
    tokenizer = byte_tokenizer()
    config = tiny_config(tokenizer, **changes)
    torch.manual_seed(seed)
    model = PerceptionDLM(config).eval()
    with torch.no_grad():
        for layer in model.language_model.layers:  # so that slots of a caption differ
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight.mul_(12)
        model.lm_head.weight.mul_(10)
        favoured = [*range(256, 256 + len(_WORDS)), config.eot_token_id]  # whole words rather than bytes
        model.lm_head.weight[favoured] *= 2.5
    return model.to(dtype), PerceptionDLMProcessor(tokenizer, config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the words above with a space before them, and LLaDA's and the model's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {letter: number for number, letter in enumerate(letters)}
    known |= {f"Ġ{word}": len(letters) + number for number, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*_LLADA, *SPECIAL_TOKENS, *_RESERVED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PerceptionDLMConfig:
    """The config that goes with the tokenizer: tiles of 128 pixels, 3 and 2 layers."""
    number = tokenizer.convert_tokens_to_ids
    regions = range(changes.get("num_prompts", 6))
    values: dict[str, Any] = {
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 128,
            "patch_size": 16,
        },
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": _VOCAB,
        },
        "image_token_id": number("<IMG_CONTEXT>"),
        "mask_token_id": number("<|mdm_mask|>"),
        "eot_token_id": number("<|eot_id|>"),
        "newline_token_id": tokenizer("\n", add_special_tokens=False)["input_ids"][0],
        "region_token_ids": [number(f"<|reserved_token_{region}|>") for region in regions],
        "caption_token_ids": [number(f"<|Mask_Cap_{region}|>") for region in regions],
    }
    return PerceptionDLMConfig(**(values | changes))
