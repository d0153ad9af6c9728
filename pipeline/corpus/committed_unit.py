"""A unit that is built again: what its committed files have, which the new ones must not lose by an error."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

from ...schemas.errors import IntegrityError
from ...schemas.reasons import LEFT, RETRIED, Reason
from ...schemas.records import CREDIT_FIELDS, SCORES, Blob, Credit, Drop, ImageRecord, Region, Rle
from ..io import files
from ..io.location import Location
from ..sources.protocols import SOURCE_STAGE
from . import reader, units
from .ledger import SOURCE_SCORES

log = logging.getLogger(__name__)

_COLUMNS = ["key", "region", "kept", "photo_offset", "photo_length", "json_offset", "json_length"]

_LOSING = RETRIED | {Reason.SIZE_MISMATCH, Reason.LABELS_DISAGREE}
"""Reasons of which none can be true of a region that was kept, unless its source is not what it was."""


class CommittedUnit:
    """The unit of a name as it is committed now; everything is empty if it is not. Read when first asked for.

    Args:
        folder: OUT/<subset>.
        name: of the unit.
    """

    def __init__(self, folder: str | Location, name: str):
        self._folder = str(folder)
        self._name = name

    @cached_property
    def _unit(self) -> reader.Unit | None:
        return units.find_unit(self._folder, self._name)

    @cached_property
    def _kept(self) -> list[dict[str, Any]]:
        """The rows of the kept regions."""
        if self._unit is None:
            return []
        try:
            table = reader.read_ledger(self._unit.ledger, _COLUMNS)
        except IntegrityError as error:  # this build replaces it
            log.warning(
                "%s; this build replaces the unit and does not compare it with the damaged one",
                str(error).removesuffix(f"; {reader.REBUILD}"),
            )
            return []
        return [row for row in table.to_pylist() if row["kept"]]

    def _members(self, name: str) -> dict[str, Blob]:
        """The members "photo" or "json" of the committed shard by key."""
        if self._unit is None:
            return {}
        shard = self._unit.shard
        return {row["key"]: Blob(shard, row[f"{name}_offset"], row[f"{name}_length"]) for row in self._kept}

    @cached_property
    def _photos(self) -> dict[str, Blob]:
        return self._members("photo")

    def photo(self, key: str) -> Blob | None:
        """The photo of an image in the committed shard; None if the shard does not have it."""
        return self._photos.get(key)

    def image(self, key: str) -> ImageRecord | None:
        """An image as the committed files have it, to be decided about again; None if they do not have it.

        What its source dropped stays dropped. Without a kept region there is no photo in the shard: then all
        of it stays as it is.
        """
        rows = [row for row in self._rows if row["key"] == key]
        if not rows or rows[0]["drop_reason"] in LEFT:
            return None
        first, photo = rows[0], self.photo(key)
        credit = Credit(**{name: first[name] or "" for name in CREDIT_FIELDS})
        image = ImageRecord(
            key,
            first["subset"],
            photo,
            first["image_width"],
            first["image_height"],
            photo_format=first["photo_format"] or "",
            file_name=first["file_name"] or "",
            removed_orientation=self.removed_orientation(key) or 1,
            credit=credit if credit != Credit() else None,
        )
        image.regions = [region_of(row, photo is None) for row in rows if row["region"] is not None]
        if not image.regions and first["drop_reason"]:
            image.drop = _drop_of(first)
        return image

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """All rows, with masks."""
        return [] if self._unit is None else reader.read_ledger(self._unit.ledger).to_pylist()

    def removed_orientation(self, key: str) -> int | None:
        """The EXIF orientation that the photo in the shard has no more, 1 if it is as it was published.

        None if the image's sample is not there or cannot be read.
        """
        record = self._members("json").get(key)
        if record is None:
            return None
        try:
            return reader.decode_sample(files.read(record), f"{record}").exif_orientation
        except (IntegrityError, OSError) as error:
            log.warning(
                "%s: not readable (%s); the photo in this shard is not used in place of the one that its "
                "source does not give",
                record,
                error.__cause__ or error,
            )
            return None

    def lost_by_errors(self, images: list[ImageRecord]) -> list[str]:
        """Kept regions, as "key/region", that these images of the same unit would lose by an error.

        A region that a threshold drops now is not lost by an error.
        """
        failing = [image for image in images if _has_error(image)]
        if not failing:
            return []
        kept = {(row["key"], row["region"]) for row in self._kept}
        now = {(image.key, region.id) for image in failing for region in image.live()}
        decided = {
            (image.key, region.id)
            for image in failing
            for region in image.regions
            if region.drop is not None and region.drop.reason not in _LOSING and not image.failed
        }
        keys = {image.key for image in failing}
        return [f"{key}/{region}" for key, region in sorted(kept - now - decided) if key in keys]


def region_of(row: dict[str, Any], is_final: bool) -> Region:
    """The region of a row of the ledger, as its source gave it, or with its drop if that is final."""
    names = ("source_id", "category", "category_id", "is_thing", "crop_box", "point_coords")
    region = Region(row["region"], None, **{name: row[name] for name in names})
    region.source_scores = {name: row[name] for name in SOURCE_SCORES if row[name] is not None}
    if row["rle_counts"] is not None:
        region.rle = Rle((row["image_height"], row["image_width"]), row["rle_counts"])
        region.bbox = (row["bbox_x"], row["bbox_y"], row["bbox_w"], row["bbox_h"])
        region.area = row["area"]
    elif row["bbox_w"] is not None:  # a box whose mask was never made
        region.bbox = (row["bbox_x"], row["bbox_y"], row["bbox_w"], row["bbox_h"])
    if row["drop_reason"] and (is_final or row["drop_stage"] == SOURCE_STAGE):
        region.drop = _drop_of(row)
        region.scores = {name: row[name] for name in SCORES if row[name] is not None}
        region.caption, region.core_category = row["caption"], row["core_category"]
    return region


def _drop_of(row: dict[str, Any]) -> Drop:
    return Drop(row["drop_stage"], Reason(row["drop_reason"]), row["drop_detail"] or "")


def _has_error(image: ImageRecord) -> bool:
    drops = [image.drop, *(region.drop for region in image.regions)]
    return bool(image.failed) or any(drop is not None and drop.reason in _LOSING for drop in drops)
