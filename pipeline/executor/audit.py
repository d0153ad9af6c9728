"""Reads a subset without any model and reports every problem: what is dropped and why, and what is odd.

`audit_subset` reads all of it, and `audit_sample` a few images before a build. `audit_images` is what one
process does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any

import msgspec

from ...schemas.config import BuildConfig, Limits
from ...schemas.errors import BadRecord, ConfigError, IntegrityError
from ...schemas.reasons import LEFT, Reason
from ...schemas.records import ImageRecord
from ..corpus.work_list import Plan
from ..corpus.work_list_summary import load_work_list
from ..io import failures, own_modules, photos, variables
from ..io.activity import NOW
from ..io.failures import SourceUnavailable
from ..io.location import Location, locate
from ..io.outputs import write_file
from ..io.store import store_of
from ..sources.protocols import CatalogEntry, Note, drop
from ..sources.registry import SubsetSource

FIXES = {
    Reason.PHOTO_MISSING: "put the photos there, or add their folder to `photos`",
    Reason.PHOTO_UNREADABLE: "fetch these photos again",
    Reason.SOURCE_UNAVAILABLE: (
        "these records may be fine, but their source did not answer; run the command again when it does"
    ),
    Reason.PHOTO_TOO_LARGE: "if these sizes are right, raise limits.max_pixels",
    Reason.SIZE_MISMATCH: "photo and annotation come from different releases; fetch matching ones",
    Reason.ANNOTATION_MISSING: "fetch their annotations, or leave them out",
    Reason.ANNOTATION_UNREADABLE: "fetch these annotations again, or correct them by hand",
    Reason.LABELS_DISAGREE: "label map and annotation do not belong together; fetch matching ones",
    Reason.PAIR_AMBIGUOUS: "correct the ids or the names, so that each names one image",
    Reason.DUPLICATE_KEY: "the first one is kept; name each image once",
    Reason.UNSAFE_NAME: (
        "give these files plain names inside their folder; a file with such a name is never opened"
    ),
    Reason.TOO_MANY_MASKS: "if these numbers of masks are right, raise limits.max_masks",
    Reason.MASK_EMPTY: "published releases have some of these; there is nothing to fix",
    Reason.MASK_UNDECODABLE: "fetch these annotations again",
    Reason.BOX_EMPTY: "correct these boxes, or leave them out",
    Reason.BENCHMARK_PHOTO: (
        "by design: a benchmark does not measure a model that was trained on its photos "
        "(benchmarks.leave_out)"
    ),
    Reason.GONE: (
        "they stay in the corpus as they are; `paracaption remove CORPUS --keys FILE` takes them out"
    ),
    Reason.REMOVED: "by design: they were taken out on request, and no build brings them back",
    Reason.CROWD: "by design: many objects under one mask",
    "photo_shared": (
        "the regions of both are read; if the photo should count once, leave it out of one of the sources"
    ),
}
"""What to do about a drop of any source, by its reason. A source adds its own, and those of its notes."""

_PART = 64
"""Images that a process reads at a time."""

_DIGEST_BYTES = 16
"""As much of a photo's SHA-256 tells the photos of a corpus apart."""

_SMALL = 2_000
"""A subset with fewer images is read in this process."""


class Problem(msgspec.Struct, frozen=True):
    """A row of the audit's Parquet file.

    Attributes:
        subset: its name.
        key: of the image; "" if the problem is not about an image.
        region: position of the region; None if the problem is about the image or a file.
        reason: a `Reason`, or the kind of a note.
        drops: whether something is dropped because of it.
        regions: how many regions are dropped because of it.
        detail: names the file and the record.
    """

    subset: str
    key: str
    region: int | None
    reason: str
    drops: bool
    regions: int
    detail: str


class SeenPhoto(msgspec.Struct, frozen=True, array_like=True):
    """A photo that was read: its key, the index of its source in the subset, and what its bytes hash to."""

    key: str
    source: int
    digest: bytes


class AuditResult(msgspec.Struct):
    """What the audit of some images has found: counts, usable photos, and problems in the catalog's order."""

    images: int = 0
    images_usable: int = 0
    regions: int = 0
    regions_usable: int = 0
    problems: list[Problem] = []
    photos: list[SeenPhoto] = []

    def add(self, other: AuditResult) -> None:
        """Add the result of other images."""
        self.images += other.images
        self.images_usable += other.images_usable
        self.regions += other.regions
        self.regions_usable += other.regions_usable
        self.problems += other.problems


class SharedPhotos:
    """Finds photos that several sources have, of one subset or of several, by the photos' bytes."""

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[str, int, str]] = {}

    def find(self, subset: str, seen: list[SeenPhoto]) -> list[Problem]:
        """A problem for each of these photos that another source had before; remembers them all."""
        found = []
        for photo in seen:
            before = self._first.setdefault(photo.digest, (subset, photo.source, photo.key))
            if before[:2] != (subset, photo.source):
                places = f"{subset}, source {photo.source}: the photo is that of {before[2]}"
                detail = f"{places} in {before[0]}, source {before[1]}"
                found.append(Problem(subset, photo.key, None, "photo_shared", False, 0, detail))
        return found


class AuditReport(msgspec.Struct):
    """What the audit of a subset has found.

    Attributes:
        subset: its name.
        result: counts and problems.
        fixes: what to do about a problem, by its reason or by the kind of its note.
        sampled: whether only a sample was read.
        mask_stage: the stage that makes the regions, where the sources declare none; else "".
    """

    subset: str
    result: AuditResult
    fixes: dict[str, str] = {}
    sampled: bool = False
    mask_stage: str = ""

    def usable(self) -> int:
        """How many regions a build could caption; how many images, where a stage makes the regions."""
        return self.result.images_usable if self.mask_stage else self.result.regions_usable

    def summary(self, num_examples: int = 3) -> dict[str, Any]:
        """The report for programs: counts, and by reason how many, what to do, and a few examples."""
        problems: dict[str, dict[str, Any]] = {}
        for each in self.result.problems:
            found = problems.setdefault(
                each.reason,
                {"number": 0, "drops": each.drops, "fix": self.fixes.get(each.reason, ""), "examples": []},
            )
            found["number"] += 1
            if len(found["examples"]) < num_examples:
                found["examples"].append(each.detail)
        names = ("images", "images_usable", "regions", "regions_usable")
        return {name: getattr(self.result, name) for name in names} | {"problems": problems}

    def text(self, num_examples: int = 3) -> str:
        """The report for people: counts, then each problem with its fix and a few examples."""
        result = self.result
        sample = "a sample: " if self.sampled else ""
        found = f"{self.subset}: {sample}{result.images_usable:,} of {result.images:,} images"
        if self.mask_stage:
            lines = [f"{found} are usable; their regions are made by the stage `{self.mask_stage}`"]
        else:
            regions = f"{result.regions_usable:,} of {result.regions:,} regions"
            lines = [f"{found} and {regions} are usable"]
        for drops, title in ((True, "dropped"), (False, "odd, but used")):
            problems = [problem for problem in result.problems if problem.drops is drops]
            if problems:
                lines += ["", f"{title}:", *_lines(problems, self.fixes, num_examples)]
        return "\n".join(lines)

    def write(self, path: str | Location) -> None:
        """Write a Parquet file with a row for each problem; its folder is made if needed."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"region": pa.int64(), "drops": pa.bool_(), "regions": pa.int64()}
        names = Problem.__struct_fields__
        columns = [
            pa.array(
                [getattr(problem, name) for problem in self.result.problems], kinds.get(name, pa.string())
            )
            for name in names
        ]
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(columns, names=list(names)), buffer, compression="zstd")
        store_of(path).make_folder(str(locate(path).parent))
        write_file(path, buffer.getvalue().to_pybytes())


def audit_subset(
    source: SubsetSource,
    limits: Limits,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
    shared: SharedPhotos | None = None,
) -> AuditReport:
    """Read every image of a subset.

    Args:
        source: of the subset.
        limits: what is refused.
        jobs: number of processes; by default one per core, or only this one for a small subset.
        progress: called with the number of images read so far.
        shared: remembers the photos of the subsets that were audited before; None compares only the sources
            of this one.

    Raises:
        ConfigError: the source cannot be listed.
    """
    total, shared = AuditResult(), shared or SharedPhotos()
    for part in _parts(source, limits, source.catalog(), jobs):
        total.add(part)
        total.problems += shared.find(source.subset, part.photos)
        if progress is not None:
            progress(total.images)
    total.problems += [_problem_of_note(source.subset, "", note) for note in source.notes]
    return AuditReport(source.subset, total, FIXES | source.fixes(), mask_stage=source.mask_stage)


def audit_sample(source: SubsetSource, config: BuildConfig, planned: Plan | None = None) -> AuditReport:
    """Read `config.audit_images` images: spread over the work list if there is one, otherwise the first ones.

    Args:
        source: of the subset.
        config: of the build.
        planned: the work list; None takes the one in the output folder.

    Raises:
        ConfigError: the source cannot be listed, has no image, or no region of the sample is usable (no
            image, where a stage makes the regions).
        SourceUnavailable: it does not answer now.
    """
    fixes, mask_stage = FIXES | source.fixes(), source.mask_stage
    report = AuditReport(source.subset, AuditResult(), fixes, sampled=True, mask_stage=mask_stage)
    if not config.audit_images:
        return report
    entries = _planned_entries(planned, locate(config.out) / source.subset, config.audit_images)
    if entries is None:
        entries = list(islice(source.catalog(), config.audit_images))
    report.result = audit_images(source, entries, config.limits)
    if not report.usable():
        away = next(
            (each for each in report.result.problems if each.reason == Reason.SOURCE_UNAVAILABLE), None
        )
        if away is not None:
            raise SourceUnavailable(
                f"{source.subset}: no image of a sample can be read ({away.detail}); run the same command "
                "again when the source answers"
            )
        what = f"no region of {len(entries)} images is usable"
        if mask_stage:
            what = f"none of {len(entries)} images is usable"
        if not entries:
            what = "no image was found"
        raise ConfigError(
            f"{source.subset}: {what}; correct the paths and options of its sources\n{report.text()}"
        )
    return report


def audit_images(source: SubsetSource, entries: list[CatalogEntry], limits: Limits) -> AuditResult:
    """Read some images, also their pixels, which a source leaves to the models: a photo may break inside.

    A region that is dropped for its image's reason is counted there and has no row.
    """
    result = AuditResult()
    for entry in entries:
        notes: list[Note] = []
        NOW.at(entry.key)
        image = source.read(entry, limits, notes)
        is_declared = source.declares_regions(entry) or bool(image.regions)
        if image.live() or not (is_declared or image.drop):
            _check_pixels(image, limits)
        live = len(image.live())
        is_usable = live > 0 if is_declared else image.drop is None
        if is_usable and image.photo_digest:
            digest = bytes.fromhex(image.photo_digest)[:_DIGEST_BYTES]
            result.photos.append(SeenPhoto(image.key, entry.source, digest))
        result.images += 1
        result.images_usable += is_usable
        result.regions += len(image.regions)
        result.regions_usable += live
        shared = image.drop
        if shared is not None:
            count = sum(region.drop == shared for region in image.regions)
            result.problems.append(
                Problem(image.subset, image.key, None, shared.reason, True, count, shared.detail)
            )
        result.problems += [
            Problem(image.subset, image.key, region.id, region.drop.reason, True, 1, region.drop.detail)
            for region in image.regions
            if region.drop is not None and region.drop != shared
        ]
        result.problems += [_problem_of_note(image.subset, image.key, note) for note in notes]
    return result


def _check_pixels(image: ImageRecord, limits: Limits) -> None:
    """Drop an image whose photo does not decode, as the build's captioner will."""
    try:
        photos.read_pixels(image, limits.max_pixels)
    except BadRecord as error:
        image.reject(drop(error.reason, error.detail), failures.kind_of(error))


def _prepare(modules: list[own_modules.OwnModule], values: dict[str, str]) -> None:
    own_modules.install(modules)
    variables.install(values)


def _parts(
    source: SubsetSource, limits: Limits, entries: Iterator[CatalogEntry], jobs: int | None
) -> Iterator[AuditResult]:
    """The result of each part of the catalog, in its order; only a few parts are read at a time."""
    first = list(islice(entries, _SMALL))
    if jobs is None:
        jobs = 1 if len(first) < _SMALL else os.cpu_count() or 1
    parts = iter(lambda: _take(first, entries), [])
    if jobs <= 1:
        for part in parts:
            yield audit_images(source, part, limits)
        return
    context, given = get_context("spawn"), (own_modules.taken(), variables.taken())
    with ProcessPoolExecutor(jobs, context, initializer=_prepare, initargs=given) as pool:
        submitted: list[Future[AuditResult]] = []
        for part in parts:
            submitted.append(pool.submit(audit_images, source, part, limits))
            if len(submitted) > 4 * jobs:
                yield submitted.pop(0).result()
        for future in submitted:
            yield future.result()


def _take(first: list[CatalogEntry], rest: Iterator[CatalogEntry]) -> list[CatalogEntry]:
    part = first[:_PART]
    del first[:_PART]
    return part + list(islice(rest, _PART - len(part)))


def _planned_entries(planned: Plan | None, folder: Location, count: int) -> list[CatalogEntry] | None:
    """Images spread over a work list; None if there is none."""
    try:
        planned = planned or Plan(load_work_list(folder))
        step = max(1, planned.work_list.num_units // 8)
        units = range(0, planned.work_list.num_units, step)
        share = -(-count // max(1, len(units)))
        read = [list(filter(_is_in_source, planned.read_unit(index))) for index in units]
        return [entry for unit in read for entry in unit[:share]][:count]
    except IntegrityError:  # a damaged one is reported, or made again, when the build plans
        return None


def _is_in_source(entry: CatalogEntry) -> bool:
    return entry.drop is None or entry.drop.reason not in LEFT


def _problem_of_note(subset: str, key: str, note: Note) -> Problem:
    return Problem(subset, key, note.region, note.kind, False, 0, note.detail)


def _lines(problems: list[Problem], fixes: dict[str, str], num_examples: int) -> list[str]:
    counts = Counter(problem.reason for problem in problems)
    regions: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for problem in problems:
        regions[problem.reason] += problem.regions
        shown = examples.setdefault(problem.reason, [])
        if len(shown) < num_examples:
            place = problem.key if problem.region is None else f"{problem.key} region {problem.region}"
            shown.append(f"      {place + ': ' if place else ''}{problem.detail}")
    lines = []
    for reason, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        what = f"{count:,} x" + (f", {regions[reason]:,} regions" if regions[reason] else "")
        lines += [
            f"  {reason}: {what} "
            f"({fixes.get(reason, 'no general fix; `paracaption audit CONFIG` lists all')})",
            *examples[reason],
        ]
        if count > num_examples:
            lines.append(f"      ... and {count - num_examples:,} more")
    return lines
