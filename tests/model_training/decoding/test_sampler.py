"""Decoding: the same as said plainly, whatever is beside an image in its batch and whatever is kept."""

import math
from functools import lru_cache
from itertools import pairwise
from typing import get_args

import pytest
import torch

from paracaption.model_training.decoding import head
from paracaption.model_training.decoding.sampler import decode_batch, decode_steps
from paracaption.model_training.model.batch import collate
from paracaption.schemas.decoding import DecodeOptions, Strategy
from paracaption.schemas.errors import ConfigError, StageFailed
from tests.model_training.plain_decoder import decode_plainly
from tests.model_training.tiny_models import examples, lively

STRATEGIES = get_args(Strategy)
LAYOUTS = ["corrected", "reference"]
SLOTS = 5


@lru_cache(None)
def ready(layout):
    """A float64 model for up to nine regions, and its processor."""
    return lively(layout=layout, num_prompts=9)


def photos(layout, regions, seed=0):
    return examples(ready(layout)[1], regions, slots=SLOTS, seed=seed)


def options_of(strategy, **changes):
    changes = {"max_new_tokens": SLOTS, "steps": 3, "threshold": 0.5} | changes
    return DecodeOptions(strategy=strategy, **changes)


def special(config):
    return [config.mask_token_id, config.image_token_id, *config.region_token_ids, *config.caption_token_ids]


CASES = [("corrected", "none"), ("corrected", "exact"), ("reference", "none")]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("layout", "cache"), CASES)
@pytest.mark.parametrize("num_steps", [3, 8])
@pytest.mark.soak(keep=10)
def test_tokens_and_passes_are_those_of_the_plain_decoder(layout, cache, strategy, num_steps):
    model, _ = ready(layout)
    suppressed = special(model.config) if layout == "corrected" else []
    for regions, early_exit in ((3, True), (1, False)):
        options = options_of(strategy, cache=cache, steps=num_steps, early_exit=early_exit)
        [example] = photos(layout, [regions], seed=1)
        expected, forwards = decode_plainly(model, example, options, suppressed)
        found = decode_batch(model, collate([example]), options)
        assert found.tokens_BNS[0].tolist() == expected
        assert found.forwards_B.tolist() == [forwards]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_end_of_text_is_kept_last_as_the_plain_decoder_says(layout, strategy):
    model, processor = lively(seed=2, layout=layout)
    with torch.no_grad():
        model.lm_head.weight[model.config.eot_token_id] *= 3
    suppressed = special(model.config) if layout == "corrected" else []
    num_early = 0
    for example in examples(processor, [3, 2, 1], slots=SLOTS):
        changes = {"cache": "none", "steps": SLOTS, "threshold": 0.9}
        captions = {}
        for last in (False, True):
            options = options_of(strategy, end_of_text_last=last, **changes)
            expected, forwards = decode_plainly(model, example, options, suppressed)
            found = decode_batch(model, collate([example]), options)
            assert (found.tokens_BNS[0].tolist(), found.forwards_B.tolist()) == (expected, [forwards])
            captions[last] = expected
        num_early += captions[False] != captions[True]
    assert num_early or strategy == "left-to-right", "it matters"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [8, 10, 12, 50])
@pytest.mark.soak(keep=2)
def test_a_sure_model_in_float32_keeps_the_tokens_that_probabilities_in_float64_choose(
    strategy, layout, scale
):
    model, processor = lively(seed=3, dtype=torch.float32, layout=layout)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    [example] = examples(processor, [4], slots=12)
    changes = {"cache": "none", "suppress_special": False, "early_exit": False}
    options = options_of(strategy, max_new_tokens=12, steps=12, threshold=1 - 1e-9, **changes)
    *_, last = decode_steps(model, collate([example]), options)
    expected, _ = decode_plainly(model, example, options, [])
    assert last.tokens_BNS[0].tolist() == expected
    assert (last.confidence_BNS.float() == 1).sum() >= 2, "float32 would take them for equally sure"


def test_a_drawn_tokens_probability_is_that_of_a_softmax_in_float64():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) * 4 for n in (20, 50))
    uniform = torch.rand(20, generator=generator, dtype=torch.float64)
    hot, all_of_them = (torch.full((20,), value, dtype=torch.float64) for value in (30.0, 1.0))
    tokens, doubts = head.drawn(hidden, weight, None, hot, all_of_them, uniform)
    expected = (hidden @ weight.T).double().softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(head.confidence_of(doubts), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_model_without_probabilities_is_an_error_and_not_a_row_of_exclamation_marks(
    strategy, temperature, value
):
    model, processor = lively()
    with torch.no_grad():
        if value is None:
            model.lm_head.weight.zero_()
        else:
            model.lm_head.weight[3, 2] = value
    batch = collate(examples(processor, [2], slots=SLOTS))
    with pytest.raises(StageFailed, match="are NaN, or equal"):
        decode_batch(model, batch, options_of(strategy, temperature=temperature))


RAGGED = [3, 9, 1, 6, 2, 8, 4, 7]
BATCHES = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 2, 5], [2, 2, 4, 0]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("layout", "cache"), [*CASES, ("reference", "approximate")])
@pytest.mark.soak(keep=2)
def test_one_to_eight_images_of_one_to_nine_regions_together_are_as_each_by_itself(layout, cache, strategy):
    model, _ = ready(layout)
    options = options_of(strategy, cache=cache, refresh_every=2, steps=2 if strategy == "sequential" else 3)
    found = photos(layout, RAGGED)
    alone = [decode_batch(model, collate([example]), options) for example in found]
    assert len({str(one.tokens_BNS[0, 0].tolist()) for one in alone}) > 1, "images matter"
    for images in BATCHES:
        together = decode_batch(model, collate([found[image] for image in images]), options)
        assert together.exists_BN.sum(1).tolist() == [RAGGED[image] for image in images]
        for row, image in enumerate(images):
            tokens = together.tokens_BNS[row, : RAGGED[image]]
            assert tokens.tolist() == alone[image].tokens_BNS[0].tolist(), (images, image)
        assert together.forwards_B.tolist() == [int(alone[image].forwards_B) for image in images]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_images_without_regions_take_no_part(strategy):
    model, _ = ready("corrected")
    found = photos("corrected", [0, 2, 0, 1])
    together = decode_batch(model, collate(found), options_of(strategy))
    for row in (1, 3):
        alone = decode_batch(model, collate([found[row]]), options_of(strategy))
        tokens = together.tokens_BNS[row][together.exists_BN[row]]
        assert torch.equal(tokens, alone.tokens_BNS[0])
    assert together.forwards_B[[0, 2]].tolist() == [0, 0]
    nothing = decode_batch(model, collate(found[:1]), options_of(strategy))
    assert nothing.tokens_BNS.shape == (1, 0, SLOTS)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("num_steps", "temperature"), [(3, 0.0), (11, 1.0)])
@pytest.mark.soak(keep=9)
def test_what_is_kept_exactly_changes_nothing(strategy, num_steps, temperature):
    model, _ = ready("corrected")
    batch = collate(photos("corrected", [3, 1, 6]))
    changes = {"steps": num_steps, "temperature": temperature}
    plain = list(decode_steps(model, batch, options_of(strategy, cache="none", **changes)))
    exact = list(decode_steps(model, batch, options_of(strategy, cache="exact", **changes)))
    assert len(plain) == len(exact)
    for one, other in zip(plain, exact, strict=True):
        assert torch.equal(one.tokens_BNS, other.tokens_BNS)
        assert torch.equal(one.open_BNS, other.open_BNS)
        assert torch.equal(one.forwards_B, other.forwards_B)
    auto = decode_batch(model, batch, options_of(strategy, cache="auto", **changes))
    assert torch.equal(auto.tokens_BNS, exact[-1].tokens_BNS)


@pytest.mark.parametrize("cache", ["none", "exact"])
def test_a_decode_with_flex_attention_is_the_same(cache, monkeypatch):
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # eager at once
    model, _ = ready("corrected")
    batch = collate(photos("corrected", [2, 1]))
    options = options_of("per-region", cache=cache)
    plain = decode_batch(model, batch, options)
    monkeypatch.setattr(model.config, "_attn_implementation", "flex_attention")
    assert torch.equal(decode_batch(model, batch, options).tokens_BNS, plain.tokens_BNS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_approximate_cache_renewed_at_every_step_is_none(strategy):
    model, _ = ready("reference")
    batch = collate(photos("reference", [3, 1, 5]))
    changes = {"steps": 4, "temperature": 0.7}
    plain = decode_batch(model, batch, options_of(strategy, cache="none", **changes))
    often = options_of(strategy, cache="approximate", refresh_every=1, compare=True, **changes)
    found = decode_batch(model, batch, often)
    assert torch.equal(found.tokens_BNS, plain.tokens_BNS)
    assert found.agreement_B.tolist() == [1.0, 1.0, 1.0]


def test_an_approximate_cache_says_how_much_it_changed():
    model, _ = ready("reference")
    batch = collate(photos("reference", [3, 1, 5]))
    seldom = options_of("per-region", cache="approximate", refresh_every=100, compare=True, steps=5)
    found = decode_batch(model, batch, seldom)
    plain = decode_batch(model, batch, options_of("per-region", cache="none", steps=5))
    shares = [
        float((found.tokens_BNS[row, :regions] == plain.tokens_BNS[row, :regions]).double().mean())
        for row, regions in enumerate([3, 1, 5])
    ]
    assert found.agreement_B.tolist() == pytest.approx(shares)
    assert len(set(shares)) == 3
    assert 0 < min(shares)
    assert max(shares) < 1
    assert decode_batch(model, batch, options_of("per-region", cache="approximate")).agreement_B is None
    plain = seldom.model_copy(update={"compare": False})
    mixed = decode_batch(model, batch, [plain, seldom, plain]).agreement_B.tolist()
    assert mixed == pytest.approx([math.nan, shares[1], math.nan], nan_ok=True)


def test_an_exact_cache_needs_a_layout_that_isolates_the_prefix():
    model, _ = ready("reference")
    batch = collate(photos("reference", [1]))
    with pytest.raises(ConfigError, match="isolates the prefix"):
        decode_batch(model, batch, options_of("remask", cache="exact"))
    auto, none = (decode_batch(model, batch, options_of("remask", cache=cache)) for cache in ("auto", "none"))
    assert torch.equal(auto.tokens_BNS, none.tokens_BNS)


def test_a_batch_laid_out_for_another_number_of_slots_is_an_error():
    model, _ = ready("corrected")
    # Two of 5 slots are as long as one of 12, and one of 5 as long as seven without slots.
    for regions, slots in (([1, 2], 6), ([2], 12), ([6], 40)):
        batch = collate(photos("corrected", regions))
        with pytest.raises(ConfigError, match=f"another length than {slots} slots"):
            decode_batch(model, batch, options_of("remask", max_new_tokens=slots))
    batch = collate(examples(ready("corrected")[1], [1], slots=10))
    with pytest.raises(ConfigError, match="another length than 4 slots"):
        decode_batch(model, batch, options_of("remask", max_new_tokens=4))


def trajectory(layout, strategy, regions=(3, 1), **changes):
    model, _ = ready(layout)
    return list(decode_steps(model, collate(photos(layout, list(regions))), options_of(strategy, **changes)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_every_strategy_ends_in_time_with_every_slot_filled(layout, strategy, num_steps):
    states = trajectory(layout, strategy, steps=num_steps, suppress_special=True)
    assert states[0].open_BNS.sum() == 4 * SLOTS
    assert states[0].forwards_B.tolist() == [0, 0]
    assert states[0].confidence_BNS.isnan().all()
    most = num_steps * (3 if strategy == "sequential" else 1)
    again = layout == "reference"  # by default, a step over captions alone that is not sure is done again
    assert len(states) - 1 <= most * (2 if again else 1)
    assert not states[-1].open_BNS.any()
    filled = states[-1].tokens_BNS[[0, 0, 0, 1], [0, 1, 2, 0]]
    assert not torch.isin(filled, torch.tensor(special(ready(layout)[0].config))).any()
    for state in states:  # the slots of a region that is not there
        assert (state.tokens_BNS[1, 1:] == states[0].tokens_BNS[1, 1:]).all()


def test_each_region_goes_by_its_own_schedule():
    states = trajectory("corrected", "per-region", steps=SLOTS, early_exit=False)
    for step, state in enumerate(states):
        assert state.open_BNS.sum(-1)[[0, 0, 0, 1], [0, 1, 2, 0]].tolist() == [SLOTS - step] * 4


def test_a_threshold_writes_at_least_the_best_and_all_that_are_sure():
    for threshold in (0.0, 0.3, 1.0):
        states = trajectory("corrected", "threshold", steps=SLOTS, threshold=threshold, early_exit=False)
        for before, after in pairwise(states):
            written = before.open_BNS & ~after.open_BNS
            assert (written.any(-1) == before.open_BNS.any(-1)).all()
            sure = before.open_BNS & (after.confidence_BNS >= threshold)
            assert written[sure].all()
            assert (written.sum(-1) <= sure.sum(-1).clamp(min=1)).all()
        assert len(states) - 1 == (1 if threshold == 0 else len(states) - 1)
        assert threshold < 1 or len(states) - 1 == SLOTS


def test_one_region_after_the_other_means_the_next_waits_for_the_last():
    states = trajectory("corrected", "sequential", steps=3)
    counts = [state.open_BNS[0].sum(-1).tolist() for state in states]
    assert counts[0] == [SLOTS] * 3
    for first, second, third in counts:
        assert second == SLOTS or first == 0
        assert third == SLOTS or second == 0
    together = trajectory("corrected", "per-region", steps=3)
    assert torch.equal(states[-1].tokens_BNS, together[-1].tokens_BNS), (
        "isolated captions do not see each other"
    )


def test_left_to_right_writes_left_to_right():
    states = trajectory("corrected", "left-to-right", steps=3)
    for state in states:
        assert (state.open_BNS.int().diff(dim=-1) >= 0).all(), "what is open is on the right"


@lru_cache(None)
def ending():
    """A model that often says end of text where the other one says its commonest word, and nine regions."""
    model, processor = lively(num_prompts=9)
    [example] = photos("corrected", [9])
    found = decode_batch(model, collate([example]), options_of("per-region")).tokens_BNS
    with torch.no_grad():
        model.lm_head.weight[model.config.eot_token_id] = (
            1.05 * model.lm_head.weight[int(found.mode().values.mode().values)]
        )
    return model, processor, example


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "remask"])
def test_a_caption_that_has_ended_is_not_worked_on_and_reads_the_same(strategy):
    model, processor, example = ending()
    eot = model.config.eot_token_id
    early, full = (
        decode_batch(
            model, collate([example]), options_of(strategy, steps=SLOTS, early_exit=exits, threshold=0.99)
        )
        for exits in (True, False)
    )
    texts = [processor.read_captions(found.tokens_BNS[0].numpy(), example.order) for found in (early, full)]
    assert texts[0] == texts[1]
    assert early.forwards_B <= full.forwards_B
    rest = [row[row.index(eot) :] for row in early.tokens_BNS[0].tolist() if eot in row[:-1]]
    assert rest, "some captions end early in this model"
    assert all(set(row) == {eot} for row in rest)
    assert not torch.equal(early.tokens_BNS, full.tokens_BNS), "what is behind the end differs"
    if strategy == "sequential":
        assert early.forwards_B < full.forwards_B


def test_early_exit_is_not_for_remasking_which_may_open_a_written_slot_again():
    model, _, example = ending()
    early, full = (
        decode_batch(model, collate([example]), options_of("remask", early_exit=exits))
        for exits in (True, False)
    )
    assert torch.equal(early.tokens_BNS, full.tokens_BNS)
    assert (early.tokens_BNS == model.config.eot_token_id).any()


def test_special_tokens_are_never_guessed_but_by_the_reference_or_if_asked_for():
    for layout in LAYOUTS:
        model, processor = lively(layout=layout)
        batch = collate(examples(processor, [3], slots=SLOTS))
        with torch.no_grad():
            model.lm_head.weight[special(model.config)] *= 4
        found = {
            suppress: torch.isin(
                decode_batch(model, batch, options_of("per-region", suppress_special=suppress)).tokens_BNS,
                torch.tensor(special(model.config)),
            ).any()
            for suppress in (None, True, False)
        }
        assert found == {None: layout == "reference", True: False, False: True}


def drawn(layout="corrected", regions=(3, 1), **changes):
    model, _ = ready(layout)
    changes = {"temperature": 1.0, "cache": "auto"} | changes
    batch = collate(photos(layout, list(regions)))
    return decode_batch(model, batch, options_of("per-region", **changes)).tokens_BNS


@pytest.mark.parametrize("seed", [-(1 << 63), 1 - (1 << 63), (1 << 63) - 1])
def test_the_largest_seeds_that_are_allowed_draw_too(seed):
    assert torch.equal(drawn(seed=seed), drawn(seed=0)) == (seed % (1 << 32) == 0)  # what PyTorch takes of it


def test_draws_depend_on_the_seed_and_on_nothing_else():
    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(seed=0), drawn(seed=1))
    assert not torch.equal(drawn(), drawn(temperature=0.0))
    assert torch.equal(drawn(temperature=1e-4), drawn(temperature=0.0))
    assert torch.equal(drawn(top_p=1e-9), drawn(temperature=0.0))
    assert torch.equal(drawn(regions=(3, 1, 9, 4))[0, :3], drawn()[0])


@pytest.mark.parametrize("cache", ["none", "exact"])
def test_each_step_draws_anew_also_where_nothing_has_changed(cache):
    states = trajectory("corrected", "per-region", regions=[1], steps=4 * SLOTS, temperature=9.0, cache=cache)
    still = [pair for pair in pairwise(states[1:]) if torch.equal(pair[0].tokens_BNS, pair[1].tokens_BNS)]
    assert len(still) > SLOTS
    for before, after in still:
        assert not torch.equal(before.predicted_BNS[before.open_BNS], after.predicted_BNS[before.open_BNS])
    assert [int(state.forwards_B) for state in states] == list(range(len(states)))


def test_slots_of_an_image_are_drawn_apart_from_each_other():
    tokens = [drawn(regions=(9,), seed=seed, temperature=50.0, steps=1) for seed in range(4)]
    assert torch.stack(tokens).unique().numel() > 0.3 * 4 * 9 * SLOTS
    assert len({str(row) for one in tokens for row in one[0].tolist()}) == 4 * 9


def test_many_slots_and_words_are_looked_at_in_parts(monkeypatch):
    whole = [drawn(temperature=temperature) for temperature in (0.0, 1.0)]
    monkeypatch.setattr(head, "_LOGITS_AT_ONCE", {"cpu": (5, 70), "gpu": (5, 70)})
    monkeypatch.setattr(head, "_DRAWN_AT_ONCE", 5)
    parts = [drawn(temperature=temperature) for temperature in (0.0, 1.0)]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_on_a_cpu_the_pass_that_fills_an_exact_cache_is_that_of_the_first_step():
    model, passes = ready("corrected")[0], []
    batch = collate(photos("corrected", [3, 1]))
    watched = model.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        found = decode_batch(model, batch, options_of("remask", steps=1, cache="exact"))
    finally:
        watched.remove()
    assert len(passes) == 1 and found.tokens_BNS.ne(model.config.mask_token_id).all()
