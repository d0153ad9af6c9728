"""Makes the sample corpus in this folder from the original photographs and their masks.

    python samples/make_samples.py ORIGINALS

ORIGINALS holds `images/` and `annotations.json` (file name, width, height, and regions with COCO RLEs). The
same input and the same Pillow release give the same bytes.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

HERE = Path(__file__).resolve().parent
JPEG = {"quality": 88, "optimize": True}

COCONUT = {
    "astronaut.png": 1,
    "chelsea.png": 17,
    "coffee.png": 47,
    "flower.jpg": 119,
    "china.jpg": 197,
    "rocket.jpg": 1001,
}
"""Photos of the COCO-panoptic part, with the category of their one segment."""

CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person", "isthing": 1},
    {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": 47, "name": "cup", "supercategory": "kitchen", "isthing": 1},
    {"id": 119, "name": "flower", "supercategory": "plant", "isthing": 0},
    {"id": 197, "name": "building-other-merged", "supercategory": "building", "isthing": 0},
    {"id": 1001, "name": "rocket", "supercategory": "vehicle", "isthing": 1},
]
"""COCO's ids and names as far as they go; COCO has no rocket."""

SA1B = ["coins.png", "coffee.png", "rocket.jpg", "flower.jpg"]
"""Photos of the SA-1B part, in order: sa_1, sa_2, ..."""


def main(originals: Path) -> None:
    records = {row["file_name"]: row for row in json.loads((originals / "annotations.json").read_text())}
    for folder in ("coconut", "sa1b"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    make_coconut(originals / "images", records)
    make_sa1b(originals / "images", records)


def make_coconut(photos: Path, records: dict[str, Any]) -> None:
    """COCO-panoptic layout: photos, label PNGs and one JSON."""
    root = HERE / "coconut"
    (root / "photos").mkdir(parents=True)
    (root / "labels").mkdir()
    images, annotations = [], []
    for number, (name, category) in enumerate(COCONUT.items(), 1):
        record = records[name]
        stem = Path(name).stem
        (root / "photos" / f"{stem}.jpg").write_bytes(jpeg(photos / name))
        mask = coco.decode(record["regions"][0]["mask_rle"]).astype(bool)
        segment = 0x0A_2000 + 4099 * number  # any 24-bit id: R + 256 G + 65536 B
        label = np.zeros((*mask.shape, 3), np.uint8)
        label[mask] = [segment & 255, segment >> 8 & 255, segment >> 16]
        Image.fromarray(label).save(root / "labels" / f"{stem}.png", optimize=True)
        images.append(
            {"id": number, "file_name": f"{stem}.jpg", "width": record["width"], "height": record["height"]}
        )
        box, area = box_and_area(mask)
        info = {"id": segment, "category_id": category, "iscrowd": 0, "bbox": box, "area": area}
        annotations.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": [info]})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "panoptic.json").write_text(json.dumps(document, indent=1) + "\n")


def make_sa1b(photos: Path, records: dict[str, Any]) -> None:
    """SA-1B layout: one tar of photo and JSON per image."""
    (HERE / "sa1b").mkdir()
    with tarfile.open(HERE / "sa1b" / "sa_000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, name in enumerate(SA1B, 1):
            record = records[name]
            masks = [coco.decode(region["mask_rle"]).astype(bool) for region in record["regions"]]
            masks += to_be_dropped(name, masks)
            annotations = [sa1b_annotation(number * 1000 + i, mask) for i, mask in enumerate(masks)]
            size = {"width": record["width"], "height": record["height"]}
            image = {"image_id": number, **size, "file_name": f"sa_{number}.jpg"}
            document = json.dumps({"image": image, "annotations": annotations}).encode()
            for ending, data in (("jpg", jpeg(photos / name)), ("json", document)):
                member = tarfile.TarInfo(f"./sa_{number}.{ending}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def to_be_dropped(name: str, masks: list[np.ndarray]) -> list[np.ndarray]:
    """Masks that no one drew, for the mask filters to find; README.md lists them."""
    height, width = masks[0].shape
    rows, columns = np.mgrid[0:height, 0:width]
    if name == "coins.png":
        largest = max(masks, key=np.sum)
        top = np.nonzero(largest.any(axis=1))[0]
        upper_half = largest & (rows <= top.mean())
        eroded = masks[0] & np.roll(masks[0], 1, axis=0) & np.roll(masks[0], 1, axis=1)
        speck = (rows - 12) ** 2 + (columns - 12) ** 2 <= 36
        return [upper_half, eroded, speck]
    if name == "flower.jpg":
        y, x = (axis.mean() for axis in np.nonzero(masks[0]))
        return [masks[0] & ((rows - y) ** 2 + (columns - x) ** 2 <= 45**2)]
    return []


def sa1b_annotation(number: int, mask: np.ndarray) -> dict[str, Any]:
    """One mask with all of SA-1B's fields; the scores and the point are filled in, see README.md."""
    (x, y, width, height), area = box_and_area(mask)
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    rows, columns = np.nonzero(mask)
    nearest = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
    return {
        "id": number,
        "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
        "bbox": [float(x), float(y), float(width - 1), float(height - 1)],  # as SA-1B has it
        "area": area,
        "predicted_iou": 0.95,
        "stability_score": 0.96,
        "point_coords": [[float(columns[nearest]), float(rows[nearest])]],
        "crop_box": [0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
    }


def box_and_area(mask: np.ndarray) -> tuple[list[int], int]:
    """Box x, y, width, height and number of pixels of a mask."""
    rows, columns = np.nonzero(mask)
    x, y = int(columns.min()), int(rows.min())
    return [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y], int(mask.sum())


def jpeg(photo: Path) -> bytes:
    """The photo's own bytes if it is a JPEG; else it is converted."""
    data = photo.read_bytes()
    if data.startswith(b"\xff\xd8"):
        return data
    with Image.open(io.BytesIO(data)) as opened:
        out = io.BytesIO()
        opened.convert("L" if opened.mode == "L" else "RGB").save(out, "JPEG", **JPEG)
    return out.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
