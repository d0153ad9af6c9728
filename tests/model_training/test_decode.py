"""The decoder against the original's recorded decodes, and the rules of `select`."""

from __future__ import annotations

import json

import pytest
import torch

from model_training import decode as decoding
from model_training.decode import Decoding
from tests.model_training import recorded


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
