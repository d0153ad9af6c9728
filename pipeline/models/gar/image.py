"""A photo as a thumbnail and tiles, and masks cut the same way.

The photo is stretched to a grid of tiles and, once more, to a single one: the thumbnail, which comes first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1024)
def tile_grid(width: int, height: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """Tiles across and down for a photo.

    Among grids that hold the photo unscaled, the one that it can be enlarged in the most, keeping its aspect;
    if none holds it, the largest of those whose aspect is nearest on the flat side of the photo's.
    """
    groups: dict[float, list[tuple[int, int]]] = {}
    for count in range(max_tiles, 0, -1):
        for across in range(1, count + 1):
            if count % across == 0:
                down = count // across
                groups.setdefault(across / down, []).append((across, down))
    aspect = width / height
    grids = [grid for group in groups.values() for grid in group]
    holding = [(a, b) for a, b in grids if a * tile_px >= width and b * tile_px >= height]
    if holding:

        def enlarged(grid: tuple[int, int]) -> float:
            """The photo's shorter side once it fills the grid; whole pixels, as published."""
            scale = min(grid[0] * tile_px / width, grid[1] * tile_px / height)
            across, down = scale * width, scale * height
            if aspect > 1:
                return int(across / aspect)
            return int(down * aspect) if aspect < 1 else down

        best = max(enlarged(grid) for grid in holding)
        return [grid for grid in holding if enlarged(grid) == best][-1]
    if aspect >= 1:
        nearest = max(ratio for ratio in groups if ratio <= aspect)
        return max(groups[nearest])
    nearest = min(
        (ratio for ratio in groups if ratio > aspect), key=lambda ratio: abs(1 / ratio - 1 / aspect)
    )
    return max(groups[nearest], key=lambda grid: grid[1])


def cut_photo(pixels: np.ndarray, tile_px: int, grid: tuple[int, int]) -> torch.Tensor:
    """Thumbnail and tiles of a photo.

    Resized in float and rounded once, which is what the model was trained on; torchvision's integer kernel
    differs in a fifth of the pixels.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        tile_px: side of a tile.
        grid: tiles across and down.

    Returns:
        (1 + tiles, 3, tile_px, tile_px) uint8, the thumbnail first, then row by row.
    """
    import torch

    photo = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return _cut(lambda height, width: _bicubic(photo, height, width), tile_px, grid)


def cut_mask(
    mask: np.ndarray,
    tile_px: int,
    grid: tuple[int, int],
    resample: str = "nearest",
    prompt: int = 1,
    ids: int = 5,
) -> torch.Tensor:
    """Thumbnail and tiles of a mask.

    Args:
        mask: (H, W), nonzero is the region.
        tile_px: side of a tile.
        grid: tiles across and down.
        resample: "nearest", or "bicubic" of the map in which the region has the value `prompt` and the rest
            the value `ids`, rounded; then every value but `ids` counts.
        prompt: number of the region's prompt.
        ids: number of prompts, which is the background's value.

    Returns:
        (1 + tiles, tile_px, tile_px) bool.
    """
    import torch

    if resample == "nearest":
        flat = torch.from_numpy(np.ascontiguousarray(mask)).ne(0)

        def resize(height: int, width: int) -> torch.Tensor:
            rows, columns = _nearest(flat.shape[0], height), _nearest(flat.shape[1], width)
            return flat[rows][:, columns][None]

        return _cut(resize, tile_px, grid)[:, 0]
    painted = torch.from_numpy(np.where(mask, np.uint8(prompt), np.uint8(ids)))[None]
    tiles = _cut(lambda height, width: _bicubic(painted, height, width), tile_px, grid)[:, 0]
    return tiles.clamp(max=ids) != ids


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The region's first and last column and row (x1, y1, x2, y2), over width and height; not empty."""
    height, width = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return columns[0] / width, rows[0] / height, columns[-1] / width, rows[-1] / height


def _cut(resize, tile_px: int, grid: tuple[int, int]) -> torch.Tensor:
    """Resize to one tile and to the whole grid, both from the original, and cut the latter row by row."""
    import torch

    across, down = grid
    thumbnail = resize(tile_px, tile_px)
    canvas = resize(down * tile_px, across * tile_px)
    tiles = canvas.unflatten(2, (across, tile_px)).unflatten(1, (down, tile_px))  # C, down, px, across, px
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([thumbnail[None], tiles])


def _bicubic(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    return resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)


@lru_cache(maxsize=1024)
def _nearest(old: int, new: int) -> torch.Tensor:
    """Which pixel each of `new` places takes from a line of `old`: torch's "nearest" rule, by torch."""
    import torch

    line = torch.arange(old, dtype=torch.float64)[None, None]
    return torch.nn.functional.interpolate(line, size=new, mode="nearest")[0, 0].long()
