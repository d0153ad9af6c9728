"""Inputs for each row of the tables in `docs/sources.md`, made anew; `test_table` sees what becomes of them.

An input is a function that takes an empty folder, writes a source into it, and returns its entry in a
configuration. A release has the images `a`, which is odd or damaged, and `b`, which is sound.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco

HEIGHT, WIDTH = 24, 32
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
HTML = b"<!DOCTYPE html><html>404 Not Found</html>"
Input = Callable[[Path], dict[str, Any]]


def encoded(form: str, image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


PLAIN = picture()
JPEG, PNG = encoded("JPEG", PLAIN), encoded("PNG", PLAIN)
LABELS = np.zeros((HEIGHT, WIDTH), np.uint32)
LABELS[2:10, 3:13] = 70_000
LABELS[12:20, 10:30] = 7
SEGMENTS = [{"id": 70_000, "category_id": 1, "area": 80}, {"id": 7, "category_id": 184, "area": 160}]


def colors(labels: np.ndarray = LABELS) -> Image.Image:
    return Image.fromarray(np.stack([labels & 255, labels >> 8 & 255, labels >> 16], -1).astype(np.uint8))


def copy_of(segments: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """The segments, the first one with other values."""
    return [segments[0] | changes, *map(dict, segments[1:])]


def release(
    photo: bytes | None = JPEG,
    labels: bytes | None = None,
    change: Callable[[dict[str, Any]], object] = lambda _: None,
    text: Callable[[str], str | bytes] = str,
    files: dict[str, bytes] | None = None,
    **options: Any,
) -> Input:
    """A panoptic release.

    Args:
        photo: the file of image `a`; None for none.
        labels: the same of its label map.
        change: changes the panoptic JSON in place.
        text: makes the file of its text.
        files: others, by their names.
        options: of the source, in which `~` is the folder.
    """

    def write(root: Path) -> dict[str, Any]:
        whole = encoded("PNG", colors())
        given = {"photos/a.jpg": photo, "labels/a.png": whole if labels is None else labels}
        given |= {"photos/b.jpg": JPEG, "labels/b.png": whole, **(files or {})}
        document: dict[str, Any] = {"images": [], "annotations": []}
        for number, name in enumerate("ab", start=1):
            size = {"width": WIDTH, "height": HEIGHT}
            document["images"].append({"id": number, "file_name": f"{name}.jpg", **size})
            segments = [dict(each) for each in SEGMENTS]
            about = {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}
            document["annotations"].append(about)
        change(document)
        made = text(json.dumps(document))
        given["panoptic.json"] = made if isinstance(made, bytes) else made.encode()
        for name, data in given.items():
            if data:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(data)
        entry = {"annotations": ["~/panoptic.json"], "labels": "~/labels", "photos": ["~/photos"]} | options
        return {"coconut": [json.loads(json.dumps(entry).replace("~", str(root)))]}

    return write


def of_image(**changes: Any) -> Input:
    """A release whose first entry of `images` has other values."""
    return release(change=lambda document: document["images"][0].update(changes))


def of_annotation(**changes: Any) -> Input:
    return release(change=lambda document: document["annotations"][0].update(changes))


def of_segment(**changes: Any) -> Input:
    return of_annotation(segments_info=copy_of(SEGMENTS, **changes))


def renamed(photo: str, label: str, name: str) -> Input:
    """Image `a` is called `name`, and its files are where they are said to be."""

    def change(document: dict[str, Any]) -> None:
        document["images"][0]["file_name"] = f"{name}.jpg"
        document["annotations"][0]["file_name"] = f"{name}.png"

    return release(None, b"", change, files={photo: JPEG, label: encoded("PNG", colors())})


def single(data: bytes) -> Input:
    """A folder with a JSON for each image; this is the one of `a`."""
    whole = json.dumps({"file_name": "b.png", "segments_info": SEGMENTS}).encode()
    files = {"info/a.json": data, "info/b.json": whole}
    return release(files=files, annotations=["~/info"])


WHOLE = json.dumps({"file_name": "a.png", "segments_info": SEGMENTS}).encode()


def categories(data: bytes) -> Input:
    return release(files={"names.json": data}, categories="~/names.json")


def named(*rows: dict[str, Any]) -> Input:
    """A category list with these rows besides those that the release needs."""
    given = [{"id": 1, "name": "person", "isthing": 1}, {"id": 184, "name": "tree", "isthing": 0}, *rows]
    return categories(json.dumps(given).encode())


def optimized() -> bytes:
    """The label map as a palette whose order is not that of the ids."""
    image = Image.fromarray(np.select([LABELS == 70_000, LABELS == 7], [0, 2], 1).astype(np.uint8))
    image.putpalette([70_000 & 255, 70_000 >> 8 & 255, 70_000 >> 16, 0, 0, 0, 7, 0, 0])
    return encoded("PNG", image)


def gray() -> Input:
    """A gray label map with the ids as values."""
    small = np.where(LABELS == 70_000, 3, LABELS).astype(np.uint8)
    labels = encoded("PNG", Image.fromarray(small))
    return release(
        labels=labels, change=lambda found: found["annotations"][0]["segments_info"][0].update(id=3)
    )


def ending(end: str) -> Input:
    """The photo of image `a` has another ending, in the list and on the disk."""
    name = f"photos/a{end}"
    return release(
        None, change=lambda found: found["images"][0].update(file_name=name[7:]), files={name: JPEG}
    )


def without_areas(labels: bytes) -> Input:
    return release(
        labels=labels,
        change=lambda found: [each.pop("area") for each in found["annotations"][0]["segments_info"]],
    )


def not_utf8_info(root: Path) -> dict[str, Any]:
    entry = single(WHOLE)(root)
    (root / "info" / os.fsdecode(b"\xe9.json")).write_bytes(WHOLE)
    return entry


def twisted(form: str = "JPEG", **options: Any) -> bytes:
    """A photo with an EXIF tag that turns it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(form, PLAIN, exif=exif, **options)


def with_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 2_000_000, zip=True)
    return encoded("PNG", PLAIN, pnginfo=text)


# SA-1B

MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[4:14, 6:20] = 1
RLE = coco.encode(np.asfortranarray(MASK))
COUNTS = str(RLE["counts"], "ascii")  # pyright: ignore
SIZE = [HEIGHT, WIDTH]
OUTLINE = [6.0, 4.0, 20.0, 4.0, 20.0, 14.0, 6.0, 14.0]


def raw_counts(mask: np.ndarray = MASK) -> list[int]:
    """Run lengths by columns, background first."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends.tolist(), flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def record(segmentation: Any = None, **changes: Any) -> bytes:
    """The JSON of an image with one mask."""
    mask = {"size": SIZE, "counts": COUNTS} if segmentation is None else segmentation
    image = {"image_id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "a.jpg"}
    about = {"id": 1, "segmentation": mask, "area": 140, "bbox": [6, 4, 13, 9], "predicted_iou": 0.9}
    return json.dumps({"image": image, "annotations": [about | changes]}).encode()


def pairs(data: bytes, photo: bytes = JPEG, **files: bytes) -> Input:
    """A folder with the pairs `a` and `b`."""

    def write(root: Path) -> dict[str, Any]:
        given = {"a.jpg": photo, "a.json": data, "b.jpg": JPEG, "b.json": record()} | files
        for name, content in given.items():
            (root / name).write_bytes(content)
        return {"sa1b": [{"paths": [str(root)]}]}

    return write


def pairs_called(photo: str) -> Input:
    """As `pairs`, with another name of the photo of `a`."""

    def write(root: Path) -> dict[str, Any]:
        entry = pairs(record())(root)
        (root / "a.jpg").rename(root / photo)
        return entry

    return write


def not_utf8_pair(root: Path) -> dict[str, Any]:
    for ending, data in (("jpg", JPEG), ("json", record())):
        (root / os.fsdecode(f"\xe9.{ending}".encode("latin-1"))).write_bytes(data)
    return pairs(record())(root)


def mask(segmentation: Any) -> Input:
    return pairs(record(segmentation))


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return buffer.getvalue()


def body(data: bytes, last: bool = True) -> bytes:
    """A tar's members without its end; the last one whole or cut in its middle."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.getmembers()[-1]
    if not last:
        return data[: member.offset_data + member.size // 2]
    return data[: member.offset_data + -(-member.size // 512) * 512]


FIRST = tar_of(("a.jpg", JPEG), ("a.json", record()))
SECOND = tar_of(("b.jpg", JPEG), ("b.json", record()))


def tar(data: bytes) -> Input:
    def write(root: Path) -> dict[str, Any]:
        (root / "sa_0.tar").write_bytes(data)
        return {"sa1b": [{"paths": [str(root / "sa_0.tar")]}]}

    return write


def folder_of_tars(root: Path) -> dict[str, Any]:
    (root / "sa_0.tar").write_bytes(FIRST)
    return {"sa1b": [{"paths": [str(root)]}]}


def two_folders(root: Path) -> dict[str, Any]:
    for folder, ending, data in (("photos", "jpg", JPEG), ("notes", "json", record())):
        (root / folder).mkdir()
        (root / folder / f"a.{ending}").write_bytes(data)
    return {"sa1b": [{"paths": [str(root / "photos"), str(root / "notes")]}]}


def same_name_in_tars(root: Path) -> dict[str, Any]:
    for name in ("sa_0.tar", "sa_1.tar"):
        (root / name).write_bytes(FIRST)
    return {"sa1b": [{"paths": [str(root / "sa_*.tar")]}]}


# Parquet


def parquet(
    cell: Callable[[bytes], Any] = lambda data: {"bytes": data, "path": "a.png"},
    other: Callable[[dict[str, Any]], Any] = lambda value: value,
) -> Input:
    """The hub's layout; `cell` makes each `mask` of the bytes of its PNG, `other` the cells beside it."""

    def write(root: Path) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (root / "photos").mkdir()
        rows = []
        for number, name in enumerate("ab", start=1):
            (root / "photos" / f"{name}.jpg").write_bytes(JPEG)
            about = {"image_id": number, "file_name": f"{name}.png", "segments_info": SEGMENTS}
            image = {"id": number, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT}
            png = cell(encoded("PNG", colors()))
            rows.append({"mask": png, "segments_info": other(about), "image_info": other(image)})
        pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")
        options = {"layout": "parquet", "annotations": [str(root / "rows.parquet")]}
        return {"coconut": [options | {"photos": [str(root / "photos")]}]}

    return write


def parquet_file(data: bytes) -> Input:
    def write(root: Path) -> dict[str, Any]:
        entry = parquet()(root)
        (root / "rows.parquet").write_bytes(data)
        return entry

    return write


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


OTHER_FILES = {
    "gzip": gzip.compress(b"{}"),
    "HTML": HTML,
    "pointer": POINTER,
    "zeros": bytes(400),
    "archive": b"PK\x03\x04" + bytes(60),
    "UTF-16": "[1]".encode("utf-16"),
}
"""What lies in the place of a JSON."""
