"""Which guesses stay after a step, against a slow statement of each strategy; and what a guess is."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.model_training.decoding.sampler import _draw, _left_open, select_predictions
from paracaption.schemas.decoding import DecodeOptions, Strategy
from tests.model_training.plain_decoder import choose, still_open

STRATEGIES = get_args(Strategy)


@st.composite
def steps(draw):
    """(options, step, regions of each image, tokens, open, guesses, confidences) of a batch in some state."""
    strategy = draw(st.sampled_from(STRATEGIES))
    length, num_steps = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    regions = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    most = max(1, *regions)
    last = num_steps * (most if strategy == "sequential" else 1) - 1
    step = draw(st.integers(0, last))
    shape = (len(regions), most, length)
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exists = np.arange(most)[None, :, None] < np.array(regions)[:, None, None]
    opens = (chance.random(shape) < draw(st.sampled_from([0.1, 0.5, 1.0]))) & exists
    confidences = chance.permutation(np.arange(opens.size)).reshape(shape) / opens.size
    if draw(st.booleans()):  # ties
        confidences = np.round(confidences, 1)
    if strategy == "remask":
        confidences = np.where(exists, confidences, np.nan)
    options = DecodeOptions(
        strategy=strategy,
        max_new_tokens=length,
        steps=num_steps,
        threshold=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        position_thresholds=draw(st.none() | st.lists(st.floats(0, 1), min_size=length, max_size=length))
        if strategy == "threshold"
        else None,
        factor=draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])),
    )
    tokens, guesses = chance.integers(0, 50, shape), chance.integers(50, 99, shape)
    return options, step, regions, *map(torch.from_numpy, (tokens, opens, guesses, confidences))


@settings(deadline=None, max_examples=120)
@given(steps())
def test_each_strategy_chooses_as_stated_slot_by_slot(drawn):
    options, step, regions, *state = drawn
    before = [part.clone() for part in state]
    tokens, opens = select_predictions(options, step, *state)
    for part, was in zip(state, before, strict=True):
        assert torch.equal(part.nan_to_num(), was.nan_to_num()), "nothing is changed in place"
    for image, count in enumerate(regions):
        plain = (part[image, :count].tolist() for part in state)
        expected_tokens, expected_opens = choose(options, step, *plain)
        assert opens[image, :count].tolist() == expected_opens
        for region in range(count):
            closed = [slot for slot, waiting in enumerate(expected_opens[region]) if not waiting]
            assert tokens[image, region, closed].tolist() == [expected_tokens[region][i] for i in closed]
        assert not opens[image, count:].any(), "a region that is not there has no slots"


@settings(deadline=None, max_examples=60)
@given(steps())
def test_what_is_written_stays_but_for_remasking(drawn):
    options, step, _, tokens, opens, guesses, confidences = drawn
    after, still = select_predictions(options, step, tokens, opens, guesses, confidences)
    assert torch.equal(after[~opens], tokens[~opens])
    written = opens & ~still
    assert torch.equal(after[written], guesses[written])
    if options.strategy != "remask":
        assert not (still & ~opens).any()
    if options.strategy in ("threshold", "factor"):
        assert (written.any(-1) | ~opens.any(-1)).all(), "each region that waits gets a token"


@given(st.integers(1, 300), st.integers(1, 130), st.data())
def test_the_schedule_is_the_linear_one_rounded_down(slots, num_steps, data):
    step = data.draw(st.integers(0, num_steps - 1))
    exact = still_open(slots, num_steps, step)
    assert exact - 1 <= _left_open(slots, num_steps, step) <= exact
    assert _left_open(slots, num_steps, -1) == slots
    assert _left_open(slots, num_steps, num_steps - 1) == _left_open(slots, num_steps, num_steps + 5) == 0


def test_the_schedule_rounds_where_the_original_does():
    assert _left_open(90, 10, 2) == 62, "90 * (7 / 10) is 62.99... in floating point"


def draws(logits, count=20_000, **options):
    """Share of each token among many draws, spread evenly over the unit interval."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = _draw(torch.tensor(logits).expand(count, -1).clone(), DecodeOptions(**options), uniform)
    return torch.bincount(found, minlength=len(logits)) / count


LOGITS = [1.0, 3.0, -torch.inf, 2.5, 0.0, 3.0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion_to_their_probability(temperature):
    expected = (torch.tensor(LOGITS) / temperature).softmax(-1)
    assert (draws(LOGITS, temperature=temperature) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("top_p", "likeliest"), [(0.01, 1), (0.4, 2), (0.7, 2), (0.8, 3), (0.97, 4), (1.0, 5)]
)
def test_only_the_likeliest_that_hold_enough_together_are_drawn(top_p, likeliest):
    probability = torch.tensor(LOGITS).softmax(-1)
    order = probability.argsort(descending=True, stable=True)
    assert probability[order[: likeliest - 1]].sum() < top_p
    assert probability[order[:likeliest]].sum() >= top_p - 1e-6
    expected = torch.zeros_like(probability)
    expected[order[:likeliest]] = probability[order[:likeliest]]
    found = draws(LOGITS, temperature=1.0, top_p=top_p)
    assert (found - expected / expected.sum()).abs().max() < 1e-4


@pytest.mark.parametrize(("top_p", "likeliest"), [(0.499, 2), (0.5, 2), (0.501, 3), (0.25, 1), (0.251, 2)])
def test_the_last_token_that_is_needed_to_hold_enough_is_the_last_that_is_drawn(top_p, likeliest):
    found = draws([0.0] * 4, temperature=1.0, top_p=top_p)
    assert found.tolist() == pytest.approx([1 / likeliest] * likeliest + [0.0] * (4 - likeliest), abs=1e-3)


def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible():
    logits = torch.tensor([LOGITS, LOGITS])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert _draw(logits, DecodeOptions(temperature=1.0), ends).tolist() == [1, 4]
