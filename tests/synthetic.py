"""Synthetic sources in the published layouts: photos with coloured rectangles, and their exact masks."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 17, "name": "cat", "isthing": 1},
    {"id": 184, "name": "tree-merged", "isthing": 0},
]


def scene(seed: int, num_masks: int = 4, size: tuple[int, int] = (96, 128)) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 photo and (H, W) uint32 label map with ids 1..num_masks, rectangles in a grid."""
    rng = np.random.default_rng(seed)
    height, width = size
    photo = rng.integers(90, 110, (height, width, 3), dtype=np.uint8)
    labels = np.zeros(size, np.uint32)
    columns = int(np.ceil(np.sqrt(num_masks)))
    rows = int(np.ceil(num_masks / columns))
    for i in range(num_masks):
        y, x = (i // columns) * height // rows, (i % columns) * width // columns
        h = rng.integers(height // rows // 2, height // rows - 2)
        w = rng.integers(width // columns // 2, width // columns - 2)
        labels[y + 1 : y + 1 + h, x + 1 : x + 1 + w] = i + 1
        photo[y + 1 : y + 1 + h, x + 1 : x + 1 + w] = rng.integers(0, 255, 3)
    return photo, labels


def jpeg(photo: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_coconut(
    root: Path, num_images: int, num_masks: int = 4, size: tuple[int, int] = (96, 128), first: int = 0
) -> dict:
    """A COCO-panoptic release under `root`; returns the config's source entry.

    Written again with more images, or with a later `first`, it is the release of a source that has grown.
    """
    (root / "photos").mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(first, first + num_images):
        photo, labels = scene(i, num_masks, size)
        name = f"{i:012d}"
        (root / "photos" / f"{name}.jpg").write_bytes(jpeg(photo))
        rgb = np.stack([labels & 255, labels >> 8 & 255, labels >> 16], axis=2).astype(np.uint8)
        Image.fromarray(rgb).save(root / "labels" / f"{name}.png", compress_level=1)
        images.append({"id": i, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]})
        segments = [
            {
                "id": k + 1,
                "category_id": CATEGORIES[k % 3]["id"],
                "iscrowd": 0,
                "area": int((labels == k + 1).sum()),
            }
            for k in range(num_masks)
        ]
        annotations.append({"image_id": i, "file_name": f"{name}.png", "segments_info": segments})
    text = json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    (root / "panoptic.json").write_text(text)
    return {
        "annotations": [str(root / "panoptic.json")],
        "labels": str(root / "labels"),
        "photos": [str(root / "photos")],
    }


def write_boxes(root: Path, num_images: int, num_boxes: int = 4, size: tuple[int, int] = (96, 128)) -> dict:
    """A detection set in COCO's layout under `root`, of the same scenes; returns the source's entry."""
    (root / "photos").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(num_images):
        photo, labels = scene(i, num_boxes, size)
        (root / "photos" / f"{i:012d}.jpg").write_bytes(jpeg(photo))
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "height": size[0], "width": size[1]})
        for k in range(num_boxes):
            rows, columns = np.nonzero(labels == k + 1)
            x, y = int(columns.min()), int(rows.min())
            box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
            category = CATEGORIES[k % 3]["id"]
            annotations.append({"id": len(annotations), "image_id": i, "category_id": category, "bbox": box})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "boxes.json").write_text(json.dumps(document))
    return {"source": "boxes", "annotations": [str(root / "boxes.json")], "photos": [str(root / "photos")]}


def write_sa1b(
    root: Path,
    num_images: int,
    num_masks: int = 4,
    size: tuple[int, int] = (96, 128),
    first: int = 0,
    name: str = "sa_000000.tar",
) -> dict:
    """One tar under `root`, with images from number `first` on; returns the config's source entry."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, "w") as tar:
        for i in range(first, first + num_images):
            photo, labels = scene(1000 + i, num_masks, size)
            annotations = []
            for k in range(num_masks):
                rle = coco.encode(np.asfortranarray(labels == k + 1))
                x, y, w, h = coco.toBbox(rle).tolist()
                annotations.append(
                    {
                        "id": 100 * i + k,
                        "segmentation": {"size": list(size), "counts": rle["counts"].decode()},
                        "bbox": [x, y, w - 1, h - 1],
                        "area": int(coco.area(rle)),
                        "predicted_iou": 0.95,
                        "stability_score": 0.97,
                        "crop_box": [0.0, 0.0, float(size[1]), float(size[0])],
                        "point_coords": [[x + w / 2, y + h / 2]],
                    }
                )
            record = {
                "image": {"image_id": i, "width": size[1], "height": size[0], "file_name": f"sa_{i}.jpg"},
                "annotations": annotations,
            }
            for ending, data in (("jpg", jpeg(photo)), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"./sa_{i}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"paths": [str(root / name)]}


def shadow_modules(parent: Path) -> Path:
    """A folder in which the user has modules called as our folders are; each of them raises."""
    folder = parent / "own"
    (folder / "flows").mkdir(parents=True)
    for name in ("schemas.py", "filters.py", "pipeline.py", "model_training.py", "flows/__init__.py"):
        (folder / name).write_text(f"raise RuntimeError('{name} of the user was imported')\n")
    return folder
