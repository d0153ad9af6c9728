"""RoI-Align in plain torch, so that the model needs no torchvision.

Shape suffixes: I maps, Y rows, X columns, D channels, R regions, P sample points along a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLES = 2
"""Sample points of a bin along each side, as in PerceptionDLM and GAR."""


def roi_align(maps_IYXD: Tensor, boxes_R4: Tensor, map_R: Tensor, size: int, scale: float = 1.0) -> Tensor:
    """RoI-Align as `torchvision.ops.roi_align` computes it with `sampling_ratio=2` and `aligned=True`.

    Args:
        maps_IYXD: feature maps, channels last.
        boxes_R4: (x1, y1, x2, y2) within the map, in cells before scaling.
        map_R: int64, the number of each region's map.
        size: bins along each side.
        scale: factor on the boxes, at most 1.

    Returns:
        (R, size * size, D), bins row by row.
    """
    points = size * SAMPLES
    place_P = (torch.arange(points, device=maps_IYXD.device, dtype=boxes_R4.dtype) + 0.5) / points
    start_R2, end_R2 = (boxes_R4 * scale - 0.5).split(2, dim=1)
    place_R2P = start_R2[..., None] + (end_R2 - start_R2)[..., None] * place_P
    rows = _neighbors(place_R2P[:, 1], maps_IYXD.shape[1])
    columns = _neighbors(place_R2P[:, 0], maps_IYXD.shape[2])
    sampled_RPPD = torch.zeros((), dtype=maps_IYXD.dtype, device=maps_IYXD.device)
    for row_RP, row_weight_RP in rows:
        for column_RP, column_weight_RP in columns:
            weight_RPP = row_weight_RP[:, :, None] * column_weight_RP[:, None]
            cells_RPPD = maps_IYXD[map_R[:, None, None], row_RP[:, :, None], column_RP[:, None]]
            sampled_RPPD = sampled_RPPD + weight_RPP[..., None].to(maps_IYXD.dtype) * cells_RPPD
    bins = sampled_RPPD.unflatten(2, (size, SAMPLES)).unflatten(1, (size, SAMPLES))
    return bins.mean(dim=(2, 4)).flatten(1, 2)


def _neighbors(place_RP: Tensor, cells: int) -> list[tuple[Tensor, Tensor]]:
    """The two cells around each place, with their weights. Places outside the map are moved onto its edge."""
    place_RP = place_RP.clamp(0, cells - 1)
    first_RP = place_RP.floor().clamp(max=max(cells - 2, 0))
    share_RP = place_RP - first_RP
    second_RP = (first_RP + 1).clamp(max=cells - 1)
    return [(first_RP.long(), 1 - share_RP), (second_RP.long(), share_RP)]
