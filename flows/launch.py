"""Runs a flow for the command line. Prefect's server, the imports and Ray start at the same time."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..schemas.errors import ParaCaptionError
from . import callbacks
from .prefect_server import PrefectServer

if TYPE_CHECKING:
    from ..pipeline.executor.progress import Progress
    from ..pipeline.executor.ray_data import RayEngine
    from ..schemas.config import BuildConfig
    from ..schemas.evaluation import EvaluateConfig
    from ..schemas.training import TrainConfig


@contextmanager
def _prefect(module: str, beside: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """A flow's module, imported while Prefect's server starts. Within the block the server answers.

    Args:
        module: name of the flow's module.
        beside: called in this thread meanwhile.
    """
    with PrefectServer() as server:
        importing = threading.Thread(target=_import_quietly, args=(module,), daemon=True)
        importing.start()
        beside()
        importing.join()
        found = importlib.import_module(module)
        with server.ready():
            yield found


def _import_quietly(module: str) -> None:
    _quiet_prefect()
    importlib.import_module(module)


def _quiet_prefect() -> None:
    """Let Prefect log only problems, and none that the command prints itself."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    import prefect  # noqa: F401 - sets its loggers up

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says more than that an error was raised, which `main` prints."""
    if isinstance(record.exc_info and record.exc_info[1], ParaCaptionError):
        return False
    return "Finished in state Failed" not in record.getMessage()


def build(
    config: BuildConfig, engine: RayEngine, on_progress: Callable[[Progress], None], **asked: Any
) -> dict[str, Any]:
    """Run the flow `build-corpus`, and return what it returns.

    Args:
        config: the build.
        engine: starts Ray, or connects to a cluster, while Prefect's server starts.
        on_progress: called with the progress of the subset that is being built.
        asked: the flow's other parameters.
    """
    with _prefect("paracaption.flows.build", lambda: engine.start(config)) as flow:
        callbacks.engine.set(engine)
        callbacks.on_build_progress.set(on_progress)
        return flow.build_corpus(config, engine.address, **asked)


def train(
    config: TrainConfig, ray_address: str | None, wait: bool, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the flow `train-captioner`; `report` is called with each step's record."""
    with _prefect("paracaption.flows.train") as flow:
        callbacks.on_training_step.set(report)
        return flow.train_captioner(config, ray_address, wait)


def evaluate(config: EvaluateConfig, count: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run the flow `evaluate-captioner`; `count` is called with what is being done, and how much of it."""
    with _prefect("paracaption.flows.evaluate") as flow:
        callbacks.on_evaluation_progress.set(count)
        return flow.evaluate_captioner(config)
