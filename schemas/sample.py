"""What a shard's sample holds: `<key>.jpg`, the publisher's photo bytes (but for an EXIF orientation), and
`<key>.json`, this struct.

The photo member is always called `.jpg`, because the member's ending is its column name for webdataset and
`datasets`, and one corpus has one set of columns. Readers sniff the bytes; `photo_format` says what they are.
"""

from __future__ import annotations

import msgspec

from .records import CREDIT_FIELDS, ImageRecord, Region
from .secrets import shorten

PHOTO_ENDING = "jpg"


class SampleRle(msgspec.Struct):
    """COCO's compressed RLE as pycocotools takes it: size [height, width] and ASCII counts."""

    size: tuple[int, int]
    counts: str


class SampleRegion(msgspec.Struct):
    """A kept region. Fields that the subset lacks are empty, never absent: one schema for all samples."""

    id: int
    rle: SampleRle
    bbox: tuple[int, int, int, int]
    area: int
    category: str
    core_category: str
    caption: str


class Sample(msgspec.Struct, omit_defaults=True):
    """An image with its kept regions, at least one.

    Attributes:
        exif_orientation: that of the publisher's photo. If it is not 1, the photo next to this has 1 in the
            tag's place, because masks fit the pixels as stored. Left out of the JSON if it is 1.
        license, ..., flickr_url: as in `Credit`; "" if the publisher's record does not state it. None, and
            not in the JSON, if the source has no such records, so that its samples have the same fields.
    """

    key: str
    subset: str
    file_name: str
    photo_format: str
    width: int
    height: int
    regions: list[SampleRegion]
    exif_orientation: int = 1
    license: str | None = None
    license_url: str | None = None
    license_id: str | None = None
    attribution: str | None = None
    author: str | None = None
    author_url: str | None = None
    title: str | None = None
    source_url: str | None = None
    coco_url: str | None = None
    flickr_url: str | None = None

    def credit(self) -> dict[str, str]:
        """What is stated of license and origin, by the names of `CREDIT_FIELDS`."""
        return {name: value for name in CREDIT_FIELDS if (value := getattr(self, name))}


def to_sample(image: ImageRecord, orientation: int = 1) -> Sample:
    """The image's sample from its live regions; `orientation` is the photo's at its source.

    Call only for images that have a live region.
    """
    return Sample(
        key=image.key,
        subset=image.subset,
        file_name=shorten(image.file_name, environment=False),
        photo_format=image.photo_format,
        width=image.width,
        height=image.height,
        regions=[_to_region(region) for region in image.live()],
        exif_orientation=orientation,
        **({} if image.credit is None else msgspec.structs.asdict(image.credit)),
    )


def _to_region(region: Region) -> SampleRegion:
    assert region.rle is not None and region.caption is not None, "a live region has a mask and a caption"
    return SampleRegion(
        id=region.id,
        rle=SampleRle(region.rle.size, region.rle.counts),
        bbox=region.bbox,
        area=region.area,
        category=region.category or "",
        core_category=region.core_category or "",
        caption=region.caption,
    )
