"""The `color_regions` mask generator: what stands out from a plain ground, or else areas of one color.

1. The ground is what varies smoothly from the photo's border: a plane in CIELAB is fitted to the border's
   colors, and what is near it and connected to the border is ground.
2. What is not ground falls into connected pieces. A piece with several hues is divided by hue, so that things
   of two colors that touch are two masks. Its white, gray and black pixels go to the nearest hue, so that a
   striped or dotted thing is one mask.
3. A photo without a plain ground, as most photographs are, is divided into areas of one color.

It knows no objects: what has two colors may be two masks, and things of one color that touch are one.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from ....filters import rle
from ..options import BackendOptions, read_options
from ..protocols import Candidate

VERSION = "1"

GROUND_NEAR = 14.0
"""CIELAB distance from the fitted plane up to which a pixel may be ground: noise and JPEG stay below it."""

GROUND_BORDER_SHARE = 0.6
"""Share of the border's pixels that have to be near the plane; with fewer the photo has no plain ground."""

CHROMA = 22.0
"""Distance from gray in CIELAB above which a color has a hue."""

HUE_STEP_DEG = 5
HUE_APART_DEG = 18
"""Two peaks of a piece's hues that are no further apart are one hue."""

HUE_SHARE = 0.04
"""Smallest share of a piece's pixels that makes a hue of its own."""


class ColorRegionsOptions(BackendOptions, frozen=True):
    """The options of `color_regions`.

    Attributes:
        max_side: pixels on the longer side that a photo is reduced to; cost grows with its square.
        colors: into how many colors a photo without a plain ground is divided.
        min_share: smallest mask, as a share of the photo.
    """

    max_side: Annotated[int, Meta(ge=16, le=4096)] = 384
    colors: Annotated[int, Meta(ge=2, le=64)] = 6
    min_share: Annotated[float, Meta(ge=0, lt=1)] = 0.004


class ColorRegions:
    """Divides a photo into masks that do not overlap. Deterministic.

    Args:
        options: see `ColorRegionsOptions`.

    Raises:
        ConfigError: an option is wrong.
    """

    version = VERSION

    def __init__(self, **options: Any):
        self.options = read_options(ColorRegionsOptions, options, "mask_generator.options")

    @classmethod
    def identity(cls, **options: Any) -> dict[str, str]:
        """Version of our part, the OpenCV release, whose clusters may differ, and the options."""
        given = read_options(ColorRegionsOptions, options, "mask_generator.options")
        import cv2

        own = {name: repr(getattr(given, name)) for name in given.__struct_fields__}
        return {"version": VERSION, "opencv": ".".join(cv2.__version__.split(".")[:2]), **own}

    def generate(self, photo: np.ndarray) -> list[Candidate]:
        """The masks of a photo, of which no two overlap; none if all of it is ground.

        Args:
            photo: (H, W, 3) uint8 RGB.

        Returns:
            Candidates in no particular order. The score is 1 less the share of the mask's outline that is
            the photo's edge: what is cut off there is seen in part.
        """
        import cv2

        height, width = photo.shape[:2]
        factor = min(1.0, self.options.max_side / max(height, width))
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA) if factor < 1 else photo
        lab = to_lab(small)
        least = max(4, round(self.options.min_share * size[0] * size[1]))
        ground = find_ground(lab)
        if ground is None:
            labels = color_areas(lab, self.options.colors, least)
        else:
            labels = things_on(ground, lab, least)
        scores = {label: _score(labels == label) for label in range(1, int(labels.max()) + 1)}
        if factor < 1:
            labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
        masks = rle.encode_label_map(labels.astype(np.uint32))
        return [Candidate(mask.rle, scores[label]) for label, mask in masks.items() if label]


def to_lab(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 RGB as float32 CIELAB, slightly smoothed, against noise and JPEG's blocks."""
    import cv2

    smooth = cv2.medianBlur(np.ascontiguousarray(pixels), 3)
    return cv2.cvtColor(smooth.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def find_ground(lab: np.ndarray) -> np.ndarray | None:
    """(h, w) bool, what varies smoothly from the border; None if the photo has no plain ground."""
    import cv2

    height, width = lab.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width]
    places = np.stack([np.ones((height, width)), rows / height, columns / width], axis=2)
    rim = np.zeros((height, width), bool)
    rim[[0, -1], :] = rim[:, [0, -1]] = True
    used, colors = places[rim], lab[rim].astype(np.float64)
    # Start from the border's middle color; each round keeps the half that fits best.
    far = np.linalg.norm(colors - np.median(colors, axis=0), axis=1)
    plane = np.zeros((3, 3))
    for _ in range(5):
        best = np.argsort(far, kind="stable")[: max(3, far.size // 2)]
        plane = np.linalg.lstsq(used[best], colors[best], rcond=None)[0]
        far = np.linalg.norm(colors - used @ plane, axis=1)
    if np.mean(far < GROUND_NEAR) < GROUND_BORDER_SHARE:
        return None
    near = (np.linalg.norm(lab - places @ plane, axis=2) < GROUND_NEAR).astype(np.uint8)
    _, pieces = cv2.connectedComponents(near, connectivity=4)
    touching = np.setdiff1d(np.unique(pieces[rim]), [0])
    return np.isin(pieces, touching)


def things_on(ground: np.ndarray, lab: np.ndarray, least: int) -> np.ndarray:
    """The pieces of what is not ground, each divided by its hues.

    Args:
        ground: (h, w) bool.
        lab: (h, w, 3) float32.
        least: pixels of the smallest mask.

    Returns:
        (h, w) int32, 0 for no mask.
    """
    labels = np.zeros(ground.shape, np.int32)
    for piece in _pieces(~ground, least):
        for part in _by_hue(piece, lab, least):
            labels[part] = labels.max() + 1
    return labels


def color_areas(lab: np.ndarray, num_colors: int, least: int) -> np.ndarray:
    """Connected areas of one of a photo's main colors; (h, w) int32, 0 for what is too small."""
    import cv2

    smooth = cv2.bilateralFilter(lab, 9, 20, 5)
    cv2.setRNGSeed(0)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.5)
    points = np.ascontiguousarray(smooth.reshape(-1, 3))
    num_colors = min(num_colors, len(points))
    _, nearest, _ = cv2.kmeans(points, num_colors, None, stop, 3, cv2.KMEANS_PP_CENTERS)  # pyright: ignore
    classes = cv2.medianBlur(nearest.reshape(lab.shape[:2]).astype(np.uint8), 5)
    labels = np.zeros(classes.shape, np.int32)
    for color in range(num_colors):
        for piece in _pieces(classes == color, least):
            labels[piece] = labels.max() + 1
    return labels


def _pieces(mask: np.ndarray, least: int) -> list[np.ndarray]:
    """The connected pieces with at least `least` pixels, by the place of their first one."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return [labels == each for each in range(1, count) if stats[each, cv2.CC_STAT_AREA] >= least]


def _by_hue(piece: np.ndarray, lab: np.ndarray, least: int) -> list[np.ndarray]:
    """The parts of a piece that have one hue each; pixels without a hue go to the nearest part."""
    import cv2

    a, b = lab[..., 1], lab[..., 2]
    colored = piece & (np.hypot(a, b) > CHROMA)
    degrees = np.degrees(np.arctan2(b, a)) % 360
    hues = _peaks(degrees[colored], HUE_SHARE * piece.sum())
    if len(hues) < 2:
        return [piece]
    apart = np.abs((degrees[..., None] - hues + 180) % 360 - 180)
    nearest = apart.argmin(axis=2)
    seeds = np.zeros(piece.shape, np.int32)
    for number in range(len(hues)):
        own = (colored & (nearest == number)).astype(np.uint8)
        seeds[cv2.erode(own, np.ones((2, 2), np.uint8)) > 0] = number + 1  # a seam of mixed colors is thin
    if not seeds.any():
        return [piece]
    _, closest = cv2.distanceTransformWithLabels(
        (seeds == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    of_pixel = np.zeros(int(closest.max()) + 1, np.int32)
    of_pixel[closest[seeds > 0]] = seeds[seeds > 0]
    given = np.where(piece, of_pixel[closest], 0)
    parts = [part for number in range(len(hues)) for part in _pieces(given == number + 1, least)]
    return parts or [piece]


def _peaks(degrees: np.ndarray, least: float) -> np.ndarray:
    """The hues that at least `least` of the pixels are near, most frequent first."""
    bins = np.bincount(
        (degrees // HUE_STEP_DEG).astype(int) % (360 // HUE_STEP_DEG), minlength=360 // HUE_STEP_DEG
    )
    smooth = bins + (np.roll(bins, 1) + np.roll(bins, -1)) / 2
    found: list[float] = []
    left = smooth.astype(float)
    while left.max(initial=0) > 0:
        hue = (int(left.argmax()) + 0.5) * HUE_STEP_DEG
        centers = (np.arange(left.size) + 0.5) * HUE_STEP_DEG
        around = np.abs((centers - hue + 180) % 360 - 180) <= HUE_APART_DEG
        if bins[around].sum() < least:
            break
        found.append(hue)
        left[around] = 0
    return np.array(found)


def _score(mask: np.ndarray) -> float:
    """1 less the share of a mask's outline that lies on the edge of the photo."""
    inner = np.pad(mask, 1)
    steps = sum(int(np.count_nonzero(np.diff(inner.astype(np.int8), axis=axis))) for axis in (0, 1))
    cut = int(mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum())
    return round(1 - cut / steps, 4) if steps else 0.0
