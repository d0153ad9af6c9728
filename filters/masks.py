"""Which masks of an image are worth a caption: large enough, seen once, visible, and whole objects.

All masks of one image are judged together and stay run-length encoded. What decides are the pixels that two
masks share; `measure_overlaps` counts them for every pair that has any. The cost grows with the pairs whose
boxes overlap, memory with the pairs that share a pixel.

Each filter judges the regions that it is given against each other and against nothing else, so give it the
live ones: a mask that was dropped before is then no duplicate's original, no occluder and no container.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from ..schemas.config import Masks
from ..schemas.reasons import Reason
from ..schemas.records import Region
from .verdict import Verdict

_ROWS = 16  # masks compared with the rest in one call: small enough to skip most of the rest by their boxes
_AREAS = 255  # pycocotools 2.0.11 with numpy 2 raises OverflowError if asked for the areas of more masks
_UNION = 32  # masks merged at once: keeps the union of k masks at about k / 32 merges with the growing union


class Overlaps(NamedTuple):
    """Every pair of masks that share a pixel, each pair once, in no particular order.

    Attributes:
        ids: ids of all regions that were compared.
        first, second: (P,) ids of the two regions.
        shared_px: (P,) int64, pixels in both masks; exact.
    """

    ids: frozenset[int]
    first: np.ndarray
    second: np.ndarray
    shared_px: np.ndarray


def measure_overlaps(regions: Sequence[Region]) -> Overlaps:
    """Count the shared pixels of every pair. The masks must be of one size (an `assert` in the filters)."""
    coco = _coco()
    ids = np.array([region.id for region in regions], np.int64)
    codes = [_code(region) for region in regions]
    area = _areas(codes)
    x, y, width, height = coco.toBbox(codes).T if codes else np.zeros((4, 0))
    by_x = np.argsort(x, kind="stable")
    firsts, seconds, counts = [], [], []
    for start in range(0, len(codes), _ROWS):
        rows = by_x[start : start + _ROWS]
        rest = by_x[start:]
        near = (x[rest] < (x + width)[rows].max()) & (y[rest] < (y + height)[rows].max())
        near &= (y + height)[rest] > y[rows].min()
        near[: len(rows)] = True  # so that a row's own column is the one of its number
        columns = rest[near]
        # With iscrowd, `iou` is the intersection over the first mask's area.
        shares = coco.iou([codes[i] for i in rows], [codes[i] for i in columns], [1] * len(columns))
        row, column = np.nonzero(np.triu(shares, k=1))
        firsts.append(rows[row])
        seconds.append(columns[column])
        counts.append(np.rint(shares[row, column] * area[rows[row]]).astype(np.int64))
    if not codes:
        nothing = np.zeros(0, np.int64)
        return Overlaps(frozenset(), nothing, nothing, nothing)
    return Overlaps(
        frozenset(ids.tolist()),
        ids[np.concatenate(firsts)],
        ids[np.concatenate(seconds)],
        np.concatenate(counts),
    )


def usable(
    regions: Sequence[Region], size: tuple[int, int], config: Masks, overlaps: Overlaps | None = None
) -> list[Verdict]:
    """Drop masks that are too small, and masks that repeat a better one. One verdict per region, in order.

    Masks are gone through from the best to the worst: the publisher's `predicted_iou` (SAM's own suppression
    goes by it), then `stability_score`, then the larger mask (it lost nothing of the object), then the lower
    id (so that nothing else decides). One that has an IoU of at least `duplicate_iou` with a mask *kept*
    before it is dropped. Regions without published scores (COCONut) thus rank by area.

    Args:
        regions: live regions of one image.
        size: (height, width) of the image in pixels.
        config: thresholds.
        overlaps: of these regions or more of the same image, if the caller has them.

    Returns:
        Verdicts with the score `duplicate_iou` for every mask that is large enough.
    """
    codes = _codes(regions, size)
    area = _areas(codes)
    large = area >= config.min_area_px
    if overlaps is None:
        overlaps = measure_overlaps([region for region, fits in zip(regions, large, strict=True) if fits])
    takes_part = [region.id if fits else None for region, fits in zip(regions, large, strict=True)]
    first, second, shared_px = _among(takes_part, overlaps)

    rank = np.empty(len(regions), np.int64)
    rank[sorted(range(len(regions)), key=lambda i: _quality(regions[i], int(area[i])))] = np.arange(
        len(regions)
    )
    swap = rank[first] > rank[second]
    better, worse = np.where(swap, second, first), np.where(swap, first, second)
    iou = shared_px / (area[first] + area[second] - shared_px)
    original = _originals(rank, better, worse, iou, config.duplicate_iou)

    kept = np.ones(len(regions), bool)
    kept[list(original)] = False
    highest = np.zeros(len(regions))
    np.maximum.at(highest, worse, np.where(kept[better], iou, 0))

    verdicts = []
    for i in range(len(regions)):
        scores = {"duplicate_iou": float(highest[i])}
        if not large[i]:
            detail = f"{area[i]} px, at least {config.min_area_px} needed"
            verdicts.append(Verdict(Reason.MASK_TOO_SMALL, detail))
        elif i in original:
            share, other = original[i]
            limit = f"has to be below {config.duplicate_iou:g}"
            detail = f"IoU {share:.3f} with region {regions[other].id}, {limit}"
            verdicts.append(Verdict(Reason.MASK_DUPLICATE, detail, scores))
        else:
            verdicts.append(Verdict(scores=scores))
    return verdicts


def _originals(
    rank: np.ndarray, better: np.ndarray, worse: np.ndarray, iou: np.ndarray, duplicate_iou: float
) -> dict[int, tuple[float, int]]:
    """The masks to drop as duplicates -> (IoU, the mask that they repeat most, which is kept).

    Args:
        rank: (N,) 0 is the best mask.
        better: (P,) the better mask of each overlapping pair.
        worse: (P,) the other one.
        iou: (P,) of the pair.
        duplicate_iou: pairs below it are no duplicates.
    """
    original: dict[int, tuple[float, int]] = {}
    close = np.flatnonzero(iou >= duplicate_iou)
    for pair in close[np.lexsort((rank[better[close]], rank[worse[close]]))].tolist():
        if int(better[pair]) in original:
            continue  # was dropped itself, hence repeats nothing
        found = original.setdefault(int(worse[pair]), (float(iou[pair]), int(better[pair])))
        if iou[pair] > found[0]:
            original[int(worse[pair])] = (float(iou[pair]), int(better[pair]))
    return original


def whole_objects(
    regions: Sequence[Region], size: tuple[int, int], config: Masks, overlaps: Overlaps | None = None
) -> list[Verdict]:
    """Drop masks that are completely occluded, then parts of larger objects. A verdict per region, in order.

    SA-1B has no depth order, so a smaller mask counts as lying on top of a larger one (of two equal ones, the
    one with the higher id). This is how nested masks are painted, and the only order by area under which a
    small object on a large one is not hidden by it.

    A mask is *occluded* if no more than `min_visible_share` of it is outside the union of the masks on top of
    it. So an object that other masks tile without a gap is dropped, and they stay.

    A mask is a *part* if at least `part_container_share` of it lies inside one container: a mask that is not
    occluded, is larger (the part has at most `part_max_area_ratio` of its area) and is an object (it covers
    at most `container_max_image_share` of the image). SAM's masks leave out what stands in front of an
    object, so what lies inside a mask belongs to it. A container may itself be a part of another.

    Args:
        regions: live regions of one image, without duplicates.
        size: (height, width) of the image in pixels.
        config: thresholds.
        overlaps: of these regions or more of the same image, if the caller has them.

    Returns:
        Verdicts with the scores `visible_share` (exact) and, for visible masks, `container_share`.
    """
    codes = _codes(regions, size)
    area = _areas(codes)
    ids = np.array([region.id for region in regions], np.int64)
    first, second, shared_px = _among(ids.tolist(), overlaps or measure_overlaps(regions))
    depth = np.empty(len(regions), np.int64)  # 0: on top
    depth[np.lexsort((-ids, area))] = np.arange(len(regions))
    swap = depth[first] > depth[second]
    top, below = np.where(swap, second, first), np.where(swap, first, second)

    visible = 1 - _covered_px(codes, area, top, below, shared_px) / np.maximum(area, 1)
    occluded = visible <= config.min_visible_share

    height, width = size
    contained = ~occluded[top] & ~occluded[below]
    contained &= area[top] <= config.part_max_area_ratio * area[below]
    contained &= area[below] <= config.container_max_image_share * height * width
    inside = np.where(contained, shared_px / np.maximum(area[top], 1), 0)
    share, container = _find_containers(ids, top[contained], below[contained], inside[contained])

    verdicts = []
    for i in range(len(regions)):
        scores = {"visible_share": float(visible[i])}
        if occluded[i]:
            detail = f"{visible[i]:.3f} visible, more than {config.min_visible_share:g} needed"
            verdicts.append(Verdict(Reason.MASK_OCCLUDED, detail, scores))
            continue
        scores["container_share"] = float(share[i])
        if i in container and share[i] >= config.part_container_share:
            limit = f"has to be below {config.part_container_share:g}"
            detail = f"{share[i]:.3f} inside region {container[i]}, {limit}"
            verdicts.append(Verdict(Reason.MASK_PART, detail, scores))
        else:
            verdicts.append(Verdict(scores=scores))
    return verdicts


def _find_containers(
    ids: np.ndarray, top: np.ndarray, below: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, dict[int, int]]:
    """The largest share of each mask inside one container, and which that is (of several, the lowest id).

    Args:
        ids: (N,) ids of the regions.
        top: (P,) a mask.
        below: (P,) its possible container.
        inside: (P,) share of the mask inside the container.

    Returns:
        (N,) shares, 0 without a container; and mask -> id of its container.
    """
    share = np.zeros(len(ids))
    np.maximum.at(share, top, inside)
    container: dict[int, int] = {}
    for pair in np.flatnonzero(inside == share[top]).tolist():
        part, other = int(top[pair]), int(ids[below[pair]])
        container[part] = min(other, container.get(part, other))
    return share, container


def _covered_px(
    codes: list[dict[str, Any]], area: np.ndarray, top: np.ndarray, below: np.ndarray, shared_px: np.ndarray
) -> np.ndarray:
    """(N,) pixels of each mask under the union of the masks on top of it. Exact.

    For a mask with one mask on top their intersection is the answer; only for the others is a union built.
    """
    count = np.bincount(below, minlength=len(codes))
    covered = np.bincount(below, shared_px, len(codes)).astype(np.int64)
    by_mask = np.lexsort((top, -shared_px, below))  # the largest covers first: a hidden mask is soon known
    ends = np.cumsum(count)
    for i in np.flatnonzero(count > 1).tolist():
        pairs = by_mask[ends[i] - count[i] : ends[i]]
        covered[i] = _union_px(
            codes[i], int(area[i]), [codes[j] for j in top[pairs].tolist()], shared_px[pairs]
        )
    return covered


def _union_px(code: dict[str, Any], area: int, covers: list[dict[str, Any]], shared_px: np.ndarray) -> int:
    """Pixels of a mask under the union of `covers`, stopping as soon as that is all of them."""
    coco = _coco()
    union: dict[str, Any] | None = None
    covered = 0
    reach = np.cumsum(shared_px)  # no union of the first k covers more
    for start in range(0, len(covers), _UNION):
        merged = coco.merge(covers[start : start + _UNION])
        union = merged if union is None else coco.merge([union, merged])
        last = min(start + _UNION, len(covers)) - 1
        if reach[last] >= area or last == len(covers) - 1:
            covered = round(float(coco.iou([code], [union], [1])[0, 0]) * area)
            if covered == area:
                break
    return covered


def _quality(region: Region, area: int) -> tuple[float, float, int, int]:
    """Sorts the best mask first."""
    predicted, stability = (
        region.source_scores.get(name, 0.0) for name in ("predicted_iou", "stability_score")
    )
    return (
        -(0.0 if isnan(predicted) else predicted),
        -(0.0 if isnan(stability) else stability),
        -area,
        region.id,
    )


def _among(ids: Sequence[int | None], overlaps: Overlaps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The overlaps between the given ids, by their positions: first, second, shared pixels.

    An id that is None takes no part.
    """
    place = {id_: position for position, id_ in enumerate(ids) if id_ is not None}
    assert place.keys() <= overlaps.ids, "overlaps were measured on other regions"
    first = np.array([place.get(id_, -1) for id_ in overlaps.first.tolist()], np.int64)
    second = np.array([place.get(id_, -1) for id_ in overlaps.second.tolist()], np.int64)
    both = (first >= 0) & (second >= 0)
    return first[both], second[both], overlaps.shared_px[both]


def _areas(codes: list[dict[str, Any]]) -> np.ndarray:
    coco = _coco()
    parts = [coco.area(codes[start : start + _AREAS]) for start in range(0, len(codes), _AREAS)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _codes(regions: Sequence[Region], size: tuple[int, int]) -> list[dict[str, Any]]:
    """As pycocotools takes them. It answers -1 for masks of two sizes, so that is checked here."""
    codes = [_code(region) for region in regions]
    assert all(tuple(code["size"]) == tuple(size) for code in codes), (
        "a live region's mask has its image's size"
    )
    assert len({region.id for region in regions}) == len(regions), "ids are unique within an image"
    return codes


def _coco() -> Any:
    return importlib.import_module("pycocotools.mask")  # compiled, without types


def _code(region: Region) -> dict[str, Any]:
    assert region.rle is not None, "a live region has a mask"
    return {"size": list(region.rle.size), "counts": region.rle.counts.encode()}
