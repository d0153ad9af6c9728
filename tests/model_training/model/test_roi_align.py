import pytest
import torch
from torchvision.ops import roi_align as torchvision_roi_align

from paracaption.model_training.model.roi_align import roi_align


@pytest.mark.parametrize("scale", [1.0, 1 / 32])
@pytest.mark.parametrize("rows, columns", [(8, 8), (4, 12), (1, 1)])
def test_equals_torchvision_s_for_boxes_within_the_map(rows: int, columns: int, scale: float):
    torch.manual_seed(0)
    maps = torch.randn(3, rows, columns, 5, dtype=torch.float64)
    corners = torch.rand(20, 2, 2, dtype=torch.float64).sort(dim=1).values
    corners[0] = torch.tensor([[0, 0], [1, 1]])  # the whole map
    corners[1] = corners[1, :1]  # one point
    boxes = corners.flatten(1) * torch.tensor([columns, rows] * 2)
    which = torch.arange(20) % 3
    rois = torch.cat([which[:, None].double(), boxes], dim=1)
    wanted = torchvision_roi_align(maps.permute(0, 3, 1, 2), rois, 4, scale, sampling_ratio=2, aligned=True)
    found = roi_align(maps, boxes, which, 4, scale)
    torch.testing.assert_close(found, wanted.flatten(2).transpose(1, 2))


def test_gradients_reach_the_map():
    maps = torch.randn(1, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.3, 0.7, 3.1, 3.9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: roi_align(m, boxes, torch.tensor([0]), 2), maps)
