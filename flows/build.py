"""The flow that builds a corpus: the driver's steps as Prefect tasks.

Prefect starts and shows a build, which is a handful of task runs. What is committed is known from the
manifests alone, so that a retried task resumes where it stopped.

Annotations are evaluated (no `from __future__ import annotations`): a served flow is pickled by value, and
the process that runs it needs `BuildConfig` itself, not its name, to check the parameters.
"""

import time
from collections.abc import Callable
from typing import Any, cast
from uuid import UUID

from prefect import flow
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from ..pipeline.corpus import card, utilization
from ..pipeline.corpus.reader import open_corpus
from ..pipeline.executor import driver, ray_data
from ..pipeline.executor.progress import Progress
from ..schemas.config import BuildConfig
from . import callbacks
from .steps import artifact_key, step

ARTIFACT_EVERY_S = 10.0


@flow(name="build-corpus", log_prints=False)
def build_corpus(
    config: BuildConfig,
    ray_address: str | None = None,
    limit_images: int | None = None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Masks in, verified region captions out: every configured subset, then one corpus.

    Args:
        config: what to build and where to.
        ray_address: "auto" or "host:port"; None starts Ray on this machine.
        limit_images: build only the first N images of each subset (a pilot; give it an `out` of its own).
        retry_failed: also build committed units again that hold drops by error.

    Returns:
        The corpus's statistics (OUT/stats.json).
    """
    engine = callbacks.engine.get() or ray_data.RayEngine(ray_address)
    show = callbacks.on_build_progress.get()
    published: dict[str, _Artifacts] = {}

    def on_progress(progress: Progress) -> None:
        show(progress)
        if progress.subset not in published:
            published[progress.subset] = _Artifacts(progress.subset)
        published[progress.subset].update(progress)

    summary = driver.build(
        config,
        engine,
        limit_images=limit_images,
        retry_failed=retry_failed,
        on_progress=on_progress,
        step=_as_task,
    )
    for artifacts in published.values():
        artifacts.finish()
    text = card.render_card(open_corpus(config.out, confined=False).summary, config)
    create_markdown_artifact(key="dataset-card", markdown=text)
    return summary


def _as_task(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step of the driver as a task whose name says the subset."""

    def run(*arguments: Any) -> Any:
        about = next((each for each in arguments if isinstance(each, str)), None)
        name = function.__name__.replace("_", " ")
        return step(function).with_options(task_run_name=f"{about}: {name}" if about else name)(*arguments)

    return run


class _Artifacts:
    """The live view as Prefect artifacts: a progress bar while it runs, a table when it is done."""

    def __init__(self, subset: str):
        self.subset = subset
        created = create_progress_artifact(
            progress=0.0, key=artifact_key(subset, "units"), description=f"{subset}: units committed"
        )
        self.id = cast(UUID, created)  # a coroutine only where the caller is one
        self.updated = time.monotonic()

    def update(self, progress: Progress) -> None:
        self.progress = progress
        if time.monotonic() - self.updated > ARTIFACT_EVERY_S and progress.pending:
            update_progress_artifact(self.id, progress=100.0 * progress.done / progress.pending)
            self.updated = time.monotonic()

    def finish(self) -> None:
        progress = self.progress
        update_progress_artifact(self.id, progress=100.0)
        rows = [
            {
                "stage": name,
                "units": stage.units,
                "regions": stage.regions,
                "asked": stage.asked,
                "seconds": round(stage.seconds, 1),
                "dropped": sum(n for key, n in progress.dropped.items() if key.partition("/")[0] == name),
                **_utilization(progress.utilization.get(name)),
            }
            for name, stage in progress.stages.items()
        ]
        create_table_artifact(
            key=artifact_key(self.subset, "stages"),
            table=rows,
            description=f"{self.subset}: this run by stage",
        )


def _utilization(stage: utilization.StageUtilization | None) -> dict[str, Any]:
    """A model stage's actors in the table: start-up, share of time in calls, the backend's own numbers."""
    if stage is None:
        return {}
    return {
        "actors": stage.actors,
        "start-up s": round(stage.startup_s, 1),
        "busy": None if stage.busy_share is None else round(stage.busy_share, 3),
        "GPU in calls": None if stage.gpu is None else round(stage.gpu, 3),
        **{name: round(value, 3) for name, value in stage.report.items()},
    }
