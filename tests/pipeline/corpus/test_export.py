import json
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from paracaption.pipeline.corpus import export, reader
from paracaption.pipeline.io import files
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests import committed


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return committed.merged(tmp_path_factory.mktemp("export") / "out")


def samples(out: Path) -> list:
    return [sample for sample, _ in reader.open_corpus(out).samples()]


def test_perceptiondlm_json_is_the_list_that_the_original_trainer_reads(out, tmp_path):
    written = export.export(out, "perceptiondlm-json", tmp_path / "to")
    assert written == [tmp_path / "to" / "annotations.json", tmp_path / "to" / "images"]
    records = json.loads(written[0].read_text())
    for record, sample in zip(records, samples(out), strict=True):
        assert set(record) == {"image", "mask_rles", "captions"}
        assert record["captions"] == [region.caption for region in sample.regions]
        with Image.open(tmp_path / "to" / record["image"]) as photo:
            for rle, region in zip(record["mask_rles"], sample.regions, strict=True):
                pixels = coco.decode(rle)
                assert pixels.shape == photo.size[::-1] and int(pixels.sum()) == region.area


def read_as_released(datasets: Path) -> dict[str, list[dict]]:
    """The records of each file of a `*_datasets.yaml`, found as the released code finds them: from here."""

    def sources(found) -> list[dict]:
        if isinstance(found, dict) and "data_file" in found:
            return [found]
        inside = found.values() if isinstance(found, dict) else found
        return [source for each in inside for source in sources(each)]

    assert str(datasets).endswith("_datasets.yaml"), "another name is taken for a file of records"
    read = {}
    for source in sources(yaml.load(datasets.read_text(), yaml.FullLoader)):
        assert source["data_type"] == "json" and source["data_file"].endswith(".json"), "others are left out"
        with open(source["data_file"]) as file:
            read[source["data_file"]] = json.load(file)
    for records in read.values():
        assert isinstance(records, list)
        for record in records:
            with Image.open(record["image"]) as photo:
                masks = [coco.decode(rle) for rle in record["mask_rles"]]
                assert {mask.shape for mask in masks} == {photo.size[::-1]} and all(map(np.any, masks))
            assert len(masks) == len(record["captions"])
    return read


@pytest.mark.parametrize("prefixed", [False, True])
def test_the_released_trainer_opens_a_file_per_subset_through_the_datasets_yaml(
    out, tmp_path, monkeypatch, prefixed
):
    to = tmp_path / "to: a folder #1"
    export.export(out, "perceptiondlm-json", to, prefix=str(to) if prefixed else "")
    monkeypatch.chdir("/" if prefixed else to)
    read = read_as_released(to / "paracaption_datasets.yaml")
    start = f"{to}/" if prefixed else ""
    assert list(read) == [f"{start}annotations/{name}_dataset.json" for name in ("coconut", "sa1b")]
    for subset, records in zip(("coconut", "sa1b"), read.values(), strict=True):
        wanted = [sample for sample in samples(out) if sample.subset == subset]
        assert [record["captions"] for record in records] == [
            [region.caption for region in sample.regions] for sample in wanted
        ]
    assert [each for records in read.values() for each in records] == json.loads(
        (to / "annotations.json").read_text()
    )


def test_the_datasets_yaml_has_the_layout_that_is_published(out, tmp_path):
    export.export(out, "perceptiondlm-json", tmp_path / "to")
    assert (tmp_path / "to" / export.DATASETS).read_text() == (
        "gar_caption:\n"
        "- data_file: annotations/coconut_dataset.json\n  data_type: json\n"
        "- data_file: annotations/sa1b_dataset.json\n  data_type: json\n"
    )


def test_photos_are_the_publishers_bytes(out, tmp_path):
    export.export(out, "perceptiondlm-json", tmp_path / "to")
    for sample, photo in reader.open_corpus(out).samples("coconut"):
        assert (tmp_path / "to/images/coconut" / f"{sample.key}.jpg").read_bytes() == photo


def test_coco_loads_with_pycocotools_and_keeps_captions(out, tmp_path, capsys):
    target, images = export.export(out, "coco", tmp_path / "to")
    loaded = COCO(target)
    regions = [(sample, region) for sample in samples(out) for region in sample.regions]
    assert len(loaded.anns) == len(regions)
    ids = {
        (row["subset"], row["key"], row["region"]): row["source_id"]
        for table in reader.open_corpus(out).ledgers()
        for row in table.to_pylist()
    }
    assert any(ids.values())
    for annotation, (sample, region) in zip(loaded.anns.values(), regions, strict=True):
        image = loaded.imgs[annotation["image_id"]]
        assert (
            image["file_name"] == f"{sample.subset}/{sample.key}.jpg"
            and (images / image["file_name"]).exists()
        )
        assert annotation.get("caption") == region.caption and annotation["bbox"] == list(region.bbox)
        assert annotation.get("source_id") == ids[sample.subset, sample.key, region.id]
        assert loaded.cats[annotation["category_id"]]["name"] == (region.category or region.core_category)
        assert int(np.sum(loaded.annToMask(annotation))) == annotation["area"] == region.area


def test_parquet_has_a_row_per_image_with_photo_and_regions(out, tmp_path):
    written = export.export(out, "parquet", tmp_path / "to")
    assert [path.name for path in written] == [
        "coconut-000000.parquet",
        "coconut-000001.parquet",
        "sa1b-000000.parquet",
    ]
    rows = [row for path in written for row in pq.read_table(path).to_pylist()]
    for row, sample in zip(rows, samples(out), strict=True):
        assert row["key"] == sample.key and len(row["regions"]) == len(sample.regions)
        assert row["regions"][0]["caption"] == sample.regions[0].caption
        assert row["regions"][0]["rle_counts"] == sample.regions[0].rle.counts
        assert row["image"]["bytes"].startswith(b"\xff\xd8")


@pytest.mark.slow
def test_parquet_decodes_photos_in_hugging_face_datasets(out, tmp_path):
    from datasets import load_dataset

    written = [str(path) for path in export.export(out, "parquet", tmp_path / "to")]
    data = load_dataset("parquet", data_files=written, split="train", cache_dir=str(tmp_path / "cache"))
    assert data[0]["image"].size == (128, 96) and data[0]["regions"][0]["rle_size"] == [96, 128]


@pytest.mark.parametrize("form", list(export.FORMATS))
def test_exporting_twice_gives_the_same_bytes(out, tmp_path, form):
    for name in ("a", "b"):
        export.export(out, form, tmp_path / name)
    first, second = (
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("a", "b")
    )
    assert first == second and first


@pytest.mark.parametrize("form", list(export.FORMATS))
def test_an_export_that_fails_leaves_nothing(tmp_path, form):
    out = committed.merged(tmp_path / "out")
    shard = out / "sa1b" / "shards" / "sa1b-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(IntegrityError, match=r"sa1b-000000\.tar"):
        export.export(out, form, tmp_path / "to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_target_with_files_in_it_is_refused_and_left_alone(out, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        export.export(out, "coco", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert export.export(out, "coco", tmp_path / "empty")[0].exists()


def test_an_unknown_format_names_those_there_are(out, tmp_path):
    with pytest.raises(ConfigError, match="perceptiondlm-json, coco, parquet"):
        export.export(out, "yolo", tmp_path / "to")


@pytest.mark.parametrize("form", list(export.FORMATS))
def test_a_corpus_without_kept_regions_exports_as_nothing(tmp_path, form):
    out = committed.unlogged(committed.merged(tmp_path / "out"))
    for path in out.glob("*/manifests/*.json"):
        path.unlink()
    written = export.export(out, form, tmp_path / "to")
    if form != "parquet":
        content = json.loads(written[0].read_text())
        assert (content if form == "perceptiondlm-json" else content["images"]) == []
    if form == "perceptiondlm-json":
        assert yaml.safe_load((tmp_path / "to" / export.DATASETS).read_text()) == {"gar_caption": []}


def test_keys_that_could_leave_the_folder_are_never_file_names(tmp_path, monkeypatch):
    out = committed.merged(tmp_path / "out")
    real = reader.iter_shard

    def hostile(shard):
        for sample, photo in real(shard):
            yield msgspec.structs.replace(sample, key="../../evil"), photo

    monkeypatch.setattr(reader, "iter_shard", hostile)
    with pytest.raises(IntegrityError, match="evil"):
        export.export(out, "perceptiondlm-json", tmp_path / "to")
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.glob(f"{files.TEMPORARY}*"))


@pytest.mark.parametrize("form", list(export.FORMATS))
def test_a_shard_that_was_cut_between_two_images_is_no_shorter_export(tmp_path, form):
    out = committed.merged(tmp_path / "out")
    unit = next(
        unit for unit in reader.open_corpus(out).units() if len(list(reader.iter_shard(unit.shard))) > 1
    )
    with tarfile.open(unit.shard) as shard:
        at = shard.getmembers()[2].offset
    data = Path(unit.shard).read_bytes()
    Path(unit.shard).write_bytes(data[: at + 32])
    with pytest.raises(IntegrityError, match="its manifest says"):
        export.export(out, form, tmp_path / "to")
    assert not (tmp_path / "to").exists()
