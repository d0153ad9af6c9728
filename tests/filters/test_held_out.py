"""Which images are held out: copies of a photo together, more with a larger share, always the same ones."""

import pytest

from paracaption.filters.held_out import is_held_out, is_in

KEYS = [f"{number:012d}" for number in range(20_000)]
HELD_OUT = ["000000000003", "000000000020", "000000000022"]
"""Of the first 40, with a share of a tenth. Corpora that were published rest on it."""


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_about_as_many_images_are_held_out_as_the_share_says(share):
    found = sum(is_held_out(key, share) for key in KEYS)
    spread = (len(KEYS) * share * (1 - share)) ** 0.5
    assert abs(found - len(KEYS) * share) < 4 * spread


def test_a_larger_share_holds_out_those_of_a_smaller_one_and_none_holds_out_none():
    small, large = ({key for key in KEYS if is_held_out(key, share)} for share in (0.05, 0.1))
    assert small < large
    assert not any(is_held_out(key, 0.0) for key in KEYS)


@pytest.mark.parametrize("copy", ["{}-dup2", "{}-dup13", "COCO_train2014_{}", "COCO_val2014_{}-dup2"])
def test_copies_of_a_photo_are_in_one_split(copy):
    assert all(is_held_out(copy.format(key), 0.3) == is_held_out(key, 0.3) for key in KEYS[:500])


def test_what_is_held_out_stays_so_in_every_release():
    assert [key for key in KEYS[:40] if is_held_out(key, 0.1)] == HELD_OUT


def test_each_image_is_in_one_of_both_splits_and_in_all():
    for key in KEYS[:200]:
        assert is_in("train", key, 0.3) != is_in("held_out", key, 0.3)
        assert is_in("all", key, 0.3) and is_in("train", key, 0.0)
