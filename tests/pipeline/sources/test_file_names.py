"""Names that publishers gave: of Windows and macOS, without an ending, of another folder, and unsafe ones."""

import unicodedata

import pytest

from paracaption.schemas.reasons import Reason
from tests.pipeline.sources.release import LIMITS, photo_jpeg, reasons


def renamed(release, kind, before, after):
    folder = release.root / kind
    (folder / after).parent.mkdir(parents=True, exist_ok=True)
    (folder / before).rename(folder / after)


@pytest.mark.parametrize("folder", ["", "train2017\\"])
def test_folders_with_backslashes_are_folders(release, folder):
    release.add("x")
    release.images[0]["file_name"] = f"{folder}sub\\x.jpg"
    release.annotations[0]["file_name"] = f"{folder}sub\\x.png"
    inside = folder.replace("\\", "/")
    renamed(release, "photos", "x.jpg", f"{inside}sub/x.jpg")
    renamed(release, "labels", "x.png", f"{inside}sub/x.png")
    source = release.source()
    (entry,) = source.catalog()
    assert not source.notes
    assert len(source.read(entry, LIMITS).live()) == 2


@pytest.mark.parametrize(("listed", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_whether_its_accents_are_composed_or_not(release, listed, on_disk):
    release.add("x")
    spelled, found = (unicodedata.normalize(form, "caf\u00e9 \uac00") for form in (listed, on_disk))
    assert spelled != found
    release.images[0]["file_name"], release.annotations[0]["file_name"] = f"{spelled}.jpg", f"{spelled}.png"
    renamed(release, "photos", "x.jpg", f"{found}.jpg")
    renamed(release, "labels", "x.png", f"{found}.png")
    (image,) = release.read()
    assert len(image.live()) == 2


def test_of_two_spellings_each_name_means_its_own(release):
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "caf\u00e9")
        release.add(name, photo=photo_jpeg())
    photos = [entry.photo.url for entry in release.source().catalog()]
    assert [unicodedata.is_normalized("NFC", url) for url in photos] == [True, False]


def test_a_photo_without_an_ending_is_found_by_its_whole_name_alone(release):
    release.add("q").add("r")
    release.images[0]["file_name"] = "q"
    renamed(release, "photos", "q.jpg", "q")
    renamed(release, "photos", "r.jpg", "r")  # the list says r.jpg
    first, second = release.read()
    assert len(first.live()) == 2
    assert reasons(second) == [Reason.PHOTO_MISSING] * 2


def test_a_photo_of_another_folder_is_told_and_not_taken(release):
    release.add("x")
    release.images[0]["file_name"] = "train2017\\x.jpg"
    (image,) = release.read()
    assert reasons(image) == [Reason.PHOTO_MISSING] * 2
    assert "x.jpg exists, but in another folder than this name says" in image.drop.detail


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../a", "leads out of its folder"),
        ("/a", "leads out of its folder"),
        ("a\nb", "has a control character"),
        ("a::b", "begins with a drive letter"),
    ],
)
def test_a_name_that_is_not_safe_is_told_what_is_wrong_with_it(release, name, told):
    release.add("x")
    release.images[0]["file_name"] = f"{name}.jpg"
    (image,) = release.read()
    assert image.drop.reason == Reason.UNSAFE_NAME
    assert told in image.drop.detail
