from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paracaption.filters import category
from paracaption.filters.verdict import Verdict
from paracaption.schemas.reasons import ERRORS, Reason


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_a_captioner_with_nothing_to_say_is_a_drop(caption):
    assert category.captioned(caption).reason is Reason.CAPTION_NONE


def test_any_caption_passes_on_to_the_text_rules():
    assert category.captioned("dog").keep


@pytest.mark.parametrize("answer", ["yes", "Yes.", " YES ", '"yes"', "yes!"])
def test_yes_keeps_the_region_and_its_margin(answer):
    assert category.judge_verdict(answer, 0.25) == Verdict(scores={"verdict_margin": 0.25})


@pytest.mark.parametrize("answer", ["no", "No.", "'no'\n"])
def test_no_is_a_wrong_category_whatever_the_margin(answer):
    verdict = category.judge_verdict(answer, 3.0)
    assert verdict.reason is Reason.CATEGORY_WRONG
    assert verdict.scores == {"verdict_margin": 3.0}


@given(st.text("yesno YN", max_size=6).filter(lambda text: text.strip().lower() not in ("yes", "no")))
def test_anything_else_is_an_invalid_answer_and_never_a_no(answer):
    assert category.judge_verdict(answer).reason is Reason.ANSWER_INVALID


@pytest.mark.parametrize(
    "answer", ["", "maybe", "yes and no", "not at all", "nothing", "no, it is a cat", "1"]
)
def test_an_invalid_answer_can_be_asked_again(answer):
    verdict = category.judge_verdict(answer, 0.1)
    assert verdict.reason is Reason.ANSWER_INVALID and verdict.reason in ERRORS


def test_a_judge_without_a_margin_leaves_no_score():
    assert category.judge_verdict("yes", None, min_margin=0.5) == Verdict()
    assert category.judge_verdict("yes", float("nan")) == Verdict()


def test_an_unsure_yes_is_a_no_if_a_least_margin_is_set():
    assert category.judge_verdict("yes", 0.4, min_margin=0.5).reason is Reason.CATEGORY_WRONG
    assert category.judge_verdict("yes", 0.5, min_margin=0.5).keep


def test_a_least_margin_decides_whatever_the_word_and_only_where_there_is_a_margin():
    assert category.judge_verdict("no", -1.0, min_margin=-2.0).keep
    assert category.judge_verdict("no", -3.0, min_margin=-2.0).reason is Reason.CATEGORY_WRONG
    assert category.judge_verdict("no", None, min_margin=-2.0).reason is Reason.CATEGORY_WRONG
    assert category.judge_verdict("perhaps", 9.0, min_margin=-2.0).reason is Reason.ANSWER_INVALID


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("dog", "dog"),
        (" A Dog. ", "dog"),
        ("the  wooden\ndining table", "wooden dining table"),
        ('"T-shirt"', "t-shirt"),
        ("women\u2019s shoe", "women's shoe"),
        ("anchor", "anchor"),
        ("狗", "狗"),
    ],
)
def test_a_core_category_is_made_plain(answer, phrase):
    assert category.core_category(answer) == (phrase, Verdict())


@pytest.mark.parametrize(
    "answer", ["", " ", "None", "n/a", "an object", "Unknown.", "the thing", "42", "..."]
)
def test_no_category_is_a_drop(answer):
    phrase, verdict = category.core_category(answer)
    assert phrase is None and verdict.reason is Reason.CATEGORY_NONE


@pytest.mark.parametrize(
    "answer", ["The caption describes a dog on a lawn", '{"category": "dog"}', "<think> dog", "x" * 81]
)
def test_more_than_a_phrase_is_an_invalid_answer(answer):
    phrase, verdict = category.core_category(answer)
    assert phrase is None and verdict.reason is Reason.ANSWER_INVALID


@given(st.text())
def test_a_plain_category_stays_as_it_is(answer):
    phrase, verdict = category.core_category(answer)
    assert verdict.keep == (phrase is not None)
    if phrase is not None and not phrase.startswith(("a ", "an ", "the ")):
        assert category.core_category(phrase) == (phrase, verdict)
