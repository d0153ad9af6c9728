"""Reads a subset without any model and reports every problem: what is dropped and why, and what is merely
odd.

`audit` reads all of it, `sample` a few images spread over it before a build. `audit_unit` is the work of one
worker: pure, and as small as a list of catalog entries.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import msgspec

from ...schemas.config import BuildConfig, Limits
from ...schemas.errors import ConfigError, IntegrityError
from ...schemas.reasons import Reason
from ..corpus import work_list
from ..io import files
from ..sources.protocols import CatalogEntry, Note, Source

MENDS = {
    Reason.PHOTO_MISSING: "put the photos there, or add their folder to `photos`",
    Reason.PHOTO_UNREADABLE: "fetch these photos again",
    Reason.PHOTO_TOO_LARGE: "raise limits.max_pixels if they are what they should be",
    Reason.SIZE_MISMATCH: "photo, label map and annotation are of different releases; fetch matching ones",
    Reason.ANNOTATION_MISSING: "fetch their annotations, or leave them out",
    Reason.ANNOTATION_UNREADABLE: "fetch these annotations again, or mend them by hand",
    Reason.DUPLICATE_KEY: "the first one is kept; name each image once",
    Reason.UNSAFE_NAME: "rename them inside their folder; they are never opened",
    Reason.UNKNOWN_CATEGORY: "give the release's category list as `categories`",
    Reason.LABELS_UNREADABLE: "put the label maps there, or fetch them again",
    Reason.SEGMENT_ABSENT: "known of COCONut; nothing to mend",
    Reason.TOO_MANY_MASKS: "raise limits.max_masks if they are what they should be",
    Reason.MASK_EMPTY: "known of real releases; nothing to mend",
    Reason.MASK_UNDECODABLE: "fetch these annotations again",
    Reason.CROWD: "by design: many objects under one mask",
    Reason.VOID: "by design: id 0 is no segment",
    "area_differs": "the mask's own area counts",
    "area_missing": "the mask's own area counts",
    "isthing_differs": "the category list counts",
    "undeclared_ids": "pixels without a record are no region",
    "photo_misnamed": "the bytes count, not the name",
    "photo_rotated": "masks refer to the pixels as stored; viewers may turn the photo",
    "label_map_without_record": "no annotation names them; they are not read",
    "other_file": "not read",
    "tar_without_end": "the tar may have been cut between two members; compare its size with the publisher's",
}
"""What to do about a problem, by reason or by kind of note."""

_UNIT = 64
_SMALL = 2_000


class Problem(msgspec.Struct, frozen=True):
    """A row of the audit's Parquet file.

    Attributes:
        subset: "coconut" or "sa1b".
        key: of the image; "" if the problem is of no image.
        region: position of the region; None if the problem is the image's or a file's.
        reason: a `Reason`, or the kind of a note.
        drops: whether something is dropped for it.
        regions: how many regions it drops.
        detail: names file and record.
    """

    subset: str
    key: str
    region: int | None
    reason: str
    drops: bool
    regions: int
    detail: str


class Found(msgspec.Struct):
    """What the audit of some images found."""

    images: int = 0
    images_usable: int = 0
    regions: int = 0
    regions_usable: int = 0
    problems: list[Problem] = []

    def add(self, other: Found) -> None:
        """Take in what another part found."""
        self.images += other.images
        self.images_usable += other.images_usable
        self.regions += other.regions
        self.regions_usable += other.regions_usable
        self.problems += other.problems


class AuditReport(msgspec.Struct):
    """What an audit found.

    Attributes:
        subset: "coconut" or "sa1b".
        found: counts, and every problem in the order of the catalog.
        sampled: whether only a part was read.
    """

    subset: str
    found: Found
    sampled: bool = False

    def text(self, num_examples: int = 3) -> str:
        """The report for people: counts, then each problem with its mend and a few examples."""
        found = self.found
        of = " of a sample" if self.sampled else ""
        lines = [
            f"{self.subset}: {found.images_usable:,} of {found.images:,} images and "
            f"{found.regions_usable:,} of {found.regions:,} regions{of} are usable"
        ]
        for drops, title in ((True, "dropped"), (False, "odd, but used")):
            problems = [problem for problem in found.problems if problem.drops is drops]
            if problems:
                lines += ["", f"{title}:", *_lines(problems, num_examples)]
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """Write every problem as a Parquet file, a row each; its folder is made if needed."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"region": pa.int64(), "drops": pa.bool_(), "regions": pa.int64()}
        names = Problem.__struct_fields__
        columns = [
            pa.array(
                [getattr(problem, name) for problem in self.found.problems], kinds.get(name, pa.string())
            )
            for name in names
        ]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.write_atomic(path) as file:
            pq.write_table(pa.Table.from_arrays(columns, names=list(names)), file, compression="zstd")


def audit(
    source: Source, limits: Limits, jobs: int | None = None, progress: Callable[[int], None] | None = None
) -> AuditReport:
    """Read every image of a subset.

    Args:
        source: of the subset.
        limits: what is refused.
        jobs: processes; default: one per core, or none besides this one for small subsets.
        progress: called with the number of images read so far.

    Raises:
        ConfigError: the source cannot be listed.
    """
    total = Found()
    for part in _parts(source, limits, source.catalog(), jobs):
        total.add(part)
        if progress is not None:
            progress(total.images)
    total.problems += [_noted(source.subset, "", note) for note in source.notes]
    return AuditReport(source.subset, total)


def sample(source: Source, config: BuildConfig) -> AuditReport:
    """Read `config.audit_images` images, spread over the plan if there is one already, else the first ones.

    Raises:
        ConfigError: the source cannot be listed, has no image, or no region of the sample is usable.
    """
    report = AuditReport(source.subset, Found(), sampled=True)
    if not config.audit_images:
        return report
    entries = _planned(Path(config.out) / source.subset, config.audit_images)
    if entries is None:
        entries = list(islice(source.catalog(), config.audit_images))
    report.found = audit_unit(source, entries, config.limits)
    if not report.found.regions_usable:
        what = "it has no image" if not entries else f"no region of {len(entries)} images is usable"
        raise ConfigError(f"{source.subset}: {what}; mend the source first\n{report.text()}")
    return report


def audit_unit(source: Source, entries: list[CatalogEntry], limits: Limits) -> Found:
    """Read some images; regions dropped for their image's reason are counted there and have no row."""
    found = Found()
    for entry in entries:
        notes: list[Note] = []
        image = source.read(entry, limits, notes)
        live = len(image.live())
        found.images += 1
        found.images_usable += live > 0
        found.regions += len(image.regions)
        found.regions_usable += live
        shared = image.drop
        if shared is not None:
            count = sum(region.drop == shared for region in image.regions)
            found.problems.append(
                Problem(image.subset, image.key, None, shared.reason, True, count, shared.detail)
            )
        found.problems += [
            Problem(image.subset, image.key, region.id, region.drop.reason, True, 1, region.drop.detail)
            for region in image.regions
            if region.drop is not None and region.drop != shared
        ]
        found.problems += [_noted(image.subset, image.key, note) for note in notes]
    return found


def _parts(
    source: Source, limits: Limits, entries: Iterator[CatalogEntry], jobs: int | None
) -> Iterator[Found]:
    """What each part of the catalog holds, in its order; only a few parts are under way at a time."""
    first = list(islice(entries, _SMALL))
    if jobs is None:
        jobs = 1 if len(first) < _SMALL else os.cpu_count() or 1
    units = iter(lambda: _take(first, entries), [])
    if jobs <= 1:
        for unit in units:
            yield audit_unit(source, unit, limits)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        under_way: list[Future[Found]] = []
        for unit in units:
            under_way.append(pool.submit(audit_unit, source, unit, limits))
            if len(under_way) > 4 * jobs:
                yield under_way.pop(0).result()
        for future in under_way:
            yield future.result()


def _take(first: list[CatalogEntry], rest: Iterator[CatalogEntry]) -> list[CatalogEntry]:
    unit = first[:_UNIT]
    del first[:_UNIT]
    return unit + list(islice(rest, _UNIT - len(unit)))


def _planned(folder: Path, count: int) -> list[CatalogEntry] | None:
    """Images spread over a plan that was made before; None without one."""
    try:
        there = work_list.load_plan(folder)
        step = max(1, there.num_units // 8)
        units = range(0, there.num_units, step)
        share = -(-count // max(1, len(units)))
        return [entry for index in units for entry in there.read_unit(index)[:share]][:count]
    except IntegrityError:  # planning will say so, or make a new one
        return None


def _noted(subset: str, key: str, note: Note) -> Problem:
    return Problem(subset, key, note.region, note.kind, False, 0, note.detail)


def _lines(problems: list[Problem], num_examples: int) -> list[str]:
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
        lines += [f"  {reason}: {what} ({MENDS.get(reason, 'see the list')})", *examples[reason]]
        if count > num_examples:
            lines.append(f"      ... and {count - num_examples:,} more")
    return lines
