"""How often an answer waits for its device: on a device that counts."""

from itertools import pairwise

import numpy as np
import pytest

from paracaption.model_training.decoding.blocks import answer_batch
from paracaption.model_training.decoding.chat import Chat, Question
from paracaption.schemas.answering import AnswerOptions
from tests.device import pretend
from tests.model_training.tiny_models import lively, photo

LENGTH = 6
WAYS = {
    "confidence": {"block_length": 3, "early_exit": False},
    "an uneven schedule": {"block_length": 4, "steps": 4, "early_exit": False},
    "no cache": {"block_length": 3, "cache": "none", "early_exit": False},
    "approximate cache": {"block_length": 3, "cache": "approximate", "refresh_every": 2, "early_exit": False},
    "threshold": {"block_length": 3, "strategy": "threshold", "threshold": 0.3, "early_exit": False},
    "factor": {"block_length": 3, "strategy": "factor", "factor": 1.5, "early_exit": False},
    "left to right": {"block_length": 3, "strategy": "left-to-right", "early_exit": False},
    "early exit": {"block_length": 1},  # another token ends a text from here on
    "end of text last": {"block_length": 3, "end_of_text_last": True, "early_exit": False},
    "temperature": {"block_length": 3, "temperature": 1.0, "early_exit": False},
    "stop strings": {"block_length": 2, "early_exit": False},
}
BEFORE, ELSEWHERE, PER_LAYER = 300, 130, 27
"""Launches before the first step, and those of a step outside of the layers and in each of them."""


@pytest.fixture(scope="module")
def asked():
    """A model, and two questions for each way, one of which sees two images; with the answers on the CPU."""
    chat = Chat(*lively())
    questions = [Question("what", [photo(0, 0)[0]]), Question("<image> or <image>", [photo(1, 0)[0]] * 2)]
    found = {}
    for name, fields in WAYS.items():
        options = AnswerOptions(max_new_tokens=LENGTH, **fields)
        laid_out = [chat._lay_out(question, options, "") for question in questions]
        if name == "stop strings":
            said = answer_batch(chat.model, laid_out).tokens_BS[:, 2:4]
            stops = [((1, 2, 3), tuple(run)) for run in said.tolist()]
            laid_out = [each._replace(stops=stop) for each, stop in zip(laid_out, stops, strict=True)]
        if name == "early exit":
            chat.model.config.eot_token_id = int(found["left to right"][1].tokens_BS[0, 1])
        found[name] = laid_out, answer_batch(chat.model, laid_out)
    with pretend() as device:
        chat.model.to(device.name)
        yield chat, device, found


@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_an_answer_waits_once_for_its_device(asked, way):
    chat, device, found = asked
    laid_out, expected = found[way]
    with device.counting() as counts:
        state = answer_batch(chat.model, laid_out)
    for one, other in zip(state, expected, strict=True):
        np.testing.assert_allclose(one, other)
    steps = int(state.forwards_B.max())
    # One for each step; one to compare places with features.
    assert counts.syncs <= steps + 1, counts.waits()
    assert counts.uploads == 0, counts.waits()
    layers = len(chat.model.language_model.layers)
    # The step that was launched too many counts, too.
    assert counts.launches <= BEFORE + (steps + 1) * (layers * PER_LAYER + ELSEWHERE)
    if way in ("early exit", "stop strings"):
        assert state.forwards_B.min() < LENGTH


def test_the_next_step_of_an_answer_is_launched_before_the_last_one_is_read(asked):
    chat, device, found = asked
    with device.counting() as counts:
        answer_batch(chat.model, found["confidence"][0])
    kinds = [event.kind for event in counts.events if event.kind == "download" or event.operation == "event"]
    assert kinds[:4] == ["download", "download", "sync", "download"], "one step ahead"
    assert kinds.count("download") == LENGTH + 1, "the last one does nothing"


def test_streaming_waits_once_a_step_and_shows_every_step(asked):
    chat, device, _ = asked
    with device.counting() as counts:
        shown = list(
            chat.ask_steps(Question("what", [photo(0, 0)[0]]), max_new_tokens=LENGTH, block_length=2)
        )
    assert all(after.settled.startswith(before.settled) for before, after in pairwise(shown))
    assert [step.forwards for step in shown] == list(range(len(shown))) and shown[-1].done
    assert counts.syncs <= len(shown), counts.waits()
    assert counts.uploads == 0, counts.waits()
