"""When an approximate cache is computed again, and the cache itself, in which each row is so on its own.

In layouts in which the prefix sees the captions, its keys and values change with every token that is written.
A step over the captions alone works with those of the last pass over the whole sequence. A row is refreshed,
that is computed over its whole sequence, every few steps, and whenever a step over the captions alone would
keep a token that it is not sure of: then the step is done again.

Shape suffixes: B rows, R some of the rows, G heads of keys and values, L tokens, K width of a head.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..model.llada import KVCache


class Refresh:
    """The rows of a bucket, as far as their caches are concerned. On the host; every row is by itself.

    Args:
        num_rows: of the bucket.
        every: steps after which a row is refreshed; 0 for never after the first pass.

    Attributes:
        age_B: steps since the row's last refresh; -1 before the first one.
        held_B: bool, rows whose last step has to be done again.
    """

    def __init__(self, num_rows: int, every: int):
        self.every = every
        self.age_B = np.full(num_rows, -1)
        self.held_B = np.zeros(num_rows, bool)

    def due_B(self) -> np.ndarray:
        """The rows that the next step computes over their whole sequences."""
        old_B = self.age_B >= self.every if self.every else self.age_B < 0
        return old_B | (self.age_B < 0) | self.held_B

    def step(self, refreshed_B: np.ndarray) -> None:
        """Take in which rows a step has refreshed."""
        self.age_B = np.where(refreshed_B, 1, self.age_B + 1)
        self.held_B = np.zeros_like(self.held_B)

    def hold(self, held_B: np.ndarray) -> None:
        """Take in which rows kept nothing in the last step, since they were not sure."""
        self.age_B = self.age_B - held_B
        self.held_B = held_B


class RefreshedCache(KVCache):
    """A KV cache of which single rows are filled again.

    Attributes:
        fresh_B: bool, which rows the next pass over whole sequences fills; the others go on with what is
            cached. None for all of them.
        rows_R: the rows that the next such pass is over; None for all of them.
    """

    fresh_B: Tensor | None = None
    rows_R: Tensor | None = None

    def update(self, layer: int, k_BGLK: Tensor, v_BGLK: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache.update`."""
        whole = self.rows_R is None and self.fresh_B is None
        if not self.filling or whole or len(self.layers) == layer:
            return super().update(layer, k_BGLK, v_BGLK)
        fresh, front = (k_BGLK, v_BGLK), slice(None, self.num_cached)
        if self.rows_R is not None:
            for cached, new in zip(self.layers[layer], fresh, strict=True):
                cached[self.rows_R, :, front] = new[:, :, front]
            return fresh
        found = []
        for cached, new in zip(self.layers[layer], fresh, strict=True):
            fills_B111 = self.fresh_B[:, None, None, None]
            cached[:, :, front].copy_(new[:, :, front].where(fills_B111, cached[:, :, front]))
            cached[:, :, self.num_cached : new.shape[2]] = new[:, :, self.num_cached :]
            found.append(cached[:, :, : new.shape[2]])
        return found[0], found[1]

    def for_sequences(self, rows_B: Tensor) -> RefreshedCache:
        """See `KVCache.for_sequences`."""
        part = RefreshedCache(self.num_cached, self.num_following)
        part.layers = [(keys[rows_B], values[rows_B]) for keys, values in self.layers]
        part.filling = self.filling
        return part
