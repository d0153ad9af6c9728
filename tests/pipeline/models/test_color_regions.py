"""The generator without weights finds what stands out from a plain ground, else areas of one color."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.models import answers
from paracaption.pipeline.models.embedded.color_regions import ColorRegions
from paracaption.schemas.errors import ConfigError

SAMPLES = Path(__file__).resolve().parents[3] / "samples"


def masks_of(photo, **options):
    found = answers.generated(ColorRegions(**options).generate(photo), photo.shape[:2])
    return [rle.decode(mask.rle).astype(bool) for mask, _ in found]


def best_ious(truth, masks):
    return [max([(one & each).sum() / (one | each).sum() for each in masks], default=0) for one in truth]


def on_ground(height=120, width=160):
    """A gray ground that grows lighter, with noise, a red disc and a white square on it."""
    rows, columns = np.mgrid[0:height, 0:width]
    ground = 110 + 30 * columns / width + np.random.default_rng(0).normal(0, 4, (height, width))
    photo = np.repeat(ground[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)
    disc = (rows - 40) ** 2 + (columns - 50) ** 2 < 25**2
    square = (abs(rows - 80) < 15) & (abs(columns - 120) < 15)
    photo[disc], photo[square] = (210, 40, 40), (250, 250, 250)
    return photo, [disc, square]


@pytest.mark.skipif(not SAMPLES.exists(), reason="no clone, but an installed wheel")
def test_it_finds_each_shape_of_the_sample_scenes_and_nothing_else():
    panoptic = json.loads((SAMPLES / "scenes" / "panoptic.json").read_text())
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        photo = np.asarray(Image.open(SAMPLES / "scenes" / "photos" / image["file_name"]).convert("RGB"))
        colors = np.asarray(Image.open(SAMPLES / "scenes" / "panoptic" / annotation["file_name"]), np.int64)
        labels = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        truth = [labels == segment["id"] for segment in annotation["segments_info"]]
        found = masks_of(photo)
        assert min(best_ious(truth, found)) >= 0.8 and len(found) == len(truth), image["file_name"]


@pytest.mark.skipif(not SAMPLES.exists(), reason="no clone, but an installed wheel")
def test_photographs_are_divided_into_areas_that_do_not_overlap():
    for path in sorted((SAMPLES / "coconut" / "photos").glob("*.jpg")):
        photo = np.asarray(Image.open(path).convert("RGB"))
        found = masks_of(photo)
        assert 3 <= len(found) <= 60, path.name
        assert sum(mask.astype(int) for mask in found).max() == 1
        assert min(mask.sum() for mask in found) >= 0.003 * photo.shape[0] * photo.shape[1]


def test_what_stands_out_from_a_shaded_ground_is_found_to_the_pixel():
    photo, truth = on_ground()
    found = masks_of(photo)
    assert len(found) == 2 and min(best_ious(truth, found)) > 0.95


def test_touching_things_of_two_hues_are_two_masks_and_stripes_divide_nothing():
    photo = np.full((90, 140, 3), 128, np.uint8)
    left, right = np.zeros((90, 140), bool), np.zeros((90, 140), bool)
    left[20:70, 20:70], right[20:70, 70:120] = True, True
    photo[left], photo[right] = (220, 130, 20), (40, 70, 210)
    stripes = (np.arange(140) // 4 % 2 == 0)[None, :]
    photo[left & stripes] = 20
    found = masks_of(photo)
    assert len(found) == 2 and min(best_ious([left, right], found)) > 0.85


def test_a_plain_photo_has_no_mask_which_is_no_error():
    assert masks_of(np.full((50, 70, 3), 90, np.uint8)) == []


def test_the_answer_is_the_same_each_time_and_of_the_photos_size():
    photo = np.random.default_rng(1).integers(0, 255, (60, 900, 3), np.uint8)
    photo[:, 300:500] = (20, 200, 40)
    generator = ColorRegions()
    first = generator.generate(photo)
    assert first == generator.generate(photo) == ColorRegions().generate(photo)
    assert {each.rle.size for each in first} == {(60, 900)}
    assert all(0 <= each.score <= 1 for each in first)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (1, 3000), (3, 5)])
def test_tiny_and_narrow_photos_are_answered(size):
    for value in (
        np.zeros((*size, 3), np.uint8),
        np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8),
    ):
        assert all(mask.shape == size and mask.any() for mask in masks_of(value))


def test_options_change_the_answer_and_the_identity():
    photo, _ = on_ground()
    assert len(masks_of(photo, min_share=0.06)) == 1
    named = [
        ColorRegions.identity(**each) for each in ({}, {"min_share": 0.06}, {"colors": 3}, {"max_side": 99})
    ]
    assert len({str(each) for each in named}) == 4
    with pytest.raises(ConfigError, match=r"mask_generator\.options.*max_side"):
        ColorRegions(side=3)
