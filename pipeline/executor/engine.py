"""What an engine is: it runs units through the stages of a recipe. `local` and `ray_data` each have one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ...schemas.config import BuildConfig
    from ..corpus.work_list_summary import WorkList
    from ..corpus.writer import Draft
    from ..stages.base import Stage
    from .worker import Job


class Engine(Protocol):
    """Runs units through the stages of a recipe. Every engine writes the same bytes."""

    def check(self, config: BuildConfig) -> None:
        """Refuse what this engine cannot run, before anything is started or written.

        Raises:
            ConfigError: names the key and what to do.
        """
        ...

    def drafts(
        self, job: Job, stages: list[Stage], work_list: WorkList, units: list[int], tick: Callable[[], None]
    ) -> Generator[Draft]:
        """Run units and yield each when it is written, in any order; the caller commits it.

        Args:
            job: what every worker knows about the build.
            stages: of the recipe, in order.
            work_list: the subset's work list.
            units: indices of the units to run.
            tick: called now and then from the caller's thread, so that it can show progress and notice a
                stall; an exception that it raises ends the run.

        Raises:
            StageFailed: a backend cannot start, or the output cannot be written.
        """
        ...
