"""What an engine is: it runs units through the stages of a recipe. `local` and `ray_data` each have one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from ...schemas.config import BuildConfig
    from ...schemas.errors import ParaCaptionError
    from ..corpus.work_list_summary import WorkList
    from ..corpus.writer import Draft
    from ..stages.base import Stage
    from .job import Job


class Part(NamedTuple):
    """The units of one subset that are to be built.

    Attributes:
        job: what every worker knows about the build of the subset.
        stages: of its recipe, in order.
        work_list: of the subset.
        units: indices of the units to run.
    """

    job: Job
    stages: list[Stage]
    work_list: WorkList
    units: list[int]

    @property
    def subset(self) -> str:
        return self.job.subset


Outcome = tuple[str, "Draft | ParaCaptionError"]
"""Of a unit: its subset, and the written unit, or the error that ends the subset."""


class Engine(Protocol):
    """Runs units through the stages of a recipe. Every engine writes the same bytes."""

    def check(self, config: BuildConfig) -> None:
        """Refuse what this engine cannot run, before anything is started or written.

        Raises:
            ConfigError: names the key and what to do.
        """
        ...

    def group(self, config: BuildConfig, subsets: Sequence[str]) -> list[list[str]]:
        """Which of these subsets are built side by side; the groups follow one another.

        Raises:
            ConfigError: there are too few resources for one of them.
            Retryable: the engine does not start.
        """
        ...

    def drafts(self, parts: Sequence[Part], tick: Callable[[], None]) -> Generator[Outcome]:
        """Run the units of a group and yield what became of each, in any order; the caller commits them.

        Args:
            parts: the subsets of the group.
            tick: called now and then from the caller's thread, so that it can show progress and notice a
                stall; an exception that it raises ends the run.

        Raises:
            StageFailed: the engine itself broke.
        """
        ...
