"""The decoder against the original's recorded decodes, and the rules of `select`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model_training import decode as decoding
from model_training.decode import Decoding
from tests.model_training import made, recorded


@pytest.mark.parametrize("num_steps", [8, 4])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_recorded_decode_is_repeated_step_by_step(name, num_steps):
    case = recorded.tensors(name)
    model = recorded.model()
    how = Decoding(steps=num_steps)
    taken = list(decoding.steps(model, recorded.batch(case), how))
    states = case[f"dec{num_steps}_state_before_step"]
    assert len(taken) == len(states)
    for number, step in enumerate(taken):
        assert torch.equal(step.before_BS[0], states[number])
        assert torch.equal(step.predicted_BS[0], case[f"dec{num_steps}_x0"][number])
        off = step.confidence_BS[0].double() - case[f"dec{num_steps}_confidence"][number]
        assert off.abs().max() < 2e-5
    final = case[f"dec{num_steps}_final_ids"][0][case["slot_positions"]]
    assert torch.equal(taken[-1].after_BS[0], final)


RAGGED = [((1, 1), 1, 10), ((2, 1), 9, 11), ((1, 2), 3, 12), ((1, 1), 6, 13),
          ((3, 2), 2, 14), ((1, 1), 8, 15), ((2, 2), 5, 16), ((1, 1), 4, 17)]  # fmt: skip
"""Grid, regions and seed of eight images; nine regions are two sequences."""


def _captions(model, images, how, length=5):
    return decoding.decode(model, made.batch(model.config, images, length), how).tokens


@pytest.mark.parametrize("how", [
    Decoding(steps=5), Decoding(strategy="per_region", steps=3), Decoding(strategy="threshold", threshold=0.3),
    Decoding(strategy="sequential", steps=2), Decoding(strategy="left_to_right", steps=4),
    Decoding(strategy="threshold", threshold=0.2, temperature=0.7, top_p=0.9, early_exit=True),
    Decoding(strategy="sequential", steps=3, temperature=1.0, seed=5),
], ids=lambda how: f"{how.strategy}-{how.temperature}")  # fmt: skip
@pytest.mark.parametrize("layout", ["reference", "corrected"])
@pytest.mark.parametrize("cache", ["none", "exact"])
def test_batched_equals_single(layout, cache, how):
    if cache == "exact" and layout == "reference":
        pytest.skip("the original's layout has no exact cache")
    model, how = made.model(layout=layout), replace(how, cache=cache)
    alone = [_captions(model, [image], how) for image in RAGGED]
    for num_images in (1, 2, 3, 8):
        images = RAGGED[-num_images:]
        assert _captions(model, images, how) == [tokens for one in alone[-num_images:] for tokens in one]
