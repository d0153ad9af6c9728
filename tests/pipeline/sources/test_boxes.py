"""Detection sets in COCO's layout: boxes become regions without masks, and what each trap becomes."""

from __future__ import annotations

from typing import Any

import pytest

from paracaption.pipeline.executor.audit import audit_subset
from paracaption.pipeline.sources.registry import find_mask_stage, open_source, recipe_name
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from tests.pipeline.sources.instances_file import (
    HEIGHT,
    LIMITS,
    WIDTH,
    annotation,
    content,
    image_row,
    photo_jpeg,
    reasons,
    write,
)


def boxed(number: Any, box: Any = (4, 3, 20, 12), **changes: Any) -> dict[str, Any]:
    """An annotation as a detection set has it: without a mask."""
    return annotation(number, segmentation=..., area=..., bbox=box, **changes)


def configured(root, recipe: str | None = None, **options: Any) -> BuildConfig:
    files = {"annotations": [str(root / "instances.json")], "photos": [str(root / "photos")]}
    subset = {"sources": {"source": "boxes", **files, **options}, "recipe": recipe}
    return BuildConfig.model_validate({"out": "out", "subsets": {"shelf": subset}})


def read(root, notes: list | None = None, **options: Any):
    source = open_source(configured(root, **options), "shelf")
    found = [source.read(entry, LIMITS, notes) for entry in source.catalog()]
    if notes is not None:
        notes += source.notes
    return found


def kinds(notes) -> list[str]:
    return [note.kind for note in notes]


def test_a_region_has_its_box_its_name_and_no_mask(tmp_path):
    write(tmp_path, content(boxed(7), boxed(8, [30.5, 2, 9, 9.25], category_id=90)))
    (image,) = read(tmp_path)
    assert reasons(image) == [None, None]
    first, second = image.regions
    assert (first.rle, first.bbox, first.area) == (None, (4, 3, 20, 12), 0)
    assert (first.source_id, first.category, first.category_id, first.is_thing) == (7, "cat", 17, True)
    assert (second.bbox, second.category) == ((30, 2, 10, 10), "hair dryer")
    assert (image.key, image.width, image.height) == ("000000000139", WIDTH, HEIGHT)
    assert image.credit is not None and image.credit.license == "BY-NC"
    config = configured(tmp_path)
    assert recipe_name(config, "shelf") == "verify"
    assert find_mask_stage(config, "shelf") == ("box_masks", "boxes")


def test_masks_in_the_file_are_not_read(tmp_path):
    write(tmp_path, content(annotation(1, segmentation="no mask at all"), annotation(2, image=139)))
    (image,) = read(tmp_path)
    assert reasons(image) == [None, "box_duplicate"]
    assert image.regions[0].rle is None


@pytest.mark.parametrize(
    ("box", "reason", "words"),
    [
        (..., "annotation_unreadable", "`bbox` is missing"),
        (None, "annotation_unreadable", "`bbox` is missing"),
        ([], "annotation_unreadable", "a list of 0 numbers"),
        ([1, 2, 3, 4, 5], "annotation_unreadable", "a list of 5 numbers"),
        ("4 3 20 12", "annotation_unreadable", "`bbox`"),
        ({"x": 4}, "annotation_unreadable", "`bbox`"),
        ([4, 3, "wide", 12], "annotation_unreadable", "`bbox`"),
        ([4, 3, float("nan"), 12], "annotation_unreadable", "NaN or infinity"),
        ([4, 3, float("inf"), 12], "annotation_unreadable", "NaN or infinity"),
        ([4, 3, 0, 12], "box_empty", "has no area"),
        ([4, 3, 20, -12], "box_empty", "has no area"),
        ([WIDTH, 3, 20, 12], "box_empty", f"outside of the photo, which is {WIDTH}x{HEIGHT}"),
    ],
)
def test_what_is_no_box_is_dropped_with_a_reason_and_leaves_the_others(tmp_path, box, reason, words):
    write(tmp_path, content(boxed(5, box), boxed(6)))
    (image,) = read(tmp_path)
    assert reasons(image) == [reason, None]
    assert words in image.regions[0].drop.detail and "instances.json" in image.regions[0].drop.detail
    assert image.regions[0].bbox == (0, 0, 0, 0)


def test_numbers_that_are_written_as_text_are_read(tmp_path):
    write(tmp_path, content(boxed("5", ["4", "3", "20", "12"], category_id="17")))
    (image,) = read(tmp_path)
    assert reasons(image) == [None] and image.regions[0].bbox == (4, 3, 20, 12)


def test_a_box_that_leaves_its_photo_is_clipped_with_a_note_where_it_is_by_a_pixel(tmp_path):
    write(tmp_path, content(boxed(1, [-5, 3, 20, 12]), boxed(2, [40, 20, 8.6, 12.4])))
    notes: list = []
    (image,) = read(tmp_path, notes)
    assert reasons(image) == [None, None]
    assert [region.bbox for region in image.regions] == [(0, 3, 15, 12), (40, 20, 8, 12)]
    assert kinds(notes) == ["box_clipped"] and "annotation 1: the box [-5, 3, 20, 12]" in notes[0].detail


def test_the_same_box_with_the_same_category_is_read_once_and_with_another_it_is_noted(tmp_path):
    same = [
        boxed(1),
        boxed(2),
        boxed(3, [4.0, 3, 20, 12.0]),
        boxed(4, category_id=1),
        boxed(5, [4, 3, 20, 13]),
    ]
    write(tmp_path, content(*same))
    notes: list = []
    (image,) = read(tmp_path, notes)
    assert reasons(image) == [None, "box_duplicate", "box_duplicate", None, None]
    assert "annotation 2: the box and the category of annotation 1" in image.regions[1].drop.detail
    assert kinds(notes) == ["box_shared"]
    assert "annotation 4 (person): the box of annotation 1 (cat)" in notes[0].detail


def test_a_box_that_was_dropped_hides_no_later_one(tmp_path):
    write(tmp_path, content(boxed(1, iscrowd=1), boxed(2), boxed(3, category_id=5)))
    (image,) = read(tmp_path)
    assert reasons(image) == ["crowd", None, "unknown_category"]
    assert image.regions[0].bbox == (4, 3, 20, 12)  # shown, though it is dropped


def test_crowds_and_unnamed_regions_are_kept_on_request(tmp_path):
    write(tmp_path, content(boxed(1, iscrowd=1), boxed(2, [1, 1, 5, 5], category_id=5)))
    notes: list = []
    (image,) = read(tmp_path, notes, recipe="identify", crowds="keep", unnamed="keep")
    assert reasons(image) == [None, None] and kinds(notes) == ["crowd_kept"]
    assert image.regions[1].category is None


OBJECTS365 = "objects365_v2_00900000.jpg"


@pytest.mark.parametrize("named", [OBJECTS365, f"images/v2/patch16/{OBJECTS365}", f"patch3/{OBJECTS365}"])
@pytest.mark.parametrize("placed", [OBJECTS365, f"patch16/{OBJECTS365}"])
def test_photos_of_objects365_are_found_whatever_patch_their_names_have(tmp_path, named, placed):
    document = content(boxed(1, image=1), images=[image_row(1, file_name=named, coco_url=...)])
    write(tmp_path, document, photos=[placed])
    (image,) = read(tmp_path)
    assert image.drop is None and image.key == "objects365_v2_00900000"
    assert image.photo is not None and image.photo.url.endswith(f"photos/{placed}")


def test_a_name_with_folders_means_no_file_of_other_folders_elsewhere(tmp_path):
    document = content(boxed(1, image=1), images=[image_row(1, file_name="a/street.jpg", coco_url=...)])
    write(tmp_path, document, photos=["b/street.jpg"])
    (image,) = read(tmp_path)
    assert image.drop is not None and image.drop.reason == "photo_missing"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": [image_row(), image_row(141)]}, "annotation_missing"),
        ({"images": [image_row(140), image_row()]}, "annotation_missing"),
        ({"images": [image_row(width=99)]}, "size_mismatch"),
        ({"images": [image_row(file_name="../../a.jpg")]}, "unsafe_name"),
        ({"images": [image_row(file_name="gone.jpg", coco_url=...)]}, "photo_missing"),
    ],
)
def test_what_is_wrong_with_an_image_is_what_it_is_for_masks(tmp_path, changes, reason):
    write(tmp_path, content(boxed(1), **changes))
    found = [image.drop.reason for image in read(tmp_path) if image.drop is not None]
    assert found == [reason]


def test_a_photo_that_is_no_photo_drops_its_regions_which_keep_no_box_of_an_unknown_size(tmp_path):
    write(tmp_path, content(boxed(1)))
    (tmp_path / "photos" / "000000000139.jpg").write_bytes(b"no photo")
    (image,) = read(tmp_path)
    assert image.drop is not None and reasons(image) == ["photo_unreadable"]
    assert image.regions[0].bbox == (0, 0, 0, 0)


def test_a_file_without_boxes_is_refused_with_what_it_is(tmp_path):
    write(tmp_path, content(annotation(1, bbox=...)))
    with pytest.raises(ConfigError, match="annotations without `bbox`; give a file with boxes"):
        read(tmp_path)
    write(tmp_path, content(annotation(1, bbox=..., segmentation=..., segments_info=[])))
    with pytest.raises(ConfigError, match="a panoptic file: read it as `source: coconut`"):
        read(tmp_path)


def test_masks_are_not_looked_for_in_a_file_of_boxes(tmp_path):
    write(tmp_path, content(boxed(1)))
    source = {"source": "coco", "annotations": [str(tmp_path / "instances.json")]}
    values = {"sources": source | {"photos": [str(tmp_path / "photos")]}}
    config = BuildConfig.model_validate({"out": "out", "subsets": {"shelf": values}})
    with pytest.raises(ConfigError, match="a file with boxes only: read it as `source: boxes`, which makes"):
        list(open_source(config, "shelf").catalog())


def test_the_audit_names_every_trap_with_what_to_do(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000000140.jpg").write_bytes(photo_jpeg())
    document = content(
        boxed(1),
        boxed(2),
        boxed(3, [-5, 3, 20, 12]),
        boxed(4, [0, 0, 0, 0]),
        boxed(5, [1, 1, 4, 4], iscrowd=1),
        boxed(6, image=140, category_id=1),
        boxed(7, image=140),
        boxed(8, "no box", image=140),
        images=[image_row(), image_row(140), image_row(141)],
    )
    write(tmp_path, document)
    report = audit_subset(open_source(configured(tmp_path), "shelf"), LIMITS)
    problems = report.summary()["problems"]
    assert set(problems) == {
        "box_duplicate", "box_clipped", "box_empty", "box_shared", "crowd", "annotation_unreadable",
        "annotation_missing",
    }  # fmt: skip
    assert all(found["fix"] for found in problems.values())
    assert (report.result.images, report.result.images_usable) == (3, 2)
    assert (report.result.regions, report.result.regions_usable) == (8, 4)
    assert "(x1, y1, x2, y2)" in report.text()
