"""The cases of `../shared/cases/sources` that are words: sources of our own, and the outcome of each.

`config-kinds`, `consumers`, `key-underscores`, `photo-jpeg-trailer`, `photo-kinds`, `real-coconut-file` and
`verify-trunc`; the rest are files, which `test_sources` reads.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageOps, PngImagePlugin
from pycocotools import mask as coco

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import export, verify
from paracaption.pipeline.executor import audit
from paracaption.pipeline.io import photos
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.errors import ConfigError, IntegrityError, ParaCaptionError
from paracaption.schemas.records import Blob
from tests import backends
from tests.building import build, config_of
from tests.synthetic import scene, write_coconut, write_sa1b


def audited(config: Any) -> audit.AuditReport:
    """The audit of a configuration with one subset."""
    (subset,) = config.subsets
    return audit.audit_subset(open_source(config, subset), config.limits, jobs=1)


# config-kinds

GIVEN = {"annotations": ["./panoptic.json"], "labels": "./labels", "photos": ["./photos"]}
START = "out: ./out\nfailures: {read_retry_s: 0}\n"


def coconut(**changes: Any) -> str:
    return START + yaml.safe_dump({"coconut": [GIVEN | changes]})


CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "anchor_merge": (coconut() + "text: {<<: {min_words: 3}}\n", ""),
    "annotations_missing": (
        coconut(annotations=["./nope.json"]),
        r"annotations: nothing found at .*nope\.json;",
    ),
    "bom": (b"\xef\xbb\xbf" + coconut().encode(), ""),
    "crlf": (coconut().replace("\n", "\r\n").encode(), ""),
    "dupkey": (coconut() + "out: ./out2\n", "`out` is given twice; keep one"),
    "empty": ("", "the file is empty; `paracaption config` prints all keys"),
    "env": (coconut(photos=["$HOME/photos"]), r"photos: no folder .*\$HOME/photos; correct the path"),
    "fileurl": (coconut(photos=["file://./photos"]), ""),
    "fileurl_one_slash": (coconut(photos=["file:./photos"]), r"photos: no folder .*file:\./photos;"),
    "json_yaml": (json.dumps({"out": "./out", "coconut": [GIVEN]}), ""),
    "labels_is_file": (
        coconut(labels="./panoptic.json"),
        r"labels: .*panoptic\.json is a file; give a folder",
    ),
    "latin1": (coconut().encode() + "# café".encode("latin-1"), "not a YAML file: save it as UTF-8"),
    "list": ("- a\n- b\n", "a mapping of keys to values, but it is a list"),
    "null_photos": (coconut(photos=None), r"coconut\.0\.photos: has to be a list"),
    "photos_glob": (coconut(photos=["./ph*"]), r"photos: no folder .*ph\*; correct the path"),
    "photos_is_file": (coconut(photos=["./labels/000000000000.png"]), r"000\.png is a file; give a folder"),
    "photos_zip": (coconut(photos=["./p.zip"]), r"p\.zip is a file; give a folder \(unpack an archive\)"),
    "sa1b_jpg": (START + "sa1b: [{paths: [./photos/000000000000.jpg]}]", "not a tar: a JPEG; give the tar"),
    "sa1b_txt": (START + "sa1b: [{paths: [./list.txt]}]", r"list\.txt: not a readable tar"),
    "scalar": ("hello", "a mapping of keys to values, but it is a single value"),
    "string_not_list": (coconut(photos="./photos"), r"coconut\.0\.photos: has to be a list"),
    "tab": (START + "coconut:\n\t- x", "cannot start any token line 4, column 1"),
    "tilde": (coconut(photos=["~/photos"]), r"photos: no folder \$\{HOME\}/photos;"),
    "trailing_slash": (coconut(labels="./labels/", photos=["./photos//"]), ""),
    "typo": (
        START + "coconut: [{annotations: [a], labels: b, photo: [c]}]",
        r"coconut\.0\.photo: unknown option",
    ),
    "utf16": (coconut().encode("utf-16"), "not a YAML file: UTF-16; save it as UTF-8"),
    "weird_proto": (coconut(photos=["foo://bucket/p"]), "foo://bucket/p: .*no package reads this kind"),
    "winpath": (START + 'coconut: [{photos: ["C:\\data\\coco"]}]', "unknown escape character 'd' line 3"),
    "winpath2": (coconut(photos=["C:\\data\\coco"]), r"photos: no folder .*C:\\data\\coco;"),
}
"""What the file says, and what is said of it: "" where it is read with all that it names."""

REMOTE = {
    "s3_nocreds": (
        "s3fs",
        "s3://no-such-bucket-xyz/p",
        "NoCredentials.*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node, or for a public",
    ),
    "hf": ("huggingface_hub", "hf://datasets/x/y", "hf://datasets/x/y: .*; run the same command again when"),
}
"""The package that reads an address, and what is said where it may not or cannot."""


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("configs")
    write_coconut(root, 1, 3)
    (root / "p.zip").write_bytes(b"PK\x03\x04")
    (root / "list.txt").write_text("a.jpg\n")
    return root


@pytest.fixture(autouse=True)
def _away(monkeypatch):
    """No settings of the machine's own user, and no server that answers."""
    monkeypatch.setenv("HOME", "/home-of-none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


def told_of(folder: Path, name: str, text: str | bytes) -> str:
    """What `audit` says of a configuration, or the error that ends it."""
    path = folder / f"{name}.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        return audited(load_config(path)).text()
    except ParaCaptionError as error:
        return f"error: {error}"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_each_kind_is_read_or_has_an_error_with_file_and_key(release, name):
    text, told = CONFIGS[name]
    found = told_of(release, name, text)
    if told:
        assert found.startswith("error: ") and re.search(told, found), found
        assert len(found.splitlines()) == 1 + (name == "typo") and "unicode string" not in found
    else:
        assert found == "coconut: 1 of 1 images and 3 of 3 regions are usable"


@pytest.mark.parametrize("name", REMOTE)
def test_a_place_that_cannot_be_reached_is_one_line_with_what_is_missing(release, name):
    package, address, told = REMOTE[name]
    pytest.importorskip(package)
    found = told_of(release, name, coconut(photos=[address]))
    assert found.startswith("error: ") and re.search(told, found), found
    assert len(found.splitlines()) == 1


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(release, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    found = told_of(release, "gs", coconut(photos=["gs://bucket/p"]))
    assert found.startswith("error: ") and "gcsfs reads gs://, and is not installed" in found


# real-coconut-file


def test_the_list_of_segments_of_one_image_is_called_a_list(tmp_path):
    entry = write_coconut(tmp_path / "coconut", 1, 3)
    document = json.loads(Path(entry["annotations"][0]).read_text())
    listed = tmp_path / "demo_segments_info.json"
    listed.write_text(json.dumps(document["annotations"][0]["segments_info"]))
    config = config_of(tmp_path / "out", coconut=entry | {"annotations": [str(listed)]})
    with pytest.raises(ConfigError, match="a list, not an object; give the panoptic JSON, or the folder of"):
        audited(config)


# photo-jpeg-trailer and photo-kinds


def encoded(form: str, image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noisy(height: int = 96, width: int = 128) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


TRAILERS = {
    "plain": b"",
    "motion": b"MotionPhoto_Data\x00\x00\x00\x18ftypmp42" + bytes(range(256)) * 2000,
    "zeros": bytes(4096),
    "ones": b"\xff" * 200,
    "comment": b"<!-- served from a cache -->",
}


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_whole_photos_of_any_length_with_bytes_after_their_end_are_usable(tmp_path, form):
    size = (400, 500)
    entry = write_coconut(tmp_path / "coconut", len(TRAILERS), 3, size)
    photo = encoded(form, noisy(*size), **({"quality": 95} if form == "JPEG" else {}))
    assert len(photo) > 3 * 64 << 10, "longer than the first read"
    wanted = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB"))
    for number, trailer in enumerate(TRAILERS.values()):
        path = tmp_path / f"coconut/photos/{number:012d}.jpg"
        path.write_bytes(photo + trailer)
        assert (photos.decode(Blob(str(path)), path.read_bytes(), 10**7) == wanted).all()
    report = audited(config_of(tmp_path / "out", coconut=entry)).result
    assert (report.images_usable, report.images) == (len(TRAILERS), len(TRAILERS))


class ReadingCaptioner(backends.InstantCaptioner):
    """Looks at the photos, as a real captioner does."""

    def caption(self, images):
        for image in images:
            photos.read_pixels(image)
        return super().caption(images)


def kinds() -> dict[str, tuple[bytes, str]]:
    """Photos of many kinds of one size, and the reason for which each is dropped."""
    plain, text = noisy(), PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 2_000_000, zip=True)
    jpeg, thumbnail = encoded("JPEG", plain), encoded("JPEG", Image.new("RGB", (16, 12)))
    marked = (
        jpeg[:2] + b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail + jpeg[2:]
    )
    png = encoded("PNG", plain)
    read = {f"png-{mode}": encoded("PNG", plain.convert(mode)) for mode in ("1", "L", "LA", "P", "RGBA")}
    read |= {f"jpeg-{mode}": encoded("JPEG", plain.convert(mode)) for mode in ("L", "CMYK", "YCbCr")}
    read |= {"webp": encoded("WEBP", plain), "bmp": encoded("BMP", plain), "tiff": encoded("TIFF", plain)}
    read |= {
        "mpo": encoded("MPO", plain, append_images=[plain]),
        "apng": encoded("PNG", plain, save_all=True),
    }
    read |= {"progressive": encoded("JPEG", plain, progressive=True), "thumbnail": marked}
    bad = {
        "gif": encoded("GIF", plain),
        "ppm": encoded("PPM", plain),
        "empty": b"",
        "html": b"<html>404</html>",
    }
    bad |= {
        "heic": b"\0\0\0\x18ftypheic" + bytes(99),
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }
    bad |= {"profile": encoded("PNG", plain, icc_profile=bytes(2_000_000)), "cut": jpeg[:-400]}
    bad |= {"text": encoded("PNG", plain, pnginfo=text), "thumbnail-cut": marked[:-400], "zeros": bytes(500)}
    bad |= {"checksum": png[: len(png) // 2] + bytes([png[len(png) // 2] ^ 1]) + png[len(png) // 2 + 1 :]}
    other = {"small": encoded("JPEG", noisy(48, 64)), "turned": encoded("JPEG", noisy(128, 96))}
    return (
        {name: (data, "") for name, data in read.items()}
        | {name: (data, "photo_unreadable") for name, data in bad.items()}
        | {name: (data, "size_mismatch") for name, data in other.items()}
    )


def test_audit_and_build_agree_on_photos_of_every_kind(tmp_path):
    given = kinds()
    entry = write_coconut(tmp_path / "coconut", len(given), 3)
    for number, (data, _) in enumerate(given.values()):
        (tmp_path / f"coconut/photos/{number:012d}.jpg").write_bytes(data)
    config = config_of(tmp_path / "out", coconut=entry, images_per_shard=64)
    reading = config.captioner.model_copy(update={"name": f"{__name__}:ReadingCaptioner"})
    config = config.model_copy(update={"captioner": reading})
    dropped = [problem for problem in audited(config).result.problems if problem.drops]
    reasons = {name: reason for name, (_, reason) in given.items() if reason}
    names = list(given)
    assert {names[int(each.key)]: str(each.reason) for each in dropped} == reasons
    build(config)
    rows = pq.read_table(tmp_path / "out/coconut/ledger/coconut-000000.parquet").to_pylist()
    assert {names[int(row["key"])]: row["drop_reason"] for row in rows if not row["kept"]} == reasons
    assert Counter(names[int(row["key"])] for row in rows) == dict.fromkeys(names, 3)
    assert verify.verify(tmp_path / "out").ok


# consumers, key-underscores and verify-trunc

TURNED = 2
ODD = ("照片001", "фото", "__abc", "__meta__", ".hidden", "été", "ok")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A corpus with a photo that a tag turns, in both subsets, and names that readers pass by."""
    root = tmp_path_factory.mktemp("built")
    first = write_coconut(root / "coconut", 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene(TURNED, 3)[0]).save(
        root / f"coconut/photos/{TURNED:012d}.jpg", exif=exif, quality=85
    )
    write_sa1b(root / "tar", len(ODD), 3)
    (root / "pairs").mkdir()
    with tarfile.open(root / "tar/sa_000000.tar") as tar:
        for number, name in enumerate(ODD):
            for ending in (".jpg", ".json"):
                member = tar.extractfile(f"./sa_{number}{ending}")
                assert member is not None
                (root / f"pairs/{name}{ending}").write_bytes(member.read())
    second = {"paths": [str(root / "pairs")]}
    build(config_of(root / "out", coconut=first, sa1b=second, images_per_shard=16))
    assert verify.verify(root / "out").ok
    return root / "out"


def shard(out: Path, subset: str) -> str:
    (path,) = (out / subset / "shards").glob("*.tar")
    return str(path)


def check_fits(photo: Image.Image, rle: dict[str, Any]) -> None:
    """Readers turn a photo by its tag: what they show has a plain rectangle where the mask is."""
    shown = np.asarray(ImageOps.exif_transpose(photo).convert("L")).astype(int)
    mask: np.ndarray = coco.decode(rle)  # type: ignore[arg-type]
    assert mask.shape == shown.shape == (96, 128)
    inside = shown[mask == 1]
    assert (abs(inside - np.median(inside)) < 14).mean() > 0.9


def test_photos_fit_their_masks_in_datasets_and_no_sample_is_passed_by(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    for subset, number in (("coconut", 4), ("sa1b", len(ODD))):
        files = shard(built, subset)
        rows = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
        assert len(rows) == number
        for row in rows:
            for region in row["json"]["regions"]:
                check_fits(row["jpg"], region["rle"])
    export.export(built, "parquet", tmp_path / "parquet")
    data = str(tmp_path / "parquet/data/*.parquet")
    rows = list(datasets.load_dataset("parquet", data_files=data, split="train", streaming=True))
    assert len(rows) == 4 + len(ODD)
    for row in rows:
        for region in row["regions"]:
            image = row["image"]
            photo = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image["bytes"]))
            check_fits(photo, {"size": region["rle_size"], "counts": region["rle_counts"]})


def test_photos_fit_their_masks_in_webdataset_and_in_the_exports_files(built, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(shard(built, "sa1b"), shardshuffle=False))
    assert len(samples) == len(ODD) and not any(each["__key__"].startswith(("__", ".")) for each in samples)
    target, _ = export.export(built, "coco", tmp_path / "coco")
    found = json.loads(target.read_text())
    names = {image["id"]: image["file_name"] for image in found["images"]}
    assert len(names) == 4 + len(ODD)
    for each in found["annotations"]:
        with Image.open(tmp_path / "coco/images" / names[each["image_id"]]) as photo:
            check_fits(photo, each["segmentation"])


@pytest.mark.parametrize("form", list(export.FORMATS))
def test_no_export_is_made_of_a_shard_that_was_cut(built, tmp_path, form):
    path = Path(shard(built, "sa1b"))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        at = tar.getmembers()[4].offset
    try:
        for end in (at + 96, at):  # in the header of the third sample, and before it
            path.write_bytes(whole[:end])
            with pytest.raises(IntegrityError):
                export.export(built, form, tmp_path / "to")
            assert not (tmp_path / "to").exists()
    finally:
        path.write_bytes(whole)
