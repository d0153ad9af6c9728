"""Boxes without masks in COCO's layout, as Objects365 and other detection sets have them.

A region has a box in the place of its mask. The stage `box_masks` makes the mask.
"""

from __future__ import annotations

from pydantic import Field

from ...filters.benchmark_photos import canonical
from ...schemas.config import Limits
from ...schemas.reasons import Reason
from ...schemas.records import ImageRecord
from ...schemas.strict import Location
from . import file_names
from .coco import Coco, CocoOptions
from .coco_json import Image
from .common import PHOTO_FIXES
from .instances import Choice, fill_boxes
from .protocols import CatalogEntry, Note


class BoxesOptions(CocoOptions):
    """Boxes with names in COCO's layout, such as Objects365; the segmenter makes the masks."""

    annotations: list[Location] = Field(
        description="JSON files in COCO's layout whose annotations have a `bbox`, such as "
        "`zhiyuan_objv2_train.json`. Masks in them are not read. Globs are allowed."
    )
    photos: list[Location] = Field(
        description="Folders in which to look for each photo by its file name, in this order. Folders in "
        "them, such as Objects365's `patch0`, are searched too."
    )
    crowds: Choice = Field(
        default="drop",
        description="What becomes of a region with `iscrowd`, many objects in one box: `drop` drops it as "
        "`crowd`, `keep` reads it like any other.",
    )


class Boxes(Coco):
    """Files in COCO's layout, read for their boxes."""

    field = "bbox"
    title = "Boxes"
    options_type = BoxesOptions
    mask_stage = "box_masks"
    fixes = PHOTO_FIXES | {
        Reason.PHOTO_MISSING: "put the photos there, or add their folder to `photos`; a part of Objects365 "
        "needs only the photos of its patches",
        Reason.ANNOTATION_MISSING: "images without any object; there is nothing to fix",
        Reason.ANNOTATION_UNREADABLE: "correct them: a `bbox` is [x, y, width, height] in pixels",
        Reason.UNKNOWN_CATEGORY: Coco.fixes[Reason.UNKNOWN_CATEGORY],
        Reason.PAIR_AMBIGUOUS: Coco.fixes[Reason.PAIR_AMBIGUOUS],
        Reason.CROWD: "by design: many objects in one box; `crowds: keep` reads them",
        Reason.BOX_EMPTY: "nothing to fix if they are few; if they are many, the file may have corners "
        "(x1, y1, x2, y2) or shares of the photo where [x, y, width, height] in pixels belong",
        Reason.BOX_DUPLICATE: "by design: the first one is kept",
        "box_clipped": "the part inside the photo is used; if they are many, the file may have corners "
        "(x1, y1, x2, y2) where [x, y, width, height] belong",
        "box_shared": "both are read, and get the same mask; `usable_masks` keeps one of them",
        **{kind: Coco.fixes[kind] for kind in ("crowd_kept", "id_unusable", "repeated_ids")},
    }

    def names_of(self, image: Image) -> list[str]:
        """As for COCO. A photo of COCO or Objects365 is also found without the folders that its name has.

        Lists and archives differ in these folders, and no two photos of either have one name.
        """
        names = super().names_of(image)
        return [*names, *(file_names.base_name(each) for each in names[:1] if canonical(each))]

    def fill(self, image: ImageRecord, entry: CatalogEntry, limits: Limits, notes: list[Note]) -> None:
        fill_boxes(image, entry, limits, notes, self.options.crowds, self.options.unnamed)
