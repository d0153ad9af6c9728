"""Many sequences through a few rows: each as if it were alone, in bounded memory, without waiting."""

import random
from typing import get_args

import pytest

from paracaption.model_training.decoding.sampler import Decoder
from paracaption.model_training.decoding.stream import decode_stream
from paracaption.model_training.model.batch import collate
from paracaption.schemas.decoding import DecodeOptions, Strategy
from paracaption.schemas.errors import ConfigError
from tests.device import pretend
from tests.model_training.decoding.test_ragged import REGIONS, alone, ending, model_of, options_of, photo_of
from tests.model_training.tiny_models import examples, lively, photo


def check(decoder, layout, seed, count=14, num_rows=3):
    """Random sequences, options and lengths come out of a stream as they are alone."""
    chance = random.Random(seed)
    kinds = [options_of(chance, layout) for _ in range(3)]
    asked = [(chance.randrange(len(REGIONS)), chance.choice(kinds)) for _ in range(count)]
    for number, each in asked:  # on the CPU, before the device is asked
        alone(layout, number, each.model_dump_json())
    given = ((photo_of(layout, number, each.max_new_tokens), each) for number, each in asked)
    found = {each.number: each for each in decode_stream(decoder, given, num_rows)}
    assert sorted(found) == list(range(count))
    for place, (number, each) in enumerate(asked):
        expected = alone(layout, number, each.model_dump_json())
        assert found[place].tokens_NS.tolist() == expected, (seed, place, each)
        assert found[place].confidence_NS.isfinite().all()
    return found


@pytest.mark.parametrize("layout", ["corrected", "reference"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.soak(keep=3)
def test_a_stream_gives_each_sequence_the_tokens_that_it_has_alone(layout, seed):
    check(Decoder(model_of(layout)[0]), layout, seed)


@pytest.mark.parametrize(("layout", "seed"), [("corrected", 225), ("reference", 222)])
@pytest.mark.soak(keep=1)
def test_a_row_that_was_dropped_from_the_cache_and_filled_again_is_told_from_the_others(layout, seed):
    check(Decoder(model_of(layout)[0]), layout, seed, count=24, num_rows=6)


@pytest.mark.parametrize("layout", ["corrected", "reference"])
@pytest.mark.soak
def test_so_does_a_stream_on_a_device_that_predicts_all_in_every_step(layout):
    expected = check(Decoder(model_of(layout)[0]), layout, 7, count=8)
    model, _ = ending(layout)
    with pretend() as device:
        model.to(device.name)
        decoder = Decoder(model)
        found = check(decoder, layout, 7, count=8)
        assert 0 < len(decoder.kept) <= 2
    assert found.keys() == expected.keys()


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["corrected", "reference"])
def test_so_do_many_streams(layout):
    for seed in range(100, 160):
        check(Decoder(model_of(layout)[0]), layout, seed)


@pytest.mark.parametrize("strategy", get_args(Strategy))
@pytest.mark.soak(keep=1)
def test_a_row_takes_the_next_sequence_as_soon_as_its_own_has_ended(strategy):
    """On a device that counts: as few steps as fit, one wait for each, and as many forwards as alone."""
    model, processor = lively(layout="corrected")
    found = examples(processor, [2] * 6, slots=4, seed=0)
    many, few = (
        DecodeOptions(strategy=strategy, max_new_tokens=4, steps=steps, early_exit=False, threshold=1.0)
        for steps in (4, 1)
    )
    options = [many, few, few, few, few, many]
    turns = 2 if strategy == "sequential" else 1
    with pretend() as device:
        model.to(device.name)
        decoder = Decoder(model)
        with device.counting() as counts:
            done = list(decode_stream(decoder, zip(found, options, strict=True), num_rows=3))
    assert {each.number: each.forwards for each in done} == dict(
        enumerate(each.steps * turns for each in options)
    )
    # By batches, 4 and 4 steps. A row is free a step after its sequence ended, and idle in another one.
    steps = (4 + 4) * turns
    batches, switches = 2, 2
    assert counts.syncs <= steps + batches + switches, counts.waits()
    assert counts.uploads == 0, counts.waits()


@pytest.mark.parametrize(("layout", "cache"), [("corrected", "exact"), ("reference", "approximate")])
@pytest.mark.parametrize("regions", [[0, 2, 0, 1, 0], [0, 0], [0], [3, 0, 0, 0, 0, 0, 0, 2]])
def test_sequences_without_regions_end_and_leave_the_others_alone(layout, cache, regions):
    """Also on a device, where nothing of them is launched that could tell that they have arrived."""
    model, processor = lively(layout=layout)
    options = DecodeOptions(max_new_tokens=4, steps=3, cache=cache, compare=True, redo_below=0.5)
    given = examples(processor, regions, slots=4)
    expected = [Decoder(model).decode(collate([each]), options) for each in given]
    with pretend() as device:
        model.to(device.name)
        stream = decode_stream(Decoder(model), ((each, options) for each in given), num_rows=2)
        found = {each.number: each for each in stream}
    assert sorted(found) == list(range(len(regions)))
    for number, (count, whole) in enumerate(zip(regions, expected, strict=True)):
        assert found[number].tokens_NS.tolist() == whole.tokens_BNS[0, :count].tolist()
        assert found[number].forwards >= (3 if count else 0)


def test_rows_are_full_while_sequences_wait(monkeypatch):
    from paracaption.model_training.decoding import loop as loops

    model, processor = model_of("corrected")
    fast, slow = (DecodeOptions(strategy="per-region", max_new_tokens=4, steps=n) for n in (1, 4))
    photos = [processor.make_example(*photo(number, 2, (64, 64)), 4) for number in range(16)]
    given = [(each, slow if number % 4 == 0 else fast) for number, each in enumerate(photos)]
    busy = []
    launch = loops.Loop.launch

    def counted(loop):
        busy.append(int(loop.open_RN.any(1).sum()))
        launch(loop)

    monkeypatch.setattr(loops.Loop, "launch", counted)
    assert len(list(decode_stream(Decoder(model), given, num_rows=4))) == 16
    assert all(count == 4 for count in busy[:-4]), busy


def test_the_source_is_read_no_further_than_needed():
    model, processor = model_of("corrected")
    [example] = examples(processor, [1], slots=4)
    read = []

    def source():
        for number in range(100):
            read.append(number)
            yield example, DecodeOptions(max_new_tokens=4, steps=2)

    stream = decode_stream(Decoder(model), source(), num_rows=2)
    for taken in range(1, 20):
        next(stream)
        assert len(read) <= taken + 3 * 2 + 1
    stream.close()


def test_a_sequence_unlike_all_others_is_not_left_behind():
    model, processor = model_of("corrected")
    usual, odd = (examples(processor, [count], slots=4)[0] for count in (1, 6))
    options = DecodeOptions(strategy="per-region", max_new_tokens=4, steps=2)
    given = [(odd if number == 1 else usual, options) for number in range(60)]
    order = [each.number for each in decode_stream(Decoder(model), given, num_rows=2)]
    assert sorted(order) == list(range(60))
    assert order.index(1) < 8 * 2 + 2


def test_a_comparison_is_that_of_the_sequence_alone():
    model, _ = model_of("reference")
    options = DecodeOptions(max_new_tokens=5, steps=4, cache="approximate", refresh_every=3, compare=True)
    given = [photo_of("reference", number, 5) for number in range(5)]
    found = {each.number: each for each in decode_stream(Decoder(model), ((e, options) for e in given), 2)}
    for number, example in enumerate(given):
        expected = Decoder(model).decode(collate([example]), options)
        assert found[number].agreement == pytest.approx(float(expected.agreement_B))
        assert found[number].forwards == int(expected.forwards_B)


def test_a_sequence_laid_out_for_another_length_is_an_error():
    model, processor = model_of("corrected")
    with pytest.raises(ConfigError, match="another length than 6 slots"):
        list(
            decode_stream(
                Decoder(model), [(examples(processor, [2], slots=4)[0], DecodeOptions(max_new_tokens=6))]
            )
        )


def test_an_error_of_the_source_comes_after_the_sequences_before_it():
    model, processor = model_of("corrected")
    [example] = examples(processor, [1], slots=4)

    def source():
        for _ in range(5):
            yield example, DecodeOptions(max_new_tokens=4, steps=2)
        raise ConfigError("the disk is gone")

    stream = decode_stream(Decoder(model), source(), num_rows=4)
    assert sorted(next(stream).number for _ in range(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="the disk is gone"):
        next(stream)
