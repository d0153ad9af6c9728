"""What bad input gets: a build of two messy sources finishes, every bad record is listed with its reason."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

from paracaption.pipeline.corpus import merge, verify
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from tests.building import build
from tests.synthetic import CATEGORIES, jpeg, scene

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HEIGHT, WIDTH = 96, 128
MAX_PIXELS, MAX_MASKS = 20_000, 12
NUM_MANY = 100_000
PHOTO, LABELS = scene(7, num_masks=4)
IDS = (1, 2, 3, 4)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(PHOTO), "JPEG", exif=exif)


def broken_inside_png() -> bytes:
    """Header and end are fine, the pixels between are not: only decoding finds it."""
    data = bytearray(saved(Image.fromarray(PHOTO), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 200] = os.urandom(200)
    return bytes(data)


GOOD = jpeg(PHOTO)
SIXTEEN = saved(Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257), "PNG")
BOMB = saved(Image.new("1", (9_000, 9_000)), "PNG")
SMALLER = saved(Image.new("RGB", (WIDTH - 1, HEIGHT)), "JPEG")

USABLE_PHOTOS = {
    "good": GOOD,
    "rotated": rotated_jpeg(),
    "grey": saved(Image.fromarray(PHOTO).convert("L"), "JPEG"),
    "cmyk": saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
    "sixteen": SIXTEEN,
    "palette": saved(Image.fromarray(PHOTO).convert("P"), "PNG"),
    "alpha": saved(Image.fromarray(PHOTO).convert("RGBA"), "PNG"),
}
BAD_PHOTOS = {
    "truncated": (GOOD[: len(GOOD) // 2], "photo_unreadable"),
    "text": (b"<html>404 Not Found</html>", "photo_unreadable"),
    "empty": (b"", "photo_unreadable"),
    "inside": (broken_inside_png(), "photo_unreadable"),
    "bomb": (BOMB, "photo_too_large"),
    "smaller": (SMALLER, "size_mismatch"),
}


def label_png(labels: np.ndarray) -> bytes:
    channels = np.stack([labels & 255, labels >> 8 & 255, labels >> 16], axis=2).astype(np.uint8)
    return saved(Image.fromarray(channels), "PNG")


class MessyCoconut:
    """A COCO-panoptic release in which only some images are as they should be."""

    def __init__(self, root: Path):
        self.root = root
        self.documents = {"images": [], "annotations": [], "categories": CATEGORIES}
        for name in ("photos", "labels"):
            (root / name).mkdir(parents=True)

    def add(self, name, photo=GOOD, label=None, segments=None, size=(HEIGHT, WIDTH), file_name=None):
        number = len(self.documents["images"])
        if photo is not None:
            (self.root / "photos" / f"{name}.jpg").write_bytes(photo)
        if label != "missing":
            (self.root / "labels" / f"{name}.png").write_bytes(label or label_png(LABELS))
        image = {"id": number, "file_name": file_name or f"{name}.jpg", "height": size[0], "width": size[1]}
        self.documents["images"].append(image)
        if segments is None:
            segments = [{"id": i, "category_id": 1, "iscrowd": 0} for i in IDS]
        annotation = {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}
        self.documents["annotations"].append(annotation)

    def write(self) -> dict:
        text = json.dumps(self.documents).encode().replace(b"@LATIN1@", b"caf\xe9")
        (self.root / "panoptic.json").write_bytes(text)
        labels, photos = str(self.root / "labels"), [str(self.root / "photos")]
        return {"annotations": [str(self.root / "panoptic.json")], "labels": labels, "photos": photos}


def messy_coconut(root: Path) -> dict:
    release = MessyCoconut(root)
    for name, photo in USABLE_PHOTOS.items():
        release.add(name, photo)
    for name, (photo, _) in BAD_PHOTOS.items():
        release.add(name, photo)
    release.add("missing", photo=None)
    release.add("label_missing", label="missing")
    release.add("label_cut", label=label_png(LABELS)[:100])
    release.add("label_jpeg", label=GOOD)
    release.add("label_smaller", label=label_png(LABELS[:-1]))
    release.add("label_bomb", label=BOMB)
    release.add("declared_wrong", size=(HEIGHT + 1, WIDTH))
    release.add("many", segments=[{"id": i, "category_id": 1} for i in range(1, MAX_MASKS + 2)])
    release.add("../../escape", photo=None, label="missing")
    release.add("absolute", file_name="/etc/passwd.jpg")
    release.add(
        "segments",
        segments=[
            {"id": 1, "category_id": 1},
            {"id": 77, "category_id": 1},
            {"id": 0, "category_id": 1},
            {"id": 2, "category_id": 1, "iscrowd": 1},
            {"id": 3, "category_id": 4_711},
            {"id": 4, "category_id": 1, "area": float("nan")},
            {"id": 4, "category_id": 1, "category_name": "@LATIN1@"},
            {"id": "four", "category_id": 1},
            "no object",
        ],
    )
    release.add("not_a_list", segments="none")
    release.documents["annotations"].append(dict(release.documents["annotations"][0]))  # good, again
    release.documents["images"].append({"id": 999, "file_name": "lonely.jpg", "height": 9, "width": 9})
    return release.write()


def annotation(number: int, mask: np.ndarray | None = None, **changes) -> dict:
    mask = LABELS == number if mask is None else mask
    counts = coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
    scores = {"predicted_iou": 0.9, "stability_score": 0.95}
    return {"id": number, "segmentation": segmentation, **scores, **changes}


def record(annotations: list | None = None, size=(HEIGHT, WIDTH)) -> bytes:
    image = {"image_id": 1, "width": size[1], "height": size[0], "file_name": "sa.jpg"}
    annotations = [annotation(i) for i in IDS] if annotations is None else annotations
    return json.dumps({"image": image, "annotations": annotations}).encode().replace(b"@LATIN1@", b"caf\xe9")


def segmentation(counts, size=(HEIGHT, WIDTH)) -> dict:
    return {"size": list(size), "counts": counts}


BAD_MASKS = [
    (annotation(1), None),
    (annotation(2, np.zeros((HEIGHT, WIDTH))), "mask_empty"),
    (annotation(2, np.ones((2 * HEIGHT, WIDTH))), "mask_undecodable"),
    (annotation(2, segmentation=segmentation("nonsense \x00\x7f")), "mask_undecodable"),
    (annotation(2, segmentation=segmentation("ooooooooooooooooooooooooooo0")), "mask_undecodable"),
    (annotation(2, segmentation=segmentation("")), "mask_undecodable"),
    (annotation(2, segmentation=segmentation([5, -5, 1 << 62])), "mask_undecodable"),
    (annotation(2, segmentation=segmentation("04", (10**9, 10**9))), "mask_undecodable"),
    (annotation(2, segmentation=None), "mask_undecodable"),
    (annotation(2, predicted_iou=float("nan")), "mask_duplicate"),
    (annotation(2, note="@LATIN1@"), None),
    ("no object", "annotation_unreadable"),
]


def messy_sa1b(root: Path) -> dict:
    root.mkdir()
    tar = tarfile.open(root / "sa_000000.tar", "w")

    def put(name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    def pair(name: str, photo: bytes = GOOD, text: bytes | None = None) -> None:
        put(f"{name}.json", record() if text is None else text)
        put(f"{name}.jpg", photo)

    for name, photo in USABLE_PHOTOS.items():
        pair(f"sa_{name}", photo)
    for name, (photo, _) in BAD_PHOTOS.items():
        pair(f"sa_{name}", photo)
    pair("sa_masks", text=record([each for each, _ in BAD_MASKS]))
    pair("sa_nojson", text=b'{"image": {"width"')
    pair("sa_emptyjson", text=b"")
    pair("sa_list", text=b"[1, 2]")
    pair("sa_many", text=record([{"id": i} for i in range(NUM_MANY)]))
    pair("sa_declared", text=record(size=(HEIGHT, WIDTH + 2)))
    pair("other/sa_good")
    pair("../../sa_escape")
    pair("/outside/sa_absolute")
    put("sa_orphan.jpg", GOOD)
    put("sa_alone.json", record())
    link = tarfile.TarInfo("sa_link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
    put("sa_link.json", record())
    tar.close()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as second:
        for name, data in (("sa_cut.json", record()), ("sa_cut.jpg", GOOD)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            second.addfile(info, io.BytesIO(data))
        end = second.offset
    (root / "sa_000001.tar").write_bytes(whole.getvalue()[: end - 1_024])
    return {"paths": [str(root / "sa_*.tar")]}


EVERY = object()
EXPECTED = [
    *(("coconut", name, EVERY, reason) for name, (_, reason) in BAD_PHOTOS.items()),
    ("coconut", "missing", EVERY, "photo_missing"),
    ("coconut", "label_missing", EVERY, "labels_unreadable"),
    ("coconut", "label_cut", EVERY, "labels_unreadable"),
    ("coconut", "label_jpeg", EVERY, "labels_unreadable"),
    ("coconut", "label_smaller", EVERY, "size_mismatch"),
    ("coconut", "label_bomb", EVERY, "size_mismatch"),
    ("coconut", "declared_wrong", EVERY, "size_mismatch"),
    ("coconut", "many", EVERY, "too_many_masks"),
    ("coconut", "escape", EVERY, "unsafe_name"),
    ("coconut", "passwd", EVERY, "unsafe_name"),
    ("coconut", "segments", 1, "segment_absent"),
    ("coconut", "segments", 2, "void"),
    ("coconut", "segments", 3, "crowd"),
    ("coconut", "segments", 4, "unknown_category"),
    ("coconut", "segments", 6, "duplicate_key"),
    ("coconut", "segments", 7, "annotation_unreadable"),
    ("coconut", "segments", 8, "annotation_unreadable"),
    ("coconut", "not_a_list", None, "annotation_unreadable"),
    ("coconut", "good-dup2", EVERY, "duplicate_key"),
    ("coconut", "lonely", None, "annotation_missing"),
    *(("sa1b", f"sa_{name}", EVERY, reason) for name, (_, reason) in BAD_PHOTOS.items()),
    *(("sa1b", "sa_masks", number, reason) for number, (_, reason) in enumerate(BAD_MASKS) if reason),
    ("sa1b", "sa_nojson", None, "annotation_unreadable"),
    ("sa1b", "sa_emptyjson", None, "annotation_unreadable"),
    ("sa1b", "sa_list", None, "annotation_unreadable"),
    ("sa1b", "sa_many", EVERY, "too_many_masks"),
    ("sa1b", "sa_declared", EVERY, "size_mismatch"),
    ("sa1b", "sa_escape", None, "unsafe_name"),
    ("sa1b", "sa_absolute", None, "unsafe_name"),
    ("sa1b", "sa_orphan", None, "annotation_missing"),
    ("sa1b", "sa_alone", EVERY, "photo_missing"),
    ("sa1b", "sa_link", EVERY, "unsafe_name"),
    ("sa1b", "sa_cut", EVERY, "photo_unreadable"),
]


OTHER_FOLDER = ("sa1b", "other_sa_good-7c727b219bfc")
"""A pair of another folder: its key says so."""


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """The corpus of both sources: (its folder, ledger rows by subset and key)."""
    root = tmp_path_factory.mktemp("messy")
    out = root / "out"
    actors = {"num_cpus": 1, "concurrency": [1, 2]}
    config = BuildConfig.model_validate(
        {
            "out": str(out),
            "coconut": [messy_coconut(root / "coconut")],
            "sa1b": [messy_sa1b(root / "sa1b")],
            "images_per_shard": 16,
            "limits": {"max_pixels": MAX_PIXELS, "max_masks": MAX_MASKS},
            "io": actors,
            "captioner": {"name": "classical", **actors},
            "judge": {"name": "lexical", **actors},
            "segmenter": {"name": "grabcut", **actors},
            "failures": {"min_free_gb": 0, "stall_s": 120},
        }
    )
    build(config)
    merge.merge(out, config)
    rows: dict[tuple[str, str], list[dict]] = {}
    for subset in config.subsets:
        for path in sorted((out / subset / "ledger").glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                rows.setdefault((subset, row["key"]), []).append(row)
    return out, rows


def test_verify_finds_nothing_in_what_bad_input_left(messy):
    report = verify.verify(messy[0])
    assert report.ok, report.text()[:3_000]


@pytest.mark.parametrize(("subset", "key", "region", "reason"), EXPECTED)
def test_each_bad_record_is_in_the_ledger_with_its_reason(messy, subset, key, region, reason):
    rows = messy[1][subset, key]
    chosen = rows if region is EVERY else [row for row in rows if row["region"] == region]
    assert chosen and {row["drop_reason"] for row in chosen} == {reason}, rows[:3]
    assert all(row["drop_detail"] for row in chosen)
    if region is EVERY:
        assert all(row["region"] is not None for row in chosen)


def test_what_nobody_needs_may_be_odd_and_one_name_in_two_folders_is_two_images(messy):
    _, rows = messy
    no_area, odd_note = rows["coconut", "segments"][5], rows["sa1b", "sa_masks"][10]
    assert no_area["caption"] and odd_note["caption"]
    masks = [[row["rle_counts"] for row in rows[key]] for key in (OTHER_FOLDER, ("sa1b", "sa_good"))]
    assert masks[0] == masks[1] and all(row["caption"] for row in rows[OTHER_FOLDER])


def test_nothing_is_listed_that_was_not_declared_and_nothing_is_missing(messy):
    expected = {(subset, key) for subset, key, _, _ in EXPECTED} | {OTHER_FOLDER}
    expected |= {("coconut", name) for name in USABLE_PHOTOS} | {
        ("sa1b", f"sa_{name}") for name in USABLE_PHOTOS
    }
    assert set(messy[1]) == expected
    counts = Counter({key: sum(row["region"] is not None for row in rows) for key, rows in messy[1].items()})
    assert counts["sa1b", "sa_many"] == NUM_MANY
    assert counts["coconut", "many"] == MAX_MASKS + 1
    assert counts["sa1b", "sa_masks"] == len(BAD_MASKS) and counts["coconut", "segments"] == 9
    whole = {
        key: n for key, n in counts.items() if key[1].removeprefix("sa_") in {*USABLE_PHOTOS, *BAD_PHOTOS}
    }
    assert set(whole.values()) == {4} and len(whole) == 2 * (len(USABLE_PHOTOS) + len(BAD_PHOTOS))


def test_what_is_beside_a_bad_mask_is_captioned(messy):
    for key in (("coconut", "segments"), ("sa1b", "sa_masks")):
        first = messy[1][key][0]
        assert first["region"] == 0 and first["caption"], first


@pytest.mark.parametrize("name", USABLE_PHOTOS)
def test_masks_of_unusual_photos_refer_to_the_stored_pixels(messy, name):
    for subset, key in (("coconut", name), ("sa1b", f"sa_{name}")):
        rows = messy[1][subset, key]
        for number, row in zip(IDS, rows, strict=True):
            assert (row["image_height"], row["image_width"]) == (HEIGHT, WIDTH)
            mask = coco.decode({"size": [HEIGHT, WIDTH], "counts": row["rle_counts"].encode()})
            assert (mask == (number == LABELS)).all()
        captioned = [row for row in rows if row["caption"]]
        assert captioned, rows
        assert not {row["drop_reason"] for row in rows} & {"model_error", "photo_unreadable", "size_mismatch"}


def test_nothing_was_written_outside_the_output(messy):
    root = messy[0].parent
    assert {path.name for path in root.iterdir()} == {"coconut", "sa1b", "out"}
    assert not Path("/outside/sa_absolute.jpg").exists()


def test_annotations_that_are_no_json_are_one_line_with_the_file(tmp_path):
    release = messy_coconut(tmp_path / "coconut")
    path = Path(release["annotations"][0])
    path.write_bytes(path.read_bytes()[:-200])
    config = BuildConfig.model_validate({"out": str(tmp_path / "out"), "coconut": [release]})
    with pytest.raises(ConfigError) as told:
        list(open_source(config, "coconut").catalog())
    assert str(told.value).startswith(f"{path}: not JSON: ") and "\n" not in str(told.value)
