"""Which guesses stay after a step, against a slow statement of each strategy; and what a guess is."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.model_training.decoding.head import _rounded, confidence_of, draw
from paracaption.model_training.decoding.selection import (
    factor_doubts,
    left_open,
    row_options,
    select,
    threshold_doubts,
)
from paracaption.schemas.decoding import DecodeOptions, Strategy
from tests.model_training.plain_decoder import choose, still_open

STRATEGIES = get_args(Strategy)
EOT = 50


@st.composite
def steps(draw):
    """(options, step, regions) of each row, and (tokens, open, guesses, doubts) of all in some state."""
    rows = draw(st.integers(1, 4))
    one = draw(st.one_of(st.none(), st.sampled_from(STRATEGIES)))  # or each its own
    options, step, regions = [], [], []
    for _ in range(rows):
        strategy = one or draw(st.sampled_from(STRATEGIES))
        regions.append(draw(st.integers(0, 4)))
        length, given = draw(st.integers(1, 8)), None
        if strategy == "threshold":
            given = draw(st.none() | st.lists(st.floats(0, 1), min_size=length, max_size=length))
        options.append(
            DecodeOptions(
                strategy=strategy,
                max_new_tokens=length,
                steps=draw(st.integers(1, 10)),
                threshold=draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
                position_thresholds=given,
                factor=draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])),
                settled=draw(st.sampled_from([None, 0.5, 0.9])),
                end_of_text_last=draw(st.booleans()),
            )
        )
        turns = max(1, regions[-1]) if strategy == "sequential" else 1
        step.append(draw(st.integers(0, options[-1].steps * turns - 1)))
    shape = (rows, max(1, *regions), max(each.max_new_tokens for each in options))
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = row_options(options, regions, shape, torch.float64, EOT).slot_BNS.numpy()
    opens = (chance.random(shape) < draw(st.sampled_from([0.1, 0.5, 1.0]))) & slots
    doubts = chance.permutation(np.arange(opens.size)).reshape(shape) / opens.size * 2
    if draw(st.booleans()):  # ties
        doubts = np.round(doubts, 1)
    doubts = np.where(slots, doubts, 398.0)
    for row, each in enumerate(options):
        # Regions whose turn comes later have no predictions on a CPU, and have some on a device.
        if each.strategy == "sequential" and draw(st.booleans()):
            doubts[row, step[row] // each.steps + 1 :] = -1.0
    tokens, guesses = chance.integers(0, EOT, shape), chance.integers(EOT, 99, shape)
    guesses[chance.random(shape) < 0.4] = EOT
    return options, step, regions, [torch.from_numpy(each) for each in (tokens, opens, guesses, doubts)]


def selected(options, step, regions, state):
    """(tokens, open) after a step."""
    rows = row_options(options, regions, tuple(state[0].shape), torch.float64, EOT)
    return select(rows, torch.tensor(step), *state)


@settings(deadline=None, max_examples=150)
@given(steps())
def test_each_strategy_chooses_as_stated_slot_by_slot_whatever_the_other_rows_do(drawn):
    options, step, regions, state = drawn
    before = [part.clone() for part in state]
    tokens, opens = selected(options, step, regions, state)
    for part, was in zip(state, before, strict=True):
        assert torch.equal(part, was), "nothing is changed in place"
    for row, (each, count) in enumerate(zip(options, regions, strict=True)):
        length = each.max_new_tokens
        parts = [*state[:3], confidence_of(state[3])]
        plain = (part[row, :count, :length].tolist() for part in parts)
        expected_tokens, expected_opens = choose(each, step[row], *plain, EOT)
        assert opens[row, :count, :length].tolist() == expected_opens
        for region in range(count):
            closed = [slot for slot, waiting in enumerate(expected_opens[region]) if not waiting]
            assert tokens[row, region, closed].tolist() == [expected_tokens[region][i] for i in closed]
        assert not opens[row, count:].any(), "a region that is not there has no slots"
        assert not opens[row, :, length:].any(), "nor is there a slot behind the last one"


@settings(deadline=None, max_examples=60)
@given(steps())
def test_what_is_written_stays_but_for_remasking(drawn):
    options, step, regions, state = drawn
    tokens, opens, guesses, _ = state
    after, still = selected(options, step, regions, state)
    assert torch.equal(after[~opens], tokens[~opens])
    written = opens & ~still
    assert torch.equal(after[written], guesses[written])
    for row, each in enumerate(options):
        if each.strategy != "remask":
            assert not (still & ~opens)[row].any()
        if each.strategy in ("threshold", "factor"):
            assert (written[row].any(-1) | ~opens[row].any(-1)).all(), "each region that waits gets a token"


def test_end_of_text_waits_for_all_words_and_is_kept_when_nothing_else_is_left():
    guesses, doubts = torch.tensor([[[EOT, 60, EOT, 61]]]), torch.tensor([[[1e-9, 3.0, 1e-9, 2.0]]])
    opens, kept = torch.ones(1, 1, 4, dtype=torch.bool), []
    options = DecodeOptions(strategy="per-region", max_new_tokens=4, steps=4, end_of_text_last=True)
    for step in range(4):
        _, after = selected([options], [step], [1], [torch.zeros_like(guesses), opens, guesses, doubts])
        kept += (opens & ~after)[0, 0].nonzero()[:, 0].tolist()
        opens = after
    assert kept == [3, 1, 0, 2], "words first, the surest of them before the other"


@pytest.mark.parametrize("strategy", ["remask", "per-region"])
def test_what_is_sure_in_all_places_ends_at_once_its_end_included(strategy):
    guesses, doubts = torch.tensor([[[60, 61, EOT, EOT]]]), torch.full((1, 1, 4), 0.01)
    state = [torch.zeros_like(guesses), torch.ones(1, 1, 4, dtype=torch.bool), guesses, doubts]
    options = DecodeOptions(strategy=strategy, max_new_tokens=4, steps=4, end_of_text_last=True, settled=0.9)
    tokens, opens = selected([options], [0], [1], state)
    assert not opens.any() and torch.equal(tokens, guesses)


def test_a_region_that_is_sure_settles_in_its_turn_and_not_before():
    """A device predicts it in every step."""
    shape = (1, 2, 3)
    state = [
        torch.zeros(shape, dtype=torch.int64),
        torch.ones(shape, dtype=torch.bool),
        torch.full(shape, 60),
    ]
    doubts = torch.tensor([[[3.0] * 3, [0.01] * 3]])
    options = DecodeOptions(strategy="sequential", max_new_tokens=3, steps=3, settled=0.9)
    _, early = selected([options], [0], [2], [*state, doubts])
    assert early[0].sum(-1).tolist() == [2, 3]
    state[1][0, 0] = False
    _, late = selected([options], [3], [2], [*state, doubts])
    assert not late.any()


def some_doubts(dtype):
    """Doubts of all sizes as the head's exponentials are summed up, and as it rounds them."""
    generator = torch.Generator().manual_seed(0)
    raw = ((torch.rand(20_000, generator=generator, dtype=torch.float64) * 60) - 45).exp().to(dtype)
    raw = torch.cat([raw, torch.tensor([0.0, 2**-53, 2**-52, 1.5 * 2**-52, 2.5 * 2**-52, 2**-29]).to(dtype)])
    return raw, _rounded(raw)


DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_doubts_order_and_tie_as_probabilities_in_float64(dtype):
    raw, doubts = some_doubts(dtype)
    assert torch.equal(confidence_of(doubts), 1 / (1 + raw.double())), "rounding changes no probability"
    order = confidence_of(doubts).argsort(descending=True, stable=True)
    assert torch.equal(doubts.argsort(stable=True), order), "ties included"


def around(edges, doubts):
    """The doubts, the edges, and what is next to the edges on either side."""
    edges = edges[edges.isfinite()]
    sides = [torch.nextafter(edges, torch.full_like(edges, far)).clamp(min=0) for far in (-1, torch.inf)]
    return torch.cat([doubts, edges, *sides, torch.full_like(doubts[:1], torch.inf)])


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 1 - 1e-9, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_threshold_of_doubts_is_that_of_probabilities_in_float64_to_the_last_bit(threshold, dtype):
    given = DecodeOptions(strategy="threshold", threshold=threshold, max_new_tokens=1)
    edges = threshold_doubts(given, dtype)
    doubts = around(edges, some_doubts(dtype)[1])
    assert torch.equal(doubts <= edges, confidence_of(doubts) >= threshold)
    both = DecodeOptions(strategy="threshold", position_thresholds=[0.0, threshold], max_new_tokens=2)
    assert threshold_doubts(both, dtype).tolist() == [torch.inf, edges.item()]


@pytest.mark.parametrize("factor", [0.0, 1e-12, 0.3, 1.0, 2.0, 4.0, 1e9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_in_doubts_is_that_of_probabilities_in_float64_to_the_last_bit(factor, dtype):
    edges = factor_doubts(DecodeOptions(strategy="factor", factor=factor, max_new_tokens=6), dtype)
    doubts = around(edges, some_doubts(dtype)[1])
    for count, edge in enumerate(edges, start=2):
        assert torch.equal(doubts <= edge, count * (1 - confidence_of(doubts)) < factor)
    assert (edges == -torch.inf).all() if factor == 0 else (edges >= 0).all()


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 130), st.data())
def test_the_schedule_is_the_linear_one_rounded_down(slots, num_steps, data):
    step = data.draw(st.integers(0, num_steps - 1))
    exact = still_open(slots, num_steps, step)
    assert exact - 1 <= left_open(slots, num_steps, step) <= exact
    assert left_open(slots, num_steps, -1) == slots
    assert left_open(slots, num_steps, num_steps - 1) == left_open(slots, num_steps, num_steps + 5) == 0


def test_the_schedule_rounds_where_the_original_does():
    assert left_open(90, 10, 2) == 62, "90 * (7 / 10) is 62.99... in floating point"


def draws(logits, count=20_000, **options):
    """Share of each token among many draws, spread evenly over the unit interval."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = DecodeOptions(**options)
    hot, nucleus = (
        torch.full((count,), each, dtype=torch.float64) for each in (chosen.temperature, chosen.top_p)
    )
    found = draw(torch.tensor(logits).expand(count, -1).clone(), hot, nucleus, uniform)
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
    assert draw(logits, torch.ones(2), torch.ones(2), ends).tolist() == [1, 4]
