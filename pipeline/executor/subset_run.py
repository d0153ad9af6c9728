"""A subset while its units are built: its job, its events, its progress, and what is committed of it."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from typing import NamedTuple

from ...schemas.config import BuildConfig
from ...schemas.errors import ParaCaptionError
from ..corpus import writer
from ..corpus.events import EventLog, EventReader
from ..corpus.owner import Owner
from ..corpus.work_list_summary import WorkList
from ..corpus.writer import Draft
from ..io import own_modules, variables
from ..io.bucket_clients import place_of, variables_set
from ..io.location import Location, is_bucket, locate
from ..io.store import store_of
from ..sources.protocols import SOURCE_STAGE
from ..stages.base import ModelStage, Stage
from ..stages.recipes import recipe_digest, recipe_of
from .committer import Committer
from .engine import Part
from .given_up import give_up
from .job import Job
from .progress import Progress, StageProgress, Watch
from .run_folders import JOURNAL, begin_run, end_run, local_folder
from .source_versions import planned_versions

log = logging.getLogger(__name__)


class Pending(NamedTuple):
    """What is to be built of a subset: its work list, and the indices of the units."""

    work_list: WorkList
    units: list[int]


class SubsetRun:
    """One subset of a group that is built side by side.

    Args:
        config: the resolved configuration.
        subset: its name.
        pending: the units to build.
        owner: of the corpus.

    Attributes:
        part: what the engine is given.
        progress: its live view.
        error: that ended it; None so far.
        has_shown_end: whether the progress was shown once since it ended.
    """

    def __init__(self, config: BuildConfig, subset: str, pending: Pending, owner: Owner):
        work_list, units = pending
        self.folder = locate(config.out) / subset
        self.run = _name_run(config, subset)
        stages = recipe_of(config, subset)
        plans = work_list.plans()
        job = Job(
            config,
            subset,
            str(self.folder),
            work_list.digest,
            recipe_digest(stages, config),
            str(self.run),
            [stage.name for stage in stages if has_all_evidence(stage, self.folder, work_list, units)],
            plans={work_list.unit_name(at): plans[at] for at in units if plans[at] != work_list.digest},
            modules=own_modules.taken(),
            variables=variables.taken(),
            versions=planned_versions(work_list),
            bucket_variables=variables_set(place_of(config.out).scheme) if is_bucket(config.out) else [],
        )
        self.part = Part(job, stages, work_list, units)
        names = [SOURCE_STAGE, *(stage.name for stage in stages), writer.WRITE_STAGE]
        self.progress = Progress(subset, pending=len(units), stages={name: StageProgress() for name in names})
        self.events = EventLog(self.run, "driver")
        self.events.emit("begun")
        self.committer = Committer(config, self.folder, owner, self.progress, self.events)
        self.error: ParaCaptionError | None = None
        self.has_shown_end = False
        self._come = 0

    def follow(self, watch: Watch) -> None:
        """Have the events of this run's workers read."""
        watch.follow(EventReader(self.run), self.progress, self.run)

    def take(self, outcome: Draft | ParaCaptionError) -> None:
        """Commit a unit, hold it back, or end the subset: then `error` says why.

        Raises:
            Fenced: another driver has taken over.
            StageFailed: the corpus cannot be written.
        """
        self._come += 1
        if self.error is not None:
            if isinstance(outcome, Draft):
                self.committer.discard(outcome)
            return
        self.error = self.committer.take(outcome) if isinstance(outcome, Draft) else outcome
        if self.error is not None:
            self.committer.abandon()
            give_up(self.run)
            self.progress.ended = True
        elif self._come == self.progress.pending:
            self.committer.commit_ready()
            self.progress.ended = True

    def finish(self, trust: bool) -> None:
        """Commit the units on which a stage failed as a whole.

        Args:
            trust: whether to do so; otherwise they are left to the next build.
        """
        if self.error is not None:
            return
        if trust:
            self.committer.finish()
        else:
            self.committer.abandon()
        self.events.emit("ended")

    def clean(self) -> None:
        """Remove the notes of a run that came to its end, and the files of stacks that are none."""
        end_run(str(self.run))
        journal = local_folder(str(self.folder.parent), f"{self.folder.name}/{JOURNAL}")
        shutil.rmtree(journal, ignore_errors=True)
        if is_bucket(self.folder):
            store_of(str(self.folder)).delete_folder(str(self.folder / JOURNAL))


def has_all_evidence(stage: Stage, folder: Location, work_list: WorkList, units: list[int]) -> bool:
    """Whether a model stage has evidence of all these units, so that its model need not be loaded yet."""
    if not isinstance(stage, ModelStage):
        return False
    return stage.store(folder).has_all([work_list.unit_name(index) for index in units])


def _name_run(config: BuildConfig, subset: str) -> Location:
    """A place for the events of a new run; its folder on this machine is made."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{subset}-{uuid.uuid4().hex[:6]}"
    run = locate(config.out) / "events" / name
    try:
        begin_run(str(run))
    except OSError as error:
        raise writer.write_failed(locate(config.out), error) from error
    return run
