"""An image as tiles and a thumbnail, and regions as patches of them. numpy and Pillow only.

Shape suffixes: T views of an image (its tiles row by row, then the thumbnail if there is more than one tile),
S side of a tile in pixels, Q patches of a tile, P region prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from model_training.layout import Layout

_BLANK = 255
"""What the original paints where no region is; it tells the two apart by this value alone."""

_ROUNDING = 1e-5
"""Of shares, which are float32."""


@lru_cache(maxsize=4096)
def tile_grid(width: int, height: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """Tiles across and down: the grid whose aspect is nearest to the image's.

    Of two equally near, the larger one if the image has more than half its pixels.
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
    """Tiles, and a thumbnail if there is more than one."""
    tiles = grid[0] * grid[1]
    return tiles + (tiles > 1)


def cut_image(pixels: np.ndarray, tile_px: int, grid: tuple[int, int]) -> np.ndarray:
    """Stretch an image to its grid of tiles, and once more to a thumbnail.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        tile_px: S.
        grid: tiles across and down.

    Returns:
        (T, 3, S, S) uint8.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    across, down = grid
    canvas = np.asarray(_stretch(image, (across * tile_px, down * tile_px)))
    views = _cut(canvas, grid)
    if across * down > 1:
        thumbnail = np.asarray(_stretch(image, (tile_px, tile_px)))
        views = np.concatenate([views, thumbnail[None]])
    return np.ascontiguousarray(views.transpose(0, 3, 1, 2))


def active_patches(
    mask: np.ndarray, prompt: int, tile_px: int, patch_px: int, grid: tuple[int, int], layout: Layout
) -> np.ndarray:
    """The patches that show a region.

    Args:
        mask: (H, W) bool, of the image's size.
        prompt: the region's prompt; the original paints it, and bicubic ringing depends on it.
        tile_px: S.
        patch_px: side of a patch.
        grid: tiles across and down.
        layout: says how.

    Returns:
        (T, Q) bool.
    """
    side = tile_px // patch_px
    sizes = [(grid[0], grid[1])] + ([(1, 1)] if grid[0] * grid[1] > 1 else [])
    views = []
    for across, down in sizes:
        if layout.mask_resample == "bicubic":
            painted = paint(mask, prompt, (across * tile_px, down * tile_px))
            shown = painted[::patch_px, ::patch_px] != _BLANK
        else:
            share = _shares(mask, across * side, down * side)
            shown = share >= layout.min_patch_share * (1 - _ROUNDING)
            if not shown.any() and mask.any():
                shown = share >= share.max() * (1 - _ROUNDING)
        views.append(_cut(shown, (across, down)).reshape(across * down, side * side))
    return np.concatenate(views)


def paint(mask: np.ndarray, prompt: int, size: tuple[int, int]) -> np.ndarray:
    """A region's prompt painted on a blank image, stretched to (width, height) as the original does it."""
    painted = np.where(mask, np.uint8(prompt), np.uint8(_BLANK))
    return np.asarray(_stretch(Image.fromarray(painted), size))


def box_of(mask: np.ndarray, inclusive: bool) -> tuple[float, float, float, float]:
    """The region's box (x1, y1, x2, y2) as shares of width and height; the mask is not empty.

    Args:
        mask: (H, W) bool.
        inclusive: ends at the near edge of the last pixel, which gives a region of one pixel no area.
    """
    height, width = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    beyond = 0 if inclusive else 1
    return (
        columns[0] / width,
        rows[0] / height,
        (columns[-1] + beyond) / width,
        (rows[-1] + beyond) / height,
    )


def by_area(masks: Sequence[np.ndarray]) -> list[int]:
    """Positions of the masks, the largest first; of equals, the later one first, as the original has it."""
    areas = [int(np.count_nonzero(mask)) for mask in masks]
    return sorted(range(len(masks)), key=lambda i: (areas[i], i), reverse=True)


def _stretch(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic, across and then down, rounded between: what weights were trained on, up to Pillow 12.

    Pillow 13 takes the cheaper order, which moves pixels by up to 5 of 255.
    """
    width, height = size
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def _shares(mask: np.ndarray, across: int, down: int) -> np.ndarray:
    """How much of each cell of a grid a mask covers, (down, across).

    Pillow's box filter gives a pixel to one cell whole, or to none where its middle is on the edge of two.
    """
    height, width = mask.shape
    return _parts(height, down) @ mask.astype(np.float32) @ _parts(width, across).T


def _parts(size: int, cells: int) -> np.ndarray:
    """How much of each of equal cells each pixel of a line is, (cells, size)."""
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
    """Every grid of at most `max_tiles`, smaller ones first."""
    grids = [(a, d) for a in range(1, max_tiles + 1) for d in range(1, max_tiles + 1) if a * d <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
