"""Prefect's artifacts, made next to the work: whoever builds, trains or evaluates never waits for a server.

Every call to Prefect runs in a thread of its own, one after the other. A server that is away costs the
numbers on its screen, and one warning.
"""

from __future__ import annotations

import base64
import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..pipeline.corpus import log as commit_log
from ..pipeline.io import files
from ..schemas.records import Blob

if TYPE_CHECKING:
    from ..pipeline.corpus.utilization import StageUtilization
    from ..pipeline.executor.progress import Progress
    from ..pipeline.io.location import Location

log = logging.getLogger(__name__)

UPDATE_EVERY_S = 10.0
"""How often the progress bars of a build change."""

ANSWER_S = 10.0
"""How long one call may take, and how long the end of a flow waits for those that are left."""

_MOST_WAITING = 100
"""Calls that may wait for a server that is away; what comes then is dropped."""


class Publisher:
    """Makes calls to Prefect in a thread, in the order in which they were put.

    Attributes:
        lost: why the latest call failed; "" if it did not.
    """

    def __init__(self) -> None:
        self.lost = ""
        self._waiting: queue.Queue[Callable[[], None]] = queue.Queue(_MOST_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, call: Callable[..., Any], **arguments: Any) -> bool:
        """Have a call made soon, in the caller's context: an artifact belongs to its run. Never waits.

        Returns:
            False if too many calls wait already, so that this one is dropped.
        """
        context = contextvars.copy_context()
        return self._put(lambda: context.run(self._call, call, arguments))

    def wait(self, timeout_s: float = ANSWER_S) -> bool:
        """Wait for the calls so far, but no longer than that; return whether they are made, the last well."""
        done = threading.Event()
        return self._put(done.set) and done.wait(timeout_s) and not self.lost

    def _put(self, job: Callable[[], None]) -> bool:
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            return False
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="artifacts", daemon=True)
                self._thread.start()
        return True

    def _work(self) -> None:
        while True:
            self._waiting.get()()

    def _call(self, call: Callable[..., Any], arguments: dict[str, Any]) -> None:
        from prefect.settings import (
            PREFECT_API_REQUEST_TIMEOUT,
            PREFECT_CLIENT_MAX_RETRIES,
            temporary_settings,
        )

        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: ANSWER_S}):
                call(**arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs a number on a screen
            why = str(error).split("\n")[0] or type(error).__name__
            if not self.lost:
                log.warning(
                    "Prefect's server does not accept artifacts (%s); the run continues without them", why
                )
            self.lost = why
        else:
            self.lost = ""


PUBLISHER = Publisher()
"""Of this process."""


def artifact_key(*parts: str) -> str:
    """A key as Prefect wants it: lower case letters, digits and dashes."""
    text = "-".join(parts).lower()
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text)


def publish_markdown(key: str, markdown: str) -> None:
    """Publish a page as an artifact of the run that this is called in."""
    from prefect.artifacts import create_markdown_artifact

    PUBLISHER.put(create_markdown_artifact, key=key, markdown=markdown)


def publish_table(key: str, rows: Sequence[dict[str, Any]], description: str | None = None) -> None:
    """Publish a table as an artifact. Prefect's page shows the first row's columns, so all rows get all."""
    from prefect.artifacts import create_table_artifact

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = [{name: row.get(name) for name in columns} for row in rows]
    PUBLISHER.put(create_table_artifact, key=key, table=table, description=description)


def embedded(picture: Path) -> str:
    """A picture as Markdown that holds the picture's bytes, so that no server has to serve the file."""
    return _embedded(picture.name, picture.read_bytes())


def _embedded(name: str, data: bytes) -> str:
    stem, _, suffix = name.rpartition(".")
    kind = "jpeg" if suffix == "jpg" else "png"
    return f"![{stem}](data:image/{kind};base64,{base64.b64encode(data).decode()})"


def card_page(card: str, corpus: str | Location) -> str:
    """A dataset card as Prefect's page can show it: without its front matter, and with its plots in it.

    Args:
        card: the text of OUT/README.md.
        corpus: whose plots the card shows.
    """
    _, _, body = card.removeprefix("---\n").partition("\n---\n")
    lines = []
    for line in (body if card.startswith("---\n") else card).strip().split("\n"):
        name = line.partition("](plots/")[2].removesuffix(")")
        data = _read_plot(corpus, PurePosixPath(name).name) if line.startswith("![") and name else None
        lines.append(line if data is None else _embedded(PurePosixPath(name).name, data))
    return "\n".join(lines) + "\n"


def _read_plot(corpus: str | Location, name: str) -> bytes | None:
    with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return files.read(Blob(commit_log.place_of(corpus, f"plots/{name}")))
    return None


class BuildBoard:
    """The live view of a build as artifacts: for each subset a progress bar, and a table when it is done."""

    def __init__(self) -> None:
        self._subsets: dict[str, _Bar] = {}

    def show(self, progress: Progress) -> None:
        """Take note of the progress; called from the loop that commits, so it never waits."""
        if progress.subset not in self._subsets:
            self._subsets[progress.subset] = _Bar(progress.subset)
        self._subsets[progress.subset].show(progress)

    def finish(self) -> None:
        """Fill the bars, and publish the tables."""
        for bar in self._subsets.values():
            bar.finish()


class _Bar:
    """A progress bar. It is created, changed and, where the server has forgotten it, created again."""

    def __init__(self, subset: str):
        self.subset = subset
        self.progress: Progress | None = None
        self._id: Any = None
        self._shown = -1e9
        self._is_waiting = False

    def show(self, progress: Progress) -> None:
        self.progress = progress
        if time.monotonic() - self._shown > UPDATE_EVERY_S and progress.pending and not self._is_waiting:
            self._shown = time.monotonic()
            self._put(100.0 * progress.done / progress.pending)

    def finish(self) -> None:
        self._put(100.0)
        assert self.progress is not None
        rows = stage_rows(self.progress)
        publish_table(artifact_key(self.subset, "stages"), rows, f"{self.subset}: this run by stage")

    def _put(self, percent: float) -> None:
        self._is_waiting = True
        self._is_waiting = PUBLISHER.put(self._send, percent=percent)

    def _send(self, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact
        from prefect.exceptions import ObjectNotFound

        self._is_waiting = False
        if self._id is not None:
            try:
                update_progress_artifact(self._id, progress=percent)
                return
            except ObjectNotFound:  # the server was started again with another database
                self._id = None
        self._id = create_progress_artifact(
            progress=percent,
            key=artifact_key(self.subset, "units"),
            description=f"{self.subset}: units committed",
        )


def stage_rows(progress: Progress) -> list[dict[str, Any]]:
    """What each stage did in a run, a row each."""
    return [
        {
            "stage": name,
            "units": stage.units,
            "regions": stage.regions,
            "asked": stage.asked,
            "seconds": round(stage.seconds, 1),
            "dropped": sum(n for key, n in progress.dropped.items() if key.partition("/")[0] == name),
            **_utilization(progress.utilization.get(name)),
        }
        for name, stage in progress.stages.items()
    ]


def _utilization(stage: StageUtilization | None) -> dict[str, Any]:
    """A model stage's actors in the table: start-up, share of time in calls, the backend's own numbers."""
    if stage is None:
        return {}
    return {
        "actors": stage.actors,
        "start-up s": round(stage.startup_s, 1),
        "regions/s each": None if stage.regions_per_s is None else round(stage.regions_per_s, 2),
        "busy": None if stage.busy_share is None else round(stage.busy_share, 3),
        "GPU in calls": None if stage.gpu is None else round(stage.gpu, 3),
        **{name: round(value, 3) for name, value in stage.report.items()},
    }
