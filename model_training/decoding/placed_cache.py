"""A KV cache in which every token of a sequence has a place, so that any of them can be computed again.

Shape suffixes: R sequences of a pass, Q tokens of a pass, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.llada import KVCache


class PlacedCache(KVCache):
    """Keys and values of whole sequences, layer by layer. Set `rows` and `places` before each pass.

    A pass computes some tokens of some sequences, puts their keys and values into their places, and attends
    to all that lie in the cache.

    Args:
        length: tokens of a sequence.

    Attributes:
        rows: the sequences of the next pass; None for all.
        places: the tokens of the next pass: a slice of each sequence, or (R, Q). The first pass is over all.
    """

    def __init__(self, length: int):
        super().__init__(length, 0)
        self.rows: Tensor | None = None
        self.places: slice | Tensor = slice(None)

    def update(self, layer: int, k_BGLK: Tensor, v_BGLK: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends to, given those of the tokens of this pass."""
        if len(self.layers) == layer:
            self.layers.append((k_BGLK, v_BGLK))
            return k_BGLK, v_BGLK
        found = []
        for cached, fresh in zip(self.layers[layer], (k_BGLK, v_BGLK), strict=True):
            rows = self.rows
            if isinstance(self.places, slice):
                cached[slice(None) if rows is None else rows, :, self.places] = fresh
            else:
                numbers = torch.arange(len(cached), device=cached.device) if rows is None else rows
                cached[numbers[:, None], :, self.places] = fresh.transpose(1, 2)
            found.append(cached if rows is None else cached[rows])
        return found[0], found[1]

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but some."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
