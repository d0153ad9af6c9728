"""Rows of all kinds in one batch, on the CPU and on a device that is none: each as if it were alone."""

import random
from functools import lru_cache
from typing import get_args

import pytest
import torch

from paracaption.model_training.decoding.sampler import Decoder, decode_batch
from paracaption.model_training.model.batch import collate
from paracaption.schemas.decoding import DecodeOptions, Strategy
from paracaption.schemas.errors import ConfigError
from tests.device import pretend
from tests.model_training.tiny_models import examples, lively

LENGTHS = (3, 5)
REGIONS = [1, 6, 3, 2, 5, 4]
ENDS = [{"early_exit": early, "end_of_text_last": last} for early in (True, False) for last in (False, True)]
CACHES = {"corrected": ("none", "exact"), "reference": ("none", "approximate")}


@lru_cache(None)
def model_of(layout):
    return ending(layout)


def ending(layout):
    """A model that often predicts the end of text."""
    model, processor = lively(layout=layout)
    with torch.no_grad():
        model.lm_head.weight[model.config.eot_token_id] *= 3
    return model, processor


@lru_cache(None)
def photo_of(layout, number, length):
    return examples(model_of(layout)[1], [REGIONS[number]], slots=length, seed=number)[0]


def options_of(chance, layout):
    """Options that a caller may give to one row of a batch."""
    strategy, length = chance.choice(get_args(Strategy)), chance.choice(LENGTHS)
    by_place = strategy == "threshold" and chance.random() < 0.5
    return DecodeOptions(
        strategy=strategy,
        max_new_tokens=length,
        steps=chance.choice([1, 2, 4, 7]),
        threshold=chance.choice([0.0, 0.4, 0.9, 1.0]),
        position_thresholds=[chance.choice([0.2, 0.4, 0.9]) for _ in range(length)] if by_place else None,
        factor=chance.choice([0.5, 1.0, 3.0]),
        temperature=chance.choice([0.0, 0.0, 0.7, 1.5]),
        top_p=chance.choice([0.6, 1.0]),
        seed=chance.choice([0, 1]),
        cache=chance.choice(CACHES[layout]),
        refresh_every=chance.choice([2, 3]),
        redo_below=chance.choice([None, 0.3]),
        settled=chance.choice([None, None, 0.3]),
        **chance.choice(ENDS),
        suppress_special=chance.choice([None, True, False]),
    )


@lru_cache(None)
def alone(layout, number, options):
    """The tokens of a photo's regions, decoded by itself on the CPU."""
    model, _ = model_of(layout)
    options = DecodeOptions.model_validate_json(options)
    batch = collate([photo_of(layout, number, options.max_new_tokens)])
    return decode_batch(model, batch, options).tokens_BNS[0].tolist()


def check(decoder, layout, seed):
    """A random batch decodes as its rows do alone."""
    chance = random.Random(seed)
    shared = options_of(chance, layout)
    free = chance.random() < 0.5  # else all rows share passes, whatever differs otherwise
    numbers, options = [], []
    for _ in range(chance.randint(2, 5)):
        each = options_of(chance, layout)
        same = {name: getattr(shared, name) for name in ("cache", "refresh_every", "suppress_special")}
        hot = {"temperature": each.temperature or 1.0 if shared.temperature else 0.0}
        options.append(each if free else each.model_copy(update=same | hot))
        numbers.append(chance.randrange(len(REGIONS)))
    photos = [photo_of(layout, *of) for of in zip(numbers, (o.max_new_tokens for o in options), strict=True)]
    found = decoder.decode(collate(photos), options)
    for row, (number, each) in enumerate(zip(numbers, options, strict=True)):
        tokens = found.tokens_BNS[row, : REGIONS[number], : each.max_new_tokens]
        assert tokens.tolist() == alone(layout, number, each.model_dump_json()), (seed, row, each)
        assert found.exists_BN[row].sum() == REGIONS[number]


LAYOUTS = ["corrected", "reference"]
BATCHES = 500


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.soak(keep=8)
def test_a_ragged_batch_has_the_tokens_that_its_rows_have_alone(layout, seed):
    check(Decoder(model_of(layout)[0]), layout, seed)


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_ragged_batches_have_the_tokens_that_their_rows_have_alone(layout):
    decoder = Decoder(model_of(layout)[0])
    for seed in range(8, BATCHES):
        check(decoder, layout, seed)


def on_device(layout, seeds):
    """Batches on a device that predicts all regions in every step, from one decoder, which keeps tensors."""
    model, _ = ending(layout)
    with pretend() as device:
        model.to(device.name)
        decoder = Decoder(model)
        for seed in seeds:
            check(decoder, layout, seed)
        assert 0 < len(decoder.kept) <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.soak(keep=1)
def test_a_device_that_predicts_all_in_every_step_has_the_same_tokens(layout):
    warm(layout, seeds := (40, *range(100, 104)))  # 40: a region that would settle before its turn
    on_device(layout, seeds)


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_such_a_device_has_the_same_tokens_in_many_batches(layout):
    warm(layout, seeds := range(104, 200))
    on_device(layout, seeds)


def warm(layout, seeds):
    """Decode on the CPU first: single photos are what the device is compared with."""
    for seed in seeds:
        check(Decoder(model_of(layout)[0]), layout, seed)


def test_tensors_of_a_bucket_are_used_again_and_nothing_is_left_in_them():
    model, _ = ending("corrected")
    options = DecodeOptions(max_new_tokens=5, steps=3)
    expected = [alone("corrected", number, options.model_dump_json()) for number in (1, 2)]
    with pretend() as device:
        model.to(device.name)
        decoder = Decoder(model)
        found, places = [], set()
        for numbers in ([1, 1], [2, 1], [2, 2], [1, 2]):
            batch = collate([photo_of("corrected", number, 5) for number in numbers])
            found.append((numbers, decoder.decode(batch, options).tokens_BNS))
            places |= {id(rows) for rows in decoder.kept.values()}
    assert len(places) <= 2
    for numbers, tokens in found:
        for row, number in enumerate(numbers):
            assert tokens[row, : REGIONS[number]].tolist() == expected[number - 1]


def test_as_many_options_as_rows():
    with pytest.raises(ConfigError, match="2 options for 1 rows"):
        decode_batch(model_of("corrected")[0], collate([photo_of("corrected", 0, 5)]), [DecodeOptions()] * 2)
