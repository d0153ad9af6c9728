"""An engine that mixes subsets as the one on Ray does, but in this process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack

from paracaption.pipeline.executor.engine import Outcome, Part
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.executor.operators import interleave, operators_of
from paracaption.pipeline.executor.rows import outcome_of
from paracaption.pipeline.executor.workers import Workers
from paracaption.schemas.config import BuildConfig


class SideBySide(LocalEngine):
    """Sends the units of all subsets through one chain of `Workers`, one unit after the other.

    Attributes:
        chain: the workers of the last run, in order.
    """

    def __init__(self) -> None:
        self.chain: list[Workers] = []

    def group(self, config: BuildConfig, subsets: Sequence[str]) -> list[list[str]]:
        return [list(subsets)]

    def drafts(self, parts: Sequence[Part], tick: Callable[[], None]) -> Generator[Outcome]:
        by_subset = {part.subset: part for part in parts}
        operators = operators_of({part.subset: part.stages for part in parts}, parts[0].job.config)
        with ExitStack() as stack:
            self.chain = [
                stack.enter_context(
                    Workers(
                        [(by_subset[subset].job, step) for subset, step in operator.steps.items()],
                        lambda _: lambda event: tick(),
                    )
                )
                for operator in operators
            ]
            for subset, number in interleave({part.subset: len(part.units) for part in parts}):
                part = by_subset[subset]
                index = part.units[number]
                row = {"subset": subset, "unit": part.work_list.unit_name(index), "index": index}
                for workers in self.chain:
                    row = workers(row)
                yield subset, outcome_of(row)
                tick()
