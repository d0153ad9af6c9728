from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from paracaption.filters import masks
from paracaption.filters.verdict import Verdict
from paracaption.schemas.config import Masks
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Region, Rle

SIZE = (20, 30)
ANY_SIZE = Masks(min_area_px=0)


def region(id_: int, pixels: np.ndarray, **scores: float) -> Region:
    code = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return Region(id=id_, rle=Rle(pixels.shape, code["counts"].decode()), source_scores=scores)


def box(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    pixels = np.zeros(size, bool)
    pixels[top:bottom, left:right] = True
    return pixels


def regions_of(*pixels: np.ndarray) -> list[Region]:
    return [region(number, mask) for number, mask in enumerate(pixels)]


def reasons(verdicts: list[Verdict]) -> list[Reason | None]:
    return [verdict.reason for verdict in verdicts]


# Masks that often are equal, nested, tiled or empty: unions of two boxes whose corners lie on a coarse grid.
corner = st.sampled_from([0, 3, 4, 8, 12])
boxes = st.tuples(corner, corner, corner, corner).map(
    lambda c: box(min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]), (12, 12))
)
images = st.lists(st.tuples(boxes, boxes).map(lambda pair: pair[0] | pair[1]), max_size=40)


@given(images)
def test_shared_pixels_are_those_of_the_boolean_masks(pixels):
    overlaps = masks.measure_overlaps(regions_of(*pixels))
    found = {
        (min(a, b), max(a, b)): shared
        for a, b, shared in zip(*(values.tolist() for values in overlaps[1:]), strict=True)
    }
    wanted = {
        (a, b): int((pixels[a] & pixels[b]).sum())
        for a, b in combinations(range(len(pixels)), 2)
        if (pixels[a] & pixels[b]).any()
    }
    assert found == wanted
    assert len(overlaps.first) == len(wanted), "each pair once"


@given(images, st.sampled_from([0.3, 0.5, 0.9, 1.0]), st.sampled_from([0, 9, 30]), st.integers(0, 2))
def test_duplicates_are_those_of_a_plain_loop_over_boolean_masks(pixels, duplicate_iou, min_area_px, levels):
    config = Masks(duplicate_iou=duplicate_iou, min_area_px=min_area_px)
    quality = [(number * 7) % (levels + 1) / 2 for number in range(len(pixels))]
    regions = [region(i, mask, predicted_iou=quality[i]) for i, mask in enumerate(pixels)]
    kept: list[int] = []
    expected: dict[int, tuple[Reason | None, float]] = {}
    for i in sorted(range(len(pixels)), key=lambda i: (-quality[i], -pixels[i].sum(), i)):
        if pixels[i].sum() < min_area_px:
            expected[i] = (Reason.MASK_TOO_SMALL, -1)
            continue
        ious = [(pixels[i] & pixels[j]).sum() / max((pixels[i] | pixels[j]).sum(), 1) for j in kept]
        highest = max(ious, default=0.0)
        expected[i] = (Reason.MASK_DUPLICATE if highest >= duplicate_iou else None, highest)
        if highest < duplicate_iou:
            kept.append(i)
    verdicts = masks.usable(regions, (12, 12), config)
    assert {i: (v.reason, v.scores.get("duplicate_iou", -1)) for i, v in enumerate(verdicts)} == expected


@given(
    images, st.sampled_from([0.0, 0.2]), st.sampled_from([0.6, 0.9, 1.0]), st.sampled_from([0.5, 0.8, 1.0])
)
def test_occluded_masks_and_parts_are_those_of_painting_boolean_masks(pixels, visible_share, share, ratio):
    pixels = [mask for mask in pixels if mask.any()]
    config = Masks(
        min_visible_share=visible_share,
        part_container_share=share,
        part_max_area_ratio=ratio,
        container_max_image_share=0.7,
    )
    painted = np.full((12, 12), -1)
    top_first = sorted(range(len(pixels)), key=lambda i: (pixels[i].sum(), -i))
    for i in reversed(top_first):
        painted[pixels[i]] = i
    visible = [1 - (pixels[i] & (painted != i)).sum() / pixels[i].sum() for i in range(len(pixels))]
    seen = [i for i in top_first if visible[i] > visible_share]
    verdicts = masks.whole_objects(regions_of(*pixels), (12, 12), config)
    for i, verdict in enumerate(verdicts):
        assert verdict.scores["visible_share"] == visible[i]
        if i not in seen:
            assert verdict.reason is Reason.MASK_OCCLUDED
            continue
        inside = max(
            (
                (pixels[i] & pixels[j]).sum() / pixels[i].sum()
                for j in seen[seen.index(i) + 1 :]
                if pixels[i].sum() <= ratio * pixels[j].sum() and pixels[j].mean() <= 0.7
            ),
            default=0.0,
        )
        assert verdict.scores["container_share"] == inside
        assert verdict.reason is (Reason.MASK_PART if inside >= share else None)


@given(images, st.randoms())
def test_verdicts_do_not_depend_on_the_order_of_the_regions(pixels, random):
    regions = regions_of(*pixels)
    shuffled = random.sample(regions, len(regions))
    for judge in (masks.usable, masks.whole_objects):
        plain = dict(zip((r.id for r in regions), judge(regions, (12, 12), ANY_SIZE), strict=True))
        assert plain == dict(zip((r.id for r in shuffled), judge(shuffled, (12, 12), ANY_SIZE), strict=True))


@given(images)
def test_overlaps_measured_once_on_all_masks_serve_the_whole_chain(pixels):
    regions = regions_of(*pixels)
    overlaps = masks.measure_overlaps(regions)
    first = masks.usable(regions, (12, 12), ANY_SIZE, overlaps)
    assert first == masks.usable(regions, (12, 12), ANY_SIZE)
    live = [r for r, verdict in zip(regions, first, strict=True) if verdict.keep]
    shared = masks.whole_objects(live, (12, 12), ANY_SIZE, overlaps)
    assert shared == masks.whole_objects(live, (12, 12), ANY_SIZE)


def test_no_masks_no_verdicts():
    assert masks.usable([], SIZE, Masks()) == []
    assert masks.whole_objects([], SIZE, Masks()) == []


def test_small_masks_are_dropped_with_their_area():
    small, large = masks.usable(regions_of(box(0, 0, 3, 5), box(5, 5, 9, 9)), SIZE, Masks(min_area_px=16))
    assert small == Verdict(Reason.MASK_TOO_SMALL, "15 px, at least 16 needed")
    assert large.keep


def test_of_two_duplicates_the_one_with_the_better_score_stays_whatever_its_place_and_size():
    first = region(0, box(0, 0, 10, 10), predicted_iou=0.8, stability_score=0.99)
    second = region(1, box(0, 0, 10, 11), predicted_iou=0.9, stability_score=0.5)
    third = region(2, box(0, 0, 11, 11), predicted_iou=0.9, stability_score=0.4)
    config = Masks(min_area_px=0, duplicate_iou=0.8)
    verdicts = masks.usable([first, second, third], SIZE, config)
    assert reasons(verdicts) == [Reason.MASK_DUPLICATE, None, Reason.MASK_DUPLICATE]
    assert "region 1" in verdicts[0].detail and "region 1" in verdicts[2].detail
    assert verdicts[0].scores["duplicate_iou"] == pytest.approx(100 / 110)


def test_without_scores_the_larger_duplicate_stays_and_of_equals_the_first():
    config = Masks(min_area_px=0, duplicate_iou=0.8)
    smaller, larger, equal = box(0, 0, 10, 10), box(0, 0, 10, 11), box(0, 0, 10, 11)
    verdicts = masks.usable(regions_of(smaller, larger, equal), SIZE, config)
    assert reasons(verdicts) == [Reason.MASK_DUPLICATE, None, Reason.MASK_DUPLICATE]


def test_a_dropped_duplicate_is_not_an_original():
    # Each overlaps its neighbour enough, the outer two do not overlap each other enough.
    chain = [region(i, box(0, i, 10, i + 10), predicted_iou=1 - i / 10) for i in range(3)]
    verdicts = masks.usable(chain, SIZE, Masks(min_area_px=0, duplicate_iou=0.8))
    assert reasons(verdicts) == [None, Reason.MASK_DUPLICATE, None]
    assert verdicts[2].scores["duplicate_iou"] == pytest.approx(80 / 120)


def test_a_mask_too_small_is_not_an_original():
    tiny = region(0, box(0, 0, 3, 5), predicted_iou=0.9)
    same = region(1, box(0, 0, 4, 5), predicted_iou=0.1)
    verdicts = masks.usable([tiny, same], SIZE, Masks(min_area_px=16, duplicate_iou=0.7))
    assert reasons(verdicts) == [Reason.MASK_TOO_SMALL, None]


def test_a_mask_is_occluded_by_the_union_of_masks_of_which_none_covers_it_alone():
    whole, left, right = box(0, 0, 10, 10), box(0, 0, 10, 6), box(0, 5, 10, 10)
    verdicts = masks.whole_objects(regions_of(whole, left, right), SIZE, Masks())
    assert reasons(verdicts) == [Reason.MASK_OCCLUDED, None, None], "what tiled it is then no part of it"
    assert verdicts[0].scores == {"visible_share": 0.0}


def test_one_visible_pixel_is_not_complete_occlusion():
    left = box(0, 0, 10, 6)
    left[9, 0] = False
    verdicts = masks.whole_objects(regions_of(box(0, 0, 10, 10), left, box(0, 5, 10, 10)), SIZE, Masks())
    assert verdicts[0].keep
    assert verdicts[0].scores["visible_share"] == pytest.approx(0.01)


def test_covers_that_sum_to_the_area_but_overlap_each_other_do_not_occlude():
    whole, left, same = box(0, 0, 10, 10), box(0, 0, 10, 5), box(0, 0, 10, 5)
    verdicts = masks.whole_objects(regions_of(whole, left, same), SIZE, Masks(part_max_area_ratio=0.1))
    assert reasons(verdicts) == [None, Reason.MASK_OCCLUDED, None]
    assert verdicts[0].scores["visible_share"] == 0.5


def test_a_part_is_dropped_and_its_container_stays():
    verdicts = masks.whole_objects(regions_of(box(2, 2, 5, 5), box(0, 0, 10, 10)), SIZE, Masks())
    assert reasons(verdicts) == [Reason.MASK_PART, None]
    assert verdicts[0].detail == "1.000 inside region 1, has to be below 0.9"
    assert verdicts[0].scores == {"visible_share": 1.0, "container_share": 1.0}
    assert verdicts[1].scores == {"visible_share": pytest.approx(0.91), "container_share": 0.0}


def test_what_only_reaches_into_a_larger_mask_is_no_part():
    verdicts = masks.whole_objects(regions_of(box(2, 8, 5, 12), box(0, 0, 10, 10)), SIZE, Masks())
    assert verdicts[0].keep
    assert verdicts[0].scores["container_share"] == 0.5


def test_a_mask_almost_as_large_as_its_container_is_the_same_object_not_a_part():
    verdicts = masks.whole_objects(regions_of(box(0, 0, 9, 10), box(0, 0, 10, 10)), SIZE, Masks())
    assert reasons(verdicts) == [None, None]


def test_a_scene_has_objects_not_parts():
    scene = box(0, 0, 18, 25)
    config = Masks(container_max_image_share=scene.mean() - 0.01)
    assert reasons(masks.whole_objects(regions_of(box(2, 2, 5, 5), scene), SIZE, config)) == [None, None]
    config = Masks(container_max_image_share=scene.mean())
    verdicts = masks.whole_objects(regions_of(box(2, 2, 5, 5), scene), SIZE, config)
    assert reasons(verdicts) == [Reason.MASK_PART, None]


def test_parts_of_parts_are_parts():
    verdicts = masks.whole_objects(
        regions_of(box(0, 0, 10, 10), box(1, 1, 6, 6), box(2, 2, 4, 4)), SIZE, Masks()
    )
    assert reasons(verdicts) == [None, Reason.MASK_PART, Reason.MASK_PART]
    assert "region 0" in verdicts[2].detail, "of two containers with equal shares the lower id"


def test_masks_of_another_size_than_the_image_are_a_bug_not_a_silent_minus_one():
    with pytest.raises(AssertionError, match="size"):
        masks.usable(regions_of(box(0, 0, 9, 9)), (30, 20), ANY_SIZE)


def test_overlaps_of_other_regions_are_refused():
    with pytest.raises(AssertionError, match="other regions"):
        masks.usable(regions_of(box(0, 0, 9, 9)), SIZE, ANY_SIZE, masks.measure_overlaps([]))


def test_two_thousand_masks_are_compared_in_bounded_memory():
    import tracemalloc

    generator = np.random.default_rng(0)
    size = (1500, 2000)
    corners = (generator.random((2000, 2)) * (1460, 1960)).astype(int).tolist()
    shapes = np.array([[x, y, 40, 30] for y, x in corners], float)
    codes = coco.frPyObjects(shapes, *size)
    regions = [Region(id=i, rle=Rle(size, code["counts"].decode())) for i, code in enumerate(codes)]
    tracemalloc.start()
    verdicts = masks.usable(regions, size, Masks())
    verdicts = masks.whole_objects(regions, size, Masks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(verdicts) == 2000
    assert peak < 32 << 20, (
        "far below the 32 MB of one float64 matrix of all pairs, or any boolean mask array"
    )
