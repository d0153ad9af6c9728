"""Build a subset, build the corpus: the paper's figure as Prefect flows.

Prefect is the front desk: a build is a handful of task runs, retried cheaply because a retry resumes. What is
done is known from the manifests alone.

Annotations are evaluated (no `from __future__ import annotations`): a served flow is pickled by value, and
the process that runs it needs `BuildConfig` itself, not its name, to check the parameters.
"""

import time
import uuid
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows import watch
from flows.steps import step
from pipeline import activity, audit, card, corpus, events, files, plan, shards, sources, stages, stream
from pipeline.config_file import dump_config
from schemas.config import BuildConfig

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
        limit_images: build from the first so many images of each subset (a pilot; use an `out` of its own).
        retry_failed: also build committed units again that hold drops by error.

    Returns:
        The corpus's statistics (OUT/stats.json).
    """
    with stream.locked(Path(config.out)):
        write_config(config)
        for subset in config.subsets:
            build_subset(config, subset, ray_address, limit_images, retry_failed)
        return merge_corpus(config)


@flow(name="build-subset", log_prints=False)
def build_subset(
    config: BuildConfig,
    subset: str,
    ray_address: str | None = None,
    limit_images: int | None = None,
    retry_failed: bool = False,
) -> None:
    """One subset: plan its units, look at a sample, stream what is pending. The caller holds the lock."""
    planned = make_plan(config, subset, limit_images)
    audit_source(config, subset)
    units = find_pending(config, subset, planned, retry_failed)
    stream_units(config, subset, planned, units, ray_address)


@step
def write_config(config: BuildConfig) -> None:
    """Keep the resolved configuration beside what it builds."""
    with files.write_atomic(Path(config.out) / "config.yaml") as file:
        file.write(dump_config(config).encode())


@step
def audit_source(config: BuildConfig, subset: str) -> None:
    """Read a sample of the source without any model; refuse to go on if none of it is usable."""
    report = audit.sample(sources.open_source(config, subset), config)
    get_run_logger().info("%s", report.text())


@step
def make_plan(config: BuildConfig, subset: str, limit_images: int | None) -> plan.Plan:
    """Cut the subset into units, or take the plan that is there if the source is still the same."""
    folder = Path(config.out) / subset
    shards.prepare(folder)
    shards.sweep(folder)
    return plan.make_plan(sources.open_source(config, subset), config, folder, limit_images)


@step
def find_pending(config: BuildConfig, subset: str, planned: plan.Plan, retry_failed: bool) -> list[int]:
    """Indices of the units without a manifest of this recipe; with `retry_failed` also those with errors."""
    folder = Path(config.out) / subset
    recipe = stages.recipe_digest(stages.RECIPES[subset](config), config)
    failed = stream.failed_units(folder, planned) if retry_failed else []
    return sorted({*plan.pending(planned, folder / "manifests", recipe), *failed})


@step
def stream_units(
    config: BuildConfig, subset: str, planned: plan.Plan, units: list[int], ray_address: str | None
) -> None:
    """Send the pending units through the stages and commit them. Without any, Ray is not started."""
    stream.check_disk(config, subset, units, planned)
    run_folder = (
        Path(config.out) / "events" / f"{time.strftime('%Y%m%d-%H%M%S')}-{subset}-{uuid.uuid4().hex[:6]}"
    )
    if units:
        start = time.perf_counter()
        stream.start_ray(ray_address, config, config.subsets)
        run_folder.mkdir(parents=True)
        events.EventLog(run_folder, "driver").emit("ray", seconds=time.perf_counter() - start)
    else:
        run_folder.mkdir(parents=True)
    published = _Artifacts(subset)
    draw = watch.watcher.get()

    def on_progress(progress: stream.Progress) -> None:
        draw(progress)
        published.update(progress)

    done = stream.run(config, subset, planned, units, run_folder, on_progress)
    published.finish(done)


@step
def merge_corpus(config: BuildConfig) -> dict[str, Any]:
    """One index, statistics, plots and the dataset card over all committed units."""
    summary = corpus.merge(Path(config.out), config)
    create_markdown_artifact(key="dataset-card", markdown=card.render(Path(config.out), config))
    return summary


class _Artifacts:
    """The live view as Prefect artifacts: a progress bar while it runs, a table when it is done."""

    def __init__(self, subset: str):
        self.subset = subset
        self.id = create_progress_artifact(
            progress=0.0, key=f"{subset}-units", description=f"{subset}: units committed"
        )
        self.updated = time.monotonic()

    def update(self, progress: stream.Progress) -> None:
        if time.monotonic() - self.updated > ARTIFACT_EVERY_S and progress.pending:
            update_progress_artifact(self.id, progress=100.0 * progress.done / progress.pending)
            self.updated = time.monotonic()

    def finish(self, progress: stream.Progress) -> None:
        update_progress_artifact(self.id, progress=100.0)
        rows = [
            {
                "stage": name,
                "units": stage.units,
                "regions": stage.regions,
                "asked": stage.asked,
                "seconds": round(stage.seconds, 1),
                "dropped": sum(n for key, n in progress.dropped.items() if key.partition("/")[0] == name),
                **_activity(progress.activity.get(name)),
            }
            for name, stage in progress.stages.items()
        ]
        create_table_artifact(
            key=f"{self.subset}-stages", table=rows, description=f"{self.subset}: this run by stage"
        )


def _activity(stage: activity.StageActivity | None) -> dict[str, Any]:
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
