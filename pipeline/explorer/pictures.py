"""Photos of a corpus for the browser, with masks drawn by `draw`, or as SVG with the same colors and numbers.

A photo is decoded and encoded again, so the browser gets a JPEG of ours whatever the publisher's file holds.
Its EXIF data are left out, because browsers would turn the photo by them, and masks would no longer fit.
"""

from __future__ import annotations

import importlib
import io
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...filters import rle
from ...schemas.config import Limits
from ...schemas.errors import BadRecord, ParaCaptionError
from ...schemas.reasons import Reason
from ...schemas.records import Blob, Rle
from ..corpus.work_list_summary import load_work_list
from ..io import confined, draw, files, photos, variables
from ..io.draw import Overlay
from ..io.location import Prefix
from .catalog import Catalog

PHOTO_SIDE = 1600
THUMB_SIDE = 480
MOST_DRAWN = 12
"""Masks on a thumbnail; more of them would hide the photo."""

_KEPT_THUMBS = 400
_THUMB_DISC = 14
"""Radius of a number's disc in pixels; thumbnails are shown about 300 pixels wide."""

_SMALL = 400
"""Side in pixels of the shrunk picture in which places for the numbers are found."""


class NotShown(BadRecord):
    """A photo that is not shown because of where it lies; `detail` says what allows it."""

    def __init__(self, detail: str):
        super().__init__(Reason.PHOTO_MISSING, detail)


class Layer(NamedTuple):
    """A mask for the browser, in the photo's pixels.

    Attributes:
        region: its id.
        path: the outlines and holes as an SVG path, for the even-odd rule.
        color: "#rrggbb" of the mask.
        halo: "#rrggbb" of the line around it, white or black.
        opacity: of the mask's area.
        x, y: center of the number; None for an empty mask.
    """

    region: int
    path: str
    color: str
    halo: str
    opacity: float
    x: int | None
    y: int | None


class Pictures:
    """Photos and thumbnails of a corpus. Any number of threads may ask; two of them decode at a time.

    Args:
        catalog: of the corpus.
        shards: folder or fsspec URL that holds `<subset>/shards/`; default: the corpus.
        max_pixels: photos with more pixels are not decoded.
        outside: show photos that lie outside of the corpus, where its work list has them, on this machine.
        urls: fetch photos that the work list has at a URL.
    """

    def __init__(
        self,
        catalog: Catalog,
        shards: str | None = None,
        max_pixels: int = 200_000_000,
        outside: bool = False,
        urls: bool = False,
    ):
        self.catalog = catalog
        self.shards = (shards or str(catalog.out)).rstrip("/")
        confined.confine(self.shards)
        self.max_pixels = min(max_pixels, Limits().max_pixels)
        self.outside, self.urls = outside, urls
        self._decoding = threading.Semaphore(2)
        self._thumb = lru_cache(_KEPT_THUMBS)(self._draw_thumb)

    def photo(self, subset: str, key: str) -> bytes:
        """The photo as a JPEG, at most `PHOTO_SIDE` pixels wide and high.

        Raises:
            ConfigError: there is no such image.
            BadRecord: its photo is missing or cannot be read.
        """
        from PIL import Image

        rows = self.catalog.image(subset, key)
        with self._decoding:
            picture = Image.fromarray(self.pixels(rows))
            picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
            return _jpeg(picture, 88)

    def thumb(self, subset: str, key: str, regions: Sequence[int]) -> bytes:
        """The photo with some masks as a JPEG, `THUMB_SIDE` pixels wide or high. Raises what `photo` does."""
        return self._thumb(self.catalog.version, subset, key, tuple(regions)[:MOST_DRAWN])

    def _draw_thumb(self, _: object, subset: str, key: str, regions: tuple[int, ...]) -> bytes:
        rows = self.catalog.image(subset, key)
        with self._decoding:
            pixels = self.pixels(rows)
            wanted = [row for row in rows if row["region"] in regions and row["rle_counts"]]
            overlays = [each for row in wanted if (each := _overlay(row)).rle.size == pixels.shape[:2]]
            return _jpeg(draw.draw_masks(pixels, overlays, THUMB_SIDE, _THUMB_DISC), 80)

    def pixels(self, rows: list[dict[str, Any]]) -> np.ndarray:
        """The pixels of the image that some ledger rows belong to, as (H, W, 3) uint8 RGB.

        Raises:
            BadRecord: its photo is missing or cannot be read.
        """
        blob = self._find_photo(rows)
        try:
            data = files.read(blob)
        except OSError as error:
            raise BadRecord(Reason.PHOTO_MISSING, f"{blob}: {error}") from error
        return photos.decode(blob, data, self.max_pixels)

    def _find_photo(self, rows: list[dict[str, Any]]) -> Blob:
        """In the shard if a region of the image was kept, otherwise where the work list has it."""
        first = rows[0]
        kept = next((row for row in rows if row["shard"]), None)
        unit = self.catalog.find_unit(first["subset"], first["key"])
        if kept is not None:  # what the ledger calls the shard is not asked: its name is known
            where = f"{self.shards}/{unit.shard.removeprefix(f'{self.catalog.out}/')}"
            return Blob(where, _whole(kept["photo_offset"]), _whole(kept["photo_length"]))
        try:
            number = int(unit.name.rpartition("-")[2])
            entries = load_work_list(self.catalog.out / unit.subset).read_unit(number)
        except (ParaCaptionError, ValueError, LookupError, OSError) as error:
            raise BadRecord(Reason.PHOTO_MISSING, f"{first['key']}: {error}") from error
        found = next((entry.photo for entry in entries if entry.key == first["key"] and entry.photo), None)
        if found is None:
            raise BadRecord(Reason.PHOTO_MISSING, f"{first['key']}: no photo was found for it")
        self._check_place(found.url)
        return found

    def _check_place(self, url: str) -> None:
        """Refuse a place of a photo that nobody has allowed: a work list may be a stranger's.

        Raises:
            NotShown: it lies outside of the corpus, or is a URL; or it is no file.
        """
        if self.outside:
            variables.take_folders(url)
        if files.is_url(url) or "::" in url:
            if not self.urls:
                raise NotShown("To show this photo, start with --photo-urls")
            return
        path, out = os.path.realpath(files.local(variables.expand(url))), self.catalog.out
        is_inside = not isinstance(out, Prefix) and confined.is_below(path, os.path.realpath(out))
        if not is_inside and not self.outside:
            raise NotShown("To show this photo, start with --photos-outside")
        if not confined.is_plain(path):
            raise NotShown("The photo is not a regular file")


def _whole(number: Any) -> int:
    """An offset or a length in a shard, from a ledger that may be anybody's."""
    if not isinstance(number, int) or number < 0:
        raise BadRecord(Reason.PHOTO_MISSING, f"{number!r}: no place in a shard")
    return number


def draw_layers(regions: Sequence[tuple[int, Rle]]) -> list[Layer]:
    """The masks of one image as SVG, the largest first, so that smaller ones are painted over it.

    Args:
        regions: pairs of id and mask; all masks have the same size. The color follows from the id.

    Raises:
        BadRecord: a mask cannot be read.
    """
    cv2: Any = importlib.import_module("cv2")
    if not regions:
        return []
    height, width = _drawable(regions[0][1].size)
    scale = min(1.0, _SMALL / max(height, width))
    sampled = np.ix_(_middles(height, scale), _middles(width, scale))
    paths: list[str] = []
    areas: list[int] = []
    small: list[np.ndarray] = []
    for _, code in regions:
        mask = rle.check(code.counts, code.size)
        dense = rle.decode(mask.rle)
        paths.append(_path(dense, mask.bbox, cv2))
        areas.append(mask.area)
        small.append(dense[sampled].astype(bool))
    order, top = draw.stack_masks(small, small[0].shape)
    places = draw.number_places(small, order, top, round(_SMALL / 20))
    found = []
    for i in sorted(range(len(regions)), key=lambda i: -areas[i]):
        color = color_of(regions[i][0])
        fill = draw.mask_opacity(areas[i], height * width)
        x, y = (round((v + 0.5) / scale) for v in places[i]) if i in places else _first_point(paths[i])
        found.append(Layer(regions[i][0], paths[i], css_color(color), halo_of(color), fill, x, y))
    return found


def draw_box(region: int, box: tuple[int, int, int, int]) -> Layer:
    """The frame of a box whose region has no mask, as SVG: four lines, so that nothing in it is filled."""
    x, y, width, height = box
    corners = [(x, y), (x + width - 1, y), (x + width - 1, y + height - 1), (x, y + height - 1)]
    ends = zip(corners, [*corners[1:], corners[0]], strict=True)
    path = "".join(f"M{ax}.5 {ay}.5L{bx}.5 {by}.5" for (ax, ay), (bx, by) in ends)
    color = color_of(region)
    return Layer(region, path, css_color(color), halo_of(color), 0.0, x + width // 2, y + height // 2)


def color_of(region: int) -> tuple[int, int, int]:
    """The color of a region on every page, as RGB."""
    return draw.color_of_region(region)


def halo_of(color: tuple[int, int, int]) -> str:
    """White or black, whichever stands out from the color."""
    return "#ffffff" if draw.is_dark(color) else "#000000"


def css_color(color: tuple[int, int, int]) -> str:
    """A color in CSS: "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def outline(code: Rle) -> str:
    """The outline of a mask as an SVG path.

    Raises:
        BadRecord: the mask cannot be read.
    """
    mask = rle.check(code.counts, _drawable(code.size))
    return _path(rle.decode(mask.rle), mask.bbox, importlib.import_module("cv2"))


def _drawable(size: tuple[int, int]) -> tuple[int, int]:
    """The size of a mask that is drawn pixel by pixel, unless it has more pixels than any photo.

    Raises:
        BadRecord: it has.
    """
    height, width = size
    if not isinstance(height, int) or not isinstance(width, int) or height * width > Limits().max_pixels:
        raise BadRecord(Reason.PHOTO_TOO_LARGE, f"{width}x{height} pixels are not drawn")
    return size


def _middles(length: int, scale: float) -> np.ndarray:
    """Which pixels of a line are kept when it is shrunk: those in the middle of each shrunk pixel."""
    count = max(1, round(length * scale))
    return ((np.arange(count) + 0.5) * length / count).astype(np.int64)


def _path(dense: np.ndarray, bbox: tuple[int, int, int, int], cv2: Any) -> str:
    x, y, w, h = bbox
    crop = np.ascontiguousarray(dense[y : y + h, x : x + w])
    contours, _ = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x, y))
    screen_pixel = max(dense.shape) / PHOTO_SIDE
    parts = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, screen_pixel / 2, closed=True)[:, 0].tolist()
        parts.append("M" + "L".join(f"{px}.5 {py}.5" for px, py in points) + "Z")
    return "".join(parts)


def _first_point(path: str) -> tuple[int | None, int | None]:
    if not path:
        return None, None
    x, y = path[1:].partition("L")[0].removesuffix("Z").split(" ")
    return int(float(x)), int(float(y))


def _overlay(row: dict[str, Any]) -> Overlay:
    code = rle.check(row["rle_counts"], (row["image_height"], row["image_width"])).rle
    region, dropped = row["region"], not row["kept"]
    return Overlay(code, "", color=color_of(region), number=region, dropped=dropped)


def _jpeg(picture: Any, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
