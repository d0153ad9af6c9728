"""A small file in COCO's own instances layout, for tests to damage."""

import io
import json

import numpy as np
from PIL import Image

from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig, Limits

WIDTH, HEIGHT = 48, 32
LIMITS = Limits()

CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "animal", "id": 17, "name": "cat"},
    {"supercategory": "appliance", "id": 90, "name": "hair drier"},
]


def photo_jpeg(width=WIDTH, height=HEIGHT, tint=90):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (tint, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def polygon(x=4.5, y=3.25, width=20.5, height=11.75):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def crowd_rle():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:30, 5:40:2] = 1
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"counts": np.diff(edges, prepend=0, append=flat.size).tolist(), "size": [HEIGHT, WIDTH]}


def annotation(number, image=139, **changes):
    own = {
        "segmentation": polygon(),
        "area": 240.875,
        "iscrowd": 0,
        "image_id": image,
        "bbox": [4.5, 3.25, 20.5, 11.75],
        "category_id": 17,
        "id": number,
    }
    return {name: value for name, value in (own | changes).items() if value is not ...}


def image_row(number=139, **changes):
    own = {
        "license": 2,
        "file_name": f"{number:012}.jpg",
        "coco_url": f"http://images.cocodataset.org/val2017/{number:012}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "date_captured": "2013-11-21 01:34:01",
        "flickr_url": "http://farm9.staticflickr.com/8035/8024364858_9c41dc1666_z.jpg",
        "id": number,
    }
    return {name: value for name, value in (own | changes).items() if value is not ...}


def content(*annotations, **changes):
    licenses = [{"url": "http://creativecommons.org/licenses/by-nc/2.0/", "id": 2, "name": "BY-NC"}]
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": licenses,
        "images": [image_row()],
        "annotations": list(annotations) or [annotation(1)],
        "categories": CATEGORIES,
    } | changes


def write(root, document, photos=("000000000139.jpg",)):
    """The folder with the JSON and the photos, made."""
    for name in photos:
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(photo_jpeg())
    text = document if isinstance(document, str | bytes) else json.dumps(document)
    (root / "instances.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def open_coco(root, recipe=None, **options):
    source = {
        "source": "coco",
        "annotations": [str(root / "instances.json")],
        "photos": [str(root / "photos")],
    } | options
    subset = {"sources": source, "recipe": recipe}
    return open_source(BuildConfig.model_validate({"out": "out", "subsets": {"shelf": subset}}), "shelf")


def read(root, limits=LIMITS, notes=None, **options):
    source = open_coco(root, **options)
    images = [source.read(entry, limits, notes) for entry in source.catalog()]
    if notes is not None:
        notes += source.notes
    return images


def reasons(image):
    return [None if region.drop is None else str(region.drop.reason) for region in image.regions]
