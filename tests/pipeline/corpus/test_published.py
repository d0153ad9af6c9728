"""What is published of a corpus says nothing of the machine that built it, and opens in what people use."""

import getpass
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from paracaption.pipeline.corpus import export, hub, ledger, merge, reader
from paracaption.schemas.published import published
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Drop
from tests import committed

PLANTED = "zz-Planted-Folder-qq"
OF_THE_MACHINE = {"config.yaml", "log", "beat", "events", "plan", "evidence", ".replaced", "corpus.json"}
"""What a build needs to go on and the card says not to publish."""


def decide(images, config):
    committed.decide(images, config)
    for image in images[:1]:
        text = f"{image.photo.url}: <Reader object at 0x7f3a12345678> cut short"
        for region in image.regions[:1]:
            region.drop = Drop("source", Reason.LABELS_UNREADABLE, text)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("machine") / PLANTED / "out"
    committed.write(out, decide=decide)
    merge.merge(out)
    return out


def contents(path: Path) -> bytes:
    """The bytes of a file, and those that a Parquet file has compressed."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            data += repr(file.read().to_pylist()).encode() + repr(file.schema_arrow.metadata).encode()
    return data


def published_files(out: Path) -> list[Path]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return [path for path in files if not OF_THE_MACHINE & set(path.relative_to(out).parts)]


def check_nothing_of_the_machine(files: list[Path], root: Path) -> None:
    """Nothing names the folder below which the tests of this run write, or the user."""
    assert files
    names = [PLANTED.encode(), str(root).encode()]
    if len(getpass.getuser()) > 4:
        names.append(getpass.getuser().encode())
    for path in files:
        data = contents(path)
        for name in names:
            assert name not in data, (path, name)
        if path.suffix in (".json", ".parquet", ".md"):
            assert not re.search(rb"0x7f[0-9a-f]{6}", data), path


@pytest.mark.soak
def test_what_is_published_has_no_path_user_or_address_of_the_machine_that_built_it(out, tmp_path_factory):
    check_nothing_of_the_machine(published_files(out), tmp_path_factory.getbasetemp())
    [first] = [row for row in pq.read_table(out / "coconut/ledger/coconut-000000.parquet").to_pylist()][:1]
    assert first["drop_detail"].endswith(".jpg: <Reader object at 0x...> cut short")
    assert first["drop_detail"].startswith(".../")


@pytest.mark.parametrize("form", list(export.FORMATS))
def test_no_export_has_a_path_user_or_address_of_the_machine_that_wrote_it(
    out, tmp_path, tmp_path_factory, form
):
    export.export(out, form, tmp_path / "to")
    written = [path for path in (tmp_path / "to").rglob("*") if path.is_file()]
    check_nothing_of_the_machine(written, tmp_path_factory.getbasetemp())


def test_no_dataset_repository_has_one_either(out, tmp_path, tmp_path_factory):
    written = hub.write_repository(hub.plan_repository(out, energon=True), tmp_path / "to")
    check_nothing_of_the_machine(written, tmp_path_factory.getbasetemp())


def test_members_of_a_shard_have_no_owner_and_no_time(out):
    for path in out.glob("*/shards/*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.uid, member.gid, member.uname, member.gname, member.mtime) == (0, 0, "", "", 0)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/ada/x/train.json", ".../train.json"),
        ("~/x", ".../x"),
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("https://ada:word@host/a?token=1", "https://host/a"),
        (["/a/b", {"c": "/d/e"}], [".../b", {"c": ".../e"}]),
        (0.5, 0.5),
        ("CC BY 4.0", "CC BY 4.0"),
    ],
)
def test_the_card_cuts_paths_to_their_names_and_urls_of_their_passwords(given, shown):
    assert published(given) == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/ada/x.json: cut", ".../x.json: cut"),
        ("annotation of a (/a/b/c.png)", "annotation of a (.../c.png)"),
        ("3/4 of 5, and/or", "3/4 of 5, and/or"),
        ("s3://bucket/a/b: gone", "s3://bucket/a/b: gone"),
    ],
)
def test_a_drops_detail_keeps_the_file_and_leaves_its_folder_out(given, shown):
    assert ledger._published(given) == shown


def test_a_shard_in_the_index_is_a_path_from_the_corpuss_folder(out):
    rows = pq.read_table(out / "index.parquet").to_pylist()
    for row in rows:
        with open(out / row["shard"], "rb") as file:
            file.seek(row["json_offset"])
            assert json.loads(file.read(row["json_length"]))["key"] == row["key"]
        assert reader.open_corpus(out).read_sample(row)[0].key == row["key"]
        early = row | {"shard": row["shard"].partition("/")[2]}
        assert reader.open_corpus(out).read_sample(early)[0].key == row["key"]


def test_coco_keeps_the_publishers_category_ids(out, tmp_path):
    target, _ = export.export(out, "coco", tmp_path / "to")
    found = json.loads(target.read_text())
    names = {each["id"]: each["name"] for each in found["categories"]}
    declared = json.loads(next(out.parent.glob("coconut-source/*.json")).read_text())["categories"]
    theirs = {each["id"]: each["name"].removesuffix("-merged") for each in declared}
    kept = {number: name for number, name in names.items() if number in theirs}
    assert kept and kept.items() <= theirs.items()
    assert all(number > max(kept) for number in names.keys() - theirs.keys())
    assert {each["category_id"] for each in found["annotations"]} == set(names)


def test_a_prefix_makes_an_exports_photos_open_from_anywhere(out, tmp_path, monkeypatch):
    to = tmp_path / "to"
    target, _ = export.export(out, "perceptiondlm-json", to, prefix=str(to))
    monkeypatch.chdir("/")
    for record in json.loads(target.read_text()):
        assert Path(record["image"]).is_file()
    target, _ = export.export(out, "coco", tmp_path / "coco", prefix=str(tmp_path / "coco"))
    assert all(Path(each["file_name"]).is_file() for each in json.loads(target.read_text())["images"])


# Real consumers.


def test_webdataset_reads_every_sample_of_the_shards(out):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    shards = sorted(map(str, out.glob("*/shards/*.tar")))
    read = [json.loads(each["json"])["key"] for each in wds.WebDataset(shards, shardshuffle=False)]
    assert read == [sample.key for sample, _ in reader.open_corpus(out).samples()]


@pytest.mark.slow
def test_datasets_reads_every_sample_of_the_shards(out, tmp_path):
    datasets = pytest.importorskip("datasets")
    shards = sorted(map(str, out.glob("*/shards/*.tar")))
    data = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path))
    assert data["__key__"][:] == [sample.key for sample, _ in reader.open_corpus(out).samples()]
    assert data[0]["jpg"].size == (128, 96) and data[0]["json"]["regions"][0]["caption"]


def test_duckdb_joins_the_index_with_the_ledgers(out):
    import duckdb

    sql = f"""SELECT count(*) FROM read_parquet('{out}/index.parquet') AS i
        JOIN read_parquet('{out}/*/ledger/*.parquet', union_by_name=true) AS l USING (subset, key, region)
        WHERE l.kept AND l.caption = i.caption"""
    found = duckdb.sql(sql)
    assert found is not None
    assert found.fetchall() == [(reader.read_summary(out).kept,)]


def read_as_fiftyone(target: Path, images: Path) -> dict[Path, list[dict[str, Any]]]:
    """The detections of each photo by the rules of `COCODetectionDatasetImporter` (fiftyone/utils/coco.py).

    These are its rules, as read in two of its versions; whoever breaks one gets an error there, or silence:

    1. An image needs `id`, `file_name`, `width` and `height`. Of two of one id or name, the last counts.
    2. `file_name` is absolute, or the path of a file below the folder of photos, at any depth.
    3. Category ids are integers from 0: labels are a list up to the largest id, in which `category_id` is the
       place. An empty list of categories is an error, a category without a name is called by its number.
    4. Annotations whose `image_id` no image has are not shown.
    5. `bbox` is four numbers, x, y, width, height in pixels.
    6. The mask is decoded from the whole photo's RLE (counts as text) and cut to the rounded `bbox`: what is
       outside is lost. A region without a mask is left out.
    7. What an annotation has besides COCO's own fields becomes a keyword argument beside `label`,
       `bounding_box`, `mask` and `confidence`, so it must be none of these. `attributes` has to be an object.
    8. A license is looked up by the image's `license` among the ids of `licenses`.
    """
    from pycocotools import mask as coco

    own = {"id", "image_id", "category_id", "bbox", "segmentation", "keypoints", "score", "area", "iscrowd"}
    found = json.loads(target.read_text())
    names = {each["id"]: each["name"] for each in found["categories"]}
    labels = [names.get(number, str(number)) for number in range(max(names) + 1)]
    below = {path.relative_to(images).as_posix(): path for path in images.rglob("*") if path.is_file()}
    by_id = {each["id"]: each for each in found["images"]}
    by_name = {each["file_name"]: each for each in by_id.values()}
    assert isinstance(found["info"], dict) and all("id" in each for each in found["licenses"])
    read: dict[Path, list[dict[str, Any]]] = {}
    for number in sorted(by_id):
        name = by_id[number]["file_name"]
        image = by_name[name]
        path = Path(name) if Path(name).is_absolute() else below[name]
        shown = read.setdefault(path, [])
        for each in found["annotations"]:
            if each["image_id"] != image["id"] or not each["segmentation"]:
                continue
            x, y, width, height = each["bbox"]
            mask = coco.decode(each["segmentation"]).astype(bool)
            cut = mask[round(y) : round(y + height), round(x) : round(x + width)]
            further = {key: value for key, value in each.items() if key not in own}
            arguments = {"label": labels[each["category_id"]], "mask": cut}
            box = [x / image["width"], y / image["height"], width / image["width"], height / image["height"]]
            shown.append(dict(**arguments, bounding_box=box, confidence=each.get("score"), **further))
            assert mask.shape == (image["height"], image["width"])
            assert isinstance(each["segmentation"]["counts"], str)
    return read


@pytest.mark.parametrize("prefixed", [False, True])
def test_fiftyones_importer_finds_every_region_with_its_label_mask_and_caption(out, tmp_path, prefixed):
    to = tmp_path / "to"
    target, images = export.export(out, "coco", to, prefix=str(to) if prefixed else "")
    read = read_as_fiftyone(target, images)
    wanted = [sample for sample, _ in reader.open_corpus(out).samples()]
    assert [path.relative_to(images).as_posix() for path in read] == [
        f"{sample.subset}/{sample.key}.jpg" for sample in wanted
    ]
    for shown, sample in zip(read.values(), wanted, strict=True):
        assert [(each["label"], each["caption"]) for each in shown] == [
            (region.category or region.core_category, region.caption) for region in sample.regions
        ]
        for each, region in zip(shown, sample.regions, strict=True):
            assert each["mask"].sum() == region.area > 0, "nothing of the mask is outside its box"
            assert all(0 <= side <= 1 for side in each["bounding_box"]) and min(each["bounding_box"][2:]) > 0
            assert set(each) - {"source_id"} == {"label", "mask", "bounding_box", "confidence", "caption"}


def test_fsspec_opens_a_corpus_behind_a_url_and_a_member_of_a_shard(out):
    import fsspec
    from PIL import Image

    memory = fsspec.filesystem("memory")
    memory.put(str(out), "/published-corpus", recursive=True)
    try:
        near = [sample for sample, _ in reader.open_corpus(out).samples()]
        for url in (f"file://{out}", "memory://published-corpus"):
            assert [sample for sample, _ in reader.open_corpus(url).samples()] == near
        shard = next(out.glob("coconut/shards/*.tar"))
        with fsspec.open(f"tar://{near[0].key}.jpg::file://{shard}", "rb") as file:
            assert Image.open(io.BytesIO(file.read())).size == (128, 96)  # type: ignore[union-attr]
    finally:
        memory.rm("/published-corpus", recursive=True)
