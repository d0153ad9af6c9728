"""The model of the parts `decode`, `batch` and `train`: random weights, made on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.decoder import LENGTH, SPECIAL, Processor
from benchmarks.gpu.machine import Machine
from paracaption.model_training.model.batch import Example
from paracaption.model_training.model.config import PerceptionDLMConfig
from paracaption.model_training.model.perceptiondlm import PerceptionDLM

TINY: dict[str, Any] = {
    "vision_config": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "image_size": 64, "patch_size": 16},
    "text_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512},
}
"""For the dry run; without changes a `PerceptionDLMConfig` has the published 8B sizes."""


def config_of(tiny: bool, layers: int | None = None) -> PerceptionDLMConfig:
    """The published sizes, or tiny ones.

    Args:
        tiny: for a dry run.
        layers: of the language model, if not all.
    """
    config = PerceptionDLMConfig(**(TINY if tiny else {}), **SPECIAL)
    if layers is not None:
        config.text_config.num_hidden_layers = min(layers, config.text_config.num_hidden_layers)
    return config


def make(config: PerceptionDLMConfig, machine: Machine, dtype: torch.dtype, attention: str) -> PerceptionDLM:
    """The model on the device, with the weights of a new one."""
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with machine.device:
            return PerceptionDLM(config)
    finally:
        torch.set_default_dtype(before)


def example(
    config: PerceptionDLMConfig, size: tuple[int, int], regions: int, words: int | None = None
) -> Example:
    """An image of noise with rectangular regions.

    Args:
        config: the model's.
        size: width and height.
        regions: their number.
        words: tokens of each caption; None: empty slots to fill.
    """
    random = np.random.default_rng(0)
    width, height = size
    pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
    masks = []
    for _ in range(regions):
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        mask = np.zeros((height, width), bool)
        mask[top : top + height // 3, left : left + random.integers(width // 8, width // 3)] = True
        masks.append(mask)
    processor = Processor(config)
    if words is None:
        return processor.make_example(pixels, masks, LENGTH)
    captions = random.integers(100, 150, (regions, words)).tolist()
    return processor.make_example(pixels, masks, captions)
