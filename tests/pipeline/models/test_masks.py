"""Masks become RLEs as pycocotools writes them, best first, whatever the chunk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from paracaption.pipeline.models.masks import to_candidates, to_rles


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_rles_are_pycocotools_own_and_an_empty_mask_is_none(count, height, width, share, seed):
    import torch

    masks = np.random.default_rng(seed).random((count, height, width)) < share
    for mask, found in zip(masks, to_rles(torch.from_numpy(masks)), strict=True):
        if not mask.any():
            assert found is None
            continue
        expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert found is not None
        assert (list(found.size), found.counts.encode()) == (expected["size"], expected["counts"])


def test_candidates_come_best_first_and_without_the_empty_ones():
    import torch

    masks = torch.zeros(2, 4, 2, 3)
    for number in (0, 1, 2):
        masks[:, number, 0, : number + 1] = 1
    scores = np.float32([[0.2, 0.9, 0.2, 0.95], [0.1, 0.3, 1.5, 0.2]])

    def found(above=None):
        things = to_candidates(masks, scores, (2, 3), lambda low: low > 0.5, above)
        return [[(area(each.rle), pytest.approx(each.score)) for each in thing] for thing in things]

    assert found() == [[(2, 0.9), (1, 0.2), (3, 0.2)], [(3, 1.0), (2, 0.3), (1, 0.1)]]
    assert found(0.2) == [[(2, 0.9)], [(3, 1.0), (2, 0.3)]]
    assert found(0.9) == [[], [(3, 1.0)]]


def area(rle):
    return int(coco.area({"size": list(rle.size), "counts": rle.counts.encode()}))


def test_no_masks_are_no_candidates():
    import torch

    none = np.zeros((2, 0), np.float32)
    assert to_candidates(torch.zeros(2, 0, 4, 4), none, (9, 9), lambda low: low > 0) == [[], []]
    assert to_candidates(torch.zeros(0, 3, 4, 4), np.zeros((0, 3)), (9, 9), lambda low: low > 0) == []


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_masks_that_are_not_bool_are_refused(dtype):
    import torch

    with pytest.raises(TypeError, match="give bool"):
        to_rles(torch.ones(1, 2, 3, dtype=getattr(torch, dtype)))


def test_masks_that_do_not_fit_together_are_enlarged_in_halves():
    import torch

    sizes = []

    def enlarge(low):
        sizes.append(len(low))
        if len(low) > 2:
            raise torch.OutOfMemoryError("too many")
        return low > 0.5

    masks, scores = torch.rand(1, 7, 4, 4), np.float32([np.arange(7) / 10])
    found = to_candidates(masks, scores, (4, 4), enlarge)
    assert found == to_candidates(masks, scores, (4, 4), lambda low: low > 0.5)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1] or max(sizes[2:]) <= 2, sizes


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from paracaption.filters import rle
    from paracaption.pipeline.models.sam import SamSegmenter
    from paracaption.pipeline.models.sam3 import Sam3Segmenter
    from tests.synthetic import scene
    from tests.tiny.sam import write_sam, write_sam3

    photo, boxes = scene(0)[0], np.array([[0, 0, 128, 96], [10, 12, 60, 80]], np.float32)
    for make, options in (
        (SamSegmenter, {"model": str(write_sam(tmp_path / "sam"))}),
        (Sam3Segmenter, {"model": str(write_sam3(tmp_path / "sam3")), "threshold": 0.35}),
    ):
        exact, single, half = (
            make(device=device, dtype=dtype, **options).segment(photo, ["cat", "a red car"], boxes)
            for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "auto"))
        )
        for one, two, three in zip(exact, single, half, strict=True):
            assert one
            assert one[0].score == pytest.approx(two[0].score, abs=1e-3)
            assert rle.iou([one[0].rle], [c.rle for c in two]).max() > 0.98
            assert rle.iou([one[0].rle], [c.rle for c in three]).max() > 0.8
