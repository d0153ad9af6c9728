"""Which photo, label map and record of a COCONut release belong together."""

from paracaption.schemas.reasons import Reason
from tests.pipeline.sources.release import SEGMENTS, label_map, panoptic_png, photo_jpeg, reasons


def test_an_image_annotated_twice_is_kept_once(release):
    first, second = release.add("a").add("a").read()
    assert (first.key, second.key) == ("a", "a-dup2")
    assert len(first.live()) == 2 and reasons(second) == [Reason.DUPLICATE_KEY] * 2


def test_an_annotation_without_an_image_finds_its_photo_by_its_own_name(release):
    release.add("a").images.clear()
    (image,) = release.read()
    assert len(image.live()) == 2


def test_rows_without_an_id_are_joined_by_name(release):
    release.add("a", width=99)
    release.annotations[0]["image_id"] = None
    (image,) = release.read()
    assert image.drop.reason == Reason.SIZE_MISMATCH and "99x16" in image.drop.detail


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


def test_the_first_photo_folder_wins(release):
    (release.root / "more").mkdir()
    (release.root / "more" / "a.jpg").write_bytes(photo_jpeg())
    folders = [str(release.root / "more"), str(release.root / "photos")]
    (image,) = release.add().read(photos=folders)
    assert image.photo.url == f"{folders[0]}/a.jpg"


def test_only_known_endings_are_endings(release):
    for number in (1, 2):
        release.add(f"frame.000{number}")
        release.images[-1]["file_name"] = release.annotations[-1]["file_name"] = f"frame.000{number}"
    first, second = release.read()
    assert len(first.live()) == len(second.live()) == 2 and first.key != second.key
    assert second.photo.url.endswith("frame.0002.jpg")


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
