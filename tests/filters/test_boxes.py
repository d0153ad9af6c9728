"""Boxes: whole pixels inside the photo, and which of a segmenter's masks is that of a box."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paracaption.filters import boxes, rle
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason

WIDTH, HEIGHT = 40, 30


@pytest.mark.parametrize(
    ("box", "found", "words"),
    [
        ([3, 4, 10, 5], (3, 4, 10, 5), ""),
        ([3.0, 4.0, 10.0, 5.0], (3, 4, 10, 5), ""),
        ([3.2, 4.7, 10.5, 5.1], (3, 4, 11, 6), ""),  # all pixels that it touches
        ([2.9999999, 4, 10.0000001, 5], (3, 4, 10, 5), ""),  # noise adds no column
        ([0, 0, 40, 30], (0, 0, 40, 30), ""),
        ([-0.4, 0, 40.7, 30], (0, 0, 40, 30), ""),
        ([-5, 2, 10, 4], (0, 2, 5, 4), "leaves the photo, which is 40x30"),
        ([30, 20, 500, 500], (30, 20, 10, 10), "the box [30, 20, 500, 500] leaves"),
        ([-1e300, -1e300, 2e300, 2e300], (0, 0, 40, 30), "leaves"),
        ([3, 4, 0.3, 0.3], (3, 4, 1, 1), ""),
    ],
)
def test_a_box_is_what_it_touches_inside_the_photo(box, found, words):
    fitted, outside = boxes.fit(box, WIDTH, HEIGHT)
    assert fitted == found
    assert words in outside if words else outside == ""


@pytest.mark.parametrize(
    ("box", "reason", "words"),
    [
        (None, Reason.ANNOTATION_UNREADABLE, "`bbox` is missing"),
        ([1, 2, 3], Reason.ANNOTATION_UNREADABLE, "a list of 3 numbers"),
        ([], Reason.ANNOTATION_UNREADABLE, "a list of 0 numbers"),
        ([3, 4, 0, 5], Reason.BOX_EMPTY, "has no area"),
        ([3, 4, 10, -5], Reason.BOX_EMPTY, "has no area"),
        ([3, 4, 0.001, 5], Reason.BOX_EMPTY, "has no area"),
        ([40, 4, 10, 5], Reason.BOX_EMPTY, "outside of the photo, which is 40x30"),
        ([-20, 4, 20, 5], Reason.BOX_EMPTY, "outside of the photo"),
    ],
)
def test_what_is_no_box_is_refused_with_its_reason(box, reason, words):
    with pytest.raises(BadRecord) as error:
        boxes.fit(box, WIDTH, HEIGHT)
    assert error.value.reason is reason and words in error.value.detail


NUMBER = st.floats(-100, 100)


@given(st.lists(NUMBER, min_size=4, max_size=4))
def test_any_box_is_refused_or_inside_and_covers_what_of_it_is_inside(box):
    try:
        (x, y, width, height), _ = boxes.fit(box, WIDTH, HEIGHT)
    except BadRecord:
        return
    assert 0 <= x < x + width <= WIDTH and 0 <= y < y + height <= HEIGHT
    assert all(type(each) is int for each in (x, y, width, height))
    left, right = max(box[0], 0), min(box[0] + box[2], WIDTH)
    assert x <= left + 0.02 and right - 0.02 <= x + width
    assert math.ceil(right - left) - 1 <= width <= math.ceil(right - left) + 2


def mask_of(x, y, width, height):
    dense = np.zeros((HEIGHT, WIDTH), bool)
    dense[y : y + height, x : x + width] = True
    return rle.from_mask(dense).rle


def test_the_mask_of_a_box_is_the_one_that_fills_it_best_whatever_its_place():
    box = (10, 10, 10, 10)
    inner, right, far = mask_of(12, 12, 3, 3), mask_of(10, 11, 10, 9), mask_of(30, 20, 5, 5)
    assert boxes.best_in_box([inner, far, right], box) == 2
    assert boxes.best_in_box([None, inner, inner], box) == 1
    assert boxes.best_in_box([far, None], box) is None
    assert boxes.best_in_box([], box) is None


@given(*(st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 9)] * 2) for _ in range(2)))
def test_the_iou_of_boxes_is_that_of_their_pixels(one, other):
    dense = []
    for x, y, width, height in (one, other):
        pixels = np.zeros((20, 20), bool)
        pixels[y : y + height, x : x + width] = True
        dense.append(pixels)
    expected = (dense[0] & dense[1]).sum() / (dense[0] | dense[1]).sum()
    assert boxes.box_iou(one, other) == pytest.approx(expected)
