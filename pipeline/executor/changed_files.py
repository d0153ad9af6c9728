"""Finds files that were changed in place: other photos or annotations under the names that they had.

A build compares names, versions of lists and lengths, and opens no photo, so such a change does not show.
Here each image is read again and compared with what is committed: its masks with the ledger, its photo with
the one that the models saw. A unit with a changed image is noted in the work list, and the next build makes
it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.config import BuildConfig
from ...schemas.errors import BadRecord
from ...schemas.reasons import RETRIED
from ...schemas.records import ImageRecord
from ..corpus import log as commit_log
from ..corpus import reader, work_list
from ..corpus.growth import EXAMPLES, Growth, cover
from ..corpus.pending import find_pending_units
from ..corpus.work_list import Plan
from ..corpus.work_list_summary import Step, WorkList, find_work_list, first_steps
from ..io import photos
from ..io.activity import NOW
from ..io.location import locate
from ..sources.protocols import SOURCE_STAGE
from ..sources.registry import SubsetSource, complete, find_mask_stage, open_source
from ..stages.automatic_masks import WHOLE_IMAGE
from ..stages.base import ModelStage
from ..stages.evidence import Evidence, fingerprint
from ..stages.recipes import recipe_digest, recipe_of
from . import driver

_COLUMNS = ["key", "region", "rle_counts", "category", "drop_stage", "drop_reason"]

_Regions = dict[int | None, tuple[Any, ...]]


def note_changed_files(
    config: BuildConfig,
    progress: Callable[[int], None] = lambda _: None,
    unread: Callable[[str], None] = lambda _: None,
) -> dict[str, Growth]:
    """Compare every committed image with its files, and note the units of those that have changed.

    Images that cannot be read now are passed by. Units that a build would make again anyway are not read.

    Args:
        config: of the corpus.
        progress: called with the number of images compared so far.
        unread: called with the name of each image that is passed by.

    Returns:
        What has changed, by subset; only subsets of which something has.

    Raises:
        ConfigError: the configuration cannot work here, a list or folder of the sources is not there, or
            another driver is writing there.
        IntegrityError: a work list, a ledger or the log is damaged.
    """
    config, found, number = complete(config), dict[str, Growth](), 0
    if not commit_log.exists(config.out):
        return found
    for subset in config.subsets:
        listed = find_work_list(locate(config.out) / subset)
        if listed is None:
            continue
        source, changed = open_source(config, subset), dict[int, list[str]]()
        source.fingerprint()  # a folder that is not there is known at once, and not waited for by each file
        pending = set(find_pending_units(listed, recipe_digest(recipe_of(config, subset), config)))
        for index in sorted(set(range(listed.num_units)) - pending):
            with NOW.during("comparing files", f"{subset}/{listed.unit_name(index)}"):
                if keys := _changed_in(config, source, listed, index, unread):
                    changed[index] = keys
            number += listed.num_images_of(index)
            progress(number)
        if changed:
            found[subset] = _note(config, listed, changed)
    return found


def _changed_in(
    config: BuildConfig, source: SubsetSource, listed: WorkList, index: int, unread: Callable[[str], None]
) -> list[str]:
    """Keys of the images of a committed unit that are not what their files hold now."""
    folder, unit = locate(listed.folder), listed.unit_name(index)
    (committed,) = (each for each in reader.list_units(listed.folder) if each.name == unit)
    rows: dict[str, _Regions] = {}
    for row in reader.read_ledger(committed.ledger, _COLUMNS).to_pylist():
        reason = row["drop_reason"] if row["drop_stage"] == SOURCE_STAGE else None
        rows.setdefault(row["key"], {})[row["region"]] = (row["rle_counts"], row["category"], reason)
    seen: dict[str, str] = {}
    asked, has_no_masks = _Asked(None, {}), bool(find_mask_stage(config, source.subset)[0])
    for stage in recipe_of(config, source.subset):
        if isinstance(stage, ModelStage) and stage.sees_photo:
            answers = stage.store(folder).load(unit)
            if stage.makes_regions:  # asked about every image; others keep answers about earlier regions
                seen = {key: answer.photo for (key, at), answer in answers.items() if at == WHOLE_IMAGE}
                break
            seen |= {key: answer.photo for (key, _), answer in answers.items() if answer.photo}
            asked = _Asked(stage, answers) if "mask" in stage.gives else asked
    changed = []
    for entry in listed.read_unit(index):
        if entry.drop is not None:
            continue
        NOW.at(entry.key)
        image = source.read(entry, config.limits)
        if image.failed or (image.drop is not None and image.drop.reason in RETRIED):
            unread(f"{source.subset}/{entry.key}")
            continue
        before = rows.get(entry.key)
        if before and not (image.regions or source.declares_regions(entry)):
            before = {None: (None, None, next((reason for _, _, reason in before.values() if reason), None))}
        elif before and has_no_masks:
            before = _without_made_masks(before, image)
        if _regions_of(image) != before or asked.otherwise(image):
            changed.append(entry.key)
            continue
        try:
            if _is_another_photo(image, seen.get(entry.key, "")):
                changed.append(entry.key)
        except BadRecord:
            unread(f"{source.subset}/{entry.key}")
    return changed


def _regions_of(image: ImageRecord) -> _Regions:
    shared = None if image.drop is None else image.drop.reason.value
    if not image.regions:
        return {None: (None, None, shared)}
    return {
        region.id: (
            region.rle and region.rle.counts,
            region.category,
            region.drop.reason.value if region.drop else None,
        )
        for region in image.regions
    }


class _Asked(NamedTuple):
    """What was asked of the stage that made the masks of a unit, if a model did."""

    stage: ModelStage | None
    answers: Evidence

    def otherwise(self, image: ImageRecord) -> bool:
        """Whether a region without a mask has another box, or whatever it was asked about, than it had."""
        return self.stage is not None and any(
            row.asked != fingerprint(*self.stage.question(region))
            for region in image.live()
            if region.rle is None and (row := self.answers.get((image.key, region.id))) is not None
        )


def _without_made_masks(rows: _Regions, image: ImageRecord) -> _Regions:
    """The rows of an image's regions, without the masks that its source did not give."""
    boxes = {region.id for region in image.regions if region.rle is None}
    return {region: (None, *row[1:]) if region in boxes else row for region, row in rows.items()}


def _is_another_photo(image: ImageRecord, seen: str) -> bool:
    if not seen or image.photo is None:
        return False
    return photos.hash_photo(image.photo, image.removed_orientation) != seen


def _note(config: BuildConfig, listed: WorkList, changed: dict[int, list[str]]) -> Growth:
    """Make the changed units a step of the work list, so that they are pending until they are built."""
    digest = hashlib.sha256(f"{listed.digest}\n".encode())
    for index in sorted(changed):
        cover(digest, index, listed.read_unit(index))
    step = Step(digest.hexdigest(), listed.num_units, listed.num_images, sorted(changed))
    now = msgspec.structs.replace(listed, digest=step.digest, steps=[*first_steps(listed), step])
    keys = [key for index in sorted(changed) for key in changed[index]]
    growth = Growth(changed=len(keys), rebuilt=len(changed), examples={"changed": keys[:EXAMPLES]})
    with driver.owned(config, "plan") as owner:
        work_list.publish(Plan(now, Path(listed.table_path), growth), listed.folder, owner)
    return growth
