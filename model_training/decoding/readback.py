"""Numbers of a device on their way to the host, while the device goes on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Readback:
    """Copies of a tensor that the host reads later, in the order in which they were sent.

    Args:
        source: the tensor; it stays where it is. On the CPU nothing is copied: read before it changes.
        depth: how many copies may be on their way.
    """

    def __init__(self, source: Tensor, depth: int):
        self.source, self.depth = source, depth
        self.sent = self.received = 0
        device = source.device
        if device.type == "cpu":
            self.copies, self.events = [source], []
            return
        pinned = device.type == "cuda"
        self.copies = [torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned) for _ in range(depth)]
        self.events = [torch.get_device_module(device).Event() for _ in range(depth)]

    def send(self) -> None:
        """Begin a copy."""
        if self.events:
            place = self.sent % self.depth
            self.copies[place].copy_(self.source, non_blocking=True)
            self.events[place].record()
        self.sent += 1

    def receive(self) -> np.ndarray:
        """Wait for the oldest copy."""
        assert self.received < self.sent, "nothing was sent"
        place = self.received % len(self.copies)
        if self.events:
            self.events[place].synchronize()
        self.received += 1
        return self.copies[place].numpy().copy()
