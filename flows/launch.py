"""Runs a flow for the command line: Prefect's server, the imports and Ray start beside each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flows import views, watch
from flows.server import PrefectServer

if TYPE_CHECKING:
    from pipeline.executor.progress import Progress
    from pipeline.executor.ray_data import RayEngine
    from schemas.config import BuildConfig


def build(
    config: BuildConfig, engine: RayEngine, on_progress: Callable[[Progress], None], **asked: Any
) -> dict[str, Any]:
    """Run the flow `build-corpus` on an engine that starts meanwhile; returns what the flow returns.

    Args:
        config: of the build.
        engine: starts Ray, or connects to a cluster.
        on_progress: shows how it is going.
        asked: the flow's other parameters.
    """
    with PrefectServer() as server:
        importing = threading.Thread(target=_import_flow, daemon=True)
        importing.start()
        engine.start(config)
        importing.join()
        with server.ready():
            from flows.build import build_corpus

            watch.engine.set(engine)
            watch.watcher.set(on_progress)
            return build_corpus(config, engine.address, **asked)


def _import_flow() -> None:
    views.quiet_prefect()
    import flows.build  # noqa: F401 - takes seconds, and needs nothing that is not there yet
