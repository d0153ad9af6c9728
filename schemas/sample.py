"""What a shard's sample holds: `<key>.jpg`, the publisher's photo bytes (but for an EXIF orientation), and
`<key>.json`, this struct.

The photo member is always called `.jpg`, because the member's ending is its column name for webdataset and
`datasets`, and one corpus has one set of columns. Readers sniff the bytes; `photo_format` says what they are.
"""

from __future__ import annotations

import msgspec

from .records import ImageRecord, Region

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
        exif_orientation: that of the publisher's photo. If it is not 1, the photo beside this has 1 in the
            tag's place, because masks fit the pixels as stored. Left out of the JSON if it is 1.
    """

    key: str
    subset: str
    file_name: str
    photo_format: str
    width: int
    height: int
    regions: list[SampleRegion]
    exif_orientation: int = 1


def to_sample(image: ImageRecord, orientation: int = 1) -> Sample:
    """The image's sample from its live regions; `orientation` is the photo's at its source.

    Call only for images that have a live region.
    """
    return Sample(
        key=image.key,
        subset=image.subset,
        file_name=image.file_name,
        photo_format=image.photo_format,
        width=image.width,
        height=image.height,
        regions=[_to_region(region) for region in image.live()],
        exif_orientation=orientation,
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
