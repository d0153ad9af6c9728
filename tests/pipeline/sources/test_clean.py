"""What a source of one's own may give, odd records among it, is made clean where it is read."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.pipeline.corpus.ledger import ledger_table, table_bytes
from paracaption.pipeline.sources.protocols import CatalogEntry, Source, SourceOptions
from paracaption.schemas.config import Limits
from paracaption.schemas.records import Credit, ImageRecord, Region, Rle

MASK = rle.from_mask(np.eye(4, 6, dtype=bool))


class Own(Source[SourceOptions]):
    """Gives what it is told to."""

    title, options_type, recipe = "own", SourceOptions, "verify"

    def __init__(self, regions, **image):
        super().__init__(SourceOptions())
        self.regions, self.image = regions, image

    def places(self):
        return []

    def fingerprint(self, catalog):
        return {}

    def catalog(self, catalog):
        yield CatalogEntry("a", None, None)

    def fill(self, image, entry, limits, notes):
        image.width, image.height = 6, 4
        for name, value in self.image.items():
            setattr(image, name, value)
        image.regions = self.regions


def read(*regions, **image) -> ImageRecord:
    """The record, after its way to another process and into a ledger."""
    found = Own(list(regions), **image).read(CatalogEntry("a", None, None), Limits(), subset="own")
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=ImageRecord)
    assert again == found
    assert table_bytes(ledger_table("own-000000", [again], {}))
    return found


def region(number=0, mask=MASK.rle, **changes) -> Region:
    return Region(**{"id": number, "rle": mask, **changes})


def test_a_good_record_stays_as_it_is_and_its_mask_is_measured():
    found = read(region(3, source_id=7, category="cat", source_scores={"predicted_iou": 0.5}))
    (only,) = found.regions
    assert (only.rle, only.area, only.bbox) == MASK and only.drop is None
    assert (only.id, only.source_id, only.category, only.source_scores) == (
        3,
        7,
        "cat",
        {"predicted_iou": 0.5},
    )


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (2**63 - 1, 2**63 - 1),
        (2**63, None),
        (10**400, None),
        (np.int64(5), 5),
        ("5", None),
        (1.5, None),
        (True, None),
    ],
)
def test_numbers_are_64_bits_or_none(value, stored):
    (only,) = read(region(source_id=value, category_id=value)).regions
    assert (only.source_id, only.category_id) == (stored, stored)
    assert only.source_id is None or type(only.source_id) is int


def test_texts_are_unicode_or_none():
    found = read(region(category="a \ud83d b"), file_name="x\udcff.jpg", credit=Credit(author="\ud83d"))
    assert found.regions[0].category == "a \\ud83d b"
    assert (found.file_name, found.credit) == ("x\\udcff.jpg", Credit(author="\\ud83d"))
    assert read(region(category=5), file_name=5).regions[0].category is None


def test_numbers_in_lists_are_finite_or_the_list_is_none():
    odd = region(crop_box=[0, 0, math.inf, 1], point_coords=[[1, 2], [np.float32(3), 10**400]])
    (only,) = read(msgspec.structs.replace(odd, source_scores={"predicted_iou": math.nan, "b": 1})).regions
    assert (only.crop_box, only.point_coords, only.source_scores) == (None, None, {"b": 1.0})


@pytest.mark.parametrize("size", [2**31, 2**64, -1, None, "6", 6.5])
def test_a_size_that_is_none_drops_the_masks(size):
    found = read(region(), width=size)
    assert found.width == 0 and found.regions[0].drop.reason == "size_mismatch"


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Rle((4, 6), "o" * 50), "mask_undecodable"),
        (Rle((4, 6), MASK.rle.counts[:-2]), "mask_undecodable"),
        (Rle((4, 6), "\ud83d"), "mask_undecodable"),
        (Rle((6, 4), MASK.rle.counts), "size_mismatch"),
        (Rle((10**9, 10**9), "PPYo1"), "mask_undecodable"),
        (Rle(None, None), "mask_undecodable"),  # pyright: ignore[reportArgumentType]
        (rle.Mask(MASK.rle, 4, (0, 0, 4, 4)), "mask_undecodable"),
        ("mask", "mask_undecodable"),
        (None, "mask_undecodable"),
        (rle.from_mask(np.zeros((4, 6))).rle, "mask_empty"),
    ],
)
def test_a_mask_of_an_own_source_is_checked_before_pycocotools_sees_it(mask, reason):
    found = read(region(0, mask), region(1))
    assert [each.drop and each.drop.reason for each in found.regions] == [reason, None]


def test_regions_of_one_id_are_all_dropped_and_all_counted():
    found = read(region(1), region(1), region(2))
    assert [each.id for each in found.regions] == [0, 1, 2]
    assert found.drop is not None and "same id" in found.drop.detail and not found.live()


@pytest.mark.parametrize("number", [-1, 2**31, None, "a", True])
def test_an_id_that_is_none_is_the_position(number):
    assert [each.id for each in read(region(0), region(number)).regions] == [0, 1]


def test_what_is_no_region_is_a_drop():
    found = read(region(0), None, 5)
    assert [each.drop and each.drop.reason for each in found.regions] == [
        None,
        *["annotation_unreadable"] * 2,
    ]
