"""A photo and its masks as a user has them: mask pictures, a COCO or SA-1B file, or a sample of a shard."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline import photos, reader, rle
from schemas.errors import BadRecord, ConfigError
from schemas.records import Blob

_SAME_SHAPE = 0.02
"""A mask whose ratio of sides differs from the photo's by no more is scaled to it."""


class Marked(NamedTuple):
    """A photo with its masks.

    Attributes:
        name: what to call the photo.
        photo: (H, W, 3) uint8 RGB.
        masks: (H, W) bool each, none of them empty.
        ids: what the source calls each mask: a file name or an annotation's id.
    """

    name: str
    photo: np.ndarray
    masks: list[np.ndarray]
    ids: list[str]


def from_pictures(photo: Path, masks: Sequence[Path]) -> Marked:
    """A photo and one picture for each mask, in any encoding.

    The photo is turned as its EXIF says, unless the first mask fits only the stored one. Masks of another size
    but the same shape are scaled to the photo.

    Raises:
        ConfigError: a file cannot be read, or a mask is empty or does not fit; names it.
    """
    read = [(path, _read_mask(path)) for path in masks]
    pixels = _read_photo(photo, turned=True)
    if read and not _fits(read[0][1], pixels):
        stored = _read_photo(photo, turned=False)
        pixels = stored if _fits(read[0][1], stored) else pixels
    return Marked(
        photo.name, pixels, [_scaled(mask, pixels, path) for path, mask in read], [p.name for p in masks]
    )


def from_coco(photo: Path, annotations: Path, image_id: int | str | None = None) -> Marked:
    """A photo and its annotations in a COCO instances file (polygons and RLEs, crowds included).

    Args:
        photo: the file, stored as it was annotated.
        annotations: the JSON.
        image_id: which of its images the photo is; None: the one of the photo's file name.

    Raises:
        ConfigError: unreadable, no such image, or a mask that cannot be decoded.
    """
    document = _read_json(annotations, "images", "annotations")
    if image_id is None:
        named = [x for x in document["images"] if Path(str(x.get("file_name"))).name == photo.name]
        if len(named) != 1:
            raise ConfigError(
                f"{annotations}: {len(named)} images are called {photo.name}; say which with --image-id"
            )
        image_id = named[0].get("id")
    found = [x for x in document["annotations"] if str(x.get("image_id")) == str(image_id)]
    if not found:
        raise ConfigError(f"{annotations}: image {image_id} has no annotation")
    return _from_annotations(photo, annotations, found)


def from_sa1b(photo: Path, annotations: Path) -> Marked:
    """A photo and its SA-1B file. Raises as `from_coco`."""
    return _from_annotations(photo, annotations, _read_json(annotations, "annotations")["annotations"])


def from_shard(shard: Path, key: str) -> Marked:
    """A sample of a shard.

    Raises:
        ConfigError: the shard has no such key.
        IntegrityError: the shard is damaged.
    """
    for sample, data in reader.iter_samples(shard):
        if sample.key == key:
            masks = [rle.check(region.rle.counts, region.rle.size).rle for region in sample.regions]
            return Marked(
                key,
                photos.decode(Blob(f"{shard}: {key}"), data, rle.MAX_PIXELS),
                [rle.decode(mask).astype(bool) for mask in masks],
                [str(region.id) for region in sample.regions],
            )
    raise ConfigError(f"{shard}: no sample {key}; `tar tf` lists them")


def to_mask(picture: Image.Image) -> np.ndarray:
    """What a picture of a mask marks, (H, W) bool.

    Transparency decides where there is any; a palette's first entry is the background; else bright is inside.
    Bright is more than half: of the brightest value, so that 0 and 1 do as well as 0 and 255, but of 255 in a
    JPEG, whose edges are grey and whose black is noisy.
    """
    if picture.mode == "P" and "transparency" not in picture.info:
        return np.asarray(picture) != 0
    if picture.mode == "P":
        picture = picture.convert("RGBA")
    values = np.asarray(picture)
    if picture.mode in ("LA", "RGBA", "PA"):
        alpha = values[..., -1]
        if alpha.min() < alpha.max():
            return alpha > 127
        values = values[..., :-1]
    if values.ndim == 3:
        values = values.max(-1)
    most = 255 if picture.format == "JPEG" else values.max()
    return values.astype(np.float64) > float(most) / 2


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as opened:
            opened.load()
            mask = to_mask(opened)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise ConfigError(f"{path}: not a picture of a mask ({error}); give a PNG or JPEG") from error
    if not mask.any():
        raise ConfigError(f"{path}: an empty mask; leave it out")
    return mask


def _read_photo(path: Path, turned: bool) -> np.ndarray:
    try:
        data = path.read_bytes()
        pixels = photos.decode(Blob(str(path)), data, rle.MAX_PIXELS)
        if not turned:
            return pixels
        with Image.open(io.BytesIO(data)) as opened:
            orientation = opened.getexif().get(0x0112, 1)
    except (OSError, BadRecord) as error:
        raise ConfigError(f"{path}: not a photo ({error}); give a PNG, JPEG or WebP") from error
    if orientation == 1:
        return pixels
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))


def _fits(mask: np.ndarray, photo: np.ndarray) -> bool:
    ratio = mask.shape[1] / mask.shape[0] / (photo.shape[1] / photo.shape[0])
    return abs(ratio - 1) <= _SAME_SHAPE


def _scaled(mask: np.ndarray, photo: np.ndarray, path: Path) -> np.ndarray:
    height, width = photo.shape[:2]
    if mask.shape == (height, width):
        return mask
    size = f"{mask.shape[1]}x{mask.shape[0]}"
    if not _fits(mask, photo):
        raise ConfigError(f"{path}: {size} pixels, the photo {width}x{height}; give a mask of the photo's shape")
    scaled = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    if not scaled.any():
        raise ConfigError(f"{path}: nothing is left of it at {width}x{height} pixels; leave it out")
    return scaled


def _read_json(path: Path, *lists: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); mend the path") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); fetch it again") from error
    for name in lists:
        value = document.get(name) if isinstance(document, dict) else None
        if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
            raise ConfigError(f"{path}: no list `{name}` of objects; not the expected kind of annotation file")
    return document


def _from_annotations(photo: Path, path: Path, annotations: list[dict[str, Any]]) -> Marked:
    pixels = _read_photo(photo, turned=False)
    height, width = pixels.shape[:2]
    checked = rle.check_all([x.get("segmentation") for x in annotations], height, width)
    ids = [str(x.get("id", i)) for i, x in enumerate(annotations)]
    masks = []
    for name, mask in zip(ids, checked, strict=True):
        if isinstance(mask, BadRecord):
            raise ConfigError(f"{path}: annotation {name} on {photo.name} ({width}x{height}): {mask}") from mask
        masks.append(rle.decode(mask.rle).astype(bool))
    return Marked(photo.name, pixels, masks, ids)
