"""What can be measured of a region without a model: color, shape, surface and place of its pixels.

Everything is measured inside the mask's bounding box plus a narrow ring, reduced to at most `MAX_SIDE` pixels
a side, so that the cost of a region does not grow with the photo.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from ....filters.rle import decode, to_coco
from ....schemas.records import Rle

MAX_SIDE = 192
"""Longest side of the crop that is measured: enough for outlines and stripes, and about 2 ms a region."""

GRAYS = {"black": 12.0, "dark grey": 34.0, "grey": 56.0, "light grey": 78.0, "white": 97.0}
"""Lightness (CIELAB L) of the names for what has no hue; the nearest one counts."""

GRAY_CHROMA = 9.0
"""CIELAB chroma below which people call a surface gray, black or white, whatever its hue."""

HUES = {
    "dark red": [(110, 20, 25), (80, 15, 20)],
    "red": [(200, 30, 35), (170, 40, 40), (225, 60, 50)],
    "pink": [(240, 160, 180), (225, 110, 150), (245, 200, 205)],
    "orange": [(240, 140, 30), (225, 105, 30), (245, 165, 80), (245, 190, 130)],
    "brown": [(125, 75, 45), (145, 95, 60), (110, 85, 65), (150, 105, 85)],
    "dark brown": [(70, 45, 30), (50, 35, 25), (65, 50, 42), (75, 38, 22)],
    "light brown": [(175, 130, 90), (165, 125, 100), (180, 145, 115)],
    "beige": [(225, 205, 175), (205, 185, 160), (235, 220, 200), (212, 190, 140)],
    "yellow": [(245, 215, 50), (230, 190, 40), (250, 235, 130)],
    "olive": [(110, 105, 40), (85, 80, 35), (140, 135, 75)],
    "dark green": [(25, 65, 35), (45, 70, 40), (20, 45, 25)],
    "green": [(50, 130, 60), (80, 130, 50), (90, 125, 80), (40, 160, 70)],
    "light green": [(150, 200, 110), (165, 190, 140), (190, 220, 165)],
    "teal": [(20, 120, 120), (40, 95, 95), (70, 145, 145)],
    "light blue": [(150, 195, 230), (175, 200, 220), (120, 175, 220)],
    "blue": [(40, 85, 185), (60, 115, 190), (70, 100, 150), (25, 60, 220)],
    "dark blue": [(20, 30, 85), (30, 45, 75), (15, 20, 50)],
    "purple": [(115, 50, 140), (90, 60, 120), (140, 100, 165), (65, 30, 75)],
    "light purple": [(190, 160, 225)],
    "magenta": [(190, 30, 120), (215, 50, 150)],
}
"""Color names with a few sRGB samples each, chosen by eye; a pixel is named by the nearest one in CIELAB."""

FAMILY = {name: name.removeprefix("dark ").removeprefix("light ") for name in [*GRAYS, *HUES]}
"""Shades of one color count together when the dominant colors are picked."""


class Color(NamedTuple):
    """A color of the region: its name, the family it belongs to, and its share of the region, 0..1."""

    name: str
    family: str
    share: float


class Appearance(NamedTuple):
    """What was measured of one region.

    Attributes:
        colors: families of colors by share, at least one, the largest first.
        lightness: mean CIELAB L of the region, 0..100.
        image_share: area of the mask over the area of the photo, 0..1.
        elongation: length over width of the ellipse with the mask's second moments; 1 is round.
        angle: direction of the long axis in degrees, 0 is level, 90 upright, 0 <= angle < 180, anticlockwise.
        solidity: area over the area of the convex hull, 0..1.
        roundness: 4 pi area over the squared perimeter of the largest piece; 1 is a disc.
        rectangularity: area over the area of the smallest turned rectangle around it, 0..1.
        pieces: separate pieces that hold at least a fiftieth of the mask each.
        holes: holes of at least a fiftieth of the mask each.
        edge_share: share of the inside on which the gray values change sharply, 0..1.
        coherence: how much the gradients of the inside agree on one direction, 0..1.
        stripe_angle: direction along which stripes would run, in degrees as `angle`.
        crossings: number of light-to-dark changes met across that direction.
        contrast: CIELAB distance between the rim of the mask and the ring around it; None without a ring.
        center: centroid in the photo (x, y), 0..1.
        span: width and height of the box over those of the photo, 0..1.
        borders: sides of the photo that the mask touches, of "left", "top", "right", "bottom".
    """

    colors: list[Color]
    lightness: float
    image_share: float
    elongation: float
    angle: float
    solidity: float
    roundness: float
    rectangularity: float
    pieces: int
    holes: int
    edge_share: float
    coherence: float
    stripe_angle: float
    crossings: int
    contrast: float | None
    center: tuple[float, float]
    span: tuple[float, float]
    borders: list[str]


def measure_region(photo: np.ndarray, rle: Rle) -> Appearance | None:
    """Measure one region.

    Args:
        photo: (H, W, 3) uint8 RGB.
        rle: the mask, the size of the photo.

    Returns:
        The measurements, or None for an empty mask.
    """
    from pycocotools import mask as coco

    encoded = to_coco(rle)
    area = int(coco.area(encoded))  # pyright: ignore[reportArgumentType]
    if area == 0:
        return None
    x, y, width, height = (int(value) for value in coco.toBbox(encoded))  # pyright: ignore[reportArgumentType]
    full_h, full_w = rle.size
    ring = max(2, round(0.06 * max(width, height)))
    left, top = max(0, x - ring), max(0, y - ring)
    right, bottom = min(full_w, x + width + ring), min(full_h, y + height + ring)
    mask = decode(rle)[top:bottom, left:right]
    pixels, mask = _shrink(photo[top:bottom, left:right], mask)
    inside = mask.astype(bool)
    lab = _to_lab(pixels)
    rows, columns = np.nonzero(inside)
    scale_x, scale_y = (right - left) / mask.shape[1], (bottom - top) / mask.shape[0]
    points = np.stack([columns * scale_x, rows * scale_y], axis=1)
    elongation, angle = _moments(points)
    solidity, roundness, rectangularity, pieces, holes = _outline(mask)
    edge_share, coherence, stripe_angle, crossings = _surface(lab[..., 0], mask)
    center_x, center_y = points.mean(axis=0) + np.array([left + scale_x / 2, top + scale_y / 2])
    touches = {"left": x == 0, "top": y == 0, "right": x + width == full_w, "bottom": y + height == full_h}
    return Appearance(
        colors=name_colors(pixels[inside]),
        lightness=float(lab[inside][:, 0].mean()),
        image_share=area / (full_h * full_w),
        elongation=elongation,
        angle=angle,
        solidity=solidity,
        roundness=roundness,
        rectangularity=rectangularity,
        pieces=pieces,
        holes=holes,
        edge_share=edge_share,
        coherence=coherence,
        stripe_angle=stripe_angle,
        crossings=crossings,
        contrast=_contrast(lab, mask),
        center=(float(center_x) / full_w, float(center_y) / full_h),
        span=(width / full_w, height / full_h),
        borders=[side for side, touched in touches.items() if touched],
    )


def name_colors(rgb: np.ndarray) -> list[Color]:
    """Share of each color family among pixels, largest first; families under a hundredth are left out.

    Args:
        rgb: (N, 3) uint8, N at least 1.
    """
    names = [*GRAYS, *HUES]
    cell = (rgb >> 3).astype(np.int32)
    chosen = _color_table()[cell[:, 0] << 10 | cell[:, 1] << 5 | cell[:, 2]]
    counts = np.bincount(chosen, minlength=len(names))
    families: dict[str, dict[str, int]] = {}
    for name, count in zip(names, counts.tolist(), strict=True):
        families.setdefault(FAMILY[name], {})[name] = count
    found = []
    for family, shades in families.items():
        total = sum(shades.values())
        main = max(shades, key=lambda name: shades[name])
        name = main if shades[main] >= 0.6 * total else family
        found.append(Color(name, family, total / len(chosen)))
    found.sort(key=lambda color: -color.share)
    return [color for index, color in enumerate(found) if index == 0 or color.share >= 0.01]


@functools.cache
def _color_table() -> np.ndarray:
    """(32768,) index into the names, grays first, for each RGB cell of 8 x 8 x 8 levels, red slowest."""
    levels = np.arange(4, 256, 8, dtype=np.uint8)
    cells = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(1, -1, 3)
    lab = _to_lab(cells)[0]
    samples = _to_lab(np.array([[sample for samples in HUES.values() for sample in samples]], np.uint8))[0]
    owner = np.array([i for i, samples in enumerate(HUES.values()) for _ in samples], np.uint8)
    distance = (lab**2).sum(axis=1)[:, None] - 2 * lab @ samples.T + (samples**2).sum(axis=1)
    table = owner[distance.argmin(axis=1)] + np.uint8(len(GRAYS))
    grayish = np.hypot(lab[:, 1], lab[:, 2]) < GRAY_CHROMA
    table[grayish] = np.abs(lab[grayish, :1] - np.array(list(GRAYS.values()))).argmin(axis=1)
    return table


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB to float32 CIELAB, L in 0..100."""
    import cv2

    return cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _shrink(pixels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Photo and mask of the crop with at most MAX_SIDE pixels a side. A mask never vanishes on the way."""
    import cv2

    height, width = mask.shape
    factor = MAX_SIDE / max(height, width)
    if factor >= 1:
        return np.ascontiguousarray(pixels), np.ascontiguousarray(mask)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    share = cv2.resize(np.ascontiguousarray(mask) * np.uint8(255), size, interpolation=cv2.INTER_AREA)
    small = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)
    enough = min(127, int(share.max()) // 2)  # lines thinner than a cell keep their densest cells
    return small, (share > enough).astype(np.uint8)


def _moments(points: np.ndarray) -> tuple[float, float]:
    """Elongation and angle of the long axis of (N, 2) points x, y."""
    centered = points - points.mean(axis=0)
    covariance = centered.T @ centered / len(points) + np.eye(2) / 12  # a pixel is a square, not a point
    values, vectors = np.linalg.eigh(covariance)
    along = vectors[:, 1]
    angle = float(np.degrees(np.arctan2(-along[1], along[0]))) % 180  # image rows grow downwards
    return float(np.sqrt(values[1] / values[0])), angle


def _outline(mask: np.ndarray) -> tuple[float, float, float, int, int]:
    """Solidity, roundness, rectangularity, pieces, holes."""
    import cv2

    area = int(mask.sum())
    minimum = max(4.0, 0.02 * area)
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    pieces = max(1, sum(int(stats[i, cv2.CC_STAT_AREA]) >= minimum for i in range(1, count)))
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(1 - padded, connectivity=4)
    background = int(labels[0, 0])  # the padding joins all of the outside into one
    holes = sum(int(stats[i, cv2.CC_STAT_AREA]) >= minimum for i in range(1, count) if i != background)
    contours, _ = cv2.findContours(padded, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(contours, key=len)
    corners = np.concatenate(contours)
    # Contours run through pixel centers: an n x n square measures (n - 1)^2, so add the half pixel around.
    hull = cv2.convexHull(corners)
    hull_area = cv2.contourArea(hull) + cv2.arcLength(hull, True) / 2 + 1
    (_, sides, _) = cv2.minAreaRect(corners)
    rectangle = (sides[0] + 1) * (sides[1] + 1)
    smooth = cv2.approxPolyDP(largest, 0.6, True)  # pixel steps lengthen slanted outlines
    own_area = cv2.contourArea(largest) + cv2.arcLength(smooth, True) / 2 + 1
    perimeter = cv2.arcLength(smooth, True) + np.pi
    roundness = min(1.0, 4 * np.pi * own_area / perimeter**2)
    return min(1.0, area / hull_area), float(roundness), min(1.0, area / rectangle), pieces, holes


def _surface(lightness: np.ndarray, mask: np.ndarray) -> tuple[float, float, float, int]:
    """Edge share, coherence of the gradients, stripes' direction, changes across it; of the inside."""
    import cv2

    eroded = cv2.erode(mask, np.ones((5, 5), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    inner = eroded.astype(bool)
    if inner.sum() < 64:  # too little to speak of a surface
        return 0.0, 0.0, 0.0, 0
    grad_x = cv2.Scharr(lightness, cv2.CV_32F, 1, 0)[inner] / 32
    grad_y = cv2.Scharr(lightness, cv2.CV_32F, 0, 1)[inner] / 32
    edge_share = float(
        (np.hypot(grad_x, grad_y) > 5).mean()
    )  # 5 of 100 in lightness from one pixel to the next
    xx, yy, xy = float((grad_x**2).mean()), float((grad_y**2).mean()), float((grad_x * grad_y).mean())
    coherence = float(np.hypot(xx - yy, 2 * xy)) / max(xx + yy, 1e-6)
    across = 0.5 * np.arctan2(
        2 * xy, xx - yy
    )  # direction of the gradients; stripes run at right angles to it
    rows, columns = np.nonzero(inner)
    position = columns * np.cos(across) + rows * np.sin(across)
    bins = (position - position.min()).astype(int)
    counts = np.maximum(np.bincount(bins), 1)
    profile = np.bincount(bins, weights=lightness[inner]) / counts
    wave = profile - np.convolve(np.pad(profile, 8, mode="edge"), np.ones(17) / 17, mode="valid")
    wave = wave[np.abs(wave) > 2]
    crossings = int((np.diff(np.sign(wave)) != 0).sum()) if len(wave) else 0
    return edge_share, coherence, float(90 - np.degrees(across)) % 180, crossings


def _contrast(lab: np.ndarray, mask: np.ndarray) -> float | None:
    """Distance of the mean colors in a ring just outside and just inside of the outline."""
    import cv2

    kernel = np.ones((3, 3), np.uint8)
    iterations = max(1, max(mask.shape) // 40)
    outer = cv2.dilate(mask, kernel, iterations=iterations + 1) - cv2.dilate(mask, kernel)
    eroded = cv2.erode(mask, kernel, iterations=iterations)
    inner = mask - eroded
    if outer.sum() < 8 or inner.sum() == 0:
        return None
    return float(np.linalg.norm(lab[outer.astype(bool)].mean(axis=0) - lab[inner.astype(bool)].mean(axis=0)))
