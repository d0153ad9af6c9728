"""The classical captioner says what is there, in English, and only that."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.filters.text import clean
from paracaption.pipeline.models.embedded.appearance import MAX_SIDE, measure_region, name_colors
from paracaption.pipeline.models.embedded.classical import ClassicalCaptioner, describe_appearance
from paracaption.pipeline.sources.categories import load_categories
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import Limits, Text
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, Drop, ImageRecord, Region
from tests.pipeline.models.sample import sample_config
from tests.shared_data import shared_data


def painted(colour, mask, background=(128, 128, 128)):
    photo = np.empty((*mask.shape, 3), np.uint8)
    photo[:] = background
    photo[mask] = colour
    return photo


def box_mask(height, width, x1, y1, x2, y2):
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def disc(height, width, x, y, radius):
    rows, columns = np.mgrid[0:height, 0:width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def caption_of(photo, mask, category=None, choice=0):
    seen = measure_region(photo, rle.from_mask(mask).rle)
    assert seen is not None
    return describe_appearance(seen, category, choice)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"),
        ((255, 255, 255), "white"),
        ((128, 128, 128), "grey"),
        ((220, 30, 30), "red"),
        ((30, 60, 190), "blue"),
        ((40, 140, 60), "green"),
        ((250, 220, 60), "yellow"),
        ((240, 140, 40), "orange"),
        ((120, 75, 45), "brown"),
        ((245, 160, 185), "pink"),
        ((60, 40, 28), "dark brown"),
        ((150, 195, 230), "light blue"),
    ],
)
def test_a_plain_colour_gets_its_everyday_name(rgb, name):
    found = name_colors(np.full((50, 3), rgb, np.uint8))
    assert [(colour.name, colour.share) for colour in found] == [(name, 1.0)]


def test_a_grey_photo_is_described_in_greys_only():
    grey = np.random.default_rng(0).integers(0, 256, (3000, 1), np.uint8).repeat(3, axis=1)
    assert {colour.family for colour in name_colors(grey)} <= {"black", "grey", "white"}


def test_two_colours_are_told_with_their_shares():
    mask = box_mask(100, 100, 20, 20, 80, 80)
    photo = painted((220, 30, 30), mask)
    photo[20:80, 20:40] = (255, 255, 255)
    text = caption_of(photo, mask, "flag")
    assert "red and white" in text and "about two thirds red and a third white" in text


def test_shape_size_and_place_are_those_of_the_mask():
    upright = caption_of(painted((200, 0, 0), m := box_mask(100, 200, 10, 20, 16, 80)), m)
    assert "long, narrow, upright red strip" in upright and "rectangular" in upright and "left" in upright
    level = caption_of(painted((200, 0, 0), m := box_mask(100, 200, 20, 90, 180, 96)), m)
    assert "horizontal" in level and "at the bottom" in level
    ball = caption_of(painted((255, 255, 255), m := disc(100, 200, 175, 20, 12)), m, "ball")
    assert "round" in ball and "in the top right of the photo" in ball and "about two percent" in ball


def test_a_mask_in_pieces_or_with_a_hole_is_said_to_be():
    two = box_mask(100, 100, 10, 10, 30, 40) | box_mask(100, 100, 60, 10, 80, 40)
    assert "in two separate pieces" in caption_of(painted((0, 0, 200), two), two)
    ring = disc(100, 100, 50, 50, 40) & ~disc(100, 100, 50, 50, 18)
    assert "has an opening" in caption_of(painted((0, 0, 200), ring), ring)


def test_stripes_are_found_with_their_direction():
    mask = box_mask(120, 120, 10, 10, 110, 110)
    photo = painted((250, 250, 250), mask)
    photo[10:110, 10:110][:, (np.arange(100) // 5) % 2 == 0] = (20, 20, 20)
    assert "up and down" in caption_of(photo, mask, "zebra", choice=0)
    assert "across" in caption_of(np.ascontiguousarray(photo.transpose(1, 0, 2)), mask.T, "zebra", choice=0)


def test_without_a_category_it_never_guesses_one():
    mask = disc(80, 80, 40, 40, 20)
    assert "A yellow disc " in caption_of(painted((250, 220, 60), mask), mask)


@pytest.mark.parametrize(
    "mask",
    [
        box_mask(40, 60, 0, 0, 1, 1),
        box_mask(40, 60, 59, 39, 60, 40),
        box_mask(40, 60, 0, 0, 60, 40),
        box_mask(40, 60, 0, 20, 60, 21),
        box_mask(40, 60, 30, 0, 31, 40),
        box_mask(1, 1, 0, 0, 1, 1),
        np.eye(40, dtype=bool),
        np.indices((40, 60)).sum(axis=0) % 2 == 0,
    ],
    ids=[
        "corner pixel",
        "last pixel",
        "whole photo",
        "row",
        "column",
        "1x1 photo",
        "diagonal",
        "checkerboard",
    ],
)
def test_any_mask_with_a_pixel_gets_a_caption(mask):
    for choice in range(3):
        text = caption_of(painted((10, 200, 90), mask), mask, "kite", choice)
        assert clean(text, Text()).keep, text


def test_an_empty_mask_gets_none():
    assert measure_region(np.zeros((5, 5, 3), np.uint8), rle.from_mask(np.zeros((5, 5), bool)).rle) is None


def test_a_hair_in_a_huge_photo_does_not_vanish():
    mask = box_mask(MAX_SIDE * 12, MAX_SIDE * 12, 700, 0, 701, MAX_SIDE * 12)
    text = caption_of(painted((220, 30, 30), mask), mask, "kite")
    assert "long, narrow, upright" in text


@pytest.mark.parametrize(
    ("category", "start"),
    [
        ("umbrella", "A red umbrella"),
        ("grass", "Red grass"),
        ("skis", "Red skis"),
        ("sky", "The red sky"),
        ("bus", "A red bus"),
        ("tv", "A red TV"),
        ("cabinet or shelf", "A red cabinet or shelf"),
        (None, "A red disc"),
    ],
)
def test_articles_fit_the_noun(category, start):
    mask = disc(60, 60, 30, 30, 12)
    assert caption_of(painted((200, 0, 0), mask), mask, category).startswith(start + " ")


def test_articles_fit_the_sound_of_the_next_word():
    mask = disc(60, 60, 30, 30, 12)
    assert caption_of(painted((240, 140, 40), mask), mask).startswith("An orange disc ")


def test_plural_categories_get_plural_verbs():
    mask = disc(60, 60, 30, 30, 12)
    text = caption_of(painted((200, 0, 0), mask), mask, "scissors")
    assert "They are" in text and "It " not in text


def test_every_known_category_can_be_spoken_of():
    seen = measure_region(painted((200, 0, 0), m := disc(60, 60, 30, 30, 12)), rle.from_mask(m).rle)
    assert seen is not None
    for category in load_categories(None).by_id.values():
        assert clean(describe_appearance(seen, category.name), Text()).keep


def test_live_regions_get_captions_in_their_order_and_dropped_ones_none(tmp_path):
    photo = painted((220, 30, 30), left := box_mask(60, 80, 0, 20, 20, 40))
    right = box_mask(60, 80, 60, 20, 80, 40)
    photo[right] = (30, 60, 190)
    Image.fromarray(photo).save(tmp_path / "a.png")
    regions = [Region(id=i, rle=rle.from_mask(m).rle) for i, m in enumerate([left, left, right])]
    regions[1].drop = Drop("usable_masks", Reason.MASK_DUPLICATE)
    image = ImageRecord("a", "sa1b", Blob(str(tmp_path / "a.png")), 80, 60, regions=regions)
    first, second = ClassicalCaptioner().caption([image, image])
    assert first == second and len(first) == 2
    assert "red" in str(first[0]) and "blue" in str(first[1])


def test_an_image_without_live_regions_is_not_even_read():
    image = ImageRecord("a", "sa1b", Blob("/nowhere.jpg"), 8, 8)
    assert ClassicalCaptioner().caption([image]) == [[]]


@pytest.mark.parametrize("subset", ["coconut", "sa1b"])
@pytest.mark.soak(keep=1)
def test_captions_of_the_sample_are_prose_without_repetition(subset):
    source = open_source(sample_config(), subset)
    images = [source.read(entry, Limits()) for entry in source.catalog()]
    captions = [text for row in ClassicalCaptioner().caption(images) for text in row]
    assert len(captions) == sum(len(image.live()) for image in images) > 0
    for text in captions:
        assert text is not None and clean(text, Text()).keep, text
        assert 12 <= len(text.split()) <= 70, text
        assert not re.search(r"\b(a [aeio]|an [bcdfgj-np-tv-z]|reachs)|  | ,|\.\.", text), text


def test_the_sample_is_described_truly():
    source = open_source(sample_config(), "coconut")
    images = {entry.key: source.read(entry, Limits()) for entry in source.catalog()}
    captions = {key: str(ClassicalCaptioner().caption([image])[0][0]) for key, image in images.items()}
    assert "orange flower" in captions["flower"] or "orange and" in captions["flower"]
    assert "round outline" in captions["flower"] or "round shape" in captions["flower"]
    assert "brown cat" in captions["chelsea"]
    assert "upright" in captions["rocket"] and "red cup" in captions["coffee"]


@pytest.mark.soak
def test_captions_of_published_masks_are_prose():
    folder = shared_data("gar_bench_open")
    for row in json.loads((folder / "annotations.json").read_text()):
        regions = [
            Region(
                id=i, rle=rle.check(r["mask_rle"]["counts"], r["mask_rle"]["size"]).rle, category=r["name"]
            )
            for i, r in enumerate(row["regions"])
        ]
        path = str(folder / "images" / row["file_name"])
        image = ImageRecord("x", "coconut", Blob(path), row["width"], row["height"], regions=regions)
        for text, region in zip(ClassicalCaptioner().caption([image])[0], regions, strict=True):
            assert text is not None and clean(text, Text()).keep, text
            assert str(region.category) in text.lower()


def test_its_identity_names_its_version_and_opencv():
    assert set(ClassicalCaptioner.identity()) == {"version", "opencv"}
