"""What runs the stages: in a Ray actor those of one step, or all of them in the local engine's process.

How failures are contained, from the inside out:

1. A record that fails is found by bisecting its batch and dropped with its error.
2. A unit on which every record fails is tried again with a fresh model; then it travels on, marked, and the
   driver decides whether the stage is broken (see `executor/driver.py`).
3. A record that kills the whole process is found through the journal: before each batch the worker notes what
   it is about to do. Whoever gets the unit next finds the note, runs the noted images one by one, and after
   `crash_attempts` deaths alone drops the image. A worker that dies for another reason costs nothing but
   time.
4. A call that hangs leaves its stack in the run's folder, where the driver finds it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from ...schemas import errors as error_types
from ...schemas.config import BuildConfig
from ...schemas.errors import BadRecord, ConfigError, EngineLost, ParaCaptionError, StageFailed
from ...schemas.reasons import Reason
from ...schemas.records import Drop, ImageRecord
from ..corpus import work_list as plan
from ..corpus import writer
from ..corpus.events import EventLog
from ..corpus.writer import Draft
from ..models import registry
from ..sources.protocols import SOURCE_STAGE, CatalogEntry
from ..sources.registry import open_source
from ..stages.base import Failure, FilterStage, ModelStage, Stage, UnitAnswers
from ..stages.evidence import EvidenceStore
from . import gpus

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 8
"""Images that fail alone, without one success, before the rest of the unit is given up."""

READ_BATCH = 64
"""Images that a source reads between two notes in the journal."""

STACK_MARK = "most recent call first"
"""Stands in a worker's stack file when a call took longer than `failures.stall_s`."""

SAVE_EVERY_S = 60.0
"""Evidence of an unfinished unit is written at least this often: a crash late in a long unit is cheap."""


class Job(msgspec.Struct, frozen=True):
    """What every worker of a build knows.

    Attributes:
        config: the whole configuration.
        subset: "coconut" or "sa1b".
        folder: OUT/<subset>.
        plan: content hash of the plan.
        recipe: digest of the recipe.
        run: folder of this run's events and stacks.
        idle: model stages that have evidence of every unit already: loaded only if that turns out not to be
            enough.
    """

    config: BuildConfig
    subset: str
    folder: str
    plan: str
    recipe: str
    run: str
    idle: list[str] = []


class Unit(msgspec.Struct):
    """A unit on its way: a row of the stream."""

    name: str
    images: list[ImageRecord]
    failures: dict[str, str] = {}


class Worker:
    """A Ray Data actor class: `row -> row`, where a row is a unit. Use it as a context to end its models.

    Args:
        job: what is built.
        stages: those that this worker runs, in order; "source" and "write" are the ends.
        on_event: called after each event that the worker logs.
    """

    def __init__(
        self,
        job: Job,
        stages: list[Stage | str],
        on_event: Callable[[], None] = lambda: None,
    ):
        keep_freed_memory()
        self.job = job
        self.folder = Path(job.folder)
        self.stages = stages
        self.name = _name(stages)
        self.events = EventLog(Path(job.run), self.name, on_event)
        self._crash_attempts = job.config.failures.crash_attempts
        self.stack_path = Path(job.run) / f"stack-{self.name}-{os.getpid()}.txt"
        self._stack = _open_stack(self.stack_path)
        self.source = open_source(job.config, job.subset) if SOURCE_STAGE in stages else None
        self.models: dict[str, Any] = {}
        self.meters = {
            stage.name: gpus.Meter(has_gpu=stage.backend.num_gpus > 0)
            for stage in stages
            if isinstance(stage, ModelStage)
        }
        started = time.perf_counter()
        self._broken: str | None = None
        for stage in stages:
            if isinstance(stage, ModelStage) and stage.name not in job.idle and self._broken is None:
                try:
                    self._load(stage)
                except Exception as error:  # noqa: BLE001 - told to the driver by the first unit, as one line
                    self._broken = f"{stage.name}: the backend cannot start: {type(error).__name__}: {error}"

        self.events.emit("ready", stage=self.name, seconds=time.perf_counter() - started)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *raised: object) -> None:
        """End the models that hold more than memory, as engines do."""
        while self.models:
            _, model = self.models.popitem()
            if hasattr(model, "close"):
                model.close()
        self._stack.close()

    def _load(self, stage: ModelStage) -> None:
        start = time.perf_counter()
        self.models.pop(stage.name, None)  # free the old one's memory first
        self.models[stage.name] = registry.load_backend(stage.protocol, stage.backend)
        self.events.emit("started", stage=stage.name, seconds=time.perf_counter() - start)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run this worker's stages on one unit.

        An error that ends the build (a model that cannot be loaded, a full disk) travels to the driver as a
        row of its own, because Ray keeps only the text of an exception, not its type.
        """
        if "failed" in row:
            return row
        try:
            if self._broken is not None:
                raise StageFailed(self._broken)
            return self._run(row)
        except ParaCaptionError as error:
            return {"unit": row["unit"], "failed": f"{type(error).__name__}: {error}"}
        except OSError as error:  # of the output folder: the sources' and the models' own are drops by now
            failed = writer.write_failed(self.folder, error)
            return {"unit": row["unit"], "failed": f"{type(failed).__name__}: {failed}"}

    def _run(self, row: dict[str, Any]) -> dict[str, Any]:
        unit = (
            Unit(row["unit"], []) if "state" not in row else msgspec.msgpack.decode(row["state"], type=Unit)
        )
        for is_filter, group in itertools.groupby(self.stages, lambda stage: isinstance(stage, FilterStage)):
            if is_filter:
                self._filter(unit, [stage for stage in group if isinstance(stage, FilterStage)])
                continue
            for stage in group:
                start, start_cpu = time.perf_counter(), time.process_time()
                regions, told = _live(unit), {}
                if stage == SOURCE_STAGE:
                    self._read(unit, row["index"])
                    regions = sum(len(image.regions) for image in unit.images)
                elif stage == writer.WRITE_STAGE:
                    return {"draft": self._write(unit, start, start_cpu)}
                elif isinstance(stage, ModelStage):
                    told = {"asked": self._ask(stage, unit), **self._spent(stage)}
                name = stage if isinstance(stage, str) else stage.name
                cpu = time.process_time() - start_cpu
                self._done(name, unit, regions, time.perf_counter() - start, cpu, **told)
        return {"unit": unit.name, "state": msgspec.msgpack.encode(unit)}

    def _done(self, stage: str, unit: Unit, regions: int, seconds: float, cpu: float, **told: Any) -> None:
        self.events.emit(
            "unit",
            stage=stage,
            unit=unit.name,
            images=len(unit.images),
            regions=regions,
            seconds=seconds,
            cpu=cpu,
            **told,
        )

    def _spent(self, stage: ModelStage) -> dict[str, Any]:
        """For the event: time inside the model, its GPU's utilisation, and what the backend reports."""
        spent = self.meters[stage.name].take()
        told: dict[str, Any] = {"busy": spent.busy_s, "gpu": spent.gpu}
        report = getattr(self.models.get(stage.name), "report", None)
        if report is not None:
            try:
                told["report"] = {str(name): float(value) for name, value in report().items()}
            except Exception:  # a number on a screen is not worth a unit
                log.warning("%s: its report cannot be had", stage.name, exc_info=True)
        return told

    # The ends.

    def _read(self, unit: Unit, index: int) -> None:
        assert self.source is not None
        source, limits = self.source, self.job.config.limits
        entries = plan.read_unit(self.folder / "plan" / "plan.parquet", index)
        read: dict[str, ImageRecord] = {}
        with Journal(self.folder / "journal" / SOURCE_STAGE, unit.name, self._crash_attempts) as journal:
            for batch in journal.split(entries, READ_BATCH):
                with (
                    journal.batch([entry.key for entry in batch]),
                    self._watched(f"{SOURCE_STAGE}, at {batch[0].key}"),
                ):
                    for entry in batch:
                        read[entry.key] = (
                            _empty(self.job.subset, entry, Reason.WORKER_CRASHED, journal.verdict(entry.key))
                            if journal.is_poison(entry.key)
                            else self._read_one(source, entry, limits)
                        )
        unit.images = [read[entry.key] for entry in entries]

    def _read_one(self, source: Any, entry: CatalogEntry, limits: Any) -> ImageRecord:
        try:
            return source.read(entry, limits)
        except BadRecord as bad:
            return _empty(self.job.subset, entry, bad.reason, bad.detail)
        except Exception as error:  # noqa: BLE001 - a record not foreseen is a drop, not the end
            detail = f"{entry.annotation}: {type(error).__name__}: {error}"
            return _empty(self.job.subset, entry, Reason.ANNOTATION_UNREADABLE, detail)

    def _write(self, unit: Unit, start: float, start_cpu: float) -> bytes:
        job = self.job
        draft = writer.write_unit(self.folder, unit.name, unit.images, job.plan, job.recipe)
        draft.failures = unit.failures
        cpu = time.process_time() - start_cpu
        self._done(writer.WRITE_STAGE, unit, draft.manifest.kept, time.perf_counter() - start, cpu)
        return msgspec.msgpack.encode(draft)

    # Filters: one image after the other through all of them, because neighbours share what they measure.

    def _filter(self, unit: Unit, stages: list[FilterStage]) -> None:
        regions = Counter[str]()
        seconds = dict.fromkeys((stage.name for stage in stages), 0.0)
        cpu = dict(seconds)
        for image in unit.images:
            for stage in stages:
                start, start_cpu = time.perf_counter(), time.process_time()
                regions[stage.name] += len(image.live())
                try:
                    stage.run(image)
                except Exception as error:  # noqa: BLE001 - an image that a filter trips over is a drop
                    image.reject(Drop(stage.name, Reason.MODEL_ERROR, f"{type(error).__name__}: {error}"))
                seconds[stage.name] += time.perf_counter() - start
                cpu[stage.name] += time.process_time() - start_cpu
        for stage in stages:
            self._done(stage.name, unit, regions[stage.name], seconds[stage.name], cpu[stage.name])

    # Models: whole units, in batches.

    def _ask(self, stage: ModelStage, unit: Unit) -> int:
        """Get the evidence the stage lacks and let it decide. Returns how many regions were asked about."""
        store = stage.store(self.folder)
        answers = UnitAnswers(stage, unit.images, store.load(unit.name))
        if answers.missing:
            self._answer(unit, answers, store)
            failure = _blame(answers)
            if failure is not None:
                unit.failures[stage.name] = failure
        answers.apply()
        return answers.num_missing

    def _answer(self, unit: Unit, answers: UnitAnswers, store: EvidenceStore) -> None:
        """Ask about what is missing, in batches; if everything fails, again with a fresh model."""
        stage, missing = answers.stage, answers.missing
        saved = time.monotonic()
        folder = self.folder / "journal" / f"{stage.name}-{stage.evidence_digest}"
        with Journal(folder, unit.name, self._crash_attempts) as journal:
            for attempt in range(self.job.config.failures.unit_retries + 1):
                if attempt:
                    failure = answers.image_failures[missing[0].key]
                    self.events.emit(
                        "failed",
                        stage=stage.name,
                        unit=unit.name,
                        detail=f"{failure.reason}: {failure.detail}",
                    )
                    self._reload(stage)
                answers.image_failures.clear()
                bisect = _Bisection(self._asking(stage), journal)
                for batch in journal.split(missing, stage.backend.batch_images):
                    for image, outcome in bisect.run(batch):
                        answers.add(image, outcome)
                    self.events.emit("batch", stage=stage.name, unit=unit.name, images=len(batch))
                    if time.monotonic() - saved > SAVE_EVERY_S:
                        self._save(store, unit.name, answers.known)
                        saved = time.monotonic()
                failures = answers.image_failures.values()
                everything = len(failures) == len(missing)
                if not everything or all(each.reason is not Reason.MODEL_ERROR for each in failures):
                    break
            if len(answers.image_failures) < len(missing):
                self._save(store, unit.name, answers.known)

    def _asking(self, stage: ModelStage) -> Callable[[list[ImageRecord]], list[list[Any]]]:
        def ask(batch: list[ImageRecord]) -> list[list[Any]]:
            if stage.name not in self.models:
                self._reload(stage)
            try:
                with self._watched(f"{stage.name}, at {batch[0].key}"), self.meters[stage.name].call():
                    return stage.ask(self.models[stage.name], batch)
            except EngineLost:
                del self.models[
                    stage.name
                ]  # a dead engine fails on every image: the next call gets a fresh one
                raise

        return ask

    def _reload(self, stage: ModelStage) -> None:
        try:
            self._load(stage)
        except Exception as error:
            raise StageFailed(
                f"{stage.name}: the backend cannot start: {type(error).__name__}: {error}"
            ) from error

    def _save(self, store: EvidenceStore, unit: str, known: dict) -> None:
        try:
            store.save(unit, known)
        except OSError as error:
            raise writer.write_failed(self.folder, error) from error

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        """Leave this process's stack in the run's folder if the block takes longer than the stall time."""
        try:
            self._stack.seek(0)
            self._stack.truncate()
            self._stack.write(f"{what}\n".encode())
        except OSError:  # a full disk is told by whoever writes what matters
            log.debug("no room for a stack", exc_info=True)
        faulthandler.dump_traceback_later(self.job.config.failures.stall_s, file=self._stack)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def draft_of(row: dict[str, Any]) -> Draft:
    """The written unit in a row that has passed through all stages.

    Raises:
        ParaCaptionError: the error that a worker put into the row, by its own type.
    """
    if "failed" in row:
        kind, _, message = row["failed"].partition(": ")
        raise getattr(error_types, kind)(message)
    return msgspec.msgpack.decode(row["draft"], type=Draft)


def _open_stack(path: Path) -> IO[bytes]:
    """Where a worker leaves its stack; nowhere if the disk is full: the unit's own writing will say so."""
    try:
        return open(path, "wb", buffering=0)
    except OSError as error:
        log.warning("%s: %s; a stall will show no stack", path, error)
        return open(os.devnull, "wb", buffering=0)


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed image buffers instead of giving them back and faulting them in anew.

    By default every buffer above 128 KB goes back at once: 40% of a worker's CPU time was spent on page
    faults. Up to half a gigabyte of freed memory then stays with the process. Does nothing where there is no
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc accepts
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)
        mallopt(_M_TOP_PAD, 16 << 20)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def _name(stages: list[Stage | str]) -> str:
    """A worker is known by its model stages, or else by what it does at the end of the stream."""
    names = [stage.name for stage in stages if isinstance(stage, ModelStage)]
    return "+".join(names) or (SOURCE_STAGE if SOURCE_STAGE in stages else writer.WRITE_STAGE)


def _live(unit: Unit) -> int:
    return sum(len(image.live()) for image in unit.images)


def _empty(subset: str, entry: CatalogEntry, reason: Reason, detail: str) -> ImageRecord:
    image = ImageRecord(entry.key, subset, entry.photo, 0, 0, file_name=entry.file_name)
    image.drop = Drop(SOURCE_STAGE, reason, detail)
    return image


_MODEL_TO_BLAME = {Reason.MODEL_ERROR, Reason.ANSWER_INVALID, Reason.WORKER_CRASHED}
"""Errors that speak against the stage if nothing of the unit succeeds; the others are the data's."""


def _blame(answers: UnitAnswers) -> str | None:
    """The error that speaks against the stage; None if it succeeded on any region, now or before."""
    failed = [
        each.detail
        for each in [*answers.image_failures.values(), *answers.region_failures.values()]
        if each.reason in _MODEL_TO_BLAME
    ]
    silent = len(answers.region_failures) + sum(
        len(image.regions) for image in answers.missing if image.key in answers.image_failures
    )
    return failed[-1] if failed and silent == answers.num_missing and not answers.num_known else None


class _Bisection:
    """Asks a model about a batch; on an error, about its halves, down to the image that fails."""

    def __init__(self, ask: Callable[[list[ImageRecord]], list[list[Any]]], journal: Journal):
        self.ask = ask
        self.journal = journal
        self.lonely_failures = 0
        self.successes = 0
        self.engines_lost = Counter[str]()
        self.last: Failure | None = None

    def run(self, batch: list[ImageRecord]) -> Iterator[tuple[ImageRecord, list[Any] | Failure]]:
        """(image, answers or error) for each image of the batch."""
        poison = [image for image in batch if self.journal.is_poison(image.key)]
        for image in poison:
            yield image, Failure(Reason.WORKER_CRASHED, self.journal.verdict(image.key))
        batch = [image for image in batch if not self.journal.is_poison(image.key)]
        if not batch:
            return
        if not self.successes and self.lonely_failures >= GIVE_UP_AFTER and self.last is not None:
            yield from ((image, self.last) for image in batch)
            return
        try:
            with self.journal.batch([image.key for image in batch]):
                answers = self.ask(batch)
            _check(batch, answers)
        except (ConfigError, StageFailed):
            raise
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            if len(batch) == 1 and not (isinstance(error, EngineLost) and self._may_try_again(batch[0])):
                yield batch[0], self._error(error)
                return
        else:
            self.successes += len(batch)
            yield from zip(batch, answers, strict=True)
            return
        middle = len(batch) // 2  # 0 for an image alone that may try again
        yield from self.run(batch[:middle])
        yield from self.run(batch[middle:])

    def _may_try_again(self, image: ImageRecord) -> bool:
        """Whether the engine's death may be chance: it has not yet died so often on this image alone."""
        self.engines_lost[image.key] += 1
        return self.engines_lost[image.key] < self.journal.attempts

    def _error(self, error: Exception) -> Failure:
        if isinstance(error, BadRecord):
            return Failure(error.reason, error.detail)
        self.lonely_failures += 1
        self.last = Failure(Reason.MODEL_ERROR, f"{type(error).__name__}: {error}")
        return self.last


def _check(batch: list[ImageRecord], answers: list[list[Any]]) -> None:
    """A backend that answers another number of questions than it was asked is broken: never match by luck."""
    expected = [len(image.live()) for image in batch]
    got = [len(answer) for answer in answers]
    if expected != got:
        raise ValueError(f"asked about {expected} regions of {len(batch)} images, answered {got}")


Keyed = TypeVar("Keyed", ImageRecord, CatalogEntry)


class Note(msgspec.Struct):
    """What a journal remembers: deaths alone in a batch by image key, and the images in flight."""

    deaths: dict[str, int] = {}
    working: list[str] = []


class Journal:
    """Remembers, across the death of a worker, which images it was working on.

    One small file per unit, written before each batch and removed when the unit is through. Not durable on
    purpose: a lost note costs one more crash. For the same reason a disk that takes no notes is a warning,
    not an error: whoever writes the evidence or the shard next says it clearly.

    Args:
        folder: OUT/<subset>/journal/<stage>.
        unit: name of the unit.
        attempts: deaths alone in a batch after which an image is poison.
    """

    def __init__(self, folder: Path, unit: str, attempts: int):
        self.path = folder / f"{unit}.json"
        self.attempts = attempts
        self.deaths: dict[str, int] = {}
        self._complained = False

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            note = msgspec.json.decode(self.path.read_bytes(), type=Note)
        except FileNotFoundError:
            return self
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            log.warning("%s: unreadable note (%s); it counts as none", self.path, error)
            return self
        self.deaths = note.deaths
        for key in note.working:
            self.deaths[key] = self.deaths.get(key, 0) + (len(note.working) == 1)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                self._complain(error)

    def is_poison(self, key: str) -> bool:
        """Whether the image killed its worker too often."""
        return self.deaths.get(key, 0) >= self.attempts

    def verdict(self, key: str) -> str:
        """The drop's detail for a poison image."""
        return f"the worker died {self.deaths[key]} times on this image alone"

    def split(self, images: list[Keyed], size: int) -> Iterator[list[Keyed]]:
        """Batches of `size`; images that were in flight when a worker died come one by one."""
        calm = [image for image in images if image.key not in self.deaths]
        for start in range(0, len(calm), size):
            yield calm[start : start + size]
        for image in images:
            if image.key in self.deaths:
                yield [image]

    @contextmanager
    def batch(self, keys: list[str]) -> Iterator[None]:
        """Note that these images are being worked on; the note stays if the process dies in the block."""
        self._note(keys)
        try:
            yield
        finally:
            self._note([])

    def _note(self, working: list[str]) -> None:
        try:
            self.path.write_bytes(msgspec.json.encode(Note(self.deaths, working)))
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            log.warning("%s: %s; an image that kills its worker now is not found", self.path, error)
            self._complained = True
