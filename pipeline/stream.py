"""Lays a recipe's stages out on Ray Data and commits what comes out.

    plan -> [source + mask filters] -> [captioner] -> [judge] -> [segmenter] -> [text + write] -> commit
                 actors                 actors       actors       actors         actors         driver

A row is a unit, so nothing re-blocks it; every bracket is an actor pool with the resources its backend asks
for, all alive at the same time. Neighbours without a GPU that ask for the same resources share their actors,
so on a laptop the whole line is one pool. Ray Data gives streaming, backpressure, autoscaling between the
pool's bounds, and restarts.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import queue
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from pipeline import plan as plans
from pipeline import shards
from pipeline.activity import Activity, StageActivity
from pipeline.events import EventLog, EventReader
from pipeline.shards import Draft
from pipeline.sources import SOURCE_STAGE
from pipeline.stages import RECIPES, FilterStage, ModelStage, Stage, recipe_digest
from pipeline.workers import Job, Worker
from schemas import errors
from schemas.config import BuildConfig
from schemas.errors import ConfigError, ParaCaptionError, StageFailed, StageStalled
from schemas.reasons import ERRORS

log = logging.getLogger(__name__)

Steps = list[list[FilterStage | ModelStage | str]]


class StageProgress(msgspec.Struct):
    """What a stage has done in this run: units, regions seen, regions a model was asked about, seconds."""

    units: int = 0
    regions: int = 0
    asked: int = 0
    seconds: float = 0.0


class Progress(msgspec.Struct):
    """The live view of one subset's build. `pending` units are this run's; `done` of them are committed.

    Attributes:
        seconds: since the stream started.
        dropped: regions by "stage/reason", of this run's units.
        stages: by stage name, in recipe order.
        activity: of the model stages whose actors are up: start-up seconds, share of time in calls.
    """

    subset: str
    pending: int
    done: int = 0
    images: int = 0
    regions: int = 0
    kept: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = msgspec.field(default_factory=Counter)
    stages: dict[str, StageProgress] = {}
    activity: dict[str, StageActivity] = {}

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None before the first commit."""
        return None if not self.done else self.seconds / self.done * (self.pending - self.done)


def steps_of(stages: list[Stage], config: BuildConfig) -> Steps:
    """Group a recipe into the operators of the stream.

    Each model starts its own, filters ride along. Neighbours without a GPU that ask for the same resources
    and the same environment share their actors: on CPUs alone a unit then runs through all stages in one
    process, and nothing is sent between them.
    """
    apart: Steps = [[SOURCE_STAGE]]
    for stage in [*stages, shards.WRITE_STAGE]:
        if isinstance(stage, ModelStage) or (isinstance(apart[-1][-1], ModelStage)):
            apart.append([stage])
        else:
            apart[-1].append(stage)
    steps: Steps = []
    for step in apart:
        asked = resources_of(step, config)
        if steps and not asked["num_gpus"] and asked == resources_of(steps[-1], config):
            steps[-1] += step
        else:
            steps.append(step)
    return steps


def resources_of(step: list[FilterStage | ModelStage | str], config: BuildConfig) -> dict[str, Any]:
    """Ray arguments of a step's actors: its model's, or those for reading and writing."""
    model = next((stage for stage in step if isinstance(stage, ModelStage)), None)
    asks = config.io if model is None else model.backend
    return {
        "runtime_env": getattr(asks, "runtime_env", {}),
        "num_cpus": asks.num_cpus,
        "num_gpus": getattr(asks, "num_gpus", 0),
        "concurrency": tuple(asks.concurrency),
    }


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the output folder: one driver commits at a time. The lock ends with the process, however it ends.

    Raises:
        ConfigError: another build holds it.
        StageFailed: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a+")
    except OSError as error:
        raise shards.write_failed(out, error) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{out}: another build is writing here; wait for it or choose another `out`"
            ) from error
        yield


def run(
    config: BuildConfig,
    subset: str,
    plan: plans.Plan,
    units: list[int],
    run_folder: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Build and commit the given units of a plan. Ray is initialised by the caller, who also holds the lock.

    Args:
        config: the resolved configuration.
        subset: "coconut" or "sa1b".
        plan: the subset's plan.
        units: indices of the units to build.
        run_folder: OUT/events/<run>; exists.
        on_progress: called about twice a second from this thread.

    Raises:
        StageFailed: a stage fails on everything, a backend cannot start, or the disk is full.
        StageStalled: nothing moved for `failures.stall_s`; the message has the hanging stacks.
    """
    folder = Path(config.out) / subset
    stages = RECIPES[subset](config)
    names = [plan.unit_name(index) for index in units]
    job = Job(
        config,
        subset,
        str(folder),
        plan.digest,
        recipe_digest(stages, config),
        str(run_folder),
        idle=[
            stage.name
            for stage in stages
            if isinstance(stage, ModelStage) and _answered(stage, folder, names)
        ],
    )
    steps = steps_of(stages, config)
    progress = Progress(subset, pending=len(units))
    progress.stages = {
        name: StageProgress() for name in [SOURCE_STAGE, *(s.name for s in stages), shards.WRITE_STAGE]
    }
    if not units:
        return progress
    check_resources(steps, config)
    events = EventLog(run_folder, "driver")
    events.emit("begun")
    rows = _Stream(_dataset(job, steps, plan, units))
    watch = _Watch(EventReader(run_folder), progress, config.failures.stall_s, run_folder)
    committer = _Committer(folder, config.failures.stop_after_units, progress, events)
    try:
        while (draft := rows.next(timeout_s=0.5)) is not _END:
            watch.look(moved=draft is not None)
            if draft is not None:
                committer.take(draft)
            on_progress(progress)
        committer.finish()
    except BaseException:
        rows.stop()
        committer.abandon()
        raise
    events.emit("ended")
    watch.look(moved=True)
    on_progress(progress)
    shards.sweep(folder)  # what a worker of an earlier, broken run was still writing when this one began
    for stack in run_folder.glob("stack-*.txt"):
        stack.unlink()
    shutil.rmtree(folder / "journal", ignore_errors=True)
    return progress


def _answered(stage: ModelStage, folder: Path, units: list[str]) -> bool:
    """Whether a stage has evidence of all these units, so that its model need not be loaded beforehand."""
    store = stage.store(folder)
    return all(store.path(unit).exists() for unit in units)


def _dataset(job: Job, steps: Steps, plan: plans.Plan, units: list[int]) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"unit": plan.unit_name(index), "index": index} for index in units]
    # A worker that dies is replaced and its unit runs again, without limit: Ray Data's default for actors.
    # The journal in `workers.py` sees to it that no record can kill workers forever.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for step in steps:
        asked = resources_of(step, job.config)
        low, high = asked["concurrency"]
        dataset = dataset.map(
            Worker,  # pyright: ignore[reportArgumentType] - Ray builds the class in its actors
            fn_constructor_args=(job, step),
            num_cpus=asked["num_cpus"],
            num_gpus=asked["num_gpus"] or None,
            runtime_env=asked["runtime_env"] or None,
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
        )
    return dataset


_END = object()


class _Stream:
    """Pulls drafts from Ray Data in a thread, so that the driver can watch the clock meanwhile."""

    def __init__(self, dataset: Any):
        self._queue: queue.Queue[Any] = queue.Queue()
        self._stopped = False
        self._thread = threading.Thread(target=self._pull, args=(dataset,), daemon=True, name="stream")
        self._thread.start()

    def _pull(self, dataset: Any) -> None:
        try:
            for row in dataset.iter_rows():
                if self._stopped:
                    return  # closes the iterator, which ends the actors
                if "failed" in row:
                    kind, _, message = row["failed"].partition(": ")
                    raise getattr(errors, kind)(message)
                self._queue.put(msgspec.msgpack.decode(row["draft"], type=Draft))
            self._queue.put(_END)
        except BaseException as error:  # noqa: BLE001 - handed to the driver's thread, whatever it is
            self._queue.put(error)

    def stop(self) -> None:
        """Let go of the stream after the unit it waits for."""
        self._stopped = True

    def next(self, timeout_s: float) -> Any:
        """A draft, `_END`, or None if nothing came in time; raises what the stream raised."""
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise _one_line(item)
        return item


def _one_line(error: BaseException) -> BaseException:
    """Errors of ours as they are; what Ray wraps in pages of traceback as a `StageFailed` of one line."""
    if isinstance(error, ParaCaptionError | KeyboardInterrupt | SystemExit):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception)\b.*:", line)]
    failed = StageFailed(f"the stream broke: {type(error).__name__}: {(told or lines or [''])[-1]}")
    failed.__cause__ = error
    return failed


class _Committer:
    """Commits drafts as they come. Units on which a stage failed wait until the stage is proven right."""

    def __init__(self, folder: Path, stop_after: int, progress: Progress, events: EventLog):
        self.folder = folder
        self.stop_after = stop_after
        self.progress = progress
        self.events = events
        self.suspects: list[Draft] = []

    def take(self, draft: Draft) -> None:
        if draft.failures:
            self.suspects.append(draft)
            if len(self.suspects) >= self.stop_after:
                stage, error = next(iter(draft.failures.items()))
                raise StageFailed(
                    f"{stage}: failed on every image of {len(self.suspects)} units in a row, last on "
                    f"{draft.manifest.unit}: {error}. "
                    "What is committed stays; mend the cause and run the same command again"
                )
            return
        self._release()
        self._commit(draft)

    def finish(self) -> None:
        self._release()

    def abandon(self) -> None:
        for draft in self.suspects:
            shards.discard(draft)
        self.suspects = []

    def _release(self) -> None:
        for draft in self.suspects:
            log.warning(
                "%s: %s; its regions are dropped, `--retry-failed` runs them again",
                draft.manifest.unit,
                "; ".join(f"{stage} failed: {why}" for stage, why in draft.failures.items()),
            )
            self._commit(draft)
        self.suspects = []

    def _commit(self, draft: Draft) -> None:
        start = time.perf_counter()
        shards.commit(self.folder, draft)
        record = draft.manifest
        self.events.emit(
            "committed",
            unit=record.unit,
            images=len(record.images),
            regions=record.regions_in,
            seconds=time.perf_counter() - start,
        )
        self.progress.done += 1
        self.progress.images += len(record.images)
        self.progress.regions += record.regions_in
        self.progress.kept += record.kept
        self.progress.dropped.update(record.dropped)


class _Watch:
    """Reads the workers' events into the progress view, and notices when nothing moves."""

    def __init__(self, reader: EventReader, progress: Progress, stall_s: float, run_folder: Path):
        self.reader = reader
        self.progress = progress
        self.stall_s = stall_s
        self.run_folder = run_folder
        self.activity = Activity()
        self.started = self.moved = time.monotonic()

    def look(self, moved: bool) -> None:
        for worker, event in self.reader.named():
            moved = True
            self.activity.add(worker, event)
            if event.what == "unit" and event.stage in self.progress.stages:
                stage = self.progress.stages[event.stage]
                stage.units += 1
                stage.regions += event.regions
                stage.asked += event.asked
                stage.seconds += event.seconds
        now = time.monotonic()
        self.progress.seconds = now - self.started
        self.progress.activity = self.activity.stages(time.time())
        if moved:
            self.moved = now
        elif now - self.moved > self.stall_s + STALL_GRACE_S:
            raise StageStalled(self._message())

    def _message(self) -> str:
        stacks = [path.read_text() for path in sorted(self.run_folder.glob("stack-*.txt"))]
        hanging = [text for text in stacks if "most recent call first" in text]
        where = (
            "\n\n".join(hanging) or "No worker is inside a call: Ray could not place them; see `ray status`."
        )
        return f"no progress for {self.stall_s:.0f} s (failures.stall_s). Committed units are safe.\n{where}"


STALL_GRACE_S = 5.0
"""The workers dump their stacks at `stall_s`; the driver looks a little later."""


def check_resources(steps: Steps, config: BuildConfig) -> None:
    """Whether the cluster holds the smallest pool of every step at once; else the stream waits forever.

    Raises:
        ConfigError: names what is asked for and what there is. Not raised on a cluster that scales itself.
    """
    import ray

    needed = needed_resources(steps, config)
    there = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > there.get(name, 0) + 1e-6 and not os.environ.get("RAY_AUTOSCALER"):
            asked = ", ".join(
                f"{_title(step)}: {resources_of(step, config)['concurrency'][0]} x "
                f"{resources_of(step, config)['num_' + name.lower() + 's']:g}"
                for step in steps
            )
            raise ConfigError(
                f"the stages need {amount:g} {name} at once ({asked}), "
                f"the cluster has {there.get(name, 0):g}: "
                "lower `concurrency` or the resources per actor, or add nodes"
            )


def needed_resources(steps: Steps, config: BuildConfig) -> dict[str, float]:
    """CPUs and GPUs that the smallest pools of all steps hold at once."""
    asked = [resources_of(step, config) for step in steps]
    return {
        "CPU": sum(a["num_cpus"] * a["concurrency"][0] for a in asked),
        "GPU": sum(a["num_gpus"] * a["concurrency"][0] for a in asked),
    }


def _title(step: list[FilterStage | ModelStage | str]) -> str:
    return " + ".join(stage if isinstance(stage, str) else stage.name for stage in step)


def start_ray(address: str | None, config: BuildConfig, subsets: list[str]) -> None:
    """Connect to a cluster, or start a local one that is large enough for the smallest pools.

    On a machine of its own the logical CPUs only admit actors, the kernel shares the real ones: a laptop with
    two cores runs the whole recipe.

    Args:
        address: "auto" or "host:port"; None starts Ray on this machine.
        config: asks for the resources.
        subsets: those that will be built.

    Raises:
        ConfigError: a ray:// address; Ray Data 2.60 does not run through Ray's client.
    """
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {address}: Ray Data does not run through Ray's client; give host:port from a "
            "node of the cluster, or submit the command with `ray job submit` (docs/cluster.md)"
        )
    import ray

    if ray.is_initialized():
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False, "ignore_reinit_error": True}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    needed = max(needed_resources(steps_of(RECIPES[s](config), config), config)["CPU"] for s in subsets)
    ray.init(num_cpus=max(os.cpu_count() or 1, math.ceil(needed)), include_dashboard=False, **quiet)


def failed_units(folder: Path, plan: plans.Plan) -> list[int]:
    """Indices of the committed units with a drop that another attempt may turn: for `--retry-failed`.

    Args:
        folder: OUT/<subset>.
        plan: the subset's plan.

    Raises:
        IntegrityError: a manifest does not parse.
    """
    failed = []
    for index in range(plan.num_units):
        try:
            record = shards.read_manifest(folder / "manifests" / f"{plan.unit_name(index)}.json")
        except FileNotFoundError:
            continue
        reasons = {key.partition("/")[2] for key in record.dropped} | set(record.images_dropped)
        if reasons & ERRORS:
            failed.append(index)
    return failed


def check_disk(config: BuildConfig, subset: str, units: list[int], plan: plans.Plan) -> None:
    """Free space for what the pending units write: their photos, by a sample of sizes, and a tenth on top.

    Raises:
        ConfigError: not enough; names how much is missing.
    """
    photos = plan.photo_bytes * len(units) / max(1, plan.num_units)
    needed = 1.1 * photos + config.failures.min_free_gb * 1e9
    free = shutil.disk_usage(config.out).free
    if free < needed:
        raise ConfigError(
            f"{config.out}: {subset} needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free space, or lower failures.min_free_gb if the estimate is wrong"
        )
