"""Builds a corpus: the order of its steps, whichever engine runs the units.

    work list -> sample audit -> pending units of each subset; then engine -> commit; then the merge

Which subsets the engine runs side by side is for the engine to say.

Only the driver commits, and only while it owns the corpus (`corpus.log`). A build that is run again resumes:
what is committed is not built again, and a corpus with nothing to do is left as it is. A build that is
refused changes nothing.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from ...schemas.config import BuildConfig, dump_config
from ...schemas.errors import ConfigError, ParaCaptionError, UnitsHeldBack
from ...schemas.records import Blob
from ..corpus import adopt, merge, reader, writer
from ..corpus import log as commit_log
from ..corpus.moves import is_moved
from ..corpus.owner import Owner, own
from ..corpus.pending import find_pending_units
from ..corpus.sweep import is_swept, sweep
from ..corpus.work_list import Plan, is_current, make_work_list, plan, publish
from ..corpus.work_list_summary import WorkList, find_work_list
from ..corpus.writer import Draft
from ..io import bucket_checks, failures, files, variables
from ..io.activity import NOW
from ..io.location import Location, is_bucket, locate
from ..io.store import store_of
from ..sources.registry import complete, open_source
from ..stages.base import ModelStage
from ..stages.recipes import recipe_digest, recipe_of, write_out
from . import audit
from .committer import held_back, write_config
from .engine import Engine
from .places import refuse_overlap
from .progress import Progress, Watch
from .stalls import telling
from .subset_run import Pending, SubsetRun, has_all_evidence

log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

OnProgress = Callable[[Progress], None]


def _unwrapped(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    return function


def _of_the_output(function: Callable[Concatenate[BuildConfig, Arguments], Result]):
    """Turn what the file system of the output says into one line. Sources have had their own by then."""

    @functools.wraps(function)
    def run(config: BuildConfig, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        failures.RETRYING.set_budget(config.failures.read_retry_s)
        bucket_checks.refuse_secrets(config.out)
        try:
            with telling(config.failures.stall_s):
                return function(config, *arguments, **options)
        except OSError as error:
            raise writer.write_failed(locate(config.out), error) from error

    return run


def _looking(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    @functools.wraps(function)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with NOW.during("looking at what is built"):
            return function(*arguments, **options)

    return run


@_of_the_output
def build(
    config: BuildConfig,
    engine: Engine,
    *,
    limit_images: int | None = None,
    retry_failed: bool = False,
    on_progress: OnProgress = lambda _: None,
    step: Callable[[Callable[..., Any]], Callable[..., Any]] = _unwrapped,
) -> dict[str, Any]:
    """Build every configured subset and merge them into one corpus, or resume where a build stopped.

    Args:
        config: what to build and where to; paths are absolute.
        engine: runs the units.
        limit_images: build only the first N images of each subset (a pilot; give it an `out` of its own).
        retry_failed: also build committed units again that hold drops by error.
        on_progress: called about twice a second, and after each unit, from this thread.
        step: wraps each step, as Prefect's `task` does; by default it returns the step unchanged.

    Returns:
        What `OUT/stats.json` holds.

    Raises:
        ConfigError: the configuration cannot work here, or another build holds the folder.
        IntegrityError: the sources are not those that the corpus was planned with.
        StageFailed: a stage fails on everything, a backend cannot start, or the disk is full.
        UnitsHeldBack: the source of some units failed; everything else is committed and merged.
        SourceUnavailable: a source does not answer now.
        StageStalled: nothing moved for `failures.stall_s`.
    """
    config = write_out(complete(config))
    variables.take_all(config.model_dump(mode="json"))  # a run that Prefect started has read no file
    engine.check(config)
    if is_finished(config, limit_images, retry_failed):
        return msgspec.to_builtins(reader.read_summary(config.out))
    prepare(config, limit_images, retry_failed)
    with owned(config, "build") as owner:
        with NOW.during("sweep"):
            sweep(owner, _keep_replaced_s(config))
        pending: dict[str, Pending] = {}
        for subset in config.subsets:
            work_list = step(prepare_work_list)(config, subset, limit_images, owner)
            if units := step(find_pending)(config, subset, work_list, retry_failed):
                pending[subset] = Pending(work_list, units)
        held: dict[str, str] = {}
        for group in step(group_subsets)(config, engine, pending) if pending else []:
            units = {subset: pending[subset] for subset in group}
            held |= step(build_units)(config, units, engine, owner, on_progress)
        if held and not owner.state.units:
            raise UnitsHeldBack(held_back(held))
        step(write_config)(config, owner)
        summary = step(merge_corpus)(config, owner)
        if held:
            raise UnitsHeldBack(held_back(held))
        return summary


# The steps.


def prepare_work_list(
    config: BuildConfig, subset: str, limit_images: int | None, owner: Owner | None = None
) -> WorkList:
    """Cut the subset into units, or take the existing work list if the source is still the same."""
    folder = locate(config.out) / subset
    with NOW.during(f"planning {subset}"):
        writer.prepare(folder)
        return make_work_list(open_source(config, subset), config, folder, limit_images, owner)


def find_pending(config: BuildConfig, subset: str, work_list: WorkList, retry_failed: bool) -> list[int]:
    """Indices of the units without a manifest of this recipe; with `retry_failed` also those with errors."""
    folder = locate(config.out) / subset
    recipe = recipe_digest(recipe_of(config, subset), config)
    failed = failed_units(folder, work_list) if retry_failed else []
    return sorted({*find_pending_units(work_list, recipe), *failed})


def audit_source(config: BuildConfig, subset: str, planned: Plan) -> None:
    """Read a sample of what is planned without any model; refuse to go on if none of it is usable."""
    source = open_source(config, subset)
    identity = (config.out, subset, tuple(source.fingerprint().items()))
    if identity not in _audited:
        with NOW.during(f"reading a sample of {subset}"):
            log.info("%s", audit.audit_sample(source, config, planned).text())
        _audited.add(identity)


_audited: set[tuple] = set()
"""Sources whose sample this process has read, so that `build` does not repeat what `prepare` did."""


def group_subsets(config: BuildConfig, engine: Engine, pending: dict[str, Pending]) -> list[list[str]]:
    """Which subsets are built side by side; see `Engine.group`."""
    return engine.group(config, list(pending))


def build_units(
    config: BuildConfig,
    pending: dict[str, Pending],
    engine: Engine,
    owner: Owner,
    on_progress: OnProgress = lambda _: None,
) -> dict[str, str]:
    """Send the units of a group of subsets through their stages, and commit them.

    A subset that fails ends alone: the others of its group are built first, then its error is raised.

    Args:
        config: the resolved configuration.
        pending: by subset, the units to build.
        engine: runs them.
        owner: of the corpus.
        on_progress: called about twice a second for each subset, and after each unit, from this thread.

    Returns:
        The units that are held back, each with what happened.

    Raises:
        Fenced: another driver has taken over.
        StageFailed: a stage fails on everything, a backend cannot start, or the disk is full.
        UnitsHeldBack: the source of a subset failed on units in a row.
        StageStalled: nothing moved for `failures.stall_s`; the message has the hanging stacks.
    """
    check_disk(config, pending)
    runs = {subset: SubsetRun(config, subset, each, owner) for subset, each in pending.items()}
    watch = Watch(config.failures.stall_s)
    for run in runs.values():
        run.follow(watch)

    def tick(moved: bool = False) -> None:
        for run in runs.values():
            run.committer.commit_now_and_then()
        with NOW.during("reading the workers' events"):
            watch.update(moved)
        for run in runs.values():
            if not run.has_shown_end:
                on_progress(run.progress)
                run.has_shown_end = run.progress.ended

    try:
        with closing(engine.drafts([run.part for run in runs.values()], tick)) as drafts:
            for subset, outcome in drafts:
                _take(runs, subset, outcome)
                if all(run.error for run in runs.values()):
                    break
                tick(moved=True)
        errors = [run.error for run in runs.values() if run.error is not None]
        for run in runs.values():
            run.finish(trust=not errors)
        for run in runs.values():
            if run.error is None:
                run.clean()
        if errors:
            raise errors[0]
        for run in runs.values():
            on_progress(run.progress)
    except BaseException:
        for run in runs.values():
            run.committer.abandon()
        raise
    finally:
        for run in runs.values():
            run.events.close()
    with NOW.during("sweep"):
        # What a worker of an earlier, broken run was still writing when this one began.
        sweep(owner, _keep_replaced_s(config))
    return {unit: why for run in runs.values() for unit, why in run.progress.held.items()}


def _take(runs: dict[str, SubsetRun], subset: str, outcome: Draft | ParaCaptionError) -> None:
    """Give a unit to its subset, and say it if that ends there while others go on."""
    run = runs[subset]
    before = run.error
    run.take(outcome)
    others = " and ".join(name for name, each in runs.items() if not each.progress.ended)
    if run.error is not before and others:
        log.error(f"{subset} ends here, {others} goes on: {run.error}")


def merge_corpus(config: BuildConfig, owner: Owner) -> dict[str, Any]:
    """Write one index, statistics, plots and the dataset card over all committed units."""
    with NOW.during("merge"):
        return merge.merge(locate(config.out), config, owner)


# What is known before an engine starts.


@_of_the_output
def prepare(config: BuildConfig, limit_images: int | None = None, retry_failed: bool = False) -> set[str]:
    """Plan every subset and read a sample of its source, so that a mistake is found before an engine starts.

    `build` does the same, and then finds it done. Nothing is written before every subset has been planned.

    Returns:
        The places in the configuration of the backends that will be asked: those of the stages that lack
        evidence of a pending unit.

    Raises:
        ConfigError: a source cannot be read, lies in the output, or nothing of the sample is usable.
        IntegrityError: the sources are not those that the corpus was planned with.
    """
    out = locate(config.out)
    refuse_overlap(config)
    bucket_checks.check_store(config.out)
    _finish_moves(config)
    units = commit_log.read_units(str(out)) if commit_log.exists(str(out)) else {}
    adopt.refuse_foreign(str(out), config.subsets.keys() - {name.partition("/")[0] for name in units})
    asked: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="paracaption-") as scratch:
        plans: dict[str, Plan] = {}
        for subset in config.subsets:
            (Path(scratch) / subset).mkdir()
            with NOW.during(f"planning {subset}"):
                source = open_source(config, subset)
                plans[subset] = plan(source, config, out / subset, Path(scratch) / subset, limit_images)
        for subset, made in plans.items():
            if made.growth:
                log.info("%s: %s", subset, made.growth)
            pending = find_pending(config, subset, made.work_list, retry_failed)
            is_empty = not made.work_list.num_units  # of which all units are committed, as it were
            if is_empty or not _are_committed(config, subset, made.work_list, pending):
                audit_source(config, subset, made)
        if any(made.table is not None for made in plans.values()):
            with owned(config, "plan") as owner:
                for subset, made in plans.items():
                    with NOW.during(f"planning {subset}", record="saving its work list"):
                        writer.prepare(out / subset)
                        publish(made, out / subset, owner)
    for subset, made in plans.items():
        folder = out / subset
        if units := find_pending(config, subset, made.work_list, retry_failed):
            models = [each for each in recipe_of(config, subset) if isinstance(each, ModelStage)]
            lacking = [each for each in models if not has_all_evidence(each, folder, made.work_list, units)]
            asked |= {each.place for each in lacking}
    return asked


def _finish_moves(config: BuildConfig) -> None:
    """Finish the moves of a driver that died: of a work list, it may have moved one file of two."""
    if commit_log.exists(config.out) and not is_moved(config.out, commit_log.read_state(config.out)):
        with owned(config, "plan"):
            pass


@_of_the_output
@_looking
def is_finished(config: BuildConfig, limit_images: int | None = None, retry_failed: bool = False) -> bool:
    """Whether a build would change nothing, because all is committed and merged by this very configuration.

    Cheap: the sources' files are listed and not read. Writes nothing.

    Raises:
        ConfigError: a source is not where the configuration says.
        IntegrityError: a work list or a manifest cannot be read.
    """
    out = locate(config.out)
    try:
        if files.read(Blob(commit_log.place_of(out, reader.CONFIG))) != dump_config(config).encode():
            return False
    except OSError:
        return False
    if not (is_built(config, limit_images, retry_failed) and merge.is_merged(out, config.held_out_share)):
        return False
    return is_swept(config.out) and is_moved(config.out, commit_log.read_state(config.out))


@_of_the_output
@_looking
def is_built(config: BuildConfig, limit_images: int | None = None, retry_failed: bool = False) -> bool:
    """Whether every unit is committed, so that no engine is needed and `build` merges at most.

    Cheap, writes nothing, and raises what `is_finished` raises.
    """
    out = locate(config.out)
    for subset in config.subsets:
        folder = out / subset
        work_list = find_work_list(folder)
        if work_list is None or not is_current(work_list, open_source(config, subset), config, limit_images):
            return False
        if find_pending(config, subset, work_list, retry_failed):
            return False
    return True


def _are_committed(config: BuildConfig, subset: str, work_list: WorkList, units: list[int]) -> bool:
    """Whether there is a version of each of these units: its photos are available, so what it has is kept."""
    names = commit_log.read_units(config.out)
    return all(f"{subset}/{work_list.unit_name(index)}" in names for index in units)


def failed_units(folder: Location, work_list: WorkList) -> list[int]:
    """Indices of the committed units that hold drops by error, for `--retry-failed`.

    Args:
        folder: OUT/<subset>.
        work_list: the subset's work list.

    Raises:
        IntegrityError: a manifest does not parse.
    """
    units = commit_log.read_units(str(folder.parent))
    names = [f"{folder.name}/{name}" for name in work_list.unit_names()]
    return [index for index, name in enumerate(names) if name in units and units[name].failed]


def check_disk(config: BuildConfig, pending: Mapping[str, Pending]) -> None:
    """Refuse to start without space for what the pending units write: their photos and a tenth on top.

    The size of the photos is estimated from a sample.

    Raises:
        ConfigError: there is not enough; the message names both numbers.
    """
    photos = sum(
        work_list.photo_bytes * len(units) / max(1, work_list.num_units)
        for work_list, units in pending.values()
    )
    if is_bucket(config.out):
        return  # a shard at a time is staged, and staging looks after its room
    needed = 1.1 * photos + config.failures.min_free_gb * 1e9
    free = shutil.disk_usage(config.out).free
    if free < needed:
        some = " and ".join(pending)
        raise ConfigError(
            f"{config.out}: {some} {'need' if len(pending) > 1 else 'needs'} about {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; "
            "free space, or lower failures.min_free_gb if the estimate is wrong"
        )


def owned(config: BuildConfig, command: str) -> AbstractContextManager[Owner]:
    """Be the one driver that writes to the corpus of a configuration; see `corpus.own`.

    Raises:
        ConfigError: another driver is writing there.
        StageFailed: the folder cannot be written.
    """
    out = locate(config.out)
    try:
        with NOW.during("opening the output"):
            bucket_checks.check_store(config.out)
            store_of(out).make_folder(str(out))
    except OSError as error:
        raise writer.write_failed(out, error) from error
    return _owned(out, command, config.failures.lease_s)


@contextmanager
def _owned(out: Location, command: str, lease_s: float) -> Iterator[Owner]:
    try:
        with own(str(out), command, lease_s) as owner:
            yield owner
    except OSError as error:
        raise writer.write_failed(out, error) from error


def _keep_replaced_s(config: BuildConfig) -> float:
    return config.failures.keep_replaced_days * 86_400
