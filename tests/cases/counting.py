"""What a source holds, counted and decoded by json, Pillow and pycocotools alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from tests.cases.layouts import Made, Picture
from tests.cases.parts import LABEL, TEXT, kind_of, read_parts

_BLOCK = 512
_PHOTO_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


class Count(NamedTuple):
    """Records of images, and the regions that these declare."""

    images: int
    regions: int

    def __add__(self, other: Any) -> Count:
        return Count(self.images + other.images, self.regions + other.regions)


class Truth(NamedTuple):
    """The masks of an undamaged source.

    Attributes:
        masks: by photo without its ending, and id.
        by_place: by photo, and place in its list: what counts where a list has the masks themselves.
    """

    masks: dict[tuple[str, int], np.ndarray]
    by_place: dict[tuple[str, int], np.ndarray]


def parse(data: bytes) -> Any:
    """JSON as its bytes say, also with NaN and broken text; None if it is none."""
    try:
        return json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return None


def true_masks(made: Made) -> Truth:
    """Decode every mask of an undamaged source."""
    masks: dict[tuple[str, int], np.ndarray] = {}
    by_place: dict[tuple[str, int], np.ndarray] = {}
    names = sorted((each.name for each in made.pictures), key=len, reverse=True)
    if made.layout == "parquet":
        rows = {str(place): each.name for place, each in enumerate(made.pictures)}
    else:
        rows = {}
    for name, data in read_parts(made.root).items():
        stem = next((each for each in names if f"/{each}." in f"/{name.replace('!', '/')}"), "")
        if name.startswith("rows.parquet!"):
            stem = rows[str(int(name[13:16]))]
        if kind_of(name) == LABEL:
            ids = _ids(data)
            masks |= {(stem, int(each)): ids == each for each in np.unique(ids) if each}
        elif kind_of(name) == TEXT and made.layout.startswith("sa1b"):
            record = json.loads(data)
            size = (record["image"]["height"], record["image"]["width"])
            for place, annotation in enumerate(record["annotations"]):
                mask = _decode(annotation["segmentation"], *size)
                masks[stem, annotation["id"]] = by_place[stem, place] = mask
    return Truth(masks, by_place)


def _ids(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if image.mode in ("L", "I;16"):
        return np.asarray(image).astype(np.int64)
    colors = np.asarray(image.convert("RGB")).astype(np.int64)
    return colors @ np.array([1, 256, 65536])


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        packed = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        packed = coco.frPyObjects(segmentation, height, width)
    else:
        packed = segmentation
    return coco.decode(packed).astype(bool)


def decode_counts(counts: str, height: int, width: int) -> np.ndarray:
    """A mask of the corpus, as pycocotools decodes it."""
    return coco.decode({"size": [height, width], "counts": counts.encode()}).astype(bool)


def picture_of(made: Made, file_name: str) -> Picture | None:
    """The picture whose photo is called so."""
    base = file_name.replace("\\", "/").rpartition("/")[2]
    for picture in made.pictures:
        stem, _, ending = base.rpartition(".")  # the ending says nothing of what a file is
        if picture.name in (base, stem if ending.lower() in _PHOTO_ENDINGS else base):
            return picture
    return None


def count_source(made: Made) -> Count | None:
    """Records and regions of a source as it lies there; None if a file is not what it should be at all."""
    if made.layout == "parquet":
        return _count_parquet(made.root / "rows.parquet")
    if made.layout.startswith("sa1b"):
        counts = [_count_texts(made.root / "sa", (".json",))] if (made.root / "sa").is_dir() else []
        counts += [count_tar(path.read_bytes()) for path in sorted(made.root.glob("*.tar"))]
        return sum(counts, Count(0, 0))
    if made.layout == "panseg":
        return _count_texts(made.root / "info", (".json",))
    total = Count(0, 0)
    for path in sorted(made.root.glob("panoptic*.json")):
        document = parse(path.read_bytes())
        records = document.get("annotations") if isinstance(document, dict) else None
        if not isinstance(records, list):
            return None
        total += Count(len(records), sum(_length(each, "segments_info") for each in records))
    return total


def _length(record: Any, name: str) -> int:
    value = record.get(name) if isinstance(record, dict) else None
    return len(value) if isinstance(value, list) else 0


def _count_text(data: bytes) -> int:
    record = parse(data)
    if isinstance(record, list):
        return len(record)
    return max(_length(record, "segments_info"), _length(record, "annotations"))


def _count_texts(folder: Path, endings: tuple[str, ...]) -> Count:
    texts = [path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()]
    return Count(len(texts), sum(_count_text(path.read_bytes()) for path in texts))


def _count_parquet(path: Path) -> Count | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None
    return Count(len(rows), sum(_length(row.get("segments_info"), "segments_info") for row in rows))


def count_tar(data: bytes) -> Count:
    """JSONs in a tar and their regions, up to a block that should be a header and is none.

    What lies behind such a block may be a file that looks like a header: nothing says where the next one is.
    """
    total, at = Count(0, 0), 0
    while at + _BLOCK <= len(data):
        header = data[at : at + _BLOCK]
        size = _size(header)
        at += _BLOCK
        if size is None and header.strip(b"\0"):
            break
        if size is None:
            continue
        name = header[:100].rstrip(b"\0")
        body = data[at : at + size]
        if name.lower().endswith(b".json") and header[156:157] in (b"0", b"\0"):
            total += Count(1, _count_text(body) if len(body) == size else 0)
        at += -(-size // _BLOCK) * _BLOCK
    return total


def _size(header: bytes) -> int | None:
    """The length that a header gives its member; None if this is no header."""
    try:
        wanted = int(header[148:156].strip(b"\0 ") or b"-", 8)
        size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return None
    return size if wanted == sum(header[:148]) + 8 * 32 + sum(header[156:]) else None
