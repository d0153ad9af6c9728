"""Which photo is a benchmark's: names decide, ids only with the size, copies are found and others are not."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from paracaption.filters.benchmark_photos import Listed, PhotoNames, find_look, picture_hash
from paracaption.pipeline.io.benchmark_photos import load_names
from tests.shared_data import shared_data

_TITLES = ("ParaDLC-Bench", "DLC-Bench")
NAMES = PhotoNames(
    {
        "000000571598": Listed(640, 480, "ParaDLC-Bench"),
        "objects365_v2_00912042": Listed(1024, 768, "DLC-Bench"),
    }
)


@pytest.mark.parametrize(
    "name",
    [
        *("000000571598.jpg", "val2017/000000571598.png", "COCO_val2014_000000571598.jpg", "000000571598"),
        *("objects365_v2_00912042.jpg", "images/v2/patch16/Objects365_v2_00912042.JPG"),
    ],
)
def test_a_photo_is_found_by_the_name_that_coco_or_objects365_gave_it(name):
    assert NAMES.find(name) and NAMES.find(name, number=1)


@pytest.mark.parametrize(
    "name",
    [
        *("000000571599.jpg", "571598.jpg", "sa_571598.jpg", "0000000571598.jpg", "x000000571598.jpg", ""),
        *("objects365_v2_00571598.jpg", "objects365_v1_00912042.jpg", "photo.jpg"),
    ],
)
def test_other_names_are_no_benchmarks(name):
    assert not NAMES.find(name)


def test_an_id_counts_with_the_size_of_the_benchmarks_photo_and_never_against_a_name():
    assert NAMES.find("photo.jpg", 571598, (640, 480)) == "ParaDLC-Bench"
    assert NAMES.find("571598.jpg", None, (640, 480)) == "ParaDLC-Bench"
    assert NAMES.find("photo.jpg", "objects365_v2_00912042") == "DLC-Bench"
    assert NAMES.find("photo.jpg", 912042, (1024, 768)) == "DLC-Bench"
    assert not NAMES.find("photo.jpg", 571598, (640, 481))
    assert not NAMES.find("photo.jpg", 571598)
    assert not NAMES.find("000000000007.jpg", 571598, (640, 480))


def test_the_list_has_the_photos_of_both_benchmarks_and_no_common_numbers():
    names = load_names().photos
    assert len(names) == 172
    titles = [each.title for each in names.values()]
    assert [sum(title in each.split(" and ") for each in titles) for title in _TITLES] == [100, 77]
    assert not any(load_names().find(f"{number:012d}.jpg") for number in range(1500))


def _copies(picture: Image.Image):
    small = picture.resize((picture.width // 3, picture.height // 3))
    for each, quality in ((picture, 20), (small, 60), (small, 20)):
        buffer = io.BytesIO()
        each.save(buffer, "JPEG", quality=quality)
        yield Image.open(buffer)
    yield picture.convert("L")


def _scene(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((300, 240), Image.Resampling.BICUBIC)


def test_a_copy_looks_the_same_and_another_picture_does_not():
    known = [(picture_hash(_scene(seed)), str(seed)) for seed in range(40)]
    for seed in range(40):
        assert all(find_look(picture_hash(copy), known) == str(seed) for copy in _copies(_scene(seed)))
    assert not any(find_look(picture_hash(_scene(seed)), known) for seed in range(40, 240))


def test_no_two_published_photos_look_the_same_and_their_copies_do():
    paths = [*shared_data("gar_bench_open").rglob("*.jpg"), *shared_data("open_images_pypi").rglob("*.jpg")]
    pictures = {path: Image.open(path).convert("RGB") for path in sorted(paths)}
    hashes = {path: picture_hash(picture) for path, picture in pictures.items()}
    for one, two in itertools.combinations(hashes, 2):
        if pictures[one].tobytes() != pictures[two].tobytes():
            assert not find_look(hashes[one], [(hashes[two], "")]) and hashes[one] != hashes[two]
    for path, picture in pictures.items():
        assert all(find_look(picture_hash(copy), [(hashes[path], "it")]) for copy in _copies(picture))
