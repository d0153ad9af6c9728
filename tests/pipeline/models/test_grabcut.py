"""GrabCut finds an object again from its box, and nothing where there is nothing to find."""

import json

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.models.embedded.grabcut import GrabCutSegmenter, place_mask
from tests.shared_data import shared_data


def scene(height=120, width=160, x=70, y=60, radius=25):
    """A red disc on grass-like noise, and its mask."""
    photo = np.random.default_rng(0).integers(60, 110, (height, width, 3), np.uint8)
    photo[..., 0] //= 2
    rows, columns = np.mgrid[0:height, 0:width]
    mask = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    photo[mask] = (210, 40, 40)
    return photo, mask


def box_of(mask):
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def segment(photo, boxes, **options):
    return GrabCutSegmenter(**options).segment(photo, ["object"] * len(boxes), np.array(boxes, np.float32))


def iou(candidate, mask):
    return rle.iou([candidate.rle], [rle.from_mask(mask).rle])[0, 0]


def test_an_object_unlike_its_surroundings_is_found_again():
    photo, mask = scene()
    [[candidate]] = segment(photo, [box_of(mask)])
    assert candidate.rle.size == mask.shape
    assert iou(candidate, mask) > 0.95
    assert 0.5 < candidate.score <= 1


def test_a_large_photo_is_cut_at_low_resolution_and_placed_at_full_size():
    photo, mask = scene(900, 1200, 700, 500, 300)
    [[candidate]] = segment(photo, [box_of(mask)])
    assert candidate.rle.size == (900, 1200)
    assert iou(candidate, mask) > 0.95


def test_the_mask_stays_inside_its_box():
    photo, _ = scene()
    x1, y1, x2, y2 = 60, 50, 80, 70
    [[candidate]] = segment(photo, [[x1, y1, x2, y2]])
    found = rle.decode(candidate.rle)
    assert found[y1:y2, x1:x2].sum() == found.sum()


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 160, 120],
        [10, 10, 11, 11],
        [159, 119, 160, 120],
        [-50, -50, 400, 300],
        [0, 0, 160, 1],
        [0, 0, 1, 120],
        [3.4, 7.9, 41.2, 66.6],
    ],
)
@pytest.mark.soak(keep=3)
def test_odd_boxes_give_a_mask_of_the_right_size_or_none(box):
    photo, mask = scene()
    [found] = segment(photo, [box])
    for candidate in found:
        assert candidate.rle.size == mask.shape and 0 <= candidate.score <= 1
        assert rle.decode(candidate.rle).any()


@pytest.mark.parametrize(
    "box", [[5, 5, 5, 9], [50, 50, 40, 40], [500, 500, 600, 600], [np.nan, 0, 5, 5], [0, 0, np.inf, 9]]
)
def test_a_box_without_pixels_finds_nothing(box):
    assert segment(scene()[0], [box]) == [[]]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_photo_of_one_colour_does_not_fail(level):
    photo = np.full((60, 80, 3), level, np.uint8)
    [found] = segment(photo, [[20, 20, 50, 50]])
    assert all(candidate.score < 0.05 for candidate in found)


def test_photos_smaller_than_anything_do_not_fail():
    assert segment(np.zeros((1, 1, 3), np.uint8), [[0, 0, 1, 1]]) == [[]]


def test_an_answer_does_not_depend_on_its_neighbours_or_on_the_run():
    photo, mask = scene()
    boxes = [[0, 0, 100, 100], box_of(mask), [30, 20, 90, 110]]
    together = segment(photo, boxes)
    assert together == segment(photo, boxes)
    assert together[1] == segment(photo, boxes[1:2])[0]


def test_no_boxes_no_candidates():
    assert segment(scene()[0], np.zeros((0, 4))) == []


def test_phrases_and_boxes_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="2 phrases for 1 boxes"):
        GrabCutSegmenter().segment(scene()[0], ["a", "b"], np.zeros((1, 4), np.float32))


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="iterations"):
        GrabCutSegmenter(iterations=0)


@pytest.mark.parametrize("seed", range(30))
def test_a_placed_mask_is_the_encoded_whole(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 12, 2)
    h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
    y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    mask = rng.random((h, w)) < rng.choice([0.3, 0.7, 1.0])
    mask[0, 0] = True
    whole = np.zeros((height, width), bool)
    whole[y : y + h, x : x + w] = mask
    assert place_mask(mask, int(x), int(y), int(height), int(width)) == rle.from_mask(whole).rle


def test_single_objects_of_real_photos_are_found_again():
    folder = shared_data("open_images_pypi")
    overlaps = []
    for row in json.loads((folder / "annotations.json").read_text()):
        photo = np.array(Image.open(folder / "images" / row["file_name"]).convert("RGB"))
        for region in row["regions"]:
            mask = rle.check(region["mask_rle"]["counts"], region["mask_rle"]["size"])
            x, y, width, height = mask.bbox
            [[candidate]] = segment(photo, [[x, y, x + width, y + height]])
            overlaps.append(rle.iou([candidate.rle], [mask.rle])[0, 0])
    assert len(overlaps) == 30
    assert np.mean(overlaps) > 0.95 and min(overlaps) > 0.7


def test_its_identity_names_its_version_and_opencv():
    assert set(GrabCutSegmenter.identity(max_side=64)) == {"version", "opencv"}
