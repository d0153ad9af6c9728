"""The workers of one process that builds several subsets side by side: a Ray Data actor class.

A row belongs to a subset, whose worker runs its stages on it. They share what a process has once: the models
that they have in common, the file of its stack, and the clock that writes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ...schemas.errors import ParaCaptionError
from ..corpus.events import Event
from ..corpus.writer import write_failed
from ..io import bucket_checks, failures
from ..io.location import locate
from . import rows
from .given_up import is_given_up
from .job import Job
from .loaded_models import LoadedModels
from .operators import Step
from .run_folders import BEGUN, forget_old
from .stalls import StackFile, read_stacks, stack_file
from .worker import Worker, name_of


class Workers:
    """One worker for each subset, `row -> row`; see `Worker`. Here a row also has its "subset".

    A row passes as it is if its subset has no stage here, or if it is written or failed already.

    Args:
        parts: for each subset what is built, and the stages that this process runs, in order.
        on_event: makes what is called with each event of a subset's worker.
    """

    def __init__(self, parts: Sequence[tuple[Job, Step]], on_event: Callable[[Job], Callable[[Event], None]]):
        started = time.perf_counter()
        job = parts[0][0]
        self.name = name_of([stage for _, step in parts for stage in step])
        self._at_work: Worker | None = None
        self._stack: StackFile | None = None
        self.models = LoadedModels()
        self.workers: dict[str, Worker] = {}
        failures.RETRYING.set_budget(job.config.failures.read_retry_s)
        self._refused = self._look_at_node([job for job, _ in parts])
        if self._refused:
            return
        stall_s = job.config.failures.stall_s
        self._stack = stack_file(job.run, stall_s, self.name, self._report_progress).__enter__()
        for each, step in parts:
            self.workers[each.subset] = Worker(each, step, on_event(each), self.models)
        self.workers[job.subset].events.add_files(partial(read_stacks, job.run))
        for worker in self.workers.values():
            worker.report_ready(started)

    def _look_at_node(self, jobs: list[Job]) -> str:
        """Why nothing can be built on this node; the first unit reports it to the driver. "" if it can."""
        job, out = jobs[0], locate(jobs[0].folder).parent
        try:
            bucket_checks.check_node(str(out), str(locate(job.run) / BEGUN), job.bucket_variables)
            forget_old(str(out), [locate(job.run).name for job in jobs])
        except ParaCaptionError as error:
            return rows.error_text(error)
        except OSError as error:
            return rows.error_text(write_failed(out, error))
        return ""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the models and the files of all workers."""
        for worker in self.workers.values():
            worker.__exit__(*raised)
        if self._stack is not None:
            self._stack.__exit__()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run the stages of a unit's subset on it; see `Worker.__call__`."""
        if self._refused:
            return {"subset": row["subset"], "unit": row["unit"], "failed": self._refused}
        worker = self.workers.get(row["subset"])
        if worker is None or "failed" in row or "draft" in row:
            return row
        if is_given_up(locate(worker.job.run)):
            return {"subset": row["subset"], **rows.left(row)}
        start = time.perf_counter()
        self._at_work = worker
        try:
            return {"subset": row["subset"], **worker(row)}
        finally:
            self._at_work = None
            for other in self.workers.values():
                if other is not worker:
                    other.away_s += time.perf_counter() - start

    def _report_progress(self) -> None:
        if self._at_work is not None:
            self._at_work.report_progress()
