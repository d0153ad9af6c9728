"""The `grabcut` segmenter: OpenCV's GrabCut inside a region's box, by color alone.

It does not read the phrase: it separates what fills the box from what surrounds it. So it confirms that a
mask has edges where the photo has them, not that the mask shows what the phrase says.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from ....schemas.records import Rle
from ..options import BackendOptions, read_options
from ..protocols import Candidate

VERSION = "1"

COLLAPSED = 0.15
"""A cut that keeps less of the box than this has lost the object to the background; it is started again."""

CORE = 0.3
"""Then the middle of the box, up to this share of its radius, counts as object for certain."""


class GrabCutOptions(BackendOptions, frozen=True):
    """The options of `grabcut`.

    Attributes:
        max_side: pixels on the longer side that the crop of a box is reduced to; cost grows with its square.
        iterations: rounds of color model and cut.
        margin: context around the box, as a share of its longer side; the background's colors come from it.
    """

    max_side: Annotated[int, Meta(ge=16)] = 128
    iterations: Annotated[int, Meta(ge=1)] = 3
    margin: Annotated[float, Meta(ge=0)] = 0.3


class GrabCutSegmenter:
    """Predicts one mask per box. Deterministic; a region's answer does not depend on the others'.

    Args:
        options: see `GrabCutOptions`.

    Raises:
        ConfigError: an option is wrong.
    """

    reads_phrases = False
    version = VERSION

    def __init__(self, **options: Any):
        self.options = read_options(GrabCutOptions, options, "segmenter.options")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Version of our part and the OpenCV release, whose cuts may differ."""
        read_options(GrabCutOptions, options, "segmenter.options")
        import cv2

        return {"version": VERSION, "opencv": ".".join(cv2.__version__.split(".")[:2])}

    def segment(self, photo: np.ndarray, phrases: list[str], boxes: np.ndarray) -> list[list[Candidate]]:
        """One candidate for each box, or none if the box is empty or GrabCut leaves nothing in it.

        Args:
            photo: (H, W, 3) uint8 RGB.
            phrases: N core categories; not read.
            boxes: (N, 4) x1, y1, x2, y2 in pixels, exclusive at the far edge; clipped to the photo.
        """
        if len(phrases) != len(boxes):
            raise ValueError(f"{len(phrases)} phrases for {len(boxes)} boxes")
        return [self._segment(photo, box) for box in np.asarray(boxes, np.float64).reshape(-1, 4)]

    def _segment(self, photo: np.ndarray, box: np.ndarray) -> list[Candidate]:
        import cv2

        height, width = photo.shape[:2]
        if not np.isfinite(box).all():
            return []
        x1, y1 = np.clip(np.floor(box[:2]), 0, [width, height]).astype(int).tolist()
        x2, y2 = np.clip(np.ceil(box[2:]), 0, [width, height]).astype(int).tolist()
        if x2 <= x1 or y2 <= y1:
            return []
        margin = max(4, round(self.options.margin * max(x2 - x1, y2 - y1)))
        left, top = max(0, x1 - margin), max(0, y1 - margin)
        right, bottom = min(width, x2 + margin), min(height, y2 + margin)
        crop = np.ascontiguousarray(photo[top:bottom, left:right, ::-1])
        factor = min(1.0, self.options.max_side / max(crop.shape[:2]))
        size = (max(1, round(crop.shape[1] * factor)), max(1, round(crop.shape[0] * factor)))
        small = cv2.resize(crop, size, interpolation=cv2.INTER_AREA) if factor < 1 else crop
        scale_x, scale_y = size[0] / crop.shape[1], size[1] / crop.shape[0]
        inner = (
            round((x1 - left) * scale_x),
            round((y1 - top) * scale_y),
            round((x2 - left) * scale_x),
            round((y2 - top) * scale_y),
        )
        found = _cut(small, inner, self.options.iterations)
        if not found.any():
            return []
        score = _separation(small, found)
        soft = cv2.resize(
            found * np.float32(1), (crop.shape[1], crop.shape[0]), interpolation=cv2.INTER_LINEAR
        )
        mask = soft[y1 - top : y2 - top, x1 - left : x2 - left] > 0.5
        if not mask.any():
            return []
        return [Candidate(place_mask(mask, x1, y1, height, width), score)]


def place_mask(mask: np.ndarray, x: int, y: int, height: int, width: int) -> Rle:
    """Encode a small mask as a part of a large image, without making the large one.

    Args:
        mask: (h, w) bool with at least one pixel.
        x: column of its left edge in the image.
        y: row of its top edge.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    from pycocotools import mask as coco

    rows = np.zeros((mask.shape[0] + 2, mask.shape[1]), np.int8)
    rows[1:-1] = mask
    column, start = np.nonzero(np.diff(rows, axis=0).T == 1)
    _, end = np.nonzero(np.diff(rows, axis=0).T == -1)
    first = (column + x) * height + y + start
    last = (column + x) * height + y + end
    joined = first[1:] == last[:-1]  # a run that goes on at the top of the next column
    edges = np.stack([first[np.r_[True, ~joined]], last[np.r_[~joined, True]]], axis=1).ravel()
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    if counts[-1] == 0:
        counts = counts[:-1]
    encoded: Any = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)  # pyright: ignore
    return Rle((height, width), encoded["counts"].decode())


def _cut(pixels: np.ndarray, box: tuple[int, int, int, int], iterations: int) -> np.ndarray:
    """(h, w) uint8 foreground of GrabCut started from a box x1, y1, x2, y2; all zero if nothing is left."""
    import cv2

    x1, y1, x2, y2 = box
    height, width = pixels.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    radius = np.hypot(
        (columns - (x1 + x2) / 2) * 2 / max(1, x2 - x1), (rows - (y1 + y2) / 2) * 2 / max(1, y2 - y1)
    )
    labels = np.full((height, width), cv2.GC_BGD, np.uint8)
    labels[y1:y2, x1:x2] = cv2.GC_PR_FGD
    if (
        labels == cv2.GC_BGD
    ).sum() < 0.1 * labels.size:  # nothing around to learn from: the corners have to do
        labels[(labels == cv2.GC_PR_FGD) & (radius > 1.1)] = cv2.GC_PR_BGD
    found = _grab(pixels, labels.copy(), iterations)
    if found.sum() < COLLAPSED * (x2 - x1) * (y2 - y1):
        labels[radius < CORE] = cv2.GC_FGD
        found = _grab(pixels, labels, iterations)
    return _without_specks(found)


def _grab(pixels: np.ndarray, labels: np.ndarray, iterations: int) -> np.ndarray:
    """GrabCut from starting labels, which it overwrites; (h, w) uint8, 1 is foreground."""
    import cv2

    inside = labels & 1 == 1  # GC_FGD and GC_PR_FGD are odd
    if min(int(inside.sum()), int((~inside).sum())) < 8:
        return np.zeros(labels.shape, np.uint8)
    cv2.setRNGSeed(0)  # GrabCut starts its color models by random k-means
    models = np.zeros((1, 65)), np.zeros((1, 65))
    try:
        cv2.grabCut(pixels, labels, None, *models, iterations, cv2.GC_INIT_WITH_MASK)  # pyright: ignore
    except cv2.error:  # a color model without a pixel: nothing is left to separate
        return np.zeros(labels.shape, np.uint8)
    return labels & 1


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Keep the pieces that hold at least a tenth of the largest."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count <= 1:
        return mask
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    kept = (areas >= 0.1 * areas.max())[labels].astype(np.uint8)
    kept[labels == 0] = 0
    return kept


def _separation(pixels: np.ndarray, mask: np.ndarray) -> float:
    """How far the colors inside and around differ: Bhattacharyya distance of their histograms, 0..1."""
    import cv2

    if mask.all():
        return 0.0
    lab = cv2.cvtColor(pixels, cv2.COLOR_BGR2LAB)
    histograms = []
    for part in (mask, 1 - mask):
        histogram = cv2.calcHist([lab], [0, 1, 2], part, [8, 12, 12], [0, 256, 64, 192, 64, 192])
        histograms.append(histogram / max(1.0, float(histogram.sum())))
    distance = cv2.compareHist(histograms[0], histograms[1], cv2.HISTCMP_BHATTACHARYYA)
    return round(min(1.0, max(0.0, float(distance))), 4)
