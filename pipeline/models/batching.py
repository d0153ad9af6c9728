"""Running out of a GPU's memory: halve the batch and go on, down to one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ...schemas.errors import OutOfMemory

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def refusing_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Turn torch's error about memory into one that names the work and says what to do.

    Raises:
        OutOfMemory: memory ran out.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{what}: out of memory ({error}); {advice}") from error


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
                self._refuse_one(len(batch), error)
                short = True
            if short:  # outside of the handler: the traceback holds the batch's tensors
                self._halve(len(batch))
        return done

    def stream(
        self, items: Sequence[Item], work: Callable[[Sequence[Item], int], Iterator[Result]]
    ) -> Iterator[Result]:
        """What `work` gives for each of `items`, in order. Its second argument is how many to hold at once.

        Raises:
            OutOfMemory: one item alone does not fit.
        """
        import torch

        num_done, short = 0, True
        while short:
            short = False
            try:
                for result in work(items[num_done:], self.size):
                    num_done += 1
                    yield result
            except torch.OutOfMemoryError as error:
                self._refuse_one(self.size, error)
                short = True
            if short:
                self._halve(self.size)

    def _refuse_one(self, size: int, error: Exception) -> None:
        if size == 1:
            raise OutOfMemory(
                f"{self.what}: out of memory with a batch of one ({error}); use a larger GPU, or "
                "raise num_gpus"
            ) from error

    def _halve(self, size: int) -> None:
        import torch

        self.size = max(1, size // 2)
        log.warning("%s: out of memory with %d at once; going on with %d", self.what, size, self.size)
        torch.cuda.empty_cache()
