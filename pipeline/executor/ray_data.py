"""The engine that builds on Ray Data: the default, and the only one that spreads over machines.

    work lists -> [source + mask filters] -> [captioner] -> [judge] -> [segmenter] -> [text + write] -> driver
                      actors                  actors       actors       actors         actors

A row is a unit, so Ray Data does not regroup rows. Every bracket is a pool of actors with the resources that
its backend asks for, and all pools live at the same time (`operators.py`). Subsets that fit are built side by
side: their units are mixed, and each runs its own recipe's stages in the pools that it meets. Ray Data
provides streaming, backpressure, autoscaling between the pool's bounds, and restarts.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...schemas.config import BuildConfig
from ...schemas.errors import ConfigError, ParaCaptionError, Retryable, StageFailed, one_line
from ..corpus.events import EventLog
from ..corpus.writer import Draft
from ..io import own_modules
from ..io.location import locate
from ..sources.registry import allow_kinds
from ..stages.base import ModelStage
from ..stages.recipes import recipe_of
from ..stages.registry import allow_stages
from .engine import Outcome, Part
from .gpus import MANY_POOLS
from .job import Job
from .operators import (
    Operator,
    Step,
    group_subsets,
    interleave,
    name_of_stage,
    needed_resources,
    operators_of,
)
from .ray_metrics import RayMetrics
from .rows import outcome_of
from .stalls import telling
from .worker import name_of
from .workers import Workers

log = logging.getLogger(__name__)

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
        self._start_s = 0.0

    def check(self, config: BuildConfig) -> None:
        """Refuse an address that Ray Data cannot use, or where nobody answers; see `check_address`.

        And an `out` in this process's memory, which no other process sees.
        """
        if config.out.startswith("memory://"):
            raise ConfigError(
                f"out: {config.out}: is the memory of one process, and the workers of Ray are others; add "
                "--local, or give a bucket or a folder"
            )
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
            started = time.perf_counter()
            try:
                _connect(self.address, config)
            except ParaCaptionError:
                raise
            except Exception as error:
                fix = "run the same command again, or build without Ray: `paracaption build CONFIG --local`"
                if self.address is not None:
                    fix = "start the cluster first, or give host:port of a running one (docs/cluster.md)"
                raise Retryable(f"Ray does not start: {one_line(error)}; {fix}") from error
            self._start_s += time.perf_counter() - started

    def group(self, config: BuildConfig, subsets: Sequence[str]) -> list[list[str]]:
        """Which subsets are built side by side: those whose pools fit on the cluster at once.

        Raises:
            ConfigError: the cluster is too small for the smallest pools of a subset.
            Retryable: Ray does not start, or no cluster is found.
        """
        self.start(config)
        recipes = {subset: recipe_of(config, subset) for subset in subsets}
        alone = [operators_of({subset: stages}, config) for subset, stages in recipes.items()]
        available = available_resources(alone)
        for each in alone:
            check_resources(each, available)
        groups = group_subsets(recipes, config, available)
        if len(groups) > 1:
            needed = needed_resources(operators_of(recipes, config))
            short = [
                f"{amount:g} {name}, the cluster has {available[name]:g}"
                for name, amount in needed.items()
                if amount > available[name] + 1e-6
            ]
            turns = ", then ".join(" and ".join(group) for group in groups)
            log.info("built one after the other: %s; all at once need %s", turns, " and ".join(short))
        return groups

    def drafts(self, parts: Sequence[Part], tick: Callable[[], None]) -> Generator[Outcome]:
        """Run units and yield them in the order in which they are ready; `tick` is called twice a second.

        Raises:
            Retryable: Ray does not start, or no cluster is found.
            StageFailed: Ray itself broke.
        """
        config = parts[0].job.config
        self.start(config)
        for part in parts:
            EventLog(locate(part.job.run), "ray").emit("ray", seconds=self._start_s)
        self._start_s = 0.0
        rows = _Rows(_dataset(parts, operators_of({part.subset: part.stages for part in parts}, config)))
        metrics = {part.subset: RayMetrics(part.subset) for part in parts}
        try:
            while (row := rows.next(TICK_S)) is not _END:
                if row is not None:
                    subset, outcome = row["subset"], outcome_of(row)
                    if isinstance(outcome, Draft) and not outcome.held:
                        metrics[subset].count_unit(outcome.manifest)
                    yield subset, outcome
                tick()
        finally:
            rows.stop()


def _dataset(parts: Sequence[Part], operators: Sequence[Operator]) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it tells that it has no bars
    by_subset = {part.subset: part for part in parts}
    rows = []
    for subset, number in interleave({part.subset: len(part.units) for part in parts}):
        index = by_subset[subset].units[number]
        name = by_subset[subset].work_list.unit_name(index)
        rows.append({"subset": subset, "unit": name, "index": index})
    # A worker that dies is replaced and its unit runs again, without limit: Ray Data's default for actors.
    # The notes that `in_flight.py` keeps make sure that no record can kill workers forever.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for operator in operators:
        asked = operator.resources
        low, high = asked["concurrency"]
        sent = [_Sent.of(by_subset[subset].job, step) for subset, step in operator.steps.items()]
        dataset = dataset.map(
            actor_class(operator),  # pyright: ignore[reportArgumentType] - Ray builds it in its actors
            fn_constructor_args=(sent,),
            num_cpus=asked["num_cpus"],
            num_gpus=asked["num_gpus"] or None,
            runtime_env=asked["runtime_env"] or None,
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
        )
    return dataset


class _Sent(NamedTuple):
    """What a worker is made of.

    Attributes:
        job: what is built.
        names: of its stages, in order; also "source" and "write".
        digests: of the evidence of its model stages, by name. The driver has computed them, so that a worker
            with other versions of packages finds the same evidence.
    """

    job: Job
    names: list[str]
    digests: dict[str, str]

    @classmethod
    def of(cls, job: Job, step: Step) -> _Sent:
        models = [stage for stage in step if isinstance(stage, ModelStage)]
        return cls(job, [*map(name_of_stage, step)], {stage.name: stage.evidence_digest for stage in models})

    def step(self) -> Step:
        """The stages again: the class of one of the user's own can only be imported once it is installed."""
        recipe = {stage.name: stage for stage in recipe_of(self.job.config, self.job.subset)}
        for name, digest in self.digests.items():
            stage = recipe[name]
            assert isinstance(stage, ModelStage)
            stage.evidence_digest = digest
        return [recipe.get(name, name) for name in self.names]


class _CountingWorkers(Workers):
    """Workers whose counters are Ray's metrics."""

    def __init__(self, sent: list[_Sent]):
        job = sent[0].job
        self._telling = telling(job.config.failures.stall_s, run=locate(job.run).name)
        self._telling.__enter__()  # for the actor's life
        own_modules.install(job.modules)
        allow_kinds(job.config.subsets.values())
        allow_stages(job.config.subsets.values())
        super().__init__(
            [(each.job, each.step()) for each in sent], lambda job: RayMetrics(job.subset).count_event
        )


def actor_class(operator: Operator) -> type[Workers]:
    """The class of an operator's actors, named after it: Ray's dashboard and `ps` show nothing else."""
    return type(name_of(operator.stages), (_CountingWorkers,), {"__module__": __name__})


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


def check_resources(operators: Sequence[Operator], available: Mapping[str, float]) -> None:
    """Refuse a cluster that does not hold the smallest pools of all operators at once: it would hang.

    Args:
        operators: of the stream.
        available: the "CPU" and "GPU" that the cluster has.

    Raises:
        ConfigError: names what is asked for and what the cluster has.
    """
    for name, amount in needed_resources(operators).items():
        if amount > available.get(name, 0) + 1e-6:
            asked = ", ".join(
                f"{_title(each)}: {each.resources['concurrency'][0]} x "
                f"{each.resources['num_' + name.lower() + 's']:g}"
                for each in operators
            )
            raise ConfigError(
                f"the stages need {amount:g} {name} at once ({asked}), "
                f"the cluster has {available.get(name, 0):g}: "
                + (f"{MANY_POOLS}; or add nodes" if name == "GPU" else _LESS)
            )


_LESS = "lower `concurrency` or the resources per actor, or add nodes"


def _title(operator: Operator) -> str:
    return " + ".join(map(name_of_stage, operator.stages))


def available_resources(alone: Iterable[Sequence[Operator]]) -> dict[str, float]:
    """The CPUs and GPUs of the cluster.

    A cluster that scales itself has at least what each subset needs alone: it is never refused.

    Args:
        alone: the operators of each subset.
    """
    import ray

    found = ray.cluster_resources()
    needs = [needed_resources(each) for each in alone] if os.environ.get("RAY_AUTOSCALER") else []
    return {name: max([found.get(name, 0.0), *(each[name] for each in needs)]) for name in ("CPU", "GPU")}


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
    alone = [operators_of({subset: recipe_of(config, subset)}, config) for subset in config.subsets]
    needed = max(needed_resources(each)["CPU"] for each in alone)
    ray.init("local", num_cpus=max(os.cpu_count() or 1, math.ceil(needed)), include_dashboard=False, **quiet)
