"""What backends answer, made clean: what means the same is taken, anything else is one record's error."""

from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from paracaption.filters import rle
from paracaption.pipeline.models import answers
from paracaption.pipeline.models.protocols import Answer, Candidate, Caption
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Rle

SIZE = (4, 6)
MASK = rle.from_mask(np.eye(4, 6, dtype=bool)).rle
NOTHING = rle.from_mask(np.zeros(SIZE, bool)).rle


class Words(str):
    __slots__ = ()


class Hostile(Answer):
    @property
    def text(self):
        raise RuntimeError("no text today")


def refused(found) -> str:
    assert isinstance(found, BadRecord) and found.reason is Reason.MODEL_ERROR
    return found.detail


@pytest.mark.parametrize("given", ["A cat.", np.str_("A cat."), Words("A cat."), np.array("A cat.")])
def test_a_caption_in_another_type_of_text_is_that_caption(given):
    found = answers.caption(given)
    assert (type(found), found) == (str, "A cat.")


@pytest.mark.parametrize("given", [5, 1.5, b"A cat.", ["A cat."], {"caption": "A cat."}, True, float("nan")])
def test_a_caption_of_another_type_is_a_model_error(given):
    assert refused(answers.caption(given)).startswith("a caption has to be text, not of type ")


def test_a_caption_of_millions_of_words_is_a_model_error_and_names_the_limit():
    assert refused(answers.caption("word " * 3_000_000)).endswith("at most 100,000 are allowed")
    assert answers.caption("x" * answers.MAX_CHARS) == "x" * answers.MAX_CHARS


def test_half_an_emoji_in_a_caption_is_escaped():
    assert answers.caption("A smiling \ud83d face.") == "A smiling \\ud83d face."


@pytest.mark.parametrize("confidence", [0, 0.25, np.float32(0.25), torch.tensor(1.0)])
def test_a_caption_with_its_confidence_is_taken_apart(confidence):
    given = Caption("A cat.", confidence)
    assert (answers.caption(given), answers.confidence(given)) == ("A cat.", float(confidence))


@pytest.mark.parametrize("given", [None, "A cat.", Caption("A cat."), Caption("A cat.", float("nan"))])
def test_a_captioner_may_have_no_confidence(given):
    assert answers.confidence(given) is None


@pytest.mark.parametrize("confidence", [-0.1, 1.5, "high", True])
def test_a_confidence_that_is_none_is_a_model_error(confidence):
    assert refused(answers.confidence(Caption("A cat.", confidence))).startswith("a confidence has to be ")
    assert refused(answers.caption(Caption(5))).startswith("a caption has to be text")


def test_no_caption_is_no_error():
    assert answers.caption(None) is None


@pytest.mark.parametrize(
    "margin", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0), Fraction(1), np.array(1)]
)
def test_a_margin_in_another_type_of_number_is_that_margin(margin):
    found = answers.judgment(Answer("yes", margin))
    assert found == Answer("yes", 1.0) and isinstance(found, Answer) and type(found.margin) is float


@pytest.mark.parametrize("margin", [None, math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_a_margin_that_is_not_finite_is_none(margin):
    assert answers.judgment(Answer("yes", margin)) == Answer("yes")


@pytest.mark.parametrize(
    "given",
    [
        None, "yes", ("yes", 1.0), {"text": "yes"}, Answer(5, 1.0), Answer(None), Answer(b"yes"),
        Answer("yes", "high"), Answer("yes", 10**400), Answer("yes", True), Answer("yes", 1j),
        Answer("yes", np.array([1.0, 2.0])), Answer("x" * 3_000_000), Hostile("yes"),
    ],
)  # fmt: skip
def test_a_judges_answer_of_another_type_or_without_measure_is_a_model_error(given):
    refused(answers.judgment(given))


@pytest.mark.parametrize(
    "given",
    [
        [Candidate(MASK, 0.5)],
        (Candidate(MASK, np.float64(0.5)),),
        iter([Candidate(MASK, torch.tensor(0.5))]),
        [Candidate(Rle(list(SIZE), MASK.counts.encode()), 0.5)],
        [Candidate(Rle(tuple(np.array(SIZE)), MASK.counts), 0.5)],
    ],
)
def test_candidates_in_other_types_are_those_candidates(given):
    assert answers.candidates(given, SIZE) == [(MASK, 0.5)]


def test_a_candidate_without_a_pixel_is_a_candidate_without_a_mask():
    assert answers.candidates([Candidate(NOTHING, 0.5), Candidate(MASK, 0.4)], SIZE) == [
        (None, 0.5),
        (MASK, 0.4),
    ]
    assert answers.candidates([], SIZE) == []


@pytest.mark.parametrize(
    "given",
    [
        None, 5, "mask", {"rle": MASK}, [None], [MASK], [(MASK, 0.5)], [Candidate(None, 0.5)],
        [Candidate({"size": SIZE, "counts": MASK.counts}, 0.5)], [Candidate(Rle(SIZE, 5), 0.5)],
        [Candidate(Rle((6, 4), MASK.counts), 0.5)], [Candidate(Rle((10**9, 10**9), "PPYo1"), 0.5)],
        [Candidate(Rle(None, MASK.counts), 0.5)], [Candidate(Rle(("a", 6), MASK.counts), 0.5)],
        [Candidate(Rle(SIZE, MASK.counts[:-2]), 0.5)], [Candidate(Rle(SIZE, "o" * 50), 0.5)],
        [Candidate(Rle(SIZE, "\ud83d"), 0.5)], [Candidate(Rle(SIZE, ""), 0.5)],
        [Candidate(Rle(SIZE, MASK.counts + "1" * 5000), 0.5)], [Candidate(Rle(SIZE, "1" * (1 << 24)), 0.5)],
        [Candidate(MASK, math.nan)], [Candidate(MASK, math.inf)], [Candidate(MASK, "x")],
        [Candidate(MASK, None)],
        itertools.repeat(Candidate(MASK, 0.5)), itertools.repeat(Candidate(Rle(SIZE, "1" * 10**6), 0.5)),
    ],
)  # fmt: skip
def test_candidates_that_are_none_are_a_model_error_within_a_second(given):
    began = time.thread_time()
    refused(answers.candidates(given, SIZE))
    assert time.thread_time() - began < 2


def generated(*areas):
    """A candidate for each (top, left, bottom, right), all of one score but the last, which is sure."""
    masks = [np.zeros(SIZE, bool) for _ in areas]
    for mask, (top, left, bottom, right) in zip(masks, areas, strict=True):
        mask[top:bottom, left:right] = True
    last = len(masks) - 1
    return [Candidate(rle.from_mask(mask).rle, 0.9 if i == last else 0.5) for i, mask in enumerate(masks)]


def test_generated_masks_are_in_an_order_of_their_own_whatever_the_generators_is():
    given = generated((2, 0, 4, 2), (0, 3, 2, 5), (0, 0, 4, 6), (0, 0, 2, 2), (1, 1, 2, 2), (0, 0, 1, 4))
    boxes = [(0, 0, 6, 4), (0, 0, 2, 2), (0, 0, 4, 1), (3, 0, 2, 2), (0, 2, 2, 2), (1, 1, 1, 1)]
    for order in itertools.islice(itertools.permutations(given), 0, None, 37):
        found = answers.generated(order, SIZE)
        areas = [mask.area for mask, _ in found]
        assert areas == sorted(areas, reverse=True)
        assert {mask.bbox for mask, _ in found} == set(boxes) and found == answers.generated(given, SIZE)
    assert [mask.bbox for mask, _ in answers.generated(given, SIZE)][1:3] != [(0, 2, 2, 2), (3, 0, 2, 2)]


def test_a_generated_mask_that_is_there_twice_counts_once_with_its_best_score_and_an_empty_one_never():
    given = [*generated((0, 0, 2, 2), (0, 0, 2, 2)), Candidate(NOTHING, 1.0)]
    [(mask, score)] = answers.generated(given, SIZE)
    assert (mask.area, score) == (4, 0.9)
    assert answers.generated([], SIZE) == [] == answers.generated([Candidate(NOTHING, 1.0)], SIZE)


@pytest.mark.parametrize("given", [None, "mask", [MASK], [Candidate(Rle((6, 4), MASK.counts), 0.5)]])
def test_generated_masks_that_are_none_are_a_model_error(given):
    assert "candidate" in refused(answers.generated(given, SIZE))


@pytest.mark.parametrize("given", ["ab", b"ab", {"a": 1, "b": 2}, {"a", "b"}, None, 5])
def test_what_has_no_order_is_no_list_of_answers(given):
    with pytest.raises(TypeError, match="answers have to be a list"):
        answers.listed(given, 2, "answers")


def test_of_answers_without_end_no_more_are_taken_than_one_too_many():
    assert answers.listed(itertools.repeat("x"), 2, "answers") == ["x"] * 3
    assert answers.listed(np.array(["a", "b"]), 2, "answers") == ["a", "b"]


def test_a_backends_own_refusal_stays_what_it_is():
    bad = BadRecord(Reason.ANSWER_INVALID, "no answer")
    assert [make(bad) for make in (answers.caption, answers.judgment)] == [bad, bad]
    assert answers.candidates(bad, SIZE) is bad


class Endless:
    def __iter__(self):
        return itertools.repeat(3)


class Classless:
    @property
    def __class__(self):
        raise RuntimeError("no class")


class Ending:
    def __iter__(self):
        raise SystemExit(3)

    def __str__(self):
        raise SystemExit(3)


@pytest.mark.parametrize("make", [Endless, lambda: range(10**12), Classless, Ending])
def test_an_object_that_does_as_it_likes_is_refused_at_once_wherever_it_stands(make):
    value = make()
    counts = rle.from_mask(np.ones((5, 5), bool)).rle.counts
    masks = [Rle(value, counts), Rle((value, 5), counts), Rle((5, 5), value)]
    refused = [answers.caption(value), answers.judgment(value), answers.candidates(value, (5, 5))]
    refused += [answers.judgment(Answer(value, None)), answers.judgment(Answer("yes", value))]
    refused += [answers.candidates([Candidate(mask, 0.5)], (5, 5)) for mask in masks]
    refused += [answers.candidates([Candidate(Rle((5, 5), counts), value)], (5, 5))]
    assert all(isinstance(each, BadRecord) and len(each.detail) < 1_000 for each in refused)
