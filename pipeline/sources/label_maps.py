"""Label maps: images in which a pixel's value is the id of its segment."""

from __future__ import annotations

import io

import numpy as np

from ...schemas.errors import BadRecord
from ...schemas.reasons import Reason
from ..io import photos

_FORMATS = ("PNG", "TIFF", "BMP")
_COLORS = ("RGB", "RGBA")
_NUMBERS = ("L", "P", "1", "I")


def label_map_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) in pixels from a label map's header.

    Raises:
        BadRecord: LABELS_UNREADABLE; `name` is for its message.
    """
    from PIL import Image

    try:
        with photos.quiet(), Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            return opened.size
    except photos.BROKEN as error:
        raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {_why(data, error)}") from error


def decode_label_map(data: bytes, name: str, largest: int) -> np.ndarray:
    """Decode a label map.

    Args:
        data: the file. RGB and RGBA mean COCO's panoptic ids, R + 256 G + 65536 B; one channel is the id
            itself. A palette image is either: its colors count if the ids that are declared exceed 255.
        name: for messages.
        largest: the largest id that is declared.

    Returns:
        (H, W) uint32.

    Raises:
        BadRecord: LABELS_UNREADABLE.
    """
    from PIL import Image

    try:
        with photos.quiet(), Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            opened.load()
            image = opened.convert("RGB") if opened.mode == "P" and largest > 255 else opened
            if image.mode in _COLORS:
                shape = (image.height, image.width)
                packed = np.frombuffer(image.tobytes("raw", "RGBX" if image.mode == "RGB" else "RGBA"), "<u4")
                return (packed & 0xFFFFFF).reshape(shape)
            if image.mode in _NUMBERS or image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.uint32)
            mode = image.mode
    except photos.BROKEN as error:
        raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: {_why(data, error)}") from error
    raise BadRecord(Reason.LABELS_UNREADABLE, f"{name}: an image of mode {mode} holds no segment ids")


def _why(data: bytes, error: BaseException) -> str:
    if not data:
        return "empty file; fetch it again"
    if data.startswith(b"\xff\xd8"):
        return "a JPEG cannot hold segment ids; get the PNG"
    return f"does not decode ({str(error)[:120] or type(error).__name__}); fetch it again"
