"""RLEs: equal to pycocotools' byte for byte, and no foreign one is trusted."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pycocotools import mask as coco

from paracaption.filters import rle
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.reasons import Reason
from tests.shared_data import shared_data

LABELS = st.sampled_from([0, 1, 2, 255, 256, 65_536, 2**24 - 1, 2**32 - 1])


@st.composite
def label_maps(draw):
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    small = draw(npst.arrays(np.uint32, shape, elements=LABELS, fill=LABELS))
    return np.repeat(np.repeat(small, draw(st.sampled_from([1, 7])), 0), draw(st.sampled_from([1, 13])), 1)


def expected(mask):
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = tuple(int(edge) for edge in coco.toBbox(encoded))
    return encoded["counts"].decode(), tuple(encoded["size"]), int(coco.area(encoded)), box


@given(label_maps())
@settings(max_examples=300, deadline=None)
@pytest.mark.soak
def test_every_segment_of_a_label_map_is_what_pycocotools_encodes(labels):
    masks = rle.encode_label_map(labels)
    assert list(masks) == np.unique(labels).tolist()
    for label, mask in masks.items():
        assert (mask.rle.counts, mask.rle.size, mask.area, mask.bbox) == expected(labels == label)
        assert rle.from_mask(labels == label) == mask
        assert (rle.decode(mask.rle) == (labels == label)).all()


@given(label_maps())
@settings(max_examples=150, deadline=None)
def test_a_canonical_rle_passes_the_check_unchanged_in_each_form(labels):
    masks = list(rle.encode_label_map(labels).values())
    packed = [rle.to_coco(mask.rle) for mask in masks]
    plain = [{"size": m.rle.size, "counts": rle.to_counts(m.rle).tolist()} for m in masks]
    text = [{"size": m.rle.size, "counts": m.rle.counts} for m in masks]
    for given_form in (packed, plain, text):
        assert rle.check_all(given_form, *labels.shape) == masks


@given(st.binary(max_size=200), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_a_mask_of_exactly_the_image_or_a_bad_record(data, height, width):
    try:
        mask = rle.check(data, [height, width])
    except BadRecord as error:
        assert error.reason in (Reason.MASK_UNDECODABLE, Reason.MASK_EMPTY)
    else:
        assert rle.decode(mask.rle).sum() == mask.area > 0


@given(label_maps(), st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.soak
def test_a_damaged_rle_never_reaches_pycocotools_unless_it_fills_its_image(labels, data):
    counts = bytearray(next(iter(rle.encode_label_map(labels).values())).rle.counts.encode())
    place = data.draw(st.integers(0, len(counts) - 1))
    counts[place] = data.draw(st.integers(0, 255))
    found = rle.check_all([{"size": list(labels.shape), "counts": bytes(counts)}], *labels.shape)[0]
    if isinstance(found, rle.Mask):
        assert rle.to_counts(found.rle).sum() == labels.size
        assert coco.area(rle.to_coco(found.rle)) == rle.decode(found.rle).sum()


def test_one_bad_mask_does_not_touch_its_neighbours():
    good = rle.encode_label_map(np.eye(6, dtype=np.uint32))[1]
    sources = [rle.to_coco(good.rle), {"size": [6, 6], "counts": "~~~"}, rle.to_coco(good.rle)]
    first, bad, last = rle.check_all(sources, 6, 6)
    assert first == last == good
    assert isinstance(bad, BadRecord) and bad.reason == Reason.MASK_UNDECODABLE


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [4, 6], "counts": [12, 12]}, Reason.SIZE_MISMATCH),
        ({"size": [6, 4], "counts": ""}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": [24]}, Reason.MASK_EMPTY),
        ({"size": [6, 4], "counts": [12, 11]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": [12, 13]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": [30, -6]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": [True, 23]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": [10**30, 1]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": "0" * 100 + "o"}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": "o" * 40 + "0"}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": "é"}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": 7}, Reason.MASK_UNDECODABLE),
        ({"size": [6.5, 4], "counts": [12, 12]}, Reason.MASK_UNDECODABLE),
        ({"size": ["6", "x"], "counts": [12, 12]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4, 1], "counts": [12, 12]}, Reason.MASK_UNDECODABLE),
        ({"size": {"h": 6, "w": 4}, "counts": [12, 12]}, Reason.MASK_UNDECODABLE),
        ({"size": ["4", "6"], "counts": [12, 12]}, Reason.SIZE_MISMATCH),
        ({"counts": [12, 12]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": [12.5, 11.5]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": ["12", "x"]}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": "12 11"}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": "[12 ... 12]"}, Reason.MASK_UNDECODABLE),
        ({"size": [6, 4], "counts": "b'<<"}, Reason.MASK_UNDECODABLE),
        ('{"size": [6, 4]', Reason.MASK_UNDECODABLE),
        ([{"size": [6, 4], "counts": "<<"}] * 2, Reason.MASK_UNDECODABLE),
        ({"size": None, "counts": [12, 12]}, Reason.MASK_UNDECODABLE),
        (None, Reason.MASK_UNDECODABLE),
        ("text", Reason.MASK_UNDECODABLE),
        ([], Reason.MASK_UNDECODABLE),
        ([[0, 0, 1]], Reason.MASK_UNDECODABLE),
        ([[0, 0, 3, 0, 3, 4, 1]], Reason.MASK_UNDECODABLE),
        ([[0, 0, 3, 4]], Reason.MASK_UNDECODABLE),
        ([[0, 0], [3, 4]], Reason.MASK_UNDECODABLE),
        ([[0, 0, "a", 0, 3, 4]], Reason.MASK_UNDECODABLE),
        ([[0, 0, 3, 0, 3, 4], "text"], Reason.MASK_UNDECODABLE),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], Reason.MASK_UNDECODABLE),
        ([[0, 0, float("nan"), 0, 2, 2]], Reason.MASK_UNDECODABLE),
    ],
)
def test_each_kind_of_garbage_has_its_reason(segmentation, reason):
    found = rle.check_all([segmentation], 6, 4)[0]
    assert isinstance(found, BadRecord) and found.reason == reason, found


RING = [0, 1, 3, 1, 3, 5, 0, 5]
HALF = {"size": [6, 4], "counts": "<<"}


@pytest.mark.parametrize(
    ("odd", "same"),
    [
        ({"size": [6.0, 4.0], "counts": "<<"}, HALF),
        ({"size": ["6", " 4.0 "], "counts": "<<"}, HALF),
        ({"size": [6, 4], "counts": [12.0, 12.0]}, HALF),
        ({"size": [6, 4], "counts": ["12", "12.0"]}, HALF),
        ({"size": [6, 4], "counts": "12 12"}, HALF),
        ({"size": [6, 4], "counts": "12, 12"}, HALF),
        ({"size": [6, 4], "counts": "[12. 12.]"}, HALF),
        ({"size": [6, 4], "counts": "[ 12,\n12 ]"}, HALF),
        ({"size": [6, 4], "counts": " <<\n"}, HALF),
        ({"size": [6, 4], "counts": "b'<<'"}, HALF),
        ({"size": [6, 4], "counts": 'b"<<"'}, HALF),
        (' {"size": [6, 4], "counts": "<<"}', HALF),
        ([HALF], HALF),
        (RING, [RING]),
        (list(map(str, RING)), [RING]),
        ([[[0, 1], [3, 1], [3, 5], [0, 5]]], [RING]),
        ([[0, 1], [3, 1], [3, 5], [0, 5]], [RING]),
        ([[[0, 1], [3, 1], [3, 5], [0, 5]], [1, 1, 2, 1, 2, 2]], [RING, [1, 1, 2, 1, 2, 2]]),
        (json.dumps([RING]), [RING]),
        ([RING, [1, 1]], [RING]),
        ([RING, []], [RING]),
    ],
)
def test_a_mask_in_another_writing_is_the_same_mask(odd, same):
    found, wanted = rle.check_all([odd, same], 6, 4)
    assert isinstance(wanted, rle.Mask) and found == wanted


def test_a_backslash_that_python_printed_twice_is_one():
    mask = rle.from_mask(np.pad(np.ones((44, 60)), ((4, 48), (4, 64))))
    assert "\\" in mask.rle.counts
    assert rle.check_all([{"size": [96, 128], "counts": repr(mask.rle.counts.encode())}], 96, 128) == [mask]


def test_text_that_is_nearly_run_lengths_costs_no_time():
    found = rle.check_all([{"size": [6, 4], "counts": "1  ,  " * 20_000 + "x"}], 6, 4)[0]
    assert isinstance(found, BadRecord)


def test_a_swapped_size_is_named_as_such():
    found = rle.check_all([{"size": [4, 6], "counts": [12, 12]}], 6, 4)[0]
    assert "swapped" in str(found)


def test_an_rle_with_runs_of_length_zero_becomes_canonical_with_the_same_pixels():
    mask = rle.check([2, 3, 0, 1, 4, 0, 14], [6, 4])
    assert rle.to_counts(mask.rle).tolist() == [2, 4, 18]
    assert (mask.area, mask.bbox) == (4, (0, 2, 1, 4))


def test_a_polygon_is_what_pycocotools_makes_of_it():
    ring = [1, 1, 8, 1, 8, 6, 1, 6]
    mask = rle.check_all([[ring]], 10, 12)[0]
    assert isinstance(mask, rle.Mask)
    assert mask.rle.counts == coco.frPyObjects([ring], 10, 12)[0]["counts"].decode()


def test_no_masks_are_no_work():
    assert rle.check_all([], 5, 5) == []
    assert rle.iou([], []).shape == (0, 0)


def test_iou_is_over_the_union_or_over_the_first():
    small = rle.from_mask(np.pad(np.ones((2, 2)), ((0, 2), (0, 2))))
    whole = rle.from_mask(np.ones((4, 4)))
    assert rle.iou([small.rle], [whole.rle])[0, 0] == 0.25
    assert rle.iou([small.rle], [whole.rle], over_first=True)[0, 0] == 1.0


def test_the_113_published_sa1b_masks_pass_unchanged_with_their_published_areas():
    published = json.loads(shared_data("sa1b_real/sa_226381.json").read_text())["annotations"]
    found = rle.check_all([each["segmentation"] for each in published], 1500, 2000)
    for each, mask in zip(published, found, strict=True):
        assert isinstance(mask, rle.Mask)
        assert (mask.rle.counts, mask.area) == (each["segmentation"]["counts"], each["area"])
        x, y, width, height = each["bbox"]  # published as x, y, width - 1, height - 1
        assert mask.bbox == (x, y, width + 1, height + 1)


@pytest.mark.parametrize(
    "rings", [[[1, 1, 8, 1, 8, 6, 1, 6], [2, 7, 5, 9]], [[-3, -2.5, 15, 1, 8, 14, 1, 6]]]
)
def test_short_second_rings_and_points_outside_are_what_pycocotools_makes_of_them(rings):
    mask = rle.check_all([rings], 10, 12)[0]
    assert isinstance(mask, rle.Mask)
    assert mask.rle.counts == coco.merge(coco.frPyObjects(rings, 10, 12))["counts"].decode()
