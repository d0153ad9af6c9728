"""Tiny models, photos and regions that the tests of the model and the decoder share."""

from typing import Any

import numpy as np
import torch

from paracaption.model_training.model.batch import Example
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.model.processor import PerceptionDLMProcessor
from tests.tiny.perceptiondlm_model import SMALLEST, tiny_model

SIZES = [(32, 32), (90, 40), (40, 90), (100, 30), (50, 50), (64, 64), (31, 97)]
"""Of photos, (width, height): one to six tiles of 32 pixels."""


def lively(
    seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[PerceptionDLM, PerceptionDLMProcessor]:
    """The smallest model, with weights so large that every token matters to every other.

    Args:
        seed: of the weights.
        dtype: of the weights; float64, so that the order of a sum decides nothing.
        changes: fields of the config.
    """
    model, processor = tiny_model(seed, torch.float64, **(SMALLEST | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*model.language_model.parameters(), *model.projector.parameters()):
            if parameter.ndim == 2:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * 1.5 / parameter.shape[1] ** 0.5)
        drawn = torch.randn(model.lm_head.weight.shape, generator=generator, dtype=torch.float64)
        model.lm_head.weight.copy_(drawn * 0.5)
    return model.to(dtype), processor


def photo(
    seed: int, regions: int, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Noise of one of SIZES or another size, and rectangles in it that may overlap."""
    draw = np.random.default_rng(seed)
    width, height = size or SIZES[seed % len(SIZES)]
    masks = []
    for _ in range(regions):
        mask = np.zeros((height, width), bool)
        top, left = draw.integers(0, height - 3), draw.integers(0, width - 3)
        mask[top : top + draw.integers(3, height), left : left + draw.integers(3, width)] = True
        masks.append(mask)
    return draw.integers(0, 256, (height, width, 3), np.uint8), masks


def examples(
    processor: PerceptionDLMProcessor, regions: list[int], slots: int = 4, seed: int = 0
) -> list[Example]:
    """Photos of different sizes with so many regions, laid out for so many slots."""
    return [
        processor.make_example(*photo(seed + number, count), slots) for number, count in enumerate(regions)
    ]
