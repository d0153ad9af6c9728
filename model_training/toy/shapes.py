"""The things in toy scenes: what they look like, and which pixels they cover. Lengths are in units.

The attribute `colour` keeps its spelling, which files of worlds and results hold.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checked")
COLORS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (248, 225, 50),
    "green": (40, 150, 60),
    "turquoise": (70, 215, 225),
    "blue": (35, 75, 210),
    "purple": (125, 45, 170),
    "pink": (252, 150, 200),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "bar")

_BAND = 0.36  # thickness of rings and bars, in units
_PERIOD = 0.4  # of a texture, in units
_OVERSAMPLED = 4


class Kind(NamedTuple):
    """What a thing looks like."""

    size: str
    texture: str
    colour: str
    shape: str


class Thing(NamedTuple):
    """A thing in a scene.

    Attributes:
        kind: what it looks like.
        center: x and y of its center of area, in pixels.
        span_px: extent in pixels.
        turn: angle by which it is turned, in radians.
        grain: direction of its texture in radians, and two phases as shares of a period.
        tint: RGB added to its color.
    """

    kind: Kind
    center: tuple[float, float]
    span_px: float
    turn: float
    grain: tuple[float, float, float]
    tint: tuple[int, int, int]


def stencil(thing: Thing, unit_px: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """A window around the thing.

    Returns:
        Rows and columns of the window in the image, and the oversampled window, uint8: 1 where the thing is.
    """
    cv2: Any = importlib.import_module("cv2")
    reach = reach_of(thing, unit_px)
    low = np.floor(np.array(thing.center) - reach).astype(int)
    width, height = np.ceil(np.array(thing.center) + reach).astype(int) - low
    fine = np.zeros((height * _OVERSAMPLED, width * _OVERSAMPLED), np.uint8)
    contours = [(contour + thing.center - low) * _OVERSAMPLED - 0.5 for contour in _contours(thing, unit_px)]
    cv2.fillPoly(fine, [np.rint(contour * 16).astype(np.int32) for contour in contours], 1, shift=4)
    return (slice(low[1], low[1] + height), slice(low[0], low[0] + width)), fine


def pattern_of(thing: Thing, here: tuple[slice, slice], fine: np.ndarray, unit_px: float) -> np.ndarray:
    """The part of a window from `stencil` that the texture's pattern inks."""
    pattern = np.zeros_like(fine)
    if thing.kind.texture != "plain":
        rows, columns = np.nonzero(fine)
        points = (np.stack([columns, rows], axis=1) + 0.5) / _OVERSAMPLED
        corner = np.array([here[1].start, here[0].start])
        pattern[rows, columns] = _is_inked(thing, points + (corner - thing.center), unit_px)
    return pattern


def pixel_shares(fine: np.ndarray) -> np.ndarray:
    """The share of each pixel that an oversampled window covers."""
    cv2: Any = importlib.import_module("cv2")
    size = (fine.shape[1] // _OVERSAMPLED, fine.shape[0] // _OVERSAMPLED)
    return cv2.resize(fine.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def _is_inked(thing: Thing, points: np.ndarray, unit_px: float) -> np.ndarray:
    """Which points (N, 2) the texture's pattern inks: (N,) bool. Points are in pixels from the center."""
    texture, period = thing.kind.texture, _PERIOD * unit_px
    angle, *phase = thing.grain
    if texture == "striped" and thing.kind.shape == "ring":  # spokes: parallel stripes hide in the band
        stripes = max(5, round(np.pi * (thing.span_px - _BAND * unit_px) / (1.2 * period)))
        return (np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) * stripes + phase[0]) % 1 < 0.45
    across = (points @ _turned(-thing.turn - angle).T) / period + phase
    if texture == "striped":
        return across[:, 0] % 1 < 0.45
    if texture == "dotted":
        return np.hypot(*(across % 1 - 0.5).T) < 0.3
    return ((across / 1.5) % 1 < 0.5).sum(axis=1) == 1


def reach_of(thing: Thing, unit_px: float) -> np.ndarray:
    """How far the thing reaches from its center in x and y, in pixels, and one pixel more."""
    return np.abs(np.concatenate(_contours(thing, unit_px))).max(axis=0) + 1


def _contours(thing: Thing, unit_px: float) -> list[np.ndarray]:
    """Outline and, if there is one, hole of the turned thing, in pixels from its center."""
    span, band, shape = thing.span_px, _BAND * unit_px, thing.kind.shape
    turn = _turned(thing.turn).T
    if shape == "bar":
        return [np.array([(-span, -band), (span, -band), (span, band), (-span, band)]) / 2 @ turn]
    if shape == "ring":
        return [_outline("circle") * (span - 2 * inset) for inset in (0, band)]
    return [_outline(shape) * span @ turn]


def _turned(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


@cache
def _outline(shape: str) -> np.ndarray:
    """Outline of a shape about 1 across, (N, 2) points around its center of area; y points down."""
    around = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    if shape == "circle":
        points = np.stack([np.cos(around), np.sin(around)], axis=1) / 2
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.45
    elif shape == "triangle":
        points = np.array([(0, -1), (0.58, 0), (-0.58, 0)]) * 1.02
    elif shape == "star":
        radius = np.where(np.arange(10) % 2, 0.27, 0.62)[:, None]
        points = np.stack([np.sin(around[::6]), -np.cos(around[::6])], axis=1) * radius
    elif shape == "cross":
        quarter = np.array([(0.17, -0.52), (0.17, -0.17), (0.52, -0.17)])
        points = np.concatenate([quarter @ _turned(i * np.pi / 2).T for i in range(4)])
    else:  # a heart
        x = 16 * np.sin(around) ** 3
        y = -13 * np.cos(around) + 5 * np.cos(2 * around) + 2 * np.cos(3 * around) + np.cos(4 * around)
        points = np.stack([x, y], axis=1) / 31
    return points - _center_of_area(points)


def _center_of_area(points: np.ndarray) -> np.ndarray:
    after = np.roll(points, -1, axis=0)
    cross = points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]
    return ((points + after) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
