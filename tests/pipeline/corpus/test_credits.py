"""License and origin of each image travel from its source's records into all that a corpus writes."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO

from paracaption.pipeline.corpus import export, merge, reader, verify, work_list_summary, work_list_table
from paracaption.schemas.records import CREDIT_FIELDS
from tests.building import build, config_of
from tests.synthetic import write_coconut, write_sa1b

BY = {"id": 4, "name": "Attribution | License", "url": "http://creativecommons.org/licenses/by/2.0/"}
NC = {"id": 2, "name": "NonCommercial License", "url": "http://creativecommons.org/licenses/by-nc/2.0/"}
STATED = {
    0: {"license": 4, "flickr_url": "http://farm1.staticflickr.com/0.jpg", "coco_url": "http://x.org/0.jpg"},
    1: {"license": 4, "author": "Ann", "attribution": "Ann, https://ann:s3cret@x.org/1?sig=s3cret"},
    2: {"license": 2, "url": "https://x.org/2.jpg?X-Amz-Signature=s3cret"},
    3: {"license": 77},
}
NUM_IMAGES = 5


def state(source: dict, stated: dict = STATED) -> None:
    """Write licenses and origin into a panoptic JSON."""
    path = Path(source["annotations"][0])
    document = json.loads(path.read_text())
    for image in document["images"]:
        image.update(stated.get(image["id"], {}))
    path.write_text(json.dumps({"licenses": [BY, NC], **document}))


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("credits")
    source = write_coconut(root / "coconut", NUM_IMAGES)
    state(source)
    sa1b = write_sa1b(root / "sa1b", 2)
    build(config_of(root / "out", coconut=source, sa1b=sa1b, images_per_shard=3))
    merge.merge(root / "out")
    return root / "out"


def samples(out: Path, subset: str = "coconut") -> dict[str, dict]:
    found = {}
    for shard in sorted((out / subset / "shards").iterdir()):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    found[record["key"]] = record
    return found


def key(number: int) -> str:
    return f"{number:012d}"


def test_each_sample_states_its_license_and_origin_and_all_of_a_source_have_the_same_fields(out):
    found = samples(out)
    assert len(found) == NUM_IMAGES
    assert all(set(CREDIT_FIELDS) <= set(record) for record in found.values())
    first = found[key(0)]
    assert (first["license"], first["license_url"], first["license_id"]) == (BY["name"], BY["url"], "4")
    assert (first["flickr_url"], first["coco_url"]) == (STATED[0]["flickr_url"], STATED[0]["coco_url"])
    assert (found[key(1)]["author"], found[key(1)]["attribution"]) == ("Ann", "Ann, https://x.org/1")
    assert found[key(2)]["source_url"] == "https://x.org/2.jpg"
    assert (found[key(3)]["license"], found[key(3)]["license_id"]) == ("", "77")
    assert {found[key(4)][name] for name in CREDIT_FIELDS} == {""}
    assert not any(set(CREDIT_FIELDS) & set(record) for record in samples(out, "sa1b").values())


def test_ledger_and_index_have_them_by_region_and_null_where_nothing_is_stated(out):
    ledger = pq.read_table(out / "coconut/ledger/coconut-000000.parquet").to_pylist()
    index = [row for row in pq.read_table(out / "index.parquet").to_pylist() if row["subset"] == "coconut"]
    for rows in (ledger, index):
        assert {row["license"] for row in rows if row["key"] in (key(0), key(1))} == {BY["name"]}
        assert {row["license_url"] for row in rows if row["key"] == key(2)} == {NC["url"]}
    assert {row["license_id"] for row in index if row["key"] == key(3)} == {"77"}
    last = [row for row in index if row["key"] == key(4)]
    assert last and {row[name] for row in last for name in CREDIT_FIELDS} == {None}
    sa1b = pq.read_table(out / "sa1b/ledger/sa1b-000000.parquet").column_names
    assert not set(CREDIT_FIELDS) & set(sa1b)


def test_the_card_and_the_statistics_count_images_by_license(out):
    summary = reader.read_summary(out)
    counted = [(each.license, each.license_url, each.images) for each in summary.subsets["coconut"].licenses]
    assert counted == [
        (BY["name"], BY["url"], 2),
        ("", "", 1),
        (NC["name"], NC["url"], 1),
        ("id 77, not in the source's list", "", 1),
    ]
    assert summary.subsets["coconut"].num_licenses == 3
    assert summary.subsets["sa1b"].licenses == []
    card = (out / "README.md").read_text()
    assert f"| COCONut | Attribution \\| License | <{BY['url']}> | 2 |" in card
    assert "| COCONut | (none stated) |  | 1 |" in card


def test_coco_has_the_block_of_licenses_and_each_image_its_id(out, tmp_path):
    export.export(out, "coco", tmp_path / "coco")
    found = COCO(str(tmp_path / "coco/instances.json")).dataset
    assert found["licenses"] == [NC, BY, {"id": 77, "name": "77", "url": ""}]
    images = {image["file_name"].rpartition("/")[2]: image for image in found["images"]}
    assert [images[f"{key(number)}.jpg"].get("license") for number in range(5)] == [4, 4, 2, 77, None]
    assert images[f"{key(0)}.jpg"]["flickr_url"] == STATED[0]["flickr_url"]
    assert images[f"{key(1)}.jpg"]["author"] == "Ann"
    assert set(images["sa_0.jpg"]) == {"id", "file_name", "width", "height"}


def test_parquet_has_a_column_for_each_and_for_the_orientation_in_every_file(out, tmp_path):
    rows = []
    for path in export.export(out, "parquet", tmp_path / "parquet"):
        table = pq.read_table(path)
        assert {*CREDIT_FIELDS, "exif_orientation"} <= set(table.column_names)
        rows += table.to_pylist()
    found = {row["key"]: row for row in rows}
    assert (found[key(0)]["license"], found[key(0)]["coco_url"]) == (BY["name"], STATED[0]["coco_url"])
    assert found[key(4)]["license"] is None and found["sa_0"]["license"] is None
    assert {row["exif_orientation"] for row in rows} == {1}


def test_the_released_json_stays_as_it_is_and_a_file_beside_it_names_them(out, tmp_path):
    export.export(out, "perceptiondlm-json", tmp_path / "json")
    items = json.loads((tmp_path / "json/annotations.json").read_text())
    assert {name for item in items for name in item} == {"image", "mask_rles", "captions"}
    credits = {item["image"]: item for item in json.loads((tmp_path / "json/credits.json").read_text())}
    assert len(credits) == 4 and credits.keys() < {item["image"] for item in items}
    first = credits[f"images/coconut/{key(0)}.jpg"]
    assert (first["license"], first["coco_url"]) == (BY["name"], STATED[0]["coco_url"])


def test_no_secret_of_an_address_is_in_anything_that_is_written(out):
    for path in (path for path in out.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += repr(pq.read_table(path).to_pylist()).encode()
        assert b"s3cret" not in data, path


def test_verify_compares_samples_with_the_ledger(out, tmp_path):
    assert verify.verify(out).ok
    from paracaption.pipeline.corpus.verify_unit import UnitCheck, _check_shard

    unit = UnitCheck(reader.list_units(str(out / "coconut"))[0])
    rows = reader.read_ledger(unit.unit.ledger).to_pylist()
    _check_shard(unit, [row | {"license": "another"} for row in rows])
    assert {"its license or origin is not what the ledger says" in each.what for each in unit.finish()} == {
        True
    }


def test_a_source_of_which_licenses_alone_changed_resumes(tmp_path):
    source = write_coconut(tmp_path / "coconut", 3)
    state(source)
    config = config_of(tmp_path / "out", coconut=source)
    build(config)
    before = samples(tmp_path / "out")
    state(source, {0: {"license": 2}})
    build(config)
    assert samples(tmp_path / "out") == before
    planned = work_list_summary.load_work_list(tmp_path / "out" / "coconut")
    first = planned.read_unit(0)[0].credit
    assert first is not None and first.license == NC["name"]


def committed(out: Path) -> dict[str, bytes]:
    folders = ("shards", "ledger", "manifests")
    return {
        str(path.relative_to(out)): path.read_bytes() for each in folders for path in out.glob(f"*/{each}/*")
    }


@pytest.mark.parametrize("listed_again", [False, True])
def test_a_unit_that_was_planned_without_is_built_again_to_the_last_byte(tmp_path, monkeypatch, listed_again):
    source = write_coconut(tmp_path / "coconut", 3)
    state(source)
    config = config_of(tmp_path / "out", coconut=source)
    with monkeypatch.context() as early:  # an early release: its lists have no such column
        written = work_list_table.write_table
        early.setattr(work_list_table, "write_table", lambda *given: written(*given[:-1], credits=False))
        build(config)
    summary = tmp_path / "out/coconut/plan/plan.json"
    found = json.loads(summary.read_text())
    assert found.pop("credits")
    summary.write_text(json.dumps({name: value for name, value in found.items() if name != "check"}))
    before = committed(tmp_path / "out")
    assert before and not any(set(CREDIT_FIELDS) & set(each) for each in samples(tmp_path / "out").values())
    if listed_again:
        text = Path(source["annotations"][0]).read_text()
        Path(source["annotations"][0]).write_text(f"{text}\n")
    for path in (tmp_path / "out/coconut/shards").iterdir():
        path.unlink()
    build(config)
    assert committed(tmp_path / "out") == before


def test_a_license_of_two_sources_is_one_and_an_id_of_two_licenses_is_of_the_first(tmp_path):
    entries = []
    for name, licenses in (
        ("a", [BY, NC]),
        ("b", [BY | {"id": 2}, NC | {"id": 4}, {"id": 3, "name": "Own"}]),
    ):
        entries.append(write_coconut(tmp_path / name, 2))
        path = Path(entries[-1]["annotations"][0])
        document = json.loads(path.read_text().replace('"file_name": "', f'"file_name": "{name}'))
        for image, number in zip(document["images"], (4, 3 if name == "b" else 2), strict=True):
            image["license"] = number
        path.write_text(json.dumps({"licenses": licenses, **document}))
        for file in [*(tmp_path / name / "photos").iterdir(), *(tmp_path / name / "labels").iterdir()]:
            file.rename(file.with_name(f"{name}{file.name}"))
    subsets = {
        name: {"sources": entry | {"source": "coconut"}} for name, entry in zip("ab", entries, strict=True)
    }
    build(config_of(tmp_path / "out", subsets=subsets))
    export.export(tmp_path / "out", "coco", tmp_path / "coco")
    found = json.loads((tmp_path / "coco/instances.json").read_text())
    assert found["licenses"] == [NC, {"id": 3, "name": "Own", "url": ""}, BY]
    assert [image["license"] for image in found["images"]] == [4, 2, 2, 3]
