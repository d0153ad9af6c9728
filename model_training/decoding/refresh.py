"""When an approximate cache is computed again, and the cache itself, in which each row is so on its own.

In layouts in which the prefix sees the captions, its keys and values change with every token that is written.
A step over the captions alone works with those of the last pass over the whole sequence. A row is computed
whole

- every few steps,
- again, when a step over the captions alone would keep a token that it is not sure of: that step keeps
  nothing, and
- as long as the whole passes keep tokens that they are not sure of. So a row that is never sure is decoded as
  without a cache, and at its cost.

Shape suffixes: B rows, R some of the rows, G heads of keys and values, L tokens, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..model.llada import KVCache


class Refresh:
    """The rows of a bucket, as far as their caches are concerned. On the host; every row is by itself.

    Args:
        num_rows: of the bucket.
        every: steps after which a row is computed whole; 0 for never after the first step.

    Attributes:
        age_B: steps since the row's last whole pass; -1 before the first one.
        whole_B: bool, rows that the last step has computed whole.
        unsure_B: bool, rows whose last step was not sure of what it would keep.
        num_held_B: how many steps of each row have kept nothing, and were done again.
    """

    def __init__(self, num_rows: int, every: int):
        self.every = every
        self.age_B = np.full(num_rows, -1)
        self.whole_B, self.unsure_B = np.zeros((2, num_rows), bool)
        self.num_held_B = np.zeros(num_rows, np.int64)

    def begin(self, rows: Sequence[int]) -> None:
        """Take in that some rows hold new sequences."""
        self.age_B[rows], self.num_held_B[rows], self.unsure_B[rows] = -1, 0, False

    def due_B(self) -> np.ndarray:
        """The rows that the next step computes whole."""
        due_B = (self.age_B < 0) | self.unsure_B
        return due_B | (self.age_B >= self.every) if self.every else due_B

    def step(self, whole_B: np.ndarray) -> None:
        """Take in which rows a step computes whole."""
        self.age_B = np.where(whole_B, 1, self.age_B + 1)
        self.whole_B, self.unsure_B = whole_B, np.zeros_like(whole_B)

    def unsure(self, unsure_B: np.ndarray) -> None:
        """Take in which rows the last step was not sure of; those that were not computed whole are held."""
        held_B = unsure_B & ~self.whole_B
        self.unsure_B = unsure_B
        self.age_B -= held_B
        self.num_held_B += held_B


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
        if not self.filling or len(self.layers) == layer:
            return super().update(layer, k_BGLK, v_BGLK)
        fresh, front = (k_BGLK, v_BGLK), slice(None, self.num_cached)
        if self.rows_R is not None:
            for cached, new in zip(self.layers[layer], fresh, strict=True):
                cached[self.rows_R, :, front] = new[:, :, front]
            return fresh
        if self.fresh_B is None:
            return super().update(layer, k_BGLK, v_BGLK)
        found = []
        for cached, new in zip(self.layers[layer], fresh, strict=True):
            fills_B111 = self.fresh_B[:, None, None, None]
            cached[:, :, front].copy_(new[:, :, front].where(fills_B111, cached[:, :, front]))
            cached[:, :, self.num_cached : new.shape[2]] = new[:, :, self.num_cached :]
            found.append(cached[:, :, : new.shape[2]])
        return found[0], found[1]
