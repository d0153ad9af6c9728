import hashlib

import pytest

from paracaption.pipeline.corpus.ledger import (
    Place,
    index_schema,
    ledger_schema,
    ledger_table,
    table_bytes,
)
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import SCORES, Blob, Drop, ImageRecord, Region, Rle


def region(number: int, **changes) -> Region:
    values = {"rle": Rle((4, 6), "0h0"), "bbox": (0, 0, 6, 4), "area": 24, "caption": "a cat on a mat"}
    return Region(id=number, **(values | changes))


def image(key: str, *regions: Region, drop: Drop | None = None) -> ImageRecord:
    return ImageRecord(key, "coconut", Blob("/photos/a.jpg"), 6, 4, "jpeg", "a.jpg", list(regions), drop)


def rows(*images: ImageRecord, places: dict | None = None) -> list[dict]:
    given = {each.key: Place(512, 7, 1536, 9) for each in images} if places is None else places
    return ledger_table("coconut-000000", list(images), given).to_pylist()


DROP = Drop("verify_category", Reason.CATEGORY_WRONG, "margin -0.4")


def test_every_region_is_a_row_kept_or_dropped_in_the_order_of_images_and_ids():
    found = rows(image("b", region(1), region(0, drop=DROP)), image("a", region(0)))
    assert [(row["key"], row["region"], row["kept"]) for row in found] == [
        ("b", 0, False),
        ("b", 1, True),
        ("a", 0, True),
    ]
    assert (found[0]["drop_stage"], found[0]["drop_reason"]) == ("verify_category", "category_wrong")
    assert found[1]["drop_reason"] is None
    assert all(row["unit"] == "coconut-000000" and row["image_width"] == 6 for row in found)


def test_only_a_kept_region_says_where_its_sample_lies():
    dropped, kept = rows(image("a", region(0, drop=DROP), region(1)))
    names = ("shard", *Place._fields)
    assert [kept[name] for name in names] == ["shards/coconut-000000.tar", 512, 7, 1536, 9]
    assert [dropped[name] for name in names] == [None] * 5


def test_an_image_without_regions_has_a_row_of_its_own():
    lost = Drop("source", Reason.PHOTO_MISSING, "a.jpg: no such file")
    empty, dropped = rows(image("empty"), image("lost", drop=lost), places={})
    assert (empty["region"], empty["kept"], empty["drop_reason"], empty["area"]) == (None, False, None, None)
    assert (dropped["region"], dropped["kept"], dropped["drop_reason"]) == (None, False, "photo_missing")


def test_a_dropped_image_drops_its_regions_which_keep_their_own_reasons():
    lost = Drop("source", Reason.PHOTO_MISSING, "a.jpg: no such file")
    found = rows(image("a", region(0, drop=DROP), region(1), drop=lost), places={})
    assert [row["drop_reason"] for row in found] == ["category_wrong", "photo_missing"]
    assert not any(row["kept"] for row in found)


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0, 2, 6, 4)])
def test_a_region_without_a_mask_has_no_measures_but_its_box_if_it_has_one(box):
    (row,) = rows(image("a", region(0, rle=None, bbox=box, drop=DROP)))
    assert [row[name] for name in ("rle_counts", "area")] == [None] * 2
    assert [row[f"bbox_{name}"] for name in "xywh"] == (list(box) if box[2] else [None] * 4)


def test_all_scores_have_a_column_in_ledger_and_index():
    scores = {name: i / 8 for i, name in enumerate(SCORES)}
    source = {"predicted_iou": 0.9, "stability_score": 0.8}
    (row,) = rows(image("a", region(0, scores=scores, source_scores=source, point_coords=[[1.0, 2.0]])))
    assert {name: row[name] for name in SCORES} == scores
    assert row["predicted_iou"] == 0.9 and row["point_coords"] == [[1.0, 2.0]]
    assert set(SCORES) <= set(index_schema().names) < set(ledger_schema().names)


def test_what_fits_no_column_does_not_keep_a_unit_from_its_ledger():
    odd = region(0, source_id=10**30, caption="half a pair \ud83d", category="tr\u00e4d")
    (row,) = rows(image("a", odd))
    assert row["source_id"] is None
    assert row["caption"] == "half a pair \\ud83d"
    assert row["category"] == "tr\u00e4d"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("odd", [2**63, 2**64, -(2**63) - 1, 10**400, "5", [1]])
def test_a_number_that_no_column_holds_is_null_beside_one_that_is_missing(odd):
    big, none = region(0, source_id=odd, category_id=odd), region(1, source_id=None, category_id=7)
    wide = region(2, crop_box=[1.0, odd], scores={"iou": 10**400}, bbox=(2**31, 0, 6, 4))
    found = rows(image("a", big, none, wide))
    assert [row["source_id"] for row in found] == [None, None, None]
    assert [row["category_id"] for row in found] == [None, 7, None]
    assert (found[2]["iou"], found[2]["bbox_x"], found[2]["bbox_w"]) == (None, None, 6)


def test_a_unit_without_any_image_is_an_empty_ledger():
    assert ledger_table("coconut-000000", [], {}).num_rows == 0


def test_equal_records_give_equal_bytes(tmp_path):
    digests = set()
    for name in ("first", "second"):
        table = ledger_table(
            "coconut-000000", [image("a", region(0), region(1, drop=DROP))], {"a": Place(1, 2, 3, 4)}
        )
        (tmp_path / name).write_bytes(table_bytes(table))
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["key", "unit", "subset", "kept"])
def test_what_every_row_has_is_never_null(name):
    assert not ledger_schema().field(name).nullable
