"""Which units are held back: a source that fails is no verdict on what it holds.

If a few images of a unit cannot be read while others can, they are dropped with a reason that
`--retry-failed` heals. If all or more than `failures.max_failed_share` of them cannot, the source is away:
such a unit is not committed, and the next run builds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from ...schemas.config import BuildConfig
from ...schemas.errors import IntegrityError, ParaCaptionError
from ...schemas.records import Drop, ImageRecord
from ..corpus.committed_unit import CommittedUnit
from ..corpus.work_list_summary import load_work_list, read_unit
from ..io import photos
from ..io.failures import Kind
from ..io.location import Location
from ..sources.protocols import SOURCE_STAGE
from ..sources.registry import SubsetSource

_KINDS = {
    str(Kind.TRANSIENT): "not answered",
    str(Kind.REFUSED): "refused",
    str(Kind.RECORD): "missing",
}
"""The kind of a failed read, in a word."""

_WITNESSES = 2
"""Images of a neighboring unit that are tried."""


def why_held(
    images: list[ImageRecord],
    committed: CommittedUnit,
    config: BuildConfig,
    do_neighbors_read: Callable[[], bool],
) -> str:
    """Why a unit must not be committed, with an example; "" if it may be.

    Args:
        images: of the unit, as they are to be written.
        committed: the same unit as it is committed now.
        config: of the build.
        do_neighbors_read: whether images of other units can be read now; asked if nothing of this one could.
    """
    share = config.failures.max_failed_share
    if share == 1:
        return ""
    lost = committed.lost_by_errors(images)
    if lost:
        what = f"{lost[0]} and {len(lost) - 1} more regions" if len(lost) > 1 else f"the region {lost[0]}"
        return f"this build would lose {what} of the committed files because of an error ({_example(images)})"
    failed = [image for image in images if image.failed]
    if not failed:
        return ""
    allowed = share * len(images)
    if len(failed) > allowed:
        alone = len(failed) == 1 and (any(map(_was_read, images)) or do_neighbors_read())
        if not alone:
            kinds = ", ".join(
                f"{n} {_KINDS.get(kind, kind)}"
                for kind, n in sorted(Counter(i.failed for i in failed).items())
            )
            return f"{len(failed)} of {len(images)} images could not be read ({kinds}): {_example(failed)}"
    return ""


def _was_read(image: ImageRecord) -> bool:
    return not image.failed and (image.drop is None or image.drop.stage != SOURCE_STAGE)


def _example(images: list[ImageRecord]) -> str:
    """The last failure of all, in its own words."""
    failed = [image for image in images if image.failed]
    drops: Iterator[Drop] = (
        found
        for image in reversed(failed or [each for each in images if not _was_read(each)])
        for found in (image.drop, *(region.drop for region in image.regions))
        if found is not None
    )
    found = next(drops, None)
    return "a model failed" if found is None else found.detail


def neighbors_read(source: SubsetSource, config: BuildConfig, folder: Location, index: int) -> bool:
    """Whether an image of another unit can be read now, so that what fails here is not the source as a whole.

    Args:
        source: of the subset.
        config: of the build.
        folder: OUT/<subset>.
        index: of the unit whose own images tell nothing.
    """
    try:
        others = {index - 1, index + 1, 0} - {index}
        units = [
            read_unit(folder, each) for each in sorted(others) if 0 <= each < load_work_list(folder).num_units
        ]
    except IntegrityError:
        return False
    for unit in units:
        for entry in [entry for entry in unit if entry.drop is None][:_WITNESSES]:
            try:
                image = source.read(entry, config.limits)
                if not image.failed and image.drop is None and image.photo is not None:
                    photos.fetch(image.photo)
                    return True
            except ParaCaptionError:
                continue
    return False
