"""Running out of a GPU's memory: halve the batch and go on, down to one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...schemas.errors import OutOfMemory

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches:
    """Runs a function over batches whose size halves when memory runs out, and stays halved.

    Args:
        size: items in a batch at the start.
        what: names the work in the error.
    """

    def __init__(self, size: int, what: str):
        self.size = size
        self.what = what

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """`work` on every batch of `items`, joined.

        Raises:
            OutOfMemory: one item alone does not fit.
        """
        import torch

        done: list[Result] = []
        while len(done) < len(items):
            batch = items[len(done) : len(done) + self.size]
            short = False
            try:
                done += work(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise OutOfMemory(
                        f"{self.what}: out of memory with a batch of one ({error}); use a larger GPU, or "
                        "raise num_gpus"
                    ) from error
                short = True
            if short:  # outside of the handler: the traceback holds the batch's tensors
                self.size = max(1, len(batch) // 2)
                log.warning(
                    "%s: out of memory with %d at once; going on with %d", self.what, len(batch), self.size
                )
                torch.cuda.empty_cache()
        return done
