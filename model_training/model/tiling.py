"""An image as tiles and a thumbnail, and regions as patches of them. numpy and Pillow only.

Shape suffixes: T views of an image (its tiles row by row, then the thumbnail if there is more than one tile),
S side of a tile in pixels, Q patches of a tile, P region prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import cast

import numpy as np
from PIL import Image

from ...schemas.errors import ConfigError
from .layout import Layout

_BLANK = 255
"""What PerceptionDLM's released code paints where there is no region; the value alone says so."""

_ROUNDING = 1e-5
"""Tolerance when shares, which are float32, are compared."""


@dataclass(frozen=True)
class MaskRuns:
    """A mask as its run lengths. Functions here take it in place of (H, W) pixels, with the same results.

    Attributes:
        shape: (H, W) of the image.
        counts: (R,) lengths of the runs of 0 and 1 in turn, first 0, down the columns of the whole image.
        area: number of pixels in the mask.
        bbox: (x, y, width, height) of the mask in pixels.
    """

    shape: tuple[int, int]
    counts: np.ndarray
    area: int
    bbox: tuple[int, int, int, int]

    def any(self) -> bool:
        """Whether the mask has a pixel."""
        return self.area > 0

    def dense(self) -> np.ndarray:
        """The mask as (H, W) bool."""
        height, width = self.shape
        return np.repeat(np.arange(len(self.counts)) % 2 == 1, self.counts).reshape(width, height).T

    def shares(self, across: int, down: int) -> np.ndarray:
        """How much of each cell of a grid the mask covers, (down, across).

        In the order of the runs, the number of mask pixels before a place is linear between the ends of the
        runs. So a cell takes as many look-ups as it has edges, and fractions of pixels are exact.
        """
        (height, width), (x, y, w, h) = self.shape, self.bbox
        first, last = y * down // height, -(-(y + h) * down // height)
        ends = np.concatenate([[0], np.cumsum(self.counts)])
        ones = np.concatenate([[0], np.cumsum(self.counts * (np.arange(len(self.counts)) % 2))])
        rows = np.arange(first, last + 1) * height / down
        places = np.arange(x, x + w)[:, None] * height + rows
        skip = int(self.counts[0] == 0)  # a run of nothing would be two ends at one place
        before = np.interp(places, ends[skip:], ones[skip:])
        running = np.zeros((w + 1, last - first))
        np.cumsum(np.diff(before, axis=1), axis=0, out=running[1:])
        columns = (np.arange(across + 1) * width / across - x).clip(0, w)
        whole = np.minimum(columns.astype(np.int64), w - 1)
        left, right = running[whole], running[whole + 1]
        cells = np.zeros((down, across))
        cells[first:last] = np.diff(left + (columns - whole)[:, None] * (right - left), axis=0).T
        return cells * (across * down / (height * width))


@lru_cache(maxsize=4096)
def tile_grid(width: int, height: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """Tiles across and down: the grid whose aspect ratio is nearest to the image's.

    Of two that are equally near, the larger one if the image has more than half of its pixels.
    """
    aspect = width / height
    best, nearest = (1, 1), float("inf")
    for across, down in _grids(max_tiles):
        distance = abs(aspect - across / down)
        larger = distance == nearest and width * height > 0.5 * tile_px**2 * across * down
        if distance < nearest or larger:
            best, nearest = (across, down), distance
    return best


def num_views(grid: tuple[int, int]) -> int:
    """How many views a grid has: its tiles, and a thumbnail if there is more than one tile."""
    tiles = grid[0] * grid[1]
    return tiles + (tiles > 1)


def cut_image(pixels: np.ndarray | Image.Image, tile_px: int, grid: tuple[int, int]) -> np.ndarray:
    """Stretch an image to its grid of tiles, and once more to a thumbnail.

    Args:
        pixels: (H, W, 3) uint8 RGB, or a Pillow image in RGB.
        tile_px: S, the side of a tile in pixels.
        grid: tiles across and down.

    Returns:
        (T, 3, S, S) uint8.
    """
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    across, down = grid
    views = np.empty((num_views(grid), 3, tile_px, tile_px), np.uint8)
    tiles = views[: across * down].reshape(down, across, 3, tile_px, tile_px)
    canvas = _stretch(image, (across * tile_px, down * tile_px))
    for channel, plane in enumerate(canvas.split()):  # planes copy by whole rows, pixels byte by byte
        cut = _pixels(plane).reshape(down, tile_px, across, tile_px)
        tiles[:, :, channel] = cut.swapaxes(1, 2)
    if across * down > 1:
        for channel, plane in enumerate(_stretch(image, (tile_px, tile_px)).split()):
            views[-1, channel] = _pixels(plane)
    return views


def _pixels(plane: Image.Image) -> np.ndarray:
    """(H, W) of one channel; Arrow, if it is installed, saves the two copies that Pillow makes."""
    try:
        import pyarrow as pa

        return pa.array(plane).to_numpy().reshape(plane.height, plane.width)
    except (ImportError, ValueError):  # ValueError: larger than Pillow's blocks of memory
        return np.asarray(plane)


def active_patches(
    mask: np.ndarray | MaskRuns,
    prompt: int,
    tile_px: int,
    patch_px: int,
    grid: tuple[int, int],
    layout: Layout,
) -> np.ndarray:
    """Find the patches that show a region.

    Args:
        mask: (H, W) bool, of the image's size.
        prompt: number of the region's prompt. The released code paints it, and bicubic ringing depends on it.
        tile_px: S, the side of a tile in pixels.
        patch_px: side of a patch in pixels.
        grid: tiles across and down.
        layout: which patches count.

    Returns:
        (T, Q) bool.
    """
    side = tile_px // patch_px
    sizes = [(grid[0], grid[1])] + ([(1, 1)] if grid[0] * grid[1] > 1 else [])
    bicubic = layout.mask_resample == "bicubic"
    dense = mask.dense() if bicubic and isinstance(mask, MaskRuns) else mask
    views = []
    for across, down in sizes:
        if bicubic:
            painted = paint_prompt(cast(np.ndarray, dense), prompt, (across * tile_px, down * tile_px))
            shown = painted[::patch_px, ::patch_px] != _BLANK
        else:
            shown = shown_cells(_shares(mask, across * side, down * side), layout.min_patch_share)
        views.append(_cut(shown, (across, down)).reshape(across * down, side * side))
    return np.concatenate(views)


def shown_cells(share: np.ndarray, least: float) -> np.ndarray:
    """Which cells show a region, given its share of each: those of at least `least`, else the fullest."""
    shown = share >= least * (1 - _ROUNDING)
    if not shown.any() and share.any():
        shown = share >= share.max() * (1 - _ROUNDING)
    return shown


def paint_prompt(mask: np.ndarray, prompt: int, size: tuple[int, int]) -> np.ndarray:
    """A region's prompt painted on a blank image and stretched to (width, height)."""
    painted = np.where(mask, np.uint8(prompt), np.uint8(_BLANK))
    return np.asarray(_stretch(Image.fromarray(painted), size))


def mask_box(mask: np.ndarray | MaskRuns, inclusive: bool) -> tuple[float, float, float, float]:
    """The box (x1, y1, x2, y2) of a mask, as shares of the image's width and height.

    Args:
        mask: (H, W) bool, not empty.
        inclusive: whether the box ends at the near edge of the last pixel, so that one pixel has no area.
    """
    height, width = mask.shape
    less = 1 if inclusive else 0
    if isinstance(mask, MaskRuns):
        x, y, w, h = mask.bbox
    else:
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        x, y, w, h = columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    return (x / width, y / height, (x + w - less) / width, (y + h - less) / height)


def sort_by_area(masks: Sequence[np.ndarray | MaskRuns]) -> list[int]:
    """Numbers of the masks, the largest first; of equal ones the later one, as in the released code."""
    areas = [mask.area if isinstance(mask, MaskRuns) else int(np.count_nonzero(mask)) for mask in masks]
    return sorted(range(len(masks)), key=lambda i: (areas[i], i), reverse=True)


def check_masks(masks: Sequence[np.ndarray | MaskRuns], size: tuple[int, int], most: int) -> None:
    """Refuse masks that cannot be captioned.

    Args:
        masks: (H, W) bool, or their runs.
        size: (height, width) of the image.
        most: how many masks there may be.

    Raises:
        ConfigError: there are too many masks, or one is empty, of another size or not bool; the first is
            named by number.
    """
    if len(masks) > most:
        raise ConfigError(f"{len(masks)} masks, but the model has {most} region prompts: make groups of them")
    for number, mask in enumerate(masks):
        if len(mask.shape) != 2:
            raise ConfigError(
                f"mask {number} has the shape {tuple(mask.shape)}: give a list of masks of the shape {size}, "
                "(height, width) of the image"
            )
        if mask.shape != size:
            shown = "x".join(map(str, reversed(mask.shape)))
            raise ConfigError(
                f"mask {number} is {shown}, the image {size[1]}x{size[0]}: scale the mask to the image"
            )
        if isinstance(mask, np.ndarray) and mask.dtype != bool:
            raise ConfigError(f"mask {number} is {mask.dtype}: give bool, True where the region is")
        if not mask.any():
            raise ConfigError(f"mask {number} is empty: there is nothing to caption; leave it out")


def _stretch(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize bicubically, first across and then down, rounded in between.

    This is what Pillow does up to version 12, and what weights were trained on. Pillow 13 takes the cheaper
    order, which changes pixels by up to 5 of 255.
    """
    width, height = size
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def _shares(mask: np.ndarray | MaskRuns, across: int, down: int) -> np.ndarray:
    """How much of each cell of a grid a mask covers, (down, across).

    Pillow's box filter would not do: it gives a pixel to one cell as a whole, or to none if its center lies
    on an edge.
    """
    if isinstance(mask, MaskRuns):
        return mask.shares(across, down)
    height, width = mask.shape
    return _parts(height, down) @ mask.astype(np.float32) @ _parts(width, across).T


def _parts(size: int, cells: int) -> np.ndarray:
    """For each of some equal cells along a line, the share of it that each pixel makes up, (cells, size)."""
    edges = np.arange(cells + 1)[:, None] * size / cells
    pixels = np.arange(size)
    common = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (common.clip(min=0) * cells / size).astype(np.float32)


def _cut(canvas: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(down * h, across * w, ...) to (tiles, h, w, ...), row by row."""
    across, down = grid
    height, width = canvas.shape[0] // down, canvas.shape[1] // across
    tiles = canvas.reshape(down, height, across, width, *canvas.shape[2:]).swapaxes(1, 2)
    return tiles.reshape(down * across, height, width, *canvas.shape[2:])


@cache
def _grids(max_tiles: int) -> list[tuple[int, int]]:
    """Every grid of at most `max_tiles` tiles, smaller ones first."""
    grids = [(a, d) for a in range(1, max_tiles + 1) for d in range(1, max_tiles + 1) if a * d <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
