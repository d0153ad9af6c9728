import numpy as np
import pytest

from paracaption.filters import rle
from paracaption.pipeline.io import draw, figure
from paracaption.pipeline.io.draw import Overlay
from paracaption.schemas.records import Rle

PHOTO = np.full((120, 160, 3), 128, np.uint8)


def box(x: int, y: int, w: int, h: int, size: tuple[int, int] = (120, 160)) -> Rle:
    mask = np.zeros(size, bool)
    mask[y : y + h, x : x + w] = True
    return rle.from_mask(mask).rle


def test_a_mask_is_painted_where_it_is_and_nowhere_else():
    picture = np.asarray(draw.draw_masks(PHOTO, [Overlay(box(20, 20, 60, 60), "a")], side=640))
    assert picture.shape == (480, 640, 3)
    assert (picture[400:, 500:] == 128).all()
    inside = picture[100, 100].astype(float)
    wanted = 128 * 0.62 + np.array(draw.PALETTE[0]) * 0.38
    assert np.abs(inside - wanted).max() <= 2


def test_a_smaller_mask_is_painted_over_the_larger_one_whatever_the_order():
    marks = [
        Overlay(box(60, 40, 20, 20), "small", color=(255, 0, 0)),
        Overlay(box(0, 0, 100, 100), "large", color=(0, 0, 255)),
    ]
    pixel = np.asarray(draw.draw_masks(PHOTO, marks, side=640))[45 * 4, 65 * 4]
    assert pixel[0] > pixel[2]


def test_the_number_stands_inside_its_mask_even_of_a_ring():
    ring = np.zeros((400, 400), bool)
    ring[50:350, 50:350] = True
    ring[100:300, 100:300] = False
    cv2 = pytest.importorskip("cv2")
    x, y = draw._inside(ring, [], 20, cv2)
    assert ring[y, x]
    again = draw._inside(ring, [(x, y)], 20, cv2)
    assert ring[again[1], again[0]] and max(abs(again[0] - x), abs(again[1] - y)) > 20


def test_a_mask_of_another_size_is_an_error_that_says_both():
    with pytest.raises(ValueError, match="mask is 100x100, photo 160x120"):
        draw.draw_image(PHOTO, [Overlay(box(0, 0, 5, 5, (100, 100)), "a")])


@pytest.mark.parametrize("marks", [[], [Overlay(rle.from_mask(np.zeros((120, 160), bool)).rle, "nothing")]])
def test_no_mask_and_an_empty_mask_are_drawn_as_the_photo_alone(marks):
    assert (np.asarray(draw.draw_masks(PHOTO, marks, side=160)) == 128).all()


def test_a_mask_of_one_pixel_is_visible_on_a_photo_that_is_shrunk():
    photo = np.zeros((2000, 3000, 3), np.uint8)
    picture = np.asarray(
        draw.draw_masks(photo, [Overlay(box(1500, 1000, 1, 1, (2000, 3000)), "dot")], side=300)
    )
    assert picture.any()


@pytest.mark.soak
def test_captions_stand_beside_the_photo_and_below_it_when_there_are_many():
    few = draw.draw_image(PHOTO, [Overlay(box(0, 0, 50, 50), "a cat")], side=600)
    assert few.width > 600 and few.height == 450
    many = draw.draw_image(
        PHOTO, [Overlay(box(i, 0, 5, 50), "a cat on a mat " * 9) for i in range(40)], side=900
    )
    assert many.width == 900 and many.height > 900
    wide = draw.draw_image(PHOTO[:30], [Overlay(box(0, 0, 5, 5, (30, 160)), "a cat")], side=900)
    assert wide.width == 900


@pytest.mark.parametrize(
    "caption", ["", "word " * 400, "x" * 3000, "tabs\tand\nlines", "кошка 猫 🐈", "<b>&amp;"]
)
@pytest.mark.soak(keep=1)
def test_any_caption_can_be_drawn(caption):
    picture = draw.draw_image(PHOTO, [Overlay(box(0, 0, 50, 50), caption, caption)], title=caption or "key")
    assert picture.height >= 100


def test_every_line_fits_its_room_and_no_word_is_lost():
    face = draw.load_font(17)
    text = "a plain caption with a_very_long_name_that_fits_no_line_at_all_by_itself and an end"
    lines = draw._wrap(text, face, 200)
    assert all(face.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_all_colours_differ_also_to_eyes_that_lack_a_cone():
    """CIELAB distances under Machado's matrices for protan, deutan, tritan vision; 2.3 is just noticeable."""
    cv2 = pytest.importorskip("cv2")
    kinds = (
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    )
    outcomes = [tuple(bytes.fromhex(color[1:])) for color in (figure.KEPT, figure.DROPPED)]
    linear = (np.array([*draw.PALETTE, *outcomes]) / 255) ** 2.2
    for matrix in map(np.array, kinds):
        seen = (np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)).astype(np.float32)
        lab = cv2.cvtColor(seen[None], cv2.COLOR_RGB2LAB)[0]
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + np.eye(len(lab)) * 999
        assert apart.min() > 15


@pytest.mark.soak
def test_the_same_image_is_drawn_the_same():
    marks = [Overlay(box(10 * i, 10, 30, 60), f"region {i}") for i in range(5)]
    first, second = (draw.draw_image(PHOTO, marks).tobytes() for _ in range(2))
    assert first == second


def test_a_dropped_mask_is_striped_and_dashed_so_that_it_is_told_from_a_kept_one_in_gray_too():
    pictures = [
        np.asarray(draw.draw_masks(PHOTO, [Overlay(box(20, 20, 80, 80), "a", dropped=dropped)], side=640))
        for dropped in (False, True)
    ]
    inside = [picture[100:150, 100:150].mean(axis=2).round().astype(int) for picture in pictures]
    assert len(np.unique(inside[0])) == 1 and (inside[1] == 128).any() and (inside[1] != 128).any()
    edges = [picture[80, 90:390].mean(axis=1) for picture in pictures]
    assert len(np.unique(edges[0].round())) == 1 and (edges[1].round() == 128).any()


@pytest.mark.soak
def test_a_number_of_its_own_stands_in_the_legend_as_in_the_picture(monkeypatch):
    drawn: list[int] = []
    monkeypatch.setattr(draw, "draw_disc", lambda canvas, place, radius, number, *rest: drawn.append(number))
    draw.draw_image(PHOTO, [Overlay(box(0, 0, 50, 50), "a", number=7), Overlay(box(60, 0, 50, 50), "b")])
    assert sorted(drawn) == [2, 2, 7, 7]
