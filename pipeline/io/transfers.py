"""Tensors between the host and a device, for which the host waits as little as it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, from pinned memory to a GPU, so that the host need not wait."""
    import torch

    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    if device.type == "cuda" and tensor.numel() and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device on the host, which waits once for all of them.

    Those of a GPU are in pinned memory, of which there should not be much: clone what is kept for long.
    Tensors of the host are returned as they are.
    """
    import torch

    if not tensors or tensors[0].is_cpu:
        return list(tensors)
    device = tensors[0].device
    copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=device.type == "cuda") for each in tensors]
    filled = [number for number, each in enumerate(tensors) if each.numel()]
    for number in filled:  # in order, so that the last copy waits for all of them
        copies[number].copy_(tensors[number], non_blocking=number != filled[-1])
    return copies
