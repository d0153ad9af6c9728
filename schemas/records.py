"""What flows through the pipeline: images by reference, regions as COCO RLE, drops with their reasons.

All structs are msgspec structs: typed, compact, and encoded to msgpack or JSON in one call.
Pixels are (row, column) from the top left of the *stored* photo; EXIF orientation is never applied.
"""

from __future__ import annotations

import msgspec

from .plain import MAX_DETAIL, plain_detail
from .reasons import Reason


class Blob(msgspec.Struct, frozen=True):
    """Bytes by reference: a whole file, or a member of a tar by offset.

    Attributes:
        url: local path or fsspec URL of the file.
        offset: first byte; 0 for a whole file.
        length: number of bytes; None for a whole file.
    """

    url: str
    offset: int = 0
    length: int | None = None

    def __str__(self) -> str:
        return self.url if self.length is None else f"{self.url}@{self.offset}+{self.length}"


class Rle(msgspec.Struct, frozen=True):
    """A mask in COCO's compressed run-length encoding (column-major, as pycocotools writes it).

    Attributes:
        size: (height, width) in pixels.
        counts: the compressed counts, ASCII.
    """

    size: tuple[int, int]
    counts: str


class Credit(msgspec.Struct, frozen=True, omit_defaults=True):
    """License and origin of an image as its publisher's record states them; "" for what it does not state.

    Attributes:
        license: name of the license, or its address where it has no name.
        license_url: address of its text.
        license_id: its id in the publisher's list; without a name, if that list does not have it.
        attribution: the line of credit.
        author, author_url: who made the photo, and their page.
        title: of the photo.
        source_url: page or file that the photo is from.
        coco_url, flickr_url: where COCO and Flickr have the photo.
    """

    license: str = ""
    license_url: str = ""
    license_id: str = ""
    attribution: str = ""
    author: str = ""
    author_url: str = ""
    title: str = ""
    source_url: str = ""
    coco_url: str = ""
    flickr_url: str = ""


CREDIT_FIELDS = Credit.__struct_fields__
"""The names of its fields; each is a column of the ledger and of the index, and a field of a sample."""


class Drop(msgspec.Struct, frozen=True):
    """Why a region or image is not in the corpus.

    Attributes:
        stage: name of the stage that decided ("source", "usable_masks", "verify_category", ...).
        reason: from the closed list.
        detail: numbers and names a person needs to check the decision; no times, hosts or process ids. What
            it quotes of a stranger is made plain, and cut if it is too long.
    """

    stage: str
    reason: Reason
    detail: str = ""

    def __post_init__(self) -> None:
        if not self.detail.isascii() or len(self.detail) > MAX_DETAIL:
            msgspec.structs.force_setattr(self, "detail", plain_detail(self.detail))


class Region(msgspec.Struct):
    """One mask with what is known of it.

    Attributes:
        id: position in the source's list of this image; unique within the image and stable.
        rle: the mask; None if the source's mask could not be read (then `drop` is set), and of a source
            without masks until a stage has made it.
        bbox: (x, y, width, height) of the mask in pixels, exclusive at the far edge, computed from the mask.
            Of a region whose mask a stage is to make, the box that the source declares, inside the photo.
        area: number of mask pixels, computed from the mask.
        source_id: the publisher's annotation or segment id.
        category: plain category name from the annotation ("tree", not "tree-merged"); None for SA-1B.
        category_id: the publisher's category id.
        is_thing: thing or stuff, from the category list.
        source_scores: the publisher's numbers kept as they are (predicted_iou, stability_score); of a mask
            that a stage has made, those of the model that made it.
        crop_box: SA-1B's crop the mask was found in (x, y, w, h).
        point_coords: SA-1B's prompt points [(x, y), ...].
        caption: the captioner's text.
        core_category: the category that the judge named from the caption.
        scores: evidence numbers by name (see `SCORES`), written by stages and filters.
        drop: set by the first stage that rejects the region; later stages pass it by.
        said: within a composite stage, what its members said so far, by their ids: the drop that a member
            would have given, or None if it keeps the region.
        aside: whether the stage that runs now is not to see the region, because another member of its
            composite has spoken for it.
    """

    id: int
    rle: Rle | None
    bbox: tuple[int, int, int, int] = (0, 0, 0, 0)
    area: int = 0
    source_id: int | None = None
    category: str | None = None
    category_id: int | None = None
    is_thing: bool | None = None
    source_scores: dict[str, float] = {}
    crop_box: list[float] | None = None
    point_coords: list[list[float]] | None = None
    caption: str | None = None
    core_category: str | None = None
    scores: dict[str, float] = {}
    drop: Drop | None = None
    said: dict[str, Drop | None] = {}
    aside: bool = False


class ImageRecord(msgspec.Struct):
    """One image with its regions.

    Attributes:
        key: unique within the subset; only `[A-Za-z0-9_-]`, so that it can name a shard member.
        subset: name of the subset.
        photo: where the photo's bytes are; None if it was not found (then `drop` is set).
        width, height: size of the stored photo in pixels.
        photo_format: sniffed from the bytes ("jpeg", "png", ...), whatever the file is called.
        file_name: the publisher's name of the photo, for people.
        regions: every region the annotation declares, dropped ones included.
        drop: set if the image as a whole is unusable; then every region is dropped with it.
        photo_digest: SHA-256 in hex of the photo's bytes, as whoever first read them whole found them; "" as
            long as nobody has.
        removed_orientation: EXIF orientation that the photo has at its source and the bytes at `photo`, which
            are those of a shard, have no more; 1 if they are the source's bytes.
        credit: what its publisher says of license and origin; None if its source does not look for that, or
            the corpus was planned by a release that did not.
        failed: the kind of the failure if its source could not be read, which is no verdict on the image
            ("transient", "refused" or "record"); else empty.
    """

    key: str
    subset: str
    photo: Blob | None
    width: int
    height: int
    photo_format: str = ""
    file_name: str = ""
    regions: list[Region] = []
    drop: Drop | None = None
    photo_digest: str = ""
    failed: str = ""
    removed_orientation: int = 1
    credit: Credit | None = None

    def live(self) -> list[Region]:
        """The regions that no stage has rejected yet, in order."""
        if self.drop:
            return []
        return [region for region in self.regions if region.drop is None and not region.aside]

    def reject(self, drop: Drop, failed: str = "") -> None:
        """Drop the image and every region of it that is still live; `failed` as in the attributes."""
        self.failed = failed or self.failed
        for region in self.live():
            region.drop = drop
        self.drop = drop


SCORES = {
    "visible_share": "share of the mask that no smaller mask covers, 0..1",
    "container_share": "largest share of the mask that lies inside the mask of one larger object, 0..1",
    "duplicate_iou": "largest IoU with a kept mask that has a better score or more area, 0..1",
    "verdict_margin": "log P(yes) - log P(no) of the judge; above 0 means that the caption fits the category",
    "iou": "IoU of the segmenter's best mask with the source's mask, 0..1",
    "segmenter_score": "the segmenter's own score of its best mask",
    "num_words": "words in the caption",
    "repeat_share": "share of the caption's 4-grams that repeat an earlier one, 0..1",
    "confidence": "how sure the captioner is of its caption, 0..1; only some captioners say so",
}
"""Names and meanings of the evidence numbers; each is a column of the ledger and of the index."""
