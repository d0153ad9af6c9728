"""A photo without masks gets its regions from a mask generator, in an order that is not the generator's."""

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.model_training.decoding.generate_regions import generate_regions
from paracaption.pipeline.models.protocols import Candidate
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import ConfigError


class Rows:
    """A mask of the first row of the photo, and one of the two rows after it."""

    def __init__(self, wrong=False):
        self.wrong = wrong

    def generate(self, photo):
        size = (1, 1) if self.wrong else photo.shape[:2]
        first, rest = np.zeros(size, bool), np.zeros(size, bool)
        first[0], rest[1:3] = True, True
        return [Candidate(rle.from_mask(mask).rle, 0.5) for mask in (first, rest)]


ROWS = f"{__name__}:Rows"


@pytest.fixture
def photo(tmp_path):
    pixels = np.full((60, 80, 3), 120, np.uint8)
    pixels[10:30, 10:30], pixels[40:52, 50:70] = (200, 30, 30), (30, 60, 200)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_without_a_name_the_generator_is_the_one_without_weights(photo):
    found = generate_regions(photo)
    assert found.name == str(photo) and found.pixels.shape == (60, 80, 3) and found.left_out == []
    assert [region.mask.bbox for region in found.regions] == [(10, 10, 20, 20), (50, 40, 20, 12)]
    assert [region.source for region in found.regions] == ["color_regions: mask 1", "color_regions: mask 2"]
    assert [mask.sum() for mask in found.masks()] == [396, 236], "all but the corners"


@pytest.mark.parametrize("given", [ROWS, {"name": ROWS, "options": {"wrong": False}}, Backend(name=ROWS)])
def test_a_generator_of_ones_own_is_named_in_any_form_and_its_masks_are_put_in_order(photo, given):
    assert [region.mask.bbox for region in generate_regions(photo, given).regions] == [
        (0, 1, 80, 2),
        (0, 0, 80, 1),
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nobody", "no backend 'nobody'"),
        ({"name": "color_regions", "options": {"colors": 0}}, "colors"),
        ({"options": {}}, "mask_generator"),
        ({"name": ROWS, "options": {"wrong": True}}, "candidate 0"),
    ],
)
def test_what_is_wrong_is_told_with_the_option(photo, given, told):
    with pytest.raises(ConfigError, match=told):
        generate_regions(photo, given)


def test_a_photo_with_nothing_to_mask_and_one_that_is_not_there_are_errors_that_say_so(tmp_path):
    Image.new("RGB", (40, 30), (9, 9, 9)).save(tmp_path / "plain.png")
    with pytest.raises(ConfigError, match=r"plain\.png.*finds nothing to mask; give masks"):
        generate_regions(tmp_path / "plain.png")
    with pytest.raises(ConfigError, match="no such photo"):
        generate_regions(tmp_path / "gone.png")
