"""Random PerceptionDLMs made from nothing: a tiny one, and the mid-size one of the speed comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_training.config import PerceptionDLMConfig
from model_training.model import PerceptionDLM
from model_training.processing import ADDED_TOKENS, PerceptionDLMProcessor

LLADA_TOKENS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|mdm_mask|>",
    *(f"<|reserved_token_{i}|>" for i in range(16)),
]
MASK_ID, EOT_ID = 261, 260

TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
TINY_TEXT = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def tokenizer(special: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens from 256 on: LLaDA's and what PerceptionDLM adds to them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>"
    )
    made.add_tokens(special or [*LLADA_TOKENS, *ADDED_TOKENS], special_tokens=True)
    return made


def config(layout: str = "corrected", **options: Any) -> PerceptionDLMConfig:
    """Tiles of 64 px, so 4 tokens a tile; everything else as small."""
    sizes: dict[str, Any] = {
        "vision_config": TINY_VISION,
        "text_config": TINY_TEXT,
        "caption_length": 8,
        "mask_token_id": MASK_ID,
        "eot_token_id": EOT_ID,
    }
    return PerceptionDLMConfig(layout=layout, **(sizes | options))


def mid_size_config(layout: str = "corrected", vocab_size: int = 8192, **options: Any) -> PerceptionDLMConfig:
    """The sizes of the speed comparison (golden BENCH.md): tiles of 512 px, 256 tokens a tile."""
    vision = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": 512,
        "patch_size": 16,
    }
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    return config(layout, **({"vision_config": vision, "text_config": text, "caption_length": 32} | options))


def model(config: PerceptionDLMConfig, seed: int = 0) -> PerceptionDLM:
    """Seeded random weights, larger than at the start of training: outputs depend visibly on every input."""
    torch.manual_seed(seed)
    made = PerceptionDLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "embed" in name:
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def write(folder: Path, config: PerceptionDLMConfig, seed: int = 0) -> Path:
    """A checkpoint in our layout: model, config, tokenizer."""
    model(config, seed).save_pretrained(folder)
    PerceptionDLMProcessor(tokenizer(), config).save_pretrained(folder)
    return folder


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def masks(width: int, height: int, number: int, seed: int = 0) -> list[np.ndarray]:
    """Random boxes, at least a quarter of the photo's sides wide and high. HW bool."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        w, h = (int(random.integers(side // 4, side // 2)) for side in (width, height))
        x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
        mask = np.zeros((height, width), bool)
        mask[y : y + h, x : x + w] = True
        made.append(mask)
    return made
