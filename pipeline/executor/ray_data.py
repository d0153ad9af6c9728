"""The engine that builds on Ray Data: the default, and the only one that spreads over machines.

    work list -> [source + mask filters] -> [captioner] -> [judge] -> [segmenter] -> [text + write] -> driver
                      actors                 actors       actors       actors         actors

A row is a unit, so Ray Data does not regroup rows. Every bracket is a pool of actors with the resources that
its backend asks for, and all pools live at the same time. Neighbors without a GPU that ask for the same
resources share their actors, so on a laptop the whole line is one pool. Ray Data provides streaming,
backpressure, autoscaling between the pool's bounds, and restarts.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError, ParaCaptionError, Retryable, StageFailed, one_line
from ..corpus import writer
from ..corpus.events import EventLog
from ..corpus.work_list_summary import WorkList
from ..corpus.writer import Draft
from ..io import own_modules
from ..sources.protocols import SOURCE_STAGE
from ..sources.registry import allow_kinds
from ..stages.base import ModelStage, Stage
from ..stages.recipes import recipe_of
from ..stages.registry import allow_stages
from .gpus import MANY_POOLS
from .ray_metrics import RayMetrics
from .rows import draft_of
from .stalls import telling
from .worker import Job, Worker, name_of

Steps = list[list[Stage | str]]

TICK_S = 0.5
"""How often the driver checks the clock and the events while no unit comes."""


def check_address(address: str | None) -> None:
    """Refuse an address that Ray Data and Ray Train cannot use, or where nobody answers; None is accepted.

    Raises:
        ConfigError: it is a ray:// address, through which Ray 2.60 runs neither, or no cluster answers.
    """
    if address is None:
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {address}: Ray Data does not run through Ray's client; give host:port from a "
            "node of the cluster, or submit the command with `ray job submit` (docs/cluster.md)"
        )
    _knock(address)


class RayEngine:
    """Builds on a Ray cluster, or on a Ray of its own on this machine.

    Args:
        address: "auto" or "host:port"; None starts Ray on this machine.
    """

    def __init__(self, address: str | None = None):
        self.address = address
        self._starting = threading.Lock()

    def check(self, config: BuildConfig) -> None:
        """Refuse an address that Ray Data cannot use, or where nobody answers; see `check_address`."""
        check_address(self.address)

    def start(self, config: BuildConfig) -> None:
        """Connect to the cluster, or start a local one that is large enough for the smallest pools.

        It may be called again, and from another thread, which then waits for the first. On this machine Ray
        is given as many logical CPUs as the pools ask for, and the kernel shares the real ones, so that a
        laptop with two cores runs the whole recipe.

        Raises:
            ConfigError: see `check`.
            Retryable: Ray does not start, or no cluster is found.
        """
        self.check(config)
        with self._starting:
            try:
                _connect(self.address, config)
            except ParaCaptionError:
                raise
            except Exception as error:
                fix = "run the same command again, or build without Ray: `paracaption build CONFIG --local`"
                if self.address is not None:
                    fix = "start the cluster first, or give host:port of a running one (docs/cluster.md)"
                raise Retryable(f"Ray does not start: {one_line(error)}; {fix}") from error

    def drafts(
        self, job: Job, stages: list[Stage], work_list: WorkList, units: list[int], tick: Callable[[], None]
    ) -> Generator[Draft]:
        """Run units and yield them in the order in which they are ready; `tick` is called twice a second.

        Raises:
            ConfigError: the cluster is too small for the smallest pools.
            Retryable: Ray does not start, or no cluster is found.
            StageFailed: a backend cannot start, the output cannot be written, or Ray itself broke.
        """
        started = time.perf_counter()
        self.start(job.config)
        EventLog(Path(job.run), "ray").emit("ray", seconds=time.perf_counter() - started)
        steps = steps_of(stages, job.config)
        check_resources(steps, job.config)
        rows = _Rows(_dataset(job, steps, work_list, units))
        metrics = RayMetrics(job.subset)
        try:
            while (row := rows.next(TICK_S)) is not _END:
                if row is not None:
                    draft = draft_of(row)
                    if not draft.held:
                        metrics.count_unit(draft.manifest)
                    yield draft
                tick()
        finally:
            rows.stop()


IO_CONCURRENCY = (1, 8)
"""Actors that read and write next to models on GPUs, where `io.concurrency` says nothing."""


def steps_of(stages: list[Stage], config: BuildConfig) -> Steps:
    """Group a recipe into the operators of the stream.

    Each model stage starts an operator of its own, and filters join the one before them. Neighbors without a
    GPU that ask for the same resources and the same environment share their actors: on CPUs alone a unit then
    runs through all stages in one process, and nothing is sent between them. Reading and writing take the
    number of actors of their neighbor, unless `io.concurrency` says how many they have.
    """
    apart: Steps = [[SOURCE_STAGE]]
    for stage in [*stages, writer.WRITE_STAGE]:
        if isinstance(stage, ModelStage) or (isinstance(apart[-1][-1], ModelStage)):
            apart.append([stage])
        else:
            apart[-1].append(stage)
    steps: Steps = []
    for step in apart:
        if steps and _shares_actors(steps[-1], step, config):
            steps[-1] += step
        else:
            steps.append(step)
    return steps


def _shares_actors(
    before: list[Stage | str],
    after: list[Stage | str],
    config: BuildConfig,
) -> bool:
    first, second = resources_of(before, config), resources_of(after, config)
    if config.io.concurrency is None and not (_has_model(before) and _has_model(after)):
        first = first | {"concurrency": second["concurrency"]}
    return not second["num_gpus"] and first == second


def _has_model(step: list[Stage | str]) -> bool:
    return any(isinstance(stage, ModelStage) for stage in step)


def resources_of(step: list[Stage | str], config: BuildConfig) -> dict[str, Any]:
    """Ray's arguments for the actors of a step: those of its model, or those for reading and writing."""
    model = next((stage for stage in step if isinstance(stage, ModelStage)), None)
    asks = config.io if model is None else model.backend
    return {
        "runtime_env": getattr(asks, "runtime_env", {}),
        "num_cpus": asks.num_cpus,
        "num_gpus": getattr(asks, "num_gpus", 0),
        "concurrency": tuple(asks.concurrency or IO_CONCURRENCY),
    }


def _dataset(job: Job, steps: Steps, work_list: WorkList, units: list[int]) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it tells that it has no bars
    rows = [{"unit": work_list.unit_name(index), "index": index} for index in units]
    # A worker that dies is replaced and its unit runs again, without limit: Ray Data's default for actors.
    # The notes that `in_flight.py` keeps make sure that no record can kill workers forever.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for step in steps:
        asked = resources_of(step, job.config)
        low, high = asked["concurrency"]
        dataset = dataset.map(
            actor_class(step),  # pyright: ignore[reportArgumentType] - Ray builds it in its actors
            fn_constructor_args=(job, *_sent(step)),
            num_cpus=asked["num_cpus"],
            num_gpus=asked["num_gpus"] or None,
            runtime_env=asked["runtime_env"] or None,
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
        )
    return dataset


def _sent(step: list[Stage | str]) -> tuple[list[str], dict[str, str]]:
    """What a worker makes a step's stages of."""
    names = [stage if isinstance(stage, str) else stage.name for stage in step]
    return names, {stage.name: stage.evidence_digest for stage in step if isinstance(stage, ModelStage)}


class _CountingWorker(Worker):
    """A worker whose counters are Ray's metrics.

    It makes its stages again: the class of one of the user's own can only be imported once `job.modules` are
    installed.

    Args:
        job: what is built.
        names: of its stages, in order; also "source" and "write".
        digests: of the evidence of its model stages, by name. The driver has computed them, so that a worker
            with other versions of packages finds the same evidence.
    """

    def __init__(self, job: Job, names: list[str], digests: dict[str, str]):
        self._telling = telling(job.config.failures.stall_s, run=Path(job.run).name)
        self._telling.__enter__()  # for the actor's life
        own_modules.install(job.modules)
        allow_kinds(job.config.subsets.values())
        allow_stages(job.config.subsets.values())
        recipe = {stage.name: stage for stage in recipe_of(job.config, job.subset)}
        for name, digest in digests.items():
            stage = recipe[name]
            assert isinstance(stage, ModelStage)
            stage.evidence_digest = digest
        stages = [recipe.get(name, name) for name in names]
        super().__init__(job, stages, on_event=RayMetrics(job.subset).count_event)


def actor_class(step: list[Stage | str]) -> type[Worker]:
    """The class of a step's actors, which has the step's name: Ray's dashboard and `ps` show nothing else."""
    return type(name_of(step), (_CountingWorker,), {"__module__": __name__})


_END = object()
_STOP_S = 10.0
"""How long the end of a stream is waited for."""


class _Rows:
    """Pulls rows from Ray Data in a thread, so that the driver can watch the clock while it waits."""

    def __init__(self, dataset: Any):
        self._queue: queue.Queue[Any] = queue.Queue()
        self._stopped = False
        self._executors = _captured_executors(dataset)
        self._thread = threading.Thread(target=self._pull, args=(dataset,), daemon=True, name="stream")
        self._thread.start()

    def _pull(self, dataset: Any) -> None:
        try:
            for row in dataset.iter_rows():
                if self._stopped:
                    return  # closes the iterator, which ends the actors
                self._queue.put(row)
            self._queue.put(_END)
        except BaseException as error:  # noqa: BLE001 - handed to the driver's thread, whatever it is
            self._queue.put(error)

    def stop(self) -> None:
        """End the stream, its actors and its threads.

        A thread of Ray Data that outlives Ray ends the whole process when it asks Ray for something.
        """
        self._stopped = True
        if self._thread.is_alive():
            logger = logging.getLogger("ray.data")
            level = logger.level
            logger.setLevel(logging.CRITICAL)  # it would log that it was stopped
            for executor in self._executors:
                executor.shutdown(force=True)
            self._thread.join(_STOP_S)
            logger.setLevel(level)

    def next(self, timeout_s: float) -> Any:
        """A row, `_END` after the last one, or None if none came in time; raises what the stream raised."""
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise _as_ours(item)
        return item


def _captured_executors(dataset: Any) -> list[Any]:
    """Where the executors of the dataset appear when it creates them.

    Ray 2.60 itself keeps a handle only once the first row is there, too late for a stage that hangs on it.
    """
    created: list[Any] = []
    create = dataset._create_executor

    def create_and_keep() -> Any:
        created.append(create())
        return created[-1]

    dataset._create_executor = create_and_keep
    return created


def _as_ours(error: BaseException) -> BaseException:
    """Errors of ours as they are; an error of Ray's as a `StageFailed` of one line."""
    if isinstance(error, ParaCaptionError | KeyboardInterrupt | SystemExit):
        return error
    failed = StageFailed(
        f"Ray Data stopped: {one_line(error)}; what is committed stays: run the same command again"
    )
    failed.__cause__ = error
    return failed


def check_resources(steps: Steps, config: BuildConfig) -> None:
    """Refuse a cluster that does not hold the smallest pools of all steps at once: the stream would hang.

    A cluster that scales itself is never refused.

    Raises:
        ConfigError: names what is asked for and what the cluster has.
    """
    import ray

    needed = needed_resources(steps, config)
    available = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > available.get(name, 0) + 1e-6 and not os.environ.get("RAY_AUTOSCALER"):
            asked = ", ".join(
                f"{_title(step)}: {resources_of(step, config)['concurrency'][0]} x "
                f"{resources_of(step, config)['num_' + name.lower() + 's']:g}"
                for step in steps
            )
            raise ConfigError(
                f"the stages need {amount:g} {name} at once ({asked}), "
                f"the cluster has {available.get(name, 0):g}: "
                + (f"{MANY_POOLS}; or add nodes" if name == "GPU" else _LESS)
            )


_LESS = "lower `concurrency` or the resources per actor, or add nodes"


def needed_resources(steps: Steps, config: BuildConfig) -> dict[str, float]:
    """CPUs and GPUs that the smallest pools of all steps hold at once."""
    asked = [resources_of(step, config) for step in steps]
    return {
        "CPU": sum(a["num_cpus"] * a["concurrency"][0] for a in asked),
        "GPU": sum(a["num_gpus"] * a["concurrency"][0] for a in asked),
    }


def _title(step: list[Stage | str]) -> str:
    return " + ".join(stage if isinstance(stage, str) else stage.name for stage in step)


def _knock(address: str) -> None:
    """Refuse host:port where nobody listens; Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or a form that only Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: no cluster answers ({error}); `ray status` on a node of it says the "
            "address (docs/cluster.md)"
        ) from error


_KNOCK_S = 10.0

_TOKENS = "ray._private.authentication.authentication_token_setup"


def _connect(address: str | None, config: BuildConfig) -> None:
    import ray

    if ray.is_initialized():
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False, "ignore_reinit_error": True}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    # That Ray asks its own processes for a token is as it should be, and no warning.
    logging.getLogger(_TOKENS).setLevel(logging.ERROR)
    recipes = [recipe_of(config, subset) for subset in config.subsets]
    needed = max(needed_resources(steps_of(stages, config), config)["CPU"] for stages in recipes)
    ray.init("local", num_cpus=max(os.cpu_count() or 1, math.ceil(needed)), include_dashboard=False, **quiet)
