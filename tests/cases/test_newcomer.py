"""The cases of `../shared/cases/newcomer` that are about wrong results, on a corpus of our own.

Each test begins with the name of its case. `remote-fs-traceback` is among those of `test_described`;
Ctrl-C, packages, tables of the terminal, Ray and Prefect are cases of another kind.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco

from paracaption.pipeline.corpus import export, merge, reader, verify
from paracaption.schemas.errors import ParaCaptionError
from tests import building, committed
from tests.building import build, config_of
from tests.synthetic import write_coconut


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("newcomer") / "out"
    committed.write(out)
    merge.merge(out)
    return out


def test_index_shard_path_each_row_leads_to_its_sample_from_the_indexs_folder(out, monkeypatch):
    monkeypatch.chdir("/")
    rows = pq.read_table(out / "index.parquet").to_pylist()
    assert {row["subset"] for row in rows} == {"coconut", "sa1b"}
    for row in rows:
        with open(out / row["shard"], "rb") as shard:
            shard.seek(row["json_offset"])
            sample = json.loads(shard.read(row["json_length"]))
            shard.seek(row["photo_offset"])
            photo = shard.read(row["photo_length"])
        assert sample["key"] == row["key"] and photo.startswith(b"\xff\xd8")
        captions = {region["id"]: region["caption"] for region in sample["regions"]}
        assert captions[row["region"]] == row["caption"]


def test_export_relative_images_the_original_trainer_reads_it_from_any_folder(out, tmp_path, monkeypatch):
    to = tmp_path / "to"
    export.export(out, "perceptiondlm-json", to, prefix=str(to))
    monkeypatch.chdir("/")
    (found,) = to.glob("*_datasets.yaml")
    listed = [source for sources in yaml.safe_load(found.read_text()).values() for source in sources]
    assert [Path(each["data_file"]).name for each in listed] == ["coconut_dataset.json", "sa1b_dataset.json"]
    masks = 0
    for source in listed:
        for record in json.loads(Path(source["data_file"]).read_text()):
            with Image.open(record["image"]) as photo:
                shapes = {coco.decode(rle).shape for rle in record["mask_rles"]}
                assert shapes == {photo.size[::-1]}
            assert len(record["captions"]) == len(record["mask_rles"])
            masks += len(record["mask_rles"])
    assert masks == pq.read_metadata(out / "index.parquet").num_rows


def test_export_relative_images_without_a_prefix_names_are_seen_from_the_export(out, tmp_path):
    to = tmp_path / "to"
    export.export(out, "perceptiondlm-json", to)
    for path in [to / "annotations.json", *to.glob("annotations/*.json")]:
        for record in json.loads(path.read_text()):
            assert (to / record["image"]).is_file()


def two_folders(root: Path, first: str, second: str) -> dict:
    """A source whose photos lie in two folders, in the second one gray."""
    entry = root / "entry.json"
    if not entry.exists():
        entry.write_text(json.dumps(write_coconut(root / "a", 3, 3)))
        (root / "b").mkdir()
        for path in (root / "a/photos").iterdir():
            Image.open(path).convert("L").convert("RGB").save(root / "b" / path.name, quality=95)
    folders = {"a": str(root / "a/photos"), "b": str(root / "b")}
    return json.loads(entry.read_text()) | {"photos": [folders[first], folders[second]]}


def is_gray(photo: bytes) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB")).astype(int)
    return bool((abs(pixels[..., 0] - pixels[..., 1]) < 3).all())


def photos_of(out: Path) -> list[bytes]:
    return [photo for _, photo in reader.open_corpus(out).samples()]


def test_resume_ignores_source_roles_another_order_of_photos_is_refused_and_changes_nothing(tmp_path):
    (tmp_path / "source").mkdir()
    first = config_of(tmp_path / "out", coconut=two_folders(tmp_path / "source", "a", "b"))
    build(first)
    before, written = building.committed(tmp_path / "out"), (tmp_path / "out/config.yaml").read_bytes()
    turned = config_of(tmp_path / "out", coconut=two_folders(tmp_path / "source", "b", "a"))
    with pytest.raises(ParaCaptionError, match="photos"):
        build(turned)
    assert (tmp_path / "out/config.yaml").read_bytes() == written, "refused, so nothing was built with it"
    assert building.committed(tmp_path / "out") == before
    assert not any(map(is_gray, photos_of(tmp_path / "out"))) and verify.verify(tmp_path / "out").ok
    fresh = config_of(tmp_path / "fresh", coconut=two_folders(tmp_path / "source", "b", "a"))
    build(fresh)
    assert all(map(is_gray, photos_of(tmp_path / "fresh")))
