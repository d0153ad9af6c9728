"""Photos and masks to what the vision tower takes: tiles, patches marked with regions, boxes.

Legend: T tiles, S tile side in pixels, G patches along a tile's side, N regions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UNMARKED = 255
"""Of a painted mask, outside the region."""


def choose_grid(width: int, height: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) whose shape is nearest the image's.

    Candidates go by area; of equally near ones a larger grid wins if the image has more than half its pixels.
    """
    ratio = width / height
    grids = sorted(
        ((w, h) for w in range(1, max_tiles + 1) for h in range(1, max_tiles // w + 1)),
        key=lambda g: g[0] * g[1],
    )
    best, nearest = (1, 1), float("inf")
    for w, h in grids:
        distance = abs(ratio - w / h)
        large = width * height > 0.5 * tile_px**2 * w * h
        if distance < nearest or (distance == nearest and large):
            best, nearest = (w, h), distance
    return best


def num_tiles(grid: tuple[int, int]) -> int:
    """Tiles of an image, thumbnail included."""
    tiles = grid[0] * grid[1]
    return tiles + (tiles > 1)


def cut_tiles(image: Image.Image, grid: tuple[int, int], tile_px: int) -> NDArray[np.uint8]:
    """The image stretched over the grid and cut row by row, the thumbnail last. T3SS."""
    views = [
        np.asarray(view) for view in _views(image.convert("RGB"), grid, tile_px, Image.Resampling.BICUBIC)
    ]
    return np.concatenate([_cut(view, grid if i == 0 else (1, 1)) for i, view in enumerate(views)]).transpose(
        0, 3, 1, 2
    )


def paint(mask_HW: NDArray[np.bool_], prompt: int, grid: tuple[int, int], tile_px: int) -> NDArray[np.uint8]:
    """The mask as the reference resizes it: the prompt's number on 255, bicubic. TSS.

    Whatever is not 255 afterwards is inside: blended edge pixels are, overshoot is not.
    """
    painted = Image.fromarray(np.where(mask_HW, np.uint8(prompt), np.uint8(UNMARKED)))
    views = [np.asarray(view) for view in _views(painted, grid, tile_px, Image.Resampling.BICUBIC)]
    return np.concatenate([_cut(view, grid if i == 0 else (1, 1)) for i, view in enumerate(views)])


def mark_patches(
    mask_HW: NDArray[np.bool_],
    prompt: int,
    grid: tuple[int, int],
    tile_px: int,
    patch_px: int,
    resize: str,
    rule: str,
) -> NDArray[np.bool_]:
    """The patches that a region marks, in every tile. TGG.

    Args:
        mask_HW: the region; not empty.
        prompt: its prompt's number, which bicubic resizing depends on.
        grid: of the image's tiles.
        tile_px: side of a tile.
        patch_px: side of a patch.
        resize: `bicubic` as in `paint`, or `area`.
        rule: `corner`: a patch's top left pixel decides, and a small region may mark none. `overlap`: patches
            that the region covers at least half as much as the one it covers most, in the tiles and in the
            thumbnail each. A large region marks what it half covers; a thin or small one is not lost.
    """
    side = tile_px // patch_px
    if resize == "bicubic":
        views = [(paint(mask_HW, prompt, grid, tile_px) != UNMARKED).astype(np.float32)]
        if num_tiles(grid) > 1:
            views = [views[0][:-1], views[0][-1:]]
    else:
        covered = Image.fromarray(mask_HW.astype(np.float32))
        views = [
            _cut(np.asarray(view), grid if i == 0 else (1, 1))
            for i, view in enumerate(_views(covered, grid, tile_px, Image.Resampling.BOX))
        ]
    return np.concatenate([_patches(view, side, rule) for view in views])


def box_of(mask_HW: NDArray[np.bool_], edges: str) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of a mask that is not empty, as shares of the image."""
    height, width = mask_HW.shape
    columns, rows = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
    beyond = int(edges == "exclusive")
    return (
        columns[0] / width,
        rows[0] / height,
        (columns[-1] + beyond) / width,
        (rows[-1] + beyond) / height,
    )


def _views(
    image: Image.Image, grid: tuple[int, int], tile_px: int, resampling: Image.Resampling
) -> list[Image.Image]:
    """The image stretched over the grid, and the thumbnail if the grid has more than one tile."""
    sizes = [(grid[0] * tile_px, grid[1] * tile_px)]
    if num_tiles(grid) > 1:
        sizes.append((tile_px, tile_px))
    # Width first, then height. In one call Pillow 13 goes the other way round when only the height shrinks,
    # which moves 8-bit values by up to 5: https://github.com/python-pillow/Pillow/pull/9549
    widened = [image.resize((width, image.height), resampling) for width, _ in sizes]
    return [view.resize(size, resampling) for view, size in zip(widened, sizes, strict=True)]


def _cut(view: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Row by row: (rows*S, columns*S, ...) to TSS..."""
    (columns, rows), (height, width) = grid, view.shape[:2]
    tiles = view.reshape(rows, height // rows, columns, width // columns, *view.shape[2:]).swapaxes(1, 2)
    return tiles.reshape(rows * columns, *tiles.shape[2:])


def _patches(covered_TSS: np.ndarray, side: int, rule: str) -> NDArray[np.bool_]:
    T, S = covered_TSS.shape[:2]
    patch = S // side
    if rule == "corner":
        return covered_TSS[:, ::patch, ::patch] >= 0.5
    share_TGG = covered_TSS.reshape(T, side, patch, side, patch).mean((2, 4))
    return share_TGG >= 0.5 * share_TGG.max()
