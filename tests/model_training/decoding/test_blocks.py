"""Answers by blocks equal those of a plain loop, whatever the batch, the layout and the cache."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paracaption.model_training.decoding.block_rows import left_open
from paracaption.model_training.decoding.blocks import answer_batch, answer_steps
from paracaption.model_training.decoding.chat import Chat, Question
from paracaption.schemas.answering import AnswerOptions
from paracaption.schemas.errors import ConfigError, StageFailed
from tests.model_training.plain_answers import answer_plainly
from tests.model_training.tiny_models import lively, photo

LAYOUTS = ["corrected", "reference"]


def talking(layout="corrected", seed=0):
    return Chat(*lively(seed, layout=layout))


@pytest.fixture(scope="module", params=LAYOUTS)
def chat(request):
    return talking(request.param)


@pytest.fixture(params=LAYOUTS)
def ending_chat(request):
    """One that often predicts the end of text."""
    chat = talking(request.param, seed=1)
    with torch.no_grad():
        chat.model.lm_head.weight[chat.model.config.eot_token_id] *= 3
    return chat


def picture(seed):
    return photo(seed, 0)[0]


def region(seed):
    pixels, masks = photo(seed, 1)
    return {"images": [pixels], "region": masks[0]}


KINDS = {
    "one image": Question("what is it", [picture(0)]),
    "two images": Question("<image> or <image>", [picture(1), picture(2)]),
    "a second turn": Question("and why", [picture(3)], [("what is it", "a cat")]),
    "text": Question("say a word"),
    "a region": Question("what is here", **region(4)),
}
OPTIONS = {
    "one block": {"max_new_tokens": 6, "block_length": 6},
    "blocks": {"max_new_tokens": 8, "block_length": 4, "steps": 4},
    "an uneven schedule": {"max_new_tokens": 7, "block_length": 7, "steps": 3},
    "a short last block": {"max_new_tokens": 7, "block_length": 3, "steps": 6},
    "more steps than tokens": {"max_new_tokens": 4, "block_length": 2, "steps": 10},
    "left to right": {"max_new_tokens": 6, "block_length": 3, "strategy": "left-to-right", "steps": 4},
    "threshold": {"max_new_tokens": 8, "block_length": 4, "strategy": "threshold", "threshold": 0.3},
    "threshold in few steps": {
        **{"max_new_tokens": 8, "block_length": 8, "strategy": "threshold"},
        **{"threshold": 0.9, "steps": 3},
    },
    "factor": {"max_new_tokens": 8, "block_length": 4, "strategy": "factor", "factor": 1.5},
    "to the last step": {"max_new_tokens": 8, "block_length": 4, "early_exit": False},
}


def laid_out(chat, question, **fields):
    return chat._lay_out(question, AnswerOptions(**fields), "")


def same(chat, asked, state, row=0):
    """Check a row of a batch against the plain loop."""
    plain = answer_plainly(chat.model, asked)
    length = asked.options.max_new_tokens
    opens = state.open_BS[row, :length].tolist()
    tokens = state.tokens_BS[row, :length].tolist()
    assert [None if waiting else token for token, waiting in zip(tokens, opens, strict=True)] == plain.tokens
    assert (int(state.ends_B[row]), int(state.forwards_B[row])) == (plain.end, plain.forwards)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.soak(keep=18)
def test_an_answer_is_that_of_the_plain_loop(chat, kind, name):
    asked = laid_out(chat, KINDS[kind], **OPTIONS[name])
    same(chat, asked, answer_batch(chat.model, [asked]))


@pytest.mark.parametrize("strategy", ["confidence", "threshold", "factor"])
def test_end_of_text_is_kept_last_in_its_block_as_the_plain_loop_says(ending_chat, strategy):
    fields = {"max_new_tokens": 8, "block_length": 4, "strategy": strategy, "threshold": 0.3, "factor": 1.5}
    answers = []
    for last in (False, True):
        asked = [laid_out(ending_chat, each, end_of_text_last=last, **fields) for each in KINDS.values()]
        state = answer_batch(ending_chat.model, asked)
        for row, each in enumerate(asked):
            same(ending_chat, each, state, row)
        answers.append(state.tokens_BS.tolist())
    assert answers[0] != answers[1], "it matters"


@pytest.mark.parametrize("cache", ["none", "auto"])
@pytest.mark.soak(keep=2)
def test_rows_with_options_of_their_own_share_a_batch(chat, cache):
    asked = [
        laid_out(chat, question, cache=cache, **fields)
        for question, fields in zip([*KINDS.values()] * 2, OPTIONS.values(), strict=True)
    ]
    state = answer_batch(chat.model, asked)
    for row, each in enumerate(asked):
        same(chat, each, state, row)


@pytest.mark.parametrize("stop_at", [0, 1, 4])
@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.soak(keep=10)
def test_an_answer_stops_before_the_first_run_of_tokens_that_is_a_stop_string(chat, stop_at, block):
    fields = {"max_new_tokens": 8, "block_length": block, "early_exit": False}
    plain = answer_plainly(chat.model, laid_out(chat, KINDS["text"], **fields)).tokens
    asked = laid_out(chat, KINDS["text"], **fields)
    run = tuple(token for token in plain[stop_at : stop_at + 2] if token is not None)
    asked = asked._replace(stops=((1, 2, 3), run, (5,) * 20))
    state = answer_batch(chat.model, [asked])
    same(chat, asked, state)
    assert int(state.ends_B[0]) <= stop_at
    assert not state.open_BS[0, : int(state.ends_B[0])].any()


def test_the_end_of_text_ends_an_answer_and_changes_none(chat, monkeypatch):
    fields = {"max_new_tokens": 12, "block_length": 4}
    asked = [laid_out(chat, Question("what", [picture(seed)]), **fields) for seed in range(6)]
    late = [each._replace(options=each.options.model_copy(update={"early_exit": False})) for each in asked]
    said = answer_batch(chat.model, late).tokens_BS[:, 2:9].flatten()
    monkeypatch.setattr(chat.model.config, "eot_token_id", int(np.bincount(said).argmax()))
    found, whole = (answer_batch(chat.model, each) for each in (asked, late))
    for row, each in enumerate(asked):
        same(chat, each, found, row)
        assert chat._tokens(found, row) == chat._tokens(whole, row)
    assert (whole.forwards_B == 12).all() and (found.forwards_B < 12).any()


def test_blocks_of_one_token_are_the_same_as_from_left_to_right(chat):
    fields = {"max_new_tokens": 6, "early_exit": False}
    ones = answer_batch(chat.model, [laid_out(chat, KINDS["one image"], block_length=1, **fields)])
    leftmost = laid_out(chat, KINDS["one image"], block_length=6, strategy="left-to-right", **fields)
    np.testing.assert_array_equal(ones.tokens_BS, answer_batch(chat.model, [leftmost]).tokens_BS)


def test_what_stays_is_never_changed_and_blocks_follow_each_other(chat):
    asked = laid_out(chat, KINDS["one image"], max_new_tokens=9, block_length=3, early_exit=False)
    states = list(answer_steps(chat.model, [asked]))
    for before, after in pairwise(states):
        decided = ~before.open_BS
        assert (after.tokens_BS[decided] == before.tokens_BS[decided]).all()
        assert (after.confidence_BS[decided] == before.confidence_BS[decided]).all()
        opened = np.flatnonzero(before.open_BS[0] & ~after.open_BS[0])
        first = np.flatnonzero(before.open_BS[0])[0]
        assert set(opened // 3) == {first // 3}


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_step_closes_as_many_slots_and_the_first_ones_one_more(width, steps):
    options = AnswerOptions(max_new_tokens=width, block_length=width, steps=steps)
    left = [width, *left_open(options, width, steps)]
    closed = [before - after for before, after in pairwise(left)]
    assert left[-1] == 0 and closed == sorted(closed, reverse=True)
    assert max(closed) - min(closed) <= 1


class Counted:
    """Counts the tokens that the language model computes, pass by pass."""

    def __init__(self, model):
        self.passes = []
        self.hook = model.language_model.layers[0].register_forward_pre_hook(self.note)

    def note(self, _module, inputs):
        self.passes.append(tuple(inputs[0].shape[:2]))


def test_the_exact_cache_computes_everything_before_the_answer_once():
    chat = talking()
    asked = laid_out(chat, KINDS["one image"], max_new_tokens=6, block_length=3, early_exit=False)
    prefix = asked.example.prefix.shape[1]
    counted = Counted(chat.model)
    answer_batch(chat.model, [asked])
    counted.hook.remove()
    assert counted.passes == [(1, prefix + 6)] + [(1, 6)] * 5


@pytest.mark.parametrize("every", [1, 2])
def test_the_approximate_cache_computes_a_block_alone_between_refreshes(chat, every):
    fields = {"max_new_tokens": 8, "block_length": 4, "early_exit": False, "cache": "approximate"}
    asked = laid_out(chat, KINDS["one image"], refresh_every=every, **fields)
    prefix = asked.example.prefix.shape[1]
    counted = Counted(chat.model)
    answer_batch(chat.model, [asked])
    counted.hook.remove()
    again = 8 if chat.model.layout.isolate_prefix else prefix + 8
    between = again if every == 1 else 4
    assert (
        counted.passes
        == [(1, prefix + 8), (1, between), (1, again), (1, between)]
        + [
            (1, again),
            (1, between),
        ]
        * 2
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_approximate_cache_that_is_always_fresh_changes_nothing(chat, kind):
    fields = {"max_new_tokens": 8, "block_length": 4}
    exact = answer_batch(chat.model, [laid_out(chat, KINDS[kind], cache="none", **fields)])
    fresh = laid_out(chat, KINDS[kind], cache="approximate", refresh_every=1, **fields)
    np.testing.assert_array_equal(answer_batch(chat.model, [fresh]).tokens_BS, exact.tokens_BS)


def test_with_an_approximate_cache_an_answer_does_not_depend_on_its_batch(chat):
    lengths = [(3, 2), (8, 4), (5, 5), (9, 3), (2, 1)]
    asked = [
        laid_out(
            chat, question, max_new_tokens=length, block_length=block, cache="approximate", refresh_every=3
        )
        for question, (length, block) in zip(KINDS.values(), lengths, strict=True)
    ]
    together = answer_batch(chat.model, asked)
    for row, each in enumerate(asked):
        alone, length = answer_batch(chat.model, [each]), each.options.max_new_tokens
        np.testing.assert_array_equal(together.tokens_BS[row, :length], alone.tokens_BS[0])
        assert together.forwards_B[row] == alone.forwards_B[0]


def test_drawn_answers_depend_on_the_seed_and_not_on_the_batch(chat):
    fields = {"max_new_tokens": 6, "block_length": 3, "temperature": 1.5, "early_exit": False}
    seeds = (1, 2, 1, -(1 << 63), (1 << 63) - 1)
    asked = [laid_out(chat, KINDS["text"], seed=seed, **fields) for seed in seeds]
    together = answer_batch(chat.model, asked).tokens_BS
    assert (together[0] == together[2]).all() and (together[0] != together[1]).any()
    alone = answer_batch(chat.model, [asked[1]]).tokens_BS
    np.testing.assert_array_equal(alone[0], together[1])


def test_a_small_top_p_leaves_only_the_likeliest_token(chat):
    fields = {"max_new_tokens": 6, "block_length": 3, "early_exit": False}
    drawn = laid_out(chat, KINDS["text"], temperature=1.0, top_p=1e-9, **fields)
    likeliest = laid_out(chat, KINDS["text"], **fields)
    found = [answer_batch(chat.model, [each]).tokens_BS for each in (drawn, likeliest)]
    np.testing.assert_array_equal(*found)


def test_tokens_that_no_answer_has_are_never_predicted():
    chat = talking("reference")
    favourite = chat.processor.tokenize("<|start_header_id|>")[0]
    with torch.no_grad():
        chat.model.lm_head.weight[favourite] *= 40
    asked = laid_out(chat, KINDS["text"], max_new_tokens=6, suppress_special=False, early_exit=False)
    assert favourite in answer_batch(chat.model, [asked]).tokens_BS
    asked = laid_out(chat, KINDS["text"], max_new_tokens=6, early_exit=False)
    assert favourite not in answer_batch(chat.model, [asked]).tokens_BS


def test_an_exact_cache_is_refused_where_the_prefix_sees_the_answer():
    chat = talking("reference")
    with pytest.raises(ConfigError, match="'exact' needs a layout that isolates the prefix"):
        answer_batch(chat.model, [laid_out(chat, KINDS["text"], cache="exact")])


def test_damaged_weights_are_said_to_be_damaged():
    chat = talking(seed=3)
    with torch.no_grad():
        chat.model.lm_head.weight[7] = torch.nan
    with pytest.raises(StageFailed, match=r"the probabilities in torch\.float64 are NaN"):
        chat.ask("what", max_new_tokens=4)
