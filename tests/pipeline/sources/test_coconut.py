"""COCONut: the published layouts, and what each kind of damage becomes."""

import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

from paracaption.filters import rle
from paracaption.pipeline.sources.categories import load_categories, make_table, plain_name
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests.shared_data import shared_data

LIMITS = Limits()
WIDTH, HEIGHT = 24, 16


def label_map(dtype=np.uint32):
    labels = np.zeros((HEIGHT, WIDTH), dtype)
    labels[2:8, 3:12] = 70_000
    labels[9:, 10:] = 7
    return labels


def panoptic_png(labels):
    channels = np.stack([labels & 255, labels >> 8 & 255, labels >> 16], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(channels).save(buffer, "PNG")
    return buffer.getvalue()


def photo_jpeg(width=WIDTH, height=HEIGHT):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


SEGMENTS = [{"id": 70_000, "category_id": 1, "area": 54}, {"id": 7, "category_id": 184, "area": None}]


class Release:
    """A tiny release in the panoptic layout; tests damage it before they read it."""

    def __init__(self, root):
        self.root = root
        for name in ("photos", "labels"):
            (root / name).mkdir()
        self.images = []
        self.annotations = []

    def add(self, name="a", segments=SEGMENTS, labels=None, photo=None, **changes):
        number = len(self.images) + 1
        self.images.append(
            {"id": number, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT} | changes
        )
        self.annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
        if "/" not in name:
            (self.root / "photos" / f"{name}.jpg").write_bytes(photo_jpeg() if photo is None else photo)
            (self.root / "labels" / f"{name}.png").write_bytes(
                panoptic_png(label_map()) if labels is None else labels
            )
        return self

    def source(self, text=None, **changes):
        content = {"images": self.images, "annotations": self.annotations}
        data = json.dumps(content) if text is None else text
        (self.root / "p.json").write_bytes(data if isinstance(data, bytes) else data.encode())
        values = {"annotations": [str(self.root / "p.json")], "labels": str(self.root / "labels")}
        return open_coconut(**{**values, "photos": [str(self.root / "photos")], **changes})

    def read(self, text=None, limits=LIMITS, notes=None, **changes):
        source = self.source(text, **changes)
        return [source.read(entry, limits, notes) for entry in source.catalog()]


@pytest.fixture
def release(tmp_path):
    return Release(tmp_path)


def open_coconut(**values):
    return open_source(BuildConfig.model_validate({"out": "out", "coconut": values}), "coconut")


def reasons(image):
    return [None if region.drop is None else region.drop.reason for region in image.regions]


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


def test_a_category_may_be_named_instead_of_numbered(release):
    (image,) = release.add(segments=[{"id": 7, "category_name": "Wall-Brick"}]).read()
    assert (image.regions[0].category, image.regions[0].category_id) == ("brick wall", 171)


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


def test_an_image_annotated_twice_is_kept_once(release):
    first, second = release.add("a").add("a").read()
    assert (first.key, second.key) == ("a", "a-dup2")
    assert len(first.live()) == 2 and reasons(second) == [Reason.DUPLICATE_KEY] * 2


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


def test_an_annotation_without_an_image_finds_its_photo_by_its_own_name(release):
    release.add("a").images.clear()
    (image,) = release.read()
    assert len(image.live()) == 2


def test_rows_without_an_id_are_joined_by_name(release):
    release.add("a", width=99)
    release.annotations[0]["image_id"] = None
    (image,) = release.read()
    assert image.drop.reason == Reason.SIZE_MISMATCH and "99x16" in image.drop.detail


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


def test_photos_are_found_in_nested_folders_and_by_their_stem(release):
    release.add("a").add("b")
    (release.root / "photos" / "patch7").mkdir()
    (release.root / "photos" / "a.jpg").rename(release.root / "photos" / "patch7" / "a.jpg")
    (release.root / "photos" / "b.jpg").rename(release.root / "photos" / "b.png")
    notes = []
    nested, renamed = release.read(notes=notes)
    assert nested.photo.url.endswith("patch7/a.jpg") and renamed.photo.url.endswith("b.png")
    assert len(nested.live()) == len(renamed.live()) == 2


def test_a_stem_that_several_files_share_is_not_guessed(release):
    release.add("a")
    (release.root / "photos" / "a.jpg").rename(release.root / "photos" / "a.png")
    (release.root / "photos" / "deep").mkdir()
    (release.root / "photos" / "deep" / "a.webp").write_bytes(b"")
    assert len(release.read()[0].live()) == 2
    (release.root / "photos" / "a.webp").write_bytes(b"")
    assert release.read()[0].drop.reason == Reason.PHOTO_MISSING


def test_a_category_whose_name_is_not_utf8_is_unknown(release):
    names = json.dumps([{"id": 1, "name": "caf\ud800"}, {"id": 184, "name": "tree-merged"}])
    (release.root / "names.json").write_text(names)
    (image,) = release.add().read(categories=str(release.root / "names.json"))
    assert reasons(image) == [Reason.UNKNOWN_CATEGORY, None]


def test_the_first_photo_folder_wins(release):
    (release.root / "more").mkdir()
    (release.root / "more" / "a.jpg").write_bytes(photo_jpeg())
    folders = [str(release.root / "more"), str(release.root / "photos")]
    (image,) = release.add().read(photos=folders)
    assert image.photo.url == f"{folders[0]}/a.jpg"


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


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def parquet_row(name, data, segments=SEGMENTS):
    return {
        "mask": {"bytes": data, "path": f"{name}.png"},
        "segments_info": {"file_name": f"{name}.png", "image_id": 1, "segments_info": segments},
        "image_info": {"id": 1, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT},
    }


def test_parquet_rows_carry_their_label_map_by_reference(release):
    for name in "abcde":
        release.add(name)
    rows = [parquet_row(name, panoptic_png(label_map())) for name in "abcde"]
    rows[3]["mask"]["bytes"] = None
    write_parquet(release.root / "rows.parquet", rows)
    source = open_coconut(
        layout="parquet", annotations=[str(release.root / "*.parquet")], photos=[str(release.root / "photos")]
    )
    entries = list(source.catalog())
    assert max(len(entry.record) for entry in entries) < 500
    images = [source.read(entry, LIMITS) for entry in reversed(entries)][::-1]
    assert [len(image.live()) for image in images] == [2, 2, 2, 0, 2]
    assert images[3].drop.reason == Reason.LABELS_UNREADABLE
    assert (rle.decode(images[4].regions[1].rle) == (label_map() == 7)).all()


@pytest.mark.parametrize("content", [b"", b"PAR1 no", None])
def test_a_parquet_file_that_is_none_is_one_line(release, content):
    path = release.root / "rows.parquet"
    write_parquet(path, [{"x": 1}]) if content is None else path.write_bytes(content)
    source = open_coconut(layout="parquet", annotations=[str(path)], photos=[str(release.root / "photos")])
    with pytest.raises(ConfigError, match=r"rows\.parquet"):
        list(source.catalog())


@pytest.mark.parametrize(
    ("column", "of_the_file"), [("segments_info.file_name", True), ("mask.bytes", False)]
)
def test_a_parquet_file_with_a_broken_page_is_one_line(release, column, of_the_file):
    release.add("a")
    path = release.root / "rows.parquet"
    write_parquet(path, [parquet_row("a", panoptic_png(label_map()))])
    group = pq.read_metadata(path).row_group(0)
    (chunk,) = (each for each in map(group.column, range(group.num_columns)) if each.path_in_schema == column)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 16] = b"\xff" * 16  # the header of its first page
    path.write_bytes(data)
    source = open_coconut(layout="parquet", annotations=[str(path)], photos=[str(release.root / "photos")])
    if of_the_file:
        with pytest.raises(ConfigError) as caught:
            list(source.catalog())
        detail = str(caught.value)
    else:
        (entry,) = source.catalog()
        image = source.read(entry, LIMITS)
        assert image.drop.reason == Reason.LABELS_UNREADABLE and len(image.regions) == 2
        detail = image.drop.detail
    assert "rows.parquet" in detail and "fetch it again" in detail and "\n" not in detail


@pytest.mark.parametrize("missing", ["annotations", "labels", "photos", "categories"])
def test_a_wrong_path_in_the_config_is_named_before_anything_starts(release, missing):
    wrong = str(release.root / "nowhere")
    source = release.add().source(**{missing: wrong if missing in ("labels", "categories") else [wrong]})
    with pytest.raises(ConfigError, match="nowhere"):
        list(source.catalog())


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


def test_category_names_are_plain_words():
    spoken = {
        "tree-merged": "tree",
        "door-stuff": "door",
        "floor-other-merged": "floor",
        "wall-brick": "brick wall",
        "wall-other-merged": "wall",
        "water-other": "water",
        "playingfield": "playing field",
        "Cabinet/shelf": "cabinet or shelf",
        "Street Lights": "street lights",
        "Bakset": "basket",
        "hot dog": "hot dog",
    }
    assert {name: plain_name(name) for name in spoken} == spoken
    names = [category.name for category in load_categories(None).by_id.values()]
    assert len(names) == 133 and not any("-" in name or "merged" in name for name in names)


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


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": True, "name": "person"}], "category 0"),
        ([{"id": 1, "name": "person"}, {"id": 1, "name": "bicycle"}], "'person' and 'bicycle'"),
        ([{"id": 1, "name": ""}], "the name ''"),
        ([{"id": 1, "name": "-merged"}], "the name '-merged'"),
        ([{"id": 1, "name": "person", "isthing": "yes"}], "isthing"),
        ([{"id": 1, "name": "person", "isthing": [1]}], "isthing"),
    ],
)
def test_a_category_list_that_cannot_be_meant_is_one_line(rows, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_table(rows, "names.json")
    assert str(caught.value).startswith("names.json: ") and "\n" not in str(caught.value)


def test_a_category_may_be_repeated_as_it_is_and_isthing_may_be_text():
    row = {"id": 1.0, "name": "wall-brick", "isthing": "0"}
    (category,) = make_table([row, row], "x").by_id.values()
    assert (category.id, category.name, category.is_thing) == (1, "brick wall", False)


def test_a_json_list_is_called_a_list(release):
    with pytest.raises(ConfigError, match=r"p\.json: a list, not an object; give the panoptic JSON"):
        list(release.source(json.dumps(SEGMENTS)).catalog())


def test_only_known_endings_are_endings(release):
    for number in (1, 2):
        release.add(f"frame.000{number}")
        release.images[-1]["file_name"] = release.annotations[-1]["file_name"] = f"frame.000{number}"
    first, second = release.read()
    assert len(first.live()) == len(second.live()) == 2 and first.key != second.key
    assert second.photo.url.endswith("frame.0002.jpg")


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
    assert "declared 98, the map has 54" in bad.drop.detail


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


def write_pair(release, photo, label):
    for folder, name, data in (("photos", photo, photo_jpeg()), ("labels", label, panoptic_png(label_map()))):
        path = release.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_images_of_one_id_are_told_apart_by_their_names(release):
    release.add("a").add("b")
    for each in release.images:
        each["id"] = 1
    for each in release.annotations:
        each["image_id"] = 1
    release.annotations.reverse()
    found = {image.key: image for image in release.read()}
    assert set(found) == {"a", "b"} and all(len(image.live()) == 2 for image in found.values())


def test_an_id_and_a_name_of_two_images_are_a_drop_and_block_neither(release):
    release.add("a").add("b")
    release.annotations.insert(0, {**release.annotations[1], "image_id": 1})
    doubtful, first, second = release.read()
    assert reasons(doubtful) == [Reason.PAIR_AMBIGUOUS] * 2 and "b.jpg" in doubtful.drop.detail
    assert (first.key, second.key) == ("a", "b") and len(first.live()) == len(second.live()) == 2


def test_an_id_of_two_images_without_a_name_that_tells_is_a_drop(release):
    release.add("a").add("b")
    release.images[1]["id"] = 1
    release.annotations = [{"image_id": 1, "file_name": "c.png", "segments_info": SEGMENTS}]
    assert reasons(release.read()[0]) == [Reason.PAIR_AMBIGUOUS] * 2


def test_a_missing_frame_is_not_another_videos_frame(release):
    write_pair(release, "vidA/00001.jpg", "vidB/00001.png")
    release.add("vidB/00001")
    assert reasons(release.read()[0]) == [Reason.PHOTO_MISSING] * 2


def test_images_of_one_name_in_two_folders_are_both_kept(release):
    for name in ("a/0001", "b/0001"):
        write_pair(release, f"{name}.jpg", f"{name}.png")
        release.add(name)
    first, second = release.read()
    assert first.key == "0001" and second.key.startswith("b_0001-")
    assert len(first.live()) == len(second.live()) == 2
    assert first.photo.url.endswith("a/0001.jpg") and second.photo.url.endswith("b/0001.jpg")


def test_a_label_map_of_another_release_is_not_a_missing_photo(release):
    write_pair(release, "train2017/a.jpg", "a.png")
    write_pair(release, "panoptic_train2017/b.png", "b.png")
    for name in "ab":
        release.add(name)
        (release.root / "photos" / f"{name}.jpg").unlink()
    first, second = release.read()
    assert len(first.live()) == 2 and reasons(second) == [Reason.PHOTO_MISSING] * 2
