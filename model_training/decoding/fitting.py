"""Captions of many things that have a photo each, with as many sequences at once as fit into memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ...pipeline.models.batching import Batches
from ...schemas.decoding import DecodeOptions
from .region_captioner import RegionCaptioner, RegionCaptions

Item = TypeVar("Item")
Kept = TypeVar("Kept")


def caption_each(
    captioner: RegionCaptioner,
    items: Sequence[Item],
    read: Callable[[Item], tuple[Kept, np.ndarray, list[np.ndarray]]],
    batches: Batches,
    options: DecodeOptions,
    **how: Any,
) -> Iterator[tuple[Kept, RegionCaptions]]:
    """Caption the regions of each item. When memory runs out, fewer sequences are decoded at once from there.

    Args:
        captioner: the model.
        items: what has a photo.
        read: what to keep of an item until its captions are there, its pixels and its masks; without masks
            there are no captions. It is called in a thread, a few items ahead; for those that were under way
            when memory ran out, again.
        batches: how many sequences are decoded at once.
        options: how captions are decoded.
        how: further arguments of `RegionCaptioner.iter_captions`.

    Yields:
        What was kept of each item, and its captions, in order.

    Raises:
        OutOfMemory: one sequence does not fit.
        ConfigError, StageFailed: as `RegionCaptioner.iter_captions`.
        Exception: what `read` raised, after the items before.
    """

    def work(left: Sequence[Item], size: int) -> Iterator[tuple[Kept, RegionCaptions]]:
        waiting: deque[Kept] = deque()

        def photos() -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
            for item in left:
                kept, pixels, masks = read(item)
                waiting.append(kept)
                yield pixels, masks

        for found in captioner.iter_captions(photos(), options, batch_size=size, **how):
            yield waiting.popleft(), found

    return batches.stream(items, work)
