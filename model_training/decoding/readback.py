"""Numbers of a device on their way to the host, while the device goes on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .head import confidence_of


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

    def wait(self) -> None:
        """Wait for whatever was sent to the host, not by this object alone."""
        for event in self.events[:1]:
            now = type(event)()
            now.record()
            now.synchronize()


class Sent(NamedTuple):
    """The state of some rows on its way to the host; it is there when `num_read` steps have been read.

    Attributes:
        stacked: tokens, open slots, predictions and doubts, as one tensor.
        num_read: how many steps.
    """

    stacked: Tensor
    num_read: int


def read_state(stacked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, open slots, predictions and their confidence, from the state of rows on the CPU."""
    tokens, opens, predicted, doubt = stacked.unbind()
    return tokens.long(), opens.bool(), predicted.long(), confidence_of(doubt)
