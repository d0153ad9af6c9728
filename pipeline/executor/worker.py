"""Runs the stages on units: in a Ray actor those of one step, in the local engine's process all of them.

How failures are contained, from the inside out:

1. A record that fails is found by bisecting its batch (`bisection.py`) and dropped with its error.
2. A unit on which every record fails is tried again with a fresh model. If that fails too, the unit goes on
   with the error in `Unit.failures`, and the driver decides whether the stage is broken (`driver.py`).
3. A record that kills the whole process is found by a note on disk (`in_flight.py`): before each batch the
   worker notes the images it works on. The worker that gets the unit next finds the note, runs these images
   one by one, and drops one that has killed its worker `failures.crash_attempts` times alone. A worker that
   dies for another reason costs nothing but time.
4. Whatever hangs (a call, a read, a filter, a write) leaves its stack in the run's folder, where the driver
   finds it (`stalls.py`).
5. A source that fails is no verdict on a record: what reads it tries again, what still fails is counted, and
   a unit of which too much failed is held back (`holding.py`).
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import msgspec

from ...schemas.errors import BadRecord, ConfigError, EngineLost, ParaCaptionError, StageFailed
from ...schemas.plain import plain_text, words_of
from ...schemas.reasons import Reason
from ...schemas.records import Drop, ImageRecord
from ..corpus import writer
from ..corpus.committed_unit import CommittedUnit
from ..corpus.events import Event, EventLog
from ..corpus.work_list_summary import read_unit
from ..io import failures, own_modules, variables
from ..io.activity import NOW
from ..io.location import is_bucket, locate
from ..sources.protocols import SOURCE_STAGE, CatalogEntry
from ..sources.registry import allow_kinds, open_source
from ..stages.base import PHOTO_CHANGED, FilterStage, ModelStage, Stage, UnitAnswers, failed_drop
from ..stages.composite import only_asked
from ..stages.evidence import Evidence, EvidenceStore
from . import gpus, holding, source_versions
from .bisection import Bisection, model_failure, needs_fresh_model
from .freed_memory import keep_freed_memory
from .in_flight import InFlight
from .job import Job
from .loaded_models import LoadedModels
from .photo_digests import PhotoWatch, check_photos
from .rows import error_text
from .run_folders import JOURNAL, local_folder
from .stalls import read_stacks, stack_file

log = logging.getLogger(__name__)

READ_BATCH = 64
"""Images that a source reads between two notes of what is in flight."""


class Unit(msgspec.Struct):
    """A unit on its way through the stages.

    Attributes:
        name: such as "coconut-000000".
        images: its records, as the stages so far left them.
        failures: stage -> error, for each model stage that failed on the whole unit.
        held: why the unit must not be committed as it is, though no stage failed; "" if it may.
        read_from: URLs of files of the source that must not have changed when all of it was read.
    """

    name: str
    images: list[ImageRecord]
    failures: dict[str, str] = {}
    held: str = ""
    read_from: list[str] = []


class Worker:
    """Runs some stages of a recipe on one unit after another; a Ray Data actor class, `row -> row`.

    A row is a unit: {"unit", "index"} before the source has read it, {"unit", "state"} on its way, {"unit",
    "draft"} when it is written, {"unit", "failed"} after an error that ends the subset. Used as a context, it
    ends its models.

    Args:
        job: what is built.
        stages: the stages that this worker runs, in order; "source" and "write" are the ends of a recipe.
        on_event: called with each event, after the worker has logged it.
        models: those of the process, if it has several workers (`workers.py`); whoever gives them also keeps
            the process's stack file, and calls `report_ready`.

    Attributes:
        away_s: seconds that the process has worked for other subsets since the last unit was reported.
    """

    def __init__(
        self,
        job: Job,
        stages: list[Stage | str],
        on_event: Callable[[Event], None] = lambda _: None,
        models: LoadedModels | None = None,
    ):
        started = time.perf_counter()
        keep_freed_memory()
        own_modules.install(job.modules)
        variables.install(job.variables)
        allow_kinds(job.config.subsets.values())
        self.job = job
        self.folder = locate(job.folder)
        self.stages = stages
        self.name = name_of(stages)
        self._names = {stage if isinstance(stage, str) else stage.name for stage in stages}
        self.events = EventLog(locate(job.run), self.name, on_event)
        self._crash_attempts = job.config.failures.crash_attempts
        self._stack = None
        if models is None:
            stall_s = job.config.failures.stall_s
            self._stack = stack_file(job.run, stall_s, self.name, self.report_progress).__enter__()
            self.events.add_files(partial(read_stacks, job.run))
        self.source = open_source(job.config, job.subset) if SOURCE_STAGE in stages else None
        failures.RETRYING.set_budget(job.config.failures.read_retry_s)
        self.models = LoadedModels() if models is None else models
        self.away_s = 0.0
        self._photos = PhotoWatch()
        self.meters = {
            stage.name: gpus.Meter(has_gpu=stage.backend.num_gpus > 0)
            for stage in stages
            if isinstance(stage, ModelStage)
        }
        self._broken = self._load_all()
        if models is None:
            self.report_ready(started)

    def _load_all(self) -> str | None:
        """Load the models that will be asked, unless they are there. Returns why one cannot start."""
        reported = set[str]()
        for stage in self.stages:
            if not isinstance(stage, ModelStage) or stage.name in self.job.idle:
                continue
            key = self.models.key(stage)
            try:
                if self.models.get(stage) is None:
                    self._load(stage)
                else:  # by a worker of another subset, or by a stage before this one: that is not paid twice
                    seconds = 0.0 if key in reported else self.models.seconds(stage)
                    self.events.emit("started", stage=stage.name, seconds=seconds)
            except Exception as error:  # noqa: BLE001 - the first unit reports it to the driver
                return _cannot_start(stage, error)
            reported.add(key)
        return None

    def report_ready(self, started: float) -> None:
        """Log that the worker takes units; `started` is when its process began to make it."""
        self.events.emit("ready", stage=self.name, seconds=time.perf_counter() - started)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the models, and the files of this process."""
        self.models.close()
        if self._stack is not None:
            self._stack.__exit__()
        self.events.close()

    def _load(self, stage: ModelStage) -> None:
        with NOW.during(f"{stage.name}: starting the model"):
            self.models.load(stage)
        self.events.emit("started", stage=stage.name, seconds=self.models.seconds(stage))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run this worker's stages on one unit.

        An error that ends the subset (a model that cannot be loaded, a full disk) travels to the driver as a
        row of its own, because Ray keeps only the text of an exception, not its type.
        """
        if "failed" in row:
            return row
        try:
            if self._broken is not None:
                raise StageFailed(self._broken)
            return self._run(row)
        except ParaCaptionError as error:
            return {"unit": row["unit"], "failed": error_text(error)}
        except OSError as error:  # of the output folder: the sources' and the models' own are drops by now
            failed = writer.write_failed(self.folder, error)
            return {"unit": row["unit"], "failed": error_text(failed)}

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
                regions, reported = 0, {}
                if stage == SOURCE_STAGE:
                    with NOW.during(SOURCE_STAGE, unit.name):
                        self._read(unit, row["index"])
                    regions = sum(len(image.regions) for image in unit.images)
                elif stage == writer.WRITE_STAGE:
                    with NOW.during(writer.WRITE_STAGE, unit.name):
                        return {"draft": self._write(unit, start, start_cpu)}
                elif isinstance(stage, ModelStage):
                    with NOW.during(stage.name, unit.name), only_asked(stage, unit.images):
                        regions = _count_live(unit)
                        reported = {"asked": self._ask(stage, unit), **self._report_model(stage)}
                        regions = _count_live(unit) if stage.makes_regions else regions
                name = stage if isinstance(stage, str) else stage.name
                cpu = time.process_time() - start_cpu
                self._report_unit(name, unit, regions, time.perf_counter() - start, cpu, **reported)
        return {"unit": unit.name, "state": msgspec.msgpack.encode(unit)}

    def _report_unit(
        self, stage: str, unit: Unit, regions: int, seconds: float, cpu: float, **reported: Any
    ) -> None:
        away, self.away_s = self.away_s, 0.0
        self.events.emit(
            "unit",
            stage=stage,
            unit=unit.name,
            images=len(unit.images),
            regions=regions,
            seconds=seconds,
            cpu=cpu,
            away=away,
            **reported,
        )

    def report_progress(self) -> None:
        """From record to record: something moves, also where a unit takes long."""
        if (step := NOW.step) is not None and step.stage in self._names:
            self.events.append("batch", stage=step.stage, unit=step.unit)

    def _report_model(self, stage: ModelStage) -> dict[str, Any]:
        """For the event: time inside the model, its GPU's utilization, and what the backend reports."""
        spent = self.meters[stage.name].take()
        reported: dict[str, Any] = {"busy": spent.busy_s, "gpu": spent.gpu}
        report = getattr(self.models.get(stage), "report", None)
        if report is not None:
            try:
                numbers = {plain_text(str(name)): float(value) for name, value in report().items()}
                reported["report"] = {name: each for name, each in numbers.items() if math.isfinite(each)}
            except Exception:  # a number on a screen is not worth a unit
                log.warning("%s: its report failed", stage.name, exc_info=True)
        return reported

    # The ends.

    def _read(self, unit: Unit, index: int) -> None:
        entries = read_unit(self.folder, index)
        committed = CommittedUnit(self.folder, unit.name)
        read: dict[str, ImageRecord] = {}
        with self._in_flight(SOURCE_STAGE, unit) as in_flight:
            for batch in in_flight.split(entries, READ_BATCH):
                with in_flight.batch([entry.key for entry in batch]):
                    for entry in batch:
                        NOW.at(entry.key)
                        if in_flight.is_poison(entry.key):
                            detail = in_flight.crash_detail(entry.key)
                            read[entry.key] = self._dropped(entry, Reason.WORKER_CRASHED, detail)
                        else:
                            read[entry.key] = self._read_one(entry, committed)
        unit.images = [read[entry.key] for entry in entries]
        assert self.source is not None
        unit.read_from = source_versions.files_read(entries, self.source, self.job.versions)
        self._stop_if_refused(unit)

    def _read_one(self, entry: CatalogEntry, committed: CommittedUnit) -> ImageRecord:
        """The image; with its photo from the committed shard if the source cannot give it.

        One that is gone from its source is taken from the committed files as a whole.
        """
        assert self.source is not None
        limits = self.job.config.limits
        if entry.drop is not None and entry.drop.reason is Reason.GONE:
            return committed.image(entry.key) or self.source.read(entry, limits)
        image = self.source.read(entry, limits)
        is_missing = image.drop is not None and image.drop.reason is Reason.PHOTO_MISSING
        if (image.failed or is_missing) and (photo := committed.photo(entry.key)) is not None:
            there = msgspec.structs.replace(entry, photo=photo, drop=None if is_missing else entry.drop)
            if there.annotation is not None:
                again = self.source.read(there, limits)
                removed = committed.removed_orientation(entry.key)
                if not again.failed and removed is not None:
                    again.removed_orientation = removed
                    return again
        return image

    def _stop_if_refused(self, unit: Unit) -> None:
        """End the build if the source refuses everything: no record is to blame for that.

        Raises:
            ConfigError: says what to do.
        """
        read = [image for image in unit.images if not image.failed and image.photo is not None]
        refused = [image for image in unit.images if image.failed == failures.Kind.REFUSED]
        if refused and not read and not self._do_neighbors_read(unit):
            drop = refused[-1].drop
            detail = drop.detail.partition("; ")[0] if drop else ""
            raise ConfigError(
                f"{detail}; the source refused every read: correct its permissions or the credentials, then "
                "run the same command again"
            )

    def _why_held(self, unit: Unit) -> str:
        committed = CommittedUnit(self.folder, unit.name)
        return holding.why_held(
            unit.images, committed, self.job.config, lambda: self._do_neighbors_read(unit)
        )

    def _do_neighbors_read(self, unit: Unit) -> bool:
        if self.source is None:
            self.source = open_source(self.job.config, self.job.subset)
        index = int(unit.name.rpartition("-")[2])
        return holding.neighbors_read(self.source, self.job.config, self.folder, index)

    def _dropped(self, entry: CatalogEntry, reason: Reason, detail: str) -> ImageRecord:
        """An image that could not be read: no regions, and the reason."""
        image = ImageRecord(entry.key, self.job.subset, entry.photo, 0, 0, file_name=entry.file_name)
        image.drop = Drop(SOURCE_STAGE, reason, detail)
        return image

    def _write(self, unit: Unit, start: float, start_cpu: float) -> bytes:
        job = self.job
        plan = job.plans.get(unit.name, job.plan)
        draft = writer.write_unit(self.folder, unit.name, unit.images, plan, job.recipe)
        draft.failures = unit.failures
        changed = source_versions.why_changed(unit.read_from, job.versions)
        draft.held = changed or unit.held or draft.held or self._why_held(unit)
        if draft.held:
            self.events.emit("failed", stage=SOURCE_STAGE, unit=unit.name, detail=draft.held)
            writer.discard(self.folder.parent, draft)
        cpu = time.process_time() - start_cpu
        self._report_unit(writer.WRITE_STAGE, unit, draft.manifest.kept, time.perf_counter() - start, cpu)
        return msgspec.msgpack.encode(draft)

    # Filters: one image after the other through all of them, because neighbors share what they measure.

    def _filter(self, unit: Unit, stages: list[FilterStage]) -> None:
        regions = Counter[str]()
        seconds = dict.fromkeys((stage.name for stage in stages), 0.0)
        cpu = dict(seconds)
        for image in unit.images:
            for stage in stages:
                start, start_cpu = time.perf_counter(), time.process_time()
                with only_asked(stage, [image]):
                    regions[stage.name] += len(image.live())
                    try:
                        with NOW.during(stage.name, unit.name, image.key):
                            stage.run(image)
                    except BadRecord as bad:
                        image.reject(failed_drop(stage, bad.reason, bad.detail), failures.kind_of(bad))
                    except Exception as error:  # noqa: BLE001 - an image that a filter trips over is a drop
                        image.reject(failed_drop(stage, Reason.MODEL_ERROR, words_of(error)))
                seconds[stage.name] += time.perf_counter() - start
                cpu[stage.name] += time.process_time() - start_cpu
        for stage in stages:
            self._report_unit(stage.name, unit, regions[stage.name], seconds[stage.name], cpu[stage.name])

    # Models: whole units, in batches.

    def _ask(self, stage: ModelStage, unit: Unit) -> int:
        """Get the evidence the stage lacks and let it decide. Returns how many regions were asked about."""
        store = stage.store(self.folder)
        known = store.load(unit.name)
        check_photos(stage, unit.images, known)
        answers = stage.answers(unit.images, known)
        if answers.missing:
            self._answer(unit, answers, store)
            failure = model_failure(answers)
            if failure is not None:
                unit.failures[stage.name] = failure
            if answers.changed:
                unit.held = f"{min(answers.changed)}: {PHOTO_CHANGED}"
        elif stage.within is not None and not store.exists(unit.name):
            self._save(store, unit.name, {})  # no region came to it: its model need not be loaded for that
        answers.apply()
        return answers.num_asked

    def _answer(self, unit: Unit, answers: UnitAnswers, store: EvidenceStore) -> None:
        """Ask about what is missing, in batches; if everything fails, again with a fresh model."""
        stage, missing = answers.stage, answers.missing
        most = stage.backend.batch_images
        size, noted = (len(missing), most) if stage.batches_itself else (most, None)
        saved = time.monotonic()
        with self._in_flight(f"{stage.name}-{stage.evidence_digest}", unit) as in_flight:
            for attempt in range(self.job.config.failures.unit_retries + 1):
                if attempt:
                    failure = answers.image_failures[missing[0].key]
                    detail = f"{failure.reason}: {failure.detail}"
                    self.events.emit("failed", stage=stage.name, unit=unit.name, detail=detail)
                    self._reload(stage)
                answers.image_failures.clear()
                bisection = Bisection(partial(self._ask_model, stage), in_flight, noted)
                for batch in in_flight.split(missing, size):
                    for number, (image, outcome) in enumerate(bisection.run(batch), 1):
                        answers.add(image, outcome)
                        if is_end := number == len(batch) or number % most == 0:
                            images = (number - 1) % most + 1
                            self.events.emit("batch", stage=stage.name, unit=unit.name, images=images)
                        is_due = time.monotonic() - saved >= self.job.config.failures.save_every_s
                        if is_due and (is_end or stage.batches_itself):
                            self._save(store, unit.name, answers.known)
                            saved = time.monotonic()
                if not needs_fresh_model(answers):
                    break
            if len(answers.image_failures) < len(missing):
                self._save(store, unit.name, answers.known)

    def _ask_model(self, stage: ModelStage, batch: list[ImageRecord]) -> Iterator[tuple[int, list[Any]]]:
        if self.models.get(stage) is None:
            self._reload(stage)
        given = [_copy(image) for image in batch]
        NOW.at(_names(batch))
        with closing(self._photos.ask(stage, self.models.get(stage), given)) as asked:
            while (answered := self._next(stage, asked, batch, given)) is not None:
                yield answered
                NOW.at(batch[answered[0]].key)

    def _next(
        self,
        stage: ModelStage,
        asked: Iterator[tuple[int, list[Any]]],
        batch: list[ImageRecord],
        given: list[ImageRecord],
    ) -> tuple[int, list[Any]] | None:
        """What the model says next; None at its end."""
        try:
            with self.meters[stage.name].call():
                return next(asked, None)
        except EngineLost:
            self.models.drop(stage)  # a dead engine fails on every image: the next call gets a fresh one
            raise
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit, GeneratorExit, CancelledError, pytest's, trio's, ...
            if hasattr(error, "ray_terminate_msg"):  # Ray ends this process
                raise
            raise RuntimeError(f"the backend tried to end the process ({words_of(error)})") from error
        finally:
            for image, seen in zip(batch, given, strict=True):
                image.photo_digest = seen.photo_digest

    def _in_flight(self, stage: str, unit: Unit) -> InFlight:
        journal = local_folder(str(self.folder.parent), f"{self.folder.name}/{JOURNAL}/{stage}")
        shared = self.folder / JOURNAL / stage if is_bucket(self.folder) else None
        return InFlight(journal, unit.name, self._crash_attempts, shared)

    def _reload(self, stage: ModelStage) -> None:
        try:
            self._load(stage)
        except Exception as error:
            raise StageFailed(_cannot_start(stage, error)) from error

    def _save(self, store: EvidenceStore, unit: str, evidence: Evidence) -> None:
        """Save evidence, and take over what somebody else has saved first."""
        NOW.at("saving its evidence")
        try:
            evidence.update(store.save(unit, evidence))
        except OSError as error:
            raise writer.write_failed(self.folder, error) from error


def _cannot_start(stage: ModelStage, error: Exception) -> str:
    return f"{stage.name}: the backend cannot start: {words_of(error)}; `paracaption doctor CONFIG` checks it"


def _names(batch: list[ImageRecord]) -> str:
    more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
    return f"{batch[0].key}{more}"


def _copy(image: ImageRecord) -> ImageRecord:
    """A record for a backend, which may change what it is given."""
    return msgspec.structs.replace(image, regions=[msgspec.structs.replace(each) for each in image.regions])


def name_of(stages: list[Stage | str]) -> str:
    """A worker is known by its model stages, or else by what it does at the end of the stream."""
    names = dict.fromkeys(stage.name for stage in stages if isinstance(stage, ModelStage))
    return "+".join(names) or (SOURCE_STAGE if SOURCE_STAGE in stages else writer.WRITE_STAGE)


def _count_live(unit: Unit) -> int:
    return sum(len(image.live()) for image in unit.images)
