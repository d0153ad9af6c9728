"""A tiny release in COCONut's panoptic layout, for tests to damage."""

import io
import json

import numpy as np
from PIL import Image

from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits

LIMITS = Limits()


WIDTH, HEIGHT = 24, 16


def label_map(dtype=np.uint32):
    labels = np.zeros((HEIGHT, WIDTH), dtype)
    labels[2:8, 3:12] = 70_000
    labels[9:, 10:] = 7
    return labels


def panoptic_png(labels):
    channels = np.stack([labels & 255, labels >> 8 & 255, labels >> 16], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(channels).save(buffer, "PNG")
    return buffer.getvalue()


def photo_jpeg(width=WIDTH, height=HEIGHT):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


SEGMENTS = [{"id": 70_000, "category_id": 1, "area": 54}, {"id": 7, "category_id": 184, "area": None}]


class Release:
    """A tiny release in the panoptic layout; tests damage it before they read it."""

    def __init__(self, root):
        self.root = root
        for name in ("photos", "labels"):
            (root / name).mkdir()
        self.images = []
        self.annotations = []

    def add(self, name="a", segments=SEGMENTS, labels=None, photo=None, **changes):
        number = len(self.images) + 1
        self.images.append(
            {"id": number, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT} | changes
        )
        self.annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
        if "/" not in name:
            (self.root / "photos" / f"{name}.jpg").write_bytes(photo_jpeg() if photo is None else photo)
            (self.root / "labels" / f"{name}.png").write_bytes(
                panoptic_png(label_map()) if labels is None else labels
            )
        return self

    def source(self, text=None, **changes):
        content = {"images": self.images, "annotations": self.annotations}
        data = json.dumps(content) if text is None else text
        (self.root / "p.json").write_bytes(data if isinstance(data, bytes) else data.encode())
        values = {"annotations": [str(self.root / "p.json")], "labels": str(self.root / "labels")}
        return open_coconut(**{**values, "photos": [str(self.root / "photos")], **changes})

    def read(self, text=None, limits=LIMITS, notes=None, **changes):
        source = self.source(text, **changes)
        return [source.read(entry, limits, notes) for entry in source.catalog()]


def open_coconut(**values):
    return open_source(BuildConfig.model_validate({"out": "out", "coconut": values}), "coconut")


def reasons(image):
    return [None if region.drop is None else region.drop.reason for region in image.regions]
