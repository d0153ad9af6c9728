"""The engine that builds in this process: the same worker, one unit after the other in a plain loop.

It is for tests, for a debugger that stops inside a captioner of your own, and for a look at a few images. It
lacks what Ray Data adds:

- There is one process: `concurrency` and `num_cpus` are ignored, and a stage with a `runtime_env` is refused.
- All models share at most one GPU, and are loaded at the same time.
- A backend that kills the process ends the build. The next run finds the note of the images that were in
  flight, runs them one by one, and drops the one that has killed it `failures.crash_attempts` times.
- A call that hangs is not ended. After `failures.stall_s` the driver logs where it is (`stalls.telling`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError
from ..corpus import writer
from ..sources.protocols import SOURCE_STAGE
from ..stages.base import ModelStage
from ..stages.recipes import recipe_of
from . import gpus
from .engine import Outcome, Part
from .rows import outcome_of
from .worker import Worker


class LocalEngine:
    """Builds in this process, without Ray."""

    def check(self, config: BuildConfig) -> None:
        """Refuse a configuration that one process cannot build.

        Raises:
            ConfigError: a stage has a `runtime_env`, or the models ask for more than this machine's one GPU.
        """
        for subset in config.subsets:
            self._check_models([each for each in recipe_of(config, subset) if isinstance(each, ModelStage)])

    def _check_models(self, models: list[ModelStage]) -> None:
        for stage in models:
            if stage.backend.runtime_env:
                raise ConfigError(
                    f"{stage.place}.runtime_env: the local engine runs every stage in this process; remove "
                    "it, or build without --local"
                )
        needed = sum(stage.backend.num_gpus for stage in models)
        available = min(1, len(gpus.list_gpus())) if needed else 0
        if needed > available:
            wanted = ", ".join(f"{stage.name} {stage.backend.num_gpus:g}" for stage in models)
            fix = f"{gpus.MANY_POOLS}; or build without --local"
            if not available:
                fix = "set `num_gpus: 0`, or build on a machine with a GPU"
            raise ConfigError(
                f"the models ask for {needed:g} GPUs together ({wanted}), the local engine has {available}; "
                f"{fix}"
            )

    def group(self, config: BuildConfig, subsets: Sequence[str]) -> list[list[str]]:
        """Each subset alone: one process gains nothing from two at once."""
        return [[subset] for subset in subsets]

    def drafts(self, parts: Sequence[Part], tick: Callable[[], None]) -> Generator[Outcome]:
        """Run units one after the other; `tick` is called after each event of the worker."""
        for job, stages, work_list, units in parts:
            with Worker(
                job, [SOURCE_STAGE, *stages, writer.WRITE_STAGE], on_event=lambda _: tick()
            ) as worker:
                for index in units:
                    row = worker({"unit": work_list.unit_name(index), "index": index})
                    yield job.subset, outcome_of(row)
