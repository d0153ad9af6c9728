"""Masks in memory: bool, two values, probabilities and logits are one region; what is unclear is an error."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paracaption.model_training.decoding.mask_arrays import to_bool_mask
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.schemas.errors import ConfigError
from tests.model_training.tiny_models import lively, photo

REGION = np.zeros((6, 8), bool)
REGION[1:4, 2:7] = True
SLOPE = np.linspace(0, 1, REGION.size).reshape(REGION.shape)


def where(inside, outside, dtype: Any = float):
    return np.where(REGION, inside, outside).astype(dtype)


@pytest.mark.parametrize(
    "mask",
    [
        REGION,
        REGION.tolist(),
        where(1, 0, np.uint8),
        where(255, 0, np.uint8),
        where(7, 0, np.int64),
        where(-1, 0, np.int8),
        where(1, 0),
        where(255, 0, np.float32),
        where(0.98, 0.02),
        where(0.51, 0.5),
        np.where(REGION, 0.5 + SLOPE / 2 + 1e-3, SLOPE / 2).clip(0, 1),
        where(0.98, 0.02, np.float16),
        where(8.0, -8.0),
        np.where(REGION, 0.01 + SLOPE, -30 * SLOPE - 1e-3),
        where(1.02, -0.02),
        torch.from_numpy(where(0.98, 0.02)).bfloat16().requires_grad_(),
        Image.fromarray(REGION),
    ],
)
def test_bool_two_values_probabilities_and_logits_are_the_same_region(mask):
    found = to_bool_mask(mask, 0)
    assert found.dtype == bool and np.array_equal(found, REGION)


def test_a_bool_mask_is_not_copied():
    assert np.shares_memory(to_bool_mask(REGION, 0), REGION)


@pytest.mark.parametrize("value", [True, 1, 255, 1.0, 255.0])
def test_a_hard_mask_may_be_the_whole_image(value):
    assert to_bool_mask(np.full((3, 4), value), 0).all()


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (where(np.nan, 0), "15 of its values are NaN or infinite"),
        (where(1, np.inf), "NaN or infinite"),
        (np.full((6, 8), np.nan), "48 of its values are NaN"),
        (np.full((6, 8), 0.98), "above 0.5 .*the whole image"),
        (0.6 + SLOPE / 3, "above 0.5 .*the whole image"),
        (np.full((6, 8), 8.0), "above 0.5 .*the whole image"),
        (where(0.3, 0.1), "from 0.1 to 0.3, probabilities or logits"),
        (where(0.3, 0), "probabilities or logits"),
        (where(8, 0.2), "from 0.2 to 8, probabilities or logits"),
        (np.where(REGION, 1.02, 0.3 * SLOPE - 0.02), "probabilities or logits"),
        (np.arange(48).reshape(6, 8) // 10, "integers from 0 to 4, as label maps"),
        (where(2, 1, np.uint8), "integers from 1 to 2"),
        ((SLOPE * 255).astype(np.uint8), "integers from 0 to 255"),
        ((np.arange(48).reshape(6, 8) // 10).astype(float), "whole numbers from 0 to 4, as label maps"),
        ((np.arange(48).reshape(6, 8) // 10 - 1.0), "whole numbers from -1 to 3, as label maps"),
        (where(1, 0).astype(complex), "array of complex128"),
        ([["a", "b"]], "array of <U1"),
        ({"counts": [1, 2]}, "array of object"),
        ([[True], [True, False]], "not an array"),
    ],
)
def test_what_can_be_read_in_two_ways_is_an_error_of_one_line_that_names_the_mask(mask, told):
    with pytest.raises(ConfigError, match=rf"^mask 3.*{told}.*; give a bool mask") as raised:
        to_bool_mask(mask, 3)
    assert "\n" not in str(raised.value)


def test_logits_and_probabilities_are_captioned_as_the_region_and_not_as_the_whole_image():
    captioner = RegionCaptioner(*lively(num_prompts=3))
    pixels, masks = photo(1, 2)
    options: dict[str, Any] = {"max_new_tokens": 4, "steps": 2}
    expected = captioner.caption(pixels, masks, **options)
    whole = captioner.caption(pixels, [mask | True for mask in masks], **options)
    assert expected != whole
    assert captioner.caption(pixels, [np.where(mask, 8.0, -8.0) for mask in masks], **options) == expected
    assert captioner.caption(pixels, [np.where(mask, 0.98, 0.02) for mask in masks], **options) == expected
    for wrong in (np.full(masks[0].shape, np.nan), np.full(masks[0].shape, 0.98)):
        with pytest.raises(ConfigError, match=r"^mask 1: "):
            captioner.caption(pixels, [masks[0], wrong], **options)
        with pytest.raises(ConfigError, match=r"^mask 1: "):
            captioner.caption_steps(pixels, [masks[0], wrong], **options)
    with pytest.raises(ConfigError, match="mask 1 is empty"):
        captioner.caption(pixels, [masks[0], np.full(masks[0].shape, -8.0)], **options)


def test_the_processor_takes_bool_only():
    _, processor = lively()
    pixels, [mask] = photo(1, 1)
    with pytest.raises(ConfigError, match="mask 0 is float64: give bool"):
        processor.make_example(pixels, [np.where(mask, 8.0, -8.0)], 4)
