"""Procedural scenes with exact masks: flat shapes of a few colours, textures and sizes on a grey ground.

A scene is a function of (seed, number, options), and so are its pixels. What is said of a scene follows from
what was drawn; whatever would make that ambiguous (an outline hidden too far, a place between two places, two
nearest neighbours) is never drawn. All lengths are in units of `Options.unit_px`.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from ...schemas.errors import ConfigError

SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checked")
COLOURS = {
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
_THIN = ("ring", "bar")
_COARSE = ("plain", "striped")
_FRETTED = ("star", "cross", "heart")

SPLITS = ("train", "heldout")

_SPANS = {"small": (1.2, 1.45), "large": (2.1, 2.7)}
_BAR_SPANS = {"small": (1.5, 1.85), "large": (3.2, 4.0)}
"""Across, in units. Nothing is drawn between small and large."""
_BAND = 0.36  # thickness of rings and bars, in units
_PERIOD = 0.4  # of a texture, in units
_DARK = {"red", "green", "blue", "purple"}  # their stripes, dots and checks are white, the others' black
_HELDOUT = 8  # one in this many contents is held out
_THIRD_MARGIN = 0.05  # of the side: no centre is nearer to the line between two places
_NEAREST_RATIO = 1.15  # the second nearest neighbour is at least this much farther away
_AXIS_RATIO = 1.5  # at least this much farther along one axis than along the other
_GAP_PX = 2
_OVERSAMPLED = 4
_LAYOUTS = (64, 512, 2048)  # drawn at once, until one is fine
_ATTEMPTS = 3000


@dataclass(frozen=True)
class Options:
    """How hard the world is.

    Attributes:
        canvas: (width, height) of the images in pixels; each image takes one of them.
        unit_px: what sizes are measured in. A small thing is 1.2 to 1.45 units across, a large one 2.1 to
            2.7, a bar or a ring is 0.36 thick.
        regions: fewest and most things in an image.
        sizes, textures, colours, shapes: those that occur.
        places: captions say in which ninth of the image the thing is.
        relations: captions say what is nearest, and on which side of it the thing is.
        lookalikes: share of things that differ from another one of the image in one attribute only.
        overlap: largest share of a large thing that others hide; 0 keeps all apart.
        turn_deg: things are turned by up to this; bars by any angle.
        noise: standard deviation of the pixels' noise, of 255.
        photo_format: of the written photos.
    """

    canvas: tuple[tuple[int, int], ...] = ((128, 128),)
    unit_px: float = 16.0
    regions: tuple[int, int] = (2, 6)
    sizes: tuple[str, ...] = SIZES
    textures: tuple[str, ...] = TEXTURES
    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    places: bool = True
    relations: bool = False
    lookalikes: float = 0.4
    overlap: float = 0.1
    turn_deg: float = 20.0
    noise: float = 5.0
    photo_format: Literal["jpeg", "png"] = "jpeg"

    def __post_init__(self) -> None:
        for name, known in (
            ("sizes", SIZES),
            ("textures", TEXTURES),
            ("colours", tuple(COLOURS)),
            ("shapes", SHAPES),
        ):
            if strange := [each for each in getattr(self, name) if each not in known]:
                raise ConfigError(f"{name}: {strange[0]!r} is none; take some of {', '.join(known)}")
        if not 1 <= self.regions[0] <= self.regions[1] <= 12:
            raise ConfigError(f"regions: {self.regions}; it takes (fewest, most) from 1 to 12")
        if self.relations and self.regions[0] < 2:
            raise ConfigError("relations: a thing alone has no neighbour; set `regions` to (2, ...)")
        if not 0 <= self.lookalikes < 1:
            raise ConfigError(f"lookalikes: {self.lookalikes}; it takes a share below 1")
        least = 5 * self.unit_px
        if any(min(size) < least for size in self.canvas):
            raise ConfigError(f"canvas: {self.canvas}; both sides need 5 units, {least:g} pixels")
        if not kinds(self):
            raise ConfigError("textures: none of them shows on any of the shapes")


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
        center: x, y of its centre of area in pixels.
        span_px: across.
        turn: by which it is turned, in radians.
        grain: direction (radians) and phase (two periods' shares) of its texture.
        tint: added to its colour.
    """

    kind: Kind
    center: tuple[float, float]
    span_px: float
    turn: float
    grain: tuple[float, float, float]
    tint: tuple[int, int, int]


class Scene(NamedTuple):
    """An image with known truth.

    Attributes:
        size: (width, height) in pixels.
        things: in no particular order.
        labels: (H, W) uint8, 0 for the ground, else 1 + position in `things`.
    """

    size: tuple[int, int]
    things: list[Thing]
    labels: np.ndarray


@cache
def kinds(options: Options) -> dict[Kind, None]:
    """Every look that the options allow, in a fixed order.

    Dots and checks do not show on thin shapes, and cannot be told apart on small ones with many corners.
    """
    every = itertools.product(options.sizes, options.textures, options.colours, options.shapes)
    return dict.fromkeys(kind for kind in itertools.starmap(Kind, every) if _shows(kind))


def _shows(kind: Kind) -> bool:
    coarse = kind.shape in _THIN or (kind.size == "small" and kind.shape in _FRETTED)
    return not coarse or kind.texture in _COARSE


def content(cast: Iterable[Kind]) -> str:
    """What is in a scene, wherever it is: scenes count as the same if this is equal."""
    return "; ".join(sorted(" ".join(kind) for kind in cast))


def split_of(text: str) -> str:
    """The split to which scenes of this content belong, whatever their seed."""
    return SPLITS[hashlib.sha256(text.encode()).digest()[0] % _HELDOUT == 0]


def draw_scene(seed: int, number: int, options: Options, split: str, taken: set[str]) -> Scene:
    """A world's scene of a number: the first of its draws that is of the split and not taken; now it is.

    Args:
        seed: of the world.
        number: of the scene.
        options: of the world.
        split: "train" or "heldout".
        taken: contents that are in the world already.

    Raises:
        ConfigError: after many draws there is none: the options allow too few scenes, or too crowded ones.
    """
    rng = np.random.default_rng([seed, number])
    size = options.canvas[rng.integers(len(options.canvas))]
    fewest, most = (min(each, len(kinds(options))) for each in options.regions)
    num_things = int(rng.integers(fewest, most + 1))  # before the draws, or crowded scenes would be rare
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng([seed, number, 1 + attempt])
        cast = _cast(rng, num_things, options)
        text = content(cast)
        if text in taken or split_of(text) != split:
            continue
        scene = _arrange(rng, size, cast, options)
        if scene is not None:
            taken.add(text)
            return scene
    raise ConfigError(
        f"no new {split} scene of {num_things} things in {_ATTEMPTS} draws; allow more shapes or colours, "
        "fewer `regions`, a larger `canvas`, or ask for fewer images"
    )


def paint(scene: Scene, seed: int, number: int, options: Options) -> np.ndarray:
    """The photo of a scene, (H, W, 3) uint8: grey ground with a soft gradient, the things, noise."""
    rng = np.random.default_rng([seed, number, 1 + _ATTEMPTS])
    width, height = scene.size
    rows, columns = np.mgrid[0:height, 0:width] / max(scene.size)
    slope = rng.uniform(-30, 30, 2)
    ground = rng.uniform(115, 185) + slope[0] * (rows - 0.5) + slope[1] * (columns - 0.5)
    photo = ground[:, :, None] + rng.uniform(-6, 6, 3)
    for thing in sorted(scene.things, key=_depth):
        here, fine = _stencil(thing, options.unit_px)
        coverage, marks = _shares(fine), _shares(_marked(thing, here, fine, options.unit_px))
        colour = np.clip(np.add(COLOURS[thing.kind.colour], thing.tint), 0, 255)
        mark = 245 if thing.kind.colour in _DARK else 30
        photo[here] *= 1 - coverage[:, :, None]
        photo[here] += (coverage - marks)[:, :, None] * colour + marks[:, :, None] * mark
    photo += rng.normal(0, options.noise, photo.shape)
    return np.clip(np.rint(photo), 0, 255).astype(np.uint8)


# What is said of a scene's arrangement.

PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
SIDES = ("left of", "right of", "above", "below")


def place(scene: Scene, number: int) -> str:
    """In which ninth of the image a thing's centre is."""
    column, row = (
        min(int(3 * c / side), 2) for c, side in zip(scene.things[number].center, scene.size, strict=True)
    )
    return PLACES[row][column]


def nearest(scene: Scene, number: int) -> tuple[str, int]:
    """(side, other): the nearest thing by its centre, and on which side of it this thing is."""
    centers = np.array([thing.center for thing in scene.things])
    away = centers[number] - centers
    distance = np.hypot(*away.T)
    distance[number] = np.inf
    other = int(distance.argmin())
    x, y = away[other]
    side = SIDES[int(x > 0)] if abs(x) > abs(y) else SIDES[2 + int(y > 0)]
    return side, other


# How a scene is made up.


def _cast(rng: np.random.Generator, num_things: int, options: Options) -> list[Kind]:
    """Different looks for one scene; some differ in one attribute only."""
    known = list(kinds(options))
    chosen: list[Kind] = []
    while len(chosen) < num_things:
        kind = known[rng.integers(len(known))]
        if chosen and rng.random() < options.lookalikes:
            field = Kind._fields[rng.integers(4)]
            value = getattr(kind, field)
            kind = chosen[rng.integers(len(chosen))]._replace(**{field: value})
        if kind in kinds(options) and kind not in chosen:
            chosen.append(kind)
    return chosen


def _arrange(
    rng: np.random.Generator, size: tuple[int, int], cast: Sequence[Kind], options: Options
) -> Scene | None:
    """The first of some random arrangements in which everything can be told; None if there is none."""
    things = [_make(rng, kind, options) for kind in cast]
    reach = np.array([_reach(thing, options.unit_px) for thing in things]) + _GAP_PX
    free = np.array(size) - 2 * reach
    if (free < 0).any():
        return None
    for number in _LAYOUTS:
        centers = reach + rng.random((number, len(things), 2)) * free
        for layout in _tellable(centers, things, size, options)[:8].tolist():
            placed = [thing._replace(center=(x, y)) for thing, (x, y) in zip(things, layout, strict=True)]
            labels = _label(placed, size, options)
            if labels is not None:
                return Scene(size, placed, labels)
    return None


def _make(rng: np.random.Generator, kind: Kind, options: Options) -> Thing:
    low, high = (_BAR_SPANS if kind.shape == "bar" else _SPANS)[kind.size]
    span = rng.uniform(low, high) * options.unit_px
    turn = rng.uniform(0, np.pi) if kind.shape == "bar" else np.deg2rad(options.turn_deg) * rng.uniform(-1, 1)
    tint = tuple(int(each) for each in rng.integers(-10, 11, 3))
    angle = 0.0 if kind.shape == "bar" else rng.uniform(0, np.pi)  # a bar's stripes cross it
    grain = (float(angle), float(rng.random()), float(rng.random()))
    return Thing(kind, (0.0, 0.0), float(span), float(turn), grain, tint)


def _tellable(
    centers_KN2: np.ndarray, things: Sequence[Thing], size: tuple[int, int], options: Options
) -> np.ndarray:
    """Those of K layouts whose things are apart, each in one place and with one nearest neighbour."""
    if options.places:
        from_line = np.abs((centers_KN2 / size)[..., None] - (1 / 3, 2 / 3))
        centers_KN2 = centers_KN2[(from_line >= _THIRD_MARGIN).all(axis=(1, 2, 3))]
    core = np.array([thing.span_px * (0.12 if thing.kind.shape == "bar" else 0.42) for thing in things])
    least = (core[:, None] + core) * (1 if options.overlap else 1.1)
    distance_KNN = _distances(centers_KN2)
    centers_KN2 = centers_KN2[(distance_KNN >= least).all(axis=(1, 2))]
    if not options.relations or not len(centers_KN2):
        return centers_KN2
    distance_KNN = _distances(centers_KN2)
    order = np.sort(distance_KNN, axis=2)
    other = np.take_along_axis(centers_KN2, distance_KNN.argmin(axis=2)[:, :, None], axis=1)
    offset = np.abs(other - centers_KN2)
    tells = order[:, :, 1] >= _NEAREST_RATIO * order[:, :, 0]
    tells &= offset.max(axis=2) >= _AXIS_RATIO * offset.min(axis=2)
    return centers_KN2[tells.all(axis=1)]


def _distances(centers_KN2: np.ndarray) -> np.ndarray:
    """(K, N, N), infinite from each to itself."""
    x, y = np.moveaxis(centers_KN2[:, :, None] - centers_KN2[:, None], 3, 0)
    return np.hypot(x, y) + np.diag(np.full(centers_KN2.shape[1], np.inf))


def _label(things: Sequence[Thing], size: tuple[int, int], options: Options) -> np.ndarray | None:
    """The label map; None if a thing hides too much of another, or borders on one of its own colour.

    Nothing hides any of a small thing or of a thin one.
    """
    cv2: Any = importlib.import_module("cv2")
    labels = np.zeros((size[1], size[0]), np.uint8)
    whole = {}
    for number in sorted(range(len(things)), key=lambda i: _depth(things[i])):
        kind = things[number].kind
        here, fine = _stencil(things[number], options.unit_px)
        mask = np.zeros(labels.shape, np.uint8)
        mask[here] = _shares(fine) >= 0.5
        around = cv2.dilate(mask, np.ones((2 * _GAP_PX + 1,) * 2, np.uint8))
        for other in np.unique(labels[around > 0]).tolist():
            if other == 0:
                continue
            below = things[other - 1].kind
            fixed = below.size == "small" or below.shape in _THIN or below.colour == kind.colour
            if options.overlap == 0 or fixed:
                return None
        labels[mask > 0] = number + 1
        whole[number + 1] = int(mask.sum())
    seen = np.bincount(labels.ravel(), minlength=len(things) + 1)
    hidden = any(seen[number] < (1 - options.overlap) * area for number, area in whole.items())
    return None if hidden else labels


def _depth(thing: Thing) -> float:
    """Larger things lie below."""
    return -thing.span_px


# How a thing is drawn.


def _stencil(thing: Thing, unit_px: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """(rows and columns of a window in the image, uint8 of the window, oversampled: 1 where the thing is)."""
    cv2: Any = importlib.import_module("cv2")
    reach = _reach(thing, unit_px)
    low = np.floor(np.array(thing.center) - reach).astype(int)
    width, height = np.ceil(np.array(thing.center) + reach).astype(int) - low
    fine = np.zeros((height * _OVERSAMPLED, width * _OVERSAMPLED), np.uint8)
    contours = [(contour + thing.center - low) * _OVERSAMPLED - 0.5 for contour in _contours(thing, unit_px)]
    cv2.fillPoly(fine, [np.rint(contour * 16).astype(np.int32) for contour in contours], 1, shift=4)
    return (slice(low[1], low[1] + height), slice(low[0], low[0] + width)), fine


def _marked(thing: Thing, here: tuple[slice, slice], fine: np.ndarray, unit_px: float) -> np.ndarray:
    """The part of a stencil that is its texture's mark."""
    marks = np.zeros_like(fine)
    if thing.kind.texture != "plain":
        rows, columns = np.nonzero(fine)
        points = (np.stack([columns, rows], axis=1) + 0.5) / _OVERSAMPLED
        corner = np.array([here[1].start, here[0].start])
        marks[rows, columns] = _is_mark(thing, points + (corner - thing.center), unit_px)
    return marks


def _shares(fine: np.ndarray) -> np.ndarray:
    """Share of each pixel."""
    cv2: Any = importlib.import_module("cv2")
    size = (fine.shape[1] // _OVERSAMPLED, fine.shape[0] // _OVERSAMPLED)
    return cv2.resize(fine.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def _is_mark(thing: Thing, points: np.ndarray, unit_px: float) -> np.ndarray:
    """(N,) bool: which points, from the centre and in pixels, are of the texture's mark."""
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


def _reach(thing: Thing, unit_px: float) -> np.ndarray:
    """Farthest from the centre in x and y, in pixels, and one more."""
    return np.abs(np.concatenate(_contours(thing, unit_px))).max(axis=0) + 1


def _contours(thing: Thing, unit_px: float) -> list[np.ndarray]:
    """Outline and hole in pixels from the centre, turned."""
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
    """(N, 2) around the centre of area, about one across; y points down."""
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
