"""How often a decode waits for its device, and how much it launches: on a device that counts."""

from typing import get_args

import pytest

from paracaption.model_training.decoding.sampler import Decoder, decode_batch
from paracaption.model_training.model.batch import collate
from paracaption.schemas.decoding import DecodeOptions, Strategy
from tests.device import pretend
from tests.model_training.tiny_models import examples, lively

CASES = [
    (layout, cache, strategy)
    for layout, caches in (("corrected", ("none", "exact")), ("reference", ("none", "approximate")))
    for cache in caches
    for strategy in get_args(Strategy)
]
SLOTS, STEPS = 4, 4
PER_LAYER, ELSEWHERE = 27, 65
"""Launches of a step: float64, whose normalization is two operations."""


def decode(device, model, batch, options):
    """(tokens, counts) of a decode on the device."""
    decoder = Decoder(model)
    with device.counting() as counts:
        found = decoder.decode(batch, options)
    return found, counts


@pytest.mark.parametrize(("layout", "cache", "strategy"), CASES)
def test_a_step_waits_once_for_its_device(layout, cache, strategy):
    model, processor = lively(layout=layout)
    batch = collate(examples(processor, [3, 1], slots=SLOTS))
    changes = {"max_new_tokens": SLOTS, "threshold": 1.0, "early_exit": False, "cache": cache}
    options = {
        steps: DecodeOptions(strategy=strategy, steps=steps, **changes) for steps in (STEPS // 2, STEPS)
    }
    expected = decode_batch(model, batch, options[STEPS])
    with pretend() as device:
        model.to(device.name)
        counted = {steps: decode(device, model, batch, each) for steps, each in options.items()}
    found, counts = counted[STEPS]
    turns = 3 if strategy == "sequential" else 1
    num_steps = STEPS * turns
    assert found.tokens_BNS.tolist() == expected.tokens_BNS.tolist()
    # One for each step; one to compare places with features, and one for the result.
    assert counts.syncs <= num_steps + 2, counts.waits()
    assert counts.uploads == 0, counts.waits()
    added = counts.launches - counted[STEPS // 2][1].launches
    layers = len(model.language_model.layers)
    assert added / (num_steps - num_steps // 2) <= layers * PER_LAYER + ELSEWHERE


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_keeping_end_of_text_last_launches_two_comparisons_more_and_waits_no_more(strategy):
    model, processor = lively()
    batch = collate(examples(processor, [2, 1], slots=SLOTS))
    options = DecodeOptions(strategy=strategy, max_new_tokens=SLOTS, steps=STEPS, early_exit=False)
    found = {}
    with pretend() as device:
        model.to(device.name)
        for last in (False, True):
            each = options.model_copy(update={"end_of_text_last": last})
            _, found[last] = decode(device, model, batch, each)
    num_steps = STEPS * (2 if strategy == "sequential" else 1) + 1  # one is launched too many
    assert found[True].syncs == found[False].syncs
    assert found[True].uploads == 0, found[True].waits()
    assert found[True].launches - found[False].launches <= 2 * num_steps


def test_drawing_waits_no_more_and_a_listener_waits_for_what_it_hears():
    model, processor = lively()
    batch = collate(examples(processor, [2], slots=SLOTS))
    options = DecodeOptions(max_new_tokens=SLOTS, steps=STEPS, temperature=1.0)
    expected = decode_batch(model, batch, options)
    with pretend() as device:
        model.to(device.name)
        found, counts = decode(device, model, batch, options)
        with device.counting() as heard:
            states = list(Decoder(model).steps(batch, options))
    assert found.tokens_BNS.tolist() == expected.tokens_BNS.tolist() == states[-1].tokens_BNS.tolist()
    assert counts.syncs <= STEPS + 2, counts.waits()
    assert heard.syncs <= 2 * (STEPS + 1) + 1, heard.waits()
    assert counts.uploads == heard.uploads == 0, counts.waits()


def test_the_next_step_is_launched_before_the_last_one_is_read():
    model, processor = lively()
    batch = collate(examples(processor, [2], slots=SLOTS))
    options = DecodeOptions(strategy="per-region", max_new_tokens=SLOTS, steps=STEPS, early_exit=False)
    with pretend() as device:
        model.to(device.name)
        _, counts = decode(device, model, batch, options)
    kinds = [event.kind for event in counts.events if event.kind == "download" or event.operation == "event"]
    assert kinds[:4] == ["download", "download", "sync", "download"], "one step ahead"
    assert kinds.count("download") == STEPS + 1, "the last one does nothing"
