"""Reads a mask image for a photo: checked, at the photo's size, with a reason for what cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...filters import rle
from ...schemas.config import Limits
from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ...schemas.records import Blob
from ..io import failures, files, mask_images, photos
from . import label_maps
from .protocols import Note


def read_mask(
    blob: Blob, header: photos.Header, limits: Limits, notes: list[Note], region: int | None = None
) -> rle.Mask:
    """The mask in an image of its own.

    Args:
        blob: the image.
        header: of the photo. A mask of another size is scaled if its aspect ratio is the photo's.
        limits: what is refused.
        notes: a scaled mask is noted in it.
        region: position of the region, for the note.

    Raises:
        BadRecord: it cannot be read, or is no mask of this photo.
    """
    name, most = str(blob), min(limits.max_pixels, photos.MAX_PIXELS)
    mask = _decoded(blob, lambda data: mask_images.decode_mask_image(data, name, most), limits)
    fitted = _fitted(mask, header, name, notes, region)
    if not fitted.any():
        raise BadRecord(Reason.MASK_EMPTY, f"{name}: no pixel is left at the photo's size")
    return rle.from_mask(fitted)


def read_indexed(
    blob: Blob, header: photos.Header, limits: Limits, notes: list[Note], background: Sequence[int]
) -> dict[int, rle.Mask]:
    """The mask of each value in an indexed image, in ascending order; as `read_mask`.

    Args:
        blob: the image.
        header: of the photo.
        limits: what is refused.
        notes: a scaled image is noted in it.
        background: values that are no region.

    Raises:
        BadRecord: also if it has too many values, or none besides the background.
    """
    name = str(blob)
    values = _decoded(blob, lambda data: label_maps.read_values(data, name), limits)
    values = _fitted(values, header, name, notes, None)
    found = np.setdiff1d(np.unique(values), background).tolist()
    if len(found) > limits.max_masks:
        detail = f"{name}: {len(found)} values; limits.max_masks is {limits.max_masks}"
        raise BadRecord(Reason.TOO_MANY_MASKS, detail)
    if not found:
        raise BadRecord(Reason.MASK_EMPTY, f"{name}: every pixel is background")
    masks = rle.encode_label_map(values)
    return {value: masks[value] for value in found}


def check_size(length: int, limits: Limits, where: str) -> None:
    """Refuse a record, or a file of one, of too many bytes.

    Raises:
        BadRecord: ANNOTATION_UNREADABLE.
    """
    if length > limits.max_record_bytes:
        detail = f"{where}: {length} bytes; limits.max_record_bytes is {limits.max_record_bytes}"
        raise BadRecord(Reason.ANNOTATION_UNREADABLE, detail)


def _decoded(blob: Blob, decode: Callable[[bytes], np.ndarray], limits: Limits) -> np.ndarray:
    """What `decode` makes of a file; read again if it does not decode."""
    reason = Reason.LABELS_UNREADABLE

    def decoded(data: bytes) -> np.ndarray:
        try:
            return decode(data)
        except mask_images.UnusableMask as error:
            raise BadRecord(error.reason, str(error)) from error

    try:
        check_size(files.fetch_size(blob), limits, str(blob))
        return files.decoded(lambda: files.fetch(blob), decoded)
    except OSError as error:
        raise failures.to_failure(error, reason, reason, "fetch it again", str(blob)) from error


def _fitted(
    mask: np.ndarray, header: photos.Header, name: str, notes: list[Note], region: int | None
) -> np.ndarray:
    """A mask at the size of its photo."""
    size = (header.height, header.width)
    try:
        fitted = mask_images.fit_mask(mask, size, name)
    except mask_images.UnusableMask as error:
        raise BadRecord(error.reason, str(error)) from error
    if fitted is not mask:
        detail = f"{name}: {mask.shape[1]}x{mask.shape[0]}, photo {size[1]}x{size[0]}"
        notes.append(Note("mask_resized", detail, region))
    return fitted
