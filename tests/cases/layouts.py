"""Small sources in every layout that is read, made from a seed, with the masks that each of them holds.

Ids, areas, names and sizes are chosen so that a mask of another segment or of another image is never equal to
the right one: what goes wrong shows.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 17, "name": "cat", "isthing": 1},
    {"id": 184, "name": "tree-merged", "isthing": 0},
]
SIZES = ((24, 32), (24, 32), (32, 24), (30, 40))
LAYOUTS = ("panoptic", "panoptic-two", "panseg", "parquet", "sa1b-folder", "sa1b-tar", "sa1b-two")


class Picture(NamedTuple):
    """A photo and its label map.

    Attributes:
        name: of the photo without its ending, perhaps with a folder.
        number: its id.
        photo: the file, `ending` as its kind says.
        labels: (H, W) uint32.
    """

    name: str
    number: int
    photo: bytes
    ending: str
    labels: np.ndarray

    @property
    def ids(self) -> list[int]:
        return [int(each) for each in np.unique(self.labels) if each]


class Made(NamedTuple):
    """A source on the disk.

    Attributes:
        root: its folder.
        layout: of `LAYOUTS`.
        entry: what a configuration says of it.
        pictures: what it holds.
        has_areas: whether it says how large each mask is.
    """

    root: Path
    layout: str
    entry: dict[str, Any]
    pictures: list[Picture]
    has_areas: bool

    def files(self, *endings: str) -> list[Path]:
        """Its files with one of these endings, in order."""
        return sorted(path for path in self.root.rglob("*") if path.is_file() and path.suffix in endings)


def make_source(random: Random, root: Path) -> Made:
    """A source of a random layout in a folder that is not there yet."""
    root.mkdir()
    layout = random.choice(LAYOUTS)
    large_ids = random.random() < 0.5
    pictures = [_picture(random, number, large_ids) for number in range(1, random.randint(2, 4) + 1)]
    has_areas = random.random() < 0.8
    if layout.startswith("sa1b"):
        entry = _write_sa1b(random, root, layout, pictures, has_areas)
    elif layout == "parquet":
        entry = _write_parquet(random, root, pictures, has_areas)
    else:
        entry = _write_panoptic(random, root, layout, pictures, has_areas)
    return Made(root, layout, entry, pictures, has_areas)


def _picture(random: Random, number: int, large_ids: bool) -> Picture:
    size = random.choice(SIZES)
    if random.random() < 0.05:
        size = (280, 300)  # a photo of noise is longer than what is read for its header
    labels = np.zeros(size, np.uint32)
    many = random.randint(1, 4)
    ids = random.sample(range(256, 1 << 24) if large_ids else range(1, 40), many)
    for place, each in enumerate(ids):  # columns of rectangles, each of another size
        width = size[1] // many
        left = place * width
        bottom, right = random.randint(7, size[0] - 3), random.randint(left + 4, left + width - 1)
        labels[2 + number % 3 : bottom, left:right] = each
    noise = np.random.default_rng(random.getrandbits(32)).integers(0, 255, (*size, 3), dtype=np.uint8)
    kind, ending = random.choice((("JPEG", ".jpg"), ("JPEG", ".jpg"), ("PNG", ".png")))
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    name = random.choice((f"{number:012d}", f"img.{number}", f"photo_{number}-x", f"bild été {number}"))
    return Picture(name, number, buffer.getvalue(), ending, labels)


def label_png(random: Random, labels: np.ndarray) -> bytes:
    """A label map as releases have it: ids as colors, or in one channel where they fit."""
    largest = int(labels.max())
    colors = np.stack([labels & 255, labels >> 8 & 255, labels >> 16], -1).astype(np.uint8)
    image = Image.fromarray(colors)
    kind = random.random()
    if kind < 0.15:
        image = image.convert("RGBA")
    elif kind < 0.25:
        image = image.quantize(256) if len(np.unique(labels)) < 200 else image
    elif kind < 0.35 and largest < 256:
        image = Image.fromarray(labels.astype(np.uint8))
    elif kind < 0.4 and largest < 65536:
        image = Image.fromarray(labels.astype(np.uint16))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _segments(random: Random, picture: Picture, has_areas: bool) -> list[dict[str, Any]]:
    found = []
    for each in picture.ids:
        category = random.choice(CATEGORIES)
        segment = {"id": each, "category_id": category["id"], "iscrowd": 0}
        if has_areas:
            segment["area"] = int((picture.labels == each).sum())
        if random.random() < 0.3:
            segment |= {"isthing": category["isthing"], "bbox": [0, 0, 5, 5]}
        found.append(segment)
    return found


def _image(picture: Picture) -> dict[str, Any]:
    height, width = picture.labels.shape
    name = f"{picture.name}{picture.ending}"
    return {"id": picture.number, "file_name": name, "width": width, "height": height}


def _write_photos(random: Random, root: Path, pictures: list[Picture]) -> list[str]:
    folders = random.choice((["photos"], ["photos", "more"], ["photos/train"]))
    for picture in pictures:
        path = root / random.choice(folders) / f"{picture.name}{picture.ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.photo)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    return [str(root / folder) for folder in folders]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_panoptic(
    random: Random, root: Path, layout: str, pictures: list[Picture], has_areas: bool
) -> dict[str, Any]:
    (root / "labels").mkdir()
    for picture in pictures:
        (root / "labels" / f"{picture.name}.png").write_bytes(label_png(random, picture.labels))
    images, annotations = [], []
    for picture in pictures:
        images.append(_image(picture))
        segments = _segments(random, picture, has_areas)
        name = f"{picture.name}.png"
        annotations.append({"image_id": picture.number, "file_name": name, "segments_info": segments})
    documents = []
    if layout == "panseg":
        (root / "info").mkdir()
        for picture, image, each in zip(pictures, images, annotations, strict=True):
            own = {**image, "segments_info": each["segments_info"]} if random.random() < 0.7 else each
            own = each["segments_info"] if random.random() < 0.15 else own
            (root / "info" / f"{picture.name}.json").write_text(_dump(own))
        documents = [str(root / "info")]
        (root / "categories.json").write_text(_dump(CATEGORIES))
    else:
        parts = [pictures] if layout == "panoptic" else [pictures[:1], pictures[1:]]
        for number, part in enumerate(parts):
            chosen = [place for place, each in enumerate(pictures) if each in part]
            document = {"images": [images[place] for place in chosen]}
            document["annotations"] = [annotations[place] for place in chosen]
            document["categories"] = CATEGORIES
            (root / f"panoptic{number}.json").write_text(_dump(document))
            documents.append(str(root / f"panoptic{number}.json"))
    return {
        "source": "coconut",
        "annotations": documents,
        "labels": str(root / "labels"),
        "photos": _write_photos(random, root, pictures),
        **({"categories": str(root / "categories.json")} if layout == "panseg" else {}),
    }


def _write_parquet(random: Random, root: Path, pictures: list[Picture], has_areas: bool) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for picture in pictures:
        mask = {"bytes": label_png(random, picture.labels), "path": f"{picture.name}.png"}
        info = {"file_name": f"{picture.name}.png", "image_id": picture.number}
        info["segments_info"] = _segments(random, picture, has_areas)
        rows.append({"mask": mask, "segments_info": info, "image_info": _image(picture)})
    pq.write_table(
        pa.Table.from_pylist(rows), root / "rows.parquet", row_group_size=2, write_page_checksum=True
    )
    (root / "categories.json").write_text(_dump(CATEGORIES))
    return {
        "source": "coconut",
        "layout": "parquet",
        "annotations": [str(root / "rows.parquet")],
        "photos": _write_photos(random, root, pictures),
        "categories": str(root / "categories.json"),
    }


def _sa1b_json(random: Random, picture: Picture, has_areas: bool) -> bytes:
    annotations = []
    form = random.choice(("rle", "rle", "counts", "polygon"))
    height, width = picture.labels.shape
    for each in picture.ids:
        mask = picture.labels == each
        packed: Any = coco.encode(np.asfortranarray(mask))
        x, y, w, h = (int(value) for value in coco.toBbox(packed))
        segmentation: Any = {"size": [height, width], "counts": packed["counts"].decode()}
        if form == "counts":
            segmentation["counts"] = _runs(mask)
        elif form == "polygon":
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotation = {"id": 1000 * picture.number + each, "segmentation": segmentation, "bbox": [x, y, w, h]}
        annotation |= {"predicted_iou": 0.95, "stability_score": 0.97}
        annotation |= {"crop_box": [0, 0, width, height], "point_coords": [[x + 1.5, y + 1.5]]}
        if has_areas:
            annotation["area"] = int(mask.sum())
        annotations.append(annotation)
    image = {"image_id": picture.number, "width": width, "height": height}
    image["file_name"] = f"{picture.name}{picture.ending}"
    return _dump({"image": image, "annotations": annotations}).encode()


def _runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]), [mask.size]])
    return [int(each) for each in np.diff(edges)]


def _write_sa1b(
    random: Random, root: Path, layout: str, pictures: list[Picture], has_areas: bool
) -> dict[str, Any]:
    pairs = []
    for picture in pictures:
        pairs.append((f"{picture.name}{picture.ending}", picture.photo))
        pairs.append((f"{picture.name}.json", _sa1b_json(random, picture, has_areas)))
    if layout == "sa1b-tar":
        paths = [root / "sa_000000.tar"]
        paths[0].write_bytes(tar_of(pairs, random.choice(("./", "", "sa/"))))
    elif layout == "sa1b-two":
        paths = [root / "sa_000000.tar", root / "sa_000001.tar"]
        paths[0].write_bytes(tar_of(pairs[:2], "./"))
        paths[1].write_bytes(tar_of(pairs[2:], "./"))
    else:
        paths = [root / "sa"]
        paths[0].mkdir()
        for name, data in pairs:
            (paths[0] / name).write_bytes(data)
    return {"source": "sa1b", "paths": [str(path) for path in paths]}


def tar_of(members: list[tuple[str, bytes]], prefix: str = "") -> bytes:
    """A tar of these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(f"{prefix}{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
