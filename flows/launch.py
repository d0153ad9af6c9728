"""Runs a flow for the command line. Prefect's server, the imports and Ray start at the same time."""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..schemas.errors import ParaCaptionError
from . import callbacks, stopping
from .prefect_server import PrefectServer, answers

if TYPE_CHECKING:
    from prefect import Flow

    from ..pipeline.executor.progress import Progress
    from ..pipeline.executor.ray_data import RayEngine
    from ..schemas.config import BuildConfig
    from ..schemas.evaluation import EvaluateConfig
    from ..schemas.training import TrainConfig


log = logging.getLogger(__name__)


@contextmanager
def _prefect(module: str, meanwhile: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """A flow's module, imported while Prefect's server starts. Within the block the server answers.

    Args:
        module: name of the flow's module.
        meanwhile: called in this thread while the server starts.
    """
    with stopping.at_once(), PrefectServer() as server:
        importing = threading.Thread(target=_import_quietly, args=(module,), daemon=True)
        importing.start()
        meanwhile()
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

    logging.raiseExceptions = False  # a log line that its server does not take is no news
    for name in ("prefect.events.clients", "prefect._internal.concurrency", "EventsWorker", "APILogWorker"):
        logging.getLogger(name).addFilter(lambda _: False)  # nor is an event; `artifacts` says it once
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says more than that an error was raised, or a signal came, which `main` prints."""
    if isinstance(record.exc_info and record.exc_info[1], ParaCaptionError):
        return False
    told = record.getMessage()
    return "Finished in state Failed" not in told and "aborted by a termination signal" not in told


def _call(flow: Flow[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a flow. What its function returned or raised counts, also where Prefect can take no note of it.

    Prefect reports the end of a flow to its server, and raises what the connection raises if that is gone.
    """
    from prefect.exceptions import Abort

    returned: list[Any] = []
    raised: list[Exception] = []

    @functools.wraps(flow.fn)
    def noted(*given: Any, **named: Any) -> Any:
        try:
            with _cancelled_when_stopped():
                returned.append(flow.fn(*given, **named))
        except Exception as error:  # noqa: BLE001 - raised below
            raised.append(error)
        if not answers():
            raise Abort("no server to tell")  # which ends the flow without telling one
        if raised:
            raise raised[-1]
        return returned[-1]

    watched = copy.copy(flow)
    watched.fn = noted
    try:
        return watched(*arguments, **options)
    except (Abort, Exception) as error:
        if raised:
            raise raised[-1] from None
        if not returned:
            raise
        log.warning(
            "Prefect's server did not record the end of the run (%s); the run itself is complete", error
        )
        return returned[-1]


@contextmanager
def _cancelled_when_stopped() -> Iterator[None]:
    """Within the block, a stopped command tells the server that its flow run is over.

    A server of the command's own ends with it. One that PREFECT_API_URL names would show the run as running
    for ever.
    """
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.states import Cancelled

    found = FlowRunContext.get()
    if found is None or found.flow_run is None:
        yield
        return
    run_id = found.flow_run.id
    with get_client(sync_client=True) as client:  # made now: there is no time for it later
        stopping.tell(lambda why: client.set_flow_run_state(run_id, Cancelled(message=why), force=True))
        try:
            yield
        finally:
            stopping.tell(None)


def build(
    config: BuildConfig, engine: RayEngine, on_progress: Callable[[Progress], None], **asked: Any
) -> dict[str, Any]:
    """Run the flow `build-corpus`, and return what it returns.

    Args:
        config: the build.
        engine: starts Ray, or connects to a cluster, while Prefect's server starts.
        on_progress: called with the progress of each subset that is being built.
        asked: the flow's other parameters.
    """
    with _prefect("paracaption.flows.build", lambda: engine.start(config)) as flow:
        callbacks.engine.set(engine)
        callbacks.on_build_progress.set(on_progress)
        return _call(flow.build_corpus, config, engine.address, **asked)


def train(
    config: TrainConfig, ray_address: str | None, wait: bool, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the flow `train-captioner`; `report` is called with each step's record."""
    with _prefect("paracaption.flows.train") as flow:
        callbacks.on_training_step.set(report)
        return _call(flow.train_captioner, config, ray_address, wait)


def evaluate(config: EvaluateConfig, count: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run the flow `evaluate-captioner`; `count` is called with what is being done, and how much of it."""
    with _prefect("paracaption.flows.evaluate") as flow:
        callbacks.on_evaluation_progress.set(count)
        return _call(flow.evaluate_captioner, config)
