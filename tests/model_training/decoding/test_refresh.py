"""Approximate caches that are computed again when a step is not sure, and regions that end when sure."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch

from paracaption.model_training.decoding.buckets import choose_cache, kind_of, resolve_options
from paracaption.model_training.decoding.refresh import Refresh, RefreshedCache
from paracaption.model_training.decoding.sampler import Decoder, decode_batch, decode_steps
from paracaption.model_training.model.batch import collate
from paracaption.schemas.decoding import AUTO_CACHE, DecodeOptions, Strategy
from tests.device import pretend
from tests.model_training.tiny_models import examples, lively

SLOTS = 4
STRATEGIES = get_args(Strategy)


def options_of(strategy="per-region", **changes):
    fields = {"max_new_tokens": SLOTS, "steps": SLOTS, "cache": "approximate", "refresh_every": 100}
    return DecodeOptions(strategy=strategy, **(fields | changes))


def ready():
    model, processor = lively(layout="reference")
    return model, collate(examples(processor, [3, 1, 2], slots=SLOTS))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_that_is_never_sure_is_decoded_as_without_a_cache_and_at_its_cost(strategy):
    model, batch = ready()
    plain = decode_batch(model, batch, options_of(strategy, cache="none"))
    never = decode_batch(model, batch, options_of(strategy, redo_below=1.0))
    always = decode_batch(model, batch, options_of(strategy, redo_below=0.0))
    assert torch.equal(never.tokens_BNS, plain.tokens_BNS)
    assert (never.forwards_B <= plain.forwards_B + 1).all()
    assert not torch.equal(always.tokens_BNS, plain.tokens_BNS), "the cache matters"


@pytest.mark.parametrize("strategy", ["per-region", "remask", "sequential"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.soak
def test_steps_that_are_done_again_are_the_same_on_a_device_that_predicts_all(strategy, temperature):
    model, batch = ready()
    options = options_of(strategy, redo_below=0.3, temperature=temperature, early_exit=False)
    expected = decode_batch(model, batch, options)
    alone = [
        decode_batch(model, collate([example]), options)
        for example in examples(lively(layout="reference")[1], [3, 1, 2], slots=SLOTS)
    ]
    for row, each in enumerate(alone):
        regions = each.tokens_BNS.shape[1]
        assert torch.equal(each.tokens_BNS[0], expected.tokens_BNS[row, :regions])
    with pretend() as device:
        model.to(device.name)
        with device.counting() as counts:
            found = Decoder(model).decode(batch, options)
    assert torch.equal(found.tokens_BNS[found.exists_BN], expected.tokens_BNS[expected.exists_BN])
    # One for each pass; one to compare places with features, and one for the result.
    assert counts.syncs <= int(found.forwards_B.max()) + 2, counts.waits()
    assert counts.uploads == 0, counts.waits()


def test_a_step_that_is_not_sure_keeps_nothing_and_is_done_again():
    model, batch = ready()
    states = list(decode_steps(model, batch, options_of(redo_below=0.3)))
    held = [
        before.open_BNS[row].any() and torch.equal(before.open_BNS[row], after.open_BNS[row])
        for before, after in pairwise(states)
        for row in range(3)
    ]
    assert any(held)
    plain = list(decode_steps(model, batch, options_of(cache="none")))
    assert torch.equal(states[1].tokens_BNS, plain[1].tokens_BNS), "the first step is a whole pass"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.soak(keep=4)
def test_regions_that_are_settled_end_with_what_is_predicted(strategy):
    model, batch = ready()
    for cache in ("none", "approximate"):
        options = options_of(strategy, cache=cache, settled=0.0, early_exit=False)
        first = list(decode_steps(model, batch, options))[1]
        last = decode_batch(model, batch, options)
        turns = 3 if strategy == "sequential" else 1
        assert last.forwards_B.tolist() == [turns, 1, min(turns, 2)]
        if strategy != "sequential":
            assert torch.equal(last.tokens_BNS, first.predicted_BNS)
    never = decode_batch(model, batch, options_of(strategy, cache="none", settled=1.0))
    plain = decode_batch(model, batch, options_of(strategy, cache="none"))
    assert torch.equal(never.tokens_BNS, plain.tokens_BNS)


def test_a_row_is_computed_whole_at_first_every_few_steps_and_while_it_is_unsure():
    refresh = Refresh(2, every=3)
    whole = []
    for unsure in ([0, 0], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0]):
        due = refresh.due_B()
        whole.append(due.tolist())
        refresh.step(due)
        refresh.unsure(np.array(unsure, bool))
    assert [row[0] for row in whole] == [True, False, False, True, False, False, True]
    # Step 1 is held, done again whole, which is still unsure; so is the next one, which is sure.
    assert [row[1] for row in whole] == [True, False, True, True, False, False, True]
    assert refresh.num_held_B.tolist() == [0, 1]
    once = Refresh(1, every=0)
    once.step(once.due_B())
    assert not once.due_B().any()


@pytest.mark.parametrize("by_rows", [False, True])
def test_single_rows_of_a_cache_are_filled_and_the_others_go_on_with_theirs(by_rows):
    def numbers(start, batch=3, length=4):
        return torch.arange(start, start + batch * 2 * length * 2.0).view(batch, 2, length, 2)

    cache = RefreshedCache(num_cached=3, num_following=1)
    first = numbers(0)
    cache.update(0, first, first + 0.5)
    if by_rows:
        cache.rows_R, new = torch.tensor([1]), numbers(100, batch=1)
        keys, _ = cache.update(0, new, new + 0.5)
        assert torch.equal(keys, new)
        filled = new[0]
    else:
        cache.fresh_B, new = torch.tensor([False, True, False]), numbers(100)
        keys, values = cache.update(0, new, new + 0.5)
        assert torch.equal(keys[0], torch.cat([first[0, :, :3], new[0, :, 3:]], dim=1))
        assert torch.equal(keys[1], new[1])
        assert torch.equal(values, keys + 0.5)
        filled = new[1]
    cache.filling = False
    behind = numbers(200, length=1)
    keys, _ = cache.update(0, behind, behind + 0.5)
    assert torch.equal(keys[1], torch.cat([filled[:, :3], behind[1]], dim=1))
    assert torch.equal(keys[2], torch.cat([first[2, :, :3], behind[2]], dim=1))


def test_auto_is_exact_where_it_can_be_and_else_a_cache_that_is_computed_again_when_unsure():
    opened, isolated = lively(layout="reference")[0], lively(layout="corrected")[0]
    auto = DecodeOptions()
    assert choose_cache(isolated, auto) == "exact"
    assert resolve_options(isolated, auto) == auto
    assert choose_cache(opened, auto) == "approximate"
    assert resolve_options(opened, auto) == DecodeOptions(**AUTO_CACHE)
    assert resolve_options(opened, DecodeOptions(settled=1.0)) == DecodeOptions(
        **AUTO_CACHE | {"settled": 1.0}
    )
    everything = DecodeOptions.checked(auto.model_dump())  # as the command line gives it
    assert resolve_options(opened, everything) == DecodeOptions(**AUTO_CACHE)
    assert kind_of(opened, everything)[1] == 8 and kind_of(opened, DecodeOptions(cache="approximate"))[1] == 4
    for every in (4, 8):
        assert resolve_options(opened, DecodeOptions(refresh_every=every)).refresh_every == every
    opened, batch = ready()
    compared = DecodeOptions(max_new_tokens=SLOTS, steps=SLOTS, settled=0.0, compare=True)
    assert decode_batch(opened, batch, compared).agreement_B.min() < 1, "with all steps, and no cache"
    plain = DecodeOptions(cache="none")
    assert resolve_options(opened, plain) == plain
