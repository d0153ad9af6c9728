from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from paracaption.filters import agreement
from paracaption.filters.verdict import Verdict
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Rle

pixels = arrays(bool, (6, 7))


def rle(mask: np.ndarray) -> Rle:
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return Rle(mask.shape, code["counts"].decode())


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((6, 7), bool)
    mask[top:bottom, left:right] = True
    return mask


@given(st.lists(st.tuples(pixels, st.sampled_from([0.1, 0.5, 0.9])), max_size=6), pixels.filter(np.any))
def test_the_best_candidate_is_the_one_with_the_highest_iou_of_the_boolean_masks(candidates, original):
    found = agreement.best_candidate([(rle(mask), score) for mask, score in candidates], rle(original))
    ious = [(mask & original).sum() / (mask | original).sum() for mask, _ in candidates]
    eligible = [i for i, (mask, _) in enumerate(candidates) if mask.any()]
    if not eligible:
        assert found is None
    else:
        best = max(eligible, key=lambda i: (ious[i], candidates[i][1], -i))
        assert found == (best, ious[best])


def test_the_best_candidate_is_the_one_that_overlaps_not_the_one_the_segmenter_is_surest_of():
    other, same = (rle(box(0, 0, 3, 3)), 0.99), (rle(box(3, 3, 6, 6)), 0.4)
    assert agreement.best_candidate([other, same], rle(box(3, 3, 6, 6))) == (1, 1.0)


def test_a_candidate_elsewhere_is_found_with_an_iou_of_zero():
    assert agreement.best_candidate([(rle(box(0, 0, 3, 3)), 0.9)], rle(box(3, 3, 6, 6))) == (0, 0.0)


def test_empty_masks_are_no_candidates():
    assert agreement.best_candidate([], rle(box(0, 0, 3, 3))) is None
    assert agreement.best_candidate([(rle(box(0, 0, 0, 0)), 0.9)], rle(box(0, 0, 3, 3))) is None


def test_a_candidate_of_another_size_is_the_backends_error_not_an_iou():
    with pytest.raises(BadRecord, match="candidate 0") as error:
        agreement.best_candidate([(rle(np.ones((7, 6), bool)), 0.9)], rle(box(0, 0, 3, 3)))
    assert error.value.reason is Reason.MODEL_ERROR


def test_empty_prediction_is_a_drop_not_an_error():
    assert agreement.judge_iou(0.0, 0.0, 0, min_iou=0.0).reason is Reason.SEGMENTER_NONE


def test_an_iou_at_the_threshold_is_kept_with_its_scores():
    kept = agreement.judge_iou(0.5, 0.8, 2, min_iou=0.5)
    assert kept == Verdict(scores={"iou": 0.5, "segmenter_score": 0.8})


@pytest.mark.parametrize("iou", [0.0, 0.499, float("nan")])
def test_a_lower_iou_is_a_drop_that_keeps_its_scores(iou):
    verdict = agreement.judge_iou(iou, 0.8, 2, min_iou=0.5)
    assert verdict.reason is Reason.IOU_LOW
    assert verdict.scores.keys() == {"iou", "segmenter_score"}
