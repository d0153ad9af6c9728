"""Builds a corpus: `driver` owns the order of the steps, an engine runs the units.

`ray_data` is the default engine and spreads over machines; `local` is the same worker in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ...schemas.config import BuildConfig
    from ..corpus.work_list import Plan
    from ..corpus.writer import Draft
    from ..stages.base import Stage
    from .worker import Job


class Engine(Protocol):
    """Runs units through the stages of a recipe. Every engine gives the same bytes."""

    def check(self, config: BuildConfig) -> None:
        """Refuse what this engine cannot run, before anything is started or written.

        Raises:
            ConfigError: names the key and what to do.
        """
        ...

    def drafts(
        self, job: Job, stages: list[Stage], plan: Plan, units: list[int], tick: Callable[[], None]
    ) -> Generator[Draft]:
        """Units as they are written, in any order; the caller commits them.

        Args:
            job: what every worker knows of the build.
            stages: of the recipe, in order.
            plan: of the subset.
            units: indices of the units to run.
            tick: called now and then from the caller's thread, so that it can show progress and notice a
                stall; what it raises ends the run.

        Raises:
            StageFailed: a backend cannot start, or the output cannot be written.
        """
        ...
