"""Commits the units of a build as they come, or holds them back."""

from __future__ import annotations

import logging
import math
import time

from ...schemas.config import BuildConfig, dump_config
from ...schemas.errors import ParaCaptionError, StageFailed, UnitsHeldBack
from ...schemas.records import Blob
from ...schemas.secrets import shorten
from ..corpus import log as commit_log
from ..corpus import reader, writer
from ..corpus.events import EventLog
from ..corpus.owner import Owner
from ..corpus.records import Config
from ..corpus.writer import Draft
from ..io import files
from ..io.activity import NOW
from ..io.location import Location, locate
from .progress import Progress

log = logging.getLogger(__name__)

COMMIT_EVERY_S = 5.0
"""Units that are ready so soon after the last commit share the next one: a record costs a few writes."""


def write_config(config: BuildConfig, owner: Owner) -> None:
    """Record the resolved configuration, and write it next to what it builds, unless it is the same."""
    text = dump_config(config)
    if owner.state.config is None or owner.state.config.text != text or not _has_config(config):
        try:
            owner.append(Config(text=text, files=[owner.write(reader.CONFIG, text.encode())]))
        except OSError as error:
            raise writer.write_failed(locate(config.out), error) from error


def _has_config(config: BuildConfig) -> bool:
    try:
        path = commit_log.place_of(config.out, reader.CONFIG)
        return files.read(Blob(path)) == dump_config(config).encode()
    except OSError:
        return False


def held_back(held: dict[str, str], how: str = "") -> str:
    """The line that ends a build whose source failed: by unit, what happened."""
    unit, why = list(held.items())[-1]
    some = f"{len(held)} units{how} are" if len(held) > 1 else "1 unit is"
    return (
        f"{some} held back, last {unit}: {why}. What is committed stays. Run the same command again when the "
        "source can be read and the models work. To commit these units without the images that failed, raise "
        "failures.max_failed_share (to 1 if regions of the committed files would be lost)"
    )


class Committer:
    """Commits drafts as they come.

    A unit whose source failed is held back: it is never committed, and `stop_after` of them in a row stop the
    build.

    A unit on which a stage failed everywhere waits for the next ones: if the stage works on one of them, the
    failed unit is committed with its drops; if it fails on `stop_after` units in a row, the build stops.
    """

    def __init__(
        self, config: BuildConfig, folder: Location, owner: Owner, progress: Progress, events: EventLog
    ):
        self.config = config
        self.folder = folder
        self.owner = owner
        self.stop_after = config.failures.stop_after_units
        self.progress = progress
        self.events = events
        self.suspects: list[Draft] = []
        self.held_in_a_row: dict[str, str] = {}
        self.ready: list[Draft] = []
        self.committed_s = -math.inf
        self.has_written_config = False

    def take(self, draft: Draft) -> ParaCaptionError | None:
        """Commit a unit, or hold it back. Returns the error that ends the subset, if there is one.

        Raises:
            Fenced: another driver has taken over.
            StageFailed: the corpus cannot be written.
        """
        if draft.held:
            return self._hold(draft)
        self.held_in_a_row = {}
        if draft.failures:
            return self._suspect(draft)
        self._release()
        self._commit(draft)

    def _suspect(self, draft: Draft) -> StageFailed | None:
        self.suspects.append(draft)
        if len(self.suspects) >= self.stop_after:
            stage, error = next(iter(draft.failures.items()))
            return StageFailed(
                f"{stage}: failed on every image of {len(self.suspects)} units in a row, last on "
                f"{draft.manifest.unit}: {error}. "
                "What is committed stays; fix the cause and run the same command again"
            )

    def _hold(self, draft: Draft) -> UnitsHeldBack | None:
        unit = draft.manifest.unit
        log.warning("%s is held back: %s", unit, draft.held)
        self.discard(draft)
        self.owner.held_back[draft.name] = shorten(draft.held)
        self.progress.held[unit] = self.held_in_a_row[unit] = draft.held
        if len(self.held_in_a_row) >= self.stop_after:
            return UnitsHeldBack(held_back(self.held_in_a_row, " in a row"))

    def finish(self) -> None:
        """Commit what waits."""
        self._release()
        self.commit_ready()

    def abandon(self) -> None:
        """Forget what is not committed: the drafts' stage or disk has failed."""
        for draft in [*self.suspects, *self.ready]:
            self.discard(draft)
        self.suspects, self.ready = [], []

    def discard(self, draft: Draft) -> None:
        """Delete the files of a unit that is not to be committed."""
        writer.discard(self.owner.out, draft)

    def commit_now_and_then(self) -> None:
        """Commit what is ready, unless the last commit is only moments ago."""
        if self.ready and time.monotonic() - self.committed_s >= COMMIT_EVERY_S:
            self.commit_ready()

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
        self.ready.append(draft)
        self.commit_now_and_then()

    def commit_ready(self) -> None:
        """Commit what is ready, now."""
        if not self.ready:
            return
        start = time.perf_counter()
        if not self.has_written_config:
            with NOW.during("commit", record="the configuration"):
                write_config(self.config, self.owner)
            self.has_written_config = True
        drafts, self.ready = self.ready, []
        with NOW.during("commit", drafts[0].name):
            writer.commit(self.folder, *drafts, owner=self.owner)
        self.committed_s = time.monotonic()
        for draft in drafts:
            record = draft.manifest
            self.events.emit(
                "committed",
                unit=record.unit,
                images=len(record.images),
                regions=record.regions_in,
                seconds=(time.perf_counter() - start) / len(drafts),
            )
            self.progress.done += 1
            self.progress.images += len(record.images)
            self.progress.regions += record.regions_in
            self.progress.kept += record.kept
            self.progress.dropped.update(record.dropped)
