"""What an epoch's items came to, over all ranks: how many were asked for, and how many became examples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...schemas.errors import NothingToTrainOn


@dataclass
class DropCounts:
    """Counts of an epoch and of the run; kept in checkpoints, so that a resume goes on counting.

    Items are groups of an image's regions, or conversations. One that is no example was left out whole.

    Attributes:
        epoch: index of the epoch that `items` and `examples` are of.
        items: items that were asked for in the epoch so far.
        examples: those of them that became examples.
        run_items, run_examples: the same of the whole run.
        complete: whether the counts began with the run; not after a resume from a checkpoint without them.
    """

    epoch: int = 0
    items: int = 0
    examples: int = 0
    run_items: int = 0
    run_examples: int = 0
    complete: bool = True

    @classmethod
    def restored(cls, stored: dict[str, Any] | None, epoch: int) -> DropCounts:
        """The counts of a checkpoint. One of an earlier release has none: counting begins again there."""
        return cls(**stored) if stored is not None else cls(epoch, complete=False)

    def stored(self) -> dict[str, Any]:
        """The counts as plain values, for a checkpoint."""
        return asdict(self)

    def add(self, epoch: int, items: int, examples: int) -> None:
        """Count a step's items and examples of all ranks."""
        if epoch != self.epoch:
            self.epoch, self.items, self.examples = epoch, 0, 0
        self.items += items
        self.examples += examples
        self.run_items += items
        self.run_examples += examples

    def check(self, limit: float | None, epoch_items: int) -> None:
        """Stop a run that trains on nothing, or on too little of an epoch.

        Args:
            limit: share of an epoch's items that may be left out; None for no limit.
            epoch_items: all items of the epoch.

        Raises:
            NothingToTrainOn: more than `limit` of the epoch's items are left out, which may be known before
                it is over.
        """
        dropped = self.items - self.examples
        if limit is not None and dropped > limit * epoch_items:
            raise NothingToTrainOn(
                f"epoch {self.epoch}: {dropped:,} of the first {self.items:,} items were left out, which is "
                f"more than data.max_dropped_share ({limit:g}) allows of the {epoch_items:,} in an epoch; "
                f"{_ADVICE}, or raise data.max_dropped_share"
            )

    def check_epoch(self, limit: float | None) -> None:
        """As `check`, when no step of the epoch is left; an epoch without any example is an error always."""
        if self.items and not self.examples and (self.complete or self.items < self.run_items):
            raise NothingToTrainOn(
                f"epoch {self.epoch}: all of its {self.items:,} items were left out, so nothing can be "
                f"learned from it: {_ADVICE}"
            )
        if self.complete or self.items < self.run_items:
            self.check(limit, self.items)

    def check_run(self, limit: float | None) -> None:
        """The same for the whole run, which may end within its first epoch."""
        whole = DropCounts(self.epoch, self.run_items, self.run_examples, self.run_items, self.run_examples)
        if self.complete:
            whole.check_epoch(limit)


_ADVICE = (
    "start a run in a new `out` with data.on_bad_sample and data.on_too_long set to `error`: it stops at the "
    "first such item and says what is wrong with it; then repair the data and train in a new `out`"
)
