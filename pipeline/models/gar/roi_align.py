"""RoI replay: the region's features once more, resampled from the feature map, as tokens of the prompt.

The published model scales the region's box twice: into cells of the feature map, and then once more by 1/28
inside RoI-Align. It was trained like that, so what it sees is a small window at the top left of the map, not
the region; scaling once changes its answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...io.transfers import upload

SCALE = 1 / 28
"""Of the second scaling. 28 is a token's side in pixels (patches of 14, pooled by 2), as published."""

Box = tuple[float, float, float, float]


def window(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns of the feature map, from its top left, that RoI-Align can reach.

    Its samples lie at most at the scaled box's far corner; each reads the cells around it.
    """
    across, down = grid
    rows, columns = (math.ceil(tiles * side * SCALE) + 2 for tiles in (down, across))
    return min(rows, down * side), min(columns, across * side)


def replay(tiles_tsh: Sequence[Tensor], grid: tuple[int, int], boxes: Sequence[Box], side: int) -> Tensor:
    """Replayed features of several regions of one photo.

    Args:
        tiles_tsh: for each of R regions (across * down, side * side, H): features of the tiles row by row,
            without the thumbnail.
        grid: tiles across and down.
        boxes: R boxes as `image.box_of` gives them.
        side: tokens along a tile's side.

    Returns:
        (R, side * side, H) in the features' dtype.
    """
    from torchvision.ops import roi_align

    across, down = grid
    rows, columns = window(grid, side)
    need_down, need_across = math.ceil(rows / side), math.ceil(columns / side)
    reached = [tiles.unflatten(0, (down, across))[:need_down, :need_across] for tiles in tiles_tsh]
    cells = (
        torch.stack(reached).unflatten(3, (side, side)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    )  # R, H, rows, columns
    cells = cells[:, :, :rows, :columns].float().contiguous()
    width, height = across * side, down * side
    scaled = [
        [index, x1 * width, y1 * height, x2 * width, y2 * height]
        for index, (x1, y1, x2, y2) in enumerate(boxes)
    ]
    rois = upload(torch.tensor(scaled, dtype=torch.float64).to(torch.float32), cells.device)
    crops = roi_align(cells, rois, (side, side), spatial_scale=SCALE, sampling_ratio=2, aligned=True)
    return crops.flatten(2).transpose(1, 2).to(tiles_tsh[0].dtype)
