"""What a source of somebody's own may give in the place of its regions."""

import itertools
import time

import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.pipeline.sources.clean import clean_image
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, ImageRecord, Region

MASK = rle.from_mask(np.eye(4, 6, dtype=bool))


def cleaned(regions) -> ImageRecord:
    image = ImageRecord("a", "own", Blob("a.jpg"), 6, 4)
    image.regions = regions
    clean_image(image, "source", False)
    return image


def broken():
    yield Region(0, MASK.rle)
    raise RuntimeError("no more")


@pytest.mark.parametrize(
    "given",
    [None, 5, "x" * 200_000, b"x" * 200_000, {"a": 1}, {1, 2}, broken()],
    ids=["none", "number", "text", "bytes", "mapping", "set", "raises"],
)
def test_what_is_no_list_of_regions_drops_the_image_at_once(given):
    began = time.thread_time()
    image = cleaned(given)
    assert image.regions == [] and image.drop is not None
    assert image.drop.reason == Reason.ANNOTATION_UNREADABLE
    assert "has to give a list of `Region`" in image.drop.detail and len(image.drop.detail) < 200
    assert time.thread_time() - began < 2


def test_what_is_no_region_is_a_drop_in_its_place_and_the_others_stay():
    image = cleaned(each for each in [Region(7, MASK.rle), None, "a cat", 3])
    assert [region.drop is None for region in image.regions] == [True, False, False, False]
    assert [region.id for region in image.live()] == [7]
    assert (
        image.regions[2].drop is not None
        and "is a str; the source has to give" in image.regions[2].drop.detail
    )


def test_regions_without_an_end_are_taken_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("paracaption.pipeline.sources.clean._MOST_REGIONS", 50)
    assert len(cleaned(itertools.repeat(None)).regions) == 50
