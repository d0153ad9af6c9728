"""Photos with an EXIF orientation fit their masks in shards and exports, and stay those of their source."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco

from paracaption.pipeline.corpus import export, reader, verify
from paracaption.pipeline.io import photos
from tests import backends
from tests.building import build, calls, committed, config_of
from tests.synthetic import write_coconut

TURNED = "000000000001"


class ReadingCaptioner(backends.InstantCaptioner):
    """Looks at the photos, as a real captioner does."""

    def caption(self, images):
        for image in images:
            photos.read_pixels(image)
        return super().caption(images)


@pytest.fixture(params=["InstantCaptioner", "ReadingCaptioner"])
def config(request, tmp_path):
    """A corpus of seven photos; the second one and the last two have a tag."""
    source = write_coconut(tmp_path / "source", 7)
    for key, orientation in ((TURNED, 6), ("000000000005", 8), ("000000000006", 3)):
        path = tmp_path / "source/photos" / f"{key}.jpg"
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(path) as photo:
            photo.load()
        photo.save(path, "JPEG", exif=exif, quality=85)
    made = config_of(tmp_path / "out", coconut=source, images_per_shard=7)
    name = f"{(__name__ if request.param.startswith('Reading') else backends.__name__)}:{request.param}"
    return made.model_copy(update={"captioner": made.captioner.model_copy(update={"name": name})})


def members(out: Path) -> dict[str, bytes]:
    with tarfile.open(out / "coconut/shards/coconut-000000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def check_fits(photo: bytes, rle) -> None:
    with Image.open(io.BytesIO(photo)) as opened:
        shown = np.array(ImageOps.exif_transpose(opened).convert("L")).astype(int)
    mask: np.ndarray = coco.decode(rle)  # type: ignore[arg-type]
    assert mask.shape == shown.shape == (96, 128)
    inside = shown[mask == 1]  # a rectangle of one color
    assert (abs(inside - np.median(inside)) < 12).mean() > 0.9


def test_the_shard_has_an_upright_photo_a_note_of_its_orientation_and_the_digest_of_the_source(
    config, tmp_path
):
    build(config)
    found = members(tmp_path / "out")
    records = {name: json.loads(data) for name, data in found.items() if name.endswith(".json")}
    turned = {name: record for name, record in records.items() if "exif_orientation" in record}
    noted = {name: record["exif_orientation"] for name, record in turned.items()}
    assert noted == {f"{TURNED}.json": 6, "000000000005.json": 8, "000000000006.json": 3}
    ledger = pq.read_table(tmp_path / "out/coconut/ledger/coconut-000000.parquet").to_pylist()
    for row in ledger:
        source = (tmp_path / "source/photos" / f"{row['key']}.jpg").read_bytes()
        assert row["photo_digest"] == photos.digest_of(source)
        stored = found[f"{row['key']}.jpg"]
        assert (stored == source) is (f"{row['key']}.json" not in noted) and len(stored) == len(source)
        check_fits(stored, records[f"{row['key']}.json"]["regions"][row["region"]]["rle"])
    assert verify.verify(tmp_path / "out").ok


def test_verify_finds_another_photo_in_the_place_of_an_upright_one(config, tmp_path):
    build(config)
    shard = tmp_path / "out/coconut/shards/coconut-000000.tar"
    with tarfile.open(shard) as tar:
        member = tar.getmember(f"{TURNED}.jpg")
    data = bytearray(shard.read_bytes())
    at = member.offset_data + member.size - 40
    data[at] ^= 1
    shard.write_bytes(data)
    from paracaption.pipeline.corpus.verify_unit import UnitCheck, _check_shard

    unit = UnitCheck(reader.list_units(str(tmp_path / "out/coconut"))[0])
    _check_shard(unit, reader.read_ledger(unit.unit.ledger).to_pylist())
    assert any("another photo was captioned" in problem.what for problem in unit.finish())


def test_a_unit_whose_photos_come_from_the_shard_is_the_same_again_and_no_model_is_asked(config, tmp_path):
    build(config)
    before, asked = members(tmp_path / "out"), len(calls(tmp_path / "captioner.log"))
    (tmp_path / "source/photos" / f"{TURNED}.jpg").unlink()
    (tmp_path / "source/photos/000000000006.jpg").unlink()
    build(config.model_copy(update={"text": config.text.model_copy(update={"min_words": 4})}))
    assert members(tmp_path / "out") == before
    assert len(calls(tmp_path / "captioner.log")) == asked
    assert verify.verify(tmp_path / "out").ok


def test_a_resume_is_the_same_to_the_last_byte(config, tmp_path):
    build(config)
    before = committed(tmp_path / "out")
    for manifest in (tmp_path / "out/coconut/manifests").iterdir():
        manifest.unlink()
    build(config)
    assert committed(tmp_path / "out") == before


def test_every_export_has_photos_that_fit_their_masks(config, tmp_path):
    build(config)
    for form in export.FORMATS:
        export.export(tmp_path / "out", form, tmp_path / form)
    for row in pq.read_table(tmp_path / "parquet/data").to_pylist():
        for region in row["regions"]:
            rle = {"size": region["rle_size"], "counts": region["rle_counts"]}
            check_fits(row["image"]["bytes"], rle)
    for record in json.loads((tmp_path / "perceptiondlm-json/annotations.json").read_text()):
        for rle in record["mask_rles"]:
            check_fits((tmp_path / "perceptiondlm-json" / record["image"]).read_bytes(), rle)
    instances = json.loads((tmp_path / "coco/instances.json").read_text())
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    for annotation in instances["annotations"]:
        photo = (tmp_path / "coco/images" / names[annotation["image_id"]]).read_bytes()
        check_fits(photo, annotation["segmentation"])


@pytest.mark.soak(keep=1)
def test_exports_of_a_shard_of_an_early_release_have_upright_photos_too(config, tmp_path, monkeypatch):
    from paracaption.pipeline.corpus import writer

    monkeypatch.setattr(writer, "make_upright", lambda data: (data, 1))
    build(config)
    monkeypatch.undo()
    with Image.open(io.BytesIO(members(tmp_path / "out")[f"{TURNED}.jpg"])) as photo:
        assert photo.getexif()[0x0112] == 6
    assert verify.verify(tmp_path / "out").ok
    test_every_export_has_photos_that_fit_their_masks(config, tmp_path)


def test_datasets_and_webdataset_show_photos_that_fit_their_masks(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    webdataset = pytest.importorskip("webdataset")
    build(config)
    shards = str(tmp_path / "out/coconut/shards/coconut-000000.tar")
    loaded = datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=True)
    rows = list(loaded)
    assert len(rows) == 7
    for row in rows:
        assert row["jpg"].size == (128, 96) and row["json"]["height"] == 96
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        for region in json.loads(sample["json"])["regions"]:
            check_fits(sample["jpg"], region["rle"])
