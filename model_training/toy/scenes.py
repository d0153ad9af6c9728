"""Procedural scenes with exact masks: flat shapes of a few colors, textures and sizes on a gray ground.

A scene is a function of (seed, number, options), and so are its pixels. The captions of a scene follow from
what was drawn. Whatever would make them ambiguous is never drawn: an outline that is hidden too far, a place
between two places, two nearest neighbors. All lengths are in units of `WorldOptions.unit_px`.

The attribute `colour` and the option `colours` keep their spelling, which files of worlds and results hold.
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
from .shapes import COLORS, SHAPES, SIZES, TEXTURES, Kind, Thing, pattern_of, pixel_shares, reach_of, stencil

_THIN = ("ring", "bar")
_COARSE = ("plain", "striped")
_FRETTED = ("star", "cross", "heart")

SPLITS = ("train", "heldout")

_SPANS = {"small": (1.2, 1.45), "large": (2.1, 2.7)}
_BAR_SPANS = {"small": (1.5, 1.85), "large": (3.2, 4.0)}
"""Extent in units, smallest and largest. Nothing is drawn between small and large."""
_DARK = {"red", "green", "blue", "purple"}
"""Colors whose stripes, dots and checks are white; those of the others are black."""

_HELDOUT = 8  # one in this many contents is held out
_THIRD_MARGIN = 0.05  # of the side: no center is nearer to the line between two places
_NEAREST_RATIO = 1.15  # the second nearest neighbor is at least this much farther away
_AXIS_RATIO = 1.5  # at least this much farther along one axis than along the other
_GAP_PX = 2
_LAYOUTS = (64, 512, 2048)  # number of layouts drawn at once, until one is usable
_ATTEMPTS = 3000


@dataclass(frozen=True)
class WorldOptions:
    """How hard the world is.

    Attributes:
        canvas: (width, height) of the images in pixels; each image takes one of them.
        unit_px: the unit of all sizes, in pixels. A small thing is 1.2 to 1.45 units across, a large one 2.1
            to 2.7; a bar or a ring is 0.36 thick.
        regions: fewest and most things in an image.
        sizes, textures, colours, shapes: the values that occur.
        places: whether captions say in which ninth of the image the thing is.
        relations: whether captions say which thing is nearest, and on which side of it the thing is.
        lookalikes: share of things that differ from another thing in the image in only one attribute.
        overlap: largest share of a large thing that others may hide; 0 keeps all things apart.
        tangled: share of scenes with two things that their boxes cannot tell apart: two large bars that cross
            and have the same box, or a small thing inside a large ring. Only their masks tell which is which.
        wordings: "one" right caption for each thing, or "many" (see wordings.py); with "many", all captions
            have places and none has relations.
        turn_deg: largest angle by which things are turned; bars are turned by any angle.
        noise: standard deviation of the pixels' noise; white is 255.
        photo_format: format of the written photos.
    """

    canvas: tuple[tuple[int, int], ...] = ((128, 128),)
    unit_px: float = 16.0
    regions: tuple[int, int] = (2, 6)
    sizes: tuple[str, ...] = SIZES
    textures: tuple[str, ...] = TEXTURES
    colours: tuple[str, ...] = tuple(COLORS)
    shapes: tuple[str, ...] = SHAPES
    places: bool = True
    relations: bool = False
    lookalikes: float = 0.4
    overlap: float = 0.1
    tangled: float = 0.0
    wordings: Literal["one", "many"] = "one"
    turn_deg: float = 20.0
    noise: float = 5.0
    photo_format: Literal["jpeg", "png"] = "jpeg"

    def __post_init__(self) -> None:
        for name, known in (
            ("sizes", SIZES),
            ("textures", TEXTURES),
            ("colours", tuple(COLORS)),
            ("shapes", SHAPES),
        ):
            if strange := [each for each in getattr(self, name) if each not in known]:
                raise ConfigError(f"{name}: unknown {strange[0]!r}; choose from {', '.join(known)}")
        if not 1 <= self.regions[0] <= self.regions[1] <= 12:
            raise ConfigError(f"regions: {self.regions}; give (fewest, most), both from 1 to 12")
        if self.relations and self.regions[0] < 2:
            raise ConfigError("relations: a thing alone has no neighbor; set `regions` to (2, ...)")
        if not 0 <= self.lookalikes < 1:
            raise ConfigError(f"lookalikes: {self.lookalikes}; give a share below 1")
        if not 0 <= self.tangled <= 1:
            raise ConfigError(f"tangled: {self.tangled}; give a share from 0 to 1")
        if self.tangled and (self.regions[0] < 2 or not _tangles(self)):
            raise ConfigError(
                "tangled: it takes two things; set `regions` to (2, ...), and allow large bars, or large "
                "rings and other small shapes"
            )
        if self.wordings == "many" and (self.relations or not self.places):
            raise ConfigError("wordings: many; such captions have places and no relations; set them so")
        least = 5 * self.unit_px
        if any(min(size) < least for size in self.canvas):
            raise ConfigError(f"canvas: {self.canvas}; make both sides at least 5 units, {least:g} pixels")
        if not possible_kinds(self):
            raise ConfigError("textures: none of them can be seen on any of the shapes; add another one")


class Scene(NamedTuple):
    """An image with known truth.

    Attributes:
        size: (width, height) in pixels.
        things: in no particular order.
        labels: (H, W) uint8, 0 for the ground, otherwise 1 + the thing's index in `things`.
        tangled: whether the first two things are ones that their boxes cannot tell apart.
    """

    size: tuple[int, int]
    things: list[Thing]
    labels: np.ndarray
    tangled: bool = False


@cache
def possible_kinds(options: WorldOptions) -> dict[Kind, None]:
    """Every kind of thing that the options allow, in a fixed order.

    Dots and checks cannot be seen on thin shapes, nor told apart on small shapes with many corners.
    """
    every = itertools.product(options.sizes, options.textures, options.colours, options.shapes)
    return dict.fromkeys(kind for kind in itertools.starmap(Kind, every) if _shows(kind))


def _shows(kind: Kind) -> bool:
    coarse = kind.shape in _THIN or (kind.size == "small" and kind.shape in _FRETTED)
    return not coarse or kind.texture in _COARSE


@cache
def _tangles(options: WorldOptions) -> list[list[tuple[Kind, Kind]]]:
    """Every pair of things that can be tangled: those that cross, then a ring and what is inside of it."""
    known = possible_kinds(options)
    pairs = [pair for pair in itertools.product(known, known) if pair[0].colour != pair[1].colour]
    return [found for fits in (_cross, _nest) if (found := [pair for pair in pairs if fits(*pair)])]


def _cross(one: Kind, other: Kind) -> bool:
    return one[::3] == other[::3] == ("large", "bar")


def _nest(one: Kind, other: Kind) -> bool:
    return one[::3] == ("large", "ring") and other.size == "small" and other.shape not in _THIN


def scene_content(cast: Iterable[Kind]) -> str:
    """The things in a scene as a text, without their places. Scenes with equal contents count as the same."""
    return "; ".join(sorted(" ".join(kind) for kind in cast))


def split_of(text: str) -> str:
    """The split that scenes with this content belong to, whatever their seed is."""
    return SPLITS[hashlib.sha256(text.encode()).digest()[0] % _HELDOUT == 0]


def draw_scene(seed: int, number: int, options: WorldOptions, split: str, taken: set[str]) -> Scene:
    """Draw a scene of a world. Draws are repeated until the content is new and belongs to the split.

    Args:
        seed: seed of the world.
        number: number of the scene.
        options: options of the world.
        split: "train" or "heldout".
        taken: contents of the world's other scenes; this scene's is added.

    Raises:
        ConfigError: many draws gave no scene: the options allow too few, or only crowded ones.
    """
    rng = np.random.default_rng([seed, number])
    size = options.canvas[rng.integers(len(options.canvas))]
    fewest, most = (min(each, len(possible_kinds(options))) for each in options.regions)
    num_things = int(rng.integers(fewest, most + 1))  # before the draws, or crowded scenes would be rare
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng([seed, number, 1 + attempt])
        tangled = options.tangled > 0 and rng.random() < options.tangled
        cast = _cast(rng, num_things, options, tangled)
        text = scene_content(cast)
        if text in taken or split_of(text) != split:
            continue
        scene = _arrange(rng, size, cast, options, tangled)
        if scene is not None:
            taken.add(text)
            return scene
    raise ConfigError(
        f"no new {split} scene of {num_things} things in {_ATTEMPTS} draws; allow more shapes or colors, "
        "fewer `regions`, a larger `canvas`, or ask for fewer images"
    )


def wording_rng(seed: int, number: int) -> np.random.Generator:
    """What draws the wordings of a scene's captions; apart from what draws the scene and its noise."""
    return np.random.default_rng([seed, number, 2 + _ATTEMPTS])


def paint_scene(scene: Scene, seed: int, number: int, options: WorldOptions) -> np.ndarray:
    """The photo of a scene, (H, W, 3) uint8: gray ground with a soft gradient, the things, and noise."""
    rng = np.random.default_rng([seed, number, 1 + _ATTEMPTS])
    width, height = scene.size
    rows, columns = np.mgrid[0:height, 0:width] / max(scene.size)
    slope = rng.uniform(-30, 30, 2)
    ground = rng.uniform(115, 185) + slope[0] * (rows - 0.5) + slope[1] * (columns - 0.5)
    photo = ground[:, :, None] + rng.uniform(-6, 6, 3)
    for thing in sorted(scene.things, key=_depth):
        here, fine = stencil(thing, options.unit_px)
        coverage, pattern = pixel_shares(fine), pixel_shares(pattern_of(thing, here, fine, options.unit_px))
        color = np.clip(np.add(COLORS[thing.kind.colour], thing.tint), 0, 255)
        ink = 245 if thing.kind.colour in _DARK else 30
        photo[here] *= 1 - coverage[:, :, None]
        photo[here] += (coverage - pattern)[:, :, None] * color + pattern[:, :, None] * ink
    photo += rng.normal(0, options.noise, photo.shape)
    return np.clip(np.rint(photo), 0, 255).astype(np.uint8)


# What captions say about a scene's arrangement.

PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
SIDES = ("left of", "right of", "above", "below")


def place_of(scene: Scene, number: int) -> str:
    """The ninth of the image that a thing's center is in, one of `PLACES`."""
    column, row = (
        min(int(3 * c / side), 2) for c, side in zip(scene.things[number].center, scene.size, strict=True)
    )
    return PLACES[row][column]


def nearest_thing(scene: Scene, number: int) -> tuple[str, int]:
    """On which side of the nearest thing this thing is, and the index of that nearest thing."""
    centers = np.array([thing.center for thing in scene.things])
    away = centers[number] - centers
    distance = np.hypot(*away.T)
    distance[number] = np.inf
    other = int(distance.argmin())
    x, y = away[other]
    side = SIDES[int(x > 0)] if abs(x) > abs(y) else SIDES[2 + int(y > 0)]
    return side, other


# How a scene is arranged.


def _cast(
    rng: np.random.Generator, num_things: int, options: WorldOptions, tangled: bool = False
) -> list[Kind]:
    """Different kinds for the things of one scene; some differ in only one attribute."""
    known = list(possible_kinds(options))
    chosen: list[Kind] = []
    if tangled:
        ways = _tangles(options)
        pairs = ways[rng.integers(len(ways))]
        chosen += pairs[rng.integers(len(pairs))]
    while len(chosen) < num_things:
        kind = known[rng.integers(len(known))]
        if chosen and rng.random() < options.lookalikes:
            field = Kind._fields[rng.integers(4)]
            value = getattr(kind, field)
            kind = chosen[rng.integers(len(chosen))]._replace(**{field: value})
        if kind in possible_kinds(options) and kind not in chosen:
            chosen.append(kind)
    return chosen


def _arrange(
    rng: np.random.Generator,
    size: tuple[int, int],
    cast: Sequence[Kind],
    options: WorldOptions,
    tangled: bool = False,
) -> Scene | None:
    """The first of some random arrangements whose captions are unambiguous; None if there is none."""
    things = [_make(rng, kind, options) for kind in cast]
    if tangled:
        things[:2] = _tangle(rng, things[0], things[1], options)
    reach = np.array([reach_of(thing, options.unit_px) for thing in things]) + _GAP_PX
    free = np.array(size) - 2 * reach
    if (free < 0).any():
        return None
    for number in _LAYOUTS:
        centers = reach + rng.random((number, len(things), 2)) * free
        if tangled:
            centers[:, 1] = centers[:, 0]
        for layout in _unambiguous(centers, things, size, options, tangled)[:8].tolist():
            placed = [thing._replace(center=(x, y)) for thing, (x, y) in zip(things, layout, strict=True)]
            labels = _label(placed, size, options, tangled)
            if labels is not None:
                return Scene(size, placed, labels, tangled)
    return None


def _tangle(rng: np.random.Generator, one: Thing, other: Thing, options: WorldOptions) -> list[Thing]:
    """Two things of one center: bars of one length that cross, or a ring wide enough for what is inside."""
    if _cross(one.kind, other.kind):
        turn = np.pi / 4 * (1 if rng.random() < 0.5 else -1)
        return [one._replace(turn=turn), other._replace(turn=-turn, span_px=one.span_px)]
    unit = options.unit_px
    return [
        one._replace(span_px=_SPANS["large"][1] * unit),
        other._replace(span_px=_SPANS["small"][0] * unit),
    ]


def _make(rng: np.random.Generator, kind: Kind, options: WorldOptions) -> Thing:
    low, high = (_BAR_SPANS if kind.shape == "bar" else _SPANS)[kind.size]
    span = rng.uniform(low, high) * options.unit_px
    turn = rng.uniform(0, np.pi) if kind.shape == "bar" else np.deg2rad(options.turn_deg) * rng.uniform(-1, 1)
    red, green, blue = (int(each) for each in rng.integers(-10, 11, 3))
    angle = 0.0 if kind.shape == "bar" else rng.uniform(0, np.pi)  # a bar's stripes cross it
    grain = (float(angle), float(rng.random()), float(rng.random()))
    return Thing(kind, (0.0, 0.0), float(span), float(turn), grain, (red, green, blue))


def _unambiguous(
    centers_KN2: np.ndarray,
    things: Sequence[Thing],
    size: tuple[int, int],
    options: WorldOptions,
    tangled: bool = False,
) -> np.ndarray:
    """Those of K layouts whose things are apart, each in one place and with one nearest neighbor."""
    if options.places:
        from_line = np.abs((centers_KN2 / size)[..., None] - (1 / 3, 2 / 3))
        centers_KN2 = centers_KN2[(from_line >= _THIRD_MARGIN).all(axis=(1, 2, 3))]
    core = np.array([thing.span_px * (0.12 if thing.kind.shape == "bar" else 0.42) for thing in things])
    least = (core[:, None] + core) * (1 if options.overlap else 1.1)
    if tangled:
        least[0, 1] = least[1, 0] = 0
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
    """Distances between things, (K, N, N); that of a thing to itself is infinite."""
    x, y = np.moveaxis(centers_KN2[:, :, None] - centers_KN2[:, None], 3, 0)
    return np.hypot(x, y) + np.diag(np.full(centers_KN2.shape[1], np.inf))


def _label(
    things: Sequence[Thing], size: tuple[int, int], options: WorldOptions, tangled: bool = False
) -> np.ndarray | None:
    """The label map; None if a thing hides too much of another one, or touches one of its own color.

    Small and thin things are never hidden, not even in part. The first two, if tangled, may do it to each
    other.
    """
    cv2: Any = importlib.import_module("cv2")
    labels = np.zeros((size[1], size[0]), np.uint8)
    whole = {}
    for number in sorted(range(len(things)), key=lambda i: _depth(things[i])):
        kind = things[number].kind
        here, fine = stencil(things[number], options.unit_px)
        mask = np.zeros(labels.shape, np.uint8)
        mask[here] = pixel_shares(fine) >= 0.5
        around = cv2.dilate(mask, np.ones((2 * _GAP_PX + 1,) * 2, np.uint8))
        for other in np.unique(labels[around > 0]).tolist():
            if other == 0 or (tangled and {number, other - 1} == {0, 1}):
                continue
            below = things[other - 1].kind
            fixed = below.size == "small" or below.shape in _THIN or below.colour == kind.colour
            if options.overlap == 0 or fixed:
                return None
        labels[mask > 0] = number + 1
        whole[number + 1] = int(mask.sum())
    seen = np.bincount(labels.ravel(), minlength=len(things) + 1)
    hidden = any(
        seen[number] < (1 - options.overlap) * area
        for number, area in whole.items()
        if not (tangled and number <= 2)
    )
    return None if hidden else labels


def _depth(thing: Thing) -> float:
    """Sort key: larger things lie below smaller ones."""
    return -thing.span_px
