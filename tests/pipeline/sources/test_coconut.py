"""COCONut: the published layouts, and what each kind of damage becomes."""

import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from paracaption.filters import rle
from paracaption.schemas.config import Limits
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests.pipeline.sources.release import (
    HEIGHT,
    LIMITS,
    SEGMENTS,
    WIDTH,
    label_map,
    open_coconut,
    panoptic_png,
    photo_jpeg,
    reasons,
)
from tests.shared_data import shared_data


def test_segments_become_regions_with_the_masks_of_their_labels(release):
    (image,) = release.add().read()
    assert (image.key, image.width, image.height, image.photo_format) == ("a", WIDTH, HEIGHT, "jpeg")
    assert [(r.id, r.source_id, r.category, r.category_id, r.is_thing) for r in image.regions] == [
        (0, 70_000, "person", 1, True),
        (1, 7, "tree", 184, False),
    ]
    for region in image.live():
        assert (rle.decode(region.rle) == (label_map() == region.source_id)).all()
    assert image.regions[0].bbox == (3, 2, 9, 6) and image.regions[1].area == 98


def test_crowd_void_absent_unknown_and_twice_declared_segments_have_their_reasons(release):
    segments = [
        {"id": 7, "category_id": 1, "iscrowd": 1},
        {"id": 0, "category_id": 1},
        {"id": 55, "category_id": 1},
        {"id": 70_000, "category_id": 9_999},
        {"id": 70_000, "category_id": 1},
    ]
    (image,) = release.add(segments=segments).read()
    wanted = [Reason.CROWD, Reason.VOID, Reason.SEGMENT_ABSENT, Reason.UNKNOWN_CATEGORY, Reason.DUPLICATE_KEY]
    assert reasons(image) == wanted
    assert image.drop is None and image.live() == []


ODD = ["NaN", '"\\ud800"', '"text"', "[1]", "{}", "true", "1e999"]


"""What no number of a segment can be, as it stands in a JSON."""


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("field", ["id", "category_id"])
def test_one_bad_segment_costs_only_itself(release, field, value):
    release.add("a", segments=[SEGMENTS[0] | {field: 54_321}, SEGMENTS[1]]).add("b")
    text = json.dumps({"images": release.images, "annotations": release.annotations})
    images = release.read(text.replace("54321", value, 1))
    assert reasons(images[0]) == [Reason.ANNOTATION_UNREADABLE, None]
    assert f"segment at position 0: `{field}`" in images[0].regions[0].drop.detail
    assert "Expected" not in images[0].regions[0].drop.detail
    assert reasons(images[1]) == [None, None]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("field", ["area", "bbox", "isthing", "note"])
@pytest.mark.soak(keep=10)
def test_a_field_that_nobody_needs_costs_no_mask(release, field, value):
    release.add("a", segments=[SEGMENTS[0] | {field: 54_321}, SEGMENTS[1]])
    text = json.dumps({"images": release.images, "annotations": release.annotations})
    (image,) = release.read(text.replace("54321", value, 1))
    assert reasons(image) == [None, None]
    assert [region.source_id for region in image.regions] == [SEGMENTS[0]["id"], SEGMENTS[1]["id"]]


@pytest.mark.parametrize(("one", "other"), [("1.0", "1"), ("1", "1.0"), ('"1"', "1"), ("1", '"1"')])
def test_image_ids_as_floats_or_text_are_the_same_ids(release, one, other):
    release.add("a")
    release.annotations[0]["image_id"], release.images[0]["id"] = "of the annotation", "of the image"
    del release.annotations[0]["file_name"]
    text = json.dumps({"images": release.images, "annotations": release.annotations})
    (image,) = release.read(text.replace('"of the annotation"', one).replace('"of the image"', other))
    assert image.drop is None and reasons(image) == [None, None]


@pytest.mark.parametrize("name", ["category", "file_name"])
def test_bytes_that_are_not_utf8_in_a_field_that_nobody_needs_cost_nothing(release, name):
    release.add(segments=[{"id": 7, "category_id": 1, name: "caf#"}, *SEGMENTS[:1]])
    text = json.dumps({"images": release.images, "annotations": release.annotations}).encode()
    (image,) = release.read(text.replace(b"caf#", b"caf\xe9"))
    assert reasons(image)[0] is None


@pytest.mark.parametrize(
    "bad", [7, None, "text", {"image_id": [1]}, {"file_name": 5}, {"file_name": "a.png"}]
)
def test_an_annotation_that_is_none_costs_only_its_image(release, bad):
    release.add("b").annotations.insert(0, bad)
    images = release.read()
    assert images[0].drop is not None and images[0].drop.reason in (
        Reason.ANNOTATION_UNREADABLE,
        Reason.PHOTO_MISSING,
    )
    assert images[-1].key == "b" and reasons(images[-1]) == [None, None]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        '{"images": [',
        '{"annotations": []} x',
        '{"images": []}',
        "[1]",
        "[" * 100_000,
        '{"a":' + "[" * 50_000,
    ],
)
def test_json_that_is_no_document_is_one_line_with_the_file(release, text):
    with pytest.raises(ConfigError, match=r"p\.json") as caught:
        list(release.source(text).catalog())
    assert "\n" not in str(caught.value)


def test_an_instances_file_is_named_as_such(release):
    with pytest.raises(ConfigError, match="instances"):
        list(release.source('{"annotations": [{"image_id": 1, "segmentation": []}]}').catalog())


def test_a_position_is_named_where_json_breaks(release):
    text = json.dumps({"images": release.add().images, "annotations": release.annotations}, indent=1)
    with pytest.raises(ConfigError, match=r"line \d+, column \d+"):
        list(release.source(text.replace('"area": 54', '"area": 5 4')).catalog())


def test_sizes_that_differ_are_all_three_named(release):
    (image,) = release.add(photo=photo_jpeg(20, 10), width=99).read()
    assert image.drop.reason == Reason.SIZE_MISMATCH
    assert all(size in image.drop.detail for size in ("20x10", "24x16", "99x16"))
    assert reasons(image) == [Reason.SIZE_MISMATCH] * 2 and image.regions[0].rle is None


def test_a_record_without_a_size_takes_the_photos(release):
    (image,) = release.add(width=None, height=None).read()
    assert (image.width, image.height) == (WIDTH, HEIGHT) and len(image.live()) == 2


@pytest.mark.parametrize(
    ("folder", "content", "reason"),
    [
        ("photos", None, Reason.PHOTO_MISSING),
        ("photos", b"<html>", Reason.PHOTO_UNREADABLE),
        ("photos", photo_jpeg()[:-40], Reason.PHOTO_UNREADABLE),
        ("labels", None, Reason.LABELS_UNREADABLE),
        ("labels", b"", Reason.LABELS_UNREADABLE),
        ("labels", photo_jpeg(), Reason.LABELS_UNREADABLE),
        ("labels", panoptic_png(label_map())[:60], Reason.LABELS_UNREADABLE),
    ],
)
def test_an_image_with_a_bad_file_lists_its_regions_with_the_reason(release, folder, content, reason):
    release.add("a").add("b")
    path = next((release.root / folder).glob("a.*"))
    path.unlink() if content is None else path.write_bytes(content)
    bad, good = release.read()
    assert bad.drop.reason == reason and reasons(bad) == [reason, reason]
    assert "a." in bad.drop.detail and len(good.live()) == 2


def test_a_photo_that_comes_too_late_is_missing_when_it_is_read(release):
    source = release.add().source()
    (entry,) = source.catalog()
    (release.root / "photos" / "a.jpg").unlink()
    assert source.read(entry, LIMITS).drop.reason == Reason.PHOTO_MISSING


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "..\\a"])
def test_names_that_leave_their_folder_are_never_opened(release, name):
    release.add("b")
    release.images[0]["file_name"] = f"{name}.jpg"
    source = release.source()
    (entry,) = source.catalog()
    assert entry.photo is None and entry.annotation is None and entry.drop.reason == Reason.UNSAFE_NAME
    assert set(entry.key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert reasons(source.read(entry, LIMITS)) == [Reason.UNSAFE_NAME] * 2


def test_odd_names_make_different_safe_keys(release):
    names = ["a b", "a_b", "a+b", "x-dup2", "x", "x", "é", "y" * 300]
    keys = [image.key for image in map(release.source().read, *_catalogued(release, names))]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 130 and key.isascii() and " " not in key for key in keys)


def _catalogued(release, names):
    for name in names:
        release.images.append({"id": len(release.images), "file_name": f"{name}.jpg"})
        release.annotations.append({"image_id": len(release.images) - 1, "segments_info": []})
    entries = list(release.source().catalog())
    return entries, [LIMITS] * len(entries)


def test_images_without_an_annotation_are_listed(release):
    release.add("a")
    release.images.append({"id": 99, "file_name": "lonely.jpg", "width": 5, "height": 5})
    _, lonely = release.read()
    assert (lonely.key, lonely.drop.reason) == ("lonely", Reason.ANNOTATION_MISSING)


def test_too_many_segments_drop_the_image_without_reading_it(release):
    segments = [{"id": 7, "category_id": 1}] * 20
    (image,) = release.add(segments=segments, labels=b"").read(limits=Limits(max_masks=10))
    assert reasons(image) == [Reason.TOO_MANY_MASKS] * 20


def test_a_record_that_is_too_long_is_unreadable(release):
    (image,) = release.add().read(limits=Limits(max_record_bytes=50))
    assert image.drop.reason == Reason.ANNOTATION_UNREADABLE


@pytest.mark.parametrize("mode", ["L", "I;16", "I", "P", "RGBA", "palette of colours"])
def test_label_maps_of_every_mode_are_read(release, mode):
    labels = np.zeros((HEIGHT, WIDTH), np.uint32)
    labels[3:9, 2:20] = 9
    segments = [{"id": 9, "category_id": 1}]
    if mode == "palette of colours":
        segments = [{"id": 70_000, "category_id": 1}]
        picture = Image.open(io.BytesIO(panoptic_png(np.where(labels, 70_000, 0)))).quantize(4)
    elif mode == "RGBA":
        picture = Image.open(io.BytesIO(panoptic_png(labels))).convert("RGBA")
    elif mode == "P":
        picture = Image.fromarray(labels.astype(np.uint8))
        picture.putpalette([i // 3 for i in range(768)])
    else:
        picture = Image.fromarray(labels.astype({"L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if mode != "I" else "TIFF")
    (image,) = release.add(segments=segments, labels=buffer.getvalue()).read()
    assert (rle.decode(image.live()[0].rle) == (labels == 9)).all()


def test_what_is_odd_but_usable_is_noted(release):
    png = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(png, "PNG")
    segments = [{"id": 70_000, "category_id": 1, "area": 51.5, "isthing": 0}]
    notes = []
    (image,) = release.add(segments=segments, photo=png.getvalue()).read(notes=notes)
    assert sorted(note.kind for note in notes) == [
        "area_differs",
        "isthing_differs",
        "photo_misnamed",
        "undeclared_ids",
    ]
    assert image.regions[0].is_thing and len(image.live()) == 1


def test_label_maps_without_a_record_are_noted(release):
    source = release.add("a").source()
    (release.root / "labels" / "stray.png").write_bytes(b"")
    list(source.catalog())
    assert [note.kind for note in source.notes] == ["label_map_without_record"]


def test_a_folder_of_single_records_is_read_by_the_workers(release):
    release.add("a")
    (release.root / "panseg_info").mkdir()
    record = json.dumps({"segments_info": SEGMENTS, "file_name": "a.png"})
    (release.root / "panseg_info" / "a.json").write_text(record)
    (release.root / "panseg_info" / "b.json").write_text("{")
    good, bad = release.read(annotations=[str(release.root / "panseg_info")])
    assert [region.category for region in good.live()] == ["person", "tree"]
    assert bad.drop.reason == Reason.ANNOTATION_UNREADABLE and "b.json" in bad.drop.detail


@pytest.mark.parametrize("missing", ["annotations", "labels", "photos", "categories"])
def test_a_wrong_path_in_the_config_is_named_before_anything_starts(release, missing):
    wrong = str(release.root / "nowhere")
    source = release.add().source(**{missing: wrong if missing in ("labels", "categories") else [wrong]})
    with pytest.raises(ConfigError, match="nowhere"):
        list(source.catalog())


def test_photos_and_labels_that_are_swapped_are_recognized(release):
    photos, labels = str(release.root / "photos"), str(release.root / "labels")
    release.add()
    with pytest.raises(ConfigError, match=r"are swapped: .*photos has photos, such as a\.jpg"):
        list(release.source(photos=[labels], labels=photos).catalog())
    (release.root / "photos" / "b.png").write_bytes(b"")  # such photos there are
    list(release.source(photos=[labels], labels=photos).catalog())


@pytest.mark.parametrize("option", ["labels", "photos"])
def test_a_file_in_the_place_of_a_folder_is_called_one(release, option):
    (release.root / "photos.zip").write_bytes(b"PK")
    wrong = str(release.root / "photos.zip")
    source = release.add().source(**{option: [wrong] if option == "photos" else wrong})
    with pytest.raises(ConfigError, match=r"photos\.zip is a file; give a folder \(unpack an archive\)"):
        list(source.catalog())


def test_a_whole_release_is_read_from_another_file_system(release):
    release.add("a").add("b")
    release.source()
    memory = fsspec.filesystem("memory")
    memory.put(str(release.root), "/coconut", recursive=True)
    url = "memory://coconut"
    try:
        source = open_coconut(annotations=[f"{url}/*.json"], labels=f"{url}/labels", photos=[f"{url}/photos"])
        assert len(source.fingerprint()) == 3
        images = [source.read(entry, LIMITS) for entry in source.catalog()]
        assert [len(image.live()) for image in images] == [2, 2]
        assert images[0].photo.url.startswith("memory://")
    finally:
        memory.rm("/coconut", recursive=True)


def test_a_whole_release_is_read_from_a_plain_web_server_that_lists_nothing(release):
    release.add("a").add("b")
    release.source()
    (release.root / "labels" / "b.png").unlink()
    handler = partial(_Quiet, directory=str(release.root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        source = open_coconut(annotations=[f"{url}/p.json"], labels=f"{url}/labels", photos=[f"{url}/photos"])
        good, bad = [source.read(entry, LIMITS) for entry in source.catalog()]
        server.shutdown()
    assert len(good.live()) == 2
    assert bad.drop.reason == Reason.LABELS_UNREADABLE


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_published_panoptic_segments_equal_the_same_segments_published_as_rle():
    root = shared_data("coco_panopticapi")
    source = open_coconut(
        annotations=[str(root / "panoptic.json")],
        labels=str(root / "panoptic"),
        photos=[str(root / "images")],
    )
    published: dict[int, list] = {}
    for each in json.loads((root / "same_segments_as_rle.json").read_text())["annotations"]:
        published.setdefault(each["image_id"], []).append(each)
    count = 0
    for entry in source.catalog():
        image = source.read(entry, LIMITS)
        for region, each in zip(image.regions, published[int(image.key)], strict=True):
            counts, size = each["segmentation"]["counts"], tuple(each["segmentation"]["size"])
            if isinstance(counts, list):
                counts = coco.frPyObjects(each["segmentation"], *size)["counts"].decode()
            assert (region.rle.counts, region.rle.size, region.area) == (counts, size, each["area"])
            assert list(region.bbox) == each["bbox"] and region.category_id == each["category_id"]
            count += 1
    assert count == 50


@pytest.mark.parametrize(
    ("folder", "json_name", "labels", "photos"),
    [
        ("coco_hf_39769", "panoptic.json", "panoptic", "."),
        ("gar_bench_open", "panoptic_derived.json", "panoptic_derived", "images"),
        ("coco_panopticapi", "panoptic.json", "panoptic", "images"),
    ],
)
def test_published_masks_are_kept_pixel_for_pixel(folder, json_name, labels, photos):
    root = shared_data(folder)
    source = open_coconut(
        annotations=[str(root / json_name)], labels=str(root / labels), photos=[str(root / photos)]
    )
    for entry in source.catalog():
        image = source.read(entry, LIMITS)
        assert image.drop is None and image.regions, image.drop
        channels = np.asarray(Image.open(entry.annotation.url)).astype(np.uint32)
        ids = channels[..., 0] + 256 * channels[..., 1] + 65_536 * channels[..., 2]
        for region in image.regions:
            assert (rle.decode(region.rle) == (ids == region.source_id)).all()


def test_the_deliberate_mismatches_are_reported_and_none_is_kept():
    root = shared_data("format_edge/tfds_panoptic_size_mismatch")
    source = open_coconut(
        annotations=[str(root / "*.json")], labels=str(root / "panoptic"), photos=[str(root / "images")]
    )
    images = [source.read(entry, LIMITS) for entry in source.catalog()]
    assert len(images) == 5 and not any(image.live() for image in images)
    assert {image.drop.reason for image in images} == {Reason.SIZE_MISMATCH}


def test_a_json_list_is_called_a_list(release):
    with pytest.raises(ConfigError, match=r"p\.json: a list, not an object; give the panoptic JSON"):
        list(release.source(json.dumps(SEGMENTS)).catalog())


def test_the_ending_of_a_single_record_may_be_in_capitals(release):
    release.add("a").add("b")
    (release.root / "info").mkdir()
    for name in ("a.JSON", "b.Json"):
        (release.root / "info" / name).write_text(json.dumps(SEGMENTS))
    assert [len(image.live()) for image in release.read(annotations=[str(release.root / "info")])] == [2, 2]


def test_a_declared_size_that_no_image_has_is_not_kept(release):
    release.add("a", width=4_294_967_295, height=-3)
    (release.root / "photos" / "a.jpg").unlink()
    (image,) = release.read()
    assert image.drop.reason == Reason.PHOTO_MISSING and (image.width, image.height) == (0, 0)


def test_areas_that_disagree_drop_every_region_of_the_image(release):
    segments = [{"id": 70_000, "category_id": 1, "area": 98}, {"id": 7, "category_id": 184, "area": 54}]
    bad, good = release.add("a", segments=segments).add("b").read()
    assert reasons(bad) == [Reason.LABELS_DISAGREE] * 2 and len(good.live()) == 2
    assert "declared 98, in the map 54" in bad.drop.detail


def test_a_label_map_in_the_place_of_a_photo_is_no_photo(release):
    labels = np.kron(label_map(), np.ones((8, 8), np.uint32))
    segments = [{"id": 70_000, "category_id": 1}, {"id": 7, "category_id": 184}]
    size = {"width": WIDTH * 8, "height": HEIGHT * 8}
    release.add(segments=segments, labels=panoptic_png(labels), **size)
    (release.root / "photos" / "a.jpg").unlink()
    (release.root / "photos" / "a.png").write_bytes(panoptic_png(labels))
    assert reasons(release.read()[0]) == [Reason.PHOTO_MISSING] * 2


def test_of_an_id_declared_twice_the_category_whose_area_is_the_masks_is_kept(release):
    segments = [{"id": 7, "category_id": 1, "area": 54}, {"id": 7, "category_id": 184, "area": 98}]
    (image,) = release.add(segments=segments).read()
    assert reasons(image) == [Reason.DUPLICATE_KEY, None] and image.live()[0].category == "tree"
    segments[1]["area"] = 55
    assert reasons(release.read()[0]) == [Reason.DUPLICATE_KEY] * 2
