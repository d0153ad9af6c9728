"""Captions with many right wordings: all of them are right, and what contradicts itself is told apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.filters import text
from paracaption.model_training.toy import scenes, wordings
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.wordings import Facts, draw_wording, facts_of, judge_wording, read_wording
from paracaption.pipeline.models.embedded.lexical import describes
from paracaption.schemas.config import Text
from paracaption.schemas.errors import ConfigError

every_facts = st.builds(
    Facts,
    st.sampled_from(scenes.SIZES),
    st.sampled_from(scenes.TEXTURES),
    st.sampled_from(list(scenes.COLORS)),
    st.sampled_from(scenes.SHAPES),
    st.sampled_from(wordings.ROWS),
    st.sampled_from(wordings.COLUMNS),
)
seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(every_facts, seeds, seeds)
def test_every_wording_is_right_and_says_all_facts(facts, seed, other):
    one, another = (draw_wording(facts, np.random.default_rng(each)) for each in (seed, other))
    assert read_wording(one) == facts
    assert judge_wording(one, another) == "right"


@settings(deadline=None)
@given(every_facts, seeds)
def test_every_wording_passes_the_text_rules_and_the_judge_and_is_of_the_worlds_words(facts, seed):
    caption = draw_wording(facts, np.random.default_rng(seed))
    assert text.clean(caption, Text()).reason is None
    assert describes(caption, facts.shape) > 0
    words = {*toy.caption_words(), *wordings.WORDING_WORDS}
    assert set(caption.replace(",", "").split()) <= words


def test_a_thing_has_hundreds_of_wordings_of_25_to_30_tokens():
    tokenizer, rng = toy.make_tokenizer(), np.random.default_rng(0)
    facts = facts_of("small", "plain", "red", "circle", "at the top left")
    assert facts == Facts("small", "plain", "red", "circle", "top", "left")
    captions = {draw_wording(facts, rng) for _ in range(3000)}
    assert len(captions) > 800
    lengths = {len(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in captions}
    assert min(lengths) == 25
    assert max(lengths) <= wordings.MOST_TOKENS


EASY_CONTENT = (
    "large striped red triangle; small dotted blue circle; small plain green triangle; "
    "small striped blue circle; small striped pink bar; small striped turquoise bar"
)
EASY_SUM = 9155
"""The first scene of the world `EASY` before there were these options: its things, the sum of its labels."""

RIGHT = (
    "a small plain red circle near the top and the left, "
    "it is not blue and nearer to the top than to the bottom"
)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (("a small plain red", "this is a red small plain"), "right"),
        (("the top and the left,", "the left and the top,"), "right"),
        (("it is not blue", "it is red, not pink"), "right"),
        (("nearer to the top than to the bottom", "farther from the right than from the left"), "right"),
        (("small", "large"), "untrue"),
        (("circle", "ring"), "untrue"),
        (("plain red", "dotted red"), "untrue"),
        (("the left,", "the right,"), "untrue"),
        (("not blue", "not red"), "contradictory"),
        (("it is not blue", "it is not blue but small"), "contradictory"),
        (("it is not blue", "it is not pink but blue"), "contradictory"),
        (("it is not blue", "it is red, not small"), "contradictory"),
        (("to the top than", "to the bottom than"), "contradictory"),
        (("than to the bottom", "than to the right"), "contradictory"),
        (("nearer to the top than to the bottom", "as near to the top as to the bottom"), "contradictory"),
        (("nearer to", "farther from"), "malformed"),
        (("small plain red", "small small red"), "malformed"),
        (("top and the left,", "top and the top,"), "malformed"),
        (("a small", "an small"), "malformed"),
        (("a small", "this is is a small"), "malformed"),
        (("and nearer", "nearer"), "malformed"),
        (("not blue", "not but blue"), "malformed"),
        ((RIGHT, ""), "malformed"),
    ],
)
def test_a_changed_caption_gets_its_verdict(change, verdict):
    assert judge_wording(RIGHT.replace(*change), RIGHT) == verdict


def test_a_caption_of_another_world_is_no_truth():
    with pytest.raises(ValueError, match="not a true caption of a world with many wordings"):
        judge_wording(RIGHT, "a small plain red circle at the top left")


def test_a_scene_of_the_hard_world_has_captions_of_its_things_and_always_the_same():
    for number, scene in enumerate(toy.draw_scenes(12, 3, toy.HARD)):
        captions = toy.true_captions(scene, 3, number, toy.HARD)
        assert captions == toy.true_captions(scene, 3, number, toy.HARD)
        for thing, caption in zip(scene.things, captions, strict=True):
            facts = read_wording(caption)
            assert facts is not None
            assert facts[:4] == tuple(thing.kind)


def test_tangled_things_share_a_box_or_one_is_in_the_others():
    tangled = [scene for scene in toy.draw_scenes(60, 0, toy.HARD) if scene.tangled]
    assert 10 < len(tangled) < 40
    crossed = nested = 0
    for scene in tangled:
        kinds = [thing.kind.shape for thing in scene.things[:2]]
        boxes = np.array([box_of(scene.labels == 1 + number) for number in range(2)])
        if kinds == ["bar", "bar"]:
            crossed += 1
            assert np.abs(boxes[0] - boxes[1]).max() <= 1
        else:
            nested += 1
            assert kinds[0] == "ring"
            assert (boxes[0, :2] < boxes[1, :2]).all() and (boxes[0, 2:] > boxes[1, 2:]).all()
    assert crossed
    assert nested


def box_of(mask):
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_worlds_without_the_new_options_are_what_they_were():
    scene = next(toy.draw_scenes(1, 0, toy.EASY))
    assert not scene.tangled
    assert scenes.scene_content(thing.kind for thing in scene.things) == EASY_CONTENT
    assert int(scene.labels.astype(np.int64).sum()) == EASY_SUM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tangled": 1.5}, "tangled: 1.5"),
        ({"tangled": 0.5, "regions": (1, 2)}, "tangled: it takes two things"),
        ({"tangled": 0.5, "shapes": ("circle", "square")}, "tangled: it takes two things"),
        ({"wordings": "many", "places": False}, "wordings: many"),
        ({"wordings": "many", "relations": True}, "wordings: many"),
    ],
)
def test_options_that_do_not_go_together_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        toy.WorldOptions(**options)
