"""Tensors that a conversion draws: those that no checkpoint has, and rows for words that it does not know."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ...pipeline.io import tensor_files
from ...pipeline.io.tensor_files import LazyTensor
from ..model.config import PerceptionDLMConfig
from ..model.tokenizer import num_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

EMBEDDING, PROMPTS = "language_model.embed_tokens.weight", "region_prompts.weight"
_HEAD = "lm_head.weight"


def draw_tensor(name: str, shape: tuple[int, ...], config: PerceptionDLMConfig, seed: int) -> LazyTensor:
    """A new tensor, as the model initialises it. Its values depend on seed and name only."""
    std = 1.0 if name == PROMPTS else 0.0 if name.endswith(".bias") else config.initializer_range
    dtype = _dtype_of(config)
    load = partial(_normal, name, shape, std, dtype, seed)
    return LazyTensor(tensor_files.dtype_name(dtype), shape, load)


def add_rows(
    ours: dict[str, LazyTensor], config: PerceptionDLMConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> str:
    """Add rows for words, a multiple of 64, if the tokenizer has more tokens than there are.

    Args:
        ours: tensors of the model; embedding and head are replaced.
        config: of the model; its number of words is set.
        tokenizer: of the model.
        seed: of what is drawn.

    Returns:
        What was drawn, in words; "" if nothing was.
    """
    rows, needed = config.text.vocab_size, num_rows(tokenizer)
    if needed <= rows:
        return ""
    more = math.ceil(needed / 64) * 64 - rows
    for name in (EMBEDDING, _HEAD):
        old = ours[name]
        shape = (more, old.shape[1])
        new = partial(_normal, name, shape, config.initializer_range, _dtype_of(config), seed)
        ours[name] = LazyTensor(old.dtype, (rows + more, old.shape[1]), partial(_on_top, old.load, new))
    config.text.vocab_size = rows + more
    return f"{more} rows of embedding and head from N(0, {config.initializer_range}^2)"


def _dtype_of(config: PerceptionDLMConfig) -> torch.dtype:
    import torch

    assert isinstance(config.dtype, torch.dtype)  # the conversion has set it
    return config.dtype


def _normal(name: str, shape: tuple[int, ...], std: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=generator).mul_(std).to(dtype)


def _on_top(old: Callable[[], torch.Tensor], new: Callable[[], torch.Tensor]) -> torch.Tensor:
    import torch

    rows = old()
    return torch.cat([rows, new().to(rows.dtype)])
