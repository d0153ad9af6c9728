"""COCO's instances layout and LVIS's: masks as pycocotools makes them, and what each trap becomes."""

import contextlib
import io
import json
import os
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from paracaption.filters import rle
from paracaption.pipeline.executor.audit import audit_subset
from paracaption.pipeline.sources import registry
from paracaption.pipeline.sources.instances import Record
from paracaption.schemas.config import BuildConfig, Limits
from paracaption.schemas.errors import BadRecord, ConfigError
from paracaption.schemas.reasons import Reason
from tests.pipeline.sources.instances_file import (
    HEIGHT,
    WIDTH,
    annotation,
    content,
    crowd_rle,
    image_row,
    open_coco,
    polygon,
    read,
    reasons,
    write,
)
from tests.shared_data import shared_data


def compressed():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[4:9, 30:41] = 1
    found = coco_mask.encode(mask)
    return {"size": found["size"], "counts": found["counts"].decode()}


TRIANGLE = [2.0, 2.0, 30.5, 2.0, 2.0, 28.0]


def test_every_mask_is_that_of_pycocotools_pixel_for_pixel(tmp_path):
    from pycocotools.coco import COCO

    forms = [
        polygon(),
        [TRIANGLE, [33.3, 20.1, 44.9, 21.2, 40.0, 30.7, 34.4, 29.9]],  # one object in two parts
        polygon(-3.0, 25.5, 20.0, 9.0),  # over two edges
        [TRIANGLE, [1, 2, 3, 4]],  # a later ring of two points has no pixel
        compressed(),
    ]
    crowd = annotation(900100000139, segmentation=crowd_rle(), iscrowd=1, area=180)
    annotations = [annotation(number, segmentation=form) for number, form in enumerate(forms)]
    write(tmp_path, content(*annotations, crowd))
    with contextlib.redirect_stdout(io.StringIO()):
        published = COCO(str(tmp_path / "instances.json"))
    (image,) = read(tmp_path, crowds="keep")
    assert reasons(image) == [None] * 6
    for region in image.regions:
        expected = published.annToMask(published.anns[region.source_id])
        assert np.array_equal(rle.decode(region.rle), expected), region.source_id
        assert (region.category, region.category_id) == ("cat", 17)


points = st.lists(st.floats(-20, 60, width=32), min_size=6, max_size=24).filter(
    lambda ring: len(ring) % 2 == 0
)


@settings(deadline=None)
@given(st.lists(points, min_size=1, max_size=3))
def test_any_polygon_becomes_the_mask_that_pycocotools_makes(rings):
    merged = coco_mask.merge(coco_mask.frPyObjects(rings, HEIGHT, WIDTH))
    (found,) = rle.check_all([rings], HEIGHT, WIDTH)
    expected = coco_mask.decode(merged)
    if not expected.any():
        assert isinstance(found, BadRecord) and found.reason is Reason.MASK_EMPTY
    else:
        assert np.array_equal(rle.decode(found.rle), expected)


@pytest.mark.parametrize(
    "segmentation, reason, words",
    [
        ([], "mask_undecodable", "the list of polygons is empty"),
        ([[1, 2, 30, 20]], "mask_undecodable", "at least 3 points"),
        ([[1, 2, 30, 20], TRIANGLE], "mask_undecodable", "at least 3 points"),
        ([[1, 2, 30, 20, 7]], "mask_undecodable", "at least 3 points"),
        ([[0, 0, 500, 0, 500, 300]], "mask_undecodable", "leaves its image by more than 64 pixels"),
        ([[1, 1, 1, 1, 1, 1]], "mask_empty", "no foreground pixel"),
        (polygon(WIDTH + 2, 2, 9, 9), "mask_empty", "no foreground pixel"),
        ({"size": [WIDTH, HEIGHT], "counts": [0, 4, WIDTH * HEIGHT - 4]}, "size_mismatch", "swapped"),
        ({"size": [HEIGHT, WIDTH], "counts": [3, 4]}, "mask_undecodable", "runs cover 7 pixels"),
        ([["x", 1, 2, 2, 3, 3]], "mask_undecodable", "not a number"),
        (..., "mask_undecodable", "`segmentation` is missing"),
        (None, "mask_undecodable", "`segmentation` is missing"),
    ],
)
def test_what_is_no_mask_is_dropped_with_a_reason_and_leaves_the_others(
    segmentation, reason, words, tmp_path
):
    write(tmp_path, content(annotation(5, segmentation=segmentation), annotation(6)))
    (image,) = read(tmp_path)
    assert reasons(image) == [reason, None]
    assert words in image.regions[0].drop.detail and "annotation 5" in image.regions[0].drop.detail


def test_an_image_has_its_license_its_names_and_the_plain_names_of_its_categories(tmp_path):
    write(tmp_path, content(annotation(1, category_id=90)))
    (image,) = read(tmp_path)
    assert (image.key, image.file_name, image.photo_format) == ("000000000139", "000000000139.jpg", "jpeg")
    assert image.credit.license == "BY-NC" and image.credit.coco_url.endswith("val2017/000000000139.jpg")
    assert image.regions[0].category == "hair dryer" and image.regions[0].is_thing is True


def test_crowds_are_dropped_or_kept_with_a_note(tmp_path):
    crowd = annotation(3, segmentation=crowd_rle(), iscrowd=1, area=180)
    write(tmp_path, content(annotation(1), crowd))
    assert reasons(read(tmp_path)[0]) == [None, "crowd"]
    notes = []
    assert reasons(read(tmp_path, notes=notes, crowds="keep")[0]) == [None, None]
    assert [(note.kind, note.region) for note in notes] == [("crowd_kept", 1)]


def test_ids_with_gaps_as_floats_as_text_or_used_twice_cost_no_mask(tmp_path):
    rows = [
        annotation(7.0, image=139.0, category_id=17.0),
        annotation("8", image="139", category_id="90"),
        annotation(1.5),
        annotation("a-9"),
        annotation(7),
        annotation(10**30),
        annotation(...),
    ]
    write(tmp_path, content(*rows, images=[image_row(id=139.0)]))
    notes = []
    (image,) = read(tmp_path, notes=notes)
    assert reasons(image) == [None] * 7
    assert [region.source_id for region in image.regions] == [7, 8, None, None, 7, None, None]
    assert [region.category for region in image.regions][:2] == ["cat", "hair dryer"]
    assert Counter(note.kind for note in notes) == {"id_unusable": 3, "repeated_ids": 1}
    assert [region.id for region in image.regions] == list(range(7))


@pytest.mark.parametrize("value", [17.5, "cat", True, [17], None, ..., "--5", "5" * 5000, 2**70])
def test_a_category_id_that_is_none_is_dropped(value, tmp_path):
    write(tmp_path, content(annotation(1, category_id=value), annotation(2)))
    (image,) = read(tmp_path)
    assert reasons(image)[0] in ("annotation_unreadable", "unknown_category") and reasons(image)[1] is None


def test_a_category_that_the_list_does_not_have_is_dropped_unless_names_are_not_wanted(tmp_path):
    write(tmp_path, content(annotation(1, category_id=2), annotation(2)))
    assert reasons(read(tmp_path)[0]) == ["unknown_category", None]
    with pytest.raises(ConfigError, match=r"subsets\.shelf\.recipe: not every region .* set `recipe`"):
        read(tmp_path, unnamed="keep")
    (image,) = read(tmp_path, unnamed="keep", recipe="identify")
    assert reasons(image) == [None, None]
    assert [region.category for region in image.regions] == [None, "cat"]


def test_without_a_category_list_the_ids_are_those_of_coco(tmp_path):
    write(tmp_path, content(annotation(1), categories=[]))
    assert read(tmp_path)[0].regions[0].category == "cat"


def lvis(number, name, **changes):
    return {
        "id": number,
        "name": name,
        "synset": f"{name}.n.01",
        "synonyms": [name],
        "frequency": "c",
    } | changes


def test_lvis_names_no_file_but_its_address_at_coco(tmp_path):
    at_train = "http://images.cocodataset.org/train2017/000000391895.jpg"
    at_val = "http://images.cocodataset.org/val2017/000000397133.jpg"
    document = content(
        annotation(1, image=391895, category_id=139, iscrowd=...),
        annotation(2, image=397133, category_id=140, iscrowd=...),
        images=[
            image_row(391895, file_name=..., coco_url=at_train, not_exhaustive_category_ids=[3]),
            image_row(397133, file_name=..., coco_url=at_val, neg_category_ids=[4]),
        ],
        categories=[lvis(139, "bow_(decorative_ribbons)"), lvis(140, "bow_(weapon)")],
    )
    write(tmp_path, document, ["train2017/000000391895.jpg", "val2017/000000397133.jpg"])
    folders = [str(tmp_path / "photos" / name) for name in ("train2017", "val2017")]
    images = read(tmp_path, photos=folders)
    assert [image.key for image in images] == ["000000391895", "000000397133"]
    assert [image.photo.url for image in images] == [
        f"{folders[0]}/000000391895.jpg",
        f"{folders[1]}/000000397133.jpg",
    ]
    assert [image.regions[0].category for image in images] == ["bow", "bow"]
    assert [image.regions[0].category_id for image in images] == [139, 140]
    images = read(tmp_path, photos=folders[1:])
    assert reasons(images[0]) == ["photo_missing"] and reasons(images[1]) == [None]


def test_lvis_photos_are_also_found_in_a_folder_of_another_name(tmp_path):
    at_train = "http://images.cocodataset.org/train2017/000000391895.jpg"
    row = image_row(391895, file_name=..., coco_url=at_train)
    write(tmp_path, content(annotation(1, image=391895), images=[row]), ["000000391895.jpg"])
    assert reasons(read(tmp_path)[0]) == [None]


def test_a_bare_list_of_annotations_finds_its_photos_by_cocos_names(tmp_path):
    write(tmp_path, json.dumps([annotation(1), annotation(2), annotation(3, image=12)]))
    images = read(tmp_path)
    assert [(image.key, reasons(image)) for image in images] == [
        ("000000000139", [None, None]),
        ("000000000012", ["photo_missing"]),
    ]


def test_the_published_list_of_one_coco_photo_is_read():
    home = shared_data("coco_hf_39769")
    source = registry.open_source(
        BuildConfig.model_validate(
            {
                "out": "out",
                "subsets": {
                    "one": {
                        "sources": {
                            "source": "coco",
                            "annotations": [str(home / "instances.json")],
                            "photos": [str(home)],
                        }
                    }
                },
            }
        ),
        "one",
    )
    (image,) = [source.read(entry, Limits()) for entry in source.catalog()]
    assert image.file_name == "000000039769.jpg" and image.photo.url.endswith("000000039769.png")
    assert len(image.live()) == len(image.regions) == 6
    assert {region.category for region in image.regions} == {"bed", "cat", "couch", "remote"}
    for region, raw in zip(image.regions, json.loads((home / "instances.json").read_text()), strict=True):
        merged = coco_mask.merge(coco_mask.frPyObjects(raw["segmentation"], image.height, image.width))
        assert np.array_equal(rle.decode(region.rle), coco_mask.decode(merged))


def test_annotations_without_an_image_have_their_rows_too(tmp_path):
    document = content(
        annotation(1), annotation(2, image=7), annotation(3, image=None), annotation(4, image=[1])
    )
    images = read(write(tmp_path, document))
    assert [(image.key, reasons(image)) for image in images] == [
        ("000000000139", [None]),
        ("instances-1", ["annotation_unreadable"]),
        ("instances-2", ["annotation_unreadable"] * 2),
    ]
    assert "has no image 7, which 1 annotations name" in images[1].drop.detail
    assert "no usable `image_id`" in images[2].drop.detail


@pytest.mark.parametrize("is_listed", [True, False])
def test_an_image_id_of_thousands_of_digits_costs_only_its_own_annotation(is_listed, tmp_path):
    document = content(annotation(1), annotation(2, image="5" * 5000))
    write(tmp_path, document if is_listed else {**document, "images": []})
    found = read(tmp_path)
    assert [reasons(image) for image in found] == [[None], [str(found[1].drop.reason)]]
    assert len(found[1].drop.detail) < 6000


def test_images_of_one_id_an_image_listed_twice_and_one_without_annotation_are_dropped(tmp_path):
    rows = [
        image_row(),
        image_row(),
        image_row(5),
        image_row(6, id=5),
        image_row(8),
        image_row(9, file_name="../x.jpg"),
    ]
    document = content(annotation(1), annotation(2, image=5), annotation(3, image=9), images=rows)
    images = read(write(tmp_path, document, ["000000000139.jpg", "000000000005.jpg", "000000000006.jpg"]))
    assert [None if image.drop is None else str(image.drop.reason) for image in images] == [
        None,
        "duplicate_key",
        "pair_ambiguous",
        "pair_ambiguous",
        "annotation_missing",
        "unsafe_name",
    ]
    assert "belongs to 000000000005.jpg and 000000000006.jpg" in images[2].drop.detail


def test_a_record_that_is_not_clean_json_costs_only_itself(tmp_path):
    text = json.dumps(content(annotation(1), annotation(2), annotation(3), 7, None))
    text = text.replace('"area": 240.875', '"area": NaN', 1).replace("4.5, 3.25, 25.0", "NaN, 3.25, 25.0", 1)
    (image, others) = read(write(tmp_path, text))
    assert reasons(image) == ["annotation_unreadable", None, None]
    assert reasons(others) == ["annotation_unreadable"] * 2


def test_a_byte_order_mark_and_text_that_is_not_utf8_are_let_through(tmp_path):
    text = (
        json.dumps(content(annotation(1, comment="caf?"), annotation(2)))
        .encode()
        .replace(b"caf?", b"caf\xe9")
    )
    (image,) = read(write(tmp_path, b"\xef\xbb\xbf" + text))
    assert reasons(image) == [None, None]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("{}", "the list `annotations` is missing; give the instances JSON"),
        ('{"annotations": 3}', "`annotations` is 3, not a list; give the instances JSON"),
        ('{"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}', "annotations without `segmentation`"),
        (
            '{"annotations": [{"image_id": 1, "segments_info": []}]}',
            "a panoptic file: read it as `source: coconut`",
        ),
        ("[\n{]", "line 2, column 2"),
    ],
)
def test_a_file_of_another_kind_is_an_error_of_one_line(text, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, text))
    assert words in str(caught.value) and "instances.json" in str(caught.value)


def test_sizes_that_are_not_the_photos_drop_the_image_and_missing_ones_do_not(tmp_path):
    write(tmp_path, content(images=[image_row(width=WIDTH + 1)]))
    assert "photo is 48x32, annotation says 49x32" in read(tmp_path)[0].drop.detail
    write(tmp_path, content(images=[image_row(width=..., height=0)]))
    assert reasons(read(tmp_path)[0]) == [None]


def test_the_limits_hold(tmp_path):
    write(tmp_path, content(annotation(1), annotation(2)))
    assert reasons(read(tmp_path, Limits(max_masks=1))[0]) == ["too_many_masks"] * 2
    assert reasons(read(tmp_path, Limits(max_pixels=100))[0]) == ["photo_too_large"] * 2
    assert str(read(tmp_path, Limits(max_record_bytes=100))[0].drop.reason) == "annotation_unreadable"


def test_a_worker_reads_only_the_record_of_its_image(tmp_path):
    rows = [annotation(number, image=number % 3 + 1) for number in range(9)]
    write(
        tmp_path,
        content(*rows, images=[image_row(number) for number in (1, 2, 3)]),
        [f"{number:012}.jpg" for number in (1, 2, 3)],
    )
    source = open_coco(tmp_path)
    entries = list(source.catalog())
    (tmp_path / "instances.json").unlink()
    for entry in entries:
        record = msgspec.json.decode(entry.record, type=Record)
        assert len(record.annotations) == 3 and [each.name for each in record.categories] == ["cat"]
        assert len(source.read(entry, Limits()).live()) == 3


def test_secrets_in_annotations_do_not_reach_the_work_list(tmp_path):
    signed = "https://host/a.jpg?X-Amz-Signature=0123456789abcdef0123456789abcdef&Expires=1"
    write(tmp_path, content(annotation(1, source=signed), images=[image_row(file_name=signed)]))
    for entry in open_coco(tmp_path).catalog():
        assert b"0123456789abcdef" not in msgspec.msgpack.encode(entry)


def test_the_recipe_is_verify_and_the_audit_says_what_to_do(tmp_path):
    write(tmp_path, content(annotation(1), annotation(2, segmentation=[]), annotation(2, category_id=5)))
    source = open_coco(tmp_path)
    config = BuildConfig.model_validate(
        {"out": "o", "subsets": {"s": {"sources": {"source": "coco", "annotations": ["a"], "photos": ["p"]}}}}
    )
    assert registry.recipe_name(config, "s") == "verify"
    report = audit_subset(source, Limits())
    text = report.text()
    assert "1 of 1 images and 1 of 3 regions are usable" in text
    assert "unknown_category: 1 x, 1 regions (give the category list as `categories`" in text
    assert "repeated_ids: 1 x (each is read as a region of its own)" in text


def test_the_fingerprint_changes_with_json_and_photos(tmp_path):
    write(tmp_path, content())
    first = open_coco(tmp_path).fingerprint()
    assert open_coco(tmp_path).fingerprint() == first
    (tmp_path / "photos" / "new.jpg").write_bytes(b"x")
    second = open_coco(tmp_path).fingerprint()
    assert second != first
    write(tmp_path, content(annotation(1), annotation(2)))
    os.utime(tmp_path / "instances.json", (1, 1))
    assert open_coco(tmp_path).fingerprint() != second
