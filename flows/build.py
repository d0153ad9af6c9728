"""The flow that builds a corpus: the driver's steps as Prefect tasks.

Prefect starts and shows a build, which is a handful of task runs. What is committed is known from the
manifests alone, so that a retried task resumes where it stopped.

Annotations are evaluated (no `from __future__ import annotations`): a served flow is pickled by value, and
the process that runs it needs `BuildConfig` itself, not its name, to check the parameters.
"""

from collections.abc import Callable
from typing import Any

from prefect import flow

from ..pipeline.corpus import card
from ..pipeline.corpus.reader import open_corpus
from ..pipeline.executor import driver, ray_data
from ..pipeline.executor.progress import Progress
from ..schemas.config import BuildConfig
from . import artifacts, callbacks, served
from .steps import run_name, step


@flow(name="build-corpus", flow_run_name=run_name, log_prints=False)
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
    served.check_run(config, ray_address)
    engine = callbacks.engine.get() or ray_data.RayEngine(ray_address)
    show = callbacks.on_build_progress.get()
    board = artifacts.BuildBoard()

    def on_progress(progress: Progress) -> None:
        show(progress)
        board.show(progress)

    summary = driver.build(
        config,
        engine,
        limit_images=limit_images,
        retry_failed=retry_failed,
        on_progress=on_progress,
        step=_as_task,
    )
    board.finish()
    text = card.render_card(open_corpus(config.out, confined=False).summary, config)
    artifacts.publish_markdown("dataset-card", artifacts.card_page(text, config.out))
    artifacts.PUBLISHER.wait()
    return summary


def _as_task(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step of the driver as a task whose name says the subset, or those that are built side by side."""

    def run(*arguments: Any) -> Any:
        about = next((" + ".join(each) for each in arguments if isinstance(each, dict)), None)
        about = next((each for each in arguments if isinstance(each, str)), about)
        name = function.__name__.replace("_", " ")
        return step(function).with_options(task_run_name=f"{about}: {name}" if about else name)(*arguments)

    return run
