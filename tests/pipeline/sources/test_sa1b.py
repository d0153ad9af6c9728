"""SA-1B: tars read in place, folders of pairs, and what each kind of damage becomes."""

import gzip
import io
import json
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.io import files, photos
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests.shared_data import shared_data

LIMITS = Limits()
WIDTH, HEIGHT = 24, 16


def photo_jpeg(width=WIDTH, height=HEIGHT):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def square(size=4):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3 : 3 + size, 5 : 5 + size] = True
    return mask


def annotation(number=1, **changes):
    mask = rle.from_mask(square())
    return {
        "id": number,
        "segmentation": {"size": list(mask.rle.size), "counts": mask.rle.counts},
        "bbox": [5, 3, 3, 3],
        "area": 16,
        "predicted_iou": 0.9,
        "stability_score": 0.95,
        "crop_box": [0, 0, WIDTH, HEIGHT],
        "point_coords": [[6.5, 4.5]],
    } | changes


def record(*annotations, **size):
    image = {"image_id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "x.jpg"} | size
    return json.dumps({"image": image, "annotations": annotations or [annotation()]}).encode()


def write_tar(path, members, form=tarfile.GNU_FORMAT):
    """Members are (name, bytes), (name, None) for a folder, or (name, target) for a link."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            elif content is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def pair(name, data=None):
    return [(f"{name}.jpg", photo_jpeg()), (f"{name}.json", record() if data is None else data)]


def open_sa1b(*paths):
    values = {"out": "out", "sa1b": {"paths": [str(path) for path in paths]}}
    return open_source(BuildConfig.model_validate(values), "sa1b")


def read(*paths, limits=LIMITS, notes=None):
    source = open_sa1b(*paths)
    return {entry.key: source.read(entry, limits, notes) for entry in source.catalog()}


def reasons(image):
    return [None if region.drop is None else region.drop.reason for region in image.regions]


def test_a_pair_becomes_an_image_with_everything_that_was_published(tmp_path):
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1")))["sa_1"]
    (region,) = image.live()
    assert (image.width, image.height, image.photo_format, image.file_name) == (
        WIDTH,
        HEIGHT,
        "jpeg",
        "sa_1.jpg",
    )
    assert (region.id, region.source_id, region.area, region.category) == (0, 1, 16, None)
    assert region.source_scores == {"predicted_iou": 0.9, "stability_score": 0.95}
    assert (region.crop_box, region.point_coords) == ([0, 0, WIDTH, HEIGHT], [[6.5, 4.5]])
    assert (rle.decode(region.rle) == square()).all()


def test_the_box_is_the_masks_own_not_the_published_one_which_is_a_pixel_short(tmp_path):
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1")))["sa_1"]
    assert image.regions[0].bbox == (5, 3, 4, 4)


def test_members_come_in_any_order_and_folder_and_are_read_by_offset(tmp_path):
    members = [("x/", None), *pair("./x/sa_2")[::-1], *pair("x/sa_1"), ("x/LICENSE.txt", b"no")]
    source = open_sa1b(write_tar(tmp_path / "sa_0.tar", members))
    entries = list(source.catalog())
    assert [entry.key for entry in entries] == ["sa_2", "sa_1"]
    assert [note.kind for note in source.notes] == ["other_file"]
    for entry in entries:
        assert files.read(entry.photo) == photo_jpeg() and files.read(entry.annotation) == record()
        assert len(source.read(entry, LIMITS).live()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sa_0.tar"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path, form):
    name = "folder/" * 30 + "é" * 60
    (image,) = read(write_tar(tmp_path / "sa_0.tar", pair(name), form)).values()
    assert len(image.live()) == 1 and image.key.isascii()


def test_orphans_are_listed_with_what_they_miss(tmp_path):
    members = [pair("sa_1")[0], pair("sa_2")[1]]
    images = read(write_tar(tmp_path / "sa_0.tar", members))
    assert images["sa_1"].drop.reason == Reason.ANNOTATION_MISSING
    assert images["sa_2"].drop.reason == Reason.PHOTO_MISSING
    assert reasons(images["sa_2"]) == [Reason.PHOTO_MISSING]


@pytest.mark.parametrize("name", ["../sa_1", "/outside/sa_1", "x/../../sa_1"])
def test_member_names_that_leave_their_folder_are_never_used(tmp_path, name):
    source = open_sa1b(write_tar(tmp_path / "sa_0.tar", pair(name)))
    (entry,) = source.catalog()
    assert entry.drop.reason == Reason.UNSAFE_NAME and entry.photo is None and entry.annotation is None
    assert source.read(entry, LIMITS).drop.reason == Reason.UNSAFE_NAME


def test_links_are_not_followed(tmp_path):
    members = [("sa_1.jpg", "/etc/passwd"), pair("sa_1")[1]]
    assert read(write_tar(tmp_path / "sa_0.tar", members))["sa_1"].drop.reason == Reason.UNSAFE_NAME


def test_the_same_image_in_two_places_is_kept_once(tmp_path):
    first = write_tar(tmp_path / "sa_0.tar", pair("a/sa_1"))
    second = write_tar(tmp_path / "sa_1.tar", pair("sa_1"))
    images = read(first, second, write_tar(tmp_path / "sa_2.tar", pair("a/sa_1")))
    assert list(images) == ["sa_1", "sa_1-dup2", "sa_1-dup3"]
    assert [len(image.live()) for image in images.values()] == [1, 0, 0]
    assert reasons(images["sa_1-dup3"]) == [Reason.DUPLICATE_KEY]


def listed(*paths):
    """Photo, JSON and reason of each image, by their names below the folder `in`."""
    found = []
    for entry in open_sa1b(*paths).catalog():
        names = [blob and blob.url.rpartition("/in/")[2] for blob in (entry.photo, entry.annotation)]
        found.append((*names, entry.drop and entry.drop.reason))
    return found


def write_files(folder, *names):
    for name in names:
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record() if name.endswith(".json") else photo_jpeg())
    return folder / "in"


def test_images_of_one_name_in_two_folders_are_both_kept(tmp_path):
    tar = write_tar(tmp_path / "sa_0.tar", [*pair("a/sa_1"), *pair("b/sa_1")[::-1]])
    images = read(tar)
    assert len(images) == 2 and next(iter(images)) == "sa_1" and list(images)[1].startswith("b_sa_1-")
    assert [len(image.live()) for image in images.values()] == [1, 1]


MISSING, NO_PHOTO, UNCLEAR = Reason.ANNOTATION_MISSING, Reason.PHOTO_MISSING, Reason.PAIR_AMBIGUOUS
PAIRS = {
    "two folders": [("images/s.jpg", "notes/s.json", None)],
    "two folders in each of two": [
        ("a/images/s.jpg", "a/notes/s.json", None),
        ("b/images/s.jpg", "b/notes/s.json", None),
    ],
    "two in each of two folders": [
        ("images/a/s.jpg", "notes/a/s.json", None),
        ("images/b/s.jpg", "notes/b/s.json", None),
    ],
    "what other folders miss": [
        ("a/s.jpg", None, MISSING),
        (None, "b/s.json", NO_PHOTO),
        ("a/t.jpg", "a/t.json", None),
        ("b/t.jpg", "b/t.json", None),
    ],
    "one JSON for two": [("a/s.jpg", None, UNCLEAR), ("b/s.jpg", None, UNCLEAR), (None, "c/s.json", UNCLEAR)],
    "a drawing beside the photo": [("s.jpg", "s.json", None), ("s.png", None, Reason.DUPLICATE_KEY)],
    "two that may be the photo": [
        ("s.png", None, UNCLEAR),
        ("s.webp", None, Reason.DUPLICATE_KEY),
        (None, "s.json", Reason.DUPLICATE_KEY),
    ],
}


@pytest.mark.parametrize("case", PAIRS)
def test_photos_and_jsons_are_paired_only_where_it_is_unambiguous(tmp_path, case):
    names = [name for row in PAIRS[case] for name in row[:2] if name]
    found = listed(write_files(tmp_path, *names))
    assert sorted(found, key=str) == sorted(PAIRS[case], key=str)


def test_photos_and_jsons_of_two_listed_folders_are_paired(tmp_path):
    names = ["images/s.jpg", "images/t.jpg", "notes/s.json", "notes/t.json", "notes/u.json"]
    root = write_files(tmp_path, *names)
    wanted = [("images/s.jpg", "notes/s.json", None), ("images/t.jpg", "notes/t.json", None)]
    lone = [(None, "notes/u.json", NO_PHOTO)]
    assert listed(root / "images", root / "notes") == wanted + lone
    assert sorted(listed(root / "notes", root / "images"), key=str) == sorted(wanted + lone, key=str)
    assert [len(image.live()) for image in read(root / "images", root / "notes").values()] == [1, 1, 0]


@pytest.mark.parametrize("name", ["__abc", "__meta__", "фото", "x..", ".hidden", "__", "..__"])
def test_no_key_begins_as_names_do_that_readers_pass_by(tmp_path, name):
    (image,) = read(write_tar(tmp_path / "sa_0.tar", pair(name))).values()
    assert not image.key.startswith(("__", ".")) and len(image.live()) == 1
    assert image.key.isascii() and "." not in image.key


def test_a_tar_that_was_cut_loses_only_its_last_member(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", [*pair("sa_1"), *pair("sa_2")[::-1]])
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(whole[: last.offset_data + 10])
    images = read(path)
    assert len(images["sa_1"].live()) == 1
    assert images["sa_2"].drop.reason == Reason.PHOTO_UNREADABLE and "cut short" in images["sa_2"].drop.detail


def test_a_broken_header_is_listed_and_what_is_before_it_is_kept(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", [*pair("sa_1"), *pair("sa_2")])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmembers()[2].offset
    data[at : at + 512] = b"\xaa" * 512
    path.write_bytes(data)
    images = read(path)
    assert len(images.pop("sa_1").live()) == 1
    (broken,) = images.values()
    assert broken.drop.reason == Reason.ANNOTATION_UNREADABLE and f"byte {at}" in broken.drop.detail


def test_a_tar_cut_between_two_members_is_noted(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", [*pair("sa_1"), *pair("sa_2")])
    with tarfile.open(path) as archive:
        at = archive.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:at])
    source = open_sa1b(path)
    assert [entry.key for entry in source.catalog()] == ["sa_1"]
    assert [note.kind for note in source.notes] == ["tar_without_end"]


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\x1f\x8b" + bytes(1000)])
def test_a_tar_that_is_none_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / "sa_0.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"sa_0\.tar"):
        list(open_sa1b(tmp_path / "sa_0.tar").catalog())


@pytest.mark.parametrize(
    ("content", "told"),
    [(photo_jpeg(), "a JPEG"), (b'{"annotations": []}', "JSON"), (b"PK\x03\x04", "a zip file")],
)
def test_another_file_in_the_place_of_a_tar_is_called_what_it_is(tmp_path, content, told):
    (tmp_path / "sa_0.jpg").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"sa_0\.jpg: not a tar: {told}; "):
        list(open_sa1b(tmp_path / "sa_0.jpg").catalog())


def test_a_path_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="/nowhere"):
        list(open_sa1b("/nowhere/sa_*.tar").catalog())


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'{"annotations": 7}', b"[" * 100_000, b"\xff\xfe", b'{"a": 1} 2']
)
def test_json_that_is_no_record_drops_its_image(tmp_path, data):
    images = read(write_tar(tmp_path / "sa_0.tar", [*pair("sa_1", data), *pair("sa_2")]))
    assert images["sa_1"].drop.reason == Reason.ANNOTATION_UNREADABLE
    assert len(images["sa_2"].live()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"predicted_iou": float("nan")},
        {"area": "text"},
        {"crop_box": 5},
        {"crop_box": [1, None, 3, 4]},
        {"id": [1]},
        {"id": "abc"},
        {"id": True},
        {"point_coords": [["a"]]},
        {"bbox": [1, 2, float("nan"), 4]},
        {"note": "\ud800"},
    ],
)
def test_a_field_that_nobody_needs_costs_no_mask(tmp_path, bad):
    data = record(annotation(1), annotation(2, **bad), annotation(3))
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1", data)))["sa_1"]
    assert reasons(image) == [None, None, None]
    assert image.regions[1].rle == image.regions[0].rle
    assert image.regions[1].source_id == (None if "id" in bad else 2)


@pytest.mark.parametrize("bad", [float("nan"), "\ud800", {"size": [float("inf"), 4], "counts": "a"}])
def test_one_bad_annotation_costs_only_itself(tmp_path, bad):
    data = record(annotation(1), annotation(2, segmentation=bad), annotation(3))
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1", data)))["sa_1"]
    assert reasons(image) == [None, Reason.ANNOTATION_UNREADABLE, None]
    assert "annotation 2: `segmentation`" in image.regions[1].drop.detail


def test_an_annotation_that_is_no_object_costs_only_itself(tmp_path):
    data = record(annotation(1), 7, annotation(3))
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1", data)))["sa_1"]
    assert reasons(image) == [None, Reason.ANNOTATION_UNREADABLE, None]


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": "garbage"}, Reason.MASK_UNDECODABLE),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, Reason.MASK_UNDECODABLE),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, Reason.MASK_EMPTY),
        ({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}, Reason.SIZE_MISMATCH),
        (None, Reason.MASK_UNDECODABLE),
    ],
)
def test_one_bad_mask_costs_only_itself(tmp_path, segmentation, reason):
    data = record(annotation(1), annotation(2, segmentation=segmentation), annotation(3))
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1", data)))["sa_1"]
    assert reasons(image) == [None, reason, None] and "annotation 2" in image.regions[1].drop.detail


def test_photo_and_record_of_different_size_drop_the_image(tmp_path):
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1", record(width=99))))["sa_1"]
    assert image.drop.reason == Reason.SIZE_MISMATCH and reasons(image) == [Reason.SIZE_MISMATCH]


@pytest.mark.soak
def test_100_000_masks_on_one_image_are_all_listed_and_none_is_decoded(tmp_path, monkeypatch):
    data = record(*[annotation()] * 100_000)
    path = write_tar(tmp_path / "sa_0.tar", pair("sa_1", data))
    monkeypatch.delattr(rle, "check_all")
    image = read(path)["sa_1"]
    assert image.drop.reason == Reason.TOO_MANY_MASKS and len(image.regions) == 100_000
    assert all(region.drop is image.drop for region in image.regions)


def test_a_record_that_is_too_long_is_not_read(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", pair("sa_1"))
    image = read(path, limits=Limits(max_record_bytes=100))["sa_1"]
    assert image.drop.reason == Reason.ANNOTATION_UNREADABLE


def test_a_folder_of_pairs_is_read_in_the_order_of_its_names(tmp_path):
    for name, content in [*pair("sa_2"), *pair("sa_1"), ("sa_3.jpg", photo_jpeg())]:
        (tmp_path / name).write_bytes(content)
    images = read(tmp_path)
    assert list(images) == ["sa_1", "sa_2", "sa_3"]
    assert [len(image.live()) for image in images.values()] == [1, 1, 0]


def test_a_tar_is_read_in_place_from_another_file_system(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", [*pair("sa_1"), *pair("sa_2")])
    memory = fsspec.filesystem("memory")
    memory.pipe("/sa1b/sa_0.tar", path.read_bytes())
    try:
        images = read("memory://sa1b/*.tar")
        assert [len(image.live()) for image in images.values()] == [1, 1]
        assert photos.read_pixels(images["sa_2"]).shape == (HEIGHT, WIDTH, 3)
    finally:
        memory.rm("/sa1b", recursive=True)


def test_a_tar_is_read_in_place_from_an_object_store(tmp_path, monkeypatch):
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
    try:
        store = fsspec.filesystem("s3")
        store.mkdir("of-sa1b")
        path = write_tar(tmp_path / "sa_0.tar", [*pair("sa_1"), *pair("sa_2")])
        store.pipe("of-sa1b/sa1b/sa_0.tar", path.read_bytes())
        images = read("s3://of-sa1b/sa1b/*.tar")
        assert [len(image.live()) for image in images.values()] == [1, 1]
        assert photos.read_pixels(images["sa_2"]).shape == (HEIGHT, WIDTH, 3)
        assert list(open_sa1b("s3://of-sa1b/sa1b/*.tar").fingerprint()) == ["s3://of-sa1b/sa1b/sa_0.tar"]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("name", "images", "regions"),
    [("sa1b_style_open/sa_900000.tar", 3, 73), ("sa1b_real/shards/standin.tar", 1, 113)],
)
def test_published_masks_are_kept_as_they_are(name, images, regions):
    source = open_sa1b(shared_data(name))
    entries = list(source.catalog())
    assert len(entries) == images
    for entry in entries:
        image = source.read(entry, LIMITS)
        published = json.loads(files.read(entry.annotation))["annotations"]
        regions -= len(image.live())
        for region, each in zip(image.regions, published, strict=True):
            assert (region.rle.counts, list(region.rle.size)) == tuple(
                each["segmentation"][k] for k in ("counts", "size")
            )
            assert region.source_scores["predicted_iou"] == each["predicted_iou"]
            assert (region.point_coords, region.crop_box) == (each["point_coords"], each["crop_box"])
    assert regions == 0


def test_the_disorderly_tar_lists_its_orphan_and_its_mismatch():
    images = read(shared_data("sa1b_real/shards/messy.tar"))
    assert images["sa_226381"].drop.reason == Reason.SIZE_MISMATCH
    assert len(images["sa_226381"].regions) == 113
    assert images["sa_8776"].drop.reason == Reason.ANNOTATION_MISSING


def test_the_swapped_size_of_the_edge_case_is_found():
    images = read(shared_data("format_edge/datumaro_sa1b"))
    assert len(images["a"].live()) == 1
    assert "swapped" in images["b"].regions[0].drop.detail


def test_tars_after_one_another_are_read_whole(tmp_path):
    first = write_tar(tmp_path / "a.tar", pair("sa_1")).read_bytes()
    second = write_tar(tmp_path / "b.tar", [*pair("sa_2"), *pair("sa_3")]).read_bytes()
    (tmp_path / "sa_0.tar").write_bytes(first + second)
    images = read(tmp_path / "sa_0.tar")
    assert {key: len(image.live()) for key, image in images.items()} == {"sa_1": 1, "sa_2": 1, "sa_3": 1}


def test_a_tar_with_a_block_of_zeros_in_its_middle_is_read_whole(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", [*pair("sa_1"), *pair("sa_2")])
    with tarfile.open(path) as archive:
        at = archive.getmembers()[2].offset
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes(512) + data[at:])
    assert [len(image.live()) for image in read(path).values()] == [1, 1]


def test_what_follows_a_tars_end_and_is_no_member_is_noted(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", pair("sa_1"))
    path.write_bytes(path.read_bytes() + b"\xaa" * 700)
    source = open_sa1b(path)
    assert [entry.key for entry in source.catalog()] == ["sa_1"]
    assert [note.kind for note in source.notes] == ["tar_after_end"] and "700 bytes" in source.notes[0].detail


def test_annotations_in_the_place_of_their_folder_lead_to_the_folder(tmp_path):
    (tmp_path / "sa_1.json").write_text("{}" * 40)
    (tmp_path / "sa_1.jpg").write_bytes(b"")
    source = open_sa1b(tmp_path / "*.json")
    with pytest.raises(
        ConfigError, match=rf"sa_1\.json: not a tar, but one file of a folder; give {tmp_path}$"
    ):
        list(source.catalog())


def test_a_gzipped_tar_is_called_gzipped(tmp_path):
    path = write_tar(tmp_path / "sa_0.tar", pair("sa_1"))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"sa_0\.tar: gzipped; unpack it"):
        list(open_sa1b(path).catalog())


def test_a_byte_order_mark_loses_nothing(tmp_path):
    images = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1", b"\xef\xbb\xbf" + record())))
    assert len(images["sa_1"].live()) == 1


@pytest.mark.parametrize("odd", [{"id": 2.0}, {"id": "2"}, {"area": "16"}, {"predicted_iou": "0.9"}])
def test_numbers_written_as_text_or_whole_floats_lose_no_mask(tmp_path, odd):
    data = record(annotation(1), annotation(2, **odd))
    image = read(write_tar(tmp_path / "sa_0.tar", pair("sa_1", data)))["sa_1"]
    assert reasons(image) == [None, None] and image.regions[1].source_id == 2
